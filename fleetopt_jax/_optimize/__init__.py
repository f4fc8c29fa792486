"""Search: each method turns a `Problem` into a `Plan`, or says which limit no fleet holds; and what matters in a plan.

The room has a private name, because `fleetopt_jax.optimize` is the function.
"""
