"""Search: each method turns a `Problem` into a `Plan` with the same fields.

The room is also its entry: `fleetopt_jax.optimize(problem, method="grid")` is `fleetopt_jax.optimize.search.optimize`.
"""

from collections.abc import Callable

from fleetopt_jax.core.rooms import make_callable


def _entry() -> Callable:
    from fleetopt_jax.optimize.search import optimize

    return optimize


make_callable(__name__, _entry)
