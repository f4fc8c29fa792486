"""The tables in the docstrings of the operator laws are those of the fits that are committed."""

import re
from importlib import import_module

import pytest

from fleetopt_jax.catalog.gpus import GPUS
from fleetopt_jax.catalog.operators import document

THREE = ("median_error", "p90_error", "held_out_median_error")  # a cell: 3.1 / 11.9 / 2.7
TWO = THREE[:2]  # a cell: 6.9 19


def tables_of(law: str) -> list[tuple[str, dict[str, dict[str, str]]]]:
    """(first word of the header, GPU: column: cell) of every table."""
    found, columns = [], []
    for line in (import_module(f"fleetopt_jax.laws.operators.{law}").__doc__ or "").splitlines():
        words = line.split()
        if len(words) > 1 and words[0] in GPUS and columns:
            cells = pieces(line)[1:]
            assert len(cells) == len(columns), line
            found[-1][1][words[0]] = dict(zip(columns, cells))
        elif len(words) > 1 and all(re.fullmatch(r"[a-z0-9_]+", word) for word in words) and line.startswith("    "):
            first = words[0] if words[0] in ("prefill", "decode") and law != "recurrent" else ""
            columns = words[bool(first) :]
            found.append((first, {}))
    return [(first, table) for first, table in found if table]


def pieces(line: str) -> list[str]:
    """The cells of a row, its GPU first."""
    return re.findall(r"borrowed|-(?=\s|$)|[\d.]+ / [\d.]+ / [\d.]+|[\d.]+ +\d+(?=\s|$)|[a-z][a-z0-9-]+", line)


def variant_of(law: str, first: str, column: str) -> tuple[str, str]:
    """(document, variant) of a column."""
    if law == "attention":
        return f"{first}_attention", column
    return (law, f"{first}_{column}") if first else (law, column)


@pytest.mark.parametrize(
    ("law", "n_tables"), [("gemm", 1), ("experts", 1), ("attention", 2), ("latent_attention", 4), ("recurrent", 1)]
)
def test_the_docstring_says_the_errors_of_the_fits(law, n_tables):
    tables, n_numbers = tables_of(law), 0
    assert len(tables) == n_tables and all(set(table) == set(GPUS) for _, table in tables)
    for first, table in tables:
        for gpu, cells in table.items():
            for column, cell in cells.items():
                name, variant = variant_of(law, first, column)
                entry = document(name)["gpus"][gpu].get(variant, {})
                said = re.findall(r"[\d.]+", cell) if cell != "-" else []
                names = THREE if "/" in cell else TWO
                if not said:
                    assert entry.get("median_error") is None and (cell == "borrowed") <= bool(entry), (gpu, column)
                    continue
                for text, error in zip(said, names, strict=True):
                    digits = len(text.partition(".")[2])
                    assert abs(float(text) - 100 * entry[error]) <= 0.51 * 10**-digits, (gpu, column, error)
                    n_numbers += 1
    assert n_numbers >= 30


def test_no_fit_is_left_out_of_the_tables():
    """Every variant with an error of its own is a column."""
    for law in ("gemm", "experts", "attention", "latent_attention", "recurrent"):
        shown = {
            (*variant_of(law, first, column), gpu)
            for first, table in tables_of(law)
            for gpu, cells in table.items()
            for column, cell in cells.items()
            if cell not in ("-", "borrowed")
        }
        names = {name for name, _, _ in shown}
        fitted = {
            (name, variant, gpu)
            for name in names
            for gpu, variants in document(name)["gpus"].items()
            for variant, entry in variants.items()
            if entry.get("median_error") is not None
        }
        assert shown == fitted, law


def test_the_tables_of_watts_are_those_of_the_fits():
    """As whole percent, ranges where a line has several kinds."""
    lines = (import_module("fleetopt_jax.laws.operators.watts").__doc__ or "").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    header, operators = rows[0], rows[1 : rows.index(next(row for row in rows[1:] if row[0] == "GPU"))]
    assert header[:2] == ["GPU", "kind"]
    kinds = {"16-bit": "bf16", "fp8": "fp8", "fp8 block": "fp8_block", "nvfp4": "nvfp4"}
    names = ("median_error", "p90_error", "below_limit_median_error", "held_out_median_error")
    for gpu, kind, _, *cells in operators:
        what, _, types = kind.partition(" ")
        variants = (
            ["prefill_attention_bf16"]
            if what == "prefill"
            else [f"{what.lower()}_{kinds[each.strip()]}" for each in types.split(",")]
        )
        entries = [document("watts")["gpus"][gpu.lower()][variant] for variant in variants]
        for cell, name in zip(cells, names, strict=True):
            said, errors = [float(text) for text in re.findall(r"\d+", cell)], [100 * entry[name] for entry in entries]
            assert abs(min(said) - min(errors)) <= 0.6 and abs(max(said) - max(errors)) <= 0.6, (gpu, kind, name)
    (serving,) = [i for i, row in enumerate(rows) if row[:2] == ["GPU", "rows"] and i]
    for gpu, _, *cells in rows[serving + 1 :]:
        entry = document("serving_watts")["gpus"][gpu.lower()]["serving"]
        errors = [entry[name] for name in ("mean_error", "p90_error", "held_out_mean_error", "held_out_median_error")]
        for cell, error in zip(cells, errors, strict=True):
            (text,) = re.findall(r"\d+", cell)
            assert abs(float(text) - 100 * error) <= 0.6, (gpu, cell)
