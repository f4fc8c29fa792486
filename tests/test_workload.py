"""Atoms keep what the metrics are made of: mass and means exactly, spikes as they are, variance nearly."""

import json

import numpy as np
import pytest

from fleetopt_jax.catalog.workloads import DATA, bundled, cdf_knots, load, load_workload
from fleetopt_jax.core.errors import BadField, BadInput
from fleetopt_jax.workload.atoms import make_workload, mean_tokens, split_total, total_tokens, with_rate
from fleetopt_jax.workload.cdf import MAX_CDF_ATOMS, cdf_workload, check_cdf
from fleetopt_jax.workload.compress import compress


def trace(n: int = 20_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Log-normal prompts and outputs with a spike of 4 % of the prompts at 7,436 tokens."""
    rng = np.random.default_rng(seed)
    prompt = np.maximum(1, np.round(np.exp(rng.normal(6.5, 1.2, n))))
    prompt[rng.random(n) < 0.04] = 7436
    output = np.maximum(1, np.round(np.exp(rng.normal(4.5, 1.0, n))))
    output[prompt == 7436] = 13
    return prompt, output


def moments(prompt, output, weight) -> tuple[np.ndarray, np.ndarray]:
    """(mean, variance) of prompt, output and total."""
    values = np.stack([prompt, output, prompt + output])
    mean = values @ weight / np.sum(weight)
    return mean, (values - mean[:, None]) ** 2 @ weight / np.sum(weight)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("max_atoms", [1, 7, 300, 2000])
def test_compression_keeps_mass_and_means_exactly(max_atoms, weighted):
    prompt, output = trace()
    weight = np.random.default_rng(1).uniform(0.1, 3.0, len(prompt)) if weighted else np.ones(len(prompt))
    atoms = compress(prompt, output, weight, max_atoms)
    assert len(atoms[2]) == max_atoms
    assert np.sum(atoms[2]) == pytest.approx(np.sum(weight), rel=1e-12)
    np.testing.assert_allclose(moments(*atoms)[0], moments(prompt, output, weight)[0], rtol=1e-12)


def test_compression_loses_little_variance_and_less_with_more_atoms():
    prompt, output = trace()
    exact = moments(prompt, output, np.ones(len(prompt)))[1]
    lost = np.array([1 - moments(*compress(prompt, output, None, n))[1] / exact for n in (50, 300, 2000)])
    assert np.all(lost >= 0)  # a mean of a cell never varies more than the cell
    assert np.all(np.diff(lost, axis=0) < 0)
    # Cells of one dimension shrink as 1/n and their variance as 1/n^2; two coordinates and a long tail leave this.
    assert np.all(lost[2] < [1e-3, 5e-3, 1e-3])


def test_few_distinct_requests_are_kept_as_they_are():
    rng = np.random.default_rng(2)
    pairs = rng.integers(1, 9, (5000, 2))
    prompt, output, weight = compress(pairs[:, 0], pairs[:, 1], None, 64)
    distinct, count = np.unique(pairs, axis=0, return_counts=True)
    np.testing.assert_array_equal(np.stack([prompt, output], axis=1), distinct)
    np.testing.assert_array_equal(weight, count)


def test_a_spike_is_not_smeared():
    prompt, output = trace()
    mass = np.sum(prompt == 7436)
    coarse = np.stack(compress(prompt, output, None, 300))
    heaviest = coarse[:, np.argmax(coarse[2])]
    assert heaviest[2] >= mass  # whole, with at most some neighbours
    assert np.all(np.abs(heaviest[:2] - [7436, 13]) < [7.4, 0.7])  # 0.1 % of the prompt, 5 % of the output
    fine = np.stack(compress(prompt, output, None, 2000))
    np.testing.assert_array_equal(fine[:, np.argmax(fine[2])], [7436, 13, mass])


def test_the_order_of_the_requests_does_not_matter():
    prompt, output = trace()
    order = np.random.default_rng(3).permutation(len(prompt))
    for one, other in zip(
        compress(prompt, output, None, 300), compress(prompt[order], output[order], None, 300), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_compression_of_weighted_atoms_stays_within_the_longest_request():
    """A cell of one request is that request, to the last digit: a workload of the atoms must accept its longest."""
    rng = np.random.default_rng(4)
    for _ in range(40):
        total = rng.integers(2, 60_000, 250).astype(float)
        prompt, output = (np.asarray(x) for x in split_total(total))
        atoms = compress(prompt, output, rng.random(250), 200)
        assert np.max(atoms[0] + atoms[1]) <= np.max(total)


def test_requests_of_no_weight_do_not_stop_compression():
    prompt, output = trace(700)
    weight = np.where(np.arange(700) % 3 == 0, 0.0, np.random.default_rng(6).random(700))
    atoms = compress(prompt, output, weight, 500)
    np.testing.assert_allclose(moments(*atoms)[0], moments(prompt, output, weight)[0], rtol=1e-12)


def test_the_mass_of_a_length_is_the_difference_of_the_cdf():
    rng = np.random.default_rng(5)
    last = 3000
    whole = np.arange(last + 1)
    for _ in range(100):  # of one shape: every length has mass
        n = rng.integers(1, 12)
        tokens = [*np.sort(rng.choice(np.arange(1, last), n, replace=False)).tolist(), last]
        fractions = [*np.sort(rng.random(n)).tolist(), 1.0]
        knots = list(zip(tokens, fractions, strict=True))
        check_cdf("test", knots)
        workload = cdf_workload(knots, arrival_rate_per_s=2.0)
        below = np.interp(whole, [0, *tokens], [0, *fractions])
        total = np.asarray(total_tokens(workload))
        np.testing.assert_array_equal(total, whole[1:])
        np.testing.assert_allclose(workload.weight, np.diff(below), atol=1e-15)
        # E[L] is the sum of P(L > l): needs no masses at all.
        assert np.sum(workload.weight * total) == pytest.approx(np.sum(1 - below[:-1]), rel=1e-12)
        np.testing.assert_array_equal(workload.prompt_tokens, np.maximum(1, np.floor(0.8 * total)))
        assert workload.longest_tokens == last


def test_a_long_cdf_keeps_its_mean_in_a_bounded_number_of_atoms():
    for last in (MAX_CDF_ATOMS + 1, 200_001, 1_000_000):
        knots = [(1000, 0.5), (30_000, 0.9), (last - 7, 0.97), (last, 1.0)]
        workload = cdf_workload(knots, arrival_rate_per_s=1.0)
        total, weight = np.asarray(total_tokens(workload)), np.asarray(workload.weight)
        below = np.interp(np.arange(last), *zip((0, 0), *knots, strict=True))
        assert len(weight) <= MAX_CDF_ATOMS
        assert np.sum(weight * total) == pytest.approx(np.sum(1 - below), rel=1e-12)
        assert np.all(np.diff(total) > 0)
        assert workload.longest_tokens == last


def test_lengths_without_mass_are_no_atoms_but_the_last_knot_is_promised():
    workload = cdf_workload([(10, 0.5), (90, 0.5), (100, 1.0), (500, 1.0)], arrival_rate_per_s=1.0)
    np.testing.assert_array_equal(total_tokens(workload), [*range(1, 11), *range(91, 101)])
    assert workload.longest_tokens == 500


@pytest.mark.parametrize(
    ("knots", "says"),
    [
        ([], "empty"),
        ([(200, 0.5), (100, 1.0)], "tokens fall from 200 to 100"),
        ([(100, 0.5), (100, 1.0)], "100"),
        ([(100, 0.8), (200, 0.5), (300, 1.0)], "fraction falls from 0.8 to 0.5"),
        ([(100, 0.5), (200, 1.5)], "1.5 is above 1"),
        ([(100, 50.0), (200, 100.0)], "percent"),
        ([(100, 0.5), (200, 0.99)], "ends at fraction 0.99"),
        ([(0, 0.5), (200, 1.0)], "tokens = 0"),
        ([(10.5, 0.5), (200, 1.0)], "tokens = 10.5"),
        ([(100, -0.5), (200, 1.0)], "fraction = -0.5"),
        ([(100, float("nan")), (200, 1.0)], "fraction = nan"),
        ([(100, 0.5), (float("inf"), 1.0)], "tokens = inf"),
        ([(100, 0.5), (10**12, 1.0)], "1000000000000"),
    ],
)
def test_what_is_no_cdf_is_refused(knots, says):
    with pytest.raises(BadInput, match=says) as refusal:
        check_cdf("lengths.json", knots)
    assert str(refusal.value).startswith("lengths.json")
    assert "\n" not in str(refusal.value)


def test_a_workload_is_sorted_and_weighs_one():
    prompt, output = trace(3000)
    weight = np.random.default_rng(5).uniform(0, 10, 3000)
    workload = make_workload(prompt, output, weight, arrival_rate_per_s=3.0, arrival_scv=2.5)
    total = np.asarray(total_tokens(workload))
    assert np.all(np.diff(total) >= 0)
    assert np.sum(workload.weight) == pytest.approx(1.0, abs=1e-14)
    np.testing.assert_allclose(mean_tokens(workload), moments(prompt, output, weight)[0][:2], rtol=1e-12)
    assert workload.longest_tokens == np.max(prompt + output)
    # Sorting keeps each request's prompt, output and weight together.
    of_request = np.sort(prompt * 1e6 + output + weight / np.sum(weight))
    of_atom = np.sort(np.asarray(workload.prompt_tokens * 1e6 + workload.output_tokens + workload.weight))
    np.testing.assert_allclose(of_atom, of_request, rtol=1e-15)
    faster = with_rate(workload, 7.0)
    assert faster.arrival_rate_per_s == 7.0
    np.testing.assert_array_equal(faster.weight, workload.weight)
    np.testing.assert_allclose(make_workload([5, 3], [1, 1], arrival_rate_per_s=1.0).weight, 0.5)


GOOD = dict(prompt_tokens=[30.0, 10.0], output_tokens=[1.0, 2.0], weight=[1.0, 3.0], arrival_rate_per_s=1.0)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (dict(prompt_tokens=[0.0, 10.0]), r"prompt_tokens.*got \[?0"),
        (dict(prompt_tokens=[-3.0, 10.0]), r"prompt_tokens.*-3"),
        (dict(prompt_tokens=[30.0, float("inf")]), r"prompt_tokens.*inf"),
        (dict(prompt_tokens=[30.0, float("nan")]), r"prompt_tokens.*nan"),
        (dict(output_tokens=[1.0, -2.0]), r"output_tokens.*-2"),
        (dict(output_tokens=[1.0]), r"shapes"),
        (dict(prompt_tokens=[], output_tokens=[], weight=[]), r"non-empty"),
        (dict(weight=[1.0, -1.0]), r"weights"),
        (dict(weight=[0.0, 0.0]), r"weights"),
        (dict(weight=[1.0, float("nan")]), r"weights"),
        (dict(arrival_rate_per_s=0.0), r"arrival_rate_per_s, got 0"),
        (dict(arrival_rate_per_s=-200.0), r"arrival_rate_per_s, got -200"),
        (dict(arrival_rate_per_s=float("inf")), r"arrival_rate_per_s, got inf"),
        (dict(arrival_scv=-1.0), r"arrival_scv >= 0, got -1"),
        (dict(longest_tokens=30.0), r"longest_tokens.*\b30"),
        (dict(longest_tokens=float("nan")), r"longest_tokens.*nan"),
    ],
)
def test_impossible_workloads_are_refused_by_name_and_value(bad, says):
    make_workload(**GOOD)
    with pytest.raises(ValueError, match=says):
        make_workload(**{**GOOD, **bad})


def test_bundled_workloads_load_and_are_the_traces_they_say():
    about = bundled()
    assert {"azure-conv", "azure-code", "azure-cdf", "lmsys-cdf", "agent-cdf"} <= set(about)
    for name, facts in about.items():
        loaded = load(name)
        workload, summary = loaded.workload, loaded.summary
        assert np.sum(workload.weight) == pytest.approx(1.0, abs=1e-12)
        assert np.min(workload.weight) > 0
        assert workload.arrival_rate_per_s == 1000.0
        assert workload.longest_tokens == summary.longest_tokens
        if facts["kind"] == "trace":
            assert len(workload.weight) == facts["n_atoms"]
            # The means of the requests themselves, taken before compression: 1e-9 is the rounding of their sums.
            means = [summary.mean_prompt_tokens, summary.mean_output_tokens]
            np.testing.assert_allclose(mean_tokens(workload), means, rtol=1e-9)
            assert max(facts["compression_error"].values()) < 1e-3
            assert workload.arrival_scv == summary.arrival_scv
        else:
            # An integral of 1 - F by parts over the knots, exact for a piecewise linear F on whole lengths.
            tokens, fractions = (np.array([0, *x]) for x in zip(*cdf_knots(name), strict=True))
            trapezia = np.sum(np.diff(tokens) * (1 - (fractions[1:] + fractions[:-1]) / 2))
            assert sum(mean_tokens(workload)) == pytest.approx(trapezia + 0.5, rel=1e-12)


def test_a_rate_is_the_callers_or_refused():
    assert load_workload("azure-conv", rate_per_s=3.5).arrival_rate_per_s == 3.5
    for rate in (0.0, -200.0, float("nan"), float("inf")):
        with pytest.raises(BadField, match=f"{rate}") as refused:
            load("azure-conv", rate_per_s=rate)
        assert refused.value.field == "arrival_rate_per_s"


def test_an_unknown_workload_is_refused_with_the_nearest_name():
    with pytest.raises(BadInput, match=r"'azure-conf'.*did you mean azure-conv"):
        load("azure-conf")


def test_each_bundled_workload_says_where_it_is_from():
    listed = {path.name.split(".")[0] for path in DATA.iterdir()} - {
        "workloads",
        "engines",
        "hosts",
        "operators",
        "drafts",
        "rate_profiles",
    }
    assert listed == set(json.loads((DATA / "workloads.json").read_text()))
    assert all(facts["source"] and facts["licence"] and facts["title"] for facts in bundled().values())
