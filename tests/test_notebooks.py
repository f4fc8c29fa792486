"""The notebooks are kept without outputs, and run from a clean kernel."""

import json
import re
import sys
import warnings
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
TIMEOUT_S = 600  # of one cell: a minute on a quiet machine
LONG = ("2_one_over_w", "4_pareto_and_pools")  # minutes, of commands that other tests run
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells_of(notebook, kind: str):
    return [cell for cell in notebook.cells if cell.cell_type == kind]


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 5


@each_notebook
def test_is_kept_as_written(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    assert 10 <= len(notebook.cells) <= 16
    for cell in cells_of(notebook, "code"):
        assert cell.outputs == [] and cell.execution_count is None
    assert cells_of(notebook, "code")[0].source.splitlines()[2].startswith('jax.config.update("jax_enable_x64", True)')
    assert cells_of(notebook, "markdown")[0].source.startswith("# ")
    figure, question = notebook.cells[-2:]
    assert figure.cell_type == "code" and "figure" in figure.source
    assert question.cell_type == "markdown" and question.source.startswith("**Try:**") and "?" in question.source


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.nightly if path.stem in LONG else ()) for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_runs_from_a_clean_kernel(path, tmp_path):
    notebook = run(nbformat.read(path, as_version=4), tmp_path)
    codes = cells_of(notebook, "code")
    for cell in codes:
        for output in cell.outputs:
            said = text_of(output)
            assert output.output_type != "error" and "Traceback" not in said, said
            assert not re.search(r"\bnan\b", said, re.IGNORECASE), said
    assert any("image/png" in output.get("data", {}) for output in codes[-1].outputs)


def text_of(output) -> str:
    """What an output says, on a stream or as a value."""
    return output.get("text", "") + output.get("data", {}).get("text/plain", "")


def run(notebook, folder: Path):
    """The notebook as it comes out of a new kernel of this interpreter, which works in `folder`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Jupyter's own; what the kernel warns of is in the outputs
        from jupyter_client.kernelspec import KernelSpecManager
        from jupyter_client.manager import AsyncKernelManager
        from nbclient import NotebookClient

        spec = folder / "kernels" / "python3" / "kernel.json"  # the name alone could be another interpreter's
        spec.parent.mkdir(parents=True)
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        spec.write_text(json.dumps({"argv": argv, "display_name": "these tests", "language": "python"}))
        specs = KernelSpecManager(kernel_dirs=[str(spec.parents[1])], ensure_native_kernel=False)
        kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs)
        place = {"metadata": {"path": str(folder)}}
        client = NotebookClient(notebook, km=kernel, timeout=TIMEOUT_S, resources=place)
        return client.execute(cleanup_kc=True)
