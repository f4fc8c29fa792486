"""Fronts of several services and stricter promises: against separate searches, and what is refused."""

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from test_scenario import assert_refused, run
from test_services import SAME, asked, specs

import fleetopt_jax as fo
from fleetopt_jax._optimize.services import NoServicesPlan, Purchase, Services, ServicesPlan, with_promise
from fleetopt_jax._optimize.services_front import PromiseFront, ServicesFront, StricterPromises
from fleetopt_jax.cli.codes import INFEASIBLE, OK
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.documents.services_front import (
    promise_front_to_json,
    services_front_to_json,
    stricter_to_json,
)
from fleetopt_jax.report.services_front import (
    promise_front_figure,
    promise_front_table,
    services_front_csv,
    services_front_figure,
    services_front_takeaway,
    stricter_said,
)

SITE = fo.make_surroundings(fo.make_site(kg_co2_per_kwh=0.4))
LIMITS_S = (2e-3, 3.5e-3, 4e-3, 5e-3, 0.1)  # of which the first is out of reach, and the third binds
SHARE = 0.2


def two_services(times: float = 1.0, *, code_s: float = 0.1, **how) -> dict[str, fo.Problem]:
    return {
        "chat": asked(specs(), 2.4e4 * times, 96.0, surroundings=SITE, **how),
        "code": asked(specs(), 3.6e4 * times, 64.0, ttft_p99_s=code_s, surroundings=SITE, **how),
    }


def with_dear_b200(usd_per_gpu_h: float = 20.0, **how) -> Services:
    """The frugal GPU costs money: carbon and cost part."""
    purchases = {"b200": Purchase(400, usd_per_gpu_h)}
    return fo.make_services(two_services(**how), budget=fo.make_budget(gpus_of={"b200": 8}), purchases=purchases)


def searched(services: Services) -> ServicesPlan:
    answer = fo.optimize_services(services, worth=False)
    assert isinstance(answer, ServicesPlan)
    return answer


@pytest.fixture(scope="module")
def front() -> ServicesFront:
    found = fo.services_front(with_dear_b200())
    assert isinstance(found, ServicesFront)
    return found


@pytest.fixture(scope="module")
def along() -> PromiseFront:
    return fo.promise_front(fo.make_services(two_services(1 / 30, code_s=5e-3)), "code", LIMITS_S)


@pytest.fixture(scope="module")
def promises() -> StricterPromises:
    return fo.stricter(fo.make_services(two_services(1 / 30, code_s=5e-3)), SHARE)


def test_every_point_is_what_a_search_by_its_weights_finds(front):
    assert front.certified and front.complete and len(front.points) >= 3
    for point in front.points:
        again = searched(point.plan.services)
        assert again.cost == pytest.approx(point.plan.cost, rel=SAME)
        assert again.status == point.plan.status == "optimal"
        total = point.plan.total
        assert point.values == pytest.approx((float(total.kg_co2_per_h), float(total.usd_per_h)), rel=SAME)


def test_the_ends_are_the_best_of_each_objective(front):
    ends = front.points[0].values[0], front.points[-1].values[1]
    for objective, end in zip(("co2", "usd"), ends, strict=True):
        problems = two_services(objective=objective)
        named = fo.make_services(problems, budget=front.services.budget, purchases=front.services.purchases)
        assert end == pytest.approx(searched(named).objective, rel=1e-6)


def test_no_point_is_dominated_and_all_are_on_the_convex_hull(front):
    values = np.array([point.values for point in front.points])
    steps = np.diff(values, axis=0)
    assert np.all(steps[:, 0] > 0) and np.all(steps[:, 1] < 0)
    slopes = steps[:, 1] / steps[:, 0]
    assert np.all(np.diff(slopes) > 0)
    assert front.knee is None or 0 < front.knee < len(values) - 1


def test_no_weighting_finds_a_plan_below_the_front(front):
    """Of weights that the front never asked for, the best is one of its points."""
    values = np.array([point.values for point in front.points])
    for usd in (1e-3, 3e-3, 1e-2, 3e-2):
        problems = two_services(objective=fo.Weights(kg_co2_per_h=1.0, usd_per_h=usd))
        best = searched(fo.make_services(problems, budget=front.services.budget, purchases=front.services.purchases))
        assert best.cost == pytest.approx(np.min(values @ [1.0, usd]), rel=1e-9)


def test_few_searches_say_that_there_may_be_more(front):
    few = fo.services_front(front.services, n_points=3)
    assert isinstance(few, ServicesFront)
    assert few.n_searches == 3 < front.n_searches and not few.complete
    assert {point.values for point in few.points} <= {point.values for point in front.points}


def test_carbon_is_power_so_that_tokens_per_joule_say_the_same():
    """Against tokens per joule one plan is the best in both."""
    found = fo.services_front(with_dear_b200(), ("kg_co2_per_h", "tok_per_j"))
    assert isinstance(found, ServicesFront) and len(found.points) == 1
    assert "one plan is the best in both" in services_front_takeaway(services_front_to_json(found, found.objectives))


# ------------------------------------------------------------------------------------------------ limits and promises


def test_each_limit_is_a_search_of_its_own_and_tighter_never_gives_more(along):
    found = [None if isinstance(answer, NoServicesPlan) else answer.objective for answer in along.answers]
    for limit, answer in zip(LIMITS_S, found, strict=True):
        again = fo.optimize_services(fo.make_services(two_services(1 / 30, code_s=limit)), worth=False)
        assert isinstance(again, NoServicesPlan) == (answer is None)
        if isinstance(again, ServicesPlan):
            assert answer == pytest.approx(again.objective, rel=SAME)
    held = [each for each in found if each is not None]
    assert found[0] is None and held == sorted(held) and held[0] < held[-1]


def test_a_limit_that_no_fleet_holds_has_its_reason(along):
    none = along.answers[0]
    assert isinstance(none, NoServicesPlan)
    assert (none.service, none.binding.limit) == ("code", "ttft_p99_s")
    document = promise_front_to_json(along)
    first, *others = document["rows"]
    assert (first["status"], first["tok_per_j"]) == ("infeasible", None)
    assert all(row["reached_s"] <= row["ttft_p99_s"] * (1 + SAME) and row["certified"] for row in others)
    assert promise_front_table(document) and promise_front_figure(document).axes


def test_limits_that_nobody_gives_are_around_what_is_asked():
    found = fo.promise_front(fo.make_services(two_services(1 / 30)), "chat", n_points=5)
    assert found.ttft_p99_s == pytest.approx([0.3 / 4, 0.3 / 2, 0.3, 0.6, 1.2])
    assert 0.3 in found.ttft_p99_s


def test_a_stricter_promise_is_a_search_by_hand(promises):
    present = promises.present
    assert isinstance(present, ServicesPlan)
    assert [one.service for one in promises.each] == ["chat", "code"]
    code = promises.each[1]
    assert (code.was_s, code.is_s) == pytest.approx((5e-3, 4e-3))
    by_hand = searched(fo.make_services(two_services(1 / 30, code_s=4e-3)))
    extra = promises.extra(code)
    assert extra is not None
    for name in ("n_gpus", "power_w", "usd_per_h", "kg_co2_per_h"):
        difference = float(getattr(by_hand.total, name)) - float(getattr(present.total, name))
        assert float(getattr(extra, name)) == pytest.approx(difference, rel=SAME, abs=1e-9)
    assert float(extra.power_w) > 0  # by the objective, it costs something
    costs_nothing = promises.extra(promises.each[0])
    assert costs_nothing is not None and float(costs_nothing.power_w) == 0.0


def test_what_no_fleet_holds_is_said_of_a_stricter_promise():
    found = fo.stricter(fo.make_services(two_services(1 / 30, code_s=5e-3)), 0.6)
    (_, code), metrics = stricter_to_json(found)["each"], {"n_gpus": 1, "power_w": 1.0, "usd_per_h": 1.0}
    assert (code["status"], code["extra"], code["certified"]) == ("infeasible", None, True)
    said = stricter_said(code, metrics)
    assert said == "Code with a P99 TTFT of 2 ms instead of 5 ms: no fleet holds it."
    assert stricter_said(code | {"why": "too slow"}, metrics).endswith("no fleet holds it (too slow).")
    held = code | {"extra": {"n_gpus": 8.0, "power_w": 2e3, "usd_per_h": -4.0}}
    assert "8 GPUs more, 2 kW more and 4 USD/h less" in stricter_said(held, metrics)


def test_another_promise_leaves_the_itl_what_it_had():
    """Where answers end is kept, so that an ITL that followed from it follows again; and a batch has its deadline."""
    problems = two_services(1 / 30)
    services = fo.make_services(problems, end_to_end_s={"chat": 5.0, "code": 3.0}, batch=["code"])
    again = with_promise(with_promise(services, "chat", ttft_p99_s=0.1), "chat", ttft_p99_s=0.3)
    assert repr(again) == repr(services) and again.each[1] is services.each[1]
    tighter = fo.make_services(problems, end_to_end_s={"chat": 5.0, "code": 2.4}, batch=["code"])
    assert repr(with_promise(services, "code", end_to_end_s=2.4)) == repr(tighter)
    found = fo.stricter(services, SHARE)
    assert [(one.promise, one.is_s) for one in found.each] == [
        ("ttft_p99_s", pytest.approx(0.24)),
        ("end_to_end_s", pytest.approx(2.4)),
    ]


def test_one_service_only_is_fine():
    alone = fo.make_services({"chat": two_services()["chat"]})
    found = fo.services_front(alone)
    assert isinstance(found, ServicesFront) and found.certified
    assert len(fo.stricter(alone).each) == 1


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda s: fo.services_front(s, ("usd_per_hour", "n_gpus")), "unknown name 'usd_per_hour'; did you mean usd_"),
        (lambda s: fo.services_front(s, ("n_gpus", "n_gpus")), "need two different ones of"),
        (lambda s: fo.services_front(s, ("n_gpus",)), "need two different ones of"),
        (lambda s: fo.services_front(s, n_points=2), "need n_points >= 3, got 2"),
        (lambda s: fo.promise_front(s, "chatt"), "unknown name 'chatt'; did you mean chat"),
        (lambda s: fo.promise_front(s, "chat", [0.0]), "need positive, finite limits"),
        (lambda s: fo.promise_front(s, "chat", []), "at least one"),
        (lambda s: fo.stricter(s, 1.0), "need a share between 0 and 1"),
    ],
)
def test_what_is_wrong_is_refused(ask, says):
    with pytest.raises(ValueError, match=re.escape(says)) as refusal:
        ask(fo.make_services(two_services()))
    assert "\n" not in str(refusal.value)


def test_carbon_needs_an_intensity_and_a_batch_has_no_ttft():
    no_carbon = {"chat": asked(specs(), 2.4e4, 96.0)}
    with pytest.raises(BadInput, match="kg_co2_per_kwh: 0; need more"):
        fo.services_front(fo.make_services(no_carbon))
    batch = fo.make_services(no_carbon, end_to_end_s={"chat": 30.0}, batch=["chat"])
    with pytest.raises(BadInput, match="is a batch, which is promised a deadline alone"):
        fo.promise_front(batch, "chat")


# ------------------------------------------------------------------------------------------------- on the command line

SCENARIO = """schema = "fleetopt-scenario/1"

[engines]
gpu = ["h100", "b200"]

[site]
kg_co2_per_kwh = 0.4

[budget]
gpus_of = { b200 = 16 }
buy = { b200 = 800 }
buy_usd_per_gpu_h = { b200 = 20.0 }

[search]
assume = "published"
objective = "usd"

[[service]]
name = "chat"
workload = "short.json"
rate = 30000.0
ttft_p99_ms = 5

[[service]]
name = "jobs"
class = "batch"
deadline_s = 30
workload = "short.json"
rate = 20000.0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fronts")
    (folder / "short.json").write_text("[[60, 0.4], [120, 0.8], [300, 1.0]]")
    (folder / "fleet.toml").write_text(SCENARIO)
    return folder


def services(folder: Path, *more: object) -> tuple[int, str, str]:
    return run("services", "--scenario", folder / "fleet.toml", *more)


def test_a_front_on_the_command_line(folder):
    made = {name: folder / f"front.{name}" for name in ("svg", "json", "csv")}
    written = ("--figure", made["svg"], "--out", made["json"], "--csv", made["csv"])
    code, out, err = services(folder, "--front", "kg_co2_per_h,usd_per_h", "--json", *written)
    assert code == OK, err
    document = json.loads(out)
    assert document == json.loads(made["json"].read_text()) and made["svg"].stat().st_size > 0
    assert document["schema"] == "fleetopt-services-front/1" and document["certified"]
    assert all(point["plan"]["schema"] == "fleetopt-services/1" for point in document["points"])
    rows = list(csv.DictReader(io.StringIO(made["csv"].read_text())))
    assert made["csv"].read_text() == services_front_csv(document)
    assert [float(row["usd_per_h"]) for row in rows] == pytest.approx(
        [point["objectives"]["usd_per_h"] for point in document["points"]], rel=1e-8
    )
    assert len(rows) > 1 and services_front_figure(document).axes


def test_limits_and_stricter_promises_on_the_command_line(folder):
    code, out, err = services(folder, "--front", "ttft-p99-ms:chat=2,4,5", "--json", "--csv", folder / "along.csv")
    assert (code, err.count("\n")) == (OK, 1) and "infeasible at 2 ms: service chat" in err
    document = json.loads(out)
    assert document["schema"] == "fleetopt-promise-front/1" and document["asked_s"] == 5e-3
    assert document["rows"][0]["status"] == "infeasible" and document["rows"][0]["why"]
    assert len((folder / "along.csv").read_text().splitlines()) == 4
    code, out, err = services(folder, "--stricter", "20%")
    assert code == OK, err
    assert "Chat with a P99 TTFT of 4 ms instead of 5 ms: " in out
    assert "Jobs with a deadline of 24 s instead of 30 s: costs nothing." in out
    assert services(folder, "--front", "ttft-p99-ms:chat=1,2", "--quiet")[0] == INFEASIBLE


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--front", "carbon,usd_per_h"], ["--front", "invalid choice: 'carbon'", "kg_co2_per_h"]),
        (["--front", "usd_per_hour,n_gpus"], ["did you mean usd_per_h"]),
        (["--front", "usd_per_h"], ["need two of"]),
        (["--front", "ttft-p99-ms"], ["ttft-p99-ms:SERVICE"]),
        (["--front", "ttft:chat"], ["did you mean ttft-p99-ms"]),
        (["--front", "ttft-p99-ms:chta"], ["unknown name 'chta'", "did you mean chat", "known: chat, jobs"]),
        (["--front", "ttft-p99-ms:jobs"], ["'jobs' is a batch", "deadline alone"]),
        (["--front", "ttft-p99-ms:chat=0"], ["ttft-p99-ms: 0", "positive"]),
        (["--front", "ttft-p99-ms:chat="], ["--front", "ttft-p99-ms:SERVICE[=V1,V2,...]"]),
        (["--front", "usd_per_h,n_gpus", "--stricter", "5%"], ["--stricter", "not read with --front"]),
        (["--front", "usd_per_h,kg_co2_per_h", "--kg-co2-per-kwh", "0"], ["--kg-co2-per-kwh", "to count carbon"]),
        (["--stricter", "2"], ["--stricter", "need a share"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folder, more, says):
    assert_refused(services(folder, *more), *says)
