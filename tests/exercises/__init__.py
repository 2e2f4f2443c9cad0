"""What a newcomer writes, following CONTRIBUTING.md: one new file for a rule, one for an engine."""
