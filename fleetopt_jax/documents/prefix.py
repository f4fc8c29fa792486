"""What caches would find of a trace's prompts as JSON (SI units), a part of what `fleetopt trace` prints."""

from typing import Any

from fleetopt_jax.workload.reuse import HitCurve


def prefix_to_json(prefix: HitCurve, rate_per_s: float) -> dict[str, Any]:
    """The hit curve of one cache that serves all requests, at so many of them a second.

    `hit_frac` is a share of the blocks of prompts, `hit_token_frac` of their tokens; `age_s` is how long such a cache
    keeps what is not used again; `grid_error` the most that the atoms' grid of ages changes a hit share. It is told by
    one in `one_in` blocks (or sessions), with so large a `standard_error` of a hit share at most; 1 and 0 by all.
    """
    points = zip(prefix.cache_tokens, prefix.age_requests, prefix.hit_frac, prefix.hit_token_frac, strict=True)
    return {
        "source": prefix.source,
        "block_tokens": prefix.block_tokens,
        "n_blocks": prefix.n_blocks,
        "n_unique_blocks": prefix.n_unique,
        "hit_frac_infinite": prefix.hit_frac_infinite,
        "rate_per_s": rate_per_s,
        "grid_error": prefix.grid_error,
        "one_in": prefix.one_in,
        "standard_error": prefix.standard_error,
        "curve": [
            {"cache_tokens": tokens, "age_s": age / rate_per_s, "hit_frac": hits, "hit_token_frac": of_tokens}
            for tokens, age, hits, of_tokens in points
        ],
    }
