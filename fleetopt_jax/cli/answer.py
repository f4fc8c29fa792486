"""What a command answers, and its delivery: a table or JSON on stdout, and the files that were asked for."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import RenderableType

from fleetopt_jax.cli.table import OUTPUTS, inputs_of
from fleetopt_jax.cli.terminal import say
from fleetopt_jax.cli.values import flag
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.files import check_writable, same_file, to_json, write_whole
from fleetopt_jax.report.tables import show
from fleetopt_jax.report.words import listed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Document = dict[str, Any]
PLAN = "fleetopt-plan/1"


class Answer(NamedTuple):
    """One JSON document, how it is shown, and the exit code."""

    document: Document
    shown: Callable[[Document], RenderableType] | str  # a table of the document, or a text that --out takes instead
    code: int
    figure: "Callable[[Document], Figure] | None" = None  # what --figure asks for; None where there is nothing to draw
    files: Mapping[str, str] = {}  # what other options ask for, by their names
    written: bool = False  # whether what --out asks for is there by now
    note: str = ""  # of a text that was written to --out: what whoever uses it must know


def check_outputs(options: argparse.Namespace) -> None:
    """Refuse, before the work is done, a file that cannot be written, is read as well, or is asked for twice."""
    given = [getattr(options, name, None) for name in inputs_of(options.command)]
    named = [each for each in given if isinstance(each, (str, list))]  # one may be a number instead
    listed = [part.strip() for text in named for part in (text if isinstance(text, list) else text.split(","))]
    listed += [part.partition(":")[0] for part in listed]  # of an engine's file, with what is otherwise there
    refuse_outputs(options, [*(text for text in named if isinstance(text, str)), *listed])
    written: dict[str, str] = {}
    for name in OUTPUTS:
        path = getattr(options, name, None)
        if path is None:
            continue
        if _place(path) in written:
            raise BadInput(f"{flag(name)} {path}", f"{written[_place(path)]} writes it", "need another name")
        written[_place(path)] = flag(name)
        if name == "figure":
            from fleetopt_jax.report.figures import check_figure

            check_figure(path)
        else:
            check_writable(path, flag(name))


def refuse_outputs(options: argparse.Namespace, inputs: Iterable[str | None]) -> None:
    """Refuse to write over a file that is read."""
    for name in OUTPUTS:
        path = getattr(options, name, None)
        if path is not None and any(source and same_file(path, source) for source in inputs):
            raise BadInput(f"{flag(name)} {path}", "the file is read as well", "need another name")


def _place(path: str) -> str:
    """A name in full, links followed; devices and pipes may be written to twice."""
    return os.path.realpath(path) if not os.path.exists(path) or os.path.isfile(path) else path


def deliver(options: argparse.Namespace, answer: Answer) -> None:
    """Files first, each whole; then stdout, as --json or as the table."""
    if options.warned:  # a command that says its own has them among these
        said = [*answer.document.get("warnings", []), *options.warned]
        answer = answer._replace(document={**answer.document, "warnings": list(dict.fromkeys(said))})
    text = to_json(answer.document)
    written = answer.shown if isinstance(answer.shown, str) else text + "\n"
    if getattr(options, "figure", None) and answer.figure:
        from fleetopt_jax.report.figures import write_figure

        write_figure(answer.figure(answer.document), options.figure)
    elif getattr(options, "figure", None):
        say(options, f"--figure {options.figure}: nothing to draw, not written")
    for name in ("csv", "router"):
        path = getattr(options, name, None)
        if path and name in answer.files:
            write_whole(path, answer.files[name], flag(name))
        elif path:
            say(options, f"{flag(name)} {path}: nothing to write, not written")
    if answer.written:
        pass
    elif options.out and _would_spoil(options.out, answer):
        why = "the plan breaks its limits" if answer.document.get("pools") else "no fleet holds the limits"
        say(options, f"--out {options.out}: {why}, so the file that is there stays")
    elif options.out:
        write_whole(options.out, written, "--out")
    try:
        _print(options, answer, text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise BadInput("stdout", f"cannot be written: {error.strerror or error}") from None


def _would_spoil(path: str, answer: Answer) -> bool:
    """Whether a plan that holds its limits, or whatever else is there, would make way for one that does not."""
    if answer.document.get("schema") != PLAN or answer.document.get("status") != "infeasible":
        return False
    try:
        there = json.loads(Path(path).read_bytes()) if os.path.isfile(path) else {}
    except (OSError, ValueError):
        return True
    return bool(there) and not (isinstance(there, dict) and there.get("status") == "infeasible")


def _print(options: argparse.Namespace, answer: Answer, text: str) -> None:
    if options.json:
        print(text)
    elif not isinstance(answer.shown, str):
        show(answer.shown(answer.document))
    elif options.out:
        others = [path for name in answer.files if (path := getattr(options, name, None))]
        print(f"Wrote {listed([options.out, *others])}{answer.note}")
    else:
        sys.stdout.write(answer.shown)  # as it is: a table's width would break its lines
