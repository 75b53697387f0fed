"""A GGUF file's vocabulary as a tokenizer.json that gives the ids of the model's own tokenizer.

Any rank. A file holds tokens, merges or scores, and the name of the way in which a text is split
before they apply; a name that is not known is refused, as another split gives other ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autotp_serving.model.gguf.header import GgufError

CURE = "put the original model's tokenizer.json and tokenizer_config.json beside the file"

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
BLANK = "\u2581"
"""What SentencePiece writes for a space."""

GPT2_SPLITS = ("gpt-2", "phi-2", "mpt", "olmo", "jais")
DIGIT_SPLITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
"""As GPT-2's, each digit on its own."""
WITH_BOS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "tekken")
"""Whose texts begin with a BOS where a file does not say; a word that is a token is not merged."""
COMPOSED = ("qwen2",)
"""Whose texts are brought into Unicode's composed form first."""


def make_tokenizer(metadata: dict[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
    """The texts of tokenizer.json and of tokenizer_config.json, the latter as an object.

    Raises:
        GgufError: no vocabulary, or one that is split in a way that is not known.
    """
    model = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise GgufError(f"{path} holds no vocabulary: {CURE}")
    if model not in ("llama", "gpt2"):
        raise GgufError(f"{path}: tokenizers of the kind {model!r:.40} are not built: {CURE}")
    try:
        make = _make_sentencepiece if model == "llama" else _make_byte_level
        tokenizer = make(metadata, tokens, path)
        _add_special_tokens(tokenizer, metadata, tokens)
        _add_template(tokenizer, metadata, tokens, model)
        text: str = tokenizer.to_str()
    except (GgufError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the Rust library panics, past every Exception
        reason = " ".join(str(error).split())[:200]
        raise GgufError(
            f"{path}: no tokenizer can be built from its vocabulary "
            f"({type(error).__name__}: {reason}): {CURE}"
        ) from error
    return text, _make_tokenizer_config(metadata, tokens)


def _make_byte_level(metadata: dict[str, Any], tokens: list[str], path: Path) -> Any:
    """BPE over bytes, as GPT-2, Llama 3 and Qwen have it."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    split = metadata.get("tokenizer.ggml.pre")
    merges = [tuple(one.split(" ")) for one in metadata.get("tokenizer.ggml.merges") or []]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=split in WITH_BOS,
        )
    )
    if split in COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    if split in GPT2_SPLITS:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif split in DIGIT_SPLITS:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_find_pattern(split, path)), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _find_pattern(split: Any, path: Path) -> str:
    """The regular expression that goes by this name, as transformers knows it."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import (
            GGUF_PRE_TOKENIZER_SPLITS,
        )
    except ImportError as error:
        raise GgufError(
            f"{path}: its tokenizer can be built with transformers 5.23 only: install it, or {CURE}"
        ) from error
    pattern: str | None = GGUF_PRE_TOKENIZER_SPLITS.get(split)
    if pattern is None:
        raise GgufError(f"{path} splits texts in the way {split!r:.40}, which is not known: {CURE}")
    return pattern


def _make_sentencepiece(metadata: dict[str, Any], tokens: list[str], path: Path) -> Any:
    """BPE over characters with bytes for the rest, as Llama 2, Mistral, Phi 3 and Gemma have it."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    is_gemma = str(metadata.get("general.architecture")).startswith("gemma")
    scores: Sequence[float] | None = metadata.get("tokenizer.ggml.scores")
    if is_gemma:  # a run of spaces may be written as one; its merges go by the order of the tokens
        tokens = [BLANK * len(one) if one and not one.strip(" ") else one for one in tokens]
        scores = range(0, -len(tokens), -1)
    if scores is None or len(scores) != len(tokens):
        raise GgufError(f"{path} does not score its tokens: {CURE}")
    vocab = {token: number for number, token in enumerate(tokens)}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    has_unknown = type(unknown) is int and 0 <= unknown < len(tokens)
    stored = metadata.get("tokenizer.ggml.merges")
    merges = [tuple(one.split(" ")) for one in stored] if stored else find_merges(vocab, scores)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges,
            unk_token=tokens[unknown] if has_unknown else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    has_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", not is_gemma))
    blanks = normalizers.Replace(" ", BLANK)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(BLANK), blanks]) if has_prefix else blanks
    )
    steps = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)][: 3 + has_prefix])
    return tokenizer


def find_merges(vocab: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The pairs that join into a token, best first, of a vocabulary that scores its tokens.

    SentencePiece joins whichever neighbours make the token with the highest score.
    """
    found = []
    for token, number in vocab.items():
        pairs = [
            (vocab[left], vocab[right], left, right)
            for left, right in ((token[:at], token[at:]) for at in range(1, len(token)))
            if left in vocab and right in vocab
        ]
        found += [(scores[number], left, right) for _, _, left, right in sorted(pairs)]
    found.sort(key=lambda one: (one[0], len(one[1]), len(one[2])), reverse=True)
    return [(left, right) for _, left, right in found]


def _add_special_tokens(tokenizer: Any, metadata: dict[str, Any], tokens: list[str]) -> None:
    """Tokens that are found whole in a text, before it is split."""
    from tokenizers import AddedToken

    types = metadata.get("tokenizer.ggml.token_type") or []
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    pairs = list(zip(tokens, types, strict=False))
    special = [token for token, kind in pairs if kind in (CONTROL, UNKNOWN) and token in vocab]
    tokenizer.add_special_tokens([AddedToken(one, normalized=False) for one in special])
    plain = [token for token, kind in pairs if kind == USER_DEFINED and token in vocab]
    tokenizer.add_tokens([AddedToken(one, normalized=False, special=False) for one in plain])


def _add_template(tokenizer: Any, metadata: dict[str, Any], tokens: list[str], model: str) -> None:
    """The tokens with which a text begins and ends."""
    from tokenizers import processors

    split = metadata.get("tokenizer.ggml.pre")
    defaults = {"bos": model == "llama" or split in WITH_BOS, "eos": False}
    ends = {}
    for name, default in defaults.items():
        number = metadata.get(f"tokenizer.ggml.{name}_token_id")
        is_there = type(number) is int and 0 <= number < len(tokens)
        if is_there and metadata.get(f"tokenizer.ggml.add_{name}_token", default):
            ends[name] = (tokens[number], number)
    if ends:
        before = [ends["bos"][0]] if "bos" in ends else []
        after = [ends["eos"][0]] if "eos" in ends else []
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A:0", *after],
            pair=[*before, "$A:0", *after, "$B:1"],
            special_tokens=list(ends.values()),
        )


def _make_tokenizer_config(metadata: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for name, key in names.items():
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if type(number) is int and 0 <= number < len(tokens):
            config[f"{name}_token"] = tokens[number]
    prefix = "tokenizer.chat_template"
    templates = {
        key.removeprefix(f"{prefix}.") if key != prefix else "default": value
        for key, value in metadata.items()
        if key == prefix or key.startswith(f"{prefix}.")
    }
    if list(templates) == ["default"]:
        config["chat_template"] = templates["default"]
    elif templates:
        config["chat_template"] = [
            {"name": name, "template": text} for name, text in templates.items()
        ]
    return config
