"""The stream of micro-batches that one rank trains on: step-indexed, in order, the same for any number of workers.

`python -m data_pipeline.loader digest SHARDS ...` prints what a rank would see (see `digest.py`).
"""

import itertools
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from data_pipeline.config import ClipConfig, DataConfig
from data_pipeline.crop_later import MOST_PIXELS
from data_pipeline.dataset import ClipDataset
from data_pipeline.plan import check_batch, micro_batches
from data_pipeline.sample import Sample
from data_pipeline.workers import Events, Job, Request, Supervised, alone

Collate = Callable[[list[Sample]], Any]
_SHM = Path("/dev/shm")
_SHM_SHARE = 0.8  # of what is free; running out is a SIGBUS that names nothing


class StepSampler:
    """One request per micro-batch: the ordinals of every modality, from `start_step` on."""

    def __init__(
        self, batch: dict[str, int], *, world: int, rank: int, accumulate: int, start_step: int, stop_step: int | None
    ):
        self.batch, self.world, self.rank, self.accumulate = dict(batch), world, rank, accumulate
        self.start_step, self.stop_step = start_step, stop_step

    def __iter__(self) -> Iterator[Request]:
        steps = itertools.count(self.start_step) if self.stop_step is None else range(self.start_step, self.stop_step)
        for step in steps:
            shares = {
                modality: micro_batches(
                    step, global_batch=size, world=self.world, rank=self.rank, accumulate=self.accumulate
                )
                for modality, size in self.batch.items()
            }
            for i in range(self.accumulate):
                yield {modality: share[i] for modality, share in shares.items()}


class _Make:
    """Makes a micro-batch, collated by modality; in a worker where there are some."""

    def __init__(self, dataset: ClipDataset, collate: Collate):
        self.dataset, self.collate = dataset, collate

    def __call__(self, job: Job) -> dict[str, Any]:
        samples = self.dataset.micro_batch(job.request, job.lost)
        return {modality: self.collate(group) for modality, group in samples.items()}


class Loader:
    """Iterate for `{modality: collate(samples)}`, one item per micro-batch of every modality.

    Each iteration starts again at `start_step`. Records that were replaced stand in `Sample.rejected`: a collate
    function hands them on, so that the trainer can count them and write them down.
    """

    def __init__(self, dataset: ClipDataset, sampler: StepSampler, collate: Collate):
        self.dataset = dataset
        self.info = dataset.info()
        self.events = Events()
        """What has happened to the workers."""
        self._sampler, self._make = sampler, _Make(dataset, collate)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        config, requests = self.dataset.config, iter(self._sampler)
        if not config.workers:
            yield from alone(self._make, requests)
            return
        with closing(
            Supervised(
                self._make,
                requests,
                config,
                in_flight=self.dataset.in_flight,
                name=self.dataset.name,
                events=self.events,
                context=_context(config),
            )
        ) as workers:
            yield from workers

    def __len__(self) -> int:
        """Micro-batches of one iteration; TypeError for a stream without a last step."""
        if self._sampler.stop_step is None:
            raise TypeError("a loader without stop_step has no length")
        return max(0, self._sampler.stop_step - self._sampler.start_step) * self._sampler.accumulate

    def epoch_of(self, modality: str, step: int) -> int:
        """The epoch at the first ordinal of a step: samples seen before it over the number of records."""
        return self.dataset.plans[modality].epoch_of(step * self._sampler.batch[modality])


def build_loader(
    config: DataConfig,
    *,
    seed: int,
    batch: dict[str, int],
    world: int = 1,
    rank: int = 0,
    accumulate: int = 1,
    start_step: int = 0,
    stop_step: int | None = None,
    collate: Collate = list,
) -> Loader:
    """The micro-batches of one rank.

    Args:
        config: sources, clips, decoder, workers.
        seed: of the order and of the crops.
        batch: the GLOBAL batch of every modality that has sources.
        world, rank: ranks that share the global batch, and which one this is.
        accumulate: micro-batches per step and rank.
        start_step, stop_step: first step, and the one before which to stop (None: never).
        collate: a list of Samples of one modality -> what the trainer takes; runs in the worker, so with workers it
            must pickle where processes are spawned (a module's function or an instance, not a lambda).

    Raises ValueError naming the numbers when a batch does not divide, a modality has no batch or no sources, shards
    are missing or damaged, or shared memory is too small.
    """
    _check_modalities(config, batch)
    micro = {modality: check_batch(size, world, accumulate) for modality, size in batch.items()}
    if not 0 <= rank < world:
        raise ValueError(f"rank={rank}: must be in [0, {world})")
    if start_step < 0:
        raise ValueError(f"start_step={start_step}: must not be negative")
    _check_shared_memory(config, micro)
    dataset = ClipDataset(config, seed=seed)
    sampler = StepSampler(
        batch, world=world, rank=rank, accumulate=accumulate, start_step=start_step, stop_step=stop_step
    )
    return Loader(dataset, sampler, collate)


def _context(config: DataConfig) -> str:
    """fork where it exists and nothing forbids it: a worker starts at once."""
    return "fork" if "fork" in multiprocessing.get_all_start_methods() and not config.needs_spawn else "spawn"


def _check_modalities(config: DataConfig, batch: dict[str, int]) -> None:
    on = config.modalities()
    if not on:
        raise ValueError("data: no modality has sources; set video.sources or image.sources")
    for modality in on:
        if modality not in batch:
            raise ValueError(f"batch: {modality} has sources but no global batch size; add batch[{modality!r}]")
    for modality in batch:
        if modality not in on:
            raise ValueError(f"batch: {modality}={batch[modality]}, but data.{modality}.sources is empty")


def clip_bytes(clip: ClipConfig) -> int:
    """Size of one sample's views in bytes."""
    return sum(3 * crop.frames * crop.size * crop.size for crop in clip.crops())


def _check_shared_memory(config: DataConfig, micro: dict[str, int]) -> None:
    """Refuse to start where the workers' finished micro-batches would not fit into /dev/shm."""
    if not config.workers or not _SHM.is_dir():
        return
    each = sum(micro[modality] * clip_bytes(part.clip) for modality, part in config.modalities().items())
    each *= 1 if config.augment_on == "worker" else MOST_PIXELS
    needed, free = config.workers * config.prefetch * each, shutil.disk_usage(_SHM).free
    if needed > _SHM_SHARE * free:
        raise ValueError(
            f"{config.workers} workers x prefetch {config.prefetch} x {each / 1e6:.1f} MB a micro-batch = "
            f"{needed / 1e6:.0f} MB, more than {_SHM_SHARE:.0%} of the {free / 1e6:.0f} MB free in /dev/shm; "
            "use fewer workers, a smaller prefetch or micro-batch, or a larger /dev/shm (docker: --shm-size)"
        )


if __name__ == "__main__":
    from data_pipeline.digest import main

    raise SystemExit(main())
