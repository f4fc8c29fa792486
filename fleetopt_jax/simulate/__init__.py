"""Iteration-level continuous batching: the arbiter of the analytic laws.

The room is also its entry: `fleetopt_jax.simulate(fleet, workload)` is `fleetopt_jax.simulate.simulate`.
"""

from fleetopt_jax.core.rooms import make_callable
from fleetopt_jax.simulate.requests import Requests, draw_requests, replay_requests
from fleetopt_jax.simulate.simulate import Estimate, Simulation, simulate
from fleetopt_jax.simulate.verify import Verified, verify

__all__ = ["Estimate", "Requests", "Simulation", "Verified", "draw_requests", "replay_requests", "simulate", "verify"]

make_callable(__name__, lambda: simulate)
