"""Small random checkpoints for tests, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def save_tiny_llama(folder: Path, **changes: Any) -> Path:
    """Save a random Llama of about 2 M parameters in several shards, with a byte-level tokenizer.

    8 heads share 4 key/value heads, so that 3 ranks get uneven shards. Weights are large enough
    for attention to matter to the choice of tokens.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "hidden_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 704,
        "vocab_size": 384,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "initializer_range": 0.08,
        "bos_token_id": 256,
        "eos_token_id": 257,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(settings | changes))).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="1MB")
    save_byte_tokenizer(folder)
    return folder


def save_byte_tokenizer(folder: Path) -> None:
    """Save a fast tokenizer with one token per byte, then BOS (256) and EOS (257)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: number for number, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
