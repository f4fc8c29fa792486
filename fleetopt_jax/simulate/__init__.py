"""Iteration-level continuous batching: the arbiter of the analytic laws."""

from fleetopt_jax.simulate.requests import Requests, draw_requests, replay_requests
from fleetopt_jax.simulate.simulate import Estimate, Simulation, simulate

__all__ = ["Estimate", "Requests", "Simulation", "draw_requests", "replay_requests", "simulate"]
