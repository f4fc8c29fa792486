"""Search: each method turns a `Problem` into a `Plan` with the same fields.

The room is also its entry: `fleetopt_jax.optimize(problem, method="grid")` is `fleetopt_jax.optimize.search.optimize`.
"""

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    """A module that can be called: importing any file of the room binds its name in the package, over any function's."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from fleetopt_jax.optimize.search import optimize

        return optimize(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
