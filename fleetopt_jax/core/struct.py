"""Frozen records that are JAX pytrees: numbers are traced leaves, choices are static."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jax import Array

T = TypeVar("T")


def static(**kwargs: Any) -> Any:
    """A field that changes the program (a choice), not a number: part of the pytree structure."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(static, dataclasses.field))
def pytree(cls: type[T]) -> type[T]:
    """Class decorator: a frozen dataclass whose non-static fields are pytree children."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


def as_floats(**values: Any) -> dict[str, Array]:
    """Every value as a floating-point array of JAX's default width."""
    return {name: jnp.asarray(value, dtype=float) for name, value in values.items()}


def stack(records: Sequence[T]) -> T:
    """One record with a leading axis from records of the same structure."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *records)
