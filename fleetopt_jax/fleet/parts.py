"""What is sized by itself: a lane of one stage, or one stage of a lane of two.

A lane of two stages shares its limits out, so that neither stage asks what the other is:

- inter-token latency is the decode stage's alone;
- of the P99 TTFT limit L (with a limit that grows with the prompt, of what does not grow), the decode stage has a share
  phi: the rest of a step and the first step of a request together take at most phi L in the mean, and at most `RARE` of
  the requests wait for a slot;
- the prefill stage has the rest: all but 1 % - RARE of the requests are prefilled and handed over within (1 - phi) L,
  and what grows with the prompt;
- each holds the utilization limit, of its time, its memory and its ports.

Then the lane holds its limits, for at most 1 % of the requests are late in either stage; that is sufficient, not
necessary. A search tries each phi of `SHARES` and takes the cheapest: it is optimal among lanes shared out like that.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.numerics import safe_div, whole_up
from fleetopt_jax.core.struct import pytree
from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.fleet import Slo
from fleetopt_jax.fleet.stage import Setting, StageLoad, decoded_load, left_and_all, sure_of
from fleetopt_jax.fleet.traffic import PoolTraffic
from fleetopt_jax.fleet.two_stage import (
    StageRun,
    decode_run,
    handed_over_ttft,
    prefill_run,
    prefilled_load,
)
from fleetopt_jax.laws.hand_over import HandOver
from fleetopt_jax.laws.ttft import TAIL_PROBABILITY, ttft_tail

RARE = 1e-3  # share of a lane's requests that may wait for a slot of the decode stage
SHARES = (0.1, 0.2, 0.4)  # of the TTFT limit, that may be the decode stage's


class Part:
    """One kind of what is sized by itself; a record derives from this and says these. `engine` serves it."""

    engine: Any

    def least(self, traffic: PoolTraffic, window_tokens: ArrayLike, slo: Slo, setting: Setting) -> Array:
        """Instances that the load alone needs; 0 without traffic, inf where one cannot hold a sequence."""
        raise NotImplementedError

    def tried(
        self, traffic: PoolTraffic, window_tokens: ArrayLike, n_instances: ArrayLike, slo: Slo, setting: Setting
    ) -> tuple[Array, Array]:
        """(by how much the worst limit is broken, watts) with so many instances."""
        raise NotImplementedError

    def bound_w(self, traffic: PoolTraffic, window_tokens: ArrayLike, least: Array, setting: Setting) -> Array:
        """Watts that no more instances than `least` undercut [W]."""
        raise NotImplementedError


@pytree
class Terms:
    """What the stages of a lane are agreed on before they are sized. Leaves traced, shape ()."""

    hand_over: HandOver
    first_share: Array  # phi [-]


def _least_by_load(engine: Engine, load: StageLoad, traffic: PoolTraffic, slo: Slo, setting: Setting) -> Array:
    whole = setting.assumptions.whole
    fits = load.n_max >= (1.0 if whole else 1e-6)
    asked = load.rate_per_s * load.service_s / jnp.where(fits, load.n_max, 1.0)
    least = jnp.maximum(whole_up(asked / slo.max_utilization * (1.0 - 1e-12), whole=whole), 1.0 if whole else 0.0)
    least = sure_of(least, engine, setting)
    return jnp.where(traffic.traffic_frac > 0, jnp.where(fits, least, jnp.inf), 0.0)


def _watts(engine: Engine, run: StageRun, n_instances: ArrayLike, compressor_w: ArrayLike, setting: Setting) -> Array:
    scope, site = setting.assumptions.power_scope, setting.surroundings.site
    return scope.pool_w(engine, site, n_instances, run.gpu_w, compressor_w)


def _finite(n_instances: ArrayLike) -> Array:
    return jnp.where(jnp.isfinite(n_instances), n_instances, 1.0)


@pytree
class PrefillPart(Part):
    """The prefill stage of a lane of two."""

    engine: Engine
    terms: Terms

    def least(self, traffic: PoolTraffic, window_tokens: ArrayLike, slo: Slo, setting: Setting) -> Array:
        load = prefilled_load(self.engine, traffic, window_tokens, setting)
        return _least_by_load(self.engine, load, traffic, slo, setting)

    def tried(
        self, traffic: PoolTraffic, window_tokens: ArrayLike, n_instances: ArrayLike, slo: Slo, setting: Setting
    ) -> tuple[Array, Array]:
        n, way = _finite(n_instances), self.terms.hand_over
        law = partial(prefill_run, self.engine, traffic, window_tokens, hand_over=way)
        found, whole = left_and_all(lambda n, at: law(n, setting=at), self.engine, n, setting)
        rest_s = (1.0 - self.terms.first_share) * slo.ttft_p99_s
        late = ttft_tail(handed_over_ttft(found, way), rest_s, slo.ttft_s_per_token)
        late = jnp.where(found.run.stable, late, 1.0)
        excess = jnp.maximum(found.run.utilization / slo.max_utilization, late / (TAIL_PROBABILITY - RARE)) - 1.0
        return excess, _watts(self.engine, whole.run, n, compressor_w(traffic, setting), setting)

    def bound_w(self, traffic: PoolTraffic, window_tokens: ArrayLike, least: Array, setting: Setting) -> Array:
        n = _finite(least)
        found = prefill_run(self.engine, traffic, window_tokens, n, self.terms.hand_over, setting)
        return _watts(self.engine, found.run, n, compressor_w(traffic, setting), setting)


@pytree
class DecodePart(Part):
    """The decode stage of a lane of two."""

    engine: Engine
    terms: Terms

    def least(self, traffic: PoolTraffic, window_tokens: ArrayLike, slo: Slo, setting: Setting) -> Array:
        load = decoded_load(self.engine, traffic, window_tokens, setting)
        return _least_by_load(self.engine, load, traffic, slo, setting)

    def tried(
        self, traffic: PoolTraffic, window_tokens: ArrayLike, n_instances: ArrayLike, slo: Slo, setting: Setting
    ) -> tuple[Array, Array]:
        n = _finite(n_instances)
        law = partial(decode_run, self.engine, traffic, window_tokens, hand_over=self.terms.hand_over)
        found, whole = left_and_all(lambda n, at: law(n, setting=at), self.engine, n, setting)
        first = safe_div(found.first_s, self.terms.first_share * slo.ttft_p99_s, otherwise=jnp.inf)
        of_limits = jnp.stack(
            [
                found.run.utilization / slo.max_utilization,
                found.operation.itl_s / slo.itl_s,
                first,
                jnp.where(found.run.stable, found.waits, 1.0) / RARE,
            ]
        )
        return jnp.max(of_limits) - 1.0, _watts(self.engine, whole.run, n, 0.0, setting)

    def bound_w(self, traffic: PoolTraffic, window_tokens: ArrayLike, least: Array, setting: Setting) -> Array:
        n = _finite(least)
        found = decode_run(self.engine, traffic, window_tokens, n, self.terms.hand_over, setting)
        return _watts(self.engine, found.run, n, 0.0, setting)


def compressor_w(traffic: PoolTraffic, setting: Setting) -> Array:
    """What compresses a lane's prompts draws [W]."""
    return setting.arrival_rate_per_s * traffic.compressor_tokens * setting.surroundings.compressor.j_per_token


def parts_of(prefill: Engine, decode: Engine, terms: Terms) -> tuple[PrefillPart, DecodePart]:
    """The stages of a lane, sized on the same terms."""
    return PrefillPart(prefill, terms), DecodePart(decode, terms)


def with_share(terms: Terms, first_share: ArrayLike) -> Terms:
    """Other terms: another share of the TTFT limit for the decode stage."""
    return replace(terms, first_share=jnp.asarray(first_share, dtype=float))
