"""How a job's model is spread over the ranks."""
