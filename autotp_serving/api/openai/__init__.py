"""The OpenAI routes and what they need. Rank 0 only, never torch."""
