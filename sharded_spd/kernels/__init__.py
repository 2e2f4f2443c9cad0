"""The work on elements: pulling weights. `reference` is plain torch and always there."""
