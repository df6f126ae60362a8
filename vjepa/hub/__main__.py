"""Weights from the command line.

python -m vjepa.hub info MODEL [--verify]
python -m vjepa.hub export MODEL OUT --format safetensors|hf|onnx [--dtype bf16] [--size 256 --frames 16] ...

MODEL is a released .pt, a folder of ours (RUN/exports/STAGE) or a Hugging Face folder of VJEPA2Model.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vjepa import hub
from vjepa.hub.folder import DTYPES, read_config, verify
from vjepa.hub.info import describe
from vjepa.hub.onnx_export import OPSET, export_onnx
from vjepa.nn.encoder import Encoder
from vjepa.nn.predictor import Predictor

FORMATS = ("safetensors", "hf", "onnx")
ONLY = {"licence": "safetensors", "opset": "onnx"}  # options of one format
DEFAULTS = {"safetensors": (None, None), "hf": (256, 64), "onnx": (256, 16)}  # size, frames


def main(arguments: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = _parser().parse_args(arguments)
    try:
        if options.command == "info":
            _info(options)
        else:
            _export(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m vjepa.hub", description="What weights are, and other formats.")
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="which model a file or folder holds")
    info.add_argument("model", type=Path)
    info.add_argument("--verify", action="store_true", help="compare the files with the SHA-256 in config.json")
    export = commands.add_parser("export", help="write a model in another format")
    export.add_argument("model", type=Path)
    export.add_argument("out", type=Path, help="a folder")
    export.add_argument("--format", choices=FORMATS, default="safetensors")
    export.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of the stored weights")
    export.add_argument("--size", type=int, help="pixels of a square clip; default: as trained, else 256")
    export.add_argument("--frames", type=int, help="of a clip; default: as trained, else 64 (hf) or 16 (onnx)")
    export.add_argument("--opset", type=int, help=f"of ONNX, default {OPSET}")
    export.add_argument(
        "--no-predictor", dest="predictor", action="store_false", help="the encoder alone (ONNX: always)"
    )
    export.add_argument("--licence", help="for the model card, an SPDX name such as apache-2.0")
    return parser


def _info(options: argparse.Namespace) -> None:
    facts = describe(options.model)
    if options.verify:
        if options.model.is_file():
            raise ValueError(f"--verify: of a released file such as {options.model} no SHA-256 is known")
        facts["verified"] = f"the SHA-256 of {', '.join(verify(options.model))}"
    for label, words in facts.items():
        print(f"{label + ':':<24} {words}")


def _check_export(options: argparse.Namespace) -> None:
    """Refuse options of another format and damaged weights: what is passed on is what was exported."""
    if options.out.resolve() == options.model.resolve():
        raise ValueError(f"OUT is MODEL, {options.model}, which it would overwrite: give another folder")
    for name, only in ONLY.items():
        if getattr(options, name) is not None and options.format != only:
            raise ValueError(f"--{name} belongs to --format {only}, not {options.format}: leave it out")
    if options.format == "onnx" and options.dtype != "fp32":
        raise ValueError(f"--dtype {options.dtype}: ONNX files are written in fp32, leave --dtype out")
    if options.model.is_dir() and read_config(options.model).get("sha256"):
        verify(options.model)


def _export(options: argparse.Namespace) -> None:
    _check_export(options)
    encoder, trained_on = hub.from_pretrained(options.model), _pretraining(options.model)
    size, frames = (
        given or trained_on.get(name) or default
        for name, given, default in zip(
            ("size", "frames"), (options.size, options.frames), DEFAULTS[options.format], strict=True
        )
    )
    if options.format == "onnx":
        _to_onnx(encoder, options, frames, size)
        return
    predictor = hub.predictor_from_pretrained(options.model) if options.predictor else None
    if options.format == "hf":
        hub.export_hf(encoder, options.out, predictor, size=size, frames=frames, dtype=options.dtype)
        print(f"{options.out}: {_compared(encoder, options.out, predictor)}")
        return
    clip = {"size": size, "frames": frames}
    described = {**trained_on, **{name: value for name, value in clip.items() if value is not None}}
    extra = {"pretraining": {"source": options.model.name, **described}}
    hub.save_pretrained(
        encoder, options.out, predictor=predictor, extra=extra, dtype=options.dtype, licence=options.licence
    )
    print(f"{options.out}: model.safetensors in {options.dtype}, config.json, preprocessor_config.json, README.md")


def _to_onnx(encoder: Encoder, options: argparse.Namespace, frames: int, size: int) -> None:
    """A file for video, and one for images where the encoder has a tokenizer of its own for them."""
    files = {"video.onnx": frames} | ({"image.onnx": 1} if encoder.config.image_tokenizer else {})
    for name, count in files.items():
        report = export_onnx(encoder, options.out / name, frames=count, size=size, opset=options.opset or OPSET)
        print(f"{options.out / name}: differs by at most {report['max_abs_difference']:.2g} on random clips")


def _compared(encoder: Encoder, folder: Path, predictor: Predictor | None) -> str:
    if importlib.util.find_spec("transformers") is None:
        return "written; transformers is not installed here, so the two were not compared"
    what = "features" if predictor is None else "features and predictions"
    return f"transformers' {what} differ by at most {hub.compare_with_transformers(encoder, folder, predictor):.2g}"


def _pretraining(model: Path) -> dict[str, Any]:
    """What a folder of ours, or a Hugging Face folder, says of its clips."""
    if model.is_file():
        return {}
    stored = read_config(model)
    if stored.get("model_type"):
        return {"size": stored.get("crop_size", 256), "frames": stored.get("frames_per_clip", 64)}
    return stored.get("pretraining", {})


if __name__ == "__main__":
    sys.exit(main())
