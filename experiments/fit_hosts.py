"""Fit the serving engines' own time to measured serving: fleetopt_jax/catalog/data/hosts.json.

    python experiments/fit_hosts.py FOLDER

FOLDER holds `serving_points` (`_serving_points.py`) and `mlenergy` (`_mlenergy.py`). The steps of a closed-loop
benchmark do not depend on how long they take (`laws/closed_loop.py`): they are listed once for every point, the mixed
step says what the GPU works in each, and the coefficients of the host law are found by least squares over the
logarithms of TPOT and TTFT. They are pooled: those of an engine are drawn towards `PRIORS`, those of a GPU towards the
engine's, as strongly as said there, so that few points move them little.

Errors are of fits that have not seen the LLM; for a GPU nobody measured, neither the LLM nor the GPU; where its
operators are borrowed too, of such fits on operators of another generation; for a configuration that was measured, of
fits that have not seen the point (every fifth left out). A GPU and a kind of LLM (dense, experts) with fewer than
`ENOUGH_ROWS` points or `ENOUGH_LLMS` LLMs says the error of a wider pool where that is larger: all GPUs, then both
kinds.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax

jax.config.update("jax_enable_x64", True)

import numpy as np  # noqa: E402
from _mlenergy import CATALOG, Row, read_rows  # noqa: E402
from _mlenergy import SOURCE as MLENERGY  # noqa: E402
from _serving_points import BUDGET_TOKENS, UTILIZATION, Point, Served, read_points  # noqa: E402
from _serving_points import SOURCE as POINTS  # noqa: E402
from operators._fitting import rounded_document  # noqa: E402
from scipy.optimize import least_squares  # noqa: E402

from fleetopt_jax.catalog.engines import workspace_of  # noqa: E402
from fleetopt_jax.catalog.gpus import GPUS  # noqa: E402
from fleetopt_jax.catalog.llms import LLMS, at_precision  # noqa: E402
from fleetopt_jax.catalog.steps import Parallelism, data_types, operator_laws, stack_of  # noqa: E402
from fleetopt_jax.core.files import write_whole  # noqa: E402
from fleetopt_jax.laws.closed_loop import Benchmark, Limits, fits, schedule  # noqa: E402
from fleetopt_jax.laws.host import MANY_ROWS, make_host_law  # noqa: E402
from fleetopt_jax.laws.kv_cache import kv_capacity_tokens  # noqa: E402
from fleetopt_jax.laws.mixed_step import CLASSES, MixedStep, StepBatch, decoding, with_prompts  # noqa: E402
from fleetopt_jax.laws.stack import mixed_step  # noqa: E402

OUT = Path(__file__).parents[1] / "fleetopt_jax" / "catalog" / "data" / "hosts.json"
TITLES = {
    "vllm": "vLLM 0.12 to 0.19",
    "vllm-0.11": "vLLM 0.11",
    "sglang": "SGLang 0.5",
    "trtllm": "TensorRT-LLM 1.0 to 1.3",
}
# vLLM's largest captured graph. Others' prompts beside few rows do not tell it: of vLLM 0.11 it would go into kappa.
GRAPH_ROWS = {"vllm": 512.0}
KINDS = ("dense", "experts")
# Coefficients: value to start from and drawn towards, and the standard deviation of the logarithm. One of each for an
# engine and kind of LLM; `_of_gpu` are factors of a GPU.
PRIORS = {
    "slowdown": (1.0, 0.10),
    "prompt_excess": (0.20, 0.7),  # kappa of a step with prompt tokens over that of one without, less 1
    "large_exchange": (0.9, 0.2),
    "layer_s": (40e-6, 1.0),
    "prompt_layer_s": (300e-6, 1.0),
    "per_seq_s": (5e-6, 1.0),
    "first_token_s": (15e-3, 0.7),
}
SHARED = ("large_exchange", "layer_s", "per_seq_s", "first_token_s")  # by both kinds of LLM
OF_GPU = {
    "slowdown": 0.10,
    "prompt_excess": 0.5,
    "large_exchange": 0.2,
}  # that have factors of a GPU, with their standard deviations
TTFT_WEIGHT = 0.5  # of a point's TTFT against its TPOT
POINT_ERROR = 0.1  # what a point is off by for no reason of ours
MOST_POINTS = 40  # of one model on one GPU at one precision that count in full
ROBUST = 1.0  # errors of more than so many POINT_ERRORs count less
MOST_GPUS = 16
MOST_SEQUENCES = 1024
ENDLESS_TOKENS = 1e12  # of KV cache, where the batch fits
MOST_TTFT_S = 15.0
ENOUGH_ROWS, ENOUGH_LLMS = 20, 3  # that an error of its own stands on
FOLDS = 5  # of the points, each left out in turn
LEAST_MEASURED = 3  # points of a configuration that counts as measured
LENDERS = {"h100": "b200", "h200": "h100", "b200": "h100", "gb200": "h100"}  # whose operators a projected GPU has
FILLED = 0.95  # of nominal lengths, that requests fill at most on average: 0.9, and some more


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    measured, left_out = measured_points(folder / "serving_points")
    borrowed = [_borrowing(point) for point, _ in measured]
    measured = [each for _, each in measured]
    for why, n in sorted(left_out.items()):
        print(f"left out, {why}: {n}")
    iterations = measured_iterations(folder / "mlenergy")
    measured, borrowed = measured + iterations, borrowed + [None] * len(iterations)
    engines = {}
    for engine, title in TITLES.items():
        here = [i for i, each in enumerate(measured) if each.engine == engine]
        of_engine = _engine(engine, [measured[i] for i in here], [borrowed[i] for i in here])
        engines[engine] = {"title": title, **of_engine}
    document = {"source": f"{POINTS}; {MLENERGY}", "licence": "Apache-2.0", "engines": engines}
    write_whole(OUT, json.dumps(rounded_document(document), indent=1, sort_keys=True) + "\n")


# ---------------------------------------------------------------------------------------------------- what was measured


@dataclass(frozen=True, eq=False)
class Measured:
    """One point, with all the steps of its benchmark [E], requests [N]."""

    engine: str
    llm: str
    gpu: str
    precision: str
    kv_precision: str
    split: Parallelism
    experts: bool
    long: bool  # whether prompts are of 8,192 tokens
    n_layers: float
    gpu_s: np.ndarray  # [E] of the operators but for collectives, timed alone
    exchange_s: np.ndarray  # [E] of collectives, timed alone
    rows: np.ndarray  # [E]
    graphless: np.ndarray  # [E] how far it goes without a graph, 0 to 1
    prompt: np.ndarray  # [E] 1 where a step has prompt tokens
    n_active: np.ndarray  # [E] of each scheduler
    repeats: np.ndarray  # [E]
    sent: np.ndarray  # [N]
    first: np.ndarray
    last: np.ndarray
    output_tokens: np.ndarray
    tpot_s: float
    ttft_s: float | None  # None: only a mean step was measured


@dataclass(frozen=True, eq=False)
class Table:
    """Many points with their steps one after the other, so that one law's arithmetic is done at once."""

    points: tuple[Measured, ...]
    of_step: np.ndarray  # the point that a step is of
    of_request: np.ndarray

    @classmethod
    def of(cls, points: Sequence[Measured]) -> "Table":
        numbers = np.arange(len(points))
        return cls(
            tuple(points),
            np.repeat(numbers, [len(point.gpu_s) for point in points]),
            np.repeat(numbers, [len(point.sent) for point in points]),
        )

    def joined(self, name: str) -> np.ndarray:
        """A column of all points."""
        return _joined(self, name)

    def predicted(self, laws: Sequence[dict[str, float]]) -> tuple[np.ndarray, np.ndarray]:
        """(TPOT, TTFT) [point] by a host law for each [s]; TPOT is the mean step where no request is listed."""
        law = {name: np.array([each[name] for each in laws]) for name in laws[0]}
        at = {name: values[self.of_step] for name, values in law.items()}
        prompt, n = self.joined("prompt"), len(self.points)
        rows = self.joined("rows")
        exchanges = 1.0 + (at["large_exchange"] - 1.0) * rows / (rows + MANY_ROWS)
        gpu_s = self.joined("gpu_s") + exchanges * self.joined("exchange_s")
        work_s = at["slowdown"] * (1.0 + at["prompt_excess"] * prompt) * gpu_s
        layers = np.array([point.n_layers for point in self.points])[self.of_step]
        graphless = prompt * self.joined("graphless")
        host_s = (at["layer_s"] + at["prompt_layer_s"] * graphless) * layers
        step_s = np.sqrt(np.sqrt(work_s**2 * work_s**2 + host_s**2 * host_s**2))  # powers are slow
        step_s = self.joined("repeats") * (step_s + at["per_seq_s"] * self.joined("n_active"))
        total_s = np.bincount(self.of_step, step_s, n)
        if not len(self.of_request):
            return total_s, np.zeros(n)
        end_s = np.concatenate([[0.0], np.cumsum(step_s)])
        start = np.concatenate([[0], np.cumsum(np.bincount(self.of_step, minlength=n))])[self.of_request]
        sent_s, first_s, last_s = (end_s[start + self.joined(name)] for name in ("sent", "first", "last"))
        requests = np.bincount(self.of_request, minlength=n)
        tpot_s = np.bincount(self.of_request, (last_s - first_s) / (self.joined("output_tokens") - 1.0), n) / requests
        return tpot_s, np.bincount(self.of_request, first_s - sent_s, n) / requests + law["first_token_s"]


@cache
def _joined(table: Table, name: str) -> np.ndarray:
    return np.concatenate([getattr(point, name) for point in table.points])


def measured_points(folder: Path) -> tuple[list[tuple[Point, Measured]], dict[str, int]]:
    """The points whose batch fits, and why others are left out."""
    points, left_out = read_points(folder)
    found = []
    for point in points:
        each = measured_point(point)
        if isinstance(each, str):
            left_out[each] = left_out.get(each, 0) + 1
        else:
            found.append((point, each))
    return found, left_out


def _borrowing(point: Point) -> Measured | None:
    """The point with operators of another generation of GPUs, by data-sheet figures; None where that has none such."""
    gpu = replace(point.served.gpu, name="projected", law=LENDERS[point.served.gpu.name])
    found = measured_point(replace(point, served=replace(point.served, gpu=gpu)))
    return None if isinstance(found, str) else found


def measured_point(point: Point, *, queues: bool = False) -> Measured | str:
    """A point with the steps of its benchmark, or why there is none; if it `queues`, as far as the cache holds it."""
    served = point.served
    if served.split.n_gpus > MOST_GPUS:
        return f"more than {MOST_GPUS} GPUs"
    try:
        step, kv_tokens = _step(served)
    except ValueError as error:
        return f"no law: {error}"
    if not queues and point.concurrency * FILLED * (point.isl + point.osl) > kv_tokens:
        return "its batch does not fit the KV cache"
    if point.ttft_s > MOST_TTFT_S:
        return f"a TTFT above {MOST_TTFT_S:g} s: it queues for a limit that nobody states"
    limits = Limits(
        budget_tokens=served.split.dp * served.split.pp * BUDGET_TOKENS,
        max_num_seqs=served.split.dp * MOST_SEQUENCES,
        kv_tokens=kv_tokens if queues else ENDLESS_TOKENS,
        window_tokens=served.architecture.window_tokens,
        n_caches=served.split.dp,
    )
    benchmark = Benchmark(point.isl, point.osl, point.concurrency, 10 * point.concurrency)
    if not fits(benchmark, limits):
        return "its longest request does not fit the KV cache"
    run = schedule(benchmark, limits)
    return Measured(
        engine=served.engine,
        llm=served.llm,
        gpu=served.gpu.name,
        precision=served.precision,
        kv_precision=served.kv_precision,
        split=served.split,
        experts=served.architecture.n_experts > 0,
        long=point.isl >= 8000,
        n_layers=served.architecture.layers,
        **_gpu(step, run.batch, served.engine),
        prompt=np.greater(run.batch.prompt_tokens, 0).astype(float),
        n_active=np.asarray(run.batch.n_active) / served.split.dp,
        repeats=run.repeats,
        sent=run.sent,
        first=run.first,
        last=run.last,
        output_tokens=run.output_tokens,
        tpot_s=point.tpot_s,
        ttft_s=point.ttft_s,
    )


@cache
def _step(served: Served) -> tuple[MixedStep, float]:
    """The mixed step, and what the KV cache of the instance holds [tokens]."""
    a, gpu, split = served.architecture, served.gpu, served.split
    types = data_types(a, gpu, served.precision, served.kv_precision)
    laws, _ = operator_laws(gpu, a, types)
    step = mixed_step(stack_of(a, split, types, served.engine), laws, gpu.gpu, make_host_law())
    numbers = at_precision(a, served.precision, served.kv_precision, gpu.formats)
    room = UTILIZATION, workspace_of(a, gpu, split)
    return step, float(kv_capacity_tokens(gpu.gpu, numbers, split.tp, *room, split.dp, split.pp))


def _gpu(step: MixedStep, batch: StepBatch, engine: str) -> dict[str, np.ndarray]:
    """What GPUs work on in steps of an engine, by the names of `Measured`."""
    parts = np.asarray(_seconds(step, batch))
    passed = CLASSES.index("collectives")
    rows = batch.n_active + batch.prompt_tokens
    graphless = make_host_law(graph_rows=GRAPH_ROWS.get(engine, 0.0)).beyond_graphs(rows)
    return {
        "gpu_s": parts.sum(axis=1) - parts[:, passed],
        "exchange_s": parts[:, passed],
        "rows": np.asarray(rows),
        "graphless": np.asarray(graphless),
    }


_seconds = jax.jit(jax.vmap(lambda step, batch: step.parts(batch).seconds, (None, 0)))


def measured_iterations(folder: Path) -> list[Measured]:
    """ML.ENERGY's mean iterations: steps with a new prompt and steps without, in the shares of its steady state."""
    found = []
    for row in read_rows(folder):
        if row.host_bound or row.architecture not in CATALOG:
            continue
        served = served_iteration(row)
        a = served.architecture
        batch, shares = iteration(row)
        found.append(
            Measured(
                engine="vllm-0.11",
                llm=served.llm,
                gpu=row.gpu,
                precision=row.precision,
                kv_precision="bf16",
                split=served.split,
                experts=a.n_experts > 0,
                long=False,
                n_layers=a.layers,
                **_gpu(step_of(served), batch, served.engine),
                prompt=np.array([0.0, 1.0]),
                n_active=np.full(2, row.batch / served.split.dp),
                repeats=shares,
                sent=np.zeros(0, int),
                first=np.zeros(0, int),
                last=np.zeros(0, int),
                output_tokens=np.zeros(0),
                tpot_s=row.iteration_s,
                ttft_s=None,
            )
        )
    return found


def served_iteration(row: Row) -> Served:
    """What served a row of ML.ENERGY."""
    llm, split = CATALOG[row.architecture], Parallelism(row.tp // row.attention_dp, row.ep, row.attention_dp)
    architecture = LLMS[llm].architecture
    return Served("vllm-0.11", "0.11.1", llm, architecture, GPUS[row.gpu], row.precision, "bf16", split)


def iteration(row: Row) -> tuple[StepBatch, np.ndarray]:
    """A step without and one with a new prompt [2], and their shares of the steady state."""
    window_tokens = LLMS[CATALOG[row.architecture]].architecture.window_tokens
    alone = decoding(row.batch, row.context_tokens, window_tokens)
    prompt_tokens = row.prompt_per_output * row.batch
    share = min(1.0, prompt_tokens / max(row.prompt_tokens, 1.0))
    both = with_prompts(alone, prompt_tokens / max(share, 1e-9), 0.0, window_tokens)
    batch = jax.tree.map(lambda *x: np.array([float(each) for each in x]), alone, both)
    return batch, np.array([1.0 - share, share])


def step_of(served: Served) -> MixedStep:
    """The mixed step on a host that costs nothing."""
    return _step(served)[0]


# ------------------------------------------------------------------------------------------------------------- the fit


@dataclass(frozen=True, eq=False)
class Fit:
    """Coefficients of one engine, as logarithms."""

    names: tuple[tuple[str, ...], ...]
    values: np.ndarray

    def law(self, experts: bool, gpu: str | None) -> dict[str, float]:
        """The coefficients for a kind of LLM on a GPU; None: of a GPU that was not measured."""
        at = dict(zip(self.names, self.values))
        kind = KINDS[experts]
        logs = {name: at[(name,) if name in SHARED else (name, kind)] for name in PRIORS}
        for name in OF_GPU:
            logs[name] += sum(at.get((name, of, gpu or ""), 0.0) for of in ("gpu", kind))
        return {name: float(np.exp(value)) for name, value in logs.items()}


def fit(points: Sequence[Measured], near: Fit | None = None) -> Fit:
    """The coefficients that describe the points best, looked for `near` those of others where that is said."""
    gpus = sorted({point.gpu for point in points})
    priors: dict[tuple[str, ...], tuple[float, float]] = {}
    for name, (value, deviation) in PRIORS.items():
        for key in [(name,)] if name in SHARED else [(name, kind) for kind in KINDS]:
            priors[key] = float(np.log(value)), deviation
    for name, deviation in OF_GPU.items():
        for gpu in gpus:
            for of in ("gpu",) if name in SHARED else ("gpu", *KINDS):
                priors[name, of, gpu] = 0.0, deviation
    names = tuple(priors)
    start, deviation = np.array(list(priors.values())).T
    if not points:
        return Fit(names, start)
    counts = Counter((point.llm, point.gpu, point.precision) for point in points)
    weight = np.array(
        [min(1.0, MOST_POINTS / counts[point.llm, point.gpu, point.precision]) ** 0.5 for point in points]
    )
    table, seen = Table.of(points), np.array([[point.tpot_s, point.ttft_s or np.nan] for point in points]).T
    counted = np.stack([weight, TTFT_WEIGHT * weight])

    def residuals(x: np.ndarray) -> np.ndarray:
        laws = {key: Fit(names, x).law(*key) for key in {(point.experts, point.gpu) for point in points}}
        shown = np.stack(table.predicted([laws[point.experts, point.gpu] for point in points]))
        wrong = (counted * np.log(np.where(shown > 0, shown, 1.0) / seen) / POINT_ERROR)[~np.isnan(seen)]
        robust = np.sign(wrong) * np.sqrt(2.0 * ROBUST**2 * (np.sqrt(1.0 + (wrong / ROBUST) ** 2) - 1.0))
        return np.concatenate([robust, (x - start) / deviation])

    known = dict(zip(near.names, near.values)) if near else {}
    first = np.array([known.get(name, value) for name, value in zip(names, start)])
    return Fit(names, least_squares(residuals, first, diff_step=1e-4, max_nfev=40, xtol=1e-4).x)


def errors(points: Sequence[Measured], law: Fit, known: bool = True) -> np.ndarray:
    """Relative errors of (TPOT, TTFT) [point, 2]; TTFT nan where it was not measured."""
    laws = [law.law(point.experts, point.gpu if known else None) for point in points]
    shown = np.stack(Table.of(points).predicted(laws))
    seen = np.array([[point.tpot_s, point.ttft_s or np.nan] for point in points]).T
    return (shown / seen - 1.0).T


def left_out_errors(points: Sequence[Measured], of: str, near: Fit | None = None) -> np.ndarray:
    """The same, each by a fit to the points of other LLMs ("llm"), or other GPUs ("gpu")."""
    return blind_errors(points, of, near=near)[0]


def blind_errors(
    points: Sequence[Measured], *of: str, shown: Sequence[Measured | None] | None = None, near: Fit | None = None
) -> list[np.ndarray]:
    """Relative errors of (TPOT, TTFT), each by a fit to points that differ in all of `of`; of the points, and of what
    else is `shown` of them by the same fits."""
    tables = [points] if shown is None else [points, shown]
    found, whole = [np.full((len(points), 2), np.nan) for _ in tables], near or fit(points)
    names = [tuple(getattr(point, name) for name in of) for point in points]
    for held in sorted(set(names)):
        kept = [point for point, name in zip(points, names) if not any(a == b for a, b in zip(name, held))]
        law = fit(kept, whole)
        for table, some in zip(found, tables):
            at = [i for i, name in enumerate(names) if name == held and some[i] is not None]
            if at:
                table[at] = errors([some[i] for i in at], law, known="gpu" not in of)
    return found


def rows_left_out_errors(points: Sequence[Measured], near: Fit) -> np.ndarray:
    """The same, each by a fit without every fifth point."""
    found, fold = np.full((len(points), 2), np.nan), np.arange(len(points)) % FOLDS
    for k in range(FOLDS):
        held = np.flatnonzero(fold == k)
        if len(held):
            law = fit([point for point, other in zip(points, fold) if other != k], near)
            found[held] = errors([points[i] for i in held], law)
    return found


# ---------------------------------------------------------------------------------------------------------- the answer


def _engine(engine: str, points: Sequence[Measured], borrowed: Sequence[Measured | None]) -> dict[str, Any]:
    """What is kept of an engine; prints its table of errors."""
    law = fit(points)
    llms, gpus = left_out_errors(points, "llm", law), left_out_errors(points, "gpu", law)
    both, projected = blind_errors(points, "llm", "gpu", shown=borrowed, near=law)
    tables = {
        "fitted": errors(points, law),
        "rows left out": rows_left_out_errors(points, law),
        "LLMs left out": llms,
        "GPUs left out": gpus,
        "both left out": both,
        "operators borrowed": projected,
    }
    print(f"{engine}: {len(points)} points")
    document: dict[str, Any] = {}
    of_gpu, of_kind = np.array([point.gpu for point in points]), np.array([point.experts for point in points], bool)
    anyone = np.ones(len(points), bool)
    for experts, kind in enumerate(KINDS):
        here = of_kind == bool(experts)
        found: dict[str, dict[str, Any]] = {}
        for gpu in sorted(set(of_gpu.tolist())):
            cell = here & (of_gpu == gpu)
            _print(f"{kind:8}{gpu:6}", points, tables, cell)
            found[gpu] = _part(law, bool(experts), gpu, cell, _blind(points, llms, cell, here, anyone))
        _print(f"{kind:8}all   ", points, tables, here)
        unmeasured = _largest(_blind(points, table, here, anyone) for table in (llms, both))
        others = _part(law, bool(experts), None, here, unmeasured)
        lent = _largest((unmeasured, _blind(points, projected, here, anyone)))
        document[kind] = {"gpus": found, "others": others, "projected": {"errors": lent}}
    for part in (part for of in document.values() for part in (*of["gpus"].values(), of["others"])):
        part["coefficients"]["graph_rows"] = GRAPH_ROWS.get(engine, 0.0)
    return {**document, "measured": _configurations(points, tables["rows left out"])}


def _blind(points: Sequence[Measured], table: np.ndarray, cell: np.ndarray, *pools: np.ndarray) -> dict[str, float]:
    """Errors of the points in a cell; of one with few points or LLMs those of the first pool with enough, if larger."""
    found, wider = _error_numbers(points, table, cell), {}
    for name in ("tpot", "ttft", "ttft_8k"):
        for chosen in (cell, *pools):
            rows = [points[i].llm for i in np.flatnonzero(chosen & _said(points, table, name))]
            if (len(rows) >= ENOUGH_ROWS and len(set(rows)) >= ENOUGH_LLMS) or chosen is pools[-1]:
                wider |= {key: x for key, x in _error_numbers(points, table, chosen).items() if key == name}
                break
    return _largest((found, wider))


def _said(points: Sequence[Measured], table: np.ndarray, name: str) -> np.ndarray:
    """Which points say something of it."""
    some = ~np.isnan(table[:, 0 if name == "tpot" else 1])
    return some & np.array([point.long for point in points], bool) if name == "ttft_8k" else some


def _largest(tables: Iterable[dict[str, float]]) -> dict[str, float]:
    """Of each error the largest that is said."""
    found: dict[str, float] = {}
    for table in tables:
        found |= {name: max(value, found.get(name, 0.0)) for name, value in table.items()}
    return found


def _configurations(points: Sequence[Measured], table: np.ndarray) -> list[dict[str, Any]]:
    """The configurations that were measured, with the errors of their own points; with few, not below their cell's."""
    keys = [(p.gpu, p.llm, p.precision, p.kv_precision, *vars(p.split).values()) for p in points]
    cells = [(point.gpu, point.experts) for point in points]
    found = []
    for key in sorted(set(keys)):
        own = np.array([other == key for other in keys])
        if own.sum() < LEAST_MEASURED:
            continue
        cell = np.array([other == cells[keys.index(key)] for other in cells])
        said = _error_numbers(points, table, own)
        if own.sum() < ENOUGH_ROWS:
            said = _largest((said, _error_numbers(points, table, cell)))
        names = ("gpu", "llm", "precision", "kv_precision", "tp", "ep", "dp", "pp")
        found.append({**dict(zip(names, key)), "points": int(own.sum()), "errors": said})
    return found


def _part(law: Fit, experts: bool, gpu: str | None, cell: np.ndarray, said: dict[str, float]) -> dict[str, Any]:
    found = law.law(experts, gpu)
    found["prompt_slowdown"] = found["slowdown"] * (1.0 + found.pop("prompt_excess"))
    return {"coefficients": found, "errors": said, "points": int(cell.sum())}


def _error_numbers(points: Sequence[Measured], table: np.ndarray, chosen: np.ndarray) -> dict[str, float]:
    """Mean absolute relative errors."""
    columns = {"tpot": 0, "ttft": 1, "ttft_8k": 1}
    some = {name: np.abs(table[chosen & _said(points, table, name), column]) for name, column in columns.items()}
    return {name: float(values.mean()) for name, values in some.items() if len(values)}


def _print(what: str, points: Sequence[Measured], tables: dict[str, np.ndarray], cell: np.ndarray) -> None:
    if not cell.any():
        return
    llms = len({points[i].llm for i in np.flatnonzero(cell)})
    print(f"  {what}{cell.sum():5} points of {llms} LLMs")
    for name, table in tables.items():
        said = _error_numbers(points, table, cell)
        print(f"    {name:20}" + " ".join(f"{key} {value:6.1%}" for key, value in said.items()))


if __name__ == "__main__":
    main()
