"""The parts of a batch job: sources, layout, prompts, results, journal, store, pipeline, progress."""
