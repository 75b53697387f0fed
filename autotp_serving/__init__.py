"""AutoTP Serving: an LLM server over several Intel GPUs, Intel CPUs or CUDA cards."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "StructuredOutput"]


def __getattr__(name: str) -> Any:
    """Import the public names when they are asked for: rank 0's API needs no torch."""
    if name == "LLM":
        from autotp_serving.llm import LLM

        return LLM
    if name == "SamplingParams":
        from autotp_serving.request import SamplingParams

        return SamplingParams
    if name == "StructuredOutput":
        from autotp_serving.structured_output import StructuredOutput

        return StructuredOutput
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
