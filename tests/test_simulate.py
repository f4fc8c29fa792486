"""The simulator against queueing theory, hand computation, a naive scheduler, and its own conservation laws."""

from collections import deque
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import poisson

from fleetopt_jax._simulate import draw_requests, replay_requests, simulate
from fleetopt_jax._simulate.batching import advance
from fleetopt_jax._simulate.dispatch import Balancer, dispatch
from fleetopt_jax._simulate.pool import Pool, PoolRequests, PoolRun, request_table, run_pool
from fleetopt_jax._simulate.routing import REJECTED, route_requests
from fleetopt_jax._simulate.state import N_GAPS, Scheduler, State, empty_state, gap_bin
from fleetopt_jax.calibrate.predict import limits_of, parts_of
from fleetopt_jax.catalog.engines import build
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.core.struct import pytree
from fleetopt_jax.fleet.assumptions import DISPATCHES, PHYSICAL, PRESETS
from fleetopt_jax.fleet.choices.dispatch import Dispatch, Queues
from fleetopt_jax.fleet.choices.routing_key import PromptAndLimit
from fleetopt_jax.fleet.engine import Engine, make_engine
from fleetopt_jax.fleet.fleet import Fleet, make_fleet
from fleetopt_jax.fleet.step_law import step_law_of
from fleetopt_jax.fleet.surroundings import make_site, make_surroundings
from fleetopt_jax.fleet.traffic import route
from fleetopt_jax.laws.closed_loop import Benchmark, lengths, schedule
from fleetopt_jax.laws.compression import make_compressor
from fleetopt_jax.laws.decode import DecodeLaw, make_decode_step
from fleetopt_jax.laws.kv_cache import make_kv_capacity
from fleetopt_jax.laws.mixed_step import StepBatch
from fleetopt_jax.laws.power import make_logistic_power
from fleetopt_jax.laws.prefill import make_prefill
from fleetopt_jax.laws.queueing import erlang_c, mean_wait_s
from fleetopt_jax.workload.atoms import Workload, make_workload, mean_tokens
from fleetopt_jax.workload.readers import Trace

FOREVER_S = 1e9
IN_TURN = Balancer(DISPATCHES["round_robin"])
ERRORS = 4.0  # standard errors that may lie between a simulated mean and theory


def engine_of(
    *,
    base_s=0.01,
    per_seq_s=0.0,
    per_token_s=0.0,
    windowed_token_s=0.0,
    window_tokens=0.0,
    tau1=1e-15,
    tau2=0.0,
    budget=1e6,
    first_token_s=0.0,
    n_blocks=1e6,
    max_num_seqs=1024.0,
) -> Engine:
    """Without arguments: a constant step, prompts for nothing and all at once."""
    step = make_decode_step(
        base_s=base_s,
        per_seq_s=per_seq_s,
        per_token_s=per_token_s,
        windowed_token_s=windowed_token_s,
        window_tokens=window_tokens,
    )
    prefill = make_prefill(
        chunk_tokens=512,
        calibration_tokens=4096,
        per_token_s=tau1,
        per_token2_s=tau2,
        budget_tokens=budget,
        gpu_w=600,
        first_token_s=first_token_s,
    )
    power = make_logistic_power(idle_w=300, nominal_w=600, log2_half_batch=4.2)
    kv = make_kv_capacity(n_blocks=n_blocks, max_num_seqs=max_num_seqs)
    return make_engine(step, kv, power, prefill, gpus_per_instance=1, usd_per_gpu_h=1, idle_w=60)


def scheduler_of(n_rows: int, *, slots=8, n_blocks=np.inf, fixed_tokens=0.0, window_s=(0.0, FOREVER_S)) -> Scheduler:
    return Scheduler(
        max_num_seqs=jnp.asarray(slots, jnp.int32),
        n_blocks=jnp.asarray(n_blocks, float),
        fixed_tokens=jnp.asarray(fixed_tokens, float),
        window_s=jnp.tile(jnp.asarray(window_s, float), (n_rows, 1)),
    )


Row = list[tuple[float, int, int]]  # (arrival_s, prompt, output) of requests
N_ROWS, N_COLUMNS = 4, 16  # one shape for all small runs: they share one compilation


def requests_of(rows: list[Row]) -> PoolRequests:
    arrival_s = np.full((N_ROWS, N_COLUMNS), np.inf)
    prompt, output = (np.zeros((N_ROWS, N_COLUMNS), int) for _ in range(2))
    for r, row in enumerate(rows):
        for i, request in enumerate(row):
            arrival_s[r, i], prompt[r, i], output[r, i] = request
    return PoolRequests(arrival_s, prompt, output)


def run_rows(engine: Engine, rows: list[Row], *, horizon_s=FOREVER_S, n_slots=8, **how) -> PoolRun:
    """Each row on an instance of its own."""
    horizons_s = np.full(N_ROWS, horizon_s)
    pool = Pool(engine, scheduler_of(N_ROWS, **how), 1)
    return run_pool(pool, requests_of(rows), horizons_s, IN_TURN, n_slots=n_slots)


def random_rows(rng: np.random.Generator, *, longest=90, gap_s=0.02, n_requests=N_COLUMNS) -> list[Row]:
    """Requests of at most `longest` tokens."""
    rows = []
    for _ in range(N_ROWS):
        total, share = rng.integers(2, longest + 1, n_requests), rng.random(n_requests)
        prompt = np.clip((share * total).astype(int), 1, total - 1)
        arrival_s = np.cumsum(rng.exponential(gap_s, n_requests))
        rows.append(list(zip(arrival_s.tolist(), prompt.tolist(), (total - prompt).tolist())))
    return rows


# --- queueing theory ------------------------------------------------------------------------------------------------
# A constant step and no prefill make an instance with c slots an M/G/c queue whose service is output times step. Every
# run starts in the stationary state, so that no warm-up need be cut off and replications have no bias.

STEP_S = 0.01


def geometric(rng: np.random.Generator, n: int, mean: int) -> np.ndarray:
    return rng.geometric(1.0 / mean, n)


def constant(rng: np.random.Generator, n: int, mean: int) -> np.ndarray:
    return np.full(n, mean)


def uniform(rng: np.random.Generator, n: int, mean: int) -> np.ndarray:
    return rng.integers(1, 2 * mean, n)


SERVICE_SCV = {geometric: lambda m: 1.0 - 1.0 / m, constant: lambda m: 0.0, uniform: lambda m: (m - 1) / (3.0 * m)}


def scipy_erlang_c(c: int, load: float) -> float:
    blocked = poisson.pmf(c, load) / poisson.cdf(c, load)
    return float(blocked / (1.0 - load / c * (1.0 - blocked)))


def found_outputs(rng: np.random.Generator, draw, c: int, utilization: float, mean: int) -> np.ndarray:
    """Outputs still to come at time 0 of those in an M/G/c queue."""
    if draw is geometric:  # without memory: a number of fresh requests, from the distribution of M/M/c
        n = np.arange(c + int(20.0 / -np.log(utilization)))
        level = poisson.pmf(np.minimum(n, c), c * utilization) * utilization ** np.maximum(n - c, 0)
        return draw(rng, rng.choice(n, p=level / level.sum()), mean)
    # One server: the work of a geometric number of residual services (Benes), all as one request.
    services = rng.choice(sizes := draw(rng, 1000, mean), rng.geometric(1.0 - utilization) - 1, p=sizes / sizes.sum())
    return np.maximum(rng.poisson(np.sum(services * rng.random(len(services))), 1), 1)


def queue(c: int, groups: list[tuple], mean: int, n_rows: int, n: int, seed=0) -> tuple[PoolRequests, PoolRun]:
    """`n_rows` replications of each group (draw, utilisation), `n` arrivals each, in one run."""
    rng, rows = np.random.default_rng(seed), []
    for draw, utilization in groups:
        for _ in range(n_rows):
            found = found_outputs(rng, draw, c, utilization, mean)
            later = np.cumsum(rng.exponential(mean * STEP_S / (c * utilization), n))
            rows.append((np.append(np.zeros(len(found)), later), np.append(found, draw(rng, n, mean))))
    width = max(len(row[0]) for row in rows)
    arrival_s, output = np.full((len(rows), width), np.inf), np.zeros((len(rows), width), int)
    for r, (times, outputs) in enumerate(rows):
        arrival_s[r, : len(times)], output[r, : len(times)] = times, outputs
    requests = PoolRequests(arrival_s, np.minimum(output, 1), output)
    horizons_s = np.full(len(rows), FOREVER_S)
    pool = Pool(engine_of(base_s=STEP_S), scheduler_of(len(rows), slots=c), 1)
    return requests, run_pool(pool, requests, horizons_s, IN_TURN, n_slots=c)


def near(values: list[float], expected: float, what: object, least_error: float = 0.0) -> None:
    error = max(np.std(values, ddof=1) / np.sqrt(len(values)), least_error)
    assert abs(np.mean(values) - expected) <= ERRORS * error, (what, np.mean(values), expected, error)


def check_queue(c: int, groups: list[tuple], mean: int, n_rows: int, n: int) -> None:
    requests, run = queue(c, groups, mean, n_rows, n)
    service_s = mean * STEP_S
    for g, (draw, utilization) in enumerate(groups):
        waits_s, waiting, in_system = [], [], []
        rate = c * utilization / service_s
        for r in range(g * n_rows, (g + 1) * n_rows):
            arrival_s, admit_s, last_s = (x[r] for x in (requests.arrival_s, run.admit_s, run.last_s))
            new = np.isfinite(arrival_s) & (arrival_s > 0)
            assert np.isfinite(last_s[new]).all()
            wait_s = admit_s[new] - arrival_s[new]
            there = np.flatnonzero(new) - np.searchsorted(np.sort(last_s), arrival_s[new], side="right")
            end_s = 0.9 * n / rate
            number = np.sum(np.clip(last_s, None, end_s)[arrival_s < end_s] - arrival_s[arrival_s < end_s]) / end_s
            if c == 1:  # iterations begin with the first arrival: whole steps, and no boundary to wait for
                waits_s.append(wait_s.mean())
                waiting.append(np.mean(wait_s > 1e-9))
                in_system.append(number)
            else:
                # Who comes during an iteration waits for its end, half a step in the mean, be a slot free or not:
                # beside the theory's wait, and in the system. Departures come at the end of the step they would be
                # spread over: who finds all slots taken is too many by half a step's departures, who is still waiting
                # after that iteration too few by as many.
                waits_s.append(np.mean(wait_s - STEP_S / 2.0 * (wait_s > 0)))
                missed = wait_s > STEP_S * (1.0 + 1e-6)
                waiting.append((np.mean(missed) + np.mean(there >= c)) / 2.0)
                in_system.append(number - rate * STEP_S / 2.0 * np.mean(wait_s > 0))
        scv = SERVICE_SCV[draw](mean) if c == 1 else 1.0
        expected_s = float(mean_wait_s(c, rate, service_s, scv))
        waits = scipy_erlang_c(c, rate * service_s)
        assert float(erlang_c(c, rate * service_s)) == pytest.approx(waits, rel=1e-9)
        near(waits_s, expected_s, (c, draw.__name__, utilization, "wait"))
        seldom = np.sqrt(waits / (n * n_rows))  # of events so rare that none was seen
        near(waiting, waits, (c, draw.__name__, utilization, "waiting"), seldom)
        if draw is geometric:  # elsewhere the work found at time 0 is one request, whatever it was
            near(in_system, rate * (expected_s + service_s), (c, draw.__name__, utilization, "number"))


UTILIZATIONS = (0.5, 0.8, 0.95)


@pytest.mark.slow
def test_one_slot_is_an_m_g_1_queue():
    """M/M/1, M/D/1 and M/G/1 (Pollaczek-Khinchine), all in one run; outputs are whole, so is their variance."""
    check_queue(1, [(draw, u) for draw in SERVICE_SCV for u in UTILIZATIONS], mean=20, n_rows=12, n=600)


@pytest.mark.slow
def test_one_slot_is_an_m_g_1_queue_more_exactly():
    check_queue(1, [(draw, u) for draw in SERVICE_SCV for u in UTILIZATIONS], mean=20, n_rows=16, n=2500)


@pytest.mark.slow
@pytest.mark.parametrize(("c", "n"), [(4, 2000), (64, 5000)])
def test_many_slots_are_an_m_m_c_queue(c, n):
    check_queue(c, [(geometric, u) for u in UTILIZATIONS], mean=200, n_rows=16, n=n)


# --- by hand --------------------------------------------------------------------------------------------------------

HAND = dict(base_s=0.01, per_seq_s=1e-3, per_token_s=1e-5, tau1=1e-4, tau2=1e-7)


def prompt_s(tokens: int) -> float:
    return HAND["tau1"] * tokens + HAND["tau2"] * tokens**2


def step_s(*contexts: int) -> float:
    return HAND["base_s"] + HAND["per_seq_s"] * len(contexts) + HAND["per_token_s"] * sum(contexts)


def test_a_lone_request_takes_the_time_and_energy_computed_by_hand():
    engine = engine_of(**HAND, budget=32)
    arrival_s, end_s = 0.7, 9.0
    rows = [[(arrival_s, prompt, output)] for prompt, output in ((100, 5), (32, 1), (33, 2), (1, 12))]
    run = run_rows(engine, rows, horizon_s=end_s, window_s=(0.0, end_s))
    low_w = 300 + 300 / (1 + 2**0 * np.exp(4.2))  # one sequence, and as well an iteration of a prompt alone
    for r, ((_, prompt, output),) in enumerate(rows):
        first_s = -(-prompt // 32) * HAND["base_s"] + prompt_s(prompt)
        decode_s = sum(step_s(prompt + j) for j in range(1, output))
        assert run.admit_s[r, 0] == arrival_s
        assert run.first_s[r, 0] - arrival_s == pytest.approx(first_s, rel=1e-12)
        assert run.last_s[r, 0] - arrival_s == pytest.approx(first_s + decode_s, rel=1e-12)
        tally = [float(x[r, 0]) for x in run.tally]
        named = dict(zip(run.tally._fields, tally))
        assert named["path_iterations"] == -(-prompt // 32) + output - 1
        assert named["tokens"] == pytest.approx(output, rel=1e-12)
        assert named["busy_s"] == pytest.approx(first_s + decode_s, rel=1e-12)
        assert named["prefill_s"] == pytest.approx(prompt_s(prompt), rel=1e-12)
        idle_j = 60 * (end_s - first_s - decode_s)
        busy_j = low_w * (first_s - prompt_s(prompt) + decode_s) + 600 * prompt_s(prompt)
        assert named["gpu_j"] == pytest.approx(idle_j + busy_j, rel=1e-12)


def test_requests_share_iterations():
    engine = engine_of(**HAND, budget=32)
    together = [(0.0, 10, 1), (0.0, 20, 2)]
    cut = [(0.0, 20, 3), (0.0, 20, 1)]  # 20 + 12 tokens, then 8 beside the first's decode
    beside = [(0.0, 5, 4), (0.02, 31, 1)]  # comes during the second iteration, joins the third
    late = [(0.0, 5, 1), (3.0, 5, 1)]
    run = run_rows(engine, [together, cut, beside, late])
    first_s, last_s = run.first_s, run.last_s
    both_s = step_s() + prompt_s(10) + prompt_s(20)
    np.testing.assert_allclose(first_s[0, :2], both_s, rtol=1e-12)
    np.testing.assert_allclose(last_s[0, :2], [both_s, both_s + step_s(21)], rtol=1e-12)
    one_s = step_s() + prompt_s(20) + prompt_s(12)
    two_s = one_s + step_s(21) + prompt_s(20) - prompt_s(12)
    np.testing.assert_allclose(first_s[1, :2], [one_s, two_s], rtol=1e-12)
    np.testing.assert_allclose(last_s[1, :2], [two_s + step_s(22), two_s], rtol=1e-12)
    one_s = step_s() + prompt_s(5)
    two_s = one_s + step_s(6)
    shared_s = step_s(7) + prompt_s(31)
    assert one_s < 0.02 < two_s
    np.testing.assert_allclose(run.admit_s[2, :2], [0.0, two_s], rtol=1e-12)
    np.testing.assert_allclose(first_s[2, :2], [one_s, two_s + shared_s], rtol=1e-12)
    gaps_s = np.array([step_s(6), shared_s, step_s(8)])  # a decode beside a prompt waits for the prompt
    assert float(run.tally.gaps[2, 0]) == pytest.approx(3)
    assert float(run.tally.gaps_s[2, 0]) == pytest.approx(gaps_s.sum(), rel=1e-12)
    np.testing.assert_allclose(run.gap_counts[2], np.bincount(gap_bin(gaps_s), minlength=N_GAPS), atol=1e-9)
    np.testing.assert_allclose(first_s[3, :2], [one_s, 3.0 + one_s], rtol=1e-12)


# --- engines of operators -------------------------------------------------------------------------------------------

BUDGET = 200  # tokens of an iteration


@pytest.fixture(scope="module")
def of_operators() -> Engine:
    """With a sliding window of 128 tokens."""
    engine = build(EngineSpec("h100", "gpt-oss-120b", 2, serving="vllm"))
    return replace(engine, prefill=replace(engine.prefill, budget_tokens=np.asarray(float(BUDGET))))


def mixed_batches(engine: Engine, steps: list) -> StepBatch:
    """Of each step: contexts of sequences that decode, and chunks (tokens done before, tokens), a token at a time."""
    window, sums = int(engine.step.window_tokens), []
    for contexts, *chunks in steps:
        attended = [before + i + 1 for before, tokens in chunks for i in range(tokens)]
        each = [
            sum(contexts),
            sum(min(x, window) for x in contexts),
            sum(attended),
            sum(min(x, window) for x in attended),
        ]
        sums.append([len(contexts), *each[:2], len(attended), *each[2:]])
    return StepBatch(*(jnp.asarray(x, float) for x in zip(*sums)))


def test_requests_on_an_engine_of_operators_take_its_mixed_steps(of_operators):
    """A chunked prompt alone, and one beside a sequence that decodes; seconds, joules and what prompts add."""
    engine, law, end_s = of_operators, step_law_of(of_operators), 9.0
    alone = [((), (0, 200)), ((), (200, 200)), ((), (400, 200)), ((), (600, 100)), ((701,),), ((702,),), ((703,),)]
    beside = [((), (0, 90)), ((91,), (0, 199)), ((92,), (199, 101)), ((93, 301),), ((94,),), ((95,),), ((),)]
    steps_of = jax.jit(lambda law, batch: (law.step_s(batch), law.gpu_j(batch)))
    rows = [[(0.5, 700, 4)], [(0.0, 90, 6), (1e-4, 300, 2)]]
    run = run_rows(engine, rows, horizon_s=end_s, window_s=(0.0, end_s))
    for r, (steps, n, first, last) in enumerate([(alone, 7, [3], [6]), (beside, 6, [0, 2], [5, 3])]):
        took_s, joules = (np.asarray(x)[:n] for x in steps_of(law, mixed_batches(engine, steps)))
        decode_s = np.asarray(steps_of(law, mixed_batches(engine, [each[:1] for each in steps]))[0])[:n]
        clock_s = rows[r][0][0] + np.cumsum(took_s)
        np.testing.assert_allclose(run.first_s[r, : len(first)], clock_s[first], rtol=1e-12)
        np.testing.assert_allclose(run.last_s[r, : len(last)], clock_s[last], rtol=1e-12)
        idle_j = float(engine.idle_w) * (end_s - took_s.sum())
        assert float(run.tally.path_iterations[r, 0]) == n
        assert float(run.tally.prefill_s[r, 0]) == pytest.approx((took_s - decode_s).sum(), rel=1e-9)
        assert float(run.tally.gpu_j[r, 0]) == pytest.approx(joules.sum() + idle_j, rel=1e-12)


def test_a_closed_loop_is_as_its_schedule_predicts(of_operators):
    """Requests sent when the schedule sends them: every first and last token, and the energy, within 0.1 %."""
    engine = of_operators
    plan = schedule(Benchmark(400, 60, 4, 14), limits_of(engine))
    (parts,) = parts_of(engine, [plan])
    took_s, gpu_j = parts.decode_s + parts.prompt_s, parts.decode_j + parts.prompt_j
    clock_s = np.append(0.0, np.cumsum(plan.repeats * took_s))
    rng = np.random.default_rng(0)
    prompt, output = lengths(400, 0.8, 14, rng), lengths(60, 0.8, 14, rng)
    sent_s = np.maximum(clock_s[plan.sent] - took_s.min() / 2, 0.0)  # within the iteration that frees the place
    rows = [list(zip(sent_s.tolist(), prompt.tolist(), output.tolist()))]
    run = run_rows(engine, rows, window_s=(0.0, clock_s[-1]))
    np.testing.assert_allclose(run.first_s[0, :14], clock_s[plan.first], rtol=1e-3)
    np.testing.assert_allclose(run.last_s[0, :14], clock_s[plan.last], rtol=1e-3)
    assert float(run.tally.gpu_j[0, 0]) == pytest.approx(plan.repeats @ gpu_j, rel=1e-3)
    assert float(run.tally.tokens[0, 0]) == pytest.approx(output.sum(), rel=1e-3)


# --- a naive scheduler ----------------------------------------------------------------------------------------------


def iterated(running: list, decoding: list, chunks: list, clock: float, law: dict, window: float = np.inf) -> float:
    """The clock after an iteration with these chunks of prompts, whose tokens the sequences then have."""
    contexts = np.array([r["context"] for r in decoding], float)
    took = law["base_s"] + law["per_seq_s"] * len(decoding) + law["per_token_s"] * contexts.sum()
    took += law.get("windowed_token_s", 0.0) * np.minimum(contexts, window).sum()
    for r, chunk in chunks:
        before, r["done"] = r["done"], r["done"] + chunk
        took += law["tau1"] * chunk + law["tau2"] * (r["done"] ** 2 - before**2)
    clock += took
    for r in running:
        if r["done"] == r["prompt"] or r in decoding:
            r["times"].append(clock)
            r["context"] += 1
            r["left"] -= 1
    return clock


def naive(row: Row, *, slots: int, budget: int, n_blocks: float, fixed_tokens: int, window: int, law: dict):
    """The same rules for one instance, request by request, in plain Python: the scheduler of vLLM as documented."""

    def blocks(tokens: int) -> int:
        return -(-(tokens + fixed_tokens) // 16)

    def used() -> int:
        return sum(blocks(r["context"]) for r in running)

    requests = [dict(arrival=a, prompt=p, left=o, times=[], admit=None) for a, p, o in row]
    waiting, running, clock, n_preempted, n_iterations = deque(requests), [], 0.0, 0, 0
    while waiting or running:
        decoding = [r for r in running if r["done"] == r["prompt"]]
        room, chunks = max(budget - len(decoding), 1), []
        for r in running:
            if r["done"] < r["prompt"]:
                chunks.append((r, min(room, r["prompt"] - r["done"])))
                room -= chunks[-1][1]
        while (
            waiting
            and waiting[0]["arrival"] <= clock
            and len(running) < slots
            and room > 0
            and used() + blocks(waiting[0]["prompt"] + 1) <= n_blocks
        ):
            r = waiting.popleft()
            r |= dict(done=0, context=r["prompt"], admit=clock if r["admit"] is None else r["admit"])
            running.append(r)
            chunks.append((r, min(room, r["prompt"])))
            room -= chunks[-1][1]
        if not running:
            clock = max(clock, waiting[0]["arrival"])
            continue
        n_iterations += 1
        clock = iterated(running, decoding, chunks, clock, law, window)
        running = [r for r in running if r["left"]]
        while used() > n_blocks:
            r = running.pop()
            r["prompt"] = r["context"]
            waiting.appendleft(r)
            n_preempted += 1
    return requests, n_preempted, n_iterations


CASES = [  # budget, n_blocks, slots, fixed tokens, mean gap
    (8, np.inf, 4, 0, 0.02),
    (64, 8, 8, 0, 0.01),
    (5, 7, 8, 0, 0.01),
    (16, 9, 8, 20, 0.03),
    (3, 10, 6, 0, 0.005),
    (24, 14, 8, 5, 0.002),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_every_token_comes_when_a_naive_scheduler_says(case):
    """Chunks, shared budgets, full caches, preemption and a sliding window, in random mixtures."""
    budget, n_blocks, slots, fixed_tokens, gap_s = CASES[case]
    law = dict(base_s=0.01, per_seq_s=1e-4, per_token_s=1e-5, windowed_token_s=3e-5, tau1=1e-4, tau2=1e-6)
    rows = random_rows(np.random.default_rng(case), gap_s=gap_s)
    engine = engine_of(**law, window_tokens=40, budget=budget)
    run = run_rows(engine, rows, slots=slots, n_blocks=n_blocks, fixed_tokens=fixed_tokens)
    how = dict(slots=slots, budget=budget, n_blocks=n_blocks, fixed_tokens=fixed_tokens, window=40, law=law)
    for r, row in enumerate(rows):
        expected, n_preempted, n_iterations = naive(row, **how)
        np.testing.assert_allclose(run.admit_s[r], [x["admit"] for x in expected], rtol=1e-9)
        np.testing.assert_allclose(run.first_s[r], [x["times"][0] for x in expected], rtol=1e-9)
        np.testing.assert_allclose(run.last_s[r], [x["times"][-1] for x in expected], rtol=1e-9)
        assert int(run.tally.preemptions[r, 0]) == n_preempted
        assert int(run.tally.path_iterations[r, 0]) == n_iterations
        assert float(run.tally.tokens[r, 0]) == pytest.approx(sum(o for _, _, o in row), rel=1e-9)
        gaps_s = np.concatenate([np.diff(x["times"]) for x in expected])
        counts = np.bincount(gap_bin(gaps_s), minlength=N_GAPS)
        # Cumulated, and a gap may lie on the edge of its bin.
        assert np.abs(np.cumsum(run.gap_counts[r] - counts)).max() <= 1 + 1e-9


def test_gaps_count_stalls():
    """The mean inter-token time counts what its histogram counts: also the wait of a preempted sequence."""
    rows = random_rows(np.random.default_rng(2), gap_s=0.01)
    run = run_rows(engine_of(), rows, n_blocks=7)
    assert run.tally.preemptions.sum() > 10
    np.testing.assert_allclose(run.tally.gaps.sum(axis=1), run.gap_counts.sum(axis=1), rtol=1e-9)


def test_a_stall_counts_from_the_last_token_even_if_preempted_again_before_the_next():
    law = dict(base_s=0.01, per_seq_s=1e-4, per_token_s=1e-5, windowed_token_s=3e-5, tau1=1e-4, tau2=1e-6)
    rows = random_rows(np.random.default_rng(1), gap_s=0.001, longest=110)
    run = run_rows(engine_of(**law, window_tokens=40, budget=4), rows, n_blocks=7)
    expected, _, _ = naive(rows[0], slots=8, budget=4, n_blocks=7, fixed_tokens=0, window=40, law=law)
    gaps_s = np.concatenate([np.diff(x["times"]) for x in expected])
    counts = np.bincount(gap_bin(gaps_s), minlength=N_GAPS)
    assert np.argmax(np.cumsum(run.gap_counts[0]) >= counts.sum() - 1e-6) == gap_bin(gaps_s.max())
    np.testing.assert_allclose(run.gap_counts[0], counts, atol=1e-6)


# --- conservation ---------------------------------------------------------------------------------------------------


def times_of(run: PoolRun, rows: list[Row]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n = [len(row) for row in rows]
    in_order = np.concatenate([[a for a, _, _ in row] for row in rows])
    return in_order, *(np.concatenate([x[r, : n[r]] for r in range(len(rows))]) for x in (run.admit_s, run.last_s))


def test_littles_law_holds_on_the_path():
    rows = random_rows(np.random.default_rng(0))
    for n_blocks in (np.inf, 8):
        run = run_rows(engine_of(**HAND, budget=16), rows, n_blocks=n_blocks, slots=5)
        arrival_s, admit_s, last_s = times_of(run, rows)
        assert run.in_system.sum() == 0
        assert np.all((arrival_s <= admit_s) & (admit_s < last_s))
        assert run.tally.path_in_system_s.sum() == pytest.approx(np.sum(last_s - arrival_s), rel=1e-9)
        in_flight_s = np.sum(last_s - admit_s)
        if n_blocks == np.inf:
            assert run.tally.preemptions.sum() == 0
            assert run.tally.path_in_flight_s.sum() == pytest.approx(in_flight_s, rel=1e-9)
        else:
            assert run.tally.preemptions.sum() > 0
            assert run.tally.path_in_flight_s.sum() < in_flight_s


def test_what_the_horizon_cuts_off_is_still_in_the_system():
    rows = random_rows(np.random.default_rng(0), gap_s=0.001)
    whole = run_rows(engine_of(), rows, n_blocks=7)
    run = run_rows(engine_of(), rows, n_blocks=7, horizon_s=0.6)
    assert run.tally.preemptions.sum() > 0
    assert 0 < run.in_system.sum() < N_ROWS * N_COLUMNS
    ended = np.isfinite(run.last_s)
    np.testing.assert_array_equal(ended.sum(axis=1) + run.in_system, N_COLUMNS)
    np.testing.assert_array_equal(run.last_s[ended], whole.last_s[ended])
    assert whole.last_s[~ended].min() > 0.6


def test_a_cache_hardly_larger_than_a_request_does_not_livelock():
    rng = np.random.default_rng(1)
    rows = [[(0.0, 16, 64), *((0.0, 1, int(o)) for o in rng.integers(30, 79, N_COLUMNS - 1))] for _ in range(N_ROWS)]
    run = run_rows(engine_of(base_s=0.01), rows, n_blocks=5)  # the longest of them needs all five
    outputs = np.array([sum(o for _, _, o in row) for row in rows])
    assert np.isfinite(run.last_s).all()
    assert run.tally.preemptions.sum(axis=1).min() > 10
    # The oldest gains a token an iteration.
    assert np.all(run.tally.path_iterations[:, 0] <= outputs)
    np.testing.assert_allclose(run.tally.tokens[:, 0], outputs, rtol=1e-9)
    np.testing.assert_allclose(run.last_s[:, 0], 64 * 0.01, rtol=1e-9)  # as if it were alone
    assert np.all(np.diff(run.admit_s, axis=1) >= 0)


@partial(jax.jit, static_argnames="n_steps")
def walk(state: State, engine: Engine, scheduler: Scheduler, until_s: jax.Array, *, n_steps: int):
    """Scheduler state after each of many small steps, and what can be told of it from the slots alone."""

    def step(state: State, _):
        state = advance(state, engine, scheduler, until_s)
        slots, i = state.slots, state.instances
        there = slots.left > 0
        decodes = there & (slots.phase == 0)
        blocks = jnp.ceil((slots.context + scheduler.fixed_tokens) / 16.0)
        windowed = jnp.minimum(slots.context, engine.decode.window_tokens)
        counted = (there, there * blocks, decodes * slots.context, decodes * windowed, decodes)
        kept = (i.n_running, i.n_blocks, i.tokens, i.windowed_tokens, i.n_decoding)
        return state, (jnp.stack([x.sum(axis=1) for x in counted]), jnp.stack(kept), i.scheduled_tokens, i.clock_s)

    return jax.lax.scan(step, state, length=n_steps)


@pytest.mark.slow
def test_counters_equal_what_the_slots_hold_and_the_cache_never_overflows():
    engine = engine_of(per_token_s=1e-6, windowed_token_s=1e-6, window_tokens=30, budget=12)
    rows = random_rows(np.random.default_rng(3), gap_s=0.01)
    requests = requests_of(rows)
    state = jax.tree.map(jnp.asarray, empty_state(request_table(requests, N_COLUMNS), N_ROWS, 1, 8))
    everybody = jnp.arange(N_ROWS * N_COLUMNS, dtype=jnp.int32).reshape(N_ROWS, N_COLUMNS)
    zero, keys = jnp.zeros(N_ROWS, jnp.int32), jax.random.split(jax.random.key(0), N_ROWS)
    state = dispatch(state, everybody, IN_TURN.policy, rank=zero, now_s=zero * 1.0, keys=keys, n_instances=1)
    until_s = jnp.full(N_ROWS, 100.0)
    state, (counted, kept, scheduled, clock_s) = walk(
        state, engine, scheduler_of(N_ROWS, n_blocks=9, fixed_tokens=10.0), until_s, n_steps=1500
    )
    np.testing.assert_array_equal(counted, kept)
    assert np.all(kept >= 0)
    assert kept[:, 1].max() == 9
    assert state.tally.preemptions.sum() > 10
    assert np.all((scheduled >= 0) & (scheduled + kept[:, 4] <= 12))
    assert np.all(np.diff(clock_s, axis=0) >= 0)
    np.testing.assert_array_equal(state.instances.clock_s, 100.0)  # everybody is done
    assert not kept[-1].any()


# --- determinism ----------------------------------------------------------------------------------------------------


def same(a: PoolRun, b: PoolRun, n_rows: int = N_ROWS) -> bool:
    pairs = zip((a.admit_s, a.first_s, a.last_s, *a.tally), (b.admit_s, b.first_s, b.last_s, *b.tally))
    return all(np.array_equal(x[:n_rows], y[:n_rows]) for x, y in pairs)


@pytest.mark.slow
def test_too_few_slots_start_again_with_more(monkeypatch):
    rows = random_rows(np.random.default_rng(4), gap_s=0.001)
    enough = run_rows(engine_of(**HAND, budget=20), rows)
    monkeypatch.setattr("fleetopt_jax._simulate.pool.LEAST_SLOTS", 4)
    few = run_rows(engine_of(**HAND, budget=20), rows, n_slots=4)
    assert same(enough, few)
    assert few.memory_bytes < enough.memory_bytes


def spread(policy, *, n_rows=N_ROWS, seed=0) -> PoolRun:
    """Equal requests over four instances, often while all queues are alike: ties decide."""
    requests = requests_of(random_rows(np.random.default_rng(5), gap_s=0.05))
    requests = requests.rows(slice(n_rows))
    horizons_s = np.full(n_rows, FOREVER_S)
    pool = Pool(engine_of(**HAND, budget=20), scheduler_of(n_rows), 4)
    return run_pool(pool, requests, horizons_s, Balancer(DISPATCHES[policy], seed=seed), n_slots=8)


@pytest.mark.slow
def test_the_seed_decides_and_nothing_else():
    assert same(spread("jsq"), spread("jsq"))
    assert not same(spread("jsq"), spread("jsq", seed=1))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["round_robin", "random", "jsq"])
def test_more_replications_do_not_change_the_first(policy):
    assert same(spread(policy, n_rows=2), spread(policy), 2)


# --- dispatch -------------------------------------------------------------------------------------------------------


def queued(state: State, instance: int) -> list[int]:
    """The linked list of an instance."""
    found, at = [], int(state.instances.head[instance])
    for _ in range(int(state.instances.n_waiting[instance])):
        found.append(at)
        at = int(state.table.next[at])
    if found:
        assert found[-1] == int(state.instances.tail[instance])
    return found


N_GROUPS, N_INSTANCES, N_SENT = 50, 6, 24


def sent(policy: Dispatch, known: np.ndarray, n_instances: int, n_first: int = N_SENT) -> State:
    """`n_first` requests a group, then the rest of `N_SENT`, on top of `known` sequences in flight."""
    width = N_SENT
    times = np.tile(np.arange(width, dtype=float), (N_GROUPS, 1))
    ones = np.ones((N_GROUPS, width), int)
    table = request_table(PoolRequests(times, ones, ones), width)
    state = jax.tree.map(jnp.asarray, empty_state(table, N_GROUPS, N_INSTANCES, 1))
    state = replace(state, instances=replace(state.instances, n_running=jnp.asarray(known.ravel(), jnp.int32)))
    numbers = np.arange(width) + width * np.arange(N_GROUPS)[:, None]
    send = jax.jit(dispatch, static_argnames="policy")
    for k, (start, stop) in enumerate(((0, n_first), (n_first, width))):
        part = np.full((N_GROUPS, width), N_GROUPS * width, np.int32)
        part[:, : stop - start] = numbers[:, start:stop]
        rank, now_s = jnp.full(N_GROUPS, start, jnp.int32), jnp.zeros(N_GROUPS)
        keys = jax.random.split(jax.random.key(k), N_GROUPS)
        state = send(
            state, jnp.asarray(part), policy=policy, rank=rank, now_s=now_s, keys=keys, n_instances=n_instances
        )
    return state


def test_who_has_just_been_sent_a_request_ties_with_the_others():
    """Two of ten are idle and get one each of three; the third goes to any of the ten that now have one."""
    n_looks, n = 20_000, 10
    lengths = jnp.ones((n_looks, n), int).at[:, :2].set(0)
    keys = jax.random.split(jax.random.key(7), n_looks)
    queues = Queues(lengths, jnp.zeros(n_looks, int), keys, jnp.asarray(n))
    chosen = np.asarray(jax.jit(lambda: DISPATCHES["jsq"].choose(queues, 3))())
    assert np.all(np.sort(chosen[:, :2], axis=1) == [0, 1])
    shares = np.bincount(chosen[:, 2], minlength=n) / n_looks
    np.testing.assert_allclose(shares, 0.1, atol=0.01)  # four standard deviations


@pytest.mark.parametrize("n_instances", [1, 5, 6])
def test_the_shortest_queue_is_that_of_a_greedy_loop(n_instances):
    rng = np.random.default_rng(n_instances)
    known = rng.integers(0, 12, (N_GROUPS, N_INSTANCES))
    state = sent(DISPATCHES["jsq"], known, n_instances, n_first=int(rng.integers(1, N_SENT)))
    lists = [[queued(state, g * N_INSTANCES + i) for i in range(N_INSTANCES)] for g in range(N_GROUPS)]
    for g in range(N_GROUPS):
        instance_of = {number: i for i, found in enumerate(lists[g]) for number in found}
        assert sorted(instance_of) == [g * N_SENT + j for j in range(N_SENT)]
        lengths = known[g, :n_instances].copy()
        for number in sorted(instance_of):  # whichever of the shortest it went to
            assert lengths[instance_of[number]] == lengths.min()
            lengths[instance_of[number]] += 1
        assert all(found == sorted(found) for found in lists[g])


def test_in_turn_and_at_random_spread_evenly():
    nobody = np.zeros((N_GROUPS, N_INSTANCES), int)
    for policy in ("round_robin", "random"):
        state = sent(DISPATCHES[policy], nobody, 5, n_first=7)
        counts = np.asarray(state.instances.n_waiting).reshape(N_GROUPS, N_INSTANCES)
        assert not counts[:, 5].any()
        np.testing.assert_array_equal(counts.sum(axis=1), N_SENT)
        if policy == "round_robin":
            assert queued(state, N_INSTANCES + 2) == [N_SENT + j for j in range(2, N_SENT, 5)]
            assert np.all(counts[:, :5].max(axis=1) - counts[:, :5].min(axis=1) <= 1)
        else:
            error = np.sqrt(N_GROUPS * N_SENT * 0.2 * 0.8)
            assert np.all(np.abs(counts[:, :5].sum(axis=0) - N_GROUPS * N_SENT / 5) < ERRORS * error)
        for i in range(12):
            assert queued(state, i) == sorted(queued(state, i))


# --- requests and routes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scv", [0.0, 0.5, 1.0, 4.0])
def test_drawn_requests_are_the_workloads(small_workload, scv):
    workload = replace(small_workload, arrival_scv=jnp.asarray(scv))
    n, n_replications = 20_000, 4
    drawn = draw_requests(workload, PHYSICAL, n, n_replications, seed=3)
    rate = float(workload.arrival_rate_per_s)
    assert np.all(np.diff(drawn.arrival_s, axis=1) >= 0)
    np.testing.assert_allclose(drawn.arrival_s[:, -1], n / rate, rtol=1e-9)
    gaps = np.diff(drawn.arrival_s, axis=1) * rate
    assert np.mean(gaps.var(axis=1)) == pytest.approx(scv, rel=0.1, abs=1e-9)
    prompt, output = mean_tokens(workload)
    # One request a stratum: the mean is off by less than the range over n.
    assert np.abs(drawn.prompt_tokens.mean(axis=1) - float(prompt)).max() < 2 * 60_000 / n
    assert np.abs(drawn.output_tokens.mean(axis=1) - float(output)).max() < 2 * 60_000 / n
    again = draw_requests(workload, PHYSICAL, n, 2, seed=3)
    other = draw_requests(workload, PHYSICAL, n, 2, seed=4)
    for name in ("arrival_s", "prompt_tokens", "output_tokens"):
        np.testing.assert_array_equal(getattr(drawn, name)[:2], getattr(again, name))
    assert not np.array_equal(other.prompt_tokens, again.prompt_tokens)
    assert not np.array_equal(drawn.prompt_tokens[0], drawn.prompt_tokens[1])


def test_lengths_that_are_not_whole_keep_their_mean():
    workload = make_workload([10.25, 99.5], [3.75, 0.0], [0.5, 0.5], arrival_rate_per_s=1.0)
    drawn = draw_requests(workload, PHYSICAL, 40_000, 1, seed=0)
    short = drawn.prompt_tokens < 50
    assert short.mean() == pytest.approx(0.5, abs=1e-3)
    assert drawn.prompt_tokens[short].mean() == pytest.approx(10.25, abs=0.02)
    assert drawn.output_tokens[short].mean() == pytest.approx(3.75, abs=0.02)
    assert set(drawn.output_tokens[~short]) == {1}  # no request without an output


def test_a_replayed_trace_keeps_its_order_and_gaps():
    rng = np.random.default_rng(0)
    stamps = np.append(0.0, np.cumsum(rng.exponential(1.0, 99)))
    trace = Trace(rng.integers(1, 9999, 100), rng.integers(1, 99, 100), stamps)
    replayed = replay_requests(trace, 5.0, 100, 3)
    for r in range(3):
        np.testing.assert_array_equal(replayed.prompt_tokens[r], trace.prompt_tokens)
        np.testing.assert_array_equal(replayed.output_tokens[r], trace.output_tokens)
        gaps = np.diff(replayed.arrival_s[r])
        np.testing.assert_allclose(gaps / gaps[0], np.diff(stamps) / stamps[1], rtol=1e-9)
        assert 99 / replayed.arrival_s[r, -1] == pytest.approx(5.0, rel=1e-9)
    laps = replay_requests(trace, 5.0, 250, 2)  # goes on where the first ended, and starts again
    np.testing.assert_array_equal(laps.prompt_tokens.ravel(), np.resize(trace.prompt_tokens, 500))
    assert np.all(np.diff(laps.arrival_s, axis=1) > 0)
    assert 249 / laps.arrival_s[0, -1] == pytest.approx(5.0, rel=0.05)
    with pytest.raises(ValueError, match="time stamps"):
        replay_requests(replace(trace, arrival_s=None), 5.0, 10, 1)


def two_pools(success: float = 0.7, seconds: float = 1e-5) -> Fleet:
    """Windows of 1,000 and 20,000 tokens, the first with compression of what is half as long again."""
    compressor = make_compressor(success_frac=success, s_per_token=seconds)
    return make_fleet(
        [engine_of()] * 2,
        window_tokens=[1000, 20_000],
        gamma=[1.5, 1.0],
        n_instances=[2, 2],
        surroundings=make_surroundings(compressor=compressor),
    )


@pytest.mark.slow
@pytest.mark.parametrize("width", [None, 0.4])
def test_requests_go_where_the_analytic_router_sends_them(small_workload, width):
    fleet, n = two_pools(), 60_000
    requests = draw_requests(small_workload, PHYSICAL, n, 1, seed=1)
    routed = route_requests(requests, fleet, small_workload, PHYSICAL, router_width=width, seed=1)
    pools = route(fleet, small_workload, PHYSICAL, router_width=width)
    shares = np.asarray(pools.traffic_frac)
    assert 0 < shares.sum() < 1
    for k, share in enumerate(shares):
        error = np.sqrt(share * (1 - share) / n)
        assert np.mean(routed.pool == k) == pytest.approx(share, abs=ERRORS * error), k
        compressor_tokens = float(pools.compressor_tokens[k])
        assert np.sum(routed.tried_tokens[routed.tried_pool == k]) / n == pytest.approx(compressor_tokens, rel=0.1), k
    assert np.mean(routed.pool == REJECTED) == pytest.approx(1 - shares.sum(), abs=4.0 / n)
    total = requests.prompt_tokens + requests.output_tokens
    np.testing.assert_array_equal(routed.pool == REJECTED, total > 20_000)
    late_s = routed.ready_s - requests.arrival_s
    np.testing.assert_allclose(late_s, 1e-5 * routed.tried_tokens, atol=1e-9)
    as_they_are = routed.tried_pool == REJECTED
    np.testing.assert_array_equal(routed.prompt_tokens[as_they_are], requests.prompt_tokens[as_they_are])
    for k in range(2):
        mean_output = float(pools.output_tokens[k])
        assert routed.output_tokens[routed.pool == k].mean() == pytest.approx(mean_output, rel=0.02), k


@pytest.mark.parametrize("width", [None, 1.0])
def test_what_a_pool_gets_fits_its_window(small_workload, width):
    fleet = two_pools()
    requests = draw_requests(small_workload, PHYSICAL, 60_000, 1, seed=1)
    routed = route_requests(requests, fleet, small_workload, PHYSICAL, router_width=width)
    windows = np.append(np.asarray(fleet.window_tokens), np.inf)  # the last for the rejected
    served = routed.pool != REJECTED
    assert np.all((routed.prompt_tokens + routed.output_tokens <= windows[routed.pool])[served])
    assert routed.prompt_tokens[served].min() >= 1
    assert routed.output_tokens[served].min() >= 1


# --- whole fleets ---------------------------------------------------------------------------------------------------


FEW = dict(n_requests=1500, n_replications=2)


def small_fleet() -> Fleet:
    """Two instances of 16 slots, window 1,000 tokens."""
    engine = engine_of(base_s=0.01, per_seq_s=1e-4, tau1=1e-5, n_blocks=3000, max_num_seqs=16)
    return make_fleet([engine], window_tokens=[1000], n_instances=[2])


def steady(rate: float, longest: float = 900.0) -> Workload:
    return make_workload([50, 300, longest - 100], [30, 60, 100], arrival_rate_per_s=rate)


def tight_fleet(first_token_s=0.0, **compressor: float) -> Fleet:
    """Windows of 300 and 1,000 tokens; caches that overflow, prompts that are cut, a compressor and a site."""
    law = dict(base_s=0.01, per_seq_s=1e-4, per_token_s=1e-6, tau1=2e-5, budget=256, first_token_s=first_token_s)
    engines = [engine_of(**law, n_blocks=blocks, max_num_seqs=16) for blocks in (100, 600)]
    return make_fleet(
        engines,
        window_tokens=[300, 1000],
        gamma=[1.5, 1.0],
        n_instances=[9, 9],  # as many as 10 to the compiler
        surroundings=make_surroundings(make_site(host_w_per_gpu=50, pue=1.2), make_compressor(**compressor)),
    )


def mixed(weight=(0.2, 0.2, 0.1, 0.4, 0.1)) -> Workload:
    """The third kind can be compressed into the first window, the last is longer than any; so many to either pool that
    both share one compilation."""
    return make_workload([60, 200, 330, 700, 1200], [40, 60, 40, 120, 30], weight, arrival_rate_per_s=300.0)


A_FEW = dict(n_requests=400, n_replications=2)
FAST = {("published", "round_robin")}
MIXTURES = [
    pytest.param(name, dispatch, marks=() if (name, dispatch) in FAST else pytest.mark.slow)
    for name in PRESETS
    for dispatch in DISPATCHES
]


@pytest.mark.parametrize(("preset", "dispatch"), MIXTURES)
def test_a_small_fleet(preset, dispatch):
    """Every arrival ends in one way, watts add up, the laws are near, and the same seed gives the same."""
    fleet, workload = tight_fleet(success_frac=0.5, s_per_token=1e-5), mixed()
    assumptions = replace(PRESETS[preset], dispatch=DISPATCHES[dispatch])
    found, again, other = (simulate(fleet, workload, assumptions, **A_FEW, seed=seed) for seed in (0, 0, 1))
    assert found == again != other
    assert found.n_arrivals == 800 == found.n_completed + found.n_in_system + found.n_rejected
    assert found.n_rejected == 80
    assert found.n_preemptions == 0 or assumptions.kv_cache.caps_sequences  # a reserved window is never overrun
    assert found.metrics["rejected_frac"].mean == pytest.approx(0.1, abs=0.02)
    assert not found.slo_held
    assert sum(pool["power_w"].mean for pool in found.pools) == pytest.approx(found.metrics["power_w"].mean, rel=1e-9)
    for pool, laws in zip(found.pools, found.pools_analytic, strict=True):
        assert 0 < pool["busy_frac"].mean <= 1
        assert 0 < pool["kv_occupancy"].mean <= 1
        assert pool["itl_s"].mean == pytest.approx(laws["itl_s"], rel=0.2)


@pytest.mark.slow
def test_what_a_first_token_takes_beyond_its_iterations_is_seen_by_users_only():
    published = replace(PRESETS["published"], dispatch=DISPATCHES["round_robin"])  # compiled above
    for assumptions, more_s in ((PHYSICAL, 0.25), (published, 0.0)):
        now, then = (
            simulate(
                tight_fleet(first_token_s=later_s, success_frac=0.5, s_per_token=1e-5), mixed(), assumptions, **A_FEW
            )
            for later_s in (0.0, 0.25)
        )
        for name, value in now.metrics.items():
            seen = name.startswith(("ttft_p", "e2e_p"))
            if name != "slo_attainment":
                assert then.metrics[name].mean == pytest.approx(value.mean + more_s * seen, rel=1e-9), name


@pytest.mark.slow
def test_a_compressor_takes_energy_whether_it_succeeds_or_not():
    """Its watts are those of every prompt it reads, in the pool that it reads for."""
    free, costly = (
        simulate(tight_fleet(success_frac=0.5, j_per_token=joules), mixed(), **A_FEW) for joules in (0.0, 1.0)
    )
    requests = draw_requests(mixed(), PHYSICAL, 400, 2, 0)
    routed = route_requests(requests, tight_fleet(success_frac=0.5), mixed(), PHYSICAL)
    counted = requests.arrival_s >= costly.warm_up_s
    tokens_per_s = np.sum(routed.tried_tokens * counted, axis=1) / (requests.arrival_s[:, -1] - costly.warm_up_s)
    assert 0 < np.mean(routed.pool[routed.tried_pool == 0] == 0) < 1
    more_w = [b["power_w"].mean - a["power_w"].mean for a, b in zip(free.pools, costly.pools)]
    np.testing.assert_allclose(more_w, [1.2 * tokens_per_s.mean(), 0.0], rtol=1e-9, atol=1e-9)


@dataclass(frozen=True)
class TwoChoices(Dispatch):
    """The shorter of two queues drawn at random (Mitzenmacher 2001)."""

    name: ClassVar[str] = "two_choices"
    arrival_scv: ClassVar[float] = 0.5
    co_arrivals: ClassVar[float] = 0.0
    looks_at_queues: ClassVar[bool] = True

    def choose(self, queues: Queues, n_sent: int) -> jax.Array:
        pairs = jax.vmap(lambda key: jax.random.randint(key, (n_sent, 2), 0, queues.n_instances))(queues.keys)
        lengths = jax.vmap(lambda row, pair: row[pair])(queues.lengths, pairs)
        return jnp.take_along_axis(pairs, jnp.argmin(lengths, axis=2)[..., None], axis=2)[..., 0]


def test_a_dispatch_of_your_own_is_a_record():
    """The longest of n queues gets a request only where it is drawn twice."""
    known = np.tile(np.arange(N_INSTANCES), (N_GROUPS, 1))
    state = sent(TwoChoices(), known, N_INSTANCES)
    longest = np.asarray(state.instances.n_waiting).reshape(N_GROUPS, N_INSTANCES)[:, -1].sum()
    n, share = N_GROUPS * N_SENT, 1.0 / N_INSTANCES**2
    assert abs(longest - n * share) < ERRORS * np.sqrt(n * share * (1 - share))


@pytest.mark.slow
def test_two_choices_are_much_better_than_none_and_not_as_good_as_all():
    fleet = make_fleet([engine_of(base_s=0.01, max_num_seqs=1)], window_tokens=[1000], n_instances=[8])
    workload = make_workload([10, 10, 10], [10, 30, 50], arrival_rate_per_s=0.85 * 8 / 0.3)
    how = dict(n_requests=2000, n_replications=2, staleness_s=0.0)
    policies = DISPATCHES["random"], TwoChoices(), DISPATCHES["jsq"]
    found = [simulate(fleet, workload, replace(PHYSICAL, dispatch=policy), **how) for policy in policies]
    p90_s = [each.metrics["ttft_p90_s"].mean for each in found]
    assert p90_s[0] > 1.5 * p90_s[1] > 1.5 * p90_s[2] > 0


@pytree
class Affine(DecodeLaw):
    """A decode law of one's own, of which nothing but the step is said."""

    base_s: jax.Array
    per_token_s: jax.Array

    def step_s(self, n_active, context_tokens):
        return self.base_s + self.per_token_s * n_active * context_tokens


def test_a_decode_law_of_your_own_runs():
    """It gives what the same law gives under its own name."""
    engine = engine_of(base_s=0.01, per_token_s=1e-5, budget=32)
    own = replace(engine, decode=Affine(engine.decode.base_s, engine.decode.per_token_s))
    rows = random_rows(np.random.default_rng(0), gap_s=0.01)
    expected, found = (run_rows(each, rows, n_blocks=10) for each in (engine, own))
    np.testing.assert_allclose(found.first_s, expected.first_s, rtol=1e-9)
    np.testing.assert_allclose(found.last_s, expected.last_s, rtol=1e-9)
    np.testing.assert_allclose(found.tally.gpu_j, expected.tally.gpu_j, rtol=1e-9)


def test_a_router_that_knows_no_output_fills_the_windows_by_what_it_knows(small_workload):
    """With a limit above every output it wastes windows, with one below it sends on what a window does not hold."""
    requests = draw_requests(small_workload, PHYSICAL, 5000, 1, seed=1)
    total = requests.prompt_tokens + requests.output_tokens
    pools = {}
    for limit in (0.0, 400.0, 1e6):
        assumptions = replace(PHYSICAL, route_by=PromptAndLimit(limit))
        routed = route_requests(requests, two_pools(), small_workload, assumptions)
        pools[limit] = routed.pool
        served = routed.pool != REJECTED
        windows = np.array([1000, 20_000])[routed.pool[served]]
        assert np.all((routed.prompt_tokens + routed.output_tokens)[served] <= windows)
    np.testing.assert_array_equal(pools[0.0] == REJECTED, total > 20_000)
    assert np.mean(pools[400.0] == 0) < np.mean(pools[0.0] == 0)
    assert np.all(pools[1e6] == REJECTED)


def test_single_precision_is_refused():
    with jax.enable_x64(False), pytest.raises(ValueError, match="simulate needs float64"):
        simulate(small_fleet(), steady(20.0), **A_FEW)


@pytest.mark.slow
def test_arrivals_are_finished_in_the_system_or_rejected():
    """Two instances hold a load, and do not hold fourteen times as much: what would take 28."""
    fleet = small_fleet()
    held, overload = (simulate(fleet, steady(rate), **FEW) for rate in (20.0, 14 * 20.0))
    for found in (held, overload):
        assert found.n_arrivals == 3000
        assert found.n_arrivals == found.n_completed + found.n_in_system + found.n_rejected
    assert held.slo_held
    assert (held.n_rejected, held.n_in_system) == (0, 0)
    assert held.metrics["slo_attainment"].mean > 0.99
    assert not overload.slo_held
    assert overload.metrics["slo_attainment"].mean < 0.5
    assert overload.metrics["ttft_p99_s"].mean > 2.0
    assert overload.metrics["output_tok_per_s"].mean < 2 * 16 / 0.01
    assert simulate(fleet, steady(20.0), **FEW) == held
    assert simulate(fleet, steady(20.0), **FEW, seed=1) != held


@pytest.mark.slow
def test_a_hopeless_overload_is_cut_by_the_horizon():
    """A hundredth of the instances needed cannot finish in four times the time: the rest is still in the system."""
    found = simulate(small_fleet(), steady(3000.0), **FEW)
    assert found.n_in_system > 0
    assert found.n_arrivals == found.n_completed + found.n_in_system + found.n_rejected
    assert found.metrics["ttft_p99_s"].mean == np.inf


@pytest.mark.slow
def test_requests_too_long_for_every_window_are_rejected_and_counted():
    found = simulate(small_fleet(), steady(20.0, longest=1200.0), **FEW)
    assert found.n_rejected == pytest.approx(1000, abs=4)
    assert found.n_arrivals == found.n_completed + found.n_in_system + found.n_rejected
    assert found.metrics["rejected_frac"].mean == pytest.approx(1 / 3, abs=0.02)
    assert found.metrics["slo_attainment"].mean == pytest.approx(2 / 3, abs=0.02)
    assert found.metrics["ttft_p99_of_all_s"].mean == np.inf
    assert not found.slo_held
