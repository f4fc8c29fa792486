"""What the README shows works as shown."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.slow
def test_python_examples_run(capsys):
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})
    assert "nan" not in capsys.readouterr().out


def test_every_command_shown_exists():
    from fleetopt_jax.cli.commands import COMMANDS

    shown = set(re.findall(r"fleetopt (\w+)", README))
    assert shown and shown <= set(COMMANDS)
