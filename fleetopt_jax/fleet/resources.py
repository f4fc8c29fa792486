"""What a fleet takes: watts, money, carbon and GPUs. Objectives and limits are weights over it, named once, here.

Power, price, carbon and GPUs are sums over pools, so the cost of a fleet by any weights is the sum of its pools' costs;
of one engine, weights are a price of an instance and a price of a watt (`PoolPrices`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.errors import unknown_name
from fleetopt_jax.core.struct import pytree
from fleetopt_jax.core.units import KW
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.surroundings import Site

Objective = Literal["tok_per_j", "usd", "power", "gpus", "co2"]


@pytree
class Resources:
    """What one pool, or a fleet, takes. GPUs of one kind, or of all together. Leaves traced, any common shape."""

    power_w: Array  # in the power scope of the assumptions [W]
    usd_per_h: Array  # GPUs, and electricity where it has a price
    kg_co2_per_h: Array  # 0 where the carbon intensity is not given
    n_gpus: Array


def resources_of(engine: Engine, site: Site, n_instances: ArrayLike, power_w: Array) -> Resources:
    """What `n_instances` that draw `power_w` together take."""
    n_gpus = jnp.asarray(n_instances) * engine.gpus_per_instance
    return Resources(
        power_w=power_w,
        usd_per_h=_priced(n_gpus, engine.usd_per_gpu_h) + _priced(power_w / KW, site.usd_per_kwh),
        kg_co2_per_h=_priced(power_w / KW, site.kg_co2_per_kwh),
        n_gpus=n_gpus,
    )


def _priced(amount: ArrayLike, price: ArrayLike) -> Array:
    """amount * price; 0 where it costs nothing, even of an infinite amount."""
    free = jnp.equal(price, 0)
    return jnp.where(free, 0.0, jnp.where(free, 0.0, amount) * price)


@dataclass(frozen=True)
class Weights:
    """Prices of a unit of each resource: an objective, a limit, or any mixture of them.

    >>> at_100_usd_per_mwh = fo.Weights(power_w=0.1e-3, usd_per_h=1.0)  # electricity beside the rent
    """

    power_w: float = 0.0
    usd_per_h: float = 0.0
    kg_co2_per_h: float = 0.0
    n_gpus: float = 0.0
    gpus_of: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))  # further, of one kind

    def of(self, resources: Resources) -> ArrayLike:
        """The weighted sum of resources without their kinds."""
        named = ((self.power_w, resources.power_w), (self.usd_per_h, resources.usd_per_h))
        more = ((self.kg_co2_per_h, resources.kg_co2_per_h), (self.n_gpus, resources.n_gpus))
        used = [weight * amount for weight, amount in (*named, *more) if weight]
        return sum(used[1:], used[0]) if used else 0.0

    def plus(self, price: float, other: "Weights") -> "Weights":
        """These, and others at a price."""
        kinds = {
            kind: self.gpus_of.get(kind, 0.0) + price * other.gpus_of.get(kind, 0.0)
            for kind in {**self.gpus_of, **other.gpus_of}
        }
        return Weights(
            power_w=self.power_w + price * other.power_w,
            usd_per_h=self.usd_per_h + price * other.usd_per_h,
            kg_co2_per_h=self.kg_co2_per_h + price * other.kg_co2_per_h,
            n_gpus=self.n_gpus + price * other.n_gpus,
            gpus_of=MappingProxyType(kinds),
        )

    def __reduce__(self):
        plain = self.power_w, self.usd_per_h, self.kg_co2_per_h, self.n_gpus
        return Weights, (*plain, dict(self.gpus_of))  # a proxy goes to no other process

    def __hash__(self) -> int:
        plain = (self.power_w, self.usd_per_h, self.kg_co2_per_h, self.n_gpus)
        return hash((plain, tuple(sorted(self.gpus_of.items()))))


OBJECTIVES: Mapping[str, Weights] = MappingProxyType(
    {
        # All fleets that hold the limits have the same output: most tokens per joule is least power.
        "tok_per_j": Weights(power_w=1.0),
        "usd": Weights(usd_per_h=1.0),
        "power": Weights(power_w=1.0),
        "gpus": Weights(n_gpus=1.0),
        "co2": Weights(kg_co2_per_h=1.0),
    }
)
# What breaks ties, which whole instances make: of fleets that cost the same the one that draws least; of as many GPUs
# the cheapest, then the one that draws least. Prices too small to outweigh a cent or a GPU: as if electricity cost
# 1e-7 USD a kWh, or every million USD an hour counted as a GPU.
_TIES: Mapping[str, Weights] = MappingProxyType(
    {"usd": Weights(power_w=1e-10), "gpus": Weights(usd_per_h=1e-6, power_w=1e-11)}
)
_TOTALS: Mapping[str, tuple[str, Weights]] = MappingProxyType(  # limits of all pools: (what is limited, its weights)
    {
        "max_gpus": ("n_gpus", Weights(n_gpus=1.0)),
        "max_power_w": ("power_w", Weights(power_w=1.0)),
        "max_usd_per_h": ("usd_per_h", Weights(usd_per_h=1.0)),
        "max_kg_co2_per_h": ("kg_co2_per_h", Weights(kg_co2_per_h=1.0)),
    }
)
_KIND = "gpus_of."


def weights_of(objective: "Objective | Weights") -> Weights:
    """The weights of an objective by its name; weights are themselves."""
    if not isinstance(objective, str):
        return objective
    if objective not in OBJECTIVES:
        raise unknown_name("objective", objective, OBJECTIVES)
    return OBJECTIVES[objective]


def search_weights(objective: "Objective | Weights", site: Site) -> Weights:
    """What searches compare fleets by: the objective, and what breaks its ties. Where electricity has a price costs do
    not tie."""
    weights = weights_of(objective)
    if not isinstance(objective, str) or objective not in _TIES or (objective == "usd" and float(site.usd_per_kwh) > 0):
        return weights
    return weights.plus(1.0, _TIES[objective])


def limit_weights(limit: str) -> Weights:
    """What a limit of the budget is of: 'max_gpus', ..., 'gpus_of.h100'."""
    if limit.startswith(_KIND):
        return Weights(gpus_of=MappingProxyType({limit.removeprefix(_KIND): 1.0}))
    return _TOTALS[limit][1]


def limited_resource(limit: str) -> str:
    """The field of `Resources` that a limit of the budget is of."""
    return "n_gpus" if limit.startswith(_KIND) else _TOTALS[limit][0]


@dataclass(frozen=True)
class Budget:
    """What all pools together may use; inf for no limit. Unlike an `Slo`, which each holds, it couples the pools."""

    max_gpus: float = math.inf
    max_power_w: float = math.inf  # in the power scope of the assumptions [W]
    max_usd_per_h: float = math.inf  # [USD/h]
    max_kg_co2_per_h: float = math.inf  # [kg/h]
    gpus_of: tuple[tuple[str, float], ...] = ()  # (GPU name, how many there are), of those that are scarce

    @property
    def caps(self) -> dict[str, float]:
        """Every finite limit by its name."""
        totals = {name: getattr(self, name) for name in _TOTALS}
        return {name: cap for name, cap in totals.items() if cap != math.inf} | {
            f"{_KIND}{gpu}": count for gpu, count in self.gpus_of
        }

    def with_cap(self, limit: str, value: float) -> "Budget":
        """With one limit changed, by its name."""
        caps = self.caps | {limit: value}
        totals = {name: cap for name, cap in caps.items() if not name.startswith(_KIND)}
        kinds = {name.removeprefix(_KIND): cap for name, cap in caps.items() if name.startswith(_KIND)}
        return Budget(**totals, gpus_of=tuple(sorted(kinds.items())))


def make_budget(
    *,
    max_gpus: float = math.inf,
    max_power_w: float = math.inf,
    max_usd_per_h: float = math.inf,
    max_kg_co2_per_h: float = math.inf,
    gpus_of: Mapping[str, float] | None = None,
) -> Budget:
    """A checked `Budget`; without limits by default.

    >>> fo.make_budget(max_power_w=300e3, gpus_of={"b200": 96}).caps
    {'max_power_w': 300000.0, 'gpus_of.b200': 96}
    """
    kinds = tuple(sorted((gpus_of or {}).items()))
    budget = Budget(max_gpus, max_power_w, max_usd_per_h, max_kg_co2_per_h, kinds)
    for name, cap in budget.caps.items():
        least = 0.0 if name.startswith(_KIND) else 1e-9
        if not cap >= least:
            raise ValueError(f"need {name} {'>= 0' if least == 0 else '> 0'}, got {cap}")
    return budget


def usage(weights: Weights, kinds: Sequence[str], pools: Resources) -> float:
    """The weighted sum over the pools [K] of a fleet, whose GPUs are of these kinds."""
    by_kind = np.array([weights.gpus_of.get(kind, 0.0) for kind in kinds])
    return float(np.sum(np.asarray(weights.of(pools)))) + float(np.sum(by_kind * np.asarray(pools.n_gpus)))


@dataclass(frozen=True)
class PoolPrices:
    """Cost of a pool = per_instance[e] N + per_watt[e] P, of each engine e: any weights, for the engines given."""

    per_instance: np.ndarray  # [E]
    per_watt: np.ndarray  # [E]

    def plus(self, price: float, other: "PoolPrices") -> "PoolPrices":
        """These, and others at a price."""
        return PoolPrices(self.per_instance + price * other.per_instance, self.per_watt + price * other.per_watt)

    def cost(self, e: int, instances: np.ndarray, watts: np.ndarray) -> np.ndarray:
        """Of pools with engine e, of any shape; inf where their watts are. The watts themselves where these are all
        that counts."""
        per_instance, per_watt = self.per_instance[e], self.per_watt[e]
        if per_instance == 0.0 and per_watt == 1.0:
            return watts
        total = np.where(np.isfinite(watts), 0.0, np.inf)  # 0 times inf is not 0
        if per_instance:
            total += per_instance * instances
        if per_watt:
            total += per_watt * watts
        return total


def pool_prices(weights: Weights, kinds: Sequence[str], engines: Sequence[Engine], site: Site) -> PoolPrices:
    """Weights as prices of an instance and a watt of each engine, whose GPUs are of these kinds."""
    per_watt = (
        weights.power_w
        + (weights.usd_per_h * float(site.usd_per_kwh) + weights.kg_co2_per_h * float(site.kg_co2_per_kwh)) / KW
    )
    per_instance = [
        float(engine.gpus_per_instance)
        * (weights.n_gpus + weights.gpus_of.get(kind, 0.0) + weights.usd_per_h * float(engine.usd_per_gpu_h))
        for kind, engine in zip(kinds, engines, strict=True)
    ]
    return PoolPrices(np.array(per_instance), np.full(len(per_instance), per_watt))
