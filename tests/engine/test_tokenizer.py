"""The tokenizer of a checkpoint: what is text in it, and what is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from autotp_serving.config import ConfigError
from autotp_serving.engine.chat_template import ChatTemplate, ChatTemplateError
from autotp_serving.engine.tokenizer import HuggingFaceTokenizer
from autotp_serving.request import RequestError

DEMO = Path(__file__).parents[2] / "demo_model"


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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files of a tokenizer, to be changed."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, tmp_path)
    return tmp_path


def change(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_prompt_is_neither_cut_nor_filled_up_as_a_training_would_have_it(folder: Path) -> None:
    plain = HuggingFaceTokenizer(folder).encode("a longer text than four tokens")
    change(
        folder / "tokenizer.json",
        truncation={
            "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0
        },
        padding={
            "strategy": {"Fixed": 100_000}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 2, "pad_type_id": 0, "pad_token": "<pad>",
        },
    )  # fmt: skip
    assert HuggingFaceTokenizer(folder).encode("a longer text than four tokens") == plain
    assert len(plain) > 4


@pytest.mark.parametrize("template", [5, True, [1], {"default": 5}, [{"name": "x"}]], ids=str)
def test_a_chat_template_that_is_no_text(template: object, folder: Path) -> None:
    change(folder / "tokenizer_config.json", chat_template=template)
    with pytest.raises(ConfigError, match=r"chat_template|no tokenizer can be loaded"):
        HuggingFaceTokenizer(folder)


@pytest.mark.parametrize(
    "changes",
    [{"model": {"type": "Newest"}}, {"added_tokens": [{"id": -1}]}, {"pre_tokenizer": 5},
     {"normalizer": {"type": "Nowhere"}}, {"decoder": []}, {"model": None}],
    ids=str,
)  # fmt: skip
def test_a_file_that_the_library_cannot_read(changes: dict[str, object], folder: Path) -> None:
    change(folder / "tokenizer.json", **changes)
    with pytest.raises(ConfigError, match="no tokenizer can be loaded") as failure:
        HuggingFaceTokenizer(folder)
    assert str(folder) in str(failure.value) and "\n" not in str(failure.value)


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
        tokenizer.render_chat([{"role": "king", "content": "a"}], options)


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


def test_the_files_of_a_model_that_also_sees(folder: Path) -> None:
    """Its template may be the processor's, its end token that of its text part."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = None
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    change(folder / "config.json", text_config={"eos_token_id": 5}, eos_token_id=None)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "seen"}))
    tokenizer = HuggingFaceTokenizer(folder)
    assert tokenizer.chat_template == "seen" and 5 in tokenizer.eos_token_ids
    options = {"add_generation_prompt": True}
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}], options) == "seen"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": 5}))
    assert HuggingFaceTokenizer(folder).chat_template == ""


def test_a_draft_model_has_the_same_tokens(folder: Path) -> None:
    tokenizer = HuggingFaceTokenizer(DEMO)
    tokenizer.check_draft(folder, False)
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    more = {**added[-1], "id": tokenizer.vocab_size, "content": "<one more>"}
    change(folder / "tokenizer.json", added_tokens=[*added, more])
    with pytest.raises(ConfigError, match=r"--draft-model .* other tokens"):
        tokenizer.check_draft(folder, False)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"--draft-model .* no tokenizer can be loaded"):
        tokenizer.check_draft(folder, False)
