"""Applications over the engine: batch jobs, evaluation back ends, data wrangling, completion."""
