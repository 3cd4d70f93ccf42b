"""The answers of GPT-OSS: messages with a header each, which names a channel and perhaps a recipient."""

import re

from sgl_jax.text.tool_calls.pieces import Emit, Waiting
from sgl_jax.text.tool_calls.reading import Reading

_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_HEADS = ("<|start|>", "<|channel|>")
_BODY = "<|message|>"
MARKERS = (*_ENDS, *_HEADS, _BODY, "<|constrain|>")

_RECIPIENT = re.compile(r"to=([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")


def harmony(reading: Reading, show_thoughts: bool) -> Waiting[None]:
    """Read a whole answer. A header may be missing or broken: what follows it is content then.

    `show_thoughts`: thoughts are part of the content.
    """
    source, answer = reading.source, reading.answer
    while word := (yield from source.until((*_HEADS, _BODY, *_ENDS), answer.text)):
        if word in _ENDS:
            continue
        header, end = ("", word) if word == _BODY else (yield from source.read_until((_BODY, *_ENDS)))
        if end != _BODY:
            continue
        recipient = _RECIPIENT.search(header)
        name = recipient[1].removeprefix("functions.") if recipient else ""
        channel = _CHANNEL.findall(word + header)[-1:]
        if recipient and reading.tools and (name in reading.tools or recipient[1].startswith("functions.")):
            answer.call(name)
            rest: Emit = answer.arguments
            whole = False
            if (yield from source.skip_space()) == "{":
                whole = yield from source.nested(answer.arguments)
                rest = lambda text: None  # noqa: E731
            last = yield from source.until((*_ENDS, *_HEADS), rest)
            answer.end_call(whole or bool(last))
        elif channel == ["analysis"] and not show_thoughts:
            answer.begin_thought(source.position)
            last = yield from source.until((*_ENDS, *_HEADS), answer.thought)
            answer.end_thought(source.position - len(last))
        else:
            if not answer.fresh:
                answer.text("\n")
            last = yield from source.until((*_ENDS, *_HEADS), answer.text)
        source.back(last if last in _HEADS else "")
