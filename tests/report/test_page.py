import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.report.fakes import straight, write_run
from upslope.report import page
from upslope.report.page import write_page
from upslope.report.video import write_video

VOID = {"meta", "img", "br", "hr", "link", "input", "path", "use", "rect"}


class Reader(HTMLParser):
    """Collects text, attributes and ids, and checks that elements are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID - {"path", "use", "rect"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader


def busy_rows(count: int = 40) -> list[dict[str, float | None]]:
    rng = np.random.default_rng(0)
    return [
        {
            "step": 25 * (i + 1),
            "seconds": 2.0 * (i + 1),
            "episode_return": 10.0 * i if i else None,
            "episodes": 3 * i,
            "kl": 0.01 + 0.001 * float(rng.normal()),
            "clip_fraction": 0.55,
            "entropy": 0.6,
            "margin": float(i),
        }
        for i in range(count)
    ]


def test_a_finished_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", busy_rows(), seed=4, summary={"mean_return": 391.5})
    (run / "checkpoints" / "1000").mkdir(parents=True)
    assert write_page(run) == run / "report.html"
    reader = read(run / "report.html")
    text = " ".join(reader.text)
    assert "ppo on CartPole-v1" in text
    assert "finished" in text
    assert "not finished" not in text
    for number in (
        "390.0",
        "1,000 of 1,000 steps (100%)",
        "0:01:20",
        "391.5",
        "environment.id",
        "seed 4 ·",
        "3.11.9",
        "step 1,000",
    ):
        assert number in text
    assert "Clip fraction is lately 0.55" in text
    assert "KL[old‖new]" in text
    assert "Margin" in text  # a number that the library does not know is shown as well
    assert f"upslope resume {run}" in text
    assert reader.tags.count("svg") == 6  # return, episodes, KL, clip fraction, entropy, margin


def test_a_run_in_progress_and_one_that_has_not_begun(tmp_path: Path) -> None:
    running = write_run(tmp_path / "running", busy_rows(10))
    with (running / "metrics.jsonl").open("a") as file:
        file.write('{"step": 275, "kl": 0.0')
    text = " ".join(read(write_page(running)).text)
    assert "not finished" in text
    assert "250 of 1,000 steps (25%)" in text
    begun = write_run(tmp_path / "begun")
    (begun / "metrics.jsonl").unlink()
    assert "No metrics yet" in " ".join(read(write_page(begun)).text)


def test_nothing_comes_from_elsewhere(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", busy_rows())
    write_video([np.full((8, 8, 3), shade, np.uint8) for shade in (0, 99)], run / "episode.gif")
    reader = read(write_page(run, tmp_path / "page.html"))
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(reader.tags)
    for tag, name, value in reader.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in {"src", "href", "xlink:href", "srcset", "poster", "data", "action"}:
            assert value.startswith(("data:", "#")), (tag, name, value)
    text = (tmp_path / "page.html").read_text()
    assert not re.search(r"https?://|//[a-z]+\.|@import", re.sub(r"base64,[^\"]*", "", text))
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_names_in_the_page_are_its_own_and_resolve(tmp_path: Path) -> None:
    reader = read(write_page(write_run(tmp_path / "run", busy_rows())))
    ids = [value for _, name, value in reader.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = {value[1:] for _, name, value in reader.attributes if name == "href" and value.startswith("#")}
    targets |= {target for _, _, value in reader.attributes for target in re.findall(r"url\(#([^)]*)\)", value)}
    assert targets
    assert targets <= set(ids)


def test_the_film_is_part_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", busy_rows())
    write_video([np.full((8, 12, 3), shade, np.uint8) for shade in (0, 99, 200)], run / "episode.gif", 10)
    (image,) = [value for tag, name, value in read(write_page(run)).attributes if (tag, name) == ("img", "src")]
    film = Image.open(io.BytesIO(base64.b64decode(image.removeprefix("data:image/gif;base64,"))))
    assert (film.size, film.n_frames) == ((12, 8), 3)
    monkeypatch.setattr(page, "FILM_LIMIT", 10)
    reader = read(write_page(run))
    assert "img" not in reader.tags
    assert "too large" in " ".join(reader.text)


def test_everything_from_the_run_is_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script><img src=x onerror=alert(1)>&"\''
    rows = [{"step": step, evil: 1.0, "episode_return": 1.0} for step in range(3)]
    settings = {evil: evil, "nested": {evil: [evil]}}
    run = write_run(tmp_path / "a&b <i>", rows, algorithm=evil, environment=evil, summary={evil: evil}, **settings)
    document = json.loads((run / "config.json").read_text())
    document |= {"versions": {evil: evil}, "note": evil}
    document["config"] |= {"run": {"seed": evil}, "total_steps": evil}
    (run / "config.json").write_text(json.dumps(document))
    reader = read(write_page(run))
    assert not {"script", "img", "i"} & set(reader.tags)
    assert all(not name.startswith("on") for _, name, _ in reader.attributes)
    assert evil in " ".join(reader.text)


def test_warnings_name_what_is_not_finite(tmp_path: Path) -> None:
    rows = [{"step": 1, "value_error": 1.0}, {"step": 2, "value_error": float("nan")}, {"step": 3, "kl": None}]
    assert "Value error is nan at step 2" in " ".join(read(write_page(write_run(tmp_path / "run", rows))).text)


def test_a_page_is_replaced_whole(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", straight(1))
    out = tmp_path / "pages" / "page.html"
    write_page(run, out)
    first = out.read_bytes()
    (run / "metrics.jsonl").write_text("{\n{}\n")
    with pytest.raises(ValueError, match="line 1 is damaged"):
        write_page(run, out)
    assert out.read_bytes() == first
    assert list(out.parent.iterdir()) == [out]


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", busy_rows())
    assert write_page(run, tmp_path / "a.html").read_bytes() == write_page(run, tmp_path / "b.html").read_bytes()
