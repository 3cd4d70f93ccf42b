"""Turns tokens into text as they come, without broken characters and without the start of a stop string."""

import itertools
import types
from collections.abc import Mapping, Sequence

from tokenizers.decoders import DecodeStream

from sgl_jax.request import SamplingParams
from sgl_jax.text.tokenizer import Tokenizer

_CONTEXT = 6  # prompt tokens that are decoded, too, so that the first token keeps its leading space
_LOOK_BACK = 16  # tokens that are searched for the end of a character
_NOTHING: Mapping[int, str] = types.MappingProxyType({})
_PATIENCE = 8  # tokens without a whole character, after which the bytes are taken as they are


class IncrementalDecoder:
    """Decodes token by token. A character that needs more tokens is held back until they come."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        # Tokens whose text is already out, without those of an unfinished character at the end.
        self._context = self._whole(prompt_ids[-_CONTEXT - _LOOK_BACK :])
        self._pending: list[int] = []  # tokens whose text is held back
        self._stream = DecodeStream(ids=self._context, skip_special_tokens=skip_special_tokens)

    def push(self, token: int) -> str:
        self._pending.append(token)
        try:
            text = self._stream.step(self._tokenizer.backend, token)
        except Exception:  # "invalid prefix": the context decodes to other text when more follows
            return self.flush()
        if text is None:
            return self.flush() if len(self._pending) >= _PATIENCE else ""
        self._context, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        """Return the text that is held back, with broken characters as U+FFFD."""
        if not self._pending:
            return ""
        both = self._context + self._pending
        known = self._tokenizer.decode(self._context, self._skip)
        text = self._tokenizer.decode(both, self._skip)
        self._pending = []
        if text != known:  # after skipped tokens alone the next token would lose its leading space
            self._context = self._whole(both)
        self._stream = DecodeStream(ids=self._context, skip_special_tokens=self._skip)
        changed = (i for i, (old, new) in enumerate(zip(known, text, strict=False)) if old != new)
        return text[next(changed, min(len(known), len(text))) :]

    def _whole(self, ids: Sequence[int]) -> list[int]:
        """Return the last ids up to the end of a character: a stream would repeat a context that ends inside one."""
        for end in range(len(ids), max(len(ids) - _LOOK_BACK, 0), -1):
            context = list(ids[max(end - _CONTEXT, 0) : end])
            if not self._tokenizer.decode(context, self._skip).endswith("\ufffd"):
                return context
        return []


class StopMatcher:
    """Finds the first stop string in a text that comes in pieces. Holds back text that may be the start of one.

    Pieces may be invisible: they count for matches but never come out, except as part of a match that is kept.
    """

    def __init__(self, stops: Sequence[str], keep_match: bool = False):
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._keep_match = keep_match
        self._held, self._seen = "", b""  # text, and for each character whether it is visible
        self.matched: str | None = None

    def push(self, text: str, may_match: bool = True, visible: bool = True) -> str:
        """Return the text that can be shown now. After a match, which sets `matched`, nothing more comes out.

        Stop strings that end in a piece with `may_match` False do not count.
        """
        if not self._stops or not text:
            return text if visible else ""
        old, seen = len(self._held), self._seen + bytes([visible]) * len(text)
        text = self._held + text
        if may_match:
            ends_new = ((stop, text.find(stop, max(old - len(stop) + 1, 0))) for stop in self._stops)
            if found := [(at, -len(stop), stop) for stop, at in ends_new if at >= 0]:
                at, _, self.matched = min(found)
                self._held, self._seen = "", b""
                return _visible(text[:at], seen) + (self.matched if self._keep_match else "")
        most = min(self._longest - 1, len(text))
        held = next((k for k in range(most, 0, -1) if any(s.startswith(text[-k:]) for s in self._stops)), 0)
        out = len(text) - held
        self._held, self._seen = text[out:], seen[out:]
        return _visible(text[:out], seen)

    def flush(self) -> str:
        held, self._held, self._seen = _visible(self._held, self._seen), "", b""
        return held


def _visible(text: str, seen: bytes) -> str:
    return "".join(itertools.compress(text, seen)) if 0 in seen else text


class Detokenizer:
    """Output of one request: text without broken characters, cut at the first stop string."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        shown: Mapping[int, str] = _NOTHING,
    ):
        """`shown` has the texts of special tokens that are not skipped."""
        self._decoder = IncrementalDecoder(tokenizer, prompt_ids, params.skip_special_tokens)
        # Special tokens that are shown, or that a stop string contains.
        skipped = tokenizer.special.items() if params.skip_special_tokens and params.stop else ()
        self._special = {token: text for token, text in skipped if any(text in each for each in params.stop)}
        self._shown = shown if params.skip_special_tokens else {}
        self._special |= self._shown
        self._stops = StopMatcher(params.stop, params.include_stop_str_in_output)
        self._min_tokens = params.min_tokens  # stop strings ending in these first tokens do not count
        self._num_tokens = 0

    @property
    def matched(self) -> str | None:
        """Stop string that ended the text, if one did."""
        return self._stops.matched

    def push(self, tokens: Sequence[int]) -> tuple[str, int]:
        """Return the text that can be shown now, and how many tokens were used (all, unless a stop string came)."""
        shown = []
        for used, token in enumerate(tokens, 1):
            self._num_tokens += 1
            may_match, special = self._num_tokens > self._min_tokens, self._special.get(token)
            piece = self._decoder.push(token) if special is None else self._decoder.flush()
            shown.append(self._stops.push(piece, may_match))
            if special is not None and self._stops.matched is None:
                shown.append(self._stops.push(special, may_match, visible=token in self._shown))
            if self._stops.matched is not None:
                return "".join(shown), used
        return "".join(shown), len(tokens)

    def finish(self) -> str:
        """Return the text still held back, when no more tokens come. A stop string may be found in it."""
        shown = self._stops.push(self._decoder.flush())
        return shown if self._stops.matched is not None else shown + self._stops.flush()
