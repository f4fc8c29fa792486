"""Composes the laws: engines and pools into a fleet, a fleet and a workload into metrics."""
