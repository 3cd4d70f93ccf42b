"""Log probabilities in OpenAI's older format, whose `text_offset` says where each token begins in the choice's text."""

from collections.abc import Sequence

from sgl_jax.engine.generation import GenerationRequest
from sgl_jax.engine.messages import TokenLogprobs
from sgl_jax.engine.native_params import finite
from sgl_jax.server.responses import CompletionLogprobs
from sgl_jax.text.detokenizer import IncrementalDecoder
from sgl_jax.text.tokenizer import Tokenizer

_DRIFT = 8  # characters that a tokenizer may drop or compose before a token, such as repeated spaces


def prompt_offsets(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> list[int]:
    """Return where each token begins in the prompt's text, in characters.

    A BOS that the text does not show takes no room, nor does a leading space that decoding drops. The tokens of one
    character share its place.
    """
    decoder = IncrementalDecoder(tokenizer, (), skip_special_tokens=text == tokenizer.decode(ids))
    found, at = [], 0
    for token in ids:
        found.append(at)
        at = _end(text, at, decoder.push(token), tokenizer.is_added(token))
    return found


def _end(text: str, at: int, piece: str, is_added: bool) -> int:
    """Return where a piece that begins at `at`, or a little later, ends in the text."""
    if text.startswith(piece, at):
        return at + len(piece)
    shown = piece.strip()
    if is_added or not shown:  # a BOS, or a space, that the text does not have
        return at
    place = text.find(shown, at, at + len(piece) + _DRIFT)
    return place + len(shown) if place >= 0 else min(at + len(piece), len(text))


class CompletionScores:
    """Scores of a choice's tokens as they come. A token is handed out when the text has reached its place: a stop string
    may cut the text before that."""

    def __init__(self, tokenizer: Tokenizer, request: GenerationRequest, echoed: Sequence[int], length: int):
        """`echoed` are the offsets of the prompt's tokens, if they come first, and `length` is that of their text."""
        self._tokenizer = tokenizer
        self._decoder = IncrementalDecoder(tokenizer, request.prompt_ids, request.params.skip_special_tokens)
        self._echoed = iter(echoed)
        self._length, self._shown = length, 0  # characters of the tokens so far, and of the text
        self._waiting: list[tuple[int, int, TokenLogprobs | None]] = []  # offset, token and score

    def add(
        self, tokens: Sequence[int], scores: Sequence[TokenLogprobs | None], text: str, is_last: bool
    ) -> CompletionLogprobs | None:
        """Return the scores of the tokens whose places are known with this text; None if there are none."""
        for token, score in zip(tokens, scores, strict=True):
            offset = next(self._echoed, None)
            if offset is None:
                offset = self._length
                self._length += len(self._decoder.push(token))
            self._waiting.append((offset, token, score))
        self._shown += len(text)
        ready = [entry for entry in self._waiting if is_last or entry[0] <= self._shown]
        self._waiting = self._waiting[len(ready) :]  # offsets never fall
        found = CompletionLogprobs([], [], [], [])
        for offset, token, score in ready:
            found.text_offset.append(min(offset, self._shown))
            self._append(found, token, score)
        return found if ready or is_last else None

    def _append(self, found: CompletionLogprobs, token: int, score: TokenLogprobs | None) -> None:
        text = self._tokenizer.token_text(token)
        found.tokens.append(text)
        if score is None:
            found.token_logprobs.append(None)
            found.top_logprobs.append(None)
            return
        best = {text: finite(score.logprob)}  # the token itself is always among them, as in OpenAI's answers
        for other, logprob in zip(score.top_ids, score.top_logprobs, strict=True):
            best.setdefault(self._tokenizer.token_text(other), finite(logprob))
        found.token_logprobs.append(finite(score.logprob))
        found.top_logprobs.append(best)
