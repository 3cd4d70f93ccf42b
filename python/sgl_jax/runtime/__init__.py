"""Device side of the engine: memory, buckets, the compiled step, sampling."""
