"""The independent oracle and the reader of the golden trajectories."""
