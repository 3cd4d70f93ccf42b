"""Flags that say what requests get: text, or a vector."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from sgl_jax.settings.flags import flag


@dataclass(frozen=True, kw_only=True)
class TaskFlags:
    """Flags about the task of a launch, which either generates or makes vectors."""

    task: Literal["generate", "embed", "classify", "score"] | None = flag(
        None,
        "what requests get (docs/features/embeddings.md): text; the prompt's vector; logits of the checkpoint's labels; or a "
        "score, from those of the tokens no and yes",
        unset="embed for sentence-transformers' folders, classify for sequence classifiers, else generate",
        refused={"embedding": "write embed", "reward": "write classify"},
        group="Model and tokenizer",
    )
    is_embedding: bool = flag(False, "the same as --task embed; with a sequence classifier, as --task classify")

    def misfits_of_task(self, speculative_flag: str | None) -> Iterator[str]:
        """Say which values do not fit together, a sentence each, the flag first."""
        if self.is_embedding and self.task == "generate":
            yield "--is-embedding cannot be had with --task generate; leave one out"
        pools = f"--task {self.task}" if self.task not in (None, "generate") else "--is-embedding"
        if speculative_flag is not None and (self.is_embedding or pools != "--is-embedding"):
            yield f"{speculative_flag} cannot be had with {pools}, which generates no tokens; leave one out"
