"""experiments/scorecard.py: who is scored on which rows, and that the errors are those."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest

EXPERIMENTS = str(Path(__file__).parents[1] / "experiments")
COLUMNS = ["backend", "backend_version", "model_path", "system", "precision", "mode", "isl", "osl", "concurrency"]
COLUMNS += ["gemm_quant_mode", "moe_quant_mode", "batch_size", "tp_size", "pp_size", "attention_dp_size"]
COLUMNS += ["moe_tp_size", "moe_ep_size", "silicon_ttft_ms", "silicon_tpot_ms"]
APART = ["prefill_num_workers", "decode_num_workers", "prefill_batch_size", "decode_batch_size"]
BASE = dict(zip(COLUMNS, ["vllm", "0.18.0", "meta-llama/Llama-3.1-70B", "h100_sxm", "fp8", "agg", 1024, 1024, 16]))
BASE |= dict(zip(COLUMNS[9:], ["fp8", "fp8", 16, 4, 1, 1, 4, 1, 100.0, 13.0]))
DEEPSEEK = {"backend": "sglang", "model_path": "deepseek-ai/DeepSeek-V3", "system": "b200_sxm"}
CHANGES = {  # what is changed, and why the row is left out
    "": {"concurrency": 32, "silicon_tpot_ms": 16.0},
    "disaggregated": {"mode": "disagg"},
    "precision unknown": {"precision": ""},
    "LLM or GPU unknown": {"model_path": "somebody/else"},
    "not a precision of the checkpoint": {"model_path": "openai/gpt-oss-120b"},
    "concurrency unknown": {"concurrency": ""},
    "more than a node": {"tp_size": 16},
    "queues": {"silicon_ttft_ms": 99_000.0},
    "batch does not fit": {"tp_size": 2, "isl": 8192, "concurrency": 512, "silicon_ttft_ms": 1000.0},
}


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS)
    import _replaced_law
    import _scored_points
    import scorecard

    yield _scored_points, _replaced_law, scorecard
    for name in [name for name, module in sys.modules.items() if EXPERIMENTS in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]


def points_of(folder, modules, *changes):
    with (folder / "points.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS + APART)
        writer.writeheader()
        writer.writerows([BASE | each for each in changes])
    return modules[0].read_points(folder)


def test_a_row_is_left_out_for_one_reason_and_a_repeated_one_is_none(tmp_path, modules):
    points = points_of(tmp_path, modules, {}, {}, *CHANGES.values())
    assert [point.left_out for point in points] == ["", *CHANGES]
    assert [point.row for point in points] == [0, *range(2, 2 + len(CHANGES))]
    squared, groups = points_of(
        tmp_path,
        modules,
        DEEPSEEK | {"tp_size": 64, "moe_tp_size": 8, "moe_ep_size": 8},
        DEEPSEEK | {"tp_size": 1, "attention_dp_size": 64, "moe_tp_size": 8, "moe_ep_size": 8},
    )
    assert (squared.tp, squared.attention_dp) == (8, 1) and (groups.tp, groups.attention_dp) == (1, 8)


def test_throughput_is_little_s_law(tmp_path, modules):
    (point,) = points_of(tmp_path, modules, {})
    n = 0.9 * 1024  # mean of what is drawn
    assert point.tok_per_s == pytest.approx(16 * n / (0.1 + (n - 1) * 0.013))


def test_errors_are_of_the_rows_that_every_predictor_predicts(tmp_path, modules):
    scorecard = modules[2]
    points = points_of(tmp_path, modules, {}, {"concurrency": 32}, {"concurrency": 64})
    truth = np.array([(point.ttft_s, point.tpot_s) for point in points])
    factors, silent = np.array([1.1, 0.7, 5.0])[:, None], truth.copy()
    silent[2] = np.nan
    says = {
        scorecard.REPLACED: lambda _: (truth * factors, ["", "", ""]),
        scorecard.PEER: lambda _: (silent, ["", "", "no tables"]),
    }
    rows, whys = scorecard.scored(points, says)
    found = {(s.predictor, s.quantity): s for s in scorecard.scores(rows) if s.gpu == scorecard.POOLED}
    for quantity in ("tpot_s", "ttft_s"):  # of 10, 30 and, of a row that is not shared, 400 %
        wrong, right = (found[name, quantity] for name in (scorecard.REPLACED, scorecard.PEER))
        assert wrong.n_rows == right.n_rows == 2 and right.mean_error == 0
        assert wrong.mean_error == pytest.approx(0.2) and wrong.median_error == pytest.approx(0.2)
    assert found[scorecard.REPLACED, "tok_per_s"].mean_error == pytest.approx((1 - 1 / 1.1 + 1 / 0.7 - 1) / 2)
    assert whys[scorecard.PEER] == {"no tables": 1}


def test_the_closed_form_waits_as_the_loop_does(tmp_path, modules):
    replaced = modules[1]
    engine = replaced.build(points_of(tmp_path, modules, {})[0].spec)
    alone_ttft_s, alone_tpot_s = replaced.closed_form(engine, 1000.0, 500.0, 1)
    own_s = float(replaced.prefill_s(engine.prefill, 1000.0))
    assert alone_tpot_s == pytest.approx(float(engine.decode.step_s(1.0, 1250.0)), rel=0.02)  # its own prompt is apart
    assert own_s < alone_ttft_s < own_s + alone_tpot_s
    found = np.array([replaced.closed_form(engine, 1000.0, 500.0, n) for n in (1, 2, 8, 32, 128)])
    assert (np.diff(found, axis=0) > 0).all()  # both rise with the concurrency


def scored_row(modules, model: str, factor: float, experts: bool = False):
    scorecard = modules[2]
    measured = {"tpot_s": 0.01, "ttft_s": 0.1, "ttft_8k_s": np.nan, "tok_per_s": 100.0}
    predicted = {scorecard.OURS: {name: factor * value for name, value in measured.items()}, scorecard.PEER: measured}
    return scorecard.Scored("h100", model, "vllm", experts, measured, predicted)


def test_groups_are_of_kinds_too_and_targets_of_every_row_of_ours(modules):
    scorecard = modules[2]
    rows = [scored_row(modules, "a", 1.1), scored_row(modules, "b", 1.3), scored_row(modules, "c", 0.9, experts=True)]
    rows[0].predicted[scorecard.PEER] = {name: np.nan for name in rows[0].measured}
    found = {
        (s.gpu, s.model): s for s in scorecard.scores(rows) if (s.predictor, s.quantity) == (scorecard.OURS, "tpot_s")
    }
    assert {key: s.n_rows for key, s in found.items()} == {
        ("h100", "b"): 1,
        ("h100", "c"): 1,
        ("h100", "all"): 2,
        ("all", "dense"): 1,
        ("all", "experts"): 1,
        ("all", "all"): 2,
    }
    assert found["all", "dense"].mean_error == pytest.approx(0.3)
    aims = {aim.what: aim for aim in scorecard.aims(rows)}
    dense, pooled = aims["vLLM, TPOT, dense"], aims["vLLM, tok/s"]
    assert (dense.n_rows, dense.mean_error) == (2, pytest.approx(0.2))  # the peer's silence does not spare ours
    assert (pooled.n_rows, pooled.mean_error) == (3, pytest.approx(0.5 / 3))
    assert not any("8K" in what for what in aims)  # nan where nothing was measured


def test_field_cases_say_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS)
    import field_cases

    cases = field_cases.read_cases()
    assert {case.case for case in cases} == set(field_cases.TITLES)
    assert all(case.measured > 0 and case.source for case in cases)
    idle = next(case for case in cases if case.protocol == "idle")
    assert field_cases.says(idle) == pytest.approx(float(field_cases.gpu_entry(idle.gpu).gpu.idle_w))
    for name in [name for name, module in sys.modules.items() if EXPERIMENTS in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]
