"""Workloads by name or file. The bundled ones are compressed traces and published CDFs, with their sources."""

import math
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fleetopt_jax.catalog.packaged import DATA, packaged_json
from fleetopt_jax.core.errors import BadField, BadInput, unknown_name
from fleetopt_jax.core.progress import Progress
from fleetopt_jax.core.struct import as_floats
from fleetopt_jax.workload.atoms import (
    OUTPUT_SHARE,
    Workload,
    make_workload,
    mean_tokens,
    share_above,
    total_tokens,
    with_rate,
)
from fleetopt_jax.workload.cdf import cdf_workload
from fleetopt_jax.workload.compress import Atoms, compress_with_members
from fleetopt_jax.workload.conversations import sticky_tokens
from fleetopt_jax.workload.profile import (
    MOMENTS,
    At,
    Hour,
    RateProfile,
    hour_of,
    hour_of_clock,
    profile_of_clock,
    rate_profile,
    requests_of,
)
from fleetopt_jax.workload.reuse import HitCurve, Reuse, hit_curve, hit_curve_of_sample, reuse_of, reuse_of_sample
from fleetopt_jax.workload.summary import TraceSummary, summarize, summarize_long, weighted_quantiles

if TYPE_CHECKING:
    from fleetopt_jax.workload.readers import Histograms, Layout, LongTrace, Trace, Understood

PAPER_RATE_PER_S = 1000.0
REUSE_ARRAYS = tuple(field.name for field in fields(Reuse))  # of a bundled workload whose reuse is known


@dataclass(frozen=True)
class LoadedWorkload:
    """A workload with its name and what is known of its requests."""

    name: str
    workload: Workload
    summary: TraceSummary
    output_share: float  # of a request's length, where the assumptions split it
    knots: list[tuple[float, float]] | None = None  # of a CDF
    rate_known: bool = True  # False where neither the file nor the caller says how often requests come
    understood: "Understood | None" = None  # what a file was taken for
    profile: RateProfile | None = None  # of a trace that is long enough
    hour: Hour | None = None  # that the workload is; None: all hours, at their mean rate
    prefix: HitCurve | None = None  # what caches would find of its prompts, where blocks or sessions tell

    @property
    def over_mean(self) -> float:
        """Its rate over the mean rate of all hours [-]."""
        return 1.0 if self.hour is None else self.hour.over_mean

    def require_window(self, window_tokens: float) -> None:
        """Refuse a window that does not hold the longest request, saying how many requests would not fit."""
        longest = float(self.workload.longest_tokens)
        if window_tokens >= longest:
            return
        share = float(share_above(self.workload, window_tokens))
        n = self.summary.n_requests
        would_not_fit = f"{share:.4%} of the requests" + (f", about {share * n:,.0f} of {n:,}," if n else "")
        raise BadField(
            "window_tokens",
            f"{window_tokens:.0f} tokens: {would_not_fit} would not fit",
            f"need >= {longest:.0f}, the longest of {self.name}",
        )


@cache
def bundled() -> dict[str, dict[str, Any]]:
    """What is said of each bundled workload: title, source, licence, summary, compression error."""
    return packaged_json("workloads.json")


def load(
    name_or_file: str,
    *,
    rate_per_s: float | None = None,
    layout: "Layout | None" = None,
    need_rate: bool = True,
    at: At = "mean",
    sticky: float | None = None,
    progress: Progress | None = None,
) -> LoadedWorkload:
    """A bundled workload (1,000 requests/s unless `rate_per_s`) or a file's (its own mean rate unless `rate_per_s`).

    A file without arrival times is refused where no rate is given, unless `need_rate` is False: then 1 request/s.
    `at` "peak" or "p95" is the workload in that hour of a trace (`workload.profile`): `rate_per_s` is still the mean of
    all hours, and that hour has as many times it as in the trace. `sticky` is the headroom of sticky sessions, of a
    trace whose block hashes or sessions tell of conversations (`workload.conversations`). A folder or a pattern of
    files is one trace (`workload.readers`); `progress` is told of the bytes that are read.

    Raises BadField for `workload`, `arrival_rate_per_s`, `at`, `sticky` or `columns` (of `layout`), and BadInput for
    what is wrong in the file, naming it and the line.
    """
    if at not in MOMENTS:
        raise unknown_name("at", at, MOMENTS)
    if rate_per_s is not None and not (math.isfinite(rate_per_s) and rate_per_s > 0):
        raise BadField("arrival_rate_per_s", f"{rate_per_s}", "need a positive, finite number of requests per second")
    if layout and name_or_file in bundled():
        raise BadField(_said_of(layout), f"{name_or_file} has no columns", "leave them out")
    if sticky is not None and name_or_file in bundled():
        raise _no_sessions(name_or_file, "is bundled without its requests")
    if name_or_file in bundled():
        if at != "mean":
            raise _no_hours(name_or_file, at, "is bundled without its arrival times")
        return _load_bundled(name_or_file, rate_per_s or PAPER_RATE_PER_S)
    if not _looks_like_file(name_or_file):
        raise unknown_name("workload", name_or_file, bundled())
    loaded = _of_file(name_or_file, rate_per_s, layout, (at, sticky), progress)
    if sticky is not None and loaded.workload.routed_tokens is None:
        raise _no_sessions(name_or_file, "has neither block hashes nor sessions")
    known = rate_per_s is not None or loaded.summary.arrival_rate_per_s is not None
    if need_rate and not known:
        why = "no arrival times to take a rate from"
        if loaded.understood and (loaded.understood.time_unit or loaded.understood.time_note):
            why = f"no span of time ({loaded.understood.time_note}) to take a rate from"
        if loaded.understood and loaded.understood.no_rate:
            why = "several runs in it, whose time stamps tell no common rate"
        problem = f"{name_or_file} has {why}"
        raise BadField("arrival_rate_per_s", problem, "need a number of requests per second")
    return replace(loaded, rate_known=known)


def made_workload(name: str, workload: Workload, *, output_share: float = OUTPUT_SHARE) -> LoadedWorkload:
    """A workload made in Python under a name, as `load` has those of files."""
    prompt, output = (float(mean) for mean in mean_tokens(workload))
    summary = TraceSummary(
        n_requests=None,
        mean_prompt_tokens=prompt,
        mean_output_tokens=output,
        longest_tokens=int(workload.longest_tokens),
        arrival_rate_per_s=None,
        arrival_scv=None,
        total_token_quantiles=weighted_quantiles(np.asarray(total_tokens(workload)), np.asarray(workload.weight)),
    )
    return LoadedWorkload(name, workload, summary, output_share)


def at_rate(loaded: LoadedWorkload, rate_per_s: float) -> LoadedWorkload:
    """The same requests at this rate: of the hour, where they are those of one [1/s]."""
    hour = loaded.hour and loaded.hour.at_rate(rate_per_s)
    return replace(loaded, workload=with_rate(loaded.workload, rate_per_s), hour=hour)


def load_workload(
    name_or_file: str,
    *,
    rate_per_s: float | None = None,
    layout: "Layout | None" = None,
    at: At = "mean",
    sticky: float | None = None,
) -> Workload:
    """The atoms of a bundled workload or a file; see `load`. A CDF with an output share of its own needs `load`.

    >>> float(fo.load_workload("azure-conv", rate_per_s=50.0).arrival_rate_per_s)
    50.0
    """
    loaded = load(name_or_file, rate_per_s=rate_per_s, layout=layout, at=at, sticky=sticky)
    if loaded.output_share != OUTPUT_SHARE:
        raise BadInput(
            name_or_file,
            f"output_share = {loaded.output_share}",
            "use catalog.workloads.load and put its output_share into Assumptions",
        )
    return loaded.workload


def cdf_knots(name: str) -> list[tuple[float, float]]:
    """The knots of a bundled CDF."""
    document = packaged_json(f"{name}.json")
    return [(tokens, fraction) for tokens, fraction in document["cdf"]]


def _load_bundled(name: str, rate_per_s: float) -> LoadedWorkload:
    about = bundled()[name]
    if about["kind"] == "cdf":
        return _of_cdf(name, cdf_knots(name), OUTPUT_SHARE, rate_per_s)
    with np.load(str(DATA / f"{name}.npz"), allow_pickle=False) as arrays:
        prompt, output, count = arrays["prompt_tokens"], arrays["output_tokens"], arrays["count"]
        reuse = Reuse(**as_floats(**{n: arrays[n] for n in REUSE_ARRAYS})) if REUSE_ARRAYS[0] in arrays else None
    summary = TraceSummary(**about["summary"])
    scv = 1.0 if summary.arrival_scv is None else summary.arrival_scv
    workload = make_workload(
        prompt,
        output,
        count,
        arrival_rate_per_s=rate_per_s,
        arrival_scv=scv,
        longest_tokens=summary.longest_tokens,
        reuse=reuse,
    )
    prefix = HitCurve(**about["prefix"]) if "prefix" in about else None
    return LoadedWorkload(name, workload, summary, OUTPUT_SHARE, prefix=prefix)


def _of_file(
    name: str,
    rate_per_s: float | None,
    layout: "Layout | None",
    asked: tuple[At, float | None],
    progress: Progress | None,
) -> LoadedWorkload:
    """What a file holds, `asked` for an hour and the headroom of sticky sessions."""
    # and pyarrow, unlike bundled ones
    from fleetopt_jax.workload.readers import CdfFile, LongTrace, Trace, read_workload_file

    at, sticky = asked
    # Whose turn a request is, a sample does not tell.
    found = read_workload_file(name, layout, keep=sticky is not None, progress=progress)
    if isinstance(found, LongTrace):
        return _of_long_trace(name, found, rate_per_s, at, layout)
    if isinstance(found, Trace):
        return _of_trace(name, found, rate_per_s, at, sticky)
    what = "a CDF" if isinstance(found, CdfFile) else "histograms"
    if layout is not None:
        raise BadField(_said_of(layout), f"{name} holds {what}: it has no columns", "leave them out")
    if at != "mean":
        raise _no_hours(name, at, f"holds {what}, without arrival times")
    if isinstance(found, CdfFile):
        return _of_cdf(name, found.knots, found.output_share, rate_per_s or 1.0)
    return _of_histograms(name, found, rate_per_s)


def _said_of(layout: "Layout") -> str:
    """The field of a layout that a workload without columns cannot be read by."""
    if layout.prompt or layout.time or layout.count:
        return "columns"
    if layout.block_tokens:
        return "block_tokens"
    return "time_unit" if layout.time_unit_s else "zero_output"


def _of_cdf(name: str, knots: list[tuple[float, float]], output_share: float, rate_per_s: float) -> LoadedWorkload:
    workload = cdf_workload(knots, arrival_rate_per_s=rate_per_s, output_share=output_share)
    return replace(made_workload(name, workload, output_share=output_share), knots=knots)


def _of_trace(
    name: str, trace: "Trace", rate_per_s: float | None, at: At, sticky: float | None = None
) -> LoadedWorkload:
    summary, profile = summarize(trace), rate_profile(trace)
    rate, scv = rate_per_s or summary.arrival_rate_per_s or 1.0, summary.arrival_scv
    hour, served = None, trace
    if at != "mean":
        profile = _require_hours(name, at, trace, profile)
        hour = hour_of(trace, profile, at, rate)
        rate, scv = hour.rate_per_s, profile.arrival_scv
        served = requests_of(trace, profile, profile.at(at)) if hour.own_lengths else trace
    lengths, blocks = (served.prompt_tokens, served.output_tokens), served.blocks
    kept = None  # what sessions that are kept are routed by
    if sticky is not None and blocks is not None:
        kept = sticky_tokens(blocks, *lengths, sticky, summary.longest_tokens)
    routed = _total(served) if kept is None else kept
    atoms, atom = compress_with_members(*lengths, served.weight, routed_tokens=kept)
    workload = make_workload(
        *atoms,
        arrival_rate_per_s=rate,
        arrival_scv=1.0 if scv is None else scv,
        longest_tokens=summary.longest_tokens,
        reuse=None if blocks is None else reuse_of(blocks, served.prompt_tokens, routed, atom),
        routed_tokens=None if kept is None else np.bincount(atom, kept) / np.bincount(atom),
    )
    prefix = None if trace.blocks is None else hit_curve(trace.blocks, trace.prompt_tokens)
    loaded = LoadedWorkload(name, workload, summary, OUTPUT_SHARE, understood=trace.understood, prefix=prefix)
    return replace(loaded, profile=profile, hour=hour)


def _of_long_trace(
    name: str, trace: "LongTrace", rate_per_s: float | None, at: At, layout: "Layout | None"
) -> LoadedWorkload:
    """Of requests that were counted as they passed; they pass again where an hour's own lengths are planned with."""
    from fleetopt_jax.workload.readers import LongTrace, read_workload_file

    summary, clock = summarize_long(trace), trace.clock
    profile = None if clock is None else profile_of_clock(clock)
    rate, scv = rate_per_s or summary.arrival_rate_per_s or 1.0, summary.arrival_scv
    hour, served = None, trace
    if at != "mean":
        if clock is None or profile is None:
            raise _no_hours(name, at, "has no arrival times" if clock is None else "is too short to tell its hours")
        hour = hour_of_clock(clock, profile, at, rate)
        rate, scv = hour.rate_per_s, profile.arrival_scv
        if hour.own_lengths:
            again = read_workload_file(name, layout, within_s=(hour.start_s, hour.start_s + hour.length_s))
            served = again if isinstance(again, LongTrace) else trace
    atoms, atom = compress_with_members(served.prompt_tokens, served.output_tokens, served.weight)
    workload = make_workload(
        *atoms,
        arrival_rate_per_s=rate,
        arrival_scv=1.0 if scv is None else scv,
        longest_tokens=summary.longest_tokens,
        reuse=_reuse_of_long(served, atoms, atom),
    )
    prefix = None if trace.uses is None else hit_curve_of_sample(trace.uses)
    loaded = LoadedWorkload(name, workload, summary, OUTPUT_SHARE, understood=trace.understood, prefix=prefix)
    return replace(loaded, profile=profile, hour=hour)


def _reuse_of_long(trace: "LongTrace", atoms: Atoms, atom: np.ndarray) -> Reuse | None:
    """Of the atoms that the cells of a trace are in."""
    if trace.uses is None or trace.cell_of_use is None or trace.cell_before is None:
        return None
    prompt, output, mass = atoms
    return reuse_of_sample(
        trace.uses, (prompt, prompt + output, mass), atom[trace.cell_of_use], atom[trace.cell_before]
    )


def _total(trace: "Trace") -> np.ndarray:
    return trace.prompt_tokens + trace.output_tokens


def _of_histograms(name: str, histograms: "Histograms", rate_per_s: float | None) -> LoadedWorkload:
    """The joint of two marginals by independence, and what another joint would change."""
    from fleetopt_jax.workload.histogram import join

    joined = join(histograms)
    workload = make_workload(
        joined.prompt_tokens,
        joined.output_tokens,
        joined.weight,
        arrival_rate_per_s=rate_per_s or histograms.rate_per_s or 1.0,
        longest_tokens=joined.longest_tokens,
    )
    loaded = made_workload(name, workload)
    low, high = joined.total_sd_range
    assumed = (
        f"two histograms do not say which prompt had which output: taken as independent; the mean total is exact, its "
        f"standard deviation {joined.total_sd_tokens:,.0f} tokens, {low:,.0f} to {high:,.0f} for other joints"
    )
    read = replace(histograms.understood, warnings=(assumed, *histograms.understood.warnings))
    n, rate = read.n_rows, histograms.rate_per_s
    return replace(loaded, summary=replace(loaded.summary, n_requests=n, arrival_rate_per_s=rate), understood=read)


def _require_hours(name: str, at: At, trace: "Trace", profile: RateProfile | None) -> RateProfile:
    if profile is not None:
        return profile
    if trace.arrival_s is None:
        raise _no_hours(name, at, "has no arrival times")
    n, span_s = len(trace.arrival_s), trace.arrival_s[-1]
    raise _no_hours(name, at, f"has {n:,} requests in {span_s:,.0f} s, too few to tell its busiest hour or minute")


def _no_sessions(name: str, why: str) -> BadField:
    return BadField("sticky", f"{name} {why}: nothing tells whose turn a request is", "need a trace that does")


def _no_hours(name: str, at: At, why: str) -> BadField:
    return BadField("at", f"{at}: {name} {why}", "need a longer trace with arrival times, or mean")


def _looks_like_file(name: str) -> bool:
    try:
        return "/" in name or "." in name or Path(name).exists()
    except (OSError, ValueError):  # a name no file can have
        return False
