"""One matrix: engine x world size x case, every cell against the oracle."""
