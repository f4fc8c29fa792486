"""The physics, one law per file: pure scalar functions over records. The caller batches with `jax.vmap`."""
