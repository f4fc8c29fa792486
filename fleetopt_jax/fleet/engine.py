"""An engine: what one instance (an LLM on TP GPUs) can do, as coefficients of the laws."""

import math

import jax.numpy as jnp
from jax import Array

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.struct import as_floats, pytree
from fleetopt_jax.core.units import GIB
from fleetopt_jax.laws.hardware import Gpu
from fleetopt_jax.laws.kv_cache import MEMORY_UTILIZATION, KvCapacity, roofline_kv_blocks
from fleetopt_jax.laws.llm import Llm, weight_bytes
from fleetopt_jax.laws.power import LogisticPower, RooflinePower, roofline_power
from fleetopt_jax.laws.roofline import DecodeStep, roofline_decode_step


@pytree
class Engine:
    """Every number is traced; the type of `power` is the choice of the power law."""

    decode: DecodeStep
    kv: KvCapacity
    power: LogisticPower | RooflinePower
    chunk_tokens: Array  # prefill tokens of one iteration [tokens]
    gpus_per_instance: Array  # tensor parallelism [-]
    usd_per_gpu_h: Array  # price [USD/h]


def make_engine(
    decode: DecodeStep,
    kv: KvCapacity,
    power: LogisticPower | RooflinePower,
    *,
    chunk_tokens: float,
    gpus_per_instance: float,
    usd_per_gpu_h: float,
) -> Engine:
    """A checked `Engine`."""
    if not (1 <= chunk_tokens < math.inf and 1 <= gpus_per_instance < math.inf and 0 <= usd_per_gpu_h < math.inf):
        raise ValueError(
            f"need chunk_tokens, gpus_per_instance >= 1 and usd_per_gpu_h >= 0, "
            f"got {chunk_tokens=}, {gpus_per_instance=}, {usd_per_gpu_h=}"
        )
    numbers = as_floats(chunk_tokens=chunk_tokens, gpus_per_instance=gpus_per_instance, usd_per_gpu_h=usd_per_gpu_h)
    return Engine(decode=decode, kv=kv, power=power, **numbers)


def roofline_engine(gpu: Gpu, llm: Llm, tp: float, *, chunk_tokens: float) -> Engine:
    """The published roofline engine of any GPU, LLM and tensor parallelism. Pure: no check that the model fits."""
    decode = roofline_decode_step(gpu, llm, tp)
    return Engine(
        decode=decode,
        kv=KvCapacity(n_blocks=roofline_kv_blocks(gpu, llm, tp), slot_tokens=jnp.asarray(jnp.inf, dtype=float)),
        power=roofline_power(gpu, llm, tp, decode),
        usd_per_gpu_h=gpu.usd_per_h,
        **as_floats(chunk_tokens=chunk_tokens, gpus_per_instance=tp),
    )


def require_fit(where: str, gpu: Gpu, llm: Llm, tp: int) -> None:
    """Refuse, at the door, a model whose weights leave no room for a single KV block."""
    if float(roofline_kv_blocks(gpu, llm, tp)) < 1:
        needs = float(weight_bytes(llm)) / tp
        has = MEMORY_UTILIZATION * float(gpu.memory_bytes)
        raise BadInput(
            where,
            f"does not fit: needs {needs / GIB:.1f} GiB of weights per GPU at TP {tp} besides communication buffers "
            f"and KV cache, has {has / GIB:.1f} GiB ({MEMORY_UTILIZATION:.0%} of the memory)",
            "use more GPUs per instance, a larger GPU or fewer bytes per weight",
        )
