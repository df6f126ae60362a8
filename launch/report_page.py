"""The report's page: one HTML file with its style and pictures inside, and no script."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from html import escape

from evals.protocol import Row
from evals.results import ahead_of, beside_each_other, columns, format_cell, not_ahead, num_trainings, summarise

STYLE = """
:root { color-scheme: light dark; --ink: #1c1f24; --soft: #5d6570; --line: #e3e6eb; --paper: #f6f7f9; --card: #fff;
  --good: #1d7a46; --bad: #b3261e; --bad-paper: #fdf1ef; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --soft: #9aa4b2; --line: #323843; --paper: #14171c; --card: #1d2128;
    --good: #4cc38a; --bad: #ff8f80; --bad-paper: #33211f; }
  img { border-radius: 6px; } section > img, .pictures img { padding: 8px; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.55 system-ui, sans-serif; }
main { max-width: 1260px; margin: 0 auto; padding: 36px 24px 64px; }
header h1 { margin: 0; font-size: 28px; letter-spacing: -0.01em; }
header p { margin: 2px 0 20px; color: var(--soft); }
h2 { font-size: 18px; margin: 0 0 4px; } h3 { font-size: 15px; margin: 14px 0 4px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px 22px;
  margin: 18px 0; }
section > p { margin: 0 0 12px; color: var(--soft); max-width: 110ch; }
section > p:last-child { margin-bottom: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 12px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px; }
.tile b { display: block; font-size: 17px; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 12.5px; }
img { display: block; max-width: 100%; height: auto; background: #fff; }
.pictures { display: flex; flex-wrap: wrap; gap: 18px 26px; }
figure { margin: 6px 0 0; max-width: 100%; } figcaption { color: var(--soft); font-size: 13px; margin-bottom: 4px; }
.status { border-left: 4px solid var(--good); } .status.alarm { border-left-color: var(--bad); }
.alarm h2 { color: var(--bad); }
ul { margin: 6px 0 0; padding-left: 20px; } li { margin: 3px 0; max-width: 110ch; }
table { border-collapse: collapse; font-size: 13.5px; }
th, td { text-align: left; padding: 4px 18px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
.results th, .results td { padding: 5px 14px; white-space: nowrap; }
.results th + th + th, .results .value { text-align: right; }
.results .best { font-weight: 700; }
.results .behind td { background: var(--bad-paper); }
.results .behind td:first-child { box-shadow: inset 3px 0 var(--bad); }
.results .ahead { color: var(--bad); }
.results small { color: var(--bad); font-size: 12px; }
.results .metric { color: var(--soft); }
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
    "learning": (
        "Learning curve",
        "The frozen encoder's checkpoints under the same probes. Step 0: the untrained encoder; band: ± one standard "
        "deviation; dashed: raw pixels with the same probe.",
    ),
    "loss": ("Loss", "Total and terms; faint: every logged step, bold: running mean."),
    "diagnostics": (
        "Health",
        "Measures of collapse per supervised level (pale: shallow block, dark: deep). Dotted red: the fixed bounds of "
        "the alarms, which are exempt during warm-up.",
    ),
    "throughput": ("Throughput", "A share of time waiting for data well above 0 means that decoding is the brake."),
    "schedules": ("Schedules", "All are functions of the step alone."),
}


MISSING = {"learning": "No checkpoint on the way was evaluated."}

REFERENCES = (
    "untrained: the same encoder at its initialisation; rgb: the pixels and the position of each token; "
    "rgb_difference: the same and the change inside each tubelet, a reference made by hand."
)


def page(
    *,
    title: str,
    subtitle: str,
    tiles: Mapping[str, str],
    alarms: Sequence[str],
    figures: Mapping[str, str],
    pictures: Mapping[str, str],
    notes: Sequence[str],
    evals: Sequence[Row],
    predictions: Mapping[str, str],
    facts: Mapping[str, str],
    config: str,
) -> str:
    """The whole page. `figures` (keys of TITLES), `predictions` and `pictures` (captions) hold data URLs.

    All text is escaped here.
    """
    return document(
        title,
        subtitle,
        _tiles(tiles),
        _status(alarms),
        _evals(evals),
        _figure_section("learning", figures) if evals else "",
        _predictions(predictions),
        *(_figure_section(name, figures) for name in ("loss", "diagnostics")),
        _pictures(pictures, notes),
        _section("How to read this", _list(HOW_TO_READ)),
        *(_figure_section(name, figures) for name in ("throughput", "schedules")),
        _section("What it ran on", _table([], list(facts.items()))) if facts else "",
        _section("Configuration", f"<details><summary>config.yaml</summary><pre>{escape(config)}</pre></details>"),
    )


def chain_page(
    *, title: str, subtitle: str, stages: Sequence[Mapping[str, str]], links: Mapping[str, str], evals: Sequence[Row]
) -> str:
    """The page about a chain: its stages (a line each, with the same columns), the table of all, the stages' pages."""
    names = list(stages[0]) if stages else []
    pages = "".join(f'<li><a href="{escape(link)}">{escape(stage)}</a></li>' for stage, link in links.items())
    return document(
        title,
        subtitle,
        _section("Stages", f'<div class="wide">{_table(names, [list(each.values()) for each in stages])}</div>'),
        _stages_beside_each_other(evals),
        _section("Pages of the stages", f"<ul>{pages}</ul>") if links else "",
    )


def document(title: str, subtitle: str, *parts: str) -> str:
    """A whole page of the parts that are not empty."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    header = f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>"
    body = "\n".join(part for part in (header, *parts) if part)
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
        return _section(title, "", MISSING.get(name, "The run logged nothing of this."))
    return _section(title, f'<img src="{figures[name]}" alt="{escape(title)}">', lead)


def _predictions(pictures: Mapping[str, str]) -> str:
    if not pictures:
        return ""
    lead = "Test clips under probes on frozen features, beside the truth."
    return _section("Predictions", f'<div class="pictures">{_figures(pictures)}</div>', lead)


def _pictures(pictures: Mapping[str, str], notes: Sequence[str]) -> str:
    lead = (
        "Frames of clips of the run, and under them the three main directions of the encoder's patch features as "
        "colours: patches of one colour are alike to the encoder. Look for regions that follow things and keep their "
        "colour from frame to frame, and compare with the untrained encoder."
    )
    body = f'<div class="pictures">{_figures(pictures)}</div>' if pictures else ""
    return _section("What the encoder sees", body + (_list(notes) if notes else ""), lead)


def _figures(pictures: Mapping[str, str]) -> str:
    return "".join(
        f'<figure><figcaption>{escape(caption)}</figcaption><img src="{url}" alt="{escape(caption)}"></figure>'
        for caption, url in pictures.items()
    )


# -------------------------------------------------------------------------------------------- the table of evaluations


def _evals(rows: Sequence[Row]) -> str:
    """A table for each stage."""
    by_stage: dict[str, list[Row]] = {}
    for row in rows:
        if row.step is None:
            by_stage.setdefault(row.stage, []).append(row)
    if not by_stage:
        return _section("Evaluation", "", "The frozen encoder has not been evaluated: python -m launch.evaluate RUN")
    body = ""
    for stage, measured in by_stage.items():
        heading = f"<h3>{escape(stage)}</h3>" if len(by_stage) > 1 else ""
        body += f"{heading}<p>{escape(_caption(measured))}</p>{_results(measured)}"
    return _section("Evaluation", body, f"Probes on the frozen encoder and on its references. {REFERENCES}")


def _stages_beside_each_other(rows: Sequence[Row]) -> str:
    """One table of all stages, each beside the one before it, and what is not ahead of what."""
    if not rows:
        return _section("Evaluation", "", "The stages have not been evaluated: python -m launch.evaluate FOLDER")
    table = beside_each_other(rows)
    body = f"<p>Mean ± sample standard deviation {escape(_over(table))}. Bold: the best of a line.</p>{_results(table)}"
    lead = f"Probes on the frozen encoder of each stage and on its references. {REFERENCES}"
    return _section("Evaluation", body + _list(not_ahead(rows)), lead)


def _caption(rows: Sequence[Row]) -> str:
    """What the means and spreads of a table are, and its marks."""
    return (
        f"Mean ± sample standard deviation {_over(rows)}; a single value has no ±. Bold: the best of a line. Marked in "
        "red: lines in which a reference is as good as the trained encoder or better."
    )


def _over(rows: Sequence[Row]) -> str:
    """Over what the means and spreads of a table are taken."""
    trainings = num_trainings(rows)
    if trainings < 2:
        over = f"over probe seeds {', '.join(map(str, sorted({row.seed for row in rows})))} of one training"
    else:
        over = f"over {trainings} trainings, for each of which the mean over its probe seeds is taken first"
        seeds = {model: {row.training_seed for row in rows if row.model == model} for model in columns(rows)}
        once = [model for model, found in seeds.items() if len(found) == 1]
        over += f" ({', '.join(once)}: over probe seeds, no training changes them)" if once else ""
    return over


def _results(rows: Sequence[Row]) -> str:
    """A line per task, a column per model; what beats the trained encoder is named in its line."""
    models, facts = columns(rows), {row.task: row for row in rows}
    beaten = ahead_of(rows)
    lines = [
        _result_line(facts[task], by_model, models, [model for model in models if task in beaten.get(model, [])])
        for task, by_model in summarise(rows).items()
    ]
    head = "".join(f"<th>{escape(name)}</th>" for name in ("task", "metric", *models))
    return f'<div class="wide"><table class="results"><tr>{head}</tr>{"".join(lines)}</table></div>'


def _result_line(row: Row, by_model: Mapping[str, Sequence[float]], models: Sequence[str], ahead: Sequence[str]) -> str:
    means = {model: statistics.fmean(values) for model, values in by_model.items()}
    best = (max if row.higher_is_better else min)(means.values())
    mark = f"<br><small>trained is not ahead of {escape(', '.join(ahead))}</small>" if ahead else ""
    cells = f'<td>{escape(row.task)}{mark}</td><td class="metric">{escape(row.metric)}</td>'
    for model in models:
        kinds = ["value", *(["best"] if means.get(model) == best else []), *(["ahead"] if model in ahead else [])]
        cells += f'<td class="{" ".join(kinds)}">{format_cell(by_model[model]) if model in by_model else ""}</td>'
    return f'<tr class="behind">{cells}</tr>' if ahead else f"<tr>{cells}</tr>"


# ----------------------------------------------------------------------------------------------------- pieces of a page


def _list(texts: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "<tr>" + "".join(f"<th>{escape(name)}</th>" for name in head) + "</tr>" if head else ""
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{top}{lines}</table>"
