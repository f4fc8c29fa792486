"""Raise instances until the simulated fleet holds what the analytic one promised."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fleetopt_jax._simulate.simulate import Simulation, pools_holding, simulate
from fleetopt_jax.fleet.assumptions import Assumptions
from fleetopt_jax.fleet.fleet import Fleet, Slo
from fleetopt_jax.workload.atoms import Workload

RAISE = 1.03  # a pool that fails grows by so much, by one instance at least
MOST_ROUNDS = 30


@dataclass(frozen=True)
class Verified:
    """The fleet that holds the limits in simulation, or the last that was tried."""

    fleet: Fleet
    simulation: Simulation
    rounds: int  # simulations run
    held: bool


def verify(
    fleet: Fleet,
    workload: Workload,
    assumptions: Assumptions,
    slo: Slo,
    *,
    most_rounds: int = MOST_ROUNDS,
    **how: Any,
) -> Verified:
    """Simulate; where a pool misses the limits give it more instances; and again. `how` is passed to `simulate`.

    What more instances cannot mend ends after `most_rounds`. With limits of the whole fleet every pool grows.
    """
    rounds = 0
    while True:
        rounds += 1
        simulation = simulate(fleet, workload, assumptions, slo, **how)
        holding = np.array(pools_holding(simulation.pools, simulation.metrics, slo))
        if holding.all() or rounds == most_rounds or simulation.n_rejected:
            return Verified(fleet, simulation, rounds, bool(holding.all()))
        n = np.rint(np.asarray(fleet.n_instances))
        fleet = fleet.with_instances(np.where(holding, n, np.maximum(n + 1, np.ceil(n * RAISE))))
