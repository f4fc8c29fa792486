"""What intervals allow to be said: of the laws and of the limits yes, no, or that it is too noisy to tell."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from fleetopt_jax._simulate.estimates import SHARES, Estimate, sufficing
from fleetopt_jax._simulate.simulate import Simulation
from fleetopt_jax.fleet.fleet import Slo
from fleetopt_jax.laws.ttft import TAIL_PROBABILITY

Compared = Literal["agrees", "differs", "unclear"]
Held = Literal["holds", "fails", "unclear"]
WORST_FIRST: tuple[Held, ...] = ("fails", "unclear", "holds")
SHARE_TOLERANCE = 1e-3  # a share of nothing is not asked to be met to the last request


@dataclass(frozen=True)
class LimitReading:
    """One limit of one pool, or of all requests together, as a simulation saw it."""

    pool: int | None  # from 1; None the fleet's
    limit: Literal["ttft_p99_s", "itl_s", "rejected_frac"]
    metric: str  # that it is judged by
    allowed: float  # of that metric
    found: Estimate
    reading: Held
    suffices_replications: int | None  # where it is unclear: how many would tell

    @property
    def by(self) -> float:
        """ln of what was found over what is allowed, of shares of what is not within: 0 at the limit, inf where nothing
        is allowed."""
        if self.metric == "slo_attainment":
            return late_by(self.found.mean, 1e-6)
        return math.log(self.found.mean / self.allowed) if self.allowed else math.inf


def compared(
    name: str, law: float | None, found: Estimate, tolerance: float, n_replications: int, *, warmed_up: bool = True
) -> tuple[Compared | None, int | None]:
    """Whether the law is within `tolerance` of what was simulated, and where that is unclear how many replications
    would tell.

    It agrees where all of the interval is within the tolerance of the law, law / (1 + tolerance) to
    law / (1 - tolerance), differs where none of it is, and is else too noisy to tell. A run without warm-up tells
    nothing, nor does one replication. None where there is no law.
    """
    if law is None:
        return None, None
    if not warmed_up:
        return "unclear", None
    if not (math.isfinite(law) and math.isfinite(found.mean)):
        return ("agrees" if math.isfinite(law) == math.isfinite(found.mean) else "differs"), None
    share = name in SHARES
    edges = law / (1 + tolerance), law / (1 - tolerance) + SHARE_TOLERANCE * share
    if edges[0] <= found.low and found.high <= edges[1]:
        return "agrees", None
    if found.low > edges[1] or found.high < edges[0]:
        return "differs", None
    inside = [edge for edge in edges if not share or 0 < edge < 1]
    return "unclear", sufficing(found, n_replications, inside, share=share) if inside else None


def limits_read(simulation: Simulation, slo: Slo) -> list[LimitReading]:
    """Every limit of every pool, those that fail first, then those that are unclear.

    The TTFT is judged by the share of requests within it, of which 99 % must be; rejections are not tolerated. Without
    a warm-up an empty fleet was watched as it filled: what holds then may fail later.
    """
    of_all = slo.scope == "fleet" or len(simulation.pools) == 1
    judged = [(None, simulation.metrics)] if of_all else list(enumerate(simulation.pools, 1))
    found = [_ttft(pool, metrics, simulation) for pool, metrics in judged if metrics]
    if math.isfinite(float(slo.itl_s)):  # of each pool where there are several: a fleet's mean hides one
        found += [_itl(pool, metrics, simulation, slo) for pool, metrics in judged if metrics]
    if rejected := simulation.metrics.get("rejected_frac"):
        held: Held = "holds" if not simulation.n_rejected else "fails"
        found.append(LimitReading(None, "rejected_frac", "rejected_frac", 0.0, rejected, held, None))
    return sorted(found, key=lambda each: WORST_FIRST.index(each.reading))


def at_least(found: Estimate, least: float) -> Held:
    """What an interval says of a limit from below."""
    return "holds" if found.low >= least else "fails" if found.high < least else "unclear"


def at_most(found: Estimate, most: float) -> Held:
    """And from above."""
    return "holds" if found.high <= most else "fails" if found.low > most else "unclear"


def late_by(within: float, least_late: float) -> float:
    """ln of the share of requests that are late, at least `least_late`, over what may be."""
    return math.log(max(1.0 - within, least_late) / TAIL_PROBABILITY)


def verdict(limits: list[LimitReading]) -> Held:
    """Of all limits: the worst."""
    return worst(each.reading for each in limits)


def worst(readings: Iterable[Held]) -> Held:
    """Of several; what nothing was said of holds."""
    found = set(readings)
    for each in WORST_FIRST:
        if each in found:
            return each
    return "holds"


def _ttft(pool: int | None, metrics: Mapping[str, Estimate], simulation: Simulation) -> LimitReading:
    found, least = metrics["slo_attainment"], 1.0 - TAIL_PROBABILITY
    held = at_least(found, least)
    return _limit(LimitReading(pool, "ttft_p99_s", "slo_attainment", least, found, held, None), simulation)


def _itl(pool: int | None, metrics: Mapping[str, Estimate], simulation: Simulation, slo: Slo) -> LimitReading:
    found, most = metrics["itl_s"], float(slo.itl_s)
    return _limit(LimitReading(pool, "itl_s", "itl_s", most, found, at_most(found, most), None), simulation)


def _limit(read: LimitReading, simulation: Simulation) -> LimitReading:
    """With what would suffice."""
    of = (read.pool, read.limit, read.metric, read.allowed, read.found)
    if read.reading == "holds" and not simulation.warmed_up:
        return LimitReading(*of, "unclear", None)
    if read.reading != "unclear":
        return read
    share = read.metric in SHARES
    enough = sufficing(read.found, simulation.n_replications, [read.allowed], share=share)
    return LimitReading(*of, "unclear", enough if simulation.warmed_up else None)
