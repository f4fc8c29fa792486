"""The command as one meets it in a terminal: help, completion, quiet, verbose, interrupts, and what is kept."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fleetopt_jax import __version__
from fleetopt_jax.cli import backend
from fleetopt_jax.cli.codes import BAD_INPUT, INTERRUPTED, OK
from fleetopt_jax.cli.commands import COMMANDS

COMMAND = [sys.executable, "-m", "fleetopt_jax.cli.main"]


def fleetopt(*arguments: object, **settings: str) -> subprocess.CompletedProcess[str]:
    """The command as a process, with settings of its environment."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=300, env={**os.environ, **settings}
    )


def test_every_command_shows_an_example_of_itself():
    for command in COMMANDS:
        shown = " ".join(fleetopt(command, "--help", COLUMNS="100").stdout.split())
        assert re.search(rf"Examples?: .*fleetopt {command}\b", shown), command


def test_the_version_is_the_packages():
    assert fleetopt("--version").stdout == f"fleetopt {__version__}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_every_command(shell):
    done = fleetopt("--print-completion", shell)
    assert (done.returncode, done.stderr) == (OK, "")
    assert all(command in done.stdout for command in COMMANDS)
    assert "--ttft-p99-ms" in done.stdout
    if shell == "bash":
        assert subprocess.run(["bash", "-n"], input=done.stdout, text=True).returncode == 0


def test_quiet_and_verbose_exclude_each_other():
    done = fleetopt("catalog", "--quiet", "--verbose")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (BAD_INPUT, "", 1)


def test_verbose_speaks_on_stderr_only():
    loud, plain = (fleetopt("trace", "azure-cdf", "--json", *more) for more in (["--verbose"], []))
    assert loud.stdout == plain.stdout
    assert plain.stderr == ""
    read, said = loud.stderr.splitlines()
    assert re.fullmatch(r"fleetopt trace: Reading azure-cdf: [\d.]+ s", read)
    assert re.fullmatch(r"fleetopt trace: azure-cdf: [\d,]+ atoms at .* requests/s, sha256:[0-9a-f]{64}", said)


def test_colour_is_off_when_piped():
    assert "\x1b" not in fleetopt("catalog", "gpus").stdout
    assert "\x1b" not in fleetopt("catalog", "gpus", TERM="xterm-256color").stdout


@pytest.mark.slow
def test_an_interrupt_leaves_no_file_and_exits_130(tmp_path):
    """Interrupted as soon as its first program is compiled and kept: it has begun, and more are to come."""
    out_folder, cache = tmp_path / "out", tmp_path / "cache"
    out_folder.mkdir()
    written = ("--out", str(out_folder / "plan.json"), "--save-scenario", str(out_folder / "s.toml"))
    environ = {**os.environ, "FLEETOPT_CACHE": str(cache)}
    # A process that is started in the background ignores the signal, and so do those that it starts.
    heard = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    heard += "runpy.run_module('fleetopt_jax.cli.main', run_name='__main__')"
    command = [sys.executable, "-c", heard, "optimize", "--pools", "4", *written]
    process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not any(cache.rglob("*-cache")):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (INTERRUPTED, "", "fleetopt optimize: interrupted\n")
    assert os.listdir(out_folder) == []


# ------------------------------------------------------------------------------------- compiled programs that are kept


def test_the_cache_lies_where_it_is_said_to(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEETOPT_CACHE", "off")
    assert backend.cache_folder() is None
    monkeypatch.setenv("FLEETOPT_CACHE", str(tmp_path / "mine"))
    assert backend.cache_folder().parent == tmp_path / "mine"
    monkeypatch.delenv("FLEETOPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert backend.cache_folder().parent == tmp_path / "xdg" / "fleetopt_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert backend.cache_folder().parent == tmp_path / ".cache" / "fleetopt_jax"


def test_without_a_place_to_keep_them_nothing_is_kept(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLEETOPT_CACHE", str(tmp_path / "file" / "below"))
    assert backend.cache_folder() is None


@pytest.mark.slow
def test_a_kept_program_gives_the_same_plan_and_a_broken_one_does_no_harm(tmp_path):
    """Byte for byte but for the time it took; XLA's notes on loading programs stay off stderr."""
    ask = ("optimize", "--workload", "azure-cdf", "--assume", "published", "--json")
    first, again = (fleetopt(*ask, FLEETOPT_CACHE=str(tmp_path)) for _ in range(2))
    kept = [path for path in Path(tmp_path).rglob("*-cache")]
    assert kept
    for path in kept:
        path.write_bytes(path.read_bytes()[:100])
    broken = fleetopt(*ask, FLEETOPT_CACHE=str(tmp_path))
    shown = [re.sub(r'"wall_s": [\d.]+', "", done.stdout) for done in (first, again, broken)]
    assert shown[0] == shown[1] == shown[2]
    assert [done.stderr for done in (first, again, broken)] == ["", "", ""]
