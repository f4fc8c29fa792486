"""fleetopt_jax: the most energy-efficient way to run a fleet of LLM inference GPUs, as differentiable JAX.

    import jax; jax.config.update("jax_enable_x64", True)
    import fleetopt_jax as fo

    workload = fo.load_workload("azure-conv")
    plan = fo.optimize(fo.make_problem(workload, [fo.engine_choice("h100")]))
    metrics = fo.evaluate(plan.fleet, workload)

Names load on first use, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Assumptions": "fleet.assumptions",
    "BadInput": "core.errors",
    "Engine": "fleet.engine",
    "Fleet": "fleet.fleet",
    "FleetMetrics": "fleet.evaluate",
    "Plan": "optimize.plan",
    "Problem": "optimize.plan",
    "PHYSICAL": "fleet.assumptions",
    "PUBLISHED": "fleet.assumptions",
    "Slo": "fleet.fleet",
    "Workload": "workload.atoms",
    "at_clock": "fleet.engine",
    "engine_choice": "catalog.engines",
    "engine_entry": "catalog.engines",
    "evaluate": "fleet.evaluate",
    "fit_decode": "calibrate.fit",
    "fit_power": "calibrate.fit",
    "front_to_json": "optimize.pareto",
    "gpu_power_w": "laws.power",
    "load_workload": "catalog.workloads",
    "ledger": "published.ledger",
    "make_compressor": "laws.compression",
    "make_engine": "fleet.engine",
    "make_fleet": "fleet.fleet",
    "make_problem": "optimize.plan",
    "make_site": "fleet.engine",
    "make_slo": "fleet.fleet",
    "make_workload": "workload.atoms",
    "measured_engine": "fleet.engine",
    "pareto": "optimize.pareto",
    "plan_to_json": "optimize.plan",
    "pytree": "core.struct",
    "read_measurements": "calibrate.measurements",
    "pull_levers": "optimize.levers",
    "reproduce": "published.tables",
    "robust": "optimize.robust",
    "roofline_engine": "fleet.engine",
    "sensitivity": "optimize.sensitivity",
    "size_fleet": "fleet.sizing",
    "replay_requests": "simulate.requests",
    "verify": "simulate.verify",
}
_ROOMS = ("calibrate", "catalog", "core", "fleet", "laws", "optimize", "published", "report", "simulate", "workload")

__all__ = ["__version__", "optimize", "simulate", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"fleetopt_jax.{_HOME[name]}"), name)
    if name in _ROOMS:
        return import_module(f"fleetopt_jax.{name}")
    raise AttributeError(f"module 'fleetopt_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_ROOMS})
