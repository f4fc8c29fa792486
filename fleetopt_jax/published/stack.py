"""The second ledger: from the physical system to a stack of 2026, a change at a time, everything else re-optimised.

    engine       vLLM 0.11, whose steady states and watts were measured, with nothing of what follows; not of what its
                 law does not describe (expert parallelism, pipelines, state-space layers)
    release      the serving engine of today, the newest vLLM unless another is asked for
    stages       each pool by instances that do all, or by a prefill and a decode stage
    prefix_cache a share of every prompt is found, in every pool; compressed prompts find nothing
    speculate    as many tokens drafted ahead as pay, in each pool or stage

What a prefix cache of two stages finds is not modelled: from `prefix_cache` on the best of fleets with one, whose pools
all do both, and of fleets without one counts.
"""

from dataclasses import replace

from fleetopt_jax._optimize.changes import changed, drafting
from fleetopt_jax._optimize.problem import Problem, Serve, make_problem
from fleetopt_jax.catalog.engines import build
from fleetopt_jax.catalog.spec import MEASURED_SERVING, EngineSpec, KvLink
from fleetopt_jax.core.errors import BadField
from fleetopt_jax.core.progress import Progress
from fleetopt_jax.documents.ledger import LedgerRow
from fleetopt_jax.fleet.assumptions import PHYSICAL
from fleetopt_jax.fleet.choices.prefix_cache import ConstantHits, PrefixCache, not_searched
from fleetopt_jax.fleet.fleet import Slo
from fleetopt_jax.fleet.surroundings import Surroundings
from fleetopt_jax.published.walk import Step, walked
from fleetopt_jax.workload.atoms import Workload
from fleetopt_jax.workload.compress import compressed

CHANGES = ("engine", "release", "stages", "prefix_cache", "speculate")
ATOMS = 256  # with 1,024 FleetOpt is up to 1.2 % better on azure-conv, one pool and two by 0.02 %
FOUND = ConstantHits(0.36)  # as of Mooncake's conversations, by two pools that forget nothing


def stack_ledger(
    workload: Workload,
    spec: EngineSpec,
    *,
    slo: Slo,
    name: str = "workload",
    prefix_cache: PrefixCache = FOUND,
    link: KvLink | None = None,
    window_tokens: float | None = None,
    surroundings: Surroundings | None = None,
    progress: Progress | None = None,
) -> list[LedgerRow]:
    """The rows for `workload`, of which `ATOMS` weighted requests are made, on `spec`: minutes.

    `spec` is what serves from the second row on; the first has it with vLLM 0.11. `prefix_cache` is what fleets find
    from the fourth on, `link` what hands KV caches over; `window_tokens` and `surroundings` as in `make_problem`, which
    refuses what cannot be asked.
    """
    steps = stack_steps(
        compressed(workload, ATOMS),
        spec,
        slo=slo,
        name=name,
        prefix_cache=prefix_cache,
        link=link,
        window_tokens=window_tokens,
        surroundings=surroundings,
    )
    return list(walked(steps, progress))


def stack_steps(
    workload: Workload,
    spec: EngineSpec,
    *,
    slo: Slo,
    name: str = "workload",
    prefix_cache: PrefixCache = FOUND,
    link: KvLink | None = None,
    window_tokens: float | None = None,
    surroundings: Surroundings | None = None,
) -> tuple[Step, ...]:
    """What each row of `stack_ledger` asks, for `walked`: of all the requests that `workload` has."""
    if prefix_cache.reads_reuse:
        raise not_searched("a ledger")
    if slo.scope == "fleet":
        raise BadField("scope", "fleet: stages apart are searched with latencies that each pool holds", "need pool")

    def asked(*specs: EngineSpec, cached: bool = False, serve: Serve = "mixed") -> Problem:
        return make_problem(
            workload,
            specs,
            slo=slo,
            workload_name=name,
            assume="ledger",
            assumptions=replace(PHYSICAL, prefix_cache=prefix_cache) if cached else PHYSICAL,
            serve=serve,
            link=link,
            window_tokens=window_tokens,
            surroundings=surroundings,
        )

    lever, old = drafting(spec.llm), _as_measured(spec)
    apart, drafts = asked(spec, serve="any"), lever.variants(spec)
    return (
        *((Step("engine", None, old.serving, (asked(old),)),) if old else ()),
        Step("release", old and old.serving, spec.serving, (asked(spec),)),
        Step("stages", "mixed", "any", (apart,)),
        Step("prefix_cache", PHYSICAL.prefix_cache.name, prefix_cache.name, (asked(spec, cached=True), apart)),
        Step("speculate", "none", lever.title, (asked(*drafts, cached=True), asked(*drafts, serve="any"))),
    )


def _as_measured(spec: EngineSpec) -> EngineSpec | None:
    """As vLLM 0.11 serves it; None where its law does not describe that."""
    old = changed(spec, serving=MEASURED_SERVING)
    try:
        build(old)
    except BadField:
        return None
    return old
