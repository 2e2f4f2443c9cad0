"""What users construct: AdamSPD, and attach for any other optimizer."""
