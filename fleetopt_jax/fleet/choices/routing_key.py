"""The choice `route_by`: the length that the router compares with its thresholds."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from fleetopt_jax.core.errors import BadField
from fleetopt_jax.workload.columns import Columns


class RoutingKey:
    """What the router sees of a request. A pool's window is compared with the same length: a key below prompt + output
    promises more than a window holds, one above it wastes some."""

    name: ClassVar[str]
    sorts_like_total: ClassVar[bool] = False  # whether requests in order of their total lengths are in order of the key

    @property
    def sticky(self) -> float | None:
        """The headroom of conversations, where it keeps them together: the workload has to tell of them."""
        return None

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
class StickySessions(RoutingKey):
    """Conversations stay in the pool that they began in, where `headroom` times their first turn fits, until a turn no
    longer does (`workload/conversations.py`): what they have in its caches is found. Of workloads that were read with
    the same headroom."""

    headroom: float
    name: ClassVar[str] = "sticky_sessions"

    @property
    def sticky(self) -> float | None:
        return self.headroom

    def __post_init__(self) -> None:
        if not 1 <= self.headroom < float("inf"):
            raise BadField("sticky", f"{self.headroom}", "need a finite number of 1 or more")

    def route_tokens(self, columns: Columns) -> Array:
        if columns.kept_tokens is None:
            raise ValueError("need a workload, and requests, that were read with sticky sessions to route by them")
        return jnp.maximum(columns.kept_tokens, columns.route_tokens)


@dataclass(frozen=True)
class PromptAndLimit(RoutingKey):
    """Prompt and the `max_tokens` that clients ask for, whatever they then get: all a router knows on arrival."""

    max_tokens: float
    name: ClassVar[str] = "prompt_and_limit"

    def route_tokens(self, columns: Columns) -> Array:
        return columns.held_tokens + jnp.maximum(columns.output_tokens, self.max_tokens)
