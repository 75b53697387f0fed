"""Other servers beside ours: `python -m benchmarks.peers NAME`. No rank; nothing of the package.

Each peer gets an environment of its own under `.venv-peers/`, the same random checkpoint in its own
format, and the same requests over HTTP from the same client, taking turns with our server within
one sitting.
"""
