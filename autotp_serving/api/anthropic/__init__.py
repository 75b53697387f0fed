"""Anthropic's routes, translated to chat completions. Rank 0 only."""
