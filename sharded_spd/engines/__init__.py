"""Engines: which elements of which layer this rank holds, and over which groups to sum. Layout only."""
