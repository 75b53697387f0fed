"""Folders with a `tokenizer.model` and no tokenizer.json: converted, or refused with the cure."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

import pytest

from autotp_serving.config import ConfigError
from autotp_serving.engine import tokenizer_files
from autotp_serving.engine.token_bytes import byte_level_bytes
from autotp_serving.engine.tokenizer import HuggingFaceTokenizer
from tests.tokenizers.layouts import LAYOUTS, make_lines, training_lines

LLAMA = {
    "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False,
    "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False,
}  # fmt: skip


def write_configs(folder: Path, tokenizer_config: dict[str, object], eos: int) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": eos}))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))


def write_sentencepiece(folder: Path, kind: str, **settings: object) -> None:
    """A sentencepiece model as Llama 2 has one, small."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    lines = [line.replace("\0", "").replace("\n", " ") for line in training_lines()]
    trainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer"), model_type=kind,
        vocab_size=640, byte_fallback=True, split_digits=True, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, character_coverage=0.98, **settings,
    )  # fmt: skip


def test_a_sentencepiece_model_alone_gives_its_own_ids(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path, "bpe")
    write_configs(tmp_path, LLAMA, eos=2)
    from sentencepiece import SentencePieceProcessor

    own = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = HuggingFaceTokenizer(tmp_path)
    lines = [line for line in make_lines(2000, seed=5) if not line.startswith("▁")]
    for line in lines:
        assert tokenizer.encode(line, add_special_tokens=False) == own.encode(line)
    assert tokenizer.encode("hi") == [1, *own.encode("hi")]
    assert tokenizer.eos_token_ids == {2} and tokenizer.special_token_ids >= {0, 1, 2}


def test_a_conversion_with_other_ids_is_refused(tmp_path: Path) -> None:
    """Of this kind and class, transformers forgets the blank before a text."""
    write_sentencepiece(tmp_path, "unigram")
    write_configs(tmp_path, LLAMA | {"tokenizer_class": "PreTrainedTokenizerFast"}, eos=2)
    with pytest.raises(ConfigError, match="gives other token ids"):
        HuggingFaceTokenizer(tmp_path)


def write_tiktoken(folder: Path) -> dict[str, int]:
    """A tiktoken vocabulary as Llama 3 has one, small. Returns its special tokens."""
    (layout,) = (one for one in LAYOUTS if one.name == "llama-3")
    vocab = json.loads(layout.tokenizer().to_str())["model"]["vocab"]
    with (folder / "tokenizer.model").open("wb") as file:
        for number, piece in enumerate(sorted(vocab, key=vocab.get)):
            file.write(base64.b64encode(byte_level_bytes(piece)) + f" {number}\n".encode())
    names = ("<|begin_of_text|>", "<|end_of_text|>")
    special = {name: len(vocab) + number for number, name in enumerate(names)}
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    added = {
        number: {"content": name, "special": True, **flags} for name, number in special.items()
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": added,
        "bos_token": names[0], "eos_token": names[1],
    }  # fmt: skip
    write_configs(folder, config, eos=special[names[1]])
    return special


def test_a_tiktoken_vocabulary_alone_gives_its_own_ids(tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken.load import load_tiktoken_bpe

    from tests.tokenizers.layouts import GPT4

    special = write_tiktoken(tmp_path)
    ranks = load_tiktoken_bpe(str(tmp_path / "tokenizer.model"))
    own = tiktoken.Encoding("small", pat_str=GPT4, mergeable_ranks=ranks, special_tokens=special)
    tokenizer = HuggingFaceTokenizer(tmp_path)
    for line in make_lines(2000, seed=5):
        assert tokenizer.encode(line, add_special_tokens=False) == own.encode_ordinary(line)
    assert tokenizer.special_token_ids == {*special.values()}


@pytest.mark.parametrize(
    ("kind", "packages"),
    [("sentencepiece", ("sentencepiece", "protobuf")), ("tiktoken", ("tiktoken",))],
)
def test_a_package_that_is_missing_is_named(
    kind: str, packages: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "tiktoken":
        write_tiktoken(tmp_path)
    else:
        (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
        write_configs(tmp_path, LLAMA, eos=2)
    for name in ("sentencepiece", "google.protobuf", "tiktoken", "tiktoken.load"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(tokenizer_files, "_is_installed", lambda name: False)
    with pytest.raises(ConfigError, match=f"pip install {' '.join(packages)}$"):
        HuggingFaceTokenizer(tmp_path)
