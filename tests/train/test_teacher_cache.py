"""What a frozen teacher has said is kept on disk: the numbers stay, the teacher rests, and nothing wrong is read."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import vjepa
from tests.objectives.test_losses import micro_batch
from tests.train.conftest import DebugRun
from tests.train.ranks import on_ranks, train_debug
from vjepa.objectives import ObjectiveConfig
from vjepa.objectives.config import TeacherConfig
from vjepa.objectives.targets import FrozenTarget
from vjepa.objectives.teacher_cache import TeacherCache

STEPS = 2
SMALL = ("data.video.clip.frames=2", "data.video.clip.size=32", "data.image.clip.size=32")
SHORT = (f"train.steps={STEPS}", "train.batch.video=4", "train.batch.image=4", *SMALL)
ORDINALS = STEPS * 4


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vjepa.hub.save_pretrained(vjepa.create_model("vit_debug", seed=9), tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def student(debug_run: DebugRun, teacher: Path) -> DebugRun:
    """`student(run_dir, "key=value", ..., cache=FOLDER)` distils for a few steps."""

    def run(run_dir: Path, *overrides: str, cache: Path | None = None, **options: Any) -> Path:
        own = () if cache is None else (f"objective.teacher.cache={cache}",)
        told = (f"objective.teacher.path={teacher}", *own, *SHORT, *overrides)
        return debug_run(run_dir, *told, options=["distill"], **options)

    return run


@pytest.fixture(scope="module")
def without(student: DebugRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return student(tmp_path_factory.mktemp("without") / "run")


@pytest.fixture(scope="module")
def filled(student: DebugRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder, and beside it the run that filled it."""
    folder = tmp_path_factory.mktemp("filled")
    student(folder / "run", cache=folder / "cache")
    return folder / "cache"


@pytest.fixture
def cache(filled: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(filled, tmp_path / "cache"))


@pytest.fixture
def asleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher must not be asked."""

    def refuse(self: FrozenTarget, clips: object) -> None:
        raise AssertionError("the teacher was asked")

    monkeypatch.setattr(FrozenTarget, "forward", refuse)


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in rows(run)]


def cached(run: Path) -> list[float]:
    return [row["teacher_cached"] for row in rows(run)]


def operations(run: Path) -> float:
    """Tera operations of the last step."""
    return rows(run)[-1]["tflops_per_second"] * rows(run)[-1]["step_seconds"]


def files(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.safetensors"))


def content(cache: Path) -> dict[Path, tuple[dict[str, str], list[float]]]:
    """What each file says of itself, and its targets."""
    found = {}
    for path in files(cache):
        with safe_open(path, framework="pt") as file:
            found[path.relative_to(cache)] = (file.metadata(), file.get_tensor("targets").flatten().tolist())
    return found


def test_losses_are_the_same_without_a_cache_and_with_a_cold_one(without: Path, filled: Path) -> None:
    cold = filled.parent / "run"
    assert losses(cold) == losses(without)
    assert cached(cold) == [0.0] * STEPS
    assert len(files(filled)) == 2 * ORDINALS
    assert not [path for path in filled.rglob(".*") if path.is_file()], "a part was left"


@pytest.mark.usefixtures("asleep")
def test_a_repeated_run_has_the_same_losses_and_never_asks_the_teacher(
    student: DebugRun, without: Path, filled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    warm = student(tmp_path / "run", cache=filled)
    assert losses(warm) == losses(without)
    assert cached(warm) == [1.0] * STEPS
    assert f"teacher cache {filled}: {2 * ORDINALS} clips read, 0 clips computed" in capsys.readouterr().out
    assert operations(warm) < 0.95 * operations(filled.parent / "run"), "the teacher's are counted, too"


@pytest.mark.usefixtures("asleep")
@pytest.mark.parametrize("override", ["model.embed_dim=96", "train.micro_batch.video=2"])
def test_another_student_and_other_micro_batches_read_what_is_there(
    student: DebugRun, filled: Path, tmp_path: Path, override: str
) -> None:
    more = ["train.micro_batch.image=2", "mask.group.video=2", "mask.group.image=2"] if "micro" in override else []
    assert cached(student(tmp_path / "run", override, *more, cache=filled)) == [1.0] * STEPS


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.seed=1", "video: seed: there 0, here 1"),
        ("data.video.clip.size=64", "clips of debug: there ClipConfig"),
        ("data.video.clip.flip=0", "flip=0.0"),
        ("objective.teacher.levels=[2]", r"teacher: levels: there \[4\], here \[2\]"),
        ("objective.teacher.cache_dtype=bf16", "kept as: there torch.float32, here torch.bfloat16"),
        ("train.precision=bf16", "computed in: there as the weights, here torch.bfloat16"),
    ],
)
def test_a_folder_of_other_clips_or_of_another_teacher_is_refused(
    student: DebugRun, cache: Path, tmp_path: Path, override: str, said: str
) -> None:
    before = content(cache)
    with pytest.raises(ValueError, match=said):
        student(tmp_path / "run", override, cache=cache)
    assert content(cache) == before


def test_a_folder_of_other_weights_is_refused(student: DebugRun, filled: Path, tmp_path: Path) -> None:
    other = vjepa.hub.save_pretrained(vjepa.create_model("vit_debug", seed=10), tmp_path / "other")
    with pytest.raises(ValueError, match="sha256 of the weights: there"):
        student(tmp_path / "run", f"objective.teacher.path={other}", cache=filled)


def test_images_alone_are_other_passes_but_the_same_files(student: DebugRun, filled: Path, tmp_path: Path) -> None:
    run = student(tmp_path / "run", "train.batch.video=0", "train.micro_batch.video=0", cache=filled)
    assert cached(run) == [1.0] * STEPS


@pytest.mark.usefixtures("asleep")
def test_shards_may_move(student: DebugRun, filled: Path, debug_shards: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(debug_shards, tmp_path / "elsewhere")
    sources = [f"data.{modality}.sources.debug.path={moved}" for modality in ("video", "image")]
    assert cached(student(tmp_path / "run", *sources, cache=filled)) == [1.0] * STEPS


def test_a_stream_whose_places_name_no_clip_is_refused(student: DebugRun, debug_shards: Path, tmp_path: Path) -> None:
    how = ["prepare.debug=none", f"data.video.sources.debug.path={sorted(debug_shards.glob('video*.tar'))[0]}"]
    with pytest.raises(ValueError, match=r"data.video.sources.debug is a webdataset stream.*ingest it"):
        student(tmp_path / "run", *how, cache=tmp_path / "cache")


def test_of_founders_at_once_one_decides_and_the_others_are_refused(tmp_path: Path) -> None:
    [batch] = micro_batch("video").values()
    targets = [torch.zeros(len(batch), math.prod(batch.grid), 8)]

    def found(teacher: str) -> str:
        cache = TeacherCache(tmp_path, teacher={"name": teacher}, clips={"video": {}}, dtype=torch.float32)
        try:
            cache.targets([batch], lambda: targets)
        except ValueError:
            return "refused"
        return teacher

    with ThreadPoolExecutor(8) as pool:
        ends = list(pool.map(found, ["first", "second"] * 8))
    assert sorted(set(ends)) in (["first", "refused"], ["refused", "second"])
    assert ends.count("refused") == 8
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("spoil", ["missing", "truncated", "flipped", "empty", "of another record"])
def test_a_file_that_is_missing_or_damaged_is_computed_and_written_anew(
    student: DebugRun, without: Path, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: str
) -> None:
    path, before = files(cache)[5], content(cache)
    whole = path.read_bytes()
    if spoil == "missing":
        path.unlink()
    else:
        spoilt = {
            "truncated": whole[:-100],
            "flipped": whole[:-1] + bytes([whole[-1] ^ 1]),
            "empty": b"",
            "of another record": files(cache)[4].read_bytes(),
        }
        path.write_bytes(spoilt[spoil])
    with caplog.at_level(logging.WARNING):
        run = student(tmp_path / "run", cache=cache)
    assert losses(run) == losses(without)
    assert 0.0 in cached(run)
    assert 1.0 in cached(run)
    assert content(cache) == before
    is_damage = spoil in ("truncated", "flipped", "empty")
    assert is_damage == any(f"{path} is damaged" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("goes_on_with_it", [True, False])
def test_a_full_disk_names_file_and_remedy_and_the_run_goes_on_as_if_nothing_had_been(
    student: DebugRun, without: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, goes_on_with_it: bool
) -> None:
    write, folder = Path.write_bytes, tmp_path / "cache"

    def write_half(self: Path, data: bytes) -> int:
        if "image" in self.parts and "000000006" in self.name:  # in the second step
            write(self, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_half)
        with pytest.raises(OSError, match=r"000000006.safetensors cannot be written .*No space left.*cache=null"):
            student(tmp_path / "run", "train.checkpoint.every=1", cache=folder)
    assert not list((folder / "image").rglob("*000000006*"))
    rest = () if goes_on_with_it else ("objective.teacher.cache=null",)
    own = folder if goes_on_with_it else None
    again = student(tmp_path / "run", "train.checkpoint.every=1", *rest, cache=own, resume=True)
    assert losses(again) == losses(without)
    assert (len(files(folder)) == 2 * ORDINALS) == goes_on_with_it


def test_a_file_that_cannot_be_read_stops_the_run(student: DebugRun, cache: Path, tmp_path: Path) -> None:
    path = files(cache)[0]
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match=rf"{path} cannot be read .*objective.teacher.cache=null"):
        student(tmp_path / "run", cache=cache)


def test_targets_kept_in_bf16_are_the_same_read_computed_or_not_kept(
    student: DebugRun, without: Path, tmp_path: Path
) -> None:
    how = "objective.teacher.cache_dtype=bf16"
    runs = [
        student(tmp_path / name, how, cache=cache)
        for name, cache in [("plain", None), ("cold", tmp_path / "cache"), ("warm", tmp_path / "cache")]
    ]
    assert losses(runs[0]) == losses(runs[1]) == losses(runs[2])
    assert losses(runs[0]) != losses(without)
    assert losses(runs[0]) == pytest.approx(losses(without), rel=1e-3)
    assert cached(runs[2]) == [1.0] * STEPS


@pytest.mark.parametrize("target", ["ema", "online", "pixels", "none"])
def test_a_cache_without_a_frozen_teacher_is_refused(target: Any) -> None:
    with pytest.raises(ValueError, match=f"teacher.cache=here .*objective.target=frozen, not {target}"):
        ObjectiveConfig(target=target, teacher=TeacherConfig(cache="here"))


def fails_alone(out: Path, shards: Path, teacher: Path, cache: Path) -> str:
    """What this rank's run says of its end."""
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(AssertionError, match="exit status 1"):
        of_two(out, shards, teacher, cache, "fsdp")
    return said.getvalue()


@pytest.mark.distributed
def test_where_one_rank_cannot_read_both_stop(debug_shards: Path, teacher: Path, cache: Path, tmp_path: Path) -> None:
    path = cache / "image/000000/000000002.safetensors"  # rank 1's in the first step
    path.unlink()
    path.mkdir()
    [first, second] = on_ranks(2, fails_alone, tmp_path / "run", debug_shards, teacher, cache)
    assert f"{path} cannot be read" in second
    assert "another rank stopped at its part of objective.teacher.cache" in first


def of_two(out: Path, shards: Path, teacher: Path, cache: Path, mode: str) -> None:
    train_debug(
        out,
        shards,
        *("--option", "distill", *SHORT, f"train.parallel.mode={mode}"),
        *(f"objective.teacher.path={teacher}", f"objective.teacher.cache={cache}"),
    )


@pytest.mark.distributed
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_ranks_agree_to_compute_where_one_lacks_a_file(
    debug_shards: Path, teacher: Path, cache: Path, without: Path, tmp_path: Path, mode: str
) -> None:
    before = set(files(cache))
    (cache / "video/000000/000000001.safetensors").unlink()  # rank 0's in the first step
    on_ranks(2, of_two, tmp_path / "run", debug_shards, teacher, cache, mode)
    assert cached(tmp_path / "run") == [0.0, 1.0]
    assert losses(tmp_path / "run") == pytest.approx(losses(without), rel=1e-5)
    assert set(files(cache)) == before
