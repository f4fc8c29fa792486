"""The options of every command, and nothing that needs JAX."""

import argparse
from typing import NoReturn

from fleetopt_jax import __version__
from fleetopt_jax.cli.codes import BAD_INPUT
from fleetopt_jax.cli.values import (
    AXES,
    MAX_TP,
    MAX_WINDOW_TOKENS,
    at_least_one,
    axis,
    batches,
    checkpoint,
    free,
    gamma,
    not_negative,
    one_name,
    open_share,
    positive,
    rate,
    share,
    stock,
    whole,
)

PLAN_SAYS = (  # options that a plan file answers
    *("gpu", "llm", "tp", "precision", "kv_precision", "max_num_seqs", "window", "assume", "dispatch"),
    *("ttft_p99_ms", "ttft_ms_per_1k", "itl_ms", "slo_scope"),
    *("host_w_per_gpu", "pue", "usd_per_kwh", "kg_co2_per_kwh"),
    *("compress_success", "compress_ms_per_1k", "compress_j_per_1k"),
)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        line = "".join(c if c.isprintable() else " " for c in message)
        self.exit(BAD_INPUT, f"{self.prog}: {line} (see {self.prog} --help)\n")


def make_parser() -> Parser:
    """The whole command line."""
    parser = Parser(
        prog="fleetopt",
        description="Find the most energy-efficient way to run a fleet of LLM inference GPUs.",
        epilog="Example: fleetopt optimize --workload azure-cdf --gpu b200 --rate 500. Compiled programs are kept in "
        "~/.cache/fleetopt_jax; delete it to clear them. FLEETOPT_CACHE names another folder, or is 'off'.",
    )
    parser.add_argument("--version", action="version", version=f"fleetopt {__version__}")
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=("bash", "zsh"),
        default=argparse.SUPPRESS,
        help='print a completion script: eval "$(fleetopt --print-completion bash)"',
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for add in (
        _add_optimize,
        _add_evaluate,
        _add_simulate,
        _add_report,
        _add_export,
        _add_pareto,
        _add_sensitivity,
        _add_levers,
        _add_ledger,
        _add_trace,
        _add_engine_command,
        _add_calibrate,
        _add_catalog,
        _add_reproduce,
    ):
        add(commands)
    return parser


class _PrintCompletion(argparse.Action):
    """A script made by shtab, which is imported only here."""

    def __call__(self, parser, namespace, shell, option_string=None) -> NoReturn:
        import shtab

        commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        for command in commands.choices.values():
            for action in command._actions:
                if "FILE" in (action.metavar or "") or "PLAN" in (action.metavar or ""):
                    action.complete = shtab.FILE
        print(shtab.complete(parser, shell))
        parser.exit()


def _add_optimize(commands) -> None:
    optimize = _command(
        commands,
        "optimize",
        "find the plan with the most tokens per joule within the limits",
        "Example: fleetopt optimize --workload mine.csv --gpu h100,b200 --ttft-p99-ms 500 --out plan.json",
    )
    _add_scenario(optimize)
    _add_problem(optimize, several=True)
    _add_budget(optimize)
    _add_search(optimize)
    optimize.add_argument(
        "--free",
        type=free,
        default=(),
        metavar="A,B",
        help="with --method gradient: what each pool may have of its own: max_num_seqs, clock (a projected law)",
    )
    _add_dispatch(optimize, "jsq")
    _add_objective(optimize)
    optimize.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="simulate the winner and add instances where the limits fail",
    )
    _add_figure(optimize, "the pools over the lengths of the requests")
    _add_robust(optimize.add_argument_group("robust", "a plan for engines and traffic that are not what they seem"))
    _add_simulation(optimize.add_argument_group("simulation", "with --verify"))


def _add_evaluate(commands) -> None:
    evaluate = _command(
        commands,
        "evaluate",
        "metrics of a given plan",
        "Example: fleetopt evaluate plan.json --rate 1500 --figure pools.svg",
    )
    evaluate.add_argument("plan", metavar="PLAN.json")
    _add_workload(evaluate, default=None)
    _add_dispatch(evaluate, None)
    _add_figure(evaluate, "the pools over the lengths of the requests")


def _add_simulate(commands) -> None:
    simulate = _command(
        commands,
        "simulate",
        "every iteration of every instance of a plan, beside the analytic metrics",
        "Example: fleetopt optimize --out plan.json && fleetopt simulate plan.json --replications 4",
    )
    simulate.add_argument("plan", metavar="PLAN.json")
    _add_workload(simulate, default=None)
    _add_dispatch(simulate, None)
    _add_simulation(simulate)
    _add_figure(simulate, "simulated over analytic, metric by metric,")


def _add_report(commands) -> None:
    report = _command(
        commands,
        "report",
        "one self-contained page: the decision, figures, assumptions, intervals",
        "Example: fleetopt report plan.json --out report.html. With --json the page's data go to stdout.",
        out="write the page to FILE.html (default report.html)",
    )
    report.set_defaults(out="report.html")
    report.add_argument("plan", metavar="PLAN.json")
    _add_workload(report, default=None)
    _add_dispatch(report, None)
    report.add_argument("--simulate", action="store_true", help="with a simulation of the plan (a minute)")
    _add_simulation(report.add_argument_group("simulation", "with --simulate"))


def _add_export(commands) -> None:
    export = _command(
        commands,
        "export",
        "what deploys a plan: vLLM flags or Kubernetes manifests of each pool, and the router's thresholds",
        "Example: fleetopt export plan.json --to kubernetes --out fleet.yaml --router router.json",
        out="write it to FILE instead of stdout",
    )
    export.add_argument("plan", metavar="PLAN.json")
    export.add_argument("--to", required=True, choices=("vllm", "kubernetes"), help="what runs the engines")
    export.add_argument("--router", metavar="FILE", help="also write the router's thresholds to FILE")
    export.add_argument(
        "--model",
        type=checkpoint,
        action="append",
        default=[],
        metavar="LLM[:PRECISION]=CHECKPOINT",
        help="what vLLM loads for an LLM of the plan (default: the catalog's repository); may be given again",
    )
    export.add_argument("--name", default="fleetopt", help="of the fleet, before its pools' (default fleetopt)")


def _add_ledger(commands) -> None:
    ledger = _command(
        commands,
        "ledger",
        "walk from the published system to the physical one, a choice at a time",
        "Example: fleetopt ledger --workload azure-cdf --gpu b200 --figure ledger.svg",
    )
    _add_scenario(ledger)
    _add_problem(ledger)
    _add_figure(ledger, "the waterfall")


def _add_engine_command(commands) -> None:
    engine = _command(
        commands,
        "engine",
        "step time, throughput, power and tokens per joule of one engine",
        "Example: fleetopt engine --gpu b200 --llm qwen3-235b-a22b --tp 4 --batch 8,32,128 --context 2000",
    )
    _add_engine(engine)
    engine.add_argument("--batch", type=batches, default=[8, 32, 128], help="sequences in flight (default 8,32,128)")
    engine.add_argument("--context", type=positive, default=1024.0, help="mean context in tokens (default 1024)")
    engine.add_argument(
        "--prompt-per-output",
        type=not_negative,
        help="prompt tokens prefilled for each output token (default: the benchmark's own mix)",
    )
    engine.add_argument("--law", action="store_true", help="the law, even where this configuration was measured")
    engine.add_argument(
        "--measured", metavar="FILE.csv", help="measurements to draw beside it, as calibrate reads them"
    )
    _add_figure(engine, "power and tokens per joule over the batch")


def _add_calibrate(commands) -> None:
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
    calibrate.add_argument("--tp", type=whole(1, MAX_TP), help="GPUs per instance (default: the file's)")
    calibrate.add_argument("--precision", help="of the weights (default: the file's)")
    calibrate.add_argument("--model", help="rows of this model only (part of its name)")
    calibrate.add_argument("--task", help="rows of this task only")
    calibrate.add_argument(
        "--form", choices=("auto", "dense", "moe"), default="auto", help="of the step (default auto)"
    )
    _add_figure(calibrate, "fit and residuals")


def _add_trace(commands) -> None:
    trace = _command(
        commands,
        "trace",
        "what is in a workload",
        "Example: fleetopt trace mine.csv --prompt-column in --output-column out --time-column t",
    )
    trace.add_argument("workload", metavar="FILE|NAME")
    _add_rate_and_layout(trace)


def _add_catalog(commands) -> None:
    catalog = _command(commands, "catalog", "what is known by name", "Example: fleetopt catalog llms")
    catalog.add_argument(
        "part",
        nargs="?",
        choices=("gpus", "llms", "engines", "workloads", "schemas"),
        help="default: all but schemas, the JSON Schemas of the files that are read",
    )


def _add_reproduce(commands) -> None:
    reproduce = _command(
        commands, "reproduce", "compare with the published tables, cell by cell", "Example: fleetopt reproduce 1 3"
    )
    reproduce.add_argument("tables", nargs="*", type=whole(1, 5), metavar="TABLE", help="1 to 5; default all")


def _command(
    commands, name: str, summary: str, epilog: str, out: str = "also write the JSON object to FILE"
) -> argparse.ArgumentParser:
    description = summary[0].upper() + summary[1:] + "."
    command = commands.add_parser(name, help=summary, description=description, epilog=epilog)
    command.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    command.add_argument("--out", metavar="FILE", help=out)
    loud = command.add_mutually_exclusive_group()
    loud.add_argument("--quiet", action="store_true", help="no progress, no warnings")
    loud.add_argument("--verbose", action="store_true", help="say on stderr what is done and how long it takes")
    return command


def _add_scenario(command: argparse.ArgumentParser) -> None:
    command.add_argument("--scenario", metavar="FILE.toml", help="options from a file; those given here override it")
    command.add_argument("--save-scenario", metavar="FILE.toml", help="write what is run, to repeat it with --scenario")


def _add_figure(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("--figure", metavar="FILE", help=f"draw {what} as FILE.svg or FILE.png")


def _add_objective(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--objective", choices=("tok_per_j", "usd", "power", "gpus"), default="tok_per_j", help="(default tok_per_j)"
    )


def _add_assume(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--assume",
        default="physical",
        help="physical (default) or published, with choices changed: physical,kv_cache=reserved",
    )


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
        type=whole(100, 10**7),
        metavar="N",
        help="of one replication (default: enough for the warm-up and a window twice as long)",
    )
    command.add_argument("--replications", type=whole(1, 64), default=4, metavar="R", help="(default 4)")
    command.add_argument(
        "--seed", type=whole(0, 2**31 - 1), default=0, metavar="S", help="of what is drawn (default 0)"
    )
    command.add_argument(
        "--staleness-ms", type=not_negative, default=50.0, help="age of what the router knows (default 50)"
    )
    command.add_argument(
        "--arrivals",
        choices=("renewal", "poisson", "trace"),
        default="renewal",
        help="as bursty as the workload's (default), Poisson, or the file's own time stamps, stretched to the rate",
    )
    command.add_argument(
        "--router-width",
        type=not_negative,
        default=0.0,
        metavar="W",
        help="scale of the error in the logarithm of a predicted length (default 0: lengths are known)",
    )


def _add_search(command: argparse.ArgumentParser) -> None:
    command.add_argument("--pools", type=whole(1, 6), default=2, help="most pools to split into, 1 to 6 (default 2)")
    command.add_argument(
        "--gamma",
        type=gamma,
        default=1.0,
        help="compress requests up to GAMMA x window; 'auto' searches (default 1: none)",
    )
    _add_assume(command)
    command.add_argument(
        "--method",
        choices=("exact", "grid", "gradient"),
        help="search: exact proves its answer, gradient relaxes and rounds, grid tries all there is (default exact; "
        "grid with --slo-scope fleet)",
    )


def _add_budget(command: argparse.ArgumentParser) -> None:
    budget = command.add_argument_group("budget", "of all pools together")
    budget.add_argument("--max-gpus", type=positive, metavar="N", help="most GPUs")
    budget.add_argument("--max-power-kw", type=positive, metavar="P", help="most power")
    budget.add_argument("--max-usd-per-h", type=positive, metavar="C", help="most cost")
    budget.add_argument(
        "--gpus-of", type=stock, default={}, metavar="GPU=N,...", help="how many there are of a kind: h100=64,b200=16"
    )


def _add_engine(command: argparse.ArgumentParser, several: bool = False) -> None:
    more = "; several a pool may choose from: h100,b200" if several else ""
    command.add_argument(
        "--gpu",
        type=str if several else one_name,
        default="h100",
        help=f"GPU, or a file that fleetopt calibrate wrote{more} (default h100)",
    )
    command.add_argument(
        "--llm", default="llama-3.1-70b", help="LLM, or a Hugging Face config.json (default llama-3.1-70b)"
    )
    one, many = whole(1, MAX_TP), "; several: 2,4,8" if several else ""
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
    command.add_argument("--max-num-seqs", type=whole(1, 10**6), help="sequences an instance runs (default vLLM's)")
    command.add_argument(
        "--window",
        type=whole(1, MAX_WINDOW_TOKENS),
        help="window of the last pool in tokens (default: the longest request)",
    )
    limits = command.add_argument_group("limits")
    limits.add_argument("--ttft-p99-ms", type=positive, default=500.0, help="P99 time to first token (default 500)")
    limits.add_argument(
        "--ttft-ms-per-1k", type=not_negative, default=0.0, help="and so much more per 1,000 prompt tokens (default 0)"
    )
    limits.add_argument("--itl-ms", type=positive, help="mean inter-token latency (default: no limit)")
    limits.add_argument(
        "--slo-scope",
        choices=("pool", "fleet"),
        default="pool",
        help="every pool holds the latencies, or all requests together (default pool)",
    )
    site = command.add_argument_group("site", "counted only if given; power counts GPU boards otherwise")
    site.add_argument("--host-w-per-gpu", type=not_negative, default=0.0, help="watts of the host a GPU")
    site.add_argument("--pue", type=at_least_one, default=1.0, help="power usage effectiveness")
    site.add_argument("--usd-per-kwh", type=not_negative, default=0.0, help="price of electricity")
    site.add_argument("--kg-co2-per-kwh", type=not_negative, default=0.0, help="carbon intensity of electricity")
    compressor = command.add_argument_group("compression", "of prompts, where gamma exceeds 1")
    compressor.add_argument("--compress-success", type=share, default=1.0, help="share of the tries that do")
    compressor.add_argument("--compress-ms-per-1k", type=not_negative, default=0.0, help="latency, 1,000 prompt tokens")
    compressor.add_argument("--compress-j-per-1k", type=not_negative, default=0.0, help="energy, 1,000 prompt tokens")


def _add_robust(command) -> None:
    command.add_argument(
        "--robust",
        choices=("quantile", "cvar"),
        help="choose by the lower quantile, or the mean of the worst share, of tok/J over scenarios: engines off by "
        "their errors, and every workload named",
    )
    command.add_argument(
        "--robust-level",
        type=open_share,
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
        "Example: fleetopt optimize --out plan.json && fleetopt sensitivity plan.json --figure tornado.svg",
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
    sensitivity.add_argument("--top", type=whole(1, 1000), default=15, metavar="N", help="inputs to show (default 15)")
    sensitivity.add_argument(
        "--reoptimize",
        action="store_true",
        help="check shadow prices: search again at 0.9 and 1.1 times every limit that binds",
    )
    _add_figure(sensitivity, "the tornado")


def _add_pareto(commands) -> None:
    pareto = _command(
        commands,
        "pareto",
        "what tokens per joule, P99 TTFT and cost can be had together",
        "Where ttft_p99_s is an objective, --ttft-p99-ms caps the front (default: no cap) and is the limit that the "
        "reference fleets are sized for (default 500). Examples: fleetopt pareto --workload azure-code --figure "
        "front.svg; fleetopt pareto --axis workload-rate=10,100,1000 --csv rates.csv",
    )
    _add_scenario(pareto)
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
    pareto.add_argument("--points", type=whole(3, 1000), default=24, metavar="N", help="searches to make (default 24)")
    pareto.add_argument(
        "--axis",
        type=axis,
        metavar="NAME=V1,V2,...",
        help=f"instead of a front, the best plan at each value of one of {', '.join(AXES)}",
    )
    _add_search(pareto)
    _add_dispatch(pareto, "jsq")
    _add_figure(pareto, "the front")
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
    _add_scenario(levers)
    _add_problem(levers)
    _add_assume(levers)
    _add_dispatch(levers, "jsq")
    asked = {name: levers.get_default(name) for name in PLAN_SAYS}
    levers.set_defaults(workload=None, plan_says=asked)  # a plan says these itself
    _add_objective(levers)
    levers.add_argument("--next-gpu", metavar="GPU", help="generation to change to (default: the next, h100 to b200)")
    levers.add_argument(
        "--other-llm",
        default="qwen3-235b-a22b",
        metavar="LLM",
        help="model to change to, with answers of its own (default qwen3-235b-a22b)",
    )
    levers.add_argument(
        "--all-pairs",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="every pair that combines, not of the best five only",
    )
    _add_figure(levers, "bars and pairs")


def _add_workload(command: argparse.ArgumentParser, default: str | None) -> None:
    shown = f"default {default}" if default else "default the plan's"
    command.add_argument("--workload", default=default, metavar="NAME|FILE", help=f"bundled workload or file ({shown})")
    _add_rate_and_layout(command, *([] if default else ["the plan's"]))


def _add_rate_and_layout(
    command: argparse.ArgumentParser, default_rate: str = "a file's own mean; 1000 for bundled workloads"
) -> None:
    command.add_argument("--rate", type=rate, metavar="R", help="requests per second (default: the workload's own)")
    command.add_argument(
        "--prompt-column", metavar="C", help="column of the prompt tokens, for a file of another layout"
    )
    command.add_argument("--output-column", metavar="C", help="column of the output tokens")
    command.add_argument("--time-column", metavar="C", help="column of the time stamps (seconds or ISO 8601)")
    command.add_argument("--time-unit", choices=("s", "ms", "us"), help="unit of numeric time stamps (default s)")
