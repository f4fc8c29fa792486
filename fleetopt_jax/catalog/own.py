"""A catalog of one's own: GPUs, LLMs and prices beside ours. A record that is handed on, so that one run's names are
nobody else's."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fleetopt_jax.catalog.gpus import GPUS, GpuEntry, gpu_entry
from fleetopt_jax.catalog.llms import LLMS, LlmEntry, llm_entry
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.core.errors import BadField, unknown_name


@dataclass(frozen=True)
class Catalog:
    """What names stand for: one's own GPUs and LLMs, at one's own prices, and ours where those say nothing.

    >>> cheap = fo.Catalog().at_prices({"h100": 2.1})
    >>> float(fo.build(cheap.spec("h100", "llama-3.1-8b", 1)).usd_per_gpu_h)
    2.1
    """

    gpus: tuple[GpuEntry, ...] = ()
    llms: tuple[LlmEntry, ...] = ()
    usd_per_gpu_h: tuple[tuple[str, float], ...] = ()  # in place of the entries' own [USD/h]
    file: str | None = None  # where it was read from

    def at_prices(self, usd_per_gpu_h: Mapping[str, float], where: str = "usd_per_gpu_h") -> "Catalog":
        """The catalog with other prices of the GPUs named."""
        for name in usd_per_gpu_h:
            self._known_gpu(name, where)
        said = {name.lower(): float(price) for name, price in usd_per_gpu_h.items()}
        return replace(self, usd_per_gpu_h=tuple((dict(self.usd_per_gpu_h) | said).items()))

    def says_price(self, gpu: str) -> bool:
        """Whether it has a price of its own for a GPU."""
        name = gpu.lower()
        own = next((entry for entry in self.gpus if entry.name == name), None)
        return name in dict(self.usd_per_gpu_h) or (
            own is not None and (name not in GPUS or own.usd_per_h != GPUS[name].usd_per_h)
        )

    def gpu(self, name: str | GpuEntry, where: str = "gpu") -> str | GpuEntry:
        """What goes into a spec for a GPU: ours by its name alone."""
        entry = self._known_gpu(name, where)
        priced = replace(entry, usd_per_h=dict(self.usd_per_gpu_h).get(entry.name, entry.usd_per_h))
        return priced.name if GPUS.get(priced.name) == priced else priced

    def gpu_entry(self, name: str | GpuEntry, where: str = "gpu") -> GpuEntry:
        """The GPU of that name, at its price."""
        return gpu_entry(self.gpu(name, where))

    def llm(self, name: str | LlmEntry, where: str = "llm") -> str | LlmEntry:
        """What goes into a spec for an LLM: ours by its name alone, a configuration file by its path."""
        own = {entry.title: entry for entry in self.llms}
        if isinstance(name, LlmEntry) or not own:
            return name
        if name.lower() in own:
            return own[name.lower()]
        try:
            llm_entry(name, where)
        except BadField as refusal:
            unknown = refusal.problem.startswith("unknown name")
            raise unknown_name(where, name, {*own, *LLMS}) if unknown else refusal from None
        return name

    def spec(
        self, gpu: str | GpuEntry, llm: str | LlmEntry, tp: int, precision: str | None = None, **how: object
    ) -> EngineSpec:
        """The engine of these names; it says which file it needs, if any."""
        found = EngineSpec(self.gpu(gpu), self.llm(llm), tp, precision, **how)  # pyright: ignore[reportArgumentType]
        return self.marked(found)

    def marked(self, spec: EngineSpec) -> EngineSpec:
        """The spec that names this catalog's file where its GPU or its LLM was found there."""
        found = spec.gpu_name in {gpu.name for gpu in self.gpus} or spec.llm in self.llms
        return replace(spec, catalog=self.file if found else None)

    def _known_gpu(self, name: str | GpuEntry, where: str) -> GpuEntry:
        own = {gpu.name: gpu for gpu in self.gpus}
        if isinstance(name, GpuEntry):
            return name
        if name.lower() in own:
            return own[name.lower()]
        if name.lower() not in GPUS:
            raise unknown_name(where, name, {*own, *GPUS})
        return gpu_entry(name)
