"""Models given by a hub id: downloaded from the Hugging Face hub or from ModelScope, and kept.

A download that broke off continues where it stopped. Files that are there already are not fetched again.
"""

import dataclasses
import fcntl
import hashlib
import http.client
import json
import logging
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from http.client import HTTPMessage
from pathlib import Path
from typing import IO, Any, Literal

logger = logging.getLogger(__name__)

MODELSCOPE = "https://www.modelscope.cn"
_TRIES = 5  # for a file whose connection breaks
_BLOCK = 1 << 20  # bytes read at a time


class HubError(ValueError):
    """The name is no path and no model that can be fetched; the message says what to check."""


@dataclasses.dataclass(frozen=True)
class Downloads:
    """Source of models given by a hub id, and the folder that keeps them."""

    source: Literal["huggingface", "modelscope"] = "huggingface"
    folder: str | None = None  # None: the source's own cache
    endpoint: str = MODELSCOPE  # for ModelScope; the Hugging Face library finds its own
    token: str | None = None  # for models of ModelScope that need one


HUGGING_FACE = Downloads()


def local_path(path: str, files: Sequence[str], downloads: Downloads, without: Sequence[str] = ()) -> Path:
    """Return the folder or file that `path` means. For a hub id, download the files that match `files` and not `without`.

    Raises HubError.
    """
    local = Path(path).expanduser()
    if local.exists():
        return local
    if not is_hub_id(path):
        cure = "give a model folder, a .gguf file or a hub id like Qwen/Qwen3-0.6B"
        raise HubError(f"{path}: no such file or folder; {cure}")
    download = _from_modelscope if downloads.source == "modelscope" else _from_hugging_face
    return download(path, files, without, downloads)


def refuse_no_model(path: str | Path) -> None:
    """Raise HubError for a file or folder of this machine in which there is no model."""
    local = Path(path).expanduser()
    has_model = (local / "config.json").exists() or any(local.glob("*.gguf"))
    if local.suffix != ".gguf" and local.exists() and not has_model:
        raise HubError(f"{path} is no model: no config.json, no .gguf; give a model's folder, a .gguf file or a hub id")


def is_hub_id(path: str) -> bool:
    """Return whether it has the form of a model's id and is no file or folder here."""
    local = Path(path).expanduser()
    has_form = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path) is not None and local.suffix != ".gguf"
    return has_form and not local.exists()


def _from_hugging_face(name: str, files: Sequence[str], without: Sequence[str], downloads: Downloads) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from tqdm.auto import tqdm

    progress = Progress(name)

    class Reported(tqdm):
        """Turns the library's progress bars that count bytes into lines in our log."""

        def __init__(self, *args: Any, **options: Any):
            self._counts_bytes = options.get("unit") == "B"
            super().__init__(*args, **options | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self._counts_bytes:
                progress.at(int(self.n), int(self.total or 0))

    try:
        folder, taken, left = downloads.folder, list(files), list(without)
        found = snapshot_download(
            name, cache_dir=folder, allow_patterns=taken, ignore_patterns=left, tqdm_class=Reported
        )
    except LocalEntryNotFoundError as error:
        problem = f"{name} is neither a local path nor in the download cache, and the hub cannot be reached"
        cure = "check the path, the network, HF_ENDPOINT and HF_HUB_OFFLINE, or point --download-dir at a filled cache"
        raise HubError(f"{problem}; {cure}") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        cure = "check the name, and set HF_TOKEN if the model is gated"
        reason = str(error).strip().partition("\n")[0]
        raise HubError(f"{name} is no local path and could not be fetched from the hub: {reason}; {cure}") from error
    return Path(found)


def _from_modelscope(name: str, files: Sequence[str], without: Sequence[str], downloads: Downloads) -> Path:
    """Use ModelScope's API: one request lists the files with sizes and hashes, one more fetches each."""
    from huggingface_hub.utils import filter_repo_objects

    model = f"{downloads.endpoint.rstrip('/')}/api/v1/models/{urllib.parse.quote(name)}/repo"
    folder = Path(downloads.folder or "~/.cache/modelscope/hub/models").expanduser() / name
    try:
        with _open(f"{model}/files?Revision=master&Recursive=true", downloads.token) as answer:
            listed = json.load(answer)["Data"]["Files"]
        stored = {f["Path"]: f for f in listed if f.get("Type") != "tree"}
        paths = filter_repo_objects(stored, allow_patterns=list(files), ignore_patterns=list(without))
        chosen = [stored[path] for path in paths]
        progress, done, total = Progress(name), 0, sum(f["Size"] for f in chosen)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        cure = "check the name, the network, and MODELSCOPE_API_TOKEN if the model needs one"
        problem = f"{name} is no local path and could not be fetched from ModelScope ({downloads.endpoint}): {error}"
        raise HubError(f"{problem}; {cure}") from error
    for f in chosen:
        target = folder / f["Path"]
        if not target.resolve().is_relative_to(folder.resolve()):
            raise HubError(f"{name} lists a file outside its folder: {f['Path']}")
        if not _is_whole(target, f["Size"]):
            url = f"{model}?{urllib.parse.urlencode({'Revision': 'master', 'FilePath': f['Path']})}"
            try:
                _fetch_file(url, target, f, downloads.token, lambda n, done=done: progress.at(done + n, total))
            except OSError as error:
                problem = f"{f['Path']} of {name} could not be fetched from ModelScope: {error}"
                raise HubError(f"{problem}; start again: what has arrived is kept") from error
        done += f["Size"]
    return folder


def _fetch_file(
    url: str, target: Path, about: dict[str, Any], token: str | None, arrived: Callable[[int], None]
) -> None:
    """Download into `target`, by way of a part file that a broken download leaves and the next one continues.

    `about` is the file's entry in ModelScope's list. Raises OSError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part, size = target.with_name(f"{target.name}.part"), about["Size"]
    with open(part, "a+b") as out:
        fcntl.flock(out, fcntl.LOCK_EX)  # both processes of a server fetch the tokenizer's files
        if _is_whole(target, size):
            part.unlink(missing_ok=True)
            return
        have = os.fstat(out.fileno()).st_size
        for attempt in range(_TRIES):
            if have >= size:
                break
            try:
                with _open(url, token, start=have) as answer:
                    if answer.status != 206:
                        out.truncate(0)
                        have = 0
                    while block := answer.read(_BLOCK):
                        have += out.write(block)
                        arrived(have)
            except urllib.error.HTTPError:
                raise
            except (OSError, http.client.HTTPException) as error:
                logger.warning("%s: the connection broke after %d of %d bytes (%s)", target.name, have, size, error)
                time.sleep(min(attempt, 2))
        if have < size:
            raise OSError(f"{have} of {size} bytes arrived")
        out.seek(0)
        listed = about.get("Sha256")
        if have > size or (listed and hashlib.file_digest(out, "sha256").hexdigest() != listed):
            part.unlink()
            raise OSError("it is not the file that is listed: its size or its SHA-256 differs")
        os.replace(part, target)


def _is_whole(target: Path, size: int) -> bool:
    return target.is_file() and target.stat().st_size == size


def _open(url: str, token: str | None, start: int = 0) -> http.client.HTTPResponse:
    headers = {"User-Agent": "sgl-jax"} | ({"Range": f"bytes={start}-"} if start else {})
    headers |= {"Authorization": f"Bearer {token}"} if token else {}
    return urllib.request.build_opener(_Redirects).open(urllib.request.Request(url, headers=headers), timeout=30)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Redirects without the token to other hosts, which keep the large files: urllib alone would send it there, too."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        onward = super().redirect_request(req, fp, code, msg, headers, newurl)
        if onward is not None and (onward.type, onward.host) != (req.type, req.host):
            onward.remove_header("Authorization")
        return onward


class Progress:
    """Logs a line every few seconds: the bytes of a download that have arrived, and those known to come."""

    def __init__(self, name: str, seconds: float = 10.0):
        self._name, self._seconds, self._last = name, seconds, time.monotonic()

    def at(self, done: int, total: int) -> None:
        if time.monotonic() - self._last >= self._seconds:
            self._last = time.monotonic()
            logger.info("downloading %s: %.2f of %.2f GB", self._name, done / 1e9, total / 1e9)
