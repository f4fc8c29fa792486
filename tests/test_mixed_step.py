"""A mixed step of an LLM's layers: limits, monotony, gradients, and what the fixed point rests on."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fleetopt_jax.catalog.gpus import GPUS
from fleetopt_jax.catalog.llms import LLMS
from fleetopt_jax.catalog.steps import Parallelism, data_types, operator_laws, stack_of, step_entry
from fleetopt_jax.core.curve import KNOTS, Curve, curve_through
from fleetopt_jax.core.errors import BadField
from fleetopt_jax.core.struct import stack
from fleetopt_jax.laws.host import make_host_law
from fleetopt_jax.laws.mixed_step import (
    CLASSES,
    MixedStep,
    OperatorDecode,
    StepBatch,
    attention_cost,
    decode_of,
    decoding,
    of_fullest,
    with_prompts,
)
from fleetopt_jax.laws.occupancy import sequences_in_flight
from fleetopt_jax.laws.operators.attention import causal_pairs, decode_attention_s, prefill_attention_s
from fleetopt_jax.laws.operators.gemm import gemm_s
from fleetopt_jax.laws.sequences import affine
from fleetopt_jax.laws.stack import mixed_step

GPU = GPUS["h100"]
DENSE, MOE, LATENT, WINDOWED = (
    LLMS[name].architecture for name in ("llama-3.1-70b", "qwen3-235b-a22b", "deepseek-v3", "gpt-oss-120b")
)
CASES = (
    (DENSE, "fp8", Parallelism(tp=8)),
    (DENSE, "bf16", Parallelism(tp=4, pp=2)),
    (MOE, "fp8", Parallelism(tp=8, ep=8)),
    (MOE, "bf16", Parallelism(tp=2, ep=8, dp=4)),
    (LATENT, "fp8", Parallelism(tp=16)),
    (LATENT, "fp8", Parallelism(dp=8, ep=8)),
    (WINDOWED, "mxfp4", Parallelism(tp=2)),
)


def steps() -> MixedStep:
    """All cases on three GPUs, a leading axis."""
    gpus = (GPUS["h100"], GPUS["b200"], GPUS["a100"])
    return stack([with_groups(step_entry(a, gpu, split, p).step) for a, p, split in CASES for gpu in gpus])


def with_groups(step: MixedStep) -> MixedStep:
    """The step of one group with groups that have nothing to do, so that it stacks beside one of several."""
    if step.groups_s is not None:
        return step
    nothing = step.costs.rows.scaled(0.0).coefficients[:2]
    costs = replace(step.costs, groups=Curve(nothing), n_groups=np.asarray(1.0))
    return replace(step, groups_s=step.rows_s.scaled(0.0), costs=costs)


def test_groups_with_nothing_to_do_change_nothing():
    step = step_entry(DENSE, GPU, Parallelism(tp=8), "fp8").step
    assert step.groups_s is None  # which costs no look-up
    for method in (MixedStep.step_s, lambda step, batch: step.parts(batch).seconds):
        alone, beside = (jax.jit(jax.vmap(method, (None, 0)))(one, batches()) for one in (step, with_groups(step)))
        np.testing.assert_allclose(alone, beside, rtol=1e-14)
    slow, same = step.at_clock(0.7), with_groups(step).at_clock(0.7)
    np.testing.assert_allclose(slow.rows_s.coefficients, same.rows_s.coefficients, rtol=1e-12, atol=1e-18)


STEPS = steps()
N_STEPS = len(STEPS.n_layers)


def batches(n: int = 200) -> StepBatch:
    """Batches of every mixture, with prompts in half of them."""
    u = np.random.default_rng(0).uniform(size=(5, n))
    active, context, prompt = 2 ** (10 * u[0]), 2 ** (7 + 9 * u[1]), 2 ** (13 * u[2]) * (u[3] > 0.5)
    return with_prompts(decoding(active, context, 128.0), prompt, 4096.0 * u[4], 128.0)


def on_all(method, *arguments):
    """A method of every step at every batch [step, batch]."""
    over_batches = jax.vmap(method, (None, *(0 for _ in arguments)))
    return jax.jit(jax.vmap(over_batches, (0, *(None for _ in arguments))))(STEPS, *arguments)


def test_a_curve_keeps_straight_lines_and_monotony():
    line = curve_through(3.0 + 0.5 * KNOTS)
    xs = np.concatenate([np.geomspace(1e-3, 1e5, 500), [0.0]])
    np.testing.assert_allclose(jax.vmap(line)(xs), 3.0 + 0.5 * xs, rtol=1e-12)
    rises = curve_through(np.cumsum(np.random.default_rng(1).uniform(size=len(KNOTS)) ** 8))
    slopes = jax.vmap(jax.grad(rises))(xs)
    assert jnp.all(slopes >= 0)


@pytest.mark.parametrize("knee", [20.0, 300.0, 5000.0])
def test_a_curve_meets_a_soft_roofline(knee):
    def roofline(x):
        return ((1.0 + x / 1e5) ** 3 + (x / knee) ** 3) ** (1 / 3)

    xs = np.geomspace(0.1, 3e4, 2000)
    np.testing.assert_allclose(jax.vmap(curve_through(roofline(KNOTS)))(xs), roofline(xs), rtol=2e-3)


def test_a_step_does_not_fall_with_any_size():
    batch = batches()
    slopes = vars(on_all(jax.grad(lambda step, batch: step.step_s(batch), argnums=1), batch))
    for name, slope in slopes.items():
        assert jnp.all(jnp.isfinite(slope)), name
        assert name == "n_active" or jnp.all(slope >= -1e-15), name
    # The same tokens fill the GPU better as more sequences; at a given mean context more of them cost more.
    together = sum(getattr(batch, name) * slopes[name] for name in ("n_active", "tokens", "windowed_tokens"))
    assert jnp.all(together >= 0)


def test_a_decoding_sequence_costs_less_among_more():
    n, context = np.geomspace(1, 4096, 100), 2048.0
    each = on_all(lambda step, n: decode_of(step).step_s(n, context) / n, n)
    assert jnp.all(jnp.diff(each, axis=1) < 0)


def test_the_decode_view_is_the_mixed_step_without_prompts():
    n, context = np.geomspace(1, 2048, 50), np.geomspace(100, 60_000, 50)
    alone = on_all(lambda step, n, c: step.step_s(decoding(n, c, step.window_tokens)), n, context)
    view = on_all(lambda step, n, c: decode_of(step).step_s(n, c), n, context)
    np.testing.assert_allclose(view, alone, rtol=1e-12)


def test_a_step_is_affine_in_contexts_where_the_host_does_not_show():
    step = replace(decode_of(step_of(DENSE, "fp8", Parallelism(tp=8))), host=make_host_law())
    contexts = np.linspace(500.0, 50_000.0, 50)
    times = jax.vmap(lambda c: step.step_s(64.0, c))(contexts)
    line = np.polyval(np.polyfit(contexts, times, 1), contexts)
    np.testing.assert_allclose(times, line, rtol=1e-9)


def test_parts_add_up_to_what_the_gpu_works():
    batch = batches()
    parts = on_all(MixedStep.parts, batch)
    assert parts.seconds.shape == (N_STEPS, 200, len(CLASSES))
    exchanges = parts.seconds[..., CLASSES.index("collectives")]
    rows = batch.n_active + batch.prompt_tokens
    more = jax.vmap(lambda host: host.exchanges(rows) - 1.0)(STEPS.host)
    several = np.asarray(STEPS.costs.n_groups)[:, None] > 1
    whole = jnp.sum(parts.seconds, axis=-1) + more * exchanges
    # Two curves are not one; within a group collectives are as large as the fullest group's, not as the mean's.
    assert jnp.all(jnp.abs(on_all(MixedStep.gpu_s, batch) / whole - 1.0) <= jnp.where(several, 6e-3, 2e-3))
    assert jnp.all(parts.peak_s <= 1.3 * parts.seconds + 1e-12)  # nothing is much faster than the data sheet


def step_of(a, precision, split, gpu=GPU):
    types = data_types(a, gpu, precision, "bf16")
    laws, _ = operator_laws(gpu, a, types)
    return mixed_step(stack_of(a, split, types), laws, gpu.gpu, make_host_law())


def test_a_huge_batch_takes_its_flops_and_one_sequence_its_weights():
    step = step_of(DENSE, "bf16", Parallelism())
    weights_s = 2.0 * (DENSE.inner_params + DENSE.lm_head_params) / GPU.bandwidth_bytes_per_s
    one_s = float(step.step_s(decoding(1.0, 16.0)))
    assert weights_s < one_s < 1.4 * weights_s
    tokens = 16_384.0
    flop_s = 2.0 * DENSE.inner_params * tokens / GPU.peak_flop_per_s
    parts = step.parts(with_prompts(decoding(0.0, 0.0), tokens))
    gemm_seconds = float(parts.seconds[CLASSES.index("gemm")])
    assert flop_s < gemm_seconds < 1.6 * flop_s
    np.testing.assert_allclose(parts.peak_s[CLASSES.index("gemm")], flop_s, rtol=0.01)


def test_one_layer_more_costs_one_layer():
    more = replace(DENSE, layers=81, attention_params=DENSE.attention_params * 81 // 80)
    more = replace(more, dense_params=DENSE.dense_params * 81 // 80)
    batch = decoding(32.0, 3000.0)
    whole, longer = (step_of(a, "bf16", Parallelism(tp=4)).gpu_s(batch) for a in (DENSE, more))
    law = operator_laws(GPU, DENSE, data_types(DENSE, GPU, "bf16", "bf16"))[0].gemm["dense"]
    gate_up, down = (gemm_s(law, GPU.gpu, 32.0, *shape) for shape in ((2 * 7168.0, 8192.0), (8192.0, 7168.0)))
    assert gate_up + down < longer - whole < 3.0 * (gate_up + down)


def test_prompts_ride_on_weights_that_are_streamed_anyway():
    step = step_of(DENSE, "bf16", Parallelism(tp=8))
    alone = step.step_s(decoding(32.0, 1000.0))
    with_few = step.step_s(with_prompts(decoding(32.0, 1000.0), 64.0))
    assert with_few - alone < 0.3 * step.step_s(with_prompts(decoding(0.0, 0.0), 64.0))


# Groups with sequences of their own: a step lasts as long as the fullest.
ALONE, SPREAD = Parallelism(), Parallelism(dp=8, ep=8)
PROMPT = with_prompts(decoding(0.0, 0.0), 4096.0)


def own_seconds(split, batch, kind, serving="vllm"):
    step = step_entry(MOE, GPUS["b200"], split, "fp8", serving=serving).step
    return float(step.parts(batch).seconds[CLASSES.index(kind)])


@pytest.mark.parametrize("kind", ["gemm", "prefill_attention", "elementwise"])
def test_a_lone_prompt_is_one_groups(kind):
    """It takes as long as on a GPU of its own, however many groups wait; dealt out, an eighth."""
    alone, lone = (own_seconds(split, PROMPT, kind) for split in (ALONE, SPREAD))
    assert lone == pytest.approx(alone, rel=0.03)
    assert own_seconds(SPREAD, PROMPT, kind, "trtllm") < 0.35 * alone  # waits until every group has some
    many = with_prompts(decoding(0.0, 0.0), 64.0, n_prompts=64.0)  # as many tokens, of prompts for every group
    even = own_seconds(SPREAD, many, kind, "trtllm")
    assert own_seconds(SPREAD, many, kind) == pytest.approx(even, rel=0.01)


def test_what_waits_is_no_work_of_the_mean_gpu():
    one, other = (
        step_entry(MOE, GPUS["b200"], SPREAD, "fp8", serving=serving).step.parts(PROMPT)
        for serving in ("vllm", "trtllm")
    )
    for name in ("bytes", "flops", "peak_s"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-12)
    assert np.all(np.asarray(one.seconds) >= np.asarray(other.seconds) - 1e-15)


def test_the_fullest_of_groups():
    """Never below the mean nor above everything; of one group, and of prompts without pairs, the batch itself."""
    batch = batches()
    for n_groups in (1.0, 2.0, 8.0):
        fullest = jax.vmap(of_fullest, (0, None))(batch, n_groups)
        least, most = batch.prompt_tokens, n_groups * batch.prompt_tokens
        assert jnp.all((least <= fullest.prompt_tokens) & (fullest.prompt_tokens <= most * (1 + 1e-12)))
        lone = batch.prompt_tokens > 1  # these batches have one prompt each
        np.testing.assert_allclose(fullest.prompt_tokens[lone], most[lone], rtol=1e-12)
        np.testing.assert_allclose(fullest.prompt_pairs[lone], n_groups * batch.prompt_pairs[lone], rtol=1e-12)
        assert jnp.all(fullest.n_active == batch.n_active) and jnp.all(fullest.tokens == batch.tokens)
    whole = replace(decoding(4.0, 100.0), prompt_tokens=jnp.asarray(8192.0))
    assert float(of_fullest(whole, 8.0).prompt_tokens) == 8192.0
    lengths = np.array([100.0, 700.0, 40.0])
    mixed = decoding(0.0, 0.0)
    for length in lengths:
        mixed = with_prompts(mixed, length)
    assert lengths.mean() <= float(of_fullest(mixed, 8.0).prompt_tokens) / 8.0 <= lengths.max()
    for k in (1.0, 3.0, 8.0, 40.0):  # like ones: each in a group of its own, then dealt out evenly
        alike = of_fullest(with_prompts(decoding(0.0, 0.0), 8192.0, n_prompts=k), 8.0)
        assert float(alike.prompt_tokens) / 8.0 == pytest.approx(8192.0 * max(1.0, k / 8.0), rel=2e-4)


def test_sequences_are_dealt_out_in_turn():
    """The fullest group has ceil(n / d) sequences: in the mean over n, as the law has it."""
    n, context = np.arange(1.0, 65.0), 4000.0
    one, spread = (step_entry(MOE, GPUS["b200"], split, "fp8").step for split in (ALONE, SPREAD))

    def attention_s(step, n):
        at = [step.parts(decoding(float(k), context)).seconds[CLASSES.index("decode_attention")] for k in n]
        return np.array(at)

    in_turn = attention_s(one, np.ceil(n / 8.0))
    assert attention_s(spread, n).mean() == pytest.approx(in_turn.mean(), rel=0.02)


def test_stages_and_groups_see_their_share_of_the_rows():
    batch = with_prompts(decoding(256.0, 2000.0), 2048.0)
    whole = step_of(DENSE, "bf16", Parallelism(tp=4)).parts(batch)
    for split in (Parallelism(tp=4, pp=2), Parallelism(tp=4, dp=2)):
        half = step_of(DENSE, "bf16", split).parts(batch)
        for name in ("gemm", "prefill_attention"):
            at = CLASSES.index(name)
            np.testing.assert_allclose(half.flops[at], 0.5 * whole.flops[at], rtol=1e-2)
    dispatch = [step_of(MOE, "fp8", split).parts(batch) for split in (Parallelism(tp=8), Parallelism(dp=8, ep=8))]
    at = CLASSES.index("decode_attention")
    assert dispatch[1].bytes[at] < dispatch[0].bytes[at]  # 4 KV heads are copied over 8 GPUs, sequences are not


def test_affine_costs_stay_near_their_laws():
    laws, _ = operator_laws(GPU, WINDOWED, data_types(WINDOWED, GPU, "mxfp4", "bf16"))
    decode, prefill = laws.sequences.decode, laws.sequences.prefill
    assert decode is not None and prefill is not None
    for heads, kv_heads, dim in ((8.0, 1.0, 128.0), (64.0, 8.0, 128.0), (32.0, 4.0, 64.0)):
        shape = heads, kv_heads, dim

        def decode_s(n, c, shape=shape):
            return decode_attention_s(decode, GPU.gpu, n, c, *shape)

        def prompt_s(p, a, shape=shape):
            return prefill_attention_s(prefill, GPU.gpu, p, a, *shape)

        one = affine(decode_s, prompt_s)
        cost = attention_cost(one, jax.tree.map(np.zeros_like, one))
        n, context = (x.ravel() for x in np.meshgrid([1.0, 8.0, 64.0, 256.0], [256.0, 2048.0, 8192.0, 32_768.0]))
        np.testing.assert_allclose(cost.decoding(n, n * context, 0.0), decode_s(n, n * context), rtol=0.15)
        p = np.array([512.0, 1024.0, 2048.0, 4096.0, 8192.0])
        prompts = cost.prompts(with_prompts(decoding(0.0, 0.0), p))
        np.testing.assert_allclose(prompts, prompt_s(p, causal_pairs(p)), rtol=0.15)


def moved_step_s(factors, a=MOE):
    """A step of an LLM with all coefficients, and the bandwidth, moved by factors."""
    types = data_types(a, GPU, "fp8", "bf16")
    laws, _ = operator_laws(GPU, a, types)

    def moved(path, value):
        return value if "flop_bits" in jax.tree_util.keystr(path) else value * factors[0]  # which choose a peak

    gpu = replace(GPU.gpu, bandwidth_bytes_per_s=GPU.gpu.bandwidth_bytes_per_s * factors[1])
    whole = stack_of(a, Parallelism(tp=4), types)
    step = mixed_step(whole, jax.tree_util.tree_map_with_path(moved, laws), gpu, make_host_law(slowdown=1.1))
    return step.step_s(with_prompts(decoding(32.0, 4000.0), 512.0))


def check_slopes(step_s, rtol):
    slopes = jax.jit(jax.grad(step_s))(jnp.ones(2))
    for slope, direction in zip(slopes, np.eye(2)):
        ends = [float(step_s(1.0 + sign * 1e-5 * direction)) for sign in (1, -1)]
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-5, rtol=rtol)


def test_gradients_go_through_the_table():
    law = operator_laws(GPU, DENSE, data_types(DENSE, GPU, "fp8", "bf16"))[0].gemm["dense"]

    def looked_up_s(launch_s, rows):
        moved = replace(law, launch_s=launch_s)
        return curve_through(gemm_s(moved, GPU.gpu, KNOTS, 7168.0, 8192.0))(rows)

    launch, per_row = jax.jit(jax.grad(looked_up_s, argnums=(0, 1)))(jnp.asarray(3e-6), 500.3)
    np.testing.assert_allclose(launch, 1.0, rtol=1e-9)
    ends = [float(gemm_s(law, GPU.gpu, rows, 7168.0, 8192.0)) for rows in (490.3, 510.3)]
    np.testing.assert_allclose(per_row, (ends[1] - ends[0]) / 20.0, rtol=0.03)


@pytest.mark.slow  # a minute to compile
def test_gradients_reach_the_coefficients_and_the_data_sheet():
    check_slopes(lambda factors: moved_step_s(factors, DENSE), 1e-5)
    check_slopes(moved_step_s, 1e-5)


def test_the_fixed_point_holds_although_a_step_is_not_concave():
    u = np.random.default_rng(2).uniform(size=(2, 64))
    context, frac = 1500.0, 0.3

    def residual(step, load, n_max):
        decode: OperatorDecode = decode_of(step)
        full = n_max / (500.0 * decode.step_s(n_max + 1.0, context)) * (1.0 - frac)
        rate = load * full
        n = sequences_in_flight(decode, n_max, rate, 500.0, context, frac)
        return n / (rate * 500.0 * decode.step_s(n + 1.0, context) / (1.0 - frac)) - 1.0

    found = on_all(residual, 0.02 + 0.95 * u[0], 8.0 + 1000.0 * u[1])
    assert jnp.max(jnp.abs(found)) < 1e-6


def test_what_cannot_be_divided_is_refused():
    for a, split, field in (
        (DENSE, Parallelism(tp=3), "tp"),
        (DENSE, Parallelism(tp=2, ep=2), "ep"),
        (MOE, Parallelism(tp=4, ep=3), "ep"),
        (DENSE, Parallelism(pp=100), "pp"),
        (DENSE, Parallelism(dp=0), "dp"),
    ):
        with pytest.raises(BadField, match=field):
            step_entry(a, GPU, split, "bf16")
