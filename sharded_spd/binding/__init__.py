"""What each layer is anchored at."""
