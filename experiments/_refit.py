"""The laws' coefficients fitted again without an architecture, to predict it: on the GPU of the fit and on the other.

As the laws' source did, by a soft L1 loss on logarithms of ratios, inverse efficiencies of at least 1; but the prefill
of a row's prompts is taken as the prefill law has it, and the power is fitted to shares of the peaks in the law's own
step, as engines use it. The published coefficients stay: this only says how far they carry.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from _mlenergy import Row, benchmark_llm
from scipy.optimize import least_squares

from fleetopt_jax.catalog.gpus import gpu_entry
from fleetopt_jax.core.units import US
from fleetopt_jax.laws.llm import expert_coverage
from fleetopt_jax.laws.measured import POWER_LIMIT_FRAC, ideal_bytes, ideal_flops
from fleetopt_jax.laws.power import CAP_SOFTNESS_W
from fleetopt_jax.laws.prefill import prefill_coefficients_s

STEP_START, STEP_LEAST = (50.0, 50.0, 100.0, 50.0, 1.1, 1.1, 1.1), (0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0)
POWER_START, POWER_LEAST = (0.5, 0.3, 0.5, 0.0), (0.0, 0.0, 0.0, -1.0)
STEP_SCALE, POWER_SCALE = 0.15, 0.1  # errors beyond count by their size, not their square


@dataclass(frozen=True)
class _Table:
    """Rows of one GPU. Arrays [rows] or [rows, terms]."""

    architecture: np.ndarray
    terms: np.ndarray  # what the seven coefficients of the step multiply [s]
    prefill_s: np.ndarray  # of a step
    bytes_s: np.ndarray  # at the peak bandwidth
    flops_s: np.ndarray  # at the peak FLOP/s
    step_s: np.ndarray
    power_frac: np.ndarray  # of the TDP
    softness: float  # of the bend below the power limit, as a fraction of the TDP

    def where(self, mask: np.ndarray) -> "_Table":
        return _Table(*(value[mask] if isinstance(value, np.ndarray) else value for value in vars(self).values()))

    def decode_s(self, coefficients: np.ndarray) -> np.ndarray:
        return self.terms @ coefficients

    def power(self, coefficients: np.ndarray, decode_s: np.ndarray) -> np.ndarray:
        floor, memory, sqrt_flop, parallel = coefficients
        asked = floor + memory * self.bytes_s / decode_s + sqrt_flop * np.sqrt(self.flops_s / decode_s)
        asked = asked + parallel * (self.terms[:, 1] > 0)
        return POWER_LIMIT_FRAC - self.softness * np.logaddexp(0.0, (POWER_LIMIT_FRAC - asked) / self.softness)


def left_out_errors(folder: Path, rows: Sequence[Row]) -> dict[tuple[str, str], tuple[float, float, float]]:
    """(GPU fitted on, GPU predicted) -> mean errors of throughput, step and power of architectures left out."""
    tables = {gpu: _table(folder, [row for row in rows if row.gpu == gpu]) for gpu in ("h100", "b200")}
    errors = {}
    for fitted_on, source in tables.items():
        fits = {name: _fit(source.where(source.architecture != name)) for name in set(source.architecture)}
        everything = _fit(source)
        for gpu, target in tables.items():
            parts = []
            for name in sorted(set(target.architecture)):
                step, power = fits.get(name, everything)
                one = target.where(target.architecture == name)
                decode_s = one.decode_s(step)
                ratio = (decode_s + one.prefill_s) / one.step_s
                parts.append(np.abs([1 / ratio - 1, ratio - 1, one.power(power, decode_s) / one.power_frac - 1]))
            errors[fitted_on, gpu] = tuple(np.concatenate(parts, axis=1).mean(axis=1).tolist())
    return errors


def _fit(table: _Table) -> tuple[np.ndarray, np.ndarray]:
    def step_error(x):
        return np.log((table.decode_s(x) + table.prefill_s) / table.step_s)

    soft = {"loss": "soft_l1", "x_scale": "jac"}
    step = least_squares(step_error, STEP_START, bounds=(STEP_LEAST, np.inf), f_scale=STEP_SCALE, **soft).x
    decode_s = table.decode_s(step)

    def power_error(x):
        return np.log(np.maximum(table.power(x, decode_s), 0.01) / table.power_frac)

    power = least_squares(power_error, POWER_START, bounds=(POWER_LEAST, np.inf), f_scale=POWER_SCALE, **soft).x
    return step, power


def _table(folder: Path, rows: Sequence[Row]) -> _Table:
    lines = []
    for row in rows:
        gpu, llm = gpu_entry(row.gpu).gpu, benchmark_llm(folder, row.architecture, row.precision)
        bytes_s, flops_s = ideal_bytes(gpu, llm, row.tp), ideal_flops(gpu, llm, row.tp)
        weights_s = bytes_s.base_s + bytes_s.expert_s * expert_coverage(llm.expert_share, row.batch)
        all_s, flop_s = (x.step_s(row.batch, row.context_tokens) for x in (bytes_s, flops_s))
        layers_s, experts = llm.n_layers * US, llm.n_expert_params > 0
        terms = [layers_s, layers_s * (row.tp > 1), layers_s * experts, row.batch * US, weights_s, all_s - weights_s]
        prefill_s = row.batch * row.prompt_per_output * prefill_coefficients_s(gpu, llm, row.tp)[0]
        lines.append([*terms, flop_s, prefill_s, all_s, row.iteration_s, row.power_w_per_gpu / gpu.tdp_w])
    values = np.array(jax.device_get(lines), dtype=float)
    return _Table(
        architecture=np.array([row.architecture for row in rows]),
        terms=values[:, :7],
        prefill_s=values[:, 7],
        bytes_s=values[:, 8],
        flops_s=values[:, 6],
        step_s=values[:, 9],
        power_frac=values[:, 10],
        softness=CAP_SOFTNESS_W / float(gpu_entry(rows[0].gpu).gpu.tdp_w),
    )
