"""Verification: the least instances are found from a guess far off, the best layout wins, and the laws' word is no
limit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from fleetopt_jax._optimize.plan import Plan, require_plan
from fleetopt_jax._optimize.problem import make_problem
from fleetopt_jax._optimize.rivals import Alone, Rivals, contender, simulated_plan
from fleetopt_jax._optimize.search import optimize
from fleetopt_jax._simulate import Standing, Verified, simulate, verify
from fleetopt_jax._simulate.bracket import Bracket
from fleetopt_jax._simulate.trials import Rooms, Seen, judge, rounded
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.fleet.assumptions import PHYSICAL, PUBLISHED
from fleetopt_jax.fleet.fleet import Fleet, Slo, make_fleet, make_slo
from fleetopt_jax.fleet.resources import Budget
from fleetopt_jax.report.simulation import verified_said
from fleetopt_jax.workload.atoms import Workload, make_workload
from tests.test_simulate import engine_of

# --- the bracket ------------------------------------------------------------------------------------------------------


def bracketed(bracket: Bracket, by, unclear: float = 0.0) -> Bracket:
    """Tried until nothing is open; what is within `unclear` of its limit is too close to tell."""
    while bracket.is_open:
        n = bracket.trial
        value = by(n)
        bracket = bracket.after(n, value, "holds" if value <= -unclear else "fails" if value > unclear else "unclear")
    return bracket


@pytest.mark.parametrize("unclear", [0.0, 0.03])
def test_the_least_is_found_from_a_guess_far_off(unclear):
    """By any power of N from a law that is off by half either way, in a few trials."""
    rng, tried = np.random.default_rng(0), []
    for _ in range(300):
        least = int(rng.integers(1, 200))
        at, power = least * rng.uniform(1.0, 3.0), rng.uniform(2.0, 12.0)
        guess = max(1, round(at * rng.uniform(0.5, 1.5)))

        def by(n: int, at=at, power=power) -> float:
            return power * math.log(at / n)

        found = bracketed(Bracket(least, 10 * least + 16, guess), by, unclear)
        holds = [n for n in range(least, 10 * least + 17) if by(n) <= -unclear]
        assert found.passed is not None and found.passed.n == holds[0]
        assert found.bound == holds[0] and not found.hopeless
        tried.append(len(found.tries))
    assert max(tried) <= 12 and np.mean(tried) < 6.5


def test_what_no_number_mends_is_given_up():
    found = bracketed(Bracket(4, 56, 4), lambda n: 0.5)
    assert found.hopeless and found.passed is None and len(found.tries) <= 3
    assert bracketed(Bracket(4, 5, 4), lambda n: 0.1 / n).hopeless


def test_a_winner_that_fails_whole_grows_by_little():
    found = bracketed(Bracket(2, 40, 20), lambda n: 4.0 * math.log(10.5 / n))
    assert found.passed is not None and found.passed.n == 11
    again = found.after(11, 0.0, "unclear")
    assert again.is_open and 12 <= again.trial <= 20
    assert bracketed(again, lambda n: 4.0 * math.log(10.5 / n)).bound == 12


# --- what replications say --------------------------------------------------------------------------------------------


def seen(share: float, n: int = 1000, itl_s: float = 0.05) -> Seen:
    counted = np.full(8, n / 8)
    return Seen(np.round(share * counted), counted, itl_s * n, n)


@pytest.mark.parametrize(
    ("shares", "itl_s", "reading"),
    [
        ((1.0, 1.0), 0.05, "holds"),
        ((0.9, 0.91), 0.05, "fails"),
        ((0.992, 0.992), 0.05, "unclear"),
        ((1.0, 1.0), 0.07, "fails"),
        ((), 0.05, "holds"),
    ],
)
def test_intervals_decide_or_say_that_they_cannot(shares, itl_s, reading):
    slo = make_slo(itl_s=0.06)
    found = judge([seen(share, itl_s=itl_s) for share in shares] or [seen(1.0, n=0)], slo)
    assert found.reading == reading
    assert found.within.low <= found.within.mean <= found.within.high
    assert (found.by > 0) == (reading == "fails")


def test_requests_of_one_burst_are_one_witness():
    """Of 2,000 requests without a miss: enough as they come alone, 20 bursts of 100 are not."""
    readings = [judge([seen(1.0), seen(1.0)], make_slo(), scv) for scv in (0.5, 1.0, 100.0)]
    assert [each.reading for each in readings] == ["holds", "holds", "unclear"]
    assert readings[0] == readings[1]


def test_programs_are_shared_by_pools_that_are_not_much_smaller():
    rooms = Rooms()
    first = rooms.enough(40, 100, 5000)
    assert (first.n_instances, first.n_slots, first.n_requests) == (64, 128, 8192)
    assert rooms.enough(45, 90, 6000) == first != rooms.enough(10, 30, 5000)
    assert rooms.enough(3, 5, 5000) == rooms.enough(60, 30, 8000)
    assert [rounded(n) for n in (1, 2, 3, 5, 7, 9, 13, 17, 25)] == [1, 2, 3, 6, 8, 12, 16, 24, 32]


# --- a race -----------------------------------------------------------------------------------------------------------
# Every pool here runs by one compiled program.

CHAT = make_workload([60, 200, 330, 700], [10, 15, 10, 5], [0.3, 0.4, 0.2, 0.1], arrival_rate_per_s=60.0)
SLO = make_slo(ttft_p99_s=0.3)
FEW = dict(n_requests=1000, n_replications=4)


@dataclass(frozen=True)
class Toy:
    """A layout whose instances cost what they are."""

    fleet: Fleet
    least: tuple[int, ...]
    price: float = 1.0

    def cost(self, n_instances: Sequence[int]) -> float:
        return self.price * float(sum(n_instances))


def toy(windows: Sequence[float], guess: Sequence[int], price: float = 1.0) -> Toy:
    engine = engine_of(base_s=0.01, per_seq_s=1e-4, per_token_s=1e-6, tau1=2e-4, budget=256, max_num_seqs=16)
    fleet = make_fleet([engine] * len(windows), window_tokens=list(windows), n_instances=list(guess))
    return Toy(fleet, (3,) * len(windows), price)


def proposing(*toys: Toy):
    return lambda standings: toys[len(standings)] if len(standings) < len(toys) else None


def verified(*toys: Toy, slo: Slo = SLO, workload: Workload = CHAT) -> Verified:
    return verify(proposing(*toys), workload, PHYSICAL, slo, **FEW)


def last_readings(found: Verified) -> dict[tuple[int, tuple[int, ...]], str]:
    """Of every fleet: what whole simulations say comes after what its trials said."""
    return {(each.rival, each.n_instances): each.reading for each in found.tried}


@pytest.fixture(scope="module")
def one_pool():
    return verified(toy([1000], [6]))


@pytest.mark.parametrize("windows", [[1000], pytest.param([300, 1000], marks=pytest.mark.slow)])
def test_the_answer_holds_and_with_one_instance_fewer_in_any_pool_would_not(one_pool, windows):
    found = one_pool if len(windows) == 1 else verified(toy(windows, [6, 6]))
    assert found.held and found.simulation.slo_held
    n = tuple(int(each) for each in found.fleet.n_instances)
    (standing,) = found.standings
    assert standing.passed == n == standing.bound
    assert any(count > low for count, low in zip(n, standing.rival.least, strict=True))
    assert last_readings(found)[0, n] == "holds"


def test_the_answer_is_no_worse_than_any_fleet_that_was_seen_to_hold(one_pool):
    held = {fleet for fleet, reading in last_readings(one_pool).items() if reading == "holds"}
    assert sum(one_pool.fleet.n_instances) == min(sum(n) for _, n in held)


@pytest.mark.slow
@pytest.mark.parametrize("off", [0.7, pytest.param(1.3, marks=pytest.mark.slow)])
def test_a_guess_that_is_a_third_off_either_way_changes_little(one_pool, off):
    """Only which numbers were too close to tell depends on the way there."""
    (n,) = one_pool.fleet.n_instances
    found = verified(toy([1000], [round(off * n)]))
    assert found.held and abs(found.fleet.n_instances[0] - n) <= 1


@pytest.mark.slow
def test_the_least_of_one_pool_is_what_trying_every_number_finds(one_pool):
    (n,) = (int(each) for each in one_pool.fleet.n_instances)
    for fewer, held in ((n, True), (n - 2, False)):
        fleet = one_pool.fleet.with_instances([fewer])
        assert simulate(fleet, CHAT, PHYSICAL, SLO, **FEW).slo_held == held


@pytest.mark.slow
@pytest.mark.parametrize("dear_first", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_cheaper_layout_wins_and_what_cannot_beat_it_is_not_simulated(one_pool, dear_first):
    cheap, dear = toy([1000], [6]), toy([1000], [6], price=5.0)
    found = verified(dear, cheap) if dear_first else verified(cheap, dear)
    assert found.held and found.fleet.n_instances.tolist() == one_pool.fleet.n_instances.tolist()
    assert found.rival == int(dear_first) and {each.rival for each in found.tried} <= {0, int(dear_first)}


@pytest.mark.slow
def test_limits_of_all_requests_together_are_judged_together():
    found = verified(toy([300, 1000], [6, 6]), slo=make_slo(ttft_p99_s=0.3, scope="fleet"))
    assert found.held and found.simulation.metrics["slo_attainment"].mean >= 0.99


def test_limits_that_no_number_holds_end_soon():
    hard = verified(toy([1000], [6]), slo=make_slo(ttft_p99_s=1e-3))
    assert not hard.held and hard.rounds <= 6
    longer = make_workload([60, 1200], [10, 10], [0.9, 0.1], arrival_rate_per_s=60.0)
    lost = verified(toy([1000], [6]), workload=longer)
    assert not lost.held and lost.simulation.n_rejected > 0


# --- who competes -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan() -> Plan:
    workload = make_workload(
        [200, 500, 1000, 2000, 4000, 8000], [300, 250, 200, 150, 100, 50], [0.3, 0.3, 0.2, 0.1, 0.06, 0.04],
        arrival_rate_per_s=100.0,
    )  # fmt: skip
    spec = EngineSpec("h100", serving="vllm-0.11")
    return require_plan(optimize(make_problem(workload, [spec], n_pools=3, assumptions=PUBLISHED)))


def counts_of(fleet: Fleet) -> tuple[int, ...]:
    return tuple(int(n) for n in fleet.n_instances)


@pytest.mark.slow
def test_the_laws_best_of_every_pool_count_compete_first(plan):
    propose, standings = Rivals(plan), []
    while len(standings) < 3 and (rival := propose(standings)):
        standings.append(Standing(rival, rival.least, None))
    first, *others = (each.rival for each in standings)
    assert first.fleet.window_tokens.tolist() == plan.fleet.window_tokens.tolist()
    assert counts_of(first.fleet) == counts_of(plan.fleet)
    assert first.cost(counts_of(first.fleet)) == pytest.approx(plan.cost, rel=1e-6)
    assert {len(each.fleet.lanes) for each in (first, *others)} == {1, 2, 3}
    assert all(n >= low for each in (first, *others) for n, low in zip(counts_of(each.fleet), each.least, strict=True))


def test_where_the_laws_are_right_nothing_else_is_tried(plan):
    propose, standings = Rivals(plan), []
    while rival := propose(standings):
        standings.append(Standing(rival, rival.least, counts_of(rival.fleet)))
    assert len(standings) == 3


def test_what_trials_need_of_a_pool_is_expected_of_pools_alike(plan):
    """Between what is known, and of what was tried itself nearly that."""
    rivals = Rivals(plan)
    standings = []
    for times in (1, 2):
        rival = rivals(standings)
        needed = tuple(times * n for n in counts_of(rival.fleet))
        standings.append(Standing(rival, needed, needed))
    (expected,), _ = rivals._corrected(standings)
    for standing, times in zip(standings, (1, 2), strict=True):
        for (_, i, j), n in zip(standing.rival.edges, counts_of(standing.rival.fleet), strict=True):
            assert n <= rivals._table(expected, i, j) <= 2 * n
            assert rivals._table(expected, i, j) == pytest.approx(times * n, rel=0.2, abs=1.0)


def test_a_hardened_plan_competes_alone_and_keeps_its_instances(plan):
    floor = counts_of(plan.fleet)
    propose = Alone(plan, floor=floor)
    rival = propose([])
    assert rival is not None and rival.least == floor and propose([Standing(rival, floor, None)]) is None


def test_a_budget_forbids_fleets_beyond_it(plan):
    n = counts_of(plan.fleet)
    capped = replace(plan.problem, budget=Budget(max_gpus=8.0 * sum(n)))
    rival = contender(capped, plan.specs, plan.fleet)
    assert rival.cost(n) < math.inf and rival.cost([10 * each for each in n]) == math.inf


def test_what_a_simulation_holds_the_laws_do_not_forbid(plan):
    """Nor is it compared with their best one-pool fleet, but with the simulation's."""
    tight = replace(plan.problem, services=(replace(plan.problem.service, slo=make_slo(ttft_p99_s=0.001)),))
    given = replace(plan, problem=tight)
    n = [int(each) + 1 for each in plan.fleet.n_instances]
    alone = contender(tight, plan.specs[:1], tight.fleet(plan.specs[:1], [tight.window_tokens], [1.0], [200.0]))
    standing = Standing(alone, (200,), (200,))
    for held in (True, False):
        found = simulated_plan(given, plan.specs, plan.fleet.with_instances(np.array(n, float)), [standing], held=held)
        assert (found.binding is None) == held and counts_of(found.fleet) == tuple(n)
        assert found.one_pool is not None and found.one_pool.n_instances == 200


# --- what is said -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("windows", "counts", "verdict", "said"),
    [
        ([900, 4000], [3, 4], "holds", "It is the laws' plan as it stands."),
        ([900, 4000], [3, 2], "fails", "and does not hold: pool 2 takes 2 instances more."),
        ([900, 4000], [4, 4], "holds", "and holds, too: pool 1 takes 1 instance fewer."),
        ([4000], [9], "unclear", "The laws' plan is another and is too close to tell: 9 instances, 72 GPUs"),
    ],
)
def test_what_verification_changed_is_said(windows, counts, verdict, said):
    laws = {"window_tokens": windows, "gpu": ["h100"] * len(windows), "n_instances": counts, "n_gpus": 8 * sum(counts)}
    verified = {
        "held": True,
        "n_tried": 5,
        "metrics": {"ttft_p99_s": {"simulated": 0.4, "ci95": [0.39, 0.42]}},
        "laws": laws,
        "tried": [laws | {"verdict": verdict}],
    }
    pools = [{"window_tokens": w, "gpu": "h100", "n_instances": n} for w, n in ((900, 3), (4000, 4))]
    document = {"verified": verified, "pools": pools, "slo": {"ttft_p99_s": 0.5, "ttft_s_per_token": 0.0}}
    text = verified_said(document)
    assert said in text and "P99 TTFT 400 ms (390 ms to 420 ms), limit 500 ms; 5 fleets tried" in text
    assert verified_said({**document, "verified": verified | {"held": False}}).startswith("No fleet was seen to hold")
