"""What a job trains and is scored on."""
