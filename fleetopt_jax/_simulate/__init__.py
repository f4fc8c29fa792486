"""Iteration-level continuous batching: the arbiter of the analytic laws.

The room has a private name, because `fleetopt_jax.simulate` is the function.
"""

from fleetopt_jax._simulate.estimates import Estimate
from fleetopt_jax._simulate.requests import Requests, draw_requests, replay_requests
from fleetopt_jax._simulate.simulate import Simulation, simulate
from fleetopt_jax._simulate.verify import Verified, verify

__all__ = ["Estimate", "Requests", "Simulation", "Verified", "draw_requests", "replay_requests", "simulate", "verify"]
