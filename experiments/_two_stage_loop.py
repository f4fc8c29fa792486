"""A closed-loop benchmark of lanes of two stages: so many requests in flight, each replaced as it ends.

All that is in flight at first is sent at once, so that the first wave queues for prefill. A request goes to the
instance that has fewest; prompts are prefilled in gated batches, up to the budget of each group of GPUs, and a batch
takes as long as its fullest group; then the KV cache is handed over, and the request decodes from the next step on,
where slots and memory are free. Its first token is that of its first step there. Seconds are the step laws' and the
hand-over's; ports are taken to be free, for they send a few percent of the time.
"""

import heapq
from collections import deque
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from fleetopt_jax.core.programs import program
from fleetopt_jax.fleet.engine import EnginePair
from fleetopt_jax.fleet.step_law import step_law_of
from fleetopt_jax.laws.closed_loop import lengths
from fleetopt_jax.laws.kv_cache import BLOCK_TOKENS
from fleetopt_jax.laws.mixed_step import StepBatch

KNOTS = 96  # batches that a step is evaluated at; between them it is interpolated


@dataclass(frozen=True)
class Loop:
    """What is sent, and to how many instances."""

    prompt_tokens: int  # nominal
    output_tokens: int  # nominal
    least_frac: float  # of the nominal lengths, evenly drawn from there to 1
    concurrency: int
    n_prefill: int
    n_decode: int
    prefill_groups: int  # of GPUs with prompts of their own, in an instance
    requests_per_sequence: int = 10
    seed: int = 0


@dataclass(frozen=True)
class Steps:
    """Seconds of iterations, by what is in them."""

    decode_s: list[float]  # of n sequences without context, n from 0
    per_token_s: list[float]  # and for each token of their mean context
    prefill_s: list[float]  # of m prompts a group without the quadratic part, of the mean length
    hand_over_s: float  # of a mean prompt
    first_token_s: float
    most_together: int  # prompts of a group in one iteration
    slots: int  # sequences of a decode instance
    kv_tokens: float


@dataclass(slots=True)
class _Decode:
    """A decode instance."""

    waiting: deque[int] = field(default_factory=deque)
    ends: list[tuple[int, int]] = field(default_factory=list)  # heap of (step, request)
    new: list[int] = field(default_factory=list)  # whose first step is going on
    n: int = 0
    step: int = 0
    tokens: float = 0.0  # of their contexts
    held: float = 0.0  # tokens that are reserved
    busy: bool = False


def steps_of(pair: EnginePair, loop: Loop) -> Steps:
    """What the iterations of a benchmark take on a pair of engines."""
    decode, prefill = step_law_of(pair.decode), step_law_of(pair.prefill)
    slots = int(min(float(pair.decode.kv.max_num_seqs), loop.concurrency))
    mean_frac = (1.0 + loop.least_frac) / 2.0
    prompt = mean_frac * loop.prompt_tokens
    contexts = prompt, prompt + mean_frac * loop.output_tokens
    n = np.geomspace(1.0, max(slots, 2.0), KNOTS)
    at = [_seconds_of(decode, _decoding(n, context)) for context in contexts]
    every = np.arange(slots + 1.0)
    low, high = (np.interp(every, n, each) for each in at)
    per_token_s = (high - low) / (contexts[1] - contexts[0])
    groups, budget = loop.prefill_groups, float(pair.prefill.prefill.budget_tokens) / loop.prefill_groups
    most = max(1, int(budget // prompt))
    chunks = np.ceil(prompt / budget)
    prompts = np.arange(1.0, KNOTS + 1.0) * groups
    together = prompts * prompt / chunks, prompts * prompt**2 / 2.0 / chunks
    prefill_s = chunks * _seconds_of(prefill, StepBatch(*np.zeros((3, KNOTS)), *together, np.zeros(KNOTS)))
    return Steps(
        decode_s=(low - per_token_s * contexts[0]).tolist(),
        per_token_s=per_token_s.tolist(),
        prefill_s=prefill_s.tolist(),
        hand_over_s=float(pair.hand_over.seconds(prompt)),
        first_token_s=float(prefill.first_token_s),
        most_together=min(most, KNOTS),
        slots=slots,
        kv_tokens=float(pair.decode.kv.n_blocks) * BLOCK_TOKENS,
    )


def _decoding(n: np.ndarray, context: float) -> StepBatch:
    zero = np.zeros_like(n)
    return StepBatch(n, n * context, zero, zero, zero, zero)


def _seconds_of(law, batch: StepBatch) -> np.ndarray:
    return np.asarray(_seconds(law, jax.tree.map(jnp.asarray, batch)))


@program
def _seconds(law, batch: StepBatch):
    return jax.vmap(law.step_s)(batch)


def played(loop: Loop, steps: Steps) -> tuple[float, float]:
    """(mean TTFT, mean TPOT) of the requests [s]."""
    run = _Run(loop, steps)
    run.play()
    output = run.output
    several = output > 1
    tpot_s = (run.last_s - run.first_s)[several] / (output[several] - 1)
    return float(np.mean(run.first_s - run.sent_s)) + steps.first_token_s, float(np.mean(tpot_s))


class _Run:
    """Where a benchmark stands. Requests by their number, in the order they are sent; events on one heap."""

    def __init__(self, loop: Loop, steps: Steps):
        n, rng = loop.requests_per_sequence * loop.concurrency, np.random.default_rng(loop.seed)
        self.loop, self.steps = loop, steps
        self.prompt = lengths(loop.prompt_tokens, loop.least_frac, n, rng)
        self.output = lengths(loop.output_tokens, loop.least_frac, n, rng)
        self.sent_s, self.first_s, self.last_s = np.zeros((3, n))
        self.queues: list[deque[int]] = [deque() for _ in range(loop.n_prefill)]
        self.prefilling = [0] * loop.n_prefill
        self.decodes = [_Decode() for _ in range(loop.n_decode)]
        self.events: list[tuple[float, int, int, list[int]]] = []  # (when, number, instance or -1 - instance, requests)
        self.n_events = self.n_sent = 0

    def play(self) -> None:
        for _ in range(min(self.loop.concurrency, len(self.prompt))):
            self._send(0.0)
        while self.events:
            now, _, where, requests = heapq.heappop(self.events)
            if where >= self.loop.n_prefill:
                self._arrive(now, requests[0])
            elif where >= 0:
                self._prefilled(now, where, requests)
            else:
                self._stepped(now, where)

    def _at(self, when: float, where: int, requests: list[int]) -> None:
        self.n_events += 1
        heapq.heappush(self.events, (when, self.n_events, where, requests))

    def _send(self, now: float) -> None:
        if self.n_sent == len(self.prompt):
            return
        request, self.n_sent = self.n_sent, self.n_sent + 1
        self.sent_s[request] = now
        where = min(range(self.loop.n_prefill), key=lambda i: len(self.queues[i]) + self.prefilling[i])
        self.queues[where].append(request)
        if not self.prefilling[where]:
            self._at(now, where, [])  # once all who are sent now are there
            self.prefilling[where] = -1

    def _prefilled(self, now: float, where: int, requests: list[int]) -> None:
        for request in requests:
            self._at(now + self.steps.hand_over_s, self.loop.n_prefill, [request])
        queue, groups = self.queues[where], self.loop.prefill_groups
        n = min(len(queue), groups * self.steps.most_together)
        self.prefilling[where] = n
        if n:
            batch = [queue.popleft() for _ in range(n)]
            self._at(now + self.steps.prefill_s[-(-n // groups) - 1], where, batch)

    def _arrive(self, now: float, request: int) -> None:
        where = min(range(len(self.decodes)), key=lambda i: self.decodes[i].n + len(self.decodes[i].waiting))
        decode = self.decodes[where]
        decode.waiting.append(request)
        if not decode.busy:
            decode.busy = True
            self._at(now, -1 - where, [])

    def _stepped(self, now: float, where: int) -> None:
        """What the steps of an instance that are over have done, and the next ones."""
        decode = self.decodes[-1 - where]
        for request in decode.new:
            self.first_s[request] = now
        decode.new.clear()
        while decode.ends and decode.ends[0][0] <= decode.step:
            request = heapq.heappop(decode.ends)[1]
            context = float(self.prompt[request] + self.output[request])
            decode.n, decode.tokens, decode.held = decode.n - 1, decode.tokens - context, decode.held - context
            self.last_s[request] = now
            self._send(now)
        self._admit(decode)
        if not decode.n:
            decode.busy = False
            return
        step_s = self.steps.decode_s[decode.n] + self.steps.per_token_s[decode.n] * decode.tokens / decode.n
        until_s = self.events[0][0] if self.events else np.inf
        k = decode.ends[0][0] - decode.step
        if decode.new:
            k = 1
        elif until_s < np.inf:
            k = min(k, int((until_s - now) / step_s) + 1)
        k = min(k, max(1, int(0.05 * decode.tokens / decode.n)))  # contexts grow within them
        decode.step += k
        decode.tokens += k * decode.n
        self._at(now + k * step_s, where, [])

    def _admit(self, decode: _Decode) -> None:
        while decode.waiting and decode.n < self.steps.slots:
            request = decode.waiting[0]
            prompt, output = float(self.prompt[request]), int(self.output[request])
            if decode.n and decode.held + prompt + output > self.steps.kv_tokens:
                return
            decode.waiting.popleft()
            decode.n, decode.tokens, decode.held = decode.n + 1, decode.tokens + prompt, decode.held + prompt + output
            decode.new.append(request)
            heapq.heappush(decode.ends, (decode.step + output, request))
