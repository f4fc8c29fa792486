"""The choices `integration` and `engine`: read where a workload is made and where an engine is built."""

from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True)
class Exact:
    """Length distributions summed over all lengths."""

    name: ClassVar[str] = "exact"


@dataclass(frozen=True)
class Sampled:
    """By the paper's 3,000 draws: `published.procedure` only."""

    name: ClassVar[str] = "sampled"


@dataclass(frozen=True)
class Projected:
    """Engines by the paper's coefficients."""

    name: ClassVar[Literal["projected"]] = "projected"


@dataclass(frozen=True)
class Measured:
    """Engines by the law, or the configuration's own fit, from measurements."""

    name: ClassVar[Literal["measured"]] = "measured"


Integration = Exact | Sampled
EngineSource = Projected | Measured
EXACT, SAMPLED, PROJECTED, MEASURED = Exact(), Sampled(), Projected(), Measured()
