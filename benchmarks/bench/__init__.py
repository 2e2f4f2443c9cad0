"""What the two benchmarks share: shapes, variants, clocks, ranks and the machine's description."""
