"""What the engines of the law fitted to ML.ENERGY (`laws/measured.py`) say of serving points, in closed form.

With N requests in flight, prompts p, outputs o, s_p = tau1 p + tau2 p^2 and n of them decoding:

    TPOT = t(n, p + o/2) + n s_p / o                  every decoding sequence waits for the prompts of the others
    TTFT = w1 (N + 1)/2 s_p + (1 - w1) (s_p + TPOT/2 + f s_p / (2 (1 - f)) (N - 1)/N),   f = n s_p / (o TPOT)
    n    = N o TPOT / (TTFT' + o TPOT)                TTFT' is the second term: that of the steady state

w1 = 1/10 is the share of requests in the first wave, when all N prompts come at once. Groups of GPUs with sequences of
their own are taken as tensor parallel: this law knows nothing else.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from _scored_points import Point

from fleetopt_jax.catalog.engines import build
from fleetopt_jax.catalog.spec import MEASURED_SERVING
from fleetopt_jax.core.errors import BadField
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.laws.prefill import prefill_s

FIRST_WAVE_FRAC = 0.1  # of 10 x concurrency requests
N_ROUNDS = 50  # of the fixed point; it contracts by the share of time spent waiting for the first token


def replaced_law_says(points: Sequence[Point]) -> tuple[np.ndarray, list[str]]:
    """(TTFT [s], TPOT [s]) of each point [points, 2], nan where there is none, and why there is none."""
    found = [_point(point) for point in points]
    values = [(np.nan, np.nan) if isinstance(each, str) else each for each in found]
    return np.array(values).reshape(-1, 2), [each if isinstance(each, str) else "" for each in found]


def _point(point: Point) -> tuple[float, float] | str:
    spec = replace(point.spec, tp=point.tp * point.attention_dp, serving=MEASURED_SERVING)
    try:
        return closed_form(build(spec), point.prompt_tokens, point.output_tokens, point.concurrency)
    except BadField as error:
        return str(error).split(";")[0]


def closed_form(engine: Engine, prompt_tokens: float, output_tokens: float, concurrency: int) -> tuple[float, float]:
    """(mean TTFT, mean TPOT) [s] of a closed loop."""
    p, o, most = prompt_tokens, output_tokens, float(concurrency)
    own_s = float(prefill_s(engine.prefill, p))
    n, tpot_s, steady_s = most, 0.0, own_s
    for _ in range(N_ROUNDS):
        tpot_s = float(engine.decode.step_s(n, p + o / 2.0)) + n * own_s / o
        busy = n * own_s / (o * tpot_s)
        steady_s = own_s + tpot_s / 2.0 + busy * own_s / (2.0 * (1.0 - busy)) * (most - 1.0) / most
        n = most * o * tpot_s / (steady_s + o * tpot_s)
    first_s = (most + 1.0) / 2.0 * own_s
    return FIRST_WAVE_FRAC * first_s + (1.0 - FIRST_WAVE_FRAC) * steady_s, tpot_s
