"""Files of requests and answers, a JSON object a line, in the form of OpenAI's batch API."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/rerank", "/v1/score")

_BEGIN = b'{"id":"batch_req_'  # how each answer begins

type Body = dict[str, Any]


class BatchFileError(ValueError):
    """A file cannot be read, or would be spoiled by writing."""


class BatchRequest(msgspec.Struct, frozen=True):
    custom_id: str
    method: str
    url: str
    body: Body


class BatchAnswer(msgspec.Struct):
    id: str
    custom_id: str | None
    response: dict[str, Any] | None  # status_code, request_id, body
    error: dict[str, str] | None  # code, message: the request was not sent, or no answer came


def read_requests(path: Path) -> Iterator[BatchRequest | BatchAnswer]:
    """Yield each line's request, or the answer that says what is wrong with it. Raises BatchFileError."""
    seen: set[str] = set()
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise BatchFileError(f"{path} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            request = msgspec.json.decode(line, type=BatchRequest)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            yield failed(_custom_id(line), "invalid_line", f"line {number}: {error}")
            continue
        if problem := _problem(request, seen):
            yield failed(request.custom_id, "invalid_request", f"line {number}: {problem}")
        else:
            seen.add(request.custom_id)
            yield request


def answered(path: Path) -> set[str]:
    """Return the ids of requests that an earlier run has answered with success, after taking away a line that it was
    stopped in, and those of failures, which are tried again. Raises BatchFileError for a file of something else."""
    if not path.exists():
        return set()
    answers, rest = [], b""
    try:
        *lines, rest = path.read_bytes().split(b"\n")
        answers = [msgspec.json.decode(line, type=BatchAnswer) for line in lines]
    except (msgspec.DecodeError, OSError) as error:
        raise BatchFileError(f"{path} exists, and is no file of answers ({error}); choose another -o") from error
    if not rest.startswith(_BEGIN[: len(rest)]):
        raise BatchFileError(f"{path} exists, and ends with what is no answer; choose another -o")
    kept = [each for each in answers if each.response is not None and each.response.get("status_code") == 200]
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(b"".join(map(line_of, kept)))
    os.replace(new, path)
    return {each.custom_id for each in kept if each.custom_id is not None}


def line_of(answer: BatchAnswer) -> bytes:
    return msgspec.json.encode(answer) + b"\n"


def done(request: BatchRequest, status: int, request_id: str, body: object) -> BatchAnswer:
    return BatchAnswer(
        _new_id(), request.custom_id, {"status_code": status, "request_id": request_id, "body": body}, None
    )


def failed(custom_id: str | None, code: str, message: str) -> BatchAnswer:
    return BatchAnswer(_new_id(), custom_id, None, {"code": code, "message": message})


def _problem(request: BatchRequest, seen: set[str]) -> str | None:
    if request.custom_id in seen:
        return f"custom_id {request.custom_id!r} is that of an earlier line"
    if request.method != "POST":
        return f"method is {request.method!r}; it must be POST"
    if request.url not in PATHS:
        return f"url is {request.url!r}; it must be one of {', '.join(PATHS)}"
    if request.body.get("stream"):
        return "stream is true; a file holds whole answers, so leave it out"
    return None


def _custom_id(line: bytes) -> str | None:
    try:
        found = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    name = found.get("custom_id") if isinstance(found, dict) else None
    return name if isinstance(name, str) else None


def _new_id() -> str:
    return f"batch_req_{uuid.uuid4().hex}"
