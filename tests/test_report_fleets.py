"""Pages of services that share a budget and of a day: what they say is in their documents, and what is refused."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report import Reader
from test_scenario import assert_refused, options_of, run
from test_services import CHAT, JOBS, TOP

import fleetopt_jax as fo
from fleetopt_jax._optimize.room import NEAR, room_of
from fleetopt_jax.cli.codes import OK
from fleetopt_jax.cli.scenario import scenario_text
from fleetopt_jax.core.files import to_json
from fleetopt_jax.documents.schedule import growth_to_json, schedule_to_json
from fleetopt_jax.documents.schedule_file import read_schedule_file
from fleetopt_jax.documents.services_file import read_services_file
from fleetopt_jax.report.schedule import schedule_decision
from fleetopt_jax.report.schedule_page import schedule_page
from fleetopt_jax.report.services import services_decision
from fleetopt_jax.report.services_page import services_page
from fleetopt_jax.workload.atoms import with_rate

BUDGET = "\n[budget]\ngpus_of = { h100 = 16, b200 = 8 }\nbuy = { b200 = 800 }\nbuy_usd_per_gpu_h = { b200 = 9.0 }\n"
RATES = [60.0, 0.0, 150.0, 90.0]
PRICES = [0.1, -0.02, 0.3, 0.2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With services that were planned, and how they were asked for."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "short.json").write_text("[[60, 0.4], [120, 0.8], [300, 1.0]]")
    (folder / "fleet.toml").write_text(TOP + BUDGET + CHAT + JOBS)
    (folder / "deep").mkdir()
    asked = ("--scenario", folder / "fleet.toml", "--objective", "usd")
    written = ("--out", folder / "services.json", "--save-scenario", folder / "deep" / "again.toml")
    code, _, err = run("services", *asked, *written)
    assert code == OK, err
    return folder


@pytest.fixture(scope="module")
def services(folder) -> dict[str, Any]:
    return json.loads((folder / "services.json").read_text())


@pytest.fixture(scope="module")
def found() -> fo.Schedule:
    chat = fo.make_workload([500, 4000], [200, 300], [0.9, 0.1], arrival_rate_per_s=20.0)
    problem = fo.make_problem(chat, [fo.EngineSpec("h100", source="projected")], n_pools=2, assume="published")
    day = fo.make_hours([20 * rate for rate in RATES], length_s=6 * 3600, usd_per_kwh=PRICES, kg_co2_per_kwh=0.4)
    answer = fo.schedule(problem, day)
    assert isinstance(answer, fo.Schedule)
    return answer


@pytest.fixture(scope="module")
def day(found, folder) -> dict[str, Any]:
    document = schedule_to_json(found) | {"growth": growth_to_json(fo.purchases(found, 2.0, 4), 2.0)}
    (folder / "day.json").write_text(to_json(document))
    return json.loads(to_json(document))


@pytest.mark.parametrize("name", ["services", "day"])
def test_a_page_is_written_of_the_document_alone(folder, services, day, name):
    """The decision first; nothing from outside; no scripts; what is not a number is not shown as one."""
    code, out, err = run("report", folder / f"{name}.json", "--out", folder / f"{name}.html", "--json")
    assert code == OK, err
    page = (folder / f"{name}.html").read_text()
    read = Reader(page)
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert (headings[0], headings[-1]) == ("The decision", "How to repeat it")
    assert len(read.all("svg")) == len(read.all("figcaption")) == 1
    assert not {"script", "link", "iframe"} & {tag for tag, _ in read.tags} and "default-src 'none'" in page
    text = " ".join(read.text)
    assert not re.search(r"\b(nan|inf|None|null)\b", text)
    shown = json.loads(out)
    assert list(shown) == [{"services": "services", "day": "schedule"}[name]]
    assert_among(next(iter(shown.values())), {"services": services, "day": day}[name])


def assert_among(shown: Any, document: Any) -> None:
    """What is shown is what the document says, as far as it goes; null where that says nothing."""
    if isinstance(shown, dict):
        for key, value in shown.items():
            assert key in document or value is None or value == [], key
            if key in document:
                assert_among(value, document[key])
    elif isinstance(shown, list):
        assert len(shown) == len(document)
        for one, other in zip(shown, document, strict=True):
            assert_among(one, other)
    else:
        assert shown == document


def tables(page: str) -> dict[str, list[list[str]]]:
    """Rows of every table, heads of rows with them, by the table's title."""
    found = re.findall(r'<table aria-label="(.*?)">.*?<tbody>(.*?)</tbody>', page)
    return {
        title: [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall("<tr>(.*?)</tr>", body)]
        for title, body in found
    }


def test_services_say_who_gets_what_and_what_to_buy(services, folder):
    page = services_page(read_services_file(folder / "services.json"))
    each = tables(page)
    for service, row in zip(services["services"], each["The services"], strict=True):
        kinds = [kind["gpu"] for kind in services["gpus"] if kind["used"]]
        assert row[: 1 + len(kinds)] == [service["name"], *(f"{service['gpus_of'].get(kind, 0):,}" for kind in kinds)]
    for kind, row in zip(services["gpus"], next(rows for title, rows in each.items() if "by kind" in title)):
        worth = [f"{more['saved']:,.4g}" for more in kind["worth"]]
        assert row == [
            *(kind["gpu"].upper(), f"{kind['stock']:,.0f}", f"{kind['used']:,}", f"{kind['bought']:,}"),
            *(f"{kind['may_buy']:,.0f}", f"${kind['usd_per_gpu_h']:,.2f}"),
            "-" if kind["buy_usd_per_gpu_h"] is None else f"${kind['buy_usd_per_gpu_h']:,.2f}",
            *worth,
        ]
    said = services_decision(services)
    assert list(said) == ["Use", "Buy", "Who", "What limits it", "What breaks first", "More GPUs", "How sure"]
    (bought,) = [kind for kind in services["gpus"] if kind["bought"]]
    assert f"{bought['bought']:,} {bought['gpu'].upper()} (for " in said["Buy"] and "Proved" in said["How sure"]


def test_what_breaks_first_carries_the_least_more(services):
    said = services_decision(services)["What breaks first"]
    first = min(services["services"], key=lambda each: each["room"]["rate_per_s"] / each["rate_per_s"])
    assert said.startswith(f"{first['name']}: load ") and f"({first['room']['rate_per_s']:,.0f} a second)" in said
    assert first["room"]["limit"] == "utilization" and first["room"]["rate_per_s"] > first["rate_per_s"]
    tight = copy.deepcopy(services)
    other = next(each for each in tight["services"] if each["name"] != first["name"])
    other["room"] = {"rate_per_s": 1.02 * other["rate_per_s"], "limit": "ttft_p99_s", "pool": 1}
    assert services_decision(tight)["What breaks first"].startswith(f"{other['name']}: P99 TTFT ")
    assert "2.0 % more requests" in services_decision(tight)["What breaks first"]


def test_the_room_is_where_a_limit_breaks(found):
    """Held at the rate that is said, broken a little above it, by another way of asking."""
    plan, rooms = found.scheduled.plan, {}
    for n in np.unique(found.scheduled.n_instances[found.hours.rate_per_s > 0], axis=0):
        room = room_of(plan, n)
        assert room is not None
        rooms[tuple(n)] = room.rate_per_s
        for times, holds in ((1.0, True), (1.0 + 3.0 * NEAR, False)):
            workload = with_rate(plan.problem.workload, times * room.rate_per_s)
            given = fo.evaluate_given(
                plan.problem.serving(workload=workload),
                plan.lanes,
                window_tokens=np.asarray(plan.fleet.window_tokens).tolist(),
                gamma=np.asarray(plan.fleet.gamma).tolist(),
                n_instances=n.tolist(),
            )
            assert (given.binding is None) == holds
            assert holds or given.binding.limit == room.limit
    assert room_of(plan, np.zeros(len(plan.lanes))) is None
    for t, rate in enumerate(found.hours.rate_per_s):
        assert not rate or rooms[tuple(found.scheduled.n_instances[t])] >= rate * (1 - NEAR)


def test_a_day_says_what_to_switch_when_and_what_it_saves(day, folder):
    page = schedule_page(read_schedule_file(folder / "day.json"))
    plan, static, said = day["plans"]["scheduled"], day["plans"]["static"], schedule_decision(day)
    assert list(said) == ["Own", "Buy", "Switch", "It saves", "What breaks first", "How sure"]
    assert said["Own"].startswith(f"{plan['n_gpus_owned']:,} H100")
    for pool in plan["pools"]:
        n = pool["n_instances"]
        for t, period in enumerate(day["periods"]):
            change = n[t] - n[t - 1]
            at = f"{period['start_s'] / 3600:02.0f}:00 ({n[t]:,} up)"
            assert (f"{abs(change):,} {'on' if change > 0 else 'off'} at {at}" in said["Switch"]) == bool(change)
    for name, amount in (("energy_kwh", "{:,.0f} kWh"), ("usd", "${:,.0f}"), ("kg_co2", "{:,.0f} kg")):
        saved = f"{100 * day['saves'][name]:.1f} %"
        assert saved in said["It saves"] and amount.format(static[name]) in said["It saves"]
    bought = [each["n_bought"] for each in day["growth"]["quarters"][1:]]
    for quarter, n in enumerate(bought, 1):
        assert (f"{n:,} in quarter {quarter}" in said["Buy"]) == (n > 0)
    each = tables(page)
    assert [row[0] for row in each["What is up when"]] == ["00:00-06:00", "06:00-12:00", "12:00-18:00", "18:00-24:00"]
    assert [row[3] for row in each["What is up when"]] == [f"{n:,}" for n in plan["n_gpus"]]
    assert [row[2] for row in each["2x a year"]] == [f"{q['n_gpus']:,}" for q in day["growth"]["quarters"]]
    rooms = [room and room["rate_per_s"] / p["rate_per_s"] for room, p in zip(plan["room"], day["periods"])]
    tight = min((t for t in range(4) if rooms[t]), key=lambda t: rooms[t])
    assert rooms[1] is None and said["What breaks first"].startswith(each["What is up when"][tight][0])


def test_what_is_typed_is_text(folder, services, day):
    hostile = "<script>alert(1)</script>"
    services, day = copy.deepcopy(services), copy.deepcopy(day)
    services["services"][0]["name"] = services["services"][0]["llm"] = hostile
    day["profile"]["name"] = day["workload"]["name"] = hostile
    for document, page, read in (
        (services, services_page, read_services_file),
        (day, schedule_page, read_schedule_file),
    ):
        path = folder / "hostile.json"
        path.write_text(json.dumps(document))
        written = page(read(path), [hostile])
        assert "<script" not in written and hostile in "".join(Reader(written).text)


def test_files_that_say_no_room_make_a_page_without(folder, services, day):
    """As those of before do."""
    services, day = copy.deepcopy(services), copy.deepcopy(day)
    for each in services["services"]:
        del each["room"]
    for name in ("room", "itl_s", "utilization"):
        del day["plans"]["scheduled"][name]
    del day["growth"], day["output_share"]
    both = (services, services_page, read_services_file), (day, schedule_page, read_schedule_file)
    for document, page, read in both:
        (folder / "before.json").write_text(json.dumps(document))
        written = page(read(folder / "before.json"))
        assert "What breaks first" not in written and "In words" in written


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("services", {"status": "infeasible"}, ["no fleets held"]),
        ("services", {"services": []}, ["services"]),
        ("services", {"metrics": None}, ["metrics"]),
        ("services", {"gpus": [{"gpu": "h100"}]}, ["gpus.0"]),
        ("services", {"schema": "fleetopt-services/2"}, ["schema"]),
        ("day", {"periods": [{"start_s": 0.0}]}, ["periods.0"]),
        ("day", {"periods": None}, ["periods"]),
        ("day", {"span_s": -1.0}, ["span_s = -1.0"]),
        ("day", {"plans": {}}, ["plans.static"]),
    ],
)
def test_a_wrong_file_is_refused_in_a_line(folder, services, day, name, change, says):
    path = folder / "wrong.json"
    path.write_text(json.dumps({"services": services, "day": day}[name] | change))
    assert_refused(run("report", path, "--out", folder / "wrong.html"), str(path), *says)
    assert not (folder / "wrong.html").exists()


def test_a_day_with_a_period_too_few_is_refused(folder, day):
    short = copy.deepcopy(day)
    short["plans"]["elastic"]["n_gpus"].pop()
    (folder / "wrong.json").write_text(json.dumps(short))
    assert_refused(run("report", folder / "wrong.json"), "plans.elastic", "each of the 4 periods")


@pytest.mark.parametrize("option", [("--rate", "5"), ("--simulate",), ("--workload", "azure-conv"), ("--seed", "3")])
def test_options_of_a_plan_are_refused(folder, services, option):
    assert_refused(run("report", folder / "services.json", *option), option[0], "fleetopt services wrote")


def test_services_that_are_saved_are_asked_for_again(folder, services):
    """The options of every service come back, and with them the answer."""
    saved = folder / "deep" / "again.toml"
    asked, again = (
        options_of("services", "--scenario", path, "--objective", "usd") for path in (folder / "fleet.toml", saved)
    )
    assert [each.name for each in again.services] == ["chat", "jobs"]
    for one, other in zip(asked.services, again.services, strict=True):
        assert (one.batch, one.end_to_end_s) == (other.batch, other.end_to_end_s)
        for its, others in zip(one.options, other.options, strict=True):
            differ = {key for key, value in vars(its).items() if value != getattr(others, key)}
            assert differ == {"scenario"}
    code, out, err = run("services", "--scenario", saved, "--json")
    assert code == OK, err
    found = json.loads(out)
    for name in ("status", "gpus", "limits", "metrics"):
        assert found[name] == services[name]
    for one, other in zip(found["services"], services["services"], strict=True):
        assert {key: value for key, value in one.items() if key != "plan"} == {
            key: value for key, value in other.items() if key != "plan"
        }


def test_what_a_service_has_of_its_own_is_saved(folder, monkeypatch):
    """Several LLMs, an end of its answers, files seen from another folder, a command line that overrides it all."""
    monkeypatch.chdir(folder)
    own = CHAT + 'end_to_end_s = 4.0\nllm = ["llama-3.1-8b", "my/config.json"]\nitl_ms = 40.0\ngpu = "b200"\n' + JOBS
    (folder / "own.toml").write_text(TOP + own)
    saved = Path("deep") / "own.toml"
    asked = options_of("services", "--scenario", "own.toml", "--rate", "7", "--save-scenario", saved)
    saved.write_text(scenario_text(asked))
    chat, jobs = options_of("services", "--scenario", saved).services
    assert [each.llm for each in chat.options] == ["llama-3.1-8b", "deep/../my/config.json"]
    assert (chat.end_to_end_s, chat.options[0].itl_ms, chat.options[0].gpu) == (4.0, 40.0, "b200")
    assert (jobs.batch, jobs.end_to_end_s, jobs.options[0].rate, chat.options[1].rate) == (True, 30.0, 7.0, 7.0)
