"""Drafts in files: a head of one's own (TOML, `fleetopt-drafts/1`), and what a plan says of those of a pool.

schema = "fleetopt-drafts/1"
method = "eagle3"                            # as vLLM calls it: eagle3, eagle, mtp, ngram, draft_model
model = "my-org/my-head"                     # its checkpoint, which export writes; none of mtp and ngram
acceptance = [0.81, 0.63, 0.47]              # of the first 1, 2, ... drafts, as vLLM logs its per-position rates
task = "our support chats, temperature 0.6"
layers = 1                                   # of the LLM's size; 0 where the host drafts
head_tokens = 32000                          # of its output layer; the LLM's where it is not said
"""

import itertools
import os
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fleetopt_jax.catalog.drafts import NONE, DraftHead, Drafts, checked, draft_heads, drafts_of, every_k
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.documents.fields import Name, NotNegative, Part
from fleetopt_jax.documents.toml_file import read_toml
from fleetopt_jax.laws.speculation import MOST_DRAFTS

SCHEMA = "fleetopt-drafts/1"
MOST_TRIED = 5  # drafts of a head that is named alone
Share = Annotated[float, Field(ge=0, le=1)]
Method = Literal["eagle3", "eagle", "mtp", "ngram", "draft_model"]


class _Head(BaseModel):
    """What plans and files say of a head alike."""

    method: Method = Field(description="As vLLM calls it.")
    acceptance: Annotated[list[Share], Field(min_length=1, max_length=MOST_DRAFTS)] = Field(
        description="Of the first 1, 2, ... drafts together."
    )
    task: str = Field("", max_length=4096, description="What it was measured on.")
    model: Name | None = Field(None, description="The head's checkpoint.")
    layers: Annotated[float, Field(ge=0, le=256)] = Field(
        0.0, description="Layers of the LLM's size; 0: the host drafts."
    )
    head_tokens: Annotated[int, Field(ge=0, le=10**7)] | None = Field(None, description="Of its output layer.")
    drafted_frac: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="Share of iterations with drafts.")
    launch_s: NotNegative | None = Field(None, description="Of the engine, for each drafted token [s].")
    verify_s: NotNegative | None = Field(None, description="Of the engine, for each iteration with drafts [s].")

    @model_validator(mode="after")
    def _falls(self) -> "_Head":
        first, chain = self.acceptance[0], self.acceptance
        if any(later > earlier for earlier, later in itertools.pairwise(chain)):
            raise ValueError(f"acceptance rises in {chain}: need that of the first 1, 2, ... drafts together")
        if first > self.drafted_frac:
            raise ValueError(f"acceptance {first:g} of the first draft is above drafted_frac {self.drafted_frac:g}")
        return self

    def as_head(self, name: str, file: str | None) -> DraftHead:
        """The record, with the catalog's costs where none are said: of the same method, else of EAGLE-3."""
        alike = next((head for head in draft_heads().values() if head.method == self.method), draft_heads()["eagle3"])
        said = self.model_dump(include={"method", "task", "model", "layers", "drafted_frac"})
        return DraftHead(
            **said,
            name=name,
            title=f"{self.method} drafts of {name}",
            acceptance=tuple(self.acceptance),
            measured=tuple(range(1, len(self.acceptance) + 1)),
            source=name,
            head_tokens=self.head_tokens if self.layers else 0,
            launch_s=alike.launch_s if self.launch_s is None else self.launch_s,
            verify_s=alike.verify_s if self.verify_s is None else self.verify_s,
            file=file,
        )


class DraftsFile(_Head):
    """A draft head of one's own, and how many of its tokens were accepted."""

    model_config = ConfigDict(title=SCHEMA, extra="forbid")

    format: Literal["fleetopt-drafts/1"] = Field(SCHEMA, alias="schema")


class SpeculatePart(_Head, Part):
    """Drafts of a pool, as a plan has them."""

    head: Name
    k: Annotated[int, Field(ge=1, le=MOST_DRAFTS)]
    file: Name | None = None

    @property
    def drafts(self) -> Drafts:
        """The catalog's head where the plan has its numbers, else that which the plan describes."""
        ours = draft_heads().get(self.head)
        if ours is not None and self.file is None and tuple(self.acceptance) == ours.acceptance:
            return checked(Drafts(ours, self.k))
        return checked(Drafts(self.as_head(self.head, self.file), self.k))


def load_draft_head(path: str | os.PathLike) -> DraftHead:
    """The head in a file of one's own. Raises BadInput that names the file, the line, the value and what is allowed."""
    where = os.fspath(path)
    found = read_toml(
        where, DraftsFile, {"": ("schema", *(name for name in DraftsFile.model_fields if name != "format"))}
    )
    return found.as_head(os.path.basename(where).removesuffix(".toml"), where)


def drafts_to_json(drafts: Drafts) -> dict[str, Any]:
    """Drafts of a pool as a plan has them."""
    head = drafts.head
    names = ("method", "task", "model", "layers", "head_tokens", "drafted_frac", "launch_s", "verify_s", "file")
    return {
        "head": head.name,
        "k": drafts.k,
        "tokens_per_step": drafts.tokens_per_step,
        "measured": drafts.is_measured,
        "acceptance": list(head.acceptance),
        **{name: getattr(head, name) for name in names},
    }


def drafts_named(text: str, where: str = "speculate") -> list[Drafts | None]:
    """What a list of drafts stands for, None for no drafts: "none", "eagle3:3" or "mine.toml:2"; "eagle3" alone none
    and up to five, so that a search has the number to choose.

    >>> [drafts and drafts.k for drafts in drafts_named("none,eagle3:1,eagle3:3")]
    [None, 1, 3]
    """
    found: list[Drafts | None] = []
    for part in (part.strip() for part in text.split(",")):
        found += _named(part, where)
    return list(dict.fromkeys(found))


def _named(part: str, where: str) -> list[Drafts | None]:
    if part.lower() == NONE:
        return [None]
    name, colon, k = part.rpartition(":")
    alone = not colon or not k.isdigit()
    name = part if alone else name
    if name.lower().endswith(".toml"):
        head = load_draft_head(name)
        return [None, *every_k(head, MOST_TRIED)] if alone else [checked(Drafts(head, int(k)), where)]
    if alone and name.lower() in draft_heads():
        return [None, *every_k(draft_heads()[name.lower()], MOST_TRIED)]
    if not part:
        raise BadInput(where, "an empty name", f"need {NONE} or a head and its drafts, as eagle3:3")
    return [drafts_of(part, where)]
