"""What of a pool may be down while it holds its limits: a number of instances and nodes, or what a probability asks.

A reserve says of N instances how many are sure to be `up`. A pool holds its limits with these, which carry all of its
traffic; it draws the watts and costs the money of all N, which are up nearly always. So what a pool needs is what it
would need without, and its spares beside; neither N nor what is up of it falls as the other rises, so that searches for
the least N keep their proofs. `laws/availability.py` says how many are down.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.errors import BadField
from fleetopt_jax.core.numerics import safe_div
from fleetopt_jax.core.struct import as_floats, namespace, pytree
from fleetopt_jax.laws.availability import (
    GPU_MTBF_H,
    GPUS_PER_NODE,
    NODE_MTBF_H,
    availability,
    down_pmf,
    instance_availability,
    instances_on_node,
    most_down,
)


@dataclass(frozen=True)
class Failures:
    """How often GPUs and nodes fail, and how long it takes to mend them. Plain numbers; see `make_failures`."""

    repair_h: float  # mean time from a failure to when its instances serve again [h]
    gpu_mtbf_h: float = GPU_MTBF_H  # mean time between failures of one GPU [h]; inf: never
    node_mtbf_h: float = NODE_MTBF_H  # of what takes all GPUs of a node [h]
    gpus_per_node: int = GPUS_PER_NODE

    @property
    def gpu_up(self) -> float:
        return float(availability(self.gpu_mtbf_h, self.repair_h))

    @property
    def node_up(self) -> float:
        return float(availability(self.node_mtbf_h, self.repair_h))

    def instances_on_node(self, gpus_per_instance: float) -> int:
        """That a node holds."""
        return int(instances_on_node(gpus_per_instance, self.gpus_per_node))

    def instance_up(self, gpus_per_instance: float) -> float:
        """Share of the time that an instance is up while its first node is [-]."""
        return float(instance_availability(self.gpu_up, self.node_up, gpus_per_instance, self.gpus_per_node))

    def down_pmf(self, n_instances: int, gpus_per_instance: float) -> np.ndarray:
        """P(0, 1, ... n of a pool's instances are down) [n + 1]."""
        on_node, up = self.instances_on_node(gpus_per_instance), self.instance_up(gpus_per_instance)
        return np.asarray(down_pmf(n_instances, on_node, up, self.node_up))


def make_failures(
    *,
    repair_h: float,
    gpu_mtbf_h: float = GPU_MTBF_H,
    node_mtbf_h: float = NODE_MTBF_H,
    gpus_per_node: int = GPUS_PER_NODE,
) -> Failures:
    """Checked `Failures`; the default rates are those of a training run (`laws/availability.py`), a repair time there
    is none.

    >>> round(fo.make_failures(repair_h=24.0).gpu_up, 4)
    0.9997
    """
    if not 0 <= repair_h < np.inf:
        raise BadField("repair_h", f"{repair_h:g}", "need a finite time >= 0 hours")
    for name, value in (("gpu_mtbf_h", gpu_mtbf_h), ("node_mtbf_h", node_mtbf_h)):
        if not value > 0:
            raise BadField(name, f"{value:g}", "need a time > 0 hours; inf for what never fails")
    _check_whole("gpus_per_node", gpus_per_node, 1)
    return Failures(float(repair_h), float(gpu_mtbf_h), float(node_mtbf_h), int(gpus_per_node))


def _check_whole(name: str, value: float, least: int) -> None:
    if not (value >= least and value == int(value)):
        raise BadField(name, f"{value:g}", f"need a whole number >= {least}")


class Reserve:
    """What may be down; a record derives from this and says these."""

    name: ClassVar[str]

    @property
    def asked(self) -> dict[str, float]:
        """What it was made of, by name; not under `jit`."""
        raise NotImplementedError

    @property
    def failures(self) -> Failures | None:
        """How often things fail, where it knows; not under `jit`."""
        return None

    def up(self, n_instances: ArrayLike, gpus_per_instance: ArrayLike) -> Array:
        """How many of so many instances are sure to be up; real numbers between whole ones."""
        raise NotImplementedError

    def needed(self, n_up: ArrayLike, gpus_per_instance: ArrayLike) -> Array:
        """The least instances of which `n_up` are sure to be up; 0 for 0, inf for inf."""
        raise NotImplementedError

    def serving(self, gpus: Collection[int]) -> "Reserve":
        """The same, ready for instances of so many GPUs."""
        raise NotImplementedError


@pytree
class Spares(Reserve):
    """So many instances of a pool, and all those on so many of its nodes, may be down. Leaves traced, shape ()."""

    name: ClassVar[str] = "spares"

    instances: Array
    nodes: Array
    gpus_per_node: Array

    @property
    def asked(self) -> dict[str, float]:
        return {name: int(value) for name, value in vars(self).items()}

    def up(self, n_instances: ArrayLike, gpus_per_instance: ArrayLike) -> Array:
        xp = namespace(self, n_instances, gpus_per_instance)
        return xp.maximum(xp.asarray(n_instances, dtype=float) - self._down(gpus_per_instance), 0.0)

    def needed(self, n_up: ArrayLike, gpus_per_instance: ArrayLike) -> Array:
        xp = namespace(self, n_up, gpus_per_instance)
        up = xp.asarray(n_up, dtype=float)
        return xp.where(up > 0, up + self._down(gpus_per_instance), up)

    def serving(self, gpus: Collection[int]) -> "Spares":
        return self

    def _down(self, gpus_per_instance: ArrayLike) -> Array:
        return self.instances + self.nodes * instances_on_node(gpus_per_instance, self.gpus_per_node)


def make_spares(*, instances: int = 0, nodes: int = 0, gpus_per_node: int = GPUS_PER_NODE) -> Spares:
    """A checked `Spares`: N + k.

    >>> float(fo.make_spares(instances=1, nodes=1).needed(10, gpus_per_instance=4))
    13.0
    """
    for name, value, least in (("spare", instances, 0), ("spare_nodes", nodes, 0), ("gpus_per_node", gpus_per_node, 1)):
        _check_whole(name, value, least)
    return Spares(**as_floats(instances=instances, nodes=nodes, gpus_per_node=gpus_per_node))


@pytree
class Target(Reserve):
    """A pool holds its limits at least so much of the time, with GPUs and nodes that fail. Beyond the instances that
    the table of what may be down is made for, their last share of it, which is more than need be."""

    name: ClassVar[str] = "target"

    availability: Array  # share of the time [-]
    repair_h: Array
    gpu_mtbf_h: Array
    node_mtbf_h: Array
    gpus_per_node: Array
    gpus: Array  # of an instance, that the rows are for [G]
    down: Array  # of N = 0, 1, ... instances, that may be at once [G, n + 1]

    @property
    def asked(self) -> dict[str, float]:
        return {"availability": float(self.availability), **vars(self.failures)}

    @property
    def failures(self) -> Failures:
        rates = {name: float(getattr(self, name)) for name in ("repair_h", "gpu_mtbf_h", "node_mtbf_h")}
        return Failures(**rates, gpus_per_node=int(self.gpus_per_node))

    def up(self, n_instances: ArrayLike, gpus_per_instance: ArrayLike) -> Array:
        down = self._row(gpus_per_instance)
        n, last = jnp.asarray(n_instances, dtype=float), down.shape[-1] - 1.0
        inside = jnp.interp(jnp.minimum(n, last), jnp.arange(last + 1.0), down)
        return jnp.where(n > last, n - jnp.ceil(n * down[-1] / last), n - inside)

    def needed(self, n_up: ArrayLike, gpus_per_instance: ArrayLike) -> Array:
        down = self._row(gpus_per_instance)
        asked, last = jnp.asarray(n_up, dtype=float), down.shape[-1] - 1.0
        up = jnp.arange(last + 1.0) - down
        inside = jnp.searchsorted(up, jnp.minimum(asked, up[-1]) - 1e-9).astype(float)
        beyond = jnp.ceil(safe_div(asked, 1.0 - down[-1] / last, otherwise=jnp.inf) * (1.0 - 1e-12))
        return jnp.where(asked > 0, jnp.where(asked > up[-1], beyond, inside), asked)

    def serving(self, gpus: Collection[int]) -> "Target":
        known = {int(g) for g in np.asarray(self.gpus)}
        if known >= set(gpus):
            return self
        return _target_for(float(self.availability), self.failures, known | set(gpus))

    def _row(self, gpus_per_instance: ArrayLike) -> Array:
        """Of such an instance; of one that the table is not for, all may be down, so that nothing holds."""
        gpus = jnp.asarray(self.gpus)
        nearest = jnp.argmin(jnp.abs(gpus - gpus_per_instance))
        known = jnp.abs(gpus[nearest] - gpus_per_instance) < 0.5
        row = jnp.asarray(self.down)[nearest]
        return jnp.where(known, row, jnp.arange(row.shape[-1]))


def make_target(availability: float, failures: Failures, gpus_per_instance: Sequence[int] = (1, 2, 4, 8)) -> Target:
    """A checked `Target` for instances of so many GPUs.

    >>> holds = fo.make_target(0.999, fo.make_failures(repair_h=24.0))
    >>> float(holds.needed(20, gpus_per_instance=8))
    22.0
    """
    if not 0 < availability < 1:
        raise BadField("availability", f"{availability:g}", "need a share of the time in (0, 1)")
    return _target_for(float(availability), failures, gpus_per_instance)


def _target_for(availability: float, failures: Failures, gpus: Collection[int]) -> Target:
    """The target with its table for these instances."""
    rows = sorted(gpus)
    down = np.stack([_most_down(availability, failures, g) for g in rows])
    return Target(**as_floats(availability=availability, **vars(failures), gpus=rows, down=down))


@lru_cache(maxsize=256)
def _most_down(availability: float, failures: Failures, gpus: int) -> np.ndarray:
    on_node, up = failures.instances_on_node(gpus), failures.instance_up(gpus)
    return most_down(availability, on_node, up, failures.node_up)
