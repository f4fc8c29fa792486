"""The second ledger: every row is the best that is found with what it allows."""

from dataclasses import replace

import pytest

import fleetopt_jax as fo
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.fleet.assumptions import PUBLISHED
from fleetopt_jax.fleet.choices.prefix_cache import WorkingSetCache
from fleetopt_jax.published.stack import CHANGES, stack_ledger, stack_steps
from fleetopt_jax.published.walk import Step, walked

CHAT = fo.make_workload([300, 800, 2500, 9000], [100, 150, 300, 400], [0.4, 0.3, 0.2, 0.1], arrival_rate_per_s=40.0)
SLO = fo.make_slo(ttft_p99_s=2.0)
ABOUT = {"slo": SLO}


def asked(**changes):
    specs = [EngineSpec("h100", source="projected", **changes)]
    return fo.make_problem(CHAT, specs, slo=SLO, assume="published", assumptions=PUBLISHED)


def tok_per_j(problem) -> float:
    plan = fo.optimize(problem)
    assert isinstance(plan, fo.Plan)
    return float(plan.metrics.tok_per_j)


def test_a_row_is_the_best_answer_to_what_is_asked():
    """Of two problems the better one counts, to 1e-6 what `optimize` finds."""
    problems = asked(), asked(tp=4)
    one, both = walked([Step("one", None, "1", problems[:1]), Step("both", "1", "2", problems)])
    found = [tok_per_j(replace(problem, gamma=None)) for problem in problems]
    assert found[0] != pytest.approx(found[1], rel=0.01)
    for row, best in ((one, found[0]), (both, max(found))):
        assert row.tok_per_j_fleetopt == pytest.approx(best, rel=1e-6)
        one_pool, two_pools = row.tok_per_j_homogeneous or 0.0, row.tok_per_j_two_pool or 0.0
        assert best * (1 + 1e-9) >= two_pools >= one_pool > 0
        assert row.gain == pytest.approx(best / one_pool, rel=1e-6)
    assert (both.choice, both.from_, both.to) == ("both", "1", "2")


def test_every_row_allows_what_those_before_it_did():
    """Nothing is searched to see that: which engines, how they serve and what a cache finds, by row."""
    steps = list(stack_steps(CHAT, EngineSpec("b200"), **ABOUT))
    assert tuple(step.choice for step in steps) == CHANGES
    (engine,), (release,), (apart,), (cached, again), (drafted, all_apart) = (step.problems for step in steps)
    assert again is apart  # which is not searched twice
    assert (engine.specs[0].serving, release.specs[0].serving) == ("vllm-0.11", "vllm")
    for problem, finds in ((release, 0.0), (cached, 0.36), (apart, 0.0), (drafted, 0.36), (all_apart, 0.0)):
        assert getattr(problem.assumptions.prefix_cache, "hit_frac", 0.0) == finds
    assert [p.service.serve for p in (cached, apart, drafted, all_apart)] == ["mixed", "any", "mixed", "any"]
    assert set(drafted.specs) == set(all_apart.specs) > set(cached.specs) == set(apart.specs)


def test_what_the_measured_engine_does_not_describe_begins_with_the_engine_of_today():
    first, *rest = stack_steps(CHAT, EngineSpec("b200", "deepseek-v3", tp=4, dp=2, ep=8), **ABOUT)
    assert (first.choice, first.before, first.after, len(rest)) == ("release", None, "vllm", 3)


def test_what_no_ledger_can_ask_is_refused_before_anything_is_searched(monkeypatch):
    monkeypatch.setattr("fleetopt_jax.published.stack.walked", lambda *_: pytest.fail("searched"))
    wrong = [
        ({"slo": fo.make_slo(ttft_p99_s=2.0, scope="fleet")}, "scope"),
        ({"prefix_cache": WorkingSetCache()}, "a ledger does not take into account"),
        ({"spec": EngineSpec("h100", serving="vllm-0.11")}, "no rows that verify drafts"),
    ]
    for changes, said in wrong:
        with pytest.raises(ValueError, match=said):
            stack_ledger(CHAT, **({"spec": EngineSpec("h100"), **ABOUT} | changes))


@pytest.mark.nightly
def test_the_last_row_is_what_optimize_finds_with_the_same_options():
    *_, last = walked(stack_steps(CHAT, EngineSpec("h100"), **ABOUT))
    *_, (_, apart) = (step.problems for step in stack_steps(CHAT, EngineSpec("h100"), **ABOUT))
    specs = [EngineSpec("h100", speculate=f"eagle3:{k}" if k else None) for k in (0, 1, 2, 3, 5)]
    cached = replace(fo.PHYSICAL, prefix_cache=fo.ConstantHits(0.36))
    problems = [
        fo.make_problem(CHAT, specs, slo=SLO, assumptions=cached),
        fo.make_problem(CHAT, specs, slo=SLO, serve="any"),
    ]
    best = max(tok_per_j(replace(problem, gamma=gamma)) for problem in problems for gamma in (1.0, None))
    assert last.tok_per_j_fleetopt == pytest.approx(best, rel=1e-6)
    assert apart.service.serve == "any"
