"""How much more traffic a fleet carries before it breaks what it is promised, and what breaks first."""

from dataclasses import dataclass, replace

import numpy as np

from fleetopt_jax._optimize.plan import Plan
from fleetopt_jax._optimize.search import compiled_excesses
from fleetopt_jax.fleet.evaluate import fleet_metrics
from fleetopt_jax.fleet.limits import ROUNDING
from fleetopt_jax.fleet.traffic import PoolTraffic, routed
from fleetopt_jax.workload.atoms import with_rate

NEAR = 1e-4  # of the rate: how near to the last that holds
MOST_DOUBLINGS = 40  # of the rate that is tried first


@dataclass(frozen=True)
class Room:
    """The most requests that a fleet carries, all its limits held, and the limit that a little more breaks."""

    rate_per_s: float
    limit: str  # utilization, ttft_p99_s or itl_s
    pool: int | None  # from 0, of which it is; None: of all requests together


def room_of(plan: Plan, n_instances: np.ndarray | None = None) -> Room | None:
    """The room of a plan's fleet, or of the same with other instances [K]: the rate is doubled from the plan's own, or
    halved, until a limit breaks, or all hold, then bisected. None of a fleet that holds them at no rate.

    The lengths of the requests stay as they are. Each rate is one evaluation, by the program that evaluated the plan.
    """
    counts = np.asarray(plan.fleet.n_instances if n_instances is None else n_instances)
    if not counts.reshape(len(counts), -1).any(axis=1).all():
        return None
    here = replace(plan, fleet=plan.fleet if n_instances is None else plan.fleet.with_instances(n_instances))
    traffic = routed(here.fleet, here.problem.workload, here.problem.assumptions)
    rate_per_s = float(here.problem.workload.arrival_rate_per_s)
    if not _broken(here, traffic, rate_per_s):
        held, over = rate_per_s, 2.0 * rate_per_s
        for _ in range(MOST_DOUBLINGS):
            if _broken(here, traffic, over):
                break
            held, over = over, 2.0 * over
    else:
        held, over = 0.5 * rate_per_s, rate_per_s
        for _ in range(MOST_DOUBLINGS):
            if not _broken(here, traffic, held):
                break
            held, over = 0.5 * held, held
        else:
            return None
    while over > held * (1.0 + NEAR):
        tried = (held * over) ** 0.5
        held, over = (held, tried) if _broken(here, traffic, tried) else (tried, over)
    _, limit, pool = max(_broken(here, traffic, over), default=(0.0, "utilization", None))
    return Room(held, limit, pool)


def _broken(plan: Plan, traffic: PoolTraffic, rate_per_s: float) -> list[tuple[float, str, int | None]]:
    """The limits that break at a rate: by how much, which, and of which pool."""
    problem = plan.problem
    metrics = fleet_metrics(plan.fleet, traffic, with_rate(problem.workload, rate_per_s), problem.assumptions)
    found = []
    for limit, excess in compiled_excesses(metrics.pools, problem.slo).items():
        each = np.nan_to_num(np.atleast_1d(np.asarray(excess)), nan=np.inf)
        pools = [None] if np.ndim(excess) == 0 else range(len(each))
        found += [(float(x), limit, pool) for x, pool in zip(each, pools, strict=True) if x > 2.0 * ROUNDING]
    return found
