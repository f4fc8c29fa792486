"""What may be down: the count of failures, pools sized for it by every search, what a plan can lose, how it is said."""

import itertools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brute_force import LONGEST, few_lengths, with_less_kv
from jax.test_util import check_grads

from fleetopt_jax._optimize.failures import resilience
from fleetopt_jax._optimize.plan import Infeasible, Plan, require_plan
from fleetopt_jax._optimize.problem import Problem, make_problem
from fleetopt_jax._optimize.search import evaluate_given, optimize
from fleetopt_jax._simulate import simulate
from fleetopt_jax._simulate.outages import Outage, Outages, draw_outages, merged, standings
from fleetopt_jax.catalog.engines import build
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.cli.codes import BAD_INPUT
from fleetopt_jax.cli.main import main
from fleetopt_jax.core.units import HOUR_S
from fleetopt_jax.documents.failures import failures_to_json
from fleetopt_jax.documents.plan import load_plan, plan_to_json, save_plan
from fleetopt_jax.fleet.assumptions import PHYSICAL, PUBLISHED
from fleetopt_jax.fleet.evaluate import evaluate
from fleetopt_jax.fleet.fleet import make_fleet, make_slo
from fleetopt_jax.fleet.reserve import Failures, Reserve, make_failures, make_spares, make_target
from fleetopt_jax.fleet.resources import make_budget
from fleetopt_jax.fleet.sizing import size_fleet
from fleetopt_jax.fleet.surroundings import make_surroundings
from fleetopt_jax.laws.availability import (
    availability,
    down_pmf,
    instance_availability,
    instances_on_node,
    most_down,
    node_down_pmf,
)
from fleetopt_jax.report.decision import decision
from fleetopt_jax.report.failures import of_time, reserve_said
from fleetopt_jax.workload.atoms import make_workload

OFTEN = make_failures(repair_h=24.0, gpu_mtbf_h=8000.0, node_mtbf_h=3000.0)
LASTING = make_failures(repair_h=24.0, gpu_mtbf_h=1600.0, node_mtbf_h=600.0)


# --- an independent count: plain Python, nodes that are up first, then the instances on them ------------------------


def binomial(n: int, k: int, p: float) -> float:
    return math.comb(n, k) * p**k * (1.0 - p) ** (n - k) if 0 <= k <= n else 0.0


def counted(n: int, gpus: int, of: Failures) -> list[float]:
    """P(0, 1, ... n instances are down)."""
    gpu_up, node_up = (mtbf / (mtbf + of.repair_h) for mtbf in (of.gpu_mtbf_h, of.node_mtbf_h))
    if gpus > of.gpus_per_node:  # each alone on its nodes, and up with all of them
        up = gpu_up**gpus * node_up ** -(-gpus // of.gpus_per_node)
        return [binomial(n, n - down, up) for down in range(n + 1)]
    per_node, up = of.gpus_per_node // gpus, gpu_up**gpus
    full, rest = divmod(n, per_node)
    found = [0.0] * (n + 1)
    for nodes_up in range(full + 1):
        for last_up in (False, True) if rest else (True,):
            hosted = nodes_up * per_node + (rest if last_up else 0)
            chance = binomial(full, nodes_up, node_up) * ((node_up if last_up else 1.0 - node_up) if rest else 1.0)
            for running in range(hosted + 1):
                found[n - running] += chance * binomial(hosted, running, up)
    return found


def fewest_for(n_up: int, gpus: int, of: Failures, share: float) -> int:
    """The fewest instances of which that many are up that much of the time."""
    return next(n for n in itertools.count(n_up) if sum(counted(n, gpus, of)[: n - n_up + 1]) >= share)


@pytest.mark.parametrize("gpus", [1, 2, 3, 4, 8, 16])
def test_failures_are_counted_as_node_by_node_and_instance_by_instance(gpus):
    on_node, up = OFTEN.instances_on_node(gpus), OFTEN.instance_up(gpus)
    for n in (1, 5, 8, 21):
        assert np.allclose(OFTEN.down_pmf(n, gpus), counted(n, gpus, OFTEN), rtol=0, atol=1e-14)
    for share in (0.9, 0.999):
        down = most_down(share, on_node, up, OFTEN.node_up, 60)
        plain = [next(d for d in range(n + 1) if sum(counted(n, gpus, OFTEN)[: d + 1]) >= share) for n in range(61)]
        assert down.tolist() == plain
        more, left = np.diff(down), np.diff(np.arange(61) - down)
        assert (more >= 0).all() and (left >= 0).all()  # another instance is never worse


def test_availability_and_the_distribution_have_derivatives_and_ends():
    assert float(availability(math.inf, 24.0)) == float(availability(1.0, 0.0)) == 1.0
    assert instances_on_node(3, 8) == 2 and instances_on_node(16, 8) == 1
    assert np.allclose(node_down_pmf(4, 1.0, 1.0), [1, 0, 0, 0, 0])
    assert np.allclose(node_down_pmf(4, 1.0, 0.9), [0.9, 0, 0, 0, 0.1])
    assert np.allclose(down_pmf(7, 4, 0.0, 1.0), np.arange(8) == 7)

    def holds(mtbf_h, repair_h):
        gpu_up = availability(mtbf_h, repair_h)
        up = instance_availability(gpu_up, availability(0.4 * mtbf_h, repair_h), 4, 8)
        return jnp.sum(down_pmf(9, 2, up, gpu_up)[:3])

    check_grads(holds, (jnp.asarray(500.0), jnp.asarray(24.0)), order=2, modes=["rev"], atol=1e-6, rtol=1e-6)
    slope = jax.grad(lambda up: down_pmf(9, 2, up, 1.0)[0])
    assert np.isfinite([slope(0.0), slope(1.0)]).all() and float(slope(1.0)) == pytest.approx(9.0)


@pytest.mark.slow
def test_a_reserve_says_what_is_up_and_what_is_needed():
    spares = make_spares(instances=1, nodes=2)
    assert [float(spares.needed(10, gpus)) for gpus in (1, 4, 8, 16)] == [27, 15, 13, 13]
    assert float(spares.up(2, 8)) == 0.0 and float(spares.needed(0.0, 8)) == 0.0
    target = make_target(0.999, OFTEN, [4, 8])
    for gpus in (4, 8):
        n_up = np.array([1, 2, 7, 30, 100])
        n = jax.jit(jax.vmap(target.needed, (0, None)))(n_up, gpus)
        assert n.tolist() == [fewest_for(int(up), gpus, OFTEN, 0.999) for up in n_up]
        assert (target.up(n, gpus) >= n_up).all() and (target.up(n - 1.0, gpus) < n_up).all()
    assert float(target.up(1e4, 2)) == 0.0  # of an instance that the table is not for nothing is sure
    assert float(target.serving({2}).up(1e4, 2)) > 9000.0
    beyond = np.array([4090.0, 4097.0, 9000.0])
    assert (np.diff(target.up(beyond, 8) / beyond) >= -1e-3).all()
    n = target.needed(9000.0, 8)
    assert float(target.up(n, 8)) >= 9000.0 > float(target.up(n - 1.0, 8))


# --- searches -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problem(h100, b200) -> Problem:
    specs = [with_less_kv(replace(each, tp=tp)) for each, tp in ((h100, 8), (b200, 4))]
    return make_problem(few_lengths(), specs, assume="published", assumptions=PUBLISHED, objective="usd")


def with_reserve(problem: Problem, reserve: Reserve | None) -> Problem:
    return replace(problem, surroundings=replace(problem.surroundings, reserve=reserve))


RESERVES = {
    "an instance": make_spares(instances=1),
    "two, and a node": make_spares(instances=2, nodes=1),
    "of the time": make_target(0.999, OFTEN, [8]),
}


def needed_by_hand(name: str, n_up: int, gpus: int) -> int:
    match name:
        case "an instance":
            return n_up + 1
        case "two, and a node":
            return n_up + 2 + 8 // gpus
        case _:
            return fewest_for(n_up, gpus, OFTEN, 0.999)


@pytest.fixture(scope="module")
def all_up(problem) -> list:
    """Every fleet of two pools over the candidate thresholds, sized with nothing down."""
    windows = [*np.unique(np.ceil(np.asarray(problem.workload.prompt_tokens + problem.workload.output_tokens)))]
    size = jax.jit(lambda fleet: size_fleet(fleet, problem.workload, problem.slo, PUBLISHED).n_instances)
    found = []
    for chosen in itertools.product(problem.specs, repeat=2):
        for window in [*windows[:-1:2], LONGEST]:
            fleet = problem.fleet(chosen, [window, problem.window_tokens], [1.0, 1.0], [1.0, 1.0])
            found.append((chosen, fleet, np.asarray(size(fleet))))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if "and" in name else pytest.mark.nightly) for name in RESERVES]
)
def test_searches_agree_with_fleets_sized_by_hand(problem, all_up, name):
    take = jax.jit(lambda fleet: evaluate(fleet, problem.workload, PUBLISHED, quantiles=False).usd_per_h)
    costs = []
    for chosen, fleet, n_up in all_up:
        if np.isfinite(n_up).all() and n_up[1] > 0:
            n = [needed_by_hand(name, int(n), spec.split.n_gpus) if n else 0 for n, spec in zip(n_up, chosen)]
            costs.append(float(take(fleet.with_instances(np.array(n, float)))))
    asked = with_reserve(problem, RESERVES[name])
    exact, grid = (require_plan(optimize(asked, method)) for method in ("exact", "grid"))
    assert exact.status == "optimal"
    assert exact.cost == pytest.approx(grid.cost, rel=1e-9)
    assert exact.cost <= min(costs) * (1.0 + 1e-9)  # by hand over every other threshold
    bare = require_plan(optimize(problem))
    assert bare.cost < exact.cost
    # The same pools, less what is down, hold; less one more, they do not.
    given = {"window_tokens": exact.fleet.window_tokens.tolist(), "gamma": exact.fleet.gamma.tolist()}
    n = np.asarray(exact.fleet.n_instances)
    sized = size_fleet(replace(exact.fleet, surroundings=problem.around), problem.workload, problem.slo, PUBLISHED)
    gpus = [spec.split.n_gpus for spec in exact.specs]
    by_hand = [needed_by_hand(name, int(up), g) for up, g in zip(sized.n_instances, gpus, strict=True)]
    assert n.tolist() == by_hand
    as_given = evaluate_given(asked, exact.lanes, **given, n_instances=n.tolist())
    assert as_given.binding is None and as_given.cost == pytest.approx(exact.cost, rel=1e-12)
    assert evaluate_given(asked, exact.lanes, **given, n_instances=(n - 1).tolist()).status == "infeasible"


@pytest.mark.slow
def test_the_gradient_search_keeps_the_spares(problem):
    asked = with_reserve(problem, RESERVES["an instance"])
    found, exact = require_plan(optimize(asked, "gradient")), require_plan(optimize(asked))
    assert found.binding is None and exact.cost <= found.cost * (1.0 + 1e-9) <= 1.05 * exact.cost


@pytest.mark.slow
def test_nothing_that_may_be_down_changes_no_bit(problem):
    bare, none = (require_plan(optimize(with_reserve(problem, r))) for r in (None, make_spares()))
    assert bare.fleet.n_instances.tolist() == none.fleet.n_instances.tolist()
    assert bare.cost == none.cost


@pytest.mark.slow
def test_what_is_left_holds_and_all_of_it_takes(workload):
    engine, windows = build(EngineSpec("h100")), [2048, 20480]
    around = make_surroundings(reserve=make_spares(instances=1))

    def metrics(n, surroundings=None):
        fleet = make_fleet([engine] * 2, window_tokens=windows, n_instances=n, surroundings=surroundings)
        return evaluate(fleet, workload, PHYSICAL)

    asked, left, whole = metrics([6, 9], around), metrics([5, 8]), metrics([6, 9])
    for name in ("utilization", "ttft_p99_s", "itl_s", "itl_p99_s", "wait_s"):
        assert np.allclose(getattr(asked.pools, name), getattr(left.pools, name), rtol=1e-12)
    for name in ("power_w", "usd_per_h", "n_gpus", "n_active", "tok_per_j", "n_instances"):
        assert np.allclose(getattr(asked.pools, name), getattr(whole.pools, name), rtol=1e-12)
    assert float(metrics([1, 9], around).utilization) == math.inf  # nothing is left of the first pool


# --- answers --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan(problem) -> Plan:
    asked = with_reserve(replace(problem, rates=OFTEN), RESERVES["an instance"])
    return require_plan(optimize(asked))


def test_a_plan_says_what_it_can_lose_and_what_a_spare_costs(problem, plan):
    found, n = resilience(plan), np.asarray(plan.fleet.n_instances)
    assert found is not None
    given = {"window_tokens": plan.fleet.window_tokens.tolist(), "gamma": plan.fleet.gamma.tolist()}

    def bare(n_instances):
        return evaluate_given(problem, plan.lanes, **given, n_instances=n_instances.tolist())

    for losses, spec in zip(found.pools, plan.specs, strict=True):
        at = np.arange(len(n)) == losses.pool
        assert losses.may_lose >= 1
        assert bare(n - losses.may_lose * at).binding is None
        assert bare(n - (losses.may_lose + 1) * at).binding == losses.then
        whole = int(n[losses.pool])
        counts = counted(whole, spec.split.n_gpus, OFTEN)
        assert losses.holds_frac == pytest.approx(sum(counts[: losses.may_lose + 1]), rel=1e-12)
    assert found.spare.power_w == pytest.approx(float(bare(n + 1).metrics.power_w - bare(n).metrics.power_w), rel=1e-9)
    assert found.holds_frac == pytest.approx(math.prod(each.holds_frac for each in found.pools))
    assert resilience(bare(np.maximum(n - 3, 1))) is None
    said = decision(plan_to_json(plan) | failures_to_json(plan))["If some fail"]
    assert "down" in said and "of the time" in said and "one more spare in every pool takes" in said.lower()
    assert reserve_said(plan_to_json(plan)).startswith("Limits hold with 1 instance of every pool down")
    assert [of_time(share) for share in (0.9, 0.99899, 0.999999)] == ["90.00 %", "99.90 %", "99.9999 %"]


@pytest.mark.parametrize("name", ["an instance", pytest.param("of the time", marks=pytest.mark.slow)])
def test_a_plan_is_read_back_with_what_may_be_down(problem, h100, name, tmp_path):
    asked = with_reserve(replace(problem, rates=OFTEN).serving(specs=(h100,)), RESERVES[name])
    plan = require_plan(optimize(asked))
    save_plan(plan, tmp_path / "plan.json")
    again = load_plan(tmp_path / "plan.json", workload=problem.workload)
    assert again.status == "optimal" and again.problem.rates == OFTEN
    assert plan_to_json(again)["reserve"] == plan_to_json(plan)["reserve"]
    assert float(again.metrics.ttft_p99_s) == pytest.approx(float(plan.metrics.ttft_p99_s), rel=1e-12)


def test_more_spares_than_a_budget_allows_are_infeasible(problem):
    n_gpus = float(require_plan(optimize(problem)).metrics.n_gpus)
    tight = replace(problem, budget=make_budget(max_gpus=n_gpus))
    assert isinstance(optimize(tight), Plan)
    refused = optimize(with_reserve(tight, make_spares(instances=2)))
    assert isinstance(refused, Infeasible) and refused.binding.limit == "max_gpus"
    assert refused.binding.nearest_feasible > n_gpus


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--spare", "-1"], "--spare"),
        (["--spare", "1.5"], "--spare"),
        (["--availability", "1", "--repair-h", "24"], "--availability"),
        (["--availability", "0.999"], "--availability: nobody said how long a repair takes; need --repair-h"),
        (["--availability", "0.99", "--repair-h", "24", "--spare", "1"], "--availability: not read with --spare"),
        (["--gpu-mtbf-h", "9"], "--gpu-mtbf-h: only read with --repair-h"),
        (["--gpu-mtbf-h", "-9", "--repair-h", "1"], "--gpu-mtbf-h"),
        (["--repair-h", "-1"], "--repair-h"),
        (["--spare", "1", "--verify"], "--verify: not read with --spare"),
    ],
)
def test_bad_input_is_refused_in_a_line(words, said, capsys):
    try:
        code = main(["optimize", "--rate", "5", *words])
    except SystemExit as refused:  # by the parser
        code = refused.code
    assert code == BAD_INPUT
    out, err = capsys.readouterr()
    assert not out and said in err and "Traceback" not in err


# --- in simulation --------------------------------------------------------------------------------------------------


def test_outages_are_as_frequent_and_as_long_as_their_rates_say():
    assert merged([(5.0, 6.0), (1.0, 3.0), (2.0, 4.0), (4.0, 4.5)]) == [(1.0, 4.5), (5.0, 6.0)]
    horizon_s, n = np.full(40, 400 * HOUR_S), 13
    found = draw_outages(OFTEN, n, 4, horizon_s, seed=1)
    assert found == draw_outages(OFTEN, n, 4, horizon_s, seed=1) != draw_outages(OFTEN, n, 4, horizon_s, seed=2)
    mean_down = np.dot(counted(n, 4, OFTEN), np.arange(n + 1.0)) / n
    window_s = np.stack([0.0 * horizon_s, horizon_s], axis=1)
    assert 1.0 - found.up_frac(window_s, n) == pytest.approx(mean_down, rel=0.15)
    # From the beginning on, as in the long run: the count of those that are down at once.
    down = [np.sum(draw_outages(OFTEN, n, 4, np.ones(1), 0, r).down_until(0, n, 0.5) > 0) for r in range(2000)]
    shares = np.bincount(down, minlength=n + 1) / len(down)
    assert np.allclose(shares, counted(n, 4, OFTEN), atol=4.0 * 0.5 / math.sqrt(len(down)))
    ticks = np.linspace(0.0, 10.0, 101)[:, None]
    one = Outages((Outage(0, 1, 2.05, 4.0),))
    before, while_down, after = standings(one, ticks, np.array([True, True, False]))
    assert (before.first, while_down.first, after.first, after.last) == (0, 21, 40, 101)
    assert while_down.down.tolist() == [[False, True, True]] and while_down.n_up.tolist() == [1]
    assert after.order.tolist() == [[0, 1, 2]]


@pytest.fixture(scope="module")
def few():
    chat = make_workload([500, 4000], [100, 150], [0.9, 0.1], arrival_rate_per_s=20.0)
    return chat, make_fleet([build(EngineSpec("h100"))], window_tokens=[4400], n_instances=[4])


@pytest.mark.slow
def test_requests_of_what_dies_are_served_elsewhere(few):
    chat, fleet = few
    how = {"n_requests": 800, "n_replications": 2}
    of = make_failures(repair_h=8 / HOUR_S, gpu_mtbf_h=200 / HOUR_S, node_mtbf_h=200 / HOUR_S)
    calm, dying = (simulate(fleet, chat, failures=failures, **how) for failures in (None, of))
    assert dying.n_outages > 3 and 0.5 < dying.up_frac[0] < 1.0 and calm.up_frac == ()
    assert dying.n_completed == dying.n_arrivals == 1600
    assert dying.metrics["slo_attainment"].mean < calm.metrics["slo_attainment"].mean
    assert dying.metrics["power_w"].mean < calm.metrics["power_w"].mean
    never = make_failures(repair_h=1.0, gpu_mtbf_h=math.inf, node_mtbf_h=math.inf)
    for name, estimate in simulate(fleet, chat, failures=never, **how).metrics.items():
        assert estimate == calm.metrics[name]  # who fails never is dispatched, run and counted as ever
    fewer = fleet.with_instances(np.array([3.0]))
    assert simulate(fleet, chat, down=1, **how).metrics == simulate(fewer, chat, **how).metrics
    with pytest.raises(ValueError, match="need fewer, so that some are left"):
        simulate(fleet, chat, down=4, **how)


@pytest.mark.nightly
def test_a_fleet_with_spares_holds_in_simulation_as_often_as_counted(few):
    """Failures that last for much longer than a run: a replication holds where no more are down than may be."""
    chat, _ = few
    problem = make_problem(chat, [EngineSpec("h100")], n_pools=1, slo=make_slo(ttft_p99_s=1.0))
    asked = replace(with_reserve(problem, make_spares(instances=1)), rates=LASTING)
    plan = require_plan(optimize(asked))
    found = resilience(plan)
    assert found is not None and found.holds_frac is not None
    n, n_rows = int(plan.metrics.n_instances), 48
    seen = simulate(plan.fleet, chat, slo=problem.slo, n_requests=1500, n_replications=n_rows, failures=LASTING, seed=3)
    drawn = draw_outages(LASTING, n, 8, np.full(n_rows, 300.0), seed=3)
    down = np.array([np.sum(drawn.down_until(r, n, 0.0) > 0) for r in range(n_rows)])
    holds = np.array(seen.ttft_p99_s) <= 1.0
    assert holds[down <= 1].mean() >= 0.9  # N + 1: with one down it holds
    assert not holds[down > found.pools[0].may_lose + 1].any()
    assert abs(holds.mean() - found.holds_frac) <= 3.0 * math.sqrt(found.holds_frac * (1.0 - found.holds_frac) / n_rows)
