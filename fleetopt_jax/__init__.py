"""fleetopt_jax: the most energy-efficient way to run a fleet of LLM inference GPUs, as differentiable JAX.

    import jax; jax.config.update("jax_enable_x64", True)
    import fleetopt_jax as fo

    workload = fo.load_workload("azure-conv")
    plan = fo.require_plan(fo.optimize(fo.make_problem(workload, [fo.EngineSpec("h100")])))
    metrics = fo.evaluate(plan.fleet, workload)

`__init__.pyi` lists the names. They load on first use, so that importing the package costs nothing.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
