"""Flags of a launch: their declarations, the readers of command line, environment and file, and downloads of models."""
