"""A day that is not stationary, request by request: arrivals by a rate profile, instances that come and go by period.

Requests come as the workload's own renewal process in operational time, which passes as fast as the rate is: with rate
lambda(s) the k-th comes when the integral of lambda has reached the k-th point of the process. An instance that starts
for a period takes requests from its first moment on; one that stops takes no more and finishes what it has. So queues
and batches carry over from period to period, which laws of every period by itself leave out.

`squeeze` shortens every period by that factor at the same rates, so that a long day fits: what carries over weighs that
much more than in the day itself.
"""

from dataclasses import dataclass

import numpy as np

from fleetopt_jax._simulate.dispatch import Balancer
from fleetopt_jax._simulate.estimates import Estimate, estimate
from fleetopt_jax._simulate.pool import Course
from fleetopt_jax._simulate.requests import Requests, draw_requests
from fleetopt_jax._simulate.simulate import Setting, arrive, beyond_iterations_s, observed_of, outlook, run_alone
from fleetopt_jax.core.numerics import require_float64
from fleetopt_jax.fleet.assumptions import Assumptions
from fleetopt_jax.fleet.choices.dispatch import STALENESS_S
from fleetopt_jax.fleet.fleet import Fleet, Slo
from fleetopt_jax.laws.ttft import TAIL_PROBABILITY
from fleetopt_jax.workload.atoms import Workload, with_rate
from fleetopt_jax.workload.hours import Hours


@dataclass(frozen=True)
class Day:
    """What serves when: windows and engines of a fleet, and how many instances by period [T, K]."""

    fleet: Fleet
    hours: Hours
    n_instances: np.ndarray


@dataclass(frozen=True)
class ReplayedDay:
    """What became of the requests of each period of the schedule, by when they came. Arrays [R, T]."""

    n_requests: np.ndarray
    ttft_p99_s: np.ndarray  # of all requests together; 0 where none came
    slo_attainment: np.ndarray  # share whose first token came in time; 1 where none came

    @property
    def attained(self) -> list[Estimate]:
        """The share in time of every period, with its interval over replications."""
        each = zip(self.slo_attainment.T, self.n_requests.sum(axis=0), strict=True)
        return [estimate(values, share=True, n_requests=int(n)) for values, n in each]

    @property
    def fails(self) -> np.ndarray:
        """Periods in which fewer than 99 % are in time, beyond chance [T]."""
        return np.array([each.high < 1.0 - TAIL_PROBABILITY for each in self.attained])


def replay_day(
    day: Day,
    workload: Workload,
    assumptions: Assumptions,
    slo: Slo,
    *,
    arrivals: Hours | None = None,
    squeeze: float = 1.0,
    n_replications: int = 3,
    seed: int = 0,
) -> ReplayedDay:
    """A day's requests, which come at the rates of its hours, or of `arrivals` of the same span, by other periods.

    `workload` says what requests are like and how bursty; its rate is not read. The same seed gives the same result.
    """
    require_float64("replay_day")
    came = arrivals or day.hours
    if abs(came.span_s - day.hours.span_s) > 1e-6 * day.hours.span_s:
        raise ValueError(f"need arrivals of {day.hours.span_s:g} s, as the day has, got {came.span_s:g} s")
    if not (squeeze >= 1 and n_replications >= 1):
        raise ValueError(f"need squeeze >= 1 and n_replications >= 1, got {squeeze} and {n_replications}")
    most = day.n_instances.max(axis=0)
    peak = with_rate(workload, day.hours.rate_per_s.max())
    fleet = day.fleet.with_instances(most)
    analytic, life_s = outlook(fleet, peak, assumptions=assumptions)
    balancer = Balancer(assumptions.dispatch, STALENESS_S, seed)
    setting = Setting(fleet, peak, assumptions, slo, analytic, float(life_s.max()), balancer, None)
    from_s = _edges_s(day.hours, squeeze)[:-1]
    found = []
    for r in range(n_replications):
        requests = requests_of_day(came, workload, assumptions, squeeze=squeeze, seed=seed, first=r)
        arrived = arrive(setting, requests, r)
        courses = [Course(from_s, n) for n in day.n_instances.T]
        runs = [run_alone(setting, arrived, k, int(most[k]), course=course) for k, course in enumerate(courses)]
        seen = observed_of(arrived, runs, beyond_iterations_s(fleet, assumptions), slo)
        period = np.searchsorted(from_s, requests.arrival_s[0], side="right") - 1
        found.append(_by_period(period, seen.ttft_s[0], seen.limit_s[0], len(from_s)))
    return ReplayedDay(*(np.stack(column) for column in zip(*found, strict=True)))


def requests_of_day(
    hours: Hours, workload: Workload, assumptions: Assumptions, *, squeeze: float = 1.0, seed: int = 0, first: int = 0
) -> Requests:
    """One replication of the requests of a day, with as many in it as its rates say."""
    edges_s = _edges_s(hours, squeeze)
    expected = np.append(0.0, np.cumsum(hours.rate_per_s * hours.length_s)) / squeeze
    n = max(1, round(float(expected[-1])))
    drawn = draw_requests(with_rate(workload, 1.0), assumptions, n, 1, seed, first)
    # A part of a gap is left after the last: all come within the day.
    point = drawn.arrival_s * (expected[-1] / (drawn.arrival_s[:, -1:] + 0.5))
    period = np.searchsorted(expected, point, side="left") - 1  # none of the periods without requests
    arrival_s = edges_s[period] + (point - expected[period]) / hours.rate_per_s[period]
    return Requests(arrival_s, drawn.prompt_tokens, drawn.output_tokens, drawn.blocks, drawn.routed_tokens)


def _edges_s(hours: Hours, squeeze: float) -> np.ndarray:
    """When its periods begin, and the last ends [T + 1]."""
    return np.append(0.0, np.cumsum(hours.length_s)) / squeeze


def _by_period(period: np.ndarray, ttft_s: np.ndarray, limit_s: np.ndarray, n: int) -> tuple[np.ndarray, ...]:
    counts = np.bincount(period, minlength=n)
    met = np.bincount(period, ttft_s <= limit_s, minlength=n)
    p99 = np.zeros(n)
    for t in np.flatnonzero(counts):
        p99[t] = np.quantile(ttft_s[period == t], 1.0 - TAIL_PROBABILITY, method="higher")
    return counts, p99, np.where(counts > 0, met / np.maximum(counts, 1), 1.0)
