"""Stand-ins for tests: what they produce can be computed by hand."""
