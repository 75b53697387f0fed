"""The names of the one model and of its adapters, and what replies tell of it. Rank 0."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict
from typing import Any, Protocol

from autotp_serving import __version__
from autotp_serving.api.errors import ApiError
from autotp_serving.api.middleware import RequestRecord
from autotp_serving.config import ServingConfig
from autotp_serving.engine.adapters import AdapterTable
from autotp_serving.engine.sampling_defaults import SamplingDefaults


class NamesModel(Protocol):
    """A body that may say which model it is for."""

    @property
    def model(self) -> str | None:
        """A name, or None for the first."""
        ...


class ModelNames:
    """The names under which the one model is served, alone and with adapters.

    Args:
        adapters: those that are loaded, at any time; None where there can be none.

    Attributes:
        names: the preferred one first.
        sampling_defaults: of requests that leave a field out.
        fingerprint: of the program, the model and its formats.
    """

    def __init__(
        self,
        config: ServingConfig,
        max_model_len: int,
        sampling_defaults: SamplingDefaults,
        adapters: AdapterTable | None = None,
    ) -> None:
        self.names = config.model_names
        self._adapters = adapters or AdapterTable(0)
        # As vLLM's clients call a model that was given no other name; shown to nobody.
        self._path = None if config.served_model_name else config.model_path.rstrip("/")
        self._root = config.default_model_names[0]
        self._takes_any = config.any_model_name
        self._task = config.shown_task
        self._max_model_len = max_model_len
        self.sampling_defaults = sampling_defaults
        self._created = int(time.time())
        setup = f"{__version__} {config.model_path} {config.low_bit} {config.dtype}"
        self.fingerprint = f"fp_{hashlib.sha256(setup.encode()).hexdigest()[:12]}"

    def check(self, name: str | None) -> str:
        """The name to answer with. Raises ApiError 404 for a name that is not served."""
        if name is None:
            return self.names[0]
        if self._adapters.find(name) is not None:
            return name
        if name not in self.names and name.rstrip("/") != self._path:
            if self._takes_any:
                return self.names[0]
            raise ApiError(
                404,
                f"model: '{name}' is not served here; served: {', '.join(self.listed)}",
                param="model",
                code="model_not_found",
            )
        return name

    @property
    def listed(self) -> list[str]:
        """All names that clients are told."""
        return [*self.names, *(adapter.name for adapter in self._adapters.loaded)]

    def card(self, name: str) -> dict[str, Any]:
        """What /v1/models tells of a name."""
        found = self.check(name.rstrip("/"))
        return {
            "id": found,
            "object": "model",
            "created": self._created,
            "owned_by": "autotp-serving",
            "root": self._root,
            "parent": None if self._adapters.find(found) is None else self.names[0],
            "task": self._task,
            "max_model_len": self._max_model_len,
            "sampling_defaults": asdict(self.sampling_defaults),
        }

    def head(self, body: NamesModel, record: RequestRecord, prefix: str) -> dict[str, Any]:
        """Fields that start every reply; the record learns which adapter is asked for."""
        record.adapter = None if body.model is None else self._adapters.find(body.model)
        name = self.check(body.model) if record.adapter is None else record.adapter.name
        return {
            "id": record.request_id.replace("req-", prefix),
            "created": int(time.time()),
            "model": name,
            "system_fingerprint": self.fingerprint,
        }
