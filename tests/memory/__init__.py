"""Peak memory, measured in processes of their own."""
