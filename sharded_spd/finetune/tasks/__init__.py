"""What a job learns: its model and its scores."""
