"""Large bodies, looked through in a helper process before they are parsed here. Rank 0 only."""

from __future__ import annotations

import asyncio
from typing import Any

from autotp_serving.api.errors import ApiError
from autotp_serving.api.prompts import MIN_LISTED_TOKENS, PromptEncoder, busy
from autotp_serving.engine.large_body import MAX_ENTRIES, PROMPT_FIELDS
from autotp_serving.engine.sandbox import Sandbox, Spool
from autotp_serving.engine.sandbox_helper import SandboxBusyError, SandboxError

MIN_LARGE_BYTES = 2**18
"""Less takes a few milliseconds to parse, whatever is in it."""

CPU_SECONDS = 5.0

LISTING_PATHS = ("/tokenize", "/detokenize", "/count_tokens")
"""Where more tokens are taken than the model runs."""

EMBEDDING_PATH = "/embeddings"
INPUT_FIELDS = ("input",)
"""Elsewhere a field of this name holds no token ids."""


class LargeBodies:
    """Refuses what certainly is no request that can be served.

    Args:
        prompts: knows how long texts may be.
        max_model_len: most tokens of prompt and completion.
        sandbox: where bodies are looked through.
    """

    def __init__(self, prompts: PromptEncoder, max_model_len: int, sandbox: Sandbox) -> None:
        self._prompts = prompts
        self._max_model_len = max_model_len
        self._sandbox = sandbox

    async def check(self, file: Spool, path: str) -> None:
        """Look through a body that has been written into a file.

        Raises:
            ApiError: 400 or 413, the body's fault; 503, no process is free to look.
        """
        max_tokens = self._max_model_len
        if path.endswith(LISTING_PATHS):
            max_tokens = max(max_tokens, MIN_LISTED_TOKENS)
        fields = INPUT_FIELDS if path.endswith(EMBEDDING_PATH) else PROMPT_FIELDS
        data = (file.size, self._prompts.max_chars(max_tokens), max_tokens, fields)
        job = self._sandbox.submit("body", data, file.size, CPU_SECONDS, file)
        try:
            problem = await asyncio.wrap_future(job)
        except SandboxError as error:
            raise ApiError(413, f"the body {error}") from error
        except SandboxBusyError as error:
            raise busy() from error
        if problem is not None:
            raise self._refuse(problem, max_tokens)

    def _refuse(self, problem: dict[str, Any], max_tokens: int) -> ApiError:
        field = problem.get("field")
        match problem["problem"]:
            case "json":
                return ApiError(
                    400,
                    f"the body is not JSON: {problem['reason']} at character {problem['position']}",
                )
            case "num_values":
                place = "the body" if field is None else f"{field}: the body"
                return ApiError(
                    413, f"{place} holds more than {problem['limit']} values", param=field
                )
            case "num_entries":
                return ApiError(
                    400,
                    f"{field}: must have at most {MAX_ENTRIES} entries in one place, not "
                    f"{problem['length']}",
                    param=field,
                )
            case "part":
                return ApiError(
                    400,
                    f"{field}: the model reads text only, no images, sounds or files",
                    param=field,
                )
            case "num_chars":
                length = f"{problem['length']} characters"
                return self._prompts.too_long(str(field), length, max_tokens)
            case "num_tokens":
                length = f"{problem['length']} tokens"
                return self._prompts.too_long(str(field), length, max_tokens)
        return ApiError(400, "the body cannot be read as JSON")
