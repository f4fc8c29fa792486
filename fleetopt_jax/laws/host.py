"""What a serving engine adds to the GPU's own time: launches, scheduling, sampling, kernels less good than alone.

    t = ((kappa t_gpu)^r + h^r)^(1/r) + s n,     h = h_0 + (eta + eta_p [P > 0] R^4 / (R^4 + G^4)) layers

kappa is what operators take in the engine over what they took looped alone (its own in steps with prompt tokens, which
is not less); t_gpu counts collectives of R rows 1 + (w - 1) R / (R + 256) times, for engines choose other kernels for
large ones than were timed. h is the host's time of a step, hidden behind the GPU's where that is longer: eta a layer
(CUDA graphs leave next to nothing of it), eta_p further in a step with prompt tokens that has more rows R than the
largest graph, G (512 of the newest vLLM; 0 where no step with prompt tokens has one, or nobody knows), h_0 the
scheduler's; s is what a sequence costs outside of the overlap, of the n of one scheduler: groups of data-parallel
attention have one each, beside each other. A request's first token takes `first_token_s` beyond its
steps: tokenizer, the way to the engine and back.

A step of one prompt token has the kappa and the host of a mixed step; below one token both are interpolated. Of prompts
that a cache has but for a block, beside 9 to 112 sequences of five LLMs on H100, steps come within 12 %, and 29 % once
(experiments/field_cases.py, C19).

Coefficients: `catalog/data/hosts.json`, fitted by `experiments/fit_hosts.py` to closed loops whose batch fits the cache
(InferenceX, 1 to 16 GPUs, prompts of 128 to 8,192 tokens) and to ML.ENERGY's mean iterations (`vllm-0.11`). Mean
absolute relative errors of TPOT, TTFT and TTFT of prompts of 8,192 tokens, by fits without the LLM; "all": without the
LLM and the GPU; "lent": and with operators of another generation. vLLM rests on one dense LLM and two mixtures of
experts: engines say the error of all three, 10 %, 20 % and 13 %, where that is larger (`catalog/hosts.py`).

    engine      LLMs     GPU   points  LLMs   TPOT   TTFT   at 8K
    vllm        dense    B200     90     1   11 %   18 %    11 %
    vllm        dense    H100     41     1    4 %   22 %    22 %
    vllm        dense    all     131     1    9 %   27 %    20 %
    vllm        dense    lent                10 %   39 %    34 %
    vllm        experts  B200    173     2   11 %   19 %    12 %
    vllm        experts  H100     59     2    8 %   22 %    10 %
    vllm        experts  H200     51     1   10 %   24 %    13 %
    vllm        experts  all     283     2    9 %   26 %    17 %
    vllm        experts  lent                23 %   38 %    32 %
    vllm-0.11   dense    B200     56     5   12 %
    vllm-0.11   dense    H100     58     5    6 %
    vllm-0.11   dense    all     114     5    9 %
    vllm-0.11   experts  B200    120     4   17 %
    vllm-0.11   experts  H100     98     3   15 %
    vllm-0.11   experts  all     218     4   18 %
    sglang      experts  B200    110     1   13 %   77 %    68 %
    sglang      experts  lent                43 %   71 %    61 %
    trtllm      dense    B200    110     1   11 %   65 %    27 %
    trtllm      dense    H100    124     1    7 %   26 %
    trtllm      dense    all     234     2   13 %   55 %    34 %
    trtllm      dense    lent                14 %   57 %    53 %
    trtllm      experts  B200    208     2   20 %   73 %    48 %
    trtllm      experts  H100     79     2   13 %   31 %
    trtllm      experts  all     287     3   24 %   59 %    42 %
    trtllm      experts  lent                56 %   60 %    48 %
"""

from dataclasses import replace
from typing import cast

from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.core.struct import as_floats, namespace, pytree

MANY_ROWS = 256.0  # at which collectives are half way from few rows to many


def longer_s(a_s: ArrayLike, b_s: ArrayLike) -> Array:
    """The soft roofline of two times (`soft_roofline_s`) at r = 4, which takes four multiplications and two roots."""
    xp = namespace(a_s, b_s)
    a2, b2 = xp.square(a_s), xp.square(b_s)
    return xp.sqrt(xp.sqrt(a2 * a2 + b2 * b2 + xp.finfo(float).tiny))  # of nothing, with a slope of 0


@pytree
class HostLaw:
    """One serving engine's own time. Every field is traced; shape () or a leading vmap axis."""

    slowdown: Array  # kappa of a step that only decodes [-]
    prompt_slowdown: Array  # kappa of a step with prompt tokens [-]
    large_exchange: Array  # w: of collectives of many rows, over those timed alone [-]
    step_s: Array  # h_0 [s]
    layer_s: Array  # eta [s]
    prompt_layer_s: Array  # eta_p [s]
    graph_rows: Array  # G: of the largest graph that a step with prompt tokens may replay [-]
    per_seq_s: Array  # s, of one decoding sequence [s]
    first_token_s: Array  # of a request, beyond its steps, before its first token [s]

    def exchanges(self, rows: ArrayLike) -> Array:
        """What collectives of `rows` take in the engine over what they took alone [-]."""
        return cast(Array, 1.0 + (self.large_exchange - 1.0) * rows / (rows + MANY_ROWS))

    def beyond_graphs(self, rows: ArrayLike) -> Array:
        """How far a step of `rows` goes without a graph [-]: 0 to 1."""
        fourth = namespace(self, rows).asarray(rows, dtype=float) ** 4 + 1e-9
        return fourth / (fourth + self.graph_rows**4)

    def of_each(self, n_schedulers: ArrayLike) -> "HostLaw":
        """This law of the sequences of an instance that so many schedulers share evenly."""
        return replace(self, per_seq_s=self.per_seq_s / n_schedulers)

    def step_of_s(
        self,
        gpu_s: ArrayLike,
        n_layers: ArrayLike,
        n_active: ArrayLike,
        prompt: ArrayLike = 0.0,
        rows: ArrayLike = 0.0,
    ) -> Array:
        """A step of `rows` whose operators, timed alone, take `gpu_s` [s]; `prompt`, 0 to 1: whether it has prompt
        tokens."""
        slowdown = self.slowdown + (self.prompt_slowdown - self.slowdown) * prompt
        graphless = prompt * self.beyond_graphs(rows)
        host_s = self.step_s + (self.layer_s + self.prompt_layer_s * graphless) * n_layers
        return cast(Array, self.per_seq_s * n_active + longer_s(slowdown * gpu_s, host_s))


def make_host_law(
    *,
    slowdown: float = 1.0,
    prompt_slowdown: float | None = None,
    large_exchange: float = 1.0,
    step_s: float = 0.0,
    layer_s: float = 0.0,
    prompt_layer_s: float = 0.0,
    graph_rows: float = 0.0,
    per_seq_s: float = 0.0,
    first_token_s: float = 0.0,
) -> HostLaw:
    """A checked `HostLaw`; without arguments a host that costs nothing.

    >>> host = make_host_law(step_s=1e-3, layer_s=1e-5)
    >>> round(float(host.step_of_s(0.01, 80, 4)), 5)
    0.01
    """
    values = dict(locals())
    if prompt_slowdown is None:
        values["prompt_slowdown"] = slowdown
    for name, value in values.items():
        if name in ("slowdown", "prompt_slowdown", "large_exchange") and not 0 < value < float("inf"):
            raise ValueError(f"need a positive, finite {name}, got {value}")
        if not 0 <= value < float("inf"):
            raise ValueError(f"need {name} >= 0 and finite, got {value}")
    return HostLaw(**as_floats(**values))
