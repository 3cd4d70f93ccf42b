"""`python fake_launcher.py FACTORY [flags]`: the real server around a fake engine core of fake_engines."""

import sys

from sgl_jax.observability import log
from sgl_jax.server.lifecycle import serve
from sgl_jax.settings.server_args import ServerArgs

if __name__ == "__main__":
    args = ServerArgs.from_cli(sys.argv[2:])
    log.setup(args.log_level)
    sys.exit(serve(args, core_factory=f"fake_engines:{sys.argv[1]}"))
