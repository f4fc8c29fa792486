"""Calibration finds what made the data, says how sure it is, and refuses what the data cannot tell."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy.optimize import curve_fit

from fleetopt_jax.calibrate.fit import fit_decode, fit_power, predict_power_w, predict_step_s
from fleetopt_jax.calibrate.measurements import Measurements, read_measurements
from fleetopt_jax.catalog.engines import engine_entry
from fleetopt_jax.catalog.spec import MEASURED_SERVING, EngineSpec
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.units import MS
from fleetopt_jax.documents.engine import SCHEMA, engine_to_json, load_engine, save_engine
from fleetopt_jax.report.calibration import calibration_figure, calibration_table

# Llama-3.1-70B on four H100, lm-arena-chat: ML.ENERGY benchmark v3 (leaderboard, commit 0cd52da; Apache-2.0 tools).
# Mean sequences in flight, median inter-token latency [ms], power per GPU [W].
MLENERGY = (
    (7.986667, 16.57271, 441.357),
    (15.95377, 17.69744, 450.9515),
    (31.87554, 20.04695, 448.5562),
    (63.79104, 22.43227, 500.3754),
    (95.72549, 25.35649, 525.3866),
    (127.6098, 27.86781, 545.9388),
    (191.6212, 33.7016, 573.2703),
    (255.3148, 39.83729, 588.5746),
    (383.0233, 55.12407, 585.8812),
    (510.5056, 73.88564, 623.2316),
    (766.3235, 103.6395, 633.832),
    (898.4528, 105.6101, 636.8795),
)
BATCH = np.array([2.0, 4, 8, 16, 32, 64, 128, 256])
TWO_CONTEXTS = np.tile([1000.0, 8000.0], 4)
SHARE = 8 / 128  # experts a token uses, of all
OWN = "batch,step_ms\n"
EXACT = 1e-6  # relative: least squares squares the rounding of float64


def noisy(values: np.ndarray, seed: int, size: float = 0.02) -> np.ndarray:
    return values * (1 + size * np.random.default_rng(seed).standard_normal(len(values)))


def dense_s(batch, base_s=0.01, per_seq_s=1e-4, per_token_s=0.0, contexts=0.0):
    return base_s + (per_seq_s + per_token_s * contexts) * batch


def moe_s(batch, base_s=0.005, per_seq_s=1e-4, expert_s=0.012):
    return base_s + expert_s * (1 - (1 - SHARE) ** batch) + per_seq_s * batch


def power_w(batch, idle_w=300.0, nominal_w=600.0, x0=4.2):
    return idle_w + (nominal_w - idle_w) / (1 + np.exp(-(np.log2(batch) - x0)))


def two_parameters(batch, base_s, per_seq_s):
    return dense_s(batch, base_s, per_seq_s)


def weighted(law, batch, values, start):
    """(theta, covariance) of least squares on relative errors, by scipy."""
    return curve_fit(law, batch, values, start, sigma=values, x_scale=start, method="trf", xtol=1e-14)


def twice() -> Measurements:
    """Every batch at two contexts, 50 ns a token."""
    batch = np.repeat(BATCH[:4], 2)
    return Measurements(batch, dense_s(batch, per_token_s=5e-8, contexts=TWO_CONTEXTS), TWO_CONTEXTS)


@pytest.fixture(scope="module")
def measured() -> Measurements:
    batch, step_ms, watts = np.array(MLENERGY).T
    return Measurements(batch, step_ms * MS, power_w_per_gpu=watts, source="mlenergy")


def refusal(action, *arguments, **options) -> str:
    with pytest.raises(BadInput) as caught:
        action(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Estimates


def test_llama_70b_on_h100_gives_the_published_fit_within_one_standard_error(measured):
    """W = 15.74 +- 0.46 ms and h = 0.1035 +- 0.0032 ms: least squares on the relative error of the same rows."""
    fit = fit_decode(measured)
    assert abs(fit.estimates["base_s"] / MS - 15.74) < 0.46
    assert abs(fit.estimates["per_seq_at_context_s"] / MS - 0.1035) < 0.0032
    np.testing.assert_allclose(np.array(list(fit.standard_errors.values())) / MS, [0.457113, 0.00315514], rtol=1e-5)
    assert fit.mape == pytest.approx(0.0354464, rel=1e-5)
    assert fit.max_ape == pytest.approx(0.0824699, rel=1e-5)
    assert fit.leave_one_out_mape == pytest.approx(0.0420704, rel=1e-5)
    power = fit_power(measured)
    assert power.identified
    np.testing.assert_allclose(list(power.estimates.values()), [435.325, 640.729, 6.90311], rtol=1e-5)


@pytest.mark.slow
def test_what_made_the_data_is_found_without_noise():
    step = fit_decode(Measurements(BATCH, dense_s(BATCH))).step
    np.testing.assert_allclose(
        [step.base_s, step.per_seq_s, step.expert_s, step.per_token_s], [0.01, 1e-4, 0, 0], EXACT
    )
    step = fit_decode(Measurements(BATCH, moe_s(BATCH)), form="moe", expert_share=SHARE).step
    np.testing.assert_allclose(
        [step.base_s, step.per_seq_s, step.expert_s, step.expert_share], [0.005, 1e-4, 0.012, SHARE], EXACT
    )
    step = fit_decode(twice(), per_token_s=1e-9).step
    np.testing.assert_allclose([step.base_s, step.per_seq_s, step.per_token_s], [0.01, 1e-4, 5e-8], EXACT)
    power = fit_power(Measurements(BATCH, BATCH, power_w_per_gpu=power_w(BATCH))).power
    np.testing.assert_allclose([power.idle_w, power.nominal_w, power.log2_half_batch], [300, 600, 4.2], EXACT)


@pytest.mark.parametrize("seed", range(3))
def test_estimates_errors_and_covariance_are_those_of_weighted_least_squares(seed):
    """scipy's Levenberg-Marquardt with sigma = measured is an independent implementation of the same problem."""
    step_s, watts = noisy(moe_s(BATCH), seed), noisy(power_w(BATCH), seed, 0.01)
    data = Measurements(BATCH, step_s, power_w_per_gpu=watts)
    cases = (
        (two_parameters, step_s, (0.01, 1e-4), fit_decode(data)),
        (moe_s, step_s, (0.005, 1e-4, 0.01), fit_decode(data, form="moe", expert_share=SHARE)),
        (power_w, watts, (300.0, 600.0, 4.0), fit_power(data)),
    )
    for law, values, start, fit in cases:
        theta, covariance = weighted(law, BATCH, values, start)
        scale = np.sqrt(np.diag(covariance))
        np.testing.assert_allclose(list(fit.estimates.values()), theta, atol=1e-4 * scale.min(), rtol=1e-5)
        np.testing.assert_allclose(fit.covariance / np.outer(scale, scale), covariance / np.outer(scale, scale), 1e-3)
        np.testing.assert_allclose(fit.residuals, law(BATCH, *theta) / values - 1, atol=1e-6)


def test_leave_one_out_is_refitting_without_each_point(measured):
    batch, step_s, watts = measured.batch, measured.step_s, measured.power_w_per_gpu
    decode, power = fit_decode(measured), fit_power(measured)
    np.testing.assert_allclose(predict_step_s(decode, batch, 0.0) / step_s - 1, decode.residuals, atol=1e-9)
    np.testing.assert_allclose(predict_power_w(power, batch) / watts - 1, power.residuals, atol=1e-9)
    for i in range(len(batch)):
        kept = np.arange(len(batch)) != i
        for law, values, start, left_out in (
            (two_parameters, step_s, (0.01, 1e-4), decode.left_out),
            (power_w, watts, (300.0, 600.0, 4.0), power.left_out),
        ):
            theta, _ = weighted(law, batch[kept], values[kept], start)
            assert left_out[i] == pytest.approx(law(batch[i], *theta) / values[i] - 1, abs=1e-5)


def test_standard_errors_cover_the_truth_as_often_as_they_say():
    """Student's t with 6 degrees of freedom: 1.94 standard errors hold the truth 90 % of the time, 4 nearly always."""
    truth, n_times = {"base_s": 0.01, "per_seq_at_context_s": 1e-4}, 200
    off = []
    for seed in range(n_times):
        fit = fit_decode(Measurements(BATCH, noisy(dense_s(BATCH), seed)))
        off.append([(value - truth[name]) / fit.standard_errors[name] for name, value in fit.estimates.items()])
    inside = (np.abs(off) < 1.943).mean(axis=0)
    np.testing.assert_allclose(inside, 0.9, atol=4 * np.sqrt(0.09 / n_times))
    assert (np.abs(off) < 4).mean() > 0.98


def test_the_cost_of_context_is_fitted_only_where_a_batch_has_two_contexts():
    batch, falling = BATCH, 8000 / BATCH**0.5
    # The step bends; a context that falls with the batch would explain the bend, and say 8K costs a hundred times more.
    bent = Measurements(batch, moe_s(batch), falling)
    given = fit_decode(bent, per_token_s=3e-9)
    assert "per_token_s" not in given.estimates
    assert "3e-09 s as given: no batch was measured at two whole contexts" in given.notes[0]
    assert float(given.step.per_token_s) == pytest.approx(3e-9)
    at_context_s = float(given.step.per_seq_s) + 3e-9 * given.context_tokens
    assert given.estimates["per_seq_at_context_s"] == pytest.approx(at_context_s)
    assert "is 0, the step ignores it" in fit_decode(bent).notes[0]
    assert "per_token_s" in fit_decode(twice()).estimates
    assert "per_token_s" not in fit_decode(dataclasses.replace(twice(), context_is_partial=True)).estimates
    partial_contexts = dataclasses.replace(bent, context_is_partial=True)
    for per_token_s in (3e-9, 1.0):  # the second is limited to all of h
        fit = fit_decode(partial_contexts, per_token_s=per_token_s)
        assert fit.estimates == pytest.approx(fit_decode(dataclasses.replace(bent, context_tokens=None)).estimates)
        per_seq_s = fit.step.per_seq_s + fit.step.per_token_s * fit.context_tokens
        assert float(per_seq_s) == pytest.approx(fit.estimates["per_seq_at_context_s"])
    flat = dataclasses.replace(twice(), step_s=noisy(dense_s(twice().batch), 1))
    assert "it cannot be told from 0" in fit_decode(flat).notes[0]


def test_a_cost_of_context_beyond_the_whole_is_limited_to_it():
    data = Measurements(BATCH, dense_s(BATCH, per_seq_s=0, per_token_s=5e-8, contexts=2000.0), np.full(8, 2000.0))
    fit = fit_decode(data, per_token_s=1e-7)
    assert float(fit.step.per_seq_s) == 0
    assert float(fit.step.per_token_s) == pytest.approx(5e-8)
    assert any("share of its own would be negative" in note for note in fit.notes)


@pytest.mark.parametrize(
    ("watts", "limit_w", "said", "names"),
    [
        (power_w(BATCH[:3]), np.inf, "3 points for 3 parameters", ["idle_w", "nominal_w"]),
        (300 + 0.05 * BATCH ** (1 / np.log(2)), np.inf, "the midpoint would be 2^", ["idle_w", "nominal_w"]),
        ([500, 520, 490, 510, 530, 505, 515, 525], np.inf, "uncertain by", ["idle_w", "nominal_w"]),
        (noisy(power_w(BATCH, 300, 900, 6.5), 0), 750.0, "most a board draws", ["idle_w", "log2_half_batch"]),
    ],
    ids=["three points", "no upper bend", "flat", "beyond the board"],
)
def test_a_power_curve_without_both_bends_is_fitted_in_part_and_says_so(watts, limit_w, said, names):
    batch = BATCH[: len(watts)]
    fit = fit_power(Measurements(batch, batch, power_w_per_gpu=np.array(watts)), limit_w=limit_w)
    assert not fit.identified
    assert said in fit.notes[0]
    assert list(fit.estimates) == names
    assert fit.mape < 0.1
    assert float(fit.power.nominal_w) <= limit_w


def test_what_is_hardly_told_from_nothing_is_said():
    fit = fit_decode(Measurements(BATCH, noisy(moe_s(BATCH, expert_s=1e-4), 2)), form="moe", expert_share=SHARE)
    assert fit.notes == ("expert_s cannot be told from 0",)


# Refusals


@pytest.mark.parametrize(
    ("batch", "step_s", "form", "said"),
    [
        ([8, 16], [0.01, 0.02], "dense", "2 points; the dense decode law needs at least 3"),
        ([8, 16, 32], [0.01, 0.02, 0.03], "moe", "3 points; the moe decode law needs at least 4"),
        ([8, 8, 8, 8], [0.01, 0.011, 0.01, 0.011], "dense", "every point has batch 8"),
        ([8] * 4 + [16] * 4, dense_s(BATCH), "moe", "cannot tell"),
        ([8] * 7 + [16], dense_s(BATCH), "dense", "cannot tell base_s and per_seq_at_context_s apart"),
        (BATCH, dense_s(BATCH)[::-1], "dense", "one more sequence costs -"),
        (BATCH + 50, BATCH / 1000, "dense", "the step at batch 0 comes out as -"),
        (BATCH, 0.01 + 1e-6 * BATCH**2, "moe", "fit the dense form"),
    ],
)
def test_steps_that_cannot_be_fitted_are_refused(batch, step_s, form, said):
    data = Measurements(np.array(batch, float), np.array(step_s))
    assert said in refusal(fit_decode, data, form=form, expert_share=SHARE)


def test_powers_and_shares_that_cannot_be_fitted_are_refused():
    data = Measurements(BATCH, dense_s(BATCH))
    assert "no column of power" in refusal(fit_power, data)
    falls = dataclasses.replace(data, power_w_per_gpu=700 - BATCH)
    assert "need a power that rises" in refusal(fit_power, falls)
    two = Measurements(BATCH[:2], BATCH[:2], power_w_per_gpu=BATCH[:2])
    assert "the power law needs at least 3" in refusal(fit_power, two)
    assert "expert_share: 0.0; need" in refusal(fit_decode, data, form="moe")
    assert "expert_share: nan; need" in refusal(fit_decode, data, form="moe", expert_share=np.nan)


# Files


def csv_file(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "points.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "step_s", "contexts", "watts"),
    [
        ("batch,step_s\n2,0.01\n4,0.02\n", [0.01, 0.02], None, None),
        ("\ufeffbatch, step_ms ,context_tokens\r\n2,10,500\r\n\r\n4,20,600\r\n", [0.01, 0.02], [500, 600], None),
        ("batch,tok_per_s,power_w_per_gpu\n2,200,300\n4,200,350\n", [0.01, 0.02], None, [300, 350]),
        ("power_w,n_gpus,step_ms,batch\n800,2,10,2\n900,2,20,4\n", [0.01, 0.02], None, [400, 450]),
        (
            "avg_batch_size,median_itl_ms,avg_power_per_gpu_w,sim_mean_output_position_tokens,flag_multimodal\n"
            "2,10,300,500,0\n3,not a number,,,1\n4,20,350,600,0\n",
            [0.01, 0.02],
            [500, 600],
            [300, 350],
        ),
        (
            "context_window_tokens,n_sequences,decode_tok_per_s,power_w_per_gpu,output_tokens_per_request\n"
            "2048,2,200,300,512\n4096,4,200,350,512\n",
            [0.01, 0.02],
            [1792, 3840],
            [300, 350],
        ),
        ("context_window_tokens,batch,step_ms\n2048,2,10\n4096,4,20\n", [0.01, 0.02], [2048, 4096], None),
    ],
    ids=["seconds", "bom, blank line and spaces", "rate", "power of all", "mlenergy", "sweep", "window only"],
)
def test_every_layout_reads_to_the_same_points(tmp_path, text, step_s, contexts, watts):
    read = read_measurements(csv_file(tmp_path, text))
    np.testing.assert_allclose(read.batch, [2, 4])
    np.testing.assert_allclose(read.step_s, step_s)
    assert read.context_is_partial == ("sim_mean_output" in text)
    for found, wanted in ((read.context_tokens, contexts), (read.power_w_per_gpu, watts)):
        assert (found is None) == (wanted is None)
        if wanted:
            np.testing.assert_allclose(found, wanted)


GROUPS = "llm,gpu,tp,task,precision,batch,step_ms\n" + "".join(
    f"{llm},{gpu},{tp},{task},{precision},{batch},{batch}\n"
    for llm, gpu, tp, task, precision in (
        ("meta/Llama-8B", "H100", 1, "chat", "bf16"),
        ("meta/Llama-8B-FP8", "H100", 1, "chat", "fp8"),
        ("meta/Llama-8B-FP8", "H100", 2, "chat", "fp8"),
        ("meta/Llama-8B-FP8", "B200", 2, "chat", "fp8"),
        ("meta/Llama-8B-FP8", "B200", 2, "code", "fp8"),
    )
    for batch in (1, 2, 3)
)


def test_selectors_leave_one_engine_and_its_names(tmp_path):
    read = partial(read_measurements, csv_file(tmp_path, GROUPS))
    found = read(model="llama-8b")  # the whole name, though it is also a part of another
    assert (found.llm, found.gpu, found.tp, found.precision) == ("meta/Llama-8B", "H100", 1, "bf16")
    assert len(found.batch) == 3
    assert read(model="FP8", gpu="h100", tp=2).precision == "fp8"
    assert read(gpu="b200", task="Code").tp == 2
    said = refusal(read, model="fp8")
    assert "holds 4 groups of (model, gpu, tp, task, precision): meta/Llama-8B-FP8 B200 2 chat fp8, " in said
    assert said.endswith("choose one with --model, --gpu, --tp, --task")
    assert "--gpu a100: no such rows in" in refusal(read, gpu="a100")
    assert "there are: 1, 2" in refusal(read, tp=4)


def test_a_column_without_a_word_is_as_one_that_is_not_there(tmp_path):
    text = "llm,gpu,tp,batch,step_ms\n" + "".join(f"Llama-8B,,,{batch},{batch}\n" for batch in (1, 2, 3))
    found = read_measurements(csv_file(tmp_path, text), gpu="h100", tp=4)
    assert (len(found.batch), found.gpu, found.tp) == (3, None, None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the file is empty"),
        (OWN, "no rows"),
        ("rate,latency\n1,2\n", "columns are rate, latency; need batch | avg_batch_size"),
        (OWN + "8,-1\n", "row 1: step_ms = '-1'; need a number, more than 0"),
        (OWN + "8,1\n0,1\n", "row 2: batch = '0'; need"),
        (OWN + "8,nan\n", "row 1: step_ms = 'nan'; need"),
        (OWN + "8,inf\n", "row 1: step_ms = 'inf'; need"),
        (OWN + "8,fast\n", "row 1: step_ms = 'fast'; need"),
        (OWN + "8,\n", "row 1: step_ms = ''; need"),
        (OWN + "8\n", "row 1: 1 cells; need 2"),
        (OWN + '8,"1\n', "cannot be read as csv"),
        (b"batch,step_ms\n\xff,1\n", "cannot be read as csv"),
        ("batch,step_ms,batch\n1,2,3\n", "column 'batch' is there more than once"),
        ("batch,step_ms,tp\n1,2,1.5\n", "row 1: tp = '1.5'; need a whole number"),
        ("batch,step_ms,power_w,n_gpus\n1,2,300,none\n", "row 1: n_gpus = 'none'; need"),
        ("batch,step_ms,context_tokens\n1,2,-5\n", "row 1: context_tokens = '-5'; need"),
        (
            "n_sequences,step_ms,context_window_tokens,output_tokens_per_request\n1,2,100,200\n",
            "row 1: output_tokens_per_request = 200; need less than twice the window",
        ),
    ],
)
def test_a_bad_file_is_refused_with_the_place_and_the_value(tmp_path, text, said):
    path = csv_file(tmp_path, text)
    found = refusal(read_measurements, path)
    assert found.startswith(str(path))
    assert said in found


def test_a_missing_file_is_refused(tmp_path):
    assert "no such file" in refusal(read_measurements, tmp_path / "none.csv")


# The document


@pytest.fixture(scope="module")
def document(measured):
    names = {"gpu": "h100", "llm": "llama-3.1-70b", "tp": 4, "precision": "bf16", "source": "ML.ENERGY v3"}
    return engine_to_json(fit_decode(measured), fit_power(measured), **names)


def written(tmp_path: Path, document) -> Path:
    path = tmp_path / "engine.json"
    path.write_text(json.dumps(document))
    return path


def test_a_document_comes_back_as_it_was_written(tmp_path, measured, document):
    path = written(tmp_path, document)
    spec = load_engine(path)
    assert (spec.gpu, spec.llm, spec.tp, spec.precision) == ("h100", "llama-3.1-70b", 4, "bf16")
    laws = spec.laws
    assert laws is not None
    assert (laws.step_error, laws.power_error) == tuple(document["relative_error"].values())
    assert (laws.quality, laws.file, laws.source) == ("measured", str(path), f"{path}: ML.ENERGY v3")
    for record, fields in ((laws.decode, document["decode"]), (laws.power, document["power"])):
        assert {name: float(value) for name, value in vars(record).items()} == fields
    assert load_engine(path) == spec


def test_a_saved_engine_is_its_own_step_on_the_memory_and_prefill_of_what_it_names(tmp_path, measured):
    path, names = tmp_path / "engine.json", ("h100", "llama-3.1-70b", 4)
    decode, power = fit_decode(measured), fit_power(measured)
    of_catalog = engine_entry(EngineSpec(*names, own_fit=False, serving=MEASURED_SERVING))
    for fitted in (power, None):
        save_engine(path, decode, fitted, gpu="H100", llm=names[1], tp=names[2])
        entry = engine_entry(load_engine(path))
        assert (entry.spec.gpu, entry.spec.precision, entry.quality) == ("h100", "bf16", "measured")
        assert entry.engine.decode == decode.step
        assert entry.engine.kv == of_catalog.engine.kv
        assert entry.engine.prefill == of_catalog.engine.prefill
        assert entry.step_error == pytest.approx(decode.leave_one_out_mape)
    assert entry.engine.power == of_catalog.engine.power  # of the law where none was measured, with its error
    assert entry.power_error == of_catalog.power_error


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gpu": "h1000"}, "gpu: unknown name 'h1000'; did you mean h100"),
        ({"llm": "llama"}, "llm: unknown name 'llama'"),
        ({"precision": "fp3"}, "precision: unknown name 'fp3'"),
        ({"tp": 1}, "llm: llama-3.1-70b on 1 x h100: does not fit"),
    ],
)
def test_an_engine_of_what_the_catalog_does_not_have_is_refused_with_its_file(tmp_path, document, changes, said):
    path = written(tmp_path, document | changes)
    assert refusal(load_engine, path).startswith(f"{path}, {said}")


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("schema",), "fleetopt-plan/1", "schema = 'fleetopt-plan/1'; need 'fleetopt-engine/1'"),
        (("gpu",), "", "gpu = "),
        (("tp",), 0, "tp = 0"),
        (("tp",), 2.5, "tp = 2.5"),
        (("extra",), 1, "extra = 1"),
        (("decode", "base_s"), -1, "decode.base_s = -1"),
        (("decode", "base_s"), float("nan"), "decode.base_s = NaN"),
        (("decode", "base_s"), float("inf"), "decode.base_s = Infinity"),
        (("decode", "base_s"), "0.01", "decode.base_s = 0.01"),
        (("decode", "expert_share"), 1.0, "expert_share < 1"),
        (("decode", "per_token_s"), None, "decode.per_token_s = None"),
        (("power", "nominal_w"), 10.0, "idle_w < nominal_w"),
        (("power",), 5, "power = 5"),
        (("relative_error", "step"), -0.1, "relative_error.step = -0.1"),
        (("quality",), "guessed", "quality = guessed"),
        (("fit", "decode", "covariance"), [[1.0]], "of one size"),
        (("fit", "decode", "n_points"), 0, "fit.decode.n_points = 0"),
        (("fit", "decode", "form"), "cubic", "fit.decode.form = cubic"),
    ],
)
def test_a_changed_document_is_refused(tmp_path, document, path, value, said):
    changed = json.loads(json.dumps(document))
    place = changed
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    assert said in refusal(load_engine, written(tmp_path, changed))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "5", f'{{"schema": "{SCHEMA}"}}', "[" * 100_000])
def test_what_is_no_document_is_refused(tmp_path, text):
    path = tmp_path / "engine.json"
    path.write_text(text)
    refusal(load_engine, path)


# The report


@pytest.mark.parametrize("with_power", [True, False])
def test_the_figure_shows_every_point_with_units(measured, with_power):
    figure = calibration_figure(measured, fit_decode(measured), fit_power(measured) if with_power else None)
    figure.draw_without_rendering()
    assert len(figure.axes) == (4 if with_power else 2)
    assert "4.2 %" in figure.get_suptitle()
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert all(title.endswith(("[ms]", "[W]", "[%]")) for title in titles)
    assert all(
        len(line.get_xdata()) == 12 for axes in figure.axes for line in axes.lines if line.get_linestyle() == "None"
    )


def test_the_table_gives_estimates_errors_and_notes(measured, document):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(calibration_table(document))
        few = Measurements(BATCH[:3], BATCH[:3], power_w_per_gpu=power_w(BATCH[:3]))
        names = {"gpu": "h100", "llm": "x", "tp": 4, "precision": None, "source": "y"}
        console.print(calibration_table(engine_to_json(fit_decode(measured), fit_power(few), **names)))
    text = console.export_text()
    assert "llama-3.1-70b on 4 x H100" in text
    assert "15.74" in text
    assert "0.46" in text
    assert "not fitted: 3 points for 3 parameters" in " ".join(text.split())


# Columns as people have them


def written_rows(tmp_path, header: str, rows) -> Path:
    path = tmp_path / "rows.csv"
    path.write_text(header + "\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("header", "row", "note"),
    [
        # `vllm bench serve`
        ("max_concurrency,median_itl_ms", lambda n, s: (n, s * 1e3), ""),
        (
            "max_concurrency,output_throughput,mean_tpot_ms",
            lambda n, s: (n, 1.0, s * 1e3),
            "mean_tpot_ms holds the pre",
        ),
        ("max_concurrency,output_throughput,mean_itl_ms", lambda n, s: (n, 1.0, s * 1e3), "mean_itl_ms holds the pre"),
        (
            "Max_Concurrency,Output_Throughput",
            lambda n, s: (n, n / s),
            "output_throughput holds prefill, and the start",
        ),
        # InferenceX: seconds, and rates of one GPU
        ("conc,tp,median_tpot", lambda n, s: (n, 8, s), "median_tpot holds the prefill of other requests"),
        ("conc,tp,output_tput_per_gpu", lambda n, s: (n, 8, n / s / 8), "output_tput_per_gpu holds prefill"),
        # without prefill before with it
        ("concurrency,mean_tpot_ms,step_s", lambda n, s: (n, 7.0, s), ""),
    ],
)
def test_columns_of_benchmarks_are_read_in_their_units(tmp_path, header, row, note):
    path = written_rows(tmp_path, header, [row(n, s) for n, s in zip(BATCH, dense_s(BATCH))])
    found = read_measurements(path)
    np.testing.assert_allclose(found.batch, BATCH)
    np.testing.assert_allclose(found.step_s, dense_s(BATCH))
    assert len(found.notes) == bool(note) and (not note or found.notes[0].startswith(note))
    fit = fit_decode(found)
    assert fit.estimates["base_s"] == pytest.approx(0.01, rel=1e-4)
    assert set(found.notes) <= set(fit.notes)


@pytest.mark.parametrize(
    ("columns", "cells"),
    [
        ("isl,osl", (1000, 200)),
        ("random_input_len,random_output_len", (1000, 200)),
        ("total_input_tokens,total_output_tokens,completed", (50_000, 10_000, 50)),
    ],
)
def test_the_context_follows_from_the_lengths(tmp_path, columns, cells):
    path = written_rows(tmp_path, f"batch,step_s,{columns}", [(n, dense_s(n), *cells) for n in (1.0, 8.0, 64.0)])
    np.testing.assert_allclose(read_measurements(path).context_tokens, 1000 + 200 / 2)


def test_names_of_inferencex_choose_the_engine(tmp_path):
    rows = [(gpu, "openai/gpt-oss-120b", 8, n, dense_s(n)) for gpu in ("h100", "b200") for n in (1.0, 8.0, 64.0)]
    path = written_rows(tmp_path, "hw,model,tp,conc,median_tpot", rows)
    found = read_measurements(path, gpu="b200")
    assert (found.gpu, found.llm, found.tp, len(found.batch)) == ("b200", "openai/gpt-oss-120b", 8, 3)
    rate = written_rows(tmp_path, "conc,output_tput_per_gpu", [(1, 5.0), (8, 9.0)])
    assert refusal(read_measurements, rate).endswith(
        "output_tput_per_gpu without tp; need the GPUs of an instance as well"
    )


def test_rows_of_an_engine_are_known_by_the_names_of_benchmarks(tmp_path):
    """And rows of another GPU, LLM, TP or precision are left out and counted, none taken for it."""
    names = [
        ("NVIDIA H100 80GB HBM3", "meta-llama/Llama-3.1-70B-Instruct", 8, "bfloat16"),
        ("B200", "meta-llama/Llama-3.1-70B-Instruct", 8, "bfloat16"),
        ("NVIDIA H100 80GB HBM3", "meta-llama/Llama-3.1-8B-Instruct", 8, "bfloat16"),
        ("NVIDIA H100 80GB HBM3", "meta-llama/Llama-3.1-70B-Instruct", 4, "bfloat16"),
        ("NVIDIA H100 80GB HBM3", "meta-llama/Llama-3.1-70B-Instruct", 8, "fp8"),
    ]
    rows = [(*name, n, 10.0 + i + n / 10) for i, name in enumerate(names) for n in (1, 8, 64)]
    path = written_rows(tmp_path, "gpu,model,tp,precision,batch,mean_tpot_ms", rows)
    found = read_measurements(path, of=EngineSpec("h100", tp=8))
    np.testing.assert_allclose(found.step_s, (10.0 + np.array([1, 8, 64]) / 10) / 1e3)
    assert (found.n_left_out, len(found.notes)) == (12, 1)
    assert read_measurements(path, of=EngineSpec("h100", tp=8, precision="fp8")).step_s[0] == pytest.approx(14.1e-3)
    said = refusal(lambda file: read_measurements(file, of=EngineSpec("h200", tp=8)), path)
    assert "has no rows of 8 x h200 llama-3.1-70b bf16" in said and "B200" in said


def test_a_calibrated_engine_says_what_stays_the_catalogs(tmp_path):
    path = tmp_path / "mine.json"
    step = fit_decode(Measurements(BATCH, dense_s(BATCH)))
    save_engine(path, step, None, gpu="h100", llm="llama-3.1-70b", tp=4, source="mine.csv")
    assert json.loads(path.read_text())["of_catalog"] == ["power", "prefill", "KV cache", "idle power"]
    entry = engine_entry(load_engine(path))
    assert entry.of_catalog == ("power", "prefill", "KV cache", "idle power")
    assert entry.source == f"{path}: mine.csv; of the catalog: power, prefill, KV cache, idle power"
    power = fit_power(Measurements(BATCH, dense_s(BATCH), power_w_per_gpu=power_w(BATCH)))
    save_engine(path, step, power, gpu="h100", llm="llama-3.1-70b", tp=4)
    assert engine_entry(load_engine(path)).of_catalog == ("prefill", "KV cache", "idle power")
