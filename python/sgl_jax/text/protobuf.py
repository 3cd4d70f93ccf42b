"""Reads protobuf messages without their schema (https://protobuf.dev/programming-guides/encoding)."""

from typing import Any

_VARINT, _SIZED = 0, 2  # wire types: a number, and bytes behind their number
_FIXED = {1: 8, 5: 4}  # bytes of a value, by wire type


def read_message(data: bytes) -> dict[int, list[Any]]:
    """Return the values of a message's fields by number, in the order of the file.

    A varint is an unsigned int. Strings, bytes, embedded messages and packed arrays are bytes, fixed-width numbers
    their 4 or 8 little-endian bytes. Raises ValueError where `data` is no message.
    """
    found: dict[int, list[Any]] = {}
    at = 0
    while at < len(data):
        start = at
        key, at = _varint(data, at)
        number, wire_type = key >> 3, key & 7
        if number == 0:
            raise ValueError(f"field number 0 at byte {start}")
        if wire_type in (_VARINT, _SIZED):
            value, at = _varint(data, at)
        elif (value := _FIXED.get(wire_type)) is None:
            raise ValueError(f"wire type {wire_type} at byte {start}")
        if wire_type != _VARINT:
            if at + value > len(data):
                raise ValueError("it ends too early")
            value, at = data[at : at + value], at + value
        found.setdefault(number, []).append(value)
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the varint that begins at byte `at`, and the index of the byte behind it."""
    value = shift = 0
    while at < len(data):
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError(f"a varint of more than 10 bytes before byte {at}")
    raise ValueError("it ends too early")
