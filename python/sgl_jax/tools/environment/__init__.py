"""Facts about a machine: what it has for serving, and what keeps it from it. Nothing here imports jax: probe.py does, in a process of
its own, so that a broken or hanging installation can still be described."""
