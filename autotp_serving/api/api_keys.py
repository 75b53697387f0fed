"""Which API keys there are and whose a request is. Rank 0 only.

Only digests are kept, so that a key can appear neither in a log nor in a debugger's view.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from autotp_serving.config import ConfigError, ServingConfig

ENVIRONMENT_NAME = "AUTOTP_API_KEY"
KEY_HEADERS = frozenset({b"authorization", b"x-api-key"})
BEARER = re.compile(rb"bearer +(\S+) *", re.IGNORECASE)


class ApiKeys:
    """The keys that clients may show; with none of them, everyone is let in."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [_digest(key.encode("ascii")) for key in dict.fromkeys(keys)]

    def find_tenant(self, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
        """Whose request this is: a name that tells nothing of the key; None for nobody we know.

        Keys are shown as OpenAI's clients do, `Authorization: Bearer KEY`, or as Anthropic's,
        `x-api-key: KEY`; where both are, the first counts.

        "" where all are one tenant. Takes the same time whichever key matches, or none.
        """
        if not self._digests:
            return ""
        shown: dict[bytes, bytes] = {}
        for name, value in headers:
            if name in KEY_HEADERS:
                shown.setdefault(name, value)
        key = shown.get(b"x-api-key", b"").strip()
        if b"authorization" in shown:
            match = BEARER.fullmatch(shown[b"authorization"])
            key = match[1] if match else b""
        digest = _digest(key)
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(found):
            return None
        return f"key {found.index(True) + 1}" if len(found) > 1 else ""


def load_api_keys(config: ServingConfig, environ: Mapping[str, str]) -> ApiKeys:
    """Gather the keys from flags, file and environment.

    Raises:
        ConfigError: a source cannot be read or holds no key, or a key that no header can carry.
            A source that is empty by mistake must not open the server.
    """
    keys = [("--api-key", key) for key in config.api_key]
    sources = {}
    if config.api_key_file is not None:
        sources[f"--api-key-file {config.api_key_file}"] = _read_lines(config.api_key_file)
    if ENVIRONMENT_NAME in environ:
        sources[ENVIRONMENT_NAME] = environ[ENVIRONMENT_NAME].split(",")
    for source, lines in sources.items():
        found = [(source, line.strip()) for line in lines if line.strip()]
        if not found:
            raise ConfigError(f"{source} holds no key")
        keys += found
    for source, key in keys:
        if not re.fullmatch(r"[!-~]+", key):
            raise ConfigError(f"{source}: a key must be visible ASCII characters without spaces")
    return ApiKeys(key for _, key in keys)


def _read_lines(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {path} cannot be read: {error}") from error
    return [line for line in lines if not line.lstrip().startswith("#")]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
