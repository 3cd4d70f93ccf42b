"""`python -m sgl_jax` is `python -m sgl_jax.launch_server`."""

import sys

from sgl_jax.launch_server import main

if __name__ == "__main__":
    sys.exit(main())
