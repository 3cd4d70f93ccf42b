"""Reads a model's answer as it comes: thoughts, text and tool calls, in the format of each model family."""
