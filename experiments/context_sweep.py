"""Tokens per joule against the context window, as measured: Llama-3.1-70B in 16 bits on 8 B200.

    python experiments/context_sweep.py FILE.csv

The paper (The 1/W Law, arXiv 2603.17280v1, table 1) claims that every doubling of the window halves tokens per watt, by
a B200 engine scaled from data sheets; its tok/W divides an instance's tokens by one GPU's power, so here it is divided
by 8. Measured: as many streams as the KV cache holds at each window, decoding together, nothing prefilled (B200 context
sweep of vllm-project/semantic-router, vLLM 0.20). The file has columns context_window_tokens, n_sequences,
decode_tok_per_s, power_w_per_gpu and output_tokens_per_request. A stream fills its window with its last token, so its
mean context while it decodes is window - output / 2.

The 128K window is shown and left out of the fits and the comparison: its 28 streams ask for all of the cache, the
engine preempts, and what it recomputes is in its time and power but not in its tokens.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from _results import GREY, LAW, MEASURED, OWN_FIT, PAPER, RESULTS, finish, log_ticks, new_figure, write_table
from _tables import reproduce  # also turns on float64
from matplotlib.figure import Figure

from fleetopt_jax.calibrate.fit import DecodeFit, PowerFit, fit_decode, fit_power
from fleetopt_jax.calibrate.measurements import Measurements, read_measurements
from fleetopt_jax.catalog.engines import EngineEntry, engine_entry, engine_points
from fleetopt_jax.catalog.gpus import gpu_entry
from fleetopt_jax.catalog.spec import MEASURED_SERVING, EngineSpec
from fleetopt_jax.laws.decode import DecodeLaw
from fleetopt_jax.report.figures import save_figure

LONGEST_KEPT = 65_536  # window [tokens]; beyond, the engine preempts
CURVES = {
    "measured": ("measured", MEASURED, "o"),
    "own_fit": ("the sweep's own fit", OWN_FIT, "-"),
    "law": ("B200 law, nothing fitted here", LAW, "-"),
    "paper": ("printed in the paper (table 1), all 8 GPUs counted", PAPER, "--"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    measured = read_measurements(parser.parse_args().file)
    windows = _windows(measured)
    kept = [i for i, window in enumerate(windows) if window <= LONGEST_KEPT]
    fields = ("batch", "step_s", "context_tokens", "power_w_per_gpu")
    steady = replace(measured, **{name: getattr(measured, name)[kept] for name in fields})
    law, paper = (engine_entry(EngineSpec("b200", source=of, own_fit=False)) for of in ("measured", "projected"))
    linear = engine_entry(EngineSpec("b200", serving=MEASURED_SERVING, own_fit=False))  # the form that is fitted
    # At a full cache n L is nearly the same for every window: a step cannot be split into what it costs without a
    # sequence and what a token of context costs. Two ends of what is possible, to show that they say the same here:
    ends = [fit_decode(steady, per_token_s=at) for at in (0.0, float(linear.engine.power.ideal_bytes.per_token_s))]
    power = fit_power(steady, limit_w=float(gpu_entry("b200").gpu.tdp_w))
    own = replace(linear, engine=replace(linear.engine, decode=ends[1].step, power=power.power))
    curves = {
        "measured": measured.batch / measured.step_s / (law.spec.tp * measured.power_w_per_gpu),
        "own_fit": _at(own, measured),
        "law": _at(law, measured),
        "paper": _printed(windows, law.spec.tp),
        "paper_engine": _at(paper, measured),
    }
    _write(windows, measured, linear.engine.power.ideal_bytes, law, own, curves)
    save_figure(_figure(windows, curves), RESULTS / "context_sweep")
    _report(windows, steady, linear, ends, power, curves)


def _windows(measured: Measurements) -> list[int]:
    """The powers of two above the mean contexts, which lie half an output below them."""
    return [1 << (int(tokens) - 1).bit_length() for tokens in measured.context_tokens]


def _at(entry: EngineEntry, measured: Measurements) -> list[float]:
    """Tokens per joule where the sweep measured, nothing prefilled."""
    points = zip(measured.batch, measured.context_tokens)
    return [engine_points(entry, [float(n)], float(tokens), 0.0)[0].tok_per_j for n, tokens in points]


def _printed(windows: list[int], tp: int) -> list[float]:
    cells = {(cell.row, cell.column): cell.exact for cell in reproduce([1]).tables["1"]}
    return [cells[str(window), "b200_tok_per_w"] / tp for window in windows]


def _write(
    windows: list[int], measured: Measurements, ideal: DecodeLaw, law: EngineEntry, own: EngineEntry, curves: dict
) -> None:
    lines = []
    for i, window in enumerate(windows):
        n, tokens = float(measured.batch[i]), float(measured.context_tokens[i])
        predicted = [engine_points(entry, [n], tokens, 0.0)[0] for entry in (law, own)]
        line = [window, int(n), tokens, int(window <= LONGEST_KEPT), float(measured.step_s[i])]
        line += [point.step_s for point in predicted]
        line += [float(ideal.step_s(n, tokens)), float(measured.power_w_per_gpu[i])]
        line += [point.power_w_per_gpu for point in predicted]
        line += [float(curve[i]) for curve in curves.values()]
        line += [float(curve[i] / curve[i - 1]) if i else None for curve in curves.values()]
        lines.append(line)
    columns = ["window_tokens", "n_sequences", "context_tokens", "compared"]
    columns += [f"step_s_{name}" for name in ("measured", "law", "own_fit", "bytes_at_peak_bandwidth")]
    columns += [f"power_w_per_gpu_{name}" for name in ("measured", "law", "own_fit")]
    columns += [f"tok_per_j_{name}" for name in curves] + [f"kept_{name}" for name in curves]
    write_table("context_sweep.csv", columns, lines)


def _figure(windows: list[int], curves: dict) -> Figure:
    figure = new_figure(10.4, 4.8)
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
    n = sum(window <= LONGEST_KEPT for window in windows)
    for name, (label, colour, style) in CURVES.items():
        values = curves[name]
        points = {"color": colour, "label": label, "linewidth": 1.8, "zorder": 3 if style == "o" else 2}
        left.plot(windows[:n], values[:n], style, **points)
        kept = [values[i] / values[i - 1] for i in range(1, n)]
        right.plot(windows[1:n], kept, "o-" if style == "o" else style, **points)
    beyond = {"color": MEASURED, "mfc": "white", "label": "measured while preempting: left out"}
    left.plot(windows[n:], curves["measured"][n:], "o", **beyond)
    halving = [curves["measured"][0] * windows[0] / window for window in windows]
    left.plot(windows, halving, ":", color=GREY, linewidth=1.2, label="halving from the first point")
    right.axhline(0.5, color=GREY, linestyle=":", linewidth=1.2)
    left.set_yscale("log")
    log_ticks(left.yaxis, [0.1, 0.2, 0.5, 1, 2, 5, 10])
    for axes, shown in ((left, windows), (right, windows[1:n])):
        axes.set_xscale("log", base=2)
        log_ticks(axes.xaxis, shown, kilo=True)
    finish(left, x="context window [tokens]", y="output tokens per joule (all 8 GPUs)")
    finish(
        right, x="context window after the doubling [tokens]", y="share of tokens per joule that the doubling leaves"
    )
    right.set_ylim(0.45, 0.9)
    left.legend(frameon=False, fontsize=9, loc="lower left")
    measured = curves["measured"]
    first, last = measured[1] / measured[0], measured[n - 1] / measured[n - 2]
    level = sum(curves["law"][i] / measured[i] for i in range(n)) / n
    figure.suptitle(
        f"Longer windows cost tokens per joule, but a doubling leaves x{first:.2f} at first and x{last:.2f} at 64K, "
        f"not a half:\nthe law has the shape right and {level:.1f}x the level of this newer engine",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    return figure


def _report(
    windows: list[int], steady: Measurements, linear: EngineEntry, ends: list[DecodeFit], power: PowerFit, curves: dict
) -> None:
    print("window  sequences  tok/J: " + "  ".join(f"{name:>12}" for name in curves))
    for i, window in enumerate(windows):
        kept = f"kept x{curves['measured'][i] / curves['measured'][i - 1]:.2f}" if i else ""
        streams = f"{steady.batch[i]:9.0f}" if i < len(steady.batch) else "preempted"
        print(f"{window:6}  {streams}         " + "  ".join(f"{curve[i]:12.3f}" for curve in curves.values()), kept)
    n = len(steady.batch)
    for name in ("own_fit", "law", "paper", "paper_engine"):
        ratio = [curves[name][i] / curves["measured"][i] for i in range(n)]
        print(f"{name}: {min(ratio):.2f} to {max(ratio):.2f} times the measured tokens per joule up to 64K")
    held = steady.batch * steady.context_tokens / 1e6
    print(f"not identified: sequences x context is {held.min():.2f} to {held.max():.2f} million tokens at every window")
    for fit in ends:
        step, error = fit.step, fit.standard_errors
        print(
            f"  a context token at {float(step.per_token_s) * 1e9:.2f} ns: base {float(step.base_s) * 1e3:.1f} "
            f"+- {error['base_s'] * 1e3:.1f} ms, a sequence {float(step.per_seq_s) * 1e6:.1f} us "
            f"(law of {MEASURED_SERVING} {float(linear.engine.decode.per_seq_s) * 1e6:.1f} us), error {fit.mape:.1%}, "
            f"left out {fit.leave_one_out_mape:.1%}"
        )
    values = ", ".join(f"{name} {value:.4g}" for name, value in power.parameters.items())
    print(f"power: {values}, error {power.mape:.1%} {' '.join(power.notes)}")
    longest = n - 1
    ideal_s = float(linear.engine.power.ideal_bytes.step_s(steady.batch[longest], steady.context_tokens[longest]))
    print(
        f"at {windows[longest]}: step {steady.step_s[longest] * 1e3:.1f} ms; its bytes take {ideal_s * 1e3:.1f} ms "
        "at the data sheet's bandwidth: shorter contexts than asked for must have been read"
    )


if __name__ == "__main__":
    main()
