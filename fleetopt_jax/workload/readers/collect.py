"""From a reader's pieces to a checked trace: only the columns that are meant are kept, 24 bytes a request."""

from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.files import first_line
from fleetopt_jax.core.units import DAY_S
from fleetopt_jax.workload.blocks import SESSION_BLOCK_TOKENS, blocks_of_sessions
from fleetopt_jax.workload.readers import limits
from fleetopt_jax.workload.readers.gathered_reuse import GatheredReuse
from fleetopt_jax.workload.readers.hints import hints
from fleetopt_jax.workload.readers.known import Settled, settle, unread_hints
from fleetopt_jax.workload.readers.numbers import BadRow, place, tokens
from fleetopt_jax.workload.readers.parquet import too_many_rows
from fleetopt_jax.workload.readers.records import Columns, Layout, Source, Trace, Understood
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
    used: GatheredReuse = field(default_factory=GatheredReuse)  # what tells of blocks that are used again


def collect(where: str, source: Source, layout: Layout | None, details: tuple[str, ...] = ()) -> Trace:
    """The requests of a file under its layout; `BadInput` names the row that is wrong."""
    settled = settle(where, source.names, layout, source.layout)
    gathered = _Gathered()
    stamps = Stamps(where, settled.time, source.decimal_comma) if settled.time else None
    try:
        for columns in source.batches(settled.columns):
            _add(where, gathered, stamps, settled, columns, decimal_comma=source.decimal_comma)
    except BadInput:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise BadInput(where, f"cannot be read as {source.file_format}: {first_line(error)}") from error
    if not gathered.n_rows:
        raise BadInput(where, "no rows")
    if not any(map(len, gathered.prompts)):
        raise BadInput(where, f"none of its {gathered.n_rows:,} rows has tokens in {settled.prompt!r}")
    return _trace(where, source, settled, gathered, stamps, details)


def _add(
    where: str, gathered: _Gathered, stamps: Stamps | None, settled: Settled, columns: Columns, *, decimal_comma: bool
) -> None:
    before = gathered.n_rows
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
    if gathered.n_rows > limits.MAX_REQUESTS:
        raise too_many_rows(where)
    kept = _kept(where, before, gathered, settled, (prompt, output, count))
    if kept is not None:
        prompt, output = prompt[kept], output[kept]
        count = None if count is None else count[kept]
        output = np.where(np.isnan(output), 0.0, output)
    if count is not None:
        gathered.counts.append(count)
        prompt, output = np.maximum(prompt / count, 1.0), output / count
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
    if blocks is None and sessions is not None:
        blocks = blocks_of_sessions(sessions, prompt, output, settled.block_tokens or SESSION_BLOCK_TOKENS)
    trace = Trace(
        prompt_tokens=prompt,
        output_tokens=output,
        arrival_s=None if source.no_rate else arrival_s,
        first_arrival_s=found.first_s if found and not source.no_rate else 0.0,
        weight=weight,
        bucket_s=bucket_s,
        blocks=blocks,
        sessions=sessions,
    )
    warnings = (
        *source.warnings,
        *gathered.used.warnings,
        *_of_rows(gathered, settled),
        *hints(trace, settled, found),
        *unread_hints(source.names, settled),
        *([source.no_rate] if source.no_rate else []),
    )
    understood = _understood(source, settled, gathered, found, (*details, *source.details), warnings)
    return replace(trace, understood=replace(understood, no_rate=source.no_rate))


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
    n_dropped = gathered.n_rows - sum(map(len, gathered.prompts))
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
