"""The fine-tuning job: a Hugging Face checkpoint, local data, an engine, and methods side by side."""
