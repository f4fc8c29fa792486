"""Laws and choices of the user's own: short records passed in like ours, and what they say is what comes out."""

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from fleetopt_jax._optimize.problem import make_problem
from fleetopt_jax._optimize.search import optimize
from fleetopt_jax.catalog.engines import build
from fleetopt_jax.catalog.spec import MEASURED_SERVING, EngineSpec, OwnLaws
from fleetopt_jax.core.struct import pytree
from fleetopt_jax.fleet.assumptions import (
    CHOICES,
    DISPATCHES,
    PHYSICAL,
    PRESETS,
    PUBLISHED,
    Assumptions,
    choice_names,
    parse_assumptions,
)
from fleetopt_jax.fleet.choices.dispatch import AtRandom, Dispatch, Queues
from fleetopt_jax.fleet.choices.routing_key import PromptAndLimit, RoutingKey, StickySessions, TotalTokens
from fleetopt_jax.fleet.choices.tail import MeanPrefillTail, QuantileTail
from fleetopt_jax.fleet.evaluate import FleetMetrics, evaluate
from fleetopt_jax.fleet.fleet import Fleet, fleet_of, make_slo
from fleetopt_jax.fleet.traffic import route
from fleetopt_jax.laws.decode import DecodeLaw
from fleetopt_jax.laws.power import PowerLaw
from fleetopt_jax.workload.atoms import Workload, make_workload

LATE_S = 0.010
H100 = EngineSpec("h100", own_fit=False, serving=MEASURED_SERVING)
compiled = jax.jit(evaluate, static_argnames="assumptions")
routed = jax.jit(route, static_argnames="assumptions")


@pytest.fixture(scope="module")
def workload() -> Workload:
    rng = np.random.default_rng(1)
    prompt, output = (np.round(np.exp(rng.uniform(2.0, high, 50))) for high in (9.0, 6.5))
    return make_workload(prompt, output, rng.random(50), arrival_rate_per_s=40.0, arrival_scv=3.0)


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    return fleet_of([build(H100)] * 2, [2000.0, 16_384.0], [1.5, 1.0], [12.0, 10.0])


@pytest.fixture(scope="module")
def ours(fleet, workload) -> FleetMetrics:
    return compiled(fleet, workload, assumptions=PHYSICAL)


# --- the user's own -------------------------------------------------------------------------------------------------


@pytree
class TwinDecode(DecodeLaw):
    """A dense model's step in other letters."""

    a: Array
    b: Array
    c: Array

    def step_s(self, n_active, context_tokens):
        return self.a + n_active * (self.b + self.c * context_tokens)


@pytree
class TwinPower(PowerLaw):
    """Watts by a law that is kept whole, and asked."""

    like: PowerLaw

    def gpu_w(self, n_active, context_tokens):
        return self.like.gpu_w(n_active, context_tokens)


@dataclass(frozen=True)
class LateTail(QuantileTail):
    """First tokens that take some milliseconds more, as a gateway in front would make them."""

    late_s: float = LATE_S
    name: ClassVar[str] = "late"

    def delay(self, state, operation):
        delay = super().delay(state, operation)
        law = delay.ttft
        return replace(delay, ttft=replace(law, least_s=law.least_s + self.late_s, most_s=law.most_s + self.late_s))


@dataclass(frozen=True)
class LateMean(MeanPrefillTail):
    """The same without a distribution."""

    name: ClassVar[str] = "late_mean"

    def delay(self, state, operation):
        delay = super().delay(state, operation)
        return replace(delay, ttft_p99_s=delay.ttft_p99_s + LATE_S)


@dataclass(frozen=True)
class LikeRandom(Dispatch):
    """Streams that stay Poisson, sent to the first instance."""

    name: ClassVar[str] = "like_random"
    arrival_scv: ClassVar[float] = 1.0
    co_arrivals: ClassVar[float] = 1.0

    def choose(self, queues: Queues, n_sent: int) -> Array:
        return jnp.zeros((len(queues.rank), n_sent), int)


@dataclass(frozen=True)
class PromptAlone(RoutingKey):
    """A router that does not know how much will be generated, and takes it that nothing is."""

    name: ClassVar[str] = "prompt_alone"

    def route_tokens(self, columns):
        return columns.held_tokens


def same(one, other, **tolerance) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), one, other)


def own_laws() -> OwnLaws:
    """The catalog's H100 by records of the user's own."""
    engine = build(H100)
    step = engine.decode
    return OwnLaws(decode=TwinDecode(step.base_s, step.per_seq_s, step.per_token_s), power=TwinPower(engine.power))


@pytest.mark.slow
def test_laws_equal_to_the_catalogs_give_its_metrics(fleet, workload, ours):
    theirs = build(replace(H100, laws=own_laws()))
    assert (type(theirs.decode), type(theirs.power)) == (TwinDecode, TwinPower)
    # 1e-7: sums of steps in another order, through a fixed point, an inverted transform and a bisected quantile.
    same(compiled(fleet.with_engines([theirs] * 2), workload, assumptions=PHYSICAL), ours, rtol=1e-7, atol=1e-12)
    assert np.all(np.asarray(ours.pools.utilization) < 1)


@pytest.mark.slow
def test_a_tail_that_adds_ten_milliseconds_adds_ten_milliseconds(fleet, workload, ours):
    later = compiled(fleet, workload, assumptions=replace(PHYSICAL, tail=LateTail()))
    np.testing.assert_allclose(later.pools.ttft_p99_s - ours.pools.ttft_p99_s, LATE_S, rtol=1e-6)
    np.testing.assert_allclose(later.ttft_p99_of_all_s - ours.ttft_p99_of_all_s, LATE_S, rtol=1e-6)
    same((later.resources, later.itl_s, later.itl_p99_s), (ours.resources, ours.itl_s, ours.itl_p99_s), rtol=1e-12)


@pytest.mark.slow
def test_a_dispatch_that_says_what_random_says_is_random(fleet, workload, ours):
    own, random = (
        compiled(fleet, workload, assumptions=replace(PHYSICAL, dispatch=d)) for d in (LikeRandom(), AtRandom())
    )
    same(own, random, rtol=1e-12)
    assert np.all(own.pools.ttft_p99_s > ours.pools.ttft_p99_s)  # the shortest queue waits less


def test_own_laws_and_an_own_tail_search_as_the_catalogs_do(workload):
    """A tail that is later by as much as its limit changes nothing of the plan."""
    own = replace(H100, source="projected")
    step, power = build(own).decode, build(own).power
    laws = OwnLaws(decode=TwinDecode(step.base_s, step.per_seq_s, step.per_token_s), power=TwinPower(power))
    late = replace(PUBLISHED, tail=LateMean())
    plain = optimize(make_problem(workload, [own], slo=make_slo(ttft_p99_s=0.3), assumptions=PUBLISHED))
    about = dict(slo=make_slo(ttft_p99_s=0.3 + LATE_S), assumptions=late)
    theirs = optimize(make_problem(workload, [replace(own, laws=laws)], **about))
    assert theirs.status == plain.status == "optimal"
    for name in ("window_tokens", "gamma", "n_instances"):
        np.testing.assert_array_equal(getattr(theirs.fleet, name), getattr(plain.fleet, name))
    assert float(theirs.metrics.tok_per_j) == pytest.approx(float(plain.metrics.tok_per_j), rel=1e-9)
    assert float(theirs.metrics.ttft_p99_s - plain.metrics.ttft_p99_s) == pytest.approx(LATE_S, rel=1e-9)


# --- what a router sees ---------------------------------------------------------------------------------------------


def routed_by_hand(seen: np.ndarray, fleet: Fleet, workload: Workload) -> dict[str, np.ndarray]:
    """Pools by a loop over requests whose length the router sees as `seen`; all tries to compress succeed."""
    windows = np.asarray(fleet.window_tokens)
    edges = np.maximum.accumulate(windows * np.asarray(fleet.gamma))
    sums = np.zeros((len(windows), 3))
    unserved = 0.0
    prompts, outputs, weights = (np.asarray(getattr(workload, n)) for n in ("prompt_tokens", "output_tokens", "weight"))
    for length, p, o, weight in zip(seen, prompts, outputs, weights, strict=True):
        pool = next((k for k, edge in enumerate(edges) if length <= edge), None)
        if pool is not None and length > windows[pool]:
            if p >= o + 2:  # gives way
                p = windows[pool] - o
            else:
                pool = next((k for k, window in enumerate(windows) if length <= window), None)
        if pool is None:
            unserved += weight
        else:
            sums[pool] += weight * np.array([1.0, p, o])
    frac = sums[:, 0]
    assert unserved + frac.sum() == pytest.approx(1.0)
    return dict(traffic_frac=frac, prefill=sums[:, 1] / frac, output_tokens=sums[:, 2] / frac)


@pytest.mark.parametrize("key", [TotalTokens(), PromptAndLimit(400.0), PromptAlone()], ids=lambda key: key.name)
def test_requests_go_where_the_router_sees_them_go(key, fleet, workload):
    prompt, output = np.asarray(workload.prompt_tokens), np.asarray(workload.output_tokens)
    seen = {
        "total_tokens": prompt + output,
        "prompt_and_limit": prompt + np.maximum(output, 400.0),
        "prompt_alone": prompt,
    }[key.name]
    assumptions = replace(PHYSICAL, route_by=key)
    for gamma in ([1.0, 1.0], [1.6, 1.0]):
        lanes = fleet_of(fleet.engines, [1000.5, 16_384.0], gamma, [1.0, 1.0], fleet.surroundings)
        traffic = routed(lanes, workload, assumptions=assumptions)
        found = dict(traffic_frac=traffic.traffic_frac, prefill=traffic.demand.prefill)
        found |= dict(output_tokens=traffic.output_tokens)
        same(found, routed_by_hand(seen, lanes, workload), rtol=1e-9)
        # The histogram of prompts follows: its mean is that of the pool's.
        shortest, longest = jax.vmap(lambda prompts: prompts.ends_tokens)(traffic.prompts)
        middle = np.sum(traffic.prompts.mass * (shortest + longest) / 2, axis=1)
        np.testing.assert_allclose(middle, traffic.demand.prefill, rtol=0.02)  # cells of several prompts are not exact


# --- records --------------------------------------------------------------------------------------------------------

RECORDS = [record for choice in CHOICES.values() for record in choice.values()]
RECORDS += [*DISPATCHES.values(), TotalTokens(), PromptAndLimit(512.0), StickySessions(2.0)]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: f"{type(record).__name__}")
def test_a_record_is_hashable_and_equal_to_another_of_its_kind(record):
    twin = copy.deepcopy(record)
    assert twin is not record
    assert twin == record
    assert hash(twin) == hash(record)
    assert record != LateTail()
    assert not jax.tree.leaves(record) or jax.tree.leaves(record) == [record]  # no numbers to trace


def test_every_choice_has_records_of_different_names():
    for choices in (*CHOICES.values(), DISPATCHES):
        assert len(choices) >= 2
        assert all(record.name == name for name, record in choices.items())
        assert len({type(record) for record in choices.values()}) == len(choices)
    for name, preset in PRESETS.items():
        assert parse_assumptions(name) == preset
        assert all(CHOICES[choice][named] == getattr(preset, choice) for choice, named in choice_names(preset).items())
    changed = [choice for choice in CHOICES if choice_names(PHYSICAL)[choice] != choice_names(PUBLISHED)[choice]]
    assert set(changed) == set(CHOICES) - {"integration"}
    for choice in changed:
        name = choice_names(PUBLISHED)[choice]
        only = parse_assumptions(f"physical,{choice}={name}")
        assert only == replace(PHYSICAL, **{choice: CHOICES[choice][name]})
        assert choice_names(only) == {**choice_names(PHYSICAL), choice: name}


def test_every_record_says_all_its_methods():
    """Of each base whose methods are to be said, none is left to the base's refusal."""
    for record in RECORDS:
        base = type(record).__mro__[1]
        methods = [name for name, value in vars(base).items() if callable(value) and not name.startswith("_")]
        assert all(getattr(type(record), name) is not getattr(base, name) for name in methods), record
        assert isinstance(record.name, str)


def test_equal_choices_share_a_compilation_and_different_ones_do_not():
    traced = []

    @jax.jit
    def double(x):
        return 2 * x

    def watched(x, assumptions: Assumptions):
        traced.append(assumptions)
        return double(x)

    program = jax.jit(watched, static_argnames="assumptions")
    for limit in (5.0, 5.0, 6.0):
        program(1.0, assumptions=replace(PHYSICAL, route_by=PromptAndLimit(limit), tail=LateTail()))
    assert len(traced) == 2
