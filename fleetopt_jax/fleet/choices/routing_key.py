"""The choice `route_by`: the length that the router compares with its thresholds."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from fleetopt_jax.workload.columns import Columns


class RoutingKey:
    """What the router sees of a request. A pool's window is compared with the same length: a key below prompt + output
    promises more than a window holds, one above it wastes some."""

    name: ClassVar[str]
    sorts_like_total: ClassVar[bool] = False  # whether requests in order of their total lengths are in order of the key

    def route_tokens(self, columns: Columns) -> Array:
        """Of each request [tokens], any shape."""
        raise NotImplementedError


@dataclass(frozen=True)
class TotalTokens(RoutingKey):
    """Prompt and output, as if the router knew both."""

    name: ClassVar[str] = "total_tokens"
    sorts_like_total: ClassVar[bool] = True

    def route_tokens(self, columns: Columns) -> Array:
        return columns.route_tokens


@dataclass(frozen=True)
class PromptAndLimit(RoutingKey):
    """Prompt and the `max_tokens` that clients ask for, whatever they then get: all a router knows on arrival."""

    max_tokens: float
    name: ClassVar[str] = "prompt_and_limit"

    def route_tokens(self, columns: Columns) -> Array:
        return columns.held_tokens + jnp.maximum(columns.output_tokens, self.max_tokens)
