"""files/disk.py: files appear whole, a folder has one owner, a model folder has a fingerprint."""

import cli
from cli import UserError

import contextlib
import errno
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from files import disk
from files.disk import atomic, cache_folder, fingerprint, lock, write_json, write_tensors


def names(folder):
    return sorted(p.name for p in folder.iterdir())


# ---- atomic writes --------------------------------------------------------------------------------------------------


def test_content_appears_whole(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("old")
    with atomic(path) as beside:
        assert beside.parent == path.parent  # a rename works within one file system only
        beside.write_text("half")
        assert path.read_text() == "old"
        beside.write_text("whole")
    assert path.read_text() == "whole" and names(tmp_path) == ["run.json"]


@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_error_leaves_what_was_there(tmp_path, before, error):
    path = tmp_path / "run.json"
    if before:
        path.write_text(before)
    with pytest.raises(error), atomic(path) as beside:
        beside.write_text("half")
        raise error
    assert names(tmp_path) == (["run.json"] if before else [])
    assert not before or path.read_text() == before


def test_content_is_on_the_disk_before_the_name_points_to_it(tmp_path, monkeypatch):
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(disk.os, "fsync", lambda *args: order.append("fsync") or fsync(*args))
    monkeypatch.setattr(disk.os, "replace", lambda *args: order.append("replace") or replace(*args))
    write_json(tmp_path / "run.json", {})
    assert order == ["fsync", "replace", "fsync"]  # the file, the rename, the folder


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_the_mode_respects_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_json(tmp_path / "run.json", {})
        write_tensors(tmp_path / "adapter.safetensors", {"a": torch.ones(1)})
        assert os.umask(umask) == umask  # left as it was
    finally:
        os.umask(before)
    assert [stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()] == [mode, mode]


def test_a_left_over_of_the_same_process_number_stands_in_nobodys_way(tmp_path):
    """In containers every program is process 1. The left-over is a folder here, which cannot be written to."""
    (tmp_path / f".run.json.{os.getpid()}.part").mkdir()
    write_json(tmp_path / "run.json", {"a": 1})
    assert json.loads((tmp_path / "run.json").read_text()) == {"a": 1}


def test_two_writers_of_the_same_process_number_do_not_share_a_file(tmp_path):
    """Two containers on one volume: each writes its own file, and the last rename wins."""
    with atomic(tmp_path / "a") as first, atomic(tmp_path / "a") as second:
        assert first != second
        first.write_text("one")
        second.write_text("two")
    assert (tmp_path / "a").read_text() == "one" and names(tmp_path) == ["a"]


def test_half_written_files_of_killed_programs_are_removed(tmp_path):
    (tmp_path / ".model.safetensors.0123abcd.part").write_text("half")
    for name in ("a.part", ".mine.part", ".notes.txt.0123abc.part", ".a.0123abcd.part.bak"):
        (tmp_path / name).write_text("a user's")
    disk.remove_parts(tmp_path)
    assert names(tmp_path) == sorted(
        ["a.part", ".mine.part", ".notes.txt.0123abc.part", ".a.0123abcd.part.bak"]
    )


def strict(text):
    """The value of a JSON text in which NaN and Infinity are errors, as they are for other programs."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_json_never_holds_what_is_no_number(tmp_path, number):
    with pytest.raises(UserError, match=r"a\.json is not written, .* nan or infinite"):
        write_json(tmp_path / "a.json", {"rope": [1.0, {"theta": number}]})
    assert names(tmp_path) == []
    value = {"loss": number, "list": [1.5, number], "pair": (number, 2), "text": "NaN", "n": 3}
    wanted = {"loss": None, "list": [1.5, None], "pair": [None, 2], "text": "NaN", "n": 3}
    assert strict(disk.json_line(value)) == wanted
    # What earlier versions wrote is read.
    assert disk.parse_json(json.dumps(value)) == wanted


def test_a_name_that_is_no_utf_8_comes_back_from_json(tmp_path):
    """A Latin-1 file name: Python has its byte 0xe9 as a lone surrogate, which UTF-8 cannot encode."""
    name = os.fsdecode(b"cr\xe8me/rag\xf9.csv")
    write_json(tmp_path / "a.json", {"data": [name], "title": "Crème"})
    text = (tmp_path / "a.json").read_bytes().decode("utf-8")
    assert json.loads(text) == {"data": [name], "title": "Crème"} and "Crème" in text
    assert os.fsencode(json.loads(text)["data"][0]) == b"cr\xe8me/rag\xf9.csv"


def test_json_and_tensors_come_back(tmp_path):
    write_json(tmp_path / "a.json", {"title": "Crème ½", "x": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {
        "title": "Crème ½",
        "x": [1, None],
    }
    assert "Crème ½" in (tmp_path / "a.json").read_text(encoding="utf-8")
    tensors = {
        "bf16": torch.randn(3, 2).bfloat16(),
        "turned": torch.arange(6).view(2, 3).T,
        "param": torch.nn.Parameter(torch.ones(2)),
    }
    write_tensors(tmp_path / "a.safetensors", tensors, {"note": "x"})
    back = load_file(tmp_path / "a.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[k], t) and back[k].dtype == t.dtype for k, t in tensors.items())
    with safe_open(tmp_path / "a.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt", "note": "x"}


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ("I/O error: No space left on device (os error 28)", errno.ENOSPC),
        ("I/O error: Disk quota exceeded (os error 122)", errno.EDQUOT),
        ("I/O error: File too large (os error 27)", errno.EFBIG),
        ("I/O error: Permission denied (os error 13)", errno.EACCES),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="the numbers are Linux's")
def test_a_full_disk_keeps_its_number_through_safetensors(tmp_path, monkeypatch, said, number):
    """cli.run makes a sentence of these, and a traceback of others."""
    path = tmp_path / "adapter.safetensors"
    path.write_text("old")

    def full(tensors, beside, metadata):
        Path(beside).write_text("half")
        raise SafetensorError(f"Error while serializing: {said}")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError) as e:
        write_tensors(path, {"a": torch.ones(1)})
    assert e.value.errno == number and e.value.filename == str(path)
    assert names(tmp_path) == ["adapter.safetensors"] and path.read_text() == "old"


@contextlib.contextmanager
def files_may_have(size):
    """The system takes no byte of a file beyond the first `size` ones, in Rust no more than in Python."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


WRITERS = {
    "json": lambda path: write_json(path, {"a": "x" * 20_000}),
    "tensors": lambda path: write_tensors(path, {"a": torch.ones(5_000)}),
    "lines": lambda path: append_to(path, b"x" * 20_000),
}


def append_to(path, data):
    with open(path, "ab", buffering=0) as file:
        disk.append(file, data)


@pytest.mark.parametrize("writer", WRITERS)
def test_an_error_at_any_byte_leaves_what_was_there(tmp_path, writer):
    write = WRITERS[writer]
    write(tmp_path / "whole")
    size = (tmp_path / "whole").stat().st_size
    path = tmp_path / "file"
    path.write_text("old")
    before = 3 if writer == "lines" else 0
    for at in (0, 1, 8, 4096, size // 2, size - 1):
        with files_may_have(at + before), pytest.raises(OSError, match="File too large"):
            write(path)
        assert path.read_text() == "old" and names(tmp_path) == ["file", "whole"]
    with files_may_have(size + before):
        write(path)
    wanted = b"old" * (writer == "lines") + (tmp_path / "whole").read_bytes()
    assert path.read_bytes() == wanted


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "close", "chmod", "replace"])
def test_an_error_of_any_call_leaves_what_was_there(tmp_path, monkeypatch, call, error):
    """A network's file system says only at fsync or close that it is full."""
    (tmp_path / "a").write_text("old")
    real = getattr(os, call)
    calls = []

    def fails(*args):
        calls.append(args)
        if call == "close":
            real(*args)
        raise OSError(error, os.strerror(error))

    for write in (WRITERS["json"], WRITERS["tensors"]):
        with monkeypatch.context() as patch, pytest.raises(OSError) as e:
            patch.setattr(disk.os, call, fails)
            write(tmp_path / "a")
        assert e.value.errno == error and error in cli.CANNOT_WRITE
        assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a"]
    assert calls


def test_what_nothing_depends_on_is_given_up_and_no_old_file_stays(tmp_path, capsys):
    path = tmp_path / "curve.png"
    path.write_text("of an earlier end")
    with disk.go_on_without(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert f"{path} is not written (No space left on device)" in capsys.readouterr().err
    assert not path.exists()
    with disk.go_on_without(path):
        path.write_text("new")
    assert path.read_text() == "new"
    with pytest.raises(BlockingIOError), disk.go_on_without(path):
        raise BlockingIOError(errno.EAGAIN, "another error")
    assert path.exists()


# ---- fingerprint ----------------------------------------------------------------------------------------------------


def edit(path, where, new):
    """The bytes from `where`, counted from the end, are `new` now."""
    content = path.read_bytes()
    path.write_bytes(
        content[:where] + new + content[where + len(new) :]
        if -where > len(new)
        else content[:where] + new
    )


def new_header(folder):
    """The same bytes under another name: two layers change places."""
    path = folder / "model.safetensors"
    path.write_bytes(
        path.read_bytes().replace(b"model.layers.0.mlp.up_proj", b"model.layers.7.mlp.up_proj")
    )


CHANGES = {
    "config": lambda folder: edit(folder / "config.json", -1, b" }"),
    "last byte": lambda folder: edit(folder / "model.safetensors", -1, b"\x77"),
    "near the end": lambda folder: edit(folder / "model.safetensors", -60_000, b"\x77"),
    "header": new_header,
    "size": lambda folder: edit(folder / "model.safetensors", -1, b"\0\0"),
    "one more shard": lambda folder: shutil.copy(
        folder / "model.safetensors", folder / "model-00002.safetensors"
    ),
    "all weights": lambda folder: make_model(folder, seed=1),
}


def test_a_copied_folder_has_the_same_fingerprint(tmp_path):
    model = make_model(tmp_path / "model")
    before = fingerprint(model)
    shutil.copytree(model, tmp_path / "copy")
    os.utime(tmp_path / "copy/model.safetensors", (1, 1))
    (tmp_path / "copy/README.md").write_text("a note")
    assert fingerprint(tmp_path / "copy") == before == fingerprint(str(model)) and len(before) >= 16


@pytest.mark.parametrize("change", CHANGES)
def test_another_model_has_another_fingerprint(tmp_path, change):
    model = make_model(tmp_path / "model")
    before, files = fingerprint(model), {p.name: p.read_bytes() for p in model.iterdir()}
    CHANGES[change](model)
    assert files != {p.name: p.read_bytes() for p in model.iterdir()}  # else the change is none
    assert fingerprint(model) != before


def test_what_a_run_adds_to_a_model_folder_does_not_change_its_fingerprint(tmp_path):
    """--lora_r 0 makes a run's folder a model folder: its state changes with each save, the model need not."""
    model = make_model(tmp_path / "model")
    before = fingerprint(model)
    for name in ("state.safetensors", "adapter_model.safetensors"):
        (model / name).write_bytes(b"anything")
    assert fingerprint(model) == before


def test_a_fingerprint_is_the_same_in_every_version_of_the_program(tmp_path):
    """A run of an earlier version is resumed only if its base model still has the fingerprint in run.json."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-00001.safetensors").write_bytes(bytes(range(256)) * 1000)
    (tmp_path / "model-00002.safetensors").write_bytes(b"short")
    assert fingerprint(tmp_path) == "1a3c07ce61349d2b"


def test_an_exchanged_tensor_between_two_samples_is_noticed(tmp_path, monkeypatch):
    """A shard of 9 MB has samples every 140 kB. A tensor of 32 kB between two of them is another one."""
    monkeypatch.setattr(disk, "SAMPLE_BYTES", 4096)
    tensors = {name: torch.ones(n) for name, n in (("a", 10**6), ("b", 8192), ("c", 1248576))}
    (tmp_path / "config.json").write_text("{}")
    write_tensors(tmp_path / "model.safetensors", tensors)
    before = disk.about_model(tmp_path)
    tensors["b"] = tensors["b"] * 2
    write_tensors(tmp_path / "model.safetensors", tensors)
    after = disk.about_model(tmp_path)
    assert after["base_fingerprint"] == before["base_fingerprint"]
    assert after["base_tensors"] != before["base_tensors"]


@pytest.mark.parametrize("change", [name for name in CHANGES if name != "config"])
def test_other_tensors_have_another_hash(tmp_path, change):
    model = make_model(tmp_path / "model")
    before = disk.tensor_samples(model)
    CHANGES[change](model)
    assert disk.tensor_samples(model) != before


def test_a_copied_folder_has_the_same_tensors_and_junk_is_passed_over(tmp_path):
    model = make_model(tmp_path / "model")
    before = disk.tensor_samples(model)
    shutil.copytree(model, tmp_path / "copy")
    (tmp_path / "copy/state.safetensors").write_bytes(b"anything")
    (tmp_path / "copy/z.safetensors").write_bytes(b"")
    assert disk.tensor_samples(tmp_path / "copy") == before


# ---- the lock and the cache folder ----------------------------------------------------------------------------------

HOLDER = """import sys, time
from files.disk import lock
held = lock(sys.argv[1])
print("held", flush=True)
time.sleep(60)"""


def test_a_lock_is_held_by_one_process_until_it_dies(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=env
    )
    try:
        assert holder.stdout.readline() == "held\n"
        for _ in range(2):
            with pytest.raises(OSError):
                lock(tmp_path)
    finally:
        holder.kill()  # SIGKILL: it cleans nothing up
        holder.wait()
        holder.stdout.close()
    assert names(tmp_path) == [".lock"]
    lock(tmp_path)


def test_a_lock_lasts_as_long_as_its_file_is_open(tmp_path):
    held = lock(tmp_path)
    with pytest.raises(OSError):
        lock(tmp_path)
    held.close()
    lock(tmp_path)


def test_the_cache_lies_beside_the_code_unless_it_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cache_folder(".cache") == ROOT / ".cache"
    assert cache_folder(str(tmp_path)) == tmp_path == cache_folder(tmp_path)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert disk.user_path("~/out", "--out") == "/home/somebody/out"
    assert disk.user_path("~", "--out") == "/home/somebody"
    for name in ("out", "a/~/b", "", "/x", "org/name"):
        assert disk.user_path(name, "--out") == name
    assert cache_folder("~/cache") == Path("/home/somebody/cache")
    with pytest.raises(UserError, match="--out ~nobody-here/x: there is no user and no file ~nob"):
        disk.user_path("~nobody-here/x", "--out")
    Path("~nobody-here").write_text("a file of that name")
    assert disk.user_path("~nobody-here", "--data") == "~nobody-here"


def test_the_programs_code_has_a_hash_of_its_content(tmp_path, monkeypatch):
    for folder in ("", "speed", "files", "tests"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(disk, "ROOT", tmp_path)
    before = disk.program()
    os.utime(tmp_path / "a.py", (1, 1))
    (tmp_path / "tests" / "b.py").write_text("")
    (tmp_path / "notes.txt").write_text("")
    assert disk.program() == before
    seen = {before}
    for name in ("a.py", "speed/a.py", "files/a.py"):
        (tmp_path / name).write_text("x = 2\n")
        seen.add(disk.program())
    (tmp_path / "speed" / "a.py").rename(tmp_path / "speed" / "b.py")
    seen.add(disk.program())
    assert len(seen) == 5
