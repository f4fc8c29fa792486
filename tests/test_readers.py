"""A workload file is read as it was written, or refused with the file, the row and the value that is wrong."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.workload.atoms import OUTPUT_SHARE
from fleetopt_jax.workload.readers import MAX_TOKENS, CdfFile, Layout, Trace, read_workload_file
from fleetopt_jax.workload.summary import summarize

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n"
    "2023-11-16 18:15:50.9951690,396,109\r\n"
    "2023-11-16 18:15:51.2225670,879,55\r\n"
)
AZURE_GAPS_S = [0.0, 4.3145790, 4.5419770]
OWN = "timestamp_s,prompt_tokens,output_tokens\n"
MOONCAKE = '{"input_length": 5, "output_length": 2}\n'
PAIRS = [(374, 44), (396, 109), (879, 55)]


def write(path: Path, content: str | bytes) -> Path:
    """The file, packed if its name ends in .gz."""
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def pairs_of(trace: Trace) -> list[tuple[int, int]]:
    return list(zip(trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), strict=True))


def stamped(stamps: list) -> str:
    """A csv of our own layout, one request per stamp."""
    return OWN + "".join(f"{stamp},10,5\n" for stamp in stamps)


def refusal(path: Path, layout: Layout | None = None) -> str:
    """What is said of a bad file: always one line that starts with its name."""
    with pytest.raises(BadInput) as refused:
        read_workload_file(path, layout)
    said = str(refused.value)
    assert said.startswith(str(path))
    assert "\n" not in said
    return said.removeprefix(str(path))


@pytest.mark.parametrize("name", ["azure.csv", "azure.csv.gz", "AZURE.CSV"])
@pytest.mark.parametrize("line_end", ["\r\n", "\n"])
def test_an_azure_csv_is_read_with_its_seven_digit_fractions(tmp_path, name, line_end):
    trace = read_workload_file(write(tmp_path / name, AZURE.replace("\r\n", line_end)))
    assert pairs_of(trace) == PAIRS
    np.testing.assert_allclose(trace.arrival_s, AZURE_GAPS_S, atol=1e-9)


@pytest.mark.parametrize("name", ["mooncake.jsonl", "mooncake.jsonl.gz"])
def test_a_mooncake_jsonl_is_read_with_stamps_in_milliseconds(tmp_path, name):
    rows = [
        {"timestamp": 27_000 + 1500 * i, "input_length": p, "output_length": o, "hash_ids": [i]}
        for i, (p, o) in enumerate(PAIRS)
    ]
    trace = read_workload_file(write(tmp_path / name, jsonl(rows)))
    assert pairs_of(trace) == PAIRS
    np.testing.assert_allclose(trace.arrival_s, [0.0, 1.5, 3.0], rtol=1e-12)


def test_columns_are_found_by_name_wherever_they_stand(tmp_path):
    """Byte-order mark, quoted names, more columns and blank lines are what spreadsheets leave behind."""
    text = (
        '\ufeff"output_tokens","model","timestamp_s","prompt_tokens"\n44,"a,b",1.5,374\n\n109,,2.5,396\n55,x,2.0,879\n'
    )
    trace = read_workload_file(write(tmp_path / "own.csv", text))
    assert pairs_of(trace) == [PAIRS[0], PAIRS[2], PAIRS[1]]  # in order of arrival
    np.testing.assert_allclose(trace.arrival_s, [0.0, 0.5, 1.0])


@pytest.mark.parametrize(("unit_s", "seconds"), [(1.0, 4.0), (1e-3, 4e-3), (1e-6, 4e-6)])
@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_any_columns_can_be_named(tmp_path, ending, unit_s, seconds):
    columns = {"when": [8, 10, 12], "in": [p for p, _ in PAIRS], "out": [o for _, o in PAIRS]}
    path = tmp_path / f"named{ending}"
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if ending == ".parquet":
        pyarrow.parquet.write_table(pa.table(columns), path)
    elif ending == ".csv":
        write(path, "".join(",".join(map(str, line)) + "\n" for line in [columns, *(row.values() for row in rows)]))
    else:
        write(path, jsonl(rows))
    trace = read_workload_file(path, Layout("in", "out", "when", unit_s))
    assert pairs_of(trace) == PAIRS
    assert trace.arrival_s[-1] == pytest.approx(seconds, rel=1e-12)
    assert read_workload_file(path, Layout("in", "out", None)).arrival_s is None
    assert "column 'tokens' is missing" in refusal(path, Layout("in", "tokens", "when"))


@given(
    pairs=st.lists(st.tuples(*[st.integers(1, int(MAX_TOKENS))] * 2), min_size=1, max_size=30),
    packed=st.booleans(),
)
@settings(max_examples=40, deadline=None, database=None)
def test_what_is_written_is_read_back_in_every_format(tmp_path_factory, pairs, packed):
    folder, gz = tmp_path_factory.mktemp("round_trip"), ".gz" if packed else ""
    table = pa.table({"prompt_tokens": [p for p, _ in pairs], "output_tokens": [o for _, o in pairs]})
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    written = {
        ".csv": "prompt_tokens,output_tokens\n" + "".join(f"{p},{o}\n" for p, o in pairs),
        ".jsonl": jsonl(table.to_pylist()),
        ".parquet": sink.getvalue().to_pybytes(),
    }
    for ending, content in written.items():
        trace = read_workload_file(write(folder / f"trace{ending}{gz}", content))
        assert pairs_of(trace) == pairs
        assert trace.arrival_s is None


@pytest.mark.parametrize(
    ("stamps", "seconds"),
    [
        ([7, 7.25, 9], [0, 0.25, 2]),
        ([9, -1, 4], [0, 5, 10]),
        (["1700000000.5", "1700000001.25"], [0, 0.75]),
        (["2024-02-28 23:59:59", "2024-02-29 00:00:01.5"], [0, 2.5]),
        (["2024-01-01T00:00:09.5Z", "2024-01-01T00:00:00Z"], [0, 9.5]),
        (["2024-01-01T01:00:00+02:00", "2023-12-31T23:00:30+00:00"], [0, 30]),
        (["2024-01-01", "2024-01-02"], [0, 86_400]),
        ([5, 5, 5], [0, 0, 0]),
    ],
)
def test_stamps_become_rising_seconds_from_the_first_arrival(tmp_path, stamps, seconds):
    """Numbers, ISO 8601 with and without time zone, in any order of rows."""
    for name, content in {
        "stamps.csv": stamped(stamps),
        "stamps.jsonl": jsonl([{"timestamp_s": s, "prompt_tokens": 10, "output_tokens": 5} for s in stamps]),
    }.items():
        trace = read_workload_file(write(tmp_path / name, content))
        np.testing.assert_allclose(trace.arrival_s, seconds, atol=1e-6)


def test_parquet_time_stamps_keep_their_own_unit(tmp_path):
    for unit, per_second in {"s": 1, "ms": 1000, "us": 10**6, "ns": 10**9}.items():
        for zone in (None, "UTC", "+02:00"):
            stamps = pa.array([1_700_000_000 * per_second, 1_700_000_003 * per_second]).cast(pa.timestamp(unit, zone))
            path = tmp_path / f"{unit}.parquet"
            columns = {"timestamp_s": stamps, "prompt_tokens": [1, 2], "output_tokens": [3, 4]}
            pyarrow.parquet.write_table(pa.table(columns), path)
            np.testing.assert_allclose(read_workload_file(path).arrival_s, [0.0, 3.0], atol=1e-9)


def test_parquet_time_stamps_may_be_finer_than_microseconds(tmp_path):
    """An Azure trace has seven digits of a second: so has its Parquet copy."""
    stamps = pa.array([1_700_000_000_680_590_100, 1_700_000_004_995_169_000]).cast(pa.timestamp("ns"))
    columns = {"timestamp_s": stamps, "prompt_tokens": [1, 2], "output_tokens": [3, 4]}
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "fine.parquet")
    np.testing.assert_allclose(read_workload_file(tmp_path / "fine.parquet").arrival_s, [0.0, 4.3145789], atol=1e-9)


def test_rate_is_requests_over_duration_and_scv_that_of_the_gaps(tmp_path):
    """scv: 0 of a metronome, 1 of a Poisson stream, and the textbook value of a known set of gaps."""
    even = summarize(read_workload_file(write(tmp_path / "even.csv", stamped([2 * i for i in range(11)]))))
    assert even.arrival_rate_per_s == pytest.approx(11 / 20)
    assert even.arrival_scv == pytest.approx(0.0, abs=1e-12)
    gaps = np.array([1.0, 3.0, 1.0, 3.0])
    pairwise = summarize(read_workload_file(write(tmp_path / "pairs.csv", stamped([0, *np.cumsum(gaps)]))))
    assert pairwise.arrival_rate_per_s == pytest.approx(5 / 8)
    assert pairwise.arrival_scv == pytest.approx(np.var(gaps) / np.mean(gaps) ** 2)
    stamps = np.cumsum(np.random.default_rng(0).exponential(0.2, 4000))
    poisson = summarize(read_workload_file(write(tmp_path / "poisson.csv", stamped(list(stamps)))))
    assert poisson.arrival_rate_per_s == pytest.approx(5.0, rel=0.05)
    assert poisson.arrival_scv == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("content", ["prompt_tokens,output_tokens\n10,5\n20,5\n", stamped([3, 3]), stamped([3])])
def test_without_a_span_of_time_there_is_no_rate(tmp_path, content):
    summary = summarize(read_workload_file(write(tmp_path / "still.csv", content)))
    assert summary.arrival_rate_per_s is None
    assert summary.arrival_scv is None


KNOTS = [(100, 0.25), (200, 0.25), (400, 1.0)]


@pytest.mark.parametrize("name", ["lengths.json", "lengths.json.gz"])
@pytest.mark.parametrize(
    ("document", "share"),
    [
        (KNOTS, OUTPUT_SHARE),
        ({"cdf": KNOTS}, OUTPUT_SHARE),
        ({"cdf": KNOTS, "output_share": 0.35, "note": "more may be said"}, 0.35),
    ],
)
def test_a_cdf_is_read_as_a_list_or_with_its_output_share(tmp_path, name, document, share):
    assert read_workload_file(write(tmp_path / name, json.dumps(document))) == CdfFile(KNOTS, share)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[]", "empty"),
        ('{"cdf": []}', "empty"),
        ("{}", "no CDF"),
        ("5", "no CDF"),
        ('{"cdf": 5}', "cdf = 5"),
        ("[1, 2]", "cdf.0 = 1"),
        ('[["many", 1]]', "cdf.0.0 = many"),
        ("[[100]]", "cdf.0.1"),
        ("[[200, 0.5], [100, 1]]", "knot 2: tokens fall from 200 to 100"),
        ("[[100, 0.5], [100, 1]]", "knot 2: tokens"),
        ("[[100, 0.9], [200, 0.5], [300, 1]]", "knot 2: fraction falls from 0.9 to 0.5"),
        ("[[100, 0.5], [200, 1.5]]", "fraction = 1.5 is above 1"),
        ("[[100, 50], [200, 100]]", "percent"),
        ("[[100, 0.5], [200, 0.99]]", "ends at fraction 0.99"),
        ("[[100, -0.5], [200, 1]]", "knot 1: fraction = -0.5"),
        ("[[0, 1]]", "knot 1: tokens = 0"),
        ("[[-5, 0.5], [200, 1]]", "knot 1: tokens = -5"),
        ("[[1.5, 1]]", "knot 1: tokens = 1.5"),
        ("[[NaN, 1]]", ", line 1: 0.0 = NaN; need a finite number"),
        ("[[100, NaN]]", ", line 1: 0.1 = NaN; need a finite number"),
        ("[[1e300, 1]]", "knot 1: tokens = 1e+300"),
        ('{"cdf": [[100, 1]], "output_share": 0}', "output_share = 0"),
        ('{"cdf": [[100, 1]], "output_share": 1.2}', "output_share = 1.2"),
        ('{"cdf": [[100, 1]], "output_share": NaN}', ", line 1: output_share = NaN; need a finite number"),
        ('{"cdf": [[100, 1]], "output_share": "most"}', "output_share = most"),
        ('{"cdf": [[100, 1]', "not JSON"),
        ("tokens,fraction\n100,1\n", "columns are tokens, fraction"),
        ("[" * 100_000, "is nested more than 100 deep"),
        (b'[[100, 1]]\xff\xfe"', "not JSON"),
        ("", "the file is empty"),
    ],
)
def test_json_that_is_no_cdf_is_refused_with_the_knot_and_the_value(tmp_path, content, says):
    assert says in refusal(write(tmp_path / "lengths.json", content))


@pytest.mark.parametrize("value", ["-3", "1.5", "nan", "inf", "1e10", "many", "0x10", "0", ""])
@pytest.mark.parametrize("column", ["prompt_tokens", "output_tokens"])
def test_a_bad_token_count_is_refused_with_its_row_column_and_value(tmp_path, column, value):
    good, bad = {"prompt_tokens": "10", "output_tokens": "5"}, {"prompt_tokens": "10", "output_tokens": "5"}
    bad[column] = value
    lines = [",".join(good), *(",".join(row.values()) for row in (good, good, bad, good))]
    path = write(tmp_path / "bad.csv", "\n".join(lines))
    if column == "output_tokens" and value in ("0", ""):  # an aborted request, which cost its prefill
        assert read_workload_file(path).output_tokens.tolist() == [5, 5, 0, 5]
        return
    said = refusal(path)
    assert said.startswith(f", row 3: {column} {'= ' + value if value == '0' else '= ' if value else 'is missing'}")
    assert value in said


@pytest.mark.parametrize("value", ["1_000", "٧"])
def test_the_row_named_is_the_bad_one(tmp_path, value):
    path = write(tmp_path / "bad.csv", f"prompt_tokens,output_tokens\n10,5\n10,5\n{value},5\n")
    assert refusal(path).startswith(f", row 3: prompt_tokens = '{value}'")


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    path = write(tmp_path / "twice.csv", "prompt_tokens,prompt_tokens,output_tokens\n10,5,5\n")
    assert "prompt_tokens" in refusal(path)


@pytest.mark.parametrize(("name", "content"), [("a.json", '[["a\\nb", 1]]'), ("a.csv", '"a\nb",c\n1,2\n')])
def test_a_line_break_in_a_value_stays_out_of_the_message(tmp_path, name, content):
    refusal(write(tmp_path / name, content))


@pytest.mark.parametrize("value", [0, -3, 1.5, float("nan"), float("inf"), None, "many", [7]])
@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_typed_columns_are_checked_alike(tmp_path, ending, value):
    rows = [{"prompt_tokens": value, "output_tokens": 5}] * 2
    path = tmp_path / f"bad{ending}"
    if ending == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        write(path, jsonl(rows))
    said = refusal(path)
    assert said.startswith(", row 1: prompt_tokens ")
    assert ("missing" if value is None else str(value)) in said


def test_a_missing_token_count_is_refused_with_its_row(tmp_path):
    rows = [{"prompt_tokens": 10, "output_tokens": 5}, {"output_tokens": 10}]
    assert ", row 2: prompt_tokens is missing" in refusal(write(tmp_path / "gap.jsonl", jsonl(rows)))


@pytest.mark.parametrize(
    ("stamps", "says"),
    [
        (["0", "nan"], ", row 2: timestamp_s = nan"),
        (["0", "1", "-inf"], ", row 3: timestamp_s = -inf"),
        (["0", ""], ", row 2: timestamp_s is missing"),
        (["0", "noon"], ", row 2: timestamp_s = 'noon'"),
        (["yesterday", "noon"], ", row 1: timestamp_s = 'yesterday'"),
        (["2024-02-30", "2024-03-01"], ", row 1: timestamp_s = '2024-02-30'"),
    ],
)
def test_a_bad_time_stamp_is_refused_with_its_value(tmp_path, stamps, says):
    assert refusal(write(tmp_path / "stamps.csv", stamped(stamps))).startswith(says)


def packed_parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.table({"prompt_tokens": [1], "output_tokens": [1]}), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.csv", None, "no such file"),
        ("empty.csv", "", "the file is empty"),
        ("blank.csv", "\n \n\n", "the file is empty"),
        ("empty.csv.gz", "", "the file is empty"),
        ("header.csv", OWN, "no rows"),
        ("few.csv", "timestamp_s,prompt_tokens\n0,5\n", "columns are timestamp_s, prompt_tokens"),
        ("few.jsonl", '{"prompt_tokens": 5}\n', "columns are prompt_tokens"),
        ("ragged.csv", OWN + "0,5,1\n\n0,5\n", ", row 2: 2 cells; need 3 as in the header"),
        ("binary.csv", bytes(range(256)) * 4, "cannot be read as csv"),
        ("zeros.csv", bytes(64), "cannot be read as csv"),
        ("latin.csv", "prompt_tokens,output_tokens,é\n1,2,3\n".encode("latin-1"), "cannot be read as csv"),
        ("latin_row.csv", "prompt_tokens,output_tokens\n1,é\n".encode("latin-1"), "cannot be read as csv"),
        ("binary.jsonl", bytes(range(256)), ", row 1: cannot be read as jsonl"),
        ("list.jsonl", '[{"prompt_tokens": 5}]', "columns are prompt_tokens"),
        ("lists.jsonl", '{"prompt_tokens": 5, "output_tokens": 5}\n[5]\n', ", row 2: [5] is not a JSON object"),
        ("cut.jsonl", '{"prompt_tokens": 5, "outp', ", row 1: cannot be read as jsonl: Unterminated string"),
        (
            "mixed.jsonl",
            jsonl([{"prompt_tokens": p, "output_tokens": 5} for p in (5, "a")]),
            ", row 2: prompt_tokens = 'a'; need a number",
        ),
        ("cut.parquet", packed_parquet()[:-20], "cannot be read as parquet"),
        ("cut.csv.gz", None, "cannot be read"),
        ("trace.txt", "1 2\n", "the header is one cell: 1 2; its words are parted by blanks"),
        ("trace", "ab\n1\n", "the header is one cell: ab"),
        ("folder.csv", None, "0 files; need files in it"),
    ],
)
def test_a_file_that_holds_no_trace_is_refused(tmp_path, name, content, says):
    path = tmp_path / name
    if name == "folder.csv":
        path.mkdir()
    elif name == "cut.csv.gz":
        path.write_bytes(gzip.compress((OWN + "0,1,1\n" * 99).encode())[:-9])
    elif content is not None:
        write(path, content)
    assert refusal(path).startswith((says, f": {says}"))
