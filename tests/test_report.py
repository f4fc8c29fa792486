"""Figures and the page: they build for one to six pools, say nothing they should not, and need nothing from outside."""

import copy
import dataclasses
import json
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from io import StringIO
from itertools import pairwise

import jax
import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.console import Console

from fleetopt_jax._optimize.problem import make_problem
from fleetopt_jax._optimize.search import evaluate_given
from fleetopt_jax.calibrate.measurements import Measurements
from fleetopt_jax.catalog.engines import build
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.documents.plan import plan_to_json
from fleetopt_jax.documents.simulation import TOLERANCE, verified_of
from fleetopt_jax.fleet.assumptions import PHYSICAL, choice_names
from fleetopt_jax.fleet.engine import inputs_of
from fleetopt_jax.fleet.resources import OBJECTIVES, make_budget
from fleetopt_jax.fleet.surroundings import Site
from fleetopt_jax.laws.compression import Compressor
from fleetopt_jax.report import style
from fleetopt_jax.report.decision import broken, decision
from fleetopt_jax.report.figures import write_figure
from fleetopt_jax.report.html import LONG_CELL
from fleetopt_jax.report.ledger import TITLES, ledger_figure, ledger_table
from fleetopt_jax.report.levers import levers_figure
from fleetopt_jax.report.page import report_page
from fleetopt_jax.report.pareto import axis_figure, front_figure
from fleetopt_jax.report.pool_map import pool_map_figure
from fleetopt_jax.report.power import engine_figure, pool_curves, power_figure
from fleetopt_jax.report.sensitivity import input_label, sensitivity_table, tornado_figure, unbounded_said
from fleetopt_jax.report.simulation import agreement_figure
from fleetopt_jax.report.words import goal_of
from fleetopt_jax.workload.atoms import with_rate

HOSTILE = "<script>alert(1)</script>\"'$x$&\n\x01 onload=x.csv"
LENGTHS = np.array([12.0, 90.0, 500.0, 500.0, 1499.0, 1500.0, 4000.0, 14000.0])
WEIGHTS = np.array([0.02, 0.1, 0.2, 0.1, 0.3, 0.18, 0.06, 0.04])
WINDOWS = {1: [14096], 2: [1499, 14096], 6: [400, 1499, 1520, 3000, 5000, 14096]}


def plan_of(n_pools: int, name: str = "requests.csv", gamma: float = 1.0, llm: str = "llama-3.1-70b") -> dict:
    pools = [
        {
            "window_tokens": window,
            "gpu": "b200" if k == 2 else "h100",
            "llm": llm,
            "tp": 8,
            "precision": "bf16",
            "kv_precision": "bf16",
            "engine_file": f"{llm}.json" if k else None,
            "engine_quality": "law",
            "engine_step_error": 0.16,
            "engine_power_error": 0.13 if k else None,
            "engine_prefill_error": 0.4,
            "n_instances": 30 + k,
            "n_gpus": 8 * (30 + k),
            "max_num_seqs": 700 - 90 * k,
            "max_num_seqs_asked": None,
            "clock_frac": 1.0,
            "gamma": 1.0 if window == 14096 else gamma,
            "traffic_frac": 1.0 / n_pools,
            "utilization": 0.849,
            "n_active": 277.1 - 20 * k,
            "prefill_frac": 0.4,
            "gpu_power_w": 590.0,
            "power_w": 136_919.0,
            "tok_per_j": 0.92 - 0.1 * k,
            "ttft_p99_s": 0.177,
            "itl_s": 0.063,
            "itl_p99_s": 0.127,
        }
        for k, window in enumerate(WINDOWS[n_pools])
    ]
    return {
        "schema": "fleetopt-plan/1",
        "version": "0.1.0",
        "status": "optimal",
        "assume": "physical",
        "power_scope": "instance",
        "output_share": 0.2,
        "assumptions": choice_names(PHYSICAL),
        "dispatch": "jsq",
        "method": "exact",
        "workload": {
            "name": name,
            "arrival_rate_per_s": 1000.0,
            "mean_prompt_tokens": 1154.7,
            "mean_output_tokens": 211.1,
            "digest": "sha256:0",
        },
        "slo": {"ttft_p99_s": 0.5, "ttft_s_per_token": 0.0, "itl_s": None, "max_utilization": 0.85, "scope": "pool"},
        "budget": {},
        "objective": "tok_per_j",
        "max_num_seqs": None,
        "site": {"host_w_per_gpu": 0.0, "pue": 1.0, "usd_per_kwh": 0.0, "kg_co2_per_kwh": 0.0},
        "compressor": {"success_frac": 1.0, "s_per_token": 0.0, "j_per_token": 0.0},
        "pools": pools,
        "metrics": {
            "tok_per_j": 0.656,
            "output_tok_per_s": 211_126.0,
            "power_w": sum(pool["power_w"] for pool in pools),
            "n_instances": sum(pool["n_instances"] for pool in pools),
            "n_gpus": sum(pool["n_gpus"] for pool in pools),
            "usd_per_h": 2157.4,
            "ttft_p99_s": 0.177,
            "ttft_p99_worst_pool_s": 0.177,
            "ttft_p99_of_all_s": 0.15,
            "itl_s": 0.0659,
            "itl_p99_s": 0.127,
            "kg_co2_per_h": 0.0,
            "unserved_frac": 0.0,
            "gain_vs_homogeneous": 1.3,
        },
        "search": {
            "n_evaluated": 31_920,
            "wall_s": 7.6,
            "candidates": "14,095 windows",
            "lower_bound": 0.656,
            "gap": 0.0,
            "n_engines": 1,
            "by_pools": [0.5, 0.656],
            "asked": "sha256:0",
        },
    }


def curves_of(plan: dict) -> list[dict]:
    batches = np.geomspace(1.0, 512.0, 10)
    points = [
        {"batch": n, "power_w_per_gpu": 400 + 25 * np.log2(n), "tok_per_j": 1.2 * n / (n + 90)}
        for n in batches.tolist()
    ]
    return [
        {
            "context_tokens": 900.0,
            "step_error": pool["engine_step_error"],
            "power_error": pool["engine_power_error"],
            "points": points,
        }
        for pool in plan["pools"]
    ]


def sensitivity_of(plan: dict) -> dict:
    ranked = [
        {"input": "workload.output_scale", "value": 1.0, "elasticity": 0.91},
        {"input": "pools.0.engine.power.idle_w", "value": 300.0, "elasticity": -0.43},
    ]
    metrics = {
        name: {"value": value, "sampled": [0.8 * value, None], "linear": [0.7 * value, 1.3 * value], "log_sigma": 0.1}
        for name, value in (("tok_per_j", 0.656), ("ttft_p99_s", 0.177))
    }
    return {
        "elasticities": {"tok_per_j": ranked},
        "skipped": [],
        "intervals": {"level": 0.9, "n_samples": 1000, "hold_probability": 0.425, "metrics": metrics},
        "shadow_prices": [
            {
                "limit": "ttft_p99_s",
                "asked": 0.5,
                "binds": False,
                "elasticity": 0.0,
                "per_unit": 0.0,
                "reoptimized": None,
            },
            {
                "limit": "max_utilization",
                "asked": 0.85,
                "binds": True,
                "elasticity": 0.77,
                "per_unit": 0.6,
                "reoptimized": None,
            },
            {"limit": "itl_s", "asked": 0.1, "binds": True, "elasticity": None, "per_unit": None, "reoptimized": None},
        ],
        "thresholds": [
            {
                "window_tokens": 1499.0,
                "as_sized": 0.1,
                "resized": 0.1,
                "moves": [{"window_tokens": 1349.0, "change": -0.01}, {"window_tokens": 1649.0, "change": None}],
            }
        ],
        "plan": plan,
        "objective": "tok_per_j",
        "shown": {"metric": "tok_per_j", "top": 15},
    }


def simulation_of(plan: dict) -> dict:
    def beside(ratio: float) -> dict:
        return {
            "tok_per_j": {"analytic": 0.6, "simulated": 0.6 * ratio, "ci95": [0.58, 0.63], "agrees": True},
            "ttft_p99_s": {"analytic": 0.2, "simulated": 0.9, "ci95": [0.5, 1.3], "agrees": False},
            "itl_p99_s": {"analytic": None, "simulated": 0.2, "ci95": [0.1, 0.3], "agrees": None},
            "itl_s": {"analytic": 0.06, "simulated": 0.062, "ci95": [None, None], "agrees": True},
            "slo_attainment": {"analytic": 0.0, "simulated": 0.99, "ci95": [0.98, 1.0], "agrees": False},
        }

    return {
        "workload": plan["workload"],
        "metrics": beside(1.01),
        "pools": [pool | {"metrics": beside(0.98 + 0.02 * k)} for k, pool in enumerate(plan["pools"])],
        "n_arrivals": 500_000,
        "slo_held": False,
    }


def ledger_of(name: str) -> dict:
    def row(choice: str, gain: float | None) -> dict:
        pools = {"tok_per_j_homogeneous": 0.5, "tok_per_j_two_pool": gain and 0.6, "tok_per_j_fleetopt": 0.8}
        return {"choice": choice, "gain": gain, **pools}

    rows = [row("published", 2.4), row("integration", 2.0), row("lengths", None), row("tail", 1.14)]
    return {"workload": {"name": name}, "gpu": "h100", "rows": rows}


def front_of(plan: dict) -> dict:
    def point(tok_per_j: float, usd: float) -> dict:
        return {"objectives": {"tok_per_j": tok_per_j, "usd_per_h": usd}, "plan": plan, "knee": tok_per_j == 0.5}

    return {
        "points": [point(0.1, 900.0), point(0.5, 1500.0), point(0.6, 4000.0)],
        "objectives": [{"name": "tok_per_j", "better": "high"}, {"name": "usd_per_h", "better": "low"}],
        "workload": plan["workload"],
        "homogeneous": None,
        "fleetopt": None,
        "gamma": 1.0,
        "reference_ttft_limit_s": 0.5,
        "ttft_is": "P99 TTFT of the worst pool",
        "hypervolume": {},
    }


def everything(n_pools: int, name: str = "requests.csv", llm: str = "llama-3.1-70b") -> tuple[dict, dict]:
    """A plan and every other document of it, as `report_page` takes them."""
    plan = plan_of(n_pools, name, gamma=1.5 if n_pools == 2 else 1.0, llm=llm)
    return plan, {
        "curves": curves_of(plan),
        "sensitivity": sensitivity_of(plan),
        "simulation": simulation_of(plan),
        "ledger": ledger_of(name),
        "front": front_of(plan),
        "commands": [f"fleetopt optimize --workload {name!r} --json --out plan.json"],
    }


@pytest.fixture(scope="module")
def page() -> str:
    plan, others = everything(2)
    return report_page(plan, LENGTHS, WEIGHTS, **others)


@pytest.fixture(scope="module")
def hostile_page() -> str:
    plan, others = everything(2, HOSTILE, HOSTILE)
    return report_page(plan, LENGTHS, WEIGHTS, **others)


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_pools", [1, 2, 6])
def test_the_pool_map_shows_every_request_and_every_pool(n_pools):
    plan = plan_of(n_pools)
    figure = pool_map_figure(plan, LENGTHS, 3.0 * WEIGHTS)  # shares, whatever the weights sum to
    panels = {axes.get_label(): axes for axes in figure.axes}
    steps = [patch.get_data() for patch in panels["map"].patches if hasattr(patch, "get_data")]
    shown = sum(float(np.sum(values - base)) for values, _, base in steps)
    assert shown == pytest.approx(100.0)
    of_pool = [float(np.sum(values - base)) for values, _, base in steps]
    edges = [pool["window_tokens"] for pool in plan["pools"]]
    below = np.diff([0.0, *(100 * WEIGHTS[edge >= LENGTHS].sum() for edge in edges)])
    np.testing.assert_allclose(of_pool, below, atol=1e-9)
    labels = [text.get_text() for text in panels["map"].texts]
    assert [f"{edge:,}" in label for edge, label in zip(edges, labels, strict=True)] == [True] * n_pools
    for name in ("requests", "gpus", "power"):
        assert sum(bar.get_width() for bar in panels[name].patches) == pytest.approx(1.0)


@pytest.mark.parametrize("n_pools", [1, 2, 6])
def test_bins_end_at_thresholds_and_shares_have_one_scale(n_pools):
    plan = plan_of(n_pools)
    plan["metrics"]["power_w"] *= 1.7
    panels = {axes.get_label(): axes for axes in pool_map_figure(plan, LENGTHS, WEIGHTS).axes}
    assert len({panels[name].get_xlim() for name in ("requests", "gpus", "power")}) == 1
    edges = [0.0, *(pool["window_tokens"] for pool in plan["pools"])]
    steps = [patch.get_data() for patch in panels["map"].patches if hasattr(patch, "get_data")]
    for (low, high), (values, ends, base) in zip(pairwise(edges), steps, strict=True):
        filled = values > base
        assert np.all(ends[:-1][filled] >= low) and np.all(ends[1:][filled] <= high * (1 + 1e-6))


def every_figure() -> dict[str, Figure]:
    """All there are, of six pools where there are pools, with large, small and far numbers."""
    plan, others = everything(6)
    curves, front = others["curves"], front_of(plan)
    for point, usd in zip(front["points"], (900.0, 15000.0, 40_000.0)):
        point["objectives"] = {"tok_per_j": 1.0 / usd, "ttft_p99_s": 20_000.0 / usd, "usd_per_h": usd}
    front["objectives"].append({"name": "ttft_p99_s", "better": "low"})
    rates = {
        "axis": {"name": "workload-rate"},
        "workload": plan["workload"],
        "rows": [
            {"value": rate, "plan": plan | {"metrics": None if rate == 3.0 else plan["metrics"] | {"n_gpus": n}}}
            for rate, n in ((3.0, 8), (20_000.0, 90_000), (100_000.0, 4_000_000))
        ],
    }
    for pool, curve in zip(plan["pools"], curves):
        pool["n_active"] = curve["points"][0]["batch"] = 0.02
    measured = Measurements(np.array([0.5, 6e4]), np.array([0.02, 3.0]), power_w_per_gpu=np.array([430.0, 5e5]))
    return {
        "map": pool_map_figure(plan, LENGTHS, WEIGHTS),
        "power": power_figure(plan, curves, measured),
        "tornado": tornado_figure(others["sensitivity"]),
        "agreement": agreement_figure(others["simulation"]),
        "ledger": ledger_figure(others["ledger"]),
        "front": front_figure(others["front"]),
        "three objectives": front_figure(front),
        "axis": axis_figure(rates),
        "levers": levers_figure(levers_of(plan)),
    }


def levers_of(plan: dict) -> dict:
    names = ("routing", "gamma", "precision", "kv_precision", "clock")
    levers = [
        {
            "name": name,
            "title": name,
            "gain": gain,
            "gain_interval": [0.9 * gain, 1.2 * gain],
            "quality": "assumed",
            "pools": plan["pools"],
            "note": "",
        }
        for name, gain in zip(names, (3.0, 1.5, 1.2, 1.0, 0.08))
    ]
    ratios = {("routing", "precision"): 0.9, ("precision", "clock"): 1.3, ("routing", "kv_precision"): None}
    pairs = [{"levers": list(pair), "ratio": ratio, "gain": ratio and 2 * ratio} for pair, ratio in ratios.items()]
    slo = {"slo": plan["slo"], "workload": plan["workload"], "objective": "usd"}
    return {"levers": levers, "pairs": pairs, **slo}


@pytest.fixture(scope="module")
def drawn() -> dict[str, Figure]:
    figures = every_figure()
    for figure in figures.values():
        figure.draw_without_rendering()
    return figures


def test_numbers_on_axes_are_in_full(drawn):
    for name, figure in drawn.items():
        for axes in figure.axes:
            said = [
                label.get_text() for axis in (axes.xaxis, axes.yaxis) for label in axis.get_ticklabels(which="both")
            ]
            offsets = [axis.get_offset_text().get_text() for axis in (axes.xaxis, axes.yaxis)]
            assert not any(re.search(r"\de[-+]?\d|10\^|[a-z]_[a-z]+_s\b", text) for text in (*said, *offsets)), (
                name,
                said,
            )


def test_no_marker_is_cut_or_outside(drawn):
    for name, figure in drawn.items():
        for axes in figure.axes:
            box = axes.get_window_extent()
            for line in axes.lines:
                if line.get_marker() in ("None", "", None) or len(line.get_xdata()) == 0:
                    continue
                size = line.get_markersize() * figure.dpi / 72 / 2 if line.get_clip_on() else -0.5
                x, y = line.get_transform().transform(line.get_xydata()).T
                inside = (box.x0 + size <= x) & (x <= box.x1 - size) & (box.y0 + size <= y) & (y <= box.y1 - size)
                assert np.all(inside), (name, line.get_label())


def test_texts_of_a_figure_do_not_collide(drawn):
    for name in ("map", "ledger", "agreement", "tornado", "levers"):
        for axes in drawn[name].axes:
            boxes = [text.get_window_extent() for text in axes.texts]
            assert not any(box.overlaps(other) for i, box in enumerate(boxes) for other in boxes[:i]), name


def test_pairs_leave_no_row_and_no_column_empty(drawn):
    matrix = drawn["levers"].axes[1]
    said = {(round(x), round(y)) for x, y in (text.get_position() for text in matrix.texts)}
    assert {x for x, _ in said} == set(range(len(matrix.get_xticks())))
    assert {y for _, y in said} == set(range(len(matrix.get_yticks())))
    assert "blank" in matrix.get_title(loc="left")


def test_what_lies_beyond_the_axis_has_an_arrow_and_its_number(drawn):
    axes = drawn["agreement"].axes[0]
    arrows = [line for line in axes.lines if line.get_marker() in ("<", ">")]
    simulation = simulation_of(plan_of(6))
    assert len(arrows) == len(axes.texts) == 7  # P99 TTFT of the fleet and of six pools: 4.5 times the laws'
    assert {text.get_text() for text in axes.texts} == {"4.5"}
    simulation["metrics"]["tok_per_j"]["ci95"] = [0.06, 1.5]
    for pool in simulation["pools"]:
        pool["metrics"]["tok_per_j"]["ci95"] = [0.5, 0.6]
    axes = agreement_figure(simulation).axes[0]
    assert sorted(text.get_text() for text in axes.texts)[:2] == ["0.1", "2.5"]


def test_figures_speak_the_words_of_the_field(drawn):
    for name, figure in drawn.items():
        texts = [text.get_text() for text in figure.findobj(Text)]
        assert not [text for text in texts if "_" in text.replace("max_num_seqs", "")], name


def test_every_input_of_an_engine_has_a_name():
    kinds = (
        ("h100", "llama-3.1-70b", {}),
        ("b200", "gpt-oss-120b", {}),
        ("h100", "llama-3.1-70b", {"source": "projected"}),
        ("h100", "llama-3.1-70b", {"serving": "vllm-0.11"}),
    )
    for gpu, llm, how in kinds:
        leaves = jax.tree_util.tree_flatten_with_path(inputs_of(build(EngineSpec(gpu, llm, **how))))[0]
        for path, _ in leaves:
            label = input_label(".".join(["pools.0.engine", *(key.name for key in path)]))
            assert label.startswith("pool 1: ") and "_" not in label.replace("max_num_seqs", ""), label
            *_, last = label.split(", ")
            assert not re.search(r" (s|w|frac)$", last), label


@pytest.mark.parametrize("n_pools", [2, 6])
def test_no_threshold_runs_through_the_label_of_another(n_pools):
    figure = pool_map_figure(plan_of(n_pools), LENGTHS, WEIGHTS)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    boxes = [text.get_window_extent() for text in axes.texts]
    for i, box in enumerate(boxes):
        for j, line in enumerate(axes.lines):
            (x, _), (_, top) = line.get_transform().transform(line.get_xydata())
            assert not (box.x0 < x < box.x1 and top > box.y0), (i, j)
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_one_length_alone_and_a_compressed_pool_are_drawn():
    plan = plan_of(2, gamma=1.5)
    figure = pool_map_figure(plan, [700.0], [1.0])
    figure.draw_without_rendering()
    assert "1.5 x 1,499" in figure.axes[0].texts[0].get_text()
    assert "shrunk" in figure.axes[0].get_xlabel()


@pytest.mark.parametrize("n_pools", [1, 2, 6])
def test_every_pool_is_marked_where_it_runs(n_pools):
    plan = plan_of(n_pools)
    measured = Measurements(np.array([8.0, 64.0]), np.array([0.02, 0.03]), power_w_per_gpu=np.array([430.0, 500.0]))
    left, right = power_figure(plan, curves_of(plan), measured).axes
    for axes, name in ((left, "gpu_power_w"), (right, "tok_per_j")):
        marked = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if len(line.get_xdata()) == 1]
        assert marked == [(pool["n_active"], pool[name]) for pool in plan["pools"]]
    dots = next(line for line in right.lines if line.get_label() == "measured decode steps")
    np.testing.assert_allclose(dots.get_ydata(), [8 / 0.02 / (430 * 8), 64 / 0.03 / (500 * 8)])
    looks = {(line.get_color(), line.get_marker()) for line in left.lines if len(line.get_xdata()) == 1}
    assert len(looks) == n_pools


def test_an_engine_is_drawn_at_its_points():
    points = curves_of(plan_of(1))[0]["points"]
    document = {
        "gpu": "h100",
        "llm": HOSTILE,
        "tp": 8,
        "quality": "law",
        "relative_error": 0.16,
        "power_relative_error": None,
        "points": [point | {"context_tokens": 600.0} for point in reversed(points[::4])],
    }
    figure = engine_figure(document, between=points[1::4])
    figure.draw_without_rendering()
    line, dots = figure.axes[1].lines
    assert list(dots.get_xdata()) == [point["batch"] for point in points[::4]]
    assert list(line.get_xdata()) == sorted(point["batch"] for point in [*points[::4], *points[1::4]])


@pytest.mark.parametrize("n_pools", [1, 2, 6])
def test_the_simulation_is_shown_with_its_tolerance(n_pools):
    figure = agreement_figure(simulation_of(plan_of(n_pools)))
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["tokens per joule", "P99 TTFT", "mean ITL"]
    band = axes.patches[1]  # of the P99 TTFT: |analytic - simulated| <= tolerance * simulated
    assert band.get_x() == pytest.approx(1 / (1 + TOLERANCE["ttft_p99_s"]))
    assert band.get_x() + band.get_width() == pytest.approx(1 / (1 - TOLERANCE["ttft_p99_s"]))
    assert any("4.5" in text.get_text() for text in axes.texts)  # 0.9 over 0.2, beyond the axis
    assert "not P99 TTFT" in figure.get_suptitle()


def test_a_prefix_cache_comes_behind_the_physical_row_of_a_ledger():
    """The sentence above is of the row before it; the bars are of both."""
    ledger = ledger_of("chat")
    before = ledger_figure(ledger).get_suptitle()
    cached = ledger["rows"][-1] | {"choice": "prefix_cache", "gain": 1.06}
    figure = ledger_figure(
        ledger | {"rows": [*ledger["rows"], cached], "prefix_cache": {"name": "constant", "hit_frac": 0.37}}
    )
    assert figure.get_suptitle() == before and "1.14x" in before
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()][-1] == "a prefix cache"
    assert "1.06x" in [text.get_text() for text in axes.texts]


def test_the_second_ledger_is_drawn_behind_each_change():
    """The gain before the stack and on it is said; a row that nothing holds has no dot."""

    def row(choice: str, to: str, homogeneous: float | None, fleetopt: float | None) -> dict:
        gain = fleetopt and homogeneous and fleetopt / homogeneous
        one_pool = {"tok_per_j_homogeneous": homogeneous, "tok_per_j_two_pool": homogeneous}
        best = {"tok_per_j_fleetopt": fleetopt, "gain": gain, "short_window_tokens": None, "gamma": 1.0}
        return {"choice": choice, "from": None, "to": to, **one_pool, **best}

    rows = [
        row("engine", "vllm-0.11", 0.6, 0.7),
        row("release", "vllm", 0.5, 0.6),
        row("stages", "any", None, None),
        row("prefix_cache", "constant", 0.7, 0.75),
        row("speculate", "draft up to 5 tokens ahead (eagle3)", 0.75, 0.78),
    ]
    about = {"workload": {"name": "chat", "arrival_rate_per_s": 5.0}, "gpu": "h200", "llm": "llama-3.1-70b", "tp": 8}
    cache = {"name": "constant", "hit_frac": 0.36}
    ledger = about | {"walk": "stack", "prefix_cache": cache, "rows": rows}
    figure = ledger_figure(ledger)
    (axes,) = figure.axes
    assert "H200 1.20x and 1.04x" in figure.get_suptitle()
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["vLLM 0.11", "the newest vLLM", "two stages", "prefix cache", "drafts"]
    assert [text.get_text() for text in axes.texts] == ["1.17x", "1.20x", "1.07x", "1.04x"]
    console = Console(file=StringIO(), width=160)
    console.print(ledger_table(ledger))
    said = " ".join(console.file.getvalue().split())
    assert "gains 1.20x with the newest vLLM, and 1.04x, of which splitting by length alone is 1.00x, on" in said
    assert "36 % of every prompt is assumed to be found; the stack gives one pool 1.50x." in said
    plan, others = everything(1)
    assert TITLES["stack"] in report_page(plan, LENGTHS, WEIGHTS, **others | {"ledger": ledger})
    rows[-1] |= {"gain": None, "tok_per_j_fleetopt": None, "tok_per_j_homogeneous": None}
    assert "no fleet holds the limits" in ledger_figure(ledger).get_suptitle()


def test_what_a_prefix_cache_spares_is_said_where_one_is_assumed():
    plan = plan_of(2)
    assert "Prefill avoided" not in decision(plan)
    spared = {"prompt_frac": 0.5, "tokens_per_s": 577_000.0, "instances": 20.3, "power_w": 98_580.0}
    cached = plan | {"prefix_cache": {"name": "constant", "hit_frac": 0.5}, "prefill_avoided": spared}
    said = decision(cached)["Prefill avoided"]
    assert said.startswith("50 % of the prompt tokens are found in the prefix cache, as assumed")
    assert "20.3 instances' time, at 98.58 kW" in said
    by_law = decision(cached | {"prefix_cache": {"name": "working_set"}})["Prefill avoided"]
    assert "by the law of its KV memory" in by_law


def test_figures_are_in_one_style_and_repeat(tmp_path):
    plan, others = everything(2, HOSTILE)
    figures = {
        "map": lambda: pool_map_figure(plan, LENGTHS, WEIGHTS),
        "power": lambda: power_figure(plan, others["curves"]),
        "tornado": lambda: tornado_figure(others["sensitivity"]),
        "agreement": lambda: agreement_figure(others["simulation"]),
        "ledger": lambda: ledger_figure(others["ledger"]),
        "front": lambda: front_figure(others["front"]),
    }
    for name, draw in figures.items():
        figure = draw()
        assert figure.get_suptitle(), name
        for axes in figure.axes:
            assert not (axes.spines["top"].get_visible() or axes.spines["right"].get_visible()), name
            assert axes.xaxis.label.get_size() == style.STYLE["axes.labelsize"], name
        path = tmp_path / f"{name}.svg"
        write_figure(figure, path)
        first = path.read_bytes()
        write_figure(draw(), path)
        assert path.read_bytes() == first, name


def test_dollars_are_not_mathematics():
    figure = front_figure(front_of(plan_of(1)))
    figure.draw_without_rendering()
    assert figure.get_suptitle().count("$") >= 2


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [*OBJECTIVES, {"weights": {"usd_per_h": 1.0, "kg_co2_per_h": 0.1}}])
def test_every_objective_and_every_limit_has_words_and_a_unit(objective):
    plan, others = everything(2)
    budget = make_budget(max_gpus=490, max_power_w=2e5, max_usd_per_h=2200, max_kg_co2_per_h=95, gpus_of={"h100": 490})
    sensitivity = others["sensitivity"]
    for each in (plan, sensitivity):
        each["objective"] = objective
    plan |= {"budget": budget.caps}
    plan["metrics"] |= {"kg_co2_per_h": 94.0, "gain_vs_homogeneous": 0.9}
    sensitivity["shadow_prices"] = [
        {"limit": name, "asked": cap, "binds": True, "elasticity": 0.5, "per_unit": 0.5, "reoptimized": None}
        for name, cap in budget.caps.items()
    ]
    said = decision(plan, sensitivity)
    for text in ("490 GPUs", "2,200 USD/h", "95 kg CO2/h", "One more kg CO2/h of carbon", "of H100 in stock"):
        assert text in said["What limits it"]
    assert ("budget" if objective == "tok_per_j" else f"seeks the {goal_of(objective).best}") in said["It saves"]
    for name, cap in budget.caps.items():
        assert "asked is" in broken({"limit": name, "asked": cap, "value": 2 * cap})
    Console(file=StringIO()).print(sensitivity_table(sensitivity))
    assert goal_of(objective).quantity.unit in "".join(Reader(report_page(plan, LENGTHS, WEIGHTS, **others)).text)


def test_what_surrounds_the_engines_is_named_without_a_pool():
    for record in (Site, Compressor):
        for field in dataclasses.fields(record):
            label = input_label(f"surroundings.{record.__name__.lower()}.{field.name}")
            assert "pool" not in label and label != field.name.replace("_", " "), field.name
    assert input_label("surroundings.site.pue") == "PUE"
    assert input_label("pools.1.engine.prefill.per_token_s") == "pool 2: prefill, time per token"


def test_a_record_of_ones_own_is_shown_by_its_name():
    plan, _ = everything(1)
    plan["assumptions"] |= {"tail": "{mine}"}
    plan |= {"dispatch": "by_weekday", "route_by": {"name": "prompt_and_limit", "max_tokens": 512.0}}
    text = "".join(Reader(report_page(plan, LENGTHS, WEIGHTS)).text)
    assert "Tail: {mine}" in text and "by_weekday" in text
    assert "max_tokens" in decision(plan_of(2) | {"route_by": plan["route_by"]})["Split"]


@pytest.mark.slow
@pytest.mark.parametrize("load", [1.0, 1e-3])  # with less than one sequence in flight
def test_a_pool_runs_on_its_curve(h100, small_workload, load):
    workload = with_rate(small_workload, load * float(small_workload.arrival_rate_per_s))
    problem = make_problem(workload, [h100], n_pools=2)
    windows = [1500.0, problem.window_tokens]
    plan = evaluate_given(problem, [h100, h100], window_tokens=windows, gamma=[1.0, 1.0], n_instances=[9, 12])
    document = plan_to_json(plan)
    for pool, curve in zip(document["pools"], pool_curves(plan), strict=True):
        batch, power_w, tok_per_j = (
            [point[name] for point in curve["points"]] for name in ("batch", "power_w_per_gpu", "tok_per_j")
        )
        # Up to what lies between two points; in overload all slots are full, where the curve ends.
        assert np.all(np.diff(batch) > 0) and batch[0] <= pool["n_active"] <= 1.01 * batch[-1]
        assert np.interp(pool["n_active"], batch, power_w) == pytest.approx(pool["gpu_power_w"], rel=0.01)
        assert np.interp(pool["n_active"], batch, tok_per_j) == pytest.approx(pool["tok_per_j"], rel=0.01)
    made = plan_of(2)
    assert set(made) == set(document) - {"binding", "broken", "one_pool"}
    for part in ("metrics", "search", "slo", "assumptions"):
        assert set(made[part]) == set(document[part])
    assert set(made["workload"]) <= set(document["workload"])
    assert set(made["pools"][0]) <= set(document["pools"][0])


# --- the page ---------------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """The tags with their attributes, and the text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.lasttag != "style":
            self.text.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.mark.parametrize("n_pools", [1, 2, 6])
def test_the_page_is_accessible(n_pools):
    plan, others = everything(n_pools)
    read = Reader(report_page(plan, LENGTHS, WEIGHTS, **others))
    assert read.all("html") == [{"lang": "en"}]
    figures = read.all("svg")
    assert len(figures) == len(read.all("figure")) == len(read.all("figcaption")) == 6
    assert all(svg["role"] == "img" and len(svg["aria-label"]) > 40 for svg in figures)
    assert read.all("th") and all(th["scope"] in ("col", "row") for th in read.all("th"))
    levels = [int(tag[1]) for tag, _ in read.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = {name for _, attributes in read.tags for value in attributes.values() for name in _references(value)}
    assert used <= set(ids)
    assert all(attributes.get("tabindex") == "0" for _, attributes in read.tags if attributes.get("class") == "scroll")


def _references(value: str | None) -> list[str]:
    return re.findall(r"(?:^|url\()#([\w-]+)", value or "")


def test_the_page_takes_nothing_from_the_network(page, hostile_page):
    for each in (page, hostile_page):
        read = Reader(each)
        names = {tag for tag, _ in read.tags}
        assert not names & {"script", "link", "iframe", "object", "embed", "form", "base"}
        for _, attributes in read.tags:
            for name in ("src", "href", "action", "data", "poster", "srcset"):
                assert attributes.get(name, "#").startswith(("#", "data:image/"))
            assert not any(name.startswith("on") for name in attributes)
        assert "@import" not in each
        assert re.findall(r"url\((?!#)", each) == []
        assert "default-src 'none'" in each


def test_what_a_user_typed_is_text(hostile_page):
    assert "<script" not in hostile_page.lower()
    assert "\x01" not in hostile_page
    text = "".join(Reader(hostile_page).text)
    assert text.count("<script>alert(1)</script>") > 6  # in the tables, the captions and the title


def test_names_in_any_script_are_shown():
    plan = plan_of(1, "对话 🙂.csv")
    assert "对话 🙂.csv" in "".join(Reader(report_page(plan, LENGTHS, WEIGHTS)).text)


def test_a_third_objective_is_shown_in_colour_without_the_network():
    plan, others = everything(1)
    front = others["front"]
    for point in front["points"]:
        point["objectives"]["ttft_p99_s"] = point["objectives"]["tok_per_j"] / 2
    front["objectives"].append({"name": "ttft_p99_s", "better": "low"})
    read = Reader(report_page(plan, LENGTHS, WEIGHTS, front=front))
    assert all(image["href"].startswith("data:image/png") for image in read.all("image"))
    assert len(read.all("image")) == 1


def test_the_page_holds_numbers_only(page):
    text = " ".join(Reader(page).text)
    assert not re.search(r"\b(nan|inf|None|null)\b", text)
    for said in ("30 x 8 H100", "1.30x the tokens per joule", "1.3", "certified", "fleetopt optimize", "physical"):
        assert said in text


def test_numbers_of_a_table_stand_to_the_right(page):
    tables = re.findall("<tbody>(.*?)</tbody>", page)
    assert len(tables) > 4
    cells = [cell for table in tables for cell in re.findall("<td(.*?)>(.*?)</td>", table)]
    for kind, text in cells:
        number = re.match(r"[-+$]?[\d.]|(-|unbounded|not held|nobody knows)$", text)
        assert ("number" in kind) == bool(number) or len(text) > LONG_CELL, text
    assert page.count('class="number"') > len(cells) / 2
    assert "tabular-nums" in page and page.count('class="hint"') > 6


def test_the_decision_comes_first(page):
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings[0] == "The decision"
    assert headings[-1] == "How to repeat it"


def test_a_plan_alone_makes_a_page_that_says_what_is_missing():
    plan = plan_of(1)
    read = Reader(report_page(plan, LENGTHS, WEIGHTS))
    assert len(read.all("svg")) == 1
    text = "".join(read.text)
    assert "fleetopt sensitivity" in text and "fleetopt simulate" in text


@pytest.mark.parametrize("added", [0, 3])
def test_a_verified_plan_says_so_and_compares_only_what_is_sized_alike(added):
    plan = plan_of(2)
    verified = simulation_of(plan) | {"held": True, "slo_held": True, "instances_added": added}
    del verified["workload"]
    plan["verified"] = verified
    read = Reader(report_page(plan, LENGTHS, WEIGHTS, sensitivity=sensitivity_of(plan)))
    text = "".join(read.text)
    assert "Verified: the limits hold in simulation" in text and "Not simulated" not in text
    assert ("What another threshold costs, the fleet sized anew" in text) == (added == 0)
    assert (f"the simulation added {added} instances to this fleet" in text) == (added > 0)


@pytest.mark.parametrize("change", [{}, {"rate": 1.5}, {"n": 1}, {"verified": None}])
def test_what_was_verified_is_told_of_the_same_fleet_and_traffic(change, tmp_path):
    plan = plan_of(2)
    plan["workload"] = plan["workload"] | {"digest": "sha256:0"}
    found = simulation_of(plan)
    counts = dict.fromkeys(("n_completed", "n_rejected", "n_in_system", "n_preemptions", "n_iterations"), 0)
    counts |= {"warm_up_s": 1.0, "window_s": 9.0, "memory_bytes": 0, "held": True, "instances_added": 2}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan | {"verified": change.get("verified", found | counts)}))
    now = plan | {
        "workload": plan["workload"]
        | {"arrival_rate_per_s": change.get("rate", 1.0) * plan["workload"]["arrival_rate_per_s"]}
    }
    now["metrics"] = plan["metrics"] | {"tok_per_j": plan["metrics"]["tok_per_j"] * (1.0 - 0.1 * change.get("n", 0))}
    verified = verified_of(path, now)
    assert (verified is None) == bool(change)
    if verified:
        text = "".join(Reader(report_page(now | {"verified": verified}, LENGTHS, WEIGHTS)).text)
        assert "500,000 requests simulated" in text


@pytest.mark.parametrize(
    ("binding", "said"),
    [
        (
            {"limit": "ttft_p99_s", "asked": 0.001, "nearest_feasible": 0.156},
            "P99 TTFT can at the nearest be 156 ms; asked is 1 ms",
        ),
        (
            {"limit": "budget", "asked": {"max_gpus": 8.0, "max_power_w": 1e4}, "nearest_feasible": None},
            "kept alone",
        ),
        ({"limit": "max_gpus", "asked": 8.0, "nearest_feasible": 536.0}, "GPUs can at the nearest be 536; asked is 8"),
        ({"limit": "window_tokens", "asked": 1e6, "nearest_feasible": 65536.0}, "65,536 tokens"),
    ],
)
def test_no_fleet_makes_a_page_that_says_why(binding, said):
    plan = plan_of(2) | {"status": "infeasible", "metrics": None, "pools": [], "binding": binding}
    assert said in "".join(Reader(report_page(plan, LENGTHS, WEIGHTS)).text)


def test_a_pue_that_was_not_given_moves_nothing():
    """A PUE of 1 is where no cooling is counted; one that is given is an input like others."""
    _, others = everything(2)
    document = copy.deepcopy(others["sensitivity"])
    for value, first in ((1.0, False), (1.3, True)):
        ranked = [{"input": "surroundings.site.pue", "value": value, "elasticity": -1.0}]
        ranked += others["sensitivity"]["elasticities"]["tok_per_j"]
        document["elasticities"]["tok_per_j"] = ranked
        figure = tornado_figure(document)
        assert ("PUE moves" in figure.get_suptitle()) == first
        assert ("PUE" in [label.get_text() for label in figure.axes[0].get_yticklabels()]) == first


def test_an_end_without_bound_is_explained():
    intervals = copy.deepcopy(everything(2)[1]["sensitivity"]["intervals"])
    for of in intervals["metrics"].values():
        of |= {"sampled": [1.0, 2.0], "linear": [1.0, 2.0]}
    assert unbounded_said(intervals) == []
    intervals["metrics"]["ttft_p99_s"]["sampled"] = [0.1, None]
    (said,) = unbounded_said(intervals)
    assert said.startswith("Unbounded: ") and "more requests than it can serve" in said


def test_an_overloaded_plan_is_shown_as_such():
    plan = plan_of(2) | {"status": "infeasible", "binding": {"limit": "utilization", "asked": 0.85, "value": 1.2}}
    plan["pools"][0] |= {"utilization": None, "ttft_p99_s": None}
    plan["metrics"] |= {"ttft_p99_s": None, "gain_vs_homogeneous": None}
    text = "".join(Reader(report_page(plan, LENGTHS, WEIGHTS, curves=curves_of(plan))).text).replace("\u00a0", " ")
    assert "This fleet" in text and "Buy" not in text
    assert "load of the busiest pool is 120 %; asked is 85 %" in text and "unbounded" in text


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("sensitivity", lambda document: document["plan"]["pools"][0].update(n_instances=7), "another fleet"),
        ("simulation", lambda document: document["pools"].pop(), "another fleet"),
        ("simulation", lambda document: document.pop("metrics"), "fleetopt simulate --json"),
        ("ledger", lambda document: document.pop("rows"), "fleetopt ledger --json"),
    ],
)
def test_a_document_of_something_else_is_refused(name, change, why):
    plan, others = everything(2)
    document = copy.deepcopy(others[name])
    change(document)
    with pytest.raises(BadInput, match=why):
        report_page(plan, LENGTHS, WEIGHTS, **(others | {name: document}))


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours (WCAG 2)."""

    def luminance(colour: str) -> float:
        channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return float(
            np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
            @ [0.2126, 0.7152, 0.0722]
        )

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_and_marks_stand_out_in_the_light_and_in_the_dark(page):
    schemes = re.findall(r":root \{([^}]*)\}", page)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--(\w+): (#\w{6})", scheme))
        for name in ("ink", "muted"):
            assert contrast(colours[name], colours["paper"]) > 4.5
        for name in ("blue", "vermillion", "green"):
            assert contrast(colours[name], colours["paper"]) > 3.0


# --- in a browser -----------------------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"),
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
FRAME = """<!doctype html><meta name="color-scheme" content="light dark"><title>not loaded</title>
<iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{page}"></iframe>
<script>addEventListener("load", () => {{ const view = document.querySelector("iframe").contentWindow;
    document.title = JSON.stringify({{
        width: view.innerWidth, needed: view.document.documentElement.scrollWidth,
        dark: view.matchMedia("(prefers-color-scheme: dark)").matches,
        loads: view.performance.getEntriesByType("resource").length }}); }});</script>"""


def browse(tmp_path, page: str, *options: str) -> tuple[str, str]:
    """(DOM, what the browser logged) of a page in a file, in a browser of its own."""
    path, profile = tmp_path / "report.html", tmp_path / "profile"
    path.write_text(page, encoding="utf-8")
    shutil.rmtree(profile, ignore_errors=True)
    command = [BROWSER, *FLAGS, f"--user-data-dir={profile}", *options, path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser, google-chrome or chrome is installed")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_the_page(page, hostile_page, tmp_path, width, dark):
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    window = f"--window-size={width},1600"
    for each in (page, hostile_page):
        shot = tmp_path / "shot.png"
        _, log = browse(tmp_path, each, scheme, window, f"--screenshot={shot}")
        assert "CONSOLE" not in log
        pixels = matplotlib.image.imread(shot)[..., :3]
        assert pixels.shape[:2] == (1600, width)
        assert len(np.unique((255 * pixels).astype(int).reshape(-1, 3), axis=0)) > 100  # letters and figures
        assert (np.median(pixels) < 0.2) if dark else (np.median(pixels) > 0.9)
        # A browser's own window is not as narrow as a phone: a frame of another page is, and can be measured.
        framed = FRAME.format(width=width, page=escape(each))
        dom, log = browse(tmp_path, framed, scheme, "--window-size=1400,1000", "--dump-dom")
        assert "CONSOLE" not in log
        facts = json.loads(re.search(r"<title>(\{.*?\})</title>", dom).group(1))
        assert facts == {"width": width, "needed": width, "dark": dark, "loads": 0}


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser, google-chrome or chrome is installed")
def test_a_browser_prints_the_page(page, tmp_path):
    pdf = tmp_path / "report.pdf"
    browse(tmp_path, page, "--no-pdf-header-footer", f"--print-to-pdf={pdf}")
    content = pdf.read_bytes()
    assert content.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 20
