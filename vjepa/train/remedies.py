"""What to change where features look collapsed, by what ails them and by what was to prevent it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

Illness = Literal["constant", "narrow", "blind", "unpredictable"]  # blind: to the clip; all that is told is place

PLAIN_TERMS = {"masked_prediction", "context_prediction"}  # alone with an online target they collapse
EMA = "lower train.optim.lr.peak or raise objective.momentum (0.99 to 0.9995 are known to learn)"
SIGREG = "raise objective.terms.sigreg.weight (0.01 to 0.2 is usual; with scale=n it acts as weight x global samples)"
COVER = (
    "its embedding.levels must cover this level; statistics of clips' means, or behind a projector's batch "
    "normalisation, may look well while tokens are constant: try embedding.projector=null and pool=place"
)
POOL = "embedding.pool=place asks clips apart at each place; pooled over tokens, variance over places is enough"
OUTWEIGHS = "the statistics may outweigh the prediction: lower objective.terms"
UNHELD = {"online": "nothing holds the features up: set objective.target=ema, or add the term sigreg or vicreg"}
GENERAL = {"": "lower lr or raise the EMA momentum", "ema": EMA, **UNHELD}

REMEDIES: dict[Illness, dict[str, str]] = {  # "": where it is not known what is to prevent it
    "constant": GENERAL
    | {"sigreg": f"{SIGREG}; {COVER}", "vicreg": f"raise objective.terms.vicreg.variance (25 is usual); {COVER}"},
    "narrow": GENERAL
    | {
        "sigreg": f"{SIGREG}; {COVER}",
        "vicreg": "raise objective.terms.vicreg.covariance (its variance is content with copies of one direction); "
        + COVER,
    },
    "blind": GENERAL
    | {"sigreg": f"{SIGREG}; {POOL}", "vicreg": f"raise objective.terms.vicreg.variance (25 is usual); {POOL}"},
    "unpredictable": {
        "": "lower lr; where statistics of the features are a term of the loss, lower its weight",
        "ema": f"the target may move faster than the predictor learns: {EMA}",
        "sigreg": f"{OUTWEIGHS}.sigreg.weight",
        "vicreg": f"{OUTWEIGHS}.vicreg.weight",
    },
}


def prevention(target: str, terms: Iterable[str]) -> tuple[str, ...]:
    """What is to keep the features from a constant, as `REMEDIES` calls it, by an objective's target and its terms."""
    names = set(terms)
    held = tuple(name for name in ("sigreg", "vicreg") if name in names)
    if target == "ema":
        return ("ema", *held)
    return ("online",) if target == "online" and names <= PLAIN_TERMS else held


def remedy(illness: Illness, held_by: Iterable[str] = ()) -> str:
    """What to change, in words; `held_by` as `prevention` says."""
    known = REMEDIES[illness]
    advice = [known[name] for name in held_by if name in known] or [known[""]]
    return f"{'; '.join(advice)}, and start again from a checkpoint before the fall"
