"""Levers over services: against searches by hand, against the levers of one fleet, and what is left out or refused."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_scenario import assert_refused, run
from test_services import KINDS, SAME, asked, specs

import fleetopt_jax as fo
from fleetopt_jax._optimize.changes import PROMPT_FRAC
from fleetopt_jax._optimize.levers import pull_levers
from fleetopt_jax._optimize.problem import Problem
from fleetopt_jax._optimize.releasing import release
from fleetopt_jax._optimize.services import NoServicesPlan, Services, ServicesPlan
from fleetopt_jax._optimize.services_levers import ALREADY, NO_TIME, ServicesLevers, SharedLever
from fleetopt_jax.cli.codes import INFEASIBLE, OK
from fleetopt_jax.core.files import to_json
from fleetopt_jax.documents.services_levers import services_levers_to_json
from fleetopt_jax.fleet.assumptions import PHYSICAL, PUBLISHED
from fleetopt_jax.laws.compression import make_compressor
from fleetopt_jax.report.services_levers import (
    services_levers_csv,
    services_levers_figure,
    services_levers_table,
    services_levers_takeaway,
)

STOCK = 24  # of B200: too few for both services
ONLY = {"h100": 96}  # of the 120 that the two take who may have no others
OWN_LENGTHS = replace(PUBLISHED, lengths=PHYSICAL.lengths)  # outputs are the requests' own, so that prompts may shrink


def two_services(**how) -> dict[str, Problem]:
    return {"chat": asked(specs(), 2.4e4, 96.0, **how), "code": asked(specs(), 3.6e4, 64.0, ttft_p99_s=0.1, **how)}


def scarce(**changed: Problem) -> Services:
    return fo.make_services(two_services() | changed, budget=fo.make_budget(gpus_of={"b200": STOCK}))


def searched(services: Services) -> ServicesPlan:
    answer = fo.optimize_services(services, worth=False)
    assert isinstance(answer, ServicesPlan)
    return answer


def pulled(found: ServicesLevers, name: str, *who: str) -> SharedLever:
    return next(one for one in found.each if (one.name, tuple(one.levers)) == (name, who))


def why_not(found: ServicesLevers, name: str, service: str) -> str:
    return next(each.why for each in found.left_out if (each.name, each.service) == (name, service))


@pytest.fixture(scope="module")
def levers() -> ServicesLevers:
    return fo.services_levers(scarce())


def test_a_lever_is_a_search_of_all_services_with_it_released(levers):
    """Gamma for one and for both, under the same budget."""
    now = searched(scarce())
    asked_for = two_services()
    for who in (("chat",), ("code",), ("chat", "code")):
        by_hand = searched(scarce(**{name: replace(asked_for[name], gamma=None) for name in who}))
        one = pulled(levers, "gamma", *who)
        assert levers.gain(one) == pytest.approx(now.cost / by_hand.cost, rel=SAME) and levers.certified(one)
        assert isinstance(one.answer, ServicesPlan) and one.answer.n_gpus_of == by_hand.n_gpus_of


def test_widening_never_loses_and_more_services_never_gain_less(levers):
    gains = [levers.gain(one) for one in levers.each]
    assert gains == sorted(gains, reverse=True) and min(gains) >= 1.0 and max(gains) > 1.0
    for name in {one.name for one in levers.each}:
        both = levers.gain(pulled(levers, name, "chat", "code"))
        assert both >= max(levers.gain(pulled(levers, name, who)) for who in ("chat", "code"))


def test_gpus_that_a_lever_frees_go_to_the_others(levers):
    """Code compresses, and chat takes its B200s; what changes sums to what all take more."""
    one = pulled(levers, "gamma", "code")
    changed = levers.gpus_changed(one)
    assert changed["code"]["b200"] < 0 < changed["chat"]["b200"]
    assert isinstance(one.answer, ServicesPlan) and isinstance(levers.present.answer, ServicesPlan)
    for kind, n in one.answer.n_gpus_of.items():
        more = sum(of.get(kind, 0) for of in changed.values())
        assert more == n - levers.present.answer.n_gpus_of[kind]
    assert one.answer.n_gpus_of["b200"] <= STOCK


def test_without_a_budget_a_lever_on_one_service_is_the_search_of_that_one():
    problems = two_services()
    found = fo.services_levers(fo.make_services(problems))
    cost = {name: fo.require_plan(fo.optimize(problem)).cost for name, problem in problems.items()}
    for name, problem in problems.items():
        alone = fo.require_plan(fo.optimize(replace(problem, gamma=None))).cost
        gain = sum(cost.values()) / (sum(cost.values()) - cost[name] + alone)
        assert found.gain(pulled(found, "gamma", name)) == pytest.approx(gain, rel=SAME)
        assert list(found.gpus_changed(pulled(found, "gamma", name))) == [name]  # the other has its best fleet


def test_of_one_service_they_are_its_levers():
    problem = asked(specs()[:1], 2.4e4, 96.0, n_pools=1)
    of_one = pull_levers(problem, next_gpu="b200")
    found = fo.services_levers(fo.make_services({"chat": problem}), next_gpu="b200")
    gains = {each.pulled.names[0]: each.gain for each in of_one.gains}
    assert {one.name: found.gain(one) for one in found.each} == pytest.approx(gains, rel=SAME)
    assert {"routing", "gamma", "pools", "generation"} == set(gains)
    quality = {each.pulled.names[0]: each.quality for each in of_one.gains}
    assert {one.name: found.quality(one) for one in found.each} == quality
    assert {each.name: each.why for each in found.left_out} == of_one.left_out


def test_another_generation_is_there_without_limit_and_may_make_promises_hold():
    """Too few H100s for both: the present fleets do not hold what is promised; B200s for one of them are enough."""
    old, new = ([fo.EngineSpec(gpu, source="projected")] for gpu in KINDS)
    problems = {"chat": asked(old, 4e5, 96.0, n_pools=1), "code": asked(old, 4e5, 64.0, n_pools=1)}
    found = fo.services_levers(fo.make_services(problems, budget=fo.make_budget(gpus_of=ONLY)), next_gpu="b200")
    assert isinstance(found.present.answer, NoServicesPlan) and found.present.answer.proved
    one = pulled(found, "generation", "chat")
    assert isinstance(one.answer, ServicesPlan) and found.without_end(one) == ("b200",)
    assert found.gain(one) is None and found.gpus_changed(one) == {}
    by_hand = problems | {"chat": asked(new, 4e5, 96.0, n_pools=1)}
    again = searched(fo.make_services(by_hand, budget=fo.make_budget(gpus_of=ONLY)))
    assert one.answer.cost == pytest.approx(again.cost, rel=SAME)
    assert list(pulled(found, "generation", "chat", "code").answer.services.kinds) == ["b200"]
    document = services_levers_to_json(found)
    assert "these make it: B200 for all" in services_levers_takeaway(document)
    assert services_levers_table(document) and len(services_levers_csv(document).splitlines()) == 1 + len(found.each)
    assert [lever["metrics"] is None for lever in document["levers"]] == [one.total is None for one in found.each]


def test_what_does_not_apply_to_a_service_is_said():
    """One has two pools by now, the other may have B200s, and no prompts of theirs are known to repeat."""
    both = [fo.EngineSpec(gpu, source="projected") for gpu in KINDS]
    problems = {"chat": asked(both[:1], 2.4e4, 96.0, n_pools=1), "code": asked(both, 3.6e4, 64.0)}
    found = fo.services_levers(fo.make_services(problems), next_gpu="b200")
    assert [tuple(one.levers) for one in found.each if one.name in ("routing", "generation")] == [("chat",)] * 2
    assert why_not(found, "routing", "code") == why_not(found, "generation", "code") == ALREADY
    assert "prefill = free_chunks" in why_not(found, "clock", "chat")
    assert "neither block hashes nor sessions" in why_not(found, "prefix_cache", "code")
    document = services_levers_to_json(found)
    assert {"name": "routing", "service": "code", "why": ALREADY} in document["left_out"]


def test_a_lever_is_released_in_those_ways_that_it_applies_to():
    """Of a service that may be served in one pool, or in two on other GPUs."""
    ways = [asked(specs()[:1], 2.4e4, 96.0, n_pools=1), asked(specs()[1:], 2.4e4, 96.0, n_pools=2)]
    found = fo.services_levers(fo.make_services({"chat": ways}, budget=fo.make_budget(gpus_of={"b200": 16})))
    one = pulled(found, "routing", "chat")
    first, second = one.answer.services.each[0].ways
    assert first.n_pools == 2 and second is ways[1]
    assert found.gain(one) >= 1.0


# ----------------------------------------------------------------------------------------------------- what compresses


def compressing(j_per_token: float, *, s_per_token: float = 0.0, **budget) -> Services:
    around = fo.make_surroundings(
        fo.make_site(usd_per_kwh=0.1), make_compressor(s_per_token=s_per_token, j_per_token=j_per_token)
    )
    problems = {
        "chat": asked(specs(), 2.4e4, 96.0, OWN_LENGTHS, n_pools=1, surroundings=around),
        "jobs": asked(specs(), 3.6e4, 64.0, OWN_LENGTHS, n_pools=1, surroundings=around),
    }
    return fo.make_services(problems, budget=fo.make_budget(**budget), end_to_end_s={"jobs": 30.0}, batch=["jobs"])


@pytest.mark.slow
def test_what_compresses_counts_in_the_gain_and_in_the_budget():
    services = compressing(1e-3)
    found = fo.services_levers(services)
    one = pulled(found, "compression", "chat", "jobs")
    assert isinstance(one.answer, ServicesPlan) and one.total is not None
    extra_w = 0.0
    for problem in (each.asked[0] for each in services.each):
        workload = problem.workload
        prompt = float(np.sum(np.asarray(workload.weight) * np.asarray(workload.prompt_tokens)))
        extra_w += 1e-3 * prompt * float(workload.arrival_rate_per_s)
    assert one.extra_w == pytest.approx(extra_w)
    assert float(one.total.power_w) == pytest.approx(float(one.answer.total.power_w) + extra_w)
    assert float(one.total.usd_per_h - one.answer.total.usd_per_h) == pytest.approx(extra_w / 1e3 * 0.1)
    output = [
        sum(float(plan.metrics.output_tok_per_s) for plan in each.plans) for each in (one.answer, searched(services))
    ]
    assert output[0] == pytest.approx(output[1], rel=1e-9)
    present_w = float(searched(services).total.power_w)
    assert found.gain(one) == pytest.approx(present_w / float(one.total.power_w), rel=1e-9)
    power_w = float(one.answer.total.power_w)
    tight = fo.services_levers(compressing(1e-3, max_power_w=power_w + 1.01 * extra_w))
    assert pulled(tight, "compression", "chat", "jobs").total is not None
    tighter = fo.services_levers(compressing(1e-3, max_power_w=power_w + 0.99 * extra_w))
    assert pulled(tighter, "compression", "chat", "jobs").total is None


@pytest.mark.slow
def test_the_time_of_compressing_is_taken_from_a_deadline():
    """A TTFT limit that does not grow with the prompt leaves none; of a batch the deadline does."""
    found = fo.services_levers(compressing(0.0, s_per_token=0.01))
    assert "compressing takes longer" in why_not(found, "compression", "chat")
    one = pulled(found, "compression", "jobs")
    jobs, then = found.services.each[1], one.answer.services.each[1]
    longest = float(np.max(np.asarray(jobs.asked[0].workload.prompt_tokens)))
    assert then.end_to_end_s == pytest.approx(30.0 - 0.01 * longest)
    assert float(np.max(np.asarray(then.ways[0].workload.prompt_tokens))) == np.ceil(PROMPT_FRAC * longest)
    assert why_not(fo.services_levers(compressing(0.0, s_per_token=1.0)), "compression", "jobs") == NO_TIME


def test_a_lever_alone_is_released_as_in_the_levers_of_one_fleet():
    """The very problem: compressed prompts, by the limits of the prompts as they came."""
    services = compressing(0.0)
    one = pulled(fo.services_levers(services), "compression", "chat")
    by_hand, _ = release(services.each[0].asked[0], [one.levers["chat"]], services.each[0].asked[0].specs)
    (way,) = one.answer.services.each[0].ways
    assert repr(way) == repr(by_hand)


# ------------------------------------------------------------------------------------------------- shown, and commanded


def test_the_document_is_json_and_is_shown(levers):
    document = json.loads(to_json(services_levers_to_json(levers)))
    assert document["schema"] == "fleetopt-services-levers/1"
    assert document["present"]["schema"] == "fleetopt-services/1"
    best, metrics = document["levers"][0], document["present"]["metrics"]
    assert best["released_for"] == ["chat", "code"] and best["certified"]
    assert best["metrics"]["tok_per_j"] / metrics["tok_per_j"] == pytest.approx(best["gain"])
    said = services_levers_takeaway(document)
    assert said.startswith(f"2 services: most comes from gamma for all, {best['gain']:.2f}x; for one of them alone")
    assert "where the GPUs of chat change too" in said
    assert services_levers_table(document) and services_levers_figure(document).axes
    rows = list(csv.DictReader(io.StringIO(services_levers_csv(document))))
    assert [float(row["gain"]) for row in rows] == pytest.approx([each["gain"] for each in document["levers"]])
    for row, each in zip(rows, document["levers"], strict=True):
        assert row["released_for"].split(";") == each["released_for"]
        assert int(row["gpus_b200"]) == sum(fleet["gpus_of"].get("b200", 0) for fleet in each["fleets"])


SCENARIO = """schema = "fleetopt-scenario/1"

[engines]
gpu = "h100"

[budget]
gpus_of = { h100 = 400 }

[search]
assume = "published"
pools = 1

[levers]
services = true

[[service]]
name = "chat"
workload = "short.json"
rate = 30000.0

[[service]]
name = "jobs"
class = "batch"
deadline_s = 30
workload = "short.json"
rate = 20000.0
pools = 2
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("levers")
    (folder / "short.json").write_text("[[60, 0.4], [120, 0.8], [300, 1.0]]")
    (folder / "fleet.toml").write_text(SCENARIO)
    (folder / "plan.toml").write_text(SCENARIO.replace("[levers]\nservices = true\n", ""))
    return folder


def test_levers_on_the_command_line(folder):
    made = {name: folder / f"levers.{name}" for name in ("svg", "json", "csv")}
    written = ("--figure", made["svg"], "--out", made["json"], "--csv", made["csv"])
    code, out, err = run("services", "--scenario", folder / "fleet.toml", "--json", *written)
    assert code == OK, err
    document = json.loads(out)
    assert document == json.loads(made["json"].read_text()) and made["svg"].stat().st_size > 0
    assert made["csv"].read_text() == services_levers_csv(document)
    generation = [each for each in document["levers"] if each["name"] == "generation"]
    assert {tuple(each["released_for"]) for each in generation} == {("chat",), ("jobs",), ("chat", "jobs")}
    assert all(each["without_end"] == ["b200"] for each in generation)
    assert document["levers"][-1]["gain"] < 1.0  # which replaces, and may lose
    code, out, err = run("services", "--scenario", folder / "plan.toml", "--levers")
    assert (code, err) == (OK, "")
    words = " ".join(out.split())
    assert "2 services: most comes from FleetOpt for all" in words
    assert "Nothing (within 1%): context routing; more pools." in words
    assert "Left out for jobs, routing: it has that already, or may have it." in words
    assert "B200: no stock of B200 is given, so that there are as many as it takes." in words


def test_what_no_fleets_hold_is_said_in_one_line(folder):
    """Too few H100s, whatever is released of them; and with no lever that is another GPU, nothing makes it."""
    few = ("--gpus-of", "h100=8", "--next-gpu", "h100")
    code, out, err = run("services", "--scenario", folder / "fleet.toml", *few, "--json")
    assert (code, err.count("\n")) == (INFEASIBLE, 1)
    assert "the present fleets: the services together do not hold what they are promised with 8 H100" in err
    document = json.loads(out)
    assert document["present"]["why"] and all(each["gain"] is None for each in document["levers"])
    assert all("8 H100" in each["why"] and "\n" not in each["why"] for each in document["levers"])
    code, out, err = run("services", "--scenario", folder / "fleet.toml", *few, "--figure", folder / "none.svg")
    assert code == INFEASIBLE and "no single lever makes it" in out and not (folder / "none.svg").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--levers", "--front", "usd_per_h,n_gpus"], ["--levers", "not read with --front"]),
        (["--levers", "--stricter", "5%"], ["--stricter", "not read with --levers"]),
        (["--levers", "--plans", "plans"], ["--plans", "not read with --levers"]),
        (["--levers", "--next-gpu", "b400"], ["--next-gpu", "unknown name 'b400'"]),
        (["--levers", "--other-llm", "gpt-9"], ["--other-llm", "unknown name 'gpt-9'"]),
        (["--lever"], ["--lever"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folder, more, says):
    assert_refused(run("services", "--scenario", folder / "plan.toml", *more), *says)


def test_what_only_levers_and_fronts_read_is_said_to_be_unread(folder):
    unread = ("--next-gpu", "h100", "--other-llm", "llama-3.1-8b", "--points", "5")
    code, _, err = run("services", "--scenario", folder / "plan.toml", *unread)
    assert code == OK
    for name, other in (("--next-gpu", "--levers"), ("--other-llm", "--levers"), ("--points", "--front")):
        assert f"{name} is not read without {other}" in err


def test_float32_is_refused(monkeypatch):
    monkeypatch.setattr("fleetopt_jax._optimize.services_levers.require_float64", _refuse)
    with pytest.raises(ValueError, match="services_levers"):
        fo.services_levers(scarce())


def _refuse(name: str) -> None:
    raise ValueError(name)
