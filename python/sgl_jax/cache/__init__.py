"""Pages of KV and who owns them. Host only: numpy, no jax. The scheduler talks to `prefix_cache` alone."""
