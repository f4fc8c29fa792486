"""Which pool serves which request, one by one: the router of `fleet/traffic.py`, drawn instead of integrated."""

from dataclasses import dataclass

import numpy as np

from fleetopt_jax.fleet.assumptions import Assumptions
from fleetopt_jax.fleet.choices import COMPRESSIBLE, REACH, SUCCESS, WHOLE_SHARE
from fleetopt_jax.fleet.fleet import Fleet
from fleetopt_jax.laws.routing import router_edges
from fleetopt_jax.simulate.requests import Requests
from fleetopt_jax.workload.atoms import Workload, split_total

REJECTED = -1


@dataclass(frozen=True)
class Routed:
    """Requests as the pools get them; numpy arrays [R, M]."""

    pool: np.ndarray  # REJECTED where no window holds it
    ready_s: np.ndarray  # arrival at the pool: later than at the fleet where compression takes time [s]
    prompt_tokens: np.ndarray  # as served
    output_tokens: np.ndarray
    tried_tokens: np.ndarray  # prompt tokens a compressor read
    tried_pool: np.ndarray  # whose compressor; REJECTED where none


def route_requests(
    requests: Requests,
    fleet: Fleet,
    workload: Workload,
    assumptions: Assumptions,
    *,
    router_width: float | None = None,
    seed: int = 0,
) -> Routed:
    """A request goes to the first pool whose edge gamma B its (predicted) length does not exceed.

    `router_width` is the scale of a logistic error in the logarithm of the predicted length; without it the router
    knows the length. A request longer than the window it comes to is compressed into it where it can be and the try
    succeeds, and otherwise goes to the first later pool whose window holds it, after the time the try took. What no
    window holds is rejected.
    """
    rng = np.random.default_rng([seed, 2**31])
    windows = np.asarray(fleet.window_tokens)
    edges = np.asarray(router_edges(fleet.window_tokens, REACH[assumptions.compression](fleet.gamma)))
    prompt, output = requests.prompt_tokens, requests.output_tokens
    total = prompt + output
    predicted = total if router_width is None else total * np.exp(router_width * rng.logistic(size=total.shape))
    aimed = np.minimum(np.searchsorted(edges, predicted), len(windows) - 1)
    compressible = np.asarray(COMPRESSIBLE[assumptions.compression](prompt.astype(float), output.astype(float))) > 0
    tries = (total > windows[aimed]) & (total <= edges[-1]) & compressible
    success = np.array([float(SUCCESS[assumptions.compression](engine)) for engine in fleet.engines])
    succeeds = tries & (rng.random(total.shape) < success[aimed])
    holds = np.maximum(np.searchsorted(windows, total), aimed)
    pool = np.where(succeeds, aimed, np.where(holds < len(windows), holds, REJECTED))
    squeezed = _SQUEEZE[assumptions.compression](windows[aimed], output, workload, assumptions)
    s_per_token = np.array([float(engine.compressor.s_per_token) for engine in fleet.engines])
    return Routed(
        pool=pool,
        ready_s=requests.arrival_s + np.where(tries, prompt * s_per_token[aimed], 0.0),
        prompt_tokens=np.where(succeeds, squeezed[0], prompt).astype(np.int64),
        output_tokens=np.where(succeeds, squeezed[1], output).astype(np.int64),
        tried_tokens=np.where(tries, prompt, 0),
        tried_pool=np.where(tries, aimed, REJECTED),
    )


def _squeeze_whole(window, output, workload: Workload, assumptions: Assumptions):
    share = float(WHOLE_SHARE[assumptions.lengths](workload, assumptions))
    prompt, rest = (np.asarray(x) for x in split_total(window, share))
    return prompt, np.maximum(np.floor(rest), 1)


def _squeeze_prompt(window, output, workload: Workload, assumptions: Assumptions):
    output = np.maximum(np.floor(np.minimum(output, window / 2)), 1)
    return np.maximum(window - output, 1), output


_SQUEEZE = {"free": _squeeze_whole, "prompt_only": _squeeze_prompt}
