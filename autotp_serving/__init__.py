"""AutoTP Serving: an LLM server over several Intel GPUs, Intel CPUs or CUDA cards."""

__version__ = "0.1.0"
