"""Sampling parameters of a request, declared once, and plain host data about a request that all rooms share."""

import dataclasses
import functools
import math
import numbers
import time
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple, Self

import msgspec
import numpy as np

MAX_LOGPROBS = 20  # OpenAI's limit; the step program always returns this many candidates
MAX_LOGIT_BIAS, MAX_STOP_TOKENS, MAX_EOS_TOKENS = 1024, 64, 16  # entries of a device row
MAX_GRAMMAR_LENGTH = 1 << 20  # characters of a grammar or schema
MAX_STOPS, MAX_STOP_LENGTH = 64, 1024  # stop strings, and characters of each: every token's text is searched for all
_MAX_INT32 = 2**31 - 1  # the largest number a device row can hold

type Json = bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None
type Api = Literal["native", "openai"]
type Names = Mapping[str, str]  # our name of a field -> the name that the user wrote, where it differs


class InvalidParameter(ValueError):
    """A request's parameter cannot be honoured; `param` names the field.

    With `values` the message is a template. {limit} stands for values["limit"]. A name in braces that is not among the
    values names a field, for which `named` writes the user's own name.
    """

    def __init__(self, param: str, message: str, **values: object):
        self.param, self.template, self.values = param, message, values
        super().__init__(self._text({}))

    def named(self, names: Names) -> Self:
        """Return the error with the user's names of fields."""
        return type(self)(names.get(self.param, self.param), self._text(names))

    def _text(self, names: Names) -> str:
        return self.template.format_map(_Words({**names, **self.values})) if self.values else self.template


class _Words(dict[str, object]):
    """Values of a template; a name without a value stands for itself."""

    def __missing__(self, name: str) -> str:
        return name


class Grammar(NamedTuple):
    """Language that an answer must belong to, as the request wrote it."""

    kind: str  # the field of SamplingParams
    text: str


class About(NamedTuple):
    """Declaration of a sampling parameter, beyond its name, type and default. `low` and `high` limit a number, or each
    value of a dictionary; `entries` limits the length of a list or dictionary."""

    help: str
    low: float | None = None
    high: float | None = None
    column: str = ""  # name of the step_plan.Param that holds it on the device
    above: bool = False  # `low` itself is refused
    must: str = ""  # completes "it must …" where the limits do not say it well
    entries: int | None = None
    native: str | None = None  # its names in the native API, the preferred one first; None: the field's name
    openai: str | None = None  # likewise in OpenAI's; empty: absent, or written in a form of its own


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Parameters that choose tokens and end the text.

    A field declares its parameter once; checks, both APIs, device columns and documentation derive from it. The device
    applies them in Hugging Face's order: logit_bias, penalties, a grammar's mask, temperature, top_k, top_p, min_p.
    """

    max_tokens: Annotated[
        int | None,
        About(
            "most tokens (0: only the prompt is computed); if not set what fits, natively at most 128, in completions 16",
            low=0,
            native="max_new_tokens max_tokens",
            openai="",
        ),
    ] = None
    min_tokens: Annotated[
        int, About("eos and stop_token_ids cannot be sampled before", 0, _MAX_INT32, native="min_new_tokens min_tokens")
    ] = 0
    temperature: Annotated[float, About("0 is greedy", 0.0, 1e4, "TEMPERATURE")] = 1.0
    top_p: Annotated[
        float, About("keeps the likeliest tokens whose probabilities sum to it", 0.0, 1.0, "TOP_P", above=True)
    ] = 1.0
    top_k: Annotated[int, About("keeps so many of the likeliest tokens; -1 or 0 is off", -1, _MAX_INT32, "TOP_K")] = -1
    min_p: Annotated[float, About("keeps tokens at least this likely relative to the likeliest", 0.0, 1.0, "MIN_P")] = (
        0.0
    )
    presence_penalty: Annotated[float, About("taken off the logits of tokens in the output", -2.0, 2.0, "PRESENCE")] = (
        0.0
    )
    frequency_penalty: Annotated[
        float, About("taken off once for each time the token is in the output", -2.0, 2.0, "FREQUENCY")
    ] = 0.0
    repetition_penalty: Annotated[
        float, About("divides the logits of tokens of prompt and output", 1e-3, 1e3, "REPETITION")
    ] = 1.0
    logit_bias: Annotated[
        dict[int, float], About("by token id, added to the logit", -100, 100, entries=MAX_LOGIT_BIAS)
    ] = {}
    seed: Annotated[
        int | None,
        About(
            "makes the draws repeatable; choice i of n has seed + i",
            -(2**63),
            2**64 - 1,
            "SEED",
            must="fit 64 bits",
            native="sampling_seed seed",
        ),
    ] = None
    stop: Annotated[tuple[str, ...], About("the text ends before the first of these", entries=MAX_STOPS)] = ()
    stop_token_ids: Annotated[
        tuple[int, ...], About("token ids that end the text, like eos", entries=MAX_STOP_TOKENS)
    ] = ()
    ignore_eos: Annotated[bool, About("eos does not end the text")] = False
    n: Annotated[int, About("choices per prompt", 1, 128)] = 1
    logprobs: Annotated[
        int | None, About("logprobs of the output, and of the k best tokens", 0, MAX_LOGPROBS, native="", openai="")
    ] = None
    prompt_logprobs: Annotated[
        int | None, About("the same for each prompt token", 0, MAX_LOGPROBS, native="", openai="")
    ] = None
    json_schema: Annotated[str | None, About("the text is JSON that this schema allows")] = None
    regex: Annotated[str | None, About("the whole text matches this regular expression")] = None
    ebnf: Annotated[str | None, About("the text belongs to this grammar, in GBNF or Lark's notation")] = None
    structural_tag: Annotated[
        str | None, About("parts of the text are JSON between tags: an object with structures and triggers")
    ] = None
    answer_form: Annotated[
        str | None, About("made from a chat: its thought, calls and content", native="", openai="")
    ] = None
    skip_special_tokens: Annotated[bool, About("leave special tokens out of the text")] = True
    include_stop_str_in_output: Annotated[
        bool, About("keep the stop string in the text", native="no_stop_trim", openai="no_stop_trim")
    ] = False
    priority: Annotated[
        int, About("greater ones are served first; --schedule-policy priority takes it", -(2**31), _MAX_INT32)
    ] = 0
    disable_speculation: Annotated[bool, About("no tokens are drafted; the output is the same")] = False
    stream_interval: Annotated[
        int | None, About("tokens per streamed event after the first; --stream-interval if not set", low=1, openai="")
    ] = None

    @property
    def has_penalties(self) -> bool:
        """True if the device must count the request's tokens."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @property
    def has_bias(self) -> bool:
        """True if the device changes logits for logit_bias or min_tokens."""
        return bool(self.logit_bias or self.min_tokens)

    @property
    def grammar(self) -> Grammar | None:
        """The language that the text must belong to; None: any text will do."""
        for kind in (*GRAMMAR_KINDS, "answer_form"):
            if (text := getattr(self, kind)) is not None:
                return Grammar(kind, text)
        return None

    def validate(self, vocab_size: int, in_range: bool = False) -> None:
        """Raise InvalidParameter for the first value that cannot be honoured. With `in_range` numbers are not compared with
        their limits again."""
        bounded, lists = _checks(type(self))
        for parameter, low, high in () if in_range else bounded:
            if (value := getattr(self, parameter.name)) is None and parameter.default is None:
                continue
            parameter.check_type(value)
            if not low <= value <= high:  # NaN is outside
                raise parameter.out_of_range(value)
        for parameter in lists:
            if (entries := getattr(self, parameter.name)) is not parameter.default:
                parameter.check_entries(entries, vocab_size)
        self._check_grammar()
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            text = "{min_tokens} is {value}, above {max_tokens} {limit}"
            raise InvalidParameter("min_tokens", text, value=self.min_tokens, limit=self.max_tokens)

    def _check_grammar(self) -> None:
        given = [kind for kind in (*GRAMMAR_KINDS, "answer_form") if getattr(self, kind) is not None]
        if len(given) > 1:
            text = f"{{{given[0]}}} and {{{given[1]}}} both say what the text must be; give {{count}}"
            raise InvalidParameter(given[1], text, count="one")
        for kind in given:
            if problem := _problem_of_grammar(getattr(self, kind)):
                raise InvalidParameter(kind, f"{{{kind}}} {{problem}}", problem=problem)
            if self.ignore_eos:
                text = f"{{ignore_eos}} is {{value}}; the text that {{{kind}}} asks for ends with eos, so leave it out"
                raise InvalidParameter("ignore_eos", text, value="true")


def _problem_of_grammar(text: object) -> str | None:
    if not isinstance(text, str):
        return f"is {text!r}; it must be a text"
    if len(text) > MAX_GRAMMAR_LENGTH:
        return f"has {len(text)} characters; the limit is {MAX_GRAMMAR_LENGTH}"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "has a lone surrogate, which is not valid Unicode"
    return None


# Fields for grammars that a user may give. `answer_form` is made for a chat (text.tool_calls.answer_form).
GRAMMAR_KINDS = ("json_schema", "regex", "ebnf", "structural_tag")


class Parameter(NamedTuple):
    """Declaration of a field of SamplingParams."""

    name: str
    kind: object  # its type, without None
    default: object
    about: About

    def names(self, api: Api) -> tuple[str, ...]:
        """Return its names in an API, the preferred one first."""
        names = self.about.native if api == "native" else self.about.openai
        return (self.name,) if names is None else tuple(names.split())

    @property
    def limit(self) -> str:
        """Words that complete "it must …"; empty for a parameter without limits."""
        low, high = self.about.low, self.about.high
        if self.about.must or low is None:
            return self.about.must
        return f"be at least {low}" if high is None else f"be between {low} and {high}"

    @property
    def range(self) -> tuple[float, float]:
        low = -math.inf if self.about.low is None else self.about.low
        high = math.inf if self.about.high is None else self.about.high
        return (math.nextafter(low, high) if self.about.above else low), high

    def out_of_range(self, value: float) -> InvalidParameter:
        if self.about.above and value == self.about.low:
            return self._error("{param} is {value}; it must be above {low:g}", value=value, low=self.about.low)
        return self._error("{param} is {value}; it must {limit}", value=value, limit=self.limit)

    def check_entries(self, value: Mapping[int, float] | Sequence[int] | Sequence[str], vocab_size: int) -> None:
        """Check type, length and entries of a list or dictionary. Numbers in a list, and keys, are token ids."""
        self.check_type(value)
        strings = [entry for entry in value if isinstance(entry, str)]
        if wrong := [entry for entry in value if not (isinstance(entry, str) or 0 <= entry < vocab_size)]:
            text = "{param} has token id {value}; the vocabulary is 0..{last}"
            raise self._error(text, value=wrong[0], last=vocab_size - 1)
        if len(value) > (limit := self.about.entries or len(value)):
            raise self._error("{param} has {count} entries; the limit is {limit}", count=len(value), limit=limit)
        if "" in strings:
            raise InvalidParameter(self.name, "a stop string must not be empty")
        if (longest := max(map(len, strings), default=0)) > MAX_STOP_LENGTH:
            text = "a stop string has {count} characters; the limit is {limit}"
            raise self._error(text, count=longest, limit=MAX_STOP_LENGTH)
        low, high = self.range
        biases = value.values() if isinstance(value, Mapping) else ()
        if not all(isinstance(each, numbers.Real) and low <= each <= high for each in biases):
            raise self._error("{param} values must be between {low} and {high}", low=low, high=high)

    def check_type(self, value: object) -> None:
        """Refuse a value of another type than the declared one: parameters made in this process were not converted."""
        container, entry, form = _TYPES[self.kind]
        fits = isinstance(value, container) and not isinstance(value, str | bytes)
        if not fits or (isinstance(value, Collection) and not all(isinstance(each, entry) for each in value)):
            raise self._error("{param} is {value!r}; it must be {form}", value=value, form=form)

    def _error(self, text: str, **values: object) -> InvalidParameter:
        return InvalidParameter(self.name, text.replace("{param}", f"{{{self.name}}}"), **values)


# Declared type -> types of the value and of its entries, numpy's included, and its description.
_TYPES: Mapping[object, tuple[type, type, str]] = {
    int: (numbers.Integral, object, "a whole number"),
    float: (numbers.Real, object, "a number"),
    tuple[str, ...]: (Collection, str, "a sequence of strings"),
    tuple[int, ...]: (Collection, numbers.Integral, "a sequence of token ids"),
    dict[int, float]: (Mapping, numbers.Integral, "a dictionary of numbers by token id"),
}


@functools.cache
def parameters_of(cls: type[SamplingParams]) -> tuple[Parameter, ...]:
    """Read the declarations of the class, in order."""
    hints = typing.get_type_hints(cls, include_extras=True)
    found = []
    for field in msgspec.structs.fields(cls):
        kind, about = typing.get_args(hints[field.name])
        if types.NoneType in (kinds := typing.get_args(kind)):
            (kind,) = (each for each in kinds if each is not types.NoneType)
        default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
        found.append(Parameter(field.name, kind, default, about))
    return tuple(found)


@functools.cache
def _checks(cls: type[SamplingParams]) -> tuple[list[tuple[Parameter, float, float]], list[Parameter]]:
    """Return the parameters that are numbers, with their ranges, and the ones that are lists or dictionaries."""
    bounded = [(each, *each.range) for each in parameters_of(cls) if each.kind in (int, float)]
    return bounded, [each for each in parameters_of(cls) if typing.get_origin(each.kind) in (tuple, dict)]


PARAMETERS = parameters_of(SamplingParams)


class FinishReason(msgspec.Struct, frozen=True, omit_defaults=True):
    """Reason why a request ended. `matched` is the id of the stop token, or the stop string, that ended it."""

    type: Literal["stop", "length", "abort"]
    matched: int | str | None = None
    message: str | None = None


@dataclasses.dataclass(eq=False, slots=True)
class Request:
    """Generation inside the engine. While it runs, its tokens and counters live in the scheduler's row table."""

    key: int
    prompt: np.ndarray  # i32[prompt_len]
    params: SamplingParams
    namespace: str
    seed: int  # u32
    max_total_tokens: int  # prompt and output together
    stop_token_ids: np.ndarray  # i32, with eos unless it is ignored
    arrival: int  # position in the order of arrival
    adapter: int = 0  # number of its LoRA adapter's load; 0: the model itself
    urgency: int = 0  # its priority, greater if it is served first
    needs_all: bool = False  # every token is computed for it, though its KV may be cached

    tokens: np.ndarray = dataclasses.field(init=False)  # i32: prompt plus output so far, current while not running
    row: int = -1  # in the row table; -1 while waiting
    admitted: bool = False  # it has, or had, a row
    announced: bool = False  # its first token has been reported
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache at first admission
    arrived_at: float = dataclasses.field(default_factory=time.perf_counter)
    queue_seconds: float = 0.0  # from then to the first admission
    prompt_logprobs: list = dataclasses.field(default_factory=list)  # collected chunk by chunk by the engine core

    def __post_init__(self) -> None:
        self.tokens = self.prompt

    def admit(self, num_cached_tokens: int) -> None:
        """Note the first admission, behind so many cached tokens."""
        self.admitted, self.num_cached_tokens = True, num_cached_tokens
        self.queue_seconds = time.perf_counter() - self.arrived_at

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.params.prompt_logprobs is not None and not self.announced
