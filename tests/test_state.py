"""state.py: a run's folder has one owner, whole files, and a state from which training goes on bit for bit."""

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import make_model

import state
from cli import UserError
from state import MADE_HERE, STATE, Run, Stop, atomic, fingerprint, write_json, write_tensors

ROOT = Path(__file__).parents[1]


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
    monkeypatch.setattr(state.os, "fsync", lambda *args: order.append("fsync") or fsync(*args))
    monkeypatch.setattr(
        state.os, "replace", lambda *args: order.append("replace") or replace(*args)
    )
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
        raise state.SafetensorError(f"Error while serializing: {said}")

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(OSError) as e:
        write_tensors(path, {"a": torch.ones(1)})
    assert e.value.errno == number and e.value.filename == str(path)
    assert names(tmp_path) == ["adapter.safetensors"] and path.read_text() == "old"


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


# ---- one owner, nothing deleted -------------------------------------------------------------------------------------

HOLDER = """import sys, time
from state import Run
run = Run(sys.argv[1], resume=False)
print("held", flush=True)
time.sleep(60)"""


def test_a_second_process_is_refused_and_a_dead_one_holds_nothing(tmp_path):
    out = tmp_path / "out"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True, env=env
    )
    try:
        assert holder.stdout.readline() == "held\n"
        (out / "run.json").write_text("{}")
        (out / STATE).write_text("")
        for resume in (False, True):
            with pytest.raises(UserError, match="another process") as e:
                Run(out, resume)
            assert str(out) in str(e.value)
        assert names(tmp_path) == ["out"] and names(out) == [
            ".lock",
            "run.json",
            STATE,
        ]  # nothing renamed or lost
    finally:
        holder.kill()  # SIGKILL: it cleans nothing up
        holder.wait()
        holder.stdout.close()
    assert (out / ".lock").exists()
    Run(out, resume=True)


def test_the_folder_that_takes_an_old_runs_place_is_owned_too(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / STATE).write_text("")
    run = Run(tmp_path / "out", resume=False)
    with pytest.raises(UserError, match="another process"):
        Run(tmp_path / "out", resume=False)
    assert names(tmp_path) == ["out", "out.1"]
    assert run.folder == tmp_path / "out"


def test_old_runs_are_renamed_and_nothing_is_deleted(tmp_path, capsys):
    out = tmp_path / "out"
    for n in range(3):
        run = Run(out, resume=False)
        run.write_json("run.json", {"n": n})
        run.log({"step": n})
        (out / STATE).write_text("")
        (out / "best").mkdir()
        (out / "best/adapter.txt").write_text(str(n))
        del run
    assert names(tmp_path) == ["out", "out.1", "out.2"]
    for folder, n in (("out.1", 0), ("out.2", 1), ("out", 2)):
        assert json.loads((tmp_path / folder / "run.json").read_text()) == {"n": n}
        assert json.loads((tmp_path / folder / "metrics.jsonl").read_text()) == {"step": n}
        assert (tmp_path / folder / "best/adapter.txt").read_text() == str(n)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "out.1" in lines[0] and "out.2" in lines[1]


@pytest.mark.parametrize("name", MADE_HERE)
def test_any_file_of_a_run_makes_a_folder_one(tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / name).write_text("")
    (tmp_path / "out.1").write_text("somebody's file")
    Run(tmp_path / "out", resume=False)
    assert (tmp_path / "out.2" / name).exists() and (
        tmp_path / "out.1"
    ).read_text() == "somebody's file"


def test_a_folder_without_a_run_is_reused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    Run(tmp_path / "out", resume=False)
    assert names(tmp_path) == ["out"] and (tmp_path / "out/notes.txt").read_text() == "mine"


def test_a_run_that_stopped_before_its_first_save_makes_room(tmp_path):
    """It has no adapter and no state to keep; its metrics are not mixed with the new run's."""
    run = Run(tmp_path / "out", resume=False)
    run.write_json("run.json", {})
    run.log({"step": 0, "try": 1})
    del run
    run = Run(tmp_path / "out", resume=False)
    run.log({"step": 0, "try": 2})
    assert names(tmp_path) == ["out"] and run.history() == [{"step": 0, "try": 2}]


def test_a_folder_is_made_with_its_parents(tmp_path):
    Run(tmp_path / "runs/today/out", resume=False)
    assert (tmp_path / "runs/today/out").is_dir()


@pytest.mark.parametrize("there", [False, True])
def test_resume_without_a_state_is_refused_and_makes_nothing(tmp_path, there):
    if there:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/run.json").write_text("{}")
    with pytest.raises(UserError, match=rf"--resume: .*out holds no {STATE}"):
        Run(tmp_path / "out", resume=True)
    assert names(tmp_path) == (["out"] if there else [])


def test_a_file_in_the_place_of_the_folder_is_a_users_mistake(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="out"):
        Run(tmp_path / "out", resume=False)
    assert (tmp_path / "out").read_text() == "a file"


def test_a_current_folder_that_holds_a_run_is_not_renamed(tmp_path, monkeypatch):
    """`--out .`: a shell stands in it."""
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    Path(STATE).write_text("")
    with pytest.raises(UserError, match="--out"):
        Run(".", resume=False)
    assert (tmp_path / "out" / STATE).exists() and names(tmp_path) == ["out"]


@pytest.mark.parametrize("content", [None, b"{", b"\xff"])
def test_a_run_json_that_cannot_be_read_is_named(tmp_path, content):
    run = Run(tmp_path / "out", resume=False)
    if content:
        (tmp_path / "out/run.json").write_bytes(content)
    with pytest.raises(UserError, match=r"run\.json cannot be read"):
        run.read_json("run.json")


# ---- metrics --------------------------------------------------------------------------------------------------------


def test_a_logged_line_is_there_at_once(tmp_path):
    run = Run(tmp_path / "out", resume=False)
    assert run.history() == []
    run.log({"step": 0, "loss": 2.5})
    run.log({"step": 1, "loss": 2.25})
    assert (
        tmp_path / "out/metrics.jsonl"
    ).read_text() == '{"step": 0, "loss": 2.5}\n{"step": 1, "loss": 2.25}\n'
    assert run.history() == [{"step": 0, "loss": 2.5}, {"step": 1, "loss": 2.25}]


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', "{", '{"step": 2}'[:-1], "\0\0\0"])
def test_history_passes_over_a_torn_last_line(tmp_path, torn):
    run = Run(tmp_path / "out", resume=False)
    (tmp_path / "out/metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n' + torn)
    assert run.history() == [{"step": 0}, {"step": 1}]


def test_forget_after_leaves_each_step_once(tmp_path):
    """A run was killed at step 5 and in the middle of a line; it goes on from step 3."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / STATE).write_text("")
    lines = [f'{{"step": {n}, "try": 1}}\n' for n in range(6)]
    (tmp_path / "out/metrics.jsonl").write_text("".join(lines) + '{"step": 6, "t')
    run = Run(tmp_path / "out", resume=True)
    run.forget_after(3)
    assert (tmp_path / "out/metrics.jsonl").read_text() == "".join(lines[:4])
    run.log({"step": 4, "try": 2})
    assert [line["step"] for line in run.history()] == [0, 1, 2, 3, 4] and run.history()[4][
        "try"
    ] == 2


def test_logging_goes_on_after_forget_after(tmp_path):
    """The file is another one after it; a line logged then must not go to the old one."""
    run = Run(tmp_path / "out", resume=False)
    for step in (1, 2, 3):
        run.log({"step": step})
    run.forget_after(1)
    run.log({"step": 2})
    assert run.history() == [{"step": 1}, {"step": 2}]


# ---- resume ---------------------------------------------------------------------------------------------------------


def toy(seed=0):
    """(model with dropout, its optimiser, its parameters)"""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    return (
        model,
        torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1),
        dict(model.named_parameters()),
    )


def train(model, optimizer, steps):
    for step in steps:
        x = torch.sin(torch.arange(12.0).view(3, 4) + step)
        optimizer.zero_grad()
        (model(x + torch.randn(3, 4)) ** 2).mean().backward()
        optimizer.step()


@pytest.fixture
def saved(tmp_path):
    """A run that saved its state after three steps: (run, parameters after three more steps)"""
    run, (model, optimizer, params) = Run(tmp_path / "out", resume=False), toy()
    train(model, optimizer, range(3))
    run.save_state(optimizer, params, {"step": 3, "best": 1.5, "title": "Crème"})
    at_three = {k: p.detach().clone() for k, p in params.items()}
    train(model, optimizer, range(3, 6))
    assert not any(torch.equal(p, at_three[k]) for k, p in params.items())
    return run, {k: p.detach().clone() for k, p in params.items()}


def test_stopped_and_resumed_is_bit_for_bit_what_uninterrupted_is(saved):
    run, expected = saved
    model, optimizer, params = toy(seed=99)
    torch.rand(7)  # another random state
    assert run.load_state(optimizer, params) == {"step": 3, "best": 1.5, "title": "Crème"}
    train(model, optimizer, range(3, 6))
    assert all(torch.equal(p, expected[k]) for k, p in params.items())


def test_the_optimisers_state_comes_back_whole(tmp_path):
    run, (model, optimizer, params) = Run(tmp_path / "out", resume=False), toy()
    train(model, optimizer, range(3))
    first = optimizer.param_groups[0]["params"][0]
    optimizer.state[first]["scale"], optimizer.state[first]["count"] = (
        0.1,
        7,
    )  # some optimisers keep plain numbers
    run.save_state(optimizer, params, {})
    _, fresh, fresh_params = toy(seed=5)
    run.load_state(fresh, fresh_params)
    before, after = optimizer.state_dict()["state"], fresh.state_dict()["state"]
    assert before.keys() == after.keys() == {0, 1, 2, 3}
    for i, values in before.items():
        assert values.keys() == after[i].keys() >= {"step", "exp_avg", "exp_avg_sq"}
        for name, value in values.items():
            other = after[i][name]
            assert type(other) is type(value)
            if torch.is_tensor(value):
                assert torch.equal(value, other) and value.dtype == other.dtype
            else:
                assert value == other
    assert after[0]["scale"] == 0.1 and after[0]["count"] == 7


def test_resuming_keeps_the_settings_of_the_optimiser_at_hand(saved):
    """The schedule sets the learning rate; a longer schedule has another one."""
    run, _ = saved
    _, optimizer, params = toy()
    optimizer.param_groups[0]["lr"] = 0.125
    run.load_state(optimizer, params)
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_people_can_read_the_facts_too(saved):
    run, _ = saved
    assert run.read_json("state.json") == {"step": 3, "best": 1.5, "title": "Crème"}


def test_the_resume_reads_one_file(saved):
    """A kill between the two writes leaves a state.json of another step: what counts lies in STATE."""
    run, _ = saved
    run.write_json("state.json", {"step": 2})
    _, optimizer, params = toy()
    assert run.load_state(optimizer, params)["step"] == 3


def test_a_save_that_fails_leaves_the_state_before(saved, monkeypatch):
    run, _ = saved
    before = (run.folder / STATE).read_bytes()
    model, optimizer, params = toy()
    train(model, optimizer, range(1))
    monkeypatch.setattr(state.os, "replace", lambda *args: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        run.save_state(optimizer, params, {"step": 4})
    assert (run.folder / STATE).read_bytes() == before and not list(run.folder.glob(".*.part"))


def rewrite(path, change):
    """The state with `change` done to its tensors and its metadata."""
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


WRONG = torch.ones(8, 5)  # where toy() has 8 x 4
DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"\xff" * 1000),
    "half of it": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "gone": lambda path: path.unlink(),
    "no metadata": lambda path: save_file(load_file(path), path),
    "no facts": lambda path: rewrite(path, lambda t, m: m.pop("facts")),
    "broken facts": lambda path: rewrite(path, lambda t, m: m.update(facts="{")),
    "a parameter is missing": lambda path: rewrite(path, lambda t, m: t.pop("param.2.bias")),
    "a parameter of another shape": lambda path: rewrite(
        path, lambda t, m: t.update({"param.0.weight": WRONG})
    ),
    "a moment is missing": lambda path: rewrite(path, lambda t, m: t.pop("optim.1.exp_avg")),
    "a moment of another shape": lambda path: rewrite(
        path, lambda t, m: t.update({"optim.0.exp_avg": WRONG})
    ),
    "no random state": lambda path: rewrite(path, lambda t, m: t.pop("random.cpu")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_state_that_is_damaged_or_does_not_fit_is_refused_by_name(saved, damage):
    run, _ = saved
    DAMAGES[damage](run.folder / STATE)
    _, optimizer, params = toy()
    with pytest.raises(UserError, match=r"state\.safetensors") as e:
        run.load_state(optimizer, params)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "change", [{"3.bias": torch.ones(1)}, {"0.weight": torch.ones(9, 4)}], ids=["more", "wider"]
)
def test_a_state_of_another_model_is_refused_and_the_parameter_named(saved, change):
    run, _ = saved
    _, optimizer, params = toy()
    with pytest.raises(UserError, match=next(iter(change))):
        run.load_state(optimizer, params | change)


# ---- signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_noted_and_the_step_goes_on(number, code, capsys):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        assert stop.signal is None
        signal.raise_signal(number)  # no exception: the step in hand is finished
        assert stop.signal == number and stop.exit_code == code
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_it_at_once(second):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT
        signal.raise_signal(second)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_handlers_are_restored_after_an_error():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), Stop():
        assert signal.getsignal(signal.SIGTERM) != before[1]
        1 // 0  # noqa: B018
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
