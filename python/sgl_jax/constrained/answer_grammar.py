"""The grammar of a chat's answer: a thought, then calls or content."""

from sgl_jax.constrained.call_rules import CALL_RULES
from sgl_jax.constrained.grammar_kinds import given
from sgl_jax.constrained.lark import GrammarError, Lark
from sgl_jax.constrained.schema import enforced
from sgl_jax.text.tool_calls.answer_form import AnswerForm, CallableFunction
from sgl_jax.text.tool_calls.formats import CALLS, HARMONY, THOUGHTS
from sgl_jax.text.tool_calls.harmony import MARKERS

_GAP = r"/[ \n]{0,2}/"  # behind a thought
# Text that is not read as a call, in formats whose calls are JSON or a list alone: at the beginning, or of any line.
_TEXT_BESIDE_BARE = {
    "llama3": r"/\s*[^\s{\[](.|\n)*/",
    "pythonic": r"/\s*[^\s{\[](\S|[^\S\n]|\s*\n\s*[^\s\[])*\s*/",
}


def answer_grammar(lark: Lark, form: AnswerForm) -> str:
    """Return the answers of a form. Raises ValueError where the vocabulary, the library or the format cannot enforce it."""
    if HARMONY in (form.calls, form.thoughts):
        return _harmony(lark, form)
    opener, closer = THOUGHTS[form.thoughts] if form.thoughts and form.thought != "closed" else ("", "")
    body = _body(lark, form, opener)
    if not closer:
        return body
    if form.max_thought_tokens is None:
        thought = lark.text_until(closer)
    elif lark.is_token(closer):
        thought = f"{lark.tokens([closer], form.max_thought_tokens)} {lark.literal(closer)}"
    else:
        raise GrammarError(f"a budget for thoughts needs a vocabulary with a token for {closer}")
    if form.thought == "open":
        return f"{thought} {_GAP} {body}"
    return f"(/\\n?/ {lark.literal(opener)} {thought} {_GAP})? {body}"


def _body(lark: Lark, form: AnswerForm, opener: str) -> str:
    """Return what may follow the thought, which `opener` would begin; empty: there is none."""
    content = None if form.content is None else given(lark, form.content)
    if form.calls is None:
        first = next((mark for mark in (opener, opener.partition(">")[0] + ">") if lark.is_token(mark)), None)
        return content or lark.tokens([first] if first else [])
    calls = _calls(lark, form)
    if form.must_call:
        return calls
    if content is not None:
        return f"({calls} | {content})"
    if (text := _TEXT_BESIDE_BARE.get(form.calls)) is not None:
        return f"({calls} | {lark.rule(text)})?"
    if not any(map(lark.is_token, CALLS[form.calls].openers)):
        raise GrammarError("calls among text can be enforced only where one token begins them")
    text = lark.text(CALLS[form.calls].openers)
    return f"({text} {calls}){'?' if form.one_call else '*'} {text}"


def _calls(lark: Lark, form: AnswerForm) -> str:
    rules = CALL_RULES.get(form.calls or "")
    if rules is None:
        raise GrammarError(f"calls in the format {form.calls} cannot be enforced")
    begin, between, end = rules.around(lark)
    one = lark.choice(rules.call(lark, _with_objects(each)) for each in form.functions)
    return f"{lark.literal(begin)} {lark.repeated(one, between, form.one_call)} {lark.literal(end)}"


def _with_objects(function: CallableFunction) -> CallableFunction:
    """Return a function whose arguments are an object, as all formats have it."""
    return CallableFunction(function.name, {"type": "object", **enforced(function.arguments)})


def _harmony(lark: Lark, form: AnswerForm) -> str:
    """Return the messages of GPT-OSS: thoughts, then one that calls or is final. An end token is behind the last."""
    marks = [mark for mark in MARKERS if lark.is_token(mark)]
    thought = lark.tokens(marks, form.max_thought_tokens)
    next_message = lark.literal("<|end|><|start|>assistant")
    said = lark.literal("<|channel|>analysis<|message|>")
    most = "*" if form.max_thought_tokens is None else "?"
    last: list[str] = []
    if form.content is not None:
        last = [f"{lark.literal('<|channel|>final<|message|>')} {given(lark, form.content)}"]
    elif form.calls is None:  # whatever is no thought
        last = [f"/( to=[^<]*)?/ {lark.literal('<|channel|>')} /(final|commentary)[^<]*/ {lark.tokens()}"]
    elif not form.must_call:
        last = [f"{lark.literal('<|channel|>final<|message|>')} {lark.tokens(marks)}"]
    for each in form.functions:
        head = f"<|channel|>commentary to=functions.{each.name} <|constrain|>json<|message|>"
        last.append(f"{lark.literal(head)} {lark.schema(_with_objects(each).arguments)}")
    return f"({said} {thought} {next_message}){most} {lark.choice(last)}"
