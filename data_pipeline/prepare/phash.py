"""A perceptual hash: 64 bits of each of a video's frames that survive another codec, size or frame rate.

Of a frame: the signs of its lowest 63 cosine frequencies (of 32 x 32 grey pixels), each against their median. Of a
video: eight frames in the middles of eight equal parts. Of a still picture: 255 frequencies.
"""

from functools import lru_cache

import numpy as np
from PIL import Image

from data_pipeline.prepare.luma import frames_shown, open_image, square_luma

WORDS = {"video": 8, "image": 4}
"""64-bit words of a hash."""
HASH_BITS = {
    modality: np.array([bit for bit in range(64 * words) if bit % (64 if modality == "video" else 256)])
    for modality, words in WORDS.items()
}
"""The bits that say something: all but the one of the mean brightness."""
_SIDE = 32  # pixels of the picture that is transformed
_FLAT = 4.0  # grey levels of standard deviation, below which a picture has nothing to go by but noise


def record_hash(data: bytes, modality: str) -> tuple[np.ndarray, int]:
    """The hash, uint64 `[words]`, and which words say something, as bits; DecodeError for damaged bytes."""
    if modality == "image":
        picture = np.asarray(open_image(data).convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX))
        return frame_bits(picture, 16), 0b1111 if picture.std() > _FLAT else 0
    count = WORDS["video"]
    shares = [(2 * i + 1) / (2 * count) for i in range(count)]
    pictures = [square_luma(frame, _SIDE) for frame in frames_shown(data, shares)]
    telling = sum(int(picture.std() > _FLAT) << i for i, picture in enumerate(pictures))
    return np.concatenate([frame_bits(picture, 8) for picture in pictures]), telling


def frame_bits(picture: np.ndarray, side: int) -> np.ndarray:
    """The signs of the lowest side x side frequencies of a square picture: uint64 `[side * side / 64]`.

    The first bit, of the mean brightness, is always 0.
    """
    waves = _cosines(len(picture))[:side]  # [side, pixels]
    low = (waves @ picture.astype(np.float32) @ waves.T).ravel()  # [side * side]
    bits = low > np.median(low[1:])
    bits[0] = False
    return np.packbits(bits, bitorder="little").view(np.uint64)


@lru_cache
def _cosines(size: int) -> np.ndarray:
    """The cosine transform (DCT-II, not scaled) as a matrix: float32 `[size, size]`."""
    k, x = np.mgrid[:size, :size]
    return np.cos(np.pi * k * (2 * x + 1) / (2 * size)).astype(np.float32)


def distance(hashes: np.ndarray, telling: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Share of differing bits, 0 to 1, over the words that say something in both: float `[pairs]`.

    Args:
        hashes: uint64 `[records, words]`.
        telling: uint8 `[records]`, a bit for each word.
        left: the pairs' first records, `[pairs]`.
        right: their second ones.

    Pairs with less than half of their words in common are 1 apart.
    """
    words = hashes.shape[1]
    both = ((telling[left] & telling[right])[:, None] >> np.arange(words, dtype=np.uint8)) & 1  # [pairs, words]
    differing = (np.bitwise_count(hashes[left] ^ hashes[right]) * both).sum(axis=1)
    common = both.sum(axis=1)
    return np.where(2 * common >= words, differing / np.maximum(1, 64.0 * common), 1.0)
