from __future__ import annotations

import pytest

from sgl_jax.text.protobuf import read_message


def test_every_wire_type_in_the_order_of_the_file() -> None:
    message = b"\x08\x96\x01" + b"\x12\x03abc" + b"\x1d\x00\x00\x80\x3f" + b"\x21\x01\0\0\0\0\0\0\0" + b"\x08\x05"
    assert read_message(message) == {
        1: [150, 5],
        2: [b"abc"],
        3: [b"\x00\x00\x80\x3f"],
        4: [b"\x01" + bytes(7)],
    }


def test_numbers_of_several_bytes_and_embedded_messages() -> None:
    assert read_message(b"\xca\x02\x03\x08\x80\x01") == {41: [b"\x08\x80\x01"]}
    assert read_message(b"\x08\x80\x01") == {1: [128]}
    assert read_message(b"\x08" + b"\xff" * 9 + b"\x01") == {1: [2**64 - 1]}  # -1 as int32 or int64
    assert read_message(b"") == {}


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (b"\x08", "ends too early"),
        (b"\x08\x80", "ends too early"),
        (b"\x12\x04abc", "ends too early"),
        (b"\x1d\x00\x00\x80", "ends too early"),
        (b"\x21" + bytes(7), "ends too early"),
        (b"\x08" + b"\xff" * 10 + b"\x01", "10 bytes"),
        (b"\x0b", "wire type 3 at byte 0"),
        (b"\x08\x01\x0e", "wire type 6 at byte 2"),
        (b"\x00\x01", "field number 0 at byte 0"),
    ],
)
def test_malformed_messages_raise_value_error(message: bytes, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        read_message(message)
