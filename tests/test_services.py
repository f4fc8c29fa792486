"""Services that share a budget: the exact search against every combination of fleets, and what is refused."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from brute_force import AllFleets, few_lengths, with_less_kv
from test_scenario import assert_refused, run

import fleetopt_jax as fo
from fleetopt_jax._optimize.problem import Problem
from fleetopt_jax._optimize.services import SHARES, NoServicesPlan, Purchase, Services, ServicesPlan, longest_answer
from fleetopt_jax.cli.codes import INFEASIBLE, OK
from fleetopt_jax.fleet.assumptions import PHYSICAL, PUBLISHED, Assumptions

SAME = 1e-9
KINDS = ("h100", "b200")


def specs(tps: Sequence[int] = (8,), source: str = "projected", times: float = 64.0) -> list[fo.EngineSpec]:
    return [with_less_kv(fo.EngineSpec(gpu, tp=tp, source=source), times) for gpu in KINDS for tp in tps]  # pyright: ignore


@pytest.fixture(scope="module")
def published() -> list[fo.EngineSpec]:
    return specs()


def asked(
    engines: Sequence[fo.EngineSpec],
    rate: float,
    longest: float,
    assumptions: Assumptions = PUBLISHED,
    *,
    n_pools: int = 2,
    **more,
) -> Problem:
    return fo.make_problem(
        few_lengths(rate, longest),
        list(engines),
        n_pools=n_pools,
        slo=fo.make_slo(ttft_p99_s=more.pop("ttft_p99_s", 0.3)),
        assume="published" if assumptions == PUBLISHED else "physical",
        assumptions=assumptions,
        **more,
    )


class Everything:
    """All fleets of a service by what they take: GPUs of each kind, watts, USD an hour [M, 4]."""

    def __init__(self, problem: Problem, windows: np.ndarray):
        fleets = AllFleets(problem, windows)
        columns = [fleets.used(fo.Weights(gpus_of={kind: 1.0})) for kind in KINDS]
        columns += [fleets.used(fo.Weights(power_w=1.0)), fleets.used(fo.Weights(usd_per_h=1.0))]
        self.takes = np.unique(np.stack([column[fleets.kept] for column in columns], axis=1), axis=0)


def sums(each: Sequence[Everything]) -> np.ndarray:
    """What all combinations take, a fleet of each service [M, 4]."""
    total = np.zeros((1, 4))
    for service in each:
        total = (total[:, None] + service.takes[None]).reshape(-1, 4)
    return total


def least(total: np.ndarray, services: Services) -> float:
    """The least cost of all combinations that keep the budget; inf without any."""
    budget, usd = services.budget, total[:, 3].copy()
    kept = (total[:, :2].sum(axis=1) <= budget.max_gpus) & (total[:, 2] <= budget.max_power_w * (1 + SAME))
    for kind, stock in budget.gpus_of:
        over = np.maximum(0.0, total[:, KINDS.index(kind)] - stock)
        purchase = services.purchases.get(kind, Purchase(0.0, 0.0))
        kept &= over <= purchase.most
        usd += over * (services.surcharge(kind) if kind in services.purchases else 0.0)
    kept &= usd <= budget.max_usd_per_h * (1 + SAME)
    cost = {"tok_per_j": total[:, 2], "usd": usd, "gpus": total[:, :2].sum(axis=1)}[str(services.any.objective)]
    return float(np.min(np.where(kept, cost, np.inf)))


def assert_best(answer: ServicesPlan | NoServicesPlan, best: float) -> None:
    assert isinstance(answer, NoServicesPlan) == (not np.isfinite(best))
    if isinstance(answer, ServicesPlan):
        assert answer.cost == pytest.approx(best, rel=SAME)
        assert answer.status == "optimal" and answer.search.gap == 0.0
        assert_kept(answer)


def assert_kept(answer: ServicesPlan) -> None:
    """Every service holds its limits, and all together keep the budget."""
    assert all(plan.binding is None for plan in answer.plans)
    budget, total = answer.services.budget, answer.total
    assert float(total.power_w) <= budget.max_power_w * (1 + SAME)
    assert float(total.usd_per_h) <= budget.max_usd_per_h * (1 + SAME)
    assert float(total.n_gpus) <= budget.max_gpus
    for kind, n in answer.n_gpus_of.items():
        assert n <= answer.services.most_of.get(kind, np.inf)


def budgets_of(free: ServicesPlan) -> list[tuple[dict[str, Any], dict[str, Purchase]]]:
    """Budgets and what may be bought, from none to too small, by what the services take without."""
    gpus, power_w, usd = (float(getattr(free.total, name)) for name in ("n_gpus", "power_w", "usd_per_h"))
    half = round(gpus / 16) * 8
    return [
        ({}, {}),
        ({"gpus_of": {"b200": 0}}, {}),
        ({"gpus_of": {"b200": half - 4}}, {}),
        ({"gpus_of": {"b200": half, "h100": 1.5 * half}}, {}),
        ({"gpus_of": {"b200": half, "h100": 2 * half}}, {}),
        ({"gpus_of": {"b200": 8, "h100": 16}}, {}),
        ({"max_gpus": 1.1 * gpus}, {}),
        ({"max_gpus": 1.2 * gpus, "gpus_of": {"b200": half}}, {}),
        ({"max_usd_per_h": 0.9 * usd, "gpus_of": {"h100": 2 * half}}, {}),
        ({"max_power_w": 1.2 * power_w, "max_gpus": 1.3 * gpus, "gpus_of": {"b200": half}}, {}),
        ({"max_power_w": 0.8 * power_w}, {}),
        ({"gpus_of": {"b200": half}}, {"b200": Purchase(16, 9.0)}),
        ({"gpus_of": {"b200": 16, "h100": half}}, {"b200": Purchase(24, 9.0), "h100": Purchase(4 * half, 30.0)}),
        ({"gpus_of": {"b200": 16, "h100": half}, "max_usd_per_h": 1.2 * usd}, {"b200": Purchase(4 * half, 12.0)}),
        ({"gpus_of": {"b200": 0, "h100": 0}}, {"b200": Purchase(8, 12.0)}),
    ]


@pytest.mark.parametrize("objective", ["tok_per_j", pytest.param("usd", marks=pytest.mark.slow)])
def test_two_and_three_services_are_the_best_of_all_combinations(published, objective):
    """Every fleet of one or two pools with any whole window, of two and of three services."""
    problems = {
        "chat": asked(published, 2.4e4, 96.0, objective=objective),
        "code": asked(published, 3.6e4, 64.0, objective=objective, ttft_p99_s=0.1),
        "jobs": asked(published, 1.6e4, 40.0, objective=objective, ttft_p99_s=10.0),
    }
    each = [Everything(problem, np.arange(1.0, problem.window_tokens + 1)) for problem in problems.values()]
    seen = set()
    for n in (2, 3):
        some, total = dict(list(problems.items())[:n]), sums(each[:n])
        assert len(total) > 10_000
        free = fo.optimize_services(fo.make_services(some), worth=False)
        assert isinstance(free, ServicesPlan)
        for budget, purchases in budgets_of(free):
            services = fo.make_services(some, budget=fo.make_budget(**budget), purchases=purchases)
            answer = fo.optimize_services(services, worth=False)
            assert_best(answer, least(total, services))
            seen.add((n, answer.status))
    assert seen == {(n, status) for n in (2, 3) for status in ("optimal", "infeasible")}


@pytest.mark.parametrize("stock", [16, 40])
def test_three_pools_of_one_service_are_what_the_search_of_one_problem_finds(published, stock):
    """Which lists whole fleets under its budget otherwise, and finds more in three pools than in two."""
    problem = asked(published, 2e4, 1600.0, n_pools=3)
    budget = fo.make_budget(gpus_of={"b200": stock})
    alone = fo.optimize(replace(problem, budget=budget))
    answer = fo.optimize_services(fo.make_services({"chat": problem}, budget=budget), worth=False)
    assert isinstance(answer, ServicesPlan) and fo.is_plan(alone)
    assert len(alone.lanes) == 3
    assert_best(answer, alone.cost)


@pytest.mark.slow
def test_physical_services_are_the_best_of_all_combinations():
    """Two services by the physical laws, each of one or two pools with any whole window on two kinds of GPU."""
    engines = [with_less_kv(fo.EngineSpec(gpu, tp=2), 64.0) for gpu in KINDS]
    problems = {
        "chat": asked(engines, 900.0, 96.0, PHYSICAL, ttft_p99_s=0.5),
        "jobs": asked(engines, 600.0, 64.0, PHYSICAL, ttft_p99_s=5.0),
    }
    total = sums([Everything(each, np.arange(1.0, each.window_tokens + 1)) for each in problems.values()])
    free = fo.optimize_services(fo.make_services(problems), worth=False)
    assert isinstance(free, ServicesPlan)
    for budget, purchases in budgets_of(free):
        services = fo.make_services(problems, budget=fo.make_budget(**budget), purchases=purchases)
        assert_best(fo.optimize_services(services, worth=False), least(total, services))


def test_what_more_gpus_are_worth_is_what_another_search_finds(published):
    """And never less than nothing; prices are 0 where a limit does not bind."""
    problems = {"chat": asked(published, 2.4e4, 96.0), "code": asked(published, 3.6e4, 64.0, ttft_p99_s=0.1)}

    def answer(b200: float, **how) -> ServicesPlan:
        budget = fo.make_budget(gpus_of={"b200": b200, "h100": 500})
        found = fo.optimize_services(fo.make_services(problems, budget=budget), **how)
        assert isinstance(found, ServicesPlan)
        return found

    few = answer(24.0)
    assert few.prices["gpus_of.b200"] > 0.0 == few.prices["gpus_of.h100"]
    for each in few.worth:
        more = answer(24.0 + each.n_gpus, worth=False).cost if each.kind == "b200" else few.cost
        assert each.certified and each.saved == pytest.approx(few.cost - more, abs=1e-6)
    assert [each.saved > 0 for each in few.worth if each.kind == "b200"] == [False, True]


@pytest.mark.slow
def test_a_deadline_is_kept_however_it_is_split_and_several_llms_are_tried(published):
    """A batch is served no dearer than by any one split, and of two LLMs the better is taken."""
    llms = [[replace(each, llm=llm) for each in published] for llm in ("llama-3.1-70b", "llama-3.1-8b")]
    ways = [asked([replace(each, laws=None) for each in engines], 50.0, 800.0, n_pools=1) for engines in llms]
    asked_for = fo.make_services({"jobs": ways}, end_to_end_s={"jobs": 20.0}, batch=["jobs"])
    (service,) = asked_for.each
    assert len(service.ways) == 2 * len(SHARES)
    answer = fo.optimize_services(asked_for, worth=False)
    alone = [fo.optimize(way) for way in service.ways]
    assert answer.cost == pytest.approx(min(plan.cost for plan in alone if fo.is_plan(plan)), rel=SAME)
    (plan,) = answer.plans
    pools = plan.metrics.pools
    assert np.all(np.asarray(pools.ttft_p99_s) + longest_answer(plan.problem) * np.asarray(pools.itl_s) <= 20.0)


# ------------------------------------------------------------------------------------------------- on the command line

TOP = """schema = "fleetopt-scenario/1"

[engines]
gpu = ["h100", "b200"]

[search]
assume = "published"
"""
CHAT = """
[[service]]
name = "chat"
workload = "short.json"
rate = 3000.0
"""
JOBS = """
[[service]]
name = "jobs"
class = "batch"
deadline_s = 30
workload = "short.json"
rate = 2000.0
pools = 1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With a workload of 300 tokens at most."""
    folder = tmp_path_factory.mktemp("services")
    (folder / "short.json").write_text("[[60, 0.4], [120, 0.8], [300, 1.0]]")
    return folder


def services(folder: Path, text: str, *more: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command on a scenario."""
    (folder / "fleet.toml").write_text(text)
    return run("services", "--scenario", folder / "fleet.toml", *more)


def test_a_scenario_becomes_a_plan_of_each_service(folder):
    """Who gets what is in the document, adds up, and each service's plan is one that `evaluate` reads."""
    budget = "\n[budget]\ngpus_of = { h100 = 16, b200 = 8 }\nbuy = { b200 = 800 }\nbuy_usd_per_gpu_h = { b200 = 9.0 }\n"
    made = {name: folder / f"services.{name}" for name in ("svg", "json")}
    written = ("--figure", made["svg"], "--out", made["json"], "--plans", folder / "plans")
    code, out, err = services(folder, TOP + budget + CHAT + JOBS, "--objective", "usd", "--json", *written)
    assert code == OK, err
    document = json.loads(out)
    assert document == json.loads(made["json"].read_text()) and made["svg"].stat().st_size > 0
    assert (document["schema"], document["status"]) == ("fleetopt-services/1", "optimal")
    assert [each["class"] for each in document["services"]] == ["interactive", "batch"]
    for kind in document["gpus"]:
        of_each = [each["gpus_of"].get(kind["gpu"], 0) for each in document["services"]]
        assert kind["used"] == sum(of_each) <= kind["stock"] + kind["bought"]
        assert kind["worth"][0]["n_gpus"] == 1 and all(more["saved"] >= 0 for more in kind["worth"])
    total = sum(each["usd_per_h"] for each in document["services"]) + document["metrics"]["surcharge_usd_per_h"]
    assert document["metrics"]["usd_per_h"] == pytest.approx(total, rel=SAME)
    chat, jobs = document["services"]
    assert chat["ttft_p99_s"] <= 0.5 < 30.0 >= jobs["ends_s"]
    code, out, err = run("evaluate", folder / "plans" / "chat.json", "--json")
    assert code == OK and json.loads(out)["metrics"]["power_w"] == pytest.approx(chat["power_w"], rel=1e-6), err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (TOP, ["there are no services", "need a file with [[service]] tables"]),
        (TOP + CHAT + CHAT, ["two services are called 'chat'"]),
        (TOP + CHAT + "speed = 3\n", ["line 13", "speed", "known: "]),
        (TOP + CHAT + "\n[[service]]\nname = 'b'\nrat = 1\n", ["line 16", "rat", "did you mean "]),
        (TOP + CHAT + "ttft_p99_ms = -5\n", ["line 13", "ttft_p99_ms"]),
        (TOP + CHAT.replace("short", "shirt"), ["service 'chat'", "shirt.json", "no such file"]),
        (TOP + CHAT + 'class = "batch"\n', ["service 'chat'", "no deadline_s"]),
        (TOP + CHAT + "deadline_s = 3\n", ["service 'chat'", "deadline_s is of class batch"]),
        (TOP + JOBS + "itl_ms = 30\n", ["service 'jobs'", "class batch with itl_ms"]),
        (TOP + CHAT + "end_to_end_s = 0.4\n", ["service 'chat'", "0.4 s", "the TTFT limit takes all"]),
        (TOP + CHAT + 'llm = "deepseek-v3"\ntp = 1\n', ["service 'chat'", "does not fit"]),
        (TOP + "\n[budget]\ngpus_of = { a100 = 3 }\n" + CHAT, ["a100=3", "no service may be of a100"]),
        (TOP + "\n[budget]\nbuy = { b200 = 3 }\n" + CHAT, ["b200", "no stock of it is given"]),
        (TOP + "\n[budget]\nbuy_usd_per_gpu_h = { b200 = 9 }\n" + CHAT, ["b200", "none may be bought"]),
        (
            TOP + "\n[budget]\ngpus_of = { b200 = 3 }\nbuy = { b200 = 3 }\nbuy_usd_per_gpu_h = { b200 = 1 }\n" + CHAT,
            ["b200=1", "one in stock costs 8 USD/h"],
        ),
        (TOP.replace("published", "physical") + '\n[limits]\nslo_scope = "fleet"\n' + CHAT, ["'chat'", "--slo-scope"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folder, text, says):
    assert_refused(services(folder, text), *says)


def test_other_commands_say_which_reads_services(folder):
    (folder / "fleet.toml").write_text(TOP + CHAT)
    assert_refused(run("optimize", "--scenario", folder / "fleet.toml"), "[[service]]", "need fleetopt services")


@pytest.mark.parametrize(
    ("budget", "more", "says"),
    [
        ("gpus_of = { h100 = 8, b200 = 8 }", "", ["the services together", "8 B200 and 8 H100", "what would do"]),
        ("max_gpus = 20", "", ["the services together", "20 GPUs", "what would do", "GPUs instead"]),
        ("max_power_kw = 100", "ttft_p99_ms = 1e-3\n", ["service chat", "a P99 TTFT of 0.001 ms"]),
        ("gpus_of = { b200 = 0 }", 'gpu = "b200"\n', ["service chat", "with 0 B200"]),
    ],
)
def test_what_cannot_be_kept_is_infeasible_and_says_what_would_do(folder, budget, more, says):
    code, out, err = services(folder, f"{TOP}\n[budget]\n{budget}\n{JOBS}{CHAT}{more}", "--json")
    assert (code, err.count("\n")) == (INFEASIBLE, 1), err
    assert json.loads(out)["status"] == "infeasible"
    for text in says:
        assert text in err
