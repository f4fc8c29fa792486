"""The mixed step of an LLM on GPUs: its layers divided as asked, with the operator laws of the GPU and data types and
the host law of the serving engine."""

from dataclasses import dataclass

from fleetopt_jax.catalog.architecture import Architecture
from fleetopt_jax.catalog.gpus import GpuEntry
from fleetopt_jax.catalog.llms import KV_BYTES, PRECISIONS, held_at
from fleetopt_jax.core.errors import BadField
from fleetopt_jax.core.struct import as_floats


@dataclass(frozen=True)
class Parallelism:
    """How the GPUs of an instance share an LLM."""

    tp: int = 1  # GPUs that divide heads and widths
    ep: int = 1  # groups of GPUs that divide the experts whole
    dp: int = 1  # groups of tp GPUs with sequences of their own
    pp: int = 1  # stages of layers

    @property
    def gpus(self) -> int:
        """Of the instance."""
        return self.tp * self.dp * self.pp

    @property
    def expert_gpus(self) -> int:
        """That a layer's experts are spread over."""
        return self.tp * self.dp


