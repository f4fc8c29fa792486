"""Frozen records that are JAX pytrees: numbers are traced leaves, choices are static."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

T = TypeVar("T")


def static(**kwargs: Any) -> Any:
    """A field that changes the program (a choice), not a number: part of the pytree structure."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(static, dataclasses.field))
def pytree(cls: type[T]) -> type[T]:
    """Class decorator: a frozen dataclass whose non-static fields are pytree children."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


def as_floats(**values: Any) -> dict[str, Any]:
    """Every value as a floating-point array: NumPy's where it is a plain number, so that building records compiles
    nothing; JAX's where it is one already, traced or not."""
    return {
        name: jnp.asarray(value, dtype=float) if isinstance(value, jax.Array) else np.asarray(value, dtype=float)
        for name, value in values.items()
    }


def stack(records: Sequence[T]) -> T:
    """One record with a leading axis from records of the same structure; of NumPy arrays where all of them are."""

    def joined(*leaves: Any) -> Any:
        return namespace(leaves).stack(leaves)

    return jax.tree.map(joined, *records)


def namespace(*values: Any) -> Any:
    """`jax.numpy` where any leaf of the values is JAX's, traced or not; else `numpy`, which compiles nothing.

    For functions that make records: under `jit` they trace, at the door they only compute.
    """
    return jnp if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(values)) else np
