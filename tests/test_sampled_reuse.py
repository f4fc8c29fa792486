"""Reuse from a sample of blocks or sessions: near what all of them say, by as much as it says; bounded, and the same
whatever the pieces."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from test_prefix_cache import blocks_of, conversations

from fleetopt_jax.catalog.workloads import load
from fleetopt_jax.cli.main import main
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.workload import sampling
from fleetopt_jax.workload.blocks import SESSION_BLOCK_TOKENS, blocks_of_sessions
from fleetopt_jax.workload.compress import compress_with_members
from fleetopt_jax.workload.readers import LongTrace, Trace, limits, read_workload_file
from fleetopt_jax.workload.readers.passing_reuse import text_keys
from fleetopt_jax.workload.reuse import HitCurve, hit_curve, hit_curve_of_sample, reuse_of, reuse_of_sample
from fleetopt_jax.workload.sampling import BlockSampler, SampledUses, SessionSampler, mixed

N, PART = 20_000, 8000
SIZES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)  # of the unique blocks
SALTS = range(8)  # whose hashes are others, and so the samples


@pytest.fixture(scope="module")
def stream():
    requests, prompts, outputs = conversations(N)
    return blocks_of(requests), prompts, outputs


@pytest.fixture(scope="module")
def part(stream):
    """Of so few requests that atoms need no splitting, which takes long."""
    blocks, prompts, outputs = stream
    return blocks.of(np.arange(PART)), prompts[:PART], outputs[:PART]


@pytest.fixture(scope="module")
def exact_part(part) -> HitCurve:
    return hit_curve(*part[:2])


@pytest.fixture(scope="module")
def exact(stream) -> HitCurve:
    return hit_curve(*stream[:2])


@pytest.fixture
def small(monkeypatch):
    """Room for so little that about one block in sixteen is in a sample of the stream."""
    monkeypatch.setattr(sampling, "MAX_USES", 2**13)
    monkeypatch.setattr(sampling, "MAX_OFTEN_USES", 2**12)
    monkeypatch.setattr(sampling, "STRETCH", 2**14)


def sampler_of(stream, pieces=(N,), salt: int = 0) -> BlockSampler:
    """Of the stream in pieces of so many requests, again and again."""
    blocks, prompts, outputs = stream
    sampler, keys, ends = BlockSampler(512), mixed(blocks.ids + (salt << 40)), np.append(0, np.cumsum(blocks.counts))
    begin, k = 0, 0
    while begin < len(prompts):
        end = min(begin + pieces[k % len(pieces)], len(prompts))
        of = slice(begin, end)
        sampler.add(keys[ends[begin] : ends[end]], blocks.counts[of], prompts[of], outputs[of])
        begin, k = end, k + 1
    return sampler


def errors(curve: HitCurve, exact: HitCurve) -> np.ndarray:
    """Of hit shares of blocks and of tokens, at every size."""
    sizes = np.array(SIZES) * exact.n_unique * exact.block_tokens
    return np.array(
        [
            np.interp(sizes, curve.cache_tokens, getattr(curve, name))
            - np.interp(sizes, exact.cache_tokens, getattr(exact, name))
            for name in ("hit_frac", "hit_token_frac")
        ]
    )


def features_of(sample: SampledUses, stream):
    """The reuse of the stream's atoms by a sample, and exactly, and their weights."""
    blocks, prompts, outputs = stream
    atoms, atom = compress_with_members(prompts, outputs)
    age = np.where(np.isfinite(sample.age_requests), sample.age_requests, 0).astype(int)
    about = (atoms[0], atoms[0] + atoms[1], atoms[2])
    found = reuse_of_sample(sample, about, atom[sample.request], atom[sample.request - age])
    return found, reuse_of(blocks, prompts, prompts + outputs, atom), atoms[2] / atoms[2].sum()


def test_a_sample_that_holds_all_says_what_all_say(part, exact_part):
    sample = sampler_of(part).settled("x")
    curve = hit_curve_of_sample(sample)
    assert (curve.one_in, curve.standard_error) == (1, 0.0)
    assert (curve.n_blocks, curve.n_unique, curve.source) == (
        exact_part.n_blocks,
        exact_part.n_unique,
        exact_part.source,
    )
    for name in ("cache_tokens", "age_requests", "hit_frac", "hit_token_frac", "grid_error"):
        assert getattr(curve, name) == pytest.approx(getattr(exact_part, name), rel=1e-9), name
    mine, theirs, weight = features_of(sample, part)
    np.testing.assert_allclose(mine.age_requests, theirs.age_requests)
    for power, name in enumerate(("cached_tokens", "cached_tokens2")):
        np.testing.assert_allclose(
            weight @ getattr(mine, name), weight @ getattr(theirs, name), rtol=0.01**power * 1e-2
        )
    pairs = np.asarray(mine.pair_tokens), np.asarray(theirs.pair_tokens)
    np.testing.assert_allclose(pairs[0].sum(axis=(1, 2)), pairs[1].sum(axis=(1, 2)), rtol=1e-9)
    np.testing.assert_allclose(mine.kept_frac, theirs.kept_frac, atol=0.01)


def test_hit_curves_of_samples_are_as_near_as_they_say(stream, exact, small):
    far, said = [], []
    for salt in SALTS:
        curve = hit_curve_of_sample(sampler_of(stream, salt=salt).settled("x"))
        assert curve.one_in >= 16
        far.append(np.abs(errors(curve, exact)).max())
        said.append(curve.standard_error)
    assert np.max(said) < 0.02
    assert np.max(far) < 0.03
    assert np.mean(np.array(far) <= 2.0 * np.array(said)) >= 0.75  # two standard errors: 95 % of them, of many
    assert 0.5 < np.sqrt(np.mean(np.square(far))) / np.mean(said) < 2.0


def test_what_many_begin_with_is_no_matter_of_chance(stream, exact, small, monkeypatch):
    """Without looking for blocks that are used often, a sample is many times as far off."""
    found = {}
    for often in (sampling.OFTEN, 2**30):
        monkeypatch.setattr(sampling, "OFTEN", often)
        curves = [hit_curve_of_sample(sampler_of(stream, salt=salt).settled("x")) for salt in SALTS]
        found[often] = np.sqrt(np.mean([errors(curve, exact) ** 2 for curve in curves]))
    assert found[2**30] > 3.0 * found[8]


def test_a_sample_is_the_same_whatever_the_pieces(stream, small):
    whole = sampler_of(stream).settled("x")
    for pieces in ((1000,), (1, 3777, 50), (7, 12_000)):
        again = sampler_of(stream, pieces).settled("x")
        for name in (field.name for field in dataclasses.fields(SampledUses)):
            np.testing.assert_array_equal(getattr(whole, name), getattr(again, name), err_msg=name)


def test_no_more_is_kept_than_there_is_room_for(small):
    """However long the log, whatever is in it."""
    rng = np.random.default_rng(0)
    alike = np.zeros(5000, int)  # everybody's first block
    sampler = BlockSampler(16)
    for start in range(0, 100_000, 5000):
        fresh = np.arange(start, start + 5000)
        ids = np.stack([alike, 1 + fresh % 70, 10_000 + fresh, 10_000_000 + fresh], axis=1)
        prompts = np.full(5000, 64.0)
        sampler.add(mixed(ids.ravel()), np.full(5000, 4), prompts, rng.integers(1, 90, 5000).astype(float))
        held = [len(each["draw"]) for kept in (sampler._kept, sampler._often.kept) for each in kept._pieces]
        assert sum(held) <= 2**13 + 2**12
        assert sum(len(each.keys) for each in sampler._pending) < 2**14 + 4 * 5000
        assert len(sampler._often.found.keys) <= sampling.MAX_OFTEN
    sample = sampler.settled("x")
    assert hit_curve_of_sample(sample).hit_frac_infinite == pytest.approx(0.5 - 71 / 400_000, abs=0.01)
    assert sample.totals[-1] == (400_000.0, 6_400_000.0)


def test_atoms_find_what_the_sample_finds(part, small):
    """Atoms, and their grid of ages, change a hit share by no more than is said of them."""
    sample = sampler_of(part).settled("x")
    curve = hit_curve_of_sample(sample)
    reuse, exactly, weight = features_of(sample, part)
    prompts = part[1].mean()
    found = np.interp(curve.age_requests, reuse.age_requests, weight @ np.asarray(reuse.cached_tokens)) / prompts
    np.testing.assert_allclose(found, curve.hit_token_frac, atol=curve.grid_error + 2e-3)  # each prompt's last token
    assert found[-1] == pytest.approx(float(weight @ exactly.cached_tokens[:, -1]) / prompts, abs=0.01)
    h, h2 = np.asarray(reuse.cached_tokens), np.asarray(reuse.cached_tokens2)
    assert np.all(np.diff(h, axis=1) >= 0)
    assert np.all(h2 >= h**2 * (1 - 1e-9))
    share = (weight @ h2)[-1] / (weight @ np.asarray(exactly.cached_tokens2))[-1]
    assert share == pytest.approx(1.0, abs=0.1)
    kept = [np.interp(1000.0, each.age_requests, np.asarray(each.kept_frac)[3]) for each in (reuse, exactly)]
    assert kept[0] == pytest.approx(kept[1], abs=0.02)


# --- sessions ---------------------------------------------------------------------------------------------------------


def talks(n: int = N) -> pa.Table:
    """Sessions of a few turns that grow, between requests of nobody."""
    rng = np.random.default_rng(3)
    session = rng.integers(0, n // 5, n)
    nobody = rng.random(n) < 0.2
    output = rng.integers(20, 300, n)
    prompt, so_far = np.empty(n, int), {}
    for i, who in enumerate(session):
        prompt[i] = rng.integers(50, 800) + (0 if nobody[i] else so_far.get(who, 0))
        if not nobody[i]:
            so_far[who] = prompt[i] + output[i]
    names = [None if none else f"talk-{who}" for who, none in zip(session, nobody)]
    at = 1.7e9 + np.cumsum(rng.exponential(0.5, n)).round(3)
    return pa.table({"timestamp_s": at, "prompt_tokens": prompt, "output_tokens": output, "session_id": names})


@pytest.mark.parametrize("room", [2**30, 2**15])
def test_sessions_are_sampled_whole(monkeypatch, room):
    monkeypatch.setattr(sampling, "MAX_USES", room)
    table = talks()
    prompts, outputs = (table[name].to_numpy().astype(float) for name in ("prompt_tokens", "output_tokens"))
    names = table["session_id"].combine_chunks()
    codes = names.dictionary_encode().indices.fill_null(-1).to_numpy(zero_copy_only=False)
    exact = hit_curve(blocks_of_sessions(codes, prompts, outputs), prompts)
    sampler = SessionSampler(SESSION_BLOCK_TOKENS)
    for start in range(0, N, 3000):
        of = slice(start, start + 3000)
        sampler.add(text_keys(names.slice(start, 3000)), codes[of] >= 0, prompts[of], outputs[of])
    curve = hit_curve_of_sample(sampler.settled())
    assert curve.source == "sessions"
    assert curve.n_blocks == exact.n_blocks
    if room == 2**30:
        assert curve.one_in == 1
        np.testing.assert_allclose(errors(curve, exact), 0.0, atol=1e-9)
    else:
        assert curve.one_in >= 8
        assert np.abs(errors(curve, exact)).max() < 3.0 * curve.standard_error < 0.1


# --- logs -------------------------------------------------------------------------------------------------------------


def log_of(part, kind=lambda i: i) -> pa.Table:
    blocks, prompts, outputs = part
    ends = np.cumsum(blocks.counts)
    ids = [[kind(int(i)) for i in blocks.ids[end - n : end]] for n, end in zip(blocks.counts, ends)]
    at = 1.7e9 + np.arange(len(prompts)) / 8.0
    return pa.table(
        {"timestamp_s": at, "prompt_tokens": prompts.astype(int), "output_tokens": outputs.astype(int), "hash_ids": ids}
    )


@pytest.fixture
def few_kept(monkeypatch, small):
    """Logs are long from 3,000 requests on, and read in pieces of about a thousand."""
    monkeypatch.setattr(limits, "MAX_KEPT_ROWS", 3000)
    monkeypatch.setattr(limits, "PIECE_ROWS", 1000)
    monkeypatch.setattr(limits, "PIECE_BYTES", 2**16)


def test_a_long_log_with_hashes_is_read_by_a_sample(tmp_path, part, exact_part, few_kept, capsys):
    path = tmp_path / "log.parquet"
    pyarrow.parquet.write_table(log_of(part), path)
    found = read_workload_file(path)
    assert isinstance(found, LongTrace)
    assert isinstance(read_workload_file(path, keep=True), Trace)
    assert found.uses is not None
    assert found.understood.columns["hashes of 512 tokens"] == "hash_ids"
    loaded = load(str(path))
    assert np.abs(errors(loaded.prefix, exact_part)).max() < 3.0 * loaded.prefix.standard_error
    assert loaded.workload.reuse is not None
    assert main(["trace", str(path), "--json"]) == 0
    prefix = json.loads(capsys.readouterr().out)["prefix"]
    assert prefix["one_in"] == loaded.prefix.one_in >= 8
    assert prefix["standard_error"] == loaded.prefix.standard_error
    assert main(["trace", str(path)]) == 0
    assert f"Reuse is told from a sample of 1 in {prefix['one_in']} blocks" in " ".join(capsys.readouterr().out.split())


def test_logs_with_many_hashes_are_long_before_they_have_many_rows(tmp_path, part, monkeypatch):
    path = tmp_path / "log.parquet"
    pyarrow.parquet.write_table(log_of(part), path)
    assert isinstance(read_workload_file(path), Trace)
    monkeypatch.setattr(limits, "MAX_KEPT_BLOCKS", 40_000)
    found = read_workload_file(path)
    assert isinstance(found, LongTrace)
    assert found.uses.one_in == 1  # and yet all of them are in the sample


def test_hashes_may_be_texts_and_logs_be_in_parts(tmp_path, part, few_kept):
    table, folder = log_of(part, "block-{}".format), tmp_path / "parts"
    folder.mkdir()
    for k, start in enumerate(range(0, PART, 3000)):
        rows = table.slice(start, 3000).to_pylist()
        (folder / f"{k}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    whole = tmp_path / "log.parquet"
    pyarrow.parquet.write_table(table, whole)
    parts, one = (read_workload_file(place).uses for place in (folder, whole))
    for name in (field.name for field in dataclasses.fields(SampledUses)):
        np.testing.assert_array_equal(getattr(parts, name), getattr(one, name), err_msg=name)


def test_an_hour_of_a_long_log_has_its_own_reuse(tmp_path, part, few_kept, monkeypatch):
    blocks, prompts, outputs = part
    table = log_of((blocks, prompts, outputs))
    at = 1.7e9 + np.sort(np.random.default_rng(1).beta(3, 3, PART)) * 86_400.0
    path = tmp_path / "day.parquet"
    pyarrow.parquet.write_table(table.set_column(0, "timestamp_s", pa.array(at.round(3))), path)
    sampled = load(str(path), at="peak")
    monkeypatch.setattr(limits, "MAX_KEPT_ROWS", 2_000_000)
    kept = load(str(path), at="peak")
    assert sampled.hour == kept.hour
    shares = [
        float(each.workload.weight @ each.workload.reuse.cached_tokens[:, -1])
        / float(each.workload.weight @ each.workload.prompt_tokens)
        for each in (sampled, kept)
    ]
    assert shares[0] == pytest.approx(shares[1], abs=0.03)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda rows: rows[7000]["hash_ids"].extend([1, 2]), "row 7001: "),
        (lambda rows: rows[7000].update(hash_ids=[None] * len(rows[7000]["hash_ids"])), "a block hash is null"),
        (lambda rows: [row["hash_ids"].reverse() for row in rows[6000:]], "was seen after another one before"),
    ],
)
def test_hashes_that_cannot_be_are_refused_however_late(tmp_path, part, few_kept, change, says):
    rows = log_of(part).to_pylist()
    change(rows)
    path = tmp_path / "log.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(BadInput, match=says):
        read_workload_file(path)


def test_sessions_of_long_logs_are_sampled(tmp_path, few_kept, monkeypatch):
    path = tmp_path / "talks.parquet"
    pyarrow.parquet.write_table(talks(PART), path)
    found = load(str(path)).prefix
    monkeypatch.setattr(limits, "MAX_KEPT_ROWS", 2_000_000)
    exact = load(str(path)).prefix
    assert (found.source, exact.one_in) == ("sessions", 1)
    assert found.one_in >= 8
    assert np.abs(errors(found, exact)).max() < 3.0 * found.standard_error


def test_logs_that_tell_of_no_reuse_are_read_without(tmp_path, part, few_kept):
    table = log_of(part)
    nothing, late = pa.array([[]] * PART, pa.list_(pa.int64())), table["hash_ids"].to_pylist()
    for k, hashes in enumerate((nothing, pa.array([None] * PART, pa.list_(pa.int64())), [[]] * 5000 + late[5000:])):
        path = tmp_path / f"{k}.parquet"
        short = np.minimum(table["prompt_tokens"].to_numpy(), 500)
        columns = [table["timestamp_s"], short if k < 2 else table["prompt_tokens"], table["output_tokens"], hashes]
        pyarrow.parquet.write_table(pa.table(columns, names=table.column_names), path)
        found = read_workload_file(path)
        assert isinstance(found, LongTrace)
        assert found.uses is None
        assert any("not read" in text for text in found.understood.warnings) == (k == 2)


def test_texts_have_keys_of_their_own():
    rng = np.random.default_rng(0)
    texts = [f"{i:x}" * int(rng.integers(1, 4)) for i in rng.integers(0, 1000, 5000)] + ["", None, "é", "ab", "ba"]
    keys = text_keys(pa.array(texts))
    assert len(set(keys.tolist())) == len({text or "" for text in texts})
    np.testing.assert_array_equal(text_keys(pa.array(texts).slice(77, 99)), keys[77:176])
