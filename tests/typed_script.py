"""A user's script: a GPU and a power law of one's own, planned, kept, loaded again, differentiated; all of it typed."""

import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

import fleetopt_jax as fo

jax.config.update("jax_enable_x64", True)


@fo.pytree
class LinearPower(fo.PowerLaw):
    """Watts that rise by the sequence up to a limit."""

    idle_w: Array
    w_per_sequence: Array
    limit_w: Array

    def gpu_w(self, n_active: ArrayLike, context_tokens: ArrayLike) -> Array:
        return jnp.minimum(self.idle_w + self.w_per_sequence * n_active, self.limit_w)


card = fo.GpuEntry(
    name="x1000",
    title="A card of our own",
    memory_bytes=160e9,
    bandwidth_bytes_per_s=6e12,
    peak_flop_per_s=1.5e15,
    tdp_w=800.0,
    usd_per_h=5.0,
    chunk_tokens=1024.0,
    source="a data sheet",
)
watts = LinearPower(jnp.asarray(200.0), jnp.asarray(6.0), jnp.asarray(780.0))
spec = fo.EngineSpec(card, "llama-3.1-8b", tp=1, laws=fo.OwnLaws(power=watts))
workload = fo.make_workload([500.0, 900.0, 4000.0], [200.0, 120.0, 300.0], [0.6, 0.3, 0.1], arrival_rate_per_s=40.0)
plan = fo.require_plan(fo.optimize(fo.make_problem(workload, [spec], n_pools=2)))

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "plan.json"
    fo.save_plan(plan, file)
    again = fo.load_plan(file, specs=[spec], workload=workload)
assert abs(float(again.metrics.tok_per_j) / float(plan.metrics.tok_per_j) - 1.0) < 1e-9


def tok_per_j(n_instances: Array) -> Array:
    real = replace(fo.PHYSICAL, rounding="real")
    return fo.evaluate(plan.fleet.with_instances(n_instances), workload, real).tok_per_j


slope: Array = jax.grad(tok_per_j)(jnp.asarray(plan.fleet.n_instances))
assert bool(jnp.all(jnp.isfinite(slope)))
print(f"{float(plan.metrics.tok_per_j):.4f} tokens per joule, {slope} for one instance more")
