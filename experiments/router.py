"""A reference router: reads the file of `fleetopt export --router router.json` and says which pool serves a request.

    python experiments/router.py router.json PROMPT_TOKENS MAX_TOKENS

Standard library only, to be copied. Where `max_tokens` is much more than requests use, predict the output instead and
send the request with max_tokens = max_total_tokens - prompt tokens, which is what its pool holds.
"""

import json
import sys


class TooLong(ValueError):
    """Answer HTTP 400: no pool holds the request."""


def route(router: dict, prompt_tokens: int, output_tokens: int, compressed_ok: bool = True) -> tuple[str, int]:
    """(URL of the pool, tokens the prompt must have there). Fewer than `prompt_tokens`: compress the prompt first, and
    where that fails ask again with compressed_ok=False."""
    total = prompt_tokens + output_tokens
    lead = router.get("compress_if_prompt_exceeds_output_by_tokens", -total)
    compressible = compressed_ok and prompt_tokens >= output_tokens + lead
    for pool in router["pools"]:  # shortest first
        longest = pool["max_total_tokens"]
        if total <= longest:
            return pool["url"], prompt_tokens
        if compressible and total <= pool.get("compress_up_to_tokens", 0) and output_tokens < longest:
            return pool["url"], longest - output_tokens
    raise TooLong(f"{total} tokens, the longest request is one of {router['pools'][-1]['max_total_tokens']}")


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        url, prompt = route(json.load(file), int(sys.argv[2]), int(sys.argv[3]))
    print(url, f"prompt of {prompt} tokens" + (", compressed" if prompt < int(sys.argv[2]) else ""))
