"""What lies near what: k-NN classification at several k, and retrieval of clips (reference evaluation.md 1.6).

Features are compared by their cosine, as they are. Nothing is fitted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = (10, 20, 100, 200)  # DINOv3's
TEMPERATURE = 0.07
ROWS = 1024  # of queries compared at a time: bounds the table of similarities


def knn_scores(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    *,
    num_classes: int,
    neighbours: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> dict[int, Tensor]:
    """Votes of the k most similar training rows [N, D] for each test row [M, D], for every k: {k: [M, classes]}.

    A neighbour votes with the softmax of similarity / temperature over the largest k; the votes of the first k do not
    add up to 1, which changes no ranking. Where there are fewer than k rows, all vote.
    """
    if min(neighbours) < 1 or temperature <= 0:
        raise ValueError(f"neighbours={list(neighbours)} must be at least 1 and temperature={temperature} positive")
    train, test = F.normalize(train.float(), dim=1), F.normalize(test.float(), dim=1)
    most = min(max(neighbours), len(train))
    votes: dict[int, list[Tensor]] = {k: [] for k in neighbours}
    for rows in test.split(ROWS):
        similarity, nearest = (rows @ train.T).topk(most, dim=1)
        weights = (similarity / temperature).softmax(dim=1)
        for k, parts in votes.items():
            table = torch.zeros(len(rows), num_classes, device=rows.device)
            parts.append(table.scatter_add_(1, labels[nearest[:, :k]], weights[:, :k]))
    return {k: torch.cat(parts) for k, parts in votes.items()}


def knn_accuracy(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    truth: Tensor,
    *,
    num_classes: int,
    neighbours: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> dict[int, float]:
    """Top-1 accuracy of `knn_scores` for every k."""
    scores = knn_scores(train, labels, test, num_classes=num_classes, neighbours=neighbours, temperature=temperature)
    return {k: (votes.argmax(dim=1) == truth).float().mean().item() for k, votes in scores.items()}


def retrieval_scores(
    queries: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor, *, at: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """`mAP`, and `recall@k`: the share of queries [M, D] with their class among the k nearest of a gallery [N, D].

    Queries of a class that the gallery does not have are refused: no ranking is right for them.
    """
    if missing := sorted(set(query_labels.tolist()) - set(gallery_labels.tolist())):
        raise ValueError(f"the gallery has nothing of class {missing[0]}, which is asked for")
    queries, gallery = F.normalize(queries.float(), dim=1), F.normalize(gallery.float(), dim=1)
    rankings = (
        gallery_labels[(rows @ gallery.T).argsort(dim=1, descending=True, stable=True)] == labels[:, None]
        for rows, labels in zip(queries.split(ROWS), query_labels.split(ROWS), strict=True)
    )
    return _ranking_scores(rankings, at)


def leave_one_out_retrieval(features: Tensor, labels: Tensor, *, at: Sequence[int] = (1, 5)) -> dict[str, float]:
    """`retrieval_scores` of every clip [N, D] among all others: clips of one sequence, say, have one label.

    `recall@1` over the clips of 20 sequences is 20-way sequence retrieval. A label that occurs once is refused.
    """
    names, counts = labels.unique(return_counts=True)
    if (counts < 2).any():
        raise ValueError(f"label {names[counts < 2][0].item()} occurs once: its clip has nothing to be found by")
    rows = F.normalize(features.float(), dim=1)
    return _ranking_scores(_rankings_of_others(rows, labels), at)


def _rankings_of_others(rows: Tensor, labels: Tensor) -> Iterator[Tensor]:
    for begin in range(0, len(rows), ROWS):
        similarity = rows[begin : begin + ROWS] @ rows.T
        own = torch.arange(begin, begin + len(similarity), device=rows.device)
        similarity[own - begin, own] = -torch.inf  # itself comes last, and is cut off
        order = similarity.argsort(dim=1, descending=True, stable=True)[:, :-1]
        yield labels[order] == labels[own][:, None]


def _ranking_scores(rankings: Iterable[Tensor], at: Sequence[int]) -> dict[str, float]:
    """Scores of rankings [rows, N], true where what is found is right."""
    precision: list[Tensor] = []
    hits: dict[int, list[Tensor]] = {k: [] for k in at}
    for is_right in rankings:
        ranks = torch.arange(1, is_right.shape[1] + 1, device=is_right.device)
        found = is_right.double().cumsum(dim=1)
        precision.append((found / ranks * is_right).sum(dim=1) / is_right.sum(dim=1))
        for k, parts in hits.items():
            parts.append(is_right[:, :k].any(dim=1))
    recalls = {f"recall@{k}": torch.cat(parts).double().mean().item() for k, parts in hits.items()}
    return {"mAP": torch.cat(precision).mean().item(), **recalls}
