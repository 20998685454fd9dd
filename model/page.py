"""One self-contained HTML page: no script, nothing fetched, readable on a phone, in print, in light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

# What the page may load: nothing. The browser enforces it.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

LIGHT = (
    "--back:#ffffff; --text:#1b1f24; --soft:#57606a; --rule:#d8dee4; --card:#f6f8fa; --ours:#0b62ba; --plain:#b35900; "
    "--limit:#8c959f; --other:#9aa4af; --good:#116329; --bad:#b3261e; --band:#0b62ba26"
)
DARK = (
    "--back:#0f1318; --text:#e3e8ee; --soft:#9aa6b2; --rule:#2c343d; --card:#171c22; --ours:#62b0ff; --plain:#ffa24d; "
    "--limit:#78838f; --other:#5b6672; --good:#4cc46f; --bad:#ff8078; --band:#62b0ff2e"
)

STYLE = f"""
:root {{ color-scheme: light dark; {LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}
@media print {{ :root {{ color-scheme: light; {LIGHT} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 68rem; padding: 1.25rem 1rem 3rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.6rem; line-height: 1.2; margin: 0 0 .6rem; }}
h2 {{ font-size: 1.2rem; margin: 2.2rem 0 .6rem; }}
p {{ margin: .5rem 0; max-width: 46rem; }}
.verdict {{ font-weight: 650; }}
.good {{ color: var(--good); }} .bad {{ color: var(--bad); }}
.soft, figcaption {{ color: var(--soft); }}
.pictures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }}
figure {{ margin: 0; padding: .8rem .8rem .6rem; background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  break-inside: avoid; }}
figure h3 {{ margin: 0 0 .3rem; font-size: 1rem; }}
figcaption {{ font-size: .88rem; line-height: 1.4; }}
svg {{ display: block; width: 100%; height: auto; }}
svg text {{ font-size: 12px; fill: var(--soft); }}
svg .grid {{ stroke: var(--rule); }}
svg polyline {{ fill: none; stroke-width: 2; stroke-linejoin: round; }}
svg polyline.plain {{ stroke-width: 4; }}
svg .ours {{ stroke: var(--ours); }} svg .plain {{ stroke: var(--plain); }} svg .other {{ stroke: var(--other); }}
svg .limit {{ stroke: var(--limit); stroke-dasharray: 5 4; }} svg .faint {{ stroke: var(--other); stroke-width: 1; }}
svg .bad {{ stroke: var(--bad); }} svg .band {{ fill: var(--band); }}
svg circle.ours, svg rect.ours {{ fill: var(--ours); }} svg circle.plain {{ fill: var(--plain); }}
svg circle.bad {{ fill: var(--bad); }} svg circle.other, svg rect.other {{ fill: var(--other); }}
svg .many {{ fill-opacity: .35; stroke-opacity: .6; }}
.key::before {{ content: ""; display: inline-block; width: 1.1em; height: .3em; margin-right: .35em; vertical-align: middle;
  background: currentcolor; border-radius: 2px; }}
.key {{ margin-right: .9em; white-space: nowrap; }}
.key.ours {{ color: var(--ours); }} .key.plain {{ color: var(--plain); }} .key.limit {{ color: var(--limit); }}
.key.other {{ color: var(--other); }} .key.band {{ color: var(--ours); }} .key.band::before {{ height: .8em; opacity: .3; }}
.key span {{ color: var(--text); }}
.wide {{ overflow-x: auto; border: 1px solid var(--rule); border-radius: 8px; }}
table {{ border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .6rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--rule); }}
thead th {{ border-top: 0; color: var(--soft); font-weight: 600; }} th.words, td.words {{ text-align: left; }}
th:first-child, td:first-child {{ text-align: left; white-space: normal; overflow-wrap: normal; min-width: 9rem; position: sticky; left: 0;
  background: var(--back); }}
tbody th {{ font-weight: 650; background: var(--card); }} tbody th:first-child {{ background: var(--card); }}
summary {{ cursor: pointer; margin: 1rem 0 .5rem; }}
pre {{ margin: 0; padding: .8rem; background: var(--card); border: 1px solid var(--rule); border-radius: 8px; font-size: .85rem;
  white-space: pre-wrap; }}
dl {{ display: grid; grid-template-columns: auto 1fr; gap: .15rem 1rem; margin: .8rem 0; font-size: .92rem; }}
dt {{ color: var(--soft); }} dd {{ margin: 0; }}
@media print {{
  @page {{ margin: 14mm; }}
  body {{ padding: 0; font-size: 11px; max-width: none; }}
  .wide {{ overflow: visible; border: 0; }} table {{ font-size: 9px; }} th, td {{ padding: .15rem .35rem; }}
  .pictures {{ grid-template-columns: 1fr 1fr; }} tr, h2 {{ break-inside: avoid; break-after: auto; }} h2 {{ break-after: avoid; }}
}}
"""


def page(title: str, parts: Sequence[str]) -> str:
    """The whole document around its parts."""
    head = [
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<link rel="icon" href="data:,">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
    ]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n{chr(10).join(head)}\n</head>\n<body>\n{body}\n</body>\n</html>\n'
    )


def heading(text: str) -> str:
    """The title of a section."""
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, kind: str = "") -> str:
    """Plain words."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def verdict(passed: bool, text: str) -> str:
    """A result in words, in its colour."""
    return paragraph(text, f"verdict {'good' if passed else 'bad'}")


def pre(text: str) -> str:
    """Text as it is, lines kept."""
    return f"<pre>{escape(text)}</pre>"


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Names and what they are."""
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in rows) + "</dl>"


def figure(title: str, svg: str, keys: Sequence[tuple[str, str]], text: str) -> str:
    """A picture with its title, what its colours mean, and a sentence."""
    legend = "".join(f'<span class="key {kind}"><span>{escape(name)}</span></span>' for kind, name in keys)
    return (
        f"<figure>\n<h3>{escape(title)}</h3>\n{svg}\n<figcaption>{legend}{'<br>' if legend else ''}{escape(text)}"
        "</figcaption>\n</figure>"
    )


def pictures(figures: Sequence[str]) -> str:
    """Pictures side by side where there is room."""
    return '<div class="pictures">\n' + "\n".join(figures) + "\n</div>"


def table(header: Sequence[str], groups: Sequence[tuple[str, Sequence[Sequence[str]]]], words: int = 1) -> str:
    """A table in groups with a title each (or none); so many first columns are words, the others figures."""
    lines = ["<thead><tr>" + "".join(head_of(name, i < words) for i, name in enumerate(header)) + "</tr></thead>"]
    for title, rows in groups:
        lines.append("<tbody>")
        if title:
            lines.append(f'<tr><th colspan="{len(header)}" scope="rowgroup">{escape(title)}</th></tr>')
        for row in rows:
            cells = (cell_of(text, i < words) for i, text in enumerate(row))
            lines.append("<tr>" + "".join(cells) + "</tr>")
        lines.append("</tbody>")
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def head_of(text: str, words: bool) -> str:
    """The head of a column."""
    return f'<th scope="col"{" class=words" * words}>{escape(text)}</th>'


def cell_of(text: str, words: bool) -> str:
    """A cell; what failed is coloured."""
    kinds = [*(["words"] if words else []), *(["bad"] if text in ("FAILED", "NO") else [])]
    breakable = escape(text).replace("_", "_<wbr>").replace(".", ".<wbr>") if words else escape(text)
    return f'<td class="{" ".join(kinds)}">{breakable}</td>' if kinds else f"<td>{breakable}</td>"


def folded(title: str, content: str) -> str:
    """What is there for those who open it."""
    return f"<details><summary>{escape(title)}</summary>\n{content}\n</details>"
