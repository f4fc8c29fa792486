"""Iteration-level continuous batching: the arbiter of the analytic laws."""

from fleetopt_jax.simulate.estimates import Estimate
from fleetopt_jax.simulate.requests import Requests, draw_requests, replay_requests
from fleetopt_jax.simulate.simulate import Simulation, simulate
from fleetopt_jax.simulate.verify import Verified, verify

__all__ = ["Estimate", "Requests", "Simulation", "Verified", "draw_requests", "replay_requests", "simulate", "verify"]
