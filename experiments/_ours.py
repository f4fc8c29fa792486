"""What our engines say of serving points, blind: by a host law fitted to the points of other LLMs, or of other GPUs."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from _mlenergy import CATALOG, Row
from _scored_points import Point
from _serving_points import read_points
from fit_hosts import Measured, left_out_errors, measured_iterations, measured_point

Without = Literal["llm", "gpu"]


def predict_points(folder: Path, points: Sequence[Point], without: Without) -> tuple[np.ndarray, list[str]]:
    """(TTFT [s], TPOT [s]) of each point [points, 2], nan where there is none, and why there is none: by engines that
    have seen no point of its LLM (`without` "llm"), or of its GPU. Every point of the folder is fitted to, scored or
    not, but for those."""
    found = _steps_of(folder)
    fitted = {row: each for row, each in found.items() if not isinstance(each, str)}
    values = {}
    for engine in dict.fromkeys(each.engine for each in fitted.values()):
        rows = [row for row, each in fitted.items() if each.engine == engine]
        off = left_out_errors([fitted[row] for row in rows], without)  # of (TPOT, TTFT)
        for row, (tpot, ttft) in zip(rows, off):
            values[row] = (1.0 + ttft) * fitted[row].ttft_s, (1.0 + tpot) * fitted[row].tpot_s
    whys = ["" if point.row in values else str(found.get(point.row, "no point that is fitted to")) for point in points]
    return np.array([values.get(point.row, (np.nan, np.nan)) for point in points]).reshape(-1, 2), whys


def predict_steady(folder: Path, rows: Sequence[Row], without: Without) -> np.ndarray:
    """Output tokens per second of each steady state of ML.ENERGY that is not bound by its host [rows], nan where there
    is none, likewise blind."""
    known = [i for i, row in enumerate(rows) if row.architecture in CATALOG]
    off = left_out_errors(measured_iterations(folder), without)[:, 0]
    tok_per_s = np.full(len(rows), np.nan)
    tok_per_s[known] = [rows[i].tok_per_s for i in known] / (1.0 + off)
    return tok_per_s


@cache
def _steps_of(folder: Path) -> dict[int, Measured | str]:
    """By row of the file: every step of its benchmark, or why there is no law of it."""
    return {each.row: measured_point(each) for each in read_points(folder)[0]}
