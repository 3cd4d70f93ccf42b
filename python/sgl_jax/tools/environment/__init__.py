"""Facts about a machine that serves or should, and verdicts on them. No jax is imported but in a process of its own."""
