"""A room whose main function has the room's own name: `fleetopt_jax.optimize(problem)` calls it."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def make_callable(room: str, load: Callable[[], Callable[..., Any]]) -> None:
    """Calling the module `room` calls the function that `load` returns.

    Importing any file of a room binds the room's name in the package, over a function's: so the room itself is called.
    """

    class Room(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return load()(*args, **kwargs)

    sys.modules[room].__class__ = Room
