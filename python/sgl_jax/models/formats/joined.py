"""Joins the stored tensors of a quantised matrix to one tensor, under the name of a plain one.

Parts that are missing or do not fit together make a tensor that is not supported, and says why: the plan of the weights
lists those of a whole checkpoint.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping

import numpy as np

from sgl_jax.models.formats.words import EXPONENTS, FLOAT8
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.stored import StoredTensor

type Parts = Mapping[str, StoredTensor]  # by the end of the name, behind the matrix's own
type Block = tuple[int | None, int | None]  # outputs and inputs that share a scale; None: all do


class DoesNotJoin(Exception):
    """Reason why the parts of a matrix make none."""


def join_all(
    stored: Parts,
    join: Callable[[str, StoredTensor, Parts], StoredTensor],
    *,
    main: str,
    dtypes: Collection[str],
    parts: Collection[str],
    to: str = "",
) -> dict[str, StoredTensor]:
    """Return the tensors with each matrix whose name ends with `main` joined, by its name without this and all parts that
    stand beside it, to one whose name ends with `to`."""
    tensors, ends = dict(stored), tuple(parts)
    for name, codes in stored.items():
        base = name.removesuffix(main)
        whole = base + to
        is_other = not name.endswith(main) or name.endswith(ends) or codes.dtype not in dtypes
        if is_other or (whole != name and whole in stored):
            continue
        found = {part: tensors.pop(base + part) for part in parts if base + part in tensors}
        del tensors[name]
        try:
            tensors[whole] = dataclasses.replace(join(base, codes, found), name=name)
        except DoesNotJoin as error:
            tensors[whole] = dataclasses.replace(codes, supported=False, dtype=f"{codes.dtype}: {error}")
    return tensors


def part(base: str, parts: Parts, *names: str) -> StoredTensor:
    """Return the first of the parts that is there."""
    found = next((parts[name] for name in names if name in parts), None)
    if found is None:
        raise DoesNotJoin(f"{base}{' or '.join(names)} is missing")
    return found


def number(stored: StoredTensor) -> np.ndarray:
    """Return the float32 that a tensor holds. Raises ModelError if it holds several."""
    found = stored.read().astype(np.float32).reshape(-1)
    if len(found) != 1:
        raise ModelError(f"{stored.name} is {list(stored.shape)}; it must be one number")
    return found[0]


def joined(
    values: StoredTensor,
    scales: StoredTensor,
    block: Block,
    zeros: StoredTensor | None = None,
    *,
    groups: np.ndarray | None = None,
    in_order: bool = False,
    symmetric: bool = False,
) -> StoredTensor:
    """Return the floats (values - zeros) * scales of values [*B, O, I]. A scale and a zero are those of a block.

    `groups` i32[I] tells the group of each input where that does not follow from the block. `in_order` promises that it does,
    and `symmetric` zeros of 0: planes are read with a check.
    """
    inputs, width = values.shape[-1], block[1] or values.shape[-1]
    scales = _of_rows(scales, values.shape, block)
    zeros = None if zeros is None else _of_rows(zeros, values.shape, block)
    number = scales.shape[-1]
    if groups is not None and (groups.shape != (inputs,) or groups.min() < 0 or groups.max() >= number):
        raise DoesNotJoin(f"g_idx {list(groups.shape)} must name one of {number} groups for each of {inputs} inputs")
    if groups is not None and np.array_equal(groups, np.arange(inputs) // width):
        groups = None

    def of_inputs(found: np.ndarray) -> np.ndarray:
        if number == 1:
            return found
        return np.repeat(found, width, axis=-1)[..., :inputs] if groups is None else found[..., groups]

    def rows(start: int, stop: int) -> np.ndarray:
        codes = values.rows(start, stop)
        codes = FLOAT8[codes.view(np.uint8)] if values.dtype == "F8_E4M3" else codes.astype(np.float32)
        codes = codes if zeros is None else codes - of_inputs(zeros.rows(start, stop))
        return codes * of_inputs(scales.rows(start, stop))

    planes = {"values": values, "scales": scales}
    if zeros is not None:
        planes |= _planes_of_zeros(zeros, scales, symmetric=symmetric)
    if groups is not None:
        planes = {"values": _out_of_order(values), "scales": scales} if in_order else {}
    nbytes = values.nbytes + scales.nbytes + (zeros.nbytes if zeros else 0)
    dtype = f"{values.dtype} with scales"
    return StoredTensor(values.name, values.shape, dtype, nbytes, rows, planes={} if inputs % width else planes)


def _out_of_order(values: StoredTensor) -> StoredTensor:
    """Return values that are not read, because their inputs are not in the order of their groups as it was promised."""

    def refused(start: int, stop: int) -> np.ndarray:
        said = "g_idx is out of order; quantization_config calls its groups in order (desc_act, actorder)"
        raise ModelError(f"{values.name}: {said}; give --quantization int8-weight-only to round the matrices again")

    return dataclasses.replace(values, rows=refused)


def _planes_of_zeros(zeros: StoredTensor, scales: StoredTensor, *, symmetric: bool) -> dict[str, StoredTensor]:
    """Return the plane of zeros times scales or, where they are promised to be 0, scales that are read with a check."""

    def offsets(start: int, stop: int) -> np.ndarray:
        return zeros.rows(start, stop) * scales.rows(start, stop)

    def checked(start: int, stop: int) -> np.ndarray:
        if zeros.rows(start, stop).any():
            raise ModelError(f"{zeros.name} holds zero points; quantization_config calls the weights symmetric (sym)")
        return scales.rows(start, stop)

    name, rows = ("scales", checked) if symmetric else ("offsets", offsets)
    return {name: dataclasses.replace(scales, rows=rows)}


def _of_rows(scales: StoredTensor, shape: tuple[int, ...], block: Block) -> StoredTensor:
    """Return the scales f32[*B, O, G] of each row of a matrix [*B, O, I], in whatever shape they are stored."""
    *experts, outputs, inputs = shape
    height, width = block[0] or outputs, block[1] or inputs
    wanted = (*experts, -(-outputs // height), -(-inputs // width))
    if [size for size in scales.shape if size != 1] != [size for size in wanted if size != 1]:
        raise DoesNotJoin(f"{scales.name} is {list(scales.shape)}; blocks of {height} x {width} need {list(wanted)}")
    if scales.dtype in ("U8", "F8_E8M0"):
        scales = scales.changed(lambda exponents: EXPONENTS[exponents])

    def lines(start: int, stop: int) -> np.ndarray:
        whole = scales.shape[:1] != wanted[:1]  # an axis of 1 is left out, or added
        return scales.read().reshape(wanted)[start:stop] if whole else scales.rows(start, stop)

    def rows(start: int, stop: int) -> np.ndarray:
        if experts:
            found = lines(start, stop).reshape(-1, *wanted[1:])[:, np.arange(outputs) // height]
        else:
            first = start // height
            found = lines(first, -(-stop // height)).reshape(-1, wanted[-1])[np.arange(start, stop) // height - first]
        return found.astype(np.float32)

    return dataclasses.replace(scales, shape=(*experts, outputs, wanted[-1]), dtype="F32", rows=rows, planes={})
