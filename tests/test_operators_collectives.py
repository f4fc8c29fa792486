"""Laws of collectives and small operators: what they promise, and what was measured."""

import json
import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from fleetopt_jax.catalog.gpus import GPUS, link_notes
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.cli.inputs import warn_of_units
from fleetopt_jax.core.struct import stack
from fleetopt_jax.core.units import US
from fleetopt_jax.laws.hardware import Gpu
from fleetopt_jax.laws.operators import collectives
from fleetopt_jax.laws.operators.collectives import (
    NETWORK_EFFICIENCY,
    NETWORK_HOP_S,
    CollectiveLaw,
    all_gather_s,
    all_reduce_s,
    make_collective_law,
)
from fleetopt_jax.laws.operators.elementwise import (
    ElementwiseLaw,
    elementwise_s,
    make_elementwise_law,
)

DATA = Path(collectives.__file__).parents[2] / "catalog" / "data" / "operators"
COLLECTIVES = json.loads((DATA / "collectives.json").read_text())["gpus"]
ELEMENTWISE = json.loads((DATA / "elementwise.json").read_text())["gpus"]
TO_SUM = ((all_reduce_s, "all_reduce"), (all_gather_s, "exchange"))
KIB, MIB = 2.0**10, 2.0**20
N = 200

# ai-dynamo/aiconfigurator (snapshot 095f58a, Apache-2.0), vLLM's all-reduce in a CUDA graph: GPUs, bytes, microseconds.
MEASURED = {
    "a100": [(2, 128 * KIB, 5.743), (4, MIB, 18.34), (8, 64 * KIB, 8.433), (8, MIB, 21.71), (8, 128 * MIB, 1161)],
    "h100": [(2, 128 * KIB, 4.751), (4, MIB, 12.76), (8, 64 * KIB, 6.411), (8, MIB, 14.97), (8, 64 * MIB, 344)],
    "h200": [(2, 128 * KIB, 4.823), (4, MIB, 12.10), (8, 64 * KIB, 6.561), (8, MIB, 14.07), (8, 64 * MIB, 323.3)],
    "b200": [(2, 128 * KIB, 7.404), (4, MIB, 18.42), (8, 32 * KIB, 8.216), (8, 16 * MIB, 63.21), (8, 64 * MIB, 222.8)],
    "b300": [(2, 128 * KIB, 7.578), (4, MIB, 18.86), (8, 32 * KIB, 8.177), (8, 16 * MIB, 62.91), (8, 64 * MIB, 215.2)],
    "gb200": [(2, 128 * KIB, 5.825), (4, 32 * KIB, 5.511), (4, 2 * MIB, 17.58), (4, 64 * MIB, 202.9)],
    "gb300": [(2, 128 * KIB, 7.443), (4, 32 * KIB, 7.419), (4, 2 * MIB, 28.96), (4, 64 * MIB, 181.1)],
    "l40s": [(2, 8 * KIB, 5.724), (2, MIB, 60.25), (2, 64 * MIB, 3542)],
    "rtx-pro-6000": [(2, 64 * KIB, 6.187), (4, MIB, 87.66), (8, 16 * KIB, 27.52), (8, 64 * MIB, 5067)],
}


def law_of(gpu: str, kind: str) -> CollectiveLaw:
    return make_collective_law(**COLLECTIVES[gpu][kind]["coefficients"])


def all_laws(kind: str) -> tuple[CollectiveLaw, Gpu]:
    """Of every GPU, with a leading axis."""
    return stack([law_of(gpu, kind) for gpu in COLLECTIVES]), stack([GPUS[gpu].gpu for gpu in COLLECTIVES])


def points(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Messages of 1 B to 4 GB, and 1 to 144 GPUs."""
    u = jax.random.uniform(jax.random.key(seed), (2, N))
    return 10.0 ** (9.6 * u[0]), jnp.round(144.0 ** u[1])


@pytest.mark.parametrize("gpu", MEASURED)
def test_all_reduces_take_as_long_as_measured(gpu):
    n_gpus, n_bytes, us = np.array(MEASURED[gpu]).T
    error = all_reduce_s(law_of(gpu, "all_reduce"), GPUS[gpu].gpu, n_bytes, n_gpus) / (us * US) - 1
    assert np.median(np.abs(error)) <= 0.12 and np.max(np.abs(error)) <= 0.2


def test_the_docstring_says_the_errors_of_the_fits():
    """And they hold what is asked of an all-reduce: 12 % in the median on every GPU with tables."""
    said = re.findall(
        r"^    (\w[\w-]*) +" + r" +".join([r"([\d.]+)"] * 6) + "$", collectives.__doc__ or "", re.MULTILINE
    )
    names = ("median_error", "p90_error", "held_out_median_error")
    found = {
        gpu: [kinds[kind][name] for kind in ("all_reduce", "exchange") for name in names]
        for gpu, kinds in COLLECTIVES.items()
    }
    assert {row[0] for row in said} == set(found) == set(GPUS) == set(ELEMENTWISE)
    for gpu, *percent in said:
        np.testing.assert_allclose(np.array(percent, dtype=float) / 100, found[gpu], atol=5.1e-4)
        assert max(found[gpu][0], found[gpu][2], found[gpu][3], found[gpu][5]) <= 0.12


def test_collectives_rise_with_bytes_and_gpus_and_have_finite_gradients():
    """And a byte costs less the larger the message, as the fixed point of a pool needs of its sequences."""
    n_bytes, n_gpus = points()
    n_bytes = jnp.sort(n_bytes).at[:20].set(0.0)
    counts = jnp.arange(1.0, 145.0)

    @jax.jit
    def found(laws: list[tuple[CollectiveLaw, Gpu]]) -> list:
        answers = []
        for (collective, _), of in zip(TO_SUM, laws):
            slopes = jax.vmap(jax.value_and_grad(collective, (0, 1, 2, 3)), (None, None, 0, 0))
            over = jax.vmap(jax.vmap(collective, (None, None, 0, None)), (None, None, None, 0))
            answers += [jax.vmap(slopes, (0, 0, None, None))(*of, n_bytes, n_gpus)]
            answers += [jax.vmap(over, (0, 0, None, None))(*of, n_bytes, counts)]
        return answers

    answers = found([all_laws(kind) for _, kind in TO_SUM])
    for (seconds, slopes), over in zip(answers[::2], answers[1::2]):
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((seconds, slopes)))
        by_bytes = np.asarray(slopes[2])
        assert np.all(np.where(n_gpus > 1, (seconds > 0) & (by_bytes > 0), (seconds == 0) & (by_bytes == 0)))
        assert np.all(np.diff(over[:, 1:] / np.maximum(n_bytes, 1e-9), axis=2)[:, :, 20:] < 0)
    assert np.all(np.diff(answers[1], axis=1) >= 0)  # of an all-reduce


def test_small_messages_cost_a_launch_and_large_ones_the_link():
    for gpu in COLLECTIVES:
        law, sheet = law_of(gpu, "all_reduce"), GPUS[gpu].gpu
        apart = (1 + (law.direct_launch_s / law.ring_launch_s) ** 4) ** -0.25
        assert all_reduce_s(law, sheet, 0.0, 2.0) == pytest.approx(law.direct_launch_s * apart)
        best = max(law.direct_efficiency, law.ring_efficiency) * sheet.link_bytes_per_s
        assert 0.7 <= all_reduce_s(law, sheet, 1e13, 2.0) * best / 1e13 <= 1.001


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather():
    """In bytes, by the same ring."""
    sheet, law = GPUS["h100"].gpu, law_of("h100", "exchange")
    ring = replace(law, direct_launch_s=1e9)  # never the shorter way
    for n_gpus in (2.0, 4.0, 8.0):
        gather_s = all_gather_s(ring, sheet, 1e13, n_gpus) - all_gather_s(ring, sheet, 0.0, n_gpus)
        reduce_s = all_reduce_s(ring, sheet, 1e13, n_gpus) - all_reduce_s(ring, sheet, 0.0, n_gpus)
        assert reduce_s == pytest.approx(2 * gather_s, rel=1e-3)


def test_beyond_the_link_the_network_is_paid_on_top():
    sheet, law = GPUS["h100"].gpu, law_of("h100", "all_reduce")
    inside_s, across_s = (all_reduce_s(law, sheet, 64 * MIB, n) for n in (8.0, 16.0))
    network = NETWORK_EFFICIENCY * sheet.inter_node_bytes_per_s
    assert across_s - inside_s == pytest.approx(2 * NETWORK_HOP_S + 64 * MIB / 8 / network)
    rack = GPUS["gb200"].gpu
    assert rack.link_gpus == 72 and GPUS["gb200"].gpus_per_node == 4
    law = law_of("gb200", "all_reduce")
    assert all_reduce_s(law, rack, 64 * MIB, 72.0) < all_reduce_s(law, replace(rack, link_gpus=4.0), 64 * MIB, 72.0)


def test_gradients_are_those_of_the_values():
    law, small, sheet = law_of("b200", "all_reduce"), small_law("b200"), GPUS["b200"].gpu

    @jax.jit
    def logs(log_bytes: jax.Array, n_gpus: jax.Array) -> tuple[jax.Array, jax.Array]:
        seconds = all_reduce_s(law, sheet, jnp.exp(log_bytes), n_gpus)
        return jnp.log(seconds), jnp.log(elementwise_s(small, sheet, jnp.exp(log_bytes)))

    check_grads(logs, (jnp.linspace(5.0, 20.0, 40), jnp.linspace(2.1, 7.9, 40)), order=1, modes=["rev"])


def small_law(gpu: str) -> ElementwiseLaw:
    return make_elementwise_law(**ELEMENTWISE[gpu]["bf16"]["coefficients"])


def test_small_operators_cost_a_launch_and_their_bytes():
    for gpu in ELEMENTWISE:
        law, sheet = small_law(gpu), GPUS[gpu].gpu
        assert elementwise_s(law, sheet, 0.0) == law.launch_s
        more_s = elementwise_s(law, sheet, 2e9) - elementwise_s(law, sheet, 1e9)
        assert more_s == pytest.approx(1e9 / (law.efficiency * sheet.bandwidth_bytes_per_s))
        assert 1 * US < law.launch_s < 4 * US and 0.7 < law.efficiency < 1


def test_what_no_gpu_is_like_is_refused():
    good = COLLECTIVES["h100"]["all_reduce"]["coefficients"]
    for wrong in (dict(direct_launch_s=0.0), dict(ring_efficiency=-1.0), dict(growth=float("nan"))):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            make_collective_law(**good | wrong)
    with pytest.raises(ValueError, match="efficiency"):
        make_elementwise_law(launch_s=1e-6, efficiency=1.5)


def test_gpus_on_pcie_are_doubtful_above_two():
    doubtful = {(gpu, tp) for gpu in GPUS for tp in (1, 2, 4, 8) if link_notes(GPUS[gpu], tp)}
    assert doubtful == {(gpu, tp) for gpu in ("l40s", "rtx-pro-6000") for tp in (4, 8)}
    (note,) = link_notes(GPUS["l40s"], 4)
    assert note.startswith("l40s above TP 2: ") and link_notes(GPUS["l40s"], 8) == (note,)
    specs = [
        EngineSpec(gpu, tp=tp, precision="bf16") for gpu, tp in (("l40s", 4), ("l40s", 8), ("l40s", 2), ("h100", 8))
    ]
    assert warn_of_units(Namespace(warned=[]), specs) == [note]
