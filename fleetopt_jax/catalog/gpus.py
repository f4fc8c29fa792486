"""GPUs by name. Prices are the paper's (table 5: USD/h of eight GPUs), but for A100 and L40S.

Peaks are dense, without sparsity. Where no idle power is given it is the default share of the TDP.
"""

from dataclasses import dataclass
from typing import Literal

from fleetopt_jax.core.errors import unknown_name
from fleetopt_jax.core.units import GIB, TB, TFLOP
from fleetopt_jax.laws.hardware import Gpu, make_gpu


@dataclass(frozen=True)
class GpuEntry:
    """One GPU as its data sheet has it, in plain numbers: hashable, and nothing is built at import. One of your own
    goes wherever a name does."""

    name: str
    title: str
    memory_bytes: float  # high-bandwidth memory [B]
    bandwidth_bytes_per_s: float  # peak memory bandwidth [B/s]
    peak_flop_per_s: float  # dense 16-bit tensor-core peak [FLOP/s]
    tdp_w: float  # thermal design power [W]
    usd_per_h: float  # rental price [USD/h]
    chunk_tokens: float  # prefill chunk its engines default to; as published for A100, H100 and B200
    source: str  # where its numbers come from
    peak_flop8_per_s: float | None = None  # dense 8-bit peak; None where the GPU has no such units [FLOP/s]
    formats: tuple[str, ...] = ("fp8", "int8")  # that its tensor cores multiply besides 16 bits
    idle_w: float | None = None  # with a model loaded and nothing to do; None: the default share of the TDP [W]
    nccl_bytes: float = 411_041_792  # communication buffers when tensor-parallel; the published one at TP 8 [B]
    law: Literal["h100", "b200"] = "h100"  # whose measured law its engines go by, carried over by data-sheet figures
    # vLLM's server defaults (get_batch_defaults in vllm/engine/arg_utils.py): 1024 sequences and 8192 tokens on boards
    # of 70 GiB and more that are not an A100, else 256 and 2048. (0.33.0: 16384 tokens from 160 GiB on.)
    max_num_seqs: int = 1024  # most sequences in flight
    batched_tokens: int = 8192  # most tokens of one engine step (max_num_batched_tokens)

    @property
    def gpu(self) -> Gpu:
        """The checked record the laws read."""
        return make_gpu(
            memory_bytes=self.memory_bytes,
            bandwidth_bytes_per_s=self.bandwidth_bytes_per_s,
            peak_flop_per_s=self.peak_flop_per_s,
            peak_flop8_per_s=self.peak_flop8_per_s,
            tdp_w=self.tdp_w,
            idle_w=self.idle_w,
            usd_per_h=self.usd_per_h,
            nccl_bytes=self.nccl_bytes,
        )


_SHEETS = (
    GpuEntry(
        name="a100",
        title="A100 SXM 80 GB",
        memory_bytes=80 * GIB,
        bandwidth_bytes_per_s=2.039 * TB,
        peak_flop_per_s=312 * TFLOP,
        peak_flop8_per_s=624 * TFLOP,  # of integers: it has no units of 8-bit floats
        formats=("int8",),
        tdp_w=400,
        usd_per_h=2.21,
        chunk_tokens=512,
        source="NVIDIA A100 data sheet; price: vllm-sr-sim's A100 80 GB profile",
        max_num_seqs=256,
        batched_tokens=2048,
    ),
    GpuEntry(
        name="h100",
        title="H100 SXM 80 GB",
        memory_bytes=80 * GIB,
        bandwidth_bytes_per_s=3.35 * TB,
        peak_flop_per_s=989 * TFLOP,
        peak_flop8_per_s=1979 * TFLOP,
        tdp_w=700,
        usd_per_h=32.2 / 8,
        chunk_tokens=1024,
        source="NVIDIA H100 data sheet; price: arXiv 2603.17280v1, table 5",
    ),
    GpuEntry(
        name="h200",
        title="H200 SXM 141 GB",
        memory_bytes=141 * GIB,
        bandwidth_bytes_per_s=4.8 * TB,
        peak_flop_per_s=989 * TFLOP,
        peak_flop8_per_s=1979 * TFLOP,
        tdp_w=700,
        usd_per_h=48.0 / 8,
        chunk_tokens=1024,
        source="NVIDIA H200 data sheet; price: arXiv 2603.17280v1, table 5",
    ),
    GpuEntry(
        name="b200",
        title="B200 SXM 180 GB",
        memory_bytes=180 * GIB,
        bandwidth_bytes_per_s=8.0 * TB,
        peak_flop_per_s=2250 * TFLOP,
        peak_flop8_per_s=4500 * TFLOP,
        formats=("fp8", "int8", "nvfp4"),
        tdp_w=1000,
        idle_w=251.3,
        usd_per_h=64.0 / 8,
        chunk_tokens=2048,
        source="NVIDIA B200 data sheet; price: arXiv 2603.17280v1, table 5; "
        "idle power: B200 context sweep of vllm-project/semantic-router (Apache-2.0)",
        law="b200",
    ),
    GpuEntry(
        name="gb200",
        title="GB200 (one GPU of NVL72) 200 GB",
        memory_bytes=200 * GIB,
        bandwidth_bytes_per_s=8.0 * TB,
        peak_flop_per_s=2500 * TFLOP,
        peak_flop8_per_s=5000 * TFLOP,
        formats=("fp8", "int8", "nvfp4"),
        tdp_w=1200,
        usd_per_h=80.0 / 8,
        chunk_tokens=2048,
        source="NVIDIA GB200 NVL72 data sheet; price: arXiv 2603.17280v1, table 5",
        law="b200",
    ),
    GpuEntry(
        name="l40s",
        title="L40S 48 GB",
        memory_bytes=45 * GIB,  # of 48 GB of GDDR6; the driver shows 46,068 MiB with error correction on
        bandwidth_bytes_per_s=0.864 * TB,
        peak_flop_per_s=362 * TFLOP,
        peak_flop8_per_s=733 * TFLOP,
        tdp_w=350,
        usd_per_h=1.861,
        chunk_tokens=512,
        source="NVIDIA L40S data sheet; price assumed: AWS g6e.xlarge, on demand in us-east-1",
        max_num_seqs=256,
        batched_tokens=2048,
    ),
)
GPUS = {sheet.name: sheet for sheet in _SHEETS}


def gpu_entry(name: str | GpuEntry, where: str = "gpu") -> GpuEntry:
    """The catalog's GPU of that name (case does not matter), or the one that is given."""
    if isinstance(name, GpuEntry):
        return name
    try:
        return GPUS[name.lower()]
    except KeyError:
        raise unknown_name(where, name, GPUS) from None
