"""Attention on CPUs by a library that is compiled when the package is installed."""
