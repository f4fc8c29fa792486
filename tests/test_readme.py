"""What the README shows works as shown."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import drop_compiled

from fleetopt_jax.cli.main import main
from fleetopt_jax.cli.parser import make_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
IN_TABLES = [
    each for row in README.splitlines() if row.startswith("|") for each in re.findall(r"`(fleetopt [^`]*)`", row)
]
SHOWN = [line.split("   #")[0] for line in [*BLOCKS.splitlines(), *IN_TABLES] if line.startswith("fleetopt ")]
LONG = (
    "fleetopt levers",
    "ledger",
    "pareto --workload",
    "axis confidence",
    "pareto --serve",
    "prefix-hit (0.5|trace --dispatch)",
)  # a minute each
COMMANDS = list(dict.fromkeys(SHOWN))  # each once, in the order shown


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "torch_dtype": "bfloat16",
}


def test_every_command_shown_is_understood():
    assert len(COMMANDS) > 20
    for command in COMMANDS:
        make_parser().parse_args(shlex.split(command)[1:])


def test_every_file_linked_exists():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith(("http", "#"))]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.slow
def test_python_examples_run(capsys, monkeypatch, tmp_path):
    """One after another, as a reader types them."""
    monkeypatch.chdir(tmp_path)
    examples, names = re.findall(r"```python\n(.*?)```", README, re.DOTALL), {"__name__": "__main__"}
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), names)
    assert "nan" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "left_out", [pytest.param(LONG, id="but for the longest"), pytest.param((), id="all", marks=pytest.mark.nightly)]
)
def test_every_command_shown_runs(capsys, monkeypatch, tmp_path, left_out):
    """In the order of the README, in one folder that holds what a reader has: a trace, measurements, what was
    observed, an LLM's configuration, the scenarios."""
    rng = np.random.default_rng(1)
    prompt, output = np.exp(rng.normal(6.5, 0.9, 1000)), np.exp(rng.normal(4.8, 0.6, 1000))
    arrival = np.cumsum(rng.exponential(0.5, 1000))
    rows = "".join(f"{p:.0f},{o:.0f},{t:.3f}\n" for p, o, t in zip(prompt + 1, output + 1, arrival))
    (tmp_path / "mine.csv").write_text("in,out,t\n" + rows)
    talks = "".join(  # of three turns each, one after another
        f"{i // 3},{400 * (1 + i % 3) + i % 7},{90 + i % 50},{0.4 * i:.1f}\n" for i in range(600)
    )
    (tmp_path / "talks.csv").write_text("session_id,prompt_tokens,completion_tokens,timestamp\n" + talks)
    (seen,) = re.findall(r"```\n(pool,rate_per_s,.*?)```", README, re.DOTALL)
    (tmp_path / "observed.csv").write_text(seen)
    batch = np.array([4.0, 8.0, 16.0, 32.0, 64.0, 128.0])
    rows = "".join(f"{n:g},{13 + 0.09 * n:.3f},1500,{420 + 45 * np.log2(n):.1f}\n" for n in batch)
    (tmp_path / "measured.csv").write_text("batch,step_ms,context_tokens,power_w_per_gpu\n" + rows)
    (catalog,) = re.findall(r"```toml\n(schema = \"fleetopt-catalog/1\".*?)```", README, re.DOTALL)
    for name in ("my.toml", "x1.toml"):  # the second as `experiments/fit_operators.py` writes it, less coefficients
        (tmp_path / name).write_text(catalog)
    (tmp_path / "prices.csv").write_text(
        "hour,usd_per_kwh\n" + "".join(f"{h},{0.1 - 0.02 * (h < 6):.2f}\n" for h in range(24))
    )
    (tmp_path / "my-chat").mkdir()
    for config in (tmp_path / "config.json", tmp_path / "my-chat" / "config.json"):
        config.write_text(json.dumps(CONFIG))
    (tmp_path / "experiments").mkdir()
    shutil.copytree(ROOT / "experiments" / "scenarios", tmp_path / "experiments" / "scenarios")
    shutil.copy(ROOT / "experiments" / "router.py", tmp_path / "experiments" / "router.py")
    monkeypatch.chdir(tmp_path)
    for command in [each for each in COMMANDS if not re.search("|".join(left_out) or "^$", each)]:
        code, out, err = said_by(shlex.split(command)[1:], capsys)
        # The laws and the simulator may differ, and a fleet of this small trace does not hold every rate: answers too.
        says_no = re.match(r"fleetopt (simulate|evaluate .*--rate) ", command) and code == 3
        assert code == 0 or says_no, f"{command}\n{err}"
        assert "Traceback" not in err
        assert not re.search(r"\bnan\b", out), command
        for written in re.findall(r"(?:--out|--figure|--csv|--router|--save-scenario) (\S+)", command):
            assert (tmp_path / written).stat().st_size > 0, command
        drop_compiled()
    program = [sys.executable, "experiments/router.py", "router.json", "1200", "300"]
    subprocess.run(program, cwd=tmp_path, check=True, capture_output=True, timeout=900)


def said_by(arguments: list[str], capsys) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command, in this process: programs are traced once for all of them."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()
