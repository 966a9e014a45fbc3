"""A disk that is full, or that cannot be written: whatever is being written then, the state of before stays whole.

The disks are real, file systems in memory of a few MB, which only root can mount; elsewhere these tests are skipped."""

import errno
import json
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file
from test_disk import append_to
from test_train import base, essence, metrics, ok, run  # noqa: F401 (fixtures, and what reads a run)

import train
from files import disk, pictures, state
from files.disk import write_json, write_tensors


def mount(*arguments):
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, check=False)
    return done.returncode == 0


@pytest.fixture
def small(tmp_path):
    """A disk of 3 MB; small.fill(n) leaves n bytes of it free, small.free() takes that back."""
    folder = tmp_path / "small"
    folder.mkdir()
    if shutil.which("mount") is None or not mount("-t", "tmpfs", "-o", "size=3m", "none", folder):
        pytest.skip("only root can mount a file system")
    yield Disk(folder)
    # Lazily, and twice: a test may have mounted another one on it.
    for _ in range(2):
        subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


class Disk:
    def __init__(self, folder):
        self.folder = folder
        self.ballast = folder / "ballast"

    def fill(self, left=0):
        free = shutil.disk_usage(self.folder).free
        self.ballast.write_bytes(b"\0" * (free - left))
        assert shutil.disk_usage(self.folder).free <= left

    def free(self):
        self.ballast.unlink()

    def make_read_only(self):
        """Put a read-only view of the disk over it: a file that is open stays so, none can be opened to write."""
        assert mount("--bind", self.folder, self.folder)
        assert mount("-o", "remount,ro,bind", self.folder)

    def make_writable(self):
        assert subprocess.run(["umount", str(self.folder)], check=False).returncode == 0


# --- one file ---


def test_a_full_disk_leaves_each_file_as_it_was(small):
    """Room for none of it, for one page, for half, and for all but the last page."""
    tensors = {"a": torch.zeros(50_000)}
    write_tensors(small.folder / "a", tensors)
    write_json(small.folder / "b", [1])
    append_to(small.folder / "c", b"one\n")
    before = {name: (small.folder / name).read_bytes() for name in "abc"}
    for left in (0, 4096, 100_000, 196_608):
        small.fill(left)
        with pytest.raises(OSError, match="No space left"):
            write_tensors(small.folder / "a", {"a": torch.ones(50_000)})
        with pytest.raises(OSError, match="No space left"):
            write_json(small.folder / "b", ["x" * (left + 1)])
        with pytest.raises(OSError, match="No space left"):
            append_to(small.folder / "c", b"x" * (left + 5000))
        small.free()
        assert {name: (small.folder / name).read_bytes() for name in "abc"} == before
        assert sorted(p.name for p in small.folder.iterdir()) == ["a", "b", "c"]
    append_to(small.folder / "c", b"two\n")
    assert (small.folder / "c").read_bytes() == b"one\ntwo\n"


# --- a run ---


def at_step(monkeypatch, step, action):
    """Do something when this step is logged."""
    log = train.Run.log

    def watched(self, line):
        if line["step"] == step:
            action()
        log(self, line)

    monkeypatch.setattr(train.Run, "log", watched)
    return lambda: monkeypatch.setattr(train.Run, "log", log)


@pytest.fixture
def whole(base, run, tmp_path):  # noqa: F811 (an imported fixture)
    """(flags, the uninterrupted run)"""
    flags = [*base, "--max_steps", 9, "--eval_every", 5, "--save_every", 2]
    ok(run(*flags, "--out", tmp_path / "whole"))
    return flags, tmp_path / "whole"


def is_the_same(out, other):
    assert essence(out) == essence(other)
    for name in ("adapter_model.safetensors", "best/adapter_model.safetensors"):
        assert (out / name).read_bytes() == (other / name).read_bytes()


# The step at which the disk gets full, and how much room is left: for nothing, for half an adapter, for an adapter and
# half a state. At step 5 best/ is written, at step 9 the last save.
FULL = [(3, 300_000), (5, 60_000), (9, 0)]
MORE = [(1, 0), (1, 300_000), (3, 0), (3, 60_000), (5, 0), (8, 300_000), (9, 300_000)]


@pytest.mark.parametrize("cases", [FULL, pytest.param(MORE, marks=pytest.mark.slow)], ids=str)
def test_a_full_disk_ends_a_run_that_goes_on_later(run, whole, small, monkeypatch, cases):  # noqa: F811 (an imported fixture)
    flags, uninterrupted = whole
    for number, (step, left) in enumerate(cases):
        out = small.folder / f"out{number}"
        undo = at_step(monkeypatch, step, lambda left=left: small.fill(left))
        code, _, err = run(*flags, "--out", out)
        undo()
        assert code == 1 and "No space left" in err.splitlines()[-1] and "Traceback" not in err
        kept = saved_step(out)
        if kept is None:
            assert step == 1 and f"{out} holds no state to go on from yet" in err
        else:
            assert f"{out} has the state after step {kept}. Go on with: python train.py" in err
            assert 2 <= kept < 9
            load_file(out / "adapter_model.safetensors")
        small.free()
        assert not list(out.rglob("*.part"))
        how = flags if kept is None else ["--resume"]
        ok(run(*how, "--out", out))
        is_the_same(out, uninterrupted)
        shutil.rmtree(out)


def saved_step(out):
    path = out / "state.safetensors"
    if not path.exists():
        return None
    return state.read_state(path)[1]["facts"]["step"]


def test_a_full_disk_at_the_end_costs_the_picture_and_no_adapter(run, whole, small, monkeypatch):  # noqa: F811 (an imported fixture)
    flags, uninterrupted = whole
    out = small.folder / "out"
    curve = pictures.curve

    def full(*args):
        small.fill()
        curve(*args)

    monkeypatch.setattr(pictures, "curve", full)
    code, said, err = run(*flags, "--out", out)
    assert code == 0 and "Traceback" not in err
    for name in ("curve.png", "summary.json"):
        assert f"{out / name} is not written (No space left on device)" in err
        assert not (out / name).exists()
    assert json.loads(said.splitlines()[-1])["steps"] == 9
    is_the_same(out, uninterrupted)


def test_metrics_that_do_not_fit_are_written_later(run, whole, tmp_path, monkeypatch):  # noqa: F811 (an imported fixture)
    """metrics.jsonl takes no line of the steps 3 and 4: training goes on, and step 5 brings both."""
    flags, uninterrupted = whole
    out = tmp_path / "out"
    append = disk.append

    def full(file, data):
        if b'"step": 3,' in data and b'"step": 5,' not in data:
            raise OSError(errno.ENOSPC, "No space left on device", file.name)
        append(file, data)

    monkeypatch.setattr(disk, "append", full)
    code, _, err = run(*flags, "--out", out)
    assert code == 0, err
    assert err.count("metrics.jsonl takes no line (No space left on device)") == 1
    is_the_same(out, uninterrupted)
    assert [line["step"] for line in metrics(out)] == list(range(10))


def test_a_disk_that_becomes_read_only_ends_a_run(run, whole, small, monkeypatch):  # noqa: F811 (an imported fixture)
    flags, uninterrupted = whole
    out = small.folder / "out"
    undo = at_step(monkeypatch, 3, small.make_read_only)
    code, _, err = run(*flags, "--out", out)
    undo()
    assert code == 1 and "Read-only file system" in err.splitlines()[-1]
    assert "out has the state after step 2. Go on with" in err and "Traceback" not in err
    before = (out / "state.safetensors").read_bytes()
    # Neither can it be resumed there, nor another run be started.
    for how in (["--resume"], flags):
        code, _, err = run(*how, "--out", out)
        assert code == 1 and "Read-only file system" in err.splitlines()[-1], err
        assert "Traceback" not in err
    assert (out / "state.safetensors").read_bytes() == before
    small.make_writable()
    ok(run("--resume", "--out", out))
    is_the_same(out, uninterrupted)
