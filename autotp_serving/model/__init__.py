"""The model: read this rank's shard, build it, attend over a paged KV cache. Every rank."""
