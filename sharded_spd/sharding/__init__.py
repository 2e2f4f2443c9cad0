"""Which elements of which layer a rank holds, and how ranks reach agreement."""
