"""Measured operating points of one engine, checked at the door. The columns are documented in `calibrate`."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from fleetopt_jax.calibrate.names import gpu_name, llm_name, precision_name
from fleetopt_jax.calibrate.points import ALL_GPUS, DATA, EXPERTS, PIPELINE, gpus_of, served_otherwise, split_of
from fleetopt_jax.calibrate.readers import Row, read_rows
from fleetopt_jax.calibrate.readers.rows import LEAST
from fleetopt_jax.catalog.engines import resolved
from fleetopt_jax.catalog.llms import llm_entry, names_of
from fleetopt_jax.catalog.spec import EngineSpec
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.files import shown
from fleetopt_jax.core.units import MS

# Ours, ML.ENERGY's, those of `vllm bench serve` (its result as a row) and of InferenceX, which has seconds.
BATCH = ("batch", "avg_batch_size", "n_sequences", "max_concurrency", "concurrency", "conc")
WITHOUT_PREFILL = {"step_s": 1.0, "step_ms": MS, "median_itl_ms": MS, "median_itl": 1.0}  # column: its unit [s]
STEP = WITHOUT_PREFILL | {
    "median_tpot_ms": MS,
    "mean_tpot_ms": MS,
    "silicon_tpot_ms": MS,
    "tpot_ms": MS,
    "mean_itl_ms": MS,
    "median_tpot": 1.0,
    "mean_tpot": 1.0,
    "tpot_s": 1.0,
    "mean_itl": 1.0,
}
DECODE_RATE = ("tok_per_s", "decode_tok_per_s")
RATE_PER_GPU = "output_tput_per_gpu"
RATE = (*DECODE_RATE, "output_throughput", RATE_PER_GPU)
PARTIAL_CONTEXT = "sim_mean_output_position_tokens"
CONTEXT = ("context_tokens", PARTIAL_CONTEXT, "context_window_tokens")
LENGTHS = (  # (prompt, output) of a request
    ("isl", "osl"),
    ("input_len", "output_len"),
    ("random_input_len", "random_output_len"),
)
TOTALS = ("total_input_tokens", "total_output_tokens", "completed")  # of a run
POWER = ("power_w_per_gpu", "avg_power_per_gpu_w")
GPUS = ("n_gpus", "num_gpus", "tensor_parallel_size")
SPLIT = {"dp": DATA, "ep": EXPERTS, "pp": PIPELINE}  # what divides an instance besides tensors: the columns it looks at
NAMES = {  # selector: the columns it looks at
    "model": ("llm", "model_id", "model_path", "model"),
    "gpu": ("gpu", "gpu_model", "hw", "system"),
    "tp": ("tp", "tp_size", *GPUS),
    "task": ("task",),
    "precision": ("precision", "weight_precision"),
}
NEED = (
    f"need {' | '.join(BATCH)} and {' | '.join((*STEP, *RATE))}; "
    f"optional: {' | '.join(CONTEXT)} | {' | '.join(' with '.join(pair) for pair in LENGTHS)}; "
    f"{' | '.join(POWER)} | power_w with n_gpus"
)
LISTED = 8  # groups a refusal names


def _column(description: str, *names: str, **rules: Any) -> Any:
    also = f" Also called {', '.join(names[1:])}." if names[1:] else ""
    return Field(None, description=description + also, validation_alias=AliasChoices(*names), **rules)


def _others(name: str) -> tuple[str, ...]:
    return tuple(column for column in SPLIT[name] if column != name)


class MeasurementsRow(BaseModel):
    """A row of a csv file of measurements: the batch, and its step or its rate. The first of several names is shown."""

    model_config = ConfigDict(title="Measured operating point")
    batch: float = Field(
        description=f"Sequences in flight in the instance. Also called {', '.join(BATCH[1:])}.",
        validation_alias=AliasChoices(*BATCH),
        ge=LEAST,
        le=1e6,
    )
    step_s: float | None = _column(
        "Decode iteration [s].", *(name for name, unit in STEP.items() if unit == 1.0), ge=LEAST, le=1e6
    )
    step_ms: float | None = _column(
        "Decode iteration [ms]; means and time per output token hold the prefill of others.",
        *(name for name, unit in STEP.items() if unit == MS),
        ge=LEAST,
        le=1e6,
    )
    tok_per_s: float | None = _column(
        "Output of the instance [tokens/s]; the last name is of one GPU.", *RATE, ge=LEAST, le=1e9
    )
    context_tokens: float | None = _column(
        "Mean context of a sequence in flight [tokens]; the second name is without the prompt, the third the window.",
        *CONTEXT,
        ge=LEAST,
        le=1e9,
    )
    isl: float | None = _column("Prompt of a request [tokens].", *(pair[0] for pair in LENGTHS), ge=LEAST, le=1e9)
    osl: float | None = _column("Output of a request [tokens].", *(pair[1] for pair in LENGTHS), ge=LEAST, le=1e9)
    power_w_per_gpu: float | None = _column("Power of a GPU [W].", *POWER, ge=LEAST, le=1e5)
    power_w: float | None = _column("Power of all n_gpus GPUs [W].", "power_w", ge=LEAST, le=1e8)
    n_gpus: int | None = _column("GPUs of the instance; or tp.", *GPUS, "tp", ge=1, le=1024)
    llm: str | None = _column("LLM.", *NAMES["model"])
    gpu: str | None = _column("GPU.", *NAMES["gpu"])
    dp: str | None = _column("Groups of GPUs with sequences of their own; true: every GPU of tp.", "dp", *_others("dp"))
    ep: str | None = _column("Groups of GPUs that divide the experts whole; true: all GPUs.", "ep", *_others("ep"))
    pp: str | None = _column("Pipeline stages.", "pp", *_others("pp"))
    task: str | None = _column("What was asked.", *NAMES["task"])
    precision: str | None = _column("Precision of the weights.", *NAMES["precision"])


@dataclass(frozen=True)
class Measurements:
    """Operating points of one engine. Arrays [points]; names are None where the file does not say."""

    batch: np.ndarray  # sequences in flight in the instance
    step_s: np.ndarray  # decode iteration [s]
    context_tokens: np.ndarray | None = None  # mean context of a sequence in flight
    power_w_per_gpu: np.ndarray | None = None
    llm: str | None = None
    gpu: str | None = None
    tp: int | None = None
    dp: int = 1  # groups of tp GPUs with sequences of their own
    ep: int = 1  # groups of GPUs that divide the experts whole
    pp: int = 1  # stages of layers
    precision: str | None = None
    source: str = "measurements"  # the file, for messages
    context_is_partial: bool = False  # without the prompt: it does not tell the cost of a context token
    notes: tuple[str, ...] = ()  # what its columns hold beside a decode step
    n_left_out: int = 0  # rows of other engines
    rows: tuple[Row, ...] = ()  # as the file has them


def read_measurements(
    path: str | os.PathLike,
    *,
    model: str | None = None,
    gpu: str | None = None,
    tp: int | None = None,
    task: str | None = None,
    llm: str | None = None,
    precision: str | None = None,
    of: EngineSpec | None = None,
    **split: int | None,
) -> Measurements:
    """The points of one engine in a file; the selectors (`model`: any part of its name; of `split` dp, ep and pp)
    choose it among several, `of` those of that engine, by whatever names the rows have.

    A selector of a column the file lacks, or leaves empty, leaves every row; so do `llm` and `precision`, the
    catalog's names, where no row has them: then they say what the file calls otherwise.
    """
    where = os.fspath(path)
    columns, rows = _table(where)
    names = {name: _first(columns, found) for name, found in NAMES.items()}
    asked = {"model": model, "gpu": gpu, "tp": None if tp is None else str(tp), "task": task}
    asked |= {name: str(size) for name, size in split.items() if size is not None}
    rows = [row for row in rows if not served_otherwise(row)]
    rows = _named(rows, names["model"], lambda text: llm_name(text) == (llm or "").lower())
    rows = _named(rows, names["precision"], lambda text: precision_name(text, llm or "") == (precision or "").lower())
    n_rows = len(rows)
    if of is not None:
        rows = _of_engine(where, rows, {name: column for name, column in names.items() if column}, resolved(of))
    n_left_out = n_rows - len(rows)
    rows = _one_group(where, rows, {name: column for name, column in names.items() if column}, asked)
    batch_column = _first(columns, BATCH)
    batch = np.array([row.number(batch_column, 1e6) for row in rows])
    step_s, notes = _step_s(columns, rows, batch, names["tp"])
    said = {name: rows[0].cells[column] for name, column in names.items() if column}
    tp, dp, ep, pp = split_of(rows[0])
    for name, text in said.items():
        if not text.isprintable():
            raise BadInput(rows[0].place, f"{names[name]} = {shown(text)!r}", "need a name without control characters")
    return Measurements(
        batch,
        step_s,
        _context_tokens(columns, rows),
        _power_w_per_gpu(columns, rows),
        llm=said.get("model") or None,
        gpu=said.get("gpu") or None,
        tp=tp,
        dp=dp,
        ep=ep,
        pp=pp,
        precision=said.get("precision") or None,
        source=where,
        context_is_partial=_first(columns, CONTEXT) == PARTIAL_CONTEXT,
        notes=notes,
        n_left_out=n_left_out,
        rows=tuple(rows),
    )


def _step_s(
    columns: list[str], rows: list[Row], batch: np.ndarray, tp_column: str | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The decode step [s], and what its column holds besides."""
    column = _first(columns, (*STEP, *RATE)) or ""
    if column in STEP:
        step_s = np.array([row.number(column, 1e6) for row in rows]) * STEP[column]
        holds = "" if column in WITHOUT_PREFILL else "the prefill of other requests"
    else:
        rate = np.array([row.number(column, 1e9) for row in rows])
        if column == RATE_PER_GPU:
            if tp_column is None:
                raise BadInput(rows[0].place, f"{column} without tp", "need the GPUs of an instance as well")
            rate = rate * np.array([gpus_of(row) or row.count(tp_column) for row in rows], dtype=float)
        step_s = batch / rate
        holds = "" if column in DECODE_RATE else "prefill, and the start and the end of the run"
    note = f"{column} holds {holds}: the step is too long by that; median_itl_ms is not"
    return step_s, (note,) if holds else ()


def _table(where: str) -> tuple[list[str], list[Row]]:
    table = read_rows(where)
    columns = list(table.columns)
    if not (_first(columns, BATCH) and _first(columns, (*STEP, *RATE))):
        raise BadInput(where, f"columns are {', '.join(map(shown, columns[:12]))}", NEED)
    return columns, list(table.rows)


def _first(columns: list[str], wanted: tuple[str, ...]) -> str | None:
    return next((name for name in wanted if name in columns), None)


def _of_engine(where: str, rows: list[Row], names: Mapping[str, str], spec: EngineSpec) -> list[Row]:
    """The rows of an engine: a name that a row leaves empty is no other engine's."""

    def is_it(row: Row) -> bool:
        said = {name: row.cells[column].lower() for name, column in names.items() if row.cells[column]}
        return all(_is(name, text, spec) for name, text in said.items())

    kept = [row for row in rows if is_it(row)]
    if rows and not kept:
        engine = f"{spec.tp} x {spec.gpu_name} {spec.llm_name} {spec.precision}"
        shown_names = {name: column for name, column in names.items() if name != "task"}
        found = {" ".join(row.cells[column] for column in shown_names.values()) for row in rows}
        raise BadInput(
            where, f"has no rows of {engine}", f"its rows are of ({', '.join(shown_names)}) {_listed(found)}"
        )
    return kept


def _is(name: str, text: str, spec: EngineSpec) -> bool:
    """Whether a cell may be said of an engine: 'NVIDIA H100 80GB' of h100, 'meta-llama/Llama-3.1-70B-Instruct' of
    llama-3.1-70b."""
    match name:
        case "gpu":
            return spec.gpu_name.lower() in (gpu_name(text), *re.split(r"[^a-z0-9]+", text))
        case "model":
            llm, known = spec.llm_name.lower(), llm_name(text)
            if text.rsplit("/", 1)[-1] in (llm, llm.rsplit("/", 1)[-1]):
                return True
            alike = names_of(llm_entry(spec.llm).architecture)
            return known in alike if known else llm.endswith(".json")  # which says no name that could be another
        case "tp":
            return text.isascii() and text.isdecimal() and int(text) == spec.tp
        case "precision":
            return precision_name(text, spec.llm_name) == spec.precision
    return True


def _one_group(where: str, rows: list[Row], names: dict[str, str], asked: dict[str, str | None]) -> list[Row]:
    """The rows of the one engine that the selectors leave."""
    if not rows:
        raise BadInput(where, "no rows of text measurements")
    divided = {name for name, columns in SPLIT.items() if any(row.has(columns) for row in rows)}
    for name, value in asked.items():
        if value is None or name not in {*names, *divided}:
            continue
        found = {_cell(row, name, names) for row in rows}
        if not any(found):
            continue  # a column without a word
        if name == "model":
            # A whole name before a part of one: "X-Instruct" is also a part of "X-Instruct-FP8".
            exact = {text for text in found if value.lower() in (text.lower(), text.lower().split("/")[-1])}
            kept = exact or {text for text in found if value.lower() in text.lower()}
        else:
            kept = {text for text in found if text.lower() == value.lower()}
            kept = kept or {text for text in found if name == "gpu" and gpu_name(text) == value.lower()}
            if name == "tp":  # of a group of GPUs, where the column is of all
                kept |= {row.cells[names[name]] for row in rows if str(split_of(row)[0]) == value}
        if not kept:
            raise BadInput(f"--{name} {value}", f"no such rows in {where}", f"there are: {_listed(found)}")
        rows = [row for row in rows if _cell(row, name, names) in kept]
    named = (*names, *sorted(divided))
    groups = {tuple(_cell(row, name, names) for name in named) for row in rows}
    if len(groups) > 1:
        selectors = ("model", "gpu", "tp", "task", *SPLIT)
        raise BadInput(
            where,
            f"holds {len(groups)} groups of ({', '.join(named)}): {_listed(' '.join(group) for group in groups)}",
            f"choose one with {', '.join(f'--{name}' for name in named if name in selectors)}",
        )
    return rows


def _cell(row: Row, name: str, names: Mapping[str, str]) -> str:
    """What a row says under a selector; of what divides an instance, its size."""
    return row.cells[names[name]] if name in names else str(dict(zip(("tp", *SPLIT), split_of(row)))[name])


def _named(rows: list[Row], column: str | None, is_it: Callable[[str], bool]) -> list[Row]:
    """The rows of a name of the catalog, or all where none has it."""
    return [row for row in rows if column and is_it(row.cells[column])] or rows


def _listed(texts) -> str:
    texts = sorted(texts)
    return ", ".join(map(shown, texts[:LISTED])) + (f" and {len(texts) - LISTED} more" if len(texts) > LISTED else "")


def _context_tokens(columns: list[str], rows: list[Row]) -> np.ndarray | None:
    column = _first(columns, CONTEXT)
    if column is None:
        return _context_of_lengths(columns, rows)
    tokens = np.array([row.number(column, 1e9) for row in rows])
    if column == "context_window_tokens" and "output_tokens_per_request" in columns:
        held = tokens - np.array([row.number("output_tokens_per_request", 1e9) for row in rows]) / 2
        if (held <= 0).any():
            row = rows[int(np.argmax(held <= 0))]
            longer = row.cells["output_tokens_per_request"]
            raise BadInput(row.place, f"output_tokens_per_request = {longer}", "need less than twice the window")
        return held
    return tokens


def _context_of_lengths(columns: list[str], rows: list[Row]) -> np.ndarray | None:
    """p + o / 2 of requests of one length, or of the mean ones of a run."""
    pair = next((pair for pair in LENGTHS if set(pair) <= set(columns)), None)
    if pair is not None:
        prompt, output = (np.array([row.number(name, 1e9) for row in rows]) for name in pair)
        return prompt + output / 2
    if not set(TOTALS) <= set(columns):
        return None
    prompts, outputs, requests = (np.array([row.number(name, 1e15) for row in rows]) for name in TOTALS)
    return (prompts + outputs / 2) / requests


def _power_w_per_gpu(columns: list[str], rows: list[Row]) -> np.ndarray | None:
    column = _first(columns, POWER)
    if column is not None:
        return np.array([row.number(column, 1e5) for row in rows])
    gpus = _first(columns, (*GPUS, "tp"))
    if "power_w" not in columns or gpus is None:
        return None
    all_of_them = gpus in ALL_GPUS
    n_gpus = [(None if all_of_them else gpus_of(row)) or row.count(gpus) for row in rows]  # or refuses an empty cell
    return np.array([row.number("power_w", 1e8) for row in rows]) / np.array(n_gpus, dtype=float)
