"""Data parallelism in `shard_map` and `pmap`, and the two gradients of a pair over two groups."""
