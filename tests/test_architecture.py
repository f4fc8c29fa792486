"""Imports go downwards only, functions stay small, choices are asked by methods, importing computes nothing, only the
edge configures JAX, and the top level stays as it is."""

import ast
import subprocess
import sys
from collections.abc import Collection
from functools import cache
from pathlib import Path

import pytest

import fleetopt_jax
from fleetopt_jax.fleet.assumptions import CHOICES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fleetopt_jax"
RANK = {
    "core": 0,
    "laws": 1,
    "workload": 2,
    "fleet": 3,
    "catalog": 4,
    "optimize": 5,
    "simulate": 5,
    "calibrate": 5,
    "documents": 6,
    "published": 7,
    "sweep": 7,
    "report": 7,
    "cli": 8,
}
MOST_LINES = 60  # of a function, its docstring included
MOST_PARAMETERS = 8  # of a function, but for `make_*`, which name every field of a record,
MANY_KNOBS = {
    "simulate",
    "robust",
    "ledger",
    "stack_ledger",
    "report_page",
    "sweep",
}  # and for entries whose further options are by keyword alone
STRATEGY_ROOMS = ("laws", "fleet", "optimize", "simulate")  # where laws and choices are asked by their methods
TOP_LEVEL = {
    "pyproject.toml",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    ".ci",
    ".github",
    ".gitignore",
    "fleetopt_jax",
    "experiments",
    "tests",
    "notebooks",
}
RUN_IT = "python -m pip install . && fleetopt optimize"
TEST_IT = 'python -m pip install -e ".[test]" && python -m pytest'


def room_of(package: str) -> str:
    """The room of a dotted name; `_optimize`, behind a function of the same name, is the room `optimize`."""
    return package.split(".")[1].removeprefix("_") if "." in package else ""


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
    room = room_of(package)
    ours = {name for name in imports(tree, package) if name.split(".")[0] == "fleetopt_jax"}
    ours -= {"fleetopt_jax.__version__"}
    # The package itself hands out names of every room, so importing it is importing upwards.
    rooms = {name: room_of(name) for name in ours}
    return {name for name, to in rooms.items() if to != room and RANK.get(to, len(RANK)) >= RANK[room]}


def configures_jax(tree: ast.AST, package: str) -> bool:
    """Whether a file sets JAX's options; to read one is no setting."""
    if any(name.startswith(("jax.config", "jax._src.config")) for name in imports(tree, package)):
        return True
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)]
    reads = {id(node.value) for node in attributes if node.attr == "read" or node.attr.startswith("jax_")}
    for node in ast.walk(tree):
        names_it = isinstance(node, ast.Attribute) and node.attr in ("config", "enable_x64", "disable_x64")
        if names_it and id(node) not in reads and ast.unparse(node).split(".")[0] == "jax":
            return True
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("JAX_"):
            return True
    return False


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def n_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Of a function, without `self` or `cls`."""
    of = function.args
    names = [each.arg for each in (*of.posonlyargs, *of.args, *of.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def strategies() -> set[str]:
    """Names of the records that are laws or choices: classes that derive from another of ours, and what they derive
    from, in the rooms that define them."""
    found: set[str] = set()
    for _, package, tree in sources():
        if package.startswith(("fleetopt_jax.laws", "fleetopt_jax.fleet.choices")):
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    found |= {node.name, *(base.id for base in node.bases if isinstance(base, ast.Name))}
    return found


def asked_by_type(tree: ast.AST, types: set[str]) -> list[str]:
    """Functions that ask more than once which law or choice a record is, instead of calling its method."""
    wrong = []
    for function in functions(tree):
        asked = 0
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                asked += bool(types & {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)})
            elif isinstance(node, ast.MatchClass):
                asked += ast.unparse(node.cls) in types
        if asked > 1:
            wrong.append(function.name)
    return wrong


def asked_by_name(tree: ast.AST, choices: Collection[str]) -> list[str]:
    """Comparisons with the name of a choice's record: `assumptions.tail.name == "quantile"`."""
    compared = [
        side for node in ast.walk(tree) if isinstance(node, ast.Compare) for side in (node.left, *node.comparators)
    ]
    texts = [ast.unparse(side) for side in compared if isinstance(side, ast.Attribute)]
    return [text for text in texts if text.endswith(".name") and text.split(".")[-2] in choices]


@cache
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
    rooms = {path.parent.name.removeprefix("_") for path in PACKAGE.glob("*/*.py")}
    assert rooms == set(RANK)
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
        path.name for path, package, tree in sources() if room_of(package) != "cli" and configures_jax(tree, package)
    ]
    assert not wrong


def test_no_function_is_longer_than_a_screen():
    wrong = {
        f"{path.relative_to(PACKAGE)}: {function.name}": lines
        for path, _, tree in sources()
        for function in functions(tree)
        if (lines := (function.end_lineno or 0) - function.lineno + 1) > MOST_LINES
    }
    assert not wrong


def test_no_function_takes_more_than_a_few_parameters():
    wrong = {
        f"{path.relative_to(PACKAGE)}: {function.name}": n
        for path, _, tree in sources()
        for function in functions(tree)
        if (n := n_parameters(function)) > MOST_PARAMETERS
        and not function.name.startswith("make_")
        and function.name not in MANY_KNOBS
    }
    assert not wrong


def test_entries_with_many_knobs_take_them_by_keyword():
    entries = [function for _, _, tree in sources() for function in functions(tree) if function.name in MANY_KNOBS]
    assert {function.name for function in entries} == MANY_KNOBS
    for function in entries:
        assert len(function.args.args) <= MOST_PARAMETERS // 2 and ast.get_docstring(function), function.name


def test_laws_and_choices_are_asked_by_their_methods():
    """A law or a choice of one's own would be missed by whoever asks which of ours it is."""
    types = strategies()
    assert {"DecodeLaw", "DecodeStep", "PowerLaw", "Tail", "QuantileTail", "Dispatch"} <= types
    rooms = [(path, tree) for path, package, tree in sources() if room_of(package) in STRATEGY_ROOMS]
    by_type = {path.name: found for path, tree in rooms if (found := asked_by_type(tree, types))}
    by_name = {path.name: found for path, tree in rooms if (found := asked_by_name(tree, (*CHOICES, "dispatch")))}
    dispatched = [path.name for path, tree in rooms if "functools.singledispatch" in imports(tree, "fleetopt_jax")]
    assert (by_type, by_name, dispatched) == ({}, {}, [])


IMPORT_ALL = """
import importlib, pkgutil, sys
import jax
compiled = []
jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
import fleetopt_jax
for module in pkgutil.walk_packages(fleetopt_jax.__path__, "fleetopt_jax."):
    if module.name.split(".")[1].removeprefix("_") in sys.argv[1:]:
        importlib.import_module(module.name)
arrays = jax.live_arrays()
assert not arrays, f"importing makes {len(arrays)} arrays"
assert not [name for name in compiled if "compile" in name], compiled
"""


@pytest.mark.parametrize("rooms", [("catalog",), tuple(room for room in RANK if room != "cli")], ids=["catalog", "all"])
def test_importing_builds_nothing(rooms):
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL, *rooms], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there():
    missing = []
    for name in fleetopt_jax.__all__:
        try:
            getattr(fleetopt_jax, name)
        except (AttributeError, ImportError) as error:
            missing.append(f"{name}: {error}")
    assert not missing
    assert len(set(fleetopt_jax.__all__)) == len(fleetopt_jax.__all__)


def test_core_needs_jax_numpy_and_the_standard_library_only():
    roots = {
        name.split(".")[0]
        for _, package, tree in sources()
        if package == "fleetopt_jax.core"
        for name in imports(tree, package)
    }
    assert "jax" in roots
    assert roots <= {"jax", "numpy", "fleetopt_jax"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("package", "source", "upward"),
    [
        ("laws", "def f():\n    from fleetopt_jax.fleet.fleet import Slo", {"fleetopt_jax.fleet.fleet.Slo"}),
        ("laws", "from ..fleet import fleet", {"fleetopt_jax.fleet.fleet"}),
        ("laws", "from .. import optimize", {"fleetopt_jax.optimize"}),
        ("laws", "import fleetopt_jax as fo", {"fleetopt_jax"}),
        ("laws", "from fleetopt_jax import evaluate", {"fleetopt_jax.evaluate"}),
        ("catalog", "from fleetopt_jax._optimize import plan", {"fleetopt_jax._optimize.plan"}),
        ("fleet", "from fleetopt_jax.catalog.spec import EngineSpec", {"fleetopt_jax.catalog.spec.EngineSpec"}),
        ("optimize", "from fleetopt_jax.documents import plan", {"fleetopt_jax.documents.plan"}),
        ("optimize", "from fleetopt_jax.catalog import engines", set()),
        ("simulate", "import fleetopt_jax._optimize.grid", {"fleetopt_jax._optimize.grid"}),
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
    for reading in ("jax.config.read('jax_enable_x64')", "x = jax.config.jax_enable_x64"):
        assert not configures_jax(ast.parse(f"import jax\n{reading}"), "fleetopt_jax.core")
    assert configures_jax(ast.parse("import jax\njax.config.jax_enable_x64 = True"), "fleetopt_jax.core")


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ("if isinstance(x, A):\n  pass\n elif isinstance(x, B):\n  pass", True),
        ("if isinstance(x, (A, C)) or isinstance(x, B):\n  pass", True),
        ("match x:\n  case A():\n   pass\n  case B():\n   pass", True),
        ("if isinstance(x, A):\n  pass\n elif isinstance(x, C):\n  pass", False),
        ("x.method()", False),
    ],
)
def test_the_check_sees_who_asks_for_types(body, wrong):
    assert bool(asked_by_type(ast.parse(f"def f(x):\n {body}"), {"A", "B"})) == wrong


def test_the_check_sees_who_asks_for_names():
    tree = ast.parse("a.tail.name == 'quantile'\n'jsq' != setting.assumptions.dispatch.name\nspec.gpu.name == 'h100'")
    assert asked_by_name(tree, ("tail", "dispatch")) == ["a.tail.name", "setting.assumptions.dispatch.name"]


@pytest.mark.parametrize(
    ("signature", "n"), [("self, a, *, b", 2), ("a, /, b, *args, c, **kwargs", 3), ("", 0), ("cls", 0)]
)
def test_the_check_counts_parameters(signature, n):
    (function,) = functions(ast.parse(f"def f({signature}): pass"))
    assert n_parameters(function) == n


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
