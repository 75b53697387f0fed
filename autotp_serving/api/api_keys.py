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
ADMIN_ENVIRONMENT_NAME = "AUTOTP_ADMIN_API_KEY"
KEY_HEADERS = frozenset({b"authorization", b"x-api-key"})
BEARER = re.compile(rb"bearer +(\S+) *", re.IGNORECASE)


class ApiKeys:
    """The keys that clients may show; with none of them, everyone is let in.

    Args:
        keys: of everybody.
        admin_keys: of those who may change the server while it runs, and all that others may.
    """

    def __init__(self, keys: Iterable[str] = (), admin_keys: Iterable[str] = ()) -> None:
        self._digests = [_digest(key.encode("ascii")) for key in dict.fromkeys(keys)]
        self._admin_digests = [_digest(key.encode("ascii")) for key in dict.fromkeys(admin_keys)]

    @property
    def has_admins(self) -> bool:
        """Whether anybody may change the server."""
        return bool(self._admin_digests)

    def is_admin(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Whether this request's key may change the server."""
        digest = _digest(_find_key(headers))
        found = [hmac.compare_digest(digest, known) for known in self._admin_digests]
        return any(found)

    def find_tenant(self, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
        """Whose request this is: a name that tells nothing of the key; None for nobody we know.

        Keys are shown as OpenAI's clients do, `Authorization: Bearer KEY`, or as Anthropic's,
        `x-api-key: KEY`; where both are, the first counts.

        "" where all are one tenant. Takes the same time whichever key matches, or none.
        """
        if not self._digests:
            return ""
        headers = tuple(headers)
        digest = _digest(_find_key(headers))
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        is_admin = self.is_admin(headers)
        if not any(found):
            return "admin" if is_admin else None
        return f"key {found.index(True) + 1}" if len(found) > 1 else ""


def load_api_keys(config: ServingConfig, environ: Mapping[str, str]) -> ApiKeys:
    """Gather the keys from flags, file and environment.

    Raises:
        ConfigError: a source cannot be read or holds no key, or a key that no header can carry.
            A source that is empty by mistake must not open the server.
    """
    keys = [("--api-key", key) for key in config.api_key]
    admin_keys = [("--admin-api-key", key) for key in config.admin_api_key]
    sources = {}
    if config.api_key_file is not None:
        sources[f"--api-key-file {config.api_key_file}"] = _read_lines(config.api_key_file)
    for name in (ENVIRONMENT_NAME, ADMIN_ENVIRONMENT_NAME):
        if name in environ:
            sources[name] = environ[name].split(",")
    for source, lines in sources.items():
        found = [(source, line.strip()) for line in lines if line.strip()]
        if not found:
            raise ConfigError(f"{source} holds no key")
        (admin_keys if source == ADMIN_ENVIRONMENT_NAME else keys).extend(found)
    for source, key in (*keys, *admin_keys):
        if not re.fullmatch(r"[!-~]+", key):
            raise ConfigError(f"{source}: a key must be visible ASCII characters without spaces")
    if not {key for _, key in keys}.isdisjoint(key for _, key in admin_keys):
        raise ConfigError("--admin-api-key: an admin's key must be none of the others")
    return ApiKeys((key for _, key in keys), (key for _, key in admin_keys))


def _find_key(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """What a request shows; b"" for nothing."""
    shown: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in KEY_HEADERS:
            shown.setdefault(name, value)
    if b"authorization" in shown:
        match = BEARER.fullmatch(shown[b"authorization"])
        return match[1] if match else b""
    return shown.get(b"x-api-key", b"").strip()


def _read_lines(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {path} cannot be read: {error}") from error
    return [line for line in lines if not line.lstrip().startswith("#")]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
