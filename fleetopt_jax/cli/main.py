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
MAX_BATCH = 100_000
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
    _add_problem(optimize)
    optimize.add_argument("--pools", type=_whole(1, 6), default=2, help="most pools to split into, 1 to 6 (default 2)")
    optimize.add_argument(
        "--gamma",
        type=_gamma,
        default=1.0,
        help="compress requests up to GAMMA x window; 'auto' searches (default 1: none)",
    )
    optimize.add_argument("--method", choices=("grid", "gradient"), default="grid", help="search (default grid)")
    optimize.add_argument(
        "--assume",
        default="physical",
        help="physical (default) or published, with choices changed: physical,kv_cache=reserved",
    )
    _add_dispatch(optimize, "jsq")
    optimize.add_argument(
        "--objective", choices=("tok_per_j", "usd", "power", "gpus"), default="tok_per_j", help="(default tok_per_j)"
    )

    optimize.add_argument(
        "--verify", action="store_true", help="simulate the winner and add instances where the limits fail"
    )
    _add_simulation(optimize.add_argument_group("simulation", "with --verify"))

    ledger = _command(
        commands,
        "ledger",
        "walk from the published system to the physical one, a choice at a time",
        "Example: fleetopt ledger --workload azure-cdf --gpu b200 --figure ledger.svg",
    )
    _add_problem(ledger)
    ledger.add_argument("--figure", metavar="FILE", help="write the waterfall as FILE.svg or FILE.png")

    engine = _command(
        commands,
        "engine",
        "step time, throughput, power and tokens per joule of one engine",
        "Example: fleetopt engine --gpu b200 --llm qwen3-235b-a22b --tp 4 --batch 8,32,128 --context 2000",
    )
    _add_engine(engine)
    engine.add_argument("--batch", type=_batches, default=[8, 32, 128], help="sequences in flight (default 8,32,128)")
    engine.add_argument("--context", type=_positive, default=1024.0, help="mean context in tokens (default 1024)")
    engine.add_argument(
        "--prompt-per-output",
        type=_not_negative,
        help="prompt tokens prefilled for each output token (default: the benchmark's own mix)",
    )
    engine.add_argument("--law", action="store_true", help="the law, even where this configuration was measured")

    calibrate = _command(
        commands,
        "calibrate",
        "fit an engine to your own measurements",
        "Columns: batch; step_s, step_ms or tok_per_s; context_tokens and power_w_per_gpu where known. Names of the "
        "ML.ENERGY files are known too. Example: fleetopt calibrate mine.csv --gpu h100 --llm llama-3.1-70b --tp 4 "
        "--out mine.json, then fleetopt optimize --gpu mine.json",
    )
    calibrate.add_argument("measurements", metavar="FILE.csv")
    calibrate.add_argument("--gpu", help="GPU that was measured (default: the file's)")
    calibrate.add_argument("--llm", help="LLM that was measured, by our name or a config.json (default: the file's)")
    calibrate.add_argument("--tp", type=_whole(1, 64), help="GPUs per instance (default: the file's)")
    calibrate.add_argument("--precision", help="of the weights (default: the file's)")
    calibrate.add_argument("--model", help="rows of this model only (part of its name)")
    calibrate.add_argument("--task", help="rows of this task only")
    calibrate.add_argument(
        "--form", choices=("auto", "dense", "moe"), default="auto", help="of the step (default auto)"
    )
    calibrate.add_argument("--figure", metavar="FILE", help="write fit and residuals as FILE.svg or FILE.png")

    evaluate = _command(commands, "evaluate", "metrics of a given plan")
    evaluate.add_argument("plan", metavar="PLAN.json")
    _add_workload(evaluate, default=None)
    _add_dispatch(evaluate, None)

    simulate = _command(
        commands,
        "simulate",
        "every iteration of every instance of a plan, beside the analytic metrics",
        "Example: fleetopt optimize --json --out plan.json && fleetopt simulate plan.json --replications 4",
    )
    simulate.add_argument("plan", metavar="PLAN.json")
    _add_workload(simulate, default=None)
    _add_dispatch(simulate, None)
    _add_simulation(simulate)

    trace = _command(commands, "trace", "what is in a workload")
    trace.add_argument("workload", metavar="FILE|NAME")
    _add_rate_and_layout(trace)

    catalog = _command(commands, "catalog", "what is known by name")
    catalog.add_argument("part", nargs="?", choices=("gpus", "llms", "engines", "workloads"), help="default all")
    return parser


def _command(commands, name: str, summary: str, epilog: str | None = None) -> argparse.ArgumentParser:
    description = summary[0].upper() + summary[1:] + "."
    command = commands.add_parser(name, help=summary, description=description, epilog=epilog)
    command.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    command.add_argument("--out", metavar="FILE", help="also write the JSON object to FILE")
    return command


def _add_dispatch(command, default: str | None) -> None:
    command.add_argument(
        "--dispatch",
        choices=("jsq", "round_robin", "random"),
        default=default,
        help=f"requests of a pool go to its shortest queue, in turn or at random (default {default or 'as planned'})",
    )


def _add_simulation(command) -> None:
    command.add_argument(
        "--requests",
        type=_whole(100, 10**7),
        metavar="N",
        help="of one replication (default: enough for the warm-up and a window twice as long)",
    )
    command.add_argument("--replications", type=_whole(1, 64), default=4, metavar="R", help="(default 4)")
    command.add_argument("--seed", type=_whole(0, 2**31 - 1), default=0, metavar="S", help="(default 0)")
    command.add_argument(
        "--staleness-ms", type=_not_negative, default=50.0, help="age of what the router knows (default 50)"
    )
    command.add_argument(
        "--arrivals",
        choices=("renewal", "poisson", "trace"),
        default="renewal",
        help="as bursty as the workload's (default), Poisson, or the file's own time stamps, stretched to the rate",
    )
    command.add_argument(
        "--router-width",
        type=_not_negative,
        default=0.0,
        metavar="W",
        help="scale of the error in the logarithm of a predicted length (default 0: lengths are known)",
    )


def _add_engine(command: argparse.ArgumentParser, several: str = "") -> None:
    command.add_argument(
        "--gpu", default="h100", help=f"GPU, or a file that fleetopt calibrate wrote{several} (default h100)"
    )
    command.add_argument(
        "--llm", default="llama-3.1-70b", help="LLM, or a Hugging Face config.json (default llama-3.1-70b)"
    )
    command.add_argument("--tp", type=_whole(1, 64), default=8, help="GPUs per instance (default 8)")
    command.add_argument("--precision", help="of the weights: bf16, fp8, int4, mxfp4 (default: the checkpoint's)")
    command.add_argument("--kv-precision", default="bf16", help="of the KV cache: bf16 or fp8 (default bf16)")


def _add_problem(command: argparse.ArgumentParser) -> None:
    """What a search is about, but for how it is searched."""
    _add_workload(command, default="azure-conv")
    _add_engine(command, several="; several a pool may choose from: h100,b200")
    command.add_argument("--max-num-seqs", type=_whole(1, 10**6), help="sequences an instance runs (default vLLM's)")
    command.add_argument(
        "--window",
        type=_whole(1, MAX_WINDOW_TOKENS),
        help="window of the last pool in tokens (default: the longest request)",
    )
    limits = command.add_argument_group("limits")
    limits.add_argument("--ttft-p99-ms", type=_positive, default=500.0, help="P99 time to first token (default 500)")
    limits.add_argument(
        "--ttft-ms-per-1k", type=_not_negative, default=0.0, help="and so much more per 1,000 prompt tokens (default 0)"
    )
    limits.add_argument("--itl-ms", type=_positive, help="mean inter-token latency (default: no limit)")
    limits.add_argument(
        "--slo-scope",
        choices=("pool", "fleet"),
        default="pool",
        help="every pool holds the latencies, or all requests together (default pool)",
    )
    site = command.add_argument_group("site", "counted only if given; power counts GPU boards otherwise")
    site.add_argument("--host-w-per-gpu", type=_not_negative, default=0.0, help="watts of the host a GPU")
    site.add_argument("--pue", type=_at_least_one, default=1.0, help="power usage effectiveness")
    site.add_argument("--usd-per-kwh", type=_not_negative, default=0.0, help="price of electricity")
    site.add_argument("--kg-co2-per-kwh", type=_not_negative, default=0.0, help="carbon intensity of electricity")
    compressor = command.add_argument_group("compression", "of prompts, where gamma exceeds 1")
    compressor.add_argument("--compress-success", type=_share, default=1.0, help="share of the tries that do")
    compressor.add_argument(
        "--compress-ms-per-1k", type=_not_negative, default=0.0, help="latency, 1,000 prompt tokens"
    )
    compressor.add_argument("--compress-j-per-1k", type=_not_negative, default=0.0, help="energy, 1,000 prompt tokens")


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


def _not_negative(text: str) -> float:
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: need a finite number >= 0")
    return value


def _at_least_one(text: str) -> float:
    value = _number(text)
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: need a finite number >= 1")
    return value


def _share(text: str) -> float:
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: need a number from 0 to 1")
    return value


def _batches(text: str) -> list[float]:
    values = [_positive(part) for part in text.split(",")]
    if not all(1 <= value <= MAX_BATCH for value in values):
        raise argparse.ArgumentTypeError(f"{text} is not allowed: need numbers from 1 to {MAX_BATCH}")
    return values


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
