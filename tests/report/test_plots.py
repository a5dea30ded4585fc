import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib import _pylab_helpers
from PIL import Image

from tests.report.fakes import straight, write_run
from upslope.report.bootstrap import aggregate
from upslope.report.plots import compare, diagnose, learning_curve, small, table, thinned
from upslope.report.records import Series


def test_seeds_of_one_setting_are_one_curve(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(seed), straight(slope), seed=seed) for seed, slope in enumerate((0.1, 0.2, 0.6))]
    (outcome,) = compare(runs, tmp_path / "curves.png", thresholds={"CartPole-v1": 100.0})
    assert (outcome.label, outcome.environment, outcome.seeds, outcome.steps) == ("ppo", "CartPole-v1", 3, 1000)
    assert outcome.final == pytest.approx(300)  # mean of 100, 200, 600 at step 1000
    assert (outcome.low, outcome.high) == pytest.approx((100, 600))  # three seeds: their range
    # Reached at 1000, 500 (0.2 · 500 = 100) and 500 of the recorded steps.
    assert (outcome.steps_to_threshold, outcome.reached) == (500, 3)
    assert Image.open(tmp_path / "curves.png").width > 600


def test_the_steps_all_seeds_share_end_the_curve(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", straight(1.0), seed=0)
    b = write_run(tmp_path / "b", straight(3.0, steps=(0, 500)), seed=1)  # still running
    (outcome,) = compare([a, b], tmp_path / "curves.png")
    assert outcome.steps == 500
    assert outcome.final == pytest.approx((500 + 1500) / 2)
    assert outcome.steps_to_threshold is None


def test_settings_that_differ_are_never_averaged(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / f"{lam}-{seed}", straight(lam + seed), seed=seed, gae_lambda=lam, network={"layers": 2})
        for lam in (0.9, 1.0)
        for seed in (0, 1)
    ]
    outcomes = compare(runs, tmp_path / "curves.png")
    assert [(outcome.label, outcome.seeds) for outcome in outcomes] == [
        ("ppo, gae_lambda=0.9", 2),
        ("ppo, gae_lambda=1.0", 2),
    ]


def test_another_kind_of_optimiser_is_named_by_its_field(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / kind, straight(1), optimizer={"type": kind}) for kind in ("Adam", "SGD")]
    labels = [outcome.label for outcome in compare(runs, tmp_path / "curves.png")]
    assert labels == ["ppo, optimizer=Adam", "ppo, optimizer=SGD"]


def test_methods_and_environments_are_kept_apart(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", straight(1), algorithm="a2c", gae_lambda=1.0),
        write_run(tmp_path / "b", straight(2), algorithm="ppo", gae_lambda=0.9),
        write_run(tmp_path / "c", straight(3), algorithm="ppo", gae_lambda=0.8, environment="Pendulum-v1"),
    ]
    outcomes = compare(runs, tmp_path / "curves.png")
    assert [(outcome.environment, outcome.label) for outcome in outcomes] == [
        ("CartPole-v1", "a2c"),
        ("CartPole-v1", "ppo"),
        ("Pendulum-v1", "ppo"),
    ]
    assert outcomes[0].low is None


def test_labels_of_ones_own(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(seed), straight(seed + 1), seed=seed, width=seed) for seed in range(2)]
    (outcome,) = compare(runs, tmp_path / "curves.png", labels=["mine", "mine"])
    assert (outcome.label, outcome.seeds) == ("mine", 2)
    with pytest.raises(ValueError, match="labels: 1 given for 2"):
        compare(runs, tmp_path / "curves.png", labels=["mine"])


def test_one_sample_never_counts_twice(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", straight(1))
    copy = write_run(tmp_path / "copy", straight(1))
    with pytest.raises(ValueError, match="same sample"):
        compare([a, copy], tmp_path / "curves.png")
    with pytest.raises(ValueError, match="same sample"):
        compare([a, tmp_path / "copy" / ".." / "a"], tmp_path / "curves.png")
    assert len(compare([a, copy], tmp_path / "curves.png", labels=["before", "after"])) == 2  # two curves, one each
    again = write_run(tmp_path / "again", straight(2))  # equal settings, other numbers: asynchronous, so a new sample
    assert compare([a, again], tmp_path / "curves.png")[0].seeds == 2
    other = write_run(tmp_path / "other", straight(1), seed=1)  # solved alike by another seed
    assert compare([a, other], tmp_path / "curves.png")[0].seeds == 2


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", straight(1))
    with pytest.raises(ValueError, match=r"curves.bmp must end in one of .png, .svg, .pdf"):
        compare([run], tmp_path / "curves.bmp")
    with pytest.raises(ValueError, match=r'metrics.jsonl has no finite "kl"; it has: episode_return'):
        compare([run], tmp_path / "curves.png", metric="kl")
    with pytest.raises(ValueError, match="at least one run directory"):
        compare([], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_gaps_before_the_first_episode_do_not_matter(tmp_path: Path) -> None:
    rows = [{"step": 0, "episode_return": None}, {"step": 50, "episode_return": float("nan")}, *straight(1, (100, 200))]
    (outcome,) = compare([write_run(tmp_path / "run", rows)], tmp_path / "curves.png")
    assert outcome.final == 200


def test_steps_to_threshold_is_a_median_that_knows_failure(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(seed), straight(slope), seed=seed) for seed, slope in enumerate((0.01, 0.01, 1))]
    (outcome,) = compare(runs, tmp_path / "curves.png", thresholds={"CartPole-v1": 100.0})
    assert (outcome.steps_to_threshold, outcome.reached) == (float("inf"), 1)
    assert "not reached (1/3)" in table([outcome])


def test_table_is_aligned(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, straight(1), algorithm=name) for name in ("a2c", "reinforce")]
    head, first, second = table(compare(runs, tmp_path / "curves.png")).splitlines()
    assert head.index("seeds") == first.index(" 1 ") + 1 == second.index(" 1 ") + 1
    assert "one seed" in first


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_the_suffix_chooses_the_format(tmp_path: Path, suffix: str, magic: bytes) -> None:
    out = tmp_path / f"curves{suffix}"
    compare([write_run(tmp_path / "run", straight(1))], out)
    assert out.read_bytes().startswith(magic)
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_file()] == [out.name]


def test_bands_thresholds_and_labels_are_drawn() -> None:
    steps = np.array([0.0, 100.0])
    seeds = [Series(steps, np.array([0.0, 10.0 * k])) for k in (1, 2, 3)]
    figure = learning_curve({"task": {"several": aggregate(seeds), "one": aggregate(seeds[:1])}}, "Return", {"task": 5})
    (axes,) = figure.axes
    assert len(axes.collections) == 1  # a band for the several seeds, none for one
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["several (3 seeds)", "one"]
    band, lines = axes.collections[0].get_datalim(axes.transData), axes.get_lines()
    assert (band.ymin, band.ymax) == pytest.approx((0, 30))
    np.testing.assert_allclose(lines[0].get_ydata()[-1], 20)
    assert any(set(np.asarray(line.get_ydata())) == {5} for line in lines)
    assert len({line.get_color() for line in lines[:2]}) == 2


def test_a_label_keeps_its_colour_in_all_panels() -> None:
    curve = aggregate([Series(np.array([0.0, 1.0]), np.array([0.0, 1.0]))])
    figure = learning_curve({"one": {"a2c": curve, "ppo": curve}, "two": {"ppo": curve}}, "Return")
    first, second = figure.axes
    assert first.get_lines()[1].get_color() == second.get_lines()[0].get_color()


def test_guides_show_only_near_the_data() -> None:
    steps = np.arange(3.0)
    near, far = Series(steps, np.array([0.0, 0.03, 0.04])), Series(steps, np.array([0.0, 1e-4, 2e-4]))
    assert len(small("kl", near).axes[0].get_lines()) == 2
    assert len(small("kl", far).axes[0].get_lines()) == 1


def test_thinning_keeps_ends_and_spikes() -> None:
    values = np.sin(np.arange(50_000.0))
    values[31_234], values[777] = 99.0, -99.0
    few = thinned(Series(np.arange(50_000.0), values))
    assert len(few.steps) <= 802
    assert (few.values.max(), few.values.min()) == (99, -99)
    assert (few.steps[0], few.steps[-1]) == (0, 49_999)
    assert (np.diff(few.steps) > 0).all()
    np.testing.assert_array_equal(few.values, values[few.steps.astype(int)])


def test_diagnose_draws_every_number(tmp_path: Path) -> None:
    rows = [{"step": step, "kl": 0.01 * step, "entropy": None, "margin": 1.0} for step in range(5)]
    diagnose(write_run(tmp_path / "run", rows), tmp_path / "all.svg")
    text = (tmp_path / "all.svg").read_text()
    assert "axes_2" in text
    assert "axes_3" not in text  # entropy has no value
    with pytest.raises(ValueError, match="no number"):
        diagnose(write_run(tmp_path / "empty"), tmp_path / "none.png")


def test_no_global_figure_is_left_behind(tmp_path: Path) -> None:
    compare([write_run(tmp_path / "run", straight(1))], tmp_path / "curves.png")
    assert _pylab_helpers.Gcf.get_num_fig_managers() == 0


def test_settings_may_hold_anything_json_holds(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(n), straight(n + 1), seed=n, layers=[64] * (n + 1)) for n in range(2)]
    labels = [outcome.label for outcome in compare(runs, tmp_path / "curves.png")]
    assert labels == [f"ppo, layers={json.dumps(layers)}" for layers in ([64], [64, 64])]
