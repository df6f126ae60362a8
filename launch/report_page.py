"""The report's page: one HTML file with its style and pictures inside, and no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
:root { --ink: #1c1f24; --soft: #5d6570; --line: #e3e6eb; --paper: #f6f7f9; --good: #1d7a46; --bad: #b3261e; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.55 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 36px 24px 64px; }
header h1 { margin: 0; font-size: 28px; letter-spacing: -0.01em; }
header p { margin: 2px 0 20px; color: var(--soft); }
h2 { font-size: 18px; margin: 0 0 4px; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 20px 22px; margin: 18px 0; }
section > p { margin: 0 0 12px; color: var(--soft); max-width: 84ch; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; }
.tile { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; }
.tile b { display: block; font-size: 19px; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 12.5px; }
img { display: block; max-width: 100%; height: auto; }
.pictures { display: flex; flex-wrap: wrap; gap: 18px 26px; }
figure { margin: 6px 0 0; } figcaption { color: var(--soft); font-size: 13px; margin-bottom: 4px; }
.status { border-left: 4px solid var(--good); } .status.alarm { border-left-color: var(--bad); }
.alarm h2 { color: var(--bad); }
ul { margin: 6px 0 0; padding-left: 20px; } li { margin: 3px 0; max-width: 96ch; }
table { border-collapse: collapse; font-size: 13.5px; }
th, td { text-align: left; padding: 4px 18px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
pre { overflow-x: auto; font-size: 12.5px; background: var(--paper); padding: 12px; border-radius: 8px; }
summary { cursor: pointer; font-weight: 600; }
"""

HOW_TO_READ = (
    "A falling loss is no sign of health here: the targets come from the network itself, so a network that maps every "
    "clip to one point predicts perfectly. A healthy run often shows a loss that falls, then rises again while the "
    "features become informative.",
    "Watch the curves under Health. Mean cosine near 1: all features point the same way. RankMe near 1: they fill one "
    "dimension; what counts is a fall from an earlier value, not the value itself. Feature std far below its earlier "
    "values: they hardly vary.",
    "Cross-sample gap: how much better a prediction fits its own clip than another clip at the same place. Near 0 the "
    "targets say nothing about the clip (complete or positional collapse); it should rise above about 0.1.",
    "The cosine of target and prediction rises with learning and with collapse alike: read it beside the gap.",
    "The first part of an EMA run looks like collapse (cosine up, gap near 0): alarms start after the warm-up.",
)

TITLES = {
    "loss": ("Loss", "Total and terms; faint: every logged step, bold: running mean."),
    "diagnostics": (
        "Health",
        "Measures of collapse per supervised level (pale: shallow block, dark: deep). Dotted red: the fixed bounds of "
        "the alarms, which are exempt during warm-up.",
    ),
    "throughput": ("Throughput", "A share of time waiting for data well above 0 means that decoding is the brake."),
    "schedules": ("Schedules", "All are functions of the step alone."),
}


def page(
    *,
    title: str,
    subtitle: str,
    tiles: Mapping[str, str],
    alarms: Sequence[str],
    figures: Mapping[str, str],
    pictures: Mapping[str, str],
    notes: Sequence[str],
    evals: Sequence[Mapping[str, Any]],
    facts: Mapping[str, str],
    config: str,
) -> str:
    """The whole page. `figures` (keys of TITLES) and `pictures` (captions) hold data URLs; all text is escaped here."""
    parts = [
        f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>",
        _tiles(tiles),
        _status(alarms),
        *(_figure_section(name, figures) for name in ("loss", "diagnostics")),
        _pictures(pictures, notes),
        _evals(evals),
        _section("How to read this", _list(HOW_TO_READ)),
        *(_figure_section(name, figures) for name in ("throughput", "schedules")),
        _section("What it ran on", _table([], list(facts.items()))) if facts else "",
        _section("Configuration", f"<details><summary>config.yaml</summary><pre>{escape(config)}</pre></details>"),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = "\n".join(part for part in parts if part)
    head = f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>'
    return f"{head}\n<body><main>\n{body}\n</main></body></html>\n"


def _section(title: str, body: str, lead: str = "", kind: str = "") -> str:
    lead = f"<p>{escape(lead)}</p>" if lead else ""
    return f'<section class="{kind}"><h2>{escape(title)}</h2>{lead}{body}</section>'


def _tiles(tiles: Mapping[str, str]) -> str:
    cells = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in tiles.items()
    )
    return f'<div class="tiles">{cells}</div>'


def _status(alarms: Sequence[str]) -> str:
    if not alarms:
        return _section("No collapse alarm", "", "No measure crossed its bound after the warm-up.", "status")
    return _section(f"{len(alarms)} collapse alarm(s)", _list(alarms), "", "status alarm")


def _figure_section(name: str, figures: Mapping[str, str]) -> str:
    title, lead = TITLES[name]
    if name not in figures:
        return _section(title, "", "The run logged nothing of this.")
    return _section(title, f'<img src="{figures[name]}" alt="{escape(title)}">', lead)


def _pictures(pictures: Mapping[str, str], notes: Sequence[str]) -> str:
    body = "".join(
        f'<figure><figcaption>{escape(caption)}</figcaption><img src="{url}" alt="{escape(caption)}"></figure>'
        for caption, url in pictures.items()
    )
    lead = (
        "Frames of clips of the run, and under them the three main directions of the encoder's patch features as "
        "colours: patches of one colour are alike to the encoder. Look for regions that follow things and keep their "
        "colour from frame to frame, and compare with the untrained encoder."
    )
    return _section(
        "What the encoder sees", f'<div class="pictures">{body}</div>' + (_list(notes) if notes else ""), lead
    )


def _evals(evals: Sequence[Mapping[str, Any]]) -> str:
    if not evals:
        return ""
    names = list(dict.fromkeys(name for row in evals for name in row))
    return _section("Evaluations", _table(names, [[str(row.get(name, "")) for name in names] for row in evals]))


def _list(texts: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "<tr>" + "".join(f"<th>{escape(name)}</th>" for name in head) + "</tr>" if head else ""
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{top}{lines}</table>"
