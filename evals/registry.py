"""Every evaluation by its name: its kind, its recipe, and where its set lies. `find` is all that a caller needs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.dense_config import RECIPES
from evals.evaluations import Attentive, Dense, Evaluation, Labelled, Tracking
from evals.pooled import Pooled
from evals.pooled_config import list_pooled
from evals.probe_config import list_recipes
from evals.suites import SUITES
from evals.videos import DatasetName
from vjepa.config import ConfigError

VIDEO_SETS: tuple[DatasetName, ...] = ("davis2016", "davis2017", "youtube_vos")
FOLDERS: Mapping[str, tuple[str, ...]] = {  # what a set's own folder may be called, besides the evaluation's name
    "ade20k": ("ADEChallengeData2016",),
    "cityscapes": ("Cityscapes",),
    "voc12": ("VOCdevkit", "VOC2012"),
    "camvid": ("CamVid",),
    "nyuv2": ("nyu_depth_v2", "NYUv2"),
    "kitti": ("KITTI",),
    "rgbd": ("rgbd_7scenes",),
    "davis2016": ("DAVIS", "DAVIS2016"),
    "davis2017": ("DAVIS", "DAVIS2017"),
    "youtube_vos": ("YouTube-VOS/train", "youtube_vos/train", "YouTubeVOS/train"),
    "ssv2": ("something-something-v2", "SSv2"),
    "ssv2_384": ("ssv2", "something-something-v2", "SSv2"),
    "k400": ("kinetics400", "k400", "Kinetics400"),
    "diving48": ("Diving48", "diving48_v2"),
    "coin": ("COIN",),
    "jester": ("20bn-jester", "Jester"),
    "in1k": ("imagenet", "ImageNet", "ILSVRC2012"),
    "ek100": ("EPIC-KITCHENS", "epic-kitchens-100"),
}
DENSE = ("ade20k", "cityscapes", "voc12", "camvid", "nyuv2", "kitti", "rgbd", *VIDEO_SETS)
GLOBAL = ("ssv2", "k400", "diving48", "coin", "jester", "in1k", "ek100")
POOLED = tuple(list_pooled())  # questions to files of one's own, which have no folder of their own and are not in `all`
GROUPS: Mapping[str, tuple[str, ...]] = {
    "dense": DENSE, "global": GLOBAL, "pooled": POOLED, "all": (*DENSE, *GLOBAL),
}  # fmt: skip


def _recipes_of(task: str) -> list[str]:
    return sorted(path.stem for path in (RECIPES / task).glob("*.yaml"))


LOADERS: dict[str, Any] = {
    **dict.fromkeys(_recipes_of("segmentation"), Dense.segmentation),
    **dict.fromkeys(_recipes_of("depth"), Dense.depth),
    **dict.fromkeys(VIDEO_SETS, Tracking.load),
    **dict.fromkeys(list_recipes(), Attentive.load),
    **dict.fromkeys(SUITES, Labelled.load),
    **dict.fromkeys(POOLED, Pooled.load),
}


def names_of(suites: str) -> list[str]:
    """The evaluations that groups (`dense`, `all`, ...) or names with commas between them stand for, each once."""
    found: dict[str, None] = {}
    for name in filter(None, (part.strip() for part in suites.split(","))):
        if name not in GROUPS and name not in LOADERS:
            close = difflib.get_close_matches(name, [*GROUPS, *LOADERS], n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(
                f"--suite {name}: there is no such evaluation.{hint} Groups: {', '.join(GROUPS)}; "
                f"evaluations: {', '.join(LOADERS)}"
            )
        found |= dict.fromkeys(GROUPS.get(name, (name,)))
    if not found:
        raise ConfigError("--suite names no evaluation")
    return list(found)


def find(suites: str, overrides: Sequence[str]) -> list[Evaluation]:
    """The evaluations of `suites` under overrides: data.root=DIR for all, NAME.key=value for one.

    Where there is one evaluation alone, key=value is its own. A set lies in DIR/NAME, or under the name its makers gave
    it; NAME.data.root=DIR says it for one. Those of `pooled` read DIR itself. Raises ConfigError.
    """
    names = names_of(suites)
    base, own = _sort_overrides(names, overrides)
    found: list[Evaluation] = []
    for name in names:
        mine = own[name]
        if not any(each.startswith("data.root=") for each in mine):
            if base is None:
                raise ConfigError(
                    f"{name}: where does its set lie? Give data.root=DIR, the folder that holds all sets, or "
                    f"{name}.data.root=DIR"
                )
            mine = [f"data.root={folder_of(name, base)}", *mine]
        found.append(_load(name, mine))
    return found


def _load(name: str, overrides: Sequence[str]) -> Evaluation:
    try:
        return LOADERS[name](name, overrides)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def _sort_overrides(names: Sequence[str], overrides: Sequence[str]) -> tuple[Path | None, dict[str, list[str]]]:
    """The folder that holds the sets, and each evaluation's own overrides."""
    base, own = None, {name: [] for name in names}
    for override in overrides:
        key, equals, value = override.partition("=")
        owner, _, rest = key.partition(".")
        if not equals or not key:
            raise ConfigError(f"{override!r} is no override: write key=value, for example data.root=DIR")
        if key == "data.root":
            base = Path(value)
        elif owner in own:
            own[owner].append(f"{rest}={value}")
        elif asked := [name for name in GROUPS.get(owner, ()) if name in own]:  # pooled.clips.size=128: for all of it
            for name in asked:
                own[name].append(f"{rest}={value}")
        elif len(names) == 1 and owner not in LOADERS:
            own[names[0]].append(override)
        else:
            raise ConfigError(
                f"{override!r}: whose is it? Write NAME.key=value with one of the evaluations that are asked for: "
                f"{', '.join(names)}"
            )
    return base, own


def folder_of(name: str, base: Path) -> Path:
    """Where the set of an evaluation lies below `base`: the first of its names that is there, or where it should be."""
    if name in POOLED:
        return base
    places = [base / each for each in (name, *FOLDERS.get(name, ()))]
    return next((place for place in places if place.is_dir()), places[0])
