"""Models given by their names on a hub: see `download`. One rank of each host, without torch."""

from __future__ import annotations

from pathlib import Path

from autotp_serving.model.hub.names import HubName


def download(
    name: HubName, hub: str, revision: str | None, *, needs_weights: bool, with_code: bool
) -> Path:
    """Fetch a model, or find it in the hub's cache.

    Args:
        needs_weights: False fetches what --plan reads: no weights, at most their headers.
        with_code: Python files too.

    Returns:
        The folder of its files; of a GGUF file the (first) file itself.

    Raises:
        ConfigError: it cannot be had; in one line, with the command that helps.
        LaunchError: the download has stalled.
    """
    if hub == "modelscope":
        from autotp_serving.model.hub.modelscope import ModelScopeModel

        return ModelScopeModel(name, revision, with_code).fetch(needs_weights)
    from autotp_serving.model.hub.huggingface import HuggingFaceModel

    return HuggingFaceModel(name, revision, with_code).fetch(needs_weights)
