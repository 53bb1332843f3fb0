"""Reports as one HTML page that needs nothing else: tables, pictures inside, one style. No torch, no network."""

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

NUMBER = re.compile(r"-|[-+]?[\d,]+(?:\.\d+)?(?:e[-+]?\d+)?[%kMBT]?")


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return the leaves of nested mappings by dotted key."""
    rows: list[tuple[str, Any]] = []
    for key, value in tree.items():
        rows += flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(prefix + key, value)]
    return rows


def _row(row: Sequence[Any], tag: str, numeric: Sequence[bool]) -> str:
    opened = (f"<{tag} class=number>" if right else f"<{tag}>" for right in numeric)
    cells = zip(opened, row, strict=True)
    return "<tr>" + "".join(f"{begin}{html.escape(str(cell))}</{tag}>" for begin, cell in cells) + "</tr>"


def table(rows: Sequence[Sequence[Any]], head: Sequence[str] = ()) -> str:
    """Return an HTML table; the cells are escaped, columns that hold numbers alone end at the right.

    One that is wider than the page scrolls by itself.
    """
    columns = list(zip(*rows, strict=True)) or [()] * len(head)
    numeric = [bool(column) and all(NUMBER.fullmatch(str(cell)) for cell in column) for column in columns]
    top = f"<thead>{_row(head, 'th', numeric)}</thead>" if head else ""
    body = f"<tbody>{''.join(_row(row, 'td', numeric) for row in rows)}</tbody>"
    return f"<div class=wide><table>{top}{body}</table></div>"


def tiles(facts: Sequence[tuple[str, str]]) -> str:
    """Return label and value pairs as the tiles on top of a page."""
    cells = (f"<div class=tile><small>{html.escape(k)}</small><b>{html.escape(v)}</b></div>" for k, v in facts)
    return f"<div class=tiles>{''.join(cells)}</div>"


def pictures(files: Mapping[str, bytes]) -> str:
    """Return PNG files by name as a grid of images inside the page."""
    encoded = ((html.escape(name.replace("_", " ")), base64.b64encode(data).decode()) for name, data in files.items())
    images = (f'<img alt="{name}" src="data:image/png;base64,{data}">' for name, data in encoded)
    return f"<div class=pictures>{''.join(images)}</div>"


def sections(parts: Sequence[tuple[str, str]]) -> str:
    """Return titled parts of a page; empty ones are left out."""
    return "".join(f"<h2>{html.escape(title)}</h2>{body}" for title, body in parts if body)


def page(title: str, subtitle: str, body: str) -> str:
    """Return the whole page; ``body`` is HTML, the titles are text."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1><p class=muted>{html.escape(subtitle)}</p>
{body}
</body></html>
"""


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #2b2f36; background: #fff; margin: 2rem auto; padding: 0 1rem;
  max-width: 84rem; }
h1 { margin: 0; } h2 { margin: 2rem 0 .5rem; font-size: 1.1rem; } .muted { color: #6b7280; margin: .2rem 0 1.2rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .6rem; margin-bottom: 1rem; }
.tile { border: 1px solid #e3e6ea; border-radius: 8px; padding: .5rem .9rem; }
.tile small { display: block; color: #6b7280; } .tile b { font-size: 1.1rem; }
.pictures { margin-top: 1rem; display: grid; grid-template-columns: repeat(auto-fill, minmax(22rem, 1fr)); gap: 1rem;
  align-items: start; }
.pictures img { width: 100%; border: 1px solid #e3e6ea; border-radius: 8px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; max-width: 100%; } th, td { text-align: left; vertical-align: top;
  padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #e3e6ea; white-space: pre-wrap;
  overflow-wrap: break-word; max-width: 30rem; }
td:first-child, th:first-child { white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
th { color: #6b7280; font-weight: 600; } summary { cursor: pointer; }
"""
