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
    raise TooLong(f"{total} tokens, the longest request is one of {router['pools'][-1]['max_total_tokens']}")


def _read(name: str) -> dict:
    with open(name, encoding="utf-8") as file:
        return json.load(file)


def refusal(error: TooLong) -> dict:
    """The JSON body of the answer 400, in the form of vLLM's own."""
    return {"error": {"message": str(error), "type": "BadRequestError", "param": None, "code": 400}}


def main(arguments: list[str]) -> int:
    """0: served; 1: answered with 400; 2: not asked rightly."""
    try:
        name, prompt, output = arguments
        router = _read(name)
        tokens = int(prompt), int(output)
        if min(tokens) < 1:
            raise ValueError
        url, held = route(router, *tokens)
    except TooLong as error:
        print(f"HTTP 400 {json.dumps(refusal(error))}")
        return 1
    except OSError as error:
        print(f"router: {error}", file=sys.stderr)
        return 2
    except (KeyError, TypeError, json.JSONDecodeError):
        print(f"router: {name}: not a file of fleetopt export --router", file=sys.stderr)
        return 2
    except ValueError:
        print("router: need ROUTER.json PROMPT_TOKENS MAX_TOKENS, two whole numbers from 1", file=sys.stderr)
        return 2
    print(url, f"prompt of {held} tokens" + (", compressed" if held < tokens[0] else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
