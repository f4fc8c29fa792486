"""Compiled programs that outlive their process."""

import os
import pickle
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fleetopt_jax.core import programs
from fleetopt_jax.core.programs import program
from fleetopt_jax.core.struct import pytree, static

traced: list[str] = []  # whenever Python runs a function that a program is made of


@pytree
class Record:
    x: jax.Array
    y: jax.Array | None
    name: str = static()


@partial(program, static_argnames="power")
def raised(record: Record, *, power: int = 2) -> Record:
    traced.append("raised")
    return Record(record.x**power, record.y, record.name + "!")


@program
def by_address(x: jax.Array, how: "Opaque") -> jax.Array:
    traced.append("by_address")
    return how.factor * x


class Opaque:
    """Not a record: it says where it lies, and nothing else."""

    def __init__(self, factor: float):
        self.factor = factor


jax.tree_util.register_pytree_node(Opaque, lambda o: ((), o), lambda o, _: o)


@pytest.fixture(autouse=True)
def folder(tmp_path):
    """A folder of its own, nothing loaded, nothing traced."""
    config, before = jax.config, jax.config.jax_compilation_cache_dir
    config.update("jax_compilation_cache_dir", str(tmp_path))
    programs.forget()
    traced.clear()
    yield tmp_path
    config.update("jax_compilation_cache_dir", before)
    programs.forget()


def kept(folder):
    return sorted(path for path in (folder / programs.FOLDER).glob("*/*") if len(path.name) == 32)


def record(n: int = 3, name: str = "a") -> Record:
    return Record(jnp.arange(1.0, n + 1.0), None, name)


def test_a_new_process_neither_traces_nor_compiles(folder):
    first = raised(record())
    programs.forget()
    again = raised(record())
    assert traced == ["raised"] and len(kept(folder)) == 1
    np.testing.assert_array_equal(first.x, again.x)
    assert (again.y, again.name) == (None, "a!")


def test_whatever_changes_the_program_is_another_one(folder):
    tried = [
        lambda: raised(record()),
        lambda: raised(record(), power=3),
        lambda: raised(record(4)),
        lambda: raised(record(name="b")),
        lambda: raised(Record(jnp.arange(1, 4), None, "a")),
        lambda: raised(Record(jnp.arange(1.0, 4.0), jnp.ones(()), "a")),
    ]
    for n, call in enumerate(tried, 1):
        call()
        assert len(traced) == len(kept(folder)) == n
    np.testing.assert_allclose(raised(record(), power=3).x, [1.0, 8.0, 27.0])
    raised(record(), power=2)  # as it is by default
    raised(Record(np.arange(1.0, 4.0), None, "a"))  # NumPy's numbers are numbers
    assert len(traced) == len(tried)


def test_within_others_it_is_traced(folder):
    x = jnp.array([1.0, 2.0, 3.0])
    slopes = jax.grad(lambda x: jnp.sum(raised(Record(x, None, "a"), power=3).x))(x)
    np.testing.assert_allclose(slopes, 3.0 * x**2)
    np.testing.assert_allclose(jax.vmap(lambda x: raised(Record(x, None, "a")).x)(x), x**2)
    assert kept(folder) == []


def test_a_damaged_file_is_made_again(folder):
    raised(record())
    (path,) = kept(folder)
    for damaged in (b"", path.read_bytes()[:100], pickle.dumps(("not", 1, 1, b"a program"))):
        path.write_bytes(damaged)
        programs.forget()
        np.testing.assert_allclose(raised(record()).x, [1.0, 4.0, 9.0])
    assert len(traced) == 4
    programs.forget()
    raised(record())
    assert len(traced) == 4  # whole again


def test_what_is_known_by_its_address_alone_is_not_kept(folder):
    found = [float(by_address(jnp.ones(()), Opaque(factor))) for factor in (2.0, 3.0)]
    assert found == [2.0, 3.0] and kept(folder) == []


def test_without_a_folder_nothing_is_written(folder):
    jax.config.update("jax_compilation_cache_dir", None)
    np.testing.assert_allclose(raised(record()).x, [1.0, 4.0, 9.0])
    assert kept(folder) == []


def test_a_changed_package_has_its_own_programs(folder, tmp_path, monkeypatch):
    package = tmp_path / "package"
    package.mkdir()
    monkeypatch.setattr(programs, "PACKAGE", package)
    for version in range(programs.MOST_VERSIONS + 2):
        (package / "laws.py").write_text(f"constant = {version}")
        programs._version.cache_clear()
        programs.forget()
        raised(record())
    programs._version.cache_clear()
    assert len(traced) == programs.MOST_VERSIONS + 2
    assert len(list((folder / programs.FOLDER).iterdir())) == programs.MOST_VERSIONS  # the oldest have gone


def test_the_next_run_expects_what_this_one_used(folder):
    programs.expect("run")
    raised(record()), raised(record(4))
    programs.remember("run")
    programs.forget()
    programs.expect("run")
    assert list(programs._expected) == [path.name for path in sorted(kept(folder), key=lambda p: p.stat().st_mtime)]
    raised(record())
    assert len(programs._expected) == 1 and len(traced) == 2
    programs.remember("run")
    assert programs._expected == {}
    programs.expect("run")
    assert programs._expected == {}  # what it used is here already


@pytest.mark.slow
def test_one_that_jaxs_cache_has_as_well_is_kept_whole(folder):
    """Of what it loads from there XLA writes but a part, which does not run."""
    for _ in range(2):
        first = raised(record(50))
        (path,) = kept(folder)
        programs.forget()
        jax.clear_caches()
        np.testing.assert_array_equal(raised(record(50)).x, first.x)
        path.unlink()
        programs.forget()
        jax.clear_caches()
    assert len(traced) == 2


def test_arrays_on_another_device_run_there():
    code = """
import jax, jax.numpy as jnp
jax.config.update("jax_compilation_cache_dir", {folder!r})
from fleetopt_jax.core import programs
double = programs.program(lambda x: 2.0 * x)
there = double(jax.device_put(jnp.ones(3), jax.devices()[1]))
print(there.devices() == {{jax.devices()[1]}}, float(double(jnp.ones(())) + double(jnp.ones(()))))
"""
    line = [sys.executable, "-c", code.format(folder="/nonexistent/never made")]
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PATH": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    run = subprocess.run(line, env=os.environ | environment, capture_output=True, text=True)
    assert run.stdout.split() == ["True", "4.0"], run.stderr
