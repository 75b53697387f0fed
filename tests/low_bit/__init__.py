"""Low-bit formats and linear layers, against float32 and against ipex-llm's native library."""
