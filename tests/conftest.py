import os
from pathlib import Path

os.environ["FLEETOPT_CACHE"] = "off"  # every test compiles what it runs

import jax

jax.config.update("jax_enable_x64", True)  # before any test module makes an array: Erlang-C needs float64

import numpy as np  # noqa: E402
import pytest  # noqa: E402

from fleetopt_jax.catalog.spec import EngineSpec  # noqa: E402
from fleetopt_jax.workload.atoms import Workload, make_workload  # noqa: E402

MOST_MEMORY_MAPS = 30_000  # of 65,530 Linux gives a process; compiled programs hold them, and XLA crashes at the end


def drop_compiled() -> None:
    """Drop what was compiled before it uses up the memory maps."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MEMORY_MAPS:
        jax.clear_caches()


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
