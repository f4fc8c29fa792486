"""When requests come: the rate by hour, the busiest hour, and what a fleet that is planned for that hour must serve.

**Bins** begin at the whole hours of the file's own clock: hours of the day, in the zone of its stamps, where that is a
calendar. A trace of less than six hours has finer ones (1, 5, 10 or 15 minutes, at most 24), a thin one coarser ones
(2, 3, 4 or 6 hours), so that a bin holds 100 requests on average: Poisson's counts then scatter by 10 %. With fewer
than four whole bins there is no profile.

**Rate of a bin** = requests / seconds of the bin between the first and the last arrival [1/s]. The bins hold all n
requests and the whole span, so the time-weighted mean of their rates is the trace's own, n / (last - first). A bin that
is covered by less than nine tenths, where the trace begins or ends, is shown, but is neither busiest nor quiet. A bin
without requests has the rate 0: an outage looks like a quiet hour. The busiest of many bins is high by chance too:
with m requests a bin by about 2 / sqrt(m) in a day of hours, 3 / sqrt(m) in a fortnight.

**Whether the rate varies** or only scatters: analysis of variance of the counts in quarters of bins, F = mean square
between bins / mean square within them, the latter at least that of renewals with the gaps' own squared CV. So bursts
that are shorter than a bin are not taken for a cycle; longer ones are hours of their own. The rate varies where chance
gives such an F in fewer than one of a thousand traces and the busiest bin is 20 % above the mean.

**Burstiness.** The squared CV of all gaps of a day holds the cycle too, for gaps are long at night. Taken for bursts it
is too much at the busiest hour, which is busy already. So an hour has the squared CV of the gaps inside bins, each over
the mean gap of its bin; the mean rate keeps that of all gaps. (Gaps that end in another bin are left out: with 800
requests a bin a squared CV of 20 comes out 10 % low.)

**Lengths** of an hour are those of the whole trace, whose tails are better known, unless the hour has at least 1,000
requests of its own and their mean prompt or output differs from that of the others by more than 5 % and 3.3 standard
errors (Welch's test, one in a thousand by chance).

**Rows that sum requests** count as many as they stand for, in the stretch of time that begins with their stamp. What is
shorter than that is not known: the rate varies where it differs by more than Poisson's counts, and burstiness is 1.
"""

import itertools
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np
import scipy  # whose parts load on first use

from fleetopt_jax.core.units import HOUR_S
from fleetopt_jax.workload.clock import Clock, Stretches

if TYPE_CHECKING:
    from fleetopt_jax.workload.readers import Trace

At = Literal["mean", "peak", "p95"]
MOMENTS: tuple[At, ...] = get_args(At)
P95 = 0.95

MIN_REQUESTS = 100  # in a bin on average: Poisson's counts scatter by a tenth
MIN_BINS = 4  # whole ones
MAX_BINS = 20_000  # two years of hours
BINS_S = (60, 300, 600, 900, HOUR_S, 2 * HOUR_S, 3 * HOUR_S, 4 * HOUR_S, 6 * HOUR_S)  # parts of a day
FINE_BINS = 24  # of a trace of less than HOURS_FROM_S
HOURS_FROM_S = 6 * HOUR_S
WHOLE_FRAC = 0.9  # of a bin: less is a part
PARTS = 4  # of a bin, whose counts scatter by chance and bursts alone

CHANCE = 1e-3  # of an F by chance below which the rate varies
VARIES_FROM = 1.2  # busiest bin over the mean: less is nothing to plan for
MIN_OWN_REQUESTS = 1000  # of an hour whose lengths are planned with
OWN_FROM_FRAC = 0.05  # of a mean length: less is nothing to plan for
OWN_FROM_ERRORS = 3.3  # standard errors of the difference: once in a thousand traces by chance


@dataclass(frozen=True)
class RateProfile:
    """Rates and lengths by bin. Arrays [B], but for `rows`."""

    bin_s: float
    start_s: np.ndarray  # of each bin, on the file's own clock
    covered_s: np.ndarray  # of each bin, between the first and the last arrival
    rows: np.ndarray  # the first row of the trace in each bin, and the number of them all, [B + 1]
    n_requests: np.ndarray
    mean_prompt_tokens: np.ndarray  # NaN where there are no requests
    mean_output_tokens: np.ndarray
    arrival_scv: float  # squared CV of the gaps inside bins [-]
    chance: float  # of rates that differ so much where none does [-]

    @cached_property
    def rate_per_s(self) -> np.ndarray:
        """Of each bin [1/s]."""
        return self.n_requests / self.covered_s

    @property
    def mean_rate_per_s(self) -> float:
        """Of the trace: n / (last - first), the last stretch of time included where stamps stand for one."""
        return float(self.n_requests.sum() / self.covered_s.sum())

    @property
    def whole(self) -> np.ndarray:
        """Whether a bin is covered, but for a tenth of it at most."""
        return self.covered_s >= WHOLE_FRAC * self.bin_s

    @cached_property
    def busiest(self) -> int:
        """The whole bin with the highest rate; the first of several."""
        return int(np.argmax(np.where(self.whole, self.rate_per_s, -1.0)))

    @cached_property
    def p95(self) -> int:
        """The whole bin with the lowest rate that the rate exceeds in 5 % of the (whole bins') time at most."""
        order = np.argsort(np.where(self.whole, self.rate_per_s, -1.0), kind="stable")
        order = order[~self.whole.sum() :]
        share = np.cumsum(self.covered_s[order]) / self.covered_s[order].sum()
        return int(order[np.argmax(share >= P95 - 1e-9)])

    @property
    def peak_over_mean(self) -> float:
        return float(self.rate_per_s[self.busiest]) / self.mean_rate_per_s

    @property
    def varies(self) -> bool:
        """Whether the rate has hours, beyond chance and by enough to plan for."""
        return self.chance < CHANCE and self.peak_over_mean >= VARIES_FROM

    @property
    def tokens_per_s(self) -> np.ndarray:
        """Prompts and outputs that come in each bin [tokens/s]."""
        length = np.nan_to_num(self.mean_prompt_tokens + self.mean_output_tokens)
        return self.rate_per_s * length

    def at(self, at: Literal["peak", "p95"]) -> int:
        """The bin that a fleet is planned for."""
        return self.busiest if at == "peak" else self.p95


@dataclass(frozen=True)
class Hour:
    """The hour of a trace (a finer or coarser bin of a short or thin one) that a fleet is planned for."""

    at: Literal["peak", "p95"]
    start_s: float  # on the file's own clock
    length_s: float
    n_requests: int  # that came in it
    rate_per_s: float  # that is planned for
    mean_rate_per_s: float  # of the whole trace at the same scale
    own_lengths: bool  # whether the lengths are this hour's own, or all hours'
    other_lengths: bool  # whether this hour's requests are longer or shorter than those of other hours, beyond chance

    @property
    def over_mean(self) -> float:
        return self.rate_per_s / self.mean_rate_per_s

    def at_rate(self, rate_per_s: float) -> "Hour":
        """The same hour with this rate in it [1/s]."""
        return replace(self, rate_per_s=rate_per_s, mean_rate_per_s=rate_per_s / self.over_mean)


class _Bins(NamedTuple):
    """The bins of a profile."""

    bin_s: float
    start_s: np.ndarray  # on the file's own clock
    edges_s: np.ndarray  # since the first arrival, the first of them not after it [B + 1]
    covered_s: np.ndarray

    @property
    def whole(self) -> np.ndarray:
        return self.covered_s >= WHOLE_FRAC * self.bin_s


def _bins_of(span_s: float, n: int, first_s: float, bucket_s: float = 0.0) -> _Bins | None:
    bin_s = _bin_s(span_s, n, bucket_s)
    if bin_s is None:
        return None
    bins_before = math.floor(first_s / bin_s)
    offset_s = first_s - bin_s * bins_before
    edges_s = bin_s * np.arange(max(1, math.ceil((span_s + offset_s) / bin_s)) + 1) - offset_s
    covered_s = np.minimum(edges_s[1:], span_s) - np.maximum(edges_s[:-1], 0.0)
    return _Bins(bin_s, bin_s * (bins_before + np.arange(len(covered_s))), edges_s, covered_s)


def rate_profile(trace: "Trace") -> RateProfile | None:
    """The rate by hour of a trace; None without time stamps, or with too few requests or too short a time for one."""
    arrival_s, n_rows = trace.arrival_s, len(trace.prompt_tokens)
    if arrival_s is None:
        return None
    bins = _bins_of(float(arrival_s[-1]) + trace.bucket_s, trace.n_requests, trace.first_arrival_s, trace.bucket_s)
    if bins is None:
        return None
    rows = np.concatenate([[0], np.searchsorted(arrival_s, bins.edges_s[1:-1]), [n_rows]])
    n_requests = np.diff(rows) if trace.weight is None else _sums(trace.weight, rows)
    if trace.bucket_s:
        scv, chance = 1.0, _chance_of_sums(n_requests[bins.whole])
    else:
        scv = _scv_within(arrival_s, rows)
        counts = np.diff(np.searchsorted(arrival_s, _quarters(bins)))
        chance = _chance(counts, bins, float(arrival_s[-1]), scv)
    profile = RateProfile(
        bin_s=bins.bin_s,
        start_s=bins.start_s,
        covered_s=bins.covered_s,
        rows=rows,
        n_requests=n_requests,
        mean_prompt_tokens=_means(trace.prompt_tokens, trace.weight, rows, n_requests),
        mean_output_tokens=_means(trace.output_tokens, trace.weight, rows, n_requests),
        arrival_scv=scv,
        chance=chance,
    )
    return profile if profile.whole.sum() >= MIN_BINS else None


def profile_of_clock(clock: Clock) -> RateProfile | None:
    """The same of arrivals that were counted as they passed; its `rows` count them."""
    bins, stretches = _bins_of(clock.last_s, clock.n, clock.first_s), clock.settled()
    if bins is None:
        return None
    per_quarter = round(bins.bin_s / PARTS / clock.width_s)
    quarters = stretches.by(stretches.index // per_quarter)
    of_bins = stretches.by(stretches.index // (PARTS * per_quarter))
    before = math.floor(clock.first_s / bins.bin_s)
    n_bins = len(bins.covered_s)

    def each(values: np.ndarray) -> np.ndarray:
        return np.bincount(np.clip(of_bins.index - before, 0, n_bins - 1), values, n_bins)

    n, scv = each(of_bins.n), _scv_of(of_bins)
    counts = np.bincount(np.clip(quarters.index - PARTS * before, 0, PARTS * n_bins - 1), quarters.n, PARTS * n_bins)
    with np.errstate(invalid="ignore"):
        profile = RateProfile(
            bin_s=bins.bin_s,
            start_s=bins.start_s,
            covered_s=bins.covered_s,
            rows=np.concatenate([[0], np.cumsum(n)]).astype(int),
            n_requests=n.astype(int),
            mean_prompt_tokens=each(of_bins.prompt) / n,
            mean_output_tokens=each(of_bins.output) / n,
            arrival_scv=scv,
            chance=_chance(counts, bins, clock.last_s, scv),
        )
    return profile if profile.whole.sum() >= MIN_BINS else None


def hour_of(trace: "Trace", profile: RateProfile, at: Literal["peak", "p95"], mean_rate_per_s: float) -> Hour:
    """The hour to plan for of a trace that is planned with `mean_rate_per_s` on average [1/s]: as many times that as
    the hour has over the mean of the trace."""
    other = trace.weight is None and differs(trace, profile, profile.at(at))
    return _hour(profile, at, mean_rate_per_s, other_lengths=other)


def hour_of_clock(clock: Clock, profile: RateProfile, at: Literal["peak", "p95"], mean_rate_per_s: float) -> Hour:
    """The same of arrivals that were counted as they passed."""
    stretches, k = clock.settled(), profile.at(at)
    inside = (stretches.index * clock.width_s // profile.bin_s) == profile.start_s[k] // profile.bin_s
    other = any(
        _means_differ(
            *((stretches.n[rows].sum(), x[rows].sum(), x2[rows].sum()) for rows in (inside, ~inside)),
        )
        for x, x2 in ((stretches.prompt, stretches.prompt2), (stretches.output, stretches.output2))
    )
    return _hour(profile, at, mean_rate_per_s, other_lengths=other)


def _hour(profile: RateProfile, at: Literal["peak", "p95"], mean_rate_per_s: float, *, other_lengths: bool) -> Hour:
    k = profile.at(at)
    n = round(float(profile.n_requests[k]))
    return Hour(
        at=at,
        start_s=float(profile.start_s[k]),
        length_s=profile.bin_s,
        n_requests=n,
        rate_per_s=mean_rate_per_s * (float(profile.rate_per_s[k]) / profile.mean_rate_per_s),
        mean_rate_per_s=mean_rate_per_s,
        own_lengths=other_lengths and n >= MIN_OWN_REQUESTS,
        other_lengths=other_lengths,
    )


def requests_of(trace: "Trace", profile: RateProfile, k: int) -> "Trace":
    """The requests of the k-th bin, their time counted from the first of them."""
    assert trace.arrival_s is not None
    rows = slice(profile.rows[k], profile.rows[k + 1])
    arrival_s = trace.arrival_s[rows]
    return replace(
        trace,
        prompt_tokens=trace.prompt_tokens[rows],
        output_tokens=trace.output_tokens[rows],
        weight=None if trace.weight is None else trace.weight[rows],
        arrival_s=arrival_s - arrival_s[0],
        first_arrival_s=trace.first_arrival_s + float(arrival_s[0]),
        blocks=None if trace.blocks is None else trace.blocks.of(np.arange(rows.start, rows.stop)),
        sessions=None if trace.sessions is None else trace.sessions[rows],
    )


def differs(trace: "Trace", profile: RateProfile, k: int) -> bool:
    """Whether the requests of a bin are longer or shorter than those of the others, beyond chance and by enough to
    plan for."""
    inside = slice(profile.rows[k], profile.rows[k + 1])
    return any(_differ(lengths, inside) for lengths in (trace.prompt_tokens, trace.output_tokens))


def _differ(lengths: np.ndarray, inside: slice) -> bool:
    """Of the lengths inside and outside a part."""
    ours, n = lengths[inside], len(lengths)
    n_else = n - len(ours)
    if min(len(ours), n_else) < 2:
        return False
    mean, square = lengths.mean(), np.mean(lengths**2)
    mean_else = (n * mean - ours.sum()) / n_else
    variance_else = max((n * square - np.sum(ours**2)) / n_else - mean_else**2, 0.0)
    return _far(ours.mean() - mean_else, mean, ours.var() / len(ours) + variance_else / n_else)


def _means_differ(ours: tuple[float, float, float], others: tuple[float, float, float]) -> bool:
    """The same of (count, sum, sum of squares) inside and outside."""
    if min(ours[0], others[0]) < 2:
        return False
    means = [total / n for n, total, _ in (ours, others)]
    errors2 = [max(square / n - mean**2, 0.0) / n for (n, _, square), mean in zip((ours, others), means)]
    return _far(means[0] - means[1], (ours[1] + others[1]) / (ours[0] + others[0]), sum(errors2))


def _far(difference: float, mean: float, error2: float) -> bool:
    """Welch's test of two means, whose difference has this squared error."""
    return abs(difference) > OWN_FROM_FRAC * mean and abs(difference) > OWN_FROM_ERRORS * math.sqrt(error2)


def _bin_s(span_s: float, n: int, bucket_s: float) -> float | None:
    """The length of a bin; None where none will do."""
    for bin_s in BINS_S:
        if bucket_s and not math.isclose(bin_s / bucket_s, max(1, round(bin_s / bucket_s)), rel_tol=1e-6):
            continue
        fine = bin_s >= HOUR_S if span_s >= HOURS_FROM_S else span_s <= FINE_BINS * bin_s
        if fine and span_s <= MAX_BINS * bin_s and n * bin_s >= MIN_REQUESTS * span_s:
            return float(bin_s) if span_s >= MIN_BINS * WHOLE_FRAC * bin_s else None
    return None


def _sums(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Of the rows of each bin."""
    some = np.diff(rows) > 0
    sums = np.zeros(len(some))
    sums[some] = np.add.reduceat(values, rows[:-1][some])
    return sums


def _means(values: np.ndarray, weight: np.ndarray | None, rows: np.ndarray, n_requests: np.ndarray) -> np.ndarray:
    """Of the requests of each bin; NaN where there are none."""
    with np.errstate(invalid="ignore"):
        return _sums(values if weight is None else values * weight, rows) / n_requests


def _scv_within(arrival_s: np.ndarray, rows: np.ndarray) -> float:
    """Squared CV of the gaps inside bins, each over the mean gap of its bin; Poisson's 1 where there are none."""
    squares, n_gaps = 0.0, 0
    for first, end in itertools.pairwise(rows):
        if end - first > 2 and (length_s := arrival_s[end - 1] - arrival_s[first]) > 0:
            gaps = np.diff(arrival_s[first:end]) * ((end - first - 1) / length_s)
            squares, n_gaps = squares + float(np.sum((gaps - 1.0) ** 2)), n_gaps + len(gaps)
    return squares / n_gaps if n_gaps else 1.0


def _scv_of(bins: Stretches) -> float:
    """The same of what passed in each bin."""
    length_s = bins.last_s - bins.first_s
    some = (bins.n > 2) & (length_s > 0)
    gaps = bins.n[some] - 1.0
    squares = bins.gaps2_s2[some] * (gaps / length_s[some]) ** 2 - gaps
    return float(squares.sum() / gaps.sum()) if some.any() else 1.0


def _chance_of_sums(n_requests: np.ndarray) -> float:
    """The chance of counts that differ at least so much where all are Poisson's of one mean [-]."""
    if len(n_requests) < 2:
        return 1.0
    mean = n_requests.mean()
    return float(scipy.special.chdtrc(len(n_requests) - 1, np.sum((n_requests - mean) ** 2) / mean))


def _quarters(bins: _Bins) -> np.ndarray:
    """The ends of the parts of bins."""
    return bins.edges_s[0] + bins.bin_s / PARTS * np.arange(PARTS * len(bins.covered_s) + 1)


def _chance(counts: np.ndarray, bins: _Bins, last_s: float, scv: float) -> float:
    """The chance of counts in bins, part by part, that differ at least so much where the rate does not [-]."""
    edges_s, whole = _quarters(bins), bins.whole
    counts = counts.reshape(-1, PARTS).astype(float)
    inside = ((edges_s[:-1] >= 0) & (edges_s[1:] <= last_s)).reshape(-1, PARTS) & whole[:, None]
    size = inside.sum(axis=1)
    counts, inside, size = counts[size > 0], inside[size > 0], size[size > 0]
    if len(size) < 2:
        return 1.0
    mean = np.sum(counts, axis=1, where=inside) / size
    over_all = np.average(mean, weights=size)
    between = float(np.sum(size * (mean - over_all) ** 2)) / (len(size) - 1)
    within = float(np.sum((counts - mean[:, None]) ** 2, where=inside)) / max(size.sum() - len(size), 1)
    within = max(within, scv * over_all)  # of renewals, however rare their bursts are
    if within == 0:
        return 0.0 if between > 0 else 1.0
    return float(scipy.special.fdtrc(len(size) - 1, size.sum() - len(size), between / within))
