"""Attention for TPU: two Pallas kernels over the paged pool (docs/features/attention_backend.md)."""
