"""What a person may give by mistake, or a disk or a server may break: each is one line that says what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import vjepa
from tests.hub.released_files import version_2, write
from vjepa.config import PredictorSettings
from vjepa.hub import from_pretrained, predictor_from_pretrained, save_pretrained
from vjepa.hub.__main__ import main
from vjepa.registry import create_predictor

PAGE = b"<!DOCTYPE html>\n<html><body>403 Forbidden</body></html>\n"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5100000000\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of ours, predictor and all."""
    encoder = vjepa.create_model("vit_debug", levels=(3,), seed=3)
    predictor = create_predictor(PredictorSettings(embed_dim=24, depth=1).predictor_config(encoder.config))
    return save_pretrained(encoder, tmp_path / "ours", predictor=predictor)


def refused(capsys: pytest.CaptureFixture[str], *command: object) -> str:
    """The one line that the command says of what it cannot do."""
    assert main([str(part) for part in command]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def cut(path: Path, size: int = -100) -> None:
    path.write_bytes(path.read_bytes()[:size])


def flip(path: Path) -> None:
    """Another value of one weight: no reader of the format can see it."""
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)


def holding(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


RELEASED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a web page": (holding(PAGE), "is a web page saved under this name"),
    "a pointer": (holding(POINTER), "is a pointer of Git LFS"),
    "empty": (holding(b""), "is empty: copy or download it again"),
    "cut short": (cut, "bytes without the list of contents that ends a torch file"),
    "cut in half": (lambda path: cut(path, path.stat().st_size // 2), "let `wget -c` go on"),
    "a picture": (holding(b"\x89PNG\r\n\x1a\n" + bytes(100)), "cannot be read as a torch checkpoint"),
    "objects": (lambda path: torch.save({"encoder": Path("x")}, path), "holds more than tensors and plain values"),
    "a tensor": (lambda path: torch.save(torch.ones(2), path), "no 'predictor' entry, found Tensor"),
    "other weights": (lambda path: torch.save({"model": {}}, path), "no 'predictor' entry, found ['model']"),
}


@pytest.mark.parametrize("case", RELEASED)
@pytest.mark.parametrize("command", ["info", "export"])
def test_a_released_file_that_is_none(
    case: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, version_2(), "vitl.pt")
    breaks, told = RELEASED[case]
    breaks(path)
    line = refused(capsys, command, path, *([tmp_path / "out"] if command == "export" else []))
    assert line.startswith(f"error: {path} ")
    assert told in line
    assert not (tmp_path / "out").exists()


def test_a_file_of_another_size_under_a_released_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As where vitG lands in the file called vitg, on a disk that ignores case."""
    path = write(tmp_path, version_2(), "vitg.pt")
    assert "On a disk that ignores case, vitg and vitG overwrite each other" in refused(capsys, "info", path)


FOLDERS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "weights cut short": ("model.safetensors", cut, "is cut short, "),
    "weights cut in the header": ("model.safetensors", lambda path: cut(path, 200), "is no whole safetensors file"),
    "weights are a page": ("model.safetensors", holding(PAGE), "is a web page"),
    "weights are a pointer": ("model.safetensors", holding(POINTER), "is a pointer of Git LFS"),
    "no weights": ("model.safetensors", Path.unlink, "is missing"),
    "predictor cut short": ("predictor.safetensors", cut, "is cut short, "),
    "no predictor": ("predictor.safetensors", Path.unlink, "is missing"),
    "config cut short": ("config.json", cut, "is no JSON"),
    "config is a list": ("config.json", holding(b"[]"), "holds a list, no mapping"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_of_ours_that_is_damaged(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, breaks, told = FOLDERS[case]
    breaks(folder / name)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        (predictor_from_pretrained if "predictor" in case else from_pretrained)(folder)
    assert str(caught.value).startswith(str(folder / name))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(folder / name) in refused(capsys, "export", folder, folder.parent / "out")
    assert not (folder.parent / "out").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "predictor.safetensors"])
def test_a_flipped_bit_is_found_by_verify_and_is_never_passed_on(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", str(folder), "--verify"]) == 0
    assert "the SHA-256 of model.safetensors, predictor.safetensors\n" in capsys.readouterr().out
    flip(folder / name)
    from_pretrained(folder)  # is not asked: see vjepa.hub.folder.verify
    for command in (("info", folder, "--verify"), ("export", folder, folder.parent / "out")):
        assert f"{folder / name} is not what was exported: its SHA-256 is" in refused(capsys, *command)


def test_what_has_no_sha_256_cannot_be_verified(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(folder.parent, version_2())
    assert "no SHA-256 is known" in refused(capsys, "info", path, "--verify")
    stored = json.loads((folder / "config.json").read_text())
    del stored["sha256"]
    (folder / "config.json").write_text(json.dumps(stored))
    assert "has no SHA-256 of its files" in refused(capsys, "info", folder, "--verify")
    assert main(["export", str(folder), str(folder.parent / "out")]) == 0, "a folder from before"


def test_wrong_paths(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "gone does not exist: give a folder" in refused(capsys, "info", tmp_path / "gone")
    assert "holds no config.json: give a folder" in refused(capsys, "info", tmp_path)
    assert "holds safetensors, not a released .pt" in refused(capsys, "info", folder / "model.safetensors")
    assert "cannot be read as a torch checkpoint" in refused(capsys, "info", folder / "config.json")
    assert "OUT is MODEL" in refused(capsys, "export", folder, folder / ".." / "ours", "--dtype", "bf16")
    assert "config.json" in refused(capsys, "export", folder, folder / "config.json"), "OUT is a file"
    folder.rename(tmp_path / "moved")
    (tmp_path / "run" / "exports").mkdir(parents=True)
    (tmp_path / "moved").rename(tmp_path / "run" / "exports" / "primary")
    told = refused(capsys, "info", tmp_path / "run")
    assert f"run is a run: give one of its exports, {tmp_path}/run/exports/primary" in told


def test_an_export_over_another_leaves_no_predictor_of_the_other(folder: Path) -> None:
    save_pretrained(from_pretrained(folder), folder)
    assert predictor_from_pretrained(folder) is None
    assert not (folder / "predictor.safetensors").exists()
