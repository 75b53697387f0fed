"""Spellings of a route's path: with and without /v1, and with a slash at its end. Rank 0 only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

VERSION = "/v1"


class RoutePaths:
    """Knows the paths that there are.

    Args:
        paths: of the routes; one with a variable in it ends with that.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        paths = set(paths)
        self._paths = {path for path in paths if "{" not in path}
        self._prefixes = tuple(path.partition("{")[0] for path in paths if "{" in path)

    def find(self, path: str) -> str:
        """The route's own path for a spelling of it; what is none stays as it is."""
        return next(filter(self._is_known, self._spellings(path)), path)

    def find_route(self, path: str) -> str | None:
        """What serves a path, with a variable it may end with left out; None if nothing does."""
        if path in self._paths:
            return path
        return next(filter(path.startswith, self._prefixes), None)

    def _is_known(self, path: str) -> bool:
        return path in self._paths or path.startswith(self._prefixes)

    def _spellings(self, path: str) -> Iterator[str]:
        yield path
        bare = path.rstrip("/")
        other = bare.removeprefix(VERSION) if bare.startswith(f"{VERSION}/") else VERSION + bare
        for one in (bare, other):
            yield one
            yield f"{one}/"
