"""A closed-loop benchmark, as every iteration of it would have it; and results of benchmarks, read as they are."""

import math
from dataclasses import dataclass

import numpy as np
import pytest

from fleetopt_jax.calibrate.names import gpu_name, llm_name, precision_name, precision_of_checkpoint
from fleetopt_jax.calibrate.predict import Sigmas, limits_of, predicted
from fleetopt_jax.catalog.engines import engine_entry
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.laws.closed_loop import FIELDS, Benchmark, Limits, lengths, outcome, schedule
from fleetopt_jax.laws.mixed_step import StepBatch

WITHIN = 0.03  # of the plain simulation: what jumps over equal iterations and a cache counted in tokens may cost
ROOMY = Limits(budget_tokens=2048, max_num_seqs=256, kv_tokens=1e6)
RUNS = (  # (benchmark, limits): alone, in waves, in chunks, few slots, a small cache, a sliding window, one length
    (Benchmark(300, 120, 1, 6), ROOMY),
    (Benchmark(500, 150, 8, 80), ROOMY),
    (Benchmark(1500, 60, 24, 120), Limits(512, 256, 1e6)),
    (Benchmark(400, 100, 24, 240), Limits(2048, 10, 1e6)),
    (Benchmark(300, 200, 16, 96), Limits(1024, 256, 4200.0, fixed_tokens=32.0)),
    (Benchmark(90, 200, 12, 60), Limits(2048, 256, 1e6, window_tokens=128)),
    (Benchmark(256, 64, 16, 64, length_spread=1.0), ROOMY),
    (Benchmark(600, 1, 4, 40), ROOMY),
)


# ------------------------------------------------------------------------------------------- the schedule and its law


def step_s(batch: StepBatch):
    """A law that bends in the batch and in the context, as operators do."""
    rows = batch.n_active + batch.prompt_tokens
    linear_s = np.hypot(5e-3, 2e-5 * rows)
    context_s = np.hypot(1e-4, 4e-8 * batch.tokens) + 3e-8 * batch.windowed_tokens
    return linear_s + context_s + 2e-10 * batch.prompt_pairs + 1e-10 * batch.windowed_pairs


def gpu_j(batch: StepBatch):
    return 400.0 * step_s(batch) + 2e-3 * batch.prompt_tokens


@dataclass
class Request:
    """One request of the plain simulation."""

    prompt: int
    output: int
    sent_s: float = 0.0
    done: int = 0  # prompt tokens that are computed
    emitted: int = 0
    again: int = 0  # generated tokens that are to be computed again
    first_s: float = math.nan
    last_s: float = math.nan

    @property
    def to_prefill(self) -> int:
        return self.prompt + self.again - self.done

    @property
    def context(self) -> int:
        return self.prompt + self.emitted


def simulated(benchmark: Benchmark, limits: Limits) -> dict[str, float]:
    """Every iteration in turn, every request by itself, the cache in whole blocks."""
    rng = np.random.default_rng(benchmark.seed)
    drawn = [
        lengths(nominal, benchmark.length_spread, benchmark.n_requests, rng).tolist()
        for nominal in (benchmark.prompt_tokens, benchmark.output_tokens)
    ]
    requests = [Request(*each) for each in zip(*drawn)]
    waiting, running, now_s, energy_j = requests[: benchmark.concurrency], [], 0.0, 0.0
    to_send = requests[benchmark.concurrency :]

    def blocks(request: Request) -> int:
        return math.ceil((request.context + limits.fixed_tokens) / 16)

    while waiting or running:
        decoding = [each for each in running if not each.to_prefill]
        room, chunks = max(limits.budget_tokens - len(decoding), 1), []
        for each in [each for each in running if each.to_prefill]:
            chunks.append((each, min(room, each.to_prefill)))
            room -= chunks[-1][1]
        while waiting and room > 0 and len(running) < limits.max_num_seqs:
            needs = math.ceil((waiting[0].context + 1 + limits.fixed_tokens) / 16)
            if 16 * (sum(map(blocks, running)) + needs) > limits.kv_tokens:
                break
            running.append(waiting.pop(0))
            chunks.append((running[-1], min(room, running[-1].to_prefill)))
            room -= chunks[-1][1]
        seen = [[i + 1 for i in range(each.done, each.done + chunk)] for each, chunk in chunks]
        contexts, window = [each.context for each in decoding], limits.window_tokens
        batch = StepBatch(
            len(decoding),
            sum(contexts),
            sum(min(context, window) for context in contexts),
            sum(chunk for _, chunk in chunks),
            sum(map(sum, seen)),
            sum(min(pair, window) for pairs in seen for pair in pairs),
        )
        now_s, energy_j = now_s + step_s(batch), energy_j + gpu_j(batch)
        for each, chunk in chunks:
            each.done += chunk
        for each in [*decoding, *(each for each, _ in chunks if not each.to_prefill)]:
            each.emitted += 1
            each.first_s = now_s if math.isnan(each.first_s) else each.first_s
            if each.emitted == each.output:
                each.last_s = now_s
                running.remove(each)
                if to_send:
                    to_send[0].sent_s = now_s
                    waiting.append(to_send.pop(0))
        while 16 * sum(map(blocks, running)) > limits.kv_tokens and len(running) > 1:
            lost = running.pop()
            lost.done, lost.again = 0, lost.emitted
            waiting.insert(0, lost)
    ttft_s = [each.first_s - each.sent_s for each in requests]
    tpot_s = [(each.last_s - each.first_s) / (each.output - 1) for each in requests if each.output > 1]
    return {
        "ttft_s": float(np.mean(ttft_s)),
        "ttft_p99_s": float(np.percentile(ttft_s, 99)),
        "tpot_s": float(np.mean(tpot_s)) if tpot_s else 0.0,
        "output_tok_per_s": sum(each.output for each in requests) / now_s,
        "gpu_w": energy_j / now_s,
        "gpu_j_per_request": energy_j / len(requests),
    }


def outcome_of(run):
    return outcome(run, step_s(run.batch), gpu_j(run.batch))


@pytest.mark.parametrize(("benchmark", "limits"), RUNS)
def test_a_schedule_agrees_with_a_plain_simulation(benchmark, limits):
    found = outcome_of(schedule(benchmark, limits))
    for name, plain in simulated(benchmark, limits).items():
        assert getattr(found, name) == pytest.approx(plain, rel=WITHIN, abs=1e-12), name


@pytest.mark.parametrize(("benchmark", "limits"), RUNS)
def test_every_token_is_in_the_schedule_once(benchmark, limits):
    run = schedule(benchmark, limits)
    emitted = run.output_tokens.sum()
    prompts = lengths(
        benchmark.prompt_tokens, benchmark.length_spread, benchmark.n_requests, np.random.default_rng(benchmark.seed)
    )
    if run.n_preempted == 0:
        assert run.repeats @ run.batch.n_active + benchmark.n_requests == emitted
        assert run.batch.prompt_tokens.sum() == prompts.sum()
    else:
        assert run.batch.prompt_tokens.sum() > prompts.sum()
    assert np.all(run.batch.n_active + run.batch.prompt_tokens > 0)
    assert np.all((run.sent < run.first) & (run.first <= run.last) & (run.last <= len(run.repeats)))
    assert run.batch.n_active.max() <= min(benchmark.concurrency, limits.max_num_seqs)
    assert np.all(run.batch.prompt_tokens <= np.maximum(limits.budget_tokens - run.batch.n_active, 1))
    assert np.all(run.repeats[run.batch.prompt_tokens > 0] == 1)


def test_a_small_cache_preempts_and_few_slots_queue():
    assert schedule(*RUNS[4]).n_preempted > 0
    few, many = (outcome_of(schedule(RUNS[3][0], limits)) for limits in (RUNS[3][1], ROOMY))
    assert few.ttft_s > 3 * many.ttft_s
    with pytest.raises(ValueError, match="need a KV cache that holds the longest request"):
        schedule(Benchmark(300, 200, 2, 4), Limits(1024, 256, 400.0))


def test_what_takes_twice_as_long_changes_no_batch():
    run = schedule(*RUNS[1])
    once, twice = (outcome(run, k * step_s(run.batch), k * gpu_j(run.batch)) for k in (1.0, 2.0))
    assert (twice.ttft_s, twice.tpot_s) == pytest.approx((2 * once.ttft_s, 2 * once.tpot_s))
    assert twice.output_tok_per_s == pytest.approx(once.output_tok_per_s / 2)
    assert twice.gpu_w == pytest.approx(once.gpu_w)


def test_lengths_have_the_mean_of_the_uniform():
    drawn = lengths(1000, 0.8, 40, np.random.default_rng(3))
    assert abs(drawn.mean() - 900) <= 1 and drawn.min() >= 800 and drawn.max() <= 1000
    assert set(lengths(1000, 1.0, 40, np.random.default_rng(3))) == {1000}


# ------------------------------------------------------------------------------------------------------- of an engine


@pytest.fixture(scope="module")
def llama():
    return engine_entry(EngineSpec("h100", "llama-3.1-70b", 4, "fp8")).engine


def test_a_request_alone_takes_its_prefill_and_its_steps(llama):
    """One in flight: nothing waits, so the laws say all."""
    (found,) = predicted(llama, Sigmas(0, 0, 0), [Benchmark(1000, 200, 1, 10, length_spread=1.0)])
    prefill_s = float(llama.prefill.per_token_s * 1000 + llama.prefill.per_token2_s * 1000**2)
    step_s = float(llama.decode.step_s(1.0, 1100.0))
    assert found.ttft_s == pytest.approx(prefill_s + float(llama.decode.batch_s(0.0, 0.0, 0.0)), rel=1e-3)
    assert found.tpot_s == pytest.approx(step_s, rel=1e-3)
    assert found.ttft_p99_s == pytest.approx(found.ttft_s)
    assert found.output_tok_per_s == pytest.approx(200 / (found.ttft_s + 199 * found.tpot_s))
    assert found.tok_per_j == pytest.approx(found.output_tok_per_s / found.power_w)
    assert found.j_per_request == pytest.approx(200 / found.tok_per_j)
    assert all(low == pytest.approx(high) for low, high in found.intervals.values())


def test_more_in_flight_give_more_tokens_and_more_of_each_wait(llama):
    benchmarks = [Benchmark(1000, 100, n, 10 * n) for n in (1, 4, 16, 64, 128)]
    found = predicted(llama, Sigmas(0.2, 0.4, 0.1), benchmarks)
    for name in ("output_tok_per_s", "tpot_s", "ttft_s", "power_w", "tok_per_j"):
        assert np.all(np.diff([getattr(each, name) for each in found if each]) > 0), name
    for each in found:
        assert each is not None
        for name, (low, high) in each.intervals.items():
            assert low < getattr(each, name) < high


def test_an_interval_is_that_of_an_engine_off_by_its_errors(llama):
    """Of one factor alone: what is predicted of the engine that is slower by it."""
    benchmark, z = Benchmark(1000, 100, 16, 160), 1.6448536
    (found,) = predicted(llama, Sigmas(0.2, 0.0, 0.0), [benchmark])
    from dataclasses import replace

    slower = replace(llama, decode=llama.decode.slower(math.exp(z * 0.2)))
    faster = replace(llama, decode=llama.decode.slower(math.exp(-z * 0.2)))
    ends = [predicted(each, Sigmas(0, 0, 0), [benchmark])[0].tpot_s for each in (faster, slower)]
    assert found.intervals["tpot_s"][1] / found.intervals["tpot_s"][0] == pytest.approx(ends[1] / ends[0], rel=1e-6)
    assert found.intervals["power_w"][1] == pytest.approx(found.power_w, rel=0.05)


def test_what_does_not_fit_is_not_predicted(llama):
    room = limits_of(llama).kv_tokens
    assert predicted(llama, Sigmas(0, 0, 0), [Benchmark(int(room), 10, 1, 1)]) == [None]
    assert tuple(vars(schedule(*RUNS[0]).batch)) == FIELDS


# --------------------------------------------------------------------------------------------------- names of others


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("b200_sxm", "b200"),
        ("gb200", "gb200"),
        ("b200-trt", "b200"),
        ("h100 nvl-less box", "h100"),
        ("mi300x", "mi300x"),
    ],
)
def test_gpus_are_known_by_their_words(theirs, ours):
    assert gpu_name(theirs) == ours


@pytest.mark.parametrize(
    ("theirs", "ours", "precision"),
    [
        ("meta-llama/Llama-3.1-70B", "llama-3.1-70b", None),
        ("RedHatAI/Meta-Llama-3.1-70B-Instruct-FP8", "llama-3.1-70b", "fp8"),
        ("nvidia/Qwen3-32B-NVFP4", "qwen3-32b", "nvfp4"),
        ("Qwen/Qwen3-235B-A22B-FP8", "qwen3-235b-a22b", "fp8"),
        ("deepseek-ai/DeepSeek-R1-0528", "deepseek-v3", None),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", None, None),
        ("some/thing-7B-AWQ", None, "int4"),
    ],
)
def test_llms_are_known_by_their_checkpoints(theirs, ours, precision):
    assert (llm_name(theirs), precision_of_checkpoint(theirs)) == (ours, precision)


def test_four_bits_are_the_checkpoints_own():
    assert precision_name("fp4", "gpt-oss-120b") == "mxfp4" and precision_name("FP4", "llama-3.1-70b") == "nvfp4"
    assert precision_name("bfloat16", "") == "bf16"
