"""The model room: load this rank's shard, run batches over a paged cache, sample."""
