"""Which simplification each answer rests on. Every choice is static: changing one changes the program."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Assumptions:
    """The choices `evaluate` takes; hashable, so it is a static argument under `jax.jit`."""

    output_share: float = 0.2
    """Every request is split into prompt and output by this share of its total length, whatever the trace says."""
    power_scope: Literal["one_gpu_per_instance", "instance"] = "one_gpu_per_instance"
    """Count the watts of one GPU of an instance (as the paper's tok/W does), or of all its GPUs."""
    rounding: Literal["whole", "real"] = "whole"
    """Floors and ceilings as published, or dropped: the relaxation that gradients need."""

    @property
    def whole(self) -> bool:
        return self.rounding == "whole"


PUBLISHED = Assumptions()
PRESETS = {"published": PUBLISHED}
