"""A GGUF file's vocabulary gives the ids of the tokenizer that it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from autotp_serving.engine.tokenizer import HuggingFaceTokenizer
from autotp_serving.model.gguf.header import GgufError
from autotp_serving.model.gguf.tokenizer import find_merges, make_tokenizer
from tests.ranks.test_families import IS_TRANSFORMERS_4

needs_transformers_5 = pytest.mark.skipif(
    IS_TRANSFORMERS_4, reason="transformers 4 cannot split texts as these files want it"
)

ROOT = Path(__file__).parents[2]
PATH = Path("m.gguf")
NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6

LINES = [
    *(ROOT / "docs" / "api.md").read_text().splitlines(),
    *("", " ", "  two  blanks  ", "12345 6,789.01", "I'm you're HE'LL", "äöü é 漢字 🙂 e\u0301"),
    *("\ttab\n\nlines\r\n", "<|end|>a <|end|>", "  <|end|>  x", "a<think>b", "\u2581 blank"),
]

# The pre-tokenizers that the models' own tokenizer.json files have.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def load(metadata: dict[str, Any], model_type: str, folder: Path) -> HuggingFaceTokenizer:
    """As the server loads it, beside a config.json of this family."""
    text, config = make_tokenizer(metadata, PATH)
    (folder / "tokenizer.json").write_text(text)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return HuggingFaceTokenizer(folder)


def split_by(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES])
SPLITS = {
    "gpt-2": BYTES,
    "smollm": DIGITS,
    "starcoder": DIGITS,
    "llama-bpe": split_by(LLAMA3),
    "qwen2": split_by(QWEN2),
}


@needs_transformers_5
@pytest.mark.parametrize("split", SPLITS)
def test_byte_level(split: str, tmp_path: Path) -> None:
    original = Tokenizer(models.BPE(ignore_merges=split == "llama-bpe"))
    original.pre_tokenizer, original.decoder = SPLITS[split], decoders.ByteLevel()
    if split == "qwen2":
        original.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|begin|>", "<|end|>"],
        show_progress=False,
    )
    original.train_from_iterator(LINES * 2, trainer)
    original.add_tokens(["<think>"])
    content = json.loads(original.to_str())
    vocab = original.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=vocab.__getitem__)
    kinds = {"<|begin|>": CONTROL, "<|end|>": CONTROL, "<think>": USER}
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [kinds.get(token, NORMAL) for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in content["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": vocab["<|begin|>"],
        "tokenizer.ggml.eos_token_id": vocab["<|end|>"],
    }
    found = load(metadata, "qwen2" if split == "qwen2" else "llama", tmp_path)
    begin = [vocab["<|begin|>"]] if split == "llama-bpe" else []
    for line in LINES:
        ids = original.encode(line).ids
        assert found.encode(line) == begin + ids, line
        text = original.decode(ids, skip_special_tokens=False)
        assert found.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("has_prefix", [True, False])
def test_sentencepiece(has_prefix: bool, tmp_path: Path) -> None:
    """As Llama 2's tokenizer.model, trained and asked by SentencePiece itself."""
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("\n".join(LINES * 3))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "spm"),
        vocab_size=900,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=has_prefix,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        character_coverage=0.999,
        minloglevel=2,
    )
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    numbers = range(original.get_piece_size())
    types = [
        UNKNOWN
        if original.is_unknown(number)
        else CONTROL
        if original.is_control(number)
        else BYTE
        if original.is_byte(number)
        else NORMAL
        for number in numbers
    ]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [original.id_to_piece(number) for number in numbers],
        "tokenizer.ggml.scores": [original.get_score(number) for number in numbers],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": original.bos_id(),
        "tokenizer.ggml.eos_token_id": original.eos_id(),
        "tokenizer.ggml.unknown_token_id": original.unk_id(),
        "tokenizer.ggml.add_space_prefix": has_prefix,
    }
    found = load(metadata, "llama", tmp_path)
    for line in LINES:
        if "\u2581" in line:  # which SentencePiece does not tell from a space
            continue
        expected = original.encode(line)
        assert found.encode(line) == [original.bos_id(), *expected], line
        assert found.decode(expected) == original.decode(expected), line


def test_merges_come_best_first() -> None:
    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}
    scores = [0.0, 0.0, 0.0, -2.0, -1.0, -3.0]
    expected = [("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")]
    assert find_merges(vocab, scores) == expected


@needs_transformers_5
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tokenizer.ggml.model": "t5"}, "of the kind 't5'"),
        ({"tokenizer.ggml.pre": None}, "None, which is not known"),
        ({"tokenizer.ggml.tokens": []}, "no vocabulary"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "no vocabulary"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "no tokenizer can be built"),
        ({"tokenizer.ggml.merges": ["x y"]}, "no tokenizer can be built"),
        ({"tokenizer.ggml.model": "llama"}, "does not score its tokens"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_cure(
    changes: dict[str, Any], expected: str
) -> None:
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.merges": ["a b"],
    }
    with pytest.raises(GgufError, match=expected) as caught:
        make_tokenizer(metadata | changes, PATH)
    assert "tokenizer.json" in str(caught.value)


def test_several_chat_templates_keep_their_names() -> None:
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.chat_template": "one",
        "tokenizer.chat_template.tool_use": "two",
    }
    _, config = make_tokenizer(metadata, PATH)
    assert config["chat_template"] == [
        {"name": "default", "template": "one"},
        {"name": "tool_use", "template": "two"},
    ]
