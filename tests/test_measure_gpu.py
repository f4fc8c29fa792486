"""experiments/measure_gpu.py on the CPU: tables that fits can read, honest about what they lack."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest

SCRIPT = str(Path(__file__).parents[1] / "experiments" / "measure_gpu.py")
MEASURE = SimpleNamespace(**runpy.run_path(SCRIPT))
HEADS = ((4, 2, 16),)
COLUMNS = {
    "gemm": {"kernel_source", "gemm_dtype", "m", "n", "k"},
    "context_attention": {"isl"},
    "generation_attention": {"step"},
    "custom_allreduce": {"kernel_source", "num_gpus", "message_size", "backend"},
}
for name in ("context_attention", "generation_attention"):
    COLUMNS[name] |= {"kernel_source", "batch_size", "num_heads", "num_key_value_heads", "head_dim"}
    COLUMNS[name] |= {"kv_cache_dtype", "window_size"}


def run(folder, tables):
    """What is said of this machine, and the tables written."""
    assert MEASURE.main(["--out", str(folder), "--gpu", "mine", "--minutes", "10"], tables) == 0
    machine = json.loads((folder / "mine" / "machine.json").read_text())
    return machine, {path.name.split(".")[0]: pq.read_table(path) for path in (folder / "mine").glob("*.jax-*.parquet")}


def test_without_a_gpu_a_table_has_no_watts_and_it_is_said(tmp_path, capsys):
    machine, tables = run(tmp_path, {"gemm": list(MEASURE.gemm_shapes("bfloat16", ((256, 512),), (64,)))})
    assert "no GPU" in machine["left_out"]["watts"] and machine["loop_us_per_run"] > 0 and machine["call_us"] > 0
    assert set(tables["gemm"].column_names) == COLUMNS["gemm"] | {"latency"}
    assert machine["rows"] == {"gemm": 1} and tables["gemm"]["latency"][0].as_py() > 0
    assert "left out: watts: no GPU" in capsys.readouterr().out


@pytest.mark.slow
def test_tables_have_the_columns_of_the_kernel_tables(tmp_path):
    shapes = {
        "gemm": list(MEASURE.gemm_shapes("bfloat16", ((512, 512),), (16, 128))),
        "context_attention": list(MEASURE.context_shapes("xla", HEADS, (128,), (2,))),
        "generation_attention": list(MEASURE.generation_shapes("xla", HEADS, (4095,), (8,))),
        "custom_allreduce": list(MEASURE.all_reduce_shapes(1, (2**18,))),
    }
    _, tables = run(tmp_path, shapes)
    for name, columns in COLUMNS.items():
        assert set(tables[name].column_names) == columns | {"latency"}
        rows = tables[name].to_pylist()
        assert all(row.pop("latency") > 0 for row in rows)
        assert sorted(map(str, rows)) == sorted(str(shape.row) for shape in shapes[name])  # each once


@pytest.mark.slow
def test_every_device_of_several_is_in_an_all_reduce(tmp_path):
    """In a process of its own, whose CPU poses as two devices."""
    program = f"""if True:
        import runpy
        measure = runpy.run_path({SCRIPT!r})
        tables = {{"custom_allreduce": list(measure["all_reduce_shapes"](2, (2**10, 2**18)))}}
        measure["main"](["--out", {str(tmp_path)!r}, "--gpu", "two"], tables)"""
    few = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    subprocess.run([sys.executable, "-c", program], env=os.environ | few, check=True)
    (path,) = (tmp_path / "two").glob("custom_allreduce.*")
    assert set(pq.read_table(path)["num_gpus"].to_pylist()) == {2}


def test_a_run_waits_for_the_one_before_and_none_is_dropped():
    seen = MEASURE.Shape(
        {}, 1.0, 1.0, lambda key, n: (jnp.zeros((2, 2)), [1.0, 2.0]), lambda x, copy: jnp.arctanh(x) + copy
    )
    carried, copies = seen.make(None, 2)
    found = MEASURE.looped(seen, 1)(carried, copies)  # tanh(arctanh(tanh(0 + 1)) + 2): both runs, in turn
    np.testing.assert_allclose(found, [[np.tanh(3.0), 0.0], [0.0, 0.0]], rtol=1e-5)


def test_watts_are_joules_of_the_counter_over_seconds(monkeypatch):
    clock_s, energy_mj = [0.0], [5_000]
    nvml = SimpleNamespace(
        nvmlDeviceGetTotalEnergyConsumption=lambda _: energy_mj[0], nvmlDeviceGetEnforcedPowerLimit=lambda _: 700_000
    )
    monkeypatch.setattr(MEASURE.time, "perf_counter", lambda: clock_s[0])
    watts = MEASURE.Watts(nvml, None)

    def work():
        clock_s[0] += 2.0
        energy_mj[0] += 900_000

    assert watts.of(work) == pytest.approx(450.0) and watts.limit_w == 700.0


def test_eight_bits_are_measured_only_where_the_device_multiplies_them():
    kept = "%x = s8[8,8]{1,0} parameter(0)\nROOT %dot.1 = s32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}"
    converted = "%x = s8[8,8] parameter(0)\n%y = f32[8,8] convert(%x)\nROOT %dot.1 = f32[8,8] dot(%y, %y)"
    library = (
        '%x = f8e4m3fn[8,8] parameter(0)\n%c.2 = (bf16[8,8], s8[99]) custom-call(%x), target="__cublas$lt$matmul$f8"'
    )
    assert MEASURE.multiplies(kept, "s8") and MEASURE.multiplies(library, "f8e4m3fn")
    assert not MEASURE.multiplies(converted, "s8")


@pytest.mark.parametrize("minutes", ["0", "-1", "nan"])
def test_minutes_that_are_none_are_refused_in_a_line(minutes, capsys):
    with pytest.raises(SystemExit) as exit:
        MEASURE.main(["--minutes", minutes])
    assert exit.value.code == 2 and capsys.readouterr().err.count("\n") == 1
