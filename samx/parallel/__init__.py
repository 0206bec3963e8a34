"""Data parallelism in `shard_map` and `pmap`; two gradients on two groups of devices."""
