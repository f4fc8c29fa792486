"""Which simplification each answer rests on: nine choices, two presets, any mixture.

Every choice is static: changing one changes the program. `fleet/choices.py` holds one small function for each;
`fleetopt ledger` walks from one preset to the other.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args, get_type_hints

from fleetopt_jax.core.errors import BadInput, unknown_name


@dataclass(frozen=True)
class Assumptions:
    """The choices `evaluate` takes; hashable, so it is a static argument under `jax.jit`."""

    integration: Literal["sampled", "exact"] = "exact"
    """Length distributions by the paper's 3,000 draws (`published.procedure` only), or summed over all lengths."""
    power_scope: Literal["one_gpu_per_instance", "instance"] = "one_gpu_per_instance"
    """Count the watts of one GPU of an instance (as the paper's tok/W does), or of all, with host and PUE if given."""
    lengths: Literal["output_share", "trace"] = "output_share"
    """Split every request's total length by `output_share`, or take the trace's own prompt and output."""
    compression: Literal["free", "prompt_only"] = "free"
    """A request compressed into a shorter window shrinks as a whole, for nothing and always; or its prompt shrinks, its
    output stays, a try may fail, and takes time and energy."""
    occupancy: Literal["full_batch", "fixed_point"] = "full_batch"
    """In flight n = rho n_max with steps as long as with all slots full, or Little's law at the real step time."""
    prefill: Literal["free_chunks", "compute"] = "free_chunks"
    """Chunks of the prompt ride along for free, or take FLOPs, engine time and power."""
    kv_cache: Literal["reserved", "paged"] = "reserved"
    """A slot reserves its whole window, or holds the tokens it has (overflowing at most 1 % of the time)."""
    engine: Literal["projected", "measured"] = "projected"
    """The paper's coefficients, or the law (or the configuration's own fit) from measurements. Read by the catalog."""
    tail: Literal["mean_prefill", "quantile"] = "mean_prefill"
    """P99 TTFT = P99 slot wait + mean prefill with Poisson arrivals, or the P99 of slot wait + prefill queue + own
    prefill with the arrivals' own burstiness."""

    output_share: float = 0.2
    """The share where lengths are split by it."""
    rounding: Literal["whole", "real"] = "whole"
    """Floors and ceilings, or neither: the relaxation that gradients need."""

    dispatch: Literal["jsq", "round_robin", "random"] = "jsq"
    """Requests of a pool go to the instance with the fewest, in turn, or at random. Read where the occupancy is the
    fixed point and the tail the quantile."""

    @property
    def whole(self) -> bool:
        return self.rounding == "whole"


CHOICES = (
    "integration",
    "power_scope",
    "lengths",
    "compression",
    "occupancy",
    "prefill",
    "kv_cache",
    "engine",
    "tail",
)
PUBLISHED = Assumptions()
PHYSICAL = Assumptions(
    power_scope="instance",
    lengths="trace",
    compression="prompt_only",
    occupancy="fixed_point",
    prefill="compute",
    kv_cache="paged",
    engine="measured",
    tail="quantile",
)
PRESETS = {"physical": PHYSICAL, "published": PUBLISHED}


def parse_assumptions(text: str, where: str = "--assume") -> Assumptions:
    """A preset, and choices changed in it: 'physical', 'published', 'physical,kv_cache=reserved,tail=mean_prefill'."""
    preset, *changes = (part.strip() for part in text.split(","))
    if preset not in PRESETS:
        raise unknown_name(where, preset, PRESETS)
    assumptions = PRESETS[preset]
    for change in changes:
        choice, _, value = change.partition("=")
        if choice not in CHOICES:
            raise unknown_name(where, choice, CHOICES)
        allowed = get_args(get_type_hints(Assumptions)[choice])
        if value not in allowed:
            raise BadInput(where, f"{choice} = {value!r}", f"need {' or '.join(allowed)}")
        assumptions = replace(assumptions, **{choice: value})
    if assumptions.integration != "exact":
        raise BadInput(where, "integration = 'sampled'", "need exact: the paper's sampler is for reproduce and ledger")
    return assumptions
