"""Self-test on the devices of this machine: each kernel against a reference in float64 numpy, and steps of a model."""

import contextlib
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sgl_jax.engine.core import Core
from sgl_jax.engine.messages import Generate, StepOutput
from sgl_jax.engine.startup import build_core
from sgl_jax.models.bundled import bundled
from sgl_jax.models.layers import gated
from sgl_jax.ops.attention import reference as attention_reference
from sgl_jax.ops.attention.api import AttentionLayer, AttentionSpec, make_ragged_batch
from sgl_jax.ops.attention.backends import Backend, NoSuchBackend, find_backend
from sgl_jax.ops.dense.api import DenseProduct, GatedProduct, plain_product
from sgl_jax.ops.experts import reference as experts_reference
from sgl_jax.ops.experts.api import RoutedExperts
from sgl_jax.ops.grouped_matmul import reference as grouped_reference
from sgl_jax.ops.grouped_matmul.api import GroupedMatmul
from sgl_jax.ops.norm_rope import Norms
from sgl_jax.request import SamplingParams
from sgl_jax.runtime.compiler import matmul_precision
from sgl_jax.runtime.platform import Name, Platform, dense_for, grouped_matmul_for, pick_devices, routed_experts_for
from sgl_jax.settings.server_args import ServerArgs

BACKENDS = ("native", "fa")
# Largest difference, for values around 1: a rounding of the dtype at each of the few places where one happens.
ALLOWED = {"bfloat16": 0.04, "float32": 0.001}


@dataclasses.dataclass(frozen=True)
class Check:
    name: str
    error: float | None = None  # the largest difference, NaN if it raised; None: not run
    allowed: float = 0.0
    note: str = ""  # why it was not run, or how it failed

    @property
    def passed(self) -> bool:
        return self.error is None or self.error <= self.allowed


def selftest(platform_name: Name, say: Callable[[str], None]) -> bool:
    """Test all devices of the platform, and `say` each line as it comes. Return whether nothing failed. Raises NoDevice."""
    started = time.perf_counter()
    platform, _ = pick_devices(platform_name)
    devices = jax.local_devices(backend=platform.name)
    say(f"\nSelf-test on {len(devices)} x {devices[0].device_kind}: the largest difference from a reference")
    passed = True
    for check in checks(platform, len(devices)):
        say(check_line(check))
        passed &= check.passed
    say(f"{'All passed' if passed else 'FAILED'}, in {time.perf_counter() - started:.0f} s")
    return passed


def check_line(check: Check) -> str:
    state = "not run" if check.error is None else "ok" if check.passed else "FAILED"
    return f"  {state:8s}{check.name:30s} {check.note or f'{check.error:.2g}, {check.allowed:g} allowed'}"


def checks(platform: Platform, num_devices: int) -> Iterator[Check]:
    """Yield every check: kernels on the first device, the model on all. One that raises has failed, and the next one runs."""
    for dtype in dict.fromkeys((platform.dtype, "float32")):
        for name in BACKENDS:
            title = f"attention {name}, {dtype}"
            try:
                backend = find_backend(name, platform.name, vectorise=platform.vectorises_rows)
            except NoSuchBackend as reason:
                yield Check(title, note=str(reason).partition(": ")[2].partition(";")[0])
                continue
            yield _run(title, ALLOWED[dtype], dtype, partial(attention_error, backend, dtype))
        error = partial(grouped_matmul_error, grouped_matmul_for(platform.name), dtype)
        yield _run(f"grouped matmul, {dtype}", ALLOWED[dtype], dtype, error)
        if dtype == "bfloat16" and (dense := dense_for(platform.name)) is not None:
            yield _run(f"dense layers, {dtype}", ALLOWED[dtype], dtype, partial(dense_error, *dense, dtype))
        if (routed := routed_experts_for(platform.name)) is not None:
            yield _run(f"experts, {dtype}", ALLOWED[dtype], dtype, partial(experts_error, routed, dtype))
    error = partial(model_error, platform.name, num_devices)
    yield _run(f"model, {platform.dtype}", ALLOWED[platform.dtype], platform.dtype, error)


def _run(name: str, allowed: float, dtype: str, error: Callable[[], float]) -> Check:
    try:
        with jax.default_matmul_precision(matmul_precision(dtype)):
            found = error()
    except Exception as problem:  # the report says so, and goes on
        return Check(name, np.nan, note=f"{type(problem).__name__}: {problem}".partition("\n")[0])
    return Check(name, found, allowed)


def attention_error(backend: Backend, dtype: str) -> float:
    """Return the largest difference of outputs, for decoding rows and chunks together in a pool of two layers."""
    heads, kv_heads, head_dim, num_tokens, num_rows = 8, 2, 128, 256, 8
    multiple = backend.page_multiple(np.dtype(dtype))
    page_size = -(-16 // multiple) * multiple
    start = np.array([0, 37, 511, 900, 0, 130, 7, 0], np.int32)
    num_new = np.array([1, 1, 1, 1, 65, 100, 16, 0], np.int32)
    row_pages = 1024 // page_size
    rng = np.random.default_rng(1)
    num_pages = num_rows * row_pages + 1
    table = 1 + rng.permutation(num_pages - 1).astype(np.int32).reshape(num_rows, row_pages)
    width = backend.pool_head_dim(head_dim)

    def random(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape).astype(np.float32)).astype(dtype)

    q = random(num_tokens, heads, head_dim)
    k, v = random(num_tokens, kv_heads, head_dim), random(num_tokens, kv_heads, head_dim)
    kv = random(2 * num_pages, kv_heads, 2, page_size, width)
    rows = jnp.asarray(table), jnp.asarray(start), jnp.asarray(num_new), jnp.int32(4)
    batch = make_ragged_batch(*rows, num_tokens, page_size)
    layer = AttentionLayer(AttentionSpec(head_dim**-0.5), jnp.int32(num_pages))
    wanted, pool = attention_reference.paged_attention(q, k, v, kv[..., :head_dim], batch, layer)
    out, new_pool = jax.jit(backend)(q, k, v, kv, batch, layer)
    used = int(num_new.sum())
    error = np.abs(np.asarray(out, np.float64) - wanted)[:used].max()
    pages = np.arange(1, num_pages)  # page 0 of a layer holds nothing
    pool_error = np.abs(np.asarray(new_pool[..., :head_dim], np.float64) - pool)
    return float(np.max([error, pool_error[pages].max(), pool_error[num_pages + pages].max()]))


def grouped_matmul_error(grouped_matmul: GroupedMatmul, dtype: str) -> float:
    """Return the largest difference of outputs, with groups of all sizes, empty ones too, and some padding."""
    rng = np.random.default_rng(2)
    sizes = np.array([0, 1, 60, 7, 0, 130, 16, 20], np.int32)
    x = jnp.asarray(rng.standard_normal((256, 256)).astype(np.float32)).astype(dtype)
    w = jnp.asarray(rng.standard_normal((2, len(sizes), 384, 256)).astype(np.float32) / 16).astype(dtype)
    out = jax.jit(grouped_matmul)(x, w, jnp.int32(1), sizes)
    used = int(sizes.sum())
    wanted = grouped_reference.grouped_matmul(np.asarray(x, np.float64), np.asarray(w, np.float64), 1, sizes)
    return float(np.abs(np.asarray(out, np.float64) - wanted)[:used].max())


def dense_error(product: DenseProduct, gated_product: GatedProduct, norms: Norms, dtype: str) -> float:
    """Return the largest difference of norms, of products behind them and of an activation, for 1024 tokens."""
    rng = np.random.default_rng(4)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape).astype(np.float32)).astype(dtype)  # noqa: E731
    x, weight, w, gate_up = draw(1024, 1024), 0.5 + draw(1024) / 16, draw(1152, 1024) / 64, draw(2 * 1152, 1024) / 64
    silu = partial(gated, activation="silu")

    def layer(x, weight, w, gate_up):
        x, h = norms.added_norm(x, norms.norm(x, weight, 1e-6), weight, 1e-6)
        halves = jnp.split(plain_product(h, gate_up), 2, axis=-1)
        act = gated_product(h, gate_up, silu)
        return x, h, product(h, w), silu(*halves) if act is None else act

    def norm64(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight64

    found = jax.jit(layer)(x, weight, w, gate_up)
    x64, weight64, w64, gate_up64 = (np.asarray(array, np.float64) for array in (x, weight, w, gate_up))
    total64 = x64 + norm64(x64)
    h64 = norm64(total64)
    gate, up = np.split(h64 @ gate_up64.T, 2, axis=-1)
    wanted = total64, h64, h64 @ w64.T, gate / (1 + np.exp(-gate)) * up
    return float(
        max(np.abs(np.asarray(out, np.float64) - exact).max() for out, exact in zip(found, wanted, strict=True))
    )


def experts_error(routed: RoutedExperts, dtype: str) -> float:
    """Return the largest difference of outputs, for 200 tokens with three of eight experts each, one of which has none."""
    rng = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape).astype(np.float32))  # noqa: E731
    arrays = draw(200, 256), draw(2, 8, 2 * 384, 256) / 16, draw(2, 8, 256, 384) / 16
    x, gate_up, down = (array.astype(dtype) for array in arrays)
    expert = np.stack([rng.permutation(9)[:3] for _ in range(200)]).astype(np.int32)
    expert[expert == 5] = 8  # number 8 is none
    weights = rng.random((200, 3)).astype(np.float32)
    silu = partial(gated, activation="silu")
    out = jax.jit(partial(routed, gated=silu, num_experts=8))(x, gate_up, down, jnp.int32(1), expert, weights)
    wanted = experts_reference.routed_experts(x, gate_up, down, 1, expert, weights)
    return float(np.abs(np.asarray(out, np.float64) - wanted).max())


@contextlib.contextmanager
def small_model(platform: Name | None, tp_size: int) -> Iterator[ServerArgs]:
    """Give the flags of a launch of two layers of Qwen3-0.6B with few tokens and random weights, which are the same on every
    platform. Its folder is there until the end of the context."""
    config = json.loads(bundled()["Qwen3-0.6B"]) | {"num_hidden_layers": 2, "vocab_size": 8192, "eos_token_id": 0}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield ServerArgs(
            model_path=folder,
            load_format="dummy",
            device=platform,
            tp_size=tp_size,
            max_running_requests=2,
            chunked_prefill_size=16,
            context_length=256,
            max_total_tokens=2048,
            random_seed=0,
        )


def model_error(platform: Name, num_devices: int) -> float:
    """Return the largest difference between the log probabilities of tokens as an engine decodes them, and those that it
    gives to the same tokens in a prompt. Its model is the small one."""
    with small_model(platform, 1 << min(3, num_devices.bit_length() - 1)) as args:  # the model has eight KV heads
        core = build_core(args)
    prompt_len = 50
    texts = np.random.default_rng(0).integers(0, core.info.vocab_size, (2, prompt_len)).tolist()
    decoding = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=8, logprobs=0)
    decoded: list[list[float]] = [[] for _ in texts]
    for output in results_of(core, [Generate(key, list(text), decoding) for key, text in enumerate(texts)]):
        for at, (key, token) in enumerate(zip(output.keys, output.tokens, strict=True)):
            texts[key].append(token)
            decoded[key].append(output.logprobs[at].logprob)
    scoring = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    # A namespace of their own keeps them from the pages that decoding left.
    outputs = results_of(core, [Generate(key, text, scoring, namespace="again") for key, text in enumerate(texts)])
    core.close()
    scored = {prompt.key: prompt.logprobs or [] for output in outputs for prompt in output.prompts}
    prefilled = [[score.logprob for score in scored[key][prompt_len:] if score] for key in range(len(texts))]
    return float(np.abs(np.subtract(decoded, prefilled)).max())


def results_of(core: Core, requests: Iterable[Generate]) -> list[StepOutput]:
    """Run the requests to their ends, and return the results of all steps."""
    for request in requests:
        core.handle(request)
    events = []
    while core.busy:
        events += core.step()
    return [event for event in events if isinstance(event, StepOutput)]
