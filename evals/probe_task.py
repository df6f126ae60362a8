"""What an engine needs to train and score attentive probes: heads, items, tokens, loss and scores of one recipe.

An engine asks a task for a dataset of clips (its items are made in loader processes), turns a batch of them into tokens
once, and gives these to every head of the grid:

    head = task.make_head(seed)
    for batch in DataLoader(task.dataset("train", epoch=3), ...):
        loss = task.loss(head(task.tokens(batch)), batch["labels"])
    score = task.new_score("validation")
    score.update(head(task.tokens(batch)), batch["labels"]); score.values()

`held_out` is part of the training set, seen as validation is: there the best head is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from evals.anticipation import (
    QUESTIONS,
    AnticipationFeatures,
    ClassMeanRecall,
    anticipation_loss,
    restrict,
)
from evals.attentive import AttentiveClassifier, AttentiveClassifiers, average_views
from evals.clip_protocol import ClipReader, encode_clips
from evals.epic_kitchens import Action, ActionClasses, EpicReader, EpicVideos, actions_on_disk
from evals.features import FeatureSource
from evals.labelled_files import FileIndex, hold_out, read_index
from evals.probe_config import ProbeConfig
from vjepa.objectives.collectives import num_ranks

Part = Literal["train", "held_out", "validation"]
Batch = Mapping[str, Any]


class Score(Protocol):
    """Counts of a part of a set; `state` can be summed over ranks, in place."""

    state: Tensor

    def update(self, output: Any, labels: Any) -> None: ...
    def values(self) -> dict[str, float]: ...


class ProbeTask(Protocol):
    """What an engine may ask, whatever the question is."""

    @property
    def headline(self) -> str:
        """Which of a score's values heads are compared by; higher is better."""
        ...

    def size(self, part: Part) -> int: ...
    def make_head(self, seed: int) -> nn.Module: ...
    def dataset(self, part: Part, *, epoch: int = 0) -> Dataset[Batch]: ...
    def tokens(self, batch: Batch) -> Tensor: ...
    def loss(self, output: Any, labels: Any) -> Tensor: ...
    def new_score(self, part: Part) -> Score: ...


def split_training(keys: Sequence[str], config: ProbeConfig) -> tuple[list[int], list[int]]:
    """Places of what heads are fitted on, and of what is held out to choose one: nothing where there is one head."""
    if len(config.grid.settings()) == 1:
        return list(range(len(keys))), []
    return hold_out(keys, config.data.held_out, seed=config.seed)


# --------------------------------------------------------------------------------------------------- classification


@dataclass
class Accuracy:
    """Top-1 and top-5 over the mean softmax of a video's views."""

    views: int

    def __post_init__(self) -> None:
        self.state = torch.zeros(3, dtype=torch.int64)  # right at the first, among the first five, all

    def update(self, output: Tensor, labels: Tensor) -> None:
        """output: [B * V, classes], labels: [B]."""
        scores = average_views(output.detach(), self.views)
        nearest = scores.topk(min(5, scores.shape[1]), dim=1).indices.cpu()
        is_right = nearest == labels.cpu()[:, None]
        self.state += torch.stack([is_right[:, 0].sum(), is_right.any(dim=1).sum(), torch.tensor(len(labels))])

    def values(self) -> dict[str, float]:
        first, five, count = self.state.tolist()
        if not count:
            raise ValueError("nothing was counted: the set is empty")
        return {"accuracy": first / count, "accuracy_top5": five / count}


@dataclass(frozen=True)
class FileClips(Dataset[Batch]):
    """Clips of an index: `clips` uint8 [V, S, C, T, H, W], `labels` and `ordinal` int."""

    index: FileIndex
    reader: ClipReader
    is_train: bool
    epoch: int

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, ordinal: int) -> Batch:
        path = self.index.paths[ordinal]
        if self.is_train:
            clips = self.reader.train(path, ordinal=ordinal, epoch=self.epoch)
        else:
            clips = self.reader.validate(path, ordinal=ordinal)
        return {"clips": clips, "labels": self.index.labels[ordinal], "ordinal": ordinal}


@dataclass(frozen=True)
class ClassificationTask:
    """One class per video or image."""

    config: ProbeConfig
    source: FeatureSource
    parts: Mapping[Part, FileIndex]
    max_clips: int = 16  # that the source sees at a time
    headline: str = "accuracy"

    @classmethod
    def build(cls, config: ProbeConfig, source: FeatureSource, **options: Any) -> ClassificationTask:
        """The task of a recipe; DataMissing where its files are not there."""
        data = config.data
        train = read_index(data.name, data.root, "train", files=data.train_files, skip_missing=data.skip_missing)
        validation = read_index(
            data.name, data.root, "validation", files=data.validation_files, skip_missing=data.skip_missing
        )
        rest, held = split_training([path.name for path in train.paths], config)
        parts: dict[Part, FileIndex] = {
            "train": train.take(rest),
            "held_out": train.take(held),
            "validation": validation,
        }
        return cls(config, source, parts, **options)

    @cached_property
    def num_classes(self) -> int:
        return len(self.parts["train"].classes)

    @cached_property
    def embed_dim(self) -> int:
        """The width of the source's tokens, seen on one black clip."""
        clips = self.config.clips
        return self.source.tokens(torch.zeros(1, 3, clips.frames, clips.size, clips.size, dtype=torch.uint8)).shape[-1]

    def size(self, part: Part) -> int:
        return len(self.parts[part])

    def make_head(self, seed: int) -> AttentiveClassifier:
        return AttentiveClassifier(self.embed_dim, self.num_classes, self.config.head, seed=seed)

    def dataset(self, part: Part, *, epoch: int = 0) -> FileClips:
        reader = ClipReader(self.config.clips, seed=self.config.seed)
        return FileClips(self.parts[part], reader, part == "train", epoch)

    def tokens(self, batch: Batch) -> Tensor:
        """`clips` [B, V, S, C, T, H, W] -> [B * V, S * N, D], the views of a video side by side."""
        return encode_clips(self.source, batch["clips"].flatten(0, 1), batch_size=self.max_clips)

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of one view: [B, classes], [B] -> scalar."""
        return F.cross_entropy(output, labels)

    def new_score(self, part: Part) -> Accuracy:
        return Accuracy(self.config.clips.views)


# ------------------------------------------------------------------------------------------------------ anticipation


class Recalls:
    """Class-mean recall of every question; in validation, scores are restricted to the classes that occur there."""

    def __init__(self, num_classes: Mapping[str, int], present: Mapping[str, Sequence[int]], k: int) -> None:
        self.present = present
        self.widths = dict(num_classes)
        self.k = k
        self.state = torch.zeros(2, sum(self.widths.values()), dtype=torch.int64)  # hits and counts, side by side

    def update(self, output: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> None:
        for name, recall in self._recalls().items():
            recall.update(restrict(output[name].detach(), self.present[name]), labels[name])

    def values(self) -> dict[str, float]:
        return {f"{name}_recall@{self.k}": recall.value() for name, recall in self._recalls().items()}

    def _recalls(self) -> dict[str, ClassMeanRecall]:
        """Each question's counts, which are views of the state."""
        parts = self.state.split(list(self.widths.values()), dim=1)
        return {name: ClassMeanRecall.over(part, self.k) for name, part in zip(self.widths, parts, strict=True)}


@dataclass(frozen=True)
class ActionClips(Dataset[Batch]):
    """Context clips of actions: `clips` uint8 [V, C, T, H, W], `labels` by question, `seconds` ahead, `ordinal`."""

    actions: Sequence[Action]
    labels: Mapping[str, Tensor]
    reader: EpicReader
    is_train: bool
    epoch: int

    def __len__(self) -> int:
        return len(self.actions)

    def __getitem__(self, ordinal: int) -> Batch:
        action = self.actions[ordinal]
        if self.is_train:
            clips, seconds = self.reader.train(action, ordinal=ordinal, epoch=self.epoch)
        else:
            clips, seconds = self.reader.validate(action)
        labels = {name: int(values[ordinal]) for name, values in self.labels.items()}
        return {"clips": clips, "labels": labels, "seconds": seconds, "ordinal": ordinal}


@dataclass(frozen=True)
class AnticipationTask:
    """Verb, noun and action of what comes next; validation drops actions that never occur in training."""

    config: ProbeConfig
    source: AnticipationFeatures
    parts: Mapping[Part, Sequence[Action]]
    classes: ActionClasses
    max_clips: int = 16  # that the source sees at a time

    @classmethod
    def build(cls, config: ProbeConfig, source: AnticipationFeatures, **options: Any) -> AnticipationTask:
        """The task of a recipe; DataMissing where its tables are not there. Classes are those of all of training."""
        root, skip = config.data.root, config.data.skip_missing
        train, validation = (actions_on_disk(root, split, skip_missing=skip) for split in ("train", "validation"))
        classes = ActionClasses.of(train)
        keys = [f"{action.video}/{action.start}/{action.stop}" for action in train]
        rest, held = split_training(keys, config)
        parts: dict[Part, Sequence[Action]] = {
            "train": [train[i] for i in rest],
            "held_out": [train[i] for i in held],
            "validation": [action for action in validation if classes.knows(action)],
        }
        return cls(config, source, parts, classes, **options)

    @property
    def headline(self) -> str:
        return f"action_recall@{self.config.anticipation.recall_at}"

    def size(self, part: Part) -> int:
        return len(self.parts[part])

    def make_head(self, seed: int) -> AttentiveClassifiers:
        width = self.source.encoder.embed_dim
        return AttentiveClassifiers(width, self.classes.counts, self.config.head, seed=seed)

    def dataset(self, part: Part, *, epoch: int = 0) -> ActionClips:
        videos = EpicVideos(Path(self.config.data.root))
        reader = EpicReader(videos, self.config.clips, self.config.anticipation, seed=self.config.seed)
        actions = self.parts[part]
        return ActionClips(actions, self.classes.labels(actions), reader, part == "train", epoch)

    def tokens(self, batch: Batch) -> Tensor:
        """`clips` [B, 1, C, T, H, W] and `seconds` [B] -> [B, N + h*w, D]."""
        pairs = zip(batch["clips"][:, 0].split(self.max_clips), batch["seconds"].split(self.max_clips), strict=True)
        return torch.cat([self.source.tokens(clips, seconds) for clips, seconds in pairs])

    def loss(self, output: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> Tensor:
        """A sum over this rank's part of the batch: the mean of ranks' gradients is that of one process."""
        return anticipation_loss(output, labels, self.config.anticipation) * num_ranks()

    def new_score(self, part: Part) -> Recalls:
        labels = self.classes.labels(self.parts[part])
        present = {name: labels[name].unique().tolist() for name in QUESTIONS}
        return Recalls(self.classes.counts, present, self.config.anticipation.recall_at)
