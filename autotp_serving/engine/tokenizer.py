"""Text to tokens and back, as the API and the engine need it. Rank 0 only, never torch.

The engine sees the `Tokenizer` protocol; tests put a byte tokenizer in its place.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from autotp_serving.config import ConfigError
from autotp_serving.engine.chat_template import ChatTemplate, ChatTemplateError, describe_error
from autotp_serving.engine.reasoning_formats import list_reasoning_tags
from autotp_serving.engine.token_bytes import byte_level_bytes, sentencepiece_bytes
from autotp_serving.engine.tokenizer_files import LoadedTokenizer, load_tokenizer, read_state
from autotp_serving.engine.tool_formats import list_tags
from autotp_serving.model_folder import read_object
from autotp_serving.request import RequestError

logger = logging.getLogger(__name__)

SHARED_TEMPLATE_OPTIONS = frozenset({"add_generation_prompt", "continue_final_message", "tools"})


class Tokenizer(Protocol):
    """What the server asks of a tokenizer; all calls are thread-safe.

    Attributes:
        eos_token_ids: tokens that end a text, all below `vocab_size`.
        special_token_ids: tokens that are no text, all below `vocab_size`.
        vocab_size: ids from 0 to below this are tokens that tokenizer and model both know. `encode`
            may yield others, where the tokenizer knows more: see `check_tokens`.
        chat_template: "" without one.
    """

    eos_token_ids: frozenset[int]
    special_token_ids: frozenset[int]
    vocab_size: int
    chat_template: str
    template: ChatTemplate | None
    """What renders conversations, for processes that may do it in this one's place; None if only
    `render_chat` can."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Tokenize, the model's own special tokens added (a leading BOS, where it has one)."""
        ...

    def encode_pair(self, text: str, other: str) -> list[int]:
        """Tokenize two texts, joined with the special tokens that the model has for that."""
        ...

    def render_chat(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
        """Write out a conversation as the model was taught to read one, in this thread.

        `options` are the template's own variables; `add_generation_prompt`,
        `continue_final_message` and `tools` are known to all.

        Raises:
            ChatTemplateError: it refuses the conversation, or fails.
        """
        ...

    def check_chat(self, options: Mapping[str, Any]) -> None:
        """Raise RequestError where there is no template, and for options that none takes."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the tokens; incomplete bytes appear as U+FFFD."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text; of a special token, its name."""
        ...


class HuggingFaceTokenizer:
    """The tokenizer that comes with a checkpoint.

    Calls go to the Rust tokenizer inside, which is never changed after loading and so may be used
    by several threads at once.

    Args:
        folder: of the checkpoint.
        trust_remote_code: run Python code that comes with it.
        num_rows: tokens that the model has an embedding and logits for; None as many as needed.
        loaded: what `load_tokenizer` gave, where it was called ahead.

    Raises:
        ConfigError: the folder has none, or only one without a fast implementation.
    """

    def __init__(
        self,
        folder: Path,
        *,
        trust_remote_code: bool = False,
        num_rows: int | None = None,
        loaded: LoadedTokenizer | None = None,
    ) -> None:
        loaded = loaded or load_tokenizer(folder, trust_remote_code)
        self._outer, self._inner = loaded.outer, loaded.inner
        # Not how many there are: ids may have gaps.
        num_ids = max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.vocab_size = num_ids if num_rows is None else min(num_ids, num_rows)
        if self.vocab_size < num_ids:
            logger.warning(
                "The tokenizer has %d tokens, the model only %d: requests with others are refused",
                num_ids,
                self.vocab_size,
            )
        template = self._outer.chat_template or ""
        texts = template.values() if isinstance(template, dict) else [template]
        if not all(isinstance(text, str) for text in texts):
            raise ConfigError(
                f"the chat_template of '{folder}' must be a text, or texts by name: download "
                "tokenizer_config.json again"
            )
        self.chat_template = "\n".join(texts)
        self.template, self._taken_names = self._find_template()
        self.eos_token_ids = frozenset(
            token
            for token in _find_eos_token_ids(folder, self._outer.eos_token_id)
            if token < self.vocab_size
        )
        added = self._inner.get_added_tokens_decoder()
        # Some models mark tags as special; left out of a text, nobody could read the text's parts.
        kept = list_tags(self.chat_template) | list_reasoning_tags()
        self.special_token_ids = frozenset(
            number
            for number in loaded.special_token_ids
            if number < self.vocab_size and added[number].content not in kept
        )
        self._is_byte_level = '"ByteLevel"' in json.dumps(
            [read_state(part) for part in (self._inner.decoder, self._inner.pre_tokenizer)]
        )

    def check_draft(self, folder: Path, trust_remote_code: bool) -> None:
        """See that --draft-model has the same tokens.

        Raises:
            ConfigError: it has others, or none that can be loaded.
        """
        try:
            other = load_tokenizer(folder, trust_remote_code).inner
        except ConfigError as error:
            raise ConfigError(f"--draft-model {folder}: {error}") from error
        if other.get_vocab(with_added_tokens=True) != self._inner.get_vocab(with_added_tokens=True):
            raise ConfigError(
                f"--draft-model {folder}: its tokenizer has other tokens than the model's: name a "
                "model of the same family"
            )

    def _find_template(self) -> tuple[ChatTemplate | None, frozenset[str]]:
        """The chat template, if transformers renders it, and names that no option may have.

        By name, an option would change how transformers renders, not what the template sees.
        """
        from transformers import PreTrainedTokenizerBase
        from transformers.utils.chat_template_utils import render_jinja_template

        apply = type(self._outer).apply_chat_template
        names = {*inspect.signature(apply).parameters}
        names |= {*inspect.signature(render_jinja_template).parameters}
        taken = frozenset(names - SHARED_TEMPLATE_OPTIONS - {"kwargs"})
        source = self._outer.chat_template
        if apply is not PreTrainedTokenizerBase.apply_chat_template or source is None:
            return None, taken
        sources = source if isinstance(source, dict) else {"default": source}
        return ChatTemplate(dict(sources), dict(self._outer.special_tokens_map)), taken

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """See Tokenizer."""
        # The batch call lets other threads run meanwhile, encode() holds the interpreter's lock.
        (encoding,) = self._inner.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        token_ids: list[int] = encoding.ids
        return token_ids

    def encode_pair(self, text: str, other: str) -> list[int]:
        """See Tokenizer."""
        (encoding,) = self._inner.encode_batch_fast([(text, other)])
        token_ids: list[int] = encoding.ids
        return token_ids

    def render_chat(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
        """See Tokenizer. For as long as the template likes: see `template`."""
        if self.template is not None:
            return self.template.render(messages, options)
        try:
            text: str = self._outer.apply_chat_template(list(messages), tokenize=False, **options)
        except Exception as error:  # code that came with the model
            raise ChatTemplateError(describe_error(error)) from error
        return text

    def check_chat(self, options: Mapping[str, Any]) -> None:
        """See Tokenizer."""
        if self._outer.chat_template is None:
            raise RequestError("messages", "this model has no chat template: use /v1/completions")
        for name in options:
            if name in self._taken_names:
                raise RequestError("chat_template_kwargs", f"'{name}' cannot be set by a request")

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """See Tokenizer."""
        if skip_special_tokens:
            token_ids = [token for token in token_ids if token not in self.special_token_ids]
        text: str = self._inner.decode(list(token_ids), skip_special_tokens=False)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """See Tokenizer."""
        piece = self._inner.id_to_token(token_id)
        if piece is None:
            return b""
        return byte_level_bytes(piece) if self._is_byte_level else sentencepiece_bytes(piece)


def is_panic(error: BaseException) -> bool:
    """True for a bug in a Rust library; pyo3 derives it from BaseException, which ends threads."""
    return type(error).__name__ == "PanicException"


def _find_eos_token_ids(folder: Path, tokenizer_eos: int | None) -> frozenset[int]:
    """All tokens that end a completion: those of generation_config.json, config.json, tokenizer."""
    found: set[int] = set() if tokenizer_eos is None else {tokenizer_eos}
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        settings = read_object(path) if path.exists() else {}
        for part in (settings, settings.get("text_config")):  # of a vision-language model
            value = part.get("eos_token_id") if isinstance(part, dict) else None
            token_ids = value if isinstance(value, list) else [] if value is None else [value]
            if any(type(token_id) is not int for token_id in token_ids):
                raise ConfigError(
                    f"{path}: eos_token_id is {repr(value)[:60]}, which must be a token id or a "
                    "list of them: download it again"
                )
            found.update(token_ids)
    return frozenset(found)
