"""What a command answers, and its delivery: a table or JSON on stdout, and the files that were asked for."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import RenderableType

from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.report.files import check_writable, same_file, to_json, write_whole
from fleetopt_jax.report.tables import show

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Document = dict[str, Any]
OUTPUTS = ("out", "figure", "csv", "router", "save_scenario")  # options that name a file to write
INPUTS = ("plan", "workload", "measurements", "measured", "scenario", "llm")  # options that may name one to read


class Answer(NamedTuple):
    """One JSON document, how it is shown, and the exit code."""

    document: Document
    shown: Callable[[Document], RenderableType] | str  # a table of the document, or a text that --out takes instead
    code: int
    figure: "Callable[[Document], Figure] | None" = None  # what --figure asks for; None where there is nothing to draw
    files: Mapping[str, str] = {}  # what other options ask for, by their names


def check_outputs(options: argparse.Namespace) -> None:
    """Refuse, before the work is done, a file that cannot be written, is read as well, or is asked for twice."""
    taken = [(path, "read") for name in INPUTS if (path := getattr(options, name, None))]
    for name in OUTPUTS:
        path = getattr(options, name, None)
        if not path:
            continue
        option = f"--{name.replace('_', '-')}"
        use = next((use for other, use in taken if same_file(path, other) or _place(path) == _place(other)), None)
        if use:
            raise BadInput(f"{option} {path}", f"the file is also {use}", "need another name")
        taken.append((path, f"written by {option}"))
        if name == "figure":
            from fleetopt_jax.report.figures import check_figure

            check_figure(path)
        else:
            check_writable(path, option)


def _place(path: str) -> str:
    """A name in full, links followed; devices and pipes may be written to twice."""
    return os.path.realpath(path) if not os.path.exists(path) or os.path.isfile(path) else path


def deliver(options: argparse.Namespace, answer: Answer) -> None:
    """Files first, each whole; then stdout, as --json or as the table."""
    text = to_json(answer.document)
    if getattr(options, "figure", None) and answer.figure:
        from fleetopt_jax.report.figures import write_figure

        write_figure(answer.figure(answer.document), options.figure)
    for name, content in answer.files.items():
        if getattr(options, name, None):
            write_whole(getattr(options, name), content, f"--{name}")
    written = answer.shown if isinstance(answer.shown, str) else text + "\n"
    if options.out:
        write_whole(options.out, written)
    if options.json:
        print(text)
    elif not isinstance(answer.shown, str):
        show(answer.shown(answer.document))
    elif options.out:
        print(f"Wrote {options.out}")
    else:
        sys.stdout.write(written)  # as it is: a table's width would break its lines
