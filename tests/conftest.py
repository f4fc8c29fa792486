import os
import shutil
import tempfile
from pathlib import Path

# One folder of compiled programs for the workers of a run, and for the commands they start as processes: what one test
# file compiled, another loads. A new one for each run, unless the environment names one, which is kept, or says "off".
OURS = "FLEETOPT_TEST_CACHE" not in os.environ  # false in the workers, which inherit it
if OURS:
    os.environ["FLEETOPT_TEST_CACHE"] = tempfile.mkdtemp(prefix="fleetopt-test-")
os.environ["FLEETOPT_CACHE"] = os.environ["FLEETOPT_TEST_CACHE"]

from fleetopt_jax.cli import backend  # noqa: E402

backend.configure()  # before any test module makes an array: Erlang-C needs float64

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from fleetopt_jax.catalog.spec import EngineSpec  # noqa: E402
from fleetopt_jax.core import programs  # noqa: E402
from fleetopt_jax.workload.atoms import Workload, make_workload  # noqa: E402

LONG = ("test_verify", "test_failures", "test_strategies", "test_simulate", "test_cli", "test_schedule", "test_ttft")
MOST_MEMORY_MAPS = 30_000  # of 65,530 Linux gives a process; compiled programs hold them, and XLA crashes at the end


QUICK = "--xla_backend_optimization_level=0"  # compiles in half the time, and runs a third as fast


def pytest_configure(config):
    """The default tests wait for compilers, not for what these make; slow ones for both."""
    asked = config.option.markexpr.replace("not slow", "").replace("not nightly", "")
    flags = os.environ.get("XLA_FLAGS", "")
    if "slow" not in asked and "nightly" not in asked and QUICK not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {QUICK}".strip()


def drop_compiled() -> None:
    """Drop what was compiled before it uses up the memory maps."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MEMORY_MAPS:
        jax.clear_caches()
        programs.forget()


def pytest_collection_modifyitems(items):
    """The files that take longest first, so that both workers end at about the same time."""
    items.sort(key=lambda item: item.path.stem not in LONG)


def pytest_unconfigure():
    """At the end of the process that made the folder, when its workers have ended."""
    if OURS:
        shutil.rmtree(os.environ["FLEETOPT_TEST_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def few_memory_maps():
    """After every test."""
    yield
    drop_compiled()


@pytest.fixture(scope="session")
def h100() -> EngineSpec:
    """The paper's H100 engine by its spec."""
    return EngineSpec("h100", source="projected")


@pytest.fixture(scope="session")
def b200() -> EngineSpec:
    """The paper's B200 engine by its spec."""
    return EngineSpec("b200", source="projected")


@pytest.fixture(scope="session")
def small_workload() -> Workload:
    """40 lengths from 20 to 60,000 tokens, log-normal around 600: a long tail that two pools pay for."""
    rng = np.random.default_rng(0)
    total = np.round(np.geomspace(20.0, 60_000.0, 40) * rng.uniform(0.96, 1.04, 40))
    prompt = np.maximum(1.0, np.floor(0.8 * total))
    weight = rng.uniform(0.5, 1.0, 40) * np.exp(-0.5 * (np.log(total / 600.0) / 1.2) ** 2)
    return make_workload(prompt, total - prompt, weight, arrival_rate_per_s=200.0)


@pytest.fixture(scope="session")
def workload() -> Workload:
    """24 kinds of requests from 20 to 20,000 tokens, prompts and outputs of their own, arriving in bursts."""
    rng = np.random.default_rng(0)
    prompt, output = np.round(np.geomspace(12, 19_000, 24)), np.round(np.exp(rng.uniform(2, 6.5, 24)))
    weight = rng.uniform(0.5, 1.0, 24) * np.exp(-0.5 * (np.log(prompt / 600.0) / 1.2) ** 2)
    return make_workload(prompt, output, weight, arrival_rate_per_s=60.0, arrival_scv=4.0)
