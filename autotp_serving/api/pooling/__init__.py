"""Embeddings and scores in place of completions. Rank 0 only."""
