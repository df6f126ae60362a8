"""`python -m vjepa.demo collapse`: six objectives on one task, and which of them keep their embeddings alive."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vjepa.demo.collapse import Outcome, run
from vjepa.demo.objectives import OBJECTIVES

STEPS = 200
UNTRAINED = "untrained"
COLUMNS = {  # measure -> heading
    "feature_std": "std",
    "normalised_std": "norm. std",
    "mean_cosine": "cosine",
    "rankme": "RankMe",
    "cross_sample_gap": "gap",
    "nmse": "nMSE",
    "position_r2": "place R2",
    "prediction_loss": "loss",
}
LEGEND = """\
std        standard deviation of the embeddings over samples, mean over 32 dimensions; see also norm. std
norm. std  the same of unit vectors, times sqrt(32): 1 at best, 0 where all point one way; below 0.3 is collapse
cosine     mean over pairs of samples; above 0.95 is collapse
RankMe     effective rank without centring, 1 to 32; below 3 is collapse
gap        how much nearer a prediction is to its own target than to another clip's; below 0.02 is collapse
nMSE       squared error of the prediction over the targets' variance; above 1 is collapse
place R2   where the digit is, by ridge regression from one embedding; not judged: it does not see scale
loss       mean squared error of the prediction; not judged: it is lowest where all has collapsed
std below a tenth of the untrained encoder's is collapse too."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, 0 whatever the verdicts."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    if parsed.json is not None and not parsed.json.parent.is_dir():
        parser.error(f"--json {parsed.json}: there is no folder {parsed.json.parent}; make it first")
    outcomes = []
    print(header(), flush=True)
    for seed in parsed.seed:
        for name in parsed.objective:
            outcomes.append(run(name, steps=parsed.steps, seed=seed))
            print("\n".join(rows(outcomes[-1], with_untrained=name == parsed.objective[0])), flush=True)
    print(f"\n{LEGEND}\n\n{verdicts(outcomes)}")
    if parsed.json is not None:
        parsed.json.write_text(json.dumps([_record(outcome) for outcome in outcomes], indent=1) + "\n")
    return 0


def header() -> str:
    """The table's first line."""
    return "".join([f"{'objective':10}{'seed':>5}", *(f"{heading:>11}" for heading in COLUMNS.values()), f"{'s':>6}"])


def rows(outcome: Outcome, *, with_untrained: bool) -> list[str]:
    """The table's line of a training, after that of its start where that is wanted."""
    before = _row(UNTRAINED, outcome.seed, outcome.untrained, "")
    after = _row(outcome.objective, outcome.seed, outcome.measures, f"{outcome.seconds:.0f}")
    return [before, after] if with_untrained else [after]


def verdicts(outcomes: Sequence[Outcome]) -> str:
    """What each objective is, and what the rules say of its embeddings."""
    return "\n".join(
        f"{outcome.objective} (seed {outcome.seed}): {OBJECTIVES[outcome.objective].about}\n    {outcome.verdict}"
        for outcome in outcomes
    )


def _row(name: str, seed: int, measures: dict[str, float], seconds: str) -> str:
    cells = "".join(f"{_number(measures[measure]):>11}" for measure in COLUMNS)
    return f"{name:10}{seed:5}{cells}{seconds:>6}"


def _number(value: float) -> str:
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3f}"


def _record(outcome: Outcome) -> dict[str, object]:
    return dataclasses.asdict(outcome) | {"is_collapsed": outcome.is_collapsed, "verdict": outcome.verdict}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m vjepa.demo", description=(__doc__ or "").strip())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    collapse = commands.add_parser("collapse", help="train toy networks with and without a prevention of collapse")
    collapse.add_argument(
        "--objective", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES), help="which ones (default: all)"
    )
    collapse.add_argument(
        "--steps",
        type=_positive,
        default=STEPS,
        help=f"of training, each (default: {STEPS}); under about 50 healthy objectives may read collapsed",
    )
    collapse.add_argument("--seed", type=int, nargs="+", default=[0], help="one training per seed (default: 0)")
    collapse.add_argument("--json", type=Path, metavar="FILE", help="write all measures and verdicts there as well")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
