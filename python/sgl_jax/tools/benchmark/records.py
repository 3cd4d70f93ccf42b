"""Requests of a benchmark and what came of them: the plain data between data sets, clients and reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Prompt:
    """One request to send."""

    prompt: str | list[int] | list[dict[str, str]]  # text, token ids, or chat messages
    prompt_len: int  # tokens, as the tokenizer at hand counts them
    output_len: int  # tokens to generate
    arrival_s: float | None = None  # seconds after the start of the run, in data sets that carry times

    @property
    def kind(self) -> Literal["text", "ids", "messages"]:
        if isinstance(self.prompt, str):
            return "text"
        return "messages" if self.prompt and isinstance(self.prompt[0], dict) else "ids"


@dataclass
class Outcome:
    """The outcome of one request. Times are seconds on the event loop's clock.

    `itl_s` has one gap per token after the first event; tokens that arrive together share their gap equally.
    """

    prompt_len: int
    sent_s: float
    error: str = ""  # why it failed; empty when it did not
    text: str = ""
    output_len: int = 0  # tokens generated, as the server counts them
    ttft_s: float | None = None  # from sending to the first token; None: the answer came in one piece
    latency_s: float = 0.0  # from sending to the end of the answer
    itl_s: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None  # as the server counts; None: it does not tell
    cached_tokens: int | None = None  # None: the server does not tell

    @property
    def ok(self) -> bool:
        return not self.error
