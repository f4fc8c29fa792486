"""A closed-loop benchmark, as every iteration of it would have it; and results of benchmarks, read as they are."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from fleetopt_jax.calibrate.benchmarks import fit_benchmarks
from fleetopt_jax.calibrate.measurements import read_measurements
from fleetopt_jax.calibrate.names import gpu_name, llm_name, precision_name, precision_of_checkpoint
from fleetopt_jax.calibrate.points import Point, benchmark, points_of, read_points
from fleetopt_jax.calibrate.predict import Sigmas, limits_of, predicted
from fleetopt_jax.calibrate.readers import read_rows
from fleetopt_jax.catalog.engines import engine_entry
from fleetopt_jax.catalog.spec import MEASURED_SERVING, EngineSpec
from fleetopt_jax.cli.codes import BAD_INPUT, OK
from fleetopt_jax.cli.main import main
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.documents.engine import load_engine
from fleetopt_jax.documents.predict import errors_of
from fleetopt_jax.laws.closed_loop import Benchmark, Limits, lengths, outcome, schedule
from fleetopt_jax.laws.mixed_step import StepBatch

WITHIN = 1e-4  # of the plain simulation: what jumps over equal iterations cost
PREEMPTED_WITHIN = 0.03  # what a cache costs that is counted in tokens, not in blocks
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
    run = schedule(benchmark, limits)
    found, within = outcome_of(run), PREEMPTED_WITHIN if run.n_preempted else WITHIN
    for name, plain in simulated(benchmark, limits).items():
        assert getattr(found, name) == pytest.approx(plain, rel=within, abs=1e-12), name


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


def test_limits_that_do_not_bind_change_nothing():
    """And their schedules are made once."""
    benchmark = Benchmark(500, 150, 8, 80)
    kept = schedule(benchmark, ROOMY)
    assert schedule(benchmark, replace(ROOMY, max_num_seqs=8, kv_tokens=2e5, fixed_tokens=100.0)) is kept
    tight = schedule(benchmark, replace(ROOMY, kv_tokens=3000.0))
    assert tight is not kept and len(tight.repeats) > len(kept.repeats)


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
    return engine_entry(EngineSpec("h100", "llama-3.1-70b", 4, "fp8", serving=MEASURED_SERVING)).engine


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
    slower = replace(llama, decode=llama.decode.slower(math.exp(z * 0.2)))
    faster = replace(llama, decode=llama.decode.slower(math.exp(-z * 0.2)))
    ends = [predicted(each, Sigmas(0, 0, 0), [benchmark])[0].tpot_s for each in (faster, slower)]
    assert found.intervals["tpot_s"][1] / found.intervals["tpot_s"][0] == pytest.approx(ends[1] / ends[0], rel=1e-6)
    assert found.intervals["power_w"][1] == pytest.approx(found.power_w, rel=0.05)


def test_what_does_not_fit_is_not_predicted(llama):
    room = limits_of(llama).kv_tokens
    assert predicted(llama, Sigmas(0, 0, 0), [Benchmark(int(room), 10, 1, 1)]) == [None]
    of_a_batch = ("n_active", "tokens", "windowed_tokens", "prompt_tokens", "prompt_pairs", "windowed_pairs")
    assert tuple(vars(schedule(*RUNS[0]).batch)) == of_a_batch  # in which order entries have them


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


# ------------------------------------------------------------------------------------------------ results of benchmarks

BENCHMARKS = Path(__file__).parent / "benchmarks"  # made of predictions: decode 0.9, prefill 1.3, watts 1.05 times ours
ENGINE = ("--gpu", "h100", "--tp", "4", "--llm", "llama-3.1-70b", "--precision", "fp8")
SEEN = {"ttft_s": 0.157, "tpot_s": 0.013, "output_tok_per_s": 297.0, "power_w": 1861.0}  # with 4 in flight
FORMATS = (  # (file, what it is taken for, rows, those that can be predicted, quantities that were measured)
    ("vllm.jsonl", "vLLM bench serve", 3, 3, ("ttft_s", "tpot_s", "output_tok_per_s")),
    ("aiperf", "aiperf", 3, 3, tuple(SEEN)),
    ("guidellm.json", "GuideLLM", 4, 3, ("ttft_s", "tpot_s", "output_tok_per_s")),
    ("inferencex.json", "InferenceX", 5, 3, ("ttft_s", "tpot_s", "output_tok_per_s")),
    ("points.csv", "csv, AIConfigurator's points", 8, 3, ("ttft_s", "tpot_s")),
    ("mlenergy.csv", "csv, ML.ENERGY's table", 4, 3, ("output_tok_per_s", "power_w")),
    ("own.csv", "csv", 3, 3, tuple(SEEN)),
)


@pytest.mark.parametrize(("name", "layout", "n", "n_good", "seen"), FORMATS)
def test_a_format_is_known_by_what_is_in_it(name, layout, n, n_good, seen):
    file = read_points(BENCHMARKS / name)
    assert (file.layout, len(file.points)) == (layout, n)
    assert [point.row for point in file.points] == list(range(n))
    first = file.points[0]
    assert {each.concurrency for each in file.points[:3]} == {4, 16, 64}
    assert {what: first.seen(4)[what] for what in seen} == pytest.approx({what: SEEN[what] for what in seen}, rel=1e-2)
    load = benchmark(first, first.isl or 2000, first.osl or 400)
    assert (load.prompt_tokens, load.concurrency, load.n_requests) == (2000, 4, 40)
    assert load.output_tokens == (360 if name == "mlenergy.csv" else 400)  # its mean of 360 is a whole number
    assert sum(not point.why for point in file.points) >= n_good


@pytest.mark.parametrize("name", [name for name, *_ in FORMATS if name != "mlenergy.csv"])
def test_factors_are_found_in_every_format_of_whole_benchmarks(name, llama):
    """Of what the files were made with; the host, which was not changed, keeps the catalog's value."""
    rows = read_measurements(BENCHMARKS / name, llm="llama-3.1-70b", precision="fp8", dp=1).rows
    points = [point for point in points_of(rows) if not point.parallel]
    fit = fit_benchmarks(llama, points)
    assert fit.parameters == pytest.approx(
        {"decode_factor": 0.9, "prefill_factor": 1.3, "iteration_s": 0.0, "sequence_s": 0.0}, rel=2e-3, abs=1e-9
    )
    assert fit.names == ("decode_factor", "prefill_factor") and len(fit.notes) == 2
    assert max(fit.left_out_mape.values()) < 2e-3
    if name in ("aiperf", "own.csv"):
        assert fit.power_factor == pytest.approx(1.05, abs=0.01)
    else:
        assert fit.power_factor is None
    np.testing.assert_allclose(fit.step.base_s, 0.9 * llama.decode.base_s, rtol=2e-3)


def test_what_the_points_do_not_tell_keeps_the_catalogs_value(llama):
    """One load, twice: one factor at most. And a host that is slower is found where the loads differ."""
    loads = [(n, isl) for n in (1, 4, 16, 64, 256) for isl in (200, 2000)]
    slow = replace(llama, decode=replace(llama.decode, base_s=llama.decode.base_s + 5e-3))
    made = []
    for i, (n, isl) in enumerate(loads):
        (seen,) = predicted(slow, Sigmas(0, 0, 0), [Benchmark(isl, 200, n, 10 * n)])
        assert seen is not None
        measured = {"ttft_s": seen.ttft_s, "tpot_s": seen.tpot_s}
        made.append(Point(i, isl=isl, osl=200, concurrency=n, measured=measured))
    fit = fit_benchmarks(llama, made)
    assert fit.parameters["iteration_s"] == pytest.approx(5e-3, rel=0.02)
    assert "sequence_s" not in fit.names
    alone = fit_benchmarks(llama, [made[3], made[3]])
    assert len(alone.names) < 3 and len(alone.notes) == 4 - len(alone.names)
    with pytest.raises(BadInput, match="1 points; factors need at least 2"):
        fit_benchmarks(llama, made[:1])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{}", "is no benchmark result that is known: its keys are none; need one of InferenceX"),
        ("[]", "is an empty list"),
        ("[1]", "1 is no object"),
        ('{"a": ', "is not JSON"),
        ("batch\n", "no rows of measurements"),
        ("a,b\n1,2\n", "columns are a, b; need max_concurrency"),
        ("conc,isl,osl,mean_ttft\n4,1,1,minus\n", "mean_ttft = 'minus'; need a number"),
        ("conc,conc\n4,1\n", "column 'conc' is there more than once"),
    ],
)
def test_what_is_no_result_is_refused_in_one_line(tmp_path, content, says):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(BadInput) as caught:
        read_points(path)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(BadInput, match="is a directory with 0 files that end in"):
        read_rows(tmp_path)


# --------------------------------------------------------------------------------------------------------- the command


def ran(capsys, *words: object) -> tuple[int, str, str]:
    try:
        code = main([str(word) for word in words])
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


def test_predict_says_a_point_for_each_concurrency(capsys, tmp_path, monkeypatch):
    figure = tmp_path / "curves.svg"
    words = ("predict", *ENGINE, "--isl", 1000, "--osl", 100, "--concurrency", "2,8", "--figure", figure)
    code, out, err = ran(capsys, *words, "--json")
    document = json.loads(out)
    assert (code, err, document["skipped"], document["errors"]) == (OK, "", [], {})
    assert [point["concurrency"] for point in document["points"]] == [2, 8]
    point = document["points"][0]
    wanted = ("gpu", "llm", "tp", "precision", "serving", "isl", "osl", "quality", "measured")
    said = {name: point[name] for name in wanted}
    assert said == dict(zip(wanted, ("h100", "llama-3.1-70b", 4, "fp8", "vllm", 1000, 100, "measured", None)))
    assert point["output_tok_per_s_per_gpu"] == point["output_tok_per_s"] / 4
    assert figure.read_text().startswith("<?xml")
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = ran(capsys, *words)
    assert code == OK and max(map(len, out.splitlines())) <= 80
    assert "mean TTFT" in out and "tok/J" in out


def test_predict_compares_with_every_row_of_a_file(capsys, tmp_path, monkeypatch):
    figure = tmp_path / "against.svg"
    words = ("predict", "--points", BENCHMARKS / "points.csv", "--figure", figure)
    code, out, err = ran(capsys, *words, "--json")
    document = json.loads(out)
    assert code == OK and err.count("\n") == 1 and "AIConfigurator's points" in err
    assert [point["row"] for point in document["points"]] == [0, 1, 2, 7]
    assert [(point["tp"], point["ep"], point["dp"], point["pp"]) for point in document["points"]][-1] == (8, 8, 1, 1)
    assert document["points"][0]["measured"] == pytest.approx({"ttft_s": 0.15717, "tpot_s": 0.013})
    whys = {each["row"]: each["why"] for each in document["skipped"]}
    assert sorted(whys) == [3, 4, 5, 6]
    assert whys[3] == "unknown LLM nobody/Unheard-7B" and whys[4] == "disaggregated"
    assert whys[5] == "the precision is not said" and "does not fit" in whys[6]
    errors = document["errors"]
    assert (
        errors["by_gpu"]["h100"] == errors["by_llm"]["llama-3.1-70b"] and errors["all"] == errors["by_serving"]["vllm"]
    )
    off = [abs(point["tpot_s"] / point["measured"]["tpot_s"] - 1) for point in document["points"]]
    assert errors["all"]["tpot_s"]["mean"] == pytest.approx(np.mean(off))
    assert errors["all"]["tpot_s"]["median"] == pytest.approx(np.median(off))
    assert figure.read_text().startswith("<?xml")
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = ran(capsys, *words, "--quiet")
    assert max(map(len, out.splitlines())) <= 80 and "4 of 8 rows predicted" in out and "1 disaggregated" in out


def test_medians_are_compared_where_a_file_has_no_means():
    point = {"ttft_s": 2.0, "ttft_median_s": 1.0, "tpot_s": 1.0, "tpot_median_s": 1.0, "output_tok_per_s": 1.0}
    point |= {"power_w": 1.0, "gpu": "a", "llm": "b", "serving": "c", "measured": {"ttft_median_s": 2.0}}
    assert errors_of([point])["all"]["ttft_s"] == {"n": 1, "mean": 0.5, "median": 0.5, "bias": -0.5}


def test_options_say_what_a_file_does_not(capsys):
    code, out, _ = ran(capsys, "predict", "--points", BENCHMARKS / "own.csv", "--json")
    assert code == OK and {each["why"] for each in json.loads(out)["skipped"]} == {"gpu is not said: give --gpu"}
    code, out, _ = ran(capsys, "predict", "--points", BENCHMARKS / "mlenergy.csv", "--isl", 2000, "--json")
    document = json.loads(out)
    assert [point["isl"] for point in document["points"]] == [2000, 2000, 2000]
    assert [each["why"] for each in document["skipped"]] == ["images or video"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--gpu", "h1000"), "--gpu: unknown name 'h1000'"),
        (("--concurrency", "0"), "0 is not allowed: need a whole number from 1"),
        (("--serving", "magic"), "unknown name 'magic'"),
        (("--isl", "9000000", "--osl", "10"), "--isl: the KV cache does not hold one request"),
        (("--points", "nowhere.csv"), "nowhere.csv: no such file"),
    ],
)
def test_a_prediction_that_cannot_be_made_is_refused_in_one_line(capsys, words, says):
    code, out, err = ran(capsys, "predict", *words)
    assert (code, out, err.count("\n")) == (BAD_INPUT, "", 1) and says in err


def test_an_engine_calibrated_with_benchmarks_predicts_them(capsys, tmp_path, monkeypatch):
    mine, figure = tmp_path / "mine.json", tmp_path / "left.svg"
    monkeypatch.setenv("COLUMNS", "80")
    words = ("calibrate", BENCHMARKS / "aiperf", *ENGINE, "--serving", "vllm-0.11", "--out", mine, "--figure", figure)
    code, out, _ = ran(capsys, *words)
    assert code == OK and max(map(len, out.splitlines())) <= 80 and figure.exists()
    assert "prefill, over the catalog's" in out and "keeps the catalog's value" in out
    assert "Power is 1.05 times the catalog's" in out
    spec = load_engine(mine)
    assert spec.laws is not None and spec.laws.prefill is not None and spec.laws.power is not None
    code, out, _ = ran(capsys, "predict", "--points", BENCHMARKS / "aiperf", "--gpu", mine, "--json")
    errors = json.loads(out)["errors"]["all"]
    assert code == OK and {name: errors[name]["n"] for name in SEEN} == dict.fromkeys(SEEN, 3)
    assert max(errors[name]["mean"] for name in SEEN) < 0.02
