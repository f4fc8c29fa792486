"""What is written is read back: plans, engines, simulations and ledgers, also those that older versions wrote."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleetopt_jax._optimize.plan import Infeasible, Plan, Search, Unreachable
from fleetopt_jax._optimize.problem import Problem, make_problem
from fleetopt_jax._optimize.search import evaluate_given
from fleetopt_jax._simulate.estimates import Estimate
from fleetopt_jax._simulate.simulate import Simulation
from fleetopt_jax.calibrate.fit import fit_decode
from fleetopt_jax.calibrate.measurements import Measurements
from fleetopt_jax.catalog.gpus import GPUS
from fleetopt_jax.catalog.spec import EngineSpec, OwnLaws
from fleetopt_jax.catalog.workloads import load
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.documents.engine import load_engine, save_engine
from fleetopt_jax.documents.ledger import LedgerRow, load_ledger, save_ledger
from fleetopt_jax.documents.own_catalog import load_catalog
from fleetopt_jax.documents.plan import load_plan, plan_to_json, save_plan
from fleetopt_jax.documents.plan_file import PlanFile
from fleetopt_jax.documents.schemas import schemas
from fleetopt_jax.documents.simulation import load_simulation, save_simulation, simulation_to_json
from fleetopt_jax.fleet.assumptions import PHYSICAL, PUBLISHED, parse_assumptions
from fleetopt_jax.fleet.choices.routing_key import PromptAndLimit
from fleetopt_jax.fleet.choices.tail import MeanPrefillTail
from fleetopt_jax.fleet.fleet import make_slo
from fleetopt_jax.fleet.resources import Weights, make_budget
from fleetopt_jax.fleet.surroundings import make_site, make_surroundings
from fleetopt_jax.laws.compression import make_compressor
from fleetopt_jax.laws.decode import make_decode_step
from fleetopt_jax.workload.atoms import Workload, make_workload
from fleetopt_jax.workload.readers import Layout

OLD_PLAN = Path(__file__).parent / "plan_0.1.0.json"  # `fleetopt optimize` of version 0.1.0, of `old_trace` at 400/s
LONG = 6000.0


@pytest.fixture(scope="module")
def few() -> Workload:
    """Three short requests and a long one, ten a second."""
    prompt, output = np.array([100.0, 200.0, 300.0, LONG - 100.0]), np.array([50.0, 60.0, 70.0, 100.0])
    return make_workload(prompt, output, arrival_rate_per_s=10.0)


@pytest.fixture(scope="module")
def old_trace(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("old") / "trace.csv"
    rows = [(i * 0.5, 200 + (i * 37) % 400 + (6000 if i % 13 == 0 else 0), 40 + (i * 11) % 90) for i in range(40)]
    path.write_text("timestamp_s,prompt_tokens,output_tokens\n" + "".join(f"{t},{p},{o}\n" for t, p, o in rows))
    return path


def given_plan(problem: Problem, specs=None, windows=(1024.0, LONG), gamma=(1.0, 1.0)) -> Plan:
    """A fleet of two pools that somebody chose."""
    return evaluate_given(
        problem, specs or problem.specs[:1] * 2, window_tokens=list(windows), gamma=list(gamma), n_instances=[2.0, 3.0]
    )


PAPER = (EngineSpec("h100", source="projected"),)


def fast(few: Workload, specs: Sequence[EngineSpec] = PAPER, **how: Any) -> Problem:
    """A problem whose laws compile quickly."""
    how = {"assume": "published", "assumptions": PUBLISHED} | how
    return make_problem(few, specs, workload_name="few", window_tokens=LONG, **how)


def without_time(document: dict[str, Any]) -> dict[str, Any]:
    return document | {"search": document["search"] | {"wall_s": 0.0}}


def back(plan: Plan, path: Path, workload: Workload, **how: Any) -> Plan:
    """Written and read back: the same document, byte for byte but for the time it took."""
    save_plan(plan, path)
    loaded = load_plan(path, workload=workload, **how)
    assert without_time(plan_to_json(loaded)) == without_time(plan_to_json(plan))
    assert loaded.specs == plan.specs
    return loaded


# --------------------------------------------------------------------------------------------------------------- plans


@pytest.mark.slow
def test_a_plan_of_an_older_version_is_the_plan_that_was_found(old_trace):
    old = json.loads(OLD_PLAN.read_text())
    plan = load_plan(OLD_PLAN, workload=load(str(old_trace), rate_per_s=400.0))
    assert (plan.status, plan.method, plan.binding) == ("optimal", "exact", None)
    assert plan.search.lower_bound == old["search"]["lower_bound"]
    assert [spec.gpu for spec in plan.specs] == ["h100", "b200"]
    new = plan_to_json(plan)
    for part in ("site", "compressor", "slo", "budget", "objective", "dispatch", "assume", "assumptions"):
        assert new[part] == old[part]
    # The laws of P99 latencies are others since. ITL, with prompts in chunks: 0.1218 s before, where prompts are long.
    # TTFT, with iterations that prompts come to while they run: 0.0939, 0.5345 and of all 0.3666 s before.
    old["metrics"]["itl_p99_s"] = old["pools"][1]["itl_p99_s"] = 0.12995593414790038
    now = {"ttft_p99_s": 0.963597083, "ttft_p99_worst_pool_s": 0.963597083, "ttft_p99_of_all_s": 0.621355306}
    for ours, theirs, expected in (
        (new["metrics"], old["metrics"], now),
        (new["pools"][0], old["pools"][0], {"ttft_p99_s": 0.156116166}),
        (new["pools"][1], old["pools"][1], {"ttft_p99_s": 0.963597083}),
    ):
        found = {name: ours[name] for name in expected}
        assert found == pytest.approx(expected, rel=1e-7)  # quantiles of tails, which are rounded at 1e-9
        theirs |= found
    assert new["metrics"] == pytest.approx(old["metrics"], rel=1e-9)
    for ours, theirs in zip(new["pools"], old["pools"], strict=True):
        assert [name for name in ours if name in theirs] == list(theirs)
        assert {name: ours[name] for name in theirs} == {
            k: pytest.approx(v, rel=1e-9) if isinstance(v, float) else v for k, v in theirs.items()
        }


@pytest.mark.slow
def test_under_another_rate_a_plan_is_no_longer_what_was_found(old_trace):
    plan = load_plan(OLD_PLAN, workload=load(str(old_trace), rate_per_s=400.0), rate_per_s=40.0)
    assert (plan.status, plan.method, plan.search.lower_bound) == ("feasible", "given", None)
    assert float(plan.problem.workload.arrival_rate_per_s) == 40.0


def test_a_plan_comes_back_with_everything_it_rests_on(few, tmp_path):
    weights = Weights(power_w=1.0, usd_per_h=200.0, gpus_of={"h100": 3.0})
    (tmp_path / "my.toml").write_text("[gpus.h100]\nidle_w = 90\n")
    catalog = load_catalog(tmp_path / "my.toml").at_prices({"h100": 2.5})
    problem = fast(
        few,
        (catalog.spec("h100", "llama-3.1-70b", 8, source="projected"),),
        slo=make_slo(ttft_p99_s=2.0, ttft_s_per_token=1e-4, itl_s=0.4, max_utilization=0.7),
        objective=weights,
        budget=make_budget(max_gpus=99, max_kg_co2_per_h=1e3, gpus_of={"b200": 5}),
        surroundings=make_surroundings(
            make_site(host_w_per_gpu=80.0, pue=1.3, usd_per_kwh=0.1, kg_co2_per_kwh=0.3),
            make_compressor(success_frac=0.8, s_per_token=1e-5, j_per_token=1e-3),
        ),
        assumptions=replace(PUBLISHED, output_share=0.3, route_by=PromptAndLimit(256.0)),
    )
    specs = (replace(problem.specs[0], clock_frac=0.8), replace(problem.specs[0], max_num_seqs=64))
    loaded = back(given_plan(problem, specs, gamma=(1.5, 1.0)), tmp_path / "plan.json", few)
    assert loaded.problem.objective == weights
    assert [float(x.usd_per_gpu_h) for x in loaded.fleet.engines] == [2.5, 2.5]
    assert json.loads((tmp_path / "plan.json").read_text())["pools"][0]["catalog_file"] == str(tmp_path / "my.toml")
    assert loaded.problem.budget == problem.budget
    assert loaded.problem.assumptions == problem.assumptions


@pytest.mark.slow
def test_the_power_limit_of_boards_comes_back_with_a_plan(few, tmp_path):
    limited = EngineSpec("h100", "llama-3.1-8b", 1, "bf16", "bf16", power_limit_w=400.0)
    problem = make_problem(few, [limited], workload_name="few", window_tokens=LONG, slo=make_slo(ttft_p99_s=5.0))
    plan = given_plan(problem, (limited, replace(limited, power_limit_w=None)))
    loaded = back(plan, tmp_path / "plan.json", few)
    assert [spec.power_limit_w for spec in loaded.specs] == [400.0, None]
    limits = [pool.get("power_limit_w") for pool in json.loads((tmp_path / "plan.json").read_text())["pools"]]
    assert limits == [400.0, None]


@pytest.mark.slow
def test_a_certificate_comes_back_only_with_its_plan(few, tmp_path):
    """A search as `optimize` would leave it: over three kinds of GPU, of which the plan has one."""
    search = Search(123, 4.5, "all there is", lower_bound=0.9, gap=0.01, by_pools=(None, 0.9))
    plan = given_plan(fast(few))
    found = replace(plan, status="optimal", method="exact", search=search, gain_vs_homogeneous=1.25)
    path = tmp_path / "plan.json"
    loaded = back(found, path, few)
    assert (loaded.status, loaded.method, loaded.search) == ("optimal", "exact", search)
    assert loaded.gain_vs_homogeneous == 1.25  # over all that it was chosen from, not over what is in the file
    document = json.loads(path.read_text())
    document["pools"][0]["n_instances"] += 1
    path.write_text(json.dumps(document))
    changed = load_plan(path, workload=few)
    assert (changed.status, changed.method) == ("feasible", "given")
    assert changed.gain_vs_homogeneous is not None
    assert changed.gain_vs_homogeneous < 1.25


def test_a_broken_limit_comes_back(few, tmp_path):
    plan = given_plan(fast(few, slo=make_slo(ttft_p99_s=1e-3)))
    assert plan.binding is not None
    loaded = back(plan, tmp_path / "plan.json", few)
    assert loaded.status == "infeasible"
    assert loaded.binding == plan.binding
    assert plan_to_json(plan)["binding"] == {"limit": "ttft_p99_s", "value": plan.binding.value, "asked": 1e-3}


def test_engines_of_your_own_come_back_from_their_specs(few, tmp_path):
    """A file names them; what they are it cannot say."""
    laws = OwnLaws(decode=make_decode_step(base_s=0.01, per_token_s=1e-8, per_seq_s=1e-5), step_error=0.05)
    mine = replace(GPUS["h100"], name="h100x", memory_bytes=2 * GPUS["h100"].memory_bytes)
    specs = (EngineSpec("h100", laws=laws, source="projected"), EngineSpec(mine, source="projected"))
    problem = fast(few, specs)
    plan, path = given_plan(problem, problem.specs), tmp_path / "plan.json"
    loaded = back(plan, path, few, specs=specs)
    assert loaded.specs[0].laws == laws
    assert [pool.get("laws") for pool in plan_to_json(plan)["pools"]] == ["own", "own"]
    with pytest.raises(BadInput, match=r"plan\.json, pools\.1\.gpu: llama-3\.1-70b on 8 x h100x is an engine that no"):
        load_plan(path, workload=few, specs=specs[:1])


def test_an_engine_of_a_file_comes_back_from_it(few, tmp_path):
    batch = np.array([2.0, 4, 8, 16, 32])
    engine, path = tmp_path / "engine.json", tmp_path / "plan.json"
    save_engine(
        engine, fit_decode(Measurements(batch, 0.01 + 1e-4 * batch)), None, gpu="h100", llm="llama-3.1-70b", tp=8
    )
    plan = given_plan(fast(few, [load_engine(engine)]))
    assert back(plan, path, few).specs[0].file == str(engine)
    assert plan_to_json(plan)["pools"][0]["engine_quality"] == "measured"
    engine.write_text("{}")
    with pytest.raises(BadInput, match=r"engine\.json: schema = 'None'"):
        load_plan(path, workload=few)


def test_the_words_for_assumptions_are_true_whatever_they_were_called(few):
    problem = fast(few, assume="mine", assumptions=replace(PHYSICAL, tail=MeanPrefillTail()))
    plan = Infeasible("exact", problem, Search(1, 0.0, "nothing"), Unreachable("ttft_p99_s", 0.5, 0.7))
    assert plan_to_json(plan)["assume"] == "physical,tail=mean_prefill"
    assert parse_assumptions("physical,tail=mean_prefill") == problem.assumptions
    assert plan_to_json(replace(plan, problem=fast(few)))["assume"] == "published"


def test_what_no_fleet_holds_is_written_and_refused_as_a_plan(few, tmp_path):
    binding = Unreachable("budget", {"max_gpus": 5, "max_power_w": 100.0}, None)
    plan, path = Infeasible("exact", fast(few), Search(1, 0.0, "nothing"), binding), tmp_path / "plan.json"
    save_plan(plan, path)
    document = json.loads(path.read_text())
    assert (document["status"], document["pools"], document["metrics"]) == ("infeasible", [], None)
    assert document["binding"] == {"limit": "budget", "asked": binding.asked, "nearest_feasible": None}
    with pytest.raises(BadInput, match="has no pools, for no fleet held its limits"):
        load_plan(path, workload=few)


@pytest.mark.parametrize(
    ("keys", "value", "says"),
    [
        (("objective",), "joy", "line 60: objective = joy: input should be 'tok_per_j', 'usd'"),
        (("objective",), ["usd"], "objective"),
        (("objective",), {"weights": {"usd_per_h": -1}}, "weights.usd_per_h = -1: input should be greater"),
        (("objective",), {"weights": {"joy": 1}}, "weights.joy = 1: no such key"),
        (("budget", "max_kg_co2_per_h"), 0, "budget.max_kg_co2_per_h = 0"),
        (("budget", "gpus_of.b200"), -1, "budget.gpus_of.b200 = -1"),
        (("route_by",), {"name": "mine", "max_tokens": 9}, "route_by.name = mine"),
        (("route_by",), {"name": "sticky_sessions", "max_tokens": 9}, "sticky_sessions needs headroom"),
        (("route_by",), {"name": "sticky_sessions", "headroom": 0.5}, "route_by.headroom = 0.5"),
        (("pools", 0, "laws"), "mine", "pools.0.laws = mine"),
        (("pools", 0, "clock_frac"), 0.1, "pools.0.clock_frac = 0.1"),
        (("output_share",), 1, "output_share = 1"),
        (("workload", "name"), "azure-con", "workload.name: unknown name 'azure-con'; did you mean azure-conv"),
        (("workload", "name"), "gone.csv", "gone.csv: no such file"),
    ],
)
def test_a_wrong_field_is_refused_by_file_name_and_value(tmp_path, keys, value, says):
    document = json.loads(OLD_PLAN.read_text())
    place = document
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(document))
    with pytest.raises(BadInput) as refused:
        load_plan(path)
    assert says.replace("line 60: ", "") in str(refused.value)


@pytest.mark.slow
def test_other_requests_under_the_same_name_are_warned_of(few, tmp_path):
    trace, path = tmp_path / "mine.csv", tmp_path / "plan.json"
    trace.write_text("p,o\n" + "100,50\n" * 3 + "900,50\n")
    loaded = load(str(trace), rate_per_s=10.0, layout=Layout("p", "o", None))
    problem = make_problem(
        loaded.workload,
        [EngineSpec("h100", source="projected")],
        workload_name=loaded.name,
        assume="published",
        assumptions=PUBLISHED,
    )
    save_plan(given_plan(problem, windows=(512.0, 1024.0)), path, Layout("p", "o", None))
    assert plan_to_json(load_plan(path))["pools"] == plan_to_json(load_plan(path, workload=loaded))["pools"]
    trace.write_text("p,o\n" + "100,50\n" * 2 + "900,50\n")
    with pytest.warns(UserWarning, match=r"mine\.csv has other requests than when .*plan\.json was made"):
        load_plan(path)
    trace.write_text("p,o\n" + "100,50\n" * 2 + "9000,50\n")
    with pytest.warns(UserWarning), pytest.raises(BadInput, match=r"pools\.1\.window_tokens: 1024 tokens: 33\.3333%"):
        load_plan(path)


def test_a_plan_is_written_whole_or_not_at_all(few, tmp_path):
    with pytest.raises(BadInput, match=r"^.*none/plan\.json: cannot be written: No such file"):
        save_plan(given_plan(fast(few)), tmp_path / "none" / "plan.json")
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------------- simulations


def test_a_simulation_comes_back_with_what_never_comes(few, tmp_path):
    plan, path = given_plan(fast(few)), tmp_path / "simulation.json"
    metrics = {
        "tok_per_j": Estimate(0.5, 0.4, 0.6),
        "ttft_p99_s": Estimate(math.inf, -math.inf, math.inf),
        "slo_attainment": Estimate(0.9, -math.inf, math.inf),
    }
    analytic = {"tok_per_j": 0.52, "ttft_p99_s": math.inf, "slo_attainment": None}
    simulation = Simulation(
        n_arrivals=300,
        n_completed=290,
        n_rejected=1,
        n_in_system=9,
        n_preemptions=0,
        n_iterations=1234,
        metrics=metrics,
        analytic=analytic,
        pools=(metrics, metrics),
        pools_analytic=(analytic, analytic),
        slo_held=False,
        warm_up_s=1.5,
        window_s=20.0,
        warmed_up=False,
        memory_bytes=10**6,
        n_replications=2,
        enough_requests=500,
    )
    how: dict[str, Any] = {"arrivals": "poisson", "seed": 3}
    save_simulation(simulation, plan, path, **how)
    assert load_simulation(path) == simulation
    document = json.loads(path.read_text())
    assert document["workload"] == plan_to_json(plan)["workload"]
    assert {name: document[name] for name in how} == how
    assert document["metrics"]["ttft_p99_s"] == {
        "analytic": None,
        "simulated": None,
        "ci95": [None, None],
        "agrees": None,
        "reading": "unclear",  # without a warm-up
        "suffices_replications": None,
    }
    assert document["verdict"] == "unclear" and document["n_replications"] == 2
    assert [(each["pool"], each["reading"]) for each in document["limits"]] == [(1, "unclear"), (2, "unclear")]
    assert [pool["n_instances"] for pool in document["pools"]] == [2, 3]
    for part in (document, *document["pools"]):  # as 0.1.0 wrote it
        part["metrics"]["ttft_p99_s"]["agrees"] = True
        for each in part["metrics"].values():
            del each["reading"], each["suffices_replications"]
    for name in ("schema", "warmed_up", "verdict", "limits", "enough_requests"):
        del document[name]
    path.write_text(json.dumps(document))
    assert load_simulation(path) == replace(simulation, warmed_up=True, enough_requests=0)
    assert simulation_to_json(simulation, plan)["arrivals"] == "renewal"
    path.write_text(json.dumps(document | {"n_arrivals": -1}))
    with pytest.raises(BadInput, match="n_arrivals = -1"):
        load_simulation(path)


# ------------------------------------------------------------------------------------------------- ledgers and schemas


def test_a_ledger_comes_back(tmp_path):
    rows = [
        LedgerRow("published", None, None, 5.58, 12.0, 14.1, 2.52, 4096, 2.0),
        LedgerRow("tail", "mean_prefill", "quantile", None, None, None, None, None, None),
    ]
    path = tmp_path / "ledger.json"
    about: dict[str, Any] = {"workload_name": "azure-cdf", "arrival_rate_per_s": 1000.0}
    save_ledger(rows, path, spec=EngineSpec("H100"), slo=make_slo(), **about)
    assert load_ledger(path) == rows
    document = json.loads(path.read_text())
    assert (document["gpu"], document["llm"], document["tp"]) == ("h100", "llama-3.1-70b", 8)
    assert document["slo"]["itl_s"] is None
    document["rows"][1]["gamma"] = -1
    path.write_text(json.dumps(document))
    with pytest.raises(BadInput, match=r"rows\.1\.gamma = -1"):
        load_ledger(path)


def test_every_file_has_a_schema():
    found = schemas({"scenario": PlanFile})
    assert next(iter(found)) == "scenario"
    assert found.keys() >= {"plan", "engine", "simulation", "CDF", "Hugging Face config", "row of measurements"}
    assert all(schema["title"] for schema in found.values())
