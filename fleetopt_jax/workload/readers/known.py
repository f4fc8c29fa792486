"""Layouts known by name, and the columns of a file that are meant by a name.

Names are compared without case, blanks, dashes and underscores: `Prompt Tokens` and `promptTokens` are `prompt_tokens`.
A nested column is known by the end of its path: `response.usage.prompt_tokens` is `usage.prompt_tokens`.
"""

import difflib
import re
from dataclasses import dataclass

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.files import shown
from fleetopt_jax.core.units import MS, NS, US
from fleetopt_jax.workload.readers.records import Layout, ZeroOutput

SECOND = 1.0
USUAL_TIMES = (
    *("timestamp", "ts", "arrival_time", "arrived_at", "arrival", "arrival_s", "request_time", "request_start_time"),
    *("start_time", "start", "started_at", "startTimeUnixNano", "start_time_unix_nano", "request_start_ns"),
    *("created", "created_at", "time", "datetime", "event_time", "event_timestamp", "log_time", "date_time", "date"),
    *("timestamp_s", "timestamp_ms", "timestamp_us", "timestamp_ns", "time_s", "time_ms", "start_times", "t"),
)
HASHES = ("hash_ids", "block_hash_ids", "prefix_hash_ids")  # of the blocks of a prompt, each of all up to its end
SESSIONS = ("session_id", "conversation_id", "conversation", "chat_id")
PARENT = "parent_chat_id"  # of a turn whose `chat_id` is its own
COUNTS = ("num_model_requests", "num_requests", "n_requests", "request_count", "requests", "count")


@dataclass(frozen=True)
class Known:
    """A layout by name. Without `times` the usual names are looked for; `also` must be there, too."""

    name: str
    prompt: str
    output: str
    times: tuple[str, ...] = ()
    time_unit_s: float | None = None
    count: str | None = None
    also: str | None = None
    block_tokens: int | None = None  # of its block hashes


KNOWN = (
    Known("Azure LLM inference trace", "ContextTokens", "GeneratedTokens", ("TIMESTAMP",)),
    Known("BurstGPT", "Request tokens", "Response tokens", ("Timestamp",), SECOND),
    Known(
        "Qwen-Bailian trace", "input_length", "output_length", ("timestamp",), SECOND, also="chat_id", block_tokens=16
    ),
    Known("Mooncake or ServeGen", "input_length", "output_length", ("timestamp",), MS),
    Known("fleetopt_jax", "prompt_tokens", "output_tokens", ("timestamp_s",), SECOND, also="timestamp_s"),
    Known("vLLM bench serve", "input_lens", "output_lens", ("start_times",), SECOND),
    Known(
        "aiperf",
        "metrics.input_sequence_length.value",
        "metrics.output_sequence_length.value",
        ("metadata.request_start_ns",),
        NS,
    ),
    Known("Vidur trace", "num_prefill_tokens", "num_decode_tokens", ("arrived_at",), SECOND),
    Known("OpenAI usage export", "input_tokens", "output_tokens", ("start_time",), SECOND, count="num_model_requests"),
    Known("OpenTelemetry spans", "gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens"),
    Known("OpenTelemetry spans", "gen_ai.usage.prompt_tokens", "gen_ai.usage.completion_tokens"),
    Known("OpenInference spans", "llm.token_count.prompt", "llm.token_count.completion"),
    Known("OpenLLMetry spans", "llm.usage.prompt_tokens", "llm.usage.completion_tokens"),
    Known("OpenAI responses", "usage.prompt_tokens", "usage.completion_tokens"),
    Known("OpenAI or Anthropic responses", "usage.input_tokens", "usage.output_tokens"),
    Known("Langfuse observations", "usageDetails.input", "usageDetails.output", ("startTime", "start_time")),
    Known("Langfuse observations", "usage.input", "usage.output", ("startTime", "start_time")),
    Known("Langfuse observations", "inputUsage", "outputUsage", ("startTime", "start_time")),
    Known("Gemini responses", "usageMetadata.promptTokenCount", "usageMetadata.candidatesTokenCount"),
    Known("prompt and completion tokens", "prompt_tokens", "completion_tokens"),
    Known("prompt and output tokens", "prompt_tokens", "output_tokens"),
    Known("input and output tokens", "input_tokens", "output_tokens"),
    Known("prompt and generated tokens", "prompt_tokens", "generated_tokens"),
    Known("prompt and generation tokens", "num_prompt_tokens", "num_generation_tokens"),
    Known("OpenRouter activity", "tokens_prompt", "tokens_completion"),
    Known("tokens in and out", "tokens_in", "tokens_out"),
    Known("tokens in and out", "in_tokens", "out_tokens"),
    Known("input and output lengths", "input_len", "output_len"),
    Known("prompt and output lengths", "prompt_len", "output_len"),
)
TEXTS = ("conversations", "messages")  # of files that hold words, not token counts
UNIT_NAMES = {
    **dict.fromkeys(("s", "sec", "secs", "seconds"), SECOND),
    **dict.fromkeys(("ms", "millis", "milliseconds", "msec"), MS),
    **dict.fromkeys(("us", "micros", "microseconds", "usec"), US),
    **dict.fromkeys(("ns", "nano", "nanos", "nanoseconds", "nsec"), NS),
}
_UNIT = re.compile(rf"(?:[^A-Za-z]|(?<=[a-z])(?=(?-i:[A-Z])))({'|'.join(UNIT_NAMES)})\W*$", re.IGNORECASE)


@dataclass(frozen=True)
class Settled:
    """The columns of one file, by their own names."""

    name: str  # of the layout
    prompt: str
    output: str
    time: str | None
    count: str | None
    time_unit_s: float | None  # asked for
    documented_s: float | None  # of the known layout, or by the column's own name
    zero_output: ZeroOutput
    hashes: str | None = None
    session: str | None = None
    parent: str | None = None  # of which session a turn goes on
    block_tokens: int | None = None  # of a hash, where it is asked for or of the layout

    @property
    def columns(self) -> list[str]:
        names = (self.prompt, self.output, self.time, self.count, self.hashes, self.session, self.parent)
        return [name for name in names if name is not None]


class Names:
    """The columns of a file, found by the names that people give them."""

    def __init__(self, where: str, names: list[str]):
        self.where, self.names = where, names
        self._by_end: dict[str, list[str]] = {}
        for name in dict.fromkeys(names):
            self._by_end.setdefault(_key(name).rsplit(".", 1)[-1], []).append(name)

    @property
    def listed(self) -> str:
        return ", ".join(shown(name) for name in self.names[:8]) + (", ..." if len(self.names) > 8 else "")

    def named(self, asked: str, option: str = "") -> str:
        """The column that a user means, or `BadInput`."""
        if asked in self.names:
            return self._once(asked)
        found = [name for name in self._by_end.get(_key(asked).rsplit(".", 1)[-1], []) if _key(name) == _key(asked)]
        if len(found) == 1:
            return self._once(found[0])
        if found:
            raise BadInput(self.where, f"column {asked!r} may be {' or '.join(map(repr, found))}", "need its own name")
        near = difflib.get_close_matches(asked, self.names, n=2, cutoff=0.6)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise BadInput(self.where, f"column {asked!r} is missing", f"columns are {self.listed}{hint}")

    def ending(self, wanted: str) -> list[tuple[str, str]]:
        """(what comes before, column) of those that end in `wanted`, the shortest path first."""
        key = _key(wanted)
        found = []
        for name in self._by_end.get(key.rsplit(".", 1)[-1], []):
            have = _key(name)
            if have == key or have.endswith("." + key):
                found.append((have[: len(have) - len(key)], name))
        return sorted(found, key=lambda each: each[0].count("."))

    def _once(self, name: str) -> str:
        if self.names.count(name) > 1:
            raise BadInput(self.where, f"column {name!r} is there more than once", "need it once")
        return name

    def pair(self, known: Known) -> tuple[str, str] | None:
        """Prompt and output of a known layout, side by side."""
        outputs = dict(reversed(self.ending(known.output)))
        pairs = [(name, outputs[before]) for before, name in self.ending(known.prompt) if before in outputs]
        if not pairs or (known.also and not self.ending(known.also)) or (known.count and not self.ending(known.count)):
            return None
        if len(pairs) > 1 and pairs[0][0].count(".") == pairs[1][0].count("."):
            several = " or ".join(repr(prompt) for prompt, _ in pairs[:3])
            raise BadInput(self.where, f"the prompt tokens may be {several}", "name the columns with options")
        return self._once(pairs[0][0]), self._once(pairs[0][1])

    def time(self, times: tuple[str, ...]) -> str | None:
        """The column of the first of these names; of the usual ones, the least nested."""
        found = [
            (before.count("."), rank, name)
            for rank, wanted in enumerate(times or USUAL_TIMES)
            for before, name in self.ending(wanted)[:1]
        ]
        return self._once(min(found)[2]) if found else None


def settle(where: str, names: list[str], layout: Layout | None, document: str = "") -> Settled:
    """Which columns of a file hold what; `BadInput` where nothing that is known is among them."""
    asked, columns = layout or Layout(), Names(where, names)
    if bool(asked.prompt) != bool(asked.output):
        raise BadInput(where, "only one of the prompt and output columns is named", "name both")
    known = next((each for each in KNOWN if columns.pair(each)), None)
    if asked.prompt and asked.output:
        pair = columns.named(asked.prompt), columns.named(asked.output)
        if pair[0] == pair[1]:
            raise BadInput(where, f"column {pair[0]!r} is named for the prompt and for the output", "name two columns")
        if known and columns.pair(known) != pair:
            known = None
        time = columns.named(asked.time) if asked.time else None
    elif known:
        pair = columns.pair(known) or ("", "")
        time = columns.named(asked.time) if asked.time else columns.time(known.times)
    else:
        raise _unknown(where, columns)
    usual = known is not None and time is not None and time == columns.time(known.times)
    documented_s = (known.time_unit_s if usual and known else None) or _unit_by_name(time)
    count = columns.named(asked.count) if asked.count else None
    if count is None and known and known.count:
        count = columns.ending(known.count)[0][1]
    hashes, session, parent = (None, None, None) if count else _reused(columns)
    return Settled(
        name=document or (known.name if known else "columns as named"),
        prompt=pair[0],
        output=pair[1],
        time=time,
        count=count,
        time_unit_s=asked.time_unit_s,
        documented_s=documented_s,
        zero_output=asked.zero_output,
        hashes=hashes,
        session=session,
        parent=parent,
        block_tokens=asked.block_tokens or (known.block_tokens if known else None),
    )


def _reused(columns: Names) -> tuple[str | None, str | None, str | None]:
    """The columns of block hashes, of sessions, and of the turn before, where each is there once."""

    def first(wanted: tuple[str, ...]) -> str | None:
        found = [name for each in wanted for before, name in columns.ending(each) if not before]
        return found[0] if found and columns.names.count(found[0]) == 1 else None

    parent = first((PARENT,))
    return first(HASHES), first(("chat_id",) if parent else SESSIONS), parent


def unread_hints(names: list[str], settled: Settled) -> list[str]:
    """Columns that look as if they should have been read."""
    columns, hints = Names("", names), []
    if settled.time is None and (time := _quietly(columns)):
        hints.append(f"column {time!r} looks like time stamps and is not read: name it with --time-column")
    if settled.count is None:
        counts = [name for wanted in COUNTS for before, name in columns.ending(wanted) if not before]
        if counts:
            hints.append(f"if column {counts[0]!r} counts requests, a row is a sum: name it with --count-column")
    cached = columns.ending("cache_read_input_tokens")
    if cached and "input" in _key(settled.prompt):
        hints.append(f"{settled.prompt!r} leaves out what was read from the cache ({cached[0][1]!r})")
    return hints


def _quietly(columns: Names) -> str | None:
    try:
        return columns.time(())
    except BadInput:
        return None


def _key(name: str) -> str:
    """A name as it is compared."""
    return ".".join("".join(c for c in part.casefold() if c.isalnum()) for part in name.split("."))


def _unit_by_name(name: str | None) -> float | None:
    """Of `timestamp_ms` or `startTimeUnixNano`; None where the name tells none."""
    unit = _UNIT.search(name) if name else None
    return UNIT_NAMES[unit[1].lower()] if unit else None


def _unknown(where: str, columns: Names) -> BadInput:
    if any(columns.ending(text) for text in TEXTS):
        return BadInput(
            where,
            "holds texts (ShareGPT or chat messages), no token counts",
            "tokenize first: one row a request with prompt_tokens and output_tokens",
        )
    return BadInput(
        where,
        f"columns are {columns.listed}",
        "need prompt_tokens and completion_tokens, or another known pair, or name yours: --prompt-column and "
        "--output-column",
    )
