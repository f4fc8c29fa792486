"""What the cost of a pool may be made of: a spec that serves it whole, or one that prefills and one that decodes.

Each is an offer, priced by itself. A lane of two stages costs the sum of its offers, which must be on the same terms:
the LLM, the precision of the KV cache, the links it is handed over by, and the decode stage's share of the TTFT limit
(`fleet/parts.py`). So the cheapest lane of a pool is the cheapest of

    min over specs of whole,    min over terms of (min over specs of prefill + min over specs of decode)

whatever pairs that makes, and a bound of each offer bounds the lanes that it is in.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fleetopt_jax.catalog.engines import build
from fleetopt_jax.catalog.links import hand_over_of, n_links
from fleetopt_jax.catalog.spec import EngineSpec, KvLink, LaneSpec, TwoStageSpec
from fleetopt_jax.core.struct import as_floats
from fleetopt_jax.fleet.engine import Role
from fleetopt_jax.fleet.parts import SHARES, DecodePart, Part, PrefillPart, Terms
from fleetopt_jax.fleet.sizing import WholeLane

Serve = Literal["mixed", "disaggregated", "any"]
Agreed = tuple[str, str, int, float]  # LLM, KV precision, links, share of the TTFT limit
Way = tuple[int, ...]  # offers that make a lane


@dataclass(frozen=True)
class Offer:
    """A spec in a role, and how it is sized by itself."""

    role: Role
    spec: EngineSpec
    part: Part
    agreed: Agreed | None = None  # with the other stage; None of a whole lane


@dataclass(frozen=True)
class Offers:
    """All that pools may choose from [R], and how lanes are made of them."""

    each: tuple[Offer, ...]
    whole: tuple[int, ...]
    pairs: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]  # (prefill, decode) on the same terms
    link: KvLink

    @property
    def ways(self) -> list[Way]:
        """Every lane that can be made of them."""
        return [(r,) for r in self.whole] + [pair for both in self.pairs for pair in itertools.product(*both)]

    def lane(self, way: Way) -> LaneSpec:
        """The spec of a lane."""
        specs = [self.each[r].spec for r in way]
        return specs[0] if len(specs) == 1 else TwoStageSpec(specs[0], specs[1], self.link)

    def cheapest(self, costs: Sequence[np.ndarray]) -> np.ndarray:
        """Of the cheapest lane, from the costs of all offers, of any shape."""
        if len(costs) == len(self.whole) == 1:
            return costs[0]
        lanes = [np.min([costs[r] for r in self.whole], axis=0)] if self.whole else []
        for prefill, decode in self.pairs:
            lanes.append(sum(np.min([costs[r] for r in stage], axis=0) for stage in (prefill, decode)))
        return lanes[0] if len(lanes) == 1 else np.min(lanes, axis=0)

    def of_lane(self, r: int, own: np.ndarray, costs: Sequence[np.ndarray]) -> np.ndarray:
        """Of the cheapest lane that an offer is in, at its `own` cost, the other stage's offers at theirs."""
        for prefill, decode in self.pairs:
            for stage, other in ((prefill, decode), (decode, prefill)):
                if r in stage:
                    return own + np.min([costs[i] for i in other], axis=0)
        return own

    def best_way(self, costs: Sequence[float]) -> tuple[float, Way]:
        """(cost, offers) of the cheapest lane of one pool; (inf, ()) where there is none."""
        best: tuple[float, Way] = (math.inf, ())
        for r in self.whole:
            best = min(best, (float(costs[r]), (r,)), key=lambda each: each[0])
        for both in self.pairs:
            prefill, decode = (min(stage, key=lambda r: costs[r]) for stage in both)
            best = min(best, (float(costs[prefill] + costs[decode]), (prefill, decode)), key=lambda each: each[0])
        return best


def offers_of(
    specs: Sequence[EngineSpec],
    serve: Serve,
    link: KvLink,
    *,
    prefill: Sequence[EngineSpec] | None = None,
    decode: Sequence[EngineSpec] | None = None,
) -> Offers:
    """What pools may choose from where each may be served like this; stages of `specs` where they have none of their
    own."""
    each = [] if serve == "disaggregated" else [Offer("mixed", spec, WholeLane(build(spec))) for spec in specs]
    whole = tuple(range(len(each)))
    of_roles: tuple[tuple[Role, Sequence[EngineSpec]], ...] = (
        ("prefill", specs if prefill is None else prefill),
        ("decode", specs if decode is None else decode),
    )
    pairs = []
    for agreed in [] if serve == "mixed" else terms_of([spec for _, of_role in of_roles for spec in of_role]):
        both = [[spec for spec in of_role if _may_agree(spec, agreed)] for _, of_role in of_roles]
        if not all(both):
            continue
        places = []
        for (role, _), found in zip(of_roles, both, strict=True):
            places.append(tuple(range(len(each), len(each) + len(found))))
            each += [_stage_offer(role, spec, agreed, link) for spec in found]
        pairs.append(tuple(places))
    return Offers(tuple(each), whole, tuple(pairs), link)


def terms_of(specs: Sequence[EngineSpec]) -> list[Agreed]:
    """All terms that some of the specs can agree on."""
    kinds = {(spec.llm_name, spec.kv_precision or "", n_links(spec)) for spec in specs}
    return [(*kind, share) for kind in sorted(kinds) for share in SHARES]


def _may_agree(spec: EngineSpec, agreed: Agreed) -> bool:
    llm, kv_precision, links, _ = agreed
    return (spec.llm_name, spec.kv_precision or "") == (llm, kv_precision) and n_links(spec) >= links


def _stage_offer(role: Role, spec: EngineSpec, agreed: Agreed, link: KvLink) -> Offer:
    *_, links, share = agreed
    way = hand_over_of(spec, links, link, sends=spec.dp, receives=spec.dp)
    terms = Terms(way, **as_floats(first_share=share))
    engine = build(spec)
    part = PrefillPart(engine, terms) if role == "prefill" else DecodePart(engine, terms)
    return Offer(role, spec, part, agreed)
