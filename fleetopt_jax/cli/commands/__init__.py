"""The commands: each is a module whose `run` turns checked options into an `Answer`."""

import argparse
from importlib import import_module

from fleetopt_jax.cli.answer import Answer

COMMANDS = (
    *("reproduce", "optimize", "services", "evaluate", "pareto", "sweep", "sensitivity", "levers", "schedule"),
    *("ledger", "simulate", "engine", "report", "calibrate", "predict", "compare", "trace", "catalog", "export"),
)


def run(options: argparse.Namespace) -> Answer:
    """Run the command that the options name. Its module, and what that needs, is only now imported."""
    return import_module(f"{__name__}.{options.command}").run(options)
