"""An episode as a film: GIF by Pillow alone, MP4 with the extra `video`."""

import zlib
from collections.abc import Iterable, Iterator
from itertools import chain, repeat
from math import ceil
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from upslope.report.files import replacing

Frame = UInt8[np.ndarray, "height width 3"]
SUFFIXES = (".gif", ".mp4")
GIF_FPS = 30.0  # more makes large files, and above 50 browsers slow a GIF down


def write_video(
    frames: Iterable[Frame],
    path: Path | str,
    fps: float = 30.0,
    *,
    max_width: int | None = 480,
    max_fps: float | None = None,
    captions: str | Iterable[str] | None = None,
) -> None:
    """Write frames (uint8, [height, width, 3], all of one shape) to `path`: the whole file or none.

    fps        frames per second of the input; the film plays at the speed of the environment
    max_width  pixels; wider frames are made smaller, narrower ones are left alone; None: never
    max_fps    above it only every k-th frame is kept, k = ceil(fps / max_fps); None: 30 for a GIF, no limit for an MP4
    captions   a bar below the picture: one text for all frames, or one for each

    A GIF has one palette for all frames, so colours do not flicker. Equal neighbours are stored once, for longer.

    Raises ValueError for no frames, another dtype or shape, an unknown suffix, fewer captions than frames, or an MP4
    without the extra that it needs.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"path: {path.name} must end in one of {', '.join(SUFFIXES)}")
    for name, number in (("fps", fps), ("max_width", max_width), ("max_fps", max_fps)):
        if number is not None and not number > 0:
            raise ValueError(f"{name} must be greater than 0, got {number}")
    ceiling = GIF_FPS if suffix == ".gif" and max_fps is None else max_fps
    every = 1 if ceiling is None else max(1, ceil(fps / ceiling))
    pictures = prepared(frames, every, max_width, captions)
    first = next(pictures, None)
    if first is None:
        raise ValueError("frames: there is none")
    write = write_gif if suffix == ".gif" else write_mp4
    with replacing(path) as temporary:
        write(chain([first], pictures), temporary, fps / every)


def prepared(
    frames: Iterable[Frame], every: int, max_width: int | None, captions: str | Iterable[str] | None
) -> Iterator[Image.Image]:
    """Check every frame; keep each `every`-th, scaled and captioned."""
    texts = repeat(captions) if captions is None or isinstance(captions, str) else iter(captions)
    shape: tuple[int, ...] | None = None
    for index, frame in enumerate(frames):
        checked(frame, index, shape)
        shape = frame.shape
        text = next(texts, False)
        if text is False:
            raise ValueError(f"captions: there are {index}, and more frames")
        if index % every:
            continue
        picture = Image.fromarray(frame)
        if max_width is not None and picture.width > max_width:
            size = max_width, max(1, round(picture.height * max_width / picture.width))
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        yield picture if text is None else captioned(picture, str(text))


def checked(frame: Frame, index: int, shape: tuple[int, ...] | None) -> None:
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8:
        kind = frame.dtype if isinstance(frame, np.ndarray) else type(frame).__name__
        raise ValueError(f"frames: frame {index} must be a numpy array of uint8, got {kind}")
    if frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
        raise ValueError(f"frames: frame {index} must have shape [height, width, 3], got {list(frame.shape)}")
    if shape is not None and frame.shape != shape:
        raise ValueError(f"frames: frame {index} has shape {list(frame.shape)}, those before it {list(shape)}")


def captioned(picture: Image.Image, text: str) -> Image.Image:
    """The picture with a dark bar below it; the text is cut where the picture ends."""
    height = max(14, picture.width // 24)
    canvas = Image.new("RGB", (picture.width, picture.height + height + 6), (24, 28, 34))
    canvas.paste(picture)
    draw = ImageDraw.Draw(canvas)
    position = 6, picture.height + 3 + height / 2
    draw.text(position, text, fill=(235, 235, 235), font=ImageFont.load_default(size=0.8 * height), anchor="lm")
    return canvas


def write_gif(pictures: Iterable[Image.Image], path: Path, fps: float) -> None:
    # Two passes, the palette first. Packed frames of a simulator take a few kB each, so long episodes fit in memory.
    pictures = iter(pictures)
    first = next(pictures)
    packed = [zlib.compress(picture.tobytes(), 1) for picture in chain([first], pictures)]

    def unpack(data: bytes) -> Image.Image:
        return Image.frombytes("RGB", first.size, zlib.decompress(data))

    palette = shared_palette([unpack(packed[i]) for i in np.unique(np.linspace(0, len(packed) - 1, 16).astype(int))])
    indexed = (unpack(data).quantize(palette=palette, dither=Image.Dither.NONE) for data in packed)
    next(indexed).save(
        path,
        format="GIF",
        save_all=True,
        append_images=indexed,
        duration=durations(len(packed), fps),
        loop=0,
        optimize=True,
    )


def shared_palette(sample: list[Image.Image]) -> Image.Image:
    """256 colours for all frames, chosen over a strip of some of them."""
    width, height = sample[0].size
    strip = Image.new("RGB", (width, height * len(sample)))
    for position, picture in enumerate(sample):
        strip.paste(picture, (0, position * height))
    return strip.quantize(256, method=Image.Quantize.MEDIANCUT)


def durations(count: int, fps: float) -> list[int]:
    """Milliseconds of each frame. A GIF counts hundredths of a second; rounding the ends keeps the whole exact.

    >>> durations(3, 30.0)
    [30, 40, 30]
    """
    ends = np.floor(np.arange(count + 1) * 100 / fps + 0.5).astype(int) * 10
    return np.diff(ends).tolist()


def write_mp4(pictures: Iterable[Image.Image], path: Path, fps: float) -> None:
    try:
        import imageio_ffmpeg
    except ImportError:
        raise ValueError(
            'an MP4 needs imageio-ffmpeg: pip install "upslope[video]"; a path that ends in .gif needs nothing more'
        ) from None
    writer = None
    try:
        for picture in pictures:
            # H.264 halves the colour resolution, so both sides must be even: repeat the last row or column.
            pixels = np.asarray(picture)
            pixels = np.pad(pixels, ((0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0)), mode="edge")
            if writer is None:
                size = pixels.shape[1], pixels.shape[0]
                writer = imageio_ffmpeg.write_frames(
                    str(path), size, fps=fps, codec="libx264", macro_block_size=2, ffmpeg_log_level="error"
                )
                writer.send(None)
            writer.send(np.ascontiguousarray(pixels))
    finally:
        if writer is not None:
            writer.close()
