"""The configuration of one run: every room's dataclasses side by side, and where recipes lie."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from omegaconf import DictConfig, OmegaConf

from data_pipeline.config import DataConfig
from evals.suites import SUITES
from vjepa.config import ConfigError, ModelConfig, PredictorSettings, config_hash, merge, read_recipe, to_object
from vjepa.masking.collate import GroupConfig, MaskConfig, micro_batches_per_step
from vjepa.nn.encoder import EncoderConfig
from vjepa.objectives import JEPA, ObjectiveConfig, build_objective
from vjepa.objectives.regularisers import InvarianceConfig, Regulariser
from vjepa.train.config import TrainConfig

RECIPES = Path(__file__).parent / "recipes"
MAKERS = ("none", "debug", "digits", "fine_digits", "real")  # of data, see launch/prepare.py
ALIASES = {"vitg16": "vit_giant", "vitG16": "vit_gigantic", "vitl16": "vit_large"}  # command line only
FOLLOWED = ("teacher", "start")
# What may change between the segments of one run: nothing that alters numbers.
FREE_ON_RESUME = (
    "run_dir",
    "in_chain",
    "follows",
    "check_memory",
    "report",
    "evals",
    "objective.teacher.cache",  # its numbers are those of objective.teacher.cache_dtype, with a folder or without
    "data.workers",
    "data.prefetch",
    "data.sample_timeout",
    "data.worker_timeout",
    "data.worker_growth_gb",
    "data.decode_isolated",
    "data.max_bad_fraction",
    "data.remote",
    "data.cache",
    "data.*.sources.*.path",  # shards may move; their names stay
    "train.device",
    "train.micro_batch",
    "train.log_every",
    "train.tensorboard",
    "train.checkpoint",
    "train.collective_timeout_s",
    "train.health",
    "train.alarms",
    "train.watchdog",
    "train.profile",
    "train.parallel",
)


@dataclass
class SuiteConfig:
    """An evaluation suite of a run: `python -m launch.evaluate RUN`."""

    data: str  # folder with a shard folder for each split of the suite
    seeds: int = 3  # times every probe is fitted
    curve: bool = True  # of the checkpoints on the way too

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"evals: seeds={self.seeds} must be at least 1")


@dataclass
class RunConfig:
    """One stage of one recipe."""

    recipe: str = ""  # set from the command line
    stage: str = ""  # set from the command line
    run_dir: str = "runs/${recipe}"  # where everything about the run goes
    prepare: dict[str, str] = field(default_factory=dict)  # SOURCE: who makes its shards where there are none yet
    init_from: str | None = None  # new run from the weights of a run, an exported folder or a released .pt file
    init_predictor: bool = False  # of an exported folder or released file too; from a run it always comes along
    init_optimizer: Literal["fresh", "carry"] = "fresh"  # carry: AdamW's averages of the run of init_from
    follows: dict[str, str] = field(default_factory=dict)  # in a chain, teacher and start: STAGE; else the one before
    in_chain: bool = False  # one training of several: the summary of all lies in the folder above
    check_memory: bool = True  # refuse to start on a GPU whose memory the plan exceeds (see --dry-run)
    report: bool = False  # write RUN/report/index.html at the end
    evals: dict[str, SuiteConfig | None] = field(default_factory=dict)  # SUITE for launch.evaluate; null drops one
    model: ModelConfig = field(default_factory=ModelConfig)
    predictor: PredictorSettings = field(default_factory=PredictorSettings)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        for name, maker in self.prepare.items():
            if maker not in MAKERS:
                raise ValueError(f"prepare.{name}={maker} is unknown: choose one of {', '.join(MAKERS)}")
        for name in self.follows:
            if name not in FOLLOWED:
                raise ValueError(f"follows.{name} is unknown: a stage takes {' and '.join(FOLLOWED)} from others")
        for name in self.evals:
            if name not in SUITES:
                raise ValueError(f"evals.{name} is unknown. Suites: {', '.join(sorted(SUITES))}")

    def check(self, world: int = 1, *, needs_sources: bool = True) -> int:
        """Refuse combinations that no single field can see; the micro-batches per step and rank."""
        objective = build_objective(self.objective, self.model, self.predictor, seed=0, device="meta")
        self._check_start()
        self._check_clips(objective.encoder.config)
        self._check_views(objective)
        self._check_masks()
        if self.train.parallel.compile and self.model.attention == "xformers":
            raise ConfigError(
                "model.attention=xformers cannot be compiled, and train.parallel.compile=true: set model.attention=auto"
            )
        if needs_sources and (missing := self.missing_sources()):
            raise ConfigError("; ".join(missing))
        batch, micro_batch = self.train.batch.as_dict(), self.train.micro_batch.as_dict()
        try:
            count = micro_batches_per_step(self.masks, batch=batch, world=world, micro_batch=micro_batch)
        except ValueError as error:
            raise ConfigError(f"train.{error}" if str(error).startswith("batch") else str(error)) from error
        return count

    def _check_start(self) -> None:
        """What comes with the first weights needs some."""
        for name, wants in (("init_predictor=true", self.init_predictor), ("init_optimizer=carry", self.carries)):
            if wants and self.init_from is None:
                raise ConfigError(f"{name} needs init_from: the run or the exported weights that it comes with")

    @property
    def carries(self) -> bool:
        """Whether the optimizer goes on with another run's averages."""
        return self.init_optimizer == "carry"

    @property
    def masks(self) -> MaskConfig:
        """The masks that are drawn: none, and no groups of clips, where nothing is predicted."""
        if self.objective.target != "none":
            return self.mask
        whole = GroupConfig(**{modality: max(1, size) for modality, size in vars(self.train.batch).items()})
        return replace(self.mask, video={}, image={}, group=whole)

    def _check_masks(self) -> None:
        for modality, size in self.train.batch.as_dict().items():
            if self.objective.target != "none" and not self.mask.of(modality):
                raise ConfigError(f"mask.{modality} is empty but train.batch.{modality}={size}: name at least one mask")

    def _check_views(self, objective: JEPA) -> None:
        """A term that compares views of a clip needs two."""
        named = {name: term.config for name, term in objective.terms.items() if isinstance(term, Regulariser)}
        comparing = [name for name, config in named.items() if isinstance(config, InvarianceConfig)]
        for modality, clip in (("video", self.data.video.clip), ("image", self.data.image.clip)):
            if comparing and modality in self.train.batch.as_dict() and clip.views + clip.local.views < 2:
                raise ConfigError(
                    f"objective.terms.{comparing[0]} compares views of a clip, and data.{modality}.clip has one: set "
                    f"data.{modality}.clip.views or data.{modality}.clip.local.views"
                )

    def _check_clips(self, encoder: EncoderConfig) -> None:
        """Every view of a clip is cut into whole patches and tubelets."""
        for modality, clip in (("video", self.data.video.clip), ("image", self.data.image.clip)):
            sizes = {"size": clip.size} | ({"local.size": clip.local.size} if clip.local.views else {})
            for name, size in sizes.items():
                if size % encoder.patch_size:
                    raise ConfigError(
                        f"data.{modality}.clip.{name}={size} must be a multiple of "
                        f"model.patch_size={encoder.patch_size}"
                    )
        clip = self.data.video.clip
        frames = {"frames": clip.frames} | ({"local.frames": clip.crops()[-1].frames} if clip.local.views else {})
        for name, count in frames.items():
            if count % encoder.tubelet_size:
                raise ConfigError(
                    f"data.video.clip.{name}={count} must be a multiple of model.tubelet_size={encoder.tubelet_size}"
                )

    def summary_folder(self, run_dir: Path | str | None = None) -> Path:
        """Where summary.json lies: in the run's folder (`run_dir` where it has moved), or in its chain's."""
        folder = Path(self.run_dir if run_dir is None else run_dir)
        return folder.resolve().parent if self.in_chain else folder

    def suites(self) -> dict[str, SuiteConfig]:
        """What `python -m launch.evaluate` asks the frozen encoder."""
        return {name: settings for name, settings in self.evals.items() if settings is not None}

    def missing_modalities(self) -> dict[str, int]:
        """Those that are trained on and have no data, with their batches."""
        batch = self.train.batch.as_dict()
        return {str(modality): size for modality, size in batch.items() if modality not in self.data.modalities()}

    def missing_sources(self) -> list[str]:
        """What must be said about data before the run can start, one entry per modality without any."""
        return [
            f"train.batch.{modality}={size} but data.{modality}.sources is empty: add "
            f"data.{modality}.sources.NAME.path=SHARDS, or set train.batch.{modality}=0"
            for modality, size in self.missing_modalities().items()
        ]


def list_recipes() -> list[str]:
    return sorted(path.name for path in RECIPES.iterdir() if path.is_dir() and path.name != "options")


def recipe_path(recipe: str, stage: str) -> Path:
    """The file of a recipe's stage; what does not exist is refused by name."""
    recipe = ALIASES.get(recipe, recipe)
    if not (RECIPES / recipe).is_dir():
        close = difflib.get_close_matches(recipe, list_recipes(), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"there is no recipe {recipe!r}.{hint} Recipes: {', '.join(list_recipes())}")
    path = RECIPES / recipe / f"{stage}.yaml"
    if not path.is_file():
        stages = sorted(found.stem for found in path.parent.glob("*.yaml"))
        raise ConfigError(f"recipe {recipe!r} has no stage {stage!r}. Stages: {', '.join(stages)}")
    return path


def load_config(recipe: str, stage: str, overrides: Sequence[str] = (), *, options: Sequence[str] = ()) -> RunConfig:
    """The resolved configuration of a new run: recipe, then named options, then overrides."""
    return to_object(merge(RunConfig, recipe_layers(recipe, stage, options), overrides))


def recipe_layers(recipe: str, stage: str, options: Sequence[str] = ()) -> list[DictConfig]:
    """What recipe and named options say, in the order in which they are merged."""
    recipe = ALIASES.get(recipe, recipe)
    layers = [read_recipe(recipe_path(recipe, stage)), *(read_recipe(option_path(name)) for name in options)]
    return [*layers, OmegaConf.create({"recipe": recipe, "stage": stage})]


def load_stored(path: Path) -> RunConfig:
    """A resolved configuration as it was written down."""
    return to_object(merge(RunConfig, [read_recipe(path)], []))


def option_path(name: str) -> Path:
    """The file of a named option."""
    path = RECIPES / "options" / f"{name}.yaml"
    if not path.is_file():
        known = sorted(found.stem for found in path.parent.glob("*.yaml"))
        raise ConfigError(f"there is no option {name!r}. Options: {', '.join(known)}")
    return path


def load_for_resume(
    stored: Path,
    overrides: Sequence[str],
    recipe: str | None = None,
    stage: str | None = None,
    *,
    options: Sequence[str] = (),
) -> RunConfig:
    """The configuration stored with a run, under what is asked now; what would change a number is refused by name."""
    base = read_recipe(stored)
    if not base.get("recipe"):
        raise ConfigError(f"{stored} is not the configuration of a run (no recipe in it): put the run's own back")
    before = merge(RunConfig, [base], [])
    asked = {name: value for name, value in (("recipe", recipe), ("stage", stage)) if value is not None}
    layers = [base, *(read_recipe(option_path(name)) for name in options), OmegaConf.create(asked)]
    after = merge(RunConfig, layers, overrides)
    changed = [f"{key}: {old!r} -> {new!r}" for key, old, new in _differences(before, after) if not _is_free(key)]
    if changed:
        raise ConfigError(
            "--resume goes on with the same run, but the command changes what decides its numbers:\n  "
            + "\n  ".join(changed)
            + "\nLeave these out, or start a new run in another run_dir"
        )
    return to_object(after)


def numbers_hash(config: RunConfig) -> str:
    """A short name for what decides a run's numbers, the same in every segment of a run."""
    leaves = _leaves(OmegaConf.to_container(OmegaConf.structured(config), resolve=True))
    return config_hash(repr([(key, value) for key, value in sorted(leaves.items()) if not _is_free(key)]))


def _is_free(key: str) -> bool:
    return any(fnmatch(key, free) or key.startswith(f"{free}.") for free in FREE_ON_RESUME)


def _differences(before: DictConfig, after: DictConfig) -> list[tuple[str, object, object]]:
    old = _leaves(OmegaConf.to_container(before, resolve=True))
    new = _leaves(OmegaConf.to_container(after, resolve=True))
    return [(key, old.get(key), new.get(key)) for key in sorted(old | new) if old.get(key) != new.get(key)]


def _leaves(value: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, dict):
        return {prefix.removesuffix("."): value}
    return {key: leaf for name, part in value.items() for key, leaf in _leaves(part, f"{prefix}{name}.").items()}
