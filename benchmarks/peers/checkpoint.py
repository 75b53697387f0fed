"""The random checkpoint that all servers load, each in its own format. No rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.peers.environments import HOME, ROOT, make_once, run_logged, say

SHAPE = "tinyllama-1.1b"


def make_checkpoint(shape: str = SHAPE) -> Path:
    """Folder of the checkpoint in BF16, with a tokenizer that has a text for every token."""
    folder = HOME / "checkpoints" / shape
    tool = ROOT / "scripts" / "make_random_checkpoint.py"

    def make() -> None:
        say(f"writing a random {shape} checkpoint to {folder}")
        run_logged((sys.executable, tool, shape, folder), HOME / "checkpoints" / "make.log")
        fill_vocabulary(folder)

    make_once(folder, tool.read_text() + Path(__file__).read_text(), make)
    return folder


def fill_vocabulary(folder: Path) -> None:
    """Add words to the tokenizer until it knows every row of the embedding.

    A token without a text would reach the client as an event without a text, or not at all, and
    could not be timed alike on all servers.
    """
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    known = set(vocabulary.values())
    for number in range(size):
        if number not in known:
            vocabulary[f"\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}word{number}"] = number
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
