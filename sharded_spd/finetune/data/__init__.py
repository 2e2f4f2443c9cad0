"""The data that a job trains on and is scored on."""
