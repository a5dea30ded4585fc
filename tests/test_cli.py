"""The command line as a user meets it: every command, every way to get it wrong."""

import json
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.program import ENVIRONMENT, ROOT, SMALL, command, fingerprint, metrics, succeed, upslope
from upslope import cli
from upslope.runs import checkpoint

SIZE = ("--environment.num-envs", 2, "--rollout-length", 32, "--total-steps", 256, "--checkpoint-seconds", 0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 4 iterations."""
    directory = tmp_path_factory.mktemp("runs") / "one"
    succeed("train", "ppo", "--env", "Pendulum-v1", *SIZE, *SMALL, "--run-dir", directory)
    return directory


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """The same, to be spoiled."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command in this process that must end with status 2; what it said, on one line, without a traceback."""
    try:
        status = cli.main([*map(str, arguments)])
    except SystemExit as leaving:
        status = leaving.code
    output = capsys.readouterr()
    assert status == 2
    assert output.out == ""
    assert "Traceback" not in output.err
    return " ".join(output.err.split())


def done(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command in this process that must succeed; what it printed."""
    capsys.readouterr()
    assert cli.main([*map(str, arguments)]) == 0
    return capsys.readouterr().out


def state(directory: Path) -> str:
    found = checkpoint.newest(directory / "checkpoints")
    assert found is not None
    return checkpoint.fingerprint(found.tensors)


def steps(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in (directory / "checkpoints").iterdir())


# Help


@pytest.mark.parametrize("arguments", [(), ("-h",), ("--help",)])
def test_help_names_every_command(arguments: tuple[str, ...]) -> None:
    out = succeed(*arguments)
    for name in ("methods", "train", "resume", "eval", "watch", "compare", "report", "bench", "fingerprint"):
        assert f"\n  {name} " in out


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    took = []
    for _ in range(3):
        began = time.monotonic()
        succeed("--help")
        took.append(time.monotonic() - began)
    assert min(took) <= 0.5
    program = (
        "import sys; from upslope import cli; assert cli.main(['--help']) == 0; "
        "print([m for m in ('torch', 'gymnasium', 'numpy', 'matplotlib', 'tensorboard', 'tyro') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", ["methods", "resume", "eval", "watch", "compare", "report", "bench", "fingerprint"])
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.main([name, "--help"])
    assert leaving.value.code == 0
    assert f"usage: upslope {name}" in capsys.readouterr().out


def test_train_lists_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help"]) == 0
    assert "ppo" in capsys.readouterr().out
    with pytest.raises(SystemExit) as leaving:
        cli.main(["train", "ppo", "--help"])
    assert leaving.value.code == 0
    out = capsys.readouterr().out
    for flag in ("--env", "--total-steps", "--seed", "--run-dir", "--gae-lambda", "--normalize.observation"):
        assert flag in out


def test_the_console_script_is_the_same_program() -> None:
    script = Path(sysconfig.get_path("scripts")) / "upslope"
    if not script.exists():
        pytest.skip("the package is not installed: there is no console script")
    result = subprocess.run([script, "--help"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, succeed("--help"))


def test_methods_is_a_table() -> None:
    out = succeed("methods")
    assert "ppo" in out.lower()
    assert len(out.splitlines()) > 10


def test_a_reader_that_leaves_early_is_no_error() -> None:
    process = subprocess.Popen(
        command("methods"), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    process.wait(timeout=60)


# What is refused


@pytest.mark.parametrize(("asked", "meant"), [("trian", "train"), ("evl", "eval"), ("fingerprnt", "fingerprint")])
def test_unknown_commands(capsys: pytest.CaptureFixture[str], asked: str, meant: str) -> None:
    said = refused(capsys, asked)
    assert f"unknown command '{asked}'. Did you mean '{meant}'?" in said


def test_unknown_algorithms(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown algorithm 'pop'. Did you mean 'ppo'?" in refused(capsys, "train", "pop", "--env", "CartPole-v1")
    assert "unknown algorithm 'zzz'. Known: reinforce, a2c, " in refused(capsys, "train", "zzz")


@pytest.mark.parametrize(
    ("arguments", "unknown", "meant"),
    [
        (("train", "ppo", "--env", "CartPole-v1", "--gama", "0.9"), "--gama", "--gamma"),
        (("train", "ppo", "--total-step", "9"), "--total-step", "--total-steps"),
        (("train", "ppo", "--env", "CartPole-v1", "--no-presets"), "--no-presets", "--no-preset"),
        (("eval", "nowhere", "--episode", "3"), "--episode", "--episodes"),
        (("watch", "nowhere", "--out", "x.gif", "--sed", "3"), "--sed", "--seed"),
        (("report", "nowhere", "--ot", "x"), "--ot", "--out"),
        (("compare", "nowhere", "--out", "x.png", "--metrik", "y"), "--metrik", "--metric"),
    ],
)
def test_unknown_flags(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], unknown: str, meant: str
) -> None:
    said = refused(capsys, *arguments)
    assert unknown in said
    assert meant in said.replace(unknown, "", 1)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--env", "CartPol-v1"), "nearest: CartPole-v1"),
        (("--env", "CartPole-v1", "--minibatch-size", "257"), "32 × num_envs 8 = 256 transitions"),
        (("--env", "CartPole-v1", "--gamma", "2"), "gamma is 2.0, allowed: 0 to 1"),
        (("--env", "CartPole-v1", "--gamma", "high"), "high"),
        (("--env", "CartPole-v1", "--environment.num-envs", "0"), "num_envs is 0, allowed: 1 or more"),
        (("--env", "Pendulum-v1", "--environment.vectorization", "native"), "no vector entry point"),
        (("--env", "Pendulum-v1", "--environment.vectorization", "threads"), "threads"),
    ],
)
def test_settings_that_cannot_be(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: tuple[str, ...], said: str
) -> None:
    directory = tmp_path / "run"
    # the program draws boxes around some of its errors
    answer = refused(capsys, "train", "ppo", *flags, "--run-dir", directory, "--quiet").replace("│ │ ", "")
    assert said in answer
    assert not directory.exists()


@pytest.mark.parametrize("name", ["resume", "eval", "report", "fingerprint", "watch", "compare"])
@pytest.mark.parametrize("there", [True, False], ids=["empty directory", "no directory"])
def test_a_directory_that_is_no_run(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, there: bool) -> None:
    directory = tmp_path / "nothing"
    if there:
        directory.mkdir()
    more = ("--out", tmp_path / "out.png") if name in ("watch", "compare") else ()
    said = refused(capsys, name, directory, *more)
    assert "not a run directory" in said
    assert str(directory) in said
    assert directory.exists() == there
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("name", ["resume", "eval", "fingerprint", "report"])
@pytest.mark.parametrize("text", ["{", "", "[]", "{}", '{"algorithm": "ppo"}', '{"algorithm": "nope", "config": {}}'])
def test_a_configuration_that_is_damaged(
    capsys: pytest.CaptureFixture[str], copied: Path, name: str, text: str
) -> None:
    (copied / "config.json").write_text(text)
    (copied / "summary.json").unlink()
    if name in ("fingerprint", "report") and text.startswith("{") and len(text) > 1:
        assert cli.main([name, str(copied)]) in (0, 2)  # they need less of it
        return
    refused(capsys, name, copied)


def test_a_run_without_a_checkpoint_yet(capsys: pytest.CaptureFixture[str], copied: Path) -> None:
    shutil.rmtree(copied / "checkpoints")
    for name in ("eval", "fingerprint"):
        assert "has no checkpoint yet" in refused(capsys, name, copied)


def test_a_run_directory_that_exists(capsys: pytest.CaptureFixture[str], copied: Path) -> None:
    before = state(copied)
    said = refused(capsys, "train", "ppo", "--env", "Pendulum-v1", "--run-dir", copied)
    assert "exists already" in said
    assert f"upslope resume {copied}" in said
    assert state(copied) == before


# What goes on


def test_resuming_a_complete_run_changes_nothing(capsys: pytest.CaptureFixture[str], copied: Path) -> None:
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    assert cli.main(["resume", str(copied)]) == 0
    assert "is complete" in " ".join(capsys.readouterr().err.split())
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_a_damaged_checkpoint_is_said_and_passed_over(
    capsys: pytest.CaptureFixture[str], trained: Path, copied: Path
) -> None:
    newest = steps(copied)[-1]
    (copied / "summary.json").unlink()
    with open(copied / "checkpoints" / str(newest) / "tensors.safetensors", "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert done(capsys, "fingerprint", copied).strip() != state(trained)
    resumed = upslope("resume", copied)
    assert resumed.returncode == 0, resumed.stderr
    assert "damaged checkpoint" in resumed.stderr
    assert state(copied) == state(trained)
    assert metrics(copied) == metrics(trained)


def test_when_all_checkpoints_are_damaged(capsys: pytest.CaptureFixture[str], copied: Path) -> None:
    (copied / "summary.json").unlink()
    for step in steps(copied):
        (copied / "checkpoints" / str(step) / "state.json").write_text("{}")
    for name in ("resume", "eval", "fingerprint"):
        assert "all checkpoints are damaged" in refused(capsys, name, copied)


def test_a_run_may_be_moved(capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(trained, tmp_path / "elsewhere"))
    (moved / "summary.json").unlink()
    shutil.rmtree(moved / "checkpoints" / str(steps(moved)[-1]))
    done(capsys, "resume", moved)
    assert state(moved) == state(trained)
    assert metrics(moved) == metrics(trained)


def test_fingerprint_is_one_hash_and_of_the_seed(
    capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path
) -> None:
    arguments = ("train", "ppo", "--env", "Pendulum-v1", *SIZE, *SMALL)
    done(capsys, *arguments, "--run-dir", tmp_path / "again")
    done(capsys, *arguments, "--run-dir", tmp_path / "other", "--seed", 2)
    assert fingerprint(trained) == state(trained)  # the program's own word
    prints = [state(path) for path in (trained, tmp_path / "again", tmp_path / "other")]
    assert all(len(found) == 64 and int(found, 16) >= 0 for found in prints)
    assert prints[0] == prints[1] != prints[2]


# What is made


def test_eval_prints_one_json_object(capsys: pytest.CaptureFixture[str], trained: Path) -> None:
    out = done(capsys, "eval", trained, "--episodes", 3, "--json")
    result = json.loads(out)  # nothing before, nothing after
    assert out.count("\n") == 1
    assert result["episodes"] == 3
    assert -16.3 * 200 - 1 <= result["mean_return"] <= 0  # a step costs π² + 0.1·8² + 0.001·2² at most
    assert result["std_return"] >= 0
    assert result["mean_length"] == 200
    assert json.loads(done(capsys, "eval", trained, "--episodes", 3, "--json")) == result
    assert json.loads(done(capsys, "eval", trained, "--episodes", 3, "--json", "--seed", 5)) != result
    assert "3 episodes: return" in done(capsys, "eval", trained, "--episodes", 3)


def test_eval_of_no_episodes(capsys: pytest.CaptureFixture[str], trained: Path) -> None:
    assert "episodes is 0, allowed: 1 or more" in refused(capsys, "eval", trained, "--episodes", 0)


def test_compare_draws_a_picture(
    capsys: pytest.CaptureFixture[str], trained: Path, copied: Path, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "curves.png"
    settings = copied / "config.json"
    settings.write_text(settings.read_text().replace('"seed": 1,', '"seed": 2,'))
    said = done(capsys, "compare", trained, copied, "--out", out, "--metric", "entropy")
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert len(np.unique(np.asarray(picture.convert("L")))) > 10  # not blank
    assert str(out) in said


def test_compare_of_a_number_that_no_run_has(capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path) -> None:
    assert "entrpy" in refused(capsys, "compare", trained, "--out", tmp_path / "x.png", "--metric", "entrpy")


def test_report_is_one_page(capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    done(capsys, "report", trained, "--out", out)
    page = out.read_text()
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert "Pendulum-v1" in page
    assert 'src="http' not in page
    assert '<link rel="stylesheet"' not in page


def test_watch_films_an_episode(capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "episode.gif"
    done(capsys, "watch", trained, "--out", out, "--max-steps", 8)
    with Image.open(out) as film:
        assert film.format == "GIF"
        assert film.n_frames > 1


def test_paths_are_printed_whole(capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path) -> None:
    out = tmp_path / ("a-long-name-" * 12) / "page.html"
    out.parent.mkdir()
    assert str(out) in done(capsys, "report", trained, "--out", out)


def test_a_run_directory_runs_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str], trained: Path) -> None:
    """A module that a run's settings name is imported only when the user names it too."""
    (tmp_path / "planted.py").write_text("raise SystemExit('planted code ran')")
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    described = json.loads((run / "config.json").read_text())
    described["config"]["environment"]["id"] = "planted:X-v0"
    (run / "config.json").write_text(json.dumps(described))
    (run / "summary.json").unlink()
    for name, *more in (("resume",), ("eval",), ("watch", "--out", str(tmp_path / "x.gif"))):
        assert "say so yourself with --env planted:X-v0" in refused(capsys, name, run, *more)
    done(capsys, "compare", run, "--out", tmp_path / "x.png", "--metric", "kl")


# Several seeds


def test_seeds_are_single_runs_beneath_one_directory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Each is bitwise the run that `--seed` gives; the command asked again goes on where a run is not complete."""
    flags = ("--env", "CartPole-v1", *SIZE, *SMALL)
    said = done(capsys, "train", "ppo", *flags, "--seeds", "3,5", "--run-dir", tmp_path / "several")
    assert "CartPole-v1" in said
    assert (tmp_path / "several" / "curves.png").exists()
    for seed in (3, 5):
        done(capsys, "train", "ppo", *flags, "--seed", seed, "--run-dir", tmp_path / f"one-{seed}")
        assert state(tmp_path / f"one-{seed}") == state(tmp_path / "several" / f"seed-{seed}")
    whole, broken = state(tmp_path / "one-5"), tmp_path / "several" / "seed-5"
    (broken / "summary.json").unlink()  # as after a kill: no summary, and not the last checkpoint
    shutil.rmtree(max((broken / "checkpoints").iterdir(), key=lambda path: int(path.name)))
    assert state(broken) != whole
    done(capsys, "train", "ppo", *flags, "--seeds", "3,5", "--run-dir", tmp_path / "several")
    assert state(broken) == whole
    other = refused(capsys, "train", "ppo", *flags, "--gamma", 0.5, "--seeds", "3", "--run-dir", tmp_path / "several")
    assert "seed-3 holds a run of other settings" in other


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--seeds", "0-x"), "seeds is '0-x', allowed: such as 0-9 or 1,3,5-7"),
        (("--seeds", "5-3"), "allowed: at least one, none twice, ranges that rise"),
        (("--seeds", "1,1"), "none twice"),
        (("--seeds", "1", "--seed", "2"), "--seed is given beside --seeds"),
    ],
)
def test_seeds_that_cannot_be(capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], words: str) -> None:
    assert words in refused(capsys, "train", "ppo", *flags)


def test_compile_names_who_compiles(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--compile is for ppo, dqn, soft-q, ddpg, td3, sac; a2c is not" in refused(
        capsys, "train", "a2c", "--compile"
    )
