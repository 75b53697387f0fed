"""Turns outputs into OpenAI's replies: whole, or as server-sent events. Rank 0 only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from autotp_serving.api.engine_client import Usage
from autotp_serving.api.errors import ApiError, check_reason, error_body
from autotp_serving.api.logprobs import (
    CompletionLogprobs,
    EchoedPrompt,
    ListedLogprobs,
    PromptLogprobs,
)
from autotp_serving.api.openai.completion_parser import CompletionParser, join
from autotp_serving.engine.tokenizer import Tokenizer
from autotp_serving.request import Request, RequestOutput, TokenLogprobs

DONE = b"data: [DONE]\n\n"


def usage_object(usage: Usage) -> dict[str, Any]:
    """Usage as OpenAI reports it: each prompt counted once, however many completions it got."""
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_output_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens},
    }


def event(data: Mapping[str, Any]) -> bytes:
    """One server-sent event. ASCII escapes: some clients split lines at U+2028 too."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode("ascii") + b"\n\n"


@dataclass
class Piece:
    """Some of a completion: what one output brought, or all of them."""

    text: str = ""
    reason: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: Sequence[TokenLogprobs] | None = None
    token_ids: list[int] = field(default_factory=list)

    def add(self, output: RequestOutput) -> Piece:
        """Append an output; returns itself."""
        self.text += output.text
        self.reason = output.finish_reason
        self.logprobs.extend(output.logprobs)
        self.token_ids.extend(output.token_ids)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        return self


class ChoiceWriter:
    """Writes the completions of one HTTP request, in the order of `requests`.

    Args:
        head: fields that start the reply and every event: id, created, model, fingerprint.
        usage: of the HTTP request; grows while its outputs come.
        include_usage: end a stream with the usage.
        tokenizer: knows the tokens that logprobs are about.
        always_usage: put the usage so far into every event.
        shows_token_ids: give the token ids of prompts and completions.
        num_prompt_logprobs: list so many most likely tokens beside each of the prompt's; None
            lists none.
    """

    object_name = ""
    chunk_name = ""

    def __init__(
        self,
        head: Mapping[str, Any],
        requests: Sequence[Request],
        usage: Usage,
        include_usage: bool,
        tokenizer: Tokenizer,
        always_usage: bool,
        *,
        shows_token_ids: bool = False,
        num_prompt_logprobs: int | None = None,
    ) -> None:
        self._shows_token_ids = shows_token_ids
        self._num_prompt_logprobs = num_prompt_logprobs
        self._head = dict(head)
        self._requests = requests
        self._tokenizer = tokenizer
        self._choices = {request.request_id: index for index, request in enumerate(requests)}
        self._usage = usage
        self._include_usage = include_usage
        self._always_usage = always_usage
        self._pieces = [Piece() for _ in requests]
        self._begun: set[int] = set()

    def collect(self, outputs: Sequence[RequestOutput]) -> None:
        """Keep outputs for the whole reply. Raises ApiError when one of them has failed."""
        for output in outputs:
            check_reason(output)
            self._pieces[self._choices[output.request_id]].add(output)

    def reply(self) -> dict[str, Any]:
        """The whole reply."""
        choices = [
            self.choice(index, self._pieces[index]) | {"index": number}
            for number, index in enumerate(self.kept())
        ]
        return self._head | {
            "object": self.object_name,
            "choices": choices,
            "usage": usage_object(self._usage),
        }

    def begin(self) -> bytes:
        """What begins a stream: nothing, before there is a token."""
        return b""

    def events(self, outputs: Sequence[RequestOutput]) -> bytes:
        """The events of some outputs."""
        parts = []
        for output in outputs:
            try:
                check_reason(output)
            except ApiError as error:
                parts.append(event(error_body(error.status, error.message, code=error.code)))
                continue
            index = self._choices[output.request_id]
            parts.extend(
                self._chunk([choice]) for choice in self.deltas(index, Piece().add(output))
            )
        return b"".join(parts)

    def end(self) -> bytes:
        """What ends a stream."""
        if not self._include_usage:
            return DONE
        return self._chunk([], usage_object(self._usage)) + DONE

    def _chunk(
        self,
        choices: list[dict[str, Any]],
        usage: dict[str, Any] | None = None,
        fields: Mapping[str, Any] | None = None,
    ) -> bytes:
        chunk = self._head | {"object": self.chunk_name, "choices": choices} | dict(fields or {})
        if usage is None and self._always_usage:
            usage = usage_object(self._usage)
        return event(chunk | {"usage": usage} if self._include_usage else chunk)

    def _prompt_fields(self, index: int, piece: Piece) -> dict[str, Any]:
        """What was asked for about a prompt, in vLLM's words."""
        fields: dict[str, Any] = {}
        prompt = self._requests[index].prompt_token_ids
        if self._shows_token_ids:
            fields["prompt_token_ids"] = list(prompt)
        if self._num_prompt_logprobs is not None:
            ranked = PromptLogprobs(self._tokenizer, self._num_prompt_logprobs)
            fields["prompt_logprobs"] = ranked.write(piece.prompt_logprobs or ())
        return fields

    def _token_fields(self, token_ids: Sequence[int]) -> dict[str, Any]:
        return {"token_ids": list(token_ids)} if self._shows_token_ids else {}

    def kept(self) -> Iterable[int]:
        """The completions that the whole reply gives, best first where it picks some."""
        return range(len(self._pieces))

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """One completion of the whole reply."""
        raise NotImplementedError

    def deltas(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """What one output adds to a completion, an event for each."""
        raise NotImplementedError


class CompletionWriter(ChoiceWriter):
    """/v1/completions.

    Args:
        echoes: a text to put before each completion, "" for none.
        num_logprobs: most likely tokens to list beside each; None gives no logprobs.
        num_kept: of so many completions to each prompt, how many to return and how many there are.
    """

    object_name = chunk_name = "text_completion"

    def __init__(
        self,
        *args: Any,
        echoes: Sequence[str],
        num_logprobs: int | None,
        num_kept: tuple[int, int],
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self._echoes = list(echoes)
        self._num_kept, self._num_sampled = num_kept
        self._num_logprobs = num_logprobs or 0
        self._logprobs = [
            CompletionLogprobs(self._tokenizer, request.params.skip_special_tokens)
            for request in (self._requests if num_logprobs is not None else ())
        ]

    def kept(self) -> Iterable[int]:
        if self._num_kept == self._num_sampled:
            return super().kept()
        kept: list[int] = []
        for first in range(0, len(self._pieces), self._num_sampled):
            sampled = range(first, first + self._num_sampled)
            kept += sorted(sampled, key=self._mean_logprob, reverse=True)[: self._num_kept]
        return kept

    def _mean_logprob(self, index: int) -> float:
        """Per token, as OpenAI ranks completions: a sum would prefer the short ones."""
        logprobs = self._pieces[index].logprobs
        return sum(item.logprob for item in logprobs) / max(1, len(logprobs))

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        choice = self._write(index, piece)
        return choice | self._prompt_fields(index, piece) | self._token_fields(piece.token_ids)

    def _write(self, index: int, piece: Piece) -> dict[str, Any]:
        logprobs = None
        echo = self._echoes[index]
        if self._logprobs:
            prompt = None
            if echo and piece.prompt_logprobs is not None:
                prompt = EchoedPrompt(
                    echo, self._requests[index].prompt_token_ids[0], piece.prompt_logprobs
                )
            logprobs = self._logprobs[index].write(piece.logprobs, self._num_logprobs, prompt)
        return {
            "index": index,
            "text": echo + piece.text,
            "logprobs": logprobs,
            "finish_reason": piece.reason,
        }

    def deltas(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        choice = self._write(index, piece) | self._token_fields(piece.token_ids)
        if index not in self._begun:
            self._begun.add(index)
            choice |= self._prompt_fields(index, piece)
        self._echoes[index] = ""
        return [choice]


class ChatWriter(ChoiceWriter):
    """/v1/chat/completions. `parsers` holds one for each completion that has parts, else None."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(
        self, *args: Any, parsers: Sequence[CompletionParser | None], **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._parsers = parsers

    def reply(self) -> dict[str, Any]:
        return super().reply() | self._prompt_fields(0, self._pieces[0])

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": piece.text, "refusal": None}
        reason = piece.reason
        if (parser := self._parsers[index]) is not None:
            message |= _name_reasoning(join(parser.add(piece.text, is_last=True)))
            reason = parser.finish_reason(reason)
        logprobs = self._write_logprobs(index, piece)
        choice = {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}
        return choice | self._token_fields(piece.token_ids)

    def events(self, outputs: Sequence[RequestOutput]) -> bytes:
        if self._begun:
            return super().events(outputs)
        self._begun = set(range(len(self._requests)))
        # Before there is a token: every completion's head, which costs nothing yet.
        usage = usage_object(replace(self._usage, num_output_tokens=0))
        delta = {"role": "assistant", "content": ""}
        heads = [
            self._chunk(
                [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}],
                usage if self._always_usage else None,
                self._prompt_fields(index, self._pieces[index]) if index == 0 else {},
            )
            for index in sorted(self._begun)
        ]
        return b"".join(heads) + super().events(outputs)

    def deltas(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        reason = piece.reason
        parts = [{"content": piece.text}] if piece.text or reason is None else []
        if (parser := self._parsers[index]) is not None:
            parts = list(map(_name_reasoning, parser.add(piece.text, is_last=reason is not None)))
            reason = parser.finish_reason(reason)
        # Something for each token, so that clients see that it goes on.
        if not parts and (reason is None or piece.logprobs or self._shows_token_ids):
            parts = [{"content": ""}]
        logprobs = self._write_logprobs(index, piece)
        tokens = self._token_fields(piece.token_ids)
        for part in parts:
            deltas.append({"delta": part, "logprobs": logprobs} | tokens)
            logprobs = None  # they belong to the tokens, however many parts these make
            tokens = self._token_fields(())
        if reason is not None:
            deltas.append({"delta": {}, "finish_reason": reason} | tokens)
        empty = {"index": index, "delta": {}, "logprobs": None, "finish_reason": None}
        return [empty | delta for delta in deltas]

    def _write_logprobs(self, index: int, piece: Piece) -> dict[str, Any] | None:
        if self._requests[index].params.logprobs is None:
            return None
        listed = ListedLogprobs(self._tokenizer).write(piece.logprobs)
        return {"content": listed, "refusal": None}


def _name_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """A message or a part of it, its reasoning under both names that clients know."""
    if "reasoning_content" in message:
        return message | {"reasoning": message["reasoning_content"]}
    return message
