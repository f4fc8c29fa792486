"""A reference router: reads the file of `fleetopt export --router router.json` and says which pool serves a request.

    python experiments/router.py router.json PROMPT_TOKENS MAX_TOKENS

Standard library only, to be copied. Where `max_tokens` is much more than requests use, predict the output instead and
send the request with max_tokens = max_total_tokens - prompt tokens, which is what its pool holds. What serves is the
Envoy that `fleetopt export` configures; a gateway that counts tokens or compresses prompts asks here first.
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
    raise TooLong(f"{total} tokens; the longest request is one of {router['pools'][-1]['max_total_tokens']}")


def answer(router: dict, prompt_tokens: int, output_tokens: int) -> tuple[int, dict]:
    """(HTTP status, JSON body) for a client: where the request goes, or vLLM's form of an error."""
    try:
        url, prompt = route(router, prompt_tokens, output_tokens)
    except TooLong as error:
        shown = {"message": str(error), "type": "BadRequestError", "param": None, "code": 400}
        return 400, {"error": shown}
    return 200, {"url": url, "prompt_tokens": prompt, "compressed": prompt < prompt_tokens}


def main(arguments: list[str]) -> int:
    """0: served, 1: answered with 400, 2: not asked rightly."""
    try:
        name, prompt, output = arguments[0], int(arguments[1]), int(arguments[2])
        if len(arguments) > 3 or prompt < 1 or output < 1:
            raise ValueError
        with open(name, encoding="utf-8") as file:
            router = json.load(file)
        status, body = answer(router, prompt, output)
    except OSError as error:
        print(f"router: {error}", file=sys.stderr)
        return 2
    except (ValueError, IndexError):
        print("router: need ROUTER.json PROMPT_TOKENS MAX_TOKENS, two whole numbers from 1", file=sys.stderr)
        return 2
    except (KeyError, TypeError):
        print(f"router: {name} is not a file of fleetopt export --router", file=sys.stderr)
        return 2
    print(f"HTTP {status} {json.dumps(body)}")
    return 0 if status == 200 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
