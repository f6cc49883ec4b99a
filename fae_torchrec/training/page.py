"""What the report pages are made of: one style for light and dark screens and paper, figures, tables, facts; nothing is fetched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from fae_torchrec.training.picture import COLOURS_ON_WHITE, Picture
from fae_torchrec.training.report_table import bytes_text, percent_text

_ON_WHITE = " ".join(f"--{name}: {colour};" for name, colour in COLOURS_ON_WHITE.items())
_STYLE = f"""
:root {{ color-scheme: light dark; --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  --page: #fbfbfa; --card: #ffffff; --tint: #f1f4f6; --accent: #0b6e6e;
  {_ON_WHITE} }}
@media (prefers-color-scheme: dark) {{ :root {{ --page: #15181b; --card: #1c2024; --ink: #e7eaed; --soft: #a3acb5; --line: #363d44;
  --tint: #242a2f; --accent: #5cc4c0; --s0: #93a1af; --s1: #f08a54; --s2: #4fbcc4; --s3: #b497dc; --s4: #dcb450; --s5: #7cbb74;
  --s6: #e67ba7; --s7: #7fa3e6; }} }}
@media print {{
  :root {{ color-scheme: light; {_ON_WHITE}
    --page: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb; --tint: #f2f2f2; --accent: #0b6e6e; }}
  main {{ max-width: none !important; padding: 0 !important; }}
  header, figure, tr {{ break-inside: avoid; }}
  .scroll {{ overflow: visible !important; }}
  table {{ font-size: 8pt !important; }}
  th, td {{ padding: 3px 5px !important; }}
}}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 var(--font);
  -webkit-print-color-adjust: exact; print-color-adjust: exact; }}
main {{ max-width: 1240px; margin: 0 auto; padding: 40px 28px 64px; }}
h1 {{ font-size: 28px; line-height: 1.2; margin: 2px 0 20px; letter-spacing: -0.01em; }}
h2 {{ font-size: 18px; margin: 0 0 14px; }}
.kicker {{ color: var(--accent); font-weight: 600; margin: 0; font-size: 13px; letter-spacing: 0.02em; }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: 1px; background: var(--line);
  border: 1px solid var(--line); border-radius: 8px; overflow: hidden; margin: 0; }}
.tiles div {{ background: var(--card); padding: 10px 14px; }}
.tiles dt {{ color: var(--soft); font-size: 12px; }}
.tiles dd {{ margin: 0; font-size: 19px; font-variant-numeric: tabular-nums; white-space: nowrap; }}
section {{ margin-top: 40px; }}
.verdicts {{ margin: 0 0 16px; padding-left: 20px; }}
.scroll {{ overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; background: var(--card); }}
table {{ border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 7px 12px; text-align: right; vertical-align: top; }}
td {{ white-space: nowrap; }}
th {{ color: var(--soft); font-weight: 600; font-size: 12px; line-height: 1.3; vertical-align: bottom; background: var(--tint); }}
tbody tr + tr td {{ border-top: 1px solid var(--line); }}
tbody tr.group td {{ border-top: 2px solid var(--soft); }}
.text {{ text-align: left; }}
td small {{ display: block; color: var(--soft); font-size: 11.5px; }}
figure {{ margin: 0 0 20px; padding: 16px 16px 12px; border: 1px solid var(--line); border-radius: 8px;
  background: var(--card); }}
figure svg {{ display: block; width: 100%; height: auto; overflow: visible; }}
figcaption {{ color: var(--soft); font-size: 13px; margin-top: 8px; }}
.pair {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 460px), 1fr)); gap: 20px; margin: 0 0 20px; }}
.pair figure {{ margin: 0; }}
.notes dt {{ font-weight: 600; }} .notes dd {{ margin: 0 0 8px; color: var(--soft); }}
.facts {{ display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; margin: 0 0 16px; }}
.facts dt {{ color: var(--soft); }} .facts dd {{ margin: 0; overflow-wrap: anywhere; }}
code, pre {{ font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }}
pre {{ background: var(--tint); padding: 12px 16px; border-radius: 8px; overflow-x: auto; margin: 8px 0 0; white-space: pre-wrap; }}
summary {{ cursor: pointer; color: var(--soft); }}
"""


class Cell(NamedTuple):
    """One cell of a table: its markup, its tooltip, and whether it is text (left) rather than a number (right)."""

    markup: str
    tip: str = ""
    words: bool = False


def document(title: str, kicker: str, tiles: str, sections: Iterable[str]) -> str:
    """A whole page that refers to nothing outside itself.

    Args:
        title: its heading, plain text.
        kicker: the line above the heading, plain text.
        tiles: markup under the heading.
        sections: markup; empty ones are left out.
    """
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'><title>{escape(title)}</title>"
    header = f"<header><p class='kicker'>{escape(kicker)}</p><h1>{escape(title)}</h1>{tiles}</header>"
    body = "\n".join(part for part in (header, *sections) if part)
    return f"<!DOCTYPE html>\n<html lang='en'><head>{head}<style>{_STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"


def section(title: str, body: str) -> str:
    """A headed section, or nothing if its body is empty."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def figure(picture: Picture | None, caption: str) -> str:
    """A picture with its caption (plain text), or nothing if there is no picture."""
    return f"<figure>{picture.svg()}<figcaption>{escape(caption)}</figcaption></figure>" if picture else ""


def pair(figures: str) -> str:
    """Figures side by side where there is room."""
    return f"<div class='pair'>{figures}</div>" if figures else ""


def tiles(values: Mapping[str, str | None]) -> str:
    """Figures at a glance: name -> text; None is left out."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in values.items() if text is not None)
    return f"<dl class='tiles'>{items}</dl>" if items else ""


def sentences(markup: Sequence[str]) -> str:
    """A list of sentences, given as markup."""
    return f"<ul class='verdicts'>{''.join(f'<li>{text}</li>' for text in markup)}</ul>" if markup else ""


def notes(texts: Mapping[str, str]) -> str:
    """Explanations: term -> plain text."""
    return f"<dl class='notes'>{''.join(f'<dt>{escape(term)}</dt><dd>{escape(text)}</dd>' for term, text in texts.items())}</dl>"


def facts(values: Mapping[str, str]) -> str:
    """Names and plain texts; empty ones are left out."""
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in values.items() if text)
    return f"<dl class='facts'>{items}</dl>" if items else ""


def table(head: Sequence[Cell], rows: Iterable[tuple[Sequence[Cell], str]]) -> str:
    """A table from its head's cells and (cells, class) per row."""

    def line(cells: Sequence[Cell], tag: str) -> str:
        return "".join(
            f"<{tag}{_attribute('class', 'text' if c.words else '')}{_attribute('title', c.tip)}>{c.markup}</{tag}>" for c in cells
        )

    body = "".join(f"<tr{_attribute('class', kind)}>{line(cells, 'td')}</tr>" for cells, kind in rows)
    return f"<div class='scroll'><table><thead><tr>{line(head, 'th')}</tr></thead><tbody>{body}</tbody></table></div>"


def share_text(share: float) -> str:
    """A share as a percentage: 0.504 -> "50.4 %"."""
    return f"{percent_text(share)} %"


def listed(values: Mapping[str, Any] | None) -> str:
    """Names and values side by side: "cores 2, ram 23.5 GiB, gpus H200 (140 GiB)"; what is null or empty is left out."""
    texts = []
    for name, value in (values or {}).items():
        if name == "gpus":  # [name, bytes of memory] of each
            value = " + ".join(f"{gpu} ({bytes_text(memory)})" for gpu, memory in value)
        if value not in (None, [], (), ""):
            texts.append(f"{name.removesuffix('_bytes')} {bytes_text(value)}" if name.endswith("_bytes") else f"{name} {value}")
    return ", ".join(texts)


def run_facts(report: Mapping[str, Any]) -> dict[str, str]:
    """What somebody needs to make the report again, and to know which saved values it belongs to."""
    return {
        "created": str(report.get("created") or ""),
        "command": " ".join(map(str, report.get("command") or ())),
        "versions": listed(report.get("versions")),
        "hardware": listed(report.get("hardware")),
        "profile": ", ".join(_profile_facts(report.get("profile") or {})),
        "placement": ", ".join(_placement_facts(report.get("placement") or {})),
    }


def estimated_on(profile: Mapping[str, Any]) -> str:
    """On which inputs the profile's figures are estimated, and what that does to them."""
    if profile.get("fresh_inputs"):
        return (
            f"Hot inputs: on {profile['fresh_inputs']:,} inputs that were not counted. Coverage: on the counted accesses themselves, so a "
            "little high."
        )
    return "Both on the very inputs that were counted, so too high where hot rows were seen only once or twice."


def _profile_facts(profile: Mapping[str, Any]) -> Iterator[str]:
    if profile.get("fingerprint"):
        yield str(profile["fingerprint"])
    if profile.get("source"):
        yield f"of {profile['source']}"
    if profile.get("num_samples") is not None and profile.get("total_samples"):
        yield f"{profile['num_samples']:,} of {profile['total_samples']:,} train samples counted"
    if profile.get("seed") is not None:
        yield f"seed {profile['seed']}"
    for file, lines in (profile.get("skipped") or {}).items():
        yield f"{lines:,} malformed lines of {file} skipped"


def _placement_facts(placement: Mapping[str, Any]) -> Iterator[str]:
    if placement.get("fingerprint"):
        yield str(placement["fingerprint"])
    if placement.get("policy"):
        yield f"selected by {placement['policy']}"
    if placement.get("budget_bytes") is not None:
        yield f"budget {placement['budget_bytes']:,} bytes per rank"
    if placement.get("used_bytes") is not None:
        yield f"{placement['used_bytes']:,} used"
    if placement.get("threshold") is not None:
        yield f"rows with at least {placement['threshold']:.3g} % of their table's accesses are hot"
    if placement.get("pinned"):
        yield f"always hot: {', '.join(map(str, placement['pinned']))}"


def _attribute(name: str, value: str) -> str:
    return f' {name}="{escape(value)}"' if value else ""
