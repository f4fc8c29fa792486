"""The same requests in every habit of writing them are the same trace; what is odd is said, what is unclear refused."""

import csv
import gzip
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from fleetopt_jax.catalog.workloads import load
from fleetopt_jax.core.errors import BadField, BadInput
from fleetopt_jax.documents.plan_file import ColumnsPart
from fleetopt_jax.laws.demand import demand, held_tokens
from fleetopt_jax.workload.histogram import join
from fleetopt_jax.workload.readers import Histogram, Histograms, Layout, Trace, Understood, read_workload_file
from fleetopt_jax.workload.summary import summarize

N = 400
EPOCH_S = 1_760_000_000
RNG = np.random.default_rng(7)
OFFSET_MS = np.sort(RNG.integers(0, 195_000, N))
PROMPT, OUTPUT = RNG.integers(20, 9000, N), RNG.integers(1, 900, N)
ROWS = [tuple(map(int, row)) for row in zip(OFFSET_MS, PROMPT, OUTPUT, strict=True)]
RATE_PER_S = N / ((OFFSET_MS[-1] - OFFSET_MS[0]) / 1000)
HEADER = ("timestamp", "prompt_tokens", "completion_tokens")


def at(ms: int, zone: timezone = UTC) -> datetime:
    return datetime.fromtimestamp(EPOCH_S, zone) + timedelta(milliseconds=ms)


def table(delimiter: str = ",", stamp: Callable = lambda ms: ms / 1000, tokens: Callable = str, **how) -> str:
    """All rows as csv."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, **how)
    writer.writerow(HEADER)
    writer.writerows((stamp(ms), tokens(p), tokens(o)) for ms, p, o in ROWS)
    return text.getvalue()


def records(stamp: Callable = lambda ms: ms / 1000, tokens: Callable = int) -> list[dict]:
    return [dict(zip(HEADER, (stamp(ms), tokens(p), tokens(o)), strict=True)) for ms, p, o in ROWS]


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def parquet(stamps: pa.Array, kind: pa.DataType | None = None) -> bytes:
    columns = {"ts": stamps, "usage": pa.array([{"prompt_tokens": p, "completion_tokens": o} for _, p, o in ROWS])}
    if kind is not None:
        columns |= {name: pa.array(x).cast(kind) for name, x in zip(HEADER[1:], (PROMPT, OUTPUT), strict=True)}
        del columns["usage"]
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def zipped(content: str) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("__MACOSX/._t.csv", "x")
        archive.writestr("folder/t.csv", content)
    return held.getvalue()


def otlp(ms: int, p: int, o: int) -> dict:
    pairs = {"gen_ai.usage.input_tokens": p, "gen_ai.usage.output_tokens": o}
    attributes = [{"key": key, "value": {"intValue": str(value)}} for key, value in pairs.items()]
    return {"name": "chat", "startTimeUnixNano": str((EPOCH_S * 1000 + ms) * 10**6), "attributes": attributes}


def response(ms: int, p: int, o: int) -> dict:
    usage = {"prompt_tokens": p, "completion_tokens": o, "prompt_tokens_details": {"cached_tokens": 9}}
    return {"created": EPOCH_S + ms / 1000, "response": {"usage": usage}}


def genai_perf(ms: int, p: int, o: int) -> dict:
    usage = json.dumps({"usage": {"prompt_tokens": p, "completion_tokens": o}})
    return {"timestamp": (EPOCH_S * 1000 + ms) * 10**6, "response_outputs": [{"response": f"data: {usage}\n\n"}]}


def stamps(unit: str, zone: str | None) -> pa.Array:
    return pa.array([at(ms) for ms, _, _ in ROWS], pa.timestamp("us", "UTC")).cast(pa.timestamp(unit, zone))


EPOCH = {unit: lambda ms, k=k: (EPOCH_S * 1000 + ms) * k // 1000 for unit, k in (("ms", 1000), ("us", 10**6))}
MIXED = [timezone(timedelta(hours=hours)) for hours in (0, 1, -7)]
ENCODINGS: dict[str, str | bytes] = {
    "plain.csv": table(),
    "no_ending": table(),
    "semicolon.csv": table(";"),
    "decimal_comma.csv": table(";", lambda ms: f"{ms / 1000:.3f}".replace(".", ",")),
    "dots_for_thousands.csv": table(
        ";", lambda ms: f"{ms / 1000}".replace(".", ","), lambda n: f"{n:,}".replace(",", ".")
    ),
    "tab.tsv": table("\t"),
    "bar.txt": table("|"),
    "sep_line.csv": "sep=;\n" + table(";"),
    "quoted_crlf_bom.csv": "\ufeff" + table(quoting=csv.QUOTE_ALL, lineterminator="\r\n"),
    "utf16.csv": table().encode("utf-16"),
    "utf16_unmarked.csv": table().encode("utf-16-le"),
    "thousands.csv": table(tokens=lambda n: f"{n:,}"),
    "blanks.csv": table().replace(",", ", "),
    "case.csv": table().replace("prompt_tokens", " Prompt Tokens ").replace("completion_tokens", "Completion-Tokens"),
    "floats.csv": table(tokens=lambda n: f"{n}.0"),
    "comments.csv": "# exported by somebody\n\n# in 2026\n" + table(),
    "epoch_ms.csv": table(stamp=EPOCH["ms"]),
    "epoch_us.csv": table(stamp=EPOCH["us"]),
    "iso_z.csv": table(stamp=lambda ms: at(ms).isoformat().replace("+00:00", "Z")),
    "iso_utc.csv": table(stamp=lambda ms: f"{at(ms):%Y-%m-%d %H:%M:%S.%f} UTC"),
    "iso_no_colon.csv": table(stamp=lambda ms: f"{at(ms):%Y-%m-%d %H:%M:%S.%f}+0000"),
    "iso_mixed.csv": table(stamp=lambda ms: at(ms, MIXED[ms % 3]).isoformat()),
    "iso_comma.csv": table(stamp=lambda ms: f"{at(ms):%Y-%m-%d %H:%M:%S},{ms % 1000:03d}"),
    "unsorted.csv": "".join([*table().splitlines(True)[:1], *reversed(table().splitlines(True)[1:])]),
    "packed.csv.gz": gzip.compress(table().encode()),
    "packed_without_ending": gzip.compress(table().encode()),
    "packed.csv.zst": pa.compress(table().encode(), "zstd", asbytes=True),
    "packed.zip": zipped(table()),
    "lines.jsonl": lines(records()),
    "lines.ndjson": lines(records(tokens=float)),
    "lines.txt": lines(records(tokens=str)),
    "mixed_kinds.jsonl": lines(records(tokens=lambda n: str(n) if n % 2 else n)),
    "utf16.jsonl": lines(records()).encode("utf-16"),
    "list.json": json.dumps(records(), indent=1),
    "wrapped.json": json.dumps({"meta": {"n": N}, "data": records()}),
    "arrays.json": json.dumps({"model": "m", **{key: [row[key] for row in records()] for key in HEADER}}),
    "naive_s.parquet": parquet(pa.array(OFFSET_MS / 1000), pa.decimal128(21, 2)),
    "ms_zone.parquet": parquet(stamps("ms", "America/New_York")),
    "ns.parquet": parquet(stamps("ns", None), pa.int16()),
    "epoch_ms.parquet": parquet(pa.array([EPOCH["ms"](ms) for ms, _, _ in ROWS])),
    "text.parquet": parquet(pa.array([at(ms).isoformat() for ms, _, _ in ROWS]), pa.string()),
}


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def trace_of(path: Path, content: str | bytes, layout: Layout | None = None) -> tuple[Trace, Understood]:
    trace = read_workload_file(written(path, content), layout)
    assert isinstance(trace, Trace)
    assert trace.understood is not None
    return trace, trace.understood


def refusal(path: Path, content: str | bytes, layout: Layout | None = None) -> str:
    with pytest.raises(BadInput) as refused:
        read_workload_file(written(path, content), layout)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_same_requests_are_the_same_trace_in_every_encoding(tmp_path):
    for name, content in ENCODINGS.items():
        trace, understood = trace_of(tmp_path / name, content)
        np.testing.assert_array_equal(
            np.sort(trace.prompt_tokens + 1j * trace.output_tokens), np.sort(PROMPT + 1j * OUTPUT)
        )
        assert summarize(trace).arrival_rate_per_s == pytest.approx(RATE_PER_S, rel=1e-9), name
        assert understood.warnings == (), name
        np.testing.assert_allclose(trace.arrival_s, (OFFSET_MS - OFFSET_MS[0]) / 1000, atol=1e-6, err_msg=name)
    assert len(ENCODINGS) > 40


# -------------------------------------------------------------------------------------------------- layouts by name

AIPERF = [
    {
        "metadata": {"request_start_ns": (EPOCH_S * 1000 + ms) * 10**6, "benchmark_phase": "profiling"},
        "metrics": {"input_sequence_length": {"value": p}, "output_sequence_length": {"value": o, "unit": "tokens"}},
    }
    for ms, p, o in ROWS
]
GUIDELLM = [{"request_start_time": EPOCH_S + ms / 1000, "prompt_tokens": p, "output_tokens": o} for ms, p, o in ROWS]
LAYOUTS: dict[str, tuple[str, str | bytes]] = {
    "azure.csv": ("Azure LLM", table(stamp=lambda ms: f"{at(ms):%Y-%m-%d %H:%M:%S.%f}0").replace(
        ",".join(HEADER), "TIMESTAMP,ContextTokens,GeneratedTokens")),
    "azure_2024.csv": ("Azure LLM", table(stamp=lambda ms: at(ms).isoformat(" ")).replace(
        ",".join(HEADER), "TIMESTAMP,ContextTokens,GeneratedTokens")),
    "burstgpt.csv": ("BurstGPT", "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n" + "".join(
        f"{ms / 1000},GPT-4,{p},{o},{p + o},API log\n" for ms, p, o in ROWS)),
    "burstgpt_8.csv": ("BurstGPT", "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens"
        ",Log Type\n" + "".join(f"{ms / 1000},a,1.5,GPT-4,{p},{o},{p + o},API log\n" for ms, p, o in ROWS)),
    "mooncake.jsonl": ("Mooncake", lines(
        [{"timestamp": ms, "input_length": p, "output_length": o, "hash_ids": [*range(-(-p // 512))]}
         for ms, p, o in ROWS])),
    "bailian.jsonl": ("Qwen-Bailian", lines(
        [{"chat_id": 1, "timestamp": ms / 1000, "input_length": p, "output_length": o} for ms, p, o in ROWS])),
    "vllm.json": ("vLLM bench", json.dumps({"request_rate": "inf", "mean_tpot_ms": float("nan"), "ttfts": [],
        "input_lens": PROMPT.tolist(), "output_lens": OUTPUT.tolist(), "start_times": (OFFSET_MS / 1000).tolist()})),
    "guidellm.json": ("GuideLLM", json.dumps({"benchmarks": [{"requests": {"successful": GUIDELLM, "errored": []}}]})),
    "aiperf.jsonl": ("aiperf", lines(AIPERF)),
    "genai.json": ("genai-perf", json.dumps({"experiments": [{"requests": [genai_perf(*row) for row in ROWS]}]})),
    "gateway.jsonl": ("OpenAI responses", lines([response(*row) for row in ROWS])),
    "spans.jsonl": ("OpenTelemetry spans", lines([{"start_time": at(ms).isoformat(), "attributes": {
        "gen_ai.usage.input_tokens": p, "gen_ai.usage.output_tokens": o}} for ms, p, o in ROWS])),
    "otlp.jsonl": ("OpenTelemetry spans (OTLP)", lines([
        {"resourceSpans": [{"scopeSpans": [{"spans": [otlp(*row) for row in ROWS[i : i + 50]]}]}]}
        for i in range(0, N, 50)])),
    "langfuse.json": ("Langfuse", json.dumps([
        {"startTime": at(ms).isoformat(), "usageDetails": {"input": p, "output": o}} for ms, p, o in ROWS])),
}  # fmt: skip


def test_known_layouts_need_no_options(tmp_path):
    for name, (layout, content) in LAYOUTS.items():
        trace, understood = trace_of(tmp_path / name, content)
        assert understood.layout.startswith(layout), name
        assert (trace.prompt_tokens.sum(), trace.output_tokens.sum()) == (PROMPT.sum(), OUTPUT.sum()), name
        assert summarize(trace).arrival_rate_per_s == pytest.approx(RATE_PER_S, rel=1e-9), name
        assert understood.warnings == (), name


def test_sums_of_requests_are_counted_by_their_column(tmp_path):
    """Hourly sums of 3, 0 and 7 requests are 10 requests of their rows' means in three hours, however they are kept."""
    rows = [(3, 900, 30), (0, 0, 0), (7, 700, 140)]
    usage = "start_time,num_model_requests,input_tokens,output_tokens\n" + "".join(
        f"{EPOCH_S + 3600 * i},{n},{p},{o}\n" for i, (n, p, o) in enumerate(rows)
    )
    results = [{"num_model_requests": n, "input_tokens": p, "output_tokens": o} for n, p, o in rows]
    hours = [{"start_time": EPOCH_S + 3600 * i, "results": [result]} for i, result in enumerate(results)]
    page = {"object": "page", "data": hours}
    other = usage.replace("num_model_requests", "calls").replace("input_tokens", "p").replace("output_tokens", "o")
    named = Layout("p", "o", "start_time", None, "calls")
    for content, layout in ((usage, None), (json.dumps(page), None), (other, named)):
        trace, understood = trace_of(tmp_path / "usage", content, layout)
        summary = summarize(trace)
        assert (summary.n_requests, understood.n_dropped) == (10, 1)
        assert (summary.mean_prompt_tokens, summary.mean_output_tokens) == (pytest.approx(160), pytest.approx(17))
        assert any("the spread of lengths within a row is lost" in warning for warning in understood.warnings)
        assert summary.arrival_rate_per_s == pytest.approx(10 / (2 * 7200))  # two stamps, two hours apart
        assert summary.arrival_scv is None
    workload = load(str(written(tmp_path / "usage.csv", usage))).workload
    np.testing.assert_allclose(workload.weight @ workload.prompt_tokens, 160)


def test_requests_without_output_are_kept_or_dropped_and_counted(tmp_path):
    content = "timestamp_s,prompt_tokens,output_tokens\n0,10,5\n1,20,0\n2,30,\n3,,\n4,40,7\n"
    kept, said = trace_of(tmp_path / "t.csv", content)
    assert (kept.output_tokens.tolist(), said.n_zero_output, said.n_dropped) == ([5, 0, 0, 7], 2, 1)
    assert any("2 requests have no output tokens, 1 of them with none recorded" in each for each in said.warnings)
    dropped, said = trace_of(tmp_path / "t.csv", content, Layout(zero_output="drop"))
    assert (dropped.prompt_tokens.tolist(), said.n_zero_output, said.n_dropped) == ([10, 40], 2, 3)
    assert kept.arrival_s is not None and dropped.arrival_s is not None
    assert (kept.arrival_s.tolist(), dropped.arrival_s.tolist()) == ([0, 1, 2, 4], [0, 4])
    assert "no request has output tokens" in refusal(tmp_path / "e.csv", "prompt_tokens,output_tokens\n5,0\n")


def test_what_decodes_nothing_holds_nothing_while_it_decodes():
    nothing = demand(jnp.array(500.0), jnp.array(500.0), jnp.array(1e-13), jnp.array(1e-13))
    assert held_tokens(nothing) == (0.0, 0.0)


# ----------------------------------------------------------------------------------------------------- time is checked


def timed(values: list, name: str = "when") -> str:
    return f"{name},in,out\n" + "".join(f"{value},{10 + i},5\n" for i, value in enumerate(values))


NAMED = Layout("in", "out", "when")
EVEN = np.arange(100)


@pytest.mark.parametrize(
    ("values", "unit", "rate_per_s"),
    [
        (EVEN / 8, "s", 8.08),
        (EVEN * 2, "s", 0.505),
        (EPOCH_S + EVEN, "s", 1.01),
        (EPOCH_S * 10**3 + EVEN * 100, "ms", 10.1),
        (EPOCH_S * 10**6 + EVEN * 1000, "us", 1010),
        (EPOCH_S * 10**9 + EVEN * 10**9, "ns", 1.01),
    ],
)
def test_the_unit_is_what_digits_and_the_rate_tell(tmp_path, values, unit, rate_per_s):
    trace, understood = trace_of(tmp_path / "t.csv", timed(values.tolist()), NAMED)
    assert understood.time_unit == unit
    assert summarize(trace).arrival_rate_per_s == pytest.approx(rate_per_s, rel=1e-2)
    asked, understood = trace_of(tmp_path / "t.csv", timed(values.tolist()), Layout("in", "out", "when", 1e-9))
    assert understood.time_unit == "ns"
    assert asked.arrival_s is not None
    assert asked.arrival_s[-1] == pytest.approx((values[-1] - values[0]) / 1e9, rel=1e-6)


@pytest.mark.parametrize(
    ("values", "name", "says"),
    [
        (EVEN * 500, "when", "may be s (0.00202 requests/s) or ms (2.02 requests/s)"),
        (EVEN * 500.5, "when", "may be s (0.00202 requests/s) or ms (2.02 requests/s)"),
        (EPOCH_S + EVEN, "when_ms", "may be ms by its layout or name, s by its digits"),
        (45423 + EVEN / 10**6, "when", "a spreadsheet's days"),
        (["05/10/2024 12:00:00 AM"], "when", "row 1: when = '05/10/2024 12:00:00 AM'; a date with slashes"),
        (["2024-05-10 00:00:00", "10.05.2024 00:00"], "when", "row 2: when = '10.05.2024 00:00'"),
        (["noon"], "when", "row 1: when = 'noon'; need seconds or ISO 8601"),
        ([1, ""], "when", "row 2: when is missing"),
    ],
)
def test_stamps_that_may_be_two_things_are_refused(tmp_path, values, name, says):
    assert says in refusal(tmp_path / "t.csv", timed(list(values), name), Layout("in", "out", name))


@pytest.mark.parametrize(
    ("values", "layout", "says"),
    [
        (EVEN * 10**5, Layout("in", "out", "when", 1.0), "0.0364 requests an hour is an odd rate"),
        (EVEN, Layout("in", "out", "when", 1e-9), "1.01e+09 requests/s is an odd rate"),
        (EVEN * 270_000, Layout("in", "out", "when", 1.0), "span 309 days"),
        (
            EPOCH_S * 10**9 + EVEN * 10**9,
            Layout("in", "out", "when", 1e-6),
            "are read in us, and look like ns since 1970",
        ),
        (EVEN * 0 + 5, NAMED, "all time stamps are the same"),
        (["2024-05-10", "2024-05-11"] * 50, NAMED, "50 requests a day over 2 whole days"),
    ],
)
def test_odd_times_are_said(tmp_path, values, layout, says):
    _, understood = trace_of(tmp_path / "t.csv", timed(list(values)), layout)
    assert any(says in warning for warning in understood.warnings), understood.warnings


# ------------------------------------------------------------------------------------------------ columns are checked


@pytest.mark.parametrize(
    ("content", "layout", "says"),
    [
        ("a,b\n10,5\n10,5\n", Layout("a", "b"), "all 2 rows are the same"),
        ("a,b\n10,10\n9,9\n", Layout("a", "b"), "equal in every row"),
        (
            "in,out\n10,5\n9,4\n",
            Layout("out", "in"),
            "prompts are read from 'out' and outputs from 'in', as if swapped",
        ),
        ("a,b\n10,500\n9,40\n", Layout("a", "b"), "times as long as prompts"),
        ("total tokens,b\n10,5\n9,4\n", Layout("total tokens", "b"), "prompt and output together"),
        ("prompt_tokens,output_tokens\n1048576,5\n9,4\n", None, "1 request of 2 has 1,048,581 tokens"),
        ("timestamp,a,b\n1,10,5\n2,9,4\n", Layout("a", "b"), "'timestamp' looks like time stamps and is not read"),
        ("count,prompt_tokens,output_tokens\n1,10,5\n2,9,4\n", None, "if column 'count' counts requests"),
    ],
)
def test_odd_columns_are_said(tmp_path, content, layout, says):
    _, understood = trace_of(tmp_path / "t.csv", content, layout)
    assert any(says in warning for warning in understood.warnings), understood.warnings


@pytest.mark.parametrize(
    ("content", "layout", "says"),
    [
        ("a,b\n10,5\n", Layout("a", "a"), "column 'a' is named for the prompt and for the output"),
        ("a,b\n10,5\n", Layout("a"), "only one of the prompt and output columns is named"),
        ("a,b\n10,5\n", Layout("prompt", "b"), "column 'prompt' is missing; columns are a, b"),
        ("a b\n10 5\n", None, "the header is one cell: a b; its words are parted by blanks"),
        ("x;y\n10;5\n", None, "read with semicolon between the cells: columns are x, y"),
        ("a,b,a\n1,2,3\n", Layout("a", "b"), "is there more than once"),
        (json.dumps([{"id": "a", "conversations": [{"from": "human", "value": "hi"}]}]), None, "tokenize first"),
        (lines([{"messages": [{"role": "user"}]}]), None, "tokenize first"),
        (json.dumps({"total_input_tokens": 5}), None, "run it with --save-detailed"),
        (json.dumps({"input_sequence_length": {"avg": 5}}), None, "profile_export.json"),
        (json.dumps([[100, 0.5], ["+Inf", 1]]), None, "a histogram's open bucket"),
        (b"PAR1" + b"x" * 20, None, "cannot be read as parquet"),
        (b"ARROW1\0\0", None, "is an Arrow or Feather file"),
        (b"\x28\xb5\x2f\xfd" + bytes(20), None, "cannot be read"),
        (zipped(table()) + b"", Layout("p", "o"), "column 'p' is missing"),
    ],
)
def test_what_cannot_be_known_is_refused_with_what_to_do(tmp_path, content, layout, says):
    assert says in refusal(tmp_path / "file", content, layout)


def test_several_files_in_a_zip_are_named(tmp_path):
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("a.csv", "x")
        archive.writestr("b.csv", "y")
    assert "holds 2 files: a.csv, b.csv; need one" in refusal(tmp_path / "two.zip", held.getvalue())


def test_a_genai_perf_export_reaches_a_plan_without_an_option(tmp_path):
    """Its own rate and lengths; of a closed loop with what that rate is, and of several runs why there is none."""
    run = {"experiment": {"mode": "concurrency", "value": 8}, "requests": [genai_perf(*row) for row in ROWS]}
    one, two = tmp_path / "profile_export.json", tmp_path / "sweep.json"
    one.write_text(json.dumps({"experiments": [run]}))
    two.write_text(json.dumps({"experiments": [run, run]}))
    loaded = load(str(one))
    trace, _ = trace_of(tmp_path / "plain.csv", table())
    assert float(loaded.workload.arrival_rate_per_s) == pytest.approx(summarize(trace).arrival_rate_per_s)
    assert loaded.summary.mean_prompt_tokens == pytest.approx(trace.prompt_tokens.mean())
    assert loaded.understood is not None
    assert any("kept 8 requests in flight" in warning for warning in loaded.understood.warnings)
    with pytest.raises(BadField, match=r"sweep\.json has several runs in it, whose time stamps tell no common rate"):
        load(str(two))
    assert float(load(str(two), rate_per_s=3.0).workload.arrival_rate_per_s) == 3.0


def test_runs_one_after_the_other_tell_no_rate(tmp_path):
    runs = json.dumps({"benchmarks": [{"requests": {"successful": GUIDELLM}}] * 2})
    trace, understood = trace_of(tmp_path / "sweep.json", runs)
    assert (len(trace.prompt_tokens), trace.arrival_s) == (2 * N, None)
    assert any("several runs" in warning for warning in understood.warnings)


def test_tokens_that_are_estimated_from_texts_are_said_to_be(tmp_path):
    asked = {"payload": json.dumps({"messages": [{"role": "user", "content": "x" * 400}]})}
    piece = {"response": 'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'}
    request = {"timestamp": EPOCH_S * 10**9, "request_inputs": asked, "response_outputs": [piece] * 20}
    document = {"experiments": [{"requests": [request, request | {"timestamp": (EPOCH_S + 1) * 10**9}]}]}
    trace, understood = trace_of(tmp_path / "profile_export.json", json.dumps(document))
    assert (trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == ([100, 100], [20, 20])
    assert any("2 of 2 requests carry no usage" in warning for warning in understood.warnings)


# -------------------------------------------------------------------------------------------------------- histograms

EDGES = [1, 10, 100, 1000, 10_000, 20_000]


def buckets(kind: str, values: np.ndarray, stamp: str = "", **labels: str) -> str:
    said = "".join(f',{key}="{value}"' for key, value in labels.items())
    name = f"vllm:request_{kind}_tokens"
    counts = [(edge, (values <= edge).sum()) for edge in EDGES]
    text = "".join(f'{name}_bucket{{le="{e}.0"{said}}} {n}{stamp}\n' for e, n in [*counts, ("+Inf", len(values))])
    text = text.replace('+Inf.0"', '+Inf"')
    return f'# TYPE {name} histogram\n{text}{name}_sum{{a="b"{said}}} {values.sum()}{stamp}\n'


def metrics(n: int = N, stamp: str = "") -> str:
    both = (("prompt", PROMPT[:n]), ("generation", OUTPUT[:n]))
    return "".join(buckets(kind, values[i::2], stamp, pod=str(i)) for kind, values in both for i in range(2))


def test_two_histograms_are_joined_with_their_own_means(tmp_path):
    path = written(tmp_path / "metrics", metrics())
    loaded = load(str(path), rate_per_s=2.0)
    summary = loaded.summary
    assert summary.n_requests == N
    assert summary.mean_prompt_tokens == pytest.approx(PROMPT.mean(), rel=1e-6)
    assert summary.mean_output_tokens == pytest.approx(OUTPUT.mean(), rel=1e-6)
    assert loaded.understood is not None
    assert "taken as independent" in loaded.understood.warnings[0]
    two = written(tmp_path / "two", metrics(100, " 1760000000000") + metrics(N, " 1760000100000"))
    assert load(str(two)).summary.arrival_rate_per_s == pytest.approx((N - 100) / 100)
    one = metrics().replace("request_generation", "request_other")
    assert "need the buckets of prompts and of outputs" in refusal(tmp_path / "one", one)
    with pytest.raises(BadInput, match=r"no span of time .counters since the server started"):
        load(str(path))


def test_the_joint_lies_between_its_bounds():
    """Any joint of the marginals has a total's standard deviation between those of the two orders."""
    rng = np.random.default_rng(0)
    edges = np.array([0.0, 1, 10, 100, 1000, 10_000])
    for _ in range(20):
        mean = rng.uniform(200, 3000, 2)
        marginals = [Histogram(edges, rng.integers(1, 50, 5).astype(float), None) for _ in mean]
        joined = join(Histograms(*marginals, None, Understood("metrics")))
        low, high = joined.total_sd_range
        assert low < joined.total_sd_tokens < high
        total = joined.prompt_tokens + joined.output_tokens
        sd = np.sqrt(joined.weight @ (total - joined.weight @ total) ** 2)
        assert sd == pytest.approx(joined.total_sd_tokens, rel=1e-3)  # of the atoms, which are compressed
        same = Histogram(edges, marginals[0].counts, None)
        low, high = join(Histograms(same, same, None, Understood("metrics"))).total_sd_range
        assert high == pytest.approx(np.sqrt(2) * join(Histograms(same, same, None, Understood("m"))).total_sd_tokens)


@pytest.mark.parametrize("kind", ["vector", "matrix"])
def test_the_answer_to_a_query_is_read_alike(tmp_path, kind):
    result = [
        {"metric": {"__name__": f"vllm:request_{name}_tokens_bucket", "le": edge, "pod": "a"},
         ("value" if kind == "vector" else "values"): [EPOCH_S + 60, count] if kind == "vector"
         else [[EPOCH_S, "0"], [EPOCH_S + 60, count]]}
        for name in ("prompt", "generation") for edge, count in (("100", "20"), ("1000", "50"), ("+Inf", "60"))
    ]  # fmt: skip
    document = json.dumps({"status": "success", "data": {"resultType": kind, "result": result}})
    found = read_workload_file(written(tmp_path / "answer.json", document))
    assert isinstance(found, Histograms)
    assert found.prompt.counts.tolist() == [20, 30, 10]
    assert found.prompt.edges_tokens.tolist() == [0, 100, 1000, 2000]
    assert found.rate_per_s == (None if kind == "vector" else 1.0)
    unnamed = document.replace('"__name__": "vllm:request_prompt_tokens_bucket", ', "")
    assert "one without a name" in refusal(tmp_path / "unnamed.json", unnamed)


def test_a_plan_keeps_how_its_trace_was_read():
    """So that it is read alike when the plan is evaluated again; plans from before knew fewer ways."""
    for layout in (Layout("p", "o", "t", 1e-3, "n", "drop"), Layout(zero_output="drop"), Layout(None, None, "t")):
        assert Layout(**ColumnsPart.model_validate(asdict(layout)).model_dump()) == layout
    before = ColumnsPart.model_validate({"prompt": "p", "output": "o", "time": "t", "time_unit_s": 1.0})
    assert Layout(**before.model_dump()) == Layout("p", "o", "t", 1.0)
