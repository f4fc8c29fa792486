"""The simulator against the engine's own measurements: a closed loop of n sequences, as the benchmark ran it.

    python experiments/closed_loop.py FOLDER

The ML.ENERGY Benchmark v3 sends all requests at time 0 to one instance that runs at most n at once, and measures from
when n requests have their first token until all but n + 1 have ended. So does the simulation, with the configuration's
own fit (Llama-3.1-70B on four H100, and the other dense models) and as many requests as each row had. Known of the
lengths: the mean output and its mean square (gamma distributed here, up to the task's cap). Assumed: the prompts, 350
tokens in chat. Prompts that were sent before hit the prefix cache, which the simulator does not know: of every prompt
it takes the share of the prefill time that makes the mix right, in one of three ways:

    fit   the mean mix that was taken off the measured iterations when the engine was fitted: the comparison that counts
    row   the row's own mix, fewer where prompts were repeated
    full  every prompt in full

Errors are of simulated / measured - 1.
"""

import argparse
import csv
from dataclasses import dataclass, replace
from pathlib import Path

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from _mlenergy import CATALOG, Row, configurations, read_rows  # noqa: E402
from _results import GREY, MEASURED, OWN_FIT, RESULTS, finish, log_ticks, new_figure, write_table  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from fleetopt_jax._simulate.dispatch import Balancer  # noqa: E402
from fleetopt_jax._simulate.pool import Pool, PoolRequests, PoolRun, run_pool  # noqa: E402
from fleetopt_jax._simulate.state import Scheduler  # noqa: E402
from fleetopt_jax.catalog.engines import EngineEntry, engine_entry, engine_points, own_fits  # noqa: E402
from fleetopt_jax.catalog.spec import MEASURED_SERVING, EngineSpec  # noqa: E402
from fleetopt_jax.fleet.assumptions import DISPATCHES  # noqa: E402
from fleetopt_jax.report.figures import save_figure  # noqa: E402

MAIN = ("h100", "llama-3.1-70b", 4, "bf16")
TASK, MOST_OUTPUT_TOKENS = "lm-arena-chat", 4096  # vLLM's cap in that task
BATCHES = (8, 512)  # sequences at once, from and to
MIXES = ("fit", "row", "full")
WITHIN = 0.05
N_REPLICATIONS = 4


@dataclass(frozen=True)
class Run:
    """How one row was measured."""

    max_num_seqs: int
    n_requests: int
    prompt_tokens: int  # assumed
    output_tokens: float  # mean
    output_tokens2: float  # mean square


@dataclass(frozen=True)
class Loop:
    """What the simulation of a row gives, means over replications."""

    n_active: float
    tok_per_s: float
    power_w_per_gpu: float
    prefill_frac: float
    prompt_per_output: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    runs, found = _runs(folder), configurations(read_rows(folder))
    names = sorted((key for key in found if _dense_fit(key)), key=lambda key: _names(key) != MAIN)
    lines = []
    for key in names:
        entry = engine_entry(EngineSpec(*_names(key), serving=MEASURED_SERVING))
        for row in found[key]:
            run = runs[row.row_id]
            if row.task != TASK or not BATCHES[0] <= run.max_num_seqs <= BATCHES[1]:
                continue
            fit = engine_points(entry, [row.batch], row.context_tokens)[0]
            lines += [(_names(key), row, run, fit, mix, _closed_loop(entry, row, run, mix)) for mix in MIXES]
    _write(lines)
    save_figure(_figure([line for line in lines if line[0] == MAIN]), RESULTS / "closed_loop")
    _report(lines)


def _names(key: tuple[str, str, int, str]) -> tuple[str, str, int, str]:
    gpu, architecture, tp, precision = key
    return gpu, CATALOG.get(architecture, ""), tp, precision


def _dense_fit(key: tuple[str, str, int, str]) -> bool:
    fit = own_fits().get(_names(key))
    return fit is not None and float(fit.decode.expert_share) == 0


def _runs(folder: Path) -> dict[int, Run]:
    runs = {}
    with (
        (folder / "llm_steady_state.csv").open(newline="") as steady,
        (folder / "llm_derived_roofline.csv").open(newline="") as derived,
    ):
        prompts = {line["row_id"]: float(line["assumed_input_len_tokens"]) for line in csv.DictReader(derived)}
        for line in csv.DictReader(steady):
            if line["row_id"] in prompts:
                runs[int(line["row_id"])] = Run(
                    max_num_seqs=int(line["max_num_seqs"]),
                    n_requests=int(line["num_requests"]),
                    prompt_tokens=round(prompts[line["row_id"]]),
                    output_tokens=float(line["avg_output_len_tokens"]),
                    output_tokens2=float(line["output_len_mean_sq_tokens2"]),
                )
    return runs


def _closed_loop(entry: EngineEntry, row: Row, run: Run, mix: str) -> Loop:
    """Simulate twice: the first run shows when the window of the second opens and closes."""
    wanted = {"fit": entry.prompt_per_output, "row": row.prompt_per_output, "full": np.inf}[mix]
    share = min(1.0, wanted * run.output_tokens / run.prompt_tokens)
    prefill = entry.engine.prefill
    prefill = replace(prefill, per_token_s=prefill.per_token_s * share, per_token2_s=prefill.per_token2_s * share)
    engine = replace(entry.engine, prefill=prefill)
    output = _outputs(run)
    requests = PoolRequests(np.zeros(output.shape), np.full(output.shape, run.prompt_tokens), output)
    window_s = np.tile([0.0, np.inf], (N_REPLICATIONS, 1))
    for _ in range(2):
        done = _simulate(engine, run, requests, window_s)
        opens_s = np.sort(done.first_s, axis=1)[:, run.max_num_seqs - 1]
        closes_s = np.sort(done.last_s, axis=1)[:, run.n_requests - run.max_num_seqs - 2]
        window_s = np.stack([opens_s, closes_s], axis=1)
    seconds, sums = window_s[:, 1] - window_s[:, 0], {name: x[:, 0] for name, x in done.tally._asdict().items()}
    return Loop(
        n_active=float(np.mean(sums["in_flight_s"] / seconds)),
        tok_per_s=float(np.mean(sums["tokens"] / seconds)),
        power_w_per_gpu=float(np.mean(sums["gpu_j"] / seconds)),
        prefill_frac=float(np.mean(sums["prefill_s"] / seconds)),
        prompt_per_output=share * run.prompt_tokens / run.output_tokens,
    )


def _outputs(run: Run) -> np.ndarray:
    rng = np.random.default_rng(0)
    scv = run.output_tokens2 / run.output_tokens**2 - 1.0
    drawn = rng.gamma(1.0 / scv, scv * run.output_tokens, (N_REPLICATIONS, run.n_requests))
    drawn *= run.output_tokens / drawn.mean(axis=1, keepdims=True)
    return np.clip(np.rint(drawn), 1, MOST_OUTPUT_TOKENS).astype(int)


def _simulate(engine, run: Run, requests: PoolRequests, window_s: np.ndarray) -> PoolRun:
    scheduler = Scheduler(
        max_num_seqs=jnp.asarray(run.max_num_seqs, dtype=jnp.int32),
        n_blocks=engine.kv.n_blocks,
        fixed_tokens=engine.kv.fixed_tokens,
        window_s=jnp.asarray(window_s),
    )
    horizon_s = np.full(N_REPLICATIONS, 1e6)
    in_turn = Balancer(DISPATCHES["round_robin"])
    return run_pool(Pool(engine, scheduler, 1), requests, horizon_s, in_turn, n_slots=run.max_num_seqs)


def _write(lines: list) -> None:
    head = ["gpu", "llm", "tp", "precision", "mix", "max_num_seqs", "n_requests", "prompt_tokens", "prompt_per_output"]
    head += ["n_active_measured", "n_active_simulated", "prefill_frac_simulated"]
    head += [f"{name}_{of}" for name in ("tok_per_s", "power_w_per_gpu") for of in ("measured", "own_fit", "simulated")]
    table = []
    for names, row, run, fit, mix, loop in lines:
        line = [*names, mix, run.max_num_seqs, run.n_requests, run.prompt_tokens, loop.prompt_per_output]
        line += [row.batch, loop.n_active, loop.prefill_frac]
        line += [getattr(x, name) for name in ("tok_per_s", "power_w_per_gpu") for x in (row, fit, loop)]
        table.append(line)
    write_table("closed_loop.csv", head, table)


def _figure(lines: list) -> Figure:
    figure = new_figure(10.0, 4.2)
    quantities = {"tok_per_s": "output tokens per second of the instance", "power_w_per_gpu": "power of one GPU [W]"}
    for axes, (name, label) in zip(figure.subplots(1, 2), quantities.items()):
        of_fit = [line for line in lines if line[4] == "fit"]
        batch = [line[2].max_num_seqs for line in of_fit]
        measured = np.array([getattr(line[1], name) for line in of_fit])
        axes.fill_between(batch, (1 - WITHIN) * measured, (1 + WITHIN) * measured, color="#dddddd", label="within 5 %")
        axes.plot(batch, measured, "o", color=MEASURED, ms=5, label="measured")
        axes.plot(batch, [getattr(x[5], name) for x in of_fit], color=OWN_FIT, label="simulated, the mix of the fit")
        full = [getattr(line[5], name) for line in lines if line[4] == "full"]
        axes.plot(batch, full, "--", color=GREY, linewidth=1.0, label="simulated, every prompt prefilled in full")
        axes.set_xscale("log", base=2)
        log_ticks(axes.xaxis, batch[::2])
        axes.set_ylim(0)
        finish(axes, x="sequences at once", y=label)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    worst = [max(abs(_error(line, name)) for line in lines if line[4] == "fit") for name in quantities]
    figure.suptitle(
        "Closed loop of Llama-3.1-70B on 4 x H100: the simulation with the configuration's own fit is within "
        f"{worst[0]:.1%} in\nthroughput and {worst[1]:.1%} in power of every measured concurrency",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    return figure


def _error(line: tuple, name: str) -> float:
    return getattr(line[5], name) / getattr(line[1], name) - 1.0


def _report(lines: list) -> None:
    print("simulated / measured - 1 (in brackets: the fit itself / measured - 1)")
    print(f"{'':30} {'n':>4} " + " ".join(f"{mix + ': tok/s':>18} {'power':>16}" for mix in MIXES))
    for i in range(0, len(lines), len(MIXES)):
        names, row, run, fit, _, _ = lines[i]
        cells = [
            f"{_error(line, name):+7.1%} ({getattr(fit, name) / getattr(row, name) - 1:+6.1%})"
            for line in lines[i : i + len(MIXES)]
            for name in ("tok_per_s", "power_w_per_gpu")
        ]
        name = f"{names[0]} {names[1]} tp{names[2]} {names[3]}"
        print(f"{name:30} {run.max_num_seqs:4} " + "  ".join(cells))
    for names in dict.fromkeys(line[0] for line in lines):
        for mix in MIXES:
            errors = [
                [abs(_error(line, name)) for line in lines if line[0] == names and line[4] == mix]
                for name in ("tok_per_s", "power_w_per_gpu")
            ]
            within = sum(max(pair) <= WITHIN for pair in zip(*errors))
            name = f"{names[0]} {names[1]} tp{names[2]} {names[3]}, mix {mix}"
            print(
                f"{name:44} tok/s: mean {np.mean(errors[0]):.1%}, worst {max(errors[0]):.1%}; power: mean "
                f"{np.mean(errors[1]):.1%}, worst {max(errors[1]):.1%}; within 5 %: {within} of {len(errors[0])}"
            )


if __name__ == "__main__":
    main()
