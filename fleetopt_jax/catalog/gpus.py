"""GPUs by name. Prices are the paper's (table 5: USD/h of eight GPUs), but for A100, L40S and what came later.

Peaks are dense, without sparsity. Memory is what CUDA reports, as PyTorch prints it ("GPU 0 has a total capacity of
79.20 GiB"): 0.4 to 1.9 % less than nvidia-smi shows (81,559 MiB), and 1 to 8 % less than the name says.

Idle power is that with a model loaded and nothing to do: a CUDA context keeps the clocks up, so it is 25 to 65 W above
an empty board's (`empty_w`; those without another source: arXiv 2605.23918, as quoted in sgl-project/sglang#27567).
Where nobody has published it, it is the default share of the TDP.

Links are one way and per GPU, half of what data sheets call bidirectional: NVLink 3, 4 and 5 300, 450 and 900 GB/s,
PCIe x16 32 (Gen 4) and 64 GB/s (Gen 5). Between nodes, a network card per GPU: 200 Gb/s (DGX A100), 400 Gb/s
(ConnectX-7: DGX H100, H200, B200; GB200 NVL72), 800 Gb/s (ConnectX-8: DGX B300, GB300 NVL72); assumed, 400 Gb/s,
for boards on PCIe. Seventy-two GPUs of a GB200 or GB300 rack are one NVLink domain, in hosts of four.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from fleetopt_jax.core.errors import unknown_name
from fleetopt_jax.core.units import GB, GIB, TB, TFLOP
from fleetopt_jax.laws.hardware import INTER_NODE_BYTES_PER_S, LINK_BYTES_PER_S, LINK_GPUS, Gpu, make_gpu

PCIE_BYTES_PER_S = 64 * GB  # of 16 lanes of Gen 5, one way
SURE_ON_PCIE = 2  # GPUs: hosts differ in what more of them reach, by up to ten (`laws/operators/collectives.py`)


@dataclass(frozen=True)
class OwnOperator:
    """An operator law fitted to timings of one's own GPU: `catalog/operators.py` makes it."""

    operator: str  # its class
    variant: str  # data type, or kind
    coefficients: tuple[tuple[str, float], ...]
    rows: int  # it was fitted to
    median_error: float | None = None  # relative, on those rows
    p90_error: float | None = None
    held_out_median_error: float | None = None  # on every fifth shape, left out of the fit


@dataclass(frozen=True)
class GpuEntry:
    """One GPU as its data sheet has it, in plain numbers: hashable, and nothing is built at import. One of your own
    goes wherever a name does."""

    name: str
    title: str
    memory_bytes: float  # as CUDA reports it: what an engine's share is taken of [B]
    bandwidth_bytes_per_s: float  # peak memory bandwidth [B/s]
    peak_flop_per_s: float  # dense 16-bit tensor-core peak [FLOP/s]
    tdp_w: float  # thermal design power [W]
    usd_per_h: float  # rental price [USD/h]
    chunk_tokens: float  # prefill chunk its engines default to; as published for A100, H100 and B200
    source: str  # where its numbers come from
    peak_flop8_per_s: float | None = None  # dense 8-bit peak; None where the GPU has no such units [FLOP/s]
    peak_flop4_per_s: float | None = None  # dense 4-bit peak; None where the GPU has no such units [FLOP/s]
    formats: tuple[str, ...] = ("fp8", "int8")  # that its tensor cores multiply besides 16 bits
    idle_w: float | None = None  # with a model loaded and nothing to do; None: the default share of the TDP [W]
    empty_w: float | None = None  # without a model, nothing running; None where nobody has published it [W]
    nominal_memory_bytes: float | None = None  # as its name says, which the paper counts with; None: as CUDA has it [B]
    nccl_bytes: float = 411_041_792  # communication buffers when tensor-parallel; the published one at TP 8 [B]
    link_bytes_per_s: float = LINK_BYTES_PER_S  # of its link to the other GPUs, one way [B/s]
    link_gpus: int = LINK_GPUS  # GPUs that reach one another over that link
    gpus_per_node: int = 8  # GPUs of a host
    inter_node_bytes_per_s: float = INTER_NODE_BYTES_PER_S  # of its share of the network between nodes, one way [B/s]
    law: Literal["h100", "b200"] = "h100"  # whose measured law its engines go by, carried over by data-sheet figures
    # vLLM's server defaults (get_batch_defaults in vllm/engine/arg_utils.py): 1024 sequences and 8192 tokens on boards
    # of 70 GiB and more that are not an A100, else 256 and 2048. (0.33.0: 16384 tokens from 160 GiB on.)
    max_num_seqs: int = 1024  # most sequences in flight
    batched_tokens: int = 8192  # most tokens of one engine step (max_num_batched_tokens)
    borrows: str | None = None  # whose operators it has where its own were not timed; None: its own tables', or `law`'s
    operators: tuple[OwnOperator, ...] = ()  # timed on it by its owner (experiments/measure_gpu.py)

    @property
    def gpu(self) -> Gpu:
        """The checked record the laws read."""
        return make_gpu(
            memory_bytes=self.memory_bytes,
            bandwidth_bytes_per_s=self.bandwidth_bytes_per_s,
            peak_flop_per_s=self.peak_flop_per_s,
            peak_flop8_per_s=self.peak_flop8_per_s,
            peak_flop4_per_s=self.peak_flop4_per_s,
            tdp_w=self.tdp_w,
            idle_w=self.idle_w,
            usd_per_h=self.usd_per_h,
            nccl_bytes=self.nccl_bytes,
            link_bytes_per_s=self.link_bytes_per_s,
            link_gpus=self.link_gpus,
            inter_node_bytes_per_s=self.inter_node_bytes_per_s,
        )

    @property
    def nominal_gpu(self) -> Gpu:
        """With the memory that its name says: as the paper's engines have it."""
        return dataclasses.replace(self, memory_bytes=self.nominal_memory_bytes or self.memory_bytes).gpu


_SHEETS = (
    GpuEntry(
        name="a100",
        title="A100 SXM 80 GB",
        memory_bytes=79.25 * GIB,
        bandwidth_bytes_per_s=2.039 * TB,
        peak_flop_per_s=312 * TFLOP,
        peak_flop8_per_s=624 * TFLOP,  # of integers: it has no units of 8-bit floats
        formats=("int8",),
        tdp_w=400,
        idle_w=62,
        empty_w=54,
        usd_per_h=2.21,
        nominal_memory_bytes=80 * GIB,
        link_bytes_per_s=300 * GB,
        inter_node_bytes_per_s=25 * GB,
        chunk_tokens=512,
        source="NVIDIA A100 data sheet; price: vllm-sr-sim's A100 80 GB profile; memory: PyTorch on A100-SXM4-80GB "
        "(nvidia-smi 81,920 MiB); idle power: 59 to 62 W in chuyishang/inference-energy, 80 W in arXiv 2605.23918",
        max_num_seqs=256,
        batched_tokens=2048,
    ),
    GpuEntry(
        name="h100",
        title="H100 SXM 80 GB",
        memory_bytes=79.2 * GIB,
        bandwidth_bytes_per_s=3.35 * TB,
        peak_flop_per_s=989 * TFLOP,
        peak_flop8_per_s=1979 * TFLOP,
        tdp_w=700,
        idle_w=121.7,
        empty_w=72,
        usd_per_h=32.2 / 8,
        nominal_memory_bytes=80 * GIB,
        link_bytes_per_s=450 * GB,
        inter_node_bytes_per_s=50 * GB,
        chunk_tokens=1024,
        source="NVIDIA H100 data sheet; price: arXiv 2603.17280v1, table 5; memory: PyTorch on H100 80GB HBM3, 79.18 "
        "to 79.21 GiB (nvidia-smi 81,559 MiB); idle power: arXiv 2605.23918",
    ),
    GpuEntry(
        name="h200",
        title="H200 SXM 141 GB",
        memory_bytes=139.8 * GIB,
        bandwidth_bytes_per_s=4.8 * TB,
        peak_flop_per_s=989 * TFLOP,
        peak_flop8_per_s=1979 * TFLOP,
        tdp_w=700,
        idle_w=115,
        usd_per_h=48.0 / 8,
        nominal_memory_bytes=141 * GIB,
        link_bytes_per_s=450 * GB,
        inter_node_bytes_per_s=50 * GB,
        chunk_tokens=1024,
        source="NVIDIA H200 data sheet; price: arXiv 2603.17280v1, table 5; memory: PyTorch on H200, 139.72 to 139.83 "
        "GiB (nvidia-smi 143,771 MiB); idle power: sgl-project/sglang#3196, 124.6 GiB loaded (80 W on another host)",
    ),
    GpuEntry(
        name="b200",
        title="B200 SXM 180 GB",
        memory_bytes=178.35 * GIB,
        bandwidth_bytes_per_s=8.0 * TB,
        peak_flop_per_s=2250 * TFLOP,
        peak_flop8_per_s=4500 * TFLOP,
        peak_flop4_per_s=9000 * TFLOP,
        formats=("fp8", "int8", "nvfp4"),
        tdp_w=1000,
        idle_w=251.3,
        empty_w=191.2,
        usd_per_h=64.0 / 8,
        nominal_memory_bytes=180 * GIB,
        link_bytes_per_s=900 * GB,
        inter_node_bytes_per_s=50 * GB,
        chunk_tokens=2048,
        source="NVIDIA B200 data sheet; price: arXiv 2603.17280v1, table 5; "
        "memory: PyTorch on B200 (nvidia-smi 183,359 MiB); idle power: B200 context sweep of "
        "vllm-project/semantic-router (Apache-2.0), between requests, and empty; nvidia-smi shows 187 W with 165 GiB "
        "loaded",
        law="b200",
    ),
    GpuEntry(
        name="gb200",
        title="GB200 (one GPU of NVL72) 200 GB",
        memory_bytes=184.31 * GIB,
        bandwidth_bytes_per_s=8.0 * TB,
        peak_flop_per_s=2500 * TFLOP,
        peak_flop8_per_s=5000 * TFLOP,
        peak_flop4_per_s=10_000 * TFLOP,
        formats=("fp8", "int8", "nvfp4"),
        tdp_w=1200,
        idle_w=220,
        empty_w=160,
        usd_per_h=80.0 / 8,
        nominal_memory_bytes=200 * GIB,
        link_bytes_per_s=900 * GB,
        link_gpus=72,
        gpus_per_node=4,
        inter_node_bytes_per_s=50 * GB,
        chunk_tokens=2048,
        source="NVIDIA GB200 NVL72 data sheet; price: arXiv 2603.17280v1, table 5; "
        "memory: PyTorch on GB200 (nvidia-smi 189,471 MiB); idle power: the least that loops of small "
        "kernels draw (219 to 222 W, ai-dynamo/aiconfigurator); empty boards 138 to 181 W (the middle)",
        law="b200",
    ),
    GpuEntry(
        name="b300",
        title="B300 SXM 288 GB",
        memory_bytes=267.69 * GIB,
        bandwidth_bytes_per_s=8.0 * TB,
        peak_flop_per_s=2250 * TFLOP,
        peak_flop8_per_s=4500 * TFLOP,
        peak_flop4_per_s=14_000 * TFLOP,
        formats=("fp8", "nvfp4"),
        tdp_w=1100,
        usd_per_h=9.3,
        link_bytes_per_s=900 * GB,
        inter_node_bytes_per_s=100 * GB,
        chunk_tokens=2048,
        source="NVIDIA HGX B300 data sheet (of eight: 16 bits 36, 8 bits 72 PFLOP/s with sparsity, 4 bits 105 to 112 "
        "without; integers 1.2); 1,100 W: nvidia-smi; price assumed: B200's times 7.89 / 6.79, RunPod's of both on "
        "27 Aug 2026; memory: PyTorch on B300 SXM6 AC (nvidia-smi 275,040 MiB); idle power with a model loaded: not "
        "published, a quarter of the TDP (empty boards 135 to 238 W)",
        law="b200",
    ),
    GpuEntry(
        name="gb300",
        title="GB300 (one GPU of NVL72) 288 GB",
        memory_bytes=276.50 * GIB,
        bandwidth_bytes_per_s=8.0 * TB,
        peak_flop_per_s=2500 * TFLOP,
        peak_flop8_per_s=5000 * TFLOP,
        peak_flop4_per_s=15_000 * TFLOP,
        formats=("fp8", "nvfp4"),
        tdp_w=1400,
        usd_per_h=11.6,
        link_bytes_per_s=900 * GB,
        link_gpus=72,
        gpus_per_node=4,
        inter_node_bytes_per_s=100 * GB,
        chunk_tokens=2048,
        source="NVIDIA GB300 NVL72 data sheet (of 72: 16 bits 360, 8 bits 720 PFLOP/s with sparsity, 4 bits 1,080 "
        "without); 1,400 W: nvidia-smi; price assumed: GB200's times that of B300 over B200; memory: PyTorch on GB300 "
        "(stas00/ml-engineering; nvidia-smi 284,208 MiB); idle power with a model loaded: not published, a quarter of "
        "the TDP (empty boards 171 to 237 W)",
        law="b200",
    ),
    GpuEntry(
        name="rtx-pro-6000",
        title="RTX PRO 6000 Blackwell Server Edition 96 GB",
        memory_bytes=94.97 * GIB,
        bandwidth_bytes_per_s=1.792 * TB,
        peak_flop_per_s=467.8 * TFLOP,
        peak_flop8_per_s=935.6 * TFLOP,
        peak_flop4_per_s=1871 * TFLOP,
        formats=("fp8", "int8", "nvfp4"),
        tdp_w=600,
        idle_w=90,
        usd_per_h=2.56,
        link_bytes_per_s=64 * GB,
        inter_node_bytes_per_s=50 * GB,
        chunk_tokens=1024,
        source="NVIDIA RTX PRO 6000 Blackwell Server Edition data sheet; peaks: the architecture's at the 2,430 MHz "
        "that it reports (ai-dynamo/aiconfigurator, Apache-2.0); price assumed: H100's times 2.09 / 3.29, RunPod's of "
        "both on 27 Aug 2026; memory: PyTorch on RTX PRO 6000 (nvidia-smi 97,887 MiB); idle power: nvidia-smi with "
        "82 GiB loaded by SGLang, one host",
    ),
    GpuEntry(
        name="l40s",
        title="L40S 48 GB",
        memory_bytes=44.39 * GIB,
        bandwidth_bytes_per_s=0.864 * TB,
        peak_flop_per_s=362 * TFLOP,
        peak_flop8_per_s=733 * TFLOP,
        tdp_w=350,
        idle_w=102.1,
        empty_w=36,
        usd_per_h=1.861,
        nominal_memory_bytes=45 * GIB,
        link_bytes_per_s=32 * GB,
        inter_node_bytes_per_s=50 * GB,
        chunk_tokens=512,
        source="NVIDIA L40S data sheet; price assumed: AWS g6e.xlarge, on demand in us-east-1; memory: PyTorch on L40S "
        "with error correction on (nvidia-smi 46,068 MiB); idle power: arXiv 2605.23918",
        max_num_seqs=256,
        batched_tokens=2048,
    ),
)
GPUS = {sheet.name: sheet for sheet in _SHEETS}


def link_notes(gpu: GpuEntry, n_gpus: int) -> tuple[str, ...]:
    """What is doubtful of GPUs of an instance that pass data to one another."""
    if n_gpus > gpu.link_gpus:
        return (
            f"{n_gpus} x {gpu.name} are more than the {gpu.link_gpus} of one link: what an instance passes over the "
            f"network is projected, at {gpu.inter_node_bytes_per_s / GB:g} GB/s a GPU",
        )
    if n_gpus <= SURE_ON_PCIE or gpu.link_bytes_per_s > PCIE_BYTES_PER_S:
        return ()
    return (
        f"{gpu.name} above TP {SURE_ON_PCIE}: PCIe through the host joins the GPUs, and how fast depends on the host; "
        "all-reduces, and with them steps, are doubtful",
    )


def gpu_entry(name: str | GpuEntry, where: str = "gpu") -> GpuEntry:
    """The catalog's GPU of that name (case does not matter), or the one that is given."""
    if isinstance(name, GpuEntry):
        return name
    try:
        return GPUS[name.lower()]
    except KeyError:
        raise unknown_name(where, name, GPUS) from None


def is_catalogs(gpu: GpuEntry) -> bool:
    """Whether it is the catalog's GPU and not another of the same name: what was measured was measured on ours. At
    whatever price, idle power, memory and defaults of the serving engine, which no measured law reads."""
    ours = GPUS.get(gpu.name)
    return ours is not None and all(getattr(ours, name) == getattr(gpu, name) for name in _MEASURED_ON)


_MEASURED_ON = ("bandwidth_bytes_per_s", "peak_flop_per_s", "peak_flop8_per_s", "tdp_w", "law")
