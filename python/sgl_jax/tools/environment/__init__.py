"""Facts about a machine that serves or should, and verdicts on them.

Nothing here imports jax but probe.py, in a process of its own: a broken or hanging installation can still be described.
"""
