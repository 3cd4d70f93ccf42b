"""Who runs next. Host only: numpy, no jax."""
