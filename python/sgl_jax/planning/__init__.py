"""Needs and costs of a launch on devices that may not be here: arithmetic, and compiling ahead of time."""
