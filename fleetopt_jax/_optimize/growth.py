"""What to buy when traffic grows: the GPUs that the busiest period needs at the end of each quarter.

The rate of every period grows by one factor a year; windows and engines stay, and each pool has the least instances
that hold its limits at the quarter's peak. GPUs grow less than the rate: larger pools wait less for the same load.
"""

import math
from dataclasses import dataclass

import numpy as np

from fleetopt_jax._optimize.graph import Boundaries
from fleetopt_jax._optimize.schedule import Schedule
from fleetopt_jax.core.errors import BadField

QUARTERS_A_YEAR = 4
MAX_QUARTERS = 40
MAX_GROWTH = 1000.0  # a year


@dataclass(frozen=True)
class Quarter:
    """The fleet at the end of a quarter, 0 for today."""

    quarter: int
    rate_per_s: float  # of the busiest period [1/s]
    n_instances: np.ndarray  # [K], warm spares with them
    n_gpus: int
    n_bought: int  # more than a quarter before; negative where traffic shrinks


def purchases(found: Schedule, growth_per_year: float, n_quarters: int = 8) -> list[Quarter]:
    """Today's fleet and that at the end of each of the next quarters, for rates that are `growth_per_year` times as
    high a year later.

    Raises BadField where no number of instances holds the limits of a quarter.
    """
    if not (math.isfinite(growth_per_year) and 0 < growth_per_year <= MAX_GROWTH):
        raise BadField("growth", f"{growth_per_year}", f"need a factor a year > 0, {MAX_GROWTH:g} at most")
    if not 1 <= n_quarters <= MAX_QUARTERS:
        raise BadField("quarters", f"{n_quarters}", f"need 1 to {MAX_QUARTERS}")
    plan, problem = found.scheduled.plan, found.problem
    windows, gamma = (np.asarray(x)[:-1] for x in (plan.fleet.window_tokens, plan.fleet.gamma))
    there = Boundaries(problem, windows, gamma)
    each = np.array([spec.split.n_gpus for spec in plan.specs])
    quarters: list[Quarter] = []
    for quarter in range(n_quarters + 1):
        rate = float(found.hours.rate_per_s.max()) * growth_per_year ** (quarter / QUARTERS_A_YEAR)
        at = there.at_rate(rate)
        ends = [(np.array([k]), np.array([k + 1])) for k in range(len(each))]
        needed = np.array([at.exact(problem.specs.index(spec), *end)[0][0] for spec, end in zip(plan.specs, ends)])
        if not np.isfinite(needed).all():
            problem_is = f"no fleet with these windows holds the limits at {rate:,.4g} requests/s"
            raise BadField("growth", problem_is, "need less growth, or fewer quarters")
        n = needed + found.running.warm_spares
        n_gpus = int(n @ each)
        quarters.append(Quarter(quarter, rate, n, n_gpus, n_gpus - quarters[-1].n_gpus if quarters else 0))
    return quarters
