"""Records, units, errors and numerically safe primitives. Needs jax and the standard library only."""
