"""An engine by what it is made of: the one thing that is kept, compared and changed; the engine is built of it."""

from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np

from fleetopt_jax.catalog.drafts import Drafts, drafts_of
from fleetopt_jax.catalog.gpus import GpuEntry
from fleetopt_jax.catalog.llms import LlmEntry
from fleetopt_jax.catalog.steps import Parallelism
from fleetopt_jax.laws.decode import DecodeLaw
from fleetopt_jax.laws.factors import StepFactors
from fleetopt_jax.laws.kv_cache import MEMORY_UTILIZATION, KvCapacity
from fleetopt_jax.laws.power import PowerLaw
from fleetopt_jax.laws.prefill import Prefill
from fleetopt_jax.laws.prefix_cache import HOST_LINK_BYTES_PER_S
from fleetopt_jax.laws.step_law import StepLaw

Quality = Literal["measured", "kernels", "law", "projected", "calibrated", "scaled", "roofline", "given"]

DEFAULT_LLM, DEFAULT_TP = "llama-3.1-70b", 8
MEASURED_SERVING = "vllm-0.11"  # the serving engine whose steady states and watts were measured (ML.ENERGY)
DEFAULT_SERVING = "vllm"  # 0.12 and newer


@dataclass(frozen=True, eq=False)
class OwnLaws:
    """Laws in place of the catalog's, at the top clock: of an engine that was calibrated, or of one of your own. What
    is None stays the catalog's. Equal where all numbers are."""

    decode: DecodeLaw | None = None
    power: PowerLaw | None = None
    prefill: Prefill | None = None
    step: StepLaw | None = None  # of a mixed batch, that goes with these
    kv: KvCapacity | None = None
    factors: StepFactors | None = None  # on the step of operators, which then gives decode, prefill and power
    idle_w: float | None = None  # board power of one GPU without a request [W]
    quality: Quality = "given"
    # Mean relative errors; None where nobody knows, or, with factors, where it stays the catalog's [-].
    step_error: float | None = None  # of the decode step
    power_error: float | None = None
    prefill_error: float | None = None  # of the time a prompt takes
    source: str = "given"
    file: str | None = None  # where they were read from
    speculate: Drafts | None = None  # the drafts that these steps verify; they hold for no other number of them

    @property
    def without_drafts(self) -> "OwnLaws | None":
        """What of them holds where nothing is drafted."""
        return None if self.speculate else self

    @property
    def are_steps(self) -> bool:
        """Whether an iteration is theirs, not the catalog's with factors."""
        return any(law is not None for law in (self.decode, self.power, self.prefill, self.step))

    def _content(self) -> tuple:
        laws = self.decode, self.power, self.prefill, self.step, self.kv, self.factors, self.idle_w
        leaves, structure = jax.tree.flatten(laws)
        numbers = tuple((np.shape(leaf), np.asarray(leaf).tobytes()) for leaf in leaves)
        errors = self.step_error, self.power_error, self.prefill_error
        return structure, numbers, self.quality, errors, self.source, self.file, self.speculate

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OwnLaws) and self._content() == other._content()

    def __hash__(self) -> int:
        return hash(self._content())


@dataclass(frozen=True)
class EngineSpec:
    """An LLM on TP x DP x PP GPUs, and how it is run. Hashable; equal specs are equal engines: `catalog.engines.build`.

    GPUs and LLMs are names of the catalog (case does not matter), records of your own, or, of LLMs, a Hugging Face
    config.json. To run it otherwise, change the spec: `replace(spec, clock_frac=0.8)`.

    >>> fo.EngineSpec("H100", tp=4) == fo.EngineSpec("h100", tp=4)
    True
    >>> fo.build(fo.EngineSpec("H100")) is fo.build(fo.EngineSpec("h100"))
    True
    """

    gpu: str | GpuEntry
    llm: str | LlmEntry = DEFAULT_LLM
    tp: int = DEFAULT_TP  # GPUs that divide heads and widths; all of an instance where dp = pp = 1
    precision: str | None = None  # of the weights; None: the checkpoint's own
    kv_precision: str | None = None  # of the KV cache; None: what the checkpoint asks for, else bf16
    serving: str = DEFAULT_SERVING  # the engine that serves it, and its release: a name of `catalog.engines.SERVING`
    max_num_seqs: int | None = None  # sequences an instance runs; None: the serving engine's default on this GPU
    max_num_batched_tokens: int | None = None  # of a step of each group and stage; None: likewise
    memory_utilization: float = MEMORY_UTILIZATION  # share of each GPU's memory the engine may use [-]
    host_cache_bytes: float = 0.0  # of its host's memory that each GPU keeps what its prefix cache lets go in [B]
    host_cache_bytes_per_s: float = HOST_LINK_BYTES_PER_S  # by which that comes back to it [B/s]
    ep: int = 1  # groups of GPUs that divide the experts whole
    dp: int = 1  # groups of tp GPUs with sequences of their own
    pp: int = 1  # stages of layers
    clock_frac: float = 1.0  # of its GPUs' cores, of their top clock [-]
    power_limit_w: float | None = None  # that each board may draw, below its TDP; None: its TDP [W]
    source: Literal["measured", "projected"] = "measured"  # of its coefficients: the choice `engine` of `Assumptions`
    own_fit: bool = True  # a configuration's own fit where there is one; else the law, even there
    laws: OwnLaws | None = None
    catalog: str | None = None  # the file of one's own that its GPU or its LLM was found in
    speculate: Drafts | str | None = None  # tokens drafted ahead, as "eagle3:3"; None: none

    def __post_init__(self) -> None:
        for name in ("gpu", "llm", "precision", "kv_precision", "serving"):
            value = getattr(self, name)
            if isinstance(value, str) and not (name == "llm" and _is_file(value)):
                object.__setattr__(self, name, value.lower())
        if isinstance(self.speculate, str):
            object.__setattr__(self, "speculate", drafts_of(self.speculate))

    @property
    def split(self) -> Parallelism:
        """How the GPUs of an instance share the LLM."""
        return Parallelism(tp=self.tp, ep=self.ep, dp=self.dp, pp=self.pp)

    @property
    def drafts(self) -> Drafts | None:
        """What it drafts ahead, if anything."""
        return drafts_of(self.speculate) if isinstance(self.speculate, str) else self.speculate

    @property
    def gpu_name(self) -> str:
        """The kind of GPU, as budgets and plans name it."""
        return self.gpu if isinstance(self.gpu, str) else self.gpu.name

    @property
    def llm_name(self) -> str:
        """The LLM, as plans name it."""
        return self.llm if isinstance(self.llm, str) else self.llm.title

    @property
    def stages(self) -> tuple["EngineSpec", ...]:
        """Of a lane that it serves: one."""
        return (self,)

    @property
    def file(self) -> str | None:
        """The file its laws were read from, if any."""
        return self.laws.file if self.laws else None


@dataclass(frozen=True)
class KvLink:
    """What KV caches are handed over by. A preset of `catalog.links.LINKS`, or one's own."""

    name: str
    bytes_per_s: float  # of each GPU, in one direction [B/s]
    latency_s: float  # of a message [s]


@dataclass(frozen=True)
class TwoStageSpec:
    """A lane of two stages by its engines: one prefills, the other decodes. Hashable; `catalog.links.build_pair`."""

    prefill: EngineSpec
    decode: EngineSpec
    link: KvLink

    @property
    def stages(self) -> tuple[EngineSpec, ...]:
        return (self.prefill, self.decode)


LaneSpec = EngineSpec | TwoStageSpec


def _is_file(llm: str) -> bool:
    return "/" in llm or llm.lower().endswith(".json")
