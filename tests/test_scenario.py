"""Scenario files: what is saved runs again, what is wrong is refused in one line, and nothing else ever happens."""

import contextlib
import functools
import io
import json
import math
import os
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from conftest import drop_compiled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleetopt_jax.cli.codes import BAD_INPUT, INFEASIBLE, OK
from fleetopt_jax.cli.main import main
from fleetopt_jax.cli.option import Option
from fleetopt_jax.cli.parser import make_parser
from fleetopt_jax.cli.scenario import SCHEMA, SECTIONS, Scenario, scenario_text, with_scenario
from fleetopt_jax.cli.synopsis import SEARCHES
from fleetopt_jax.cli.table import SECTIONS as TABLES
from fleetopt_jax.cli.table import TABLE, keys_of
from fleetopt_jax.cli.values import Number

parser = functools.cache(make_parser)  # it takes longer to make than to use

N_GENERATED = int(os.environ.get("FLEETOPT_SCENARIOS", "100"))  # of the long property test
EXAMPLES = sorted((Path(__file__).parents[1] / "experiments" / "scenarios").glob("*.toml"))


def run(*arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def assert_refused(answer: tuple[int, str, str], *says: str) -> None:
    code, out, err = answer
    assert (code, out, err.count("\n")) == (BAD_INPUT, "", 1), err
    for text in says:
        assert text in err


def write(folder: Path, content: str, name: str = "s.toml") -> Path:
    path = folder / name
    path.write_text(content)
    return path


def options_of(*arguments: object) -> Any:
    given = [str(argument) for argument in arguments]
    parser = make_parser()
    return with_scenario(parser, parser.parse_args(given), given)


# ------------------------------------------------------------------------------------------------------- every option


KEYS: list[tuple[str, str, Option]] = [
    (section.name, key, option) for section in TABLES for key, option in keys_of(section).items()
]


def test_every_option_of_a_search_is_in_the_scenario_and_the_other_way_round():
    parser = make_parser()
    assert {name: list(model.model_fields) for name, model in SECTIONS.items()} == {
        section.name: list(keys_of(section)) for section in TABLES
    }
    options = {name for command in SEARCHES for name in vars(parser.parse_args([command]))}
    of_the_run = {"command", "json", "out", "quiet", "verbose", "scenario", "save_scenario", "figure", "csv"}
    of_the_run |= {"warned", "read", "show", "workers", "address", "plans"}
    of_a_plan = {"plan", "plan_says"}
    assert {option.name for _, _, option in KEYS} == options - of_the_run - of_a_plan


def taken_by_file(section: str, key: str, value: Any) -> bool:
    try:
        Scenario.model_validate(tomllib.loads(tomli_w.dumps({"schema": SCHEMA, section: {key: value}})))
    except ValueError:
        return False
    return True


def taken_by_option(option: Option, value: Any) -> bool:
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            parser().parse_args([option.commands[0], f"{option.where}={value}"])
        except SystemExit:
            return False
    return True


def test_the_options_and_the_scenario_have_the_same_ranges():
    """A value is taken by the option if and only if the scenario takes it."""
    values = [-1, 0, 1e-7, 0.5, 1, 1.5, 7, 65, 2.0**31, 1e10]
    checked = set()
    for section, key, option in KEYS:
        number = getattr(option.kind, "of", option.kind)
        if not isinstance(number, Number):
            continue
        for value in values:
            typed = int(value) if number.whole and value == int(value) else value
            assert taken_by_file(section, key, typed) == taken_by_option(option, typed), (key, value)
        checked.add(option.name)
    assert checked >= {"rate", "tp", "gamma", "pue", "robust_level", "max_kg_co2_per_h", "window", "seed"}


def test_the_options_and_the_scenario_know_the_same_choices():
    schema = Scenario.model_json_schema()["$defs"]
    for command in SEARCHES:
        for name, said in vars(parser().parse_args([command])).items():
            for section, key, option in KEYS:
                if option.name == name and isinstance(said, str):
                    listed = [said] if "array" in str(schema[f"{section.title()}Section"]["properties"][key]) else said
                    assert taken_by_file(section, key, listed), (name, said)
    assert taken_by_file("search", "objective", "co2")
    assert not taken_by_file("search", "objective", "joy")


@pytest.mark.parametrize(
    "arguments",
    [
        ("pareto", "--axis", "workload-rate=1,2.5", "--workload", "azure-code", "--objectives", "usd_per_h,ttft_p99_s"),
        ("pareto", "--points", "7", "--ttft-p99-ms", "900"),
        ("levers", "--next-gpu", "b200", "--other-llm", "qwen3-32b", "--all-pairs", "--objective", "usd"),
        ("ledger", "--workload", "lmsys-cdf", "--gpu", "b200", "--window", "65536"),
    ],
)
def test_every_command_saves_what_it_was_asked(tmp_path, arguments):
    saved = tmp_path / "saved.toml"
    asked = make_parser().parse_args([*arguments, "--save-scenario", str(saved)])
    saved.write_text(scenario_text(asked))
    again = options_of(arguments[0], "--scenario", saved)
    differ = {key for key, value in vars(asked).items() if value != getattr(again, key)}
    assert differ == {"scenario", "save_scenario"}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_understood(example):
    command = "services" if "[[service]]" in example.read_text() else "optimize"
    assert options_of(command, "--scenario", example).ttft_p99_ms > 0


def test_only_what_is_lost_is_warned_of(tmp_path):
    full = tmp_path / "full.toml"
    full.write_text(scenario_text(make_parser().parse_args(["optimize", "--save-scenario", str(full)])))
    assert options_of("pareto", "--scenario", full).warned == []
    lost = write(tmp_path, f'schema = "{SCHEMA}"\n[search]\nobjective = "usd"\n')
    (said,) = options_of("pareto", "--scenario", lost).warned
    assert "not an option of pareto: objective" in said


def test_what_is_saved_is_what_was_asked(tmp_path):
    arguments = [
        *("optimize", "--workload", "azure-code", "--rate", "12.5", "--gpu", "h100,b200", "--tp", "2,8"),
        *("--precision", "bf16,fp8", "--gamma", "auto", "--pools", "3", "--ttft-p99-ms", "750", "--itl-ms", "60"),
        *(
            "--gpus-of",
            "b200=64",
            "--max-power-kw",
            "300.5",
            "--max-kg-co2-per-h",
            "40",
            "--free",
            "clock",
            "--method",
            "gradient",
            "--verify",
        ),
        *("--robust", "cvar", "--robust-workloads", "azure-conv,lmsys-cdf", "--seed", "7"),
    ]
    saved = tmp_path / "saved.toml"
    asked = make_parser().parse_args([*arguments, "--save-scenario", str(saved)])
    saved.write_text(scenario_text(asked))
    again = options_of("optimize", "--scenario", saved)
    differ = {key for key, value in vars(asked).items() if value != getattr(again, key)}
    assert differ == {"scenario", "save_scenario"}


def test_the_command_line_overrides_the_file(tmp_path):
    path = write(tmp_path, f'schema = "{SCHEMA}"\n[workload]\nrate = 5.0\n[search]\nverify = true\npools = 3\n')
    options = options_of("optimize", "--scenario", path, "--rate", "9", "--no-verify")
    assert (options.rate, options.verify, options.pools) == (9.0, False, 3)


def test_files_are_found_from_where_the_scenario_lies(tmp_path):
    (tmp_path / "deep").mkdir()
    path = write(tmp_path / "deep", f'schema = "{SCHEMA}"\n[workload]\nname = "mine.csv"\n')
    options = options_of("optimize", "--scenario", path)
    assert options.workload == str(tmp_path / "deep" / "mine.csv")
    options.save_scenario = str(tmp_path / "copy.toml")
    (tmp_path / "copy.toml").write_text(scenario_text(options))
    saved = tomllib.loads((tmp_path / "copy.toml").read_text())
    assert saved["workload"]["name"] == str(tmp_path / "deep" / "mine.csv")  # absolute stays absolute


# ------------------------------------------------------------------------------------------------ what is wrong in it


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", ["is empty"]),
        ("[workload]\nrate = 5\n", ["schema", "required"]),
        ('schema = "fleetopt-scenario/2"\n', ["line 1", "schema"]),
        (f'schema = "{SCHEMA}"\n[workload]\nrate = -200\n', ["line 3", "workload.rate = -200"]),
        (f'schema = "{SCHEMA}"\n[workload]\nrate = "5"\n', ["line 3", "valid number"]),
        (f'schema = "{SCHEMA}"\n[workload]\nrate = true\n', ["line 3", "valid number"]),
        (f'schema = "{SCHEMA}"\n[workload]\nrate = nan\n', ["line 3", "workload.rate"]),
        (f'schema = "{SCHEMA}"\n[workload]\nspeed = 5\n', ["line 3", "workload.speed", "known: name, rate"]),
        (f'schema = "{SCHEMA}"\n[limit]\nitl_ms = 5\n', ["line 2", "limit", "known: schema, workload"]),
        (f'schema = "{SCHEMA}"\n[engines]\ntp = [8, 99]\n', ["line 3", "engines.tp.1 = 99"]),
        (f'schema = "{SCHEMA}"\n[workload]\nrate = 5\nrate = 6\n', ["is not TOML", "line 4"]),
        (f'schema = "{SCHEMA}"\n[workload\n', ["is not TOML", "line 2"]),
        ("a = " + "[" * 20000, ["is not TOML"]),
        (f'schema = "{SCHEMA}"\nworkload.rate = -1\n', ["line 2", "workload.rate = -1"]),
    ],
)
def test_one_line_says_what_is_wrong_and_where(tmp_path, content, says):
    path = write(tmp_path, content)
    assert_refused(run("optimize", "--scenario", path), str(path), *says)


def test_a_value_that_another_command_does_not_take_is_blamed_on_the_file(tmp_path):
    path = write(tmp_path, f'schema = "{SCHEMA}"\n[engines]\ntp = [4, 8]\n')
    assert_refused(run("ledger", "--scenario", path), str(path), "--tp: '4,8'", "as ledger takes it")


def test_a_scenario_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "s.toml"
    path.write_bytes('schema = "\xe9"'.encode("latin-1"))
    assert_refused(run("optimize", "--scenario", path), str(path), "UTF-8")
    assert_refused(run("optimize", "--scenario", tmp_path / "none.toml"), "no such file")


def test_a_file_is_not_asked_for_twice(tmp_path):
    path = tmp_path / "x.toml"
    assert_refused(run("optimize", "--out", path, "--save-scenario", path), "--save-scenario", "--out writes it")
    assert not path.exists()


def test_an_output_is_not_an_input(tmp_path):
    path = write(tmp_path, "prompt_tokens,output_tokens\n10,5\n", "mine.csv")
    assert_refused(run("optimize", "--workload", path, "--rate", "1", "--out", path), "--out", "read")
    assert path.read_text().startswith("prompt_tokens")


# ------------------------------------------------------------------------------------------------------ 10,000 of them

TRACE = "prompt_tokens,output_tokens\n" + "".join(
    f"{p},{o}\n" for p, o in [(100, 50), (400, 80), (900, 20), (7000, 300)]
)
VALID: dict[str, dict[str, list[Any]]] = {
    "workload": {"rate": [1.0, 40.0, 2000.0, 1e-6, 1e9]},
    "engines": {"gpu": [["h100"], ["b200"], ["h100", "b200"], ["H100"]], "max_num_seqs": [1, 64, 10**6]},
    "limits": {
        "ttft_p99_ms": [1e-3, 200.0, 500, 1e9],
        "ttft_ms_per_1k": [0.0, 100.0],
        "itl_ms": [1e-3, 60, 1e6],
        "window": [1, 7300, 8192, 10**9],
    },
    "budget": {"max_gpus": [1, 64.0], "max_power_kw": [0.5, 1e5], "max_usd_per_h": [1.0, 1e6]},
    "site": {"pue": [1.0, 1.3, 1e9], "host_w_per_gpu": [0.0, 150.0], "usd_per_kwh": [0.0, 1e6]},
    "compression": {"compress_success": [0.0, 0.7, 1.0]},
    "search": {"pools": [1, 2], "gamma": [1.0, 1.5, 10.0]},
}
COMPILED = [  # choices that compile anew, a few together
    {"assume": "published"},
    {"assume": "published", "objective": "usd"},
    {"assume": "physical"},
    {"assume": "physical,kv_cache=reserved", "objective": "gpus", "dispatch": "random"},
    {"assume": "nonsense"},
    {"assume": "physical,kv_cache=paged,x"},
]
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=30),
    st.lists(st.integers(-9, 99), max_size=3),
    st.sampled_from(["", "nan", "../../etc/passwd", "$(id)", "\u202e", "h100,h100", "a" * 300, "{}", "%s%n"]),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)


@st.composite
def scenarios(draw) -> bytes:
    """A valid scenario, and often something wrong in it: a value, a key, a table, or the text itself."""
    document: dict[str, Any] = {"schema": SCHEMA, "workload": {"name": "TRACE", "rate": 40.0}}
    for section, keys in VALID.items():
        for key in draw(st.sets(st.sampled_from(sorted(keys)), max_size=2)):
            document.setdefault(section, {})[key] = draw(st.sampled_from(keys[key]))
    document["search"] = document.get("search", {}) | draw(st.sampled_from(COMPILED))
    for _ in range(draw(st.integers(0, 3))):
        section = draw(st.sampled_from([*SECTIONS, "other"]))
        known = sorted(SECTIONS[section].model_fields) if section in SECTIONS else ["x"]
        key, value = draw(st.sampled_from([*known, "odd key"])), draw(JUNK)
        table = document.get(section, {})
        if value is None and isinstance(table, dict):
            document[section] = {name: kept for name, kept in table.items() if name != key}
        elif isinstance(table, dict) and draw(st.booleans()):
            document[section] = table | {key: value}
        elif value is not None:
            document[section] = value
    try:
        text = tomli_w.dumps(document).encode()
    except (ValueError, TypeError, UnicodeEncodeError):
        text = repr(document).encode(errors="replace")
    if draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.binary(max_size=8)) + text[at + draw(st.integers(0, 4)) :]
    return text


def no_nan(constant: str) -> None:
    raise AssertionError(f"{constant} in the output")


@pytest.mark.slow
@settings(
    max_examples=N_GENERATED, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
@given(scenarios())
def test_generated_scenarios_end_in_0_2_or_3(text):
    """No traceback, no NaN, one line where it is refused, and nothing left behind."""
    counts["all"] += 1
    drop_compiled()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "s.toml")
        path.write_bytes(text.replace(b"TRACE", b"[b][trace.csv"))
        Path(folder, "[b][trace.csv").write_text(TRACE)
        code, out, err = run("optimize", "--scenario", path, "--json", "--method", "exact", "--no-verify")
        if code == OK and counts["all"] % 7 == 0:
            assert "[b][trace.csv" in run("trace", Path(folder, "[b][trace.csv"))[1]
        assert code in (OK, BAD_INPUT, INFEASIBLE), err
        assert "Traceback" not in err
        counts[code] = counts.get(code, 0) + 1
        if code == BAD_INPUT:
            refusals = [line for line in err.splitlines() if ": warning: " not in line]
            assert (out, len(refusals)) == ("", 1), (out, err)
        else:
            plan = json.loads(out, parse_constant=no_nan)
            assert plan["status"] in ("optimal", "feasible", "infeasible")
            if code == OK:
                assert math.isfinite(plan["metrics"]["tok_per_j"])
        assert sorted(os.listdir(folder)) == ["[b][trace.csv", "s.toml"]


counts: dict[Any, int] = {"all": 0}


@pytest.mark.slow
def test_generated_scenarios_reach_every_exit_code():
    """What the property above ran, were it not all refused at the door."""
    if counts["all"] < 80:
        pytest.skip("the property test has not run")
    assert counts.get(OK, 0) > 2 and counts.get(BAD_INPUT, 0) > 2 and counts.get(INFEASIBLE, 0) > 2


def test_files_of_a_scenario_are_relative_to_it():
    found = {option.name for option in TABLE if option.file == "named" and option.section}
    of_engines = {"gpu", "prefill_gpu", "decode_gpu", "llm", "catalog", "other_llm", "speculate"}
    assert found == of_engines | {"workload", "prefix_hit", "robust_workloads", "profile", "prices", "carbon"}
