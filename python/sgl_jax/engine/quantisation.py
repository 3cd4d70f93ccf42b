"""Rules of holding: in which scheme devices hold a model's matrices, by the checkpoint's format, --quantization and the
platform. A matrix that is not held as it is stored is rounded again from the exact floats that it stands for."""

import collections
import dataclasses
import logging
import re
from collections.abc import Callable, Mapping

from sgl_jax.engine.launch_plan import grid_of
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.formats.form import Form, Kind
from sgl_jax.models.plan import flat_weights
from sgl_jax.models.quantised import Quantised
from sgl_jax.models.scaled import Scaled
from sgl_jax.models.weights import declare
from sgl_jax.observability import log
from sgl_jax.parallel.grid import Grid
from sgl_jax.runtime.placed_weights import weight_bytes
from sgl_jax.runtime.platform import Platform
from sgl_jax.settings.server_args import ServerArgs

logger = logging.getLogger(__name__)

type Rule = Callable[[Form], Scaled | None]  # None: plain floats

_ROUTERS = ("moe.router", "moe.shared_gate")
_INT8, _FP8 = Scaled("int8"), Scaled("float8_e4m3fn")
_W8A8, _FP8_FP8 = Scaled("int8", rounding="int8"), Scaled("float8_e4m3fn", rounding="float8_e4m3fn")
_INT4 = Scaled("int4", 128)
_W8A8_HEAD = Scaled("int8", rounding="int8", exempt=_ROUTERS)  # CPUs spend a fifth of a step on a head of floats
_LANES = 128  # lanes of a TPU; groups divide them, or are a multiple


def _floats(form: Form) -> Scaled | None:
    return None


def _int8(form: Form) -> Scaled:
    return _INT8


def _as_stored(form: Form) -> Scaled:
    return Scaled(form.dtype, form.group, form.offsets)


def _grouped(form: Form) -> Scaled:
    """Return groups as they are stored where the kernel takes them."""
    fits = form.group is not None and (form.group % _LANES == 0 or _LANES % form.group == 0)
    return _as_stored(form) if fits else _INT8


def _rounding(form: Form) -> Scaled:
    return dataclasses.replace(_as_stored(form), rounding=form.rounding)


# By the checkpoint's format: on CPU, on TPU, on TPU that multiplies fp8 (v7x), and on GPU.
_STORED: Mapping[Kind, tuple[Rule, Rule, Rule, Rule]] = {
    "w8a8": (_rounding, _as_stored, _as_stored, _as_stored),
    "int8": (_as_stored, _as_stored, _as_stored, _as_stored),
    "fp8": (_floats, _as_stored, _rounding, _as_stored),
    "fp8 blocks": (_floats, _grouped, _grouped, _int8),  # scales of groups need a kernel
    "groups": (_floats, _grouped, _grouped, _int8),
    "other": (_floats, _int8, _int8, _int8),
}
_SLOW = "weights that are widened inside a product are many times slower there than bfloat16; give int8"
_NO_INT4 = "groups of 4 bits have no kernel there; give int8-weight-only"
# By --quantization, on the same platforms. A text says why a platform refuses it.
_ON_LOAD: Mapping[str, tuple[Scaled | str, Scaled | str, Scaled | str, Scaled | str]] = {
    "int8": (_W8A8_HEAD, _W8A8, _W8A8, _W8A8),
    "int8-weight-only": (_INT8, _INT8, _INT8, _INT8),
    "fp8": (_SLOW, _FP8, _FP8_FP8, _FP8),
    "fp8-weight-only": (_SLOW, _FP8, _FP8, _FP8),
    "int4": (_SLOW, _INT4, _INT4, _NO_INT4),
    "auto": (_W8A8_HEAD, _INT8, _FP8_FP8, _INT8),
}
# SGLang's and vLLM's names that mean one of these for plain weights.
_ALSO = {"w8a8_int8": "int8", "w8a8_fp8": "fp8"}
# Names that repeat the checkpoint's quant_method, or the kind of its matrices.
_SAME_METHOD = {"awq_marlin": "awq", "gptq_marlin": "gptq", "modelopt_fp8": "modelopt", "modelopt_fp4": "modelopt"}
_SAME_KIND = {"w8a8_int8": ("w8a8",), "fp8": ("fp8", "fp8 blocks"), "w8a8_fp8": ("fp8", "fp8 blocks")}


def held(args: ServerArgs, model: DecoderConfig, platform: Platform, device_kind: str) -> DecoderConfig:
    """Return the model with the scheme in which a launch holds it. Raises ValueError for a --quantization that the platform or
    the checkpoint refuses."""
    option, stored = args.quantization, model.weight_format
    if option is None and (stored is None or model.weight_scheme is not None):
        return model
    column = 0 if platform.name == "cpu" else 3 if platform.name == "gpu" else 2 if "7" in device_kind else 1
    if stored is not None and (option in (None, "auto") or _repeats(option, stored.form)):
        scheme = _STORED[stored.form.kind][column](stored.form)
    else:
        scheme = _ON_LOAD.get(_ALSO.get(option or "", option or ""), ())[column:][:1]
        if not scheme:
            found = f"is stored as {stored.form}" if stored else "is not quantised"
            raise ValueError(f"--quantization is {option}; {args.model_path} {found}: leave it out")
        (scheme,) = scheme
        if isinstance(scheme, str):
            raise ValueError(f"--quantization is {option}; it is refused on {platform.name}: {scheme}")
    if scheme is None:
        return dataclasses.replace(model, weight_scheme=None)
    if stored is not None:  # the head is quantised if the checkpoint's is
        scheme = dataclasses.replace(scheme, exempt=_ROUTERS)
    else:
        model = dataclasses.replace(model, copies_head=model.tie_embeddings and "lm_head" not in scheme.exempt)
    whole = option == "int4" or _divides(model, scheme, grid_of(args))
    return dataclasses.replace(
        model, weight_scheme=scheme if whole else dataclasses.replace(_INT8, exempt=scheme.exempt)
    )


def _divides(model: DecoderConfig, scheme: Scaled, grid: Grid) -> bool:
    """Tell whether each device's inputs are whole groups."""
    try:
        declare(dataclasses.replace(model, weight_scheme=scheme).shard(grid), "bfloat16")
    except ValueError:
        return False
    return True


def _repeats(option: str | None, form: Form) -> bool:
    return form.method == _SAME_METHOD.get(option or "", option) or form.kind in _SAME_KIND.get(option or "", ())


def say_weights(model: DecoderConfig, shard: DecoderConfig, dtype: str) -> None:
    """Log how quantised matrices are stored and held, the bytes that this saves on a device, and which stay plain floats."""
    stored, scheme = model.weight_format, model.weight_scheme
    if stored is None and scheme is None:
        return
    rounds = isinstance(scheme, Scaled) and (
        stored is None or stored.form.kind == "other" or _bare(scheme) != _bare(_as_stored(stored.form))
    )
    if rounds and scheme.dtype == "int4":
        lost = "a model of 135M parameters lost .24 to .43 nats a token so, in groups of 64"
        logger.warning("--quantization int4 rounds what was not made for it: %s", lost)
    as_floats = dataclasses.replace(shard, weight_scheme=None, copies_head=False)
    bytes_held, plain = weight_bytes(shard, dtype), weight_bytes(as_floats, dtype)
    logger.info(
        "Matrices%s are held as %s%s: weights take %s of a device, %s less than in %s.%s",
        f" stored as {stored.form}" if stored else "",
        scheme or dtype,
        ", rounded from their exact values" if rounds else "",
        log.size(bytes_held),
        log.size(plain - bytes_held),
        dtype,
        f" Plain floats stay {_wide(model, dtype)}." if scheme else "",
    )


def _bare(scheme: Scaled) -> Scaled:
    return dataclasses.replace(scheme, rounding=None, exempt=())


def _wide(model: DecoderConfig, dtype: str) -> str:
    """Say which matrices stay plain floats: those that always do, and those that the checkpoint stores so."""
    always, as_stored = collections.Counter[str](), collections.Counter[str]()
    for path, spec, as_held in flat_weights(model, dtype):
        if spec.is_matrix and not isinstance(as_held, Quantised) and path != ".embed":
            (as_stored if path in model.wide else always)[re.sub(r"^\.(layers\[\d+\]\.)?", "", path)] += 1
    own = ["embeddings", "norms", *always]
    of_checkpoint = [f"{name} ({n} times)" if n > 1 else name for name, n in as_stored.items()]
    return ", ".join(own) + (f" and, as the checkpoint has them, {', '.join(of_checkpoint)}" if of_checkpoint else "")
