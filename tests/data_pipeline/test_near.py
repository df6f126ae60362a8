"""Claims: near pairs are found among many, strangers are not, and every dropped record resembles a kept one."""

import numpy as np

from data_pipeline.prepare.features import sign_bits
from data_pipeline.prepare.near import keep_one_of_each, near_pairs
from data_pipeline.prepare.phash import HASH_BITS, distance, frame_bits

RECORDS, COPIES = 5000, 400


def hashes_with_copies(share: float) -> np.ndarray:
    """Random hashes `[RECORDS + COPIES, 8]`; the last differ from the first in `share` of the bits."""
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 2**64, (RECORDS, 8), np.uint64)
    flips = generator.random((COPIES, 512)) < share
    copies = hashes[:COPIES] ^ np.packbits(flips, axis=1).view(np.uint64)
    return np.concatenate([hashes, copies])


def test_copies_are_found_among_strangers_and_nothing_else():
    hashes = hashes_with_copies(0.1)
    telling = np.full(len(hashes), 255, np.uint8)

    def judge(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return distance(hashes, telling, left, right)

    pairs, apart = near_pairs(hashes, HASH_BITS["video"], bit_error=0.15, judge=judge, limit=0.15)
    assert (pairs[:, 1] - pairs[:, 0] == RECORDS).all()
    assert len(pairs) >= 0.98 * COPIES
    assert 0.05 < apart.min() <= apart.max() <= 0.15


def test_a_crowd_of_equals_ends_as_one_group():
    hashes = np.repeat(np.random.default_rng(0).integers(0, 2**64, (2, 8), np.uint64), 300, axis=0)
    telling = np.full(600, 255, np.uint8)

    def judge(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return distance(hashes, telling, left, right)

    pairs, apart = near_pairs(hashes, HASH_BITS["video"], bit_error=0.15, judge=judge, limit=0.15)
    groups = keep_one_of_each(pairs, apart, rank=lambda number: (number,))
    dropped = {other for _, found in groups for other in found}
    assert len(dropped) >= 590
    assert all({kept, *found} <= set(range(300)) or {kept, *found} <= set(range(300, 600)) for kept, found in groups)


def test_the_angle_between_vectors_is_the_share_of_differing_bits():
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((2, 64)).astype(np.float32)
    vectors[1] = vectors[0] + 0.3 * np.linalg.norm(vectors[0]) * vectors[1] / np.linalg.norm(vectors[1])
    cosine = vectors[0] @ vectors[1] / np.linalg.norm(vectors[0]) / np.linalg.norm(vectors[1])
    bits = sign_bits(vectors, bits=8192)
    share = np.bitwise_count(bits[0] ^ bits[1]).sum() / 8192
    assert abs(share - np.arccos(cosine) / np.pi) < 0.01


def test_in_a_chain_only_what_is_near_to_a_kept_record_is_dropped():
    pairs, apart = np.array([[0, 1], [1, 2], [2, 3]]), np.array([0.1, 0.1, 0.1])
    assert keep_one_of_each(pairs, apart, rank=lambda number: (number,)) == [(0, {1: 0.1}), (2, {3: 0.1})]
    assert keep_one_of_each(pairs, apart, rank=lambda number: (number != 1, number)) == [(1, {0: 0.1, 2: 0.1})]


def test_words_that_say_nothing_do_not_count():
    hashes = np.array([[0, 0, 0, 0], [0, 0, 2**64 - 1, 2**64 - 1]], np.uint64)
    left, right = np.array([0]), np.array([1])
    assert distance(hashes, np.array([15, 15], np.uint8), left, right) == [0.5]
    assert distance(hashes, np.array([15, 3], np.uint8), left, right) == [0.0]
    assert distance(hashes, np.array([15, 1], np.uint8), left, right) == [1.0]


def test_a_hash_survives_noise_and_contrast_and_tells_pictures_apart():
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (2, 8, 8)).astype(float)
    one, other = (np.kron(picture, np.ones((4, 4))) for picture in coarse)
    altered = np.clip(0.8 * one + 20 + generator.normal(0, 4, one.shape), 0, 255)
    bits = [frame_bits(picture.astype(np.uint8), 8) for picture in (one, altered, other)]
    near, far = (int(np.bitwise_count(bits[0] ^ picture).sum()) for picture in bits[1:])
    assert near <= 4
    assert far >= 20
