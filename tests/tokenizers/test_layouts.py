"""Token ids, text and structured outputs with the tokenizer files of real families."""

from __future__ import annotations

import json
import logging
import random
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from autotp_serving.config import ConfigError
from autotp_serving.engine.detokenizer import IncrementalDecoder
from autotp_serving.engine.grammar import compile_text, write_structure
from autotp_serving.engine.tokenizer import HuggingFaceTokenizer
from autotp_serving.engine.vocabulary import Vocabulary
from autotp_serving.structured_output import CallableTool, StructuredOutput, ToolCalls
from tests.tokenizers.layouts import LAYOUTS, Layout, make_lines

NUM_LINES = 2000
NUM_STREAMED = 150
MAX_TOKENS = 400

BY_NAME = {layout.name: layout for layout in LAYOUTS}
STRUCTURED = ("llama-2", "mistral-v0.1", "mistral-v0.3", "phi-3", "gemma", "llm-jp", "qwen3")

TOOL = CallableTool(
    "the_function",
    json.dumps({
        "type": "object", "properties": {"city": {"enum": ["東京 now", "naïve"]}},
        "required": ["city"], "additionalProperties": False,
    }),
    is_strict=True,
)  # fmt: skip
SCHEMA = {
    "type": "object",
    "properties": {
        "value_name": {"type": "string", "maxLength": 6},
        "word": {"enum": ["the function", "привет мир", "🍣", "cafe\u0301"]},
    },
    "required": ["value_name", "word"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: layout.name)
def layout(request: pytest.FixtureRequest) -> Layout:
    return request.param


@pytest.fixture(scope="module")
def folder(layout: Layout, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(layout.name)
    layout.write(folder)
    return folder


def test_ids_and_text_are_those_of_the_file(layout: Layout, folder: Path) -> None:
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = HuggingFaceTokenizer(folder)
    lines = make_lines(NUM_LINES, seed=5, special=layout.special)
    assert len({len(line) for line in lines}) > 50
    for add_special_tokens in (False, True):
        expected = [
            one.ids for one in file.encode_batch(lines, add_special_tokens=add_special_tokens)
        ]
        found = [tokenizer.encode(line, add_special_tokens=add_special_tokens) for line in lines]
        wrong = [
            line for line, ours, own in zip(lines, found, expected, strict=True) if ours != own
        ]
        assert not wrong, f"{len(wrong)} of {NUM_LINES} lines, such as {wrong[0]!r}"
    prompt = tokenizer.encode("x")
    for token_ids in expected[:NUM_STREAMED]:
        decoder = IncrementalDecoder(tokenizer, prompt, skip_special_tokens=False)
        text = "".join(map(decoder.add, token_ids))
        start = len(tokenizer.decode(prompt, skip_special_tokens=False))
        assert text == file.decode(prompt + token_ids, skip_special_tokens=False)[start:]
        # The bytes of tokens are those that they add to a text.
        pieces = b"".join(map(tokenizer.token_bytes, token_ids))
        assert pieces.decode() == text


@pytest.mark.parametrize("name", ["smollm2", "llama-2", "code-llama"])
def test_a_class_that_would_give_other_ids_is_named_once(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    BY_NAME[name].write(tmp_path)
    with caplog.at_level(logging.INFO, "autotp_serving"):
        HuggingFaceTokenizer(tmp_path)
    (line,) = [one for one in caplog.messages if "The tokenizer is that of" in one]
    assert BY_NAME[name].tokenizer_class in line


def test_tokens_that_only_the_config_has_keep_their_ids(tmp_path: Path) -> None:
    BY_NAME["smollm2"].write(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    first = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size()
    extra = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    config["added_tokens_decoder"][str(first)] = {"content": "<|new|>", "special": True, **extra}
    path.write_text(json.dumps(config))
    tokenizer = HuggingFaceTokenizer(tmp_path)
    assert tokenizer.encode("<|new|>") == [first] and first in tokenizer.special_token_ids
    config["added_tokens_decoder"] = {"7": {"content": "<|new|>", "special": True, **extra}}
    path.write_text(json.dumps(config))
    loaded = HuggingFaceTokenizer(tmp_path)
    assert loaded.encode("<|new|>") != [7]  # the file's own token has that id


def test_a_file_for_training_neither_cuts_nor_fills_up_what_is_probed(tmp_path: Path) -> None:
    BY_NAME["smollm2"].write(tmp_path)
    path = tmp_path / "tokenizer.json"
    padding = {
        "strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "!",
    }  # fmt: skip
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding": padding}))
    assert len(HuggingFaceTokenizer(tmp_path).encode("hello")) < 10


def complete(tokenizer: HuggingFaceTokenizer, output: StructuredOutput, seed: int) -> str:
    """A random completion that keeps to a structured output, as a client would get it."""
    vocabulary = Vocabulary.of(tokenizer)
    matcher, _ = compile_text(vocabulary, write_structure(output, vocabulary))
    matcher = matcher.deep_copy()
    decoder = IncrementalDecoder(tokenizer, tokenizer.encode("[INST] the cat [/INST]"))
    rng = random.Random(seed)
    text = ""
    for _ in range(MAX_TOKENS):
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [token for token in range(tokenizer.vocab_size) if mask >> token & 1]
        # Blanks between JSON tokens are allowed without end.
        weights = [1 if tokenizer.token_bytes(token).strip() else 0.01 for token in allowed]
        (token,) = rng.choices(allowed, weights)
        assert matcher.consume_token(token)
        if token in tokenizer.eos_token_ids:
            return text
        text += decoder.add(token)
        if matcher.is_stopped():
            return text
    raise AssertionError(f"no end after {text[-80:]!r}")


@pytest.mark.parametrize("name", STRUCTURED)
def test_structured_outputs_keep_their_form(name: str, tmp_path: Path) -> None:
    BY_NAME[name].write(tmp_path)
    tokenizer = HuggingFaceTokenizer(tmp_path)
    choices = ["the cat", " don't", "naïve", "cafe\u0301 yes", "<0x41>", "🍣"]
    for seed in range(3):
        text = complete(tokenizer, StructuredOutput("choice", json.dumps(choices)), seed)
        assert text in choices
        for choice in choices:
            only = StructuredOutput("choice", json.dumps([choice]))
            assert complete(tokenizer, only, seed) == choice
        pattern = "(the|function) [0-9]{3}! +x"
        assert re.fullmatch(pattern, complete(tokenizer, StructuredOutput("regex", pattern), seed))
        found = complete(tokenizer, StructuredOutput("json_schema", json.dumps(SCHEMA)), seed)
        assert json.loads(found)["word"] in SCHEMA["properties"]["word"]["enum"]
        calls = ToolCalls("hermes", (TOOL,), is_required=True, is_single=True)
        found = complete(tokenizer, StructuredOutput("text", calls=calls), seed)
        call = re.fullmatch(r"<tool_call>\n(.*)\n</tool_call>\s*", found)
        assert call and json.loads(call[1])["name"] == "the_function", found


def test_a_file_that_the_library_cannot_read_is_named(tmp_path: Path) -> None:
    """The class builds its own pre-tokenizer, and would not notice."""
    BY_NAME["smollm2"].write(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"decoder": {"type": "Newest"}}))
    with pytest.raises(ConfigError, match="no tokenizer can be loaded"):
        HuggingFaceTokenizer(tmp_path)
