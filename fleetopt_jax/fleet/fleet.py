"""What is deployed: lanes behind a length router, each of stages of equal instances; and the limits they must hold."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.struct import as_floats, namespace, pytree, static
from fleetopt_jax.fleet.engine import Engine, EnginePair, Role, Server
from fleetopt_jax.fleet.surroundings import Surroundings, make_surroundings
from fleetopt_jax.laws.hand_over import HandOver


@pytree
class Stage:
    """Equal instances of one engine that do one part of the work. Leaves traced, shape ()."""

    engine: Engine
    n_instances: Array
    role: Role = static(default="mixed")


@pytree
class Lane:
    """A slice of the traffic, the requests up to its window that no lane before it takes, and the stages for it."""

    window_tokens: Array  # context window (max-model-len) [tokens]
    gamma: Array  # requests up to gamma * window are compressed into the lane; 1 for none [-]
    stages: tuple[Stage, ...]  # one that does all, or one that prefills and one that decodes
    hand_over: HandOver | None = None  # from the first to the second, where there are two

    @property
    def stage(self) -> Stage:
        """The only stage of a lane that has one; whoever asks is told, in one line, of a lane that has two."""
        if len(self.stages) != 1:
            raise two_stages()
        return self.stages[0]

    @property
    def server(self) -> Server:
        """The engines of its stages."""
        if self.hand_over is None:
            return self.stage.engine
        prefill, decode = self.stages
        return EnginePair(prefill.engine, decode.engine, self.hand_over)


def two_stages() -> BadInput:
    """The refusal of whoever reads lanes of one stage only."""
    return BadInput(
        "a lane of two stages",
        "its prefill and decode stages are not read here yet",
        "need lanes of mixed instances (--serve mixed); optimize, evaluate, simulate, levers and export read both",
    )


@pytree
class Fleet:
    """K lanes in order of their windows, and what surrounds them."""

    lanes: tuple[Lane, ...]
    surroundings: Surroundings

    @property
    def engines(self) -> tuple[Engine, ...]:
        """Of the lanes, which have one stage each; they may differ in kind."""
        return tuple(lane.stage.engine for lane in self.lanes)

    @property
    def servers(self) -> tuple[Server, ...]:
        """Of the lanes, whatever their stages."""
        return tuple(lane.server for lane in self.lanes)

    @property
    def n_stages(self) -> int:
        """Of the lane that has most."""
        return max(len(lane.stages) for lane in self.lanes)

    @property
    def window_tokens(self) -> Array:
        """[K]"""
        return _stacked([lane.window_tokens for lane in self.lanes])

    @property
    def gamma(self) -> Array:
        """[K]"""
        return _stacked([lane.gamma for lane in self.lanes])

    @property
    def n_instances(self) -> Array:
        """[K]; where a lane has two stages [K, 2], of its prefill and its decode stage, a lane of one with 0 behind."""
        if self.n_stages == 1:
            return _stacked([lane.stage.n_instances for lane in self.lanes])
        counts = [[stage.n_instances for stage in lane.stages] for lane in self.lanes]
        return _stacked([_stacked([*row, *[0.0 * row[0]] * (2 - len(row))]) for row in counts])

    def with_instances(self, n_instances: ArrayLike) -> "Fleet":
        """The same with other numbers of instances, [K] or [K, 2]."""
        return fleet_of(self.servers, self.window_tokens, self.gamma, n_instances, self.surroundings)

    def with_engines(self, engines: Sequence[Server]) -> "Fleet":
        """The same with other engines."""
        return fleet_of(engines, self.window_tokens, self.gamma, self.n_instances, self.surroundings)


def _stacked(values: Sequence[Array]) -> Array:
    return namespace(values).stack(values)


def fleet_of(
    engines: Sequence[Server],
    window_tokens: ArrayLike,
    gamma: ArrayLike,
    n_instances: ArrayLike,
    surroundings: Surroundings | None = None,
) -> Fleet:
    """A fleet from the engines of its lanes and its numbers [K], instances [K, 2] where a lane has two stages;
    unchecked: traced numbers will do."""
    xp = namespace(window_tokens, gamma, n_instances)
    windows, gammas, n = (xp.asarray(x, dtype=float) for x in (window_tokens, gamma, n_instances))
    lanes = []
    for k, server in enumerate(engines):
        counts = [n[k]] if n.ndim == 1 else n[k]
        stages = tuple(Stage(engine, counts[i], role) for i, (role, engine) in enumerate(server.parts))
        lanes.append(Lane(windows[k], gammas[k], stages, server.hand_over))
    return Fleet(tuple(lanes), surroundings or make_surroundings())


def make_fleet(
    engines: Sequence[Server],
    *,
    window_tokens: Sequence[float],
    n_instances: Sequence[float] | Sequence[Sequence[float]],
    gamma: Sequence[float] | None = None,
    surroundings: Surroundings | None = None,
) -> Fleet:
    """A checked `Fleet`; without `gamma` nothing is compressed. Where a lane has two stages (`EnginePair`), each lane's
    instances are a pair: of prefill and decode, or of its one stage and 0.

    >>> h100 = fo.build(fo.EngineSpec("h100"))
    >>> fleet = fo.make_fleet([h100, h100], window_tokens=[1536, 14096], n_instances=[36, 34])
    >>> fleet.with_instances([40, 34]).n_instances.tolist()
    [40.0, 34.0]
    """
    gamma = [1.0] * len(engines) if gamma is None else gamma
    if not (len(engines) == len(window_tokens) == len(n_instances) == len(gamma) > 0):
        raise ValueError("need as many engines, windows, instance counts and gammas, at least one of each")
    if not all(a < b < math.inf for a, b in zip([0.0, *window_tokens], window_tokens)):
        raise ValueError(f"need positive, finite, rising window_tokens, got {list(window_tokens)}")
    if not all(1 <= g < math.inf for g in gamma):
        raise ValueError(f"need finite gamma >= 1, got {list(gamma)}")
    counts = np.asarray(n_instances, dtype=float)
    if not np.all((counts >= 0) & (counts < math.inf)):
        raise ValueError(f"need finite n_instances >= 0, got {list(n_instances)}")
    n_stages = max(len(server.parts) for server in engines)
    if counts.shape != ((len(engines),) if n_stages == 1 else (len(engines), 2)):
        each = "a number of each lane" if n_stages == 1 else "a pair of each lane, for one of them has two stages"
        raise ValueError(f"need n_instances as {each}, got {list(n_instances)}")
    numbers = as_floats(window_tokens=window_tokens, gamma=gamma, n_instances=n_instances)
    return fleet_of(engines, **numbers, surroundings=surroundings)


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
    """A checked `Slo`; the defaults are the published ones.

    >>> float(fo.make_slo(ttft_p99_s=0.3, itl_s=0.05).ttft_p99_s)
    0.3
    """
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


def with_limits(slo: Slo, **limits: ArrayLike) -> Slo:
    """The limits with some numbers changed, unchecked."""
    return replace(slo, **as_floats(**limits))
