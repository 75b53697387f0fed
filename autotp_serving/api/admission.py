"""From a checked body to a request that fits the model: tokenize, measure, name. Rank 0 only."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

from autotp_serving.api.errors import ApiError
from autotp_serving.api.large_bodies import LargeBodies
from autotp_serving.api.middleware import RequestRecord
from autotp_serving.api.prompts import MIN_LISTED_TOKENS, PromptEncoder, busy
from autotp_serving.api.sampling_fields import SamplingFields
from autotp_serving.config import ServingConfig
from autotp_serving.engine.grammar import GrammarError
from autotp_serving.engine.grammar_compiler import GrammarCompiler
from autotp_serving.engine.grammar_guide import CompiledGrammar
from autotp_serving.engine.sandbox import Sandbox
from autotp_serving.engine.sandbox_helper import SandboxBusyError
from autotp_serving.engine.tokenizer import Tokenizer
from autotp_serving.request import Request, RequestError, SamplingParams, check_tokens
from autotp_serving.structured_output import Grammar, StructuredOutput


class Admission:
    """Turns prompts into engine requests; refuses those that can never be served."""

    def __init__(
        self, tokenizer: Tokenizer, max_model_len: int, config: ServingConfig, sandbox: Sandbox
    ) -> None:
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.max_listed_tokens = max(max_model_len, MIN_LISTED_TOKENS)
        self._heeds_priority = config.scheduling_policy != "fcfs"
        self.max_num_completions = config.max_num_seqs + config.max_queue_len
        self._prompts = PromptEncoder(tokenizer, max_model_len, sandbox, config.template_timeout)
        self.large_bodies = LargeBodies(self._prompts, max_model_len, sandbox)
        self._compiler = GrammarCompiler(tokenizer, sandbox, config.compile_timeout)

    async def encode(
        self,
        prompt: str | list[int],
        *,
        pair: str | None = None,
        add_special_tokens: bool = True,
        is_listed: bool = False,
        field_name: str = "prompt",
    ) -> list[int]:
        """Tokenize a prompt without holding up the event loop; check one that is tokens already.

        Args:
            pair: a second text, joined to the first as the tokenizer joins two.
            is_listed: it is not run but listed, so it may have more tokens than the model takes.
            field_name: the client's word for it.

        Raises:
            RequestError: naming the field, when a token is not in the vocabulary.
            ApiError: 400 when it is too long for the model by far.
        """
        if not isinstance(prompt, str):
            self._prompts.check_num_tokens(len(prompt), field_name)
            self.check_tokens(prompt, field_name)
            return prompt
        token_ids = await self._prompts.encode(
            prompt,
            field_name,
            pair=pair,
            add_special_tokens=add_special_tokens,
            max_tokens=self.max_listed_tokens if is_listed else self.max_model_len,
        )
        self.check_tokens(token_ids, field_name)
        return token_ids

    async def encode_chat(
        self, messages: list[dict[str, Any]], options: dict[str, Any], *, is_listed: bool = False
    ) -> list[int]:
        """Tokenize a conversation by the model's chat template.

        Args:
            is_listed: it is not run but listed, so it may have more tokens than the model takes.

        Raises:
            RequestError: when there is no template, it refuses the messages, or what it makes of
                them holds a token that the model does not have.
            ApiError: 400 when it is too long for the model by far, 503 when nothing is free to
                render it.
        """
        max_tokens = self.max_listed_tokens if is_listed else self.max_model_len
        text = await self._prompts.render(messages, options, max_tokens)
        # The template has written the special tokens itself.
        token_ids = await self._prompts.encode(
            text, "messages", add_special_tokens=False, max_tokens=max_tokens
        )
        self.check_tokens(token_ids, "messages")
        return token_ids

    async def compile(self, wanted: tuple[str, StructuredOutput] | None) -> CompiledGrammar | None:
        """Make a structured output ready for use, in another thread.

        Args:
            wanted: the field that asks for it, and the structured output; None asks for none.

        Raises:
            RequestError: naming the field, when it is not valid or takes too much to compile.
            ApiError: 503 when nothing is free to compile it.
        """
        if wanted is None:
            return None
        field_name, structured_output = wanted
        future = asyncio.wrap_future(self._compiler.submit(structured_output))
        try:
            # Others may wait for the same one: it must not be cancelled for the first that leaves.
            return await asyncio.shield(future)
        except GrammarError as error:
            raise RequestError(field_name, str(error)) from error
        except SandboxBusyError as error:
            raise busy() from error

    def check_named_tokens(self, body: SamplingFields) -> None:
        """Refuse a body whose fields name tokens that the model does not have."""
        self.check_tokens(body.stop_token_ids or (), "stop_token_ids")
        self.check_tokens(map(int, body.logit_bias or ()), "logit_bias")

    def check_tokens(self, token_ids: Iterable[int], field_name: str) -> None:
        """Refuse tokens that the tokenizer or the model does not have."""
        check_tokens(field_name, token_ids, self.tokenizer.vocab_size)

    def check_num_completions(
        self, num_prompts: int, num_choices: int, choices_field: str = "n"
    ) -> None:
        """Refuse one call that asks for more completions than the server ever holds at once."""
        if num_prompts * num_choices > self.max_num_completions:
            raise RequestError(
                choices_field if num_choices > 1 else "prompt",
                f"{num_prompts} prompts with {num_choices} answers each are more than the "
                f"{self.max_num_completions} requests that run and wait at most",
            )

    def num_tokens_left(self, prompt_token_ids: list[int]) -> int:
        """Tokens that the model has left for a completion; may be negative."""
        return self.max_model_len - len(prompt_token_ids)

    def admit(
        self,
        prompt_token_ids: list[int],
        choices: Sequence[SamplingParams],
        record: RequestRecord,
        *,
        first_choice: int = 0,
        prompt_field: str = "prompt",
        length_field: str = "max_tokens",
        grammar: Grammar | None = None,
        priority: int | None = None,
    ) -> list[Request]:
        """Make the engine's requests, one for each completion wanted to one prompt.

        Args:
            choices: how to sample each completion.
            record: of the HTTP request; its usage counts the prompt once.
            first_choice: number of the first answer among all of this HTTP request.
            prompt_field: the client's word for the prompt.
            length_field: the client's word for max_tokens.
            grammar: the structured output that `choices` name, compiled, and what else they follow.
            priority: see Request; None is 0.

        Raises:
            ApiError: 400 when prompt and completion together exceed the model's length.
            RequestError: when the prompt has no tokens, or a priority would not be heeded.
        """
        if priority and not self._heeds_priority:
            raise RequestError(
                "priority",
                "is not heeded here, where who comes first is served first: leave it out, or start "
                "the server with --scheduling-policy priority",
            )
        num_prompt_tokens = len(prompt_token_ids)
        max_tokens = choices[0].max_tokens
        total = num_prompt_tokens + max_tokens
        if total > self.max_model_len:
            param = prompt_field if num_prompt_tokens >= self.max_model_len else length_field
            parts = f"{num_prompt_tokens} tokens of prompt"
            if max_tokens:  # prompts that are scored or pooled have none
                parts += f" and {length_field} {max_tokens} make {total},"
            raise ApiError(
                400,
                f"{param}: {parts} over the limit of {self.max_model_len} (--max-model-len)",
                param=param,
                code="context_length_exceeded",
            )
        if not prompt_token_ids:
            raise RequestError(prompt_field, "must not be empty")
        record.usage.num_prompt_tokens += num_prompt_tokens
        prompt = tuple(prompt_token_ids)
        return [
            Request(
                f"{record.request_id}-{number}",
                prompt,
                params,
                record.arrival_time,
                record.tenant,
                grammar,
                priority or 0,
                record.adapter,
            )
            for number, params in enumerate(choices, first_choice)
        ]
