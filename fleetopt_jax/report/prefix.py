"""What caches would find of a trace's prompts in words and as a table, of the document of `fleetopt trace`."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from fleetopt_jax.report.words import percent

EVERY = 3  # of the points of the curve, the last among them
WORTH = 0.9  # of what an infinite cache finds


def span_said(span_s: float) -> str:
    """'45 s', '12 min', '5.1 h', '3 days'."""
    for unit, length_s in (("days", 86_400.0), ("h", 3600.0), ("min", 60.0)):
        if span_s >= 2.0 * length_s:
            return f"{span_s / length_s:.3g} {unit}"
    return f"{span_s:.3g} s"


def rounded(tokens: float) -> str:
    """Three digits, without exponents."""
    return f"{float(f'{tokens:.3g}'):,.0f}"


def prefix_table(document: Mapping[str, Any]) -> RenderableType:
    """The hit curve, and what an infinite cache would give."""
    from fleetopt_jax.report.tables import new_table

    prefix = document["prefix"]
    of = f"{prefix['source']}, blocks of {prefix['block_tokens']:,} tokens"
    table = new_table("One cache of", "Keeps for", "Finds, of blocks", "Of tokens", title=f"Prefixes ({of})")
    for point in shown_points(prefix):
        shares = (percent(point[name]) for name in ("hit_frac", "hit_token_frac"))
        table.add_row(f"{rounded(point['cache_tokens'])} tokens", span_said(point["age_s"]), *shares)
    return Group(table, Text("\n".join(prefix_lines(document))))


def shown_points(prefix: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Some points of the curve, even in the logarithm of the cache, to the last."""
    return prefix["curve"][::-1][::EVERY][::-1]


def prefix_lines(document: Mapping[str, Any]) -> list[str]:
    """What the curve comes to, a sentence each."""
    prefix = document["prefix"]
    sampled = _sampled(prefix)
    last, most = prefix["curve"][-1], prefix["hit_frac_infinite"]
    if not most:
        return ["No prompt begins as another one did: a prefix cache finds nothing.", *sampled]
    enough = next(point for point in prefix["curve"] if point["hit_frac"] >= WORTH * most)
    return [
        f"An infinite cache finds {most:.1%} of the blocks of prompts, {last['hit_token_frac']:.1%} of their tokens; "
        f"{WORTH:.0%} of that takes {rounded(enough['cache_tokens'])} tokens, which last {span_said(enough['age_s'])} "
        f"at {prefix['rate_per_s']:,.4g} requests/s.",
        *sampled,
        f"The atoms that plans are made of change a hit share by at most {100 * prefix['grid_error']:.1f} points.",
        "Plans compute every prompt as a whole unless --prefix-hit says otherwise.",
    ]


def _sampled(prefix: Mapping[str, Any]) -> list[str]:
    """What the curve is told from, where that is not all."""
    if prefix.get("one_in", 1) == 1:
        return []
    of = "sessions" if prefix["source"] == "sessions" else "blocks"
    error = 100.0 * prefix["standard_error"]
    return [
        f"Reuse is told from a sample of 1 in {prefix['one_in']:,} {of}, whose hit shares have a standard error of "
        f"{error:.2g} points at most."
    ]
