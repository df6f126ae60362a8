"""Clips in which one handwritten digit moves and another stands still: what is in them, and how they are drawn.

Nothing here reads or writes a file but `load_glyphs`. A scene is a pure function of (config, split, index).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

DIRECTIONS = ("right", "down", "left", "up")
_STEPS = np.array([(0, 1), (1, 0), (0, -1), (-1, 0)], np.float64)  # as y, x, in the order of DIRECTIONS
SPLITS = ("train", "probe_train", "test")
BACKGROUND, STATIC, MOVING = 0, 1, 2  # values of a mask


@dataclass(frozen=True)
class DigitsConfig:
    """The whole set: the same values give the same bytes."""

    seed: int = 0
    """Of the glyphs' split and of the unlabelled clips."""
    probe_seed: int = 11
    """Of the probe_train and test clips; another value gives fresh ones of the same glyphs."""
    train_clips: int = 16384
    """Clips of the unlabelled split, `train`."""
    probe_train_clips: int = 768
    """Labelled clips to fit probes on."""
    test_clips: int = 512
    """Labelled clips to report on."""
    train_glyphs: int = 1000
    """Glyphs that only `train` shows ..."""
    probe_train_glyphs: int = 400
    """... and that only `probe_train` shows; `test` has the rest."""
    size: int = 32
    """Height and width in pixels; even."""
    frames: int = 8
    """Frames of a clip."""
    fps: float = 8.0
    """Frames per second written into the files; a power of two keeps every frame's time exact."""
    glyph_min: float = 14.0
    """Smallest side of a digit, in pixels ..."""
    glyph_max: float = 18.0
    """... and largest; not rounded."""
    speed_min: float = 0.6
    """Slowest motion, in pixels per frame ..."""
    speed_max: float = 1.5
    """... and fastest; constant within a clip."""
    background: float = 0.1
    """Grey of the background, 0 to 1."""
    colour_min: float = 0.6
    """Darkest value of a digit's red, green and blue; the brightest is 1."""
    noise: float = 0.05
    """Standard deviation of the noise, drawn for each pixel, channel and frame."""

    def __post_init__(self) -> None:
        travel = self.speed_max * (self.frames - 1)
        rules = {
            "seed": (self.seed >= 0, "must not be negative"),
            "probe_seed": (self.probe_seed >= 0, "must not be negative"),
            "train_clips": (self.train_clips >= 1, "must be at least 1"),
            "probe_train_clips": (self.probe_train_clips >= 1, "must be at least 1"),
            "test_clips": (self.test_clips >= 1, "must be at least 1"),
            "train_glyphs": (self.train_glyphs >= 1, "must be at least 1"),
            "probe_train_glyphs": (self.probe_train_glyphs >= 1, "must be at least 1"),
            "size": (self.size >= 2 and self.size % 2 == 0, "must be even and at least 2"),
            "frames": (self.frames >= 1, "must be at least 1"),
            "fps": (math.isfinite(self.fps) and self.fps > 0, "must be positive"),
            "glyph_min": (self.glyph_min > 0, "must be positive"),
            "glyph_max": (
                self.glyph_min <= self.glyph_max <= self.size - travel,
                f"must lie between glyph_min={self.glyph_min} and size - speed_max * (frames - 1) = "
                f"{self.size - travel:g}, or the fastest path leaves the frame",
            ),
            "speed_min": (self.speed_min > 0, "must be positive"),
            "speed_max": (self.speed_max >= self.speed_min, f"must not be below speed_min={self.speed_min}"),
            "background": (0 <= self.background < 1, "must be in [0, 1)"),
            "colour_min": (self.background < self.colour_min <= 1, "must be above background and at most 1"),
            "noise": (self.noise >= 0, "must not be negative"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r}: {rule}")

    def clips(self, split: str) -> int:
        """Clips of a split."""
        return {"train": self.train_clips, "probe_train": self.probe_train_clips, "test": self.test_clips}[split]


class Glyphs(NamedTuple):
    """scikit-learn's handwritten digits: ink 0 to 1, float64 `[1797, 8, 8]`, and which digit each is, `[1797]`."""

    ink: np.ndarray
    digit: np.ndarray


@dataclass(frozen=True)
class Thing:
    """One digit of a scene."""

    glyph: int
    """Its index in scikit-learn's set."""
    digit: int
    side: float
    """Side of the glyph's square in pixels."""
    colour: tuple[float, float, float]
    """RGB, 0 to 1."""
    centres: np.ndarray
    """float64 `[T, 2]`: y, x of the centre in pixels; the top left pixel's centre is at 0.5, 0.5."""


@dataclass(frozen=True)
class Scene:
    """What one clip shows; the static digit is drawn first, so the moving one may hide it."""

    direction: int
    """Index into DIRECTIONS."""
    speed: float
    """Pixels per frame."""
    static: Thing
    moving: Thing


def load_glyphs() -> Glyphs:
    """The digits that scikit-learn ships; nothing is downloaded. ImportError where it is not installed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the labelled digits need scikit-learn, which ships the handwriting: pip install scikit-learn "
            f"(or `make setup`); it does not import: {error}"
        ) from error
    images, digit = load_digits(return_X_y=True)
    return Glyphs(np.asarray(images).reshape(-1, 8, 8) / 16.0, np.asarray(digit))


def split_glyphs(config: DigitsConfig, count: int) -> dict[str, np.ndarray]:
    """`{split: sorted glyph indices}`, each glyph in one split. ValueError where too few are left for `test`."""
    taken = config.train_glyphs + config.probe_train_glyphs
    if taken >= count:
        raise ValueError(
            f"train_glyphs={config.train_glyphs}, probe_train_glyphs={config.probe_train_glyphs}: together they must "
            f"leave some of the {count} glyphs for test"
        )
    order = np.random.default_rng([config.seed, len(SPLITS)]).permutation(count)
    parts = np.split(order, [config.train_glyphs, taken])
    return {split: np.sort(part) for split, part in zip(SPLITS, parts, strict=True)}


class SplitPlan:
    """All scenes of one split; directions and both digits each occur equally often (to within one)."""

    def __init__(self, config: DigitsConfig, split: str, glyphs: Glyphs):
        self.config, self.split, self.ink = config, split, glyphs.ink
        self.glyphs = split_glyphs(config, len(glyphs.ink))[split]
        self._entropy = [config.seed if split == "train" else config.probe_seed, SPLITS.index(split)]
        self._of_digit = [self.glyphs[glyphs.digit[self.glyphs] == digit] for digit in range(10)]
        if missing := [digit for digit, members in enumerate(self._of_digit) if len(members) == 0]:
            raise ValueError(f"{split}: its {len(self.glyphs)} glyphs hold no digit {missing[0]}; give it more glyphs")
        generator, clips = np.random.default_rng(self._entropy), config.clips(split)
        self.directions = generator.permutation(clips) % len(DIRECTIONS)
        self.moving_digits = generator.permutation(clips) % 10
        self.static_digits = generator.permutation(clips) % 10

    def __len__(self) -> int:
        return len(self.directions)

    @property
    def is_labelled(self) -> bool:
        """Whether its samples carry labels: all but those that are trained on."""
        return self.split != "train"

    def scene(self, index: int) -> tuple[Scene, np.random.Generator]:
        """What clip `index` shows, and the generator that its noise comes from."""
        config = self.config
        generator = np.random.default_rng([*self._entropy, index + 1])  # 0 would be the split's own: numpy pads with it
        direction = int(self.directions[index])
        static = self._thing(int(self.static_digits[index]), np.zeros((config.frames, 2)), generator)
        speed = generator.uniform(config.speed_min, config.speed_max)
        since_middle = np.arange(config.frames)[:, None] - (config.frames - 1) / 2  # [T, 1]: the path's centre is at 0
        moving = self._thing(int(self.moving_digits[index]), speed * since_middle * _STEPS[direction], generator)
        return Scene(direction, speed, static, moving), generator

    def _thing(self, digit: int, offsets: np.ndarray, generator: np.random.Generator) -> Thing:
        """A digit on a path (`offsets` from its middle, `[T, 2]`) that lies anywhere it fits whole."""
        config = self.config
        members = self._of_digit[digit]
        glyph = int(members[generator.integers(len(members))])
        side = generator.uniform(config.glyph_min, config.glyph_max)
        red, green, blue = generator.uniform(config.colour_min, 1, 3).tolist()
        margin = side / 2 + np.abs(offsets).max(axis=0)  # [2]
        middle = generator.uniform(margin, config.size - margin)
        return Thing(glyph, digit, side, (red, green, blue), middle + offsets)


def draw(
    scene: Scene, ink: np.ndarray, config: DigitsConfig, generator: np.random.Generator | None
) -> tuple[np.ndarray, np.ndarray]:
    """A scene's frames, uint8 `[T, H, W, 3]`, and its masks, uint8 `[T, H, W]`; without a generator, no noise.

    A pixel belongs to a digit that covers at least half of it, to the moving one first.
    """
    pixels = np.full((config.frames, config.size, config.size, 3), config.background)
    masks = np.zeros(pixels.shape[:3], np.uint8)
    for value, thing in ((STATIC, scene.static), (MOVING, scene.moving)):
        cover = _cover(ink[thing.glyph], thing, config.size)  # [T, H, W]
        pixels += cover[..., None] * (np.array(thing.colour) - pixels)
        masks[cover >= 0.5] = value
    if generator is not None:
        pixels += config.noise * generator.standard_normal(pixels.shape, np.float32)
    return np.rint(pixels * 255).clip(0, 255).astype(np.uint8), masks


def _cover(ink: np.ndarray, thing: Thing, size: int) -> np.ndarray:
    """How much of each pixel a digit covers, 0 to 1, `[T, H, W]`: the glyph resized bilinearly, its edges sharpened."""
    across = np.arange(size) + 0.5 - (thing.centres[:, :, None] - thing.side / 2)  # [T, 2, size]
    cell = across * (len(ink) / thing.side) - 0.5  # in the glyph's pixels, whole at their centres
    weights = np.maximum(0, 1 - np.abs(cell[..., None] - np.arange(len(ink))))  # [T, 2, size, 8]
    resized = weights[:, 0] @ ink @ weights[:, 1].swapaxes(1, 2)  # [T, H, W]
    return np.clip(4 * (resized - 0.3), 0, 1)
