"""Fields that ask for structured output in OpenAI's bodies, in the spellings of OpenAI, vLLM and SGLang."""

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field

from sgl_jax.engine.native_params import as_grammar_text
from sgl_jax.request import GRAMMAR_KINDS, InvalidParameter, Names
from sgl_jax.server.bodies import Body, TextFormat

type JsonObject = dict[str, Any]

ANY_OBJECT = '{"type":"object"}'


class JsonObjectFormat(Body):
    type: Literal["json_object"]
    schema_: JsonObject | None = Field(
        None,
        validation_alias=AliasChoices("schema", "value"),
        description="the object's schema, as llama.cpp takes it, or as value like Hugging Face's servers",
    )


class JsonSchema(Body):
    name: str | None = None
    description: str | None = None
    schema_: JsonObject = Field(alias="schema", description="the schema, which is enforced with and without strict")
    strict: bool | None = None


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class StructuralTagFormat(Body):
    type: Literal["structural_tag"]
    structures: list[JsonObject] | None = None
    triggers: list[str] | None = None
    format: JsonObject | None = Field(None, description="XGrammar's form, in the place of structures and triggers")


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | StructuralTagFormat, Field(discriminator="type")
]


class StructuredOutputs(Body):
    """vLLM's form: one of these."""

    json_: str | JsonObject | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | JsonObject | None = None
    disable_any_whitespace: Literal[False] | None = None
    disable_additional_properties: Literal[False] | None = None
    whitespace_pattern: None = None


class GrammarFields(Body):
    response_format: ResponseFormat | None = Field(None, description="the form that the text must have")
    structured_outputs: StructuredOutputs | None = Field(None, description="the same in vLLM's form")
    guided_json: str | JsonObject | None = Field(None, description="another name for json_schema")
    guided_regex: str | None = Field(None, description="another name for regex")
    guided_choice: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="the text is one of these"
    )
    guided_grammar: str | None = Field(None, description="another name for ebnf")

    def grammar(self) -> tuple[dict[str, str], Names]:
        """Return the grammar that the body asks for, by our name, with the body's name for it. Raises InvalidParameter if
        there are two."""
        direct = ((name, value, name) for name in GRAMMAR_KINDS if (value := getattr(self, name)) is not None)
        found = [*self._of_format(), *self._of_vllm(), *direct]
        if len(found) > 1:
            (_, _, first), (_, _, second), *_ = found
            raise InvalidParameter(second, f"{first} and {second} both say what the text must be; give one")
        return {kind: as_grammar_text(value) for kind, value, _ in found}, {kind: name for kind, _, name in found}

    def _of_format(self) -> Iterator[tuple[str, str | JsonObject, str]]:
        match self.response_format:
            case JsonObjectFormat(schema_=schema):
                yield "json_schema", ANY_OBJECT if schema is None else schema, "response_format"
            case JsonSchemaFormat(json_schema=given):
                yield "json_schema", given.schema_, "response_format.json_schema.schema"
            case StructuralTagFormat() as given:
                yield "structural_tag", given.model_dump(exclude_none=True), "response_format"

    def _of_vllm(self) -> Iterator[tuple[str, str | JsonObject, str]]:
        given, name = self.structured_outputs or StructuredOutputs(), "structured_outputs"
        for kind, value, path in (
            ("json_schema", given.json_, f"{name}.json"),
            ("regex", given.regex, f"{name}.regex"),
            ("ebnf", _one_of(given.choice), f"{name}.choice"),
            ("ebnf", given.grammar, f"{name}.grammar"),
            ("json_schema", ANY_OBJECT if given.json_object else None, f"{name}.json_object"),
            ("structural_tag", given.structural_tag, f"{name}.structural_tag"),
            ("json_schema", self.guided_json, "guided_json"),
            ("regex", self.guided_regex, "guided_regex"),
            ("ebnf", _one_of(self.guided_choice), "guided_choice"),
            ("ebnf", self.guided_grammar, "guided_grammar"),
        ):
            if value is not None:
                yield kind, value, path


def _one_of(choices: list[str] | None) -> str | None:
    """Return a grammar, in Lark's notation, of these texts."""
    return None if choices is None else "start: " + " | ".join(map(json.dumps, choices))
