"""The decoders of this process: torchcodec and PyAV for videos (same frames for the same times), pillow for images.

decord works in a process of its own: see isolated.py.

torchcodec is imported only when its decoder is made: it needs FFmpeg on the machine. PyAV carries its own.
"""

import io
import weakref
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.avfile import (
    SCALER_THREADS,
    NamelessFile,
    frame_stamps,
    open_container,
    quarter_turns,
    video_stream,
)
from data_pipeline.media import DecodeError, MediaInfo, check_info
from data_pipeline.picture import upright_rgb

_ROUNDING = 1e-6  # seconds


class TorchCodecDecoder:
    """torchcodec in exact seek mode on one thread: the fastest of the decoders measured.

    Where its frames' own times show that they are not those asked for, PyAV decodes them instead.
    On `cuda:N` the frames are decoded by the GPU (by the CPU where its NVDEC does not know the codec) and stay there.
    """

    def __init__(self, data: bytes | Path, max_pixels: int, device: str = "cpu"):
        from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportPrivateImportUsage]

        if (len(data) if isinstance(data, bytes) else data.stat().st_size) == 0:
            raise DecodeError("empty file")
        self._data, self._max_pixels, self._device = data, max_pixels, device
        self._instead: PyAvDecoder | None = None
        source = data
        if isinstance(data, Path):  # as an open file: FFmpeg never sees the path, see `avfile.open_container`
            source = NamelessFile(data)
            weakref.finalize(self, source.close)
        self._decoder = VideoDecoder(source, seek_mode="exact", num_ffmpeg_threads=1, device=device)
        facts = self._decoder.metadata
        begin, end = float(facts.begin_stream_seconds or 0.0), float(facts.end_stream_seconds or 0.0)
        count, header_fps = int(facts.num_frames or 0), float(facts.average_fps or 0.0)
        fps = count / (end - begin) if end > begin else header_fps
        width, height = int(facts.width or 0), int(facts.height or 0)
        self.info = check_info(
            MediaInfo(count, fps, begin, end, width, height, str(facts.codec)), max_pixels=max_pixels
        )

    def frames_at(self, times: np.ndarray) -> Tensor:
        """See `Decoder.frames_at`."""
        if self.info.end <= self.info.begin:  # a single frame without a duration
            return self._decoder.get_frames_at([0] * len(times)).data
        last = np.nextafter(self.info.end, self.info.begin)
        asked = np.clip(times, self.info.begin, last)
        found = self._sought(asked)
        if found is None:  # it has sought past them: MPEG-TS, AVI with B-frames
            self._instead = self._instead or PyAvDecoder(self._data, self._max_pixels)
            return self._instead.frames_at(times).to(self._device)
        return found

    def _sought(self, times: np.ndarray) -> Tensor | None:
        """The frames, or None where their own times show that they are not those asked for."""
        try:
            found = self._decoder.get_frames_played_at(times.tolist())
        except RuntimeError as error:
            if "no more frames left" in str(error):
                return None
            raise
        return None if (found.pts_seconds.cpu().numpy() > times + _ROUNDING).any() else found.data


class PyAvDecoder:
    """PyAV: reads the packets' times, seeks to the key frame before the first wanted frame, decodes up to the last."""

    def __init__(self, data: bytes | Path, max_pixels: int):
        self._data = data
        with open_container(data) as container:
            stream = video_stream(container)
            self._base = stream.time_base
            self._stamps, length = frame_stamps(container, stream)  # int64 [frames], in ticks of the time base
            context = stream.codec_context
            width, height, codec = context.width, context.height, context.name
        if len(self._stamps) == 0:
            raise DecodeError("no frames")
        with open_container(data) as container:  # the rotation is known only once a frame is decoded
            first = next(iter(container.decode(video_stream(container))), None)
        if first is None:
            raise DecodeError("no frames")
        self._turns = quarter_turns(first.rotation)
        if self._turns % 2:
            width, height = height, width
        self._starts = np.array([self._seconds(stamp) for stamp in self._stamps])  # seconds, [frames]
        begin, end = self._seconds(self._stamps[0]), self._seconds(self._stamps[-1] + length)
        fps = len(self._stamps) / (end - begin) if end > begin else 0.0
        self.info = check_info(
            MediaInfo(len(self._stamps), fps, begin, end, width, height, codec), max_pixels=max_pixels
        )

    def frames_at(self, times: np.ndarray) -> Tensor:
        """See `Decoder.frames_at`."""
        shown = np.clip(np.searchsorted(self._starts, times, side="right") - 1, 0, len(self._starts) - 1)  # [T]
        wanted = {int(self._stamps[i]) for i in shown}
        found = self._decode(wanted, seek=True) or self._decode(wanted, seek=False)
        if found is None:
            raise DecodeError(f"{len(wanted)} frames were wanted, the stream ended before all were decoded")
        frames = np.stack([found[int(self._stamps[i])] for i in shown])  # [T, H, W, C]
        return torch.from_numpy(frames).permute(0, 3, 1, 2)  # [T, C, H, W], stored as channels last

    def _decode(self, wanted: set[int], *, seek: bool) -> dict[int, np.ndarray] | None:
        """The wanted frames by time stamp, or None where the stream does not give them all from there."""
        found: dict[int, np.ndarray] = {}
        first, last = min(wanted), max(wanted)
        with open_container(self._data) as container:
            stream = video_stream(container)
            if seek:
                container.seek(first, stream=stream, backward=True)
            for frame in container.decode(stream):
                stamp = frame.pts if frame.pts is not None else frame.dts
                if stamp in wanted and stamp not in found:
                    found[stamp] = np.rot90(frame.to_ndarray(format="rgb24", threads=SCALER_THREADS), self._turns)
                if len(found) == len(wanted) or (seek and stamp is not None and stamp > last):
                    break
        if len({frame.shape for frame in found.values()}) > 1:
            raise DecodeError("the frame size changes inside the stream")
        return found if len(found) == len(wanted) else None

    def _seconds(self, stamp: int) -> float:
        base = self._base
        return float(int(stamp)) * base.numerator / base.denominator if base else 0.0


class ImageDecoder:
    """pillow: EXIF orientation applied, RGB; the picture stands still for any number of frames."""

    def __init__(self, data: bytes | Path, max_pixels: int):
        picture = Image.open(io.BytesIO(data if isinstance(data, bytes) else data.read_bytes()))
        codec, (width, height) = str(picture.format).lower(), picture.size
        check_info(MediaInfo(1, 1.0, 0.0, 1.0, width, height, codec), max_pixels=max_pixels)  # before decoding it
        self._pixels = np.asarray(upright_rgb(picture))  # [H, W, C]
        height, width, _ = self._pixels.shape
        self.info = MediaInfo(1, 1.0, 0.0, 1.0, width, height, codec)

    def frames_at(self, times: np.ndarray) -> Tensor:
        """See `Decoder.frames_at`; all T frames are the same memory."""
        frame = torch.from_numpy(self._pixels.copy()).permute(2, 0, 1)  # [C, H, W], stored as channels last
        return frame.expand(len(times), *frame.shape)
