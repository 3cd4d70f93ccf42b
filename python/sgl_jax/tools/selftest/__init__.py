"""Checks that `check_env --selftest` runs on a machine's own devices: kernels against references, and speed against bounds."""
