"""The tokenizer of a checkpoint: what is text in it, and what is not."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from autotp_serving.tokenizer import HuggingFaceTokenizer

DEMO = Path(__file__).parents[1] / "demo_model"


def test_tags_that_part_an_answer_are_text_even_where_a_model_marks_them_special(
    tmp_path: Path,
) -> None:
    outer = AutoTokenizer.from_pretrained(DEMO)
    outer.add_special_tokens({"additional_special_tokens": ["<tool_call>", "<|other|>"]})
    outer.save_pretrained(tmp_path)
    tokenizer = HuggingFaceTokenizer(tmp_path)
    tag, other = (outer.convert_tokens_to_ids(name) for name in ("<tool_call>", "<|other|>"))
    assert other in tokenizer.special_token_ids and tag not in tokenizer.special_token_ids
    token_ids = [*tokenizer.encode("a", add_special_tokens=False), tag, other]
    assert tokenizer.decode(token_ids) == "a<tool_call>"
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == "a<tool_call><|other|>"
    assert tokenizer.token_bytes(tag) == b"<tool_call>"
