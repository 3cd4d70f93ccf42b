"""`python -m sgl_jax.run_batch -i in.jsonl -o out.jsonl --model-path …`: answers a file of requests; docs/features/batch_files.md."""

import sys

from sgl_jax.tools.batch.batch_command import main

if __name__ == "__main__":
    sys.exit(main())
