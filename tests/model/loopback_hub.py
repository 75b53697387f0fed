"""A hub on loopback that speaks the Hugging Face Hub's API, with faults on demand.

Files are answered by a redirect to where they lie, as the Hub's are, with ETags and range requests.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_a_test"


@dataclass
class Hub:
    """What is served, and what was asked.

    Attributes:
        repos: folder of each repository.
        gated: repositories that only TOKEN opens.
        cut: bytes after which the first transfer of a file is cut off, by the file's name.
        log: method, path, and range of each request for a file's content.
        calls: paths of requests of the API.
    """

    repos: dict[str, Path]
    gated: set[str] = field(default_factory=set)
    cut: dict[str, int] = field(default_factory=dict)
    status: int | None = None
    log: list[tuple[str, str, str | None]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    url: str = ""

    def commit(self, repo: str) -> str:
        """Forty digits that change with the repository's files."""
        names = sorted(str(path) for path in self.repos[repo].rglob("*"))
        return hashlib.sha1("\n".join([repo, *names]).encode()).hexdigest()

    def list_files(self, repo: str) -> dict[str, Path]:
        folder = self.repos[repo]
        return {
            path.relative_to(folder).as_posix(): path
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    def fetched(self) -> set[str]:
        """Names of the files whose content was asked for."""
        return {path for method, path, _ in self.log if method == "GET"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        if hub.status is not None:
            return self._send(hub.status, b"")
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        if match is not None:
            hub.calls.append(path)
            return self._answer_api(*match.groups())
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if match is not None:
            return self._answer_resolve(*match.groups())
        match = re.fullmatch(r"/content/([^/]+/[^/]+)/(.+)", path)
        if match is not None:
            return self._answer_content(*match.groups())
        return self._send(404, b"")

    def _refuse(self, repo: str, revision: str | None) -> bool:
        hub = self.hub
        if repo not in hub.repos:
            # As the Hub answers somebody whom it does not know.
            self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
        elif repo in hub.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        elif revision not in (None, "main", hub.commit(repo)):
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            return False
        return True

    def _answer_api(self, repo: str, what: str | None, revision: str | None) -> None:
        if self._refuse(repo, revision):
            return None
        files = self.hub.list_files(repo)
        if what == "tree":
            found = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": _etag(path)}
                for name, path in files.items()
            ]
            return self._send(200, json.dumps(found).encode())
        siblings = [
            {"rfilename": name, "size": path.stat().st_size, "blobId": _etag(path)}
            for name, path in files.items()
        ]
        info = {"id": repo, "sha": self.hub.commit(repo), "siblings": siblings}
        return self._send(200, json.dumps(info).encode())

    def _answer_resolve(self, repo: str, revision: str, name: str) -> None:
        if self._refuse(repo, revision):
            return None
        path = self.hub.list_files(repo).get(name)
        if path is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {
            "X-Repo-Commit": self.hub.commit(repo),
            "X-Linked-Etag": f'"{_etag(path)}"',
            "X-Linked-Size": str(path.stat().st_size),
            # Another host than the hub's own, as a network of caches is.
            "Location": f"{self.hub.url.replace('127.0.0.1', 'localhost')}/content/{repo}/{name}",
        }
        return self._send(302, b"", headers)

    def _answer_content(self, repo: str, name: str) -> None:
        hub = self.hub
        asked = self.headers.get("Range")
        hub.log.append((self.command, name, asked))
        data = hub.list_files(repo)[name].read_bytes()
        headers = {"ETag": f'"{_etag(hub.list_files(repo)[name])}"', "Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked or "")
        if match is None:
            return self._send(200, data, headers, cut=hub.cut.pop(name, None))
        start, stop = int(match[1]), int(match[2] or len(data) - 1) + 1
        part = data[start:stop]
        headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(data)}"
        return self._send(206, part, headers)

    def _send(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        cut: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body if cut is None else body[:cut])
            self.wfile.flush()
        if cut is not None:
            self.close_connection = True


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def run_hub(**repos: Path) -> Iterator[Hub]:
    """Serve repositories of organisation "org" while the context lasts."""
    hub = Hub({f"org/{name.replace('_', '-')}": folder for name, folder in repos.items()})
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
