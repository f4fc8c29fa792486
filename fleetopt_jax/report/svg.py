"""A figure as SVG inside a page: in the page's colours, light and dark, and its letters."""

import re
import warnings
from io import BytesIO
from typing import Any
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.figure import Figure

from fleetopt_jax.report import style

COLOURS = {  # of the figures: variable, in the light, in the dark
    style.INK: ("ink", "#1a1a1a", "#ececec"),
    style.MUTED: ("muted", "#555555", "#b3b9c0"),
    style.GRID: ("grid", "#dddddd", "#3a4048"),
    style.PAPER: ("paper", "#ffffff", "#14171b"),
    style.BLUE: ("blue", "#0072b2", "#4aa8e0"),
    style.VERMILLION: ("vermillion", "#d55e00", "#f2813d"),
    style.GREEN: ("green", "#009e73", "#2cc397"),
    style.ORANGE: ("orange", "#e69f00", "#f0b429"),
    style.SKY: ("sky", "#56b4e9", "#8ccff5"),
    style.PURPLE: ("purple", "#cc79a7", "#dd94bb"),
}
PX_PER_PT = 4 / 3
REFERENCE = re.compile(r"#([\w-]+)")  # to an id; a colour looks the same


def inline_svg(figure: Figure, key: str, said: str) -> str:
    """The figure as SVG for a page: text as text, the page's colours, ids of its own, `said` for who cannot see it."""
    buffer = BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    settings: dict[Any, Any] = style.STYLE | {"svg.fonttype": "none", "svg.hashsalt": key}
    with rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's fonts write the text
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    root = ElementTree.fromstring(buffer.getvalue())
    _drop(root, {"metadata", "style"})
    elements = list(root.iter())
    values = " ".join(value for element in elements for value in element.attrib.values())
    ids = {element.get("id") for element in elements} & set(REFERENCE.findall(values))
    for element in elements:
        element.tag = element.tag.split("}")[-1]
        element.attrib = {
            name.split("}")[-1]: REFERENCE.sub(lambda at: f"#{key}-{at[1]}" if at[1] in ids else at[0], value)
            for name, value in element.attrib.items()
            if name != "id" or value in ids
        }
        if "id" in element.attrib:
            element.set("id", f"{key}-{element.get('id')}")
        painted = "; ".join(
            f"{name}: {element.attrib.pop(name)}" for name in ("fill", "stroke") if name in element.attrib
        )
        said_already = element.attrib.pop("style", "")
        if painted or said_already:
            element.set("style", _page_style("; ".join(filter(None, (painted, said_already)))))
    view = root.attrib["viewBox"]
    width = float(view.split()[2])
    root.attrib = {"viewBox": view, "style": f"max-width: {width * PX_PER_PT:.0f}px"}
    root.attrib |= {"role": "img", "aria-label": style.printable(said)}
    return ElementTree.tostring(root, encoding="unicode")


def _drop(element: ElementTree.Element, tags: set[str]) -> None:
    for child in list(element):
        if child.tag.split("}")[-1] in tags:
            element.remove(child)
        else:
            _drop(child, tags)


def _page_style(text: str) -> str:
    """Colours as the page's variables, letters in the page's font."""
    for colour, (name, *_) in COLOURS.items():
        text = re.sub(re.escape(colour), f"var(--{name})", text, flags=re.IGNORECASE)
    return re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", text)
