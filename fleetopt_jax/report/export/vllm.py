"""A plan as a shell script of `vllm serve` lines."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fleetopt_jax.report.export.launch import FleetLaunch, PoolLaunch
from fleetopt_jax.report.export.releases import PORT, STAGE_ROUTER_RELEASE, VLLM_RELEASE
from fleetopt_jax.report.export.text import comment_lines
from fleetopt_jax.report.export.two_stage import HAND_OVER_PORT, KEY_NOTE, StageRouter

SCHEMA = "fleetopt-export/1"
USE = (
    "sh THIS_FILE POOL [FLAG ...] starts one instance of the pool. A flag given here wins, such as --port=8001 for a "
    "second instance on a host, with CUDA_VISIBLE_DEVICES set to the GPUs of each.",
    "VLLM_API_KEY is the key that clients must send, HF_TOKEN opens gated checkpoints: set them in the environment, "
    "where no list of processes shows them.",
    "Clients ask the router, which fleetopt export --to envoy writes; instances need no port open to anyone else.",
    "To stop an instance take it out of the router, wait until that has read it, and send SIGTERM: it ends what it has "
    "begun for up to --shutdown-timeout seconds. Give systemd's TimeoutStopSec, or docker stop -t, more than that.",
    "GET /health answers 200 once it serves, GET /metrics is for Prometheus.",
)
STAGES_USE = (
    "An instance of a stage needs VLLM_NIXL_SIDE_CHANNEL_HOST, its host's address as the other stage's hosts reach it, "
    f"and where several run on one host a VLLM_NIXL_SIDE_CHANNEL_PORT of its own (default {HAND_OVER_PORT}). NIXL "
    "comes with pip install nixl.",
    "The router of a pool of two stages is started by the pool's own name, with the address of every instance "
    f"(pip install vllm-router=={STAGE_ROUTER_RELEASE}):",
)


def vllm_document(fleet: FleetLaunch) -> dict[str, Any]:
    """The contract's object: what `vllm_script` prints, and the router."""
    return {
        "schema": SCHEMA,
        "to": "vllm",
        "release": VLLM_RELEASE,
        "title": fleet.title,
        "verified": fleet.verified,
        "header": list(fleet.header),
        "notes": [*fleet.stage_router_notes, *fleet.notes],
        "pools": [_pool_document(pool) for pool in fleet.pools],
        **({"stage_routers": [_document(each) for each in fleet.stage_routers]} if fleet.stage_routers else {}),
        "router": fleet.router,
    }


def _pool_document(pool: PoolLaunch) -> dict[str, Any]:
    """Whole pools say no role."""
    document = _document(pool) | {"notes": list(pool.notes)}
    return document if pool.role else {name: value for name, value in document.items() if name != "role"}


def _document(each: PoolLaunch | StageRouter) -> dict[str, Any]:
    return {**asdict(each), "args": list(each.args)}


def vllm_script(document: Mapping[str, Any]) -> str:
    """`sh SCRIPT POOL` starts one instance of a pool; comments say how many to start."""
    pools, routers = document["pools"], document.get("stage_routers", [])
    names = [each["name"] for each in (*pools, *routers)]
    lines = [
        "#!/bin/sh",
        comment_lines(
            [*document["header"], "", *_sizes(pools, routers), "", *USE, *_stages_use(routers), *document["notes"]]
        ).rstrip("\n"),
        "set -eu",
        f'pool="${{1:?need a pool: {" or ".join(names)}}}"',
        "shift",
        'case "$pool" in',
        f"{'|'.join(names)}) ;;",
        "*)",
        f'    echo "no such pool: $pool; there are: {", ".join(names)}" >&2',
        "    exit 2",
        "    ;;",
        "esac",
        'case "${VLLM_API_KEY-}" in',
        '"") echo "VLLM_API_KEY is not set: whoever reaches the port is served" >&2 ;;',
        "esac",
        'case "$pool" in',
    ]
    for pool in pools:
        lines += [f"{pool['name']})", *(f"    # {note}" for note in pool["notes"])]
        lines += _met_at() if "role" in pool else []
        words = [shlex.quote(word) for word in pool["args"]]
        lines += _command([f"exec vllm serve {words[0]}", *words[1:]])
    for router in routers:
        lines += [f"{router['name']})", '    export OPENAI_API_KEY="${VLLM_API_KEY-}"']
        lines += _command(["exec vllm-router", *map(shlex.quote, router["args"])])
    return "\n".join([*lines, "esac"]) + "\n"


def _sizes(pools: Sequence[Mapping[str, Any]], routers: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many to start of each."""
    width = max(len(each["name"]) for each in (*pools, *routers))
    served = [
        f"{pool['name']:{width}}  requests of up to {pool['window_tokens']:,} tokens: {pool['n_instances']:,} "
        f"instances of {pool['gpus_per_instance']} x {pool['gpu']}"
        for pool in pools
    ]
    return served + [f"{each['name']:{width}}  before both stages: vllm-router, one or more" for each in routers]


def _stages_use(routers: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    if not routers:
        return ()
    return (
        *STAGES_USE,
        f"  sh THIS_FILE {routers[0]['name']} --prefill http://HOST:{PORT} --decode http://HOST:{PORT}",
        KEY_NOTE,
    )


def _met_at() -> list[str]:
    """Where the other stage's instances meet one."""
    need = "need the address of this host that the other stage reaches"
    return [
        f'    export VLLM_NIXL_SIDE_CHANNEL_HOST="${{VLLM_NIXL_SIDE_CHANNEL_HOST:?{need}}}"',
        f'    export VLLM_NIXL_SIDE_CHANNEL_PORT="${{VLLM_NIXL_SIDE_CHANNEL_PORT:-{HAND_OVER_PORT}}}"',
    ]


def _command(words: Sequence[str]) -> list[str]:
    command = " \\\n        ".join([*words, '"$@"'])
    return [f"    {command}", "    ;;"]
