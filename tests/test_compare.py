"""What was observed of a fleet beside what the laws say: known changes are named, files of any habit are read, wrong
ones refused."""

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleetopt_jax._optimize.compare import LEVEL, METERS, ObservedFigure, compare, predicted
from fleetopt_jax._optimize.engine_errors import EngineFactors
from fleetopt_jax._optimize.plan import Plan
from fleetopt_jax._optimize.problem import make_problem
from fleetopt_jax._optimize.search import evaluate_given
from fleetopt_jax._optimize.shifted import FIGURES, Trial, no_shift
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.cli.codes import BAD_INPUT, OK
from fleetopt_jax.cli.main import main
from fleetopt_jax.core.errors import BadField, BadInput
from fleetopt_jax.core.struct import as_floats
from fleetopt_jax.documents.observed import ObservedFile, load_observed
from fleetopt_jax.documents.plan import load_plan
from fleetopt_jax.report.compare import explained_said, input_said, verdict_lines

COLUMNS = ("output_tok_per_s", "power_w", "ttft_p99_s", "itl_s")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def plan_path(folder) -> Path:
    """Two pools of the published system, whose laws compile quickly, at 2,000 requests a second, and room for more."""
    rows = [(i * 0.5, 200 + (i * 37) % 400 + (6000 if i % 13 == 0 else 0), 40 + (i * 11) % 90) for i in range(40)]
    trace, path = folder / "trace.csv", folder / "plan.json"
    trace.write_text("timestamp_s,prompt_tokens,output_tokens\n" + "".join(f"{t},{p},{o}\n" for t, p, o in rows))
    how = ["--workload", str(trace), "--rate", "2000", "--assume", "published", "--quiet", "--json", "--out", str(path)]
    assert main(["optimize", *how]) == OK
    document = json.loads(path.read_text())
    for pool in document["pools"]:
        pool["n_instances"] = math.ceil(1.8 * pool["n_instances"])
        pool["n_gpus"] = pool["tp"] * pool["n_instances"]
    path.write_text(json.dumps(document))
    return path


@pytest.fixture(scope="module")
def plan(plan_path) -> Plan:
    return load_plan(plan_path)


def shifted(plan: Plan, prompts: float = 1.0, outputs: float = 1.0, **shift: Any) -> Trial:
    """A trial with some inputs so many times the plan's; of engines by `step`, `power` or `prefill`."""
    base = no_shift(len(plan.specs))
    factors = {name: shift.pop(name, 1.0) * getattr(base.engine, name) for name in ("step", "power", "prefill")}
    engine = EngineFactors(**as_floats(**factors))
    return Trial(dataclasses.replace(base, engine=engine, **as_floats(**shift)), prompts, outputs)


def seen(plan: Plan, trial: Trial, names: Sequence[str] = COLUMNS, pools: Sequence[int | None] = (None, 0, 1)):
    """What the laws say of a trial, as if it had been observed; 1 where they say nothing."""
    asked = [ObservedFigure(name, 1.0, pool) for pool, name in itertools.product(pools, names)]
    values = predicted(plan, asked, [trial])[0].tolist()
    known = [1.0 if math.isnan(value) else value for value in values]
    return [dataclasses.replace(each, value=value) for each, value in zip(asked, known, strict=True)]


def written(path: Path, figures: Sequence[ObservedFigure]) -> Path:
    """As csv, latencies in ms, power in kW."""
    titles = {"output_tok_per_s": "tokens/s", "power_w": "kW", "rate_per_s": "rps"}
    names = list(dict.fromkeys(each.name for each in figures))
    rows = [",".join(["pool", *(titles.get(name, name.removesuffix("_s") + "_ms") for name in names)])]
    for pool in dict.fromkeys(each.pool for each in figures):
        sizes = {"power_w": 1e3, "output_tok_per_s": 1.0, "rate_per_s": 1.0}
        values = [each.value / sizes.get(each.name, 1e-3) for each in figures if each.pool == pool]
        rows.append(",".join(["fleet" if pool is None else str(pool + 1), *map(repr, values)]))
    path.write_text("\n".join(rows) + "\n")
    return path


def test_a_known_change_is_named_with_its_factor(plan, tmp_path):
    for name, pool, factor, how in (
        ("decode", None, 1.15, {"step": 1.15}),
        ("rate", None, 1.3, {"rate": 1.3}),
        ("outputs", None, 0.8, {"outputs": 0.8}),
        ("power", None, 1.2, {"power": 1.2}),
        ("instances", 1, 0.75, {"instances": np.array([1.0, 0.75])}),
    ):
        file = load_observed(written(tmp_path / "seen.csv", seen(plan, shifted(plan, **how))), plan)
        assert len(file.figures) == 12 and not file.left_out
        best = compare(plan, file.figures).planned.explanations[0]
        assert (best.input, best.pool) == (name, pool)
        assert best.factor == pytest.approx(factor, rel=0.01) and best.removes > 0.99 and not best.at_bound
        assert best.figures == pytest.approx([each.value for each in file.figures], rel=0.02)


@pytest.mark.nightly
def test_physical_laws_tell_prompts_prefill_and_bursts_apart(workload):
    spec = EngineSpec("h100", serving="vllm-0.11")
    problem = make_problem(workload, [spec], n_pools=2)
    numbers = {"window_tokens": [2048, 19136], "gamma": [1, 1], "n_instances": [4, 6]}
    plan, names = evaluate_given(problem, [spec] * 2, **numbers), [name for name in FIGURES if name != "rate_per_s"]
    for name, factor, how in (
        ("prompts", 1.2, {"prompts": 1.2}),
        ("prefill", 0.7, {"prefill": 0.7}),
        ("burstiness", 3.0, {"burstiness": 3.0}),
        ("decode", 1.15, {"step": 1.15}),
    ):
        found = compare(plan, seen(plan, shifted(plan, **how), names))
        assert [(each.name, each.pool) for each in found.not_compared] == [("itl_p99_s", None)]  # no law of all pools
        best = found.planned.explanations[0]
        assert best.input == name and best.factor == pytest.approx(factor, rel=0.02) and best.removes > 0.98
        assert best.hit_frac == (pytest.approx(0.3, abs=0.02) if name == "prefill" else None)


def test_an_observed_rate_is_compared_and_then_granted(plan):
    trial = shifted(plan, rate=1.3, step=1.15)
    found = compare(plan, seen(plan, trial, ("rate_per_s", *COLUMNS)))
    there = found.at_observed_rate
    assert there is not None and there.rate_per_s == pytest.approx(2600.0)
    assert not all(each.inside for each in found.planned.figures)
    assert found.planned.explanations[0].input == "rate"
    assert all(each.inside for each in there.figures)
    assert "rate" not in {each.input for each in there.explanations}
    assert there.explanations[0].input == "decode"
    assert there.explanations[0].factor == pytest.approx(1.15, rel=0.01)
    same = compare(plan, [ObservedFigure("rate_per_s", 2000.0 * (1.0 + METERS))])
    assert same.at_observed_rate is None and same.planned.figures[0].inside


def test_errors_alone_and_what_nothing_explains_are_said(plan):
    as_planned = compare(plan, seen(plan, shifted(plan))).planned
    assert all(each.inside for each in as_planned.figures) and as_planned.misfit < 1e-9
    odd = [
        dataclasses.replace(each, value=each.value * (4.0 if each.pool else 0.25)) for each in seen(plan, shifted(plan))
    ]
    account = compare(plan, odd).planned
    assert account.best is None and not any(each.inside for each in account.figures)
    assert 0.0 <= account.explanations[0].removes < 0.5


def test_a_figure_that_is_none_is_refused(plan):
    for figure, field in (
        (ObservedFigure("speed", 1.0), "observed"),
        (ObservedFigure("itl_s", math.nan), "itl_s"),
        (ObservedFigure("itl_s", 1.0, 2), "pool"),
        (ObservedFigure("itl_s", 1.0, 0, (2.0, 3.0)), "itl_s"),
        (ObservedFigure("ttft_p50_s", 1.0), "observed"),  # of which the published laws say nothing
    ):
        with pytest.raises(BadField) as refused:
            compare(plan, [figure])
        assert refused.value.field == field


# --- csv --------------------------------------------------------------------------------------------------------------


def read(tmp_path: Path, plan: Plan, text: str) -> ObservedFile:
    path = tmp_path / "seen.csv"
    path.write_text(text)
    return load_observed(path, plan)


def figures_of(file: ObservedFile) -> dict[tuple[int | None, str], float]:
    return {(each.pool, each.name): each.value for each in file.figures}


@pytest.mark.parametrize(
    ("title", "cell", "figure", "value"),
    [
        ("ttft_p99_ms", "480", "ttft_p99_s", 0.48),
        ("TTFT P99 [ms]", "480", "ttft_p99_s", 0.48),
        ("p99_ttft_s", "0.48", "ttft_p99_s", 0.48),
        ("Time to First Token (p50, seconds)", "0.2", "ttft_p50_s", 0.2),
        ("median ttft", "200", "ttft_p50_s", 0.2),
        ("ttft", "0.2", "ttft_s", 0.2),
        ("mean_ttft_ms", "200", "ttft_s", 0.2),
        ("itl", "0.03", "itl_s", 0.03),
        ("itl", "30", "itl_s", 0.03),
        ("tpot", "30", "itl_s", 0.03),
        ("Inter-Token Latency avg (ms)", "30", "itl_s", 0.03),
        ("time_per_output_token_us", "30000", "itl_s", 0.03),
        ("P99 ITL ms", "90", "itl_p99_s", 0.09),
        ("tokens/s", "5e4", "output_tok_per_s", 5e4),
        ("output_tok_per_s", "50000", "output_tok_per_s", 5e4),
        ("Output throughput (tok/s)", "50000", "output_tok_per_s", 5e4),
        ("tokens per minute", "3e6", "output_tok_per_s", 5e4),
        ("tps", "50000", "output_tok_per_s", 5e4),
        ("kw", "66", "power_w", 66e3),
        ("power_w", "66000", "power_w", 66e3),
        ("Power [kW]", "66", "power_w", 66e3),
        ("rate", "2000", "rate_per_s", 2000.0),
        ("qps", "2000", "rate_per_s", 2000.0),
        ("rps", "2000", "rate_per_s", 2000.0),
        ("requests/s", "2000", "rate_per_s", 2000.0),
        ("arrival_rate_per_s", "2000", "rate_per_s", 2000.0),
        ("req/min", "120000", "rate_per_s", 2000.0),
    ],
)
def test_columns_are_known_by_any_habit(tmp_path, plan, title, cell, figure, value):
    found = figures_of(read(tmp_path, plan, f'"{title}"\n{cell}\n'))
    assert found == {(None, figure): pytest.approx(value)}


def test_pools_are_numbers_windows_or_names(tmp_path, plan):
    first, second = (round(window) for window in np.asarray(plan.fleet.window_tokens).tolist())
    for one, other in (("1", "2"), ("pool 1", "Pool-2"), (str(first), f"fleetopt-pool-{second}")):
        found = figures_of(read(tmp_path, plan, f"Pool,itl_ms\n{one},20\n{other},30\nall,25\n"))
        assert found == pytest.approx({(0, "itl_s"): 0.02, (1, "itl_s"): 0.03, (None, "itl_s"): 0.025})


def test_what_the_laws_do_not_say_is_left_out(tmp_path, plan):
    text = "itl_ms,tpot_ms,ttft_p95_ms,ttft_std_ms,error_rate,hour,total_tokens,prompt_tokens_per_s,power_w_per_gpu\n"
    file = read(tmp_path, plan, text + "20,21,3,4,5,6,7,8,9\n")
    assert figures_of(file) == {(None, "itl_s"): 0.02}
    assert len(file.left_out) == 8 and file.left_out[0] == "tpot_ms: itl_s is in itl_ms"


# --- pages of metrics -------------------------------------------------------------------------------------------------

EDGES = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, math.inf)


def page(
    values: Mapping[str, np.ndarray], requests: int, tokens: int, labels: str = 'model_name="m",engine="0"'
) -> str:
    """What a server of vLLM says of latencies [s] by metric, and of its counters."""
    lines = []
    for name, seconds in values.items():
        lines += [f"# TYPE {name} histogram"]
        lines += [
            f'{name}_bucket{{{labels},le="{"+Inf" if edge == math.inf else edge}"}} {np.sum(seconds <= edge):.1f}'
            for edge in EDGES
        ]
        lines += [f"{name}_sum{{{labels}}} {seconds.sum()}", f"{name}_count{{{labels}}} {len(seconds)}"]
    lines += [f"vllm:generation_tokens_total{{{labels}}} {tokens}"]
    lines += [
        f'vllm:request_success_total{{{labels},finished_reason="{why}"}} {requests / 2}' for why in ("stop", "length")
    ]
    return "\n".join([*lines, "process_start_time_seconds 1.7e9"]) + "\n"


@pytest.fixture(scope="module")
def latencies() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ttft, itl = 0.05 * np.exp(0.6 * rng.normal(size=20_000)), 0.015 * np.exp(0.2 * rng.normal(size=20_000))
    return {"vllm:time_to_first_token_seconds": ttft, "vllm:inter_token_latency_seconds": itl}


def test_histograms_give_quantiles_within_their_buckets(tmp_path, plan, latencies):
    path = tmp_path / "metrics.prom"
    path.write_text(page(latencies, 20_000, 10**6))
    file = load_observed(path, plan)
    found = {each.name: each for each in file.figures}
    ttft, itl = latencies.values()
    assert found.keys() == {"ttft_s", "ttft_p50_s", "ttft_p99_s", "itl_s", "itl_p99_s"}
    for name, share, seconds in (("ttft_p50_s", 0.5, ttft), ("ttft_p99_s", 0.99, ttft), ("itl_p99_s", 0.99, itl)):
        low, high = found[name].between or (0.0, 0.0)
        assert low <= np.quantile(seconds, share) <= high and low < found[name].value < high
    assert found["ttft_s"].value == pytest.approx(ttft.mean()) and found["ttft_s"].between is None
    assert "give --over SECONDS" in file.left_out[0]


def test_two_pages_tell_what_was_counted_between_them(tmp_path, plan, latencies):
    """From every instance: a page after another in one file, or what a Prometheus that gathers them says."""
    before, after = tmp_path / "before.prom", tmp_path / "after.prom"
    n = round(float(plan.metrics.n_instances))
    twice = {name: np.concatenate([seconds, 2.0 * seconds]) for name, seconds in latencies.items()}
    before.write_text(page(latencies, 1000, 50_000) * n)
    after.write_text("".join(page(twice, 4000, 350_000, f'instance="{i}"') for i in range(n)))
    found = figures_of(load_observed(after, plan, since=before, over_s=60.0))
    assert found[None, "ttft_s"] == pytest.approx(2.0 * latencies["vllm:time_to_first_token_seconds"].mean())
    assert found[None, "rate_per_s"] == pytest.approx(3000 * n / 60.0)
    assert found[None, "output_tok_per_s"] == pytest.approx(300_000 * n / 60.0)
    with pytest.raises(BadInput, match=r"falls from .* earlier page of the same servers"):
        load_observed(before, plan, since=after)
    of_pool = tmp_path / "pool.prom"
    of_pool.write_text(page(latencies, 1000, 50_000, 'pool="2"'))
    file = load_observed(of_pool, plan, over_s=60.0)
    assert {each.pool for each in file.figures} == {1}
    (why,) = file.left_out
    assert why.startswith("pool 2 has") and "the file pages of 1 server:" in why


def test_a_bucket_without_end_only_says_above(plan):
    (predicted_s,) = (each.value for each in seen(plan, shifted(plan), ["itl_s"], [None]))
    above = ObservedFigure("itl_s", 0.5 * predicted_s, None, (0.5 * predicted_s, math.inf))
    (figure,) = compare(plan, [above]).planned.figures
    assert figure.inside and figure.log_off == 0.0
    beyond = dataclasses.replace(above, value=9.0 * predicted_s, between=(9.0 * predicted_s, math.inf))
    (figure,) = compare(plan, [beyond]).planned.figures
    assert not figure.inside and figure.log_off == pytest.approx(math.log(9.0))


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_answers_whatever_lies_outside(plan, plan_path, tmp_path, capsys):
    path = written(tmp_path / "seen.csv", seen(plan, shifted(plan, rate=1.3), ("rate_per_s", *COLUMNS)))
    figure, out = tmp_path / "compared.svg", tmp_path / "compared.json"
    how = ["compare", str(plan_path), "--observed", str(path)]
    assert main([*how, "--json", "--out", str(out), "--figure", str(figure)]) == OK
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert document == json.loads(out.read_text()) and figure.read_bytes().startswith(b"<?xml")
    assert "read " + str(path) in said.err and "kw as power_w times 1000" in said.err
    assert (document["schema"], document["level"]) == ("fleetopt-comparison/1", LEVEL)
    first = document["planned"]["explanations"][0]
    assert (first["input"], first["planned"]) == ("rate", 2000.0)
    assert first["would_be"] == pytest.approx(2600.0, rel=0.01)
    assert document["at_observed_rate"]["within_errors"] and not document["planned"]["within_errors"]
    assert {each["pool"] for each in document["planned"]["figures"]} == {None, 1, 2}
    assert main(how) == OK
    table = " ".join(capsys.readouterr().out.split())
    assert "The observed rate is 2,600 requests/s, 1.30 times that" in table
    assert "all figures lie within the 90 % interval of the laws" in table and "Nothing is to explain" in table


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("itl_ms,pool\n20,1\n-3,2\n", "row 2: itl_ms = '-3'; need a number, more than 0"),
        ("pool,itl_ms\n3,20\n", "row 1: pool = '3'; need 1 to 2, a window of the plan"),
        ("pool,itl_ms\n1,20\n1,21\n", "row 2: pool 1 has been in"),
        ("when,what\n1,2\n", "columns are when, what; need some of ttft_p50_ms"),
        ("ttft_p99\n8\n", "row 1: ttft_p99 = 8 may be s or ms; call the column ttft_p99_ms or ttft_p99_s"),
        ("power\n8\n", "column 'power' has no unit; call it power_w or power_kw"),
        ("itl_ms\n\n", "has no number in a column that is known"),
        ("", "the file is empty"),
        ('{"itl_ms": 3}', "is JSON; need csv, or a page of vLLM's metrics"),
        ("# TYPE vllm:num_requests_running gauge\n", "has no histogram of latencies that counted a request"),
        ('vllm:time_to_first_token_seconds_bucket{le="x"} 3\n', "_bucket le = 'x'; need a number"),
        ("ttft_p50_ms\n20\n", "ttft_p50_s; need a figure that the plan's laws say something of"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(plan_path, tmp_path, capsys, text, said):
    path = tmp_path / "seen.csv"
    path.write_text(text)
    assert main(["compare", str(plan_path), "--observed", str(path)]) == BAD_INPUT
    ran = capsys.readouterr()
    assert ran.out == "" and ran.err.count("\n") == 1 and said in ran.err


def test_options_about_counters_need_pages(plan_path, tmp_path, capsys):
    path = tmp_path / "seen.csv"
    path.write_text("itl_ms\n20\n")
    assert main(["compare", str(plan_path), "--observed", str(path), "--over", "60"]) == BAD_INPUT
    assert "--over: " in capsys.readouterr().err
    assert main(["compare", str(plan_path), "--observed", str(tmp_path / "none.csv")]) == BAD_INPUT
    assert capsys.readouterr().err.count("\n") == 1


def test_words_say_how_much_and_which_way():
    each = {"pool": None, "at_bound": False, "prefix_hit_frac": None, "planned": None, "would_be": None, "removes": 0.8}
    assert input_said({**each, "input": "decode", "factor": 1.12}) == "decode 12 % slower than the engine's law"
    assert input_said({**each, "input": "rate", "factor": 0.9}) == "10 % fewer requests than planned"
    faster = {**each, "input": "prefill", "factor": 0.7, "prefix_hit_frac": 0.3}
    hits = "as if prompts found 30 % of their tokens in a prefix cache"
    assert input_said(faster) == f"prefill 30 % faster than the engine's law, {hits}"
    down = {**each, "input": "instances", "pool": 2, "factor": 0.9, "planned": 10.0, "would_be": 9.0}
    assert input_said(down) == "9 instances of pool 2 in service, 10 planned"
    account = {"within_errors": False, "explained": True, "explanations": [down, {**each, **down, "removes": 0.1}]}
    said = "9 instances of pool 2 in service, 10 planned would explain 80 % of the difference."
    assert explained_said(account) == said
    figure = {"pool": 1, "figure": "itl_s", "inside": False}
    planned = {**account, "rate_per_s": 2000.0, "figures": [figure, {**figure, "inside": True}]}
    lines = verdict_lines({"planned": planned, "at_observed_rate": None, "level": 0.9})
    which = "1 of 2 lie within the 90 % interval of the laws; not pool 1's mean ITL"
    assert lines == [f"At the plan's 2,000 requests/s {which}.", said]
