"""Models of the Hugging Face Hub, or of what HF_ENDPOINT names. One rank of each host.

huggingface_hub keeps the files in its cache (HF_HOME), where they are found again without a
network, and fetches with HF_TOKEN or what `hf auth login` has left.
"""

from __future__ import annotations

import atexit
import contextlib
import glob
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from autotp_serving.config import ConfigError
from autotp_serving.distributed.launch import LaunchError
from autotp_serving.low_bit.selection import MANIFEST_NAME
from autotp_serving.model.gguf.header import GgufError, read_header
from autotp_serving.model.hub.names import (
    BESIDE_GGUF,
    SINGLE_NAME,
    SPLIT,
    HubName,
    choose_gguf,
    choose_small_files,
    find_missing,
    is_complete,
    list_index,
    refuse_without_safetensors,
)
from autotp_serving.model.hub.progress import check_room, try_again, watch_download
from autotp_serving.model.hub.refusals import explain, is_offline
from autotp_serving.model_folder import INDEX_NAME

logger = logging.getLogger(__name__)

HEAD_BYTES = 2**17
"""As much as most heads of weights take."""
STORED_OTHERWISE = (
    MANIFEST_NAME,
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
    "hf_quant_config.json",
)
"""Files that tell of weights that are quantized already."""
MAX_HEAD_BYTES = 100 * 2**20  # the limit of safetensors itself


class HuggingFaceModel:
    """One model on the Hugging Face Hub, or on what HF_ENDPOINT names."""

    def __init__(self, name: HubName, revision: str | None, with_code: bool) -> None:
        try:
            import huggingface_hub
            from huggingface_hub import constants
        except ImportError as error:
            raise ConfigError(
                f"{name.text}: to fetch a model by name, pip install huggingface_hub ({error})"
            ) from error
        self._hub: Any = huggingface_hub
        self._name, self._revision, self._with_code = name, revision, with_code
        self._endpoint: str = constants.ENDPOINT
        self._cache = Path(constants.HF_HUB_CACHE).expanduser()
        self._home = self._cache / f"models--{name.repo.replace('/', '--')}"

    def fetch(self, needs_weights: bool) -> Path:
        """See `download`."""
        try:
            info = self._hub.HfApi(library_name="autotp-serving").model_info(
                self._name.repo, revision=self._revision, files_metadata=True, timeout=30
            )
        except Exception as error:  # of the hub's package, or of whatever HTTP client it uses
            refusal = self._explain(error)
            cached = self._find_cached(needs_weights)
            if cached is None:
                raise refusal from error
            if not is_offline(error):
                logger.warning("%s; what the cache holds is served", refusal)
            return cached
        sizes = {one.rfilename: one.size or 0 for one in info.siblings or []}
        commit: str = info.sha
        if self._name.wants_gguf:
            files = choose_gguf(sizes, self._name)
            small = choose_small_files(sizes, with_code=False)
            beside = [one for one in small if one in BESIDE_GGUF]
            if not needs_weights and not self._has(commit, files):
                folder = self._download(commit, beside, sizes)
                return self._copy_with_heads(folder, commit, files, sizes) / Path(files[0]).name
            return self._download(commit, [*files, *beside], sizes) / files[0]
        if "config.json" not in sizes and any(one.endswith(".gguf") for one in sizes):
            raise refuse_without_safetensors(self._name, sizes)
        if "config.json" not in sizes:
            raise ConfigError(
                f"{self._name.repo} has no config.json: it is no model that can be served"
            )
        folder = self._download(commit, choose_small_files(sizes, with_code=self._with_code), sizes)
        if INDEX_NAME in sizes:
            weights = list_index(folder / INDEX_NAME)
        elif SINGLE_NAME in sizes:
            weights = [SINGLE_NAME]
        else:
            raise refuse_without_safetensors(self._name, sizes)
        if unknown := [one for one in weights if one not in sizes]:
            raise ConfigError(
                f"{self._name.repo}: {INDEX_NAME} names {unknown[0]!r:.200}, which the repository "
                "lacks: it is incomplete"
            )
        if needs_weights:
            return self._download(commit, weights, sizes)
        if find_missing(folder, weights) and _needs_headers(folder):
            return self._copy_with_heads(folder, commit, weights, sizes)
        return folder

    def _find_cached(self, needs_weights: bool) -> Path | None:
        """What the cache holds of the revision, if it is complete."""
        revision = self._revision or "main"
        with contextlib.suppress(OSError):
            revision = (self._home / "refs" / revision).read_text().strip()
        folder = self._home / "snapshots" / revision
        if revision in ("", ".", "..") or not folder.is_dir():
            return None
        if not self._name.wants_gguf:
            return folder if is_complete(folder, needs_weights) else None
        files = {str(path.relative_to(folder)): 0 for path in folder.rglob("*.gguf")}
        try:
            found = choose_gguf(files, self._name)
        except ConfigError:
            return None
        parts = SPLIT.search(found[0])
        is_whole = parts is None or len(found) == int(parts[2])
        return folder / found[0] if is_whole and not find_missing(folder, found) else None

    def _download(self, commit: str, names: list[str], sizes: dict[str, int]) -> Path:
        """Bring files into the cache, in the folder of the commit."""
        folder = self._home / "snapshots" / commit
        missing = find_missing(folder, names)
        total = sum(sizes[name] for name in missing)
        check_room(self._name.text, total, self._cache, "HF_HOME")

        def fetch_once() -> None:
            from huggingface_hub.utils import disable_progress_bars

            disable_progress_bars()
            self._hub.snapshot_download(
                self._name.repo,
                revision=self._revision if self._follows(commit) else commit,
                allow_patterns=[glob.escape(name) for name in names],
                library_name="autotp-serving",
            )

        if missing:
            home = self._home / "blobs"
            try:
                watch_download(self._name.text, total, home, lambda: try_again(fetch_once))
            except (ConfigError, LaunchError):
                raise
            except Exception as error:
                raise self._explain(error) from error
        else:
            self._remember(commit)
        if missing := find_missing(folder, names):
            raise ConfigError(
                f"{self._name.text}: {missing[0]} did not come with the others: start again"
            )
        return folder

    def _follows(self, commit: str) -> bool:
        """Whether the branch may be named rather than its commit, which notes it in the cache."""
        reference = self._home / "refs" / (self._revision or "main")
        with contextlib.suppress(OSError):
            return reference.read_text().strip() != commit
        return True

    def _remember(self, commit: str) -> None:
        """Note which commit the branch is at, for starts without a network."""
        revision = self._revision or "main"
        if revision != commit and self._follows(commit):
            with contextlib.suppress(OSError):
                reference = self._home / "refs" / revision
                reference.parent.mkdir(parents=True, exist_ok=True)
                reference.write_text(commit)

    def _has(self, commit: str, names: list[str]) -> bool:
        return not find_missing(self._home / "snapshots" / commit, names)

    def _copy_with_heads(
        self, folder: Path, commit: str, weights: list[str], sizes: dict[str, int]
    ) -> Path:
        """A folder for --plan alone, in which weights have their heads and their sizes, but no
        numbers: those take no room."""
        target = Path(tempfile.mkdtemp(prefix="autotp-plan-"))
        atexit.register(shutil.rmtree, target, ignore_errors=True)
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.is_file() and not path.name.endswith((".safetensors", ".gguf")):
                shutil.copy(path, target)
        for name in weights:
            is_gguf = name.endswith(".gguf")
            path = target / (Path(name).name if is_gguf else name)
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                fetch_head = self._fetch_gguf_head if is_gguf else self._fetch_safetensors_head
                fetch_head(name, commit, path, sizes[name])
                os.truncate(path, sizes[name])
            except ConfigError:
                raise
            except Exception as error:
                raise self._explain(error) from error
        return target

    def _fetch_safetensors_head(self, name: str, commit: str, path: Path, size: int) -> None:
        data = self._fetch_range(name, commit, 0, min(size, HEAD_BYTES))
        num_bytes = 8 + int.from_bytes(data[:8], "little")
        if num_bytes > min(size, MAX_HEAD_BYTES):
            raise ConfigError(f"{self._name.repo}: {name} is no safetensors file")
        if num_bytes > len(data):
            data += self._fetch_range(name, commit, len(data), num_bytes)
        path.write_bytes(data)

    def _fetch_gguf_head(self, name: str, commit: str, path: Path, size: int) -> None:
        """Fetch more and more until it is whole, as only its end tells how long it is."""
        data, length = b"", HEAD_BYTES
        while True:
            length = min(length, size)
            data += self._fetch_range(name, commit, len(data), length)
            path.write_bytes(data)
            try:
                read_header(path, is_whole=False)
                return
            except GgufError:
                if length >= min(size, MAX_HEAD_BYTES):
                    raise
            length *= 4

    def _fetch_range(self, name: str, commit: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file."""
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = self._hub.hf_hub_url(self._name.repo, name, revision=commit)
        headers = build_hf_headers(library_name="autotp-serving")
        headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with get_session().stream("GET", url, headers=headers, timeout=30) as response:
            hf_raise_for_status(response)
            data = bytearray()
            for part in response.iter_bytes():
                data += part
                if response.status_code != 206 or len(data) > stop - start:
                    raise ConfigError(
                        f"{self._endpoint} answers no range requests, and without them --plan "
                        f"would fetch all of {name}: leave out --plan"
                    )
        return bytes(data)

    def _explain(self, error: Exception) -> ConfigError:
        return explain(error, self._name, self._revision, self._endpoint, self._cache)


def _needs_headers(folder: Path) -> bool:
    """Whether a plan asks how tensors are stored: where that is not what config.json implies."""
    if any((folder / name).is_file() for name in STORED_OTHERWISE):
        return True
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = {"quantization_config", "compression_config"}
        return isinstance(found, dict) and not names.isdisjoint(found)
    return False
