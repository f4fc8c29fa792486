"""Routed experts of one layer on one GPU: a product per expert that has tokens, all of them in one or two kernels.

    t = t0 + d (h + f) + s a + g T + e A + (t_b^r + t_f^r)^(1/r)
    t_b = x_b (w M h f A + x_a 2 (2 h + M f) a) / BW,     t_f = x_f 2 M h f (a + p A) / peak

T tokens of the layer choose k of E experts each. One GPU of the busiest group has a of the T k choices, on A of its E / ep
experts, each of M matrices (3 with a gate, 2 without) of h (hidden) x f (width / tp). Expert parallelism divides experts,
tensor parallelism their width. w are bytes of a weight, p the rows that an expert's last tile leaves empty, d the walk of
a block along the inputs, s, g and e what a choice, a token and an expert with tokens cost besides (sorting, gathering,
quantizing). All GPUs of a layer wait for the busiest, whose load and coverage are

    u = -(a ep / E) log(1 - k / E) / (k / E),    A = E / ep (1 - (1 + q u)^(-1/q)),
    a = T k / ep + z sqrt(2 ln ep) sqrt(T k / ep (1 + q T k / E))

q is how uneven the router is: experts whose popularity varies with variance q (a gamma distribution) see Poisson numbers
of tokens. q = 0 is an even router, A = E / ep (1 - (1 - k / E)^T); q = -1 deals tokens out in turn. z scales the spread
between groups, 0 without any.

The tables time three routings (`ROUTINGS`): balanced, and loads drawn from a power law with exponents 1.01 and 1.2, whose
q and z are fitted to such draws, not to times: they describe coverage within 8 % and load within 15 % in the median.
Coefficients: `catalog/data/operators/experts.json`, fitted by `experiments/fit_operators.py`.
"""

import math
from typing import cast

from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import as_floats, namespace, pytree
from fleetopt_jax.laws.hardware import Gpu, peak_of_bits
from fleetopt_jax.laws.operators.roofline import soft_roofline_s

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
    choice_s: Array  # s: a choice, besides [s]
    token_s: Array  # g: a token, besides, wherever its experts are [s]
    expert_s: Array  # e: an expert that has tokens, besides [s]
    byte_excess: Array  # x_b: inverse share of the peak bandwidth [-]
    activation_excess: Array  # x_a: an activation's bytes over a weight's [-]
    flop_excess: Array  # x_f: inverse share of the peak FLOP/s [-]
    tile_rows: Array  # p: empty rows of an expert's last tile [-]
    sharpness: Array  # r [-]
    weight_bytes: Array  # w, scales included [B]
    flop_bits: Array  # 16, 8 or 4: of the numbers multiplied [bits]
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
    names = tuple(ExpertsLaw.__dataclass_fields__)
    if set(coefficients) != set(names):
        raise ValueError(f"need {', '.join(names)}, got {', '.join(coefficients)}")
    positive = ("byte_excess", "flop_excess", "sharpness", "weight_bytes", "flop_bits")
    for name, value in coefficients.items():
        least = -1.0 if name == "unevenness" else 0.0
        if not (least <= value < math.inf and (value > 0 or name not in positive)):
            raise ValueError(f"need a finite {name} {'>' if name in positive else '>='} {least:g}, got {value}")
    if coefficients["sharpness"] < 1:
        raise ValueError(f"need sharpness >= 1, got {coefficients['sharpness']}")
    return ExpertsLaw(**as_floats(**coefficients))


def experts_load(law: ExpertsLaw, experts: Experts, tokens: ArrayLike, ep: ArrayLike = 1.0) -> tuple[Array, Array]:
    """(choices, experts with tokens) of the busiest of `ep` GPUs [-], of `tokens` of all of them together."""
    xp = namespace(law, experts, tokens, ep)
    local, mean = experts.n_experts / ep, tokens * experts.per_token / ep
    share = experts.per_token / experts.n_experts
    variance = mean * xp.maximum(1.0 + law.unevenness * tokens * share, 0.0)
    some = variance > 0
    deviation = xp.where(some, xp.sqrt(xp.where(some, variance, 1.0)), 0.0)
    spread = law.spread * xp.sqrt(2.0 * xp.log(xp.asarray(ep, dtype=float)))
    choices = xp.minimum(mean + spread * deviation, tokens * xp.minimum(experts.per_token, local))
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

    Rises with every size. Routing itself (a small product) and the exchange of tokens are not in it.
    """
    choices, used = experts_load(law, experts, tokens, ep)
    activation_bytes = law.activation_excess * _activation_bytes(experts, choices, tp)
    moved_bytes = _weight_bytes(law, experts, used, tp) + activation_bytes
    memory_s = law.byte_excess * moved_bytes / gpu.bandwidth_bytes_per_s
    flop = _row_flop(experts, tp) * (choices + law.tile_rows * used)
    compute_s = law.flop_excess * flop / peak_of_bits(gpu, law.flop_bits)
    walk_s = law.depth_s * (experts.hidden + experts.width / tp)
    besides_s = law.choice_s * choices + law.token_s * tokens + law.expert_s * used
    return soft_roofline_s(law.launch_s + walk_s + besides_s, memory_s, compute_s, law.sharpness)


def _weight_bytes(law: ExpertsLaw, experts: Experts, used: ArrayLike, tp: ArrayLike) -> Array:
    return cast(Array, used * law.weight_bytes * experts.matrices * experts.hidden * experts.width / tp)


def _activation_bytes(experts: Experts, choices: ArrayLike, tp: ArrayLike) -> Array:
    return cast(Array, choices * ACTIVATION_BYTES * (2.0 * experts.hidden + experts.matrices * experts.width / tp))


def _row_flop(experts: Experts, tp: ArrayLike) -> Array:
    return cast(Array, 2.0 * experts.matrices * experts.hidden * experts.width / tp)
