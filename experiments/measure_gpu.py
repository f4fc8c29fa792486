"""Time your own GPU: the kernel tables of it, with JAX, in five minutes.

    python experiments/measure_gpu.py --out kernels --gpu my-gpu      # kernels/my-gpu/gemm.jax-0.10.1.parquet, ...
    python experiments/fit_operators.py kernels/my-gpu --catalog my.toml --gpu-file my-gpu.toml    # its operator laws

The tables have the columns of the public kernel tables (ai-dynamo/aiconfigurator): `gemm` (m rows, n outputs, k
inputs), `context_attention` (a prompt of isl tokens, causal), `generation_attention` (one token after `step` others),
`custom_allreduce` and `nccl` (all-gather; message_size in 16-bit elements; with several GPUs), each with its `latency`
[ms] and, where NVML gives the energy of the board (`pip install nvidia-ml-py`), its `power` and `power_limit` [W].

An operator is run many times inside one compiled program, each run waiting for the one before and reading other
weights (or another KV cache), so that neither launches from Python nor the second-level cache are timed:

    latency = (median time of a call) / (runs in it) - (what the loop itself takes a run)

What the loop takes is measured with nothing in it; where it is more than half of a run, the shape is left out. Shapes
come in a random order that covers their ranges early, so that less time gives fewer rows and not fewer sizes. Not
measured: sliding windows, 8-bit KV caches, experts. JAX takes cuBLAS, cuDNN and XLA's own kernels; an engine's
attention may be faster, its 8-bit products scaled by blocks. `machine.json` says what was measured on, what the loop
took and what was left out, and why.
"""

import argparse
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jax import Array, lax

from fleetopt_jax.core.files import write_whole

ENGINE = f"jax-{re.match('[0-9.]+[0-9]', jax.__version__)[0]}"  # pyright: ignore[reportOptionalSubscript]
SHARES = {  # of the minutes
    "gemm": 0.5,
    "context_attention": 0.2,
    "generation_attention": 0.2,
    "custom_allreduce": 0.05,
    "nccl": 0.05,
}
COPIES = 6  # of the weights, read in turn: together more than the second-level cache of any GPU from 22 MB each
MEMORY_FRAC = 0.5  # of the GPU's, that one shape may take
CALL_S = 0.005  # what a call should take, guessed from FAST
FAST = {"gpu": (1e15, 3e12), "cpu": (2e10, 5e9)}  # FLOP/s and bytes/s: what is slower takes longer for a call, not less
MAX_LOOPS = 50
REPEATS, REPEAT_S = 5, 0.02  # timings of a shape, and how long each is at least
WATTS_S = 0.6  # of running for the watts: the driver's counter steps about every 0.1 s
CPU_FLOP, CPU_SHAPE_BYTES, CPU_BYTES = 1e8, 1e7, 1e9  # without a GPU larger shapes are left out
QUICK_MINUTES, QUICK_FLOP = 0.5, 2e11

Record = dict[str, Any]
Loop = Callable[[Array, list[Any]], Array]


@dataclass(frozen=True)
class Shape:
    """One shape of an operator: its row in the table, what it works, and how to run it."""

    row: Record
    flop: float
    n_bytes: float
    make: Callable[[Array, int], tuple[Array, list[Any]]]  # key, copies -> what is carried on, what is read in turn
    run: Callable[[Array, Any], Array]
    over: Callable[[Loop], Loop] = lambda loop: loop  # the devices


@dataclass
class Session:
    """What measures, and what is to be said of it."""

    most_flop: float
    watts: "Watts | None"
    loop_s: float = 0.0  # what the loop takes a run
    most_bytes: float = math.inf
    left_out: dict[str, str] = field(default_factory=dict)  # what, and why
    too_short: int = 0  # shapes


# ---------------------------------------------------------------------------------------------------------- the timing


def looped(shape: Shape, loops: int) -> Loop:
    """A compiled program that runs the shape `loops` times over all copies, one run after the other."""

    def once(copies: list[Any], carried: Array) -> Array:
        for copy in copies:
            out = lax.optimization_barrier(shape.run(carried, copy))
            first = jnp.tanh(out[(0,) * out.ndim].astype(jnp.float32))  # the next run waits for this one
            carried = carried.at[(0,) * carried.ndim].set(first.astype(carried.dtype))
        return carried

    def loop(carried: Array, copies: list[Any]) -> Array:
        return lax.fori_loop(0, loops, lambda _, x: once(copies, x), carried)

    return jax.jit(shape.over(loop))


def run_s(shape: Shape, watts: "Watts | None" = None) -> tuple[float, float | None]:
    """(seconds of a run, the loop's own included; watts of the board meanwhile or None)."""
    n_copies = copies_of(shape)
    carried, copies = shape.make(jax.random.key(0), n_copies)
    flop_per_s, bytes_per_s = FAST.get(jax.default_backend(), FAST["gpu"])
    guess_s = max(shape.flop / flop_per_s, shape.n_bytes / bytes_per_s, 1e-6)
    loops = int(min(max(CALL_S / (guess_s * n_copies), 1), MAX_LOOPS))
    program, runs = looped(shape, loops), loops * n_copies

    def call(times: int) -> float:
        start_s = time.perf_counter()
        jax.block_until_ready([program(carried, copies) for _ in range(times)][-1])
        return (time.perf_counter() - start_s) / (times * runs)

    def times_of(least_s: float, seconds: float) -> int:
        return max(1, math.ceil(least_s / (seconds * runs)))

    call(1)  # compiles
    times = times_of(REPEAT_S, call(1))
    call(times)  # warms up
    seconds = statistics.median(call(times) for _ in range(REPEATS))
    return seconds, watts.of(partial(call, times_of(WATTS_S, seconds))) if watts else None


def copies_of(shape: Shape) -> int:
    """As many copies as fit."""
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", CPU_BYTES / MEMORY_FRAC)
    return int(min(max(MEMORY_FRAC * memory / max(shape.n_bytes, 1.0), 1), COPIES))


def loop_alone_s() -> float:
    """What the loop takes a run with nothing in it: one element of what is carried is set."""

    def make(key: Array, copies: int) -> tuple[Array, list[Any]]:
        return jax.random.normal(key, (8, 128)), [None] * copies

    return run_s(Shape({}, 0.0, 1.0, make, lambda carried, _: carried))[0]


def dispatch_s() -> float:
    """What a call from Python takes: a compiled program that does nothing."""
    nothing, one = jax.jit(lambda x: x + 1), jnp.zeros(())
    jax.block_until_ready(nothing(one))
    start_s = time.perf_counter()
    for _ in range(100):
        jax.block_until_ready(nothing(one))
    return (time.perf_counter() - start_s) / 100


@dataclass(frozen=True)
class Watts:
    """The board's energy counter."""

    nvml: Any
    handle: Any

    @property
    def limit_w(self) -> float:
        return self.nvml.nvmlDeviceGetEnforcedPowerLimit(self.handle) / 1e3

    def of(self, work: Callable[[], Any]) -> float:
        """Mean board power while `work` runs [W]."""
        start_mj, start_s = self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle), time.perf_counter()
        work()
        used_mj = self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) - start_mj
        return used_mj / 1e3 / (time.perf_counter() - start_s)


def open_watts() -> "Watts | str":
    """The counter of the first GPU that JAX uses, or why there is none."""
    if jax.default_backend() != "gpu":
        return f"no GPU: JAX runs on the {jax.default_backend()}"
    try:
        import pynvml  # pyright: ignore[reportMissingImports]
    except ImportError:
        return "pynvml is not installed: pip install nvidia-ml-py"
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    try:
        pynvml.nvmlInit()
        by_name = pynvml.nvmlDeviceGetHandleByUUID if first.startswith("GPU-") else pynvml.nvmlDeviceGetHandleByIndex
        handle = by_name(first if first.startswith("GPU-") else int(first))
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except (pynvml.NVMLError, ValueError) as error:
        return f"NVML gives no energy: {error}"
    return Watts(pynvml, handle)


# ---------------------------------------------------------------------------------------------------------- the shapes

# (n outputs, k inputs) of a layer's four products: Llama-8B, Llama-70B on 1, 4 and 8 GPUs, Qwen3-32B on 2, its output.
PRODUCTS = ((6144, 4096), (4096, 4096), (28_672, 4096), (4096, 14_336), (10_240, 8192), (8192, 8192), (57_344, 8192))
PRODUCTS += ((8192, 28_672), (2560, 8192), (8192, 2048), (14_336, 8192), (8192, 7168), (1280, 8192), (8192, 1024))
PRODUCTS += ((7168, 8192), (8192, 3584), (25_600, 5120), (5120, 12_800), (75_968, 5120), (256, 2048), (512, 512))
ROWS = (1, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192, 16_384)
HEADS = ((32, 8, 128), (64, 8, 128), (16, 2, 128), (8, 1, 128), (64, 8, 64), (8, 1, 64), (4, 1, 128))  # with KV, size
PROMPTS, PROMPT_BATCHES = (128, 512, 1024, 2048, 4096, 8192, 16_384), (1, 2, 4, 8, 16)
CONTEXTS, BATCHES = (127, 511, 1023, 2047, 4095, 8191, 16_383, 32_767), (1, 4, 8, 16, 32, 64, 128, 256)
MESSAGES = tuple(2**power for power in range(10, 28))
SCORES_BYTES = 2**31  # XLA's attention keeps all scores: larger ones are left out


def gemm_shapes(dtype: str, products: Iterable = PRODUCTS, rows: Iterable = ROWS) -> Iterator[Shape]:
    """x [m, k] times weights [n, k], as a linear layer has them."""
    kind = {"bfloat16": jnp.bfloat16, "fp8": jnp.float8_e4m3fn, "int8": jnp.int8}[dtype]
    for n, k in products:
        for m in rows:
            row = {"kernel_source": "jax_dot_general", "gemm_dtype": dtype, "m": m, "n": n, "k": k}
            n_bytes = float(jnp.dtype(kind).itemsize * (m * k + n * k) + 2 * m * n)
            yield Shape(row, 2.0 * m * n * k, n_bytes, partial(_operands, kind, m, n, k), product)


def _operands(kind: Any, m: int, n: int, k: int, key: Array, copies: int) -> tuple[Array, list[Array]]:
    first, *others = jax.random.split(key, 1 + copies)
    return _random(first, (m, k), kind), [_random(each, (n, k), kind) for each in others]


def _random(key: Array, shape: tuple[int, ...], kind: Any) -> Array:
    """Random numbers, for zeros draw less power."""
    if kind == jnp.int8:
        return jax.random.randint(key, shape, -127, 128, dtype=jnp.int8)
    return jax.random.normal(key, shape, dtype=jnp.bfloat16).astype(kind)


def product(x: Array, weights: Array) -> Array:
    """x times weights transposed, in 16 bits, of integers in 32."""
    out = jnp.int32 if x.dtype == jnp.int8 else jnp.bfloat16
    return lax.dot_general(x, weights, (((1,), (1,)), ((), ())), preferred_element_type=out)


def context_shapes(how: str, heads=HEADS, prompts=PROMPTS, batches=PROMPT_BATCHES) -> Iterator[Shape]:
    """Causal attention of whole prompts."""
    for n_heads, n_kv, size in heads:
        for isl in prompts:
            for batch in batches:
                row = {"kernel_source": f"jax_{how}", "batch_size": batch, "isl": isl, **_heads(n_heads, n_kv, size)}
                flop = 2.0 * batch * n_heads * size * isl * isl  # half of the pairs
                scores_bytes = 4.0 * batch * n_heads * isl * isl
                yield from _attention(row, how, flop, scores_bytes, (batch, isl, isl, n_heads, n_kv, size))


def generation_shapes(how: str, heads=HEADS, contexts=CONTEXTS, batches=BATCHES) -> Iterator[Shape]:
    """Attention of one token a sequence, after `step` others."""
    for n_heads, n_kv, size in heads:
        for step in contexts:
            for batch in batches:
                row = {"kernel_source": f"jax_{how}", "batch_size": batch, "step": step, **_heads(n_heads, n_kv, size)}
                flop = 4.0 * batch * n_heads * size * (step + 1)
                scores_bytes = 4.0 * batch * n_heads * (step + 1)
                yield from _attention(row, how, flop, scores_bytes, (batch, 1, step + 1, n_heads, n_kv, size))


def _heads(n_heads: int, n_kv: int, size: int) -> Record:
    return {"num_heads": n_heads, "num_key_value_heads": n_kv, "head_dim": size} | {
        "kv_cache_dtype": "bfloat16",
        "window_size": 0,
    }


def _attention(row: Record, how: str, flop: float, scores_bytes: float, sizes: Sequence[int]) -> Iterator[Shape]:
    batch, queries, keys, n_heads, n_kv, size = sizes
    n_bytes = 2.0 * batch * size * (2 * keys * n_kv + 2 * queries * n_heads)
    if how == "xla" and scores_bytes > SCORES_BYTES:
        return

    def make(key: Array, copies: int) -> tuple[Array, list[tuple[Array, Array]]]:
        first, *others = jax.random.split(key, 1 + 2 * copies)
        kv = [_random(each, (batch, keys, n_kv, size), jnp.bfloat16) for each in others]
        return _random(first, (batch, queries, n_heads, size), jnp.bfloat16), list(zip(kv[::2], kv[1::2]))

    run = partial(attention, how, queries > 1)
    yield Shape(row, flop, n_bytes, make, run)


def attention(how: Any, causal: bool, q: Array, kv: tuple[Array, Array]) -> Array:
    """JAX's scaled dot-product attention, by cuDNN or by XLA."""
    return jax.nn.dot_product_attention(q, *kv, is_causal=causal, implementation=how)


def all_reduce_shapes(n_gpus: int, messages: Iterable = MESSAGES) -> Iterator[Shape]:
    """The sum over GPUs of what each holds, on each."""
    row = {"kernel_source": "jax_psum", "backend": "xla"}
    return _passed(n_gpus, messages, row, lambda size: (n_gpus, size), lambda held: lax.psum(held, "gpu"))


def all_gather_shapes(n_gpus: int, messages: Iterable = MESSAGES) -> Iterator[Shape]:
    """All of a message whose equal parts lie on the GPUs, on each of them."""
    row = {"kernel_source": "jax_all_gather", "nccl_dtype": "half"}
    return _passed(n_gpus, messages, row, lambda size: (size,), lambda held: lax.all_gather(held, "gpu", tiled=True))


def _passed(
    n_gpus: int,
    messages: Iterable,
    row: dict[str, Any],
    held_shape: Callable[[int], tuple[int, ...]],
    exchange: Callable[[Array], Array],
) -> Iterator[Shape]:
    """Messages among GPUs, the first axis of what is held divided among them."""
    mesh = jax.make_mesh((n_gpus,), ("gpu",), devices=jax.local_devices()[:n_gpus])
    parts, whole = jax.P("gpu"), jax.P()
    over = partial(jax.shard_map, mesh=mesh, in_specs=(parts, whole), out_specs=parts, check_vma=False)
    for size in messages:

        def make(key: Array, copies: int, size: int = size) -> tuple[Array, list[Any]]:
            held = jax.device_put(_random(key, held_shape(size), jnp.bfloat16), jax.NamedSharding(mesh, parts))
            return held, [None] * copies

        about = {**row, "num_gpus": n_gpus, "message_size": size}
        yield Shape(about, float(size), 2.0 * size, make, lambda held, _: exchange(held), over)


# --------------------------------------------------------------------------------------------------- what there is here


def eight_bit_type() -> tuple[str | None, dict[str, str]]:
    """An 8-bit type that the device multiplies as such, and of those before it why not: JAX may turn 8 bits to 16 or 32
    and say nothing."""
    whys = {}
    for name, kind, in_program in (("fp8", jnp.float8_e4m3fn, "f8e4m3fn"), ("int8", jnp.int8, "s8")):
        zeros = jnp.zeros((256, 256), kind)
        try:
            program = jax.jit(product).lower(zeros, zeros).compile().as_text() or ""
        except Exception as error:  # whatever a compiler says that cannot
            whys[f"products in {name}"] = " ".join(str(error).split())[:120]
            continue
        if multiplies(program, in_program):
            return name, whys
        whys[f"products in {name}"] = "JAX converts them to 16 bits or more on this device"
    return None, whys


def multiplies(program: str, kind: str) -> bool:
    """Whether a compiled program has a product, or a library's call, of arrays of this type."""
    types = dict(re.findall(r"%?([\w.-]+) = (\w+)\[", program))
    operands = re.findall(r"\b(?:dot|custom-call)\(([^)]*)\)", program)
    return any(types.get(name) == kind for each in operands for name in re.findall(r"[\w.-]+", each))


def attention_kernel(queries: int) -> str:
    """cuDNN's flash attention where it runs for so many queries of a sequence, else XLA's."""
    q, k = (jnp.zeros((1, tokens, 2, 64), jnp.bfloat16) for tokens in (queries, 128))
    try:
        jax.block_until_ready(jax.jit(partial(attention, "cudnn", queries > 1))(q, (k, k)))
    except Exception:  # not a GPU, or none that cuDNN has kernels for
        return "xla"
    return "cudnn"


# --------------------------------------------------------------------------------------------------------- the tables


def measure(shapes: Sequence[Shape], seconds: float, session: Session, say: Callable[[str], None]) -> list[Record]:
    """Rows of the shapes, in a random order, as many as there is time for; at least one."""
    rows: list[Record] = []
    shapes = [shape for shape in shapes if shape.flop <= session.most_flop and shape.n_bytes <= session.most_bytes]
    end_s = time.perf_counter() + seconds
    for i in np.random.default_rng(0).permutation(len(shapes)):
        shape = shapes[i]
        if rows and time.perf_counter() > end_s:
            break
        try:
            taken_s, power_w = run_s(shape, session.watts)
        except Exception as error:  # out of memory, or a shape a library has no kernel for
            session.left_out[str(shape.row)] = " ".join(str(error).split())[:120]
            continue
        if taken_s < 2.0 * session.loop_s:
            session.too_short += 1
            continue
        row = shape.row | {"latency": 1e3 * (taken_s - session.loop_s)}
        if session.watts and power_w is not None:
            row |= {"power": power_w, "power_limit": session.watts.limit_w}
        rows.append(row)
        say(f"{len(rows)} of {len(shapes)}: {row}")
    return rows


def all_shapes(session: Session) -> dict[str, list[Shape]]:
    """Of every table that this machine can fill."""
    eight_bit, whys = eight_bit_type()
    session.left_out |= whys
    n_gpus = len(jax.local_devices())
    tables = {
        "gemm": [shape for dtype in ("bfloat16", eight_bit) if dtype for shape in gemm_shapes(dtype)],
        "context_attention": list(context_shapes(attention_kernel(128))),
        "generation_attention": list(generation_shapes(attention_kernel(1))),
    }
    if n_gpus == 1:
        session.left_out["all-reduce, all-gather"] = "one device only"
    counts = [n for n in (2, 4, 8, 16) if n <= n_gpus]
    tables["custom_allreduce"] = [shape for n in counts for shape in all_reduce_shapes(n)]
    tables["nccl"] = [shape for n in counts for shape in all_gather_shapes(n)]
    return tables


def write_tables(folder: Path, tables: dict[str, list[Record]]) -> None:
    """One Parquet file a table, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        if rows:
            buffer = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_pylist(rows), buffer)
            write_whole(folder / f"{name}.{ENGINE}.parquet", buffer.getvalue().to_pybytes())


def name_of_gpu() -> str:
    """As JAX has it, as a name: 'nvidia-h100-80gb-hbm3', 'cpu'."""
    return re.sub(r"[^a-z0-9]+", "-", jax.local_devices()[0].device_kind.lower()).strip("-")


def main(argv: Sequence[str] | None = None, tables: dict[str, list[Shape]] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("kernels"), help="folder for the GPU's folder (kernels)")
    parser.add_argument("--gpu", help="name of the GPU's folder; by default what JAX calls the device")
    parser.add_argument("--minutes", type=float, default=5.0, help="how long to measure, compiling included (5)")
    parser.add_argument("--quick", action="store_true", help="half a minute of small shapes, to see that it works")
    given = parser.parse_args(argv)
    minutes = QUICK_MINUTES if given.quick else given.minutes
    if not 0 < minutes < math.inf:
        parser.exit(2, f"--minutes: {given.minutes:g}: need a positive, finite number\n")
    on_gpu, watts = jax.default_backend() == "gpu", open_watts()
    most_flop = math.inf if on_gpu and not given.quick else QUICK_FLOP if on_gpu else CPU_FLOP
    session = Session(most_flop, None if isinstance(watts, str) else watts)
    if not on_gpu:
        session.most_bytes = CPU_SHAPE_BYTES
    if isinstance(watts, str):
        session.left_out["watts"] = watts
    session.loop_s = loop_alone_s()
    found, folder = {}, given.out / (given.gpu or name_of_gpu())
    for name, shapes in (all_shapes(session) if tables is None else tables).items():
        seconds = 60.0 * minutes * SHARES[name]
        found[name] = measure(
            shapes, seconds, session, lambda text, name=name: print(f"{name} {text}", file=sys.stderr)
        )
        write_tables(folder, {name: found[name]})  # what there is stays, should it be stopped
    machine = {
        "device": jax.local_devices()[0].device_kind,
        "devices": len(jax.local_devices()),
        "backend": jax.default_backend(),
        "jax": jax.__version__,
        "loop_us_per_run": round(1e6 * session.loop_s, 3),
        "call_us": round(1e6 * dispatch_s(), 3),
        "rows": {name: len(rows) for name, rows in found.items()},
        "too_short_for_the_loop": session.too_short,
        "left_out": session.left_out,
    }
    write_whole(folder / "machine.json", json.dumps(machine, indent=2, sort_keys=True) + "\n")
    print(f"{folder}: " + ", ".join(f"{n} rows of {name}" for name, n in machine["rows"].items()))
    print(f"subtracted of each run: {machine['loop_us_per_run']} us of the loop; a call takes {machine['call_us']} us")
    for what, why in list(session.left_out.items())[:8]:
        print(f"left out: {what}: {why}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
