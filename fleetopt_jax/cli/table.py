"""The table of options: everything that may be given, its range and unit, who takes it, and what files call it.

The parser, the scenario's model and its JSON Schema, completion and the README's table are all made from these records.
An option that some commands take otherwise (one GPU instead of several) has a record for each way; the widest is first,
and is what a scenario may hold. Nothing here needs JAX or pydantic.
"""

from dataclasses import replace
from functools import cache

from fleetopt_jax.cli.option import Field, Option, Section
from fleetopt_jax.cli.synopsis import ALL, BUDGETED, OF_ONE_HOUR, ONE_ENGINE, PLANNED, SEARCHES, SPLITS
from fleetopt_jax.cli.values import (
    Checkpoint,
    Choice,
    EngineOf,
    Flag,
    FrontOf,
    Growth,
    Number,
    NumberOrAuto,
    NumberOrText,
    OneName,
    OneOf,
    Percent,
    Several,
    Stock,
    Sweep,
    Text,
    Vary,
    flag,
)
from fleetopt_jax.core.units import GB, KW, MS

MAX_WINDOW_TOKENS = 10**9
MAX_GAMMA = 10  # nobody compresses a prompt further
MAX_BATCH = 100_000
MAX_TP = 64
MAX_GPUS = 128  # of an instance
RATES_PER_S = (1e-6, 1e9)
MEMORY_UTILIZATION = 0.9  # as the laws have it; nothing here loads them
MAX_UTILIZATION = 0.85  # likewise
MIN_CLOCK_FRAC = 0.4  # likewise

POSITIVE = Number(0, open=True)
NOT_NEGATIVE = Number(0)
LIMIT_MS = replace(POSITIVE, unit="ms")
SIZED = (*SPLITS, "levers")  # what sizes fleets with instances that may be down

# ------------------------------------------------------------------------------------------- sections of a scenario

WORKLOAD = Section("workload", "What is asked of the fleet.")
ENGINES = Section("engines", "What the pools may be made of.", of_plan=True)
LIMITS = Section("limits", "What every pool, or the fleet, must hold.", dict.fromkeys(SEARCHES, ""), of_plan=True)
BUDGET = Section("budget", "What all pools may use together.", dict.fromkeys(BUDGETED, "of all pools together"))
SITE = Section(
    "site",
    "What is counted besides GPU boards.",
    dict.fromkeys(SEARCHES, "counted only if given; power counts GPU boards otherwise"),
    of_plan=True,
)
FAILURES = Section(
    "failures",
    "What may be down while the limits hold.",
    dict.fromkeys(SIZED, "what of every pool may be down while it holds its limits"),
    of_plan=True,
)
COMPRESSION = Section(
    "compression",
    "Of prompts, where gamma exceeds 1.",
    dict.fromkeys(SEARCHES, "of prompts, where gamma exceeds 1"),
    of_plan=True,
)
SEARCH = Section("search", "How the plan is searched.")
ROBUST = Section(
    "robust",
    "A plan for engines and traffic that are not what they seem.",
    {"optimize": "a plan for engines and traffic that are not what they seem"},
)
SIMULATION = Section("simulation", "With verify.", {"optimize": "with --verify", "report": "with --simulate"})
SWEEP = Section("sweep", "What `fleetopt sweep` varies.")
FRONT = Section("front", "What `fleetopt pareto` draws, and `fleetopt services --front`.")
LEVERS = Section("levers", "What `fleetopt levers` changes to, and `fleetopt services --levers`.")
HOURS = Section(
    "hours",
    "What `fleetopt schedule` switches instances by.",
    {"schedule": "when requests come, what electricity costs, and how instances are switched"},
)
SECTIONS = (
    *(WORKLOAD, ENGINES, LIMITS, BUDGET, FAILURES, SITE, COMPRESSION),
    *(SEARCH, ROBUST, SIMULATION, FRONT, SWEEP, LEVERS, HOURS),
)

# ------------------------------------------------------------------------------------- what is run, and what is written

_OUT = Option(
    name="out",
    kind=Text(),
    about="also write the JSON object to FILE",
    commands=tuple(name for name in ALL if name not in ("report", "export", "sweep")),
    metavar="FILE",
    file="written",
)
_PLAN = Option(
    name="plan",
    kind=Text(),
    commands=("export", *(name for name in PLANNED if name != "report")),
    metavar="PLAN.json",
    file="read",
    nargs="",
)
_OF_THE_RUN = (
    Option(name="json", kind=Flag(), about="print one JSON object and nothing else", default=False, commands=ALL),
    _OUT,
    replace(
        _OUT, about="write the page to FILE.html", default="report.html", otherwise="default {}", commands=("report",)
    ),
    replace(_OUT, about="write it to FILE instead of stdout", commands=("export",)),
    replace(
        _OUT,
        about="where the rows go; goes on from FILE.parts, if it is there",
        commands=("sweep",),
        metavar="FILE.parquet",
    ),
    Option(name="quiet", kind=Flag(), about="no progress, no warnings", default=False, commands=ALL, alone=True),
    Option(
        name="verbose",
        kind=Flag(),
        about="say on stderr what is done and how long it takes",
        default=False,
        commands=ALL,
        alone=True,
    ),
    _PLAN,
    replace(_PLAN, about="a plan, or what services or schedule wrote with --out", commands=("report",)),
    replace(
        _PLAN, about="the present fleet; --workload and --rate may change its traffic", commands=("levers",), nargs="?"
    ),
    Option(name="measurements", kind=Text(), commands=("calibrate",), metavar="FILE", file="read", nargs=""),
    Option(name="workload", kind=Text(), commands=("trace",), metavar="FILE|NAME", file="named", nargs=""),
    Option(
        name="scenario",
        kind=Text(),
        about="options from a file; those given here override it",
        commands=SEARCHES,
        metavar="FILE.toml",
        file="read",
    ),
    Option(
        name="save_scenario",
        kind=Text(),
        about="write what is run, to repeat it with --scenario",
        commands=SEARCHES,
        metavar="FILE.toml",
        file="written",
    ),
)

# --------------------------------------------------------------------------------------------------------- the workload

_WITH_A_WORKLOAD = (*SEARCHES, *PLANNED, "trace")
_WORKLOAD = Option(
    name="workload",
    kind=Text(),
    about="bundled workload or file",
    default="azure-conv",
    otherwise="default azure-conv",
    commands=(*SPLITS, "ledger"),
    metavar="NAME|FILE",
    section=WORKLOAD,
    key="name",
    file="named",
)
_COLUMN = Option(name="", kind=Text(), commands=_WITH_A_WORKLOAD, metavar="C", section=WORKLOAD)
_OF_THE_WORKLOAD = (
    _WORKLOAD,
    replace(_WORKLOAD, default=None, commands=("levers",)),  # where a plan is given, its own
    replace(_WORKLOAD, default=None, otherwise="default the plan's", commands=PLANNED),
    Option(
        name="rate",
        kind=Number(*RATES_PER_S, unit="requests per second"),
        about="requests per second",
        otherwise="default: the workload's own",
        commands=_WITH_A_WORKLOAD,
        metavar="R",
        section=WORKLOAD,
        field=Field("arrival_rate_per_s"),
    ),
    Option(
        name="at",
        kind=Choice(("mean", "peak", "p95")),
        about="plan for the mean rate of a trace, its busiest hour, or the 95th percentile of its hours; --rate stays "
        "the mean of all hours",
        otherwise="default: mean; the plan's where one is given",
        commands=(*OF_ONE_HOUR, *PLANNED),
        section=WORKLOAD,
    ),
    replace(_COLUMN, name="prompt_column", about="column of the prompt tokens, for a file of another layout"),
    replace(_COLUMN, name="output_column", about="column of the output tokens"),
    replace(_COLUMN, name="time_column", about="column of the time stamps (numbers or ISO 8601)"),
    replace(_COLUMN, name="count_column", about="column of how many requests a row sums"),
    Option(
        name="time_unit",
        kind=Choice(("s", "ms", "us", "ns")),
        about="unit of numeric time stamps",
        otherwise="default: what their digits tell",
        commands=_WITH_A_WORKLOAD,
        section=WORKLOAD,
    ),
    Option(
        name="zero_output",
        kind=Choice(("keep", "drop")),
        about="requests without output tokens: keep as prefilled only, or drop",
        otherwise="default keep",
        commands=_WITH_A_WORKLOAD,
        section=WORKLOAD,
    ),
    Option(
        name="block_tokens",
        kind=Number(1, 10**6, whole=True, unit="tokens"),
        about="tokens of a prompt that one of its block hashes stands for",
        otherwise="default: the layout's, or 512",
        commands=_WITH_A_WORKLOAD,
        metavar="N",
        section=WORKLOAD,
        field=Field("block_tokens"),
    ),
    Option(
        name="prefix_hit",
        kind=NumberOrText(Number(0, 0.999), "'trace' or a file of a hit curve"),
        about="what prompts find in the KV cache: a share of their tokens; 'trace', what block hashes or sessions "
        "tell; or a file of shares over cache_tokens or age_s. To levers and a last row of the ledger, a share that "
        "they would find, or to levers a curve",
        otherwise="default 0; the plan's where one is given",
        commands=(*SEARCHES, *PLANNED),
        metavar="SHARE|trace|FILE",
        section=WORKLOAD,
        file="named",
        field=Field("prefix_hit"),
    ),
    Option(
        name="sticky",
        kind=Number(1, 1000),
        about="conversations stay in the pool that they began in, where so many times their first turn fits, until a "
        "turn no longer does; of a trace with block hashes or sessions",
        otherwise="default: each request goes by its own length",
        commands=("optimize", "pareto", "sweep"),
        metavar="HEADROOM",
        section=WORKLOAD,
        field=Field("sticky"),
    ),
)

# ---------------------------------------------------------------------------------------------------------- the engines

_NAMES = Several(OneName())
_GPUS_PER_INSTANCE = Several(Number(1, MAX_TP, whole=True))
_GPU = Option(
    name="gpu",
    kind=replace(_NAMES, as_text=True),
    about="GPU, or a file that fleetopt calibrate wrote",
    several="; several a pool may choose from: h100,b200",
    default="h100",
    otherwise="default {}",
    commands=SPLITS,
    section=ENGINES,
    file="named",
)
_TP = Option(
    name="tp",
    kind=_GPUS_PER_INSTANCE,
    about="GPUs per instance",
    several="; several: 2,4,8",
    default=[8],
    otherwise="default {}",
    commands=SPLITS,
    section=ENGINES,
)
_PRECISION = Option(
    name="precision",
    kind=replace(_NAMES, as_text=True),
    about="of the weights: bf16, fp8, int8, int4, mxfp4, nvfp4",
    several="; several: bf16,fp8",
    otherwise="default: the checkpoint's",
    commands=SPLITS,
    section=ENGINES,
)
_SHARED = Option(
    name="",
    kind=Number(1, MAX_GPUS, whole=True),
    default=1,
    otherwise="default {}",
    commands=(*SEARCHES, "engine"),
    metavar="N",
    section=ENGINES,
)
_OF_THE_ROW = {"default": None, "otherwise": "default 1; of --points the row's", "commands": ("predict",)}
_OF_THE_FILE = {"default": None, "otherwise": "default: the file's", "commands": ("calibrate",)}
_EP = replace(_SHARED, name="ep", about="groups of GPUs that divide the experts whole; all GPUs or 1 in vLLM")
_DP = replace(_SHARED, name="dp", about="groups of --tp GPUs with sequences of their own, that share the experts")
_PP = replace(_SHARED, name="pp", about="pipeline stages of layers; an instance has tp x dp x pp GPUs")
_SERVING = Option(
    name="serving",
    kind=OneName(),
    about="serving engine: vllm (0.12 and newer), vllm-0.11, sglang, trtllm",
    otherwise="default vllm",
    commands=(*SEARCHES, "engine"),
    section=ENGINES,
)
_CATALOG = Option(
    name="catalog",
    kind=Text(),
    about="GPUs, LLMs and prices of your own, beside the catalog's",
    commands=(*SEARCHES, "engine", "calibrate", "catalog", "predict"),
    metavar="FILE.toml",
    section=ENGINES,
    of_plan=False,
    file="named",
)
_SERVE = Option(
    name="serve",
    kind=Choice(("mixed", "disaggregated", "any")),
    about="each pool by instances that do all, by a prefill and a decode stage, or by whichever is better",
    default="mixed",
    otherwise="default {}",
    commands=("optimize", "services", "pareto"),
    section=ENGINES,
)
_STAGE = Option(
    name="prefill_gpu",
    kind=Several(
        EngineOf(
            keys={
                **dict.fromkeys(("tp", "ep", "dp", "pp"), Number(1, MAX_TP, whole=True)),
                "precision": OneName(),
                "max_num_seqs": Number(1, 10**6, whole=True),
                "max_num_batched_tokens": Number(1, 10**6, whole=True),
                "clock": Number(MIN_CLOCK_FRAC, 1),
                "power_limit_w": replace(POSITIVE, unit="W"),
            }
        ),
        bare=False,
    ),
    about="with --serve: what prefill stages may be of, and what of it is otherwise: h100:tp=4:clock=0.8,h200",
    otherwise="default: --gpu's, with --tp and the like",
    commands=("optimize", "services", "pareto"),
    metavar="GPU[:KEY=VALUE...],...",
    section=ENGINES,
    file="named",
    field=Field("prefill_specs"),
)
_OF_THE_ENGINE = (
    _GPU,
    replace(_GPU, kind=OneOf(_NAMES), several="", commands=ONE_ENGINE),
    Option(
        name="llm",
        kind=Text(),
        about="LLM, or a Hugging Face config.json",
        default="llama-3.1-70b",
        otherwise="default {}",
        commands=(*SEARCHES, "engine"),
        section=ENGINES,
        file="named",
    ),
    _TP,
    replace(_TP, kind=OneOf(_GPUS_PER_INSTANCE), several="", default=8, commands=ONE_ENGINE),
    _EP,
    _DP,
    _PP,
    _PRECISION,
    replace(_PRECISION, several="", commands=ONE_ENGINE),
    Option(
        name="kv_precision",
        kind=Text(),
        about="of the KV cache: bf16 or fp8",
        otherwise="default: the checkpoint's",
        commands=(*SEARCHES, "engine", "predict"),
        section=ENGINES,
    ),
    Option(
        name="max_num_seqs",
        kind=Number(1, 10**6, whole=True),
        about="sequences an instance runs",
        otherwise="default vLLM's",
        commands=(*SEARCHES, "predict"),
        section=ENGINES,
    ),
    Option(
        name="max_num_batched_tokens",
        kind=Number(1, 10**6, whole=True, unit="tokens"),
        about="tokens of a step, each of --dp groups and --pp stages",
        otherwise="default vLLM's",
        commands=(*SEARCHES, "engine", "predict"),
        metavar="N",
        section=ENGINES,
    ),
    Option(
        name="speculate",
        kind=replace(_NAMES, as_text=True),
        about="tokens drafted ahead: none, eagle3:3, mtp:1, ngram:4, or a file of your own",
        several="; several a pool may choose from; eagle3 alone: none to 5",
        otherwise="default none",
        commands=SPLITS,
        metavar="HEAD:K",
        section=ENGINES,
        file="named",
    ),
    Option(
        name="speculate",
        kind=OneOf(_NAMES),
        about="tokens drafted ahead: none, eagle3:3, mtp:1, ngram:4, or a file of your own",
        otherwise="default none",
        commands=("levers", "engine"),
        metavar="HEAD:K",
        section=ENGINES,
        file="named",
    ),
    _SERVING,
    replace(_SERVING, otherwise="default the plan's", commands=PLANNED),
    _SERVE,
    _STAGE,
    replace(
        _STAGE,
        name="decode_gpu",
        about="and what decode stages may be of: h200:tp=8:max_num_seqs=512",
        field=Field("decode_specs"),
    ),
    Option(
        name="kv_link",
        kind=Text(),
        about="what KV caches are handed over by: nvlink, infiniband, ethernet, or GB/s of each GPU[,latency in ms]",
        default="infiniband",
        otherwise="default {}",
        commands=("optimize", "services", "pareto", "levers", "ledger"),
        metavar="LINK",
        section=ENGINES,
    ),
    Option(
        name="gpu_memory_utilization",
        kind=Number(0.01, 1),
        about="share of each GPU's memory the engine may use",
        default=MEMORY_UTILIZATION,
        otherwise="default {}",
        commands=(*SEARCHES, "engine", "predict"),
        metavar="SHARE",
        section=ENGINES,
        field=Field("memory_utilization"),
    ),
    Option(
        name="gpu_power_limit_w",
        kind=replace(POSITIVE, unit="W"),
        about="what each GPU's board may draw, as nvidia-smi -pl limits it: cores slow down where they would draw more",
        otherwise="default: its TDP",
        commands=(*SEARCHES, "engine", "predict"),
        metavar="W",
        section=ENGINES,
        field=Field("power_limit_w"),
    ),
    Option(
        name="host_cache_gb",
        kind=replace(NOT_NEGATIVE, unit="GB"),
        about="host memory in which each GPU keeps what its prefix cache lets go, with --prefix-hit trace or a curve",
        otherwise="default 0; the plan's where one is given",
        commands=("optimize", "pareto", "sweep", *PLANNED),
        metavar="GB",
        section=ENGINES,
        field=Field("host_cache_bytes", GB),
    ),
    Option(
        name="host_cache_gb_per_s",
        kind=replace(POSITIVE, unit="GB/s"),
        about="by which each GPU loads what it finds there",
        otherwise="default 50; the plan's where one is given",
        commands=("optimize", "pareto", "sweep", *PLANNED),
        metavar="GB/s",
        section=ENGINES,
        field=Field("host_cache_bytes_per_s", GB),
    ),
    _CATALOG,
    replace(_CATALOG, otherwise="default: the plan's", commands=(*PLANNED, "export")),
    Option(
        name="usd_per_gpu_h",
        kind=Stock(OneName(), NOT_NEGATIVE, "USD"),
        about="prices of GPUs: h100=2.1,b200=4",
        default={},
        otherwise="default: the catalog's",
        commands=SEARCHES,
        metavar="GPU=USD,...",
        section=ENGINES,
        of_plan=False,
    ),
)

# -------------------------------------------------------------------------------------- limits, budget and surroundings

_TTFT = Option(
    name="ttft_p99_ms",
    kind=LIMIT_MS,
    about="P99 time to first token",
    default=500.0,
    otherwise="default 500",
    commands=("optimize", "services", "sweep", "levers", "schedule", "ledger"),
    section=LIMITS,
    field=Field("ttft_p99_s", MS),
)
_OF_THE_LIMITS = (
    Option(
        name="window",
        kind=Number(1, MAX_WINDOW_TOKENS, whole=True, unit="tokens"),
        about="window of the last pool in tokens",
        otherwise="default: the longest request",
        commands=SEARCHES,
        section=LIMITS,
        grouped=False,
        field=Field("window_tokens"),
    ),
    _TTFT,
    replace(_TTFT, default=None, commands=("pareto",)),  # no cap of the front, unless given
    Option(
        name="ttft_ms_per_1k",
        kind=replace(NOT_NEGATIVE, unit="ms"),
        about="and so much more per 1,000 prompt tokens",
        default=0.0,
        otherwise="default {}",
        commands=SEARCHES,
        section=LIMITS,
        field=Field("ttft_s_per_token", MS / 1000.0),
    ),
    Option(
        name="itl_ms",
        kind=LIMIT_MS,
        about="mean inter-token latency",
        otherwise="default: no limit",
        commands=SEARCHES,
        section=LIMITS,
        field=Field("itl_s", MS),
    ),
    Option(
        name="end_to_end_s",
        kind=replace(POSITIVE, unit="s"),
        about="from a request to the end of its answer: P99 time to first token, and the longest answer at the mean "
        "inter-token latency",
        otherwise="default: no limit",
        commands=("services",),
        metavar="S",
        section=LIMITS,
    ),
    Option(
        name="max_utilization",
        kind=Number(0, 1, open=True),
        about="most load of an instance, of what it can take",
        default=MAX_UTILIZATION,
        otherwise="default {}",
        commands=SEARCHES,
        metavar="SHARE",
        section=LIMITS,
        field=Field("max_utilization"),
    ),
    Option(
        name="slo_scope",
        kind=Choice(("pool", "fleet")),
        about="every pool holds the latencies, or all requests together",
        default="pool",
        otherwise="default {}",
        commands=SEARCHES,
        section=LIMITS,
        field=Field("scope"),
    ),
)
_OF_THE_SITE = (
    Option(
        name="host_w_per_gpu",
        kind=replace(NOT_NEGATIVE, unit="W"),
        about="watts of the host a GPU",
        default=0.0,
        commands=SEARCHES,
        section=SITE,
        field=Field("host_w_per_gpu"),
    ),
    Option(
        name="pue",
        kind=Number(1),
        about="power usage effectiveness",
        default=1.0,
        commands=SEARCHES,
        section=SITE,
        field=Field("pue"),
    ),
    Option(
        name="usd_per_kwh",
        kind=replace(NOT_NEGATIVE, unit="USD/kWh"),
        about="price of electricity",
        default=0.0,
        commands=SEARCHES,
        section=SITE,
        field=Field("usd_per_kwh"),
    ),
    Option(
        name="kg_co2_per_kwh",
        kind=replace(NOT_NEGATIVE, unit="kg/kWh"),
        about="carbon intensity of electricity",
        default=0.0,
        commands=SEARCHES,
        section=SITE,
        field=Field("kg_co2_per_kwh"),
    ),
    Option(
        name="compress_success",
        kind=Number(0, 1),
        about="share of the tries that do",
        default=1.0,
        commands=SEARCHES,
        section=COMPRESSION,
        field=Field("success_frac"),
    ),
    Option(
        name="compress_ms_per_1k",
        kind=replace(NOT_NEGATIVE, unit="ms"),
        about="latency, 1,000 prompt tokens",
        default=0.0,
        commands=SEARCHES,
        section=COMPRESSION,
        field=Field("s_per_token", MS / 1000.0),
    ),
    Option(
        name="compress_j_per_1k",
        kind=replace(NOT_NEGATIVE, unit="J"),
        about="energy, 1,000 prompt tokens",
        default=0.0,
        commands=SEARCHES,
        section=COMPRESSION,
        field=Field("j_per_token", 1.0 / 1000.0),
    ),
)
_REPAIR = Option(
    name="repair_h",
    kind=replace(NOT_NEGATIVE, unit="h"),
    about="mean hours from a failure to when its instances serve again: says how often pools hold",
    commands=SIZED,
    metavar="H",
    section=FAILURES,
    field=Field("repair_h"),
)
_GPU_MTBF = Option(
    name="gpu_mtbf_h",
    kind=replace(POSITIVE, unit="h"),
    about="mean hours between failures of one GPU, with --repair-h",
    otherwise="default 79,230, as in training Llama 3",
    commands=SIZED,
    metavar="H",
    section=FAILURES,
    field=Field("gpu_mtbf_h"),
)
_NODE_MTBF = Option(
    name="node_mtbf_h",
    kind=replace(POSITIVE, unit="h"),
    about="and of what takes a whole node",
    otherwise="default 30,161, likewise",
    commands=SIZED,
    metavar="H",
    section=FAILURES,
    field=Field("node_mtbf_h"),
)
_PER_NODE = Option(
    name="gpus_per_node",
    kind=Number(1, 72, whole=True),
    about="GPUs that a node holds",
    default=8,
    otherwise="default {}",
    commands=SIZED,
    metavar="N",
    section=FAILURES,
    field=Field("gpus_per_node"),
)
_OF_THE_FAILURES = (
    Option(
        name="spare",
        kind=Number(0, 1000, whole=True),
        about="instances of every pool that may be down: N + k",
        default=0,
        otherwise="default {}",
        commands=SIZED,
        metavar="K",
        section=FAILURES,
        field=Field("spare"),
    ),
    Option(
        name="spare_nodes",
        kind=Number(0, 1000, whole=True),
        about="nodes of every pool that may be down, with all instances on them",
        default=0,
        otherwise="default {}",
        commands=SIZED,
        metavar="K",
        section=FAILURES,
        field=Field("spare_nodes"),
    ),
    Option(
        name="availability",
        kind=Number(0, 1, open=True),
        about="instead, the least share of the time in which every pool holds, with GPUs and nodes that fail",
        commands=SIZED,
        metavar="SHARE",
        section=FAILURES,
        field=Field("availability"),
    ),
    _REPAIR,
    _GPU_MTBF,
    _NODE_MTBF,
    _PER_NODE,
)
_OF_THE_BUDGET = (
    Option(
        name="max_gpus",
        kind=POSITIVE,
        about="most GPUs",
        commands=BUDGETED,
        metavar="N",
        section=BUDGET,
        field=Field("max_gpus"),
    ),
    Option(
        name="max_power_kw",
        kind=replace(POSITIVE, unit="kW"),
        about="most power",
        commands=BUDGETED,
        metavar="P",
        section=BUDGET,
        field=Field("max_power_w", KW),
    ),
    Option(
        name="max_usd_per_h",
        kind=replace(POSITIVE, unit="USD/h"),
        about="most cost",
        commands=BUDGETED,
        metavar="C",
        section=BUDGET,
        field=Field("max_usd_per_h"),
    ),
    Option(
        name="max_kg_co2_per_h",
        kind=replace(POSITIVE, unit="kg/h"),
        about="most CO2",
        commands=BUDGETED,
        metavar="C",
        section=BUDGET,
        field=Field("max_kg_co2_per_h"),
    ),
    Option(
        name="gpus_of",
        kind=Stock(OneName(), NOT_NEGATIVE),
        about="how many there are of a kind: h100=64,b200=16",
        default={},
        commands=BUDGETED,
        metavar="GPU=N,...",
        section=BUDGET,
        field=Field("gpus_of"),
    ),
    Option(
        name="buy",
        kind=Stock(OneName(), NOT_NEGATIVE),
        about="how many more of a kind in stock may be had: b200=40",
        default={},
        otherwise="default: none",
        commands=("services",),
        metavar="GPU=N,...",
        section=BUDGET,
    ),
    Option(
        name="buy_usd_per_gpu_h",
        kind=Stock(OneName(), NOT_NEGATIVE, "USD"),
        about="what an hour of one of those costs: b200=7",
        default={},
        otherwise="default: as much as one in stock",
        commands=("services",),
        metavar="GPU=USD,...",
        section=BUDGET,
    ),
)

# ----------------------------------------------------------------------------------------------------------- the search

_DISPATCH = Option(
    name="dispatch",
    kind=Choice(("jsq", "round_robin", "random", "affinity", "bounded_hash")),
    about="requests of a pool go to its shortest queue, in turn, at random, or by how their prompts begin, with a "
    "loose or a strict bound on the load of an instance",
    default="jsq",
    otherwise="default jsq",
    commands=(*SPLITS, "levers"),
    section=SEARCH,
    of_plan=True,
)
_OF_THE_SEARCH = (
    Option(
        name="pools",
        kind=Number(1, 6, whole=True),
        about="most pools to split into, 1 to 6",
        default=2,
        otherwise="default {}",
        commands=SPLITS,
        section=SEARCH,
        field=Field("n_pools"),
    ),
    Option(
        name="gamma",
        kind=NumberOrAuto(Number(1, MAX_GAMMA)),
        about="compress requests up to GAMMA x window; 'auto' searches",
        default=1.0,
        otherwise="default {}: none",
        commands=SPLITS,
        section=SEARCH,
        field=Field("gamma"),
    ),
    Option(
        name="assume",
        kind=Text(letters=r"[\w,= ]", most=1000),
        about="physical (default) or published, with choices changed: physical,kv_cache=reserved",
        default="physical",
        commands=(*SPLITS, "levers"),
        section=SEARCH,
        of_plan=True,
    ),
    Option(
        name="stack",
        kind=Flag(negated=True),
        about="instead, from the physical system to a stack of 2026: a newer engine, prefill and decode apart, a "
        "prefix cache (0.36 of every prompt is found, or what --prefix-hit says) and drafts, each searched anew",
        default=False,
        commands=("ledger",),
        section=SEARCH,
    ),
    Option(
        name="method",
        kind=Choice(("exact", "grid", "gradient")),
        about="search: exact proves its answer, gradient relaxes and rounds, grid tries all there is",
        otherwise="default exact; grid with --slo-scope fleet or --prefix-hit trace or a curve",
        commands=("optimize", "pareto", "sweep"),
        section=SEARCH,
    ),
    Option(
        name="free",
        kind=Several(Choice(("max_num_seqs", "clock")), most=2, bare=False),
        about="with --method gradient: what each pool may have of its own: max_num_seqs, clock (a projected law)",
        default=(),
        commands=("optimize", "sweep"),
        metavar="A,B",
        section=SEARCH,
    ),
    _DISPATCH,
    replace(_DISPATCH, default=None, otherwise="default as planned", commands=PLANNED),
    Option(
        name="objective",
        kind=Choice(("tok_per_j", "usd", "power", "gpus", "co2")),
        about="what is best: most tokens per joule, or least cost, power, GPUs or CO2 (with --kg-co2-per-kwh)",
        default="tok_per_j",
        otherwise="default {}",
        commands=("optimize", "services", "sweep", "levers", "schedule"),
        section=SEARCH,
    ),
    Option(
        name="confidence",
        kind=Percent(Number(0.01, 0.99)),
        about="least probability with which the limits hold, under the errors of engines and laws",
        otherwise="default: as engines and laws stand",
        commands=("optimize", "pareto"),
        metavar="P",
        section=SEARCH,
    ),
    Option(
        name="verify",
        kind=Flag(negated=True),
        about="the simulator decides: the best fleet that holds in it, of every pool count, instances added or freed",
        default=False,
        commands=("optimize",),
        section=SEARCH,
    ),
)

_BY_NAME = {  # of two ways the later: one value, as a sweep takes it
    option.name: option
    for option in (
        *(*_OF_THE_WORKLOAD, *_OF_THE_ENGINE, *_OF_THE_LIMITS, *_OF_THE_FAILURES),
        *(*_OF_THE_SITE, *_OF_THE_SEARCH),
    )
}
AXES = {  # inputs that pareto sweeps: the option each is, and what checks a value
    "workload-rate" if name == "rate" else flag(name).removeprefix("--"): (name, _BY_NAME[name].kind)
    for name in (
        *("rate", "ttft_p99_ms", "itl_ms", "pue", "usd_per_kwh", "host_w_per_gpu", "max_num_seqs", "tp", "pools"),
        *("spare", "spare_nodes", "availability", "confidence"),
    )
}
USUAL = {  # values of an axis that is named alone
    "confidence": "0.5,0.6,0.7,0.8,0.9,0.95",
    "spare": "0,1,2,3",
    "spare-nodes": "0,1,2",
    "availability": "0.9,0.99,0.999,0.9999",
}  # values of an axis that is named alone
_OF_THE_FRONT = (
    Option(
        name="objectives",
        kind=Several(Choice(("tok_per_j", "ttft_p99_s", "usd_per_h")), least=2, most=None, bare=False),
        about="two or three of tok_per_j, ttft_p99_s, usd_per_h",
        default=["tok_per_j", "ttft_p99_s"],
        otherwise="default {}",
        commands=("pareto",),
        metavar="A,B[,C]",
        section=FRONT,
    ),
    Option(
        name="points",
        kind=Number(3, 1000, whole=True),
        about="searches to make",
        default=24,
        otherwise="default {}",
        commands=("pareto",),
        metavar="N",
        section=FRONT,
        field=Field("n_points"),
    ),
    Option(
        name="axis",
        kind=Sweep(AXES, USUAL),
        about=f"instead of a front, the best plan at each value of one of {', '.join(AXES)}",
        commands=("pareto",),
        metavar="NAME=V1,V2,...",
        section=FRONT,
    ),
    Option(
        name="front",
        kind=FrontOf(("kg_co2_per_h", "usd_per_h", "tok_per_j", "n_gpus"), "ttft-p99-ms", LIMIT_MS),
        about="instead of one plan, a front of all services: two of kg_co2_per_h, usd_per_h, tok_per_j, n_gpus against "
        "each other; or tokens per joule of all at limits of the P99 TTFT of one: ttft-p99-ms:chat=200,500",
        otherwise="limits left out: from a quarter of what is asked to four times that",
        commands=("services",),
        metavar="A,B|ttft-p99-ms:SERVICE[=V1,...]",
        section=FRONT,
        key="services",
    ),
    Option(
        name="points",
        kind=Number(3, 1000, whole=True),
        about="with --front: searches to make",
        default=9,
        otherwise="default {}",
        commands=("services",),
        metavar="N",
        section=FRONT,
        field=Field("n_points"),
    ),
    Option(
        name="stricter",
        kind=Percent(Number(0.001, 0.99)),
        about="also what it costs to promise each service a P99 TTFT, or a batch its deadline, tighter by so much",
        commands=("services",),
        metavar="SHARE",
        section=FRONT,
        field=Field("tighter_frac"),
    ),
)
_SCENARIO = (
    *(*_OF_THE_WORKLOAD, *_OF_THE_ENGINE, *_OF_THE_LIMITS, *_OF_THE_FAILURES),
    *(*_OF_THE_SITE, *_OF_THE_BUDGET, *_OF_THE_SEARCH),
)
_VARIED = {  # inputs that a sweep varies, by their names and keys: all of a scenario, but for what names them
    name: (option.name, option.kind)
    for option in _SCENARIO
    if "sweep" in option.commands and option.section and option.name not in ("free", "catalog")
    for name in filter(None, (option.name, option.key))
}
_OF_THE_SWEEP = (
    Option(
        name="vary",
        kind=Vary(_VARIED),
        about="an input, an option of this command, and its values: rate=100:1000:10 (10 numbers from 100 to 1,000), "
        "gpu=h100,b200; with semicolons where a value has commas: tp=4;8;4,8. May be given again: every combination is "
        "a scenario",
        commands=("sweep",),
        metavar="KEY=VALUES",
        section=SWEEP,
    ),
    Option(
        name="thresholds",
        kind=Number(1, 65_536, whole=True),
        about="windows that a search of two pools tries, where scenarios are answered together",
        default=256,
        otherwise="default {}",
        commands=("sweep",),
        metavar="N",
        section=SWEEP,
    ),
    Option(
        name="workers",
        kind=Number(1, 4096, whole=True),
        about="processes that share the scenarios; with --address, units of work that are given out",
        default=1,
        otherwise="default {}: this one, on all of its cores and devices",
        commands=("sweep",),
        metavar="N",
    ),
    Option(
        name="address",
        kind=Text(),
        about="of a Ray cluster whose workers share the scenarios: auto, host:port, or local to start one here (pip "
        "install 'fleetopt_jax[ray]')",
        commands=("sweep",),
        metavar="ADDRESS",
    ),
    Option(
        name="show",
        kind=Text(),
        about="print the rows of a sweep that is there, and draw them with --figure, instead of making one",
        commands=("sweep",),
        metavar="FILE.parquet",
        file="read",
    ),
)
_OF_THE_HOURS = (
    Option(
        name="profile",
        kind=Text(),
        about="requests a second by period: servegen-small, servegen-mid or servegen-large (a mean day; with -10d ten "
        "days), or csv: start_s, hour, period or time stamps, and rate",
        otherwise="default: the trace's own hours; servegen-large where it has none",
        commands=("schedule",),
        metavar="NAME|FILE",
        section=HOURS,
        file="named",
    ),
    Option(
        name="prices",
        kind=Text(),
        about="price of electricity by period, csv: usd_per_kwh or usd_per_mwh, negative ones too",
        otherwise="default: --usd-per-kwh in all",
        commands=("schedule",),
        metavar="FILE",
        section=HOURS,
        file="named",
    ),
    Option(
        name="carbon",
        kind=Text(),
        about="carbon intensity of electricity by period, csv: g_per_kwh or kg_per_kwh",
        otherwise="default: --kg-co2-per-kwh in all",
        commands=("schedule",),
        metavar="FILE",
        section=HOURS,
        file="named",
    ),
    Option(
        name="start_up_s",
        kind=replace(NOT_NEGATIVE, unit="s"),
        about="from the start of an instance to its first request",
        otherwise="default: 100 s and its weights at 2 GB/s",
        commands=("schedule",),
        section=HOURS,
        field=Field("start_up_s"),
    ),
    Option(
        name="min_up_s",
        kind=replace(NOT_NEGATIVE, unit="s"),
        about="a pool that grew stays as large for so long",
        default=0.0,
        otherwise="default {}",
        commands=("schedule",),
        section=HOURS,
        field=Field("min_up_s"),
    ),
    Option(
        name="start_kj",
        kind=replace(NOT_NEGATIVE, unit="kJ"),
        about="energy of a start beside idle watts, an instance",
        default=0.0,
        otherwise="default {}",
        commands=("schedule",),
        section=HOURS,
        field=Field("start_j", 1000.0),
    ),
    Option(
        name="warm_spares",
        kind=Number(0, 10_000, whole=True),
        about="instances of each pool that are loaded and idle, beside those that serve",
        default=0,
        otherwise="default {}",
        commands=("schedule",),
        metavar="N",
        section=HOURS,
        field=Field("warm_spares"),
    ),
    Option(
        name="down_w_per_gpu",
        kind=replace(NOT_NEGATIVE, unit="W"),
        about="watts of a GPU whose instance is down",
        default=0.0,
        otherwise="default {}: its node is off, or somebody else's",
        commands=("schedule",),
        section=HOURS,
        field=Field("down_w_per_gpu"),
    ),
    Option(
        name="reserved",
        kind=Flag(negated=True),
        about="GPUs are paid for when they are down, too",
        default=False,
        commands=("schedule",),
        section=HOURS,
    ),
    Option(
        name="growth",
        kind=Growth(),
        about="of the rate: what to buy by quarter, windows and engines kept",
        commands=("schedule",),
        metavar="2x/year",
        section=HOURS,
    ),
    Option(
        name="quarters",
        kind=Number(1, 40, whole=True),
        about="with --growth: quarters ahead",
        default=8,
        otherwise="default {}",
        commands=("schedule",),
        metavar="N",
        section=HOURS,
    ),
)
_OF_THE_LEVERS = (
    Option(
        name="levers",
        kind=Flag(negated=True),
        about="instead of one plan, what pays: from the present fleets of all services one lever released at a time, "
        "for each of them and for all, everything else re-optimised",
        default=False,
        commands=("services",),
        section=LEVERS,
        key="services",
    ),
    Option(
        name="next_gpu",
        kind=Text(),
        about="generation to change to; to services with --levers",
        otherwise="default: the next, h100 to b200",
        commands=("levers", "services"),
        metavar="GPU",
        section=LEVERS,
    ),
    Option(
        name="other_llm",
        kind=Text(),
        about="model to change to, with answers of its own; to services with --levers",
        default="qwen3-235b-a22b",
        otherwise="default {}",
        commands=("levers", "services"),
        metavar="LLM",
        section=LEVERS,
        file="named",
    ),
    Option(
        name="all_pairs",
        kind=Flag(negated=True),
        about="every pair that combines, not of the best five only",
        default=False,
        commands=("levers",),
        section=LEVERS,
    ),
)
_OF_ROBUSTNESS = (
    Option(
        name="robust",
        kind=Choice(("quantile", "cvar")),
        about="choose by the lower quantile, or the mean of the worst share, of tok/J over scenarios: engines off by "
        "their errors, and every workload named",
        commands=("optimize",),
        section=ROBUST,
    ),
    Option(
        name="robust_level",
        kind=Number(0, 1, open=True),
        about="which quantile, or worst share",
        default=0.1,
        otherwise="default {}",
        commands=("optimize",),
        metavar="Q",
        section=ROBUST,
        field=Field("level"),
    ),
    Option(
        name="robust_workloads",
        kind=_NAMES,
        about="tomorrow's traffic, as likely as today's",
        default=[],
        commands=("optimize",),
        metavar="NAME|FILE,...",
        section=ROBUST,
        file="named",
    ),
)

# ------------------------------------------------------------------------------------------------------- the simulation

_SIMULATING = ("optimize", "simulate", "report")
_OF_THE_SIMULATION = (
    Option(
        name="requests",
        kind=Number(100, 10**7, whole=True),
        about="of one replication",
        otherwise="default: enough for the warm-up and a window twice as long",
        commands=_SIMULATING,
        metavar="N",
        section=SIMULATION,
        field=Field("n_requests"),
    ),
    Option(
        name="replications",
        kind=Number(1, 64, whole=True),
        default=4,
        otherwise="default {}",
        commands=_SIMULATING,
        metavar="R",
        section=SIMULATION,
        field=Field("n_replications"),
    ),
    Option(
        name="seed",
        kind=Number(0, 2**31 - 1, whole=True),
        about="of what is drawn",
        default=0,
        otherwise="default {}",
        commands=_SIMULATING,
        metavar="S",
        section=SIMULATION,
    ),
    Option(
        name="staleness_ms",
        kind=replace(NOT_NEGATIVE, unit="ms"),
        about="age of what the router knows",
        default=50.0,
        otherwise="default {}",
        commands=_SIMULATING,
        section=SIMULATION,
        field=Field("staleness_s", MS),
    ),
    Option(
        name="arrivals",
        kind=Choice(("renewal", "poisson", "trace")),
        about="as bursty as the workload's (default), Poisson, or the file's own time stamps, stretched to the rate; "
        "of a plan for an hour (--at), that hour's requests",
        default="renewal",
        commands=_SIMULATING,
        section=SIMULATION,
    ),
    Option(
        name="router_width",
        kind=NOT_NEGATIVE,
        about="scale of the error in the logarithm of a predicted length",
        default=0.0,
        otherwise="default {}: lengths are known",
        commands=_SIMULATING,
        metavar="W",
        section=SIMULATION,
        field=Field("router_width"),
    ),
)

# ------------------------------------------------------------------------------------------------ of one command only

_OF_ONE_COMMAND = (
    Option(
        name="down",
        kind=Number(0, 1000, whole=True),
        about="instances of every pool that are left out, as if they had failed",
        default=0,
        otherwise="default {}",
        commands=("simulate",),
        metavar="K",
    ),
    *(
        replace(each, commands=("simulate",), section=None, about=about)
        for each, about in (
            (_REPAIR, "GPUs and nodes fail at random, and are mended in so many hours in the mean"),
            (_GPU_MTBF, _GPU_MTBF.about),
            (_NODE_MTBF, _NODE_MTBF.about),
            (_PER_NODE, _PER_NODE.about),
        )
    ),
    Option(
        name="plans",
        kind=Text(),
        about="also write the plan of each service to FOLDER, by its name, for evaluate, simulate and export",
        commands=("services",),
        metavar="FOLDER",
    ),
    Option(
        name="until",
        kind=Percent(Number(0.001, 1.0)),
        about="add as many replications again, up to 64, until the confidence intervals of tokens per joule and P99 "
        "TTFT of every pool are within SHARE of the mean to each side",
        commands=("simulate",),
        metavar="SHARE",
    ),
    Option(
        name="observed",
        kind=Text(),
        about="what was observed of the fleet or its pools: csv, or vLLM's pages of metrics",
        commands=("compare",),
        metavar="FILE",
        file="read",
        required=True,
    ),
    Option(
        name="since",
        kind=Text(),
        about="earlier pages of metrics of the same servers: what was counted after them is compared",
        commands=("compare",),
        metavar="FILE",
        file="read",
    ),
    Option(
        name="over",
        kind=replace(POSITIVE, unit="s"),
        about="seconds in which the pages of metrics counted, for requests and tokens per second",
        otherwise="default: what their time stamps tell",
        commands=("compare",),
        metavar="SECONDS",
    ),
    Option(
        name="batch",
        kind=Several(Number(1, MAX_BATCH)),
        about="sequences in flight",
        default=[8, 32, 128],
        otherwise="default {}",
        commands=("engine",),
    ),
    Option(
        name="context",
        kind=replace(POSITIVE, unit="tokens"),
        about="mean context in tokens",
        default=1024.0,
        otherwise="default {}",
        commands=("engine",),
    ),
    Option(
        name="prompt_per_output",
        kind=NOT_NEGATIVE,
        about="prompt tokens prefilled for each output token",
        otherwise="default: the benchmark's own mix",
        commands=("engine",),
    ),
    Option(
        name="prompt_tokens",
        kind=replace(NOT_NEGATIVE, unit="tokens"),
        about="tokens of one prompt, whose attention grows with its square",
        otherwise="default: that of the context and the mix",
        commands=("engine",),
    ),
    Option(
        name="law",
        kind=Flag(),
        about="the law, even where this configuration was measured",
        default=False,
        commands=("engine",),
    ),
    Option(
        name="measured",
        kind=Text(),
        about="measurements to draw beside it, as calibrate reads them",
        commands=("engine",),
        metavar="FILE.csv",
        file="read",
    ),
    Option(
        name="gpu",
        kind=Text(),
        about="GPU that was measured",
        otherwise="default: the file's",
        commands=("calibrate",),
        file="named",
    ),
    Option(
        name="llm",
        kind=Text(),
        about="LLM that was measured, by our name or a config.json",
        otherwise="default: the file's",
        commands=("calibrate",),
        file="named",
    ),
    Option(
        name="tp",
        kind=_GPUS_PER_INSTANCE.of,
        about="GPUs per instance",
        otherwise="default: the file's",
        commands=("calibrate",),
    ),
    Option(
        name="precision", kind=Text(), about="of the weights", otherwise="default: the file's", commands=("calibrate",)
    ),
    Option(
        name="serving",
        kind=OneName(),
        about="serving engine that was measured: vllm (0.12 and newer), vllm-0.11, sglang, trtllm",
        otherwise="default: the file's, else vllm",
        commands=("calibrate",),
    ),
    Option(
        name="isl",
        kind=Number(1, 10**7, whole=True, unit="tokens"),
        about="nominal tokens of a prompt",
        otherwise="default: the file's",
        commands=("calibrate",),
        metavar="TOKENS",
    ),
    Option(
        name="osl",
        kind=Number(1, 10**7, whole=True, unit="tokens"),
        about="nominal tokens of an output",
        otherwise="default: the file's",
        commands=("calibrate",),
        metavar="TOKENS",
    ),
    Option(name="model", kind=Text(), about="rows of this model only (part of its name)", commands=("calibrate",)),
    Option(name="task", kind=Text(), about="rows of this task only", commands=("calibrate",)),
    Option(
        name="form",
        kind=Choice(("auto", "benchmark", "steps", "dense", "moe")),
        about="of the fit: factors on the catalog's engine, by whole benchmarks (auto where all rows have lengths and "
        "a load) or by decode steps at known contexts, or a step of its own (dense, moe)",
        default="auto",
        otherwise="default {}",
        commands=("calibrate",),
    ),
    Option(
        name="to",
        kind=Choice(("vllm", "kubernetes", "dynamo", "envoy")),
        about="what runs the engines; dynamo: graphs of NVIDIA Dynamo's operator; envoy: the router alone, before "
        "engines of the script",
        commands=("export",),
        required=True,
    ),
    Option(
        name="weights",
        kind=Choice(("claim", "host", "none")),
        about="where Kubernetes keeps checkpoints: a claim of all instances, a folder of each host (not of Dynamo), or "
        "nowhere",
        otherwise="default claim",
        commands=("export",),
    ),
    Option(
        name="router",
        kind=Text(),
        about="also write the router's thresholds to FILE",
        commands=("export",),
        metavar="FILE",
        file="written",
    ),
    Option(
        name="model",
        kind=Checkpoint(),
        about="what vLLM loads for an LLM of the plan (default: the catalog's repository); may be given again",
        default=[],
        commands=("export",),
        metavar="LLM[:PRECISION]=CHECKPOINT",
    ),
    Option(
        name="name",
        kind=Text(),
        about="of the fleet, before its pools'",
        default="fleetopt",
        otherwise="default {}",
        commands=("export",),
    ),
    Option(
        name="anyway",
        kind=Flag(),
        about="export a plan that is known to fail its limits as well, marked as such",
        default=False,
        commands=("export",),
    ),
    Option(
        name="repair",
        kind=Flag(),
        about="of a plan that fails its limits: answer the plan with the fewest instances added that hold them",
        default=False,
        commands=("evaluate",),
    ),
    Option(
        name="metric",
        kind=Choice(("tok_per_j", "power_w", "usd_per_h", "ttft_p99_s", "itl_s")),
        about="to rank inputs for, in the table and the figure",
        otherwise="default: the plan's objective",
        commands=("sensitivity",),
    ),
    Option(
        name="top",
        kind=Number(1, 1000, whole=True),
        about="inputs to show",
        default=15,
        otherwise="default {}",
        commands=("sensitivity",),
        metavar="N",
    ),
    Option(
        name="reoptimize",
        kind=Flag(),
        about="check shadow prices: search again at 0.9 and 1.1 times every limit that binds",
        default=False,
        commands=("sensitivity",),
    ),
    Option(
        name="simulate",
        kind=Flag(),
        about="with a simulation of the plan (a minute)",
        default=False,
        commands=("report",),
    ),
    Option(
        name="part",
        kind=Choice(("gpus", "llms", "engines", "workloads", "schemas", "llm")),
        about="default: all but schemas, the JSON Schemas of the files that are read, and llm, one LLM in full",
        commands=("catalog",),
        nargs="?",
    ),
    Option(
        name="llm",
        kind=Text(),
        about="of catalog llm: an LLM, or a Hugging Face config.json",
        commands=("catalog",),
        metavar="NAME|FILE",
        file="named",
        nargs="?",
    ),
    Option(
        name="tables",
        kind=Number(1, 5, whole=True),
        about="1 to 5; default all",
        commands=("reproduce",),
        metavar="TABLE",
        nargs="*",
    ),
)

_OF_A_BENCHMARK = (
    Option(
        name="gpu",
        kind=OneName(),
        about="GPU, or a file that fleetopt calibrate wrote",
        otherwise="default h100; of --points the row's",
        commands=("predict",),
        file="named",
    ),
    Option(
        name="llm",
        kind=Text(),
        about="LLM, or a Hugging Face config.json",
        otherwise="default llama-3.1-70b; of --points the row's",
        commands=("predict",),
        file="named",
    ),
    Option(
        name="tp",
        kind=_GPUS_PER_INSTANCE.of,
        about="GPUs per instance",
        otherwise="default 8; of --points the row's",
        commands=("predict",),
    ),
    *(replace(option, section=None, **_OF_THE_ROW) for option in (_EP, _DP, _PP)),
    *(replace(option, section=None, **_OF_THE_FILE) for option in (_EP, _DP, _PP)),
    Option(
        name="precision",
        kind=OneName(),
        about="of the weights: bf16, fp8, int8, int4, mxfp4, nvfp4",
        otherwise="default: the checkpoint's; of --points the row's",
        commands=("predict",),
    ),
    replace(_SERVING, section=None, otherwise="default vllm; of --points the row's", commands=("predict",)),
    Option(
        name="isl",
        kind=Number(1, 10**7, whole=True, unit="tokens"),
        about="nominal tokens of a prompt",
        otherwise="default 1024; of --points the row's",
        commands=("predict",),
        metavar="TOKENS",
    ),
    Option(
        name="osl",
        kind=Number(1, 10**6, whole=True, unit="tokens"),
        about="nominal tokens of an output",
        otherwise="default 1024; of --points the row's",
        commands=("predict",),
        metavar="TOKENS",
    ),
    Option(
        name="length_spread",
        kind=Number(0.01, 1),
        about="lengths are drawn evenly from this share of the nominal ones up; 1: all alike",
        otherwise="default 0.8; 1 where a file's mean lengths are whole numbers",
        commands=("predict",),
        metavar="SHARE",
    ),
    Option(
        name="concurrency",
        kind=Several(Number(1, MAX_BATCH, whole=True)),
        about="requests in flight, each replaced as it ends",
        default=[4, 16, 64],
        otherwise="default {}; of --points the row's",
        commands=("predict",),
        metavar="N,...",
    ),
    Option(
        name="requests",
        kind=Number(1, 10**6, whole=True),
        about="requests in total",
        otherwise="default: 10 for each in flight, or the row's",
        commands=("predict",),
        metavar="N",
    ),
    Option(
        name="points",
        kind=Text(),
        about="predict every row of a file, or of the files of a folder, and compare: vLLM bench, aiperf, GuideLLM, "
        "InferenceX, AIConfigurator's points, ML.ENERGY, or csv of your own",
        commands=("predict",),
        metavar="FILE",
        file="read",
    ),
)


def _figure(what: str, *commands: str) -> Option:
    about = f"draw {what} as FILE.svg or FILE.png"
    return Option(name="figure", kind=Text(), about=about, commands=commands, metavar="FILE", file="written")


_FIGURES = (
    _figure("the pools over the lengths of the requests", "optimize", "evaluate"),
    _figure("GPUs by service and kind, or the front, or the levers,", "services"),
    _figure("the front", "pareto"),
    _figure("tokens per joule over the input with the most numbers,", "sweep"),
    _figure("the tornado", "sensitivity"),
    _figure("observed over predicted, figure by figure,", "compare"),
    _figure("bars and pairs", "levers"),
    _figure("the day", "schedule"),
    _figure("the waterfall, or what each change of the stack brings,", "ledger"),
    _figure("power and tokens per joule over the batch", "engine"),
    _figure("fit and residuals", "calibrate"),
    _figure("curves over the requests in flight, and predicted against measured,", "predict"),
    _figure("the rate by hour, and what prefix caches would find", "trace"),
    Option(
        name="csv",
        kind=Text(),
        about="write the plans of a front, or of --levers, as FILE, a line each",
        commands=("pareto", "services"),
        metavar="FILE",
        file="written",
    ),
)

TABLE: tuple[Option, ...] = (
    *_OF_THE_RUN,
    *_OF_THE_WORKLOAD,
    *_OF_THE_ENGINE,
    *_OF_THE_LIMITS,
    *_OF_THE_FAILURES,
    *_OF_THE_SITE,
    *_OF_THE_BUDGET,
    *_OF_THE_FRONT,
    *_OF_THE_SEARCH,
    *_OF_THE_SWEEP,
    *_OF_THE_LEVERS,
    *_OF_THE_HOURS,
    *_OF_ONE_COMMAND,
    *_OF_A_BENCHMARK,
    *_FIGURES,
    *_OF_ROBUSTNESS,
    *_OF_THE_SIMULATION,
    _figure("simulated over analytic, metric by metric,", "simulate"),
)
# Options that name a file to write.
OUTPUTS = tuple(dict.fromkeys(option.name for option in TABLE if option.file == "written"))


@cache
def options_of(command: str) -> tuple[Option, ...]:
    """What a command takes, in the order of its help."""
    return tuple(option for option in TABLE if command in option.commands)


def inputs_of(command: str) -> tuple[str, ...]:
    """Options of a command that may name files to read."""
    return tuple(option.name for option in options_of(command) if option.file in ("read", "named"))


def keys_of(section: Section) -> dict[str, Option]:
    """What a section of a scenario may hold, each option as wide as any command takes it."""
    found: dict[str, Option] = {}
    for option in TABLE:
        if option.section is section:
            found.setdefault(option.key or option.name, option)
    return found
