"""Sticky sessions: which conversations there are, the pools they stay in, what their caches keep, and every search."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fleetopt_jax as fo
from fleetopt_jax._optimize.derivatives import _scaled
from fleetopt_jax._optimize.plan import require_plan
from fleetopt_jax._optimize.problem import make_problem
from fleetopt_jax._optimize.search import optimize
from fleetopt_jax._optimize.shifted import _as_long
from fleetopt_jax._simulate import replay_requests, simulate
from fleetopt_jax._simulate.requests import draw_requests
from fleetopt_jax._simulate.routing import route_requests
from fleetopt_jax.catalog.spec import MEASURED_SERVING, EngineSpec
from fleetopt_jax.catalog.workloads import load
from fleetopt_jax.cli.main import main
from fleetopt_jax.core.errors import BadField, BadInput
from fleetopt_jax.fleet.assumptions import PHYSICAL, PUBLISHED, PrefixAffinity, WorkingSetCache
from fleetopt_jax.fleet.choices.routing_key import StickySessions
from fleetopt_jax.fleet.choices.tail import MeanPrefillTail
from fleetopt_jax.fleet.evaluate import evaluate
from fleetopt_jax.fleet.fleet import make_slo
from fleetopt_jax.fleet.traffic import route
from fleetopt_jax.workload.atoms import with_rate
from fleetopt_jax.workload.blocks import Blocks
from fleetopt_jax.workload.compress import compress_with_members
from fleetopt_jax.workload.conversations import first_turns, sticky_tokens
from fleetopt_jax.workload.readers import Trace

BLOCK, HEADROOM = 512, 3.0
SPEC = EngineSpec("h100", own_fit=False, serving=MEASURED_SERVING)
CACHED = replace(PHYSICAL, prefix_cache=WorkingSetCache(), dispatch=PrefixAffinity(), tail=MeanPrefillTail())


class Stream:
    """Conversations that grow, all of them after one system prompt, and what is said of each request."""

    def __init__(self, n: int = 1200, seed: int = 3):
        rng = np.random.default_rng(seed)
        self.began, chains, fresh, open_ones = [], [], 1, []
        for i in range(n):
            if open_ones and rng.random() < 0.7:
                talk = open_ones[rng.integers(len(open_ones))]
            else:
                talk = (i, [0])
                open_ones = [*open_ones, talk][-40:]
            more = 1 + int(rng.geometric(0.4))
            talk[1].extend(range(fresh, fresh + more))
            fresh += more
            self.began.append(talk[0])
            chains.append(list(talk[1]))
        self.chains = chains
        self.prompts = np.array([BLOCK * len(chain) - int(rng.integers(BLOCK // 2)) for chain in chains])
        self.outputs = rng.integers(50, 400, n)
        self.arrival_s = np.cumsum(rng.exponential(0.05, n))
        counts = np.array([len(chain) for chain in chains])
        self.blocks = Blocks(np.concatenate([np.array(chain) for chain in chains]), counts, BLOCK)

    @property
    def longest(self) -> int:
        return int((self.prompts + self.outputs).max())

    def write(self, file) -> str:
        rows = zip(self.prompts, self.outputs, self.arrival_s, self.chains, strict=True)
        lines = [
            json.dumps({"input_length": int(p), "output_length": int(o), "timestamp": 1000 * t, "hash_ids": chain})
            for p, o, t, chain in rows
        ]
        file.write_text("\n".join(lines))
        return str(file)


@pytest.fixture(scope="module")
def stream() -> Stream:
    return Stream()


@pytest.fixture(scope="module")
def file(stream, tmp_path_factory) -> str:
    return stream.write(tmp_path_factory.mktemp("sticky") / "talks.jsonl")


@pytest.fixture(scope="module")
def kept(file):
    return load(file, sticky=HEADROOM).workload


# --- conversations ----------------------------------------------------------------------------------------------------


def test_a_request_goes_on_with_whoever_it_begins_as(stream):
    np.testing.assert_array_equal(first_turns(stream.blocks, stream.prompts), stream.began)


def test_a_common_system_prompt_makes_no_conversation():
    """Two requests begin as a third one does, but for its own two blocks; a fourth goes on with the second."""
    ids = np.array([0, 1, 2, 0, 3, 0, 4, 0, 3, 5])
    blocks, prompts = Blocks(ids, np.array([3, 2, 2, 3]), 10), np.array([30, 20, 20, 30])
    assert first_turns(blocks, prompts).tolist() == [0, 1, 2, 1]


def test_what_is_routed_by_never_breaks_a_window_and_is_the_length_where_nothing_is_kept(stream):
    total = stream.prompts + stream.outputs
    for headroom in (1.0, HEADROOM, 1e3):
        routed = sticky_tokens(stream.blocks, stream.prompts, stream.outputs, headroom, stream.longest)
        assert np.all(routed >= total) and np.all(routed <= stream.longest)
        begun = np.asarray(stream.began) == np.arange(len(total))
        np.testing.assert_array_equal(routed[begun], np.minimum(headroom * total, stream.longest)[begun])
    plain = sticky_tokens(stream.blocks, stream.prompts, stream.outputs, 1.0, stream.longest)
    assert np.mean(plain == total) > 0.95  # shorter answers make some turns shorter than the first


# --- lanes ------------------------------------------------------------------------------------------------------------


def two_pools(workload, window: float, instances=(4, 4)):
    engine, windows = fo.build(SPEC), [window, float(workload.longest_tokens)]
    return fo.make_fleet([engine] * 2, window_tokens=windows, n_instances=instances)


def assumed(headroom: float = HEADROOM, base=CACHED):
    return replace(base, route_by=StickySessions(headroom))


def hit_shares(workload, assumptions, window: float) -> np.ndarray:
    """What pools whose caches forget nothing find of their prompts, by the law."""
    fleet = two_pools(workload, window)
    traffic = route(fleet, workload, assumptions)
    best = [assumptions.prefix_cache.at_best(fleet.engines[k], _lane(traffic, k)) for k in range(2)]
    asked = np.asarray(traffic.demand.prefill)
    found = [float(asked[k] - each.demand.prefill) / float(asked[k]) for k, each in enumerate(best)]
    return np.array([*found, float(traffic.traffic_frac[0])])


def _lane(traffic, k: int):
    return jax.tree.map(lambda x: x[k], traffic)


def naive(stream: Stream, routed: np.ndarray, window: float) -> np.ndarray:
    """The same by plain sets, one of each pool."""
    caches, found, asked = [set(), set()], np.zeros(2), np.zeros(2)
    for chain, prompt, length in zip(stream.chains, stream.prompts, routed, strict=True):
        pool = int(length > window)
        known = 0
        for k, block in enumerate(chain):
            if block not in caches[pool]:
                break
            known = min((k + 1) * BLOCK, prompt - 1)
        found[pool] += known
        asked[pool] += prompt
        caches[pool].update(chain)
    return np.array([*(found / asked), np.mean(routed <= window)])


@pytest.mark.parametrize("share", [0.3, 0.6, 0.85])
def test_what_caches_find_of_conversations_that_stay(stream, file, kept, share):
    """And it is more than where each turn goes by its own length, of as many requests in the short pool. Nearly every
    conversation grows across the threshold here, and of its blocks all uses but the last are on the other side, which
    the law takes to be by chance (`fleet/lane_reuse.py`): up to 7 points of what a pool finds."""
    routed = sticky_tokens(stream.blocks, stream.prompts, stream.outputs, HEADROOM, stream.longest)
    total = stream.prompts + stream.outputs
    window, by_length = np.quantile(routed, share), np.quantile(total, share)
    law, simulated = hit_shares(kept, assumed(), window), naive(stream, routed, window)
    assert np.all(np.abs(law - simulated) <= (0.07, 0.07, 1e-3)), (law, simulated)
    assert simulated[0] > naive(stream, total, by_length)[0]


def test_every_key_but_this_one_reads_the_same_workload_as_before(file, kept):
    plain = load(file).workload
    fleet = two_pools(kept, 4000.0)
    for assumptions in (PUBLISHED, PHYSICAL):
        a, b = (np.asarray(route(fleet, each, assumptions).demand.prefill) for each in (plain, kept))
        np.testing.assert_allclose(a, b, rtol=1e-9)
    with pytest.raises(ValueError, match="read with sticky sessions"):
        route(fleet, plain, assumed())


# --- searches ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_exact_is_the_best_of_all_thresholds_and_the_others_find_it(stream):
    """Of few atoms, so that grid tries every length there is."""
    lengths = stream.prompts, stream.outputs
    routed = sticky_tokens(stream.blocks, *lengths, HEADROOM, stream.longest)
    atoms, atom = compress_with_members(*lengths, max_atoms=32, routed_tokens=routed)
    routed = np.bincount(atom, routed) / np.bincount(atom)
    few = fo.make_workload(*atoms, arrival_rate_per_s=20.0, longest_tokens=stream.longest, routed_tokens=routed)
    base = replace(PHYSICAL, tail=MeanPrefillTail(), route_by=StickySessions(HEADROOM))
    problem = make_problem(few, [SPEC], n_pools=2, slo=make_slo(ttft_p99_s=1.0), assumptions=base, gamma=1.0)
    exact, grid, relaxed = (require_plan(optimize(problem, method)) for method in ("exact", "grid", "gradient"))
    assert exact.status == "optimal"
    assert float(exact.metrics.tok_per_j) >= float(grid.metrics.tok_per_j) * (1 - 1e-9)
    assert float(grid.metrics.tok_per_j) >= 0.999 * float(exact.metrics.tok_per_j)  # exact tries whole blocks as well
    assert float(relaxed.metrics.tok_per_j) >= 0.98 * float(exact.metrics.tok_per_j)
    again = evaluate(exact.fleet, few, base)
    assert float(again.tok_per_j) == pytest.approx(float(exact.metrics.tok_per_j), rel=1e-9)


# --- the simulator ----------------------------------------------------------------------------------------------------


def test_the_simulator_sends_requests_where_the_law_does(stream, kept):
    window = float(np.quantile(np.asarray(kept.routed_tokens), 0.5))
    fleet = two_pools(kept, window)
    law = float(route(fleet, kept, assumed()).traffic_frac[0])
    trace = Trace(stream.prompts, stream.outputs, stream.arrival_s, blocks=stream.blocks)
    replayed = replay_requests(trace, 20.0, len(stream.prompts), 1, sticky=HEADROOM)
    drawn = draw_requests(kept, assumed(), 4000, 1, seed=1)
    for requests, error in ((replayed, 1e-9), (drawn, 2e-3)):
        pool = route_requests(requests, fleet, kept, assumed()).pool
        assert np.mean(pool == 0) == pytest.approx(law, abs=error)
    with pytest.raises(ValueError, match="read with sticky sessions"):
        route_requests(replace(replayed, routed_tokens=None), fleet, kept, assumed())


@pytest.mark.slow
def test_simulated_caches_find_what_the_law_says(stream, kept):
    window = float(np.quantile(np.asarray(kept.routed_tokens), 0.6))
    fleet = two_pools(kept, window, (2, 3))
    trace = Trace(stream.prompts, stream.outputs, stream.arrival_s, blocks=stream.blocks)
    requests = replay_requests(trace, 8.0, len(stream.prompts), 1, sticky=HEADROOM)
    found = simulate(fleet, with_rate(kept, 8.0), assumed(), requests=requests)
    # Of the fleet; of one pool the law can be 7 points off, as above.
    assert found.metrics["prefix_hit_frac"].mean == pytest.approx(found.analytic["prefix_hit_frac"], abs=0.05)


# --- at the door ------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_line(file, tmp_path):
    with pytest.raises(BadField, match="is bundled without its requests"):
        load("mooncake-conv", sticky=2.0)
    lengths = tmp_path / "lengths.csv"
    lengths.write_text("prompt_tokens,completion_tokens,arrival_s\n500,20,0\n700,30,1\n")
    with pytest.raises(BadField, match="neither block hashes nor sessions"):
        load(str(lengths), sticky=2.0)
    with pytest.raises(BadField, match="1 or more"):
        StickySessions(0.5)
    with pytest.raises(ValueError, match="routed_tokens"):
        fo.make_workload([500.0], [20.0], arrival_rate_per_s=1.0, routed_tokens=[400.0])


def test_a_plan_keeps_its_headroom(file, tmp_path, capsys):
    """It is evaluated as it was made, says how it routes, and no router is written for it."""
    out = tmp_path / "plan.json"
    asked = ["--workload", file, "--rate", "20", "--at", "mean", "--assume", "published", "--quiet"]
    assert main(["optimize", *asked, "--sticky", "2", "--ttft-p99-ms", "4000", "--out", str(out)]) == 0
    assert "2 times its first total length" in capsys.readouterr().out
    plan = json.loads(out.read_text())
    assert plan["route_by"] == {"name": "sticky_sessions", "headroom": 2.0}
    assert main(["evaluate", str(out), "--json", "--quiet"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["metrics"]["tok_per_j"] == pytest.approx(plan["metrics"]["tok_per_j"], rel=1e-9)
    assert main(["export", str(out), "--to", "vllm", "--out", str(tmp_path / "fleet.sh")]) == 2
    assert "keeps conversations" in capsys.readouterr().err
    assert main(["optimize", *asked, "--workload", "azure-conv", "--sticky", "2"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        main(["optimize", *asked, "--sticky", "0.5"])
    assert "need a number from 1 to 1000" in capsys.readouterr().err


def test_a_plan_with_an_unknown_key_is_refused(file, tmp_path):
    out = tmp_path / "plan.json"
    assert (
        main(
            [
                "optimize",
                "--workload",
                file,
                "--at",
                "mean",
                "--assume",
                "published",
                "--sticky",
                "2",
                "--ttft-p99-ms",
                "4000",
                "--quiet",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    plan = json.loads(out.read_text())
    out.write_text(json.dumps(plan | {"route_by": {"name": "sticky_sessions", "headroom": 0.5}}))
    with pytest.raises(BadInput, match="headroom"):
        fo.load_plan(str(out))


def test_longer_requests_are_routed_as_much_longer(kept):
    """In the shifts of `compare` and in elasticities; the other searches say that they do not know."""
    longer = _as_long(kept, 1.5, 1.5)
    assert longer.routed_tokens is not None
    total = np.asarray(longer.prompt_tokens + longer.output_tokens)
    grown = np.sort(1.5 * np.asarray(kept.routed_tokens))
    np.testing.assert_allclose(np.sort(np.asarray(longer.routed_tokens)), grown.clip(max=total.max()), rtol=1e-9)
    assert np.all(np.asarray(longer.routed_tokens) >= total * (1 - 1e-12))
    scaled = _scaled(kept, jnp.asarray(1.5), jnp.asarray(1.5))
    np.testing.assert_allclose(scaled.routed_tokens, 1.5 * np.asarray(kept.routed_tokens), rtol=1e-12)
    same = _as_long(kept, 1.0, 1.0)
    assert same is kept
