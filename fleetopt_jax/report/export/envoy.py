"""The router as an Envoy configuration: thresholds between pools, and within a pool the plan's own dispatch.

A Lua filter (`router.lua`) chooses the pool of a request, a cluster has the instances of a pool. All workers of one
Envoy count an instance's requests together, so one Envoy is the law's shortest queue; of several, each counts its own.

Prompts that begin alike go to one instance by consistent hashing (dispatch `affinity`): the filter puts a hash of the
beginning in a header, Maglev's table gives every instance nearly the same share of all hashes, as the law assumes (a
ring of Envoy's usual 1,024 places leaves some a quarter more), and the bound on its load passes over one that a popular
beginning keeps busy. All Envoys have the same table. Envoy 1.40: extensions.load_balancing_policies.maglev.v3.Maglev,
ConsistentHashingLbConfig.hash_balance_factor, RouteAction.HashPolicy.
"""

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

from fleetopt_jax.report.export.launch import MOST_LOAD_FRAC, FleetLaunch
from fleetopt_jax.report.export.text import yaml_with_comments
from fleetopt_jax.report.export.two_stage import KEY_NOTE
from fleetopt_jax.report.export.vllm import SCHEMA
from fleetopt_jax.report.words import listed

ENVOY_RELEASE = "1.40.0"
LISTEN_PORT, ADMIN_PORT, METRICS_PORT = 8080, 9901, 9902
POOL_HEADER = "x-fleetopt-pool"
PREFIX_HEADER = "x-fleetopt-prefix"
TABLE_SIZES = (65_537, 655_373, 5_000_011)  # of Maglev, primes: Envoy's own, one ten times as large, its largest
PLACES = 100  # of the table that an instance has at least: shares even to 1 % (Maglev, NSDI 2016, 5.3)
LONGEST_S = 3600  # a request may take; an answer of 32,768 tokens at 100 ms each does
DNS_REFRESH_S = 5
KEEP_IDLE_S = 4  # vLLM closes an idle connection after 5 s: Envoy must be the first
MANY = 1_000_000  # of what Envoy would cut off at 1,024 each: the plan's queues are unbounded
MOST_BYTES_PER_TOKEN = 16  # as in router.lua

_TYPES = "type.googleapis.com/envoy"
_LEAST = "envoy.load_balancing_policies.least_request"
Policy = tuple[str, dict[str, Any]]
_POLICIES: dict[str, Policy] = {
    # Looks at every instance; Envoy's default of two at random is not the shortest queue.
    "jsq": (_LEAST, {"@type": f"{_TYPES}.extensions.load_balancing_policies.least_request.v3.LeastRequest"}),
    "round_robin": (
        "envoy.load_balancing_policies.round_robin",
        {"@type": f"{_TYPES}.extensions.load_balancing_policies.round_robin.v3.RoundRobin"},
    ),
    "random": (
        "envoy.load_balancing_policies.random",
        {"@type": f"{_TYPES}.extensions.load_balancing_policies.random.v3.Random"},
    ),
}
_POLICIES["jsq"][1]["selection_method"] = "FULL_SCAN"

Address = tuple[str, int]


def envoy_document(
    fleet: FleetLaunch,
    *,
    addresses: Mapping[str, Sequence[Address]] | None = None,
    ports: tuple[int, int, int] = (LISTEN_PORT, ADMIN_PORT, METRICS_PORT),
) -> dict[str, Any]:
    """Envoy's bootstrap. `addresses` are those of a pool's instances: by default its name, which DNS resolves to all of
    them, as a headless Service does. `ports`: of requests, of the admin page (this host only) and of the metrics."""
    listen, admin, metrics = ports
    pools = fleet.router["pools"]
    known = {pool["name"]: [_address_of(pool["url"])] for pool in pools} | dict(addresses or {})
    dispatch = fleet.router["dispatch_within_pool"]
    sizes = {pool.name: pool.n_instances for pool in fleet.pools} | {each.name: 1 for each in fleet.stage_routers}
    policies = [_policy(dispatch, sizes[pool["name"]]) for pool in pools]
    local = {"name": "admin", "type": "STATIC", "load_assignment": _assignment("admin", [("127.0.0.1", admin)])}
    return {
        "admin": {"address": _socket("127.0.0.1", admin)},
        "static_resources": {
            "listeners": [_requests(fleet, listen), _metrics(metrics)],
            "clusters": [
                *(_cluster(pool["name"], known[pool["name"]], policy) for pool, policy in zip(pools, policies)),
                local,
            ],
        },
    }


def router_export(fleet: FleetLaunch) -> dict[str, Any]:
    """The contract's object of the router alone: what `router_yaml` prints."""
    return {
        "schema": SCHEMA,
        "to": "envoy",
        "release": ENVOY_RELEASE,
        "title": fleet.title,
        "verified": fleet.verified,
        "header": list(fleet.header),
        "notes": [
            "",
            f"envoy -c THIS_FILE --disable-hot-restart (Envoy {ENVOY_RELEASE}) takes requests on port {LISTEN_PORT}.",
            "EDIT the addresses of each pool: host and port of every instance, or one name that DNS resolves to all.",
            *_stages_said(fleet),
        ],
        "config": envoy_document(fleet),
        "router": fleet.router,
    }


def _stages_said(fleet: FleetLaunch) -> list[str]:
    if not fleet.stage_routers:
        return []
    names = listed([each.name for each in fleet.stage_routers])
    return [f"Of {names} those are the addresses of its vllm-router, not of its stages.", KEY_NOTE]


def router_yaml(document: Mapping[str, Any]) -> str:
    """As `envoy -c` reads it."""
    return envoy_yaml(document["config"], [*document["header"], *document["notes"]])


def envoy_yaml(document: Mapping[str, Any], comments: Sequence[str] = ()) -> str:
    """The bootstrap, after its comments."""
    return yaml_with_comments([((), document)], comments)


def router_lua(router: Mapping[str, Any]) -> str:
    """The filter's source, with the thresholds of this router."""
    rows = "".join(
        f'  {{name = "{pool["name"]}", longest = {pool["max_total_tokens"]}}},\n' for pool in router["pools"]
    )
    source = _source("router.lua")
    by_prefix = "true" if router["dispatch_within_pool"] in MOST_LOAD_FRAC else "false"
    return f'local POOLS = {{\n{rows}}}\nlocal LENGTH = "{router["length"]}"\nlocal BY_PREFIX = {by_prefix}\n{source}'


def _source(name: str) -> str:
    return resources.files("fleetopt_jax.report.export").joinpath(name).read_text(encoding="utf-8")


def _lua(name: str, source: str) -> dict[str, Any]:
    code = {"default_source_code": {"inline_string": source}}
    return {"name": name, "typed_config": _type("filters.http.lua.v3.Lua") | code}


def _address_of(url: str) -> Address:
    parts = urlsplit(url)
    return str(parts.hostname), int(parts.port or 80)


def _socket(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def _assignment(name: str, addresses: Sequence[Address]) -> dict[str, Any]:
    endpoints = [{"endpoint": {"address": _socket(host, port)}} for host, port in addresses]
    return {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]}


def _policy(dispatch: str, n_instances: int) -> Policy:
    """Who of a pool's instances gets a request."""
    if dispatch not in MOST_LOAD_FRAC:
        return _POLICIES[dispatch]
    size = next((size for size in TABLE_SIZES if size >= PLACES * n_instances), TABLE_SIZES[-1])
    return "envoy.load_balancing_policies.maglev", _type("load_balancing_policies.maglev.v3.Maglev") | {
        "table_size": size,
        "consistent_hashing_lb_config": {"hash_balance_factor": round(100 * MOST_LOAD_FRAC[dispatch])},
    }


def _cluster(name: str, addresses: Sequence[Address], balanced: Policy) -> dict[str, Any]:
    policy, config = balanced
    return {
        "name": name,
        "cluster_type": {
            "name": "envoy.cluster.dns",
            "typed_config": _type("clusters.dns.v3.DnsCluster")
            | {"dns_refresh_rate": f"{DNS_REFRESH_S}s", "dns_lookup_family": "V4_PREFERRED"},
        },
        "connect_timeout": "5s",
        "load_balancing_policy": {"policies": [{"typed_extension_config": {"name": policy, "typed_config": config}}]},
        "circuit_breakers": {
            "thresholds": [dict.fromkeys(("max_connections", "max_pending_requests", "max_requests"), MANY)]
        },
        # An instance that does not answer is left out for a while; one that answers 500 may have been asked nonsense.
        "outlier_detection": {
            "consecutive_gateway_failure": 3,
            "enforcing_consecutive_gateway_failure": 100,
            "enforcing_consecutive_5xx": 0,
            "enforcing_success_rate": 0,
            "base_ejection_time": "30s",
            "max_ejection_percent": 50,
        },
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": f"{_TYPES}.extensions.upstreams.http.v3.HttpProtocolOptions",
                "common_http_protocol_options": {"idle_timeout": f"{KEEP_IDLE_S}s"},
                "explicit_http_config": {"http_protocol_options": {}},
            }
        },
        "load_assignment": _assignment(name, addresses),
    }


def _requests(fleet: FleetLaunch, port: int) -> dict[str, Any]:
    """The listener of clients. Only /v1/ is passed on: vLLM asks for its API key nowhere else."""
    route: dict[str, Any] = {
        "match": {"prefix": "/v1/"},
        "route": {
            "cluster_header": POOL_HEADER,
            "timeout": f"{LONGEST_S}s",
            "idle_timeout": f"{LONGEST_S}s",  # an answer that is not streamed is silent until its end
            "retry_policy": {
                "retry_on": "connect-failure,refused-stream,reset-before-request",
                "num_retries": 2,
                "host_selection_retry_max_attempts": 5,
                "retry_host_predicate": [_extension("retry.host.previous_hosts", "PreviousHostsPredicate")],
            },
        },
        "response_headers_to_add": [{"header": {"key": POOL_HEADER, "value": f"%REQ({POOL_HEADER})%"}}],
    }
    if fleet.router["dispatch_within_pool"] in MOST_LOAD_FRAC:
        route["route"]["hash_policy"] = [{"header": {"header_name": PREFIX_HEADER}}]
    filters = [_lua("envoy.filters.http.lua", router_lua(fleet.router))]
    if fleet.router_looks_at_keys:
        filters.insert(0, _lua("key", _source("key.lua")))
    longest = max(pool["max_total_tokens"] for pool in fleet.router["pools"])
    return {
        "name": "requests",
        "address": _socket("0.0.0.0", port),
        # Larger bodies cannot be of requests that fit.
        "per_connection_buffer_limit_bytes": min(max(2**20, MOST_BYTES_PER_TOKEN * longest), 2**31),
        "filter_chains": [
            _http(
                "requests",
                [route],
                filters=filters,
                access_log=[_access_log()],
                local_reply_config=_local_replies(longest),
                request_headers_timeout="10s",
                request_timeout="60s",
                stream_idle_timeout=f"{LONGEST_S}s",
                normalize_path=True,
            )
        ],
    }


def _metrics(port: int) -> dict[str, Any]:
    """Envoy's own metrics and readiness, and nothing else of its admin page."""
    routes = [{"match": {"path": path}, "route": {"cluster": "admin"}} for path in ("/stats/prometheus", "/ready")]
    return {"name": "metrics", "address": _socket("0.0.0.0", port), "filter_chains": [_http("metrics", routes)]}


def _http(
    name: str, routes: list[dict[str, Any]], *, filters: Sequence[dict[str, Any]] = (), **more: Any
) -> dict[str, Any]:
    manager = _type("filters.network.http_connection_manager.v3.HttpConnectionManager") | {
        "stat_prefix": name,
        **more,
        "route_config": {"virtual_hosts": [{"name": name, "domains": ["*"], "routes": routes}]},
        "http_filters": [
            *filters,
            {"name": "envoy.filters.http.router", "typed_config": _type("filters.http.router.v3.Router")},
        ],
    }
    return {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}


def _type(name: str) -> dict[str, Any]:
    return {"@type": f"{_TYPES}.extensions.{name}"}


def _extension(name: str, message: str) -> dict[str, Any]:
    return {
        "name": f"envoy.{name.replace('retry.host.', 'retry_host_predicates.')}",
        "typed_config": _type(f"{name}.v3.{message}"),
    }


def _access_log() -> dict[str, Any]:
    """One line a request on the standard output."""
    fields = {
        "time": "%START_TIME%",
        "path": "%REQ(:PATH)%",
        "status": "%RESPONSE_CODE%",
        "flags": "%RESPONSE_FLAGS%",
        "pool": f"%REQ({POOL_HEADER})%",
        "instance": "%UPSTREAM_HOST%",
        "first_byte_ms": "%RESPONSE_DURATION%",
        "duration_ms": "%DURATION%",
    }
    return {
        "name": "envoy.access_loggers.stdout",
        "typed_config": _type("access_loggers.stream.v3.StdoutAccessLog") | {"log_format": {"json_format": fields}},
    }


def _local_replies(longest: int) -> dict[str, Any]:
    """What Envoy answers itself has the form of vLLM's errors; a body beyond the buffer is a request too long."""

    def replaced(operator: str, code: int, kind: str, message: str, **more: Any) -> dict[str, Any]:
        compared = {"default_value": code, "runtime_key": "fleetopt.unused"}
        shown = {"message": message, "type": kind, "param": None, "code": "%RESPONSE_CODE%"}
        return {
            "filter": {"status_code_filter": {"comparison": {"op": operator, "value": compared}}},
            "body_format_override": {"json_format": {"error": shown}},
            **more,
        }

    too_long = f"the longest request is one of {longest} tokens"
    return {
        "mappers": [
            replaced("EQ", 413, "BadRequestError", too_long, status_code=400),
            replaced("GE", 404, "RouterError", "%RESPONSE_CODE_DETAILS%"),
        ]
    }
