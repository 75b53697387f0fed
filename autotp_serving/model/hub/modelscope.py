"""Models of ModelScope, by its own package. One rank of each host."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

from autotp_serving.config import ConfigError
from autotp_serving.model.hub.names import (
    NEVER,
    SINGLE_NAME,
    SMALL_PATTERNS,
    HubName,
    find_missing,
    list_index,
)
from autotp_serving.model.hub.progress import one_line
from autotp_serving.model_folder import INDEX_NAME, TEMPLATE_FOLDER
from autotp_serving.pooling import POOLING_FOLDER, SCORE_FOLDER


class ModelScopeModel:
    """One model on ModelScope, by its own package."""

    def __init__(self, name: HubName, revision: str | None, with_code: bool) -> None:
        try:
            from modelscope import snapshot_download  # type: ignore[import-not-found]
        except ImportError as error:
            raise ConfigError(
                f"--hub modelscope needs its package: pip install modelscope ({one_line(error)})"
            ) from error
        if name.wants_gguf:
            raise ConfigError(
                f"{name.text}: --hub modelscope fetches safetensors only: download the GGUF file "
                f"with `modelscope download --model {name.repo} FILE.gguf` and name it by its path"
            )
        self._snapshot: Callable[..., str] = snapshot_download
        self._name, self._revision, self._with_code = name, revision, with_code

    def fetch(self, needs_weights: bool) -> Path:
        """See `download`."""
        patterns = [*SMALL_PATTERNS, f"{TEMPLATE_FOLDER}/*.jinja"]
        patterns += [f"{one}/config.json" for one in (POOLING_FOLDER, SCORE_FOLDER)]
        folder = self._download([*patterns, "*.py"] if self._with_code else patterns)
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"{self._name.repo} has no config.json on ModelScope: it is no model that can be "
                "served"
            )
        if not needs_weights:
            return folder
        index = folder / INDEX_NAME
        weights = list_index(index) if index.is_file() else [SINGLE_NAME]
        if find_missing(folder, weights):
            folder = self._download(weights)
        if missing := find_missing(folder, weights):
            raise ConfigError(
                f"{self._name.repo} holds no {missing[0]} on ModelScope: its weights must be "
                "safetensors"
            )
        return folder

    def _download(self, patterns: list[str]) -> Path:
        try:
            return Path(
                self._snapshot(
                    self._name.repo,
                    revision=self._revision,
                    allow_file_pattern=patterns,
                    ignore_file_pattern=list(NEVER),
                )
            )
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ConfigError(
                    f"{self._name.text}: the disk is full: free some of it, or set "
                    "MODELSCOPE_CACHE to a folder on another disk"
                ) from error
            raise self._explain(error) from error
        except Exception as error:  # of the package, or of whatever HTTP client it uses
            raise self._explain(error) from error

    def _explain(self, error: Exception) -> ConfigError:
        return ConfigError(
            f"{self._name.text} cannot be fetched from ModelScope "
            f"({type(error).__name__}: {one_line(error)}): check the name and the network, or run "
            f"`modelscope download --model {self._name.repo}` and name its folder"
        )
