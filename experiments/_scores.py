"""What a scorecard counts: rows with what was measured and predicted, errors by group, and what was aimed at."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

OURS, NEW_GPU, REPLACED, PEER = "ours", "ours, GPU unseen", "law it replaces", "AIConfigurator"
PREDICTORS = (OURS, NEW_GPU, REPLACED, PEER)
TITLES = {
    "tpot_s": "TPOT",
    "ttft_s": "TTFT",
    "ttft_8k_s": "TTFT of 8K prompts",
    "tok_per_s": "tok/s",
    "power_w": "watts",
    "tok_per_j": "tok/J",
}
STEADY = "vllm-0.11"  # what ML.ENERGY ran
POOLED, DENSE, EXPERTS = "all", "dense", "experts"
OVER_ALL = (POOLED, DENSE, EXPERTS)  # groups of more than one model


@dataclass(frozen=True)
class Scored:
    """One row: where it belongs, what was measured, what each predictor says; nan where there is nothing."""

    gpu: str
    model: str
    serving: str
    experts: bool
    measured: dict[str, float]
    predicted: dict[str, dict[str, float]]  # by predictor


@dataclass(frozen=True)
class Score:
    """Errors of one predictor in one quantity over one group of rows."""

    predictor: str
    gpu: str
    model: str
    serving: str
    quantity: str
    n_rows: int
    mean_error: float
    median_error: float


class Aim(NamedTuple):
    """What was aimed at, and what came of it: mean and median error."""

    what: str
    most: float
    mean_error: float
    median_error: float
    n_rows: int


def scores(rows: Sequence[Scored]) -> Iterator[Score]:
    """Errors by engine, GPU and model, and pooled over models, kinds of models and GPUs, each over the rows that every
    predictor of the quantity predicts on that engine: nobody is scored on rows that others were spared."""
    for serving in dict.fromkeys(row.serving for row in rows):
        of_engine = [row for row in rows if row.serving == serving]
        for quantity in of_engine[0].measured:
            names = [name for name in PREDICTORS if any(_speaks(row, name, quantity) for row in of_engine)]
            shared = [row for row in of_engine if all(_speaks(row, name, quantity) for name in names)]
            for (gpu, model), group in _groups(shared).items():
                for name in names:
                    errors = _errors(group, name, quantity)
                    middle = float(np.mean(errors)), float(np.median(errors))
                    yield Score(name, gpu, model, serving, quantity, len(group), *middle)


def _groups(rows: Sequence[Scored]) -> dict[tuple[str, str], list[Scored]]:
    """Rows by GPU and model, then by GPU, then of a kind, then all; without those that are empty."""
    found: dict[tuple[str, str], list[Scored]] = {}
    for gpu in sorted({row.gpu for row in rows}):
        here = [row for row in rows if row.gpu == gpu]
        found |= {
            (gpu, name): [row for row in here if row.model == name] for name in sorted({row.model for row in here})
        }
        found[gpu, POOLED] = here
    found[POOLED, DENSE] = [row for row in rows if not row.experts]
    found[POOLED, EXPERTS] = [row for row in rows if row.experts]
    found[POOLED, POOLED] = list(rows)
    return {key: group for key, group in found.items() if group}


def _speaks(row: Scored, name: str, quantity: str) -> bool:
    said = row.predicted.get(name, {}).get(quantity, np.nan)
    return bool(np.isfinite(said) and np.isfinite(row.measured[quantity]))


def _errors(rows: Sequence[Scored], name: str, quantity: str) -> np.ndarray:
    return np.array([abs(row.predicted[name][quantity] / row.measured[quantity] - 1.0) for row in rows])


def aims(rows: Sequence[Scored]) -> Iterator[Aim]:
    """What was aimed at of ours, over every row that ours predicts, whoever else does."""

    def aim(what: str, most: float, name: str, quantity: str, chosen: Callable[[Scored], bool]) -> Iterator[Aim]:
        some = [row for row in rows if quantity in row.measured and chosen(row) and _speaks(row, name, quantity)]
        if some:
            errors = _errors(some, name, quantity)
            yield Aim(what, most, float(np.mean(errors)), float(np.median(errors)), len(some))

    for quantity, of_dense, of_experts in (("tpot_s", 0.10, 0.15), ("ttft_8k_s", 0.15, 0.25)):
        of = TITLES[quantity]
        yield from aim(f"vLLM, {of}, dense", of_dense, OURS, quantity, lambda row: _is_new(row) and not row.experts)
        yield from aim(f"vLLM, {of}, experts", of_experts, OURS, quantity, lambda row: _is_new(row) and row.experts)
    yield from aim("vLLM, tok/s", 0.12, OURS, "tok_per_s", _is_new)
    for quantity in ("tpot_s", "ttft_8k_s", "tok_per_s"):
        yield from aim(f"vLLM, {TITLES[quantity]}, whole GPUs left out", 0.20, NEW_GPU, quantity, _is_new)
    for gpu, most in (("h100", 0.12), ("b200", 0.18)):
        what = f"vLLM 0.11, tok/s, {gpu.upper()}"
        yield from aim(what, most, OURS, "tok_per_s", lambda row, gpu=gpu: row.serving == STEADY and row.gpu == gpu)
    for quantity, most in (("power_w", 0.08), ("tok_per_j", 0.14)):
        yield from aim(f"vLLM 0.11, {TITLES[quantity]}", most, OURS, quantity, lambda row: row.serving == STEADY)


def _is_new(row: Scored) -> bool:
    return row.serving == "vllm"
