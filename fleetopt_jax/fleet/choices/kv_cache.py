"""The choice `kv_cache`: sequences one instance runs at once."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fleetopt_jax.laws.demand import Demand, held_tokens
from fleetopt_jax.laws.kv_cache import BLOCK_TOKENS, KvCapacity, max_sequences, paged_sequences


class KvPolicy:
    """How the KV cache is given out."""

    name: ClassVar[str]
    caps_sequences: ClassVar[bool]  # whether `max_num_seqs` and bytes bound the batch, not the window

    def n_max(self, kv: KvCapacity, window_tokens: ArrayLike, mean: Demand, *, whole: bool) -> Array:
        """Sequences one instance can run [-]; of requests with mean features `mean`."""
        raise NotImplementedError

    def scheduled_blocks(self, kv: KvCapacity) -> Array:
        """KV blocks that bound a simulated batch; inf where its slots do."""
        raise NotImplementedError

    def occupied_blocks(
        self, kv: KvCapacity, window_tokens: ArrayLike, in_use: ArrayLike, n_active: ArrayLike
    ) -> Array:
        """Blocks taken where `n_active` sequences use `in_use` of them."""
        raise NotImplementedError


@dataclass(frozen=True)
class ReservedKv(KvPolicy):
    """A slot reserves its whole window."""

    name: ClassVar[str] = "reserved"
    caps_sequences: ClassVar[bool] = False

    def n_max(self, kv: KvCapacity, window_tokens: ArrayLike, mean: Demand, *, whole: bool) -> Array:
        return max_sequences(kv, window_tokens, whole=whole)

    def scheduled_blocks(self, kv: KvCapacity) -> Array:
        return jnp.asarray(jnp.inf)

    def occupied_blocks(
        self, kv: KvCapacity, window_tokens: ArrayLike, in_use: ArrayLike, n_active: ArrayLike
    ) -> Array:
        return jnp.asarray(n_active) * jnp.ceil((window_tokens + kv.fixed_tokens) / BLOCK_TOKENS)


@dataclass(frozen=True)
class PagedKv(KvPolicy):
    """A sequence holds the tokens it has (overflowing at most 1 % of the time)."""

    name: ClassVar[str] = "paged"
    caps_sequences: ClassVar[bool] = True

    def n_max(self, kv: KvCapacity, window_tokens: ArrayLike, mean: Demand, *, whole: bool) -> Array:
        return paged_sequences(kv, window_tokens, *held_tokens(mean), whole=whole)

    def scheduled_blocks(self, kv: KvCapacity) -> Array:
        return kv.n_blocks

    def occupied_blocks(
        self, kv: KvCapacity, window_tokens: ArrayLike, in_use: ArrayLike, n_active: ArrayLike
    ) -> Array:
        return jnp.asarray(in_use)
