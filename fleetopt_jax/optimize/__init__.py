"""Search: each method turns a `Problem` into a `Plan` with the same fields.

The room is also its entry: `fleetopt_jax.optimize(problem, method="grid")` is `fleetopt_jax.optimize.search.optimize`.
"""

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    """A callable module: importing any file of the room binds the room's name in the package, over a function's."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from fleetopt_jax.optimize.search import optimize

        return optimize(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
