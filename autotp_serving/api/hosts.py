"""By which names this server may be called from a browser. Rank 0 only.

A web page may have its own name lead to any address, ours too ("DNS rebinding"): to the browser it
then talks to itself, and reads what we answer. It cannot choose what `Host` says, though: that is
the page's name, which is none of ours.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable

from autotp_serving.config import ServingConfig

BROWSER_MARKS = frozenset({b"origin", b"sec-fetch-site"})
"""Headers that browsers add and that no page can take away; other clients send none of them."""

HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:@/\s]+)(?::\d*)?")


class AllowedHosts:
    """The names that lead here by the will of whoever runs this server, addresses included.

    Args:
        names: beside the names of loopback and IP addresses.
        origins: of pages that may call under any name, or *; a page cannot choose its own.
    """

    def __init__(self, names: Iterable[str], origins: Iterable[str] = ()) -> None:
        self._names = {name.lower().rstrip(".") for name in names}
        self._origins = {origin.encode("latin-1", "replace") for origin in origins}

    def find_stranger(self, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
        """What a browser's request calls us, where that is no name of ours; else None."""
        hosts = []
        is_browser = False
        for name, value in headers:
            if name == b"host":
                hosts.append(value.decode("latin-1"))
            elif name in BROWSER_MARKS:
                is_browser = True
                if name == b"origin" and value in self._origins:
                    return None
        if not is_browser or b"*" in self._origins:
            return None
        if len(hosts) == 1 and self.knows(hosts[0]):
            return None
        return ", ".join(hosts)

    def knows(self, host: str) -> bool:
        """Whether a `Host` header names this server; its port, if it has one, does not count."""
        match = HOST.fullmatch(host.lower())
        if match is None:
            return False
        name = match[1].rstrip(".")
        return (
            name in self._names
            or name == "localhost"
            or name.endswith(".localhost")
            or (_is_address(name))
        )


def find_allowed_hosts(config: ServingConfig) -> AllowedHosts:
    """This host's own names, what it listens on, and what --allowed-host adds."""
    own = socket.gethostname()
    short = own.partition(".")[0]
    # .local is for the local network alone to resolve; no page of elsewhere can have such a name.
    names = [own, short, f"{short}.local", socket.getfqdn(), config.host, *config.allowed_host]
    return AllowedHosts(names, config.cors_origin)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
