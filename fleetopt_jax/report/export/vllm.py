"""A plan as a shell script of `vllm serve` lines."""

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fleetopt_jax.report.export.launch import VLLM_RELEASE, FleetLaunch
from fleetopt_jax.report.export.text import comment_lines

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


def vllm_document(fleet: FleetLaunch) -> dict[str, Any]:
    """The contract's object: what `vllm_script` prints, and the router."""
    return {
        "schema": SCHEMA,
        "to": "vllm",
        "release": VLLM_RELEASE,
        "title": fleet.title,
        "verified": fleet.verified,
        "header": list(fleet.header),
        "notes": list(fleet.notes),
        "pools": [{**asdict(pool), "args": list(pool.args), "notes": list(pool.notes)} for pool in fleet.pools],
        "router": fleet.router,
    }


def vllm_script(document: Mapping[str, Any]) -> str:
    """`sh SCRIPT POOL` starts one instance of a pool; comments say how many to start."""
    pools = document["pools"]
    width = max(len(pool["name"]) for pool in pools)
    sizes = [
        f"{pool['name']:{width}}  requests of up to {pool['window_tokens']:,} tokens: {pool['n_instances']:,} "
        f"instances of {pool['gpus_per_instance']} x {pool['gpu']}"
        for pool in pools
    ]
    lines = [
        "#!/bin/sh",
        comment_lines([*document["header"], "", *sizes, "", *USE, *document["notes"]]).rstrip("\n"),
        "set -eu",
        f'pool="${{1:?need a pool: {" or ".join(pool["name"] for pool in pools)}}}"',
        "shift",
        'case "$pool" in',
        f"{'|'.join(pool['name'] for pool in pools)}) ;;",
        "*)",
        f'    echo "no such pool: $pool; there are: {", ".join(pool["name"] for pool in pools)}" >&2',
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
        words = [shlex.quote(word) for word in pool["args"]]
        command = " \\\n        ".join([f"exec vllm serve {words[0]}", *words[1:], '"$@"'])
        lines += [f"    {command}", "    ;;"]
    return "\n".join([*lines, "esac"]) + "\n"
