"""The table of options as the README shows it: `python -m fleetopt_jax.cli.reference` prints it."""

from fleetopt_jax.cli.option import Option
from fleetopt_jax.cli.synopsis import ALL
from fleetopt_jax.cli.table import TABLE

HEAD = ("option", "may be", "default", "what it is", "in a scenario", "commands")


def options_table() -> str:
    """Markdown: a row for each option, and for each way it is taken."""
    return "\n".join(_row(cells) for cells in (HEAD, ("---",) * len(HEAD), *map(_cells, TABLE)))


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _cells(option: Option) -> tuple[str, ...]:
    section, unit = option.section, option.kind.unit
    allowed = option.allowed
    return (
        f"`{option.where if option.nargs is None else option.metavar or option.name}`",
        allowed if unit in allowed else f"{allowed} [{unit}]",
        option.unless.removeprefix("default").lstrip(": ") or option.usual,
        option.about + option.several,
        f"`{section.name}.{option.key or option.name}`" if section else "",
        "all" if option.commands == ALL else ", ".join(option.commands),
    )


if __name__ == "__main__":
    print(options_table())
