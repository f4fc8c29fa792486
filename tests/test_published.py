"""Every printed cell of the 1/W Law (arXiv 2603.17280v1) comes out, from the constants and the draws behind it."""

import csv
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest

from fleetopt_jax.catalog.gpus import GPUS
from fleetopt_jax.catalog.workloads import cdf_knots
from fleetopt_jax.laws.llm import weight_bytes
from fleetopt_jax.published import tables
from fleetopt_jax.published.engines import LLMS, published_engine
from fleetopt_jax.published.procedure import N_DRAWS, cut, mean_output_tokens, sampled_lengths
from fleetopt_jax.published.tables import Cell, Ratio, Reproduction, reproduce

EXPECTED = files("fleetopt_jax.published") / "expected"
N_CELLS = {"1": 42, "2": 30, "3": 46, "4": 12, "5": 20}
SPLITS = [("azure-cdf", 4096.0), ("azure-cdf", 8192.0), ("lmsys-cdf", 1536.0), ("lmsys-cdf", 3072.0)]

# Source: arXiv 2603.17280v1, the engines of tables 2 and 5. Columns: llm, gpu, GPUs, bytes a weight, parameters, active
# parameters in the power formula, KV bytes a token, W of the step [s], W of the power formula [s], H at a context of
# 4,096 [s], 16-token KV blocks, TDP [W], 16-bit peak [FLOP/s].
ENGINES = [
    *(
        ("llama-3.1-8b", gpu, 1, 2, 7504658432, 7504658432, 131072, *rest)
        for gpu, *rest in (
            ("h100", 0.00569649137, 0.00569649137, 0.000200324967, 29707, 700, 989e12),
            ("b200", 0.00244120576, 0.00244120576, 8.388608e-05, 75787, 1000, 2250e12),
        )
    ),
    *(
        ("llama-3.1-70b", gpu, 8, 2, 69501714432, 69501714432, 327680, *rest)
        for gpu, *rest in (
            ("h100", 0.00672336888, 0.00672336888, 6.26015522e-05, 11353, 700, 989e12),
            ("h200", 0.0047648512, 0.0047648512, 4.36906667e-05, 22596, 700, 989e12),
            ("b200", 0.00295491072, 0.00295491072, 2.62144e-05, 29785, 1000, 2250e12),
            ("gb200", 0.00295491072, 0.00295491072, 2.62144e-05, 33471, 1200, 2500e12),
        )
    ),
    *(
        ("llama-3.1-405b", gpu, 8, 2, 403747897344, 403747897344, 516096, *rest)
        for gpu, *rest in (
            ("h100", 0.0380410501, 0.0380410501, 9.85974448e-05, 0, 700, 989e12),
            ("b200", 0.0161494022, 0.0161494022, 4.128768e-05, 8791, 1000, 2250e12),
        )
    ),
    *(
        ("qwen3-235b-a22b", gpu, 8, 2, 231069974528, 18167103488, 96256, *rest)
        for gpu, *rest in (
            ("h100", 0.00164179104, 0.0457146165, 1.8389206e-05, 12421, 700, 989e12),
            ("b200", 0.0006875, 0.0249451629, 7.70048e-06, 75169, 1000, 2250e12),
        )
    ),
    *(
        ("deepseek-v3", gpu, 8, 1, 701195091968, 34955067392, 874496, *rest)
        for gpu, *rest in (
            ("h100", 0.00138059701, 0.0434677376, 0.000167067893, 0, 700, 989e12),
            ("b200", 0.000578125, 0.0236443322, 6.995968e-05, 6138, 1000, 2250e12),
        )
    ),
]


@pytest.fixture(scope="module")
def reproduction() -> Reproduction:
    return reproduce()


def test_every_printed_cell_is_reproduced(reproduction):
    assert reproduction.mismatches == 0
    assert {number: len(cells) for number, cells in reproduction.tables.items()} == N_CELLS
    for number, cells in reproduction.tables.items():
        with (EXPECTED / f"table{number}.csv").open() as file:
            printed = [(line["row"], line["column"], float(line["published"])) for line in csv.DictReader(file)]
        assert [(cell.row, cell.column, cell.published) for cell in cells] == printed


def test_the_headline_ratios_come_out(reproduction):
    ratios = {ratio.name: ratio for ratio in reproduction.ratios}
    assert {name: ratio.reproduced for name, ratio in ratios.items()} == {
        "fleetopt_gain_h100": 2.52,
        "fleetopt_gain_b200": 2.44,
        "b200_gain_homogeneous": 1.75,
        "b200_gain_fleetopt": 1.68,
        "combined_gain": 4.25,
    }
    # Without sampling the two steps multiply to the whole: topology on H100, then the GPU under that topology.
    exact = {name: ratio.exact for name, ratio in ratios.items()}
    combined = pytest.approx(exact["combined_gain"], rel=1e-12)
    assert exact["fleetopt_gain_h100"] * exact["b200_gain_fleetopt"] == combined
    assert exact["b200_gain_homogeneous"] * exact["fleetopt_gain_b200"] == combined


def test_what_is_printed_is_the_computed_value_rounded(reproduction):
    """Half a unit of the last printed digit, in the tables that rest on no draws."""
    for number in ("1", "2", "4", "5"):
        with (EXPECTED / f"table{number}.csv").open() as file:
            digits = [int(line["digits"]) for line in csv.DictReader(file)]
        for cell, n_digits in zip(reproduction.tables[number], digits, strict=True):
            assert abs(cell.exact - cell.published) <= 0.5 * 10.0**-n_digits * (1 + 1e-9), cell


def test_the_exact_integral_gives_145_instances_where_3000_draws_gave_141(reproduction):
    cells = {(cell.row, cell.column): cell for cell in reproduction.tables["3"]}
    instances = cells["azure/homogeneous/h100", "n_instances"]
    tok_per_w = cells["azure/homogeneous/h100", "tok_per_w"]
    assert (instances.published, instances.exact) == (141, 145)
    assert (tok_per_w.published, round(tok_per_w.exact, 2)) == (5.58, 5.44)


def test_asked_tables_come_once_and_in_order():
    asked = reproduce([5, 1, 5])
    assert list(asked.tables) == ["1", "5"]
    assert asked.ratios == []


def test_one_wrong_digit_is_a_mismatch(monkeypatch, tmp_path):
    cell, ratio = Cell("8192", "h100_tok_per_w", 5.4, 5.4, 5.4), Ratio("gain", 2.5, 2.5, 2.5, "")
    assert Reproduction({"1": [cell]}, [ratio]).mismatches == 0
    wrong_cell, wrong_ratio = replace(cell, reproduced=5.5), replace(ratio, reproduced=2.6)
    assert Reproduction({"1": [cell, wrong_cell], "2": [wrong_cell]}, [wrong_ratio, ratio]).mismatches == 3
    with (EXPECTED / "table1.csv").open() as file:
        header, *lines = csv.reader(file)
    row, column, printed, digits = lines[-1]
    misprint = [*lines[:-1], [row, column, str(float(printed) + 0.01), digits]]
    (tmp_path / "expected").mkdir()
    (tmp_path / "expected" / "table1.csv").write_text("".join(",".join(line) + "\n" for line in [header, *misprint]))
    monkeypatch.setattr(tables, "files", lambda package: tmp_path)
    missed = [(cell.row, cell.column) for cell in reproduce([1]).tables["1"] if not cell.matches]
    assert missed == [(row, column)]


@pytest.mark.parametrize("row", ENGINES, ids=lambda row: f"{row[0]}/{row[1]}")
def test_an_engine_has_the_published_constants(row):
    name, gpu, tp, bytes_per_weight, n_params, active, kv_bytes, step_s, power_s, scan_s, blocks, tdp_w, flop_per_s = (
        row
    )
    entry, engine = LLMS[name], published_engine(gpu, name)
    assert (entry.tp, engine.tp, entry.power_active_params) == (tp, tp, active)
    assert float(weight_bytes(entry.llm)) == n_params * bytes_per_weight
    assert float(entry.llm.kv_bytes_per_token) == kv_bytes
    assert engine.n_blocks == blocks
    assert (float(engine.power.tdp_w), float(GPUS[gpu].gpu.peak_flop_per_s)) == (tdp_w, flop_per_s)
    scans = (4096 * engine.decode.per_token_s, 4096 * engine.power.step.per_token_s)
    computed = (engine.decode.base_s, engine.power.step.base_s, *scans)
    assert [f"{float(x):.6g}" for x in computed] == [f"{x:.6g}" for x in (step_s, power_s, scan_s, scan_s)]
    assert float(engine.power.compute_s_per_seq) == pytest.approx(2 * active / tp / flop_per_s, rel=1e-12)


def test_a_model_that_does_not_fit_counts_as_one_slot():
    """Wrong, and the paper's: the catalog refuses such engines."""
    for name, gpu in (("llama-3.1-405b", "h100"), ("deepseek-v3", "h100")):
        engine = published_engine(gpu, name)
        assert (engine.n_blocks, engine.n_max) == (0, 1)


@pytest.mark.parametrize(("name", "window"), [*SPLITS, ("azure-cdf", 65_536.0), ("agent-cdf", 65_536.0)])
def test_draws_are_the_same_each_time_and_within_the_window(name, window):
    knots = cdf_knots(name) if window == 65_536 else cut(cdf_knots(name), window)[0]
    lengths = sampled_lengths(knots, int(window))
    np.testing.assert_array_equal(lengths, sampled_lengths(knots, int(window)))
    assert lengths.shape == (N_DRAWS,)
    assert lengths.min() >= 1
    assert lengths.max() <= window
    np.testing.assert_array_equal(lengths, np.round(lengths))
    # They follow the CDF: its value at every knot within four standard errors.
    tokens, fractions = np.array(knots).T
    error = np.abs(np.mean(lengths[:, None] <= tokens, axis=0) - fractions)
    assert np.all(error <= 4 * np.sqrt(fractions * (1 - fractions) / N_DRAWS) + 1e-12)


def test_a_window_inside_an_interval_caps_its_draws():
    knots = [(100, 0.5), (1000, 1.0)]
    lengths = sampled_lengths(knots, 300)
    assert lengths.max() <= 300
    assert np.mean(lengths > 100) == pytest.approx(0.5, abs=0.04)
    assert np.mean(sampled_lengths(knots, 50) == 50) == pytest.approx(0.5, abs=0.05)  # what is longer becomes 50


@pytest.mark.parametrize(("name", "at"), [*SPLITS, ("azure-cdf", 5000.0), ("lmsys-cdf", 100.0)])
def test_a_cut_shares_the_requests_and_both_parts_end_at_one(name, at):
    knots = cdf_knots(name)
    tokens, fractions = np.array([(0, 0.0), *knots]).T
    short, long, share = cut(knots, at)
    assert share == pytest.approx(np.interp(at, tokens, fractions), rel=1e-12)
    assert 0 < share < 1
    assert short[-1] == (at, 1.0)
    assert long[-1] == (knots[-1][0], 1.0)
    for part in (short, long):
        lengths, parts = np.array(part).T
        assert np.all(np.diff(lengths) > 0)
        assert np.all(np.diff(parts) >= 0)
    # The parts, weighted by their shares, are the whole again.
    whole = [(t, share * f) for t, f in short[:-1]] + [(t, share + (1 - share) * f) for t, f in long]
    np.testing.assert_allclose(whole, [(t, f) for t, f in knots if t != at], rtol=1e-12)


def test_mean_output_is_a_fifth_of_the_mean_midpoint_in_whole_tokens():
    assert mean_output_tokens([(100, 1.0)]) == 10
    assert mean_output_tokens([(100, 0.5), (300, 1.0)]) == 25
    assert mean_output_tokens([(100, 0.5), (299, 1.0)]) == 24
    assert mean_output_tokens([(2, 1.0)]) == 1
