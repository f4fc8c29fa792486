"""The router's thresholds as a plain file. Which requests they send where is the law of `fleet/traffic.py`."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fleetopt_jax.fleet.choices.compression import PROMPT_LEAD_TOKENS, Compression, PromptCompression

SCHEMA = "fleetopt-router/1"


def router_document(
    names: Sequence[str],
    max_total_tokens: Sequence[int],
    *,
    windows_of_plan: Sequence[int],
    gammas: Sequence[float],
    compression: Compression,
    length: str,
    dispatch: str,
    port: int,
) -> dict[str, Any]:
    """Pools in the order they are asked, each with the longest request it serves as it is and, where it compresses, the
    longest it takes. Lengths are whole tokens, so that the edge gamma B is rounded down; `length` says what of."""
    pools = []
    for name, longest, window, gamma in zip(names, max_total_tokens, windows_of_plan, gammas, strict=True):
        pool: dict[str, Any] = {"name": name, "url": f"http://{name}:{port}", "max_total_tokens": longest}
        edge = math.floor(window * np.asarray(compression.effective_gamma(gamma)).item())
        if edge > window:
            pool["compress_up_to_tokens"] = edge
        pools.append(pool)
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "length": length,
        "dispatch_within_pool": dispatch,
        "pools": pools,
    }
    if isinstance(compression, PromptCompression) and any("compress_up_to_tokens" in pool for pool in pools):
        document["compress_if_prompt_exceeds_output_by_tokens"] = int(PROMPT_LEAD_TOKENS)
    return document
