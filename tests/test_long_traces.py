"""Requests that are counted as they pass: what is exact stays exact, what is lost is bounded, memory as well."""

import dataclasses
import gzip

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetopt_jax.catalog.workloads import load
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.workload.cells import EXACT, Cells
from fleetopt_jax.workload.compress import compress
from fleetopt_jax.workload.profile import hour_of, hour_of_clock, profile_of_clock, rate_profile
from fleetopt_jax.workload.readers import LongTrace, Trace, limits, read_workload_file
from fleetopt_jax.workload.summary import summarize, summarize_long


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.floats(0.5, 9.0), st.integers(1, 6000), st.integers(1024, 3000))
def test_cells_keep_counts_and_means_and_lose_what_their_width_allows(seed, decades, n, most):
    rng = np.random.default_rng(seed)
    pairs = np.floor(10.0 ** rng.uniform(0.0, decades, (n, 2))) - np.array([0.0, 1.0])
    cells, other = Cells(most), Cells(most)
    for counter, order in ((cells, pairs), (other, rng.permutation(pairs))):
        for start in range(0, n, 700):
            counter.add(*order[start : start + 700].T)
    prompt, output, count = cells.settled()
    for one, two in zip((prompt, output, count), other.settled()):
        np.testing.assert_array_equal(one, two)  # whatever the order
    assert len(count) <= most
    assert count.sum() == n
    np.testing.assert_allclose(np.stack([prompt, output]) @ count, pairs.sum(axis=0), rtol=1e-12)
    kept, width = np.stack([prompt, output], axis=1), cells.width_frac
    if cells.digits == EXACT:
        np.testing.assert_array_equal(np.unique(pairs, axis=0), kept[np.lexsort(kept.T[::-1])])
        return
    # Each request has a cell whose mean is no further than its width; so little of the variance is lost.
    some = pairs[rng.integers(0, n, 100)]
    near = np.abs(some[:, None] - kept[None]) <= width * np.minimum(some[:, None], kept[None]) + 1e-6
    assert near.all(axis=2).any(axis=1).all()
    lost, squares = np.sum(pairs**2, axis=0) - count @ kept**2, np.sum(pairs**2, axis=0)
    assert np.all((lost >= -1e-9 * squares) & (lost <= width**2 / 4.0 * squares + 1e-9 * squares))


def test_atoms_of_cells_are_as_good_as_atoms_of_requests():
    """The metrics read means, and are as far off as variance is lost: no more of it by way of coarse cells."""
    rng = np.random.default_rng(0)
    prompt, output = (np.maximum(1, np.round(np.exp(rng.normal(mean, 1.2, 60_000)))) for mean in (6.5, 5.0))
    cells = Cells(20_000)
    cells.add(prompt, output)
    assert cells.width_frac > 0 or len(cells.settled()[2]) <= 20_000
    moments = [
        (w @ p / w.sum(), w @ o / w.sum(), w @ (p + o) ** 2 / w.sum())
        for p, o, w in (
            (prompt, output, np.ones(len(prompt))),
            compress(prompt, output, None, 2000),
            compress(*cells.settled(), 2000),
        )
    ]
    exact, of_requests, of_cells = np.array(moments)
    np.testing.assert_allclose(of_cells[:2], exact[:2], rtol=1e-12)
    assert abs(of_cells[2] / exact[2] - 1) < max(2 * abs(of_requests[2] / exact[2] - 1), cells.width_frac**2)


def day(n: int = 20_000) -> pa.Table:
    """A day that is busier at noon, where prompts are longer; stamps with fractions."""
    rng = np.random.default_rng(1)
    at = np.sort(rng.beta(3, 3, n)) * 86_400.0
    prompt = np.maximum(1, np.round(np.exp(rng.normal(5.5 + (np.abs(at - 43_200) < 3600), 0.8))))
    output = np.maximum(1, np.round(np.exp(rng.normal(4.5, 0.8, n))))
    return pa.table({"timestamp_s": 1.7e9 + np.round(at, 3), "prompt_tokens": prompt, "output_tokens": output})


@pytest.fixture
def few_kept(monkeypatch):
    """Traces are long from 3,000 requests on, and read in pieces of about a thousand."""
    monkeypatch.setattr(limits, "MAX_KEPT_ROWS", 3000)
    monkeypatch.setattr(limits, "PIECE_ROWS", 1000)
    monkeypatch.setattr(limits, "PIECE_BYTES", 2**15)


def test_a_long_trace_says_what_its_requests_say(tmp_path, few_kept):
    path = tmp_path / "day.parquet"
    pyarrow.parquet.write_table(day(), path)
    told = []
    long = read_workload_file(path, progress=lambda *far: told.append(far))
    kept = read_workload_file(path, keep=True)
    assert isinstance(long, LongTrace)
    assert isinstance(kept, Trace)
    assert told[-1][0] <= told[-1][1] == path.stat().st_size
    mine, theirs = dataclasses.asdict(summarize_long(long)), dataclasses.asdict(summarize(kept))
    assert mine.pop("total_token_quantiles") == pytest.approx(theirs.pop("total_token_quantiles"), rel=1e-12)
    assert mine == pytest.approx(theirs, rel=1e-9)
    assert long.clock is not None
    by_clock, by_rows = profile_of_clock(long.clock), rate_profile(kept)
    assert by_clock is not None
    assert by_rows is not None
    for name in (field.name for field in dataclasses.fields(by_rows)):
        np.testing.assert_allclose(getattr(by_clock, name), getattr(by_rows, name), rtol=1e-9, err_msg=name)
    for at in ("peak", "p95"):
        assert hour_of_clock(long.clock, by_clock, at, 5.0) == hour_of(kept, by_rows, at, 5.0)


@pytest.mark.parametrize("at", ["mean", "peak"])
def test_a_long_trace_is_the_same_workload(tmp_path, monkeypatch, at):
    path = tmp_path / "day.parquet"
    pyarrow.parquet.write_table(day(), path)
    kept = load(str(path), at=at)
    monkeypatch.setattr(limits, "MAX_KEPT_ROWS", 3000)
    monkeypatch.setattr(limits, "PIECE_ROWS", 1000)
    long = load(str(path), at=at)
    assert (long.hour is None) == (at == "mean")
    assert long.hour == kept.hour
    for name in ("prompt_tokens", "output_tokens", "weight", "arrival_rate_per_s", "arrival_scv", "longest_tokens"):
        np.testing.assert_allclose(getattr(long.workload, name), getattr(kept.workload, name), rtol=1e-9, err_msg=name)


def test_a_folder_and_a_pattern_are_one_trace(tmp_path, few_kept):
    table, folder = day(), tmp_path / "logs"
    folder.mkdir()
    for k, start in enumerate(range(0, len(table), 5000)):
        rows = "".join(f"{t},{p:.0f},{o:.0f}\n" for t, p, o in zip(*(c.to_pylist() for c in table.slice(start, 5000))))
        text = "timestamp_s,prompt_tokens,output_tokens\n" + rows
        (folder / f"part-{k}.csv.gz").write_bytes(gzip.compress(text.encode()))
    (folder / ".hidden").write_text("not a log")
    whole = tmp_path / "day.parquet"
    pyarrow.parquet.write_table(table, whole)
    traces = [read_workload_file(place) for place in (whole, folder, f"{folder}/part-*.csv.gz")]
    summaries = [dataclasses.asdict(summarize_long(trace)) for trace in traces if isinstance(trace, LongTrace)]
    quantiles = [each.pop("total_token_quantiles") for each in summaries]
    assert quantiles[1:] == quantiles[:1] * 2
    assert summaries[1:] == [pytest.approx(summaries[0], rel=1e-12)] * 2
    (folder / "part-2.csv.gz").write_bytes(gzip.compress(b"timestamp_s,prompt_tokens,output_tokens\n1,x,5\n"))
    with pytest.raises(BadInput, match=r"part-2\.csv\.gz, row 1: prompt_tokens = 'x'"):
        read_workload_file(folder)
    (folder / "part-2.csv.gz").write_text("when,prompt_tokens,completion_tokens\n1,2,5\n")
    with pytest.raises(BadInput, match=r"part-2\.csv\.gz: .* not read as those of .*part-0"):
        read_workload_file(folder)
    with pytest.raises(BadInput, match="0 files; need a pattern that files match"):
        read_workload_file(tmp_path / "none-*.csv")


def test_what_is_not_in_order_is_kept(tmp_path, few_kept):
    table = day()
    order = np.random.default_rng(0).permutation(len(table))
    path = tmp_path / "mixed.parquet"
    pyarrow.parquet.write_table(table.take(order), path)
    found = read_workload_file(path)
    assert isinstance(found, Trace)
    assert np.all(np.diff(found.arrival_s) >= 0)


def test_requests_that_name_the_turn_before_are_kept(tmp_path, few_kept):
    turns = pa.array([None if k % 3 == 0 else f"c{k - 1}" for k in range(20_000)])
    table = day().append_column("chat_id", pa.array([f"c{k}" for k in range(20_000)]))
    path = tmp_path / "talks.parquet"
    pyarrow.parquet.write_table(table.append_column("parent_chat_id", turns), path)
    found = read_workload_file(path)
    assert isinstance(found, Trace)
    assert found.sessions is not None
    assert len(np.unique(found.sessions)) == 20_000 // 3 + 1
