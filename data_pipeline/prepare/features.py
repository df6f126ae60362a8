"""Near-duplicates by the features of an encoder: a file of vectors that the caller brings."""

import math
from pathlib import Path

import numpy as np

from data_pipeline.prepare.near import Pairs, near_pairs
from data_pipeline.shards import Shards

_ROWS = 4096  # vectors worked on at a time: the file may be larger than memory


def load_features(file: Path, shards: Path, modality: str) -> np.ndarray:
    """The vectors in the order of the records, float `[records, D]`.

    `.npy` holds one row a record in the shards' order (it is mapped, not read); `.npz` holds `features` and their
    `keys`, in any order. ValueError where a record has no vector, or a vector values that are not finite.
    """
    opened = Shards(shards, modality)
    if not file.is_file():
        raise ValueError(f"--features {file}: no such file")
    loaded = np.load(file, mmap_mode="r")
    features = loaded if isinstance(loaded, np.ndarray) else _by_key(file, loaded, opened)
    if features.ndim != 2 or len(features) != len(opened):
        raise ValueError(f"--features {file}: of shape {list(features.shape)}, but [{len(opened)}, D] is needed")
    for start in range(0, len(features), _ROWS):
        if not np.isfinite(features[start : start + _ROWS]).all():
            raise ValueError(f"--features {file}: holds values that are not finite, from row {start} on")
    return features


def _by_key(file: Path, loaded: np.lib.npyio.NpzFile, opened: Shards) -> np.ndarray:
    if not {"features", "keys"} <= set(loaded.files):
        raise ValueError(f"--features {file}: an .npz must hold `features` and `keys`, it holds {loaded.files}")
    place = {key: i for i, key in enumerate(loaded["keys"].tolist())}
    keys = [opened.row(i)["key"] for i in range(len(opened))]
    missing = [key for key in keys if key not in place]
    if missing:
        raise ValueError(f"--features {file}: no vector for {len(missing)} records, the first is {missing[0]}")
    return loaded["features"][[place[key] for key in keys]]


def feature_pairs(features: np.ndarray, cosine: float) -> Pairs:
    """Pairs of vectors, float `[records, D]`, no further apart than the cosine allows; distances are 1 - cosine."""

    def judge(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        parts = [
            _one_minus_cosine(features[left[start : start + _ROWS]], features[right[start : start + _ROWS]])
            for start in range(0, len(left), _ROWS)
        ]
        return np.concatenate(parts) if parts else np.zeros(0)

    signatures = sign_bits(features)
    bits = np.arange(signatures.shape[1] * 64)
    return near_pairs(signatures, bits, bit_error=math.acos(cosine) / math.pi, judge=judge, limit=1 - cosine + 1e-6)


def _one_minus_cosine(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    left, right = left.astype(np.float32), right.astype(np.float32)  # [pairs, D]
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return 1 - np.einsum("nd,nd->n", left, right) / np.maximum(lengths, 1e-12)


def sign_bits(features: np.ndarray, bits: int = 1024) -> np.ndarray:
    """On which side of random planes each vector lies: float `[records, D]` -> uint64 `[records, bits / 64]`.

    Two vectors at an angle a differ in a share a / pi of the bits (Charikar 2002).
    """
    planes = np.random.default_rng(0).standard_normal((features.shape[1], bits), np.float32)
    parts = [
        np.packbits(np.asarray(features[start : start + _ROWS], np.float32) @ planes > 0, axis=1)
        for start in range(0, len(features), _ROWS)
    ]
    return np.concatenate(parts).view(np.uint64)
