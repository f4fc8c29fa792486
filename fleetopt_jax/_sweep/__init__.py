"""Sweeps: thousands of scenarios, answered by few programs on all devices, processes or machines there are.

The room has a private name, because `fleetopt_jax.sweep` is the function.
"""
