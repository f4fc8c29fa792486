"""The choice `lengths`: prompt and output of every request."""

from dataclasses import dataclass
from typing import ClassVar

from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.workload.atoms import Workload, mean_tokens, split_total, total_tokens


class Lengths:
    """How a request's length splits into prompt and output."""

    name: ClassVar[str]

    def split(self, workload: Workload, output_share: float, *, whole: bool) -> tuple[Array, Array]:
        """(prompt, output) of every atom [tokens] [J]."""
        raise NotImplementedError

    def whole_share(self, workload: Workload, output_share: float) -> ArrayLike:
        """Output share of a request that is compressed as a whole [-]."""
        raise NotImplementedError


@dataclass(frozen=True)
class SplitByShare(Lengths):
    """Every request's total length is split by the output share."""

    name: ClassVar[str] = "output_share"

    def split(self, workload: Workload, output_share: float, *, whole: bool) -> tuple[Array, Array]:
        return split_total(total_tokens(workload), output_share, whole=whole)

    def whole_share(self, workload: Workload, output_share: float) -> ArrayLike:
        return output_share


@dataclass(frozen=True)
class TracedLengths(Lengths):
    """The trace's own prompt and output."""

    name: ClassVar[str] = "trace"

    def split(self, workload: Workload, output_share: float, *, whole: bool) -> tuple[Array, Array]:
        return workload.prompt_tokens, workload.output_tokens

    def whole_share(self, workload: Workload, output_share: float) -> ArrayLike:
        prompt, output = mean_tokens(workload)
        return output / (prompt + output)
