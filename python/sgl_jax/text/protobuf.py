"""Reads protobuf messages without their schema (https://protobuf.dev/programming-guides/encoding)."""

from collections.abc import Iterator


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the number and the value of each field of a message, in the order of the file.

    A varint is an unsigned int. Strings, bytes, embedded messages and packed arrays are bytes, fixed-width numbers
    their 4 or 8 little-endian bytes. Raises ValueError where `data` is no message.
    """
    at = 0
    while at < len(data):
        start = at
        key, at = _varint(data, at)
        number, wire_type = key >> 3, key & 7
        if number == 0:
            raise ValueError(f"field number 0 at byte {start}")
        match wire_type:
            case 0:
                value, at = _varint(data, at)
                yield number, value
                continue
            case 1:
                size = 8
            case 2:
                size, at = _varint(data, at)
            case 5:
                size = 4
            case _:
                raise ValueError(f"wire type {wire_type} at byte {start}")
        if at + size > len(data):
            raise ValueError("it ends too early")
        yield number, data[at : at + size]
        at += size


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
