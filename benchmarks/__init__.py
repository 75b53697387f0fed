"""The load client behind benchmark.py. Talks HTTP only and imports nothing of the server."""
