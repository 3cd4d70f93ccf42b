"""Pages of KV and their owners. Host only: numpy, no jax. The scheduler uses `prefix_cache` alone."""
