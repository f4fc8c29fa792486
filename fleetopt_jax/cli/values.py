"""What the text of an option may be. Each refuses with what is allowed."""

import argparse
import math

MAX_WINDOW_TOKENS = 10**9
MAX_GAMMA = 10  # nobody compresses a prompt further
MAX_BATCH = 100_000
MAX_TP = 64
RATES_PER_S = (1e-6, 1e9)


def flag(name: str) -> str:
    """An option as it is typed, by the name argparse keeps it under."""
    return f"--{name.replace('_', '-')}"


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def positive(text: str) -> float:
    value = number(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not allowed: need a positive, finite number")
    return value


def not_negative(text: str) -> float:
    value = number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: need a finite number >= 0")
    return value


def at_least_one(text: str) -> float:
    value = number(text)
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: need a finite number >= 1")
    return value


def share(text: str) -> float:
    value = number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: need a number from 0 to 1")
    return value


def open_share(text: str) -> float:
    value = number(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: need a number between 0 and 1")
    return value


def one_name(text: str) -> str:
    if "," in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: need one name")
    return text


def batches(text: str) -> list[float]:
    values = [positive(part) for part in text.split(",")]
    if not all(1 <= value <= MAX_BATCH for value in values):
        raise argparse.ArgumentTypeError(f"{text} is not allowed: need numbers from 1 to {MAX_BATCH}")
    return values


def rate(text: str) -> float:
    value = positive(text)
    if not RATES_PER_S[0] <= value <= RATES_PER_S[1]:
        raise argparse.ArgumentTypeError(
            f"{text} is not allowed: need a number from {RATES_PER_S[0]:g} to {RATES_PER_S[1]:g} requests per second"
        )
    return value


def free(text: str) -> tuple[str, ...]:
    asked = tuple(part.strip() for part in text.split(","))
    if not set(asked) <= {"max_num_seqs", "clock"}:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: need max_num_seqs, clock or both")
    return asked


def stock(text: str) -> dict[str, float]:
    found = {}
    for part in text.split(","):
        gpu, equals, count = part.partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(f"{part!r} is not allowed: need GPU=N,GPU=N,...")
        found[gpu.strip().lower()] = not_negative(count)
    return found


def checkpoint(text: str) -> tuple[str, str]:
    llm, _, name = text.partition("=")
    if not (llm.strip() and name.strip()):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: need LLM=CHECKPOINT or LLM:PRECISION=CHECKPOINT")
    return llm.strip(), name.strip()


def gamma(text: str) -> float | None:
    if text == "auto":
        return None
    value = number(text)
    if not 1 <= value <= MAX_GAMMA:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: need a number from 1 to {MAX_GAMMA}, or 'auto'")
    return value


def axis(text: str) -> tuple[str, list[float]]:
    """(name, values) of an input that is swept, each value as its own option would take it."""
    name, equals, values = text.partition("=")
    name = {"rate": "workload-rate"}.get(name.strip(), name.strip())
    if not equals or name not in AXES:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: need NAME=V1,V2,... of {', '.join(AXES)}")
    found = []
    for value in values.split(","):
        try:
            found.append(AXES[name][1](value.strip()))
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{name}: {error}") from None
    if len(set(found)) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: need at least two different values")
    return name, sorted(set(found))


def whole(least: int, most: int):
    def parse(text: str) -> int:
        limits = f"from {least} to {most}"
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed: need a whole number {limits}") from None
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not allowed: need a whole number {limits}")
        return value

    return parse


AXES = {  # inputs that pareto sweeps: the option each is, and what checks a value
    "workload-rate": ("rate", rate),
    "ttft-p99-ms": ("ttft_p99_ms", positive),
    "itl-ms": ("itl_ms", positive),
    "pue": ("pue", at_least_one),
    "usd-per-kwh": ("usd_per_kwh", not_negative),
    "host-w-per-gpu": ("host_w_per_gpu", not_negative),
    "max-num-seqs": ("max_num_seqs", whole(1, 10**6)),
    "tp": ("tp", whole(1, MAX_TP)),
    "pools": ("pools", whole(1, 6)),
}
