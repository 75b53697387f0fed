"""From a client's text or conversation to tokens, within bounds of time and memory. Rank 0 only.

What cannot fit the model is refused by its length before it is tokenized. Long texts are tokenized
one at a time, and short ones pass them. Chat templates that are not known to be cheap run in the
sandbox.
"""

from __future__ import annotations

import asyncio
import hashlib
import marshal
from collections import OrderedDict
from functools import partial
from typing import Any

from autotp_serving.api.errors import ApiError
from autotp_serving.engine.chat_template import ChatTemplateError
from autotp_serving.engine.sandbox import Sandbox
from autotp_serving.engine.sandbox_helper import RefusalError, SandboxBusyError, SandboxError
from autotp_serving.engine.shortest_first import ShortestFirst
from autotp_serving.engine.template_cost import is_cheap
from autotp_serving.engine.tokenizer import Tokenizer, is_panic
from autotp_serving.heap import return_free_memory
from autotp_serving.request import RequestError

MAX_INLINE_CHARS = 4096
"""A millisecond or two: cheaper than changing threads."""

MAX_SHORT_CHARS = 2**16
MAX_CHEAP_CHARS = 2**20
"""A conversation that a cheap template writes out in this process."""

MAX_UNCOUNTED_BYTES = 2**20
USUAL_TOKEN_LEN = 8
"""Bytes. Texts of longer tokens are so rare that they are counted piece by piece first."""

MAX_UTF8_LEN = 4

PIECE_LEN = 2**16
PIECE_SLACK = 64
"""Tokens by which a text may be shorter than its pieces, for each cut."""

MIN_LISTED_TOKENS = 2**17
"""/tokenize counts so many, whatever the model takes."""

LONG_CHARS = 2**20
"""After texts of this length, memory is given back to the system."""

TRIM_SECONDS = 2.0

MAX_REFUSALS = 256
LONG_NICENESS = 5
RETRY_SECONDS = 2


class PromptEncoder:
    """Makes tokens of texts and conversations.

    Args:
        tokenizer: the model's.
        max_model_len: most tokens of prompt and completion.
        sandbox: where foreign templates run.
        template_seconds: of processor time that a template may take.
    """

    def __init__(
        self, tokenizer: Tokenizer, max_model_len: int, sandbox: Sandbox, template_seconds: float
    ) -> None:
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        longest = max(len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size))
        self._longest = max(1, longest)
        self._sandbox = sandbox
        self._seconds = template_seconds
        self._is_cheap = {
            has_tools: is_cheap(self._find_source(has_tools)) for has_tools in (False, True)
        }
        self._trim_timer: asyncio.TimerHandle | None = None
        self._refusals: OrderedDict[bytes, str] = OrderedDict()
        self._short = ShortestFirst(2, "tokenize")
        self._long = ShortestFirst(1, "tokenize-long", niceness=LONG_NICENESS)

    def _find_source(self, has_tools: bool) -> str:
        try:
            template = self._tokenizer.template
            return "" if template is None else template.find_source(has_tools)
        except ChatTemplateError:  # every conversation is told
            return ""

    async def encode(
        self,
        text: str,
        field_name: str,
        *,
        pair: str | None = None,
        add_special_tokens: bool = True,
        max_tokens: int,
    ) -> list[int]:
        """Tokenize a text without holding up the event loop.

        Args:
            field_name: the client's word for it.
            pair: a second text, joined to the first as the tokenizer joins two.
            add_special_tokens: begin with the model's own.
            max_tokens: refuse a text that certainly has more.

        Raises:
            ApiError: 400, the text is too long for the model.
            RequestError: the tokenizer fails.
        """
        num_chars = len(text) + len(pair or "")
        if num_chars > LONG_CHARS and self._trim_timer is None:
            loop = asyncio.get_running_loop()
            self._trim_timer = loop.call_later(TRIM_SECONDS, self._trim)
        if num_chars > self.max_chars(max_tokens):
            raise self.too_long(field_name, f"{num_chars} characters", max_tokens)
        work = partial(self._encode, text, pair, field_name, add_special_tokens, max_tokens)
        if num_chars <= MAX_INLINE_CHARS:
            return work()
        threads = self._short if num_chars <= MAX_SHORT_CHARS else self._long
        return await asyncio.wrap_future(threads.submit(num_chars, work))

    def max_chars(self, max_tokens: int) -> int:
        """Characters that so many tokens have at most."""
        return self._longest * max_tokens

    def check_num_tokens(self, num_tokens: int, field_name: str) -> None:
        """Refuse a prompt that leaves no room for a token, before each is looked at."""
        if num_tokens > self._max_model_len:
            raise self.too_long(field_name, f"{num_tokens} tokens", self._max_model_len)

    async def render(
        self, messages: list[dict[str, Any]], options: dict[str, Any], max_tokens: int
    ) -> str:
        """Write out a conversation by the model's chat template.

        Args:
            max_tokens: refuse what certainly has more.

        Raises:
            RequestError: there is no template, or it refuses the messages, fails, or takes too
                much time or memory.
            ApiError: 400, it is too long by far; 503, no process is free to run it.
        """
        self._tokenizer.check_chat(options)
        work = partial(self._render_here, messages, options)
        size = count_chars([messages, options])
        if self._tokenizer.template is None:
            return await asyncio.wrap_future(self._short.submit(size, work))
        if self._is_cheap["tools" in options] and size <= MAX_CHEAP_CHARS:
            if size <= MAX_INLINE_CHARS:
                return work()
            return await asyncio.wrap_future(self._short.submit(size, work))
        return await self._render_apart(messages, options, size, max_tokens)

    def _render_here(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> str:
        try:
            return self._tokenizer.render_chat(messages, options)
        except ChatTemplateError as error:
            raise _refuse_chat(str(error)) from error

    async def _render_apart(
        self, messages: list[dict[str, Any]], options: dict[str, Any], size: int, max_tokens: int
    ) -> str:
        key = hashlib.sha256(marshal.dumps((messages, options))).digest()
        if key in self._refusals:
            raise RequestError("messages", self._refusals[key])
        data = (messages, options, self.max_chars(max_tokens))
        job = self._sandbox.submit("render", data, size, self._seconds)
        try:
            text: str | int = await asyncio.wrap_future(job)
        except RefusalError as error:
            raise _refuse_chat(str(error)) from error
        except SandboxError as error:
            reason = f"rendering them by the chat template {error}"
            if error.is_certain:
                self._refusals[key] = reason
            if len(self._refusals) > MAX_REFUSALS:
                self._refusals.popitem(last=False)
            raise RequestError("messages", reason) from error
        except SandboxBusyError as error:
            raise busy() from error
        if isinstance(text, int):  # its length: too long to be handed over
            raise self.too_long("messages", f"{text} characters", max_tokens)
        return text

    def _trim(self) -> None:
        """Return what long texts took."""
        self._trim_timer = None
        self._long.submit(0, return_free_memory)

    def _encode(
        self,
        text: str,
        pair: str | None,
        field_name: str,
        add_special_tokens: bool,
        max_tokens: int,
    ) -> list[int]:
        try:
            limit = min(MAX_UNCOUNTED_BYTES, max(USUAL_TOKEN_LEN * max_tokens, PIECE_LEN))
            whole = text + (pair or "")
            if MAX_UTF8_LEN * len(whole) > limit and len(whole.encode()) > limit:
                self._count(whole, field_name, max_tokens)
            if pair is not None:
                return self._tokenizer.encode_pair(text, pair)
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except BaseException as error:
            if not is_panic(error):
                raise
            raise RequestError(field_name, "is more than the tokenizer can take") from error

    def _count(self, text: str, field_name: str, max_tokens: int) -> None:
        """Refuse a text by its first pieces, before there are tokens of all of it in memory."""
        num_tokens = 0
        for start in range(0, len(text), PIECE_LEN):
            piece = text[start : start + PIECE_LEN]
            num_tokens += len(self._tokenizer.encode(piece, add_special_tokens=False))
            num_tokens -= PIECE_SLACK
            if num_tokens > max_tokens:
                raise self.too_long(field_name, f"over {num_tokens} tokens", max_tokens)

    def too_long(self, field_name: str, length: str, max_tokens: int) -> ApiError:
        """The refusal of what does not fit the model.

        Args:
            field_name: the client's word for it.
            length: how long it is, with its unit.
            max_tokens: the limit.
        """
        flag = " (--max-model-len)" if max_tokens == self._max_model_len else ""
        return ApiError(
            400,
            f"{field_name}: {length} are more than fit in the limit of {max_tokens} tokens{flag}",
            param=field_name,
            code="context_length_exceeded",
        )


def _refuse_chat(reason: str) -> RequestError:
    return RequestError("messages", f"the chat template refuses them: {reason}")


def busy() -> ApiError:
    """The refusal for want of a process that tries things out."""
    return ApiError(
        503,
        "the processes that try out templates and structured outputs are busy: try again",
        code="busy",
        headers={"Retry-After": str(RETRY_SECONDS)},
    )


def count_chars(value: Any) -> int:
    """Characters of all texts in a value, and one for each value."""
    total = 0
    stack = [value]
    while stack:
        one = stack.pop()
        total += 1
        if isinstance(one, str):
            total += len(one)
        elif isinstance(one, dict):
            total += sum(map(len, one))
            stack.extend(one.values())
        elif isinstance(one, list):
            stack.extend(one)
    return total
