"""The model room: load this rank's shard, run step plans over a paged cache, sample."""
