"""What a step's tokens mean to those who asked: text, ends, figures. Rank 0, engine thread only."""

from __future__ import annotations

from collections.abc import Callable

from autotp_serving.engine.batch_builder import Progress
from autotp_serving.engine.detokenizer import Detokenizer
from autotp_serving.engine.sequence import Sequence
from autotp_serving.engine.tokenizer import Tokenizer
from autotp_serving.request import FinishReason, Request, RequestOutput


class OutputProcessor:
    """Writes the outputs of all requests and hands them out once a step.

    Args:
        tokenizer: decodes.
        on_outputs: takes the outputs of a step.
    """

    def __init__(
        self, tokenizer: Tokenizer, on_outputs: Callable[[list[RequestOutput]], None]
    ) -> None:
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self.num_finished: dict[FinishReason, int] = dict.fromkeys(
            ("stop", "length", "abort", "error"), 0
        )
        self._tokenizer = tokenizer
        self._on_outputs = on_outputs
        self._detokenizers: dict[str, Detokenizer] = {}
        self._outputs: list[RequestOutput] = []

    @property
    def is_empty(self) -> bool:
        """True when nothing is kept for any request."""
        return not self._detokenizers and not self._outputs

    def open(self, request: Request) -> None:
        """Begin a request's text."""
        self._detokenizers[request.request_id] = Detokenizer(
            self._tokenizer, request.prompt_token_ids, request.params
        )

    def withdraw(self, request_id: str) -> Detokenizer:
        """Forget a request that goes on elsewhere, with this text."""
        return self._detokenizers.pop(request_id)

    def adopt(self, request_id: str, detokenizer: Detokenizer) -> None:
        """Go on with a request's text."""
        self._detokenizers[request_id] = detokenizer

    def add(self, progress: Progress) -> FinishReason | None:
        """Write what a step did for a sequence.

        Returns:
            Why the request ends with this output, which may be a stop string that only the text
            shows; None while it goes on.
        """
        sequence, token_ids = progress.sequence, progress.token_ids
        reason = sequence.finish_reason
        detokenizer = self._detokenizers[sequence.request_id]
        num_tokens = len(token_ids)
        num_in_text = num_tokens if sequence.ends_in_text else num_tokens - 1
        text = ""
        for count, token in enumerate(token_ids[: max(0, num_in_text)], start=1):
            text += detokenizer.add(token)
            if detokenizer.stopped:
                reason = "stop"
                num_tokens = count
                break
        if reason is not None:
            text += detokenizer.flush()
        # Tokens after a stop string are no part of the completion.
        num_output_tokens = sequence.num_output_tokens - (len(token_ids) - num_tokens)
        self.num_generated_tokens += num_tokens
        prompt_logprobs = None
        is_first = num_tokens and num_output_tokens == num_tokens
        if is_first or (not num_tokens and reason in ("length", "stop")):
            self.num_prompt_tokens += sequence.num_prompt_tokens
            if sequence.params.prompt_logprobs is not None:
                prompt_logprobs = tuple(sequence.prompt_logprobs)
        self._outputs.append(
            RequestOutput(
                sequence.request_id,
                text,
                token_ids=tuple(token_ids[:num_tokens]),
                finish_reason=reason,
                error=sequence.error,
                error_code=sequence.error_code,
                num_prompt_tokens=sequence.num_prompt_tokens,
                num_output_tokens=num_output_tokens,
                num_cached_tokens=sequence.num_cached_tokens,
                queue_seconds=sequence.queue_seconds,
                logprobs=tuple(progress.logprobs[:num_tokens]) if progress.logprobs else (),
                prompt_logprobs=prompt_logprobs,
                stop_string=detokenizer.stop_string,
                pooled=sequence.pooled,
            )
        )
        return reason

    def add_end(
        self,
        request: Request,
        sequence: Sequence | None,
        reason: FinishReason,
        error: str | None = None,
        error_code: str | None = None,
    ) -> None:
        """Write the last output of a request that ends between steps."""
        self._outputs.append(
            RequestOutput(
                request.request_id,
                text="",
                finish_reason=reason,
                error=error,
                error_code=error_code,
                num_prompt_tokens=len(request.prompt_token_ids),
                num_output_tokens=sequence.num_output_tokens if sequence else 0,
                num_cached_tokens=sequence.num_cached_tokens if sequence else 0,
            )
        )

    def close(self, request_id: str, reason: FinishReason) -> None:
        """Count an end and forget the request, which has had its last output."""
        self.num_finished[reason] += 1
        self._detokenizers.pop(request_id, None)

    def publish(self) -> None:
        """Hand out what was written since the last time."""
        outputs, self._outputs = self._outputs, []
        if outputs:
            self._on_outputs(outputs)
