"""Converts a vocabulary in a form of its own with the transformers library, if that is installed: the last resort."""

from pathlib import Path

from tokenizers import Tokenizer

from sgl_jax.models.model_errors import ModelError


def load_with_transformers(folder: Path) -> Tokenizer:
    """Read the folder with AutoTokenizer, without running code from it. Raises ModelError."""
    instead = "give a folder with tokenizer.json with --tokenizer-path"
    try:
        from transformers import AutoTokenizer  # pyrefly: ignore[missing-import]
    except ImportError as error:
        raise ModelError(
            f"{folder} has no tokenizer.json, *.tiktoken or tokenizer.model; {instead}, or install transformers "
            "(the extra sgl-jax[transformers]), which may be able to convert what is there"
        ) from error
    try:
        backend = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False).backend_tokenizer
        return Tokenizer.from_str(backend.to_str())
    except Exception as error:  # whatever its converters raise, it means one thing here
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"transformers cannot convert the tokenizer of {folder} ({reason}); {instead}") from error
