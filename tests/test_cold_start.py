"""What a fresh process compiles. Seconds depend on the machine, so programs are counted: each costs tens of
milliseconds at the least, and records are built of NumPy arrays so that none of them is of their arithmetic."""

import os
import subprocess
import sys

import pytest

MOST_PROGRAMS = 12
COUNTED = """
import jax
programs = []
def count(event, seconds, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        programs.append(seconds)
jax.monitoring.register_event_duration_secs_listener(count)
"""
LIBRARY = """
jax.config.update("jax_enable_x64", True)
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.catalog.workloads import load_workload
from fleetopt_jax._optimize.problem import make_problem
problem = make_problem(load_workload("azure-conv"), [EngineSpec("h100")])
print("to ask:", len(programs))
"""
CLI = """
from fleetopt_jax.cli.main import main
assert main(["optimize", "--json"]) == 0
import sys
assert "matplotlib.figure" not in sys.modules, "a plain plan draws nothing"
"""


def n_programs(script: str, cwd: os.PathLike) -> dict[str, int]:
    """Programs compiled in a fresh process without a cache of them, by when."""
    without_cache = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-c", f'{COUNTED}{script}\nprint("in all:", len(programs))'],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**without_cache, "FLEETOPT_CACHE": "off"},
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split(": ") for line in done.stdout.splitlines() if line.startswith(("to ask: ", "in all: "))]
    return {when: int(count) for when, count in lines}


def test_a_question_compiles_no_program(tmp_path):
    assert n_programs(LIBRARY, tmp_path)["to ask"] == 0


@pytest.mark.slow
def test_the_first_command_compiles_few_programs(tmp_path):
    assert 1 <= n_programs(CLI, tmp_path)["in all"] <= MOST_PROGRAMS
