"""What goes to stderr: progress, warnings and, with --verbose, what was done. stdout is the answer's alone."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from fleetopt_jax._simulate import Simulation


def say(options: argparse.Namespace, text: str) -> None:
    """One line that the user must see."""
    print(f"fleetopt {options.command}: {text}", file=sys.stderr)


def understood(options: argparse.Namespace, text: str) -> None:
    """One line of how an input was read, on stderr after an answer unless --quiet: a refusal stands alone."""
    options.read.append(text)


def say_understood(options: argparse.Namespace) -> None:
    """How the inputs were read."""
    for text in () if options.quiet else options.read:
        say(options, text)


def warn(options: argparse.Namespace, text: str) -> None:
    """One line beside the answer: in its document, and on stderr after it unless --quiet. Each is said once."""
    if text not in options.warned:
        options.warned.append(text)


def say_warnings(options: argparse.Namespace) -> None:
    """What was warned of."""
    for text in () if options.quiet else options.warned:
        say(options, f"warning: {text}")


def detail(options: argparse.Namespace, text: str) -> None:
    """One line, with --verbose."""
    if options.verbose:
        say(options, text)


@contextmanager
def progress(options: argparse.Namespace, title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time that remains, on stderr where that is a terminal. Yields (done, total) -> None."""
    with _bar(options) as bar, _timed(options, title):
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def simulation_progress(options: argparse.Namespace) -> Iterator[Callable[[str, float], None]]:
    """The bar of a simulation. Yields (what is simulated, share that is done) -> None."""
    with _bar(options) as bar, _timed(options, "Simulating"):
        task = bar.add_task("Simulating", total=1.0)
        yield lambda what, done: bar.update(task, description=f"Simulating {what}", completed=done)


def _bar(options: argparse.Namespace) -> Progress:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=options.quiet or not console.is_terminal)


@contextmanager
def _timed(options: argparse.Namespace, title: str) -> Iterator[None]:
    began_s = time.perf_counter()
    yield
    detail(options, f"{title}: {time.perf_counter() - began_s:.2f} s")


def warn_of_warm_up(options: argparse.Namespace, result: "Simulation") -> None:
    """Say so where a simulation was too short to forget that it began empty."""
    if not result.warmed_up:
        warn(
            options,
            f"the warm-up of {result.warm_up_s:.3g} s is shorter than three lives of a sequence: give "
            f"--requests {result.enough_requests}",
        )
