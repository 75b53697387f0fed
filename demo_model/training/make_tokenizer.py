"""Trains the byte-level BPE tokenizer and writes it in the form that transformers loads.

The configuration is written by hand: it is the part of the format that transformers 4 and 5
both read, which neither's own `save_pretrained` would give.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from texts import (
    BOS,
    CHAT_TEMPLATE,
    EOS,
    PAD,
    SPECIAL_TOKENS,
    SYSTEM_PROMPTS,
    answer,
    questions,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from wordnet import Entry

VOCAB_SIZE = 8192
MAX_LENGTH = 4096


def training_text(entries: list[Entry]) -> Iterator[str]:
    """Every answer, and every phrasing of a few questions so that their words are whole tokens."""
    yield from SYSTEM_PROMPTS
    for index, entry in enumerate(entries):
        yield answer(entry)
        if index % 20 == 0:
            yield from questions(entry)


def train_tokenizer(entries: list[Entry]) -> Tokenizer:
    """Byte-level, without normalization: any UTF-8 text comes back as it went in."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(entries), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "additional_special_tokens": [t for t in SPECIAL_TOKENS if t not in names.values()],
        "model_max_length": MAX_LENGTH,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": CHAT_TEMPLATE,
    }
    for name, content in (("tokenizer_config", config), ("special_tokens_map", names)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
