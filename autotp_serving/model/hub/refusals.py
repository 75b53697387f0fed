"""Why a model did not come from the Hugging Face Hub, and what helps. One rank of each host."""

from __future__ import annotations

import errno
from pathlib import Path

from autotp_serving.config import ConfigError
from autotp_serving.model.hub.names import HubName
from autotp_serving.model.hub.progress import one_line


def is_offline(error: Exception) -> bool:
    """Whether HF_HUB_OFFLINE kept from asking the hub."""
    return type(error).__name__ == "OfflineModeIsEnabled"


def explain(
    error: Exception, name: HubName, revision: str | None, endpoint: str, cache: Path
) -> ConfigError:
    """One line for whatever kept a model from coming.

    Args:
        error: of huggingface_hub, of its HTTP client, or of the disk.
        cache: folder in which the hub's files are kept.
    """
    from huggingface_hub import errors

    text, repo = name.text, name.repo
    at = f"--revision {revision} of {repo}" if revision else repo
    command = f"`hf download {repo}{f' --revision {revision}' if revision else ''}`"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if is_offline(error):
        return ConfigError(
            f"{at} is not in the cache ({cache}), and HF_HUB_OFFLINE keeps from fetching "
            f"it: unset it, or run {command} where there is a network and copy the cache"
        )
    if isinstance(error, errors.GatedRepoError):
        return ConfigError(
            f"{repo} is gated: accept its terms at {endpoint}/{repo}, then run "
            "`hf auth login`, or set HF_TOKEN to the token of that account"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ConfigError(
            f"{repo} has no revision '{revision}': {endpoint}/{repo}/tree/main shows its branches"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ConfigError(
            f"--repo-id-or-model-path: there is no folder '{text}' here, and no model {repo} "
            f"at {endpoint}, or it is private: check the name, or run `hf auth login`"
        )
    if status in (401, 403):
        return ConfigError(
            f"{endpoint} refuses {repo} ({status}): run `hf auth login` with an account "
            "that may read it, or mend HF_TOKEN"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ConfigError(
            f"{text}: the disk of {cache} is full: free some of it "
            "(`hf cache ls`, `hf cache rm`), or set HF_HOME to a folder on another disk"
        )
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ConfigError(
            f"{text}: {cache} cannot be written ({error.strerror}): set HF_HOME to a "
            "folder that can"
        )
    reason = f"HTTP {status}" if status else f"{type(error).__name__}: {one_line(error)}"
    return ConfigError(
        f"{text} cannot be fetched from {endpoint} ({reason}): check the network, or "
        f"HF_ENDPOINT, or run {command} where there is one and copy the cache ({cache})"
    )
