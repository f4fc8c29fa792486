"""Pools of two stages as vLLM runs them: prefill instances, decode instances, and vLLM's own router before both.

The router asks a prefill instance for one token, and a decode instance for the answer; the latter reads the KV cache
that the former kept, by NIXL. Sources: vLLM 0.33.0's `distributed/kv_transfer/kv_connector/v1/nixl` and its guides
(`docs/features/nixl_connector_usage.md`, `nixl_connector_compatibility.md`); vllm-router 0.1.17, its flags read, and
run before instances that only write down what they are asked. It sends them the key of its own environment, whatever
the client's; it counts no requests in flight on this path, so that its `power_of_two` finds all loads 0; its /readiness
is 503 until both stages have a healthy instance; of a cluster it lists and watches the pods of its namespace, no more.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from fleetopt_jax.catalog.architecture import Architecture
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.units import MS
from fleetopt_jax.documents.drafts import SpeculatePart
from fleetopt_jax.documents.plan_file import LinkPart
from fleetopt_jax.report.export.releases import PORT, STAGE_ROUTER_RELEASE, VLLM_RELEASE

Role = Literal["prefill", "decode"]
ROLES: dict[Role, str] = {"prefill": "kv_producer", "decode": "kv_consumer"}  # as KVTransferConfig.kv_role names them
HAND_OVER_PORT = 5600  # where instances meet before the first hand-over (VLLM_NIXL_SIDE_CHANNEL_PORT)
STAGE_METRICS_PORT = 29_000
LONGEST_S = 3600  # of a request, and of the start of an instance
HEALTH_S = 10  # between looks at an instance; three without an answer leave it out
POLICIES = {"jsq": "round_robin", "round_robin": "round_robin", "random": "random"}


class StageEngine(Protocol):
    """What of a stage decides whether its KV cache can be handed over."""

    tp: int
    pp: int
    gpu: str
    speculate: SpeculatePart | None


@dataclass(frozen=True)
class StageRouter:
    """What stands before the two stages of a pool, by the pool's name."""

    name: str
    window_tokens: int
    prefill: str  # its prefill instances' name
    decode: str
    drain_s: int  # to end what it has begun [s]
    args: tuple[str, ...]  # of `vllm-router`, without its instances

    @property
    def stages(self) -> dict[Role, str]:
        """The name of each stage's instances."""
        return {"prefill": self.prefill, "decode": self.decode}


def stage_router(name: str, window_tokens: int, drain_s: int, dispatch: str) -> StageRouter:
    """The router of a pool. Its flags are those that the launcher on PyPI and the program of the image both have; of
    the levels of logging that do not write a line for every request they share `error` alone."""
    flags = {
        "host": "0.0.0.0",
        "port": PORT,
        "vllm-pd-disaggregation": None,
        "kv-connector": "nixl",
        "prefill-policy": POLICIES[dispatch],
        "decode-policy": POLICIES[dispatch],
        "worker-startup-timeout-secs": LONGEST_S,
        "request-timeout-secs": LONGEST_S,
        "health-check-interval-secs": HEALTH_S,
        "prometheus-host": "0.0.0.0",
        "prometheus-port": STAGE_METRICS_PORT,
        "log-level": "error",
    }
    args = (f"--{flag}" if value is None else f"--{flag}={value}" for flag, value in flags.items())
    return StageRouter(name, window_tokens, f"{name}-prefill", f"{name}-decode", drain_s, tuple(args))


def kv_transfer_config(role: Role) -> str:
    """vLLM's JSON of the hand-over. A cache that cannot be read fails its request: computed anew where it is decoded,
    it would hold up everybody's tokens there."""
    config = {"kv_connector": "NixlConnector", "kv_role": ROLES[role], "kv_load_failure_policy": "fail"}
    return json.dumps(config)


def require_hand_over(where: str, prefill: StageEngine, decode: StageEngine, architecture: Architecture) -> None:
    """Refuse stages between which NixlConnector hands no cache over."""
    said = f"vLLM {VLLM_RELEASE} hands no KV cache over"
    for role, stage in (("prefill", prefill), ("decode", decode)):
        if stage.pp > 1:
            raise BadInput(f"{where}, {role}.pp", f"{stage.pp}: {said} between pipelines", "need a plan with --pp 1")
    few, many = sorted((prefill.tp, decode.tp))
    if many % few:
        problem = f"TP {prefill.tp} and {decode.tp}: {said} where neither divides the other"
        raise BadInput(f"{where}.tp", problem, "need a plan with such --tp")
    heads = architecture.kv_heads
    if not architecture.latent_dim and prefill.tp > max(heads, decode.tp):
        problem = f"{prefill.tp} GPUs prefill, {decode.tp} decode, of {heads} KV heads: {said} from copies of a head"
        raise BadInput(f"{where}.tp", problem, f"need a plan that prefills with --tp {heads} or less")
    heads_said = f"{_drafts_said(prefill)} in prefill, {_drafts_said(decode)} in decode"
    if _head_of(prefill) != _head_of(decode) and prefill.speculate:  # without drafts it is given the other's head
        raise BadInput(f"{where}.speculate", f"{heads_said}: {said}", "need the same draft head in both stages")


def require_same_checkpoint(where: str, prefill: str, decode: str) -> None:
    """Refuse stages of which each loads a checkpoint of its own."""
    if prefill != decode:
        problem = f"{prefill!r} prefills, {decode!r} decodes: vLLM {VLLM_RELEASE} compares their names"
        raise BadInput(where, problem, "need one checkpoint for both stages")


def has_cache(drafts: SpeculatePart) -> bool:
    """Whether what drafts has a KV cache of its own, which is handed over with the LLM's."""
    return drafts.method != "ngram"


def _head_of(stage: StageEngine) -> tuple[str, str | None] | None:
    """What drafts with a KV cache of its own."""
    drafts = stage.speculate
    return (drafts.method, drafts.model) if drafts and has_cache(drafts) else None


def _drafts_said(stage: StageEngine) -> str:
    if stage.speculate is None:
        return "no drafts"
    return f"{stage.speculate.method} drafts" + (f" of {stage.speculate.model}" if stage.speculate.model else "")


def stage_router_notes(dispatch: str) -> list[str]:
    """What is to be known of vLLM's own router before two stages."""
    return [
        "A pool of two stages has prefill instances, decode instances and, by the pool's name, vLLM's own router "
        f"(vllm-router {STAGE_ROUTER_RELEASE}), which asks first the one, then the other. It tries again, up to five "
        "times, what an instance answers with 408, 429 or 5xx.",
        _turns_said(dispatch),
    ]


def stage_notes(engines: Sequence[tuple[StageEngine, StageEngine]], link: LinkPart, mean_s: float) -> list[str]:
    """What is to be known of pools of two stages, whatever asks them: what must agree, what is not written."""
    notes = [
        f"The plan's hand-overs take what its link says ({link.name}: {link.bytes_per_s / 1e9:g} GB/s for each GPU, "
        f"{link.latency_s / MS:g} ms): {mean_s / MS:.3g} ms for a mean prompt. What NIXL needs to notice, connect and "
        "pack is not counted. It moves caches over UCX, by RDMA where it finds it, else by TCP, which is slower.",
        "Not written, for no plan knows them: the RDMA devices of your hosts (UCX_NET_DEVICES; in a cluster the "
        "resource that its device plugin names, in the pods of both stages, and mostly the capability IPC_LOCK), and a "
        f"network in which decode instances reach every prefill instance on port {HAND_OVER_PORT} and by RDMA.",
        "Both stages must run the same vLLM, checkpoint, KV precision, attention backend and draft head: vLLM compares "
        "them at the first hand-over, and refuses. They are written alike.",
    ]
    if any(one.gpu.lower() != other.gpu.lower() for one, other in engines):
        notes.append(
            "vLLM may choose another attention backend for each kind of GPU: EDIT the same --attention-backend into "
            "both stages, one that both kinds run."
        )
    return notes


def _turns_said(dispatch: str) -> str:
    if dispatch != "jsq":
        how = "in turn" if dispatch == "round_robin" else "at random"
        return f"The instances of both stages are asked {how}, as planned."
    return (
        "The instances of both stages are asked in turn, not by the shortest queue that the plan counts on: this "
        "release counts no requests in flight between two stages, so that its power_of_two would be random. A plan "
        "with --dispatch round_robin counts on turns."
    )


HEAD_NOTE = (
    "The draft head is here because its KV cache is handed over too: vLLM wants it in both stages. The plan has none "
    "in this one, and counts neither its time over each prompt nor its memory."
)
KEY_NOTE = (
    "vllm-router asks its instances with a key of its own (OPENAI_API_KEY, the fleet's) and looks at no client's: the "
    "Envoy in front of it does, by VLLM_API_KEY of its environment. Let nobody else reach it."
)
