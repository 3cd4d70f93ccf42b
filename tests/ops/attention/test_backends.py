"""Backends by name, and those that other packages bring."""

from __future__ import annotations

import json
import sys
import types
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import arguments, random_batch

import sgl_jax
from sgl_jax.ops.attention import backends, native
from sgl_jax.ops.attention.api import AttentionSpec, write_kv
from sgl_jax.ops.attention.backends import Backend, NoSuchBackend, find_backend

PLUGIN = """
from sgl_jax.ops.attention.backends import Backend
from sgl_jax.ops.attention.native import paged_attention

def doubled(q, k, v, kv, batch, layer):
    out, kv = paged_attention(q, k, v, kv, batch, layer)
    return 2 * out, kv

backend = Backend(doubled, platforms=frozenset({"cpu"}), page_multiple=lambda dtype: 8)
something = 3
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A package, as pip would install it, that brings the backends `double` and `wrong`."""
    (tmp_path / "double_attention.py").write_text(PLUGIN)
    info = tmp_path / "double_attention-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: double-attention\nVersion: 1.0\n")
    points = "[sgl_jax.attention]\ndouble = double_attention:backend\nwrong = double_attention:something\n"
    (info / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(tmp_path))
    metadata.MetadataPathFinder().invalidate_caches()
    yield
    sys.modules.pop("double_attention", None)


def test_an_installed_package_brings_a_backend_that_computes(plugin):
    backend = find_backend("double", "cpu", vectorise=False)
    assert (backend.page_multiple(jnp.float32), backend.pool_head_dim(80)) == (8, 80)
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "page_size": 16, "num_tokens": 16, "num_rows": 2}
    b = random_batch(np.random.default_rng(0), [(5, 1), (20, 9)], **sizes)
    given = arguments(b, AttentionSpec(0.25))
    expected, _ = native.paged_attention(*given)
    out, _ = backend(*given)
    np.testing.assert_array_equal(out, 2 * expected)


def dense(q, k, v, kv, batch, layer):
    """Attend to all pages of a row's table at once: a whole backend for models without windows and soft caps."""
    q, k = (q, k) if layer.prepare is None else layer.prepare(q, k)
    kv = write_kv(kv, k, v, batch, layer)
    pages = kv[batch.page_table + layer.first_page]  # [S, pages, K, 2, page, H]
    rows, _, heads, _, _, width = pages.shape
    keys, values = pages.transpose(3, 0, 2, 1, 4, 5).reshape(2, rows, heads, -1, width)[:, batch.token_row]
    scores = jnp.einsum("tkgh,tkph->tkgp", q.reshape(len(q), heads, -1, width), keys) * layer.spec.scale
    visible = jnp.arange(keys.shape[2]) <= batch.positions[:, None]
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("tkgp,tkph->tkgh", weights, values).reshape(q.shape), kv


def test_a_backend_of_a_dozen_lines_serves_the_reference_s_tokens(monkeypatch, stories260k: Path, golden: Path):
    point = types.SimpleNamespace(name="dense", load=lambda: Backend(dense, platforms=frozenset({"cpu"})))
    monkeypatch.setattr(metadata, "entry_points", lambda **group: [point] if group == {"group": backends.GROUP} else [])
    cases = json.loads((golden / "stories260k.json").read_text())["cases"]
    options = {"max_running_requests": 4, "chunked_prefill_size": 8, "max_total_tokens": 1024, "context_length": 128}
    options |= {"dtype": "float32", "device": "cpu", "attention_backend": "dense"}
    greedy = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
    with sgl_jax.Engine(model_path=str(stories260k), **options) as engine:
        answers = engine.generate(input_ids=[case["prompt_ids"] for case in cases], sampling_params=greedy)
    assert [answer["output_ids"] for answer in answers] == [case["output_ids_200_greedy"][:24] for case in cases]


def test_what_is_no_backend_is_said(plugin):
    with pytest.raises(NoSuchBackend, match=r"--attention-backend wrong.* double_attention:something .*Backend"):
        find_backend("wrong", "cpu", vectorise=False)
    with pytest.raises(NoSuchBackend, match=r"--attention-backend x.* native, cpu, fa, double, tokamax, wrong$"):
        find_backend("x", "cpu", vectorise=False)


def test_a_backend_of_another_platform_is_refused(plugin):
    with pytest.raises(NoSuchBackend, match=r"double.* cpu.* tpu.* native$"):
        find_backend("double", "tpu", vectorise=True)
    with pytest.raises(NoSuchBackend, match=r"fa.* tpu.* cpu.* native$"):
        find_backend("fa", "cpu", vectorise=False)


def test_a_backend_that_knows_no_latent_vectors_is_refused_for_a_model_that_keeps_them(plugin):
    for name in ("native", "fa"):
        assert find_backend(name, "tpu", vectorise=True, latent=True).latent
    with pytest.raises(NoSuchBackend, match=r"--attention-backend double.*latent .*MLA"):
        find_backend("double", "cpu", vectorise=True, latent=True)


def test_fa_says_what_pool_it_needs():
    backend = find_backend("fa", "tpu", vectorise=True)
    assert isinstance(backend, Backend)
    assert [backend.pool_head_dim(n) for n in (64, 80, 128, 192, 256, 576)] == [128, 128, 128, 256, 256, 640]
    assert [backend.page_multiple(dtype) for dtype in (jnp.float32, jnp.bfloat16, jnp.int8)] == [8, 16, 32]
