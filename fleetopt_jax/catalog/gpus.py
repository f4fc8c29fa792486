"""GPUs by name. Prices are the paper's (table 5: USD/h of eight GPUs), but for A100 and L40S.

Peaks are dense, without sparsity. Where no idle power is given it is the default share of the TDP.
"""

from dataclasses import dataclass

from fleetopt_jax.core.errors import unknown_name
from fleetopt_jax.core.units import GIB, TB, TFLOP
from fleetopt_jax.laws.hardware import Gpu, make_gpu


@dataclass(frozen=True)
class GpuEntry:
    """One GPU of the catalog, with where its numbers come from."""

    title: str
    gpu: Gpu
    chunk_tokens: float  # prefill chunk its engines default to; as published for A100, H100 and B200
    source: str
    # vLLM's server defaults (get_batch_defaults in vllm/engine/arg_utils.py): 1024 sequences and 8192 tokens on boards
    # of 70 GiB and more that are not an A100, else 256 and 2048. (0.33.0: 16384 tokens from 160 GiB on.)
    max_num_seqs: int = 1024  # most sequences in flight
    batched_tokens: int = 8192  # most tokens of one engine step (max_num_batched_tokens)


def _build() -> dict[str, GpuEntry]:
    return {
        "a100": GpuEntry(
            "A100 SXM 80 GB",
            make_gpu(
                memory_bytes=80 * GIB,
                bandwidth_bytes_per_s=2.039 * TB,
                peak_flop_per_s=312 * TFLOP,
                tdp_w=400,
                usd_per_h=2.21,
            ),
            512,
            "NVIDIA A100 data sheet; price: vllm-sr-sim's A100 80 GB profile",
            max_num_seqs=256,
            batched_tokens=2048,
        ),
        "h100": GpuEntry(
            "H100 SXM 80 GB",
            make_gpu(
                memory_bytes=80 * GIB,
                bandwidth_bytes_per_s=3.35 * TB,
                peak_flop_per_s=989 * TFLOP,
                peak_flop8_per_s=1979 * TFLOP,
                tdp_w=700,
                usd_per_h=32.2 / 8,
            ),
            1024,
            "NVIDIA H100 data sheet; price: arXiv 2603.17280v1, table 5",
        ),
        "h200": GpuEntry(
            "H200 SXM 141 GB",
            make_gpu(
                memory_bytes=141 * GIB,
                bandwidth_bytes_per_s=4.8 * TB,
                peak_flop_per_s=989 * TFLOP,
                peak_flop8_per_s=1979 * TFLOP,
                tdp_w=700,
                usd_per_h=48.0 / 8,
            ),
            1024,
            "NVIDIA H200 data sheet; price: arXiv 2603.17280v1, table 5",
        ),
        "b200": GpuEntry(
            "B200 SXM 180 GB",
            make_gpu(
                memory_bytes=180 * GIB,
                bandwidth_bytes_per_s=8.0 * TB,
                peak_flop_per_s=2250 * TFLOP,
                peak_flop8_per_s=4500 * TFLOP,
                tdp_w=1000,
                idle_w=251.3,
                usd_per_h=64.0 / 8,
            ),
            2048,
            "NVIDIA B200 data sheet; price: arXiv 2603.17280v1, table 5; "
            "idle power: B200 context sweep of vllm-project/semantic-router (Apache-2.0)",
        ),
        "gb200": GpuEntry(
            "GB200 (one GPU of NVL72) 200 GB",
            make_gpu(
                memory_bytes=200 * GIB,
                bandwidth_bytes_per_s=8.0 * TB,
                peak_flop_per_s=2500 * TFLOP,
                peak_flop8_per_s=5000 * TFLOP,
                tdp_w=1200,
                usd_per_h=80.0 / 8,
            ),
            2048,
            "NVIDIA GB200 NVL72 data sheet; price: arXiv 2603.17280v1, table 5",
        ),
        "l40s": GpuEntry(
            "L40S 48 GB",
            make_gpu(
                memory_bytes=45 * GIB,  # of 48 GB of GDDR6; the driver shows 46,068 MiB with error correction on
                bandwidth_bytes_per_s=0.864 * TB,
                peak_flop_per_s=362 * TFLOP,
                peak_flop8_per_s=733 * TFLOP,
                tdp_w=350,
                usd_per_h=1.861,
            ),
            512,
            "NVIDIA L40S data sheet; price assumed: AWS g6e.xlarge, on demand in us-east-1",
            max_num_seqs=256,
            batched_tokens=2048,
        ),
    }


GPUS = _build()


def gpu_entry(name: str, where: str = "--gpu") -> GpuEntry:
    """The catalog's GPU of that name (case does not matter)."""
    try:
        return GPUS[name.lower()]
    except KeyError:
        raise unknown_name(where, name, GPUS) from None
