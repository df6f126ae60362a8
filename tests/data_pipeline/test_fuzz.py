"""Claim: each of a hundred damaged files is decoded or rejected by name, by every decoder and by ingest."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from data_pipeline.config import Backend
from data_pipeline.decode import choose_backend
from tests.benchmarks.fuzz_campaign import check, ingest_all, load, make_files

FILES = 100


@pytest.fixture(scope="module")
def fuzzed(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("fuzz") / "files"
    return folder, make_files(clips, folder, files=FILES, seed=0, originals=False)


@pytest.mark.parametrize("decoder", ["torchcodec", "pyav", "decord"])
def test_a_loader_accounts_for_every_damaged_file(fuzzed: tuple[Path, list[str]], decoder: Backend):
    if decoder == "torchcodec" and choose_backend("auto") != "torchcodec":
        pytest.skip("torchcodec does not load on this machine (FFmpeg is missing)")
    if decoder == "decord" and find_spec("decord") is None:
        pytest.skip("decord is not installed: x86-64 Linux only")
    row = load(*fuzzed, decoder)
    check(row, fuzzed[1])
    found = row.count()
    assert found["decoded"] > FILES // 5
    assert found["rejected"] > FILES // 5
    assert (found["crashed"] > 0) == (decoder == "decord"), "decord no longer dies: is it still worth its own process?"


def test_ingest_accounts_for_every_damaged_file(fuzzed: tuple[Path, list[str]], tmp_path: Path):
    row = ingest_all(*fuzzed, tmp_path)
    check(row, fuzzed[1])
    assert row.count()["decoded"] > FILES // 5
    assert row.count()["rejected"] > FILES // 5
