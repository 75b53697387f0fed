"""AutoTP Serving: an LLM server over several Intel GPUs, Intel CPUs or CUDA cards."""
