"""The files that a job writes about itself."""
