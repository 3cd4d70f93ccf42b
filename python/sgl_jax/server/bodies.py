"""Parts of request bodies: types of fields, and fields made from the tables of sampling parameters (request.py) and of
features that are not built (settings/not_built.py)."""

import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError

from sgl_jax.engine.generation import GenerationRequest
from sgl_jax.engine.native_params import DEFAULT_MAX_NEW_TOKENS, as_grammar_text, in_our_names, names_in
from sgl_jax.request import GRAMMAR_KINDS, PARAMETERS, Api, InvalidParameter, Names, Parameter, SamplingParams
from sgl_jax.settings.not_built import NOT_BUILT, Feature

INT64_MAX = 2**63 - 1
_MOST_FIELDS = 2048

TokenId = Annotated[int, Field(ge=0, le=INT64_MAX)]
TokenIdText = Annotated[str, Field(pattern="^[0-9]{1,10}$")]
StopString = Annotated[str, Field(min_length=1)]
CacheKey = Annotated[str, Field(max_length=1024)]
EmptyList = Annotated[list[Any], Field(max_length=0)]

# pydantic's Literal takes 0 for False, which its schema does not say.
Off = Annotated[Literal[False], BeforeValidator(lambda value: value if value is False else str(value))]

type Fields = Mapping[str, tuple[object, object]]  # a type and a default each, as pydantic.create_model takes them


def limited(value: object) -> object:
    """Refuse an object with more fields than anything needs: pydantic would describe each that is wrong."""
    if isinstance(value, dict) and len(value) > _MOST_FIELDS:
        numbers = {"count": len(value), "limit": _MOST_FIELDS}
        raise PydanticCustomError("too_many_fields", "an object has {count} fields; the limit is {limit}", numbers)
    return value


def _stop_at_first_error(schema: object) -> None:
    """Make every list of a schema stop at its first wrong entry: pydantic would describe every one."""
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        schema = list(schema.values())
    if isinstance(schema, list | tuple):
        for part in schema:
            _stop_at_first_error(part)


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _limited(cls, value: object) -> object:
        return limited(value)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _stop_at_first_error(schema)
        return schema


class Answered(Body):
    """Part of an answer that a client sends back. Fields of it that are null say nothing, and need not be known."""

    @model_validator(mode="before")
    @classmethod
    def _said(cls, value: object) -> object:
        return {name: each for name, each in value.items() if each is not None} if isinstance(value, dict) else value


class TextFormat(Body):
    type: Literal["text"]


# Types of fields that accept, beside null, a value that means "off".
_OFF: Mapping[str, object] = {
    "functions": EmptyList | None,
    "function_call": Literal["none"] | None,
    "modalities": Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None,
}


def with_fields[B: type[Body]](*tables: Fields) -> Callable[[B], B]:
    """Decorate a body: add the fields of the tables to those it declares."""

    def add(body: B) -> B:
        fields: dict[str, Any] = {name: field for table in tables for name, field in table.items()}
        made = pydantic.create_model(body.__name__, __base__=body, __module__=body.__module__, **fields)
        made.__doc__ = body.__doc__
        return typing.cast(B, made)

    return add


def null_fields(names: str) -> Fields:
    """Make fields of parameters that other engines know and ours does not: any value but null is refused, by name."""
    return dict.fromkeys(names.split(), (None, None))


def off_fields(body: str, features: Iterable[Feature] = NOT_BUILT) -> Fields:
    """Make the fields of a body that belong to features that are not built: they accept only values that mean "off"."""
    found: dict[str, tuple[object, object]] = {}
    for feature in features:
        found |= null_fields(feature.null.get(body, ""))
        found |= {name: (_OFF[name], None) for name in feature.off.get(body, "").split()}
    return found


def feature_of(field: str, features: Iterable[Feature] = NOT_BUILT) -> str | None:
    """Return the feature that a field belongs to, with its verb: "tool calls are" for `messages[0].function_call`. The
    innermost known name decides. None: it belongs to none."""
    known = {name: feature.name for feature in features for name in feature.fields.split()}
    return next((known[name] for name in reversed(re.findall(r"\w+", field)) if name in known), None)


def sampling_fields(api: Api, parameters: Sequence[Parameter] = PARAMETERS) -> Fields:
    """Make the fields of the parameters, by each of their names in the API."""
    found: dict[str, tuple[object, object]] = {}
    for each in parameters:
        kind: Any = _kind(each)
        names = each.names(api)
        for name in names:
            text = each.about.help if name == names[0] else f"another name for {names[0]}"
            found[name] = (kind | None, Field(None, description=text))
    return found


def _kind(parameter: Parameter) -> object:
    """Return the type of the parameter's value in JSON."""
    entries = Field(max_length=parameter.about.entries)
    if parameter.kind in (int, float):
        return Annotated[parameter.kind, limits(parameter.name, parameters=[parameter])]
    if parameter.kind == tuple[str, ...]:
        return StopString | list[StopString]
    if parameter.kind == tuple[int, ...]:
        return Annotated[list[TokenId], entries]
    if parameter.kind == dict[int, float]:
        numbers = Annotated[float, limits(parameter.name, parameters=[parameter])]
        return Annotated[dict[TokenIdText, numbers], entries, BeforeValidator(limited)]
    return str | dict[str, Any] if parameter.name in ("json_schema", "structural_tag") else parameter.kind


def limits(name: str, low: float | None = None, parameters: Iterable[Parameter] = PARAMETERS) -> FieldInfo:
    """Return the limits of a parameter's number as a pydantic Field. `low`: the least number, if this API differs."""
    [parameter] = (each for each in parameters if each.name == name)
    about = parameter.about
    low = about.low if low is None else low
    high = INT64_MAX if about.high is None and parameter.kind is int else about.high
    return Field(gt=low, le=high) if about.above else Field(ge=low, le=high)


def native_params(body: Body, cls: type[SamplingParams] = SamplingParams) -> GenerationRequest:
    """Read the parameters of a body that has the native API's `sampling_fields`."""
    values, names = _written(body, "native", cls)
    return GenerationRequest([], cls(**values), default_max_tokens=DEFAULT_MAX_NEW_TOKENS, names=names, in_range=True)


def openai_params(
    body: Body, own: Mapping[str, int | str | None], names: Names, cls: type[SamplingParams] = SamplingParams
) -> GenerationRequest:
    """Read the parameters of a body that has OpenAI's `sampling_fields`. `own` has, by our names, values that the body
    gives in a form of its own, and `names` their names there."""
    values, theirs = _written(body, "openai", cls)
    values.update(own)
    return GenerationRequest([], cls(**values), names={"lora_path": "model", **theirs, **names}, in_range=True)


def _written(body: Body, api: Api, cls: type[SamplingParams]) -> tuple[dict[str, Any], Names]:
    """Return the body's values by our names, typed as SamplingParams declares them, and the body's names by ours."""
    names = (name for name in names_in(api, cls)[0] if name in body.model_fields_set)
    return in_our_names({name: _as_declared(name, getattr(body, name)) for name in names}, api, cls)


def _as_declared(name: str, value: Any) -> Any:
    """Convert a value that pydantic checked to the type that SamplingParams declares. Raises InvalidParameter if a
    dictionary has one token id in two spellings."""
    if isinstance(value, list):
        return tuple(value)
    if name in GRAMMAR_KINDS and value is not None:
        return as_grammar_text(value)
    if isinstance(value, dict):
        found: dict[int, float] = {}
        for token, bias in value.items():
            if int(token) in found:
                raise InvalidParameter(name, f"{name} has token id {int(token)} twice")
            found[int(token)] = bias
        return found
    return (value,) if isinstance(value, str) else value  # one stop string
