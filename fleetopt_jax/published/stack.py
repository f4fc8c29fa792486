"""The second ledger: from the physical system to a stack of 2026, a change at a time, everything else re-optimised.

    engine       vLLM 0.11, whose steady states and watts were measured, with nothing of what follows
    release      the newest vLLM
    stages       each pool by instances that do all, or by a prefill and a decode stage
    prefix_cache a share of every prompt is found, in every pool; compressed prompts find nothing
    speculate    as many tokens drafted ahead as pay, in each pool or stage

What a prefix cache of two stages finds is not modelled: from `prefix_cache` on the best of fleets with one, whose pools
all do both, and of fleets without one counts.
"""

from collections.abc import Iterator
from dataclasses import replace

from fleetopt_jax._optimize.changes import drafting
from fleetopt_jax._optimize.problem import Problem, Serve, make_problem
from fleetopt_jax.catalog.spec import DEFAULT_SERVING, MEASURED_SERVING, EngineSpec, KvLink
from fleetopt_jax.fleet.assumptions import PHYSICAL, Assumptions
from fleetopt_jax.fleet.choices.prefix_cache import ConstantHits
from fleetopt_jax.fleet.fleet import Slo
from fleetopt_jax.published.walk import Step
from fleetopt_jax.workload.atoms import Workload

CHANGES = ("engine", "release", "stages", "prefix_cache", "speculate")


def stack_steps(
    workload: Workload,
    spec: EngineSpec,
    *,
    slo: Slo,
    hit_frac: float,
    name: str = "workload",
    link: KvLink | None = None,
    assumptions: Assumptions = PHYSICAL,
) -> Iterator[Step]:
    """What each row asks, for `walked`. `hit_frac` of every prompt is found in a prefix cache; `spec` is run by two
    releases of vLLM, and may have stages, over `link`, and drafts."""

    def asked(*specs: EngineSpec, assumed: Assumptions = assumptions, serve: Serve = "mixed") -> Problem:
        return make_problem(
            workload,
            specs,
            slo=slo,
            workload_name=name,
            assume="ledger",
            assumptions=assumed,
            serve=serve,
            link=link,
        )

    old, new = (replace(spec, serving=serving) for serving in (MEASURED_SERVING, DEFAULT_SERVING))
    yield Step("engine", None, old.serving, (asked(old),))
    yield Step("release", old.serving, new.serving, (asked(new),))
    apart = asked(new, serve="any")
    yield Step("stages", "mixed", "any", (apart,))
    finding = replace(assumptions, prefix_cache=ConstantHits(hit_frac))
    cached = asked(new, assumed=finding)
    yield Step("prefix_cache", assumptions.prefix_cache.name, finding.prefix_cache.name, (cached, apart))
    lever = drafting(new.llm)
    drafts = lever.variants(new)
    both = asked(*drafts, assumed=finding), asked(*drafts, serve="any")
    yield Step("speculate", "none", lever.title, both)
