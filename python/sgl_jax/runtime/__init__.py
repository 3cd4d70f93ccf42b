"""The device side: memory, buckets, the compiled step, sampling."""
