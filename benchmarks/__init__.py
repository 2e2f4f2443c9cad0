"""Benchmarks: what the projection costs, and what it keeps."""
