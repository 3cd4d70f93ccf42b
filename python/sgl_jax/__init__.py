"""Serve large language models with JAX."""
