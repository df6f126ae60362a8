"""Do the demo's verdicts tell collapsed embeddings from healthy ones? Expected against found, over seeds.

    python -m tests.benchmarks.collapse_confusion [--seeds 5] [--steps 200] [--out FILE.jsonl]

What is expected is the reference's reading (collapse prevention, 5a): without a prevention, and with a stop-gradient
alone, embeddings collapse. Prints a line per training, the confusion table and how far the values lie from the limits.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from vjepa.demo.__main__ import STEPS
from vjepa.demo.collapse import Outcome, run
from vjepa.demo.objectives import OBJECTIVES

COLLAPSES = ("none", "sg")
JUDGED = ("mean_cosine", "rankme", "cross_sample_gap", "feature_std", "normalised_std", "nmse")


def confusion(outcomes: Sequence[Outcome]) -> str:
    """Counts of found verdicts by what was expected."""
    counts = Counter((outcome.objective in COLLAPSES, outcome.is_collapsed) for outcome in outcomes)
    lines = [f"{'expected':12}{'found collapsed':>17}{'found healthy':>15}"]
    for expected, word in ((True, "collapsed"), (False, "healthy")):
        lines.append(f"{word:12}{counts[expected, True]:17}{counts[expected, False]:15}")
    return "\n".join(lines)


def ranges(outcomes: Sequence[Outcome]) -> str:
    """Smallest and largest value of every judged measure, by objective."""
    lines = ["".join([f"{'objective':10}", *(f"{name:>21}" for name in JUDGED)])]
    for objective in OBJECTIVES:
        found = [outcome.measures for outcome in outcomes if outcome.objective == objective]
        cells = [(min(row[name] for row in found), max(row[name] for row in found)) for name in JUDGED]
        lines.append("".join([f"{objective:10}", *(f"{f'{low:.3g} to {high:.3g}':>21}" for low, high in cells)]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, help="one JSON line per training")
    arguments = parser.parse_args()
    outcomes = []
    for seed in range(arguments.seeds):
        for objective in OBJECTIVES:
            outcome = run(objective, steps=arguments.steps, seed=seed)
            outcomes.append(outcome)
            print(f"{objective:8} seed {seed}  {outcome.seconds:4.0f} s  {outcome.verdict}", flush=True)
            if arguments.out is not None:
                with arguments.out.open("a") as file:
                    file.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
    print(f"\n{confusion(outcomes)}\n\n{ranges(outcomes)}")


if __name__ == "__main__":
    main()
