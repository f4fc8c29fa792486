"""The command line, made from the table of options. Nothing here needs JAX."""

import argparse
import copy
from typing import Any, NoReturn

from fleetopt_jax import __version__
from fleetopt_jax.cli.codes import BAD_INPUT
from fleetopt_jax.cli.option import Option
from fleetopt_jax.cli.synopsis import COMMANDS, Command
from fleetopt_jax.cli.table import options_of
from fleetopt_jax.cli.values import flag, no_choice
from fleetopt_jax.core.errors import MOST_CHARS, NEAR, did_you_mean


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with what was perhaps meant."""

    def error(self, message: str) -> NoReturn:
        line = "".join(c if c.isprintable() else " " for c in message)
        self.exit(BAD_INPUT, f"{self.prog}: {line} (see {self.prog} --help)\n")

    def parse_known_args(self, args=None, namespace=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Refuses what is not known where it is found: the whole command line would not know whose options to name."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown(unknown[0]))
        return found, unknown

    def _unknown(self, word: str) -> str:
        name = word.partition("=")[0]
        if not name.startswith("-"):
            return f"unexpected {word[:MOST_CHARS]!r}"
        takes = sorted(option for option in self._option_string_actions if option.startswith("--"))
        said = f"unknown option {name[:MOST_CHARS]}; {did_you_mean(name, takes, NEAR).rstrip()}"
        others = [command.name for command in COMMANDS if name in map(_flag, options_of(command.name))]
        return said.removesuffix("; ") + (f"; it is of {', '.join(others)}" if others else "")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse what is none of an option's choices, or no command; argparse's own refusal lists them only."""
        choices = None if action.choices is None else [str(choice) for choice in action.choices]
        if choices is None or value in choices:
            return
        if isinstance(action, argparse._SubParsersAction):
            known = f"the commands are {', '.join(choices)}"
            self.error(f"unknown command {value[:MOST_CHARS]!r}; {did_you_mean(value, choices, NEAR)}{known}")
        raise argparse.ArgumentError(action, str(no_choice(value, choices)))


def _flag(option: Option) -> str:
    return flag(option.name) if option.nargs is None else ""


def make_parser() -> Parser:
    """The whole command line."""
    parser = Parser(
        prog="fleetopt",
        description="Find the most energy-efficient way to run a fleet of LLM inference GPUs.",
        epilog="Example: fleetopt optimize --workload azure-cdf --gpu b200 --rate 500. Compiled programs are kept in "
        "~/.cache/fleetopt_jax; delete it to clear them. FLEETOPT_CACHE names another folder, or is 'off'.",
    )
    parser.set_defaults(warned=[], read=[])  # what `terminal.warn` and `terminal.understood` are told
    parser.add_argument("--version", action="version", version=f"fleetopt {__version__}")
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=("bash", "zsh"),
        default=argparse.SUPPRESS,
        help='print a completion script: eval "$(fleetopt --print-completion bash)"',
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for command in COMMANDS:
        description = command.summary[0].upper() + command.summary[1:] + "."
        _fill(
            commands.add_parser(
                command.name, help=command.summary, description=description, epilog=command.epilog, allow_abbrev=False
            ),
            command,
        )
    return parser


def _fill(parser: argparse.ArgumentParser, command: Command) -> None:
    """Everything the command takes, each in its group."""
    alone = parser.add_mutually_exclusive_group()
    groups: dict[str, Any] = {}
    for option in options_of(command.name):
        section = option.section
        if option.alone:
            _add(alone, option)
        elif section and option.grouped and command.name in section.groups:
            if section.name not in groups:
                groups[section.name] = parser.add_argument_group(section.name, section.groups[command.name] or None)
            _add(groups[section.name], option)
        else:
            _add(parser, option)
    if command.plan_or_options:
        parser.set_defaults(
            plan_says={each.name: each.default for each in options_of(command.name) if each.said_by_a_plan}
        )


def _add(place: Any, option: Option) -> None:
    """`place` is a parser or a group of one."""
    named: dict[str, Any] = {"help": option.help, "default": copy.copy(option.default)} | option.kind.argument
    if option.metavar:
        named["metavar"] = option.metavar
    if option.nargs:
        named["nargs"] = option.nargs
    if option.required:
        named["required"] = True
    action = place.add_argument(flag(option.name) if option.nargs is None else option.name, **named)
    action.file = option.file  # for completion


class _PrintCompletion(argparse.Action):
    """A script made by shtab, which is imported only here."""

    def __call__(self, parser, namespace, values, option_string=None) -> NoReturn:
        import shtab

        commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        for command in commands.choices.values():
            for action in command._actions:
                if getattr(action, "file", None):
                    action.complete = shtab.FILE
        print(shtab.complete(parser, str(values)))
        parser.exit()
