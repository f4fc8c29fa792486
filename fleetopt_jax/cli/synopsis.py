"""The commands as `fleetopt --help` shows them, and those that take much the same."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command as `fleetopt --help` shows it."""

    name: str
    summary: str
    epilog: str
    plan_or_options: bool = False  # a plan may say what its options say


COMMANDS = (
    Command(
        "optimize",
        "find the plan with the most tokens per joule within the limits",
        "Example: fleetopt optimize --workload mine.csv --gpu h100,b200 --ttft-p99-ms 500 --out plan.json",
    ),
    Command(
        "services",
        "find the fleets of several services that share a budget of GPUs, power and money",
        "The scenario has a [[service]] table for each, with its name and whichever keys differ from those of all: "
        "workload, rate, llm (or several), gpu, limits, pools. Example: fleetopt services --scenario "
        "experiments/scenarios/fleet.toml --figure services.svg --out services.json",
    ),
    Command(
        "evaluate",
        "metrics of a given plan; of one that fails, what it breaks and what mends it",
        "Examples: fleetopt evaluate plan.json --rate 800 --figure pools.svg; and a plan grown for more traffic: "
        "fleetopt evaluate plan.json --rate 2000 --repair --out grown.json",
    ),
    Command(
        "simulate",
        "every iteration of every instance of a plan, beside the analytic metrics",
        "Example: fleetopt optimize --out plan.json && fleetopt simulate plan.json --replications 4",
    ),
    Command(
        "compare",
        "a plan beside what was observed of its fleet, and which input explains the difference",
        "FILE is csv, a row for the fleet or one for each pool with a column pool, and whichever are known of "
        "ttft_p50_ms, ttft_p99_ms, itl_ms, tokens_per_s, power_kw, rate_per_s; or vLLM's /metrics pages, one after "
        "another: --over says how long they counted, --since what they had counted before. Examples: fleetopt compare "
        "plan.json --observed observed.csv; fleetopt compare plan.json --observed after.prom --since before.prom "
        "--over 600",
    ),
    Command(
        "report",
        "one self-contained page: the decision, figures, assumptions, intervals",
        "Of a plan, of services that share a budget, or of a day: what optimize, services or schedule wrote. Examples: "
        "fleetopt report plan.json --out report.html; fleetopt report services.json. With --json the page's data go to "
        "stdout.",
    ),
    Command(
        "export",
        "what deploys a plan: vLLM flags, Kubernetes or Dynamo manifests of each pool, and the router's thresholds",
        "Example: fleetopt export plan.json --to kubernetes --out fleet.yaml --router router.json",
    ),
    Command(
        "pareto",
        "what tokens per joule, P99 TTFT and cost can be had together",
        "Where ttft_p99_s is an objective, --ttft-p99-ms caps the front (default: no cap) and is the limit that the "
        "reference fleets are sized for (default 500). Examples: fleetopt pareto --workload azure-code --figure "
        "front.svg; fleetopt pareto --axis workload-rate=10,100,1000 --csv rates.csv",
    ),
    Command(
        "sweep",
        "the best plan of every combination of inputs, thousands of them, as the rows of a Parquet file",
        "Searches of at most two pools with a given gamma and without a budget are answered together, over "
        "--thresholds windows and much faster than one by one; the others as optimize answers them. A sweep that was "
        "ended goes on with the same command. Examples: fleetopt sweep --vary rate=100:1000:10 --vary gpu=h100,b200 "
        "--out rates.parquet; fleetopt sweep --show rates.parquet --figure rates.svg",
    ),
    Command(
        "sensitivity",
        "what a plan's answer rests on: elasticities, intervals, prices of its limits",
        "Example: fleetopt optimize --out plan.json && fleetopt sensitivity plan.json --figure tornado.svg",
    ),
    Command(
        "levers",
        "what pays: from the present fleet one lever released at a time, and pairs of them",
        "The present fleet is PLAN.json's, or the best one-pool fleet of the options. Levers: context routing, gamma, "
        "more pools, prefill and decode apart (on one GPU, or either on the next), tensor parallelism, max_num_seqs, "
        "GPU generation, precision of weights and KV cache, another model, clock, drafts ahead, compressed prompts. "
        "Example: fleetopt levers --workload azure-code --figure levers.svg",
        plan_or_options=True,
    ),
    Command(
        "schedule",
        "what to switch when: a fleet over the hours of a day, with prices and carbon by the hour",
        "Three plans side by side: static for the peak, scheduled, and elastic as if starts were free. Examples: "
        "fleetopt schedule --profile servegen-small --figure day.svg; fleetopt schedule --workload mine.csv --prices "
        "prices.csv --objective usd --min-up-s 3600",
    ),
    Command(
        "ledger",
        "walk from the published system to the physical one, a choice at a time",
        "Examples: fleetopt ledger --workload azure-cdf --gpu b200 --figure ledger.svg; and on to what serves in 2026: "
        "fleetopt ledger --stack --figure stack.svg",
    ),
    Command(
        "trace",
        "what is in a workload",
        "Example: fleetopt trace mine.csv --prompt-column in --output-column out --time-column t",
    ),
    Command(
        "engine",
        "step time, throughput, power and tokens per joule of one engine",
        "Example: fleetopt engine --gpu b200 --llm qwen3-235b-a22b --tp 4 --batch 8,32,128 --context 2000",
    ),
    Command(
        "predict",
        "what a closed-loop benchmark would show, beside what one did",
        "So many requests in flight, all sent at once, each replaced as it ends: TTFT, TPOT, tok/s, watts, tokens per "
        "joule, each with its interval. Example: fleetopt predict --gpu b200 --llm llama-3.1-70b --tp 4 --precision "
        "fp8 --isl 8192 --osl 1024 --concurrency 4,16,64; and of what was measured: fleetopt predict --points "
        "results.json --gpu h100 --tp 4",
    ),
    Command(
        "calibrate",
        "fit an engine to your own measurements",
        "Columns: batch; step_s, step_ms or tok_per_s; context_tokens and power_w_per_gpu where known. Names of the "
        "ML.ENERGY files are known too. Example: fleetopt calibrate mine.csv --gpu h100 --llm llama-3.1-70b --tp 4 "
        "--out mine.json, then fleetopt optimize --gpu mine.json",
    ),
    Command(
        "catalog", "what is known by name, or how a config.json is read", "Example: fleetopt catalog llm config.json"
    ),
    Command("reproduce", "compare with the published tables, cell by cell", "Example: fleetopt reproduce 1 3"),
)

ALL = tuple(command.name for command in COMMANDS)
OF_ONE_HOUR = ("optimize", "services", "pareto", "sweep", "levers", "ledger")  # searches at one rate
SEARCHES = (*OF_ONE_HOUR, "schedule")  # what a scenario says all about
BUDGETED = ("optimize", "services", "pareto", "sweep")  # searches within a budget
SPLITS = (*BUDGETED, "schedule")  # searches that choose among engines and pools
ONE_ENGINE = ("levers", "ledger", "engine")
PLANNED = ("evaluate", "simulate", "compare", "report", "sensitivity")  # a plan under a workload
