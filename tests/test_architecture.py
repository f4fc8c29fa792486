"""Imports go downwards only, only the edge configures JAX, and the top level stays as it is."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fleetopt_jax"
RANK = {
    "core": 0,
    "laws": 1,
    "workload": 2,
    "fleet": 3,
    "optimize": 4,
    "simulate": 4,
    "calibrate": 4,
    "catalog": 5,
    "published": 6,
    "report": 6,
    "cli": 7,
}
TOP_LEVEL = {
    "pyproject.toml",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    ".ci",
    ".gitignore",
    "fleetopt_jax",
    "experiments",
    "tests",
    "notebooks",
}
RUN_IT = "python -m pip install . && fleetopt optimize"
TEST_IT = 'python -m pip install -e ".[test]" && python -m pytest'


def imports(tree: ast.AST, package: str) -> set[str]:
    """Dotted names a file of `package` imports, at any depth: `from a import b` gives a.b, which may be a room."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def upward_imports(tree: ast.AST, package: str) -> set[str]:
    """Imports that leave the file's room for one that is not below it."""
    room = package.split(".")[1]
    ours = {name for name in imports(tree, package) if name.split(".")[0] == "fleetopt_jax"}
    ours -= {"fleetopt_jax.__version__"}
    # The package itself hands out names of every room, so importing it is importing upwards.
    rooms = {name: name.split(".")[1] if "." in name else "" for name in ours}
    return {name for name, to in rooms.items() if to != room and RANK.get(to, len(RANK)) >= RANK[room]}


def configures_jax(tree: ast.AST, package: str) -> bool:
    if any(name.startswith(("jax.config", "jax._src.config")) for name in imports(tree, package)):
        return True
    for node in ast.walk(tree):
        names_it = isinstance(node, ast.Attribute) and node.attr in ("config", "enable_x64", "disable_x64")
        if names_it and ast.unparse(node).split(".")[0] == "jax":
            return True
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("JAX_"):
            return True
    return False


def sources() -> list[tuple[Path, str, ast.AST]]:
    """(path, package, tree) of every library file in a room."""
    paths = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)
    assert len(paths) > 20, "the library was not found"
    return [
        (path, ".".join(path.parent.relative_to(ROOT).parts), ast.parse(path.read_text(encoding="utf-8")))
        for path in paths
    ]


def test_imports_go_downwards_only():
    wrong = {path.name: found for path, package, tree in sources() if (found := upward_imports(tree, package))}
    assert not wrong


def test_every_room_has_a_rank():
    rooms = {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert rooms <= set(RANK)
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py"}


def test_no_room_imports_by_a_computed_name():
    """`import_module(...)` would pass the check above unseen; only the package's own lazy loader may, and the room on
    top of all others, which imports a command when it is run."""
    wrong = [
        path.name
        for path, package, tree in sources()
        if not package.startswith("fleetopt_jax.cli")
        for name in imports(tree, package)
        if name.split(".")[0] == "importlib" and not name.startswith(("importlib.resources", "importlib.metadata"))
    ]
    assert not wrong
    names = {node.id for _, _, tree in sources() for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert "__import__" not in names


def test_only_the_command_line_configures_jax():
    wrong = [
        path.name
        for path, package, tree in sources()
        if package.split(".")[1] != "cli" and configures_jax(tree, package)
    ]
    assert not wrong


def test_core_needs_jax_and_the_standard_library_only():
    roots = {
        name.split(".")[0]
        for _, package, tree in sources()
        if package == "fleetopt_jax.core"
        for name in imports(tree, package)
    }
    assert "jax" in roots
    assert roots <= {"jax", "fleetopt_jax"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("package", "source", "upward"),
    [
        ("laws", "def f():\n    from fleetopt_jax.fleet.fleet import Slo", {"fleetopt_jax.fleet.fleet.Slo"}),
        ("laws", "from ..fleet import fleet", {"fleetopt_jax.fleet.fleet"}),
        ("laws", "from .. import optimize", {"fleetopt_jax.optimize"}),
        ("laws", "import fleetopt_jax as fo", {"fleetopt_jax"}),
        ("laws", "from fleetopt_jax import evaluate", {"fleetopt_jax.evaluate"}),
        ("simulate", "import fleetopt_jax.optimize.grid", {"fleetopt_jax.optimize.grid"}),
        ("report", "from fleetopt_jax.published import tables", {"fleetopt_jax.published.tables"}),
        ("fleet", "from . import fleet\nfrom ..laws import power\nimport fleetopt_jax.core.units", set()),
    ],
)
def test_the_check_sees_every_way_to_import_upwards(package, source, upward):
    assert upward_imports(ast.parse(source), f"fleetopt_jax.{package}") == upward


@pytest.mark.parametrize(
    "source",
    [
        "import jax\njax.config.update('jax_enable_x64', True)",
        "from jax import config",
        "import jax.config",
        "def f():\n    with jax.experimental.enable_x64():\n        pass",
        "import os\nos.environ['JAX_ENABLE_X64'] = '1'",
    ],
)
def test_the_check_sees_every_way_to_configure_jax(source):
    assert configures_jax(ast.parse(source), "fleetopt_jax.laws")


def test_nothing_else_lies_at_the_top_level():
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    names = {line.split("/")[0] for line in listed.splitlines()}
    if not names:
        pytest.skip("nothing is tracked here")
    assert names <= TOP_LEVEL


def test_the_documented_commands_are_the_ones_that_run():
    readme = [line.strip() for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()]
    assert RUN_IT in readme
    assert TEST_IT in readme
    assert TEST_IT in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
