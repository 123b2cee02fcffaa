"""The modules of batch jobs: sources, layout, prompts, results, journal, store, pipeline, progress."""
