"""The tokenizer of a checkpoint: what is text in it, and what is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from autotp_serving.chat_template import ChatTemplate, ChatTemplateError
from autotp_serving.request import RequestError
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


def test_a_conversation_is_written_out_as_transformers_would() -> None:
    tokenizer = HuggingFaceTokenizer(DEMO)
    messages = [{"role": "user", "content": "hi", "name": None}]
    options = {"add_generation_prompt": True, "continue_final_message": False}
    outer = AutoTokenizer.from_pretrained(DEMO)
    expected = outer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.render_chat(messages, options) == expected
    goes_on = {"add_generation_prompt": False, "continue_final_message": True}
    assert tokenizer.render_chat(messages, goes_on) == outer.apply_chat_template(
        messages, tokenize=False, continue_final_message=True
    )
    with pytest.raises(ChatTemplateError, match="Roles are system, user and assistant"):
        tokenizer.render_chat([{"role": "tool", "content": "a"}], options)


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "conversations", "documents"])
def test_an_option_cannot_change_how_a_conversation_is_written_out(name: str) -> None:
    tokenizer = HuggingFaceTokenizer(DEMO)
    with pytest.raises(RequestError, match=name):
        tokenizer.check_chat({name: "a"})
    tokenizer.check_chat({"enable_thinking": True, "add_generation_prompt": True, "tools": []})


def test_templates_are_chosen_by_name() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "tools"}, {})
    options = {"add_generation_prompt": True}
    messages = [{"role": "user", "content": "hi"}]
    assert template.render(messages, options) == "plain"
    assert template.render(messages, options | {"tools": [{"type": "function"}]}) == "tools"
    with pytest.raises(ChatTemplateError, match="none of them"):
        ChatTemplate({"other": "a"}, {}).render(messages, options)
