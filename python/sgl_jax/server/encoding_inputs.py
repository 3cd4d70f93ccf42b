"""Inputs of requests for vectors as token ids, cut where the request wants that, and whether the launch makes such
vectors."""

from collections.abc import Sequence
from typing import Literal

from sgl_jax.engine.encoding import EncodeRequest, check_task
from sgl_jax.engine.pooling_info import PoolingInfo
from sgl_jax.engine.slices import in_slices
from sgl_jax.request import InvalidParameter
from sgl_jax.server.app_state import ServerState
from sgl_jax.server.encoding_bodies import MOST_INPUTS, InputFields

type Kind = Literal["embed", "classify", "score"]

_MOST_TO_CUT = 1_000_000  # tokens of a text that is cut
_OF_MESSAGES = ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs", "reasoning_effort")


def launch_that(state: ServerState, path: str, kinds: Sequence[Kind]) -> PoolingInfo:
    """Return what vectors the launch makes. Raises InvalidParameter for other ones than the path answers with."""
    state.service.check_ready()
    check_task(state.service.info, pools=True)
    pooling = state.service.info.pooling
    assert pooling is not None
    if pooling.kind not in kinds:
        wanted = f"{path} needs a launch with --task {' or '.join(kinds)}"
        raise InvalidParameter("model", f"{wanted}; this one has --task {pooling.kind}")
    return pooling


async def inputs_of(state: ServerState, body: InputFields, before: str = "") -> list[EncodeRequest]:
    """Encode a request's inputs, with the text `before` put before each that is a text. Raises InvalidParameter."""
    adapter = state.adapter_of(body.model)
    if (body.input is None) == (body.messages is None):
        raise InvalidParameter("input", "give either input or messages")
    if body.truncate_prompt_tokens == 0:
        raise InvalidParameter("truncate_prompt_tokens", "truncate_prompt_tokens is 0; it must be at least 1, or -1")
    if body.truncation_side is not None and body.truncate_prompt_tokens is None:
        raise InvalidParameter("truncation_side", "truncation_side needs truncate_prompt_tokens")
    found = []
    if body.messages is not None:
        options = body.model_copy(update={"add_generation_prompt": bool(body.add_generation_prompt)})
        ids = await state.encode_chat(body.messages, options, _most(body))
        found.append(("messages", _cut(ids, [], [], body, state)))
    else:
        for name in _OF_MESSAGES:
            if getattr(body, name) is not None:
                raise InvalidParameter(name, f"{name} needs messages, since input has no template")
        given, several = _listed(body)
        if body.add_special_tokens is not None and not isinstance(given[0], str):
            reason = "add_special_tokens needs text, since token ids are taken as they are"
            raise InvalidParameter("add_special_tokens", reason)
        state.service.check_count(len(given), 1, {"prompt": "input"})
        async for i, each in in_slices(enumerate(given)):
            name = f"input[{i}]" if several else "input"
            if not each:
                raise InvalidParameter(name, f"{name} is empty; at least one token is needed")
            found.append((name, await _encoded(state, each, name, body, before)))
    rids = [body.rid or ""] if len(found) == 1 else [(body.rid and f"{body.rid}_{i}") or "" for i in range(len(found))]
    of_all = body.cache_salt or "", adapter, body.priority or 0
    return [EncodeRequest(ids, rid, name, *of_all) for (name, ids), rid in zip(found, rids, strict=True)]


def _listed(body: InputFields) -> tuple[Sequence[str | list[int]], bool]:
    """Return the inputs, and whether they came in a list."""
    given = body.input
    if not given:
        raise InvalidParameter("input", "input is empty; at least one token is needed")
    if isinstance(given, str):
        return [given], False
    several = [each for each in given if not isinstance(each, int)]
    if not several:
        return [[each for each in given if isinstance(each, int)]], False
    if len(several) > MOST_INPUTS:
        raise InvalidParameter("input", f"input has {len(several)} entries; the limit is {MOST_INPUTS}")
    return several, True


async def _encoded(state: ServerState, given: str | list[int], name: str, body: InputFields, before: str) -> list[int]:
    if not isinstance(given, str):
        return _cut(given, [], [], body, state)
    text, special = before + given, body.add_special_tokens is not False
    ids = await state.encode(text, name, special, _most(body))
    if not special or _fits(ids, body, state):
        return _cut(ids, [], [], body, state)
    plain = await state.encode(text, name, False, _most(body))
    num_added = len(ids) - len(plain)
    start = next((i for i in range(num_added + 1) if ids[i : i + len(plain)] == plain), 0)
    return _cut(ids[start : start + len(plain)], ids[:start], ids[start + len(plain) :], body, state)


def _most(body: InputFields) -> int:
    return 0 if body.truncate_prompt_tokens is None else _MOST_TO_CUT


def _limit(body: InputFields, state: ServerState) -> int | None:
    info, limit = state.service.info, body.truncate_prompt_tokens
    return min(info.context_length, info.max_total_tokens) if limit == -1 else limit


def _fits(ids: Sequence[int], body: InputFields, state: ServerState) -> bool:
    limit = _limit(body, state)
    return limit is None or len(ids) <= limit


def _cut(ids: list[int], before: list[int], behind: list[int], body: InputFields, state: ServerState) -> list[int]:
    """Return the ids, cut to the body's limit, between special tokens that stay, as the last one may be the one whose
    state is the vector."""
    limit = _limit(body, state)
    if limit is None:
        return [*before, *ids, *behind]
    room = max(limit - len(before) - len(behind), 0)
    kept = ids[max(len(ids) - room, 0) :] if body.truncation_side == "left" else ids[:room]
    return [*before, *kept, *behind][:limit]
