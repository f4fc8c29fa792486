"""What engines are off by: the errors their catalog entries state, and engines perturbed by such factors.

An engine is off by three factors, exp(sigma z) with z standard normal: on the time of a decode step, on the watts at a
given batch, on the engine time of prefill. A factor is common to all batches and contexts of an engine, to every pool
and every fleet that uses it (so that ratios of two fleets keep only what differs), and independent between engines.
Two tensor parallelisms or precisions on one GPU count as two engines: their errors surely go together, so intervals of
ratios between them are too wide rather than too narrow.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.catalog.engines import engine_entry
from fleetopt_jax.catalog.spec import EngineSpec, OwnLaws
from fleetopt_jax.core.struct import as_floats, pytree, stack
from fleetopt_jax.fleet.engine import Engine, with_laws
from fleetopt_jax.fleet.fleet import Fleet
from fleetopt_jax.laws.prefill import EFFICIENCY_ERROR
from fleetopt_jax.laws.step_law import ScaledStep

N_SAMPLES = 1000
_SCORE = np.vectorize(NormalDist().inv_cdf, otypes=[float])  # SciPy's takes longer to import than all draws
OF_MEAN_ABSOLUTE = math.sqrt(math.pi / 2.0)  # sigma of a normal error over its mean absolute value
UNSTATED = 0.2  # sigma where nobody states an error: what the paper states of its B200 (+-20 %)


@pytree
class EngineErrors:
    """Standard deviations of the logarithms of an engine's factors [-]. Shape (), or [E] of E engines."""

    step: Array  # time of a decode step
    power: Array  # watts of a GPU at a given batch
    prefill: Array  # engine time of a prompt


@pytree
class EngineFactors:
    """What an engine is off by; 1 as it stands [-]. Shape (), [E] of E engines, or with axes before it."""

    step: Array
    power: Array
    prefill: Array


def make_errors(*, step: float, power: float, prefill: float) -> EngineErrors:
    """Checked `EngineErrors`."""
    values = dict(locals())
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"need a finite {name} error >= 0, got {value}")
    return EngineErrors(**as_floats(**values))


def errors_of(spec: EngineSpec) -> EngineErrors:
    """The errors of an engine, from what its catalog entry states.

    Stated step and power errors are mean absolute ones of predictions, so sigma is sqrt(pi / 2) times as much. Where
    none is stated (the paper's engines) sigma is 0.2, the +-20 % the paper gives its B200: for its H100 a guess,
    and no bound, for the published shape refitted to measurements is 49 % off on architectures left out. Prefill is
    0.4 where it goes by a share of the peak, for that has not been measured by itself.
    """
    entry = engine_entry(spec)

    def sigma(stated: float | None) -> float:
        return UNSTATED if stated is None else OF_MEAN_ABSOLUTE * stated

    assumed = entry.prefill_error in (None, EFFICIENCY_ERROR)  # which is a standard deviation already
    prefill = EFFICIENCY_ERROR if assumed else sigma(entry.prefill_error)
    return make_errors(step=sigma(entry.step_error), power=sigma(entry.power_error), prefill=prefill)


def however_run(spec: EngineSpec) -> EngineSpec:
    """The spec at its top clock and with the default batch: what of it shares its errors."""
    return replace(spec, max_num_seqs=None, clock_frac=1.0)


def without_drafts(spec: EngineSpec) -> EngineSpec:
    """The spec however it is run, and with nothing drafted ahead: the step that verifies drafts is the one without."""
    return replace(however_run(spec), speculate=None)


def shared_errors(
    specs: Sequence[EngineSpec], same: Callable[[EngineSpec], Hashable] = without_drafts
) -> tuple[EngineErrors, np.ndarray]:
    """(errors [E] of the distinct engines, index of its engine for each spec): those with an equal `same` share their
    factors."""
    keys = [same(spec) for spec in specs]
    distinct = {key: errors_of(spec) for key, spec in zip(keys, specs, strict=True)}
    return stack(list(distinct.values())), np.array([list(distinct).index(key) for key in keys])


def perturb(engine: Engine, factors: EngineFactors) -> Engine:
    """The engine with its step, its power and its prefill off by `factors` of shape (). jit, vmap and grad work.

    Each factor is on what was compared with measurements at a given batch, so power does not follow the step. Watts
    below a board's power limit grow, the limit (known, where the law has one) does not.
    """
    prefill = engine.prefill.slower(factors.prefill)
    return with_laws(
        engine,
        decode=engine.decode.slower(factors.step),
        power=engine.power.hungrier(factors.power),
        idle_w=engine.idle_w * factors.power,
        prefill=replace(prefill, gpu_w=engine.power.bent_w(prefill.gpu_w, factors.power)),
        step=engine.step and ScaledStep(engine.step, factors.step, factors.prefill, factors.power),
    )


def perturbed_spec(spec: EngineSpec, factors: EngineFactors) -> EngineSpec:
    """The spec whose laws, at the top clock, are off by `factors` of shape (): run as it was, and as well known."""
    entry = engine_entry(however_run(spec))
    engine = jax.tree.map(np.asarray, perturb(entry.engine, factors))
    laws = OwnLaws(
        decode=engine.decode,
        power=engine.power,
        prefill=engine.prefill,
        step=engine.step,
        kv=engine.kv,
        idle_w=float(engine.idle_w),
        quality=entry.quality,
        step_error=entry.step_error,
        power_error=entry.power_error,
        prefill_error=entry.prefill_error,
        source=entry.source,
        file=spec.file,
        speculate=spec.drafts,
    )
    return replace(spec, laws=laws)


def factors_of(factors: EngineFactors, index: int | Array) -> EngineFactors:
    """Those of one engine, of [E]; or of one draw, of [n, E]."""
    return jax.tree.map(lambda x: x[index], factors)


def perturbed(fleet: Fleet, factors: EngineFactors, engine_of: ArrayLike) -> Fleet:
    """The fleet whose engines are off: the k-th of all its stages, one lane after the other, by `factors` [E] of engine
    `engine_of`[k]."""
    index, moved, k = jnp.asarray(engine_of), [], 0
    for server in fleet.servers:
        engines = [perturb(engine, factors_of(factors, index[k + i])) for i, (_, engine) in enumerate(server.parts)]
        moved.append(server.with_parts(engines))
        k += len(engines)
    return fleet.with_engines(moved)


def slower(errors: EngineErrors, sigmas: ArrayLike) -> EngineFactors:
    """Factors of engines whose steps and prefill are slower by so many sigmas; the watts as they are."""
    step, prefill = (jnp.exp(sigmas * sigma) for sigma in (errors.step, errors.prefill))
    return EngineFactors(step=step, power=jnp.ones_like(step), prefill=prefill)


def draw(errors: EngineErrors, n_samples: int = N_SAMPLES, seed: int | Sequence[int] = 0) -> EngineFactors:
    """Factors [n], or [n, E] of E engines, a Latin hypercube."""
    sigma = np.stack([errors.step, errors.power, errors.prefill])  # [3] or [3, E]
    z = normal_scores(sigma.shape, n_samples, seed)
    step, power, prefill = np.moveaxis(np.exp(sigma[..., None] * z), -1, 1)
    return EngineFactors(**as_floats(step=step, power=power, prefill=prefill))


def normal_scores(shape: tuple[int, ...], n_samples: int, seed: int | Sequence[int]) -> np.ndarray:
    """Standard normal numbers [*shape, n], a Latin hypercube: of each one draw in each n-th of its distribution."""
    rng = np.random.default_rng(seed)
    ranks = rng.permuted(np.broadcast_to(np.arange(n_samples), (*shape, n_samples)), axis=-1)
    return _SCORE((ranks + rng.uniform(1e-9, 1.0 - 1e-9, ranks.shape)) / n_samples)
