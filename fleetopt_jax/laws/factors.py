"""Factors on a step of operators: what one stack takes over what the catalog says of its GPU and serving engine.

    kappa -> f_gpu kappa,     kappa_p -> max(f_gpu f_prompt kappa_p, f_gpu kappa),     w -> f_exchange w,
    h -> f_host h,     s -> f_sequence s,     first_token_s -> f_first_token first_token_s,
    W - idle -> f_watts (W - idle), below the board's limit

with the symbols of `laws/host.py` and `laws/operators/watts.py`. 1 is the catalog's. They are few, each is something
that stacks differ in (kernels and clocks, chunked prefill, interconnect, host CPU, API server, cooling and firmware),
and each keeps the law's shape, so that a batch, a context or a prompt that nobody measured still follows. Fitted by
`calibrate/factors.py`.
"""

from dataclasses import replace

from jax import Array

from fleetopt_jax.core.struct import as_floats, namespace, pytree
from fleetopt_jax.laws.host import HostLaw
from fleetopt_jax.laws.operators.watts import StepWatts


@pytree
class StepFactors:
    """Factors on one engine's step [-]. Every field is traced; shape () or a leading vmap axis."""

    gpu: Array  # on kappa, of every step
    prompt: Array  # further on that of steps with prompt tokens
    exchange: Array  # on what collectives of many rows take over those timed alone
    host: Array  # on the host's time of a step
    sequence: Array  # on the time of each sequence
    first_token: Array  # on what a first token takes beyond its steps
    watts: Array  # on the watts above idle

    def of_host(self, law: HostLaw) -> HostLaw:
        """The serving engine's own time with these factors; a step with prompt tokens is never the faster one."""
        slowdown = self.gpu * law.slowdown
        xp = namespace(self, law)
        return replace(
            law,
            slowdown=slowdown,
            prompt_slowdown=xp.maximum(self.gpu * self.prompt * law.prompt_slowdown, slowdown),
            large_exchange=self.exchange * law.large_exchange,
            step_s=self.host * law.step_s,
            layer_s=self.host * law.layer_s,
            prompt_layer_s=self.host * law.prompt_layer_s,
            per_seq_s=self.sequence * law.per_seq_s,
            first_token_s=self.first_token * law.first_token_s,
        )

    def of_watts(self, law: StepWatts) -> StepWatts:
        """The watts of its steps with these factors."""
        fractions = {name: self.watts * getattr(law.operators, name) for name in ("busy_frac", "memory_frac")}
        operators = replace(law.operators, **fractions, flop_frac=self.watts * law.operators.flop_frac)
        return StepWatts(operators, self.watts * law.gap_frac)


def make_step_factors(
    *,
    gpu: float = 1.0,
    prompt: float = 1.0,
    exchange: float = 1.0,
    host: float = 1.0,
    sequence: float = 1.0,
    first_token: float = 1.0,
    watts: float = 1.0,
) -> StepFactors:
    """Checked `StepFactors`; without arguments the catalog's engine.

    >>> from fleetopt_jax.laws.host import make_host_law
    >>> law = make_step_factors(gpu=0.9, host=2.0).of_host(make_host_law(slowdown=1.1, step_s=1e-3))
    >>> round(float(law.slowdown), 4), float(law.step_s)
    (0.99, 0.002)
    """
    values = dict(locals())
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"need a positive, finite factor {name}, got {value}")
    return StepFactors(**as_floats(**values))
