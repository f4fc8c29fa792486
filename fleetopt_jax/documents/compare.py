"""A plan beside what was observed of its fleet as JSON (`fleetopt-comparison/1`, SI units), pools counted from 1."""

import dataclasses
from typing import Any

import numpy as np

from fleetopt_jax._optimize.compare import METERS, WORTH, Account, ComparedFigure, Comparison, Explanation
from fleetopt_jax._optimize.law_errors import LAW_ERRORS
from fleetopt_jax._optimize.plan import Plan
from fleetopt_jax._optimize.uncertainty import LEVEL
from fleetopt_jax.documents.observed import ObservedFile
from fleetopt_jax.workload.atoms import mean_tokens

SCHEMA = "fleetopt-comparison/1"
OF_PLAN = ("workload", "assume", "dispatch")
OF_POOL = ("window_tokens", "gpu", "llm", "tp", "n_instances")


def comparison_to_json(found: Comparison, plan: Plan, of_plan: dict[str, Any], file: ObservedFile) -> dict[str, Any]:
    """A comparison with the figures of a file; `of_plan` is the plan's own document.

    `planned` is at the plan's rate; `at_observed_rate`, null unless another was observed, has the same fields. Of each
    figure: what was observed and predicted, the interval of the prediction and whether the first lies in it. Of each
    input: the `factor` that leaves the least misfit, how much of that it `removes`, and what the figures then are.
    """
    return {
        "schema": SCHEMA,
        **{name: of_plan[name] for name in OF_PLAN},
        "pools": [{name: pool[name] for name in OF_POOL} for pool in of_plan["pools"]],
        "observed": {"understood": list(file.understood), "left_out": list(file.left_out)},
        "level": LEVEL,
        "n_draws": found.n_draws,
        "seed": found.seed,
        "law_log_sigmas": dataclasses.asdict(LAW_ERRORS),
        "meter_log_sigma": METERS,
        "planned": _account(found.planned, plan),
        "at_observed_rate": None if found.at_observed_rate is None else _account(found.at_observed_rate, plan),
        "not_compared": [{"pool": _number(each.pool), "figure": each.name} for each in found.not_compared],
    }


def _account(account: Account, plan: Plan) -> dict[str, Any]:
    return {
        "rate_per_s": account.rate_per_s,
        "misfit": account.misfit,
        "within_errors": account.misfit <= WORTH,
        "explained": account.best is not None,
        "figures": [_figure(each) for each in account.figures],
        "explanations": [_explanation(each, plan) for each in account.explanations],
    }


def _figure(each: ComparedFigure) -> dict[str, Any]:
    seen = each.observed
    return {
        "pool": _number(seen.pool),
        "figure": seen.name,
        "observed": seen.value,
        "observed_between": None if seen.between is None else list(seen.between),
        "predicted": each.predicted,
        "interval": [each.interval.low, each.interval.high],
        "log_sigma": each.log_sigma,
        "inside": each.inside,
    }


def _explanation(each: Explanation, plan: Plan) -> dict[str, Any]:
    planned = _planned(each, plan)
    return {
        "input": each.input,
        "pool": _number(each.pool),
        "factor": each.factor,
        "removes": each.removes,
        "at_bound": each.at_bound,
        "planned": planned,
        "would_be": None if planned is None else planned * each.factor,
        "prefix_hit_frac": each.hit_frac,
        "figures": list(each.figures),
    }


def _planned(each: Explanation, plan: Plan) -> float | None:
    """What the plan has of an input, where that is a number: 1/s, a squared CV, tokens or instances."""
    workload, instances = plan.problem.workload, np.asarray(plan.fleet.n_instances)
    prompts, outputs = mean_tokens(workload)
    numbers = {
        "rate": workload.arrival_rate_per_s,
        "burstiness": workload.arrival_scv,
        "prompts": prompts,
        "outputs": outputs,
        "instances": instances.sum() if each.pool is None else instances[each.pool],
    }
    return float(numbers[each.input]) if each.input in numbers else None


def _number(pool: int | None) -> int | None:
    return None if pool is None else pool + 1
