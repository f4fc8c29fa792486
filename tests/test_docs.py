"""What the docstrings promise: every public name says what it is, and examples give what they show."""

import doctest
import inspect
from importlib import import_module
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fleetopt_jax as fo

ROOT = Path(fo.__file__).parents[1]
WITH_EXAMPLES = sorted(path for path in Path(fo.__file__).parent.rglob("*.py") if ">>> " in path.read_text())
KNOWN = {"fo": fo, "jax": jax, "jnp": jnp, "np": np}  # to every example, in float64


def module_at(path: Path):
    return import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))


@pytest.mark.parametrize("name", fo.__all__)
def test_a_public_name_says_what_it_is(name):
    thing = getattr(fo, name)
    if callable(thing):
        said = inspect.getdoc(thing)
        assert said and not said.startswith(f"{name}("), "no docstring of its own"  # a dataclass's repeats its fields


@pytest.mark.slow
@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_give_what_they_show(path, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where examples write
    results = doctest.testmod(
        module_at(path), extraglobs=KNOWN, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )
    assert results.failed == 0, capsys.readouterr().out
    assert results.attempted == path.read_text().count(">>> "), "an example is where none is looked for"
