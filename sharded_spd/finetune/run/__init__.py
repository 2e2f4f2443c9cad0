"""A job from end to end."""
