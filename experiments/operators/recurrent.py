"""Recurrent layers: the coefficients of `fleetopt_jax/laws/operators/recurrent.py`.

The newest vLLM table of the gated delta net of each GPU: the fastest convolution and the fastest recurrence of each
shape, together. Fitted and tried on 16 tokens or more a prompt, 65,536 or fewer in all; decode as timed. A100 has no
such table and takes H100's coefficients.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fleetopt_jax.core.struct import as_floats
from fleetopt_jax.laws.operators.recurrent import (
    STATE_VALUES,
    RecurrentShape,
    make_recurrent_decode_law,
    make_recurrent_prefill_law,
    recurrent_prefill_s,
    timed_recurrent_decode_s,
)

from ._attention import cache_bounds, entry
from ._fitting import LICENCE, SOURCE, Bounds, Rows, Tables, by_gpu, fastest, where, with_borrowers

BORROWED = {"a100": "h100"}
HEAD_DIM = 128.0  # of keys and values of every model timed
PREFILL_BOUNDS: Bounds = {
    "launch_s": (1.3e-5, 1e-6, 1e-4),
    "conv_excess": (3.0, 0.5, 20.0),
    "walk_s": (5e-8, 1e-10, 1e-6),
    "head_s": (4e-10, 1e-12, 1e-7),
    "state_excess": (1.0, 0.01, 20.0),
    "sharpness": (3.0, 1.0, 9.0),
    "spill_excess": (1.0, 1e-3, 20.0),
    "spill_tokens": (1e5, 1e3, 1e7),
}
DECODE_BOUNDS: Bounds = {
    "launch_s": (6e-6, 1e-6, 1e-4),
    "channel_s": (1e-12, 1e-14, 1e-9),
    "state_excess": (1.2, 0.5, 10.0),
}
SHAPE = ("num_k_heads", "num_v_heads")


def fit(folder: Path) -> dict[str, Any]:
    """The document of the class: the coefficients of every GPU and phase, and how well they describe its table."""
    gpus = by_gpu(folder, _variants, *BORROWED)
    return {"source": SOURCE, "licence": LICENCE, "gpus": with_borrowers(gpus, BORROWED)}


def _variants(tables: Tables) -> dict[str, Any]:
    table = tables.rows("gdn")
    prefill = _both(where(table, table["phase"] == "context"))
    prefill = where(prefill, (prefill["seq_len"] >= 16) & (prefill["num_tokens"] <= 65536))
    decode = _both(where(table, table["phase"] == "generation"))
    sheet, bounds = tables.gpu, {**DECODE_BOUNDS, **cache_bounds(tables)}
    return {
        "prefill": entry(partial(_prefill_seconds, sheet), prefill, PREFILL_BOUNDS, "num_tokens", SHAPE, left_out=""),
        "decode": entry(partial(_decode_seconds, sheet), decode, bounds, "batch_size", SHAPE, left_out=""),
    }


def _both(rows: Rows) -> Rows:
    """Rows of the two kernels of a layer added up, where both were timed."""
    keys = ("num_k_heads", "num_v_heads", "batch_size", "seq_len")
    conv = np.char.startswith(rows["kernel_source"].astype(str), "causal_conv1d")
    first, second = fastest(where(rows, conv), keys), fastest(where(rows, ~conv), keys)
    seconds = {tuple(key): s for *key, s in zip(*(second[name] for name in keys), second["seconds"])}
    others = np.array([seconds.get(key, np.nan) for key in zip(*(first[name] for name in keys))])
    return where({**first, "seconds": first["seconds"] + others}, ~np.isnan(others))


def _shape(rows: Rows) -> RecurrentShape:
    heads = rows["num_v_heads"].astype(float)
    channels = HEAD_DIM * (2.0 * rows["num_k_heads"] + heads)
    return RecurrentShape(**as_floats(heads=heads, state_values=STATE_VALUES, conv_channels=channels))


def _prefill_seconds(gpu: Any, coefficients: dict[str, float], rows: Rows) -> np.ndarray:
    law = make_recurrent_prefill_law(**coefficients)
    n = rows["batch_size"].astype(float)
    return np.asarray(recurrent_prefill_s(law, gpu, _shape(rows), n * rows["seq_len"], n))


def _decode_seconds(gpu: Any, coefficients: dict[str, float], rows: Rows) -> np.ndarray:
    law = make_recurrent_decode_law(**coefficients)
    return np.asarray(timed_recurrent_decode_s(law, gpu, _shape(rows), rows["batch_size"].astype(float)))
