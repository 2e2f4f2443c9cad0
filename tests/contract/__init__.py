"""Bad input on several ranks: a clear error on every rank and no hang."""
