"""API pages from the docstrings, with pdoc (extra `docs`): `python -W error tests/api_pages.py FOLDER`."""

import inspect
import re
import sys
from pathlib import Path
from pkgutil import iter_modules

import matplotlib.pyplot  # noqa: F401 - it asks a process for the fonts, which pdoc lets no import do

import fleetopt_jax as fo

ARRAY = "jax.jaxlib._jax.Array"  # as Python spells jax.Array
ARRAY_LIKE = re.compile(rf"Union\[{ARRAY}, numpy.ndarray, [a-z., ]* complex(, NoneType)?\]")


def write_pages(folder: Path) -> None:
    """A page for the package, with every public name, and one for each room but `cli`, with its files below it."""
    spell = inspect.formatannotation
    inspect.formatannotation = lambda *about, **how: shorter(spell(*about, **how))
    import pdoc  # now, for it keeps what it imports

    for name in fo.__all__:  # loaded on first use; pdoc looks at what is loaded
        setattr(fo, name, getattr(fo, name))
    rooms = [room.name for room in iter_modules(fo.__path__) if room.ispkg and room.name != "cli"]
    fo.__all__ = [*fo.__all__, *(room for room in rooms if room not in fo.__all__)]
    pdoc.pdoc("fleetopt_jax", output_directory=folder)


def shorter(annotation: str) -> str:
    """An annotation that says `ArrayLike` and `jax.Array`, as the source does."""
    return ARRAY_LIKE.sub(lambda found: "ArrayLike | None" if found[1] else "ArrayLike", annotation).replace(
        ARRAY, "jax.Array"
    )


if __name__ == "__main__":
    write_pages(Path(sys.argv[1]))
