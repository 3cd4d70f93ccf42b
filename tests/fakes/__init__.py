"""Fakes for tests, whose output can be computed by hand."""
