"""`fleetopt`: parses arguments and nothing else. JAX is imported by the commands, so `--help` is immediate."""

import argparse
import math
import os
import sys
from typing import NoReturn

from fleetopt_jax import __version__
from fleetopt_jax.cli.codes import BAD_INPUT, INTERRUPTED, OK
from fleetopt_jax.core.errors import BadInput

MAX_WINDOW_TOKENS = 10**9
MAX_GAMMA = 10  # nobody compresses a prompt further
RATES_PER_S = (1e-6, 1e9)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code is 0 done, 1 a bug of ours (with its traceback), 2 bad input, 3 infeasible."""
    options = _parser().parse_args(argv)
    try:
        from fleetopt_jax.cli import commands

        code = commands.run(options)
        sys.stdout.flush()
    except BadInput as error:
        print(f"fleetopt {options.command}: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"fleetopt {options.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader had enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    return code


def entry() -> None:
    """The console command. An interrupt ends the process at once: a compiled search cannot be stopped tidily."""
    code = main()
    if code == INTERRUPTED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fleetopt",
        description="Find the most energy-efficient way to run a fleet of LLM inference GPUs.",
        epilog="Example: fleetopt optimize --workload azure-cdf --gpu b200 --rate 500",
    )
    parser.add_argument("--version", action="version", version=f"fleetopt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    reproduce = _command(commands, "reproduce", "compare with the published tables, cell by cell")
    reproduce.add_argument("tables", nargs="*", type=_whole(1, 5), metavar="TABLE", help="1 to 5; default all")

    optimize = _command(commands, "optimize", "find the plan with the most tokens per joule within the limits")
    _add_workload(optimize, default="azure-conv")
    optimize.add_argument(
        "--gpu", default="h100", help="GPU, or several a pool may choose from: h100,b200 (default h100)"
    )
    optimize.add_argument("--llm", default="llama-3.1-70b", help="LLM to serve (default llama-3.1-70b)")
    optimize.add_argument("--tp", type=_whole(1, 64), default=8, help="GPUs per instance (default 8)")
    optimize.add_argument("--pools", type=_whole(1, 6), default=2, help="most pools to split into, 1 to 6 (default 2)")
    optimize.add_argument(
        "--gamma",
        type=_gamma,
        default=1.0,
        help="compress requests up to GAMMA x window; 'auto' searches (default 1: none)",
    )
    optimize.add_argument(
        "--window",
        type=_whole(1, MAX_WINDOW_TOKENS),
        help="window of the last pool in tokens (default: the longest request)",
    )
    optimize.add_argument("--method", choices=("grid", "gradient"), default="grid", help="search (default grid)")
    optimize.add_argument("--assume", choices=("published",), default="published", help="preset of assumptions")
    optimize.add_argument("--ttft-p99-ms", type=_positive, default=500.0, help="limit of the P99 TTFT (default 500)")
    optimize.add_argument(
        "--objective", choices=("tok_per_j", "usd", "power", "gpus"), default="tok_per_j", help="(default tok_per_j)"
    )

    evaluate = _command(commands, "evaluate", "metrics of a given plan")
    evaluate.add_argument("plan", metavar="PLAN.json")
    _add_workload(evaluate, default=None)

    trace = _command(commands, "trace", "what is in a workload")
    trace.add_argument("workload", metavar="FILE|NAME")
    _add_rate_and_layout(trace)

    catalog = _command(commands, "catalog", "what is known by name")
    catalog.add_argument("part", nargs="?", choices=("gpus", "llms", "engines", "workloads"), help="default all")
    return parser


def _command(commands, name: str, summary: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    command.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    command.add_argument("--out", metavar="FILE", help="also write the JSON object to FILE")
    return command


def _add_workload(command: argparse.ArgumentParser, default: str | None) -> None:
    shown = f"default {default}" if default else "default the plan's"
    command.add_argument("--workload", default=default, metavar="NAME|FILE", help=f"bundled workload or file ({shown})")
    _add_rate_and_layout(command, *([] if default else ["the plan's"]))


def _add_rate_and_layout(
    command: argparse.ArgumentParser, default_rate: str = "a file's own mean; 1000 for bundled workloads"
) -> None:
    command.add_argument("--rate", type=_rate, metavar="R", help="requests per second (default: the workload's own)")
    command.add_argument(
        "--prompt-column", metavar="C", help="column of the prompt tokens, for a file of another layout"
    )
    command.add_argument("--output-column", metavar="C", help="column of the output tokens")
    command.add_argument("--time-column", metavar="C", help="column of the time stamps (seconds or ISO 8601)")
    command.add_argument("--time-unit", choices=("s", "ms", "us"), help="unit of numeric time stamps (default s)")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _positive(text: str) -> float:
    value = _number(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not allowed: need a positive, finite number")
    return value


def _rate(text: str) -> float:
    value = _positive(text)
    if not RATES_PER_S[0] <= value <= RATES_PER_S[1]:
        raise argparse.ArgumentTypeError(
            f"{text} is not allowed: need a number from {RATES_PER_S[0]:g} to {RATES_PER_S[1]:g} requests per second"
        )
    return value


def _gamma(text: str) -> float | None:
    if text == "auto":
        return None
    value = _number(text)
    if not 1 <= value <= MAX_GAMMA:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: need a number from 1 to {MAX_GAMMA}, or 'auto'")
    return value


def _whole(least: int, most: int):
    def parse(text: str) -> int:
        limits = f"from {least} to {most}"
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed: need a whole number {limits}") from None
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not allowed: need a whole number {limits}")
        return value

    return parse


if __name__ == "__main__":
    entry()
