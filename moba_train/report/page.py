"""HTML in small pieces: everything that comes from a run is escaped here, pictures become data URIs."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

STYLE = """
:root { --ink: #1b2430; --soft: #5b6675; --line: #e3e8ee; --paper: #ffffff; --back: #f5f7f9; --accent: #0b9e77; }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 28px; margin: 0; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 0 0 4px; }
h3 { font-size: 15px; margin: 18px 0 2px; }
p { margin: 4px 0 10px; color: var(--soft); max-width: 78ch; }
nav { margin: 14px 0 18px; display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 14px; }
nav a { color: var(--accent); text-decoration: none; }
nav a:hover { text-decoration: underline; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px;
  margin: 0 0 16px; scroll-margin-top: 12px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; margin: 0 0 16px; }
.tile { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 11px 14px; }
.tile b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; letter-spacing: -0.01em; }
.tile span { color: var(--soft); font-size: 12.5px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: 8px 18px; }
figure { margin: 8px 0 0; }
figure img { width: 100%; height: auto; display: block; }
figcaption { font-size: 13px; font-weight: 600; color: var(--ink); }
.scroll { overflow-x: auto; }
.wide img { min-width: 760px; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; margin: 8px 0; width: 100%; }
th { text-align: right; font-weight: 600; color: var(--soft); border-bottom: 1px solid #b9c2cc; padding: 4px 10px 4px 0;
  vertical-align: bottom; }
td { text-align: right; border-bottom: 1px solid var(--line); padding: 5px 10px 5px 0; white-space: nowrap; }
th:first-child, td:first-child, th.text, td.text { text-align: left; }
table.facts { width: auto; } table.facts td { text-align: left; padding-right: 28px; }
ul.missing { margin: 6px 0; padding-left: 20px; color: var(--soft); }
pre { background: var(--back); border-radius: 8px; padding: 12px 14px; overflow-x: auto; font-size: 12.5px;
  line-height: 1.5; }
summary { cursor: pointer; color: var(--accent); }
@media print { body { background: #fff; } section, .tile { break-inside: avoid; } nav { display: none; } }
"""


def picture(content: bytes | None, alt: str, *, caption: str = "") -> str:
    """An SVG as a figure; nothing where there is no picture."""
    if content is None:
        return ""
    data = base64.b64encode(content).decode("ascii")
    heading = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure>{heading}<img alt="{escape(alt, quote=True)}" src="data:image/svg+xml;base64,{data}"></figure>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 1) -> str:
    """A table; the first `text_columns` columns are aligned to the left."""

    def row(cells: Sequence[str], tag: str) -> str:
        parts = [
            f'<{tag} class="text">{escape(cell)}</{tag}>' if i < text_columns else f"<{tag}>{escape(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        ]
        return f"<tr>{''.join(parts)}</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f'<div class="scroll"><table><thead>{row(header, "th")}</thead><tbody>{body}</tbody></table></div>'


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns of names and values."""
    body = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<div class="scroll"><table class="facts"><tbody>{body}</tbody></table></div>'


def tiles(values: Sequence[tuple[str, str]]) -> str:
    """The key figures at the top: (value, name)."""
    cards = (f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in values)
    return f'<div class="tiles">{"".join(cards)}</div>'


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def section(anchor: str, title: str, parts: Sequence[str]) -> str:
    """A section with its heading; `parts` are HTML."""
    return f'<section id="{escape(anchor, quote=True)}"><h2>{escape(title)}</h2>{"".join(parts)}</section>'


def document(title: str, subtitle: str, links: Sequence[tuple[str, str]], body: Sequence[str]) -> str:
    """The whole file: no script, no request to anywhere."""
    anchors = "".join(f'<a href="#{escape(anchor, quote=True)}">{escape(name)}</a>' for anchor, name in links)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main><h1>{escape(title)}</h1>{paragraph(subtitle)}<nav>{anchors}</nav>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )
