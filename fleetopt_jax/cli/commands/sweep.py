"""`fleetopt sweep`: the best plan of every combination of inputs, as rows of a file; and such a file shown."""

import argparse
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from fleetopt_jax._optimize.problem import Problem
from fleetopt_jax._sweep.sweep import sweep
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.catalog.workloads import LoadedWorkload, at_rate
from fleetopt_jax.cli.answer import Answer
from fleetopt_jax.cli.backend import configure
from fleetopt_jax.cli.codes import INFEASIBLE, OK
from fleetopt_jax.cli.inputs import at_door, budget_of, problem_of, specs_of, workload_of
from fleetopt_jax.cli.table import options_of
from fleetopt_jax.cli.terminal import progress, say, warn
from fleetopt_jax.cli.values import Axis
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.documents.sweep import load_sweep, sweep_to_json
from fleetopt_jax.fleet.assumptions import parse_assumptions
from fleetopt_jax.report.sweep import sweep_figure, sweep_table


def run(options: argparse.Namespace) -> Answer:
    if options.show:
        if options.vary or options.out:
            raise BadInput("--show", f"not read with {'--vary' if options.vary else '--out'}", "give one of them")
        return _answer(options, load_sweep(options.show), options.show, rows=True)
    if not options.vary:
        raise BadInput("--vary", "nothing is varied", "need --vary KEY=VALUES, or --show FILE.parquet")
    if not options.out:
        raise BadInput("--out", "no file for the rows", "need --out FILE.parquet")
    axes = {axis.name: axis for axis in options.vary}  # the last of two that are of one input
    scenarios = _Scenarios(options, list(axes.values()))
    scenarios.check()
    with progress(options, "Sweeping") as step, at_door("--vary"):
        table = sweep(
            scenarios,
            {axis.name: axis.shown for axis in axes.values()},
            options.out,
            method=options.method,
            n_thresholds=options.thresholds,
            workers=options.workers,
            address=options.address,
            prepare=configure,
            progress=step,
            log=lambda text: say(options, text),
        )
    return _answer(options, table, options.out, rows=False)


def _answer(options: argparse.Namespace, table: pa.Table, path: str, *, rows: bool) -> Answer:
    document = sweep_to_json(table, path, rows=rows)
    held = document["by_status"].keys() & {"optimal", "feasible"}
    for status in ("failed", "infeasible"):
        if n := document["by_status"].get(status):
            first = table["reason"][table["status"].to_pylist().index(status)]
            warn(options, f"{n:,} of {len(table):,} scenarios {_HOW[status]}, the first: {first}")
    code = OK if held else INFEASIBLE
    return Answer(document, lambda _: sweep_table(table), code, lambda _: sweep_figure(table), written=True)


_HOW = {"failed": "failed", "infeasible": "have no fleet that holds the limits"}


class _Scenarios:
    """The problem of each combination of inputs; what several have in common is read once."""

    def __init__(self, options: argparse.Namespace, axes: Sequence[Axis]):
        self._options, self._axes = options, axes
        self._values = {axis.name: dict(zip(axis.shown, axis.values)) for axis in axes}
        sections = {option.name: option.section.name for option in options_of("sweep") if option.section}
        self._of_workload = [axis.name for axis in axes if sections[axis.name] == "workload" and axis.name != "rate"]
        self._of_engines = [axis.name for axis in axes if sections[axis.name] == "engines" or axis.name == "assume"]
        self._workloads: dict[tuple, LoadedWorkload] = {}
        self._specs: dict[tuple, list[EngineSpec]] = {}

    def check(self) -> None:
        """Refuse what no scenario could have: a workload that cannot be read."""
        self._workload(self._with({axis.name: axis.shown[0] for axis in self._axes}))

    def __call__(self, **inputs: Any) -> Problem:
        options = self._with(inputs)
        loaded = self._workload(options)
        key = tuple(str(getattr(options, name)) for name in self._of_engines)
        if key not in self._specs:
            self._specs[key] = specs_of(options, parse_assumptions(options.assume))
        how = {"free": options.free, "specs": self._specs[key]}
        return problem_of(options, loaded, options.objective, budget_of(options), **how)

    def _with(self, inputs: dict[str, Any]) -> argparse.Namespace:
        """The options of one scenario."""
        return argparse.Namespace(**vars(self._options) | {name: self._values[name][x] for name, x in inputs.items()})

    def _workload(self, options: argparse.Namespace) -> LoadedWorkload:
        """The workload of one scenario: read once for all of its rates, of which `--rate` is the mean of all hours."""
        key = tuple(str(getattr(options, name)) for name in self._of_workload)
        if key not in self._workloads:
            self._workloads[key] = workload_of(options)
        loaded = self._workloads[key]
        return loaded if options.rate is None else at_rate(loaded, options.rate * loaded.over_mean)
