"""What readers are asked, what they find, and what they say of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa

from fleetopt_jax.workload.blocks import Blocks
from fleetopt_jax.workload.clock import Clock
from fleetopt_jax.workload.sampling import SampledUses

ZeroOutput = Literal["keep", "drop"]
Columns = dict[str, pa.Array]


@dataclass(frozen=True)
class Layout:
    """Which columns hold what; a nested one by its dotted path. What is None is found by the names that are known.

    `time_unit_s` is the length of one unit of numeric time stamps; without it the numbers tell, or are refused. A
    `count` column says how many requests a row sums. Where prompt and output are named, no column of time or count is
    read but the named ones (and those of the known layout that has both).
    """

    prompt: str | None = None
    output: str | None = None
    time: str | None = None
    time_unit_s: float | None = None
    count: str | None = None
    zero_output: ZeroOutput = "keep"  # of requests without output tokens: prefilled only, or left out
    block_tokens: int | None = None  # of a prompt that one block hash stands for; None: the layout's, or 512


@dataclass(frozen=True)
class Understood:
    """What a reader took a file for."""

    file_format: str  # csv, jsonl, json, Parquet, ...
    details: tuple[str, ...] = ()  # packing, encoding, delimiter, where they are not the usual ones
    layout: str = ""  # by name
    columns: dict[str, str] = field(default_factory=dict)  # role: column
    time_unit: str | None = None  # s, ms, us, ns; calendar; day; None without time
    time_note: str = ""  # how the unit or the zone was found
    n_rows: int = 0  # read, those left out included
    n_dropped: int = 0  # rows left out
    n_zero_output: int = 0  # requests with 0 or no output tokens, kept or dropped
    zero_output: ZeroOutput = "keep"
    warnings: tuple[str, ...] = ()
    no_rate: str = ""  # why its time stamps tell no rate

    @property
    def line(self) -> str:
        """All but the warnings, in one line."""
        parts = [" ".join((self.file_format, *(f"({detail})" for detail in self.details)))]
        if self.layout:
            parts.append(self.layout)
        if self.columns:
            parts.append(", ".join(f"{role} {name!r}" for role, name in self.columns.items()))
        if self.time_note:
            parts.append(self.time_note)
        if self.n_dropped:
            parts.append(f"{self.n_dropped:,} of {self.n_rows:,} rows left out")
        return "; ".join(parts)


@dataclass(frozen=True)
class Trace:
    """Requests as recorded. Arrays [n], in order of arrival where there are time stamps.

    `arrival_s` counts from the first arrival, or is None. A row may stand for `weight` requests that came within
    `bucket_s` from its stamp on: then its lengths are their means.
    """

    prompt_tokens: np.ndarray
    output_tokens: np.ndarray
    arrival_s: np.ndarray | None
    first_arrival_s: float = 0.0  # on the file's own clock; since 1970 where that is a calendar
    weight: np.ndarray | None = None  # requests a row stands for; None: one
    bucket_s: float = 0.0  # what a stamp stands for: an hour of sums, a day of dates alone; 0: a moment
    understood: Understood | None = None
    blocks: Blocks | None = None  # of the prompts, where their hashes or their sessions tell
    sessions: np.ndarray | None = None  # whose turn each request is, equal numbers for one; -1: nobody's [n]

    @property
    def n_requests(self) -> int:
        return len(self.prompt_tokens) if self.weight is None else round(float(self.weight.sum()))


@dataclass(frozen=True)
class LongTrace:
    """Requests too many to keep one by one: counted by their lengths and their time as they passed. Arrays [C]."""

    prompt_tokens: np.ndarray  # mean of each cell
    output_tokens: np.ndarray
    weight: np.ndarray  # requests in it
    width_frac: float  # of a cell, over the least length in it; 0: each pair of lengths has its own
    longest_tokens: float
    clock: Clock | None  # None without time stamps
    understood: Understood | None = None
    uses: SampledUses | None = None  # of blocks of prompts, where hashes or sessions tell: a sample [M]
    cell_of_use: np.ndarray | None = None  # that its request is in [M]
    cell_before: np.ndarray | None = None  # that the request is in which used the block before [M]

    @property
    def n_requests(self) -> int:
        return round(float(self.weight.sum()))


@dataclass(frozen=True)
class CdfFile:
    """A CDF of total lengths, and how a request's length splits."""

    knots: list[tuple[float, float]]
    output_share: float


@dataclass
class Source:
    """A file opened by its reader: the columns it has, and a way to stream some of them."""

    file_format: str
    names: list[str]  # of columns, nested ones by dotted path
    batches: Callable[[list[str]], Iterator[Columns]]
    details: tuple[str, ...] = ()
    layout: str = ""  # of a document that says what it is
    decimal_comma: bool = False
    no_rate: str = ""  # why its time stamps tell no rate
    warnings: list[str] = field(default_factory=list)  # complete once all batches are read


@dataclass(frozen=True)
class Histogram:
    """Counts of one kind of length by bucket. `edges_tokens` [K + 1] rise from 0; `counts` [K]; the mean is exact."""

    edges_tokens: np.ndarray
    counts: np.ndarray
    mean_tokens: float | None  # None where only the buckets are given


@dataclass(frozen=True)
class Histograms:
    """The two marginal histograms of prompts and outputs, and the rate where two samples tell one."""

    prompt: Histogram
    output: Histogram
    rate_per_s: float | None
    understood: Understood
