"""JSON documents that hold requests in a shape of their own: benchmark reports, span exports, usage pages.

Each shape is unfolded into records, one a request, which are then read like any other rows.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from fleetopt_jax.core.errors import BadInput

Record = dict[str, Any]
CHARS_PER_TOKEN = 4.0  # of English text, as OpenAI's help pages have it; other texts differ by half
SEVERAL_RUNS = "several runs are in the file: their time stamps tell no common rate (give --rate)"
CLOSED_LOOP = "the benchmark kept {} requests in flight: its rate is what that server did, not what is asked for"
_PROMPT = re.compile(r'"(?:prompt_tokens|input_tokens)"\s*:\s*(\d{1,9})\b')
_COMPLETION = re.compile(r'"(?:completion_tokens|output_tokens)"\s*:\s*(\d{1,9})\b')


@dataclass(frozen=True)
class Shape:
    """What a document was taken for. `estimated` counts records whose tokens are no counts."""

    layout: str
    records: list[Record]
    no_rate: str = ""
    warnings: tuple[str, ...] = ()


def unfold(document: Any) -> Shape | None:
    """The requests of a document of a known shape; None for any other."""
    if not isinstance(document, dict):
        return None
    return next((shape for read in _SHAPES if (shape := read(document))), None)


def refuse_summary(where: str, document: Any) -> None:
    """Refuse reports that hold statistics of requests only, naming the file or option that has the requests."""
    if not isinstance(document, dict):
        return
    if "total_input_tokens" in document and "input_lens" not in document:
        raise BadInput(where, "is a vLLM bench result without its requests", "run it with --save-detailed")
    lengths = document.get("input_sequence_length")
    if isinstance(lengths, dict) and "avg" in lengths:
        raise BadInput(where, "holds statistics of a benchmark, not its requests", "need profile_export.json or .jsonl")


def longest_list(document: Any) -> list[Record]:
    """The longest list of objects within three levels of a document: its records, whatever it is called."""
    best: list[Record] = []
    level = [document]
    for _ in range(3):
        below = []
        for value in itertools.chain(*(each.values() if isinstance(each, dict) else each for each in level)):
            if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
                best = max(best, value, key=len)
            if isinstance(value, dict) or (isinstance(value, list) and len(value) <= 100):
                below.append(value)
        level = below
    return best


def arrays_of(document: Record) -> dict[str, list[Any]]:
    """The scalar arrays of a document that are as long as most of them, as vLLM bench and pandas write columns."""
    arrays = {key: _listed(value) for key, value in document.items()}
    found = {key: value for key, value in arrays.items() if value and not isinstance(value[0], (dict, list))}
    lengths = Counter(map(len, found.values()))
    if not lengths or max(lengths.values()) < 2:
        return {}
    common = max(lengths, key=lambda length: (lengths[length], length))
    return {key: value for key, value in found.items() if len(value) == common}


def _listed(value: Any) -> list[Any]:
    """A list as it is; an object whose keys count the rows, as pandas writes it, as the list of its values."""
    if isinstance(value, dict) and value and all(key.isdecimal() for key in itertools.islice(value, 3)):
        return list(value.values())
    return value if isinstance(value, list) else []


def _guidellm(document: Record) -> Shape | None:
    """GuideLLM: benchmarks[].requests.successful[] and .incomplete[]; those that erred have no lengths."""
    runs = _objects(document.get("benchmarks"))
    requests = [run["requests"] for run in runs if isinstance(run.get("requests"), (dict, list))]
    if not requests:
        return None
    records = [
        record
        for each in requests
        for record in (
            _objects(each)
            if isinstance(each, list)
            else [*_objects(each.get("successful")), *_objects(each.get("incomplete"))]
        )
    ]
    return Shape("GuideLLM report", records, SEVERAL_RUNS if len(requests) > 1 else "")


def _genai_perf(document: Record) -> Shape | None:
    """genai-perf and perf_analyzer: experiments[].requests[], times in nanoseconds, payloads and answers as text."""
    experiments = [run for run in _objects(document.get("experiments")) if _objects(run.get("requests"))]
    runs = [_objects(run["requests"]) for run in experiments]
    if not runs:
        return None
    records = [_of_texts(request) for request in itertools.chain(*runs)]
    estimated = sum(record.pop("estimated") for record in records)
    warnings = [CLOSED_LOOP.format(n) for n in _concurrencies(experiments)]
    if estimated:
        warnings.append(
            f"{estimated:,} of {len(records):,} requests carry no usage: their prompts are taken as a token every "
            f"{CHARS_PER_TOKEN:g} characters and their answers as a token a streamed piece, which may be 30 % off"
        )
    return Shape("genai-perf profile export", records, SEVERAL_RUNS if len(runs) > 1 else "", tuple(warnings))


def _concurrencies(experiments: list[Record]) -> list[str]:
    """How many requests each run kept in flight, where it was run so; said of one run, for several tell no rate."""
    modes = [run.get("experiment") for run in experiments]
    found = [mode.get("value") for mode in modes if isinstance(mode, dict) and mode.get("mode") == "concurrency"]
    return [f"{n:g}" for n in found if isinstance(n, (int, float))] if len(experiments) == 1 else []


def _of_texts(request: Record) -> Record:
    asked, answers = request.get("request_inputs"), _objects(request.get("response_outputs"))
    said = [text for answer in answers for text in answer.values() if isinstance(text, str)]
    usage = "\n".join(said[-3:])
    prompt, completion = _last(_PROMPT, usage), _last(_COMPLETION, usage)
    estimated = prompt is None or completion is None
    if prompt is None:
        prompt = _prompt_tokens(asked)
    if completion is None:
        completion = _answer_tokens(said)
    record = {"timestamp_ns": request.get("timestamp"), "prompt_tokens": prompt, "completion_tokens": completion}
    return record | {"estimated": estimated}


def _prompt_tokens(asked: Any) -> int | None:
    """Of token ids their number, of text an estimate."""
    if not isinstance(asked, dict):
        return None
    payload = asked.get("payload", asked)
    if isinstance(payload, str):
        try:
            payload = json.loads(payload)
        except (ValueError, RecursionError):
            payload = {"prompt": payload}
    texts = list(itertools.islice(_texts(payload), 100_000))
    numbers = [each for each in texts if not isinstance(each, str)]
    characters = sum(len(each) for each in texts if isinstance(each, str))
    return max(1, len(numbers) + round(characters / CHARS_PER_TOKEN))


def _texts(payload: Any, depth: int = 0) -> Iterator[str | int]:
    """The words, or token ids, of a request: what stands under the names that endpoints use."""
    if depth > 6:
        return
    if isinstance(payload, (str, int)) and not isinstance(payload, bool):
        yield payload
    elif isinstance(payload, list):
        for each in payload:
            yield from _texts(each, depth + 1)
    elif isinstance(payload, dict):
        for key in ("messages", "content", "text", "prompt", "text_input", "input_ids", "input", "inputs"):
            if key in payload:
                yield from _texts(payload[key], depth + 1)


def _answer_tokens(said: list[str]) -> int:
    """Pieces of a stream; of an answer in one piece, an estimate by its length."""
    words = [text for text in said if text.strip() and "[DONE]" not in text and '"content":""' not in text]
    pieces = sum(max(1, text.count("data: ")) for text in words)
    if pieces == 1 and not words[0].startswith("data: "):
        return max(1, round(len(words[0]) / CHARS_PER_TOKEN))
    return pieces


def _spans(document: Record) -> Shape | None:
    """OpenTelemetry's OTLP JSON: resourceSpans[].scopeSpans[].spans[]."""
    scopes = [
        scope
        for resource in _objects(document.get("resourceSpans"))
        for scope in _objects(resource.get("scopeSpans", resource.get("instrumentationLibrarySpans")))
    ]
    records = [span for scope in scopes for span in _objects(scope.get("spans"))]
    return Shape("OpenTelemetry spans (OTLP)", records) if records else None


def _usage_page(document: Record) -> Shape | None:
    """OpenAI's usage API: data[] of buckets, each with its results[]."""
    buckets = [bucket for bucket in _objects(document.get("data")) if isinstance(bucket.get("results"), list)]
    records = [
        {"start_time": bucket.get("start_time")} | result
        for bucket in buckets
        for result in _objects(bucket["results"])
    ]
    return Shape("OpenAI usage export", records) if records else None


def _last(pattern: re.Pattern[str], text: str) -> int | None:
    found = pattern.findall(text)
    return int(found[-1]) if found else None


def _objects(value: Any) -> list[Record]:
    return (
        [each for each in value if isinstance(each, dict)]
        if isinstance(value, Iterable) and not isinstance(value, (str, dict))
        else []
    )


_SHAPES: tuple[Callable[[Record], Shape | None], ...] = (_guidellm, _genai_perf, _spans, _usage_page)
