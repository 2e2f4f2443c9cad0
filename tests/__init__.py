"""Tests of the package; `pytest tests` from the repository root."""
