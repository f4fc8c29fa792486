"""The table of options: what is made from it agrees, and nothing of it is said twice."""

import argparse
import contextlib
import functools
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fleetopt_jax.cli.codes import BAD_INPUT
from fleetopt_jax.cli.fields import FLAGS, said_as_options
from fleetopt_jax.cli.parser import make_parser
from fleetopt_jax.cli.reference import options_table
from fleetopt_jax.cli.repeat import command_said
from fleetopt_jax.cli.synopsis import ALL, COMMANDS, PLANNED
from fleetopt_jax.cli.table import AXES, MIN_CLOCK_FRAC, SECTIONS, TABLE, keys_of, options_of
from fleetopt_jax.cli.values import Number, flag
from fleetopt_jax.laws import clocks

parser = functools.cache(make_parser)  # it takes longer to make than to use

README = (Path(__file__).parents[1] / "README.md").read_text()
NEEDED = {"trace": ["azure-conv"], "calibrate": ["m.csv"], "export": ["plan.json", "--to", "vllm"]}
NEEDED |= {command: ["plan.json"] for command in PLANNED}
NEEDED["compare"] += ["--observed", "observed.csv"]


def parse(command: str, *words: str) -> argparse.Namespace:
    return parser().parse_args([command, *NEEDED.get(command, []), *words])


def refusal(command: str, *words: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as stop:
        parse(command, *words)
    assert (stop.value.code, said.getvalue().count("\n")) == (BAD_INPUT, 1)
    return said.getvalue()


# ---------------------------------------------------------------------------------------------------------- the table


def test_a_command_takes_an_option_in_one_way():
    for command in ALL:
        names = [option.name for option in options_of(command)]
        assert len(names) == len(set(names)), command
        assert set(names) <= vars(parse(command)).keys()
    assert {command for option in TABLE for command in option.commands} == set(ALL)


def test_ways_to_take_an_option_agree_on_what_it_stands_for():
    for option in TABLE:
        if option.section:
            widest = keys_of(option.section)[option.key or option.name]
            assert option.name == widest.name
            assert (option.field, option.file, option.of_plan) == (widest.field, widest.file, widest.of_plan)


def test_a_key_is_in_one_section():
    keys = [option.name for section in SECTIONS for option in keys_of(section).values()]
    assert len(keys) == len(set(keys))


def test_a_default_is_a_value_the_option_takes():
    for option in TABLE:
        if option.default is None or option.usual == "" or option.nargs is not None:
            continue
        for command in option.commands:
            again = parse(command, *option.kind.words(option.name, option.kind.kept(option.default)))
            assert getattr(again, option.name) == getattr(parse(command), option.name) == option.default, option.name


def test_what_is_typed_comes_back_through_a_scenario():
    """kept, then typed, then parsed: the same value."""
    for command, words in (
        ("optimize", ("--tp=2,4", "--gpu=h100,b200", "--gamma=auto", "--gpus-of=h100=64,b200=0.5", "--free=clock")),
        ("optimize", ("--rate=0.1", "--gamma=1.5", "--verify", "--robust-workloads=a,b.csv", "--seed=7")),
        (
            "optimize",
            ("--serve=any", "--prefill-gpu=h100:tp=4:clock=0.8,h200", "--decode-gpu=own.json:max_num_seqs=64"),
        ),
        ("pareto", ("--axis=tp=1,8", "--objectives=usd_per_h,ttft_p99_s")),
        ("levers", ("--tp=2", "--gpu=b200", "--all-pairs")),
    ):
        asked = parse(command, *words)
        kept = {option.name: option.kind.kept(getattr(asked, option.name)) for option in options_of(command)}
        said = [option for option in options_of(command) if option.section and kept[option.name] is not None]
        again = parse(command, *(word for option in said for word in option.kind.words(option.name, kept[option.name])))
        assert vars(again) == vars(asked)
        _, ran, *repeated = shlex.split(command_said(asked))
        assert ran == command and vars(parse(command, *repeated)) == vars(asked)


# ---------------------------------------------------------------------------------------------------------- its kinds


@pytest.mark.parametrize(
    ("number", "taken", "refused", "says"),
    [
        (Number(0, open=True), ["1e-9", "1e300"], ["0", "-1", "inf", "nan"], "a positive, finite number"),
        (Number(0), ["0", "5"], ["-1e-9", "inf", "nan"], "a finite number >= 0"),
        (Number(0, 1), ["0", "1"], ["-0.1", "1.1", "nan"], "a number from 0 to 1"),
        (Number(0, 1, open=True), ["0.1"], ["0", "1", "nan"], "a number between 0 and 1"),
        (Number(1, 6, whole=True), ["1", "6"], ["0", "7", "1.0", "two", "9" * 5000], "a whole number from 1 to 6"),
        (Number(1, 9, unit="km"), ["1"], ["0"], "a number from 1 to 9 km"),
    ],
)
def test_a_number_takes_its_range_and_says_it(number, taken, refused, says):
    for text in taken:
        assert number.parse(text) == float(text)
        assert number.parse(number.typed(number.parse(text))) == number.parse(text)
    for text in refused:
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(f"is not allowed: need {says}")):
            number.parse(text)
    with pytest.raises(argparse.ArgumentTypeError):
        number.parse("abc")


def test_a_list_is_refused_by_the_value_that_is_wrong():
    assert "'x' is not allowed: need a whole number from 1 to 64" in refusal("optimize", "--tp", "2,x")
    assert "200000 is not allowed: need a number from 1 to 100000" in refusal("engine", "--batch", "8,200000")
    assert "invalid choice: 'speed'; need max_num_seqs or clock" in refusal("optimize", "--free", "clock,speed")
    assert "'4,8' is not allowed" in refusal("levers", "--tp", "4,8")
    assert "'h100,b200' is not allowed: need one name" in refusal("engine", "--gpu", "h100,b200")
    assert "tp: 99 is not allowed" in refusal("pareto", "--axis", "tp=1,99")
    assert "clock: 1.5 is not allowed: need a number from 0.4 to 1" in refusal(
        "optimize", "--prefill-gpu", "h200,h100:clock=1.5"
    )
    assert "invalid choice: 'clok'; did you mean clock? need tp" in refusal("optimize", "--decode-gpu", "h100:clok=1")
    assert MIN_CLOCK_FRAC == clocks.MIN_CLOCK_FRAC  # which the table does not load
    for wrong in ("h100:tp", ":tp=4", "h100:tp=2:tp=4", "h100:"):
        assert "need GPU[:KEY=VALUE...] with tp" in refusal("optimize", "--prefill-gpu", wrong)


def test_carbon_is_an_objective_and_a_budget():
    options = parse("optimize", "--objective", "co2", "--max-kg-co2-per-h", "12.5")
    assert (options.objective, options.max_kg_co2_per_h) == ("co2", 12.5)
    assert parse("pareto").max_kg_co2_per_h is None
    assert "positive" in refusal("optimize", "--max-kg-co2-per-h", "0")


def test_an_axis_is_an_option_of_the_same_command():
    taken = {option.name: option for option in options_of("pareto")}
    assert {name for name, _ in AXES.values()} <= set(taken)
    assert AXES["itl-ms"][1] is taken["itl_ms"].kind


# -------------------------------------------------------------------------------------------------- what is made of it


def test_the_readme_holds_the_table():
    shown = README.partition("<!-- python -m fleetopt_jax.cli.reference -->\n")[2]
    assert shown.partition("\n<!-- end of the table of options -->")[0] == options_table()


def test_every_option_has_a_row_of_six_cells():
    rows = options_table().splitlines()
    assert len(rows) == len(TABLE) + 2
    assert {len(re.split(r"(?<!\\)\|", row)) for row in rows} == {8}
    assert all(any(row.startswith(f"| `{flag(o.name)}` |") for row in rows) for o in TABLE if o.nargs is None)


def test_files_are_completed_where_the_table_says_so():
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
        make_parser().parse_args(["--print-completion", "zsh"])
    completed = set(re.findall(r'"--([a-z-]+)\[[^"]*:_files"', said.getvalue()))
    assert completed == {flag(o.name).removeprefix("--") for o in TABLE if o.file and o.nargs is None}


def test_the_parser_needs_neither_jax_nor_pydantic():
    ask = "import sys, fleetopt_jax.cli.main, fleetopt_jax.cli.reference, fleetopt_jax.cli.fields\n"
    ask += "sys.exit(sorted({'jax', 'numpy', 'pydantic', 'shtab'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_command_is_described():
    assert all(command.summary and command.name in command.epilog for command in COMMANDS)


# ------------------------------------------------------------------------------------------------ the library's fields


def test_the_readings_of_a_field_are_one_option():
    named = {(option.field.name, option.name) for option in TABLE if option.field}
    assert len(named) == len(FLAGS)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            "need ttft_p99_s > 0 and 0 < max_utilization < 1, got ttft_p99_s=-0.5, max_utilization=0.85",
            "need --ttft-p99-ms > 0 and 0 < --max-utilization < 1, got --ttft-p99-ms=-500, --max-utilization=0.85",
        ),
        ("need max_power_w > 0, got -2000.0", "need --max-power-kw > 0, got -2"),
        ("need max_kg_co2_per_h > 0, got -1", "need --max-kg-co2-per-h > 0, got -1"),
        ("need gamma <= 2 where only prompts shrink, got 3", "need --gamma <= 2 where only prompts shrink, got 3"),
        ("need 0 < level < 1, got 2", "need 0 < --robust-level < 1, got 2"),
        ("need a finite pue >= 1, got nan", "need a finite --pue >= 1, got nan"),
        ("need itl_s >= 0.25, got inf", "need --itl-ms >= 250, got inf"),
        ("need a finite max_ttft_p99_s > 0, got 0", "need a finite max_ttft_p99_s > 0, got 0"),
        ("need a paged KV cache for a free max_num_seqs", "need a paged KV cache for a free max_num_seqs"),
    ],
)
def test_a_refusal_of_the_library_names_options(message, said):
    assert said_as_options(message) == said


def test_the_door_says_options():
    from fleetopt_jax.cli.inputs import at_door
    from fleetopt_jax.core.errors import BadField, BadInput

    with pytest.raises(BadInput, match=re.escape("azure-conv: need --ttft-p99-ms > 0")), at_door("azure-conv"):
        raise ValueError("need ttft_p99_s > 0")
    for field, said in (("arrival_rate_per_s", "--rate: "), ("tp", "--tp: "), ("services", "services: ")):
        with pytest.raises(BadInput, match=f"^{said}2 is"), at_door("azure-conv"):
            raise BadField(field, "2 is too many")
