"""Tokenizer files of real model families, rebuilt small: their structure, a vocabulary of our own.

Each layout has the normalizer, pre-tokenizer, decoder, post-processor, special tokens and
`tokenizer_class` that the family publishes. Only the vocabulary is trained here, on `make_lines`.
"""
# ruff: noqa: E501, RUF001, SIM905

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

VOCAB_SIZE = 1500

WORDS = (
    "the cat's sat on mat and don't you think it'll rain WE'RE here I've she'd "
    "function return value_name camelCase HTTPServer snake_case_name self.model[0] import numpy "
    "naïve café Zürich straße Ελλάδα καλημέρα привет мир здравствуйте мелкий текст 東京 寿司 "
    "日本語の文章です 你好世界 今天天气很好 한국어 문장입니다 안녕하세요 مرحبا بالعالم שלום עולם "
    "नमस्ते दुनिया मैं हूँ ภาษาไทย สวัสดี cafe\u0301 e\u0301te\u0301 \ufb01ne \u2167 ½ ①"
).split(" ")
EMOJI = "🍣 🎉 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 ☕ ✅ →".split(" ")
NUMBERS = "0 7 12 345 2026 31415 1,234,567.89 0x1F 3e-7 ١٢٣ 10:45 v2.13.0 1/2".split(" ")
CODE = (
    "def f(x):\n    return x**2  # square",
    "for (int i = 0; i < n; ++i) {\n\t\tsum += a[i];\n}",
    'print(f"{name!r:>10}")\r\n',
    '<div class="a">\n\n  <b>text</b>\n</div>',
    "SELECT * FROM t WHERE a >= 10 AND b != 'x';",
    "https://example.org/a_b?q=1&r=%20#top",
)
BLANKS = (
    " ",
    "  ",
    "   ",
    "        ",
    "\t",
    "\n",
    "\n\n",
    "\n\n\n",
    " \n ",
    "\r\n",
    "\u00a0",
    "\u3000",
)
MARKS = ", . ; : ! ? ... — - ' \" ( ) [ ] { } # @ $ % ^ & * _ ~ ` | \\ / ，。！？、「」".split(" ")


def make_lines(count: int, seed: int = 0, special: tuple[str, ...] = ()) -> list[str]:
    """Mixed text: scripts, code, emoji, digits, runs of blanks, odd bytes, special tokens."""
    rng = random.Random(seed)
    sources: list[tuple[str, ...] | list[str]] = [WORDS, WORDS, WORDS, NUMBERS, EMOJI, CODE, MARKS]
    if special:
        sources.append(special)
    lines = []
    for _ in range(count):
        parts = []
        for _ in range(rng.randrange(1, 14)):
            if rng.random() < 0.03:
                parts.append(chr(rng.choice((0, 1, 127, 0x85, 0x200B, 0x2581, 0xFEFF, 0x1F9FF))))
            parts.append(rng.choice(rng.choice(sources)))
            parts.append(" " if rng.random() < 0.7 else rng.choice(("", *BLANKS)))
        lines.append("".join(parts))
    return lines


@cache
def training_lines() -> list[str]:
    """What all vocabularies are made from."""
    return make_lines(1500, seed=1)


@dataclass(frozen=True)
class Layout:
    """One family's tokenizer files.

    Attributes:
        name: of the family.
        tokenizer: makes `tokenizer.json`, the special tokens included.
        tokenizer_class: as tokenizer_config.json has it.
        model_type: as config.json has it.
        config: further entries of tokenizer_config.json.
        prepends_blank: a blank goes before each text.
    """

    name: str
    tokenizer: Callable[[], Tokenizer]
    tokenizer_class: str
    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    prepends_blank: bool = False

    def write(self, folder: Path) -> None:
        """Write the files that a checkpoint of the family has."""
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = self.tokenizer()
        tokenizer.save(str(folder / "tokenizer.json"))
        added = {
            str(number): {
                "content": one.content, "lstrip": one.lstrip, "rstrip": one.rstrip,
                "normalized": one.normalized, "single_word": one.single_word,
                "special": one.special,
            }
            for number, one in tokenizer.get_added_tokens_decoder().items()
        }  # fmt: skip
        config = {
            "added_tokens_decoder": added,
            "tokenizer_class": self.tokenizer_class,
            "clean_up_tokenization_spaces": False,
            **self.config,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        eos = tokenizer.token_to_id(self.config["eos_token"])
        (folder / "config.json").write_text(
            json.dumps({"model_type": self.model_type, "eos_token_id": eos})
        )

    @property
    def special(self) -> tuple[str, ...]:
        """Added tokens, as a text may spell them."""
        return tuple(one.content for one in self.tokenizer().get_added_tokens_decoder().values())


GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = GPT4.replace(r"\p{N}{1,3}", r"\p{N}")
WORD_CASES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s|"
    r"%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = WORD_CASES % ("", "", r"\p{N}")
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = WORD_CASES % (ENDINGS, ENDINGS, r"\p{N}{1,3}")

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
GPT2_SPLIT = BYTE_LEVEL | {"use_regex": True}
BYTES_ONLY = BYTE_LEVEL | {"use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}


def sequence(kind: str, *parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", kind: list(parts)}


def split(pattern: str, behavior: str = "Isolated", is_regex: bool = True) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex" if is_regex else "String": pattern},
        "behavior": behavior,
        "invert": False,
    }


def template(*tokens: str) -> Callable[[Tokenizer], dict[str, Any]]:
    """A post-processor that puts special tokens before a text."""

    def make(tokenizer: Tokenizer) -> dict[str, Any]:
        def piece(token: str, number: int) -> dict[str, Any]:
            return {"SpecialToken": {"id": token, "type_id": number}}

        first = [*(piece(one, 0) for one in tokens), {"Sequence": {"id": "A", "type_id": 0}}]
        second = [*(piece(one, 1) for one in tokens), {"Sequence": {"id": "B", "type_id": 1}}]
        return {
            "type": "TemplateProcessing",
            "single": first,
            "pair": [*first, *second],
            "special_tokens": {
                one: {"id": one, "ids": [tokenizer.token_to_id(one)], "tokens": [one]}
                for one in tokens
            },
        }

    return make


@cache
def trained(pre_tokenizer: str, normalizer: str, size: int = VOCAB_SIZE) -> dict[str, Any]:
    """A byte-level BPE model: its vocabulary and merges, for a pre-tokenizer and normalizer."""
    tokenizer = Tokenizer(models.BPE())
    state = json.loads(tokenizer.to_str())
    state["pre_tokenizer"] = json.loads(pre_tokenizer)
    state["normalizer"] = json.loads(normalizer)
    tokenizer = Tokenizer.from_str(json.dumps(state))
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_lines(), trainer)
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return model


def token(content: str, **flags: bool) -> dict[str, Any]:
    return {
        "content": content, "lstrip": False, "rstrip": False, "single_word": False,
        "normalized": False, "special": True, **flags,
    }  # fmt: skip


def assemble(
    model: dict[str, Any],
    added: list[dict[str, Any]],
    post_processor: Any,
    **parts: dict[str, Any] | None,
) -> Tokenizer:
    """A tokenizer of its parts. Added tokens that the vocabulary lacks come after it."""
    entries = model["vocab"]
    ids = (
        dict(entries)
        if isinstance(entries, dict)
        else {one: i for i, (one, _) in enumerate(entries)}
    )
    numbered = []
    for one in added:
        number = ids.setdefault(one["content"], len(ids))
        numbered.append({"id": number, **one})
    state = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": sorted(numbered, key=lambda one: one["id"]), "post_processor": None,
        "model": model, **parts,
    }  # fmt: skip
    tokenizer = Tokenizer.from_str(json.dumps(state))
    if post_processor is not None:
        state["post_processor"] = (
            post_processor(tokenizer) if callable(post_processor) else post_processor
        )
    return Tokenizer.from_str(json.dumps(state))


def byte_level(
    pre_tokenizer: dict[str, Any],
    added: list[dict[str, Any]],
    *,
    normalizer: dict[str, Any] | None = None,
    post_processor: Any = BYTE_LEVEL | {"use_regex": True},
    **model: Any,
) -> Callable[[], Tokenizer]:
    """A byte-level vocabulary; `model` overrides settings of the BPE model."""

    @cache
    def make() -> Tokenizer:
        return assemble(
            trained(json.dumps(pre_tokenizer), json.dumps(normalizer)) | model,
            added,
            post_processor,
            normalizer=normalizer,
            pre_tokenizer=pre_tokenizer,
            decoder=BYTE_LEVEL | {"use_regex": True},
        )

    return make


PREPEND = sequence(
    "normalizers",
    {"type": "Prepend", "prepend": "▁"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
)
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
UNREPLACE = (
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
)


@cache
def trained_pieces() -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces and merges of a vocabulary in which ▁ stands for a blank."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    # No merge goes over a word's border, nor over lines.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁*[^▁\n\t]*|\n+|\t+"), "isolated")
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, limit_alphabet=160, show_progress=False)
    tokenizer.train_from_iterator(training_lines(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [tuple(one) for one in model["merges"]]


def sentencepiece(
    added: list[dict[str, Any]],
    *,
    first: tuple[str, ...] = ("<unk>", "<s>", "</s>"),
    normalizer: dict[str, Any] | None = PREPEND,
    pre_tokenizer: dict[str, Any] | None = None,
    strips: bool = True,
    post_processor: Any = None,
) -> Callable[[], Tokenizer]:
    """A BPE vocabulary with byte fallback, as converted from sentencepiece."""

    @cache
    def make() -> Tokenizer:
        pieces, merges = trained_pieces()
        byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
        names = [*first, *byte_pieces, *pieces]
        model = {
            "type": "BPE", "dropout": None, "unk_token": "<unk>",
            "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": {name: number for number, name in enumerate(names)},
            "merges": [list(one) for one in merges],
        }  # fmt: skip
        return assemble(
            model,
            [*(token(name) for name in first), *added],
            post_processor,
            normalizer=normalizer,
            pre_tokenizer=pre_tokenizer,
            decoder=sequence("decoders", *UNREPLACE, *([STRIP] if strips else [])),
        )

    return make


def unigram(added: list[dict[str, Any]]) -> Callable[[], Tokenizer]:
    """A Unigram vocabulary with byte fallback and Metaspace, as llm-jp has."""

    @cache
    def make() -> Tokenizer:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=VOCAB_SIZE, unk_token="<unk>", special_tokens=["<unk>", "<s>", "</s>"],
            show_progress=False,
        )  # fmt: skip
        tokenizer.train_from_iterator(training_lines(), trainer)
        pieces = json.loads(tokenizer.to_str())["model"]["vocab"]
        model = {
            "type": "Unigram", "unk_id": 0, "byte_fallback": True,
            "vocab": [*pieces[:3], *([f"<0x{byte:02X}>", -20.0] for byte in range(256)),
                      *pieces[3:]],
        }  # fmt: skip
        return assemble(
            model,
            [token("<unk>"), token("<s>"), token("</s>"), *added],
            template("<s>"),
            normalizer=None,
            pre_tokenizer=METASPACE | {"split": False},
            decoder=sequence("decoders", *UNREPLACE, STRIP),
        )

    return make


def names(*contents: str, **flags: bool) -> list[dict[str, Any]]:
    return [token(one, **flags) for one in contents]


END = "<|endoftext|>"
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
S = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
GPT2 = {"bos_token": END, "eos_token": END, "unk_token": END, "add_prefix_space": False}
FAST = "PreTrainedTokenizerFast"
LLAMA3 = (
    "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>".split()
)
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
GLM = ("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|user|>")
GEMMA = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
PHI = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")

LAYOUTS = (
    Layout("gpt2", byte_level(GPT2_SPLIT, names(END, normalized=True)), "GPT2Tokenizer", "gpt2", GPT2),
    Layout(
        "smollm2",
        byte_level(sequence("pretokenizers", DIGITS, GPT2_SPLIT), names(*CHATML), post_processor=None),
        "GPT2Tokenizer", "llama", GPT2 | {"eos_token": "<|im_end|>"},
    ),
    Layout(
        "starcoder2",
        byte_level(sequence("pretokenizers", DIGITS, GPT2_SPLIT), names(END, "<fim_prefix>")),
        "GPT2Tokenizer", "starcoder2", GPT2,
    ),
    Layout(
        "qwen2",
        byte_level(sequence("pretokenizers", split(QWEN), BYTES_ONLY), names(*CHATML),
                   normalizer={"type": "NFC"}, unk_token=None),
        "Qwen2Tokenizer", "qwen2",
        {"eos_token": "<|im_end|>", "pad_token": END, "bos_token": None, "add_bos_token": False},
    ),
    Layout(
        "qwen3",
        byte_level(sequence("pretokenizers", split(QWEN), BYTES_ONLY),
                   [*names(*CHATML), *names("<tool_call>", "</tool_call>", "<think>", "</think>",
                                            special=False)],
                   normalizer={"type": "NFC"}),
        "Qwen2Tokenizer", "qwen3",
        {"eos_token": "<|im_end|>", "pad_token": END, "bos_token": None, "add_bos_token": False},
    ),
    Layout(
        "llama-2", sentencepiece([], post_processor=template("<s>")), "LlamaTokenizer", "llama",
        S | {"add_bos_token": True, "add_eos_token": False, "legacy": False}, prepends_blank=True,
    ),
    Layout(
        "llama-3",
        byte_level(sequence("pretokenizers", split(GPT4), BYTES_ONLY), names(*LLAMA3),
                   post_processor=lambda tokenizer: sequence(
                       "processors", BYTE_LEVEL | {"use_regex": True},
                       template(LLAMA3[0])(tokenizer)),
                   ignore_merges=True),
        FAST, "llama", {"bos_token": LLAMA3[0], "eos_token": "<|eot_id|>"},
    ),
    Layout(
        "mistral-v0.1", sentencepiece([], post_processor=template("<s>")), "LlamaTokenizer",
        "mistral", S | {"add_bos_token": True, "legacy": True}, prepends_blank=True,
    ),
    Layout(
        "mistral-v0.3",
        sentencepiece(names("[INST]", "[/INST]", "[TOOL_CALLS]"), normalizer=None,
                      pre_tokenizer=METASPACE, post_processor=template("<s>")),
        "LlamaTokenizer", "mistral", S | {"add_bos_token": True, "legacy": False},
        prepends_blank=True,
    ),
    Layout(
        "mistral-nemo",
        byte_level(sequence("pretokenizers", split(TEKKEN), BYTES_ONLY),
                   names("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
                   post_processor=template("<s>"), ignore_merges=True),
        "GPT2Tokenizer", "mistral", S,
    ),
    Layout(
        "gemma",
        sentencepiece([*names("\n\n", "\n\n\n", "<b>", special=False),
                       *names("<start_of_turn>", "<end_of_turn>")],
                      first=GEMMA, normalizer=REPLACE,
                      pre_tokenizer=split(" ", "MergedWithPrevious", is_regex=False),
                      strips=False, post_processor=template("<bos>")),
        "GemmaTokenizer", "gemma",
        {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
    ),
    Layout(
        "gemma-3",
        sentencepiece([*names("\n\n", "\t\t", "▁▁", special=False), *names("<end_of_turn>")],
                      first=GEMMA, normalizer=REPLACE, strips=False,
                      post_processor=template("<bos>")),
        "GemmaTokenizer", "gemma3_text",
        {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "add_bos_token": True},
    ),
    Layout(
        "phi-3",
        sentencepiece(names(*PHI, rstrip=True), post_processor=template()), "LlamaTokenizer",
        "phi3", S | {"add_bos_token": False, "legacy": False, "eos_token": END},
        prepends_blank=True,
    ),
    Layout(
        "phi-4",
        byte_level(sequence("pretokenizers", split(GPT4), BYTES_ONLY),
                   names(END, "<|im_start|>", "<|im_end|>", "<|fim_prefix|>", lstrip=True,
                         rstrip=True)),
        "GPT2Tokenizer", "phi3", GPT2,
    ),
    Layout(
        "glm-4",
        byte_level(sequence("pretokenizers", split(GPT4), BYTES_ONLY), names(*GLM),
                   post_processor=lambda tokenizer: sequence(
                       "processors", BYTE_LEVEL | {"use_regex": True},
                       template("[gMASK]", "<sop>")(tokenizer))),
        FAST, "glm4", {"eos_token": END, "pad_token": END},
    ),
    Layout(
        "deepseek-v3",
        byte_level(sequence("pretokenizers", split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"),
                            split(GPT4.replace(r"|\p{N}{1,3}", "")), BYTES_ONLY),
                   [*names(*DEEPSEEK[:2]), *names(*DEEPSEEK[2:], special=False)],
                   normalizer=sequence("normalizers")),
        "LlamaTokenizerFast", "deepseek_v3",
        {"bos_token": DEEPSEEK[0], "eos_token": DEEPSEEK[1], "add_bos_token": True,
         "add_eos_token": False},
    ),
    Layout(
        "deepseek-coder",
        byte_level(sequence("pretokenizers", split(r"[\r\n]"), split(r"\s?\p{L}+"),
                            split(r"\s?\p{P}+"), split("[一-龥ࠀ-一가-퟿]+"), DIGITS, BYTES_ONLY),
                   names(*DEEPSEEK[:2]), normalizer=sequence("normalizers")),
        "LlamaTokenizerFast", "llama",
        {"bos_token": DEEPSEEK[0], "eos_token": DEEPSEEK[1], "add_bos_token": True},
    ),
    Layout(
        "granite-3",
        byte_level(sequence("pretokenizers", DIGITS, GPT2_SPLIT),
                   names("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>")),
        "GPT2Tokenizer", "granite",
        {"bos_token": "<|end_of_text|>", "eos_token": "<|end_of_text|>", "add_bos_token": False},
    ),
    Layout(
        "olmo",
        byte_level(GPT2_SPLIT, [*names("<|padding|>", END),
                                *names("   ", "    ", normalized=True, special=False)],
                   normalizer={"type": "NFC"}, post_processor=template()),
        "GPTNeoXTokenizer", "olmo",
        {"bos_token": None, "eos_token": END, "pad_token": "<|padding|>"},
    ),
    Layout(
        "olmo-2",
        byte_level(sequence("pretokenizers", split(GPT4), BYTES_ONLY), names(END, "<|pad|>")),
        "GPT2Tokenizer", "olmo2", GPT2,
    ),
    Layout(
        "falcon",
        byte_level(sequence("pretokenizers", {"type": "Punctuation", "behavior": "Contiguous"},
                            GPT2_SPLIT, {"type": "Digits", "individual_digits": False},
                            split("[0-9][0-9][0-9]")),
                   names(">>TITLE<<", ">>QUESTION<<", END), post_processor=None),
        FAST, "falcon", {"eos_token": END, "add_prefix_space": False},
    ),
    Layout(
        "pythia",
        byte_level(GPT2_SPLIT, [*names(END, "<|padding|>"),
                                *names("  ", "   ", "        ", normalized=True, special=False)],
                   normalizer={"type": "NFC"}),
        "GPTNeoXTokenizer", "gpt_neox", GPT2,
    ),
    Layout(
        "yi",
        sentencepiece(names("<|im_start|>", "<|im_end|>"), first=("<unk>", "<|startoftext|>", END),
                      normalizer=REPLACE, strips=False),
        "LlamaTokenizer", "llama",
        {"bos_token": "<|startoftext|>", "eos_token": END, "unk_token": "<unk>",
         "add_bos_token": False, "add_prefix_space": False},
    ),
    Layout(
        "code-llama",
        sentencepiece(names("▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>"),
                      post_processor=template("<s>")),
        "CodeLlamaTokenizer", "llama", S, prepends_blank=True,
    ),
    Layout(
        "command-r",
        byte_level(sequence("pretokenizers", DIGITS, GPT2_SPLIT),
                   names("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<UNK>"),
                   normalizer={"type": "NFC"}, post_processor=template("<BOS_TOKEN>")),
        "CohereTokenizerFast", "cohere",
        {"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "unk_token": "<UNK>",
         "add_bos_token": True, "add_eos_token": False},
    ),
    Layout(
        "bloom",
        byte_level(sequence("pretokenizers", split(r" ?[^(\s|[.,!?…。，、।۔،])]+"), BYTES_ONLY),
                   names("<unk>", "<s>", "</s>")),
        "BloomTokenizerFast", "bloom", S,
    ),
    Layout(
        "gpt-oss",
        byte_level(sequence("pretokenizers", split(O200K, "Removed") | {"invert": True}, BYTES_ONLY),
                   names("<|startoftext|>", END, "<|return|>", "<|channel|>"), ignore_merges=True),
        FAST, "gpt_oss", {"bos_token": "<|startoftext|>", "eos_token": "<|return|>"},
    ),
    Layout("llm-jp", unigram([]), FAST, "llama", S, prepends_blank=True),
)  # fmt: skip
