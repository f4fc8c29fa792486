"""The command line that makes an answer again, written from the options as they were understood."""

import argparse
import shlex
from collections.abc import Callable, Iterable, Sequence

from fleetopt_jax._optimize.plan import Plan
from fleetopt_jax.cli.table import options_of
from fleetopt_jax.cli.values import flag
from fleetopt_jax.documents.plan_file import from_plan, read_plan_file, seen_from_plan


def command_said(options: argparse.Namespace) -> str:
    """The command with what it is about: each option that is not at its default, a scenario's included. What is
    written, and how loudly, is left out. Files are named as seen from the folder of --out, if that is given."""
    words = _changed(options, options.command)
    if options.out:
        words = _renamed(options.command, words, lambda name: seen_from_plan(name, options.out))
    return shlex.join(["fleetopt", options.command, *words])


def commands_of(options: argparse.Namespace, plan: Plan) -> list[str]:
    """What repeats the plan of a file: the search that found it, where the file says which and still is what was found;
    else its evaluation, as the options ask for it. Then the command that is running."""
    found = None if plan.method == "given" else read_plan_file(options.plan).command
    asked = _changed(options, "evaluate")
    said = shlex.join(["fleetopt", "evaluate", options.plan, *asked])
    if found and not asked:
        said = f"{from_here(found, options.plan)} --out {shlex.quote(options.plan)}"
    return [said, options.line]


def from_here(found: str, plan: str) -> str:
    """A command kept in a plan with its files as seen from here; as it is where nobody of ours wrote it."""
    try:
        program, command, *words = shlex.split(found)
    except ValueError:
        return found
    return shlex.join([program, command, *_renamed(command, words, lambda name: from_plan(name, plan))])


def _renamed(command: str, words: Sequence[str], rename: Callable[[str], str | None]) -> list[str]:
    """The words of a command with the files that its options name, several with commas, called otherwise; what
    `rename` says None of stays."""
    files = {flag(option.name) for option in options_of(command) if option.file in ("read", "named")}
    before = ["", *words[:-1]]
    return [",".join(_each(word.split(","), rename)) if last in files else word for last, word in zip(before, words)]


def _each(names: Iterable[str], rename: Callable[[str], str | None]) -> list[str]:
    return [rename(name) or _head(name, rename) for name in names]


def _head(name: str, rename: Callable[[str], str | None]) -> str:
    """An engine's file called otherwise, before what is said of it: mine.json:clock=0.8."""
    file, colon, said = name.partition(":")
    return f"{rename(file) or file}{colon}{said}"


def _changed(options: argparse.Namespace, command: str) -> list[str]:
    """The options of a command that say what is asked, where they are not at their defaults."""
    words = []
    for option in options_of(command):
        if option.section is None:
            continue
        kept = option.kind.kept(getattr(options, option.name))
        if kept is not None and kept != option.kind.kept(option.default):
            words += [part for word in option.kind.words(option.name, kept) for part in _parted(word)]
    return words


def _parted(word: str) -> list[str]:
    """'--gpu=h100' as two words, unless the second would be taken for an option."""
    name, equals, value = word.partition("=")
    return [name, value] if equals and not value.startswith("-") else [word]
