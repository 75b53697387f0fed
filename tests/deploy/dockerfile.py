"""Reads a Dockerfile: its stages, the steps of each, and which files of the context `COPY .` takes.

Knows what docker/Dockerfile uses and refuses the rest.
"""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

KNOWN = {
    *("RUN", "ENV", "ARG", "COPY", "USER", "WORKDIR"),
    *("EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"),
}


@dataclass(frozen=True)
class Step:
    """One instruction."""

    word: str
    text: str


@dataclass
class Stage:
    """What follows one FROM."""

    name: str
    base: str
    steps: list[Step] = field(default_factory=list)


def read_stages(path: Path) -> dict[str, Stage]:
    """All stages by name."""
    stages: dict[str, Stage] = {}
    for step in _read_steps(path.read_text()):
        if step.word == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", step.text).groups()
            stage = stages[name] = Stage(name, base)
            continue
        assert step.word in KNOWN, f"an instruction that is not understood: {step}"
        stage.steps.append(step)
    return stages


def list_steps(stages: dict[str, Stage], target: str) -> tuple[str, list[Step]]:
    """The image that a target begins with, and all steps from there in order."""
    stage = stages[target]
    if stage.base not in stages:
        return stage.base, stage.steps
    base, steps = list_steps(stages, stage.base)
    return base, steps + stage.steps


def _read_steps(text: str) -> Iterator[Step]:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    whole = ""
    for line in lines:
        whole += line.removesuffix("\\")
        if not line.endswith("\\"):
            word, _, rest = whole.strip().partition(" ")
            yield Step(word, rest.strip())
            whole = ""


def read_words(text: str) -> list[str]:
    """The words of a step in JSON notation."""
    words = json.loads(text)
    assert isinstance(words, list)
    return words


def read_pairs(text: str) -> dict[str, str]:
    """The variables of an ENV step."""
    return dict(word.split("=", 1) for word in shlex.split(text))


def list_context(root: Path) -> list[Path]:
    """Files below `root` that .dockerignore lets through, relative to it.

    The last pattern that matches a file or a folder above it decides.
    """
    patterns = [
        line.strip()
        for line in (root / ".dockerignore").read_text().splitlines()
        if line.strip() and not line.startswith("#")
    ]
    return [
        path.relative_to(root)
        for top in sorted(root.iterdir())
        if top.name not in (".git", ".venv")
        for path in ([top] if top.is_file() else sorted(top.rglob("*")))
        if path.is_file() and not _is_ignored(path.relative_to(root), patterns)
    ]


def _is_ignored(path: Path, patterns: list[str]) -> bool:
    ignored = False
    names = [str(path), *map(str, path.parents)][:-1]
    for pattern in patterns:
        wanted = pattern.removeprefix("!")
        if any(_matches(name, wanted) for name in names):
            ignored = not pattern.startswith("!")
    return ignored


def _matches(name: str, pattern: str) -> bool:
    if pattern.startswith("**/"):
        return any(fnmatch.fnmatchcase(part, pattern[3:]) for part in Path(name).parts)
    return name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)
