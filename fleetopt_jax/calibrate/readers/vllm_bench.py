"""`vllm bench serve --save-result`: an object a run, its own metadata beside the results (`--metadata gpu=h100`).

SGLang's `bench_serving --output-file` writes much the same, without prefix of what serves.
"""

from fleetopt_jax.calibrate.readers.rows import Record

LAYOUT = "vLLM bench serve"
NEEDS = {"output_throughput", "total_output_tokens", "completed"}
SERVERS = ("vllm", "sglang", "trtllm", "tensorrt-llm", "trt")  # other backends are kinds of endpoints


def records(document: Record) -> list[Record] | None:
    """One run; None where it is no such result."""
    if not document.keys() >= NEEDS:
        return None
    named = str(document.get("backend") or document.get("endpoint_type") or "").lower()
    kept = {name: value for name, value in document.items() if name not in ("backend", "endpoint_type", "date")}
    serving = kept.get("serving") or (named if named in SERVERS else None)
    if document.get("max_concurrency") is None and str(document.get("request_rate", "")).lower() == "inf":
        kept["max_concurrency"] = document["completed"]  # without a limit all requests are in flight
    return [kept | ({"serving": serving} if serving else {})]
