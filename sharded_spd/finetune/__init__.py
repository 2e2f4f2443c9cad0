"""The fine-tuning job: a Hugging Face checkpoint, local data, an engine, and the methods to compare."""
