"""A closed-loop benchmark on one instance: so many requests in flight, each replaced as soon as it ends.

The protocol of `vllm bench serve --max-concurrency` and of InferenceX: the first requests are all sent at time 0, 10
times the concurrency in total; lengths are drawn uniformly from a share of the nominal ones to these, an end of
sequence is ignored. So the first wave queues for its prefill, and that is in the mean TTFT.

Who is in which iteration depends on counts alone (lengths, the tokens of an iteration, the most sequences, the KV
cache) and not on how long iterations take: in a closed loop everything follows an end, and nothing a clock. So the
iterations are made once (`schedule`), as vLLM makes them: a token for each sequence that decodes, then the prompt that
was cut off, then waiting prompts, first come first served, up to `budget_tokens`; where the cache overflows the newest
sequence is preempted and computed again. Equal decode iterations are one entry, taken at their mean context, which may
grow by a quarter within one. A step law then gives seconds and joules of every entry in one call, and `outcome` is
linear in them.

Lengths are the n quantiles of the uniform distribution in an order drawn from a seed, so that their means are exact.
Against a plain simulation of every iteration, of a law that bends in batch and context (tests/test_predict.py): TTFT,
TPOT, tok/s and watts within 0.01 %; within 1.2 % where sequences are preempted, for the cache is counted in tokens and
half a block a sequence, not in whole blocks. About 5 us an entry; 10 requests a sequence make some 25 entries.
"""

import heapq
import math
from collections import deque
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from fleetopt_jax.laws.kv_cache import BLOCK_TOKENS
from fleetopt_jax.laws.mixed_step import StepBatch

REQUESTS_PER_SEQUENCE = 10  # of a benchmark, a request in flight
LENGTH_SPREAD = 0.8  # shortest over nominal length
MOST_GROWTH = 0.25  # of the contexts within one entry


@dataclass(frozen=True)
class Benchmark:
    """What a closed-loop benchmark sends: so many requests in flight, each replaced as it ends.

    >>> fo.Benchmark(prompt_tokens=1024, output_tokens=1024, concurrency=16, n_requests=160).length_spread
    0.8
    """

    prompt_tokens: int  # nominal
    output_tokens: int  # nominal
    concurrency: int  # requests in flight
    n_requests: int  # in total
    length_spread: float = LENGTH_SPREAD
    seed: int = 0


@dataclass(frozen=True)
class Limits:
    """What bounds an instance's iterations."""

    budget_tokens: int  # of one iteration (max_num_batched_tokens)
    max_num_seqs: int
    kv_tokens: float  # what the cache holds
    fixed_tokens: float = 0.0  # what a sequence holds in layers with a sliding window, as tokens of the others
    window_tokens: int = 0  # of the sliding window; 0 without
    n_caches: float = 1.0  # equal parts of the cache, each with sequences of its own


@dataclass(frozen=True, eq=False)
class Schedule:
    """All iterations of a benchmark: E entries, each so many equal iterations; and when N requests were served.

    `sent`, `first` and `last` [N] count entries: something happened once so many of them were over.
    """

    batch: StepBatch  # [E]
    repeats: np.ndarray  # [E]
    sent: np.ndarray
    first: np.ndarray
    last: np.ndarray
    output_tokens: np.ndarray  # [N]
    n_preempted: int


@dataclass(frozen=True)
class Outcome:
    """What a benchmark reports. TTFT and TPOT over requests; TPOT without the first token."""

    ttft_s: float  # mean
    ttft_median_s: float
    ttft_p99_s: float
    tpot_s: float  # mean
    tpot_median_s: float
    output_tok_per_s: float  # of the instance, over the whole run
    gpu_w: float  # mean power of one GPU
    gpu_j_per_request: float  # energy of one GPU
    gpu_j_per_tok: float


def lengths(nominal: int, spread: float, n: int, rng: np.random.Generator) -> np.ndarray:
    """n whole lengths: the quantiles of the uniform distribution from `spread` times nominal to nominal, shuffled."""
    least = max(1, int(spread * nominal))
    return rng.permutation(least + ((np.arange(n) + 0.5) / n * (nominal - least + 1)).astype(int))


def fits(benchmark: Benchmark, limits: Limits) -> bool:
    """Whether the cache holds the longest request."""
    longest = benchmark.prompt_tokens + benchmark.output_tokens
    return longest + limits.fixed_tokens + BLOCK_TOKENS <= limits.kv_tokens / limits.n_caches


def schedule(benchmark: Benchmark, limits: Limits) -> Schedule:
    """The iterations of a benchmark that `fits`; those of engines whose limits do not bind are the same, and kept."""
    if not fits(benchmark, limits):
        raise ValueError(f"need a KV cache that holds the longest request, got {benchmark}, {limits}")
    return _schedule(benchmark, _binding(benchmark, limits))


def _binding(benchmark: Benchmark, limits: Limits) -> Limits:
    """The limits without those that no iteration of the benchmark reaches."""
    n = min(benchmark.concurrency, limits.max_num_seqs)
    most = n * (benchmark.prompt_tokens + benchmark.output_tokens + limits.fixed_tokens + BLOCK_TOKENS)
    if most <= limits.kv_tokens:
        return replace(limits, max_num_seqs=n, kv_tokens=math.inf, fixed_tokens=0.0, n_caches=1.0)
    return replace(limits, max_num_seqs=n)


@lru_cache(maxsize=256)
def _schedule(benchmark: Benchmark, limits: Limits) -> Schedule:
    run = _Run.of(benchmark, limits)
    while run.iterate():
        pass
    columns = np.array(run.entries, dtype=float).T
    return Schedule(
        batch=StepBatch(*columns[1:]),
        repeats=columns[0],
        sent=np.array(run.sent),
        first=np.array(run.first),
        last=np.array(run.last),
        output_tokens=run.output,
        n_preempted=run.n_preempted,
    )


def outcome(schedule: Schedule, step_s: np.ndarray, gpu_j: np.ndarray) -> Outcome:
    """What the benchmark reports where an iteration of each entry takes `step_s` and one GPU `gpu_j` joules [E]."""
    end_s = np.concatenate([[0.0], np.cumsum(schedule.repeats * step_s)])
    energy_j, output = float(schedule.repeats @ gpu_j), schedule.output_tokens
    sent_s, first_s, last_s = end_s[schedule.sent], end_s[schedule.first], end_s[schedule.last]
    ttft_s, several = first_s - sent_s, output > 1
    tpot_s = (last_s - first_s)[several] / (output[several] - 1)
    return Outcome(
        ttft_s=float(ttft_s.mean()),
        ttft_median_s=float(np.median(ttft_s)),
        ttft_p99_s=float(np.percentile(ttft_s, 99)),
        tpot_s=float(tpot_s.mean()) if len(tpot_s) else 0.0,
        tpot_median_s=float(np.median(tpot_s)) if len(tpot_s) else 0.0,
        output_tok_per_s=float(output.sum() / end_s[-1]),
        gpu_w=energy_j / float(end_s[-1]),
        gpu_j_per_request=energy_j / len(output),
        gpu_j_per_tok=energy_j / float(output.sum()),
    )


def _pairs(done: int, chunk: int, window: int) -> tuple[float, float]:
    """(token, token it attends to) of a chunk after `done` tokens of a prompt: all, and within a window. It is
    `causal_pairs` in plain numbers, a fiftieth of the time: every chunk asks."""
    everything = chunk * done + chunk * (chunk + 1) / 2
    beyond = min(max(done + chunk - window, 0), chunk)  # tokens that see no more than the window
    before = chunk - beyond
    return everything, before * done + before * (before + 1) / 2 + beyond * window


@dataclass(slots=True)
class _Run:
    """Where a benchmark stands between two iterations. Requests by their number, in the order they are sent."""

    limits: Limits
    prompt: list[int]  # tokens to prefill before the next output token
    left: list[int]  # output tokens still to generate
    output: np.ndarray
    waiting: deque[int]
    sent: list[int]
    first: list[int]
    last: list[int]
    n_sent: int
    entries: list[tuple[float, ...]] = field(default_factory=list)
    iteration: int = 0
    n: int = 0  # sequences that decode
    n_running: int = 0  # and those that are prefilled
    tokens: int = 0  # contexts of the decoding
    held: float = 0.0  # tokens in the cache
    n_below: int = 0  # decoding with a context within the window
    below_tokens: int = 0  # and their contexts
    partial: tuple[int, int] | None = None  # the prompt that was cut off, and what is done of it
    ends: list[tuple[int, int]] = field(default_factory=list)  # heap of (iteration, request)
    end_of: dict[int, int] = field(default_factory=dict)  # of the decoding; what the heap says otherwise is void
    crossings: list[tuple[int, int]] = field(default_factory=list)  # heap: a context reaches the window
    crossing_of: dict[int, int] = field(default_factory=dict)
    admitted: list[int] = field(default_factory=list)  # in order; who is gone is dropped when met
    n_preempted: int = 0

    @classmethod
    def of(cls, benchmark: Benchmark, limits: Limits) -> "_Run":
        n, rng = benchmark.n_requests, np.random.default_rng(benchmark.seed)
        prompt = lengths(benchmark.prompt_tokens, benchmark.length_spread, n, rng)
        output = lengths(benchmark.output_tokens, benchmark.length_spread, n, rng)
        first_wave = min(benchmark.concurrency, n)
        return cls(
            limits=limits,
            prompt=prompt.tolist(),
            left=output.tolist(),
            output=output,
            waiting=deque(range(first_wave)),
            sent=[0] * n,
            first=[-1] * n,
            last=[0] * n,
            n_sent=first_wave,
        )

    def iterate(self) -> bool:
        """One entry; False when nothing is left to do."""
        done, prompt_tokens, pairs, windowed_pairs = self._prompts()
        if not (prompt_tokens or self.n):
            return False
        n, k = self.n, 1 if prompt_tokens else self._alike()
        windowed = self.limits.window_tokens * (n - self.n_below) + self.below_tokens + self.n_below * (k - 1) / 2
        mean_tokens = self.tokens + n * (k - 1) / 2
        self.entries.append((k, n, mean_tokens, windowed, prompt_tokens, pairs, windowed_pairs))
        self.iteration += k
        self.tokens += n * k
        self.below_tokens += self.n_below * k
        self.held += n * k
        while self.crossings and self.crossings[0][0] <= self.iteration:
            at, request = heapq.heappop(self.crossings)
            if self.crossing_of.get(request) == at:
                self._leave_below(request, self.limits.window_tokens)
        self._ended()
        for request in done:
            self._decodes(request)
        while self.held > self.limits.kv_tokens and self.n_running > 1:
            self._preempt()
        return True

    def _prompts(self) -> tuple[list[int], int, float, float]:
        """Prompts of the next iteration: those it completes, and its tokens and pairs of all."""
        limits, waiting = self.limits, self.waiting
        if self.partial is None and not waiting:
            return [], 0, 0.0, 0.0
        room, done, total, pairs, windowed_pairs = max(limits.budget_tokens - self.n, 1), [], 0, 0.0, 0.0
        while room > 0:
            if self.partial is None:
                if not waiting or not self._admit(waiting[0]):
                    break
                self.partial = waiting.popleft(), 0
            request, before = self.partial
            chunk = min(self.prompt[request] - before, room)
            more, windowed = _pairs(before, chunk, limits.window_tokens)
            pairs, windowed_pairs, total, room = pairs + more, windowed_pairs + windowed, total + chunk, room - chunk
            if before + chunk == self.prompt[request]:
                done.append(request)
                self.partial = None
            else:
                self.partial = request, before + chunk
        return done, total, pairs, windowed_pairs

    def _admit(self, request: int) -> bool:
        """Take a request, if the scheduler does now."""
        needs = self.prompt[request] + self._beside
        if self.n_running >= self.limits.max_num_seqs or self.held + needs + 1 > self.limits.kv_tokens:
            return False
        self.held += needs
        self.n_running += 1
        self.admitted.append(request)
        return True

    @property
    def _beside(self) -> float:
        """What a sequence holds besides its context, half an unfilled block included [tokens]."""
        return self.limits.fixed_tokens + (BLOCK_TOKENS - 1.0) / 2.0

    def _alike(self) -> int:
        """How many equal decode iterations follow."""
        while self.end_of.get(self.ends[0][1]) != self.ends[0][0]:
            heapq.heappop(self.ends)
        k = min(self.ends[0][0] - self.iteration, max(1, int(MOST_GROWTH * self.tokens / self.n)))
        while self.crossings and self.crossing_of.get(self.crossings[0][1]) != self.crossings[0][0]:
            heapq.heappop(self.crossings)
        if self.crossings:
            k = min(k, self.crossings[0][0] - self.iteration)
        return max(1, int(min(k, (self.limits.kv_tokens - self.held) / self.n)))

    def _ended(self) -> None:
        """Who has its last token leaves, and the next request is sent."""
        while self.ends and self.ends[0][0] <= self.iteration:
            at, request = heapq.heappop(self.ends)
            if self.end_of.get(request) == at:
                context = self.prompt[request] + self.left[request]
                self._stops(request, context)
                self._leaves(request, context)

    def _leaves(self, request: int, context: int) -> None:
        self.held -= context + self._beside
        self.n_running -= 1
        self.left[request] = 0
        self.last[request] = len(self.entries)
        if self.n_sent < len(self.sent):
            self.sent[self.n_sent] = len(self.entries)
            self.waiting.append(self.n_sent)
            self.n_sent += 1

    def _decodes(self, request: int) -> None:
        """A prompt is done: it gives a token, and decodes from now on."""
        if self.first[request] < 0:
            self.first[request] = len(self.entries)
        self.held += 1
        context = self.prompt[request] + 1
        if self.left[request] == 1:
            self._leaves(request, context)
            return
        self.n += 1
        self.tokens += context
        self.end_of[request] = self.iteration + self.left[request] - 1
        heapq.heappush(self.ends, (self.end_of[request], request))
        if context < self.limits.window_tokens:
            self.n_below += 1
            self.below_tokens += context
            self.crossing_of[request] = self.iteration + self.limits.window_tokens - context
            heapq.heappush(self.crossings, (self.crossing_of[request], request))

    def _stops(self, request: int, context: int) -> None:
        """It decodes no more."""
        self.n -= 1
        self.tokens -= context
        del self.end_of[request]
        if request in self.crossing_of:
            self._leave_below(request, context)

    def _leave_below(self, request: int, context: int) -> None:
        self.n_below -= 1
        self.below_tokens -= context
        del self.crossing_of[request]

    def _preempt(self) -> None:
        """The newest sequence loses its cache and waits again, before all others, to be computed anew."""
        request = self.admitted.pop()
        if request in self.end_of:
            to_come = self.end_of[request] - self.iteration
            context = self.prompt[request] + self.left[request] - to_come
            self._stops(request, context)
            self.prompt[request], self.left[request] = context, to_come
        elif self.partial is not None and self.partial[0] == request:
            context, self.partial = self.prompt[request], None
        else:
            return  # it has ended
        self.held -= context + self._beside
        self.n_running -= 1
        self.n_preempted += 1
        self.waiting.appendleft(request)
