"""The first batches, clips and masks alike, are a function of the seed alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from data_pipeline.config import ClipConfig, DataConfig, LocalConfig, ModalityConfig, SourceConfig
from data_pipeline.loader import build_loader
from data_pipeline.prepare.synthetic import make_debug_shards
from vjepa.batch import Batch, Modality
from vjepa.masking.blocks import BlockMaskConfig
from vjepa.masking.collate import MaskCollator, MaskConfig, ViewsConfig, micro_batches_per_step

STEPS = 20
BATCH: dict[Modality, int] = {"video": 12, "image": 12}
MODALITIES: tuple[Modality, ...] = ("video", "image")
IJEPA = BlockMaskConfig(kind="multiblock", num_blocks=4, spatial_scale=0.15, spatial_scale_max=0.2)
MULTI_CROP = ClipConfig(
    frames=4, fps=8.0, size=64, views=2, local=LocalConfig(views=2, size=32, frames=2), view_times="own"
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_debug_shards(tmp_path_factory.mktemp("shards") / "debug")


def hashes(
    shards: Path,
    *,
    seed: int = 0,
    workers: int = 0,
    micro: int = 12,
    world: int = 1,
    steps: int = STEPS,
    config: MaskConfig | None = None,
    clip: ClipConfig | None = None,
) -> list[str]:
    """One hash per step and modality over every clip's bytes and every mask's indices, in the order of ordinals."""
    config = config or MaskConfig()
    count = micro_batches_per_step(config, batch=BATCH, world=world, micro_batch={"video": micro, "image": micro})
    source = {"debug": SourceConfig(path=str(shards))}
    data = DataConfig(
        video=ModalityConfig(source, clip or ClipConfig(frames=4, fps=8.0, size=64)),
        image=ModalityConfig(source, ClipConfig(frames=1, size=64)),
        workers=workers,
    )
    collate = MaskCollator(config, seed=seed, batch=BATCH, patch_size=16, tubelet_size=2)
    clips: dict[tuple[int, Modality], dict[int, bytes]] = {}
    for rank in range(world):
        loader = build_loader(
            data,
            seed=seed,
            batch={str(modality): size for modality, size in BATCH.items()},
            world=world,
            rank=rank,
            accumulate=count,
            stop_step=steps,
            collate=collate,
        )
        for item in loader:
            for modality in MODALITIES:
                batch: Batch = item[modality]
                clips.setdefault((batch.step, modality), {}).update(rows(batch))
    return [
        hashlib.sha256(b"".join(value for _, value in sorted(clips[step, modality].items()))).hexdigest()
        for step in range(steps)
        for modality in MODALITIES
    ]


def rows(batch: Batch) -> dict[int, bytes]:
    def content(row: int) -> bytes:
        kept = [context for context in batch.view_contexts if context is not None]
        parts = [x[row] for x in (*batch.views, *kept)]
        parts += [x[row] for mask in batch.masks for x in (mask.context, mask.masked)]
        return b"".join(part.contiguous().numpy().tobytes() for part in parts)

    return {ordinal: content(row) for row, ordinal in enumerate(batch.ordinals)}


@pytest.fixture(scope="module")
def expected(shards: Path) -> list[str]:
    found = hashes(shards)
    assert len(set(found)) == 2 * STEPS, "every step's batch differs from every other's"
    return found


@pytest.mark.parametrize("workers", [1, 3])
def test_twenty_batches_do_not_depend_on_the_number_of_workers(shards: Path, expected: list[str], workers: int) -> None:
    assert hashes(shards, workers=workers) == expected


@pytest.mark.parametrize("micro", [2, 4])
def test_twenty_batches_do_not_depend_on_the_micro_batch(shards: Path, expected: list[str], micro: int) -> None:
    assert hashes(shards, micro=micro) == expected


def test_twenty_batches_do_not_depend_on_the_number_of_ranks(shards: Path, expected: list[str]) -> None:
    assert hashes(shards, world=3, micro=2, workers=1) == expected


def test_another_seed_gives_other_batches(shards: Path, expected: list[str]) -> None:
    assert not set(hashes(shards, seed=1)) & set(expected)


@pytest.mark.parametrize("split", [{"workers": 1}, {"micro": 2}, {"world": 3, "micro": 2}])
def test_views_dropped_tokens_and_ijepa_s_masks_do_not_depend_on_the_split(shards: Path, split: dict[str, int]) -> None:
    config = MaskConfig(video={"targets": IJEPA}, image={"targets": IJEPA}, views=ViewsConfig(0.3))
    alone = hashes(shards, steps=3, config=config, clip=MULTI_CROP)
    assert hashes(shards, steps=3, config=config, clip=MULTI_CROP, **split) == alone
