"""Reads the WordNet 3.0 database files and picks one sense for every spelling.

A word is asked for by its spelling alone, so each spelling ("AI" and "ai" are two) gets exactly
one entry: the sense most often tagged in WordNet's own semantic concordance (nouns count four
times, because "What is love?" asks for a noun), then the sense that WordNet lists first, then
nouns before verbs, adjectives and adverbs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PARTS = ("noun", "verb", "adj", "adv")
SPOKEN = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
SENSE_KEY_DIGIT = {"1": "noun", "2": "verb", "3": "adj", "4": "adv", "5": "adj"}
POINTER_PART = {"n": "noun", "v": "verb", "a": "adj", "s": "adj", "r": "adv"}
NOUN_WEIGHT = 4
MAX_GLOSS_WORDS = 40
MAX_EXAMPLE_WORDS = 10
MAX_SYNONYMS = 2

# Words whose everyday sense is not the one WordNet puts first: how that sense's gloss begins.
PREFERRED = {
    "AI": "the branch of computer science",
    "bank": "a financial institution",
    "gold": "a soft yellow malleable",
    "queen": "a female sovereign",
    "table": "a piece of furniture having",
}


@dataclass(frozen=True)
class Synset:
    """One meaning: its spellings, gloss, examples and what it is a kind of."""

    part: str
    words: tuple[str, ...]
    gloss: str
    examples: tuple[str, ...]
    parent: tuple[str, int] | None
    is_instance: bool


@dataclass(frozen=True)
class Entry:
    """What the model learns for one spelling; `kind`, `example` and `synonyms` may be empty."""

    name: str
    part: str
    gloss: str
    kind: str = ""
    synonyms: tuple[str, ...] = ()
    example: str = ""


def split_gloss(text: str) -> tuple[str, tuple[str, ...]]:
    """Separates the definition from the quoted examples that follow it."""
    text = " ".join(text.split())
    found = re.search(r'[;:,]\s*"', text)
    body, rest = (text[: found.start()], text[found.start() :]) if found else (text, "")
    parts = body.strip(" ;:.,").split("; ")
    kept = parts[0]
    for part in parts[1:]:  # a long gloss is cut where its author paused
        if len(f"{kept} {part}".split()) > MAX_GLOSS_WORDS:
            break
        kept = f"{kept}; {part}"
    return kept, tuple(re.findall(r'"([^"]+)"', rest))


def read_synsets(folder: Path, part: str) -> dict[int, Synset]:
    """Reads data.<part> (format: wndb(5WN)) into offset -> synset."""
    synsets: dict[int, Synset] = {}
    for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):  # the licence at the head of every file
            continue
        fields, _, gloss = line.partition(" | ")
        cells = fields.split()
        count = int(cells[3], 16)
        words = tuple(
            re.sub(r"\((p|a|ip)\)$", "", cells[4 + 2 * i]).replace("_", " ") for i in range(count)
        )
        at = 4 + 2 * count
        parent, is_instance = None, False
        for i in range(int(cells[at])):
            symbol, offset, letter, _ = cells[at + 1 + 4 * i : at + 5 + 4 * i]
            if symbol in ("@", "@i"):
                parent, is_instance = (POINTER_PART[letter], int(offset)), symbol == "@i"
                break
        definition, examples = split_gloss(gloss)
        synsets[int(cells[0])] = Synset(part, words, definition, examples, parent, is_instance)
    return synsets


def read_tag_counts(folder: Path) -> dict[tuple[str, str, int], int]:
    """Reads cntlist.rev into (lower-case lemma, part, sense number) -> times tagged."""
    counts: dict[tuple[str, str, int], int] = {}
    for line in (folder / "cntlist.rev").read_text(encoding="utf-8").splitlines():
        key, sense, count = line.split()
        lemma, _, rest = key.partition("%")
        counts[lemma, SENSE_KEY_DIGIT[rest[0]], int(sense)] = int(count)
    return counts


def make_entry(name: str, synset: Synset, synsets: dict[str, dict[int, Synset]]) -> Entry:
    """Puts one synset into words as seen from one of its spellings."""
    kind = synsets[synset.parent[0]][synset.parent[1]].words[0] if synset.parent else ""
    others = [word for word in synset.words if word.lower() != name.lower()]
    example = next(
        (
            example.strip(" .;")
            for example in synset.examples
            if name.lower() in example.lower() and len(example.split()) <= MAX_EXAMPLE_WORDS
        ),
        "",
    )
    part = "name" if synset.is_instance else SPOKEN[synset.part]
    return Entry(name, part, synset.gloss, kind, tuple(others[:MAX_SYNONYMS]), example)


def load_entries(folder: Path) -> list[Entry]:
    """Returns one entry per spelling, sorted by spelling."""
    synsets = {part: read_synsets(folder, part) for part in PARTS}
    counts = read_tag_counts(folder)
    best: dict[str, tuple[tuple[int, ...], Synset]] = {}
    for part_rank, part in enumerate(PARTS):
        for line in (folder / f"index.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):
                continue
            cells = line.split()
            lemma, offsets = cells[0], cells[-int(cells[2]) :]
            for sense, offset in enumerate(offsets, 1):
                synset = synsets[part][int(offset)]
                tagged = counts.get((lemma, part, sense), 0)
                tagged *= NOUN_WEIGHT if part == "noun" else 1
                for word in synset.words:
                    if word.lower().replace(" ", "_") != lemma:
                        continue
                    wanted = word in PREFERRED and synset.gloss.startswith(PREFERRED[word])
                    rank = (-int(wanted), -tagged, sense, part_rank)
                    if word not in best or rank < best[word][0]:
                        best[word] = (rank, synset)
    return [make_entry(name, best[name][1], synsets) for name in sorted(best)]
