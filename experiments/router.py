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


def _wrong(said: str) -> int:
    print(f"router: {said}", file=sys.stderr)
    return 2


def main(arguments: list[str]) -> int:
    """0: served; 1: answered with 400; 2: not asked rightly."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    if len(arguments) != 3:
        return _wrong(
            f"need ROUTER.json PROMPT_TOKENS MAX_TOKENS, got {len(arguments)} of the three (--help says more)"
        )
    name, *texts = arguments
    if wrong := [text for text in texts if not (text.isascii() and text.isdecimal() and int(text) > 0)]:
        return _wrong(f"need whole numbers of tokens from 1, got {wrong[0]!r}")
    prompt, output = map(int, texts)
    try:
        url, held = route(_read(name), prompt, output)
    except TooLong as error:
        print(f"HTTP 400 {json.dumps(refusal(error))}")
        return 1
    except OSError as error:
        return _wrong(f"{name}: cannot be read: {error.strerror}")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return _wrong(
            f"{name}: not a router's file: need one that fleetopt export PLAN.json --to ... --router FILE wrote"
        )
    print(url, f"prompt of {held} tokens" + (", compressed" if held < prompt else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
