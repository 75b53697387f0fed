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

from jinja2 import TemplateError

from autotp_serving.config import ConfigError
from autotp_serving.request import RequestError
from autotp_serving.token_bytes import byte_level_bytes, sentencepiece_bytes

logger = logging.getLogger(__name__)

TAGS_OF_TEXT = frozenset({"<think>", "</think>", "<tool_call>", "</tool_call>"})
"""Some models mark these as special; left out of a text, nobody could read the text's parts."""

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

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Tokenize, the model's own special tokens added (a leading BOS, where it has one)."""
        ...

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
    ) -> list[int]:
        """Tokenize a conversation as the model was taught to read one.

        `options` are the template's own variables; `add_generation_prompt`,
        `continue_final_message` and `tools` are known to all.

        Raises:
            RequestError: there is no template, or it refuses the messages.
        """
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

    Raises:
        ConfigError: the folder has none, or only one without a fast implementation.
    """

    def __init__(
        self, folder: Path, *, trust_remote_code: bool = False, num_rows: int | None = None
    ) -> None:
        from transformers import AutoTokenizer

        try:
            self._outer: Any = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(f"no tokenizer can be loaded from '{folder}': {reason}") from error
        self._inner = getattr(self._outer, "backend_tokenizer", None)
        if self._inner is None:
            raise ConfigError(
                f"the tokenizer of '{folder}' has no fast implementation: add a tokenizer.json "
                "(save_pretrained of a fast tokenizer writes one)"
            )
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
        self.chat_template = template if isinstance(template, str) else json.dumps(template)
        self.eos_token_ids = frozenset(
            token
            for token in _find_eos_token_ids(folder, self._outer.eos_token_id)
            if token < self.vocab_size
        )
        added = self._inner.get_added_tokens_decoder()
        self.special_token_ids = frozenset(
            number
            for number, one in added.items()
            if one.special and one.content not in TAGS_OF_TEXT and number < self.vocab_size
        )
        self._added = {number: one.content.encode() for number, one in added.items()}
        self._is_byte_level = '"ByteLevel"' in json.dumps(
            [json.loads(self._inner.to_str())[part] for part in ("decoder", "pre_tokenizer")]
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """See Tokenizer."""
        # The batch call lets other threads run meanwhile, encode() holds the interpreter's lock.
        (encoding,) = self._inner.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
    ) -> list[int]:
        """See Tokenizer."""
        if self._outer.chat_template is None:
            raise RequestError("messages", "this model has no chat template: use /v1/completions")
        # By name, an option would change how transformers renders, not what the template sees.
        own = inspect.signature(self._outer.apply_chat_template).parameters
        for name in options:
            if name in own and name not in SHARED_TEMPLATE_OPTIONS:
                raise RequestError("chat_template_kwargs", f"'{name}' cannot be set by a request")
        try:
            text = self._outer.apply_chat_template(list(messages), tokenize=False, **options)
        except (TemplateError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise RequestError("messages", f"the chat template refuses them: {reason}") from error
        return self.encode(text, add_special_tokens=False)  # the template wrote them itself

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """See Tokenizer."""
        if skip_special_tokens:
            token_ids = [token for token in token_ids if token not in self.special_token_ids]
        return self._inner.decode(list(token_ids), skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """See Tokenizer."""
        if token_id in self._added:
            return self._added[token_id]
        piece = self._inner.id_to_token(token_id)
        if piece is None:
            return b""
        return byte_level_bytes(piece) if self._is_byte_level else sentencepiece_bytes(piece)


def _find_eos_token_ids(folder: Path, tokenizer_eos: int | None) -> frozenset[int]:
    """All tokens that end an answer: those of generation_config.json, config.json, tokenizer."""
    found: set[int] = set() if tokenizer_eos is None else {tokenizer_eos}
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        value = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        if value is not None:
            found.update([value] if isinstance(value, int) else value)
    return frozenset(found)
