"""One input file to its samples: decoded once in full, scaled, cut, written again as clean H.264 or JPEG."""

import errno
import io
import shutil
import warnings
from collections import deque
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.logging
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from PIL import Image

from data_pipeline.avfile import SCALER_THREADS, open_video, quarter_turns, video_stream
from data_pipeline.media import DecodeError
from data_pipeline.picture import upright_rgb
from data_pipeline.prepare.find import Input
from data_pipeline.prepare.options import IngestOptions, Outcome, Record
from data_pipeline.prepare.timeline import Frames, Timeline, grid_length, on_grid, output_rate, scan

_COPY_CODECS = {"h264", "hevc", "vp8", "vp9", "av1"}
_COPY_SUFFIXES = {".mp4", ".mov", ".mkv", ".webm"}  # AVI seeks one frame off: always written again
_KEEP_IMAGES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def convert(item: Input, options: IngestOptions, scratch: Path) -> Outcome:
    """The samples of one input, their media in `scratch`; bad bytes give a note, never an exception."""
    av.logging.set_level(None)
    if item.kind == "skipped":
        return Outcome(notes=[_note(item, "skipped", f"not a video or an image ({item.path.suffix or 'no suffix'})")])
    try:
        if item.path.stat().st_size == 0:
            raise DecodeError("empty file")
        return _image(item, options, scratch) if item.kind == "image" else _video(item, options, scratch)
    except DecodeError as error:
        return Outcome(notes=[_note(item, "rejected", str(error))])
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        return Outcome(notes=[_note(item, "rejected", f"cannot be read: {error.strerror or error}")])
    except (ValueError, ArithmeticError) as error:  # sound bytes of a kind that cannot be scaled or encoded
        return Outcome(notes=[_note(item, "rejected", f"cannot be converted: {type(error).__name__}: {error}")])


def _note(item: Input, status: str, reason: str) -> dict[str, Any]:
    return {"path": item.name, "reason": reason, "status": status}


def _meta(item: Input, start: float, **facts: Any) -> dict[str, Any]:
    return (
        {"source_path": item.name, "start": round(start, 6)} | facts | ({"labels": item.labels} if item.labels else {})
    )


# --- videos ---------------------------------------------------------------------------------------------------------


def _video(item: Input, options: IngestOptions, scratch: Path) -> Outcome:
    with _open(item.path) as container:
        stream = video_stream(container)
        codec = stream.codec_context.name
        timeline = _scan(container)
    if options.copy and not options.stills and timeline.duration <= options.max_seconds:
        record = _copied(item, options, scratch, timeline, codec)
        if record:
            return Outcome([record])
    with _open(item.path) as container:
        frames = Frames(container, video_stream(container), timeline, options.max_pixels)
        writer = _PieceWriter(item, options, scratch, timeline)
        try:
            for frame in on_grid(frames, writer.rate, timeline.duration):
                writer.write(frame)
        finally:
            writer.close()
    return _judge(item, options, frames, writer)


def _judge(item: Input, options: IngestOptions, frames: Frames, writer: "_PieceWriter") -> Outcome:
    """The damaged-tail rule: the intact beginning is kept if it is long enough, and the loss is written down."""
    damage = frames.damage or frames.lost
    if frames.count == 0:
        raise DecodeError(damage or "no frame could be decoded")
    if damage is None:
        return Outcome(writer.records)
    long_enough = max(options.min_frames, options.min_seconds * float(writer.rate))
    kept = [record for record in writer.records if record.meta.get("frames", 0) >= long_enough]
    if not kept:
        raise DecodeError(
            f"{damage}; the {frames.count} intact frames are too few to keep "
            f"({long_enough:g} at {float(writer.rate):g} fps are needed)"
        )
    seconds = kept[-1].meta["start"] + kept[-1].meta["duration"]
    stills = [record for record in writer.records if record.modality == "image"]
    status = "tail lost" if frames.damage else "frames lost"
    note = _note(item, status, f"{damage}; kept the first {seconds:.2f} s")
    return Outcome(kept + stills, [note])


class _PieceWriter:
    """Writes frames on an even grid as MP4 files of equal length, and the stills among them."""

    def __init__(self, item: Input, options: IngestOptions, scratch: Path, timeline: Timeline):
        self.item, self.options, self.scratch = item, options, scratch
        self.rate = output_rate(timeline.rate, options.fps)
        total = grid_length(timeline.duration, self.rate)
        pieces = -(-total // max(1, int(options.max_seconds * self.rate)))
        self.per_piece = -(-total // pieces)
        self.still_at = {int((i + 0.5) * total / options.stills) for i in range(options.stills)}
        self.records: list[Record] = []
        self.written = 0
        self._encoder: _Encoder | None = None
        self._path = scratch

    def write(self, frame: av.VideoFrame) -> None:
        """The next frame of the grid."""
        if self.written % self.per_piece == 0:
            self.close()
            self._path = self.scratch / f"{self.item.key}-{self.written // self.per_piece:04d}.mp4"
            self._encoder = _Encoder(self._path, self.rate, self.options)
        assert self._encoder is not None
        small = scaled(frame, self.options.short_side)
        self._encoder.write(small)
        if self.written in self.still_at:
            self.records.append(self._still(small))
        self.written += 1

    def close(self) -> None:
        """Finish the open piece, if there is one."""
        if self._encoder is None:
            return
        encoder, self._encoder = self._encoder, None
        encoder.close()
        start = float((self.written - encoder.count) / self.rate)
        facts = {
            "frames": encoder.count,
            "fps": float(self.rate),
            "duration": float(encoder.count / self.rate),
            "width": encoder.width,
            "height": encoder.height,
            "codec": "h264",
        }
        meta = _meta(self.item, start, **facts)
        self.records.append(Record(self._path.stem, "mp4", "video", str(self._path), meta))

    def _still(self, frame: av.VideoFrame) -> Record:
        key = f"{self.item.key}-still-{sum(record.modality == 'image' for record in self.records):04d}"
        path = self.scratch / f"{key}.jpg"
        frame.to_image(threads=SCALER_THREADS).save(path, quality=self.options.jpeg_quality)
        facts = _image_facts(frame.width, frame.height, "jpeg")
        return Record(key, "jpg", "image", str(path), _meta(self.item, float(self.written / self.rate), **facts))


class _Encoder:
    """One H.264 MP4: yuv420p, no B-frames.

    One thread and no macroblock tree: with the tree, x264 gives other bytes for the same flat frames in 1 run of 30.
    """

    def __init__(self, path: Path, rate: Fraction, options: IngestOptions):
        self._container = av.open(str(path), "w", format="mp4")
        settings = {"crf": str(options.crf), "preset": options.preset, "tune": "fastdecode", "bf": "0"}
        settings["x264-params"] = "mbtree=0"
        self._stream = self._container.add_stream("libx264", rate=rate, options=settings)
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.thread_count = 1
        self._stream.codec_context.gop_size = options.gop
        self.count = self.width = self.height = 0

    def write(self, frame: av.VideoFrame) -> None:
        context = self._stream.codec_context
        if self.count == 0:
            self.width, self.height = context.width, context.height = frame.width, frame.height
            context.color_range, context.colorspace = frame.color_range, frame.colorspace
        if (frame.width, frame.height) != (self.width, self.height):
            frame = frame.reformat(width=self.width, height=self.height, threads=SCALER_THREADS)
        frame.pts, frame.time_base = self.count, 1 / Fraction(context.framerate)
        frame.pict_type = 0  # the source's key frames mean nothing here
        self._container.mux(self._stream.encode(frame))
        self.count += 1

    def close(self) -> None:
        self._container.mux(self._stream.encode(None))
        self._container.close()


def scaled(frame: av.VideoFrame, short_side: int) -> av.VideoFrame:
    """The frame upright, yuv420p, with even sides, its short side at most `short_side`; its colours untouched."""
    turns = quarter_turns(frame.rotation)
    factor = min(1.0, short_side / min(frame.width, frame.height))
    width, height = (max(2, round(side * factor / 2) * 2) for side in (frame.width, frame.height))
    small = frame.reformat(
        width=width, height=height, format="yuv420p", interpolation="BICUBIC", threads=SCALER_THREADS
    )
    if turns == 0:
        return small
    planes = np.split(small.to_ndarray().ravel(), [width * height, width * height * 5 // 4])
    shapes = [(height, width), (height // 2, width // 2), (height // 2, width // 2)]
    turned = [np.rot90(plane.reshape(shape), turns) for plane, shape in zip(planes, shapes, strict=True)]
    stacked = np.concatenate([plane.ravel() for plane in turned]).reshape(-1, turned[0].shape[1])
    upright = av.VideoFrame.from_ndarray(stacked.astype(np.uint8), format="yuv420p")
    upright.color_range, upright.colorspace = small.color_range, small.colorspace
    return upright


def _copied(item: Input, options: IngestOptions, scratch: Path, timeline: Timeline, codec: str) -> Record | None:
    """The original bytes as a sample; None where the file has to be written again."""
    suffix = item.path.suffix.lower()
    if codec not in _COPY_CODECS or suffix not in _COPY_SUFFIXES:
        return None
    with _open(item.path) as container:
        frames = Frames(container, video_stream(container), timeline, options.max_pixels)
        last = deque(frames, maxlen=1)
    if frames.damage or frames.lost or not last:
        return None
    _, frame = last[0]
    key = f"{item.key}-0000"
    path = scratch / f"{key}{suffix}"
    shutil.copyfile(item.path, path)
    sides = (frame.height, frame.width) if quarter_turns(frame.rotation) % 2 else (frame.width, frame.height)
    facts = {
        "frames": frames.count,
        "fps": frames.count / frames.end if frames.end else float(timeline.rate),
        "duration": frames.end,
        "width": sides[0],
        "height": sides[1],
        "codec": codec,
    }
    return Record(key, suffix[1:], "video", str(path), _meta(item, 0.0, **facts))


def _open(path: Path) -> InputContainer:
    try:
        return open_video(str(path))
    except (FFmpegError, ValueError, EOFError) as error:  # UnicodeDecodeError is a ValueError
        raise DecodeError(f"cannot be opened as a video ({type(error).__name__})") from error


def _scan(container: InputContainer) -> Timeline:
    return scan(container, video_stream(container))


# --- images ---------------------------------------------------------------------------------------------------------


def _image(item: Input, options: IngestOptions, scratch: Path) -> Outcome:
    data = item.path.read_bytes()
    picture, upright = _decoded(data, options.max_pixels)
    ext = _KEEP_IMAGES.get(picture.format or "")
    turned = picture.getexif().get(0x0112, 1) != 1
    factor = options.short_side / min(upright.size)
    if ext is None or turned or factor < 1:
        width, height = (max(1, round(side * min(1.0, factor))) for side in upright.size)
        upright = upright.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
        buffer = io.BytesIO()
        upright.save(buffer, "JPEG", quality=options.jpeg_quality)
        data, ext, codec = buffer.getvalue(), "jpg", "jpeg"
    else:
        codec = str(picture.format).lower()
    path = scratch / f"{item.key}.{ext}"
    path.write_bytes(data)
    meta = _meta(item, 0.0, **_image_facts(*upright.size, codec))
    return Outcome([Record(item.key, ext, "image", str(path), meta)])


def _decoded(data: bytes, max_pixels: int) -> tuple[Image.Image, Image.Image]:
    """The picture as opened and as displayed; DecodeError for anything pillow cannot read in full."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = Image.open(io.BytesIO(data))
            if picture.width * picture.height > max_pixels:
                raise DecodeError(f"{picture.width}x{picture.height} pixels: more than max_pixels={max_pixels}")
            return picture, upright_rgb(picture)
    except (DecodeError, MemoryError):
        raise
    except Exception as error:  # pillow raises OSError, ValueError, SyntaxError, struct.error, ... on bad bytes
        raise DecodeError(f"cannot be read as an image ({type(error).__name__}: {str(error)[:100]})") from error


def _image_facts(width: int, height: int, codec: str) -> dict[str, Any]:
    return {"frames": 1, "fps": 0.0, "duration": 0.0, "width": width, "height": height, "codec": codec}
