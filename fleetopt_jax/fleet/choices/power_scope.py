"""The choice `power_scope`: watts of a pool from those of one GPU."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.fleet.engine import Engine
from fleetopt_jax.fleet.surroundings import Site


class PowerScope:
    """Whose watts count."""

    name: ClassVar[str]
    counts_site: ClassVar[bool]  # whether hosts and cooling are in it

    def pool_w(
        self, engine: Engine, site: Site, n_instances: ArrayLike, gpu_w: ArrayLike, compressor_w: ArrayLike
    ) -> Array:
        """Watts of `n_instances` whose GPUs draw `gpu_w` each, and of what compresses for them [W]."""
        raise NotImplementedError


@dataclass(frozen=True)
class OneGpuPerInstance(PowerScope):
    """One GPU's watts for an instance of TP GPUs, as the paper's tok/W has it."""

    name: ClassVar[str] = "one_gpu_per_instance"
    counts_site: ClassVar[bool] = False

    def pool_w(
        self, engine: Engine, site: Site, n_instances: ArrayLike, gpu_w: ArrayLike, compressor_w: ArrayLike
    ) -> Array:
        return jnp.asarray(n_instances) * gpu_w


@dataclass(frozen=True)
class WholeInstance(PowerScope):
    """All GPUs of an instance, host watts and PUE where they are given."""

    name: ClassVar[str] = "instance"
    counts_site: ClassVar[bool] = True

    def pool_w(
        self, engine: Engine, site: Site, n_instances: ArrayLike, gpu_w: ArrayLike, compressor_w: ArrayLike
    ) -> Array:
        boards_w = n_instances * engine.gpus_per_instance * (gpu_w + site.host_w_per_gpu)
        return site.pue * (boards_w + compressor_w)
