"""The parts of a self-contained page: no scripts, nothing from the network, whatever a user typed escaped."""

import re
from collections.abc import Mapping, Sequence
from html import escape

from matplotlib.figure import Figure

from fleetopt_jax import __version__
from fleetopt_jax.report import style
from fleetopt_jax.report.svg import COLOURS, inline_svg

LONG_CELL = 30  # letters from which a cell of a table may wrap
SHORT_HEAD = 11  # letters of a row's head that never wrap
NARROW = 36  # letters of a row that a phone shows
NO_NUMBER = ("", "-", "not held", "unbounded", "unbounded (overload)", "never (overload)", "overload", "nobody knows")
SCROLLS = '<p class="hint" aria-hidden="true">Scroll sideways to see all of it &#8594;</p>'
NOTHING_FROM_OUTSIDE = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page_of(title: str, name: str, about: str, body: Sequence[str]) -> str:
    """A page of sections, the decision first: its title, the name of what it is about, and that in a line."""
    light, dark = ("".join(f"--{name}: {pair[i]}; " for name, *pair in COLOURS.values()) for i in (0, 1))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{NOTHING_FROM_OUTSIDE}">\n'
        f"<title>{as_text(title)} ({as_text(name)})</title>\n"
        f"<style>\n:root {{ color-scheme: light dark; {light}}}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}\n{CSS}</style>\n</head>\n<body>\n"
        f'<a class="skip" href="#decision">To the decision</a>\n'
        f"<header><h1>{as_text(title)}</h1><p>{as_text(about)}</p></header>\n<main>\n"
        f"{chr(10).join(body)}\n</main>\n</body>\n</html>\n"
    )


def decision_of(rows: Mapping[str, str]) -> str:
    """Questions and answers, as the first section of a page."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{as_text(said)}</dd></div>" for name, said in rows.items())
    return f'<section id="decision"><h2>The decision</h2><dl class="decision">{items}</dl></section>'


def list_of(items: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{as_text(text)}</li>' for text in items)}</ul>"


def repeat_of(commands: Sequence[str], facts: Sequence[str]) -> str:
    """The commands that make a page again, and by what it was made."""
    code = "".join(f"<pre><code>{as_text(line)}</code></pre>" for line in commands)
    said = "; ".join([f"fleetopt_jax {__version__}", *facts])
    return section_of("How to repeat it", code, f"<p>{as_text(said)}.</p>")


def as_text(text: str) -> str:
    return escape(style.printable(text).replace(" %", "\u00a0%"))  # a number and its sign on one line


def section_of(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def table_of(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column heads the rows, numbers to the right; it scrolls in its own box where the screen is
    narrow."""
    right = [False, *(_is_of_numbers([row[k] for row in rows]) for k in range(1, len(head)))]
    columns = "".join(
        f'<th scope="col"{_aligned(right[k])}>{as_text(name)}</th>' if name else "<td></td>"
        for k, name in enumerate(head)
    )
    lines = "".join(
        f'<tr><th scope="row"{_wraps(row[0])}>{as_text(row[0])}</th>{"".join(map(_cell, row[1:], right[1:]))}</tr>'
        for row in rows
    )
    widths = [max(len(row[k]) for row in (head, *rows)) + 2 for k in range(len(head))]
    letters = min(widths[0], NARROW // 2) + sum(widths[1:])  # the heads of rows wrap
    return (
        f'<h3>{as_text(title)}</h3><div class="scroll" tabindex="0" role="region" aria-label="{as_text(title)}">'
        f'<table aria-label="{as_text(title)}"><thead><tr>{columns}</tr></thead><tbody>{lines}</tbody></table></div>'
        f"{SCROLLS if letters > NARROW else ''}"
    )


def _is_of_numbers(cells: Sequence[str]) -> bool:
    """Whether a column is numbers, or what stands for one that there is not."""
    numbers = [re.match(r"[-+$]?[\d.]", cell) for cell in cells]
    short = all(len(cell) <= LONG_CELL for cell in cells)
    return short and any(numbers) and all(of or cell in NO_NUMBER for of, cell in zip(numbers, cells))


def _wraps(head: str) -> str:
    """Of a row's head that is long: it wraps on a phone, but not word by word."""
    return ' class="head"' if len(head) > SHORT_HEAD else ""


def _aligned(right: bool) -> str:
    return ' class="number"' if right else ""


def _cell(text: str, right: bool) -> str:
    kind = ' class="long"' if len(text) > LONG_CELL else _aligned(right)
    return f"<td{kind}>{as_text(text)}</td>"


def figure_of(key: str, title: str, figure: Figure) -> str:
    """The takeaway becomes the caption, which wraps, and with the title the text for who cannot see it."""
    takeaway = " ".join(figure.get_suptitle().split("\n"))
    figure.suptitle("")
    said = f"{title}. {takeaway.rstrip('.')}."
    return (
        f'<figure id="figure-{key}"><h3>{escape(title)}</h3><figcaption>{as_text(takeaway)}</figcaption>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}">'
        f"{inline_svg(figure, key, said)}</div>{SCROLLS}</figure>"
    )


CSS = """\
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
header, main { max-width: 62rem; margin: 0 auto; padding: 0 1rem; }
header { padding-top: 1.5rem; }
header p { margin-top: 0; color: var(--muted); }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.3rem; margin: 2rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid var(--grid); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .2rem; }
h1, h3, p, li, dd, dt, figcaption, code, .long { overflow-wrap: anywhere; }
.decision { margin: 0; }
.decision div { display: grid; grid-template-columns: 8.5rem 1fr; gap: .3rem 1rem; padding: .5rem 0;
  border-bottom: 1px solid var(--grid); }
dt { font-weight: 600; }
dd { margin: 0; }
.scroll { overflow-x: auto; margin: .6rem 0 1.2rem; }
.hint { display: none; margin: -.9rem 0 1.2rem; color: var(--muted); font-size: .85rem; }
.scroll:focus-visible, a:focus-visible { outline: 3px solid var(--blue); outline-offset: 2px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem 1rem .25rem 0; text-align: left; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--grid); }
.number { text-align: right; }
.long { white-space: normal; min-width: 15rem; }
th[scope=row] { font-weight: 400; color: var(--muted); }
figure { margin: 0 0 1.5rem; }
figure svg { display: block; width: 100%; min-width: 36rem; height: auto; font-family: system-ui, sans-serif; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
pre { margin: .5rem 0; padding: .6rem .8rem; border: 1px solid var(--grid); white-space: pre-wrap; }
.skip { position: absolute; left: -100rem; }
.skip:focus { left: 1rem; top: .5rem; }
@media (max-width: 40rem) {
  .decision div { grid-template-columns: 1fr; gap: 0; }
  h1 { font-size: 1.35rem; }
  .hint { display: block; }
  .scroll:has(+ .hint) { border-right: 1px dashed var(--muted); }
  th[scope=row] { position: sticky; left: 0; background: var(--paper); }
  .head { min-width: 7rem; max-width: 9rem; white-space: normal; }
}
@media print {
  body { font-size: 10pt; }
  header, main { max-width: none; padding: 0; }
  .scroll { overflow: visible; }
  figure svg { min-width: 0; max-width: 16cm !important; }
  figure, tr, .decision div { break-inside: avoid; }
  h2, h3, figcaption { break-after: avoid; }
  td, th { white-space: normal; }
  .long { min-width: 0; }
  .skip, .hint { display: none; }
}
"""
