"""Benchmarks, the check of an environment and the self-test: nothing here is imported by a server."""
