"""Turns WordNet into a tokenizer and a store of token segments for training.

Training shuffles entries, phrasings and forms anew in every epoch. So the corpus is not a text
but a store of short token segments (question, definition, synonyms, ...) which `batches.py`
strings together; joining them gives exactly the tokens of the joined text, which is checked here.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import texts
from make_tokenizer import train_tokenizer, write_tokenizer
from tokenizers import Tokenizer
from wordnet import Entry, load_entries

SMALL_TALK_COPIES = 20
SAMPLE_SIZE = 300
SAMPLE_SEED = 20
COMMON_WORDS = """
    dog cat house tree water sun moon book computer music river mountain bread table chair
    window doctor teacher city school language mathematics physics gold iron horse bird fish
    flower apple rain snow fire summer winter king queen army war peace law money bank ship
    train bridge garden kitchen love freedom
"""


class SegmentStore:
    """Token segments one after another, each kept once; segment 0 is empty."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.numbers: dict[tuple[int, ...], int] = {(): 0}

    def add(self, items: list[str]) -> np.ndarray:
        """Adds one segment per text and returns their numbers; an empty text is segment 0."""
        encoded = self.tokenizer.encode_batch(items, add_special_tokens=False)
        pieces = [tuple(item.ids) for item in encoded]
        numbers = [self.numbers.setdefault(piece, len(self.numbers)) for piece in pieces]
        return np.array(numbers, dtype=np.int32)

    def arrays(self) -> dict[str, np.ndarray]:
        """The store as arrays: all tokens, and where each segment starts and how long it is."""
        lengths = np.array([len(piece) for piece in self.numbers], dtype=np.int32)
        starts = np.concatenate([[0], np.cumsum(lengths[:-1])]).astype(np.int32)
        tokens = np.array([t for piece in self.numbers for t in piece], dtype=np.uint16)
        return {"tokens": tokens, "starts": starts, "lengths": lengths}


def first_word(text: str) -> str:
    """The first word without the punctuation that the tokenizer would split off."""
    return text.split(" ")[0].rstrip("!.,?")


def every_phrasing(entries: list[Entry]) -> list[tuple[str, ...]]:
    """All questions for each entry, in the order of PHRASING_WEIGHTS."""
    names = {entry.name for entry in entries}
    return [texts.questions(e) + texts.loose_questions(e, names) for e in entries]


def build_segments(tokenizer: Tokenizer, entries: list[Entry]) -> dict[str, np.ndarray]:
    """Returns the segment store and, per entry, the numbers of its segments."""
    store = SegmentStore(tokenizer)
    # Small talk is a kind of entry: an answer without a definition, asked for in one way.
    talk = [pair for pair in texts.SMALL_TALK for _ in range(SMALL_TALK_COPIES)]
    asked = every_phrasing(entries)
    asked += [(question,) * len(texts.PHRASING_WEIGHTS) for question, _ in talk]
    leads = ["The"] * len(entries) + [first_word(reply) for _, reply in talk]
    heads = [texts.answer_head(e)[len("The") :] for e in entries] + [""] * len(talk)
    bodies = [f" {e.gloss}." for e in entries]
    bodies += [reply[len(first_word(reply)) :] for _, reply in talk]

    phrasings = list(zip(*asked, strict=True))

    def each_phrasing(part: Callable[[str], str]) -> np.ndarray:
        return np.stack([store.add([part(q) for q in row]) for row in phrasings], axis=1)

    columns = {
        # The first token of question and answer stands alone, because it is written with a
        # space before it in running text and without one elsewhere.
        "question_first": each_phrasing(first_word),
        "question_first_spaced": each_phrasing(lambda q: f" {first_word(q)}"),
        "question_rest": each_phrasing(lambda q: q[len(first_word(q)) :]),
    }
    columns |= {
        "lead": store.add(leads),
        "lead_spaced": store.add([f" {lead}" for lead in leads]),
        "head": store.add(heads),
        "body": store.add(bodies),
    }
    # A fact can end an answer, and can be asked for in a follow-up turn.
    facts = {
        "kind": (texts.kind_sentence, texts.NO_KIND, texts.KIND_QUESTIONS),
        "synonyms": (texts.synonym_sentence, texts.NO_SYNONYM, texts.SYNONYM_QUESTIONS),
        "example": (texts.example_sentence, texts.NO_EXAMPLE, texts.EXAMPLE_QUESTIONS),
    }
    for name, (make, unknown, asking) in facts.items():
        told = [make(e) for e in entries] + [""] * len(talk)
        columns[name] = store.add([f" {fact}" if fact else "" for fact in told])
        columns[f"{name}_reply"] = store.add([fact or unknown for fact in told])
        turns = [f"{texts.USER}{q}{texts.END}{texts.ASSISTANT}" for q in asking]
        columns[f"{name}_asked"] = store.add(turns)
    columns |= {
        "bos": store.add([texts.BOS]),
        "eos": store.add([texts.EOS]),
        "end": store.add([texts.END]),
        "user": store.add([texts.USER]),
        "assistant": store.add([texts.END + texts.ASSISTANT]),
        "newlines": np.concatenate([store.add(["\n"]), store.add(["\n\n"])]),
        "system": store.add([f"{texts.SYSTEM}{s}{texts.END}" for s in texts.SYSTEM_PROMPTS]),
        "phrasing_weights": np.array(texts.PHRASING_WEIGHTS, dtype=np.float32),
    }
    return store.arrays() | columns


def check_segments(
    tokenizer: Tokenizer, entries: list[Entry], corpus: dict[str, np.ndarray]
) -> None:
    """Joined segments must equal the joined text's own tokens, or training teaches wrong ones."""

    def ids(number: int) -> list[int]:
        start = corpus["starts"][number]
        return corpus["tokens"][start : start + corpus["lengths"][number]].tolist()

    asked_of = every_phrasing(entries)
    for i in random.Random(0).sample(range(len(entries)), min(2000, len(entries))):
        phrasing = i % len(texts.PHRASING_WEIGHTS)
        question, reply = asked_of[i][phrasing], texts.answer(entries[i])
        asked = [corpus[n][i, phrasing] for n in ("question_first", "question_rest")]
        told = [corpus[n][i] for n in ("head", "body", "kind", "synonyms", "example")]
        bare = [*asked, corpus["lead_spaced"][i], *told]
        chat = [corpus["lead"][i], *told]
        for numbers, text in ((bare, f"{question} {reply}"), (chat, reply)):
            joined = [t for number in numbers for t in ids(number)]
            if joined != tokenizer.encode(text, add_special_tokens=False).ids:
                raise ValueError(f"segments do not join to the tokens of {text!r}")


def recall_sample(entries: list[Entry]) -> dict[str, list[dict[str, str]]]:
    """The fixed random entries and the common words that `evaluate.py` asks for."""
    named = {entry.name: entry for entry in entries}
    groups = {
        "random": random.Random(SAMPLE_SEED).sample(entries, min(SAMPLE_SIZE, len(entries))),
        "common": [named[word] for word in COMMON_WORDS.split() if word in named],
    }
    return {
        group: [
            {
                "name": e.name,
                "question": texts.questions(e)[0],
                "head": texts.answer_head(e),
                "definition": e.gloss,
                "answer": texts.answer(e),
            }
            for e in chosen
        ]
        for group, chosen in groups.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--model", type=Path, required=True, help="tokenizer and sample go here")
    parser.add_argument("--corpus", type=Path, required=True, help="the .npz file to write")
    parser.add_argument("--limit", type=int, help="learn only so many random entries (for trials)")
    args = parser.parse_args()

    entries = load_entries(args.wordnet)
    args.model.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(entries)
    write_tokenizer(tokenizer, args.model)
    if args.limit:
        entries = random.Random(SAMPLE_SEED).sample(entries, args.limit)
    corpus = build_segments(tokenizer, entries)
    check_segments(tokenizer, entries, corpus)
    args.corpus.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.corpus, **corpus)
    sample = json.dumps(recall_sample(entries), indent=1, ensure_ascii=False)
    (args.model / "recall_sample.json").write_text(sample + "\n", encoding="utf-8")
    print(f"{len(entries)} entries, {len(corpus['tokens'])} stored tokens")


if __name__ == "__main__":
    main()
