"""Choice of the rows of each step. Host only: numpy, no jax."""
