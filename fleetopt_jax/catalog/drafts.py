"""Draft heads by name, from `data/drafts.json`: how many of their tokens are accepted, where that was measured, and
what drafting costs.

An engine names one as "eagle3:3", the head and how many tokens it drafts. Acceptance depends on the task, the
temperature and the head: a curve of your own traffic (`documents/drafts.py`) is worth more than any of these.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from fleetopt_jax.catalog.architecture import Architecture
from fleetopt_jax.catalog.packaged import packaged_json
from fleetopt_jax.core.errors import BadField, unknown_name
from fleetopt_jax.laws.speculation import Speculation, make_speculation

NONE = "none"  # as an option and a lever name an engine that drafts nothing


@dataclass(frozen=True)
class DraftHead:
    """What drafts: a head of its own, a module of the checkpoint, or n-grams of the context."""

    name: str
    title: str
    method: str  # as vLLM calls it
    acceptance: tuple[float, ...]  # of the first 1, 2, ... drafts together [-]
    measured: tuple[int, ...] = ()  # numbers of drafts whose tokens were measured; the others are projected
    task: str = ""  # that was measured
    llm: str = ""
    source: str = ""
    projected: str = ""  # how
    layers: float = 0.0  # of the LLM's size; 0: the host drafts
    head_tokens: int | None = 0  # of its vocabulary; None: the LLM's
    drafted_frac: float = 1.0  # share of a sequence's iterations that have drafts
    launch_s: float = 0.0  # of the engine, for each drafted token
    launch_source: str = ""
    verify_s: float = 0.0  # of the engine, for each iteration with drafts
    model: str | None = None  # the head's checkpoint, where it is one
    file: str | None = None  # of one's own, where it was read from

    @property
    def most(self) -> int:
        """Drafts that the curve knows of."""
        return len(self.acceptance)


@dataclass(frozen=True)
class Drafts:
    """k tokens drafted ahead in every iteration."""

    head: DraftHead
    k: int

    @property
    def name(self) -> str:
        """As options and plans name it: "eagle3:3"."""
        return f"{self.head.file or self.head.name}:{self.k}"

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens that a sequence gains in an iteration."""
        return 1.0 + sum(self.head.acceptance[: self.k])

    @property
    def is_measured(self) -> bool:
        """Whether somebody measured the tokens of so many drafts."""
        return self.k in self.head.measured


@cache
def draft_heads() -> dict[str, DraftHead]:
    """The heads of the catalog, by name."""
    document = packaged_json("drafts.json")
    return {head["name"]: _head(head, document["verify_s"]["value"]) for head in document["heads"]}


def _head(entry: dict[str, Any], verify_s: float) -> DraftHead:
    lists = {name: tuple(entry[name]) for name in ("acceptance", "measured")}
    return DraftHead(**{**entry, **lists}, verify_s=verify_s)


def drafts_of(name: str, where: str = "speculate") -> Drafts:
    """The drafts that a name of the catalog and a number stand for.

    >>> drafts = fo.drafts_of("eagle3:3")
    >>> drafts.k, round(drafts.tokens_per_step, 2)
    (3, 2.79)
    """
    head, _, k = name.rpartition(":")
    heads = draft_heads()
    if not head or not k.isdigit():
        raise BadField(where, f"{name!r}", f"need a head and its drafts, as eagle3:3; heads: {', '.join(heads)}")
    if head.lower() not in heads:
        raise unknown_name(where, head, heads)
    return checked(Drafts(heads[head.lower()], int(k)), where)


def checked(drafts: Drafts, where: str = "speculate") -> Drafts:
    """`drafts`, if its curve knows of so many."""
    if not 1 <= drafts.k <= drafts.head.most:
        raise BadField(where, f"{drafts.name}", f"need 1 to {drafts.head.most} drafts of {drafts.head.name}")
    return drafts


def every_k(head: DraftHead, most: int | None = None) -> Sequence[Drafts]:
    """All numbers of drafts of a head, up to `most`."""
    return [Drafts(head, k) for k in range(1, min(head.most, most or head.most) + 1)]


def speculation_of(drafts: Drafts, a: Architecture) -> Speculation:
    """What such drafts are to an LLM of this architecture."""
    head = drafts.head
    vocabulary = a.vocabulary if head.head_tokens is None else min(head.head_tokens, a.vocabulary)
    return make_speculation(
        head.acceptance,
        drafts.k,
        drafted_frac=head.drafted_frac,
        layers_frac=head.layers / a.layers,
        head_frac=vocabulary / max(a.vocabulary, 1),
        launch_s=head.launch_s,
        verify_s=head.verify_s,
    )
