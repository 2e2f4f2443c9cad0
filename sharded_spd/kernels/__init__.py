"""The work on elements: forming statistics and pulling weights. `reference` is plain torch and always there."""
