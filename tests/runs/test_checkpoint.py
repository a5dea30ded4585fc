"""Checkpoints: what is read is what was written, or it is refused; a full disk or a kill costs the newest at most."""

import errno
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from upslope.runs import checkpoint
from upslope.runs.checkpoint import DamagedCheckpointError

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64,
]  # fmt: skip


def some(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random bytes as a tensor of any type: NaN payloads, infinities and negative zeros are among them."""
    size = torch.empty((), dtype=dtype).element_size()
    count = size * int(torch.tensor(shape).prod()) if shape else size
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, high, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw.view(dtype).reshape(shape)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write_some(root: Path, step: int) -> dict[str, Tensor]:
    tensors = {"theta": some(torch.float32, (5, 3), step), "step": torch.tensor(step)}
    checkpoint.write(root, step, tensors, {"seconds": step / 7, "offsets": {"metrics.jsonl": 10 * step}})
    return tensors


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 1, 5)], ids=str)
def test_every_bit_of_every_type_comes_back(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = some(dtype, shape)
    state = {"seconds": 0.1 + 0.2, "text": 'θ "quoted"\n', "nothing": None, "nested": {"deep": [1, 2.5, True]}}
    path = checkpoint.write(tmp_path, 3, {"a.b": tensor}, state)
    assert path == tmp_path / "3"
    back = checkpoint.read(tmp_path, 3)
    assert back.step == 3
    assert back.tensors.keys() == {"a.b"}
    assert back.tensors["a.b"].dtype == dtype
    assert back.tensors["a.b"].shape == shape
    assert bits(back.tensors["a.b"]) == bits(tensor)
    assert {key: back.state[key] for key in state} == state


def test_views_and_gradients_are_stored_by_value(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    given_tensors = {"transposed": base.T, "strided": base[:, ::2], "grad": torch.ones(2, requires_grad=True)}
    checkpoint.write(tmp_path, 1, given_tensors, {})
    back = checkpoint.read(tmp_path, 1).tensors
    assert back["transposed"].tolist() == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    assert back["strided"].tolist() == [[0, 2], [4, 6], [8, 10]]
    assert back["grad"].tolist() == [1, 1]


# Damage


def survives(root: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> bool:
    """Read a checkpoint that may be damaged. False if it is refused; if it is not, it must be the one written."""
    try:
        back = checkpoint.read(root, step)
    except DamagedCheckpointError:
        return False
    assert {name: bits(tensor) for name, tensor in back.tensors.items()} == {n: bits(t) for n, t in tensors.items()}
    assert back.state == state
    return True


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_every_flipped_bit_is_found(tmp_path: Path, name: str) -> None:
    tensors = write_some(tmp_path, 4)
    state = checkpoint.read(tmp_path, 4).state
    path = tmp_path / "4" / name
    whole = path.read_bytes()
    passed = []
    for position in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ (1 << bit)]) + whole[position + 1 :])
            if survives(tmp_path, 4, tensors, state):
                passed.append((position, bit))
    path.write_bytes(whole)
    assert survives(tmp_path, 4, tensors, state)
    # In JSON a few flips change no meaning (white space, the last digit of a long fraction); in the tensors none may.
    assert len(passed) <= (0 if name == "tensors.safetensors" else 8 * len(whole) // 100)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_every_truncation_is_found(tmp_path: Path, name: str) -> None:
    tensors = write_some(tmp_path, 4)
    path = tmp_path / "4" / name
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert not survives(tmp_path, 4, tensors, {})
    for tail in (b"\0", b"x", whole):
        path.write_bytes(whole + tail)
        assert not survives(tmp_path, 4, tensors, {})


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_a_missing_file_is_found(tmp_path: Path, name: str) -> None:
    write_some(tmp_path, 4)
    (tmp_path / "4" / name).unlink()
    with pytest.raises(DamagedCheckpointError, match=re.escape(str(tmp_path / "4"))):
        checkpoint.read(tmp_path, 4)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_a_file_of_another_checkpoint_is_found(tmp_path: Path, name: str) -> None:
    write_some(tmp_path, 4)
    write_some(tmp_path, 5)
    shutil.copy(tmp_path / "4" / name, tmp_path / "5" / name)
    with pytest.raises(DamagedCheckpointError):
        checkpoint.read(tmp_path, 5)


def test_a_checkpoint_under_another_ones_name_is_found(tmp_path: Path) -> None:
    write_some(tmp_path, 4)
    (tmp_path / "4").rename(tmp_path / "400")
    with pytest.raises(DamagedCheckpointError):
        checkpoint.read(tmp_path, 400)


@pytest.mark.parametrize("text", ["null", "[]", "3", '"state"', "{}", '{"sha256": 1, "self": ""}', "\0" * 50])
def test_state_that_is_other_json_is_damage(tmp_path: Path, text: str) -> None:
    write_some(tmp_path, 4)
    (tmp_path / "4" / "state.json").write_text(text)
    with pytest.raises(DamagedCheckpointError):
        checkpoint.read(tmp_path, 4)


def test_the_one_before_a_damaged_one_is_used_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = write_some(tmp_path, 9)
    write_some(tmp_path, 10)  # 10 comes after 9, though not in the order of names
    (tmp_path / "10" / "tensors.safetensors").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 9
    assert bits(found.tensors["theta"]) == bits(before["theta"])
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "damaged checkpoint" in warnings[0]
    assert str(tmp_path / "10") in warnings[0]


def test_a_whole_checkpoint_is_read_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_some(tmp_path, 9)
    write_some(tmp_path, 10)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 10
    assert not caplog.records


def test_all_damaged_is_an_error_that_names_them(tmp_path: Path) -> None:
    for step in (9, 10):
        write_some(tmp_path, step)
        (tmp_path / str(step) / "state.json").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"all checkpoints are damaged \(steps 9, 10\)"):
        checkpoint.newest(tmp_path)


def test_none_yet(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "missing") is None
    assert checkpoint.steps(tmp_path / "missing") == []


# Keeping


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    for step in (8, 9, 10, 11):
        checkpoint.write(tmp_path, step, {"x": torch.tensor(step)}, {}, keep)
        assert checkpoint.steps(tmp_path) == [s for s in (8, 9, 10, 11) if s <= step][-keep:]
    assert sorted(os.listdir(tmp_path)) == sorted(str(step) for step in checkpoint.steps(tmp_path))


def test_damaged_ones_ahead_never_push_out_a_whole_one(tmp_path: Path) -> None:
    for step in (100, 200, 300):
        checkpoint.write(tmp_path, step, {"x": torch.tensor(step)}, {}, keep=3)
    for step in (200, 300):
        (tmp_path / str(step) / "tensors.safetensors").write_bytes(b"")
    for step in (150, 220):  # a run resumed from 100
        write_some(tmp_path, step)
        found = checkpoint.newest(tmp_path)
        assert found is not None
        assert found.step == step
        whole = [s for s in checkpoint.steps(tmp_path) if survives(tmp_path, s, *_of(tmp_path, s))]
        assert len(whole) == 2


def _of(root: Path, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        found = checkpoint.read(root, step)
    except DamagedCheckpointError:
        return {}, {}
    return found.tensors, found.state


def test_the_same_step_is_written_anew(tmp_path: Path) -> None:
    write_some(tmp_path, 4)
    checkpoint.write(tmp_path, 4, {"x": torch.tensor(7)}, {})
    assert checkpoint.read(tmp_path, 4).tensors["x"].item() == 7
    assert os.listdir(tmp_path) == ["4"]


def test_clean_removes_what_is_half_written_and_nothing_else(tmp_path: Path) -> None:
    write_some(tmp_path, 4)
    before = files(tmp_path)
    (tmp_path / ".partial-5").mkdir()
    (tmp_path / ".partial-5" / "tensors.safetensors").write_bytes(b"half")
    assert checkpoint.steps(tmp_path) == [4]
    checkpoint.clean(tmp_path)
    assert files(tmp_path) == before
    assert os.listdir(tmp_path) == ["4"]


# Fingerprints

names = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=8)
state_tensors = st.dictionaries(
    names, st.builds(some, st.sampled_from(DTYPES), st.sampled_from([(), (3,), (2, 2)]), st.integers(0, 99)), min_size=1
)


@settings(max_examples=50, deadline=None)
@given(state_tensors, st.randoms(use_true_random=False))
def test_fingerprint_knows_no_order(tensors: dict[str, Tensor], random: Any) -> None:
    shuffled = list(tensors.items())
    random.shuffle(shuffled)
    assert checkpoint.fingerprint(dict(shuffled)) == checkpoint.fingerprint(tensors)
    assert re.fullmatch(r"[0-9a-f]{64}", checkpoint.fingerprint(tensors))


@settings(max_examples=100, deadline=None)
@given(state_tensors, st.data())
def test_fingerprint_sees_one_bit(tensors: dict[str, Tensor], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(tensors)))
    changed = {key: tensor.clone() for key, tensor in tensors.items()}
    raw = changed[name].reshape(-1).view(torch.uint8)
    position = data.draw(st.integers(0, len(raw) - 1))
    bit = 0 if tensors[name].dtype == torch.bool else data.draw(st.integers(0, 7))
    raw[position] ^= 1 << bit
    assert checkpoint.fingerprint(changed) != checkpoint.fingerprint(tensors)


def test_fingerprint_sees_name_type_and_shape() -> None:
    zeros = torch.zeros(4)
    others: list[dict[str, Tensor]] = [
        {"x": zeros},
        {"y": zeros},
        {"x": zeros.reshape(2, 2)},
        {"x": zeros.int()},
        {"x": zeros.double()[:2]},  # the same bytes
        {"x": -zeros},  # the other zero
        {"x": zeros, "y": torch.zeros(0)},
        {"x": zeros[:2], "y": zeros[2:]},
        {"x": zeros[:2], "xx": zeros[2:]},
        {},
    ]
    assert len({checkpoint.fingerprint(tensors) for tensors in others}) == len(others)


def test_fingerprint_is_of_values_not_of_memory() -> None:
    base = torch.arange(6.0).reshape(2, 3)
    assert checkpoint.fingerprint({"x": base.T}) == checkpoint.fingerprint({"x": base.T.contiguous()})
    assert checkpoint.fingerprint({"x": base.requires_grad_()}) == checkpoint.fingerprint({"x": base.detach()})


def test_fingerprint_is_of_the_tensors_only(tmp_path: Path) -> None:
    for root, seconds, torch_version in ((tmp_path / "a", 1.0, "2.6"), (tmp_path / "b", 99.0, "3.0")):
        state = {"seconds": seconds, "versions": {"torch": torch_version}}
        checkpoint.write(root, 1, {"x": torch.arange(3)}, state)
    one, other = checkpoint.newest(tmp_path / "a"), checkpoint.newest(tmp_path / "b")
    assert one is not None
    assert other is not None
    assert one.state != other.state
    assert checkpoint.fingerprint(one.tensors) == checkpoint.fingerprint(other.tensors)


# A full disk


class Fails:
    """Stands in for a function; raises ENOSPC the n-th time it is called."""

    def __init__(self, function: Any, at: int) -> None:
        self.function, self.left = function, at

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.function(*arguments, **named)


class FullFile:
    """A file whose writes fail after half of the bytes."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> "FullFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, payload: bytes) -> int:
        self.file.write(payload[: len(payload) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("operation", ["write 1", "write 2", "fsync 1", "fsync 2", "fsync 3", "mkdir 1", "replace 1"])
def test_a_full_disk_leaves_the_last_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    good = write_some(tmp_path, 4)
    before = files(tmp_path)
    what, count = operation.split()
    with monkeypatch.context() as patch:
        if what == "write":
            opened = iter(range(1, 9))
            real = io.open
            patch.setattr(
                checkpoint,
                "open",
                lambda *a, **k: FullFile(real(*a, **k)) if next(opened) == int(count) else real(*a, **k),
                raising=False,
            )
        elif what == "mkdir":
            patch.setattr(Path, "mkdir", Fails(Path.mkdir, int(count)))
        else:
            patch.setattr(checkpoint.os, what, Fails(getattr(os, what), int(count)))
        with pytest.raises(OSError, match="checkpoint at step 5 was not written") as caught:
            write_some(tmp_path, 5)
    assert caught.value.errno == errno.ENOSPC
    assert "No space left on device" in str(caught.value)
    assert str(tmp_path / "5") in str(caught.value)
    assert files(tmp_path) == before
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 4
    assert bits(found.tensors["theta"]) == bits(good["theta"])
    write_some(tmp_path, 5)  # when there is space again
    assert checkpoint.steps(tmp_path) == [4, 5]


def test_a_disk_that_is_full_for_real(small_disk: Path) -> None:
    small = {"x": torch.arange(1000)}
    checkpoint.write(small_disk, 1, small, {})
    before = files(small_disk)
    with pytest.raises(OSError, match="checkpoint at step 2 was not written") as caught:
        checkpoint.write(small_disk, 2, {"x": torch.zeros(100_000)}, {})
    assert caught.value.errno == errno.ENOSPC
    assert files(small_disk) == before
    found = checkpoint.newest(small_disk)
    assert found is not None
    assert torch.equal(found.tensors["x"], small["x"])
    checkpoint.write(small_disk, 2, small, {})  # what fits is written again
    assert checkpoint.steps(small_disk) == [1, 2]


# No pickle


def test_no_file_is_a_pickle_or_an_archive(tmp_path: Path) -> None:
    write_some(tmp_path, 4)
    assert sorted(files(tmp_path)) == ["4/state.json", "4/tensors.safetensors"]
    for name, content in files(tmp_path).items():
        assert not zipfile.is_zipfile(io.BytesIO(content)), name
        assert not content.startswith(b"\x80"), name
    json.loads((tmp_path / "4" / "state.json").read_text())
    payload = (tmp_path / "4" / "tensors.safetensors").read_bytes()
    header = int.from_bytes(payload[:8], "little")  # safetensors: length of a JSON header, the header, raw bytes
    described = json.loads(payload[8 : 8 + header])
    assert described["theta"]["shape"] == [5, 3]
    assert len(payload) == 8 + header + 5 * 3 * 4 + 8


def test_nothing_is_unpickled_when_reading(tmp_path: Path) -> None:
    tensors = write_some(tmp_path, 4)
    program = """
import pickle, sys
from pathlib import Path
from upslope.runs import checkpoint
def refuse(*_, **__): raise SystemExit("unpickled")
class Refuse:
    def __init__(self, *_, **__): refuse()
pickle.load = pickle.loads = refuse
pickle.Unpickler = pickle._Unpickler = Refuse
import torch
torch.load = refuse
print(checkpoint.fingerprint(checkpoint.newest(Path(sys.argv[1])).tensors))
"""
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [checkpoint.fingerprint(tensors)]


def test_cleaning_removes_segments_that_no_checkpoint_names(tmp_path: Path) -> None:
    """What a kill between a checkpoint and its garbage collection leaves behind."""
    one = {"a": lambda: {"x": torch.ones(2)}}
    checkpoint.write(tmp_path, 1, {"theta": torch.zeros(1)}, {}, segments=one)
    stray = tmp_path / checkpoint.SEGMENTS / "b.safetensors"
    stray.write_bytes(b"of a checkpoint that is gone")
    checkpoint.clean(tmp_path)
    assert [path.stem for path in stray.parent.iterdir()] == ["a"]
    assert checkpoint.newest(tmp_path) is not None
