"""Text while it comes: whole characters only, the same text in the end, stop strings cut."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from autotp_serving.engine.detokenizer import MAX_WINDOW_LEN, Detokenizer, StopStrings
from autotp_serving.request import SamplingParams
from tests.fakes import ByteTokenizer

SAMPLES = (
    "plain words, and more of them, until the window has moved on several times over",
    "né à Zürich: 東京で寿司 🍣 и 👩‍👩‍👧‍👦 मैं हूँ",
    "🎉🎉🎉🎉🎉🎉🎉🎉🎉🎉🎉🎉🎉🎉🎉🎉🎉🎉🎉🎉🎉🎉",
    " leading, trailing ",
)


class PieceTokenizer:
    """As sentencepiece with byte fallback decodes: a space before each word, none where text
    begins; a run of byte tokens is one string of bytes or, if that fails, all broken."""

    eos_token_ids = frozenset({1})

    def __init__(self) -> None:
        self._pieces = {0: "▁Hello", 1: None, 2: "▁wor", 3: "ld", 4: "!", 5: "▁", 6: "a"}

    def encode(self, text: str) -> list[int]:
        return [1000 + byte for byte in text.encode()]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text, run = "", b""
        for token in [*token_ids, 1]:
            if token >= 1000:
                run += bytes([token - 1000])
                continue
            try:
                text += run.decode()
            except UnicodeDecodeError:
                text += "\ufffd" * len(run)
            run = b""
            text += (self._pieces[token] or "").replace("▁", " ")
        return text.removeprefix(" ")


class CountingTokenizer(ByteTokenizer):
    """Counts the tokens it has decoded."""

    def __init__(self) -> None:
        super().__init__()
        self.num_decoded = 0

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        self.num_decoded += len(token_ids)
        return super().decode(token_ids)


def stream(tokens: Sequence[int], stop=(), prompt=(), tokenizer=None) -> list[str]:
    """Deltas of all tokens up to a stop string, and at last what flush gives."""
    detokenizer = Detokenizer(
        tokenizer or ByteTokenizer(), prompt, SamplingParams(stop=tuple(stop))
    )
    deltas = []
    for token in tokens:
        deltas.append(detokenizer.add(token))
        if detokenizer.stopped:
            break
    return [*deltas, detokenizer.flush()]


@pytest.mark.parametrize("text", SAMPLES)
@pytest.mark.parametrize("prompt", ["x", "é 日", "日日日日日", "🎉日日日日"])
@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), PieceTokenizer()])
def test_bytes_come_out_as_whole_characters_once_complete(text, prompt, tokenizer):
    tokens = tokenizer.encode(text)
    deltas = stream(tokens, prompt=tokenizer.encode(prompt), tokenizer=tokenizer)
    assert "".join(deltas) == text
    assert len(deltas) == len(tokens) + 1
    done = 0
    for index, delta in enumerate(deltas[:-1]):
        done += len(delta)
        assert done == len(text.encode()[: index + 1].decode(errors="ignore"))


def test_space_at_a_word_border_is_kept():
    """Decoding each token by itself would give "Helloworld!"."""
    tokenizer = PieceTokenizer()
    words = [0, 2, 3, 4] * 30
    assert "".join(stream(words, tokenizer=tokenizer)) == tokenizer.decode(words)
    assert stream([2, 3, 4], prompt=[0], tokenizer=tokenizer) == [" wor", "ld", "!", ""]
    assert stream([2, 3], prompt=[0, 1], tokenizer=tokenizer)[:2] == [" wor", "ld"]
    assert stream([0, 2], prompt=[1], tokenizer=tokenizer)[:2] == ["Hello", " wor"]


@pytest.mark.parametrize("seed", range(20))
def test_random_text_in_random_tokens_adds_up(seed):
    """Tokens of one or more bytes, cut anywhere, also inside characters; any prompt before it."""
    rng = random.Random(seed)

    class Chunks(ByteTokenizer):
        def decode(self, token_ids, *, skip_special_tokens=True):
            return b"".join(pieces[token] for token in token_ids).decode("utf-8", "replace")

    text = "".join(chr(rng.choice((97, 32, 233, 0x65E5, 0x1F600, 0x10FFFF))) for _ in range(300))
    data = text.encode()
    pieces: list[bytes] = []
    while data:
        size = rng.choice((1, 1, 2, 3, 5))
        pieces.append(data[:size])
        data = data[size:]
    num_prompt = rng.randrange(40)
    tokens = list(range(len(pieces)))
    prompt_text = b"".join(pieces[:num_prompt]).decode(errors="ignore")
    deltas = stream(tokens[num_prompt:], prompt=tokens[:num_prompt], tokenizer=Chunks())
    assert prompt_text + "".join(deltas) == text


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), PieceTokenizer()])
def test_noise_gives_no_broken_character_and_loses_no_sound_text(seed, tokenizer):
    rng = random.Random(seed)
    offset = 1000 if isinstance(tokenizer, PieceTokenizer) else 0
    noise = [offset + rng.randrange(128, 256) for _ in range(rng.randrange(200))]
    sound = [6] * 40 if offset else list(b"a" * 40)
    deltas = stream([*noise, *sound], tokenizer=tokenizer)
    assert not any("\ufffd" in delta for delta in deltas)
    assert "".join(deltas).endswith("a" * 40)


def test_sound_character_after_endless_noise_is_not_lost():
    """The window moves on inside noise; that must not cut the character that follows."""
    for num_noise in range(MAX_WINDOW_LEN + 8):
        tokens = [0xFF] * num_noise + list("🎉".encode())
        assert "".join(stream(tokens)) == "🎉"


def test_cut_character_at_the_end_gives_no_text():
    assert "".join(stream("ab🎉".encode()[:-1])) == "ab"


@pytest.mark.parametrize("tokens", [[97] * 2000, [0xFF] * 2000, [ByteTokenizer.EOS] * 2000])
def test_cost_per_token_does_not_grow(tokens):
    tokenizer = CountingTokenizer()
    stream(tokens, prompt=[97] * 5000, tokenizer=tokenizer)
    assert tokenizer.num_decoded < len(tokens) * MAX_WINDOW_LEN


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("none",), "one two three"),
        ("one two three", ("three", "two"), "one "),
        ("abcabd rest", ("abd",), "abc"),
        ("aaab rest", ("aab",), "a"),
        ("say \n\nUser: hi", ("\n\nUser:",), "say "),
        ("x🎉y", ("🎉",), "x"),
        ("end with a beginning of sto", ("stop",), "end with a beginning of sto"),
        ("stop at once", ("stop",), ""),
        ("overlap", ("lap", "overlap"), ""),
        ("abcd", ("abcd", "bc"), "a"),
    ],
)
def test_stop_strings_across_tokens(text, stop, expected):
    assert "".join(stream(text.encode(), stop)) == expected
    whole = {0: text}

    class OneToken(ByteTokenizer):
        def decode(self, token_ids, *, skip_special_tokens=True):
            return "".join(whole[token] for token in token_ids)

    assert "".join(stream([0], stop, tokenizer=OneToken())) == expected


def test_only_text_that_may_begin_a_stop_string_is_held_back():
    assert stream(b"ab\n\nc\n", ("\n\nUser",)) == ["a", "b", "", "", "\n\nc", "", "\n"]


@pytest.mark.parametrize("seed", range(30))
def test_stop_strings_against_a_reference(seed):
    """Whatever the pieces: the text up to the stop string that is complete first, none earlier."""
    rng = random.Random(seed)
    text = "".join(rng.choice("ab") for _ in range(60))
    stop = ["".join(rng.choice("ab") for _ in range(rng.randrange(3, 8))) for _ in range(2)]
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    expected = text[: min(ends)[1]] if ends else text
    finder, found = StopStrings(stop), ""
    while text and not finder.found:
        size = rng.randrange(6)
        found += finder.add(text[:size])
        assert expected.startswith(found)
        text = text[size:]
    assert found + finder.flush() == expected
    assert (finder.found is not None) == bool(ends)
