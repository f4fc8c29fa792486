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
    _add_problem(optimize, several=True)
    _add_budget(optimize)
    optimize.add_argument("--pools", type=_whole(1, 6), default=2, help="most pools to split into, 1 to 6 (default 2)")
    optimize.add_argument(
        "--gamma",
        type=_gamma,
        default=1.0,
        help="compress requests up to GAMMA x window; 'auto' searches (default 1: none)",
    )
    _add_method(optimize)
    optimize.add_argument(
        "--free",
        type=_free,
        default=(),
        metavar="A,B",
        help="with --method gradient: what each pool may have of its own: max_num_seqs, clock (a projected law)",
    )
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
    _add_robust(optimize.add_argument_group("robust", "a plan for engines and traffic that are not what they seem"))
    _add_simulation(optimize.add_argument_group("simulation", "with --verify"))

    _add_pareto(commands)
    _add_sensitivity(commands)

    ledger = _command(
        commands,
        "ledger",
        "walk from the published system to the physical one, a choice at a time",
        "Example: fleetopt ledger --workload azure-cdf --gpu b200 --figure ledger.svg",
    )
    _add_problem(ledger)
    ledger.add_argument("--figure", metavar="FILE", help="write the waterfall as FILE.svg or FILE.png")

    _add_levers(commands)

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


def _add_method(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--method",
        choices=("exact", "grid", "gradient"),
        help="search: exact proves its answer, gradient relaxes and rounds, grid tries all there is (default exact; "
        "grid with --slo-scope fleet)",
    )


def _add_budget(command: argparse.ArgumentParser) -> None:
    budget = command.add_argument_group("budget", "of all pools together")
    budget.add_argument("--max-gpus", type=_positive, metavar="N", help="most GPUs")
    budget.add_argument("--max-power-kw", type=_positive, metavar="P", help="most power")
    budget.add_argument("--max-usd-per-h", type=_positive, metavar="C", help="most cost")
    budget.add_argument(
        "--gpus-of", type=_stock, default={}, metavar="GPU=N,...", help="how many there are of a kind: h100=64,b200=16"
    )


def _add_engine(command: argparse.ArgumentParser, several: bool = False) -> None:
    more = "; several a pool may choose from: h100,b200" if several else ""
    command.add_argument(
        "--gpu", default="h100", help=f"GPU, or a file that fleetopt calibrate wrote{more} (default h100)"
    )
    command.add_argument(
        "--llm", default="llama-3.1-70b", help="LLM, or a Hugging Face config.json (default llama-3.1-70b)"
    )
    one, many = _whole(1, 64), "; several: 2,4,8" if several else ""
    parse = (lambda text: [one(part) for part in text.split(",")]) if several else one
    command.add_argument("--tp", type=parse, default=[8] if several else 8, help=f"GPUs per instance{many} (default 8)")
    many = "; several: bf16,fp8" if several else ""
    command.add_argument(
        "--precision", help=f"of the weights: bf16, fp8, int4, mxfp4{many} (default: the checkpoint's)"
    )
    command.add_argument("--kv-precision", default="bf16", help="of the KV cache: bf16 or fp8 (default bf16)")


def _add_problem(command: argparse.ArgumentParser, *, several: bool = False) -> None:
    """What a search is about, but for how it is searched; `several` engines to choose from, or GPUs alone."""
    _add_workload(command, default="azure-conv")
    _add_engine(command, several)
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


def _add_robust(command) -> None:
    command.add_argument(
        "--robust",
        choices=("quantile", "cvar"),
        help="choose by the lower quantile, or the mean of the worst share, of tok/J over scenarios: engines off by "
        "their errors, and every workload named",
    )
    command.add_argument(
        "--robust-level",
        type=_open_share,
        default=0.1,
        metavar="Q",
        help="which quantile, or worst share (default 0.1)",
    )
    command.add_argument(
        "--robust-workloads",
        type=lambda text: text.split(","),
        default=[],
        metavar="NAME|FILE,...",
        help="tomorrow's traffic, as likely as today's",
    )


def _add_sensitivity(commands) -> None:
    sensitivity = _command(
        commands,
        "sensitivity",
        "what a plan's answer rests on: elasticities, intervals, prices of its limits",
        "Example: fleetopt optimize --json --out plan.json && fleetopt sensitivity plan.json --figure tornado.svg",
    )
    sensitivity.add_argument("plan", metavar="PLAN.json")
    _add_workload(sensitivity, default=None)
    _add_dispatch(sensitivity, None)
    sensitivity.add_argument(
        "--metric",
        choices=("tok_per_j", "power_w", "usd_per_h", "ttft_p99_s", "itl_s"),
        default="tok_per_j",
        help="to rank inputs for, in the table and the figure (default tok_per_j)",
    )
    sensitivity.add_argument("--top", type=_whole(1, 1000), default=15, metavar="N", help="inputs to show (default 15)")
    sensitivity.add_argument(
        "--reoptimize",
        action="store_true",
        help="check shadow prices: search again at 0.9 and 1.1 times every limit that binds",
    )
    sensitivity.add_argument("--figure", metavar="FILE", help="write the tornado as FILE.svg or FILE.png")


def _add_pareto(commands) -> None:
    pareto = _command(
        commands,
        "pareto",
        "what tokens per joule, P99 TTFT and cost can be had together",
        "Where ttft_p99_s is an objective, --ttft-p99-ms caps the front (default: no cap) and is the limit that the "
        "reference fleets are sized for (default 500). Examples: fleetopt pareto --workload azure-code --figure "
        "front.svg; fleetopt pareto --axis workload-rate=10,100,1000 --csv rates.csv",
    )
    _add_problem(pareto, several=True)
    _add_budget(pareto)
    pareto.set_defaults(ttft_p99_ms=None)
    pareto.add_argument(
        "--objectives",
        type=lambda text: [name.strip() for name in text.split(",")],
        default=["tok_per_j", "ttft_p99_s"],
        metavar="A,B[,C]",
        help="two or three of tok_per_j, ttft_p99_s, usd_per_h (default tok_per_j,ttft_p99_s)",
    )
    pareto.add_argument("--points", type=_whole(3, 1000), default=24, metavar="N", help="searches to make (default 24)")
    pareto.add_argument(
        "--axis",
        type=_axis,
        metavar="NAME=V1,V2,...",
        help=f"instead of a front, the best plan at each value of one of {', '.join(AXES)}",
    )
    pareto.add_argument("--pools", type=_whole(1, 6), default=2, help="most pools to split into, 1 to 6 (default 2)")
    pareto.add_argument(
        "--gamma", type=_gamma, default=1.0, help="as in optimize: a number, or 'auto' (default 1: no compression)"
    )
    _add_method(pareto)
    pareto.add_argument("--assume", default="physical", help="physical (default) or published, as in optimize")
    _add_dispatch(pareto, "jsq")
    pareto.add_argument("--figure", metavar="FILE", help="draw the front as FILE.svg or FILE.png")
    pareto.add_argument("--csv", metavar="FILE", help="write the plans as FILE, a line each")


def _add_levers(commands) -> None:
    levers = _command(
        commands,
        "levers",
        "what pays: from the present fleet one lever released at a time, and pairs of them",
        "The present fleet is PLAN.json's, or the best one-pool fleet of the options. Levers: context routing, gamma, "
        "more pools, tensor parallelism, max_num_seqs, GPU generation, precision of weights and KV cache, another "
        "model, GPU clock, compressed prompts. Example: fleetopt levers --workload azure-code --figure levers.svg",
    )
    levers.add_argument(
        "plan", nargs="?", metavar="PLAN.json", help="the present fleet; --workload and --rate may change its traffic"
    )
    _add_problem(levers)
    levers.add_argument("--assume", default="physical", help="physical (default) or published, as in optimize")
    _add_dispatch(levers, "jsq")
    asked = {name: levers.get_default(name) for name in PLAN_SAYS}
    levers.set_defaults(workload=None, plan_says=asked)  # a plan says these itself
    levers.add_argument(
        "--objective", choices=("tok_per_j", "usd", "power", "gpus"), default="tok_per_j", help="(default tok_per_j)"
    )
    levers.add_argument("--next-gpu", metavar="GPU", help="generation to change to (default: the next, h100 to b200)")
    levers.add_argument(
        "--other-llm",
        default="qwen3-235b-a22b",
        metavar="LLM",
        help="model to change to, with answers of its own (default qwen3-235b-a22b)",
    )
    levers.add_argument("--all-pairs", action="store_true", help="every pair that combines, not of the best five only")
    levers.add_argument("--figure", metavar="FILE", help="write bars and pairs as FILE.svg or FILE.png")


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


def _open_share(text: str) -> float:
    value = _number(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: need a number between 0 and 1")
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


def _free(text: str) -> tuple[str, ...]:
    asked = tuple(part.strip() for part in text.split(","))
    if not set(asked) <= {"max_num_seqs", "clock"}:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: need max_num_seqs, clock or both")
    return asked


def _stock(text: str) -> dict[str, float]:
    found = {}
    for part in text.split(","):
        gpu, equals, count = part.partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(f"{part!r} is not allowed: need GPU=N,GPU=N,...")
        found[gpu.strip().lower()] = _not_negative(count)
    return found


def _gamma(text: str) -> float | None:
    if text == "auto":
        return None
    value = _number(text)
    if not 1 <= value <= MAX_GAMMA:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: need a number from 1 to {MAX_GAMMA}, or 'auto'")
    return value


def _axis(text: str) -> tuple[str, list[float]]:
    """(name, values) of an input that is swept, each value as its own option would take it."""
    name, equals, values = text.partition("=")
    name = {"rate": "workload-rate"}.get(name.strip(), name.strip())
    if not equals or name not in AXES:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: need NAME=V1,V2,... of {', '.join(AXES)}")
    found = []
    for value in values.split(","):
        try:
            found.append(AXES[name][1](value.strip()))
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{name}: {error}") from None
    if len(set(found)) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: need at least two different values")
    return name, sorted(set(found))


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


AXES = {  # inputs that pareto sweeps: the option each is, and what checks a value
    "workload-rate": ("rate", _rate),
    "ttft-p99-ms": ("ttft_p99_ms", _positive),
    "itl-ms": ("itl_ms", _positive),
    "pue": ("pue", _at_least_one),
    "usd-per-kwh": ("usd_per_kwh", _not_negative),
    "host-w-per-gpu": ("host_w_per_gpu", _not_negative),
    "max-num-seqs": ("max_num_seqs", _whole(1, 10**6)),
    "tp": ("tp", _whole(1, 64)),
    "pools": ("pools", _whole(1, 6)),
}

PLAN_SAYS = (  # options that a plan file answers
    *("gpu", "llm", "tp", "precision", "kv_precision", "max_num_seqs", "window", "assume", "dispatch"),
    *("ttft_p99_ms", "ttft_ms_per_1k", "itl_ms", "slo_scope"),
    *("host_w_per_gpu", "pue", "usd_per_kwh", "kg_co2_per_kwh"),
    *("compress_success", "compress_ms_per_1k", "compress_j_per_1k"),
)


if __name__ == "__main__":
    entry()
