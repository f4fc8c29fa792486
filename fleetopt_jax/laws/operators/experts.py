"""Routed experts of one layer on one GPU: a product for each expert that has tokens, all in one or two kernels.

    t = t0 + d (h + f) + x_g 2 T k (h + 2 f) / BW + e A + (t_b^r + t_f^r)^(1/r)
    t_b = x_b (w M h f A + x_a 2 (2 h + M f) a) / BW,     t_f = x_f 2 M h f (a + p A) / peak

T tokens choose k of E experts each. A GPU of the busiest group has a of the T k choices, on A of its E / ep experts,
each of M matrices (3 with a gate, 2 without) of h (hidden) x f (width / tp): expert parallelism divides the experts,
tensor parallelism their width. w are the bytes of a weight, p the rows that an expert's last tile leaves empty, d the
walk of a block along the inputs, e what an expert with tokens costs besides. x_g are the passes over room for all
choices, wherever their experts are: kernels that do not divide it over GPUs gather, clear and sum it whole (Triton's).

All GPUs of a layer wait for the busiest group:

    a = T k / ep + z sqrt(2 ln ep) sqrt(T k / ep (1 + q T k / E)),     A = E / ep (1 - (1 + q u)^(-1/q)),
    u = -(a ep / E) log(1 - k / E) / (k / E)

q is how uneven the router is: experts whose popularity has variance q (a gamma distribution) see Poisson numbers of
tokens. q = 0 is an even router, A = E / ep (1 - (1 - k / E)^T); q = -1 deals tokens out in turn. z scales the spread
between groups, 0 without any. Times rise with tokens, sizes and experts per token; a choice among more experts is
spread more evenly over groups.

The tables time three routings (`ROUTINGS`): dealt out in turn, and loads drawn from a power law of exponent 1.01 or
1.2, whose q and z describe such draws, not times: coverage within 8 %, load within 15 % in the median (for a token or
two, which the draws put on one GPU, half). As timed, over and over, weights come from the L2 cache if they fit it
(`timed_experts_s`); an engine reads them from memory (`experts_s`).

Holds for 1 to 16,384 tokens, slices of an expert of 64 and wider. Source: kernel timings of ai-dynamo/aiconfigurator
(095f58a, Apache-2.0): vLLM 0.24.0 (A100 0.14.0), fitted by `experiments/fit_operators.py` into
`catalog/data/operators/experts.json`. Median and 90th-percentile error, all routings [%]; with every fifth shape left
out of the fit the medians on those are at most 2 points higher (mxfp4 on L40S, of two models, 6):

                      bf16      fp8  fp8_block     int4    nvfp4    mxfp4  mxfp4_mxfp8
    a100           12.1 32        -          -        -        -        -            -
    h100            6.6 21   9.3 28     7.0 28   7.2 26        -   9.7 27            -
    h200            7.1 23   9.6 29     7.7 28   8.0 28        -  10.7 28            -
    b200            7.9 24   7.9 22     8.5 26   9.0 29  10.2 28   6.5 20       9.2 30
    b300            8.0 25   7.9 23     8.3 26   8.5 29  10.2 29   6.6 20       9.1 31
    gb200           7.8 24   7.7 22     8.3 27   9.0 30   9.9 29   6.3 19       9.9 32
    gb300           7.7 24   7.5 22     8.2 26   8.8 28   9.7 28   6.4 19       9.3 31
    l40s            7.0 29   8.4 38     7.2 33   4.7 16        -   7.8 28            -
    rtx-pro-6000    6.6 22   7.4 23          -   5.1 18   7.0 24   8.5 23            -

fp8 is ModelOpt's, a scale a tensor: on Hopper vLLM's kernel for it takes three to five times as long as that of
fp8_block, which other fp8 checkpoints have. mxfp4 is gpt-oss's, with 16-bit activations; kernels that few models take
(of other activations) are left out. Types without a table borrow from bf16, with their own bytes: projected.
"""

import math
from typing import cast

from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import as_floats, namespace, pytree
from fleetopt_jax.laws.hardware import Gpu, peak_of_bits
from fleetopt_jax.laws.operators.coefficients import checked
from fleetopt_jax.laws.operators.roofline import cached_share, soft_roofline_s

ACTIVATION_BYTES = 2.0  # of an element between the products
ROUTINGS = {"balanced": (-1.0, 0.0), "power_law_1.01": (0.9, 1.6), "power_law_1.2": (1.15, 1.6)}  # (q, z)
USUAL_ROUTING = "power_law_1.2"  # what the tables' authors count with for mixtures of experts


@pytree
class Experts:
    """The routed experts of one layer, whole. Every field is traced; shape () or a leading vmap axis."""

    hidden: Array  # [-]
    width: Array  # of one expert [-]
    per_token: Array  # k: experts that one token uses [-]
    n_experts: Array  # E [-]
    matrices: Array  # of one expert: 3 with a gate, 2 without [-]


@pytree
class ExpertsLaw:
    """Coefficients of one data type on one GPU. Every field is traced; shape () or a leading vmap axis."""

    launch_s: Array  # t0 [s]
    depth_s: Array  # d: a block's walk along one input [s]
    gather_passes: Array  # x_g: passes over what all tokens' choices take, by peak bandwidth [-]
    expert_s: Array  # e: an expert that has tokens, besides [s]
    byte_excess: Array  # x_b: inverse share of the peak bandwidth [-]
    activation_excess: Array  # x_a: an activation's bytes over a weight's [-]
    flop_excess: Array  # x_f: inverse share of the peak FLOP/s [-]
    tile_rows: Array  # p: empty rows of an expert's last tile [-]
    sharpness: Array  # r [-]
    weight_bytes: Array  # w, scales included [B]
    flop_bits: Array  # 16, 8 or 4: of the numbers multiplied [bits]
    cached_bytes: Array  # B0: weights that the L2 cache keeps between two calls [B]
    cached_frac: Array  # time of bytes from the L2 cache over that of bytes from memory [-]
    unevenness: Array  # q: of the router, -1 or more [-]
    spread: Array  # z: between groups of experts [-]


def make_experts(*, hidden: float, width: float, per_token: float, n_experts: float, matrices: float = 3.0) -> Experts:
    """Checked `Experts`."""
    values = dict(locals())
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"need a positive, finite {name}, got {value}")
    if per_token >= n_experts:
        raise ValueError(f"need per_token < n_experts, got {per_token} of {n_experts}")
    return Experts(**as_floats(**values))


def make_experts_law(**coefficients: float) -> ExpertsLaw:
    """A checked `ExpertsLaw`, of all its fields by name."""
    positive = ("byte_excess", "flop_excess", "weight_bytes", "flop_bits")
    return ExpertsLaw(**checked(ExpertsLaw, coefficients, positive=positive, least={"unevenness": -1.0}))


def experts_load(law: ExpertsLaw, experts: Experts, tokens: ArrayLike, ep: ArrayLike = 1.0) -> tuple[Array, Array]:
    """(choices, experts with tokens) of the busiest of `ep` GPUs [-], of `tokens` of all of them together."""
    xp = namespace(law, experts, tokens, ep)
    local, mean = experts.n_experts / ep, tokens * experts.per_token / ep
    share = experts.per_token / experts.n_experts
    variance = mean * xp.maximum(1.0 + law.unevenness * tokens * share, 0.0)
    apart = 2.0 * xp.log(xp.maximum(ep, 1.0)) * variance
    some = apart > 0  # the square root's slope is infinite at 0
    spread = law.spread * xp.where(some, xp.sqrt(xp.where(some, apart, 1.0)), 0.0)
    choices = xp.minimum(mean + spread, tokens * xp.minimum(experts.per_token, local))
    each = -choices / local * xp.log1p(-share) / share
    return choices, xp.minimum(local * _covered(law, each), choices)


def _covered(law: ExpertsLaw, each: ArrayLike) -> Array:
    """Share of experts that have a token, where each has `each` on average [-]."""
    xp = namespace(law, each)
    even = xp.abs(law.unevenness) < 1e-6
    q = xp.where(even, 1.0, law.unevenness)
    uneven = xp.log(xp.maximum(1.0 + q * each, 1e-30)) / q
    return -xp.expm1(-xp.where(even, each, uneven))


def experts_bytes(
    law: ExpertsLaw, experts: Experts, tokens: ArrayLike, tp: ArrayLike = 1.0, ep: ArrayLike = 1.0
) -> Array:
    """What the busiest GPU reads and writes: weights of its experts that have tokens, and activations [B]."""
    choices, used = experts_load(law, experts, tokens, ep)
    return _weight_bytes(law, experts, used, tp) + _activation_bytes(experts, choices, tp)


def experts_flop(
    law: ExpertsLaw, experts: Experts, tokens: ArrayLike, tp: ArrayLike = 1.0, ep: ArrayLike = 1.0
) -> Array:
    """Multiplications and additions of the busiest GPU, without empty rows [FLOP]."""
    return _row_flop(experts, tp) * experts_load(law, experts, tokens, ep)[0]


def experts_s(
    law: ExpertsLaw, gpu: Gpu, experts: Experts, tokens: ArrayLike, tp: ArrayLike = 1.0, ep: ArrayLike = 1.0
) -> Array:
    """Time of one layer's routed experts on the busiest GPU [s], for `tokens` of all GPUs that share them together.

    Weights come from memory. Rises with tokens, hidden size, width and experts per token. Routing itself (a small
    product) and the exchange of tokens are not in it.
    """
    return _experts_s(law, gpu, experts, tokens, tp, ep, cached=False)


def timed_experts_s(
    law: ExpertsLaw, gpu: Gpu, experts: Experts, tokens: ArrayLike, tp: ArrayLike = 1.0, ep: ArrayLike = 1.0
) -> Array:
    """The same tokens through the same experts over and over again [s]: weights from the L2 cache if they fit it."""
    return _experts_s(law, gpu, experts, tokens, tp, ep, cached=True)


def _experts_s(
    law: ExpertsLaw,
    gpu: Gpu,
    experts: Experts,
    tokens: ArrayLike,
    tp: ArrayLike,
    ep: ArrayLike,
    *,
    cached: bool,
) -> Array:
    choices, used = experts_load(law, experts, tokens, ep)
    weight_bytes = _weight_bytes(law, experts, used, tp)
    moved_bytes = weight_bytes + law.activation_excess * _activation_bytes(experts, choices, tp)
    saved_frac = (1.0 - law.cached_frac) * cached_share(weight_bytes, law.cached_bytes) if cached else 0.0
    memory_s = law.byte_excess * moved_bytes / gpu.bandwidth_bytes_per_s * (1.0 - saved_frac)
    flop = _row_flop(experts, tp) * (choices + law.tile_rows * used)
    compute_s = law.flop_excess * flop / peak_of_bits(gpu, law.flop_bits)
    walk_s = law.depth_s * (experts.hidden + experts.width / tp)
    gathered_bytes = tokens * experts.per_token * ACTIVATION_BYTES * (experts.hidden + 2.0 * experts.width / tp)
    besides_s = law.gather_passes * gathered_bytes / gpu.bandwidth_bytes_per_s + law.expert_s * used
    return soft_roofline_s(law.launch_s + walk_s + besides_s, memory_s, compute_s, law.sharpness)


def _weight_bytes(law: ExpertsLaw, experts: Experts, used: ArrayLike, tp: ArrayLike) -> Array:
    return cast(Array, used * law.weight_bytes * experts.matrices * experts.hidden * experts.width / tp)


def _activation_bytes(experts: Experts, choices: ArrayLike, tp: ArrayLike) -> Array:
    return cast(Array, choices * ACTIVATION_BYTES * (2.0 * experts.hidden + experts.matrices * experts.width / tp))


def _row_flop(experts: Experts, tp: ArrayLike) -> Array:
    return cast(Array, 2.0 * experts.matrices * experts.hidden * experts.width / tp)
