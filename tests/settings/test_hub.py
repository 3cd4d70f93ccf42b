"""Models that are named: what is fetched, from where, and what is said when it cannot be."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tokenizers

from messages import says
from scripted_hub import FILES, Hub, serving
from sgl_jax.settings.hub import Downloads, HubError, Progress, local_path
from sgl_jax.settings.server_args import ServerArgs
from sgl_jax.text.tokenizer import load_tokenizer

WANTED = ["*.json", "*.safetensors"]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as server:
        yield server


def fetch_in_a_process(cache: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """The Hugging Face library reads its variables when it is imported."""
    source = (
        "import logging; logging.basicConfig(level='INFO')\n"
        "from sgl_jax.settings import hub\n"
        "hub.Progress.__init__.__defaults__ = (0.0,)\n"
        f"print(hub.local_path('org/model', {WANTED}, hub.Downloads(folder={str(cache)!r}), ['original/*']))"
    )
    keep = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    return subprocess.run(
        [sys.executable, "-c", source], env=keep | environ, capture_output=True, text=True, timeout=100, check=False
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


CHOSEN = {name: FILES[name] for name in ("config.json", "model.safetensors")}


def test_hugging_face_from_hf_endpoint_resumed_reported_and_then_offline(hub: Hub, tmp_path: Path) -> None:
    chunk = 10 << 20  # bytes that the library writes at a time
    hub.files["model.safetensors"], hub.breaks_at = bytes(chunk + 5000), chunk + 3000
    first = fetch_in_a_process(tmp_path, HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET="1")
    assert first.returncode == 0, first.stderr
    assert contents(Path(first.stdout.strip())) == {name: hub.files[name] for name in CHOSEN}
    assert hub.transfers("model.safetensors") == [None, f"bytes={chunk}-"]
    assert says(first.stderr, "org/model: 0.01 of 0.01 GB")
    number = len(hub.seen)
    offline = fetch_in_a_process(tmp_path, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert (offline.returncode, offline.stdout) == (0, first.stdout)
    assert len(hub.seen) == number
    empty = fetch_in_a_process(tmp_path / "other", HF_HUB_OFFLINE="1")
    assert says(empty.stderr, "HubError: org/model … cache")


def modelscope(hub: Hub, cache: Path, **options: str) -> Path:
    downloads = Downloads("modelscope", str(cache), hub.url, **options)
    return local_path("org/model", WANTED, downloads, without=["original/*"])


def test_modelscope_fetches_what_is_wanted_and_goes_on_where_it_broke_off(hub: Hub, tmp_path: Path) -> None:
    found = modelscope(hub, tmp_path, token="secret")
    assert found == tmp_path / "org/model"
    assert contents(found) == CHOSEN
    assert hub.transfers("model.safetensors") == [None, "bytes=5000-"]
    assert hub.authorizations == {"Bearer secret"}
    number = len(hub.seen)
    assert modelscope(hub, tmp_path) == found
    assert len(hub.seen) == number  # nothing is fetched twice


def test_modelscope_goes_on_after_the_process_ended(hub: Hub, tmp_path: Path) -> None:
    part = tmp_path / "org/model/model.safetensors.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(FILES["model.safetensors"][:100])
    hub.breaks = 0
    assert contents(modelscope(hub, tmp_path)) == CHOSEN
    assert hub.transfers("model.safetensors") == ["bytes=100-"]


@pytest.mark.parametrize("host", ["the same", "another"])
def test_the_token_of_modelscope_is_for_its_own_host_only(hub: Hub, tmp_path: Path, host: str) -> None:
    """Large files are redirected to a store. One that breaks off goes on there as well."""
    with serving() as other:
        store = hub if host == "the same" else other
        hub.store = store.url
        found = modelscope(hub, tmp_path, token="secret")
    assert contents(found) == CHOSEN
    assert store.transfers("model.safetensors") == [None, "bytes=5000-"]
    assert hub.authorizations == {"Bearer secret"}
    assert other.authorizations == (set() if host == "the same" else {None})


def test_two_at_once_fetch_each_file_once(hub: Hub, tmp_path: Path) -> None:
    """As the two processes of a server do."""
    hub.breaks = 0
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: modelscope(hub, tmp_path), range(2)))
    assert contents(found[0]) == contents(found[1]) == CHOSEN
    assert hub.transfers("model.safetensors") == hub.transfers("config.json") == [None]


def test_a_part_that_was_whole_is_taken(hub: Hub, tmp_path: Path) -> None:
    part = tmp_path / "org/model/config.json.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(FILES["config.json"])
    assert contents(modelscope(hub, tmp_path)) == CHOSEN
    assert hub.transfers("config.json") == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("hash", r"model\.safetensors .*org/model"),
        ("outside", r"\.\./\.\./config\.json"),
        ("listing", r"org/model .*ModelScope .*'Size'"),
        ("gone", r"org/absent .*ModelScope"),
    ],
)
def test_what_modelscope_cannot_give(hub: Hub, tmp_path: Path, spoil: str, message: str) -> None:
    if spoil == "hash":
        hub.listed_sha256 = "0" * 64
    elif spoil == "listing":
        hub.listed_beside = [{"Path": "more.json", "Type": "blob"}]
    elif spoil == "outside":
        hub.files = {"../../config.json": b"{}"}
    name = "org/absent" if spoil == "gone" else "org/model"
    with pytest.raises(HubError, match=message):
        local_path(name, WANTED, Downloads("modelscope", str(tmp_path), hub.url))
    assert not (tmp_path / "org/model/model.safetensors").exists()


def test_the_source_is_a_flag_and_its_address_modelscopes_own_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODELSCOPE_DOMAIN", raising=False)
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "secret")
    args = ServerArgs(model_path="org/model", download_source="modelscope", download_dir="there")
    assert args.downloads == Downloads("modelscope", "there", "https://www.modelscope.cn", "secret")
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "www.modelscope.ai")
    assert args.downloads.endpoint == "https://www.modelscope.ai"


@pytest.mark.parametrize(
    "path", ["/no/such/model", "./nothing", "~/nothing", "a/b/c", "org/..", "some where", "absent.gguf"]
)
def test_a_path_that_is_not_there_is_no_hub_id(path: str) -> None:
    with pytest.raises(HubError, match=f"{re.escape(path)}.* model folder"):
        local_path(path, WANTED, Downloads())


def test_progress_is_a_line_every_few_seconds(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        Progress("org/model").at(1, 2)
        Progress("org/model", seconds=0.0).at(1_500_000_000, 3_000_000_000)
    [said] = [record.message for record in caplog.records]
    assert says(said, "org/model: 1.50 of 3.00 GB")


def test_a_tokenizer_by_name_comes_with_all_its_templates(hub: Hub, tmp_path: Path) -> None:
    bare = tokenizers.Tokenizer(tokenizers.models.BPE()).to_str().encode()
    named = "additional_chat_templates/rag.jinja"
    hub.files = {"tokenizer.json": bare, "chat_template.jinja": b"one", named: b"two", "model.safetensors": b"no"}
    tokenizer = load_tokenizer("org/model", downloads=Downloads("modelscope", str(tmp_path), hub.url))
    assert tokenizer.chat_template("rag") is not tokenizer.chat_template()
    assert set(contents(tmp_path / "org/model")) == {"tokenizer.json", "chat_template.jinja", named}
