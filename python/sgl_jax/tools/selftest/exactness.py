"""Greedy tokens of a small model in float32 on two platforms: they are equal, but for ties that rounding decides."""

import dataclasses
from collections.abc import Sequence

import msgspec
import numpy as np

from sgl_jax.engine.messages import Generate, TokenLogprobs
from sgl_jax.engine.startup import build_core
from sgl_jax.request import SamplingParams
from sgl_jax.runtime.platform import Name
from sgl_jax.tools.selftest.numerics import ALLOWED, results_of, small_model

_PROMPTS = (3, 50)  # tokens of each; the second is computed in chunks
_OUTPUT = 32  # tokens


class GreedyAnswer(msgspec.Struct, frozen=True):
    """Greedy tokens of one prompt, and the log probability of each with those of the best two there."""

    tokens: list[int]
    logprobs: list[TokenLogprobs]


@dataclasses.dataclass(frozen=True)
class Comparison:
    tokens: int  # in all answers
    equal: int  # equal ones, up to an answer's first difference
    largest_difference: float | None  # between log probabilities of equal tokens; None: one is not a number
    gaps: list[float]  # at each answer's first difference, how much better the reference found its token than the next

    @property
    def passed(self) -> bool:
        """Whether nothing differs by more than rounding: a tie is a gap that two values' differences can close."""
        difference = self.largest_difference
        return (
            difference is not None
            and difference <= ALLOWED["float32"]
            and max(self.gaps, default=0.0) <= 2 * ALLOWED["float32"]
        )


def greedy_answers(platform: Name | None, tp_size: int, attention_backend: str | None) -> list[GreedyAnswer]:
    """Let the small model answer in float32. Raises ValueError for a flag that cannot be honoured."""
    with small_model(platform, tp_size) as args:
        core = build_core(dataclasses.replace(args, dtype="float32", attention_backend=attention_backend))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, core.info.vocab_size, length).tolist() for length in _PROMPTS]
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=_OUTPUT, logprobs=2)
    answers = [GreedyAnswer([], []) for _ in prompts]
    for output in results_of(core, [Generate(key, prompt, params) for key, prompt in enumerate(prompts)]):
        for at, (key, token) in enumerate(zip(output.keys, output.tokens, strict=True)):
            answers[key].tokens.append(token)
            answers[key].logprobs.append(output.logprobs[at])
    core.close()
    return answers


def compare(reference: Sequence[GreedyAnswer], found: Sequence[GreedyAnswer]) -> Comparison:
    """Compare answers up to the first token that differs: what follows has another prompt."""
    equal, differences, gaps = 0, [0.0], []
    for wanted, answer in zip(reference, found, strict=True):
        same = np.equal(wanted.tokens, answer.tokens)
        length = len(same) if same.all() else int(same.argmin())
        equal += length
        for each, other in zip(wanted.logprobs[:length], answer.logprobs[:length], strict=True):
            differences.append(abs(each.logprob - other.logprob))
        if length < len(same):
            best, second = wanted.logprobs[length].top_logprobs
            gaps.append(best - second)
    largest = float(np.max(differences))
    tokens = sum(len(each.tokens) for each in reference)
    return Comparison(tokens, equal, None if np.isnan(largest) else largest, gaps)
