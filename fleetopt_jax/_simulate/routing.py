"""Which pool serves which request, one by one: the router of `fleet/traffic.py`, drawn instead of integrated."""

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from fleetopt_jax._simulate.requests import Requests
from fleetopt_jax.fleet.assumptions import Assumptions
from fleetopt_jax.fleet.fleet import Fleet
from fleetopt_jax.laws.routing import router_edges
from fleetopt_jax.workload.atoms import Workload
from fleetopt_jax.workload.columns import columns_of

REJECTED = -1


@dataclass(frozen=True)
class Routed:
    """Requests as the pools get them; numpy arrays [R, M]."""

    pool: np.ndarray  # REJECTED where no window holds it
    ready_s: np.ndarray  # arrival at the pool: later than at the fleet where compression takes time [s]
    prompt_tokens: np.ndarray  # as served
    output_tokens: np.ndarray
    tried_tokens: np.ndarray  # prompt tokens a compressor read
    tried_pool: np.ndarray  # for which pool; REJECTED where none

    @property
    def compressed(self) -> np.ndarray:
        """Whether a request was: of those that were tried only they stay in the pool."""
        return (self.tried_pool != REJECTED) & (self.tried_pool == self.pool)


def route_requests(
    requests: Requests,
    fleet: Fleet,
    workload: Workload,
    assumptions: Assumptions,
    *,
    router_width: float | None = None,
    seed: int = 0,
    first: int = 0,
) -> Routed:
    """A request goes to the first pool whose edge gamma B the length that is routed by, as predicted, does not exceed.

    `router_width` is the scale of a logistic error in the logarithm of the predicted length; without it the router
    knows the length. A request longer than the window it comes to is compressed into it where it can be and the try
    succeeds, and otherwise goes to the first later pool whose window holds it, after the time the try took. What no
    window holds is rejected, by prompt and output where the router sees less. `first` is the number of the first
    replication: those that are added later draw anew.
    """
    rng = np.random.default_rng([seed, 2**31, first])
    compression, compressor = assumptions.compression, fleet.surroundings.compressor
    windows = np.asarray(fleet.window_tokens)
    edges = np.asarray(router_edges(fleet.window_tokens, jnp.asarray(compression.effective_gamma(fleet.gamma))))
    prompt, output = requests.prompt_tokens, requests.output_tokens
    columns = replace(columns_of(prompt, output), kept_tokens=requests.routed_tokens)
    seen = np.asarray(assumptions.route_by.route_tokens(columns))
    predicted = seen if router_width is None else seen * np.exp(router_width * rng.logistic(size=seen.shape))
    aimed = np.minimum(np.searchsorted(edges, predicted), len(windows) - 1)
    length = np.maximum(seen, prompt + output)
    compressible = np.asarray(compression.compressible(prompt.astype(float), output.astype(float))) > 0
    tries = (length > windows[aimed]) & (length <= edges[-1]) & compressible
    succeeds = tries & (rng.random(length.shape) < np.asarray(compression.success_frac(compressor)))
    holds = np.maximum(np.searchsorted(windows, length), aimed)
    pool = np.where(succeeds, aimed, np.where(holds < len(windows), holds, REJECTED))
    whole_share = float(np.asarray(assumptions.lengths.whole_share(workload, assumptions.output_share)))
    squeezed = compression.squeeze(windows[aimed], output, whole_share)
    return Routed(
        pool=pool,
        ready_s=requests.arrival_s + np.where(tries, prompt * float(compressor.s_per_token), 0.0),
        prompt_tokens=np.where(succeeds, squeezed[0], prompt).astype(np.int64),
        output_tokens=np.where(succeeds, squeezed[1], output).astype(np.int64),
        tried_tokens=np.where(tries, prompt, 0),
        tried_pool=np.where(tries, aimed, REJECTED),
    )
