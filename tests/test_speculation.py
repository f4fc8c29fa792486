"""Tokens drafted ahead: the step without drafts as the limit, where rows stop being free, and law against simulator."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import fleetopt_jax as fo
from fleetopt_jax._optimize.engine_errors import EngineFactors, perturbed_spec, shared_errors
from fleetopt_jax._simulate.batching import _chance, _gained
from fleetopt_jax._simulate.state import Slots
from fleetopt_jax.catalog.drafts import draft_heads
from fleetopt_jax.catalog.engines import build, engine_entry, engine_points
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.struct import as_floats
from fleetopt_jax.documents.drafts import drafts_named, drafts_to_json, load_draft_head
from fleetopt_jax.fleet.engine import Engine, at_clock, speculating
from fleetopt_jax.laws.mixed_step import StepBatch, decoding, with_prompts
from fleetopt_jax.laws.speculation import MOST_DRAFTS, Speculation, in_iterations, make_speculation, pays_up_to
from fleetopt_jax.report.export.launch import fleet_launch

RELEASE = json.loads((Path(__file__).parent / "vllm_flags.json").read_text())
DENSE, LATENT = fo.EngineSpec("h100"), fo.EngineSpec("h200", "deepseek-v3", serving="sglang")
HEAD = {"layers_frac": 1 / 80, "head_frac": 0.25, "launch_s": 8e-4, "verify_s": 9.5e-4}
CURVE = (0.8, 0.6, 0.4, 0.3, 0.2)


def head(k) -> Speculation:
    """CURVE with k drafts, traced or not."""
    return replace(make_speculation(CURVE, 5, **HEAD), n_drafts=jnp.asarray(k, float))


def batches(n: int = 400) -> StepBatch:
    u = np.random.default_rng(1).uniform(size=(5, n))
    active, context, prompt = 2 ** (9 * u[0]), 2 ** (7 + 9 * u[1]), 2 ** (13 * u[2]) * (u[3] > 0.5)
    return with_prompts(decoding(active, context), prompt, 4096.0 * u[4])


@jax.jit
def everything(engine: Engine, batch: StepBatch, context) -> tuple:
    """Seconds and joules of mixed batches, and a decode step with its watts."""
    n = batch.n_active
    step = engine.step.step_s(batch), engine.step.gpu_j(batch), engine.step.added_s(batch)
    return *step, engine.decode.step_s(n, context), engine.power.gpu_w(n, context), engine.prefill.per_token_s


@pytest.mark.parametrize("spec", [pytest.param(DENSE, marks=pytest.mark.slow), LATENT])
def test_no_draft_is_the_engine_without(spec):
    batch, plain = batches(), build(spec)
    context = batch.tokens / batch.n_active
    for clock in (1.0, 0.7):
        with_, without = (
            everything(speculating(at_clock(plain, clock), head(0.0)), batch, context),
            at_clock(plain, clock),
        )
        for a, b in zip(with_, everything(without, batch, context), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9)


@pytest.mark.slow
def test_no_draft_leaves_requests_as_they_are():
    chat = fo.make_workload([500, 4000, 900], [200, 300, 1], [0.6, 0.3, 0.1], arrival_rate_per_s=20.0)
    fleet = fo.make_fleet([build(DENSE)], window_tokens=[4400], n_instances=[6])
    none = fleet.with_engines([speculating(build(DENSE), head(0.0))])
    with_, without = (jax.tree.leaves(fo.evaluate(each, chat, quantiles=False)) for each in (none, fleet))
    for a, b in zip(with_, without, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)


def test_the_decode_view_is_the_iteration_without_prompts():
    batch = batches()
    for spec in (DENSE, LATENT):
        engine = at_clock(speculating(build(spec), head(3.0)), 0.8)
        n, context = batch.n_active, batch.tokens / batch.n_active
        seen = engine.step.step_s(decoding(n, context, engine.step.window_tokens))
        np.testing.assert_allclose(engine.decode.step_s(n, context), seen, rtol=1e-12)


def test_an_iteration_never_falls_and_a_sequence_shares_it():
    n, context = jnp.geomspace(1.0, 1024.0, 60), 1500.0
    for spec in (DENSE, LATENT):
        engine = build(spec)
        drafting = [speculating(engine, head(k)) for k in (0.0, 0.5, 1.0, 2.0, 3.5, 5.0)]
        step_s = np.stack([each.decode.step_s(n, context) for each in drafting])
        assert np.all(np.diff(step_s, axis=0) > 0) and np.all(np.diff(step_s, axis=1) > 0)
        assert np.all(np.diff(step_s / n, axis=1) < 0)
        longer = np.stack([each.decode.step_s(n, 2 * context) for each in drafting])
        assert np.all(longer > step_s)


def test_a_curve_gains_ever_less():
    ks = jnp.linspace(0.0, 5.0, 51)
    gained = jax.vmap(lambda k: head(k).tokens_per_step)(ks)
    np.testing.assert_allclose(gained[::10], 1.0 + np.cumsum([0.0, *CURVE]), rtol=1e-12)
    slope = np.diff(gained)
    assert np.all(slope >= -1e-12) and np.all(np.diff(slope) <= 1e-9)


def test_gain_falls_with_the_batch_and_crosses_one_where_rows_cost_what_they_gain():
    """Beside the operator law itself: with heads that cost nothing the gain is AL t(n) / t((k + 1) n), and it is one
    where a verified row costs what it gains."""
    engine, free = build(replace(DENSE, llm="llama-3.1-8b", tp=1)), {name: 0.0 for name in HEAD}
    n, context, k = np.geomspace(8.0, 1024.0, 200), 300.0, 3
    drafts = make_speculation([0.5, 0.3, 0.2], k, **free)
    drafting = speculating(engine, drafts)
    al = float(drafts.tokens_per_step)
    gain = al * np.asarray(engine.decode.step_s(n, context) / drafting.decode.step_s(n, context))
    law = engine.step.step
    read = law.attention_s.decoding(n, n * context, 0.0 * n)
    rows = [law.host.step_of_s(law.rows_s(r * n) + law.head_s(r * n) + read, law.n_layers, n) for r in (1, 1 + k)]
    np.testing.assert_allclose(gain, al * np.asarray(rows[0] / rows[1]), rtol=2e-3)  # attention is far from its FLOPs
    from_here = n > 32
    assert np.all(np.diff(gain[from_here]) < 0) and gain[0] > 1.8 and gain[-1] < 0.8
    crosses = float(np.interp(-1.0, -gain[from_here], n[from_here]))
    assert pays_up_to(engine.decode, drafting.decode, al, context, 1024.0) == pytest.approx(crosses, rel=0.02)
    marginal_s = float((law.rows_s((1 + k) * crosses) - law.rows_s(crosses)) / (k * crosses))
    bound_s = float(law.costs.peak_s[0](2048.0) / 2048.0)
    assert marginal_s > 0.8 * bound_s  # from there on a row costs its FLOPs


def test_gradients_reach_drafts_acceptance_and_costs():
    engine = build(replace(DENSE, llm="llama-3.1-8b", tp=1))

    @jax.jit
    def joules_per_token(k, survival, costs):
        drafts = replace(head(k), survival=jnp.append(survival, jnp.zeros(MOST_DRAFTS - 5)), verify_s=1e-3 * costs)
        drafting = speculating(engine, drafts)
        watts = drafting.power.gpu_w(40.0, 900.0)
        return 1e3 * watts * drafting.decode.step_s(40.0, 900.0) / drafting.tokens_per_step / 500.0

    for k in (0.4, 2.3, 4.6):  # between whole numbers, where the mix is smooth
        check_grads(joules_per_token, (k, jnp.array(CURVE), 1.0), order=1, modes=["rev"], atol=1e-4, rtol=1e-4)
    slopes = jax.jit(jax.grad(joules_per_token, (0, 1, 2)))
    for k in (0.0, 1.0, 3.0):
        assert all(np.all(np.isfinite(leaf)) for leaf in slopes(k, jnp.array(CURVE), 1.0))


@pytest.mark.slow
def test_gradients_go_through_a_fleet():
    chat = fo.make_workload([500, 4000], [200, 300], [0.9, 0.1], arrival_rate_per_s=20.0)
    plain = build(DENSE)

    @jax.jit
    def watts(k):
        engines = [speculating(plain, head(k))]
        fleet = fo.make_fleet([plain], window_tokens=[4400], n_instances=[5]).with_engines(engines)
        metrics = fo.evaluate(fleet, chat, quantiles=False)
        return metrics.power_w / 1e3 + 100.0 * metrics.itl_s

    check_grads(watts, (2.5,), order=1, modes=["rev"], atol=1e-4, rtol=1e-3)


def test_iterations_of_a_request_are_those_of_a_renewal_process():
    """E[N] and Var N of requests of one length against a plain draw of every iteration."""
    rng, drafts, output = np.random.default_rng(0), head(3.0), 60
    chance = rng.uniform(size=(40_000, output))
    gained = 1 + np.sum(chance[..., None] < np.asarray(drafts.accepted), axis=-1)
    n = 1 + 1 + np.sum(np.cumsum(gained, axis=1) < output - 1, axis=1)  # the first token comes with its prompt
    demand = fo.laws.demand.demand(100.0, 100.0, float(output), float(output))
    steps = fo.laws.service.step_moments(0.0, float(output), 160.0)
    _, mean = in_iterations(drafts, steps, demand)
    assert float(mean.steps) == pytest.approx(n.mean(), rel=2e-3)
    assert float(mean.steps2) == pytest.approx((n**2).mean(), rel=5e-3)
    assert float(mean.held / mean.steps) == pytest.approx(float(demand.held / demand.steps), rel=1e-12)


def test_simulated_chance_accepts_as_the_curve_says():
    n = 200_000
    request, left = (
        jnp.arange(n, dtype=jnp.int32) % 40,
        jnp.full(n, 50, jnp.int32) + jnp.arange(n, dtype=jnp.int32) // 40,
    )
    first_s = jnp.full(n, 12.345) + 1e-3 * (jnp.arange(n) % 7)
    chance = np.sort(np.asarray(_chance(first_s, request, left)))
    assert np.max(np.abs(chance - (np.arange(n) + 0.5) / n)) < 0.005  # uniform
    empty = jnp.zeros((n, 1), jnp.int32)
    slots = Slots(request[:, None], left[:, None], empty, empty, empty, first_s[:, None], first_s[:, None])
    gained = np.asarray(_gained(head(4.0), slots, jnp.ones((n, 1), bool)))
    assert gained.mean() == pytest.approx(float(head(4.0).tokens_per_step), rel=5e-3)
    np.testing.assert_allclose([(gained > j).mean() for j in range(1, 5)], CURVE[:4], atol=5e-3)
    ending = _gained(head(4.0), replace(slots, left=jnp.full((n, 1), 2, jnp.int32)), jnp.ones((n, 1), bool))
    assert int(ending.max()) == 2  # no more than what is left


@pytest.mark.slow
def test_law_and_simulator_agree():
    chat = fo.make_workload([600, 2400, 5000], [150, 260, 320], [0.6, 0.3, 0.1], arrival_rate_per_s=30.0)
    fleet = fo.make_fleet([build(replace(DENSE, speculate="eagle3:3"))], window_tokens=[6000], n_instances=[4])
    seen = fo.simulate(fleet, chat, n_requests=4000, n_replications=2)
    for name, within in (("tok_per_j", 0.03), ("power_w", 0.03), ("itl_s", 0.05), ("n_active", 0.08)):
        assert seen.analytic[name] == pytest.approx(seen.metrics[name].mean, rel=within), name
    without = fleet.with_engines([build(DENSE)])
    faster = float(fo.evaluate(without, chat).itl_s / fo.evaluate(fleet, chat).itl_s)
    assert 1.5 < faster < 2.5


def test_the_fit_and_what_it_has_not_seen():
    """Measured speed-ups: EAGLE-3 by k, to which c and l are fitted, within 10 %; by concurrency, of other engines and
    not in the fit, within 20 %."""
    rows = list(csv.DictReader((Path(__file__).parent / "speculation_speedups.csv").read_text().splitlines()))
    assert len(rows) == 9
    for row in rows:
        spec = fo.EngineSpec(row["gpu"], row["llm"], tp=int(row["tp"]), serving=row["serving"])
        plain, drafting = build(spec), build(replace(spec, speculate=row["speculate"]))
        n, context = float(row["concurrency"]), float(row["context_tokens"])
        gain = float(plain.decode.step_s(n, context) / drafting.decode.step_s(n, context) * drafting.tokens_per_step)
        within = 0.10 if row["in_fit"] == "yes" else 0.20
        assert gain == pytest.approx(float(row["speedup"]), rel=within), row


@pytest.mark.nightly
def test_a_search_chooses_drafts_by_pool_as_brute_force_does():
    """Every pair of engines of two pools, searched alone, against one search that has all of them."""
    chat = fo.make_workload([500, 4000, 9000], [200, 300, 400], [0.7, 0.2, 0.1], arrival_rate_per_s=12.0)
    specs = [replace(DENSE, speculate=each) for each in (None, "eagle3:1", "eagle3:4")]
    how = {"n_pools": 2, "slo": fo.make_slo(ttft_p99_s=2.0, itl_s=0.012)}
    best = fo.require_plan(fo.optimize(fo.make_problem(chat, specs, **how)))
    assert best.status == "optimal" and {spec.drafts and spec.drafts.name for spec in best.specs} != {None}
    alone = [fo.optimize(fo.make_problem(chat, [spec], **how)) for spec in specs]
    reached = [float(plan.metrics.power_w) for plan in alone if isinstance(plan, fo.Plan)]
    assert float(best.metrics.power_w) <= min(reached) * (1 + 1e-9)
    one = fo.require_plan(fo.optimize(fo.make_problem(chat, specs, **(how | {"n_pools": 1}))))
    assert float(one.metrics.power_w) == pytest.approx(min(reached_of_one(chat, specs, how)), rel=1e-9)


def reached_of_one(chat, specs, how) -> list[float]:
    plans = [fo.optimize(fo.make_problem(chat, [spec], **(how | {"n_pools": 1}))) for spec in specs]
    return [float(plan.metrics.power_w) for plan in plans if isinstance(plan, fo.Plan)]


def test_presets_say_their_source_and_what_is_projected():
    for name, entry in draft_heads().items():
        assert entry.source and entry.task and (entry.projected or set(entry.measured) >= set(range(1, entry.most + 1)))
        assert fo.drafts_of(f"{name.upper()}:1").head is entry
    reported = {2: 2.36, 3: 2.79, 4: 3.08, 5: 3.32, 6: 3.46, 7: 3.54}
    for k, tokens in reported.items():
        assert fo.drafts_of(f"eagle3:{k}").tokens_per_step == pytest.approx(tokens, abs=0.005)
    assert 1.85 <= fo.drafts_of("mtp:1").tokens_per_step <= 1.90
    assert fo.drafts_of("ngram:10").tokens_per_step == pytest.approx(1.55, abs=0.005)
    assert fo.drafts_of("ngram-edit:5").tokens_per_step == pytest.approx(2.96, abs=0.01)


def test_an_engine_with_drafts_is_another_one_and_no_better_known():
    spec = replace(DENSE, speculate="eagle3:3")
    assert spec == replace(DENSE, speculate="EAGLE3:3") != DENSE and build(spec) is build(replace(spec))
    assert (
        engine_entry(spec).quality == "kernels"
        and engine_entry(replace(spec, speculate="eagle3:1")).quality == "projected"
    )
    assert float(build(spec).kv.n_blocks) < float(build(DENSE).kv.n_blocks)
    errors, of = shared_errors([fo.EngineSpec("h100"), spec])
    assert list(of) == [0, 0] and errors.step.shape == (1,)
    (point,) = engine_points(engine_entry(spec), [32.0], 2000.0, 0.0)
    (without,) = engine_points(engine_entry(DENSE), [32.0], 2000.0, 0.0)
    assert 1.3 < point.tok_per_s / without.tok_per_s < 2.79
    slower = perturbed_spec(spec, EngineFactors(**as_floats(step=1.1, power=1.0, prefill=1.0)))
    np.testing.assert_allclose(
        build(slower).decode.step_s(32.0, 2000.0), 1.1 * build(spec).decode.step_s(32.0, 2000.0), rtol=1e-12
    )
    assert float(build(slower).speculation.tokens_per_step) == pytest.approx(2.79)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"speculate": "eagle3:9"}, "need 1 to 7 drafts"),
        ({"speculate": "eagle3"}, "need a head and its drafts"),
        ({"speculate": "eagel3:2"}, "did you mean eagle3"),
        ({"speculate": "mtp:1", "serving": "vllm-0.11"}, "knows no rows that verify drafts"),
        ({"speculate": "eagle3:2", "source": "projected"}, "knows no rows that verify drafts"),
        ({"speculate": "eagle3:2", "pp": 2}, "need pp = 1"),
        (
            {"speculate": "eagle3:2", "laws": fo.OwnLaws(decode=fo.make_decode_step(base_s=0.01, per_token_s=1e-8))},
            "own laws",
        ),
    ],
)
def test_what_cannot_draft_is_refused(change, said):
    with pytest.raises(BadInput, match=said):
        build(replace(DENSE, **change))


def test_a_closed_loop_drafts_nothing():
    with pytest.raises(BadInput, match="need an engine that drafts nothing"):
        fo.predict(replace(DENSE, speculate="eagle3:2"), [fo.Benchmark(100, 10, 2, 4)])


@pytest.mark.parametrize(
    "survival, how, said",
    [
        ([], {"n_drafts": 0}, "1 to 16"),
        ([0.5, 0.6], {"n_drafts": 1}, "never rises"),
        ([1.2], {"n_drafts": 1}, "never rises"),
        ([np.nan], {"n_drafts": 1}, "never rises"),
        ([0.5], {"n_drafts": 2}, "0 to the curve's 1"),
        ([0.5], {"n_drafts": 1, "launch_s": -1.0}, "launch_s >= 0"),
        ([0.5], {"n_drafts": 1, "drafted_frac": 0.4}, "drafted_frac"),
    ],
)
def test_a_curve_is_checked(survival, how, said):
    with pytest.raises(ValueError, match=said):
        make_speculation(survival, **how)


OWN = """schema = "fleetopt-drafts/1"
method = "eagle3"
model = "my-org/my-head"
acceptance = [0.81, 0.63, 0.47]
task = "our chats"
layers = 1
head_tokens = 32000
"""


def test_a_head_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(OWN)
    mine = load_draft_head(path)
    assert (mine.most, mine.model, mine.launch_s) == (3, "my-org/my-head", draft_heads()["eagle3"].launch_s)
    (two,) = drafts_named(f"{path}:2")
    assert two.tokens_per_step == pytest.approx(2.44) and [d and d.k for d in drafts_named(str(path))] == [
        None,
        1,
        2,
        3,
    ]


@pytest.mark.nightly
def test_a_plan_holds_the_curve_itself(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(OWN)
    (two,) = drafts_named(f"{path}:2")
    chat = fo.make_workload([500, 4000], [200, 300], [0.9, 0.1], arrival_rate_per_s=5.0)
    plan = fo.require_plan(fo.optimize(fo.make_problem(chat, [replace(DENSE, speculate=two)], n_pools=1)))
    fo.save_plan(plan, tmp_path / "plan.json")
    path.unlink()  # a plan holds the curve itself
    again = fo.load_plan(tmp_path / "plan.json", workload=chat)
    assert again.specs == plan.specs and float(again.metrics.power_w) == pytest.approx(float(plan.metrics.power_w))
    said = json.loads((tmp_path / "plan.json").read_text())["pools"][0]["speculate"]
    assert said["k"] == 2 and 1 < said["pays_up_to_seqs"] <= plan.fleet.engines[0].kv.max_num_seqs


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("[0.81, 0.63, 0.47]", "[0.81, 0.9]", "acceptance rises"),
        ("[0.81, 0.63, 0.47]", "[1.81]", "less than or equal to 1"),
        ("[0.81, 0.63, 0.47]", "[]", "at least 1"),
        ('"eagle3"', '"magic"', "eagle"),
        ("task =", "tusk =", "task"),
        ("drafts/1", "drafts/2", "drafts/1"),
    ],
)
def test_a_wrong_head_is_refused_by_its_line(tmp_path, old, new, said):
    path = tmp_path / "mine.toml"
    path.write_text(OWN.replace(old, new))
    with pytest.raises(BadInput, match=said) as refusal:
        load_draft_head(path)
    assert "mine.toml" in str(refusal.value)


@pytest.mark.parametrize("name, keys", [("eagle3:3", {"model"}), ("mtp:1", set()), ("ngram:4", {"prompt_lookup_max"})])
def test_export_writes_what_the_release_takes(name, keys):
    pool = {
        "gpu": "h100",
        "llm": "llama-3.1-70b",
        "tp": 8,
        "n_instances": 3,
        "max_num_seqs": 2048,
        "window_tokens": 8000,
    }
    pool |= {
        "window_tokens": 8000,
        "precision": "bf16",
        "utilization": 0.5,
        "speculate": drafts_to_json(fo.drafts_of(name)),
    }
    document = {"schema": "fleetopt-plan/1", "status": "optimal", "assume": "physical", "pools": [pool]}
    document |= {"workload": {"name": "chat", "arrival_rate_per_s": 3.0}, "slo": {"ttft_p99_s": 1.0}}
    (launched,) = fleet_launch(document | {"metrics": {"tok_per_j": 1.0, "output_tok_per_s": 1.0}}, "plan.json").pools
    flags = dict(arg.removeprefix("--").split("=", 1) for arg in launched.args[1:] if "=" in arg)
    config = json.loads(flags["speculative-config"])
    assert set(config) == {"method", "num_speculative_tokens"} | keys <= set(RELEASE["speculative_config"])
    assert config["method"] in RELEASE["speculative_methods"] and "--speculative-config" in RELEASE["flags"]
    k = fo.drafts_of(name).k
    assert config["num_speculative_tokens"] == k and int(flags["max-num-batched-tokens"]) >= 2048 * (1 + k)
    assert any("mean acceptance length" in note for note in launched.notes)
