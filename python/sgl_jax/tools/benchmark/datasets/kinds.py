"""Kinds of prompts: text cut to a length, drawn token ids, groups that share a system prompt, files, and traces.

Mooncake's traces (FAST'25) are JSON lines of timestamp (ms), input_length, output_length and hash_ids, one for each block
of 512 tokens. Their prompts are made up: equal ids stand for equal blocks, so they share what the trace shares.
"""

import itertools
from argparse import Namespace
from collections.abc import Iterator
from typing import Annotated

import msgspec
from numpy.random import Generator, default_rng

from sgl_jax.text.tokenizer import Tokenizer
from sgl_jax.tools.benchmark.datasets.source import IdSource, TextSource
from sgl_jax.tools.benchmark.protocols import Prompt
from sgl_jax.tools.benchmark.terminal import BenchmarkError

_BETWEEN = "\n\n"  # system prompt and question
_BLOCK = 512  # tokens one hash id stands for

# Limits of published results with ShareGPT, in tokens: conversations beyond them are left out.
_SHORTEST = 4
_LONGEST_PROMPT, _LONGEST_TOTAL = 1024, 2048
_USERS = ("human", "user")


def random_texts(args: Namespace, tokenizer: Tokenizer, rng: Generator, count: int) -> list[Prompt]:
    """Make prompts of drawn lengths, each beginning at another word of the text."""
    source = TextSource(tokenizer, rng, args.dataset_path)
    lengths = _drawn_lengths(args, rng, count, shortest=len(tokenizer.encode("")) + 1)
    return [Prompt(source.piece(n), n, out) for n, out in lengths]


def random_ids(args: Namespace, source: IdSource, rng: Generator, count: int) -> list[Prompt]:
    return [Prompt(source.ids(n), n, out) for n, out in _drawn_lengths(args, rng, count, shortest=1)]


def _drawn_lengths(args: Namespace, rng: Generator, count: int, shortest: int) -> list[tuple[int, int]]:
    """Draw (input, output) lengths, each drawn evenly from [ratio x most, most]."""

    def draw(most: int, least: int) -> list[int]:
        low = min(max(int(most * args.random_range_ratio), least), most)
        return rng.integers(low, most + 1, count).tolist()

    return list(zip(draw(args.random_input_len, shortest), draw(args.random_output_len, 1), strict=True))


def shared_prefixes(args: Namespace, tokenizer: Tokenizer, rng: Generator, most: int) -> list[Prompt]:
    """Make groups of prompts in a drawn order; those of a group begin with the same --gsp-system-prompt-len tokens.

    A prompt has exactly --gsp-system-prompt-len plus --gsp-question-len tokens, BOS included.
    """
    source = TextSource(tokenizer, rng)
    num_tokens = args.gsp_system_prompt_len + args.gsp_question_len
    prompts = []
    for _ in range(args.gsp_num_groups):
        system = source.piece(args.gsp_system_prompt_len) + _BETWEEN
        for _ in range(args.gsp_prompts_per_group):
            prompts.append(Prompt(source.piece(num_tokens, system), num_tokens, args.gsp_output_len))
    return [prompts[i] for i in rng.permutation(len(prompts))]


class Turn(msgspec.Struct, rename={"speaker": "from"}):
    speaker: str
    value: str


class Conversation(msgspec.Struct):
    """Entry of a ShareGPT file."""

    conversations: list[Turn]


_Count = Annotated[int, msgspec.Meta(ge=1)]


class CustomLine(msgspec.Struct):
    """Line of a file of one's own: text or token ids, and how much to generate unless --sharegpt-output-len says it."""

    prompt: Annotated[str, msgspec.Meta(min_length=1)] | Annotated[list[int], msgspec.Meta(min_length=1)]
    output_len: _Count | None = None


class MooncakeLine(msgspec.Struct):
    """Request of a trace, as it is written."""

    timestamp: float  # ms
    input_length: _Count
    output_length: _Count
    hash_ids: list[int]


def sharegpt(args: Namespace, tokenizer: Tokenizer, rng: Generator, most: int) -> Iterator[Prompt]:
    """Yield the first question of each conversation, in a drawn order; the answer says how much to generate.

    Left out: under 4 tokens of either, and over 1024 of the prompt or 2048 together, or over --sharegpt-context-len
    together where that is given.
    """
    exchanges = _exchanges(args.dataset_path)
    longest = args.sharegpt_context_len or _LONGEST_TOTAL
    longest_prompt = args.sharegpt_context_len or _LONGEST_PROMPT
    for i in rng.permutation(len(exchanges)):
        question, answer = exchanges[i]
        prompt_len = len(tokenizer.encode(question))
        output_len = args.sharegpt_output_len or len(tokenizer.encode(answer, add_special_tokens=False))
        fits = prompt_len <= longest_prompt and prompt_len + output_len <= longest
        if fits and min(prompt_len, output_len) >= _SHORTEST:
            yield Prompt(question, prompt_len, output_len)


def _exchanges(path: str) -> list[tuple[str, str]]:
    """Return the first question and its answer of each conversation that has them."""
    with open(path, "rb") as file:
        entries = _decoded(path, file.read(), list[msgspec.Raw], "a list; JSON lines are --dataset-name custom")
    found = []
    for i, entry in enumerate(entries):
        form = '{"conversations": [{"from": …, "value": …}, …]}'
        turns = _decoded(f"{path}: entry {i}", entry, Conversation, form).conversations
        for turn, reply in itertools.pairwise(turns):
            if turn.speaker in _USERS and reply.speaker not in _USERS:
                found.append((turn.value, reply.value))
                break
    return found


def _lines[T: msgspec.Struct](path: str, kind: type[T]) -> Iterator[tuple[str, T]]:
    """Yield (file and line number for messages, content) of each line that is not empty."""
    form = f"JSON of {', '.join(kind.__struct_fields__)}"
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                place = f"{path} line {number}"
                yield place, _decoded(place, line, kind, form)


def _decoded[T](place: str, content: str | bytes | msgspec.Raw, kind: type[T], form: str) -> T:
    """Decode JSON. Raises BenchmarkError, which says the form that it should have."""
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.DecodeError as error:
        raise BenchmarkError(f"{place} is not {form}: {error}") from error


def custom(args: Namespace, tokenizer: Tokenizer, rng: Generator, most: int) -> Iterator[Prompt]:
    """Yield the file's lines in their order; nothing is drawn. Left out: what is over --sharegpt-context-len."""
    for place, line in _lines(args.dataset_path, CustomLine):
        ids = tokenizer.encode(line.prompt) if isinstance(line.prompt, str) else line.prompt
        prompt_len, output_len = len(ids), args.sharegpt_output_len or line.output_len
        if output_len is None:
            raise BenchmarkError(f'{place}: no "output_len" says how much to generate; give --sharegpt-output-len')
        if args.sharegpt_context_len is None or prompt_len + output_len <= args.sharegpt_context_len:
            yield Prompt(line.prompt, prompt_len, output_len)


def mooncake(args: Namespace, source: IdSource, rng: Generator, most: int) -> list[Prompt]:
    """Make prompts of the first lines of the file in order of arrival; the first arrives at 0."""
    calls = []
    for place, call in itertools.islice(_lines(args.dataset_path, MooncakeLine), most):
        if len(call.hash_ids) != -(-call.input_length // _BLOCK):
            blocks = f"{call.input_length} tokens in blocks of {_BLOCK}"
            raise BenchmarkError(f"{place}: {blocks}, but {len(call.hash_ids)} hash_ids")
        calls.append(call)
    calls.sort(key=lambda call: call.timestamp)
    blocks_key = int(rng.integers(2**63))
    prompts = []
    for call in calls:
        blocks = (source.ids(_BLOCK, default_rng((blocks_key, hash_id))) for hash_id in call.hash_ids)
        ids = list(itertools.islice(itertools.chain.from_iterable(blocks), call.input_length))
        arrival_s = (call.timestamp - calls[0].timestamp) / 1000 * args.mooncake_slowdown_factor
        prompts.append(Prompt(ids, call.input_length, call.output_length, arrival_s))
    return prompts
