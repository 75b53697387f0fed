"""From a chat's body to the engine's requests, for all dialects that are chats. Rank 0 only."""

from __future__ import annotations

from dataclasses import dataclass

from autotp_serving.api.admission import Admission
from autotp_serving.api.middleware import RequestRecord
from autotp_serving.api.openai.chat_schemas import ChatRequest
from autotp_serving.api.openai.completion_parser import (
    NO_TOOLS,
    CompletionParser,
    CompletionParsers,
)
from autotp_serving.engine.sampling_defaults import SamplingDefaults
from autotp_serving.request import Request


@dataclass(frozen=True)
class AdmittedChat:
    """A chat that the engine may run.

    Attributes:
        requests: one for each completion wanted.
        parsers: of each completion; None where there is nothing to part.
    """

    requests: list[Request]
    parsers: list[CompletionParser | None]


class ChatAdmission:
    """Makes requests of conversations.

    Args:
        admission: makes requests of prompts.
        parsers: of reasoning and tool calls in what the model writes.
        sampling_defaults: of requests that leave a field out.
    """

    def __init__(
        self,
        admission: Admission,
        parsers: CompletionParsers,
        sampling_defaults: SamplingDefaults,
    ) -> None:
        self.admission = admission
        self.parsers = parsers
        self._sampling_defaults = sampling_defaults

    async def encode(
        self, body: ChatRequest, record: RequestRecord, *, is_listed: bool = False
    ) -> list[int]:
        """The prompt that the chat template makes of a body. Raises as `Admission.encode_chat`.

        Args:
            body: what is asked for.
            record: of the HTTP request; its reply tells of tools that were left out.
            is_listed: it is not run but counted.
        """
        if body.tools and self.parsers.call_format(is_required=body.requires_call) is None:
            record.headers["X-Warning"] = NO_TOOLS
        messages, options = body.for_template(knows_tools=self.parsers.tool_format is not None)
        options = self.parsers.reasoning_options.complete(options, body.reasoning_effort)
        return await self.admission.encode_chat(messages, options, is_listed=is_listed)

    async def admit(
        self,
        body: ChatRequest,
        record: RequestRecord,
        *,
        length_field: str | None = None,
        cuts_length: bool = False,
    ) -> AdmittedChat:
        """Tokenize, compile and measure.

        Args:
            body: what is asked for.
            record: of the HTTP request.
            length_field: the client's word for the most tokens to generate.
            cuts_length: generate as many as fit, if more are wanted.

        Raises:
            RequestError, ApiError: naming a field of a chat completion.
        """
        admission, parsers = self.admission, self.parsers
        admission.check_named_tokens(body)
        admission.check_num_completions(1, body.num_sampled)
        token_ids = await self.encode(body, record)
        reasoning = parsers.reasoning(token_ids)
        wanted = body.whole_structured_output(
            parsers.call_format(is_required=body.requires_call),
            reasoning,
            parsers.reasoning_format,
        )
        grammar = parsers.limit_reasoning(
            await admission.compile(wanted), body.most_thinking_tokens, reasoning
        )
        num_left = admission.num_tokens_left(token_ids)
        max_tokens = body.max_new_tokens(num_left)
        if cuts_length:
            max_tokens = min(max_tokens, max(1, num_left))
        requests = admission.admit(
            token_ids,
            [
                body.sampling_params(
                    max_tokens, choice, wanted and wanted[1], self._sampling_defaults
                )
                for choice in range(body.num_sampled)
            ],
            record,
            prompt_field="messages",
            length_field=length_field
            or ("max_tokens" if body.max_tokens else "max_completion_tokens"),
            grammar=grammar,
            priority=body.priority,
        )
        tools = {tool.function.name: tool.function.parameters for tool in body.callable_tools}
        max_calls = 1 if body.allows_one_call else None
        return AdmittedChat(
            requests,
            [
                parsers.make(
                    reasoning,
                    tools,
                    max_calls,
                    is_chosen=body.names_one_tool,
                    is_required=body.requires_call,
                )
                for _ in requests
            ],
        )
