import builtins
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageSequence

from upslope.report.files import replacing
from upslope.report.video import write_video

Frames = list[np.ndarray]


def moving_square(count: int, height: int = 40, width: int = 60) -> Frames:
    """A red square that moves one pixel per frame over a blue ground."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    frames[..., 2] = 200
    for index, frame in enumerate(frames):
        left = index % (width - 8)
        frame[10:18, left : left + 8] = (255, 0, 0)
    return list(frames)


def read_gif(path: Path) -> tuple[Frames, int]:
    """Frames, and milliseconds in all."""
    with Image.open(path) as film:
        frames = [(np.asarray(frame.convert("RGB")), frame.info["duration"]) for frame in ImageSequence.Iterator(film)]
        assert film.info["loop"] == 0
    return [frame for frame, _ in frames], sum(duration for _, duration in frames)


@pytest.mark.parametrize(("fps", "milliseconds"), [(10, 1200), (24, 500), (12, 1000)])
def test_a_gif_is_read_back(tmp_path: Path, fps: float, milliseconds: int) -> None:
    frames = moving_square(12)
    write_video(iter(frames), tmp_path / "film.gif", fps)
    found, duration = read_gif(tmp_path / "film.gif")
    assert len(found) == 12
    assert duration == milliseconds
    for frame, original in zip(found, frames, strict=True):
        np.testing.assert_array_equal(frame, original)  # two colours fit into any palette


def test_fast_films_keep_their_time_and_lose_frames(tmp_path: Path) -> None:
    write_video(moving_square(40), tmp_path / "film.gif", fps=50)
    found, duration = read_gif(tmp_path / "film.gif")
    assert (len(found), duration) == (20, 800)  # every second frame, 40 frames at 50 per second
    np.testing.assert_array_equal(found[3], moving_square(40)[6])
    write_video(moving_square(40), tmp_path / "film.gif", fps=50, max_fps=10)
    assert [len(read_gif(tmp_path / "film.gif")[0]), read_gif(tmp_path / "film.gif")[1]] == [8, 800]


def test_equal_frames_cost_time_not_frames(tmp_path: Path) -> None:
    still = moving_square(1) * 5 + moving_square(2)[1:]
    write_video(still, tmp_path / "film.gif", fps=10)
    found, duration = read_gif(tmp_path / "film.gif")
    assert (len(found), duration) == (2, 600)


def test_wide_frames_shrink_and_narrow_ones_do_not_grow(tmp_path: Path) -> None:
    write_video(moving_square(2, 100, 200), tmp_path / "film.gif", max_width=50)
    assert read_gif(tmp_path / "film.gif")[0][0].shape == (25, 50, 3)
    write_video(moving_square(2, 100, 200), tmp_path / "film.gif", max_width=300)
    assert read_gif(tmp_path / "film.gif")[0][0].shape == (100, 200, 3)


def test_captions_have_their_own_bar(tmp_path: Path) -> None:
    frames = moving_square(3)
    write_video(frames, tmp_path / "film.gif", captions=["", "m", "mm"])
    found, _ = read_gif(tmp_path / "film.gif")
    assert found[0].shape == (60, 60, 3)  # 40 and a bar of 14 + 6
    for frame, original in zip(found, frames, strict=True):
        np.testing.assert_allclose(frame[:40].astype(int), original, atol=8)  # the palette is shared with the text
    light = [int((frame[40:] > 150).sum()) for frame in found]
    assert light[0] == 0 < light[1] < light[2]


def test_a_long_episode_stays_small(tmp_path: Path) -> None:
    frames = moving_square(500, 400, 600)
    write_video(frames, tmp_path / "film.gif", fps=50)
    assert (tmp_path / "film.gif").stat().st_size < 2e6


def test_many_colours_come_close(tmp_path: Path) -> None:
    ramp = np.zeros((64, 64, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(64) * 4, np.arange(64)[:, None] * 4
    write_video([ramp], tmp_path / "film.gif")
    (found,), _ = read_gif(tmp_path / "film.gif")
    assert np.abs(found.astype(int) - ramp).mean() < 8  # 256 colours for 4096: 16 levels a channel


def test_mp4_is_read_back(tmp_path: Path) -> None:
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    write_video(moving_square(30, 41, 61), tmp_path / "film.mp4", fps=10)  # odd sides are padded
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "film.mp4"))
    info = next(reader)
    assert info["size"] == (62, 42)
    assert info["fps"] == 10
    found = [np.frombuffer(data, np.uint8).reshape(42, 62, 3) for data in reader]
    assert len(found) == 30
    for row, column in ((30, 30), (41, 30), (30, 61)):  # the padding repeats the blue edge
        assert found[0][row, column, 2] > 150 > 80 > found[0][row, column, 0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["film.mp4"]


def test_mp4_without_the_extra_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "imageio_ffmpeg":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"upslope\[video\]"):
        write_video(moving_square(2), tmp_path / "film.mp4")
    write_video(moving_square(2), tmp_path / "film.gif")
    assert [entry.name for entry in tmp_path.iterdir()] == ["film.gif"]


@pytest.mark.parametrize("name", ["film.gif", "film.mp4"])
def test_a_failing_episode_leaves_no_part_of_a_film(tmp_path: Path, name: str) -> None:
    if name.endswith("mp4"):
        pytest.importorskip("imageio_ffmpeg")

    def failing() -> Iterator[np.ndarray]:
        yield from moving_square(5)
        raise RuntimeError("the environment died")

    (tmp_path / name).write_bytes(b"an older film")
    with pytest.raises(RuntimeError, match="the environment died"):
        write_video(failing(), tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"an older film"
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


BLANK = np.zeros((4, 6, 3), np.uint8)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "there is none"),
        ([BLANK.astype(float)], "frame 0 must be a numpy array of uint8, got float64"),
        ([[[0, 0, 0]]], "frame 0 must be a numpy array of uint8, got list"),
        ([BLANK, BLANK[..., 0]], r"frame 1 must have shape \[height, width, 3\], got \[4, 6\]"),
        ([np.zeros((4, 6, 4), np.uint8)], r"got \[4, 6, 4\]"),
        ([np.zeros((0, 6, 3), np.uint8)], r"got \[0, 6, 3\]"),
        ([BLANK, BLANK[:2]], r"frame 1 has shape \[2, 6, 3\], those before it \[4, 6, 3\]"),
    ],
)
def test_odd_frames_are_refused(tmp_path: Path, frames: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_video(frames, tmp_path / "film.gif")
    assert list(tmp_path.iterdir()) == []


def test_odd_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"film.avi must end in one of .gif, .mp4"):
        write_video([BLANK], tmp_path / "film.avi")
    with pytest.raises(ValueError, match="fps must be greater than 0, got 0"):
        write_video([BLANK], tmp_path / "film.gif", fps=0)
    with pytest.raises(ValueError, match="max_width must be greater than 0, got -1"):
        write_video([BLANK], tmp_path / "film.gif", max_width=-1)
    with pytest.raises(ValueError, match="captions: there are 1, and more frames"):
        write_video([BLANK] * 2, tmp_path / "film.gif", captions=["one"])


def test_replacing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"

    def half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        half()
    assert list(path.parent.iterdir()) == []
    with replacing(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]
