"""From readers' pieces to a checked trace: only the columns that are meant are kept, 24 bytes a request.

Beyond `limits.MAX_KEPT_ROWS` requests are counted by their lengths and their time as they pass (`workload/cells.py`,
`workload/clock.py`), so that a log of any length takes no more memory, and of its block hashes or sessions a sample is
kept (`workload/sampling.py`); but where its rows sum requests, or name the turn before theirs, which have to be there
at once. So it is beyond `limits.MAX_KEPT_BLOCKS` hashes.
"""

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.files import first_line
from fleetopt_jax.core.units import DAY_S
from fleetopt_jax.workload.blocks import SESSION_BLOCK_TOKENS, blocks_of_sessions
from fleetopt_jax.workload.cells import Cells
from fleetopt_jax.workload.clock import Clock, OutOfOrder
from fleetopt_jax.workload.readers import limits
from fleetopt_jax.workload.readers.gathered_reuse import GatheredReuse
from fleetopt_jax.workload.readers.hints import hints
from fleetopt_jax.workload.readers.known import Settled, settle, unread_hints
from fleetopt_jax.workload.readers.numbers import BadRow, place, tokens
from fleetopt_jax.workload.readers.parquet import too_many_rows
from fleetopt_jax.workload.readers.passing_reuse import PassingReuse
from fleetopt_jax.workload.readers.records import Columns, Layout, LongTrace, Source, Trace, Understood
from fleetopt_jax.workload.readers.rounded import Spread
from fleetopt_jax.workload.readers.stamps import Arrivals, Stamps, arrivals


@dataclass
class _Gathered:
    """What the pieces held, row by row of those that are kept."""

    prompts: list[np.ndarray] = field(default_factory=list)
    outputs: list[np.ndarray] = field(default_factory=list)
    counts: list[np.ndarray] = field(default_factory=list)
    n_rows: int = 0
    n_empty: int = 0  # rows without a request: no tokens at all, or a count of 0
    n_zero: float = 0  # requests with 0 output tokens
    n_unknown: float = 0  # requests with no number of output tokens
    n_kept: int = 0  # rows with a request
    before: int = 0  # rows of the files before the present one
    no_rate: str = ""
    warnings: list[list[str]] = field(default_factory=list)  # of each file, complete once it is read
    used: GatheredReuse = field(default_factory=GatheredReuse)  # what tells of blocks that are used again

    def begin(self, source: Source) -> None:
        """Another file."""
        self.before = self.n_rows
        self.no_rate = self.no_rate or source.no_rate
        self.warnings.append(source.warnings)

    @property
    def is_long(self) -> bool:
        """Whether it is too long to be kept."""
        return self.n_rows > limits.MAX_KEPT_ROWS or self.used.n_held > limits.MAX_KEPT_BLOCKS

    def release(self) -> None:
        """Let go what was kept row by row."""
        self.prompts, self.outputs = [], []
        self.used.release()


class Part(NamedTuple):
    """A file that is opened, of one or several that hold one trace."""

    where: str
    source: Source
    details: tuple[str, ...] = ()


def collect(
    parts: Iterable[Part],
    layout: Layout | None,
    *,
    keep: bool = False,
    within_s: tuple[float, float] | None = None,
) -> Trace | LongTrace:
    """The requests of files, one after another, under their layout; `BadInput` names the file and the row that is
    wrong. With `keep` every request is kept, however many. `within_s` are the ends of a stretch on the file's own
    clock: of a long trace, only its requests are counted. Raises `OutOfOrder` where a long one is not in order."""
    gathered, first, settled, stamps, passed = _Gathered(), None, None, None, None
    for part in parts:
        mine = settle(part.where, part.source.names, layout, part.source.layout)
        if first is None or settled is None:
            first, settled = part, mine
            stamps = Stamps(part.where, mine.time, part.source.decimal_comma) if mine.time else None
        elif mine != settled:
            problem = f"its columns are not read as those of {first.where}"
            raise BadInput(part.where, problem, "need files of one layout, each with the same columns")
        gathered.begin(part.source)
        if stamps is not None:
            stamps.where = part.where
        for columns in _pieces(part, settled):
            _add(part.where, gathered, stamps, settled, columns, decimal_comma=part.source.decimal_comma)
            if passed is None and not keep and gathered.is_long:
                passed = _passing(first.where, gathered, stamps, settled, within_s)
            if passed is not None:
                passed.take(gathered, stamps)
    if first is None or settled is None or not gathered.n_rows:
        raise BadInput(first.where if first else "", "no rows")
    if not gathered.n_kept:
        raise BadInput(first.where, f"none of its {gathered.n_rows:,} rows has tokens in {settled.prompt!r}")
    if passed is not None:
        return _long_trace(first, settled, gathered, passed)
    return _trace(first.where, first.source, settled, gathered, stamps, first.details)


def _pieces(part: Part, settled: Settled) -> Iterator[Columns]:
    """The columns of a file, piece by piece; while one is looked at, the next is read."""
    pieces = part.source.batches(settled.columns)
    ahead = ThreadPoolExecutor(1)
    try:
        piece = next(pieces, None)
        while piece is not None:
            following = ahead.submit(next, pieces, None)
            yield piece
            piece = following.result()
    except (BadInput, OutOfOrder):
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise BadInput(part.where, f"cannot be read as {part.source.file_format}: {first_line(error)}") from error
    finally:
        ahead.shutdown(cancel_futures=True)


class _Passing:
    """What is counted of requests that pass."""

    def __init__(self, found: Arrivals | None, within_s: tuple[float, float] | None, reuse: PassingReuse):
        self.cells, self.longest_tokens, self.some_output = Cells(), 0.0, False
        self.found, self.reuse, self._within_s = found, reuse, within_s
        self.clock = Clock(found.first_s) if found else None
        self._spread = Spread(found.grid, in_pieces=True) if found and found.grid else None

    def take(self, gathered: _Gathered, stamps: Stamps | None) -> None:
        """Count what is gathered, and let it go."""
        prompts, outputs = gathered.prompts, gathered.outputs
        for k, (prompt, output) in enumerate(zip(prompts, outputs)):
            if not len(prompt):
                continue
            rows, order = slice(None), None
            if stamps is not None and self.clock is not None and self.found is not None:
                raw = stamps.pieces.pop(0)
                if raw.min() < self.found.first:
                    raise OutOfOrder
                seconds = self.found.since_first(raw)
                self.clock.add(self._spread(seconds) if self._spread else seconds, prompt, output)
                order = np.argsort(seconds, kind="stable") if (np.diff(seconds) < 0).any() else None
                if self._within_s is not None:
                    at = seconds + self.found.first_s
                    rows = (at >= self._within_s[0]) & (at < self._within_s[1])
                    order = np.flatnonzero(rows) if order is None else order[rows[order]]
            self.reuse.take(k, prompt, output, order)
            self.cells.add(prompt[rows], output[rows])
            self.longest_tokens = max(self.longest_tokens, float((prompt + output).max()))
            self.some_output |= bool(output.any())
            prompts[k] = outputs[k] = prompt[:0]
        gathered.release()


def _passing(
    where: str,
    gathered: _Gathered,
    stamps: Stamps | None,
    settled: Settled,
    within_s: tuple[float, float] | None,
) -> _Passing | None:
    """The counters of a long trace; None where its rows must stay. Their unit of time is what is known by now."""
    if gathered.no_rate or settled.count or (settled.parent and not gathered.used.n_blocks):
        return None
    found = arrivals(stamps, gathered.n_kept, settled.time_unit_s, settled.documented_s) if stamps else None
    if found is not None and found.unit == "day":
        return None
    return _Passing(found, within_s, PassingReuse(where, settled, gathered.used))


def _add(
    where: str, gathered: _Gathered, stamps: Stamps | None, settled: Settled, columns: Columns, *, decimal_comma: bool
) -> None:
    before = gathered.n_rows - gathered.before
    most = limits.MAX_SUM_TOKENS if settled.count else limits.MAX_TOKENS
    try:
        prompt = tokens(settled.prompt, columns[settled.prompt], decimal_comma=decimal_comma, most=most)
        output = tokens(settled.output, columns[settled.output], decimal_comma=decimal_comma, most=most)
        count = None
        if settled.count:
            count = tokens(settled.count, columns[settled.count], decimal_comma=decimal_comma, most=most)
    except BadRow as error:
        raise error.at(where, before) from None
    gathered.n_rows += len(prompt)
    if len(gathered.prompts) and sum(map(len, gathered.prompts)) > limits.MAX_REQUESTS:
        raise too_many_rows(where)
    if gathered.n_rows > limits.MAX_PASSED_ROWS:
        raise too_many_rows(where, limits.MAX_PASSED_ROWS)
    kept = _kept(where, before, gathered, settled, (prompt, output, count))
    if kept is not None:
        prompt, output = prompt[kept], output[kept]
        count = None if count is None else count[kept]
        output = np.where(np.isnan(output), 0.0, output)
    if count is not None:
        gathered.counts.append(count)
        prompt, output = np.maximum(prompt / count, 1.0), output / count
    gathered.n_kept += len(prompt)
    gathered.prompts.append(prompt)
    gathered.outputs.append(output)
    gathered.used.add(settled, columns, before, len(columns[settled.prompt]), kept)
    if stamps is not None and settled.time and len(prompt):
        stamps.add(before, columns[settled.time], kept)


def _kept(
    where: str,
    before: int,
    gathered: _Gathered,
    settled: Settled,
    found: tuple[np.ndarray, np.ndarray, np.ndarray | None],
) -> np.ndarray | None:
    """The rows that are requests, None for all; counts those that are none, and those without output."""
    prompt, output, count = found
    requests = np.ones_like(prompt) if count is None else count
    if prompt.min(initial=1) >= 1 and output.min(initial=1) >= 1 and requests.min(initial=1) >= 1:
        return None  # none of them missing, either
    empty = ~(prompt > 0) & ~(output > 0) | (requests == 0)
    lacking = ~empty & ~(prompt >= 1)
    if lacking.any() or np.isnan(requests[~empty]).any():
        name, values = (settled.prompt, prompt) if lacking.any() else (settled.count, requests)
        row = int(np.argmax(lacking if lacking.any() else np.isnan(requests) & ~empty))
        problem = f"{name} is missing" if np.isnan(values[row]) else f"{name} = {values[row]:g}"
        raise BadInput(place(where, before, row), problem, "need a whole number from 1 on")
    without = ~empty & ~(output >= 1)
    unknown = without & np.isnan(output)
    gathered.n_empty += int(empty.sum())
    gathered.n_unknown += float(requests[unknown].sum())
    gathered.n_zero += float(requests[without & ~unknown].sum())
    dropped = empty | (without if settled.zero_output == "drop" else False)
    return np.flatnonzero(~dropped)


def _trace(
    where: str,
    source: Source,
    settled: Settled,
    gathered: _Gathered,
    stamps: Stamps | None,
    details: tuple[str, ...],
) -> Trace:
    prompt, output = np.concatenate(gathered.prompts), np.concatenate(gathered.outputs)
    if not output.any():
        raise BadInput(where, f"no request has output tokens in {settled.output!r}", "tokens per joule need some")
    weight = np.concatenate(gathered.counts) if gathered.counts else None
    n_requests = len(prompt) if weight is None else float(weight.sum())
    found = arrivals(stamps, n_requests, settled.time_unit_s, settled.documented_s) if stamps else None
    bucket_s = _bucket_s(found, weighted=weight is not None) if found else 0.0
    arrival_s = found.seconds if found else None
    blocks, sessions = gathered.used.settled(where, settled, prompt)
    if arrival_s is not None and (np.diff(arrival_s) < 0).any():
        order = np.argsort(arrival_s, kind="stable")
        arrival_s, prompt, output = arrival_s[order], prompt[order], output[order]
        weight = None if weight is None else weight[order]
        blocks, sessions = blocks and blocks.of(order), None if sessions is None else sessions[order]
    if arrival_s is not None and found is not None and found.grid and weight is None:
        arrival_s = np.sort(Spread(found.grid)(arrival_s))
    if blocks is None and sessions is not None:
        blocks = blocks_of_sessions(sessions, prompt, output, settled.block_tokens or SESSION_BLOCK_TOKENS)
    trace = Trace(
        prompt_tokens=prompt,
        output_tokens=output,
        arrival_s=None if gathered.no_rate else arrival_s,
        first_arrival_s=found.first_s if found and not gathered.no_rate else 0.0,
        weight=weight,
        bucket_s=bucket_s,
        blocks=blocks,
        sessions=sessions,
    )
    warnings = (*_said(gathered, settled), *hints(trace, settled, found), *_unread(source, settled, gathered))
    understood = _understood(source, settled, gathered, found, (*details, *source.details), warnings)
    return replace(trace, understood=replace(understood, no_rate=gathered.no_rate))


def _long_trace(first: Part, settled: Settled, gathered: _Gathered, passed: _Passing) -> LongTrace:
    if not passed.some_output:
        raise BadInput(first.where, f"no request has output tokens in {settled.output!r}", "tokens per joule need some")
    prompt, output, weight = passed.cells.settled()
    trace = LongTrace(prompt, output, weight, passed.cells.width_frac, passed.longest_tokens, passed.clock)
    uses, found = passed.reuse.settled(), passed.found
    if uses is not None:
        mine = passed.cells.of(uses.prompt_tokens, uses.output_tokens)
        before = passed.cells.of(uses.previous_prompt, uses.previous_output)
        trace = replace(trace, uses=uses, cell_of_use=mine, cell_before=before)
    if found is not None and passed.clock is not None:
        found = replace(found, seconds=np.array([0.0, passed.clock.last_s]))
    as_trace = Trace(prompt, output, None, weight=weight)
    warnings = (*_said(gathered, settled), *hints(as_trace, settled, found), *_unread(first.source, settled, gathered))
    details = (*first.details, *first.source.details)
    return replace(trace, understood=_understood(first.source, settled, gathered, found, details, warnings))


def _said(gathered: _Gathered, settled: Settled) -> list[str]:
    """What readers and rows tell."""
    of_files = dict.fromkeys(itertools.chain(*gathered.warnings))
    return [*of_files, *gathered.used.warnings, *_of_rows(gathered, settled)]


def _unread(source: Source, settled: Settled, gathered: _Gathered) -> list[str]:
    return [*unread_hints(source.names, settled), *([gathered.no_rate] if gathered.no_rate else [])]


def _understood(
    source: Source,
    settled: Settled,
    gathered: _Gathered,
    found: Arrivals | None,
    details: tuple[str, ...],
    warnings: tuple[str, ...],
) -> Understood:
    without = round(gathered.n_zero + gathered.n_unknown)
    roles = {"prompt": settled.prompt, "output": settled.output, "time": settled.time, "count": settled.count}
    roles |= gathered.used.roles(settled)
    n_dropped = gathered.n_rows - gathered.n_kept
    return Understood(
        file_format=source.file_format,
        details=details,
        layout=settled.name,
        columns={role: name for role, name in roles.items() if name},
        time_unit=found.unit if found else None,
        time_note=found.note if found else "",
        n_rows=gathered.n_rows,
        n_dropped=n_dropped,
        n_zero_output=without,
        zero_output=settled.zero_output,
        warnings=warnings,
    )


def _bucket_s(found: Arrivals, *, weighted: bool) -> float:
    """What a stamp stands for: a day of dates alone; of sums, the least gap between two stamps."""
    if found.unit == "day":
        return DAY_S
    gaps = np.diff(np.unique(found.seconds))
    return float(gaps.min()) if weighted and len(gaps) else 0.0


def _of_rows(gathered: _Gathered, settled: Settled) -> list[str]:
    """What is said of rows that are no full requests."""
    said = []
    if gathered.n_empty:
        what = "hold no requests" if settled.count else "have no tokens"
        said.append(f"{gathered.n_empty:,} rows {what} and are left out")
    without = gathered.n_zero + gathered.n_unknown
    if without:
        unknown = f", {gathered.n_unknown:,.0f} of them with none recorded" if gathered.n_unknown else ""
        how = "are left out" if settled.zero_output == "drop" else "count as prefilled only (--zero-output drop)"
        said.append(f"{without:,.0f} requests have no output tokens{unknown}; they {how}")
    if settled.count:
        said.append(
            f"rows are sums over {settled.count!r} requests: every request gets its row's mean lengths, the spread of "
            "lengths within a row is lost, and with it the longest requests"
        )
    return said
