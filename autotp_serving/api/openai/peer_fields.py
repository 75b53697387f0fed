"""Fields of other servers, which may hold what asks for nothing. Rank 0 only.

Clients written for vLLM, SGLang, llama.cpp or TGI send their defaults along. A value that would
change the completion is answered 400 by name.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from autotp_serving.api.ignored_fields import Ignored
from autotp_serving.api.sampling_fields import SamplingFields
from autotp_serving.api.schemas import PRIORITY, Priority, only


class PeerFields(SamplingFields):
    """What both OpenAI routes take beside what they honour."""

    use_beam_search: Annotated[Any, only(False)] = None
    length_penalty: Annotated[Any, only(1)] = None
    early_stopping: Annotated[Any, only(False)] = None
    include_stop_str_in_output: Annotated[Any, only(False)] = None
    spaces_between_special_tokens: Annotated[Any, only(True)] = None
    no_stop_trim: Annotated[Any, only(False)] = None
    truncate_prompt_tokens: Annotated[Any, only()] = None
    allowed_token_ids: Annotated[Any, only([])] = None
    bad_words: Annotated[Any, only([])] = None
    logits_processors: Annotated[Any, only([])] = None
    custom_logit_processor: Annotated[Any, only()] = None
    typical_p: Annotated[Any, only(1)] = None
    top_a: Annotated[Any, only(0)] = None
    tfs_z: Annotated[Any, only(1)] = None
    mirostat: Annotated[Any, only(0)] = None
    xtc_probability: Annotated[Any, only(0)] = None
    dry_multiplier: Annotated[Any, only(0)] = None
    repeat_penalty: Annotated[Any, only(1)] = Field(None, description="see repetition_penalty")
    return_tokens_as_token_ids: Annotated[Any, only(False)] = None
    return_hidden_states: Annotated[Any, only(False)] = None
    guided_decoding_backend: Annotated[Any, only()] = None
    guided_whitespace_pattern: Annotated[Any, only()] = None
    lora_path: Annotated[Any, only()] = None
    priority: Priority | None = Field(None, description=PRIORITY)
    cache_salt: Annotated[Any, only()] = None
    cache_prompt: Annotated[Any, only(True)] = None
    id_slot: Annotated[Any, only(-1)] = None
    kv_transfer_params: Annotated[Any, only({})] = None
    vllm_xargs: Annotated[Any, only({})] = None
    request_id: Ignored = Field(None, description="send it in X-Request-Id")
