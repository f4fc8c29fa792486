"""The simulated prefix cache against an LRU cache in plain Python, which shares no line with it; what it must find."""

import heapq
import re
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from jax.test_util import check_grads

from fleetopt_jax._simulate import replay_requests, simulate, verify
from fleetopt_jax._simulate.dispatch import Balancer
from fleetopt_jax._simulate.kept import HOMELESS, homes_of, prompt_blocks
from fleetopt_jax._simulate.pool import Pool, PoolRequests, PoolRun, Room, _segment, run_pool
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.fleet.assumptions import DISPATCHES, PHYSICAL, ConstantHits, NoPrefixCache, WorkingSetCache
from fleetopt_jax.fleet.choices.dispatch import BOUND, BoundedHashing, Queues, home_frac
from fleetopt_jax.fleet.choices.tail import MeanPrefillTail
from fleetopt_jax.fleet.fleet import make_fleet
from fleetopt_jax.laws.prefix_cache import HostCache, make_host_cache
from fleetopt_jax.workload.atoms import make_workload
from fleetopt_jax.workload.blocks import Blocks, uses_of
from fleetopt_jax.workload.readers import Trace
from fleetopt_jax.workload.reuse import reuse_of
from tests.test_simulate import engine_of, iterated, scheduler_of
from tests.test_verify import CHAT, FEW, SLO, proposing, toy

BLOCK = 8  # tokens of a hash
N_ROWS, N_COLUMNS = 4, 40  # one shape for all small runs: they share one compilation
FOREVER_S = 1e9
LAW = dict(base_s=0.01, per_seq_s=1e-4, per_token_s=1e-5, tau1=1e-4, tau2=1e-6)
EVERYTHING = 1e6  # KV blocks that hold all there is
IN_TURN = Balancer(DISPATCHES["round_robin"])
NO_HOST = make_host_cache()


@dataclass
class Stream:
    """Requests of one instance or more, whose prompts begin like others."""

    arrival_s: list[float] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    blocks: list[list[int]] = field(default_factory=list)

    @property
    def as_blocks(self) -> Blocks:
        return Blocks(np.concatenate([np.array(x) for x in self.blocks]), np.array([*map(len, self.blocks)]), BLOCK)


def stream(seed: int, *, gap_s: float = 0.02, n: int = N_COLUMNS, longest: int = 9) -> Stream:
    """Turns of conversations, half of which begin with one of two system prompts; ends are no whole blocks."""
    rng, found, fresh = np.random.default_rng(seed), Stream(), 2
    known: list[list[int]] = [[0], [1]]
    clock_s = 0.0
    for _ in range(n):
        begun = known[rng.integers(len(known))] if rng.random() < 0.7 else []
        begun = begun[: longest - 1]
        more = int(rng.integers(1, 1 + min(4, longest - len(begun))))
        blocks = [*begun, *range(fresh, fresh + more)]
        fresh += more
        clock_s += rng.exponential(gap_s)
        found.arrival_s.append(clock_s)
        whole = rng.random() < 0.3
        found.prompt.append(BLOCK * len(blocks) - (0 if whole else int(rng.integers(1, BLOCK))))
        found.output.append(int(rng.integers(1, 20)))
        found.blocks.append(blocks)
        known.append(blocks if whole else blocks[:-1] or blocks)
    return found


def pool_requests(streams: list[Stream]) -> PoolRequests:
    arrival_s, prompt, output = (
        np.array([getattr(each, x) for each in streams]) for x in ("arrival_s", "prompt", "output")
    )
    return PoolRequests(
        arrival_s, prompt, output, blocks=prompt_blocks([x.as_blocks for x in streams], list(prompt), list(output))
    )


def run_streams(streams: list[Stream], *, n_blocks: float, budget: float, host: HostCache = NO_HOST) -> PoolRun:
    engine = replace(engine_of(**LAW, budget=budget), host_cache=host)
    pool = Pool(engine, scheduler_of(N_ROWS, n_blocks=n_blocks), 1)
    return run_pool(pool, pool_requests(streams), np.full(N_ROWS, FOREVER_S), IN_TURN, n_slots=8)


# --- the same rules in plain Python -----------------------------------------------------------------------------------


class Lru:
    """Blocks in use, counted, and those that nobody uses, the one given up longest ago first; and so those that hosts
    have room for after them."""

    def __init__(self, sizes: dict[int, int], host_tokens: float):
        self.sizes, self.uses, self.kept = sizes, Counter(), OrderedDict()
        self.on_hosts, self.host_tokens = OrderedDict(), host_tokens

    def tokens_of(self, blocks) -> int:
        return sum(self.sizes[b] for b in blocks)

    @property
    def shared(self) -> int:
        return sum((c - 1) * self.sizes[b] for b, c in self.uses.items() if c > 1)

    def shared_by(self, blocks: list[int]) -> int:
        return self.tokens_of(b for b in blocks if self.uses[b])

    def admit(self, blocks: list[int]) -> tuple[int, int]:
        """Tokens of the first blocks that are there, and of those on hosts; all are in use then."""
        found = [0, 0]
        for b in blocks:
            here = self.uses[b] or b in self.kept
            if not (here or b in self.on_hosts):
                break
            found[0 if here else 1] += self.sizes[b]
        for b in blocks:
            self.kept.pop(b, None)
            self.on_hosts.pop(b, None)
            self.uses[b] += 1
        return found[0], found[1]

    def give_up(self, blocks: list[int], done: float) -> None:
        ends = np.cumsum([self.sizes[b] for b in blocks])
        for b, end in reversed(list(zip(blocks, ends))):
            self.uses[b] -= 1
            if not self.uses[b] and end <= done:
                self.kept[b] = None

    def evict(self, room: float) -> None:
        while self.tokens_of(self.kept) > room:
            self.on_hosts[self.kept.popitem(last=False)[0]] = None
        while self.tokens_of(self.on_hosts) > self.host_tokens:
            self.on_hosts.popitem(last=False)


def naive(found: Stream, *, n_blocks: float, budget: int, slots: int, host: HostCache = NO_HOST):
    """One instance with a prefix cache, request by request: requests, preemptions, and the most that was kept."""

    def used() -> int:
        return sum(-(-r["context"] // 16) for r in running) - cache.shared // 16

    def fits(r: dict) -> bool:
        shared = cache.shared + cache.shared_by(r["blocks"])
        alone = sum(-(-x["context"] // 16) for x in running) + -(-(r["prompt"] + 1) // 16)
        return alone - shared // 16 <= n_blocks

    columns = zip(found.arrival_s, found.prompt, found.output, found.blocks)
    requests: list[dict[str, Any]] = [
        dict(arrival=a, prompt=p, left=o, blocks=b, times=[], admit=None) for a, p, o, b in columns
    ]
    sizes: dict[int, int] = {}
    for r in requests:
        for d, b in enumerate(r["blocks"]):
            sizes[b] = max(sizes.get(b, 0), min(BLOCK, r["prompt"] - d * BLOCK))
    cache, load_s = Lru(sizes, float(host.tokens)), 1.0 / float(host.tokens_per_s)
    waiting, running, clock, n_preempted, loading_s = deque(requests), [], 0.0, 0, 0.0
    while waiting or running:
        decoding = [r for r in running if r["done"] == r["prompt"]]
        room, chunks = max(budget - len(decoding), 1), []
        for r in running:
            if r["done"] < r["prompt"]:
                chunks.append((r, min(room, r["prompt"] - r["done"])))
                room -= chunks[-1][1]
        while waiting and waiting[0]["arrival"] <= clock and len(running) < slots and room > 0 and fits(waiting[0]):
            r = waiting.popleft()
            here, there = cache.admit(r["blocks"])
            hit = min(here + there, r["prompt"] - 1)
            loading_s += there * load_s
            if r["admit"] is None:
                spared = min(here, r["prompt"] - 1)
                spared += round((1.0 - load_s / LAW["tau1"]) * (hit - spared))
                r |= dict(admit=clock, hit=spared)
            r |= dict(done=hit, context=r["prompt"])
            running.append(r)
            cache.evict(16 * (n_blocks - used()))
            chunks.append((r, min(room, r["prompt"] - hit)))
            room -= chunks[-1][1]
        if not running:
            clock = max(clock, waiting[0]["arrival"])
            continue
        clock, loading_s = iterated(running, decoding, chunks, clock + loading_s, LAW), 0.0
        for r in running:
            if not r["left"]:
                cache.give_up(r["blocks"], np.inf)
        running = [r for r in running if r["left"]]
        cache.evict(max(16 * (n_blocks - used()), 0))
        while used() > n_blocks:
            r = running.pop()
            cache.give_up(r["blocks"], r["context"] if r["done"] == r["prompt"] else r["done"])
            r["prompt"] = r["context"]
            waiting.appendleft(r)
            n_preempted += 1
            cache.evict(max(16 * (n_blocks - used()), 0))
    return requests, n_preempted, cache


def check_against_naive(
    n_blocks: float, budget: int, gap_s: float, host: HostCache = NO_HOST
) -> tuple[int, float, int]:
    """(preemptions, share found, blocks that are left) of runs that must be token by token as the naive one's."""
    streams = [stream(seed, gap_s=gap_s) for seed in range(N_ROWS)]
    run = run_streams(streams, n_blocks=n_blocks, budget=budget, host=host)
    n_preempted, hits, left = 0, 0, 0
    assert run.found_tokens is not None
    for r, each in enumerate(streams):
        expected, preempted, cache = naive(each, n_blocks=n_blocks, budget=budget, slots=8, host=host)
        np.testing.assert_array_equal(run.found_tokens[r], [x["hit"] for x in expected])
        np.testing.assert_allclose(run.admit_s[r], [x["admit"] for x in expected], rtol=1e-9)
        np.testing.assert_allclose(run.first_s[r], [x["times"][0] for x in expected], rtol=1e-9)
        np.testing.assert_allclose(run.last_s[r], [x["times"][-1] for x in expected], rtol=1e-9)
        assert int(run.tally.preemptions[r, 0]) == preempted
        n_preempted, hits, left = n_preempted + preempted, hits + run.found_tokens[r].sum(), left + len(cache.kept)
    return n_preempted, hits / sum(sum(x.prompt) for x in streams), left


def test_without_pressure_every_prefix_is_found_that_came_before():
    n_preempted, share, left = check_against_naive(EVERYTHING, budget=64, gap_s=0.02)
    assert n_preempted == 0 and share > 0.3
    assert left == sum(len({b for x in stream(seed).blocks for b in x}) for seed in range(N_ROWS))


@pytest.mark.parametrize(("n_blocks", "budget", "gap_s"), [(24, 16, 0.02), (9, 24, 0.02), (8, 5, 0.01)])
def test_under_pressure_the_oldest_go_first(n_blocks, budget, gap_s):
    """Token by token: evictions, shared blocks, preempted sequences that find what they left, cut prompts."""
    all_found = check_against_naive(EVERYTHING, budget, gap_s)[1]
    n_preempted, share, _ = check_against_naive(n_blocks, budget, gap_s)
    assert 0 < share < all_found
    assert n_preempted > 10 or n_blocks > 9


@pytest.mark.parametrize(("n_blocks", "budget", "gap_s"), [(24, 16, 0.02), (8, 5, 0.01)])
def test_hosts_keep_what_the_gpus_let_go(n_blocks, budget, gap_s):
    """Token by token, with preemptions: what is there, when it goes for good, and how long loading takes."""
    shares = [
        check_against_naive(n_blocks, budget, gap_s, make_host_cache(memory_bytes=tokens, bytes_per_s=4e4))[1]
        for tokens in (0.0, 150.0, 1e9)
    ]
    assert shares[0] + 0.02 < shares[1] < shares[2]


@pytest.mark.slow  # compiles a program that nobody else runs
def test_caches_are_changed_in_place(monkeypatch):
    """Who has which blocks is never copied in a program: in every iteration that would take longer than all else."""
    programs = []

    def kept(*args: Any, **kwargs: Any) -> Any:
        programs.append((_segment.lower(*args, **kwargs).compile().as_text(), args[0].kept.held.shape))
        return _segment(*args, **kwargs)

    monkeypatch.setattr("fleetopt_jax._simulate.pool._segment", kept)
    run_streams([stream(seed) for seed in range(N_ROWS)], n_blocks=24, budget=16)
    text, (n_instances, n_blocks) = programs[0]
    held = rf"s32\[{n_instances},{n_blocks}\]"
    assert re.search(held, text)
    assert not re.findall(rf"{held}\S* copy\(", text)


def test_no_host_and_a_slow_one_change_no_digit():
    """Of no bytes, or slower than computing anew: as without."""
    streams = [stream(seed) for seed in range(N_ROWS)]
    usual = run_streams(streams, n_blocks=24, budget=16)
    slow = run_streams(streams, n_blocks=24, budget=16, host=make_host_cache(memory_bytes=1e9, bytes_per_s=9e3))
    for name in ("found_tokens", "admit_s", "first_s", "last_s", "gap_counts"):
        np.testing.assert_array_equal(getattr(usual, name), getattr(slow, name))
    for a, b in zip(usual.tally, slow.tally, strict=True):
        np.testing.assert_array_equal(a, b)


# --- shares that are given --------------------------------------------------------------------------------------------


def run_found(streams: list[Stream], found: np.ndarray | None) -> PoolRun:
    requests = replace(pool_requests(streams), blocks=None, found_tokens=found)
    pool = Pool(engine_of(**LAW, budget=16), scheduler_of(N_ROWS, n_blocks=12), 1)
    return run_pool(pool, requests, np.full(N_ROWS, FOREVER_S), IN_TURN, n_slots=8)


@pytest.mark.slow
def test_nothing_found_changes_no_digit():
    streams = [stream(seed) for seed in range(N_ROWS)]
    without, nothing = run_found(streams, None), run_found(streams, np.zeros((N_ROWS, N_COLUMNS), int))
    assert without.found_tokens is None
    for name in ("admit_s", "first_s", "last_s", "gap_counts"):
        np.testing.assert_array_equal(getattr(without, name), getattr(nothing, name))
    for a, b in zip(without.tally, nothing.tally, strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_is_found_is_attended_to_but_not_computed():
    """A prompt alone: tau1 (p - h) + tau2 (p^2 - h^2), in as many iterations as the rest of it needs."""
    lone = Stream([0.5], [90], [3], [[0]])
    rows = [replace(lone, prompt=[p]) for p in (90, 40, 17, 2)]
    hits = [55, 24, 1, 1]
    padded = [Stream(x.arrival_s + [np.inf] * (N_COLUMNS - 1), x.prompt + [0] * 39, x.output + [0] * 39) for x in rows]
    arrival_s, prompt, output = (
        np.array([getattr(x, name) for x in padded]) for name in ("arrival_s", "prompt", "output")
    )
    found = np.zeros((N_ROWS, N_COLUMNS), int)
    found[:, 0] = hits
    pool = Pool(engine_of(**LAW, budget=16), scheduler_of(N_ROWS, n_blocks=12), 1)
    requests = PoolRequests(arrival_s, prompt, output, found)
    run = run_pool(pool, requests, np.full(N_ROWS, FOREVER_S), IN_TURN, n_slots=8)
    for r, (each, hit) in enumerate(zip(rows, hits, strict=True)):
        p = each.prompt[0]
        chunks_s = -(-(p - hit) // 16) * LAW["base_s"] + LAW["tau1"] * (p - hit) + LAW["tau2"] * (p**2 - hit**2)
        assert run.first_s[r, 0] - 0.5 == pytest.approx(chunks_s, rel=1e-12)
        decode_s = sum(LAW["base_s"] + LAW["per_seq_s"] + LAW["per_token_s"] * (p + j) for j in (1, 2))
        assert run.last_s[r, 0] - run.first_s[r, 0] == pytest.approx(decode_s, rel=1e-12)


def test_shares_are_found_in_whole_tokens_never_all_of_them():
    prompts = np.array([1, 2, 3, 1000, 1001])
    assert ConstantHits(0.5).whole_tokens_found(prompts).tolist() == [0, 1, 2, 500, 501]
    assert ConstantHits(0.999).whole_tokens_found(prompts).tolist() == [0, 1, 2, 999, 1000]
    assert ConstantHits(0.0).whole_tokens_found(prompts).tolist() == [0] * 5


# --- several instances ------------------------------------------------------------------------------------------------


def hit_share(policy: str, streams: list[Stream], n_instances: int) -> float:
    """Of two replications, in a program with room for four instances."""
    pool = Pool(engine_of(**LAW, budget=64), scheduler_of(len(streams), n_blocks=EVERYTHING), n_instances)
    balancer, room = Balancer(DISPATCHES[policy]), Room(4, 16, 160)
    run = run_pool(pool, pool_requests(streams), np.full(len(streams), FOREVER_S), balancer, room=room)
    assert run.found_tokens is not None and np.isfinite(run.last_s).all()
    return float(run.found_tokens.sum() / sum(sum(x.prompt) for x in streams))


SEVERAL = [stream(seed, n=160, longest=24) for seed in range(2)]


@pytest.mark.slow
def test_affinity_finds_more_than_chance():
    affine, alone = (hit_share("affinity", SEVERAL, n) for n in (4, 1))
    assert hit_share("random", SEVERAL, 4) + 0.05 < affine <= alone


@pytest.mark.slow
def test_affinity_finds_more_than_the_shortest_queue():
    assert hit_share("jsq", SEVERAL, 4) + 0.05 < hit_share("affinity", SEVERAL, 4)


@pytest.mark.slow
def test_a_strict_bound_finds_less_than_a_loose_one_and_more_than_chance():
    assert hit_share("random", SEVERAL, 4) < hit_share("bounded_hash", SEVERAL, 4) <= hit_share("affinity", SEVERAL, 4)


def bounded_shares(n_instances: int, in_flight: float, n_requests: int = 12_000) -> tuple[float, float, float]:
    """(stayed home, overflowed together with the last of the same home, most over the bound) of exponential services
    whose requests have homes at random, one after another by the record itself."""
    rng, policy = np.random.default_rng(0), BoundedHashing()
    lengths, clock_s, ends = np.zeros(n_instances, int), 0.0, []
    choose = jax.jit(partial(policy.choose, n_sent=1))
    homes = rng.integers(2**31 - 1, size=200 * n_instances).astype(np.int32)
    stayed, together, last, excess = 0, [], {}, 0.0
    for _ in range(n_requests):
        clock_s += rng.exponential(1.0 / (n_instances * in_flight))
        while ends and ends[0][0] <= clock_s:
            lengths[heapq.heappop(ends)[1]] -= 1
        home = homes[rng.integers(len(homes))]
        key = jax.random.wrap_key_data(np.zeros((1, 2), np.uint32))
        queues = Queues(lengths[None], np.zeros(1, int), key, np.asarray(n_instances), home[None, None])
        to = int(choose(queues)[0, 0])
        excess = max(excess, lengths[to] + 1 - np.ceil(BOUND * (lengths.sum() + 1) / n_instances))
        if to == home % n_instances:
            stayed += 1
        else:
            together.append(last.get(home) == to)
            last[home] = to
        lengths[to] += 1
        heapq.heappush(ends, (clock_s + rng.exponential(), to))
    return stayed / n_requests, float(np.mean(together)), excess


@pytest.mark.slow
@pytest.mark.parametrize(("n_instances", "in_flight"), [(4, 0.5), (4, 10.0), (16, 2.0)])
def test_bounded_hashing_keeps_its_bound_and_as_many_at_home_as_the_law_says(n_instances, in_flight):
    stayed, together, excess = bounded_shares(n_instances, in_flight)
    assert excess <= 0.0
    law = float(home_frac(BOUND, in_flight, n_instances))
    assert -(0.06 if in_flight >= 2 else 0.12) < law - stayed < 0.06
    assert together > 1.5 / n_instances


@pytest.mark.slow
def test_fuller_instances_keep_more_at_home():
    law, many = partial(home_frac, BOUND), np.geomspace(1.0, 300.0, 60)
    shares = jax.vmap(law, (0, None))(many, 8.0)
    assert np.all(np.diff(shares) > 0) and shares[0] > 0.6 and shares[-1] > 0.9999
    assert float(law(3.0, 1.0)) == 1.0
    check_grads(lambda m: law(m, 8.0), (5.0,), order=1, modes=["fwd", "rev"])
    assert np.all(np.isfinite(jax.vmap(jax.grad(law), (0, None))(np.array([0.0, 0.3, 1e6]), 8.0)))


def test_who_begins_alike_has_one_home_but_for_what_too_many_begin_with():
    """Turns of a conversation share a home; a system prompt that everybody begins with decides nothing."""
    turns = [[0, k, *range(1000 * k, 1000 * k + i)] for i in range(1, 5) for k in range(1, 31)]
    blocks = prompt_blocks(
        [Blocks(np.concatenate([np.array(x) for x in turns]), np.array([*map(len, turns)]), 8)],
        [np.array([8 * len(x) for x in turns])],
        [np.ones(len(turns), int)],
    )
    homes = homes_of(blocks, 4, seed=0)[0].reshape(4, 30)
    assert (homes == homes[:1]).all() and len(set(homes[0])) == 30
    lone = prompt_blocks([Blocks(np.zeros(99, int), np.ones(99, int), 8)], [np.full(99, 8)], [np.ones(99, int)])
    assert (homes_of(lone, 4, seed=0) == HOMELESS).all()


# --- through the door -------------------------------------------------------------------------------------------------


def trace_of(found: Stream, scale: int = 64) -> Trace:
    """The stream with longer blocks, as a file would have it."""
    prompt, output = scale * np.array(found.prompt, float), 4.0 * np.array(found.output, float)
    blocks = replace(found.as_blocks, block_tokens=scale * BLOCK)
    return Trace(prompt, output, np.array(found.arrival_s) - found.arrival_s[0], blocks=blocks)


CACHED = replace(
    PHYSICAL, prefix_cache=WorkingSetCache(), dispatch=DISPATCHES["affinity"], tail=MeanPrefillTail()
)  # whose programs are small


@pytest.mark.slow
def test_a_replayed_trace_finds_what_it_repeats_beside_the_law():
    """With memory for everything, on one instance, from the first request on; and what is refused."""
    trace = trace_of(stream(3, gap_s=2.0, n=300, longest=12))
    assert trace.blocks is not None
    total = trace.prompt_tokens + trace.output_tokens
    reuse = reuse_of(trace.blocks, trace.prompt_tokens, total, np.arange(len(total)))
    workload = make_workload(trace.prompt_tokens, trace.output_tokens, arrival_rate_per_s=0.5, reuse=reuse)
    engine = engine_of(**LAW | {"per_token_s": 1e-7, "tau1": 1e-5, "tau2": 1e-9}, n_blocks=1e5, max_num_seqs=16)
    fleet = make_fleet([engine], window_tokens=[float(total.max())], n_instances=[1])
    requests = replay_requests(trace, 0.5, 300, 1)
    found = simulate(fleet, workload, CACHED, requests=requests)
    uses = uses_of(trace.blocks, trace.prompt_tokens)
    again = np.bincount(uses.request, uses.tokens * np.isfinite(uses.age_requests), 300)
    counted = requests.arrival_s[0] >= found.warm_up_s
    repeated = np.minimum(again, trace.prompt_tokens - 1)[counted].sum() / trace.prompt_tokens[counted].sum()
    assert found.metrics["prefix_hit_frac"].mean == pytest.approx(repeated, abs=1e-9)
    assert found.pools[0]["prefix_hit_frac"].mean == pytest.approx(repeated, abs=1e-9)
    law = found.analytic["prefix_hit_frac"]
    assert law is not None and law == pytest.approx(repeated, abs=0.05)
    with pytest.raises(BadInput, match=r"no block hashes.*--arrivals trace"):
        simulate(fleet, workload, CACHED)


@pytest.mark.slow
def test_hosts_find_beside_the_law_what_they_find():
    """One instance whose GPUs hold an eighth of the blocks, and hosts of several sizes: hits and time, law by law."""
    trace = trace_of(stream(3, gap_s=2.0, n=600, longest=12))
    assert trace.blocks is not None
    total = trace.prompt_tokens + trace.output_tokens
    reuse = reuse_of(trace.blocks, trace.prompt_tokens, total, np.arange(len(total)))
    workload = make_workload(trace.prompt_tokens, trace.output_tokens, arrival_rate_per_s=0.5, reuse=reuse)
    alone = engine_of(**LAW | {"per_token_s": 1e-7, "tau1": 1e-4, "tau2": 1e-9}, n_blocks=2500, max_num_seqs=16)
    requests, shares = replay_requests(trace, 0.5, 600, 1), []
    for tokens in (0.0, 4e4, 1.2e5):
        engine = replace(alone, host_cache=make_host_cache(memory_bytes=tokens, bytes_per_s=4e4))
        fleet = make_fleet([engine], window_tokens=[float(total.max())], n_instances=[1])
        found = simulate(fleet, workload, CACHED, requests=requests)
        seen, law = found.pools[0], found.pools_analytic[0]
        for name, within in (("prefix_hit_frac", {"abs": 0.02}), ("prefill_frac", {"rel": 0.05})):
            said = law[name]
            assert said is not None and seen[name].mean == pytest.approx(said, **within)
        assert law["tok_per_j"] == pytest.approx(seen["tok_per_j"].mean, rel=0.05)
        shares.append(seen["prefix_hit_frac"].mean)
    assert np.all(np.diff(shares) > 0.05)


@pytest.mark.slow
def test_verification_frees_what_found_prefixes_spare():
    """Prompts are most of the work here: with half of them found fewer instances hold."""
    alone = toy([1000], [6])
    without, found = (
        verify(proposing(alone), CHAT, replace(PHYSICAL, prefix_cache=cache), SLO, **FEW)
        for cache in (NoPrefixCache(), ConstantHits(0.5))
    )
    assert without.held and found.held
    assert int(found.fleet.n_instances[0]) < int(without.fleet.n_instances[0])
    assert found.simulation.metrics["prefix_hit_frac"].mean == pytest.approx(0.5, abs=0.01)
