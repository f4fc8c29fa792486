"""What is deployed: pools of equal instances behind a length router, and the limits they must hold."""

import math
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from jax import Array

from fleetopt_jax.core.struct import as_floats, pytree, static
from fleetopt_jax.fleet.engine import Engine


@pytree
class Fleet:
    """K pools in order of their windows. Engines may differ in kind, so they are a tuple; numbers have shape [K]."""

    engines: tuple[Engine, ...]
    window_tokens: Array  # context window (max-model-len) of each pool [tokens]
    gamma: Array  # requests up to gamma * window are compressed into the pool; 1 for none [-]
    n_instances: Array  # instances of each pool [-]


@pytree
class Slo:
    """Limits of the service. Leaves traced, shape () or a leading vmap axis."""

    ttft_p99_s: Array  # P99 time to first token [s]
    ttft_s_per_token: Array  # by how much the limit grows with a request's prompt [s/token]
    itl_s: Array  # mean inter-token latency; inf for no limit [s]
    max_utilization: Array  # share of the load an instance can take [-]
    scope: Literal["pool", "fleet"] = static(default="pool")  # every pool holds the latencies, or all requests together


def make_slo(
    *,
    ttft_p99_s: float = 0.5,
    ttft_s_per_token: float = 0.0,
    itl_s: float = math.inf,
    max_utilization: float = 0.85,
    scope: Literal["pool", "fleet"] = "pool",
) -> Slo:
    """A checked `Slo`; the defaults are the published ones."""
    if not (math.isfinite(ttft_p99_s) and ttft_p99_s > 0 and 0 < max_utilization < 1):
        raise ValueError(f"need ttft_p99_s > 0 and 0 < max_utilization < 1, got {ttft_p99_s=}, {max_utilization=}")
    if not (0 <= ttft_s_per_token < math.inf and itl_s > 0):
        raise ValueError(f"need a finite ttft_s_per_token >= 0 and itl_s > 0, got {ttft_s_per_token=}, {itl_s=}")
    if scope not in ("pool", "fleet"):
        raise ValueError(f"need scope 'pool' or 'fleet', got {scope!r}")
    numbers = as_floats(
        ttft_p99_s=ttft_p99_s, ttft_s_per_token=ttft_s_per_token, itl_s=itl_s, max_utilization=max_utilization
    )
    return Slo(**numbers, scope=scope)


def make_fleet(
    engines: Sequence[Engine],
    *,
    window_tokens: Sequence[float],
    n_instances: Sequence[float],
    gamma: Sequence[float] | None = None,
) -> Fleet:
    """A checked `Fleet`; without `gamma` nothing is compressed."""
    gamma = [1.0] * len(engines) if gamma is None else gamma
    if not (len(engines) == len(window_tokens) == len(n_instances) == len(gamma) > 0):
        raise ValueError("need as many engines, windows, instance counts and gammas, at least one of each")
    if not all(a < b < math.inf for a, b in zip([0.0, *window_tokens], window_tokens)):
        raise ValueError(f"need positive, finite, rising window_tokens, got {list(window_tokens)}")
    if not all(1 <= g < math.inf for g in gamma):
        raise ValueError(f"need finite gamma >= 1, got {list(gamma)}")
    if not all(0 <= n < math.inf for n in n_instances):
        raise ValueError(f"need finite n_instances >= 0, got {list(n_instances)}")
    numbers = as_floats(window_tokens=window_tokens, gamma=gamma, n_instances=n_instances)
    return Fleet(engines=tuple(engines), **{name: jnp.atleast_1d(x) for name, x in numbers.items()})
