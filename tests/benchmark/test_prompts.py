"""Prompts have exactly the asked number of tokens, whatever the tokenizer does."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest

from benchmarks.prompts import (
    LocalCodec,
    PromptError,
    PromptMaker,
    find_codec,
    fit,
    read_dataset,
)
from tests.benchmark.fake_server import FakeServer, PieceTokenizer

ROOT = Path(__file__).resolve().parents[2]


class Codec:
    """A tokenizer as the benchmark sees one."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    async def encode(self, text):
        return self.tokenizer.encode(text)

    async def decode(self, tokens):
        return self.tokenizer.decode(tokens)


class MergingTokenizer(PieceTokenizer):
    """Counts change when a text is cut: pieces of three letters from the END of each word."""

    def encode(self, text):
        tokens = [1]
        for word in re.findall(r"\s*\S+", text):
            pieces = []
            while word:
                word, piece = word[:-3], word[-3:]
                pieces.append(piece)
            for piece in reversed(pieces):
                if piece not in self.ids:
                    self.ids[piece] = len(self.pieces)
                    self.pieces.append(piece)
                tokens.append(self.ids[piece])
        return tokens


class PairTokenizer(PieceTokenizer):
    """Every count is odd: no text has an even number of tokens."""

    def encode(self, text):
        return [token for token in super().encode(text)[1:] for _ in range(2)] + [1]


@pytest.mark.parametrize("tokenizer", [PieceTokenizer(), MergingTokenizer()])
@pytest.mark.parametrize("length", [1, 5, 32, 1000, 1024, 2048, 5000])
def test_exactly_the_asked_number_of_tokens(tokenizer, length):
    maker = PromptMaker(Codec(tokenizer), ROOT / "prompt", length)

    async def run():
        return [await maker.make(8) for _ in range(5)]

    for prompt in asyncio.run(run()):
        assert len(tokenizer.encode(prompt.text)) == prompt.num_tokens == length


def test_a_tokenizer_that_cannot_is_an_error_with_a_cure():
    with pytest.raises(PromptError, match="--prompt_length"):
        asyncio.run(fit(Codec(PairTokenizer()), "one two three", 10))


def test_prompts_begin_differently_unless_asked_otherwise():
    async def run(**options):
        maker = PromptMaker(Codec(PieceTokenizer()), ROOT / "prompt", 64, **options)
        return [(await maker.make(1)).text[:12] for _ in range(50)]

    assert len(set(asyncio.run(run()))) == 50
    assert len(set(asyncio.run(run(same_prompt=True)))) == 1


def test_the_template_counts():
    async def run():
        maker = PromptMaker(Codec(PieceTokenizer()), ROOT / "prompt", 64)
        prompt = await maker.make(1, overhead=9)
        assert len(PieceTokenizer().encode(prompt.text)) == 55
        assert prompt.num_tokens == 64
        with pytest.raises(PromptError, match="template alone has 64"):
            await maker.make(1, overhead=64)

    asyncio.run(run())


@pytest.mark.parametrize("length", [32, 1024, 2048])
def test_prompt_files_are_about_as_long_as_their_names_say(length):
    num_words = len((ROOT / "prompt" / f"{length}.txt").read_text().split())
    assert 0.65 * length < num_words < length


def test_codecs(tmp_path):
    from benchmarks.http_client import HttpClient

    async def check(url):
        codec = await find_codec(HttpClient(url), None, None)
        return await codec.decode(await codec.encode("some words here"))

    with FakeServer() as server:
        assert asyncio.run(check(server.url)) == "some words here"
    with FakeServer(has_tokenize=False) as server, pytest.raises(PromptError, match="--tokenizer"):
        asyncio.run(check(server.url))
    with pytest.raises(PromptError, match=r"tokenizer\.json"):
        LocalCodec(tmp_path)


def test_local_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, "?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    codec = LocalCodec(tmp_path)
    assert asyncio.run(codec.encode("a b a")) == [0, 1, 0]
    assert len(asyncio.run(codec.encode(asyncio.run(fit(codec, "a b a b", 9))))) == 9


def test_datasets(tmp_path):
    lines = tmp_path / "d.jsonl"
    lines.write_text('{"prompt": "one", "max_tokens": 7}\n\n{"prompt": "two"}\n{"other": 1}\n')
    assert [(p.text, p.max_new_tokens) for p in read_dataset(lines, 99)] == [
        ("one", 7),
        ("two", 99),
    ]
    share = tmp_path / "d.json"
    share.write_text(json.dumps([{"conversations": [{"from": "human", "value": "hi"}]}, {}]))
    assert [p.text for p in read_dataset(share, 1)] == ["hi"]
    plain = tmp_path / "d.txt"
    plain.write_text("alpha\nbeta\n")
    assert [p.text for p in read_dataset(plain, 1)] == ["alpha", "beta"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "{", "not JSON"),
        ("a.json", "{}", "a JSON list"),
        ("a.txt", "\n", "no prompt found"),
        ("a.txt", None, "cannot be read"),
        ("a.jsonl", '{"prompt": 3}', "no prompt found"),
    ],
)
def test_bad_datasets_are_one_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(PromptError, match=message):
        read_dataset(tmp_path / name, 1)
