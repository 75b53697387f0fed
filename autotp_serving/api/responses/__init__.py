"""/v1/responses, translated to chat completions. Rank 0 only."""
