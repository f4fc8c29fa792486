"""A plan as a shell script of `vllm serve` lines."""

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fleetopt_jax.report.export.launch import VLLM_RELEASE, FleetLaunch

SCHEMA = "fleetopt-export/1"


def vllm_document(fleet: FleetLaunch) -> dict[str, Any]:
    """The contract's object: what `vllm_script` prints, and the router."""
    return {
        "schema": SCHEMA,
        "to": "vllm",
        "release": VLLM_RELEASE,
        "title": fleet.title,
        "notes": list(fleet.notes),
        "pools": [{**asdict(pool), "args": list(pool.args), "notes": list(pool.notes)} for pool in fleet.pools],
        "router": fleet.router,
    }


def vllm_script(document: Mapping[str, Any]) -> str:
    """`sh SCRIPT POOL` starts one instance of a pool; comments say how many to start."""
    pools = document["pools"]
    width = max(len(pool["name"]) for pool in pools)
    lines = ["#!/bin/sh", f"# {document['title']}.", "# Written by fleetopt export from a plan.", "#"]
    lines += [
        f"# {pool['name']:{width}}  requests of up to {pool['window_tokens']:,} tokens: {pool['n_instances']:,} "
        f"instances of {pool['gpus_per_instance']} x {pool['gpu']}"
        for pool in pools
    ]
    lines += [
        "#",
        "# sh THIS_FILE POOL [FLAG ...] starts one instance of the pool; a flag given here wins, such as --port=8001.",
        *(f"# {note}" for note in document["notes"]),
        "set -eu",
        f'pool="${{1:?need a pool: {" or ".join(pool["name"] for pool in pools)}}}"',
        "shift",
        'case "$pool" in',
    ]
    for pool in pools:
        lines += [f"{pool['name']})", *(f"    # {note}" for note in pool["notes"])]
        words = [shlex.quote(word) for word in pool["args"]]
        command = " \\\n        ".join([f"exec vllm serve {words[0]}", *words[1:], '"$@"'])
        lines += [f"    {command}", "    ;;"]
    lines += ["*)", '    echo "no such pool: $pool" >&2', "    exit 2", "    ;;", "esac"]
    return "\n".join(lines) + "\n"
