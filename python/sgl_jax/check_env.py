"""`python -m sgl_jax.check_env`: says what this machine has for serving, whether TPU, GPU and CPU can be used, and if
not, why and what to do. Works whatever is missing, jax included; also as `check_env.check_env()`.
"""

import sys

from sgl_jax.tools.environment.check_command import check_env, look, main

__all__ = ["check_env", "look", "main"]

if __name__ == "__main__":
    sys.exit(main())
