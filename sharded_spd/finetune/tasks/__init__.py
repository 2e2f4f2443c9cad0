"""A job's tasks: models and scores."""
