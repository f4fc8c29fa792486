"""Iteration-level continuous batching: the arbiter of the analytic laws.

The room has a private name, because `fleetopt_jax.simulate` is the function.
"""

from fleetopt_jax._simulate.burstiness import Burstiness, burstiness
from fleetopt_jax._simulate.day import Day, ReplayedDay, replay_day
from fleetopt_jax._simulate.estimates import Estimate
from fleetopt_jax._simulate.readings import LimitReading, limits_read
from fleetopt_jax._simulate.requests import Requests, draw_requests, poisson_arrivals, replay_requests
from fleetopt_jax._simulate.simulate import Simulation, simulate
from fleetopt_jax._simulate.verify import Attempt, Rival, Standing, Verified, verify

__all__ = [
    "Attempt",
    "Burstiness",
    "Day",
    "Estimate",
    "LimitReading",
    "ReplayedDay",
    "Requests",
    "Rival",
    "Simulation",
    "Standing",
    "Verified",
    "burstiness",
    "draw_requests",
    "limits_read",
    "poisson_arrivals",
    "replay_day",
    "replay_requests",
    "simulate",
    "verify",
]
