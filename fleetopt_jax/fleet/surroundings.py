"""What surrounds the engines of a fleet: the site that powers them, the compressor in front of them, and what of
them may be down."""

import math

from jax import Array

from fleetopt_jax.core.struct import as_floats, pytree
from fleetopt_jax.fleet.reserve import Reserve
from fleetopt_jax.laws.compression import Compressor, make_compressor


@pytree
class Site:
    """What surrounds the GPUs. Off by default: boards only, electricity not priced. Leaves traced, shape ()."""

    host_w_per_gpu: Array  # CPUs, memory, network and fans, shared out to the GPUs [W]
    pue: Array  # power usage effectiveness: power of the site over that of its machines [-]
    usd_per_kwh: Array  # price of electricity [USD/kWh]
    kg_co2_per_kwh: Array  # carbon intensity of electricity [kg/kWh]


def make_site(
    *, host_w_per_gpu: float = 0.0, pue: float = 1.0, usd_per_kwh: float = 0.0, kg_co2_per_kwh: float = 0.0
) -> Site:
    """A checked `Site`; the default counts GPU boards and nothing else.

    >>> float(fo.make_site(pue=1.2, usd_per_kwh=0.1).pue)
    1.2
    """
    values = dict(locals())
    for name, value in values.items():
        least = 1.0 if name == "pue" else 0.0
        if not least <= value < math.inf:
            raise ValueError(f"need a finite {name} >= {least:g}, got {value}")
    return Site(**as_floats(**values))


@pytree
class Surroundings:
    """What all lanes of a fleet share."""

    site: Site
    compressor: Compressor
    reserve: Reserve | None = None  # what of each pool may be down while it holds its limits; None: nothing


def make_surroundings(
    site: Site | None = None,
    compressor: Compressor | None = None,
    reserve: Reserve | None = None,
) -> Surroundings:
    """A site, a compressor and what may be down; by default boards alone, one that is perfect and free, and nothing."""
    return Surroundings(site or make_site(), compressor or make_compressor(), reserve)
