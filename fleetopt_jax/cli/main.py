"""`fleetopt`: from the command line to an exit code. JAX is imported by the commands, so `--help` is immediate."""

import argparse
import os
import shlex
import sys
import unicodedata
from collections.abc import Sequence

from fleetopt_jax.cli.codes import BAD_INPUT, INTERRUPTED, OK
from fleetopt_jax.cli.parser import make_parser
from fleetopt_jax.cli.table import options_of
from fleetopt_jax.core.errors import BadInput


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0 done, 1 a bug of ours (with its traceback), 2 bad input, 3 infeasible."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser, name = make_parser(), "fleetopt"
    if sys.stdout is None:  # closed
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(errors="backslashreplace")
    try:
        options = parser.parse_args(arguments)
        name = f"fleetopt {options.command}"
        code = _run(parser, options, arguments)
    except BadInput as error:
        print(f"{name}: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader had enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    return code


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from fleetopt_jax.cli import backend

    unkept = backend.configure()  # before JAX is imported
    from fleetopt_jax.cli.answer import check_outputs, deliver
    from fleetopt_jax.cli.commands import run
    from fleetopt_jax.cli.terminal import say, say_understood, say_warnings
    from fleetopt_jax.core import programs
    from fleetopt_jax.core.files import write_whole

    if getattr(options, "scenario", None):
        from fleetopt_jax.cli.scenario import with_scenario

        options = with_scenario(parser, options, arguments)
    options.line = shlex.join(["fleetopt", *arguments])  # to say how to repeat it
    if unkept and not options.quiet:  # of this machine, not of the answer
        say(options, f"warning: {unkept}")
    _check_texts(options)
    check_outputs(options)
    scenario = None
    if getattr(options, "save_scenario", None):
        from fleetopt_jax.cli.scenario import scenario_text

        scenario = scenario_text(options)
    programs.expect(options.command)
    try:
        answer = run(argparse.Namespace(**vars(options)))
        deliver(options, answer)
        if answer.code == OK:
            say_understood(options)
    finally:  # beside the answer, or the refusal
        programs.remember(options.command)
        say_warnings(options)
    if scenario is not None:
        write_whole(options.save_scenario, scenario, "--save-scenario")
    return answer.code


def _check_texts(options: argparse.Namespace) -> None:
    """Refuse what is empty, as an unset variable of a shell is, or would not come back from a file as it is."""
    for option in options_of(options.command):
        value = getattr(options, option.name)
        if not isinstance(value, str):
            continue
        if not value.strip():
            raise BadInput(option.where, "is empty", "need a value")
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in value):
            raise BadInput(option.where, repr(value)[:60], "need text without control characters, in UTF-8")


def entry() -> None:
    """The console command. An interrupt ends the process at once: a compiled search cannot be stopped tidily."""
    code = main()
    if code == INTERRUPTED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    entry()
