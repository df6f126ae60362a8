"""The encoder as ONNX, one file for clips of one shape, with a parity report beside it.

Frames and size are fixed in the file (RoPE tables and token counts are constants of the grid), the number of clips is
not. Weights lie in a file of their own beside it, so that a model may exceed the 2 GB of one protobuf; fp32 only.
`frames=1` gives the image tokenizer's file where the encoder has one: the two tokenizers are two files. The
packages onnx, onnxscript and onnxruntime are imported only here.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vjepa.hub.files import file_digest
from vjepa.hub.strict import write_atomically
from vjepa.nn.encoder import Encoder

INSTALL = "pip install onnx onnxruntime onnxscript"
OPSET = 18
TOLERANCE = 1e-4
BATCHES = (1, 3)  # numbers of clips that are compared
INPUT, OUTPUT = "clips", "tokens"


def export_onnx(
    encoder: Encoder, path: Path | str, *, frames: int = 16, size: int = 256, opset: int = OPSET
) -> dict[str, Any]:
    """Write `path` (and `path`.data, the weights), compare it with the encoder, and return the parity report.

    Takes `clips` [B, C, frames, size, size] float32, normalised, gives `tokens` [B, N, D] of the last level. The report
    goes to PATH.parity.json; a difference over 1e-4 on random clips is a ValueError, and the report is there to read.
    """
    require("onnx", "onnxscript", "onnxruntime")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    was_training, device = encoder.training, next(encoder.parameters()).device
    encoder = encoder.cpu().eval()
    try:
        clips = [_clips(encoder, count, frames, size) for count in BATCHES]
        with torch.no_grad():  # also fills the cache of RoPE tables: made while tracing they would be fake, and stay
            expected = [encoder(batch) for batch in clips]
        _write(encoder, clips[-1], path, opset)
    finally:
        encoder.to(device).train(was_training)
    report = _report(path, clips, expected, opset=opset, modality=encoder.modality(clips[0]))
    text = json.dumps(report, indent=2) + "\n"
    write_atomically(report_path(path), lambda temporary: temporary.write_text(text))
    if not report["passed"]:
        raise ValueError(
            f"{path} differs from the encoder by {report['max_abs_difference']:.3g}, more than {TOLERANCE}: do not use "
            f"it; {report_path(path)} has the figures"
        )
    return report


def report_path(path: Path) -> Path:
    return path.with_suffix(".parity.json")


def require(*packages: str) -> None:
    """ValueError with the command that installs what is missing."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ValueError(
                f"exporting to ONNX needs {package}, which does not import ({error}): {INSTALL}"
            ) from error


def _clips(encoder: Encoder, count: int, frames: int, size: int) -> Tensor:
    shape = (count, encoder.config.in_chans, frames, size, size)
    clips = torch.randn(shape, generator=torch.Generator().manual_seed(count))
    encoder.grid(clips)  # refuses what does not fit
    return clips


def _write(encoder: Encoder, clips: Tensor, path: Path, opset: int) -> None:
    batch = torch.export.Dim("batch")
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            encoder,
            (clips,),
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: batch},),
            opset_version=opset,
            verbose=False,
        )
    assert program is not None
    program.save(str(path), external_data=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings about torch's own internals."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        yield


def _report(path: Path, clips: list[Tensor], expected: list[Tensor], *, opset: int, modality: str) -> dict[str, Any]:
    found = [_run(path, batch) for batch in clips]
    differences = [float((mine - theirs).abs().max()) for mine, theirs in zip(found, expected, strict=True)]
    return {
        "max_abs_difference": max(differences),
        "tolerance": TOLERANCE,
        "passed": max(differences) <= TOLERANCE,
        "largest_feature": max(float(tokens.abs().max()) for tokens in expected),
        "clips": [list(batch.shape) for batch in clips],
        "tokens": [list(tokens.shape) for tokens in found],
        "modality": modality,
        "opset": opset,
        "sha256": {file.name: file_digest(file) for file in (path, Path(f"{path}.data")) if file.is_file()},
        "versions": {name: importlib.import_module(name).__version__ for name in ("torch", "onnx", "onnxruntime")},
    }


def _run(path: Path, clips: Tensor) -> Tensor:
    onnxruntime = importlib.import_module("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run([OUTPUT], {INPUT: clips.numpy()})[0])
