"""Nothing that enters by a file can hang, exhaust memory, run code or break a terminal; nothing leaves half-written."""

import ast
import base64
import contextlib
import errno
import gzip
import json
import os
import re
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from fuzz_readers import (
    CDF,
    CSV,
    DENSE,
    ENGINE,
    JSONL,
    LEDGER,
    PLAN,
    SEEDS,
    SIMULATION,
    check_one,
    check_trace,
    parquet,
    targets,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetopt_jax.calibrate.measurements import MeasurementsRow, read_measurements
from fleetopt_jax.calibrate.points import read_points
from fleetopt_jax.catalog.hf_config import HfConfig, read_config
from fleetopt_jax.core import files
from fleetopt_jax.core.errors import BadInput, unknown_name
from fleetopt_jax.core.files import MIB, check_writable, parse_json, read_bytes, same_file, write_whole
from fleetopt_jax.documents.engine import EngineFile, load_engine
from fleetopt_jax.documents.ledger import LedgerFile, load_ledger
from fleetopt_jax.documents.plan_file import PlanFile, read_plan_file
from fleetopt_jax.documents.simulation import SimulationFile, load_simulation
from fleetopt_jax.workload.readers import CdfDocument, Layout, limits, read_workload_file

PACKAGE = Path(__file__).parents[1] / "fleetopt_jax"
NEVER_CALLED = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
NEVER_IMPORTED = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "subprocess", "runpy", "code"}
READS = {
    "trace.csv": read_workload_file,
    "trace.jsonl": read_workload_file,
    "trace.parquet": read_workload_file,
    "trace.csv.gz": read_workload_file,
    "lengths.json": read_workload_file,
    "engine.json": load_engine,
    "config.json": read_config,
    "points.csv": read_measurements,
    "results.json": read_points,
    "plan.json": read_plan_file,
    "simulation.json": load_simulation,
    "ledger.json": load_ledger,
}
LOGS = {name for name, read in READS.items() if read is read_workload_file}  # read in pieces, however large
OWN = "prompt_tokens,output_tokens\n"


def refusal(read, path, *more) -> str:
    """What is said of a bad file, after its name: one short line that can be printed, at once."""
    start = time.perf_counter()
    with pytest.raises(BadInput) as refused:
        read(str(path), *more)
    assert time.perf_counter() - start < 20
    said = str(refused.value)
    assert said.isprintable()
    assert len(said) < 3000
    assert said.startswith(str(path))
    return said.removeprefix(str(path))


def written(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


# ---------------------------------------------------------------------------------------------- what a file can be


@pytest.mark.parametrize("name", READS)
def test_a_huge_file_is_refused_by_its_size_or_its_first_piece(tmp_path, name):
    path = tmp_path / name
    path.touch()
    os.truncate(path, 10 * 2**30)
    said = r": too large: it is 10,240 MiB; need at most [\d,]+ MiB$"
    if name in LOGS:  # of which the first piece tells that nothing is in it
        said = r": (too large: it holds more; need|a line is longer than 8 MiB; need|cannot be read as csv: holds NUL)"
    assert re.match(said, refusal(READS[name], path))


@pytest.mark.parametrize("name", READS)
def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path, name):
    read, path = READS[name], tmp_path / name
    assert "no such file" in refusal(read, path)
    path.symlink_to(tmp_path / "gone")
    assert "no such file" in refusal(read, path)
    path.unlink()
    path.symlink_to(path)
    assert "cannot be read: Too many levels" in refusal(read, path)
    for device in ("/dev/zero", "/dev/null"):
        path.unlink()
        path.symlink_to(device)
        assert "cannot be read: is a device" in refusal(read, path)
    path.unlink()
    path.mkdir()
    said = ": 0 files; need files in it" if name in LOGS else "cannot be read: is a directory"
    assert said in refusal(read, path)
    path.rmdir()
    os.mkfifo(path)  # without a writer
    assert refusal(read, path) == ": the file is empty"


def test_a_name_no_file_can_have_is_refused():
    with pytest.raises(BadInput):
        read_bytes("a\0b.json")
    with pytest.raises(BadInput):
        read_workload_file("x" * 5000 + ".csv")


@pytest.mark.parametrize("data", [CSV, JSONL, SEEDS["parquet"][0]])
def test_a_pipe_is_read_like_a_file(tmp_path, data):
    ending = {CSV: "csv", JSONL: "jsonl"}.get(data, "parquet")
    path = tmp_path / f"pipe.{ending}"
    os.mkfifo(path)
    hold = os.open(path, os.O_RDWR)  # a pipe holds 64 KiB without a reader
    os.write(hold, data)
    done = threading.Timer(0.2, lambda: os.close(hold))
    done.start()
    trace = read_workload_file(path)
    done.join()
    assert trace.prompt_tokens[0] == (1 if ending == "parquet" else 374)


def test_an_unreadable_file_is_refused(tmp_path, monkeypatch):
    """Root may read all, so the system's answer is put in its place."""
    path = written(tmp_path / "secret.csv", CSV)

    def denied(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(files.os, "open", denied)
    assert refusal(read_workload_file, path) == ": cannot be read: Permission denied"


def test_a_file_that_fails_or_grows_while_it_is_read_is_refused(tmp_path):
    class Failing:
        def read(self, size: int) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    class Growing:
        def read(self, size: int) -> bytes:
            return b" " * size

    for source, said in (
        (Failing(), "Input/output error"),
        (Growing(), "too large: it holds more; need at most 2 MiB"),
    ):
        stream = files.io.BufferedReader(files.Bounded("f", source, 2 * MIB, False))
        with pytest.raises(BadInput, match=said):
            stream.read()


@pytest.mark.parametrize("name", ["lengths.json.gz", "plan.json.gz", "trace.csv.gz", "trace.jsonl.gz"])
def test_a_gzip_bomb_is_unpacked_no_further_than_the_limit(tmp_path, name, monkeypatch):
    monkeypatch.setattr(limits, "MAX_TRACE_BYTES", 20 * MIB)
    monkeypatch.setattr(limits, "MAX_CDF_BYTES", 20 * MIB)
    read = read_plan_file if "plan" in name else read_workload_file
    starts = {"trace.csv.gz": OWN.encode(), "trace.jsonl.gz": JSONL, "lengths.json.gz": b"[[100, 1]"}
    bomb = gzip.compress(starts.get(name, b"") + b"\n" * (40 * MIB), compresslevel=1)
    assert len(bomb) < MIB
    assert "too large: it holds more" in refusal(read, written(tmp_path / name, bomb))


def test_more_rows_than_memory_is_meant_for_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MAX_PASSED_ROWS", 1000)
    table = pa.table({"prompt_tokens": np.ones(1001), "output_tokens": np.ones(1001)})
    pyarrow.csv.write_csv(table, tmp_path / "many.csv")
    pyarrow.parquet.write_table(table, tmp_path / "many.parquet")
    written(tmp_path / "many.jsonl", b'{"prompt_tokens": 1, "output_tokens": 1}\n' * 1001)
    for ending in ("csv", "parquet", "jsonl"):
        assert ": more than 1,000 rows; need at most 1,000" in refusal(read_workload_file, tmp_path / f"many.{ending}")


def test_a_trace_read_in_pieces_is_the_trace(tmp_path, monkeypatch):
    """Pieces end within quoted line breaks, numbers and time stamps; a wrong row is counted from the first piece on."""
    monkeypatch.setattr(limits, "PIECE_BYTES", 1000)
    monkeypatch.setattr(limits, "PIECE_ROWS", 7)
    rows = [(f"2024-01-01T00:00:{i % 60:02d}.5", 10 + i, 1 + i % 3, "a\nb" * (i % 5)) for i in range(300)]
    table = pa.table(dict(zip(("timestamp_s", "prompt_tokens", "output_tokens", "said"), zip(*rows))))
    pyarrow.csv.write_csv(table, tmp_path / "t.csv")
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet", row_group_size=50)
    text = "".join(json.dumps(row) + "\n" for row in table.to_pylist())
    written(tmp_path / "t.jsonl", text)
    for ending in ("csv", "parquet", "jsonl"):
        trace = read_workload_file(tmp_path / f"t.{ending}")
        assert trace.prompt_tokens.tolist() == [row[1] for row in sorted(rows, key=lambda row: row[0])]
        assert 59 <= trace.arrival_s[-1] < 60  # of rounded stamps, five on each
    written(tmp_path / "bad.jsonl", text.replace('"prompt_tokens": 210', '"prompt_tokens": true'))
    assert refusal(read_workload_file, tmp_path / "bad.jsonl").startswith(
        ", row 201: prompt_tokens = True; need a number"
    )
    lines = (tmp_path / "t.csv").read_text()
    written(tmp_path / "bad.csv", lines.replace(",210,", ",-1,"))
    assert refusal(read_workload_file, tmp_path / "bad.csv").startswith(", row 201: prompt_tokens = -1")
    written(tmp_path / "ragged.csv", lines.replace(",210,", ","))
    assert refusal(read_workload_file, tmp_path / "ragged.csv").startswith(", row 201: 3 cells; need 4")


# ------------------------------------------------------------------------------------------- what a trace can hold


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("nul.csv", OWN + "1,2\n1\0,2\n", "NUL bytes"),
        ("bom.csv", b"\xef\xbb\xbf", "the file is empty"),
        ("ones.csv", OWN + "1e999,2\n", ", row 1: prompt_tokens = 1e999"),
        ("digits.csv", OWN + "1" * 10_000 + ",2\n", ", row 1: prompt_tokens = 1111"),
        ("escape.csv", OWN + "\x1b[31m1,2\n", ", row 1: prompt_tokens = '"),
        ("pickle.csv", b"\x80\x04\x95" + b"c__builtin__\nexit\n(tR.", "is a Python pickle"),
        ("npy.csv", b"\x93NUMPY\x01\x00v\x00{'descr': '<f8'}", "is a NumPy array"),
        ("npz.csv", b"PK\x03\x04" + bytes(26), "cannot be read as zip"),
        ("wide.csv", ",".join(f"c{i}" for i in range(10_000)) + "\n", "columns are c0, c1"),
        ("true.jsonl", '{"prompt_tokens": true, "output_tokens": 1}', ", row 1: prompt_tokens = True; need a number"),
        ("text.jsonl", '{"prompt_tokens": "5a", "output_tokens": 1}', ", row 1: prompt_tokens = '5a'; need a number"),
        (
            "digits.jsonl",
            f'{{"prompt_tokens": {"9" * 10_000}, "output_tokens": 1}}',
            ", row 1: cannot be read as jsonl",
        ),
        (
            "large.jsonl",
            '{"prompt_tokens": 1e999, "output_tokens": 1}',
            ", row 1: prompt_tokens = inf; need a whole number",
        ),
        ("twice.jsonl", '{"prompt_tokens": 1, "prompt_tokens": 2, "output_tokens": 1}', "specified twice"),
        ("deep.jsonl", '{"prompt_tokens": ' + "[" * 100_000, ", row 1: is nested too deep"),
        ("true.parquet", parquet({"prompt_tokens": [True], "output_tokens": [1]}), ", row 1: prompt_tokens = 'True'"),
        ("list.parquet", parquet({"prompt_tokens": [[1]], "output_tokens": [1]}), ", row 1: prompt_tokens = '[1]'"),
    ],
)
def test_a_trace_that_holds_anything_else_is_refused(tmp_path, name, data, says):
    assert says in refusal(read_workload_file, written(tmp_path / name, data))


def test_what_stands_beside_the_lengths_is_passed_over(tmp_path):
    """However deep it is: Arrow alone would end the process on the first of these."""
    deep = b'{"a": ' * 100_000 + b"1" + b"}" * 100_000
    rows = b'{"prompt_tokens": 1, "output_tokens": 2}\n' * limits.FIRST_LINES
    path = written(tmp_path / "deep.jsonl", rows + b'{"prompt_tokens": 3, "output_tokens": 4, "x": ' + deep + b"}\n")
    assert read_workload_file(path).prompt_tokens[-1] == 3
    path = written(tmp_path / "latin.csv", "prompt_tokens,output_tokens,who\n1,2,é\n".encode("latin-1"))
    assert read_workload_file(path).prompt_tokens.tolist() == [1]
    wide = ",".join(["prompt_tokens", "output_tokens", *(f"c{i}" for i in range(10_000))])
    path = written(tmp_path / "wide.csv", f"{wide}\n{'7,' * 10_001}7\n")
    assert read_workload_file(path).output_tokens.tolist() == [7]


def test_parquet_types_that_hold_whole_numbers_are_read(tmp_path):
    for i, kind in enumerate((pa.int8(), pa.uint64(), pa.float16(), pa.float32(), pa.decimal128(21, 2), pa.string())):
        values = pa.array([5, 7]).cast(pa.float32()).cast(kind) if kind == pa.float16() else pa.array([5, 7]).cast(kind)
        path = written(tmp_path / f"{i}.parquet", parquet({"prompt_tokens": values, "output_tokens": [1, 1]}))
        assert read_workload_file(path).prompt_tokens.tolist() == [5, 7]
    path = written(
        tmp_path / "d.parquet",
        parquet({"prompt_tokens": pa.array([5, 7]).dictionary_encode(), "output_tokens": [1, 1]}),
    )
    assert read_workload_file(path).prompt_tokens.tolist() == [5, 7]


def test_times_at_the_ends_of_their_types_stay_finite(tmp_path):
    rows = ["1677-09-22T00:00:00", "2262-04-11T00:00:00"]  # a span of more nanoseconds than an int64 holds
    trace = read_workload_file(written(tmp_path / "t.csv", "timestamp_s," + OWN + "".join(f"{t},1,1\n" for t in rows)))
    assert trace.arrival_s[-1] == pytest.approx(584.5 * 365.25 * 86_400, rel=1e-3)
    path = written(tmp_path / "far.csv", "timestamp_s," + OWN + "-1e308,1,1\n1e308,1,1\n")
    assert refusal(read_workload_file, path).startswith(", row 1: timestamp_s = -1e308; need a finite time")


SAID = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=4
)  # a NUL is no text in a csv
TABLES = st.lists(
    st.tuples(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(-(10**6), 10**9), SAID),
    min_size=1,
    max_size=20,
)


@given(rows=TABLES)
@settings(max_examples=25, deadline=None, database=None)
def test_a_table_is_the_same_trace_in_every_format(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("same")
    table = pa.table(dict(zip(("in", "out", "when", "said"), map(list, zip(*rows)))))
    layout = Layout("in", "out", "when", 1e-3)
    pyarrow.csv.write_csv(table, folder / "t.csv")
    pyarrow.parquet.write_table(table, folder / "t.parquet")
    written(folder / "t.jsonl", "".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    traces = [read_workload_file(folder / f"t.{ending}", layout) for ending in ("csv", "parquet", "jsonl")]
    for trace in traces:
        check_trace(trace)
        ordered = sorted(rows, key=lambda row: row[2])  # rows of one time stay in their order
        assert trace.prompt_tokens.tolist() == [row[0] for row in ordered]
        assert trace.output_tokens.tolist() == [row[1] for row in ordered]
        np.testing.assert_array_equal(trace.arrival_s, traces[0].arrival_s)
    assert traces[0].arrival_s[-1] == pytest.approx((max(r[2] for r in rows) - min(r[2] for r in rows)) / 1e3, abs=1e-9)


# --------------------------------------------------------------------------------------------------------- any bytes

CRASHES = [  # (target, what the fuzzer found to break it)
    ("cdf", base64.b64decode("W05hTm1tbW0AAAA1bW1tbW1tbW1tbW1tbW1tbW1tbTAsIDAuNV0sIFsyMDAsIG0=")),
    ("measurements", b"\xef\xbb\xbf"),
    ("csv", b"prompt_tokens,output_tokens\n1,2\n1,2,\xff\n"),  # Arrow would print a traceback of its own
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return targets(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize(("target", "data"), CRASHES)
def test_what_broke_a_reader_once_is_refused(run, target, data):
    check_one(run[target], data)


@pytest.mark.parametrize("target", SEEDS)
def test_junk_is_valid_or_refused(run, target):
    """Random bytes, and seeds with a part replaced: what the fuzzer does for longer."""
    rng = np.random.default_rng(0)
    for seed in SEEDS[target]:
        check_one(run[target], seed)
        for _ in range(25):
            start, stop = sorted(rng.integers(0, len(seed) + 1, 2))
            check_one(run[target], seed[:start] + rng.bytes(rng.integers(0, 9)) + seed[stop:])
            check_one(run[target], seed[:start] + seed[start : start + 9] + seed[start:])


@pytest.mark.slow
@pytest.mark.parametrize("target", SEEDS)
@given(data=st.binary(max_size=300))
@settings(max_examples=1000, deadline=None, database=None)
def test_any_bytes_are_valid_or_refused(run, target, data):
    check_one(run[target], data)


def test_the_fuzzer_starts_from_valid_files(run):
    for target in SEEDS:
        run[target](SEEDS[target][0])


# --------------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            '{"a": 1,\n "b": {"c": [0, {"d": 1,\n "d": 2}]}}',
            ", line 3: key 'b.c.1.d' is there more than once; need it once",
        ),
        ('{"a": 1,\n"a": 2}', ", line 2: key 'a' is there more than once"),
        ('{"a\\u001b": 1, "a\\u001b": 2}', ", line 1: key 'a\\x1b' is there more than once"),
        ('[1,\n{"x": -Infinity}]', ", line 2: 1.x = -Infinity; need a finite number"),
        ("[NaNm", ", line 1: 0 = NaN; need a finite number"),
        ("[0,\n1e999]", ", line 2: 1 = 1e999; need a finite number"),
        ("9" * 10_000, ", line 1: 9999"),
        ("[0,\n\n 1 2]", ", line 3: is not JSON: Expecting ',' delimiter (column 4)"),
        ('{"a": 1', ", line 1: is not JSON"),
        ("[" * 100_000, ": is nested more than 100 deep"),
        ("[" * 101 + "]" * 101, ": is nested more than 100 deep"),
        ('{"a":' * 900 + "1" + "}" * 900, ": is nested more than 100 deep"),
        ('["\\ud800"]', ": has a text with half of a surrogate pair"),
        (b'{\n"a": "\xe9"}', ", line 2: is not JSON: not UTF-8 text"),
        ("[1]".encode("utf-16"), ", line 1: is not JSON: not UTF-8 text"),
        ('["\ud800"]'.encode("utf-8", "surrogatepass"), "not UTF-8"),
        ("{" + ",".join(f'"{i}":0' for i in range(100_001)) + "}", ": an object has 100001 keys; need at most 100000"),
    ],
)
def test_json_that_says_two_things_or_too_much_is_refused_with_its_place(text, says):
    with pytest.raises(BadInput) as refused:
        parse_json("f.json", text if isinstance(text, bytes) else text.encode())
    assert str(refused.value).startswith("f.json")
    assert says in str(refused.value)


def test_good_json_is_read_as_python_reads_it():
    for text in (
        b"\xef\xbb\xbf[1, 2.5, -0.0]",
        b'{"a": [true, null, "\\ud83d\\ude00"]}\r\n',
        b"[" * 99 + b"]" * 99,
        b"1e308",
    ):
        assert parse_json("f", text) == json.loads(text.decode("utf-8-sig"))


@pytest.mark.parametrize(
    ("read", "document", "says"),
    [
        (load_engine, ENGINE | {"tp": True}, "tp = True"),
        (load_engine, ENGINE | {"gpu": "h100\x1b[31m"}, "gpu = h100 [31m: value error, a name has no control"),
        (read_config, DENSE | {"hidden_size": "4096"}, "hidden_size = 4096: input should be a valid integer"),
        (read_config, DENSE | {"vocab_size": True}, "vocab_size = True"),
        (read_workload_file, {"cdf": [[100, 0.5], [200, "x"]]}, "cdf.1.1 = x"),
    ],
)
def test_a_wrong_field_is_refused_with_its_line(tmp_path, read, document, says):
    text = json.dumps(document, indent=1)
    path = written(tmp_path / "f.json", text)
    found = re.match(r", line (\d+): (.*)", refusal(read, path))
    assert found[2].startswith(says)
    field = says.split(" ")[0]
    wrong = '"x"' if field == "cdf.1.1" else f'"{field}"'
    assert wrong in text.splitlines()[int(found[1]) - 1]


@pytest.mark.parametrize("model", [CdfDocument, EngineFile, HfConfig, MeasurementsRow])
def test_every_model_describes_its_fields(model):
    schema = model.model_json_schema()
    assert schema["title"]
    fields = [
        field
        for part in (schema, *schema.get("$defs", {}).values())
        for name, field in part.get("properties", {}).items()
        if "const" not in field and "$ref" not in field and name not in ("type", "weights", "quantization_config")
    ]
    assert len(fields) > 1
    undescribed = [field for field in fields if "description" not in field and "anyOf" not in field]
    assert not undescribed


def test_the_models_take_what_the_readers_take():
    CdfDocument.model_validate([[100, 0.5], [200, 1]])
    CdfDocument.model_validate(json.loads(CDF))
    HfConfig.model_validate(DENSE)
    EngineFile.model_validate(ENGINE)
    PlanFile.model_validate(PLAN)
    SimulationFile.model_validate(SIMULATION)
    LedgerFile.model_validate(LEDGER)
    MeasurementsRow.model_validate({"n_sequences": "8", "median_itl_ms": "12.5"})


# ----------------------------------------------------------------------------------------------------------- messages


def test_a_message_is_one_short_line_whatever_it_is_about():
    """No terminal sequence, no line break, no override of the reading direction, no half of a surrogate pair."""
    for bad in ("\n\r\x0b\x0c\x85\u2028", "\x1b]0;title\x07\x1b[2J", "\u202e\u2066", "\ud800", "x" * 10**6, "\0"):
        for error in (BadInput(bad, bad, bad), unknown_name("--gpu", bad, ["h100"])):
            assert str(error).isprintable()
            assert len(str(error)) < 3000
            str(error).encode()
    assert str(BadInput("/".join("x" * 2000) + "/end.csv, row 7", "a")).endswith("/end.csv, row 7: a")


# ------------------------------------------------------------------------------------------------- no code from files


def forbidden(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in NEVER_IMPORTED]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in NEVER_IMPORTED:
            found.append(node.module)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in NEVER_CALLED or name.startswith(
                ("os.spawn", "os.exec", "yaml.load", "yaml.safe_load", "yaml.unsafe", "yaml.full")
            ):
                found.append(name)
            unpickles = any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords)
            if unpickles or (name in ("np.load", "numpy.load") and "allow_pickle=False" not in ast.unparse(node)):
                found.append(name)
    return found


def test_nothing_in_the_package_runs_what_it_reads():
    # Compiled programs are code, and JAX writes them as pickles: in the folder where the user's own are kept.
    sources = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "core" / "programs.py")
    assert len(sources) > 20
    assert not {path.name: found for path in sources if (found := forbidden(ast.parse(path.read_text())))}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from subprocess import run",
        "eval('1')",
        "np.load(f)",
        "np.load(f, allow_pickle=True)",
        "os.system(c)",
    ],
)
def test_the_check_sees_what_runs_code(source):
    assert forbidden(ast.parse(source))


# ------------------------------------------------------------------------------------------------------------- outputs


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def unwritable(path, write=write_whole, *content) -> str:
    with pytest.raises(BadInput) as refused:
        write(str(path), *content, option="--out")
    assert str(refused.value).startswith("--out ")
    assert str(refused.value).isprintable()
    return str(refused.value)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["fsync", "chmod", "replace"])
def test_a_full_disk_or_an_interrupt_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, error, step):
    path = written(tmp_path / "plan.json", "old")

    def fails(*_):
        raise error

    monkeypatch.setattr(files.os, step, fails)
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            write_whole(path, "new")
    else:
        assert "No space left on device" in unwritable(path, write_whole, "new")
    assert path.read_text() == "old"
    assert leftovers(tmp_path) == ["plan.json"]


def test_a_full_device_is_said_in_one_line():
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    assert "No space left on device" in unwritable("/dev/full", write_whole, "x" * 100_000)


def test_a_link_a_mode_and_a_read_only_file_are_respected(tmp_path, monkeypatch):
    path, link = written(tmp_path / "plan.json", "old"), tmp_path / "link.json"
    path.chmod(0o640)
    link.symlink_to(path)
    check_writable(str(link))
    write_whole(link, "new")
    assert link.is_symlink()
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o640
    monkeypatch.setattr(files.os, "access", lambda *_: False)  # root may write all
    assert "cannot be written: is read-only" in unwritable(link, write_whole, "newer")
    assert "cannot be written: is read-only" in unwritable(link, check_writable)
    assert path.read_text() == "new"
    assert leftovers(tmp_path) == ["link.json", "plan.json"]


def test_places_where_no_file_can_be_are_refused_before_the_work(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    assert "nobody reads the pipe" in unwritable(tmp_path / "pipe", write_whole, "x")
    assert "is a directory" in unwritable(tmp_path, check_writable).lower()
    assert "is a directory" in unwritable(tmp_path, write_whole, "x").lower()
    assert "no such directory" in unwritable(tmp_path / "none" / "x", check_writable)
    assert "name too long" in unwritable(tmp_path / ("x" * 300), check_writable).lower()
    assert "null" in unwritable(f"{tmp_path}/a\0b", check_writable).lower()
    assert "Not a directory" in unwritable(tmp_path / "pipe" / "x", write_whole, "x")

    def denied(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(files.Path, "touch", denied)
    assert "Permission denied" in unwritable(tmp_path / "new", check_writable)
    assert leftovers(tmp_path) == ["pipe"]


def test_a_text_that_utf_8_cannot_hold_is_still_written(tmp_path):
    write_whole(tmp_path / "x", "\ud800")
    assert (tmp_path / "x").read_text() == "\\ud800"


def test_same_file_sees_through_links(tmp_path):
    path, link = written(tmp_path / "a", "x"), tmp_path / "b"
    link.symlink_to(path)
    with contextlib.chdir(tmp_path):
        assert same_file("a", path)
    assert same_file(link, path)
    assert not same_file(path, tmp_path / "gone")
    assert not same_file(path, written(tmp_path / "c", "x"))
    assert not same_file("a\0", path)
