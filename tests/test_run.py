"""files/run.py: a run's folder has one owner, and a state from which training goes on bit for bit."""

from cli import UserError

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from files import disk, state
from files.run import (
    FORMAT,
    MADE_HERE,
    STATE,
    Facts,
    Run,
    Stop,
    check_out,
    how_often,
    read_run,
    refuse_other_flags,
    started_with,
)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


# ---- one owner, nothing deleted -----------------------------------------------------------------------------------

HOLDER = """import sys, time
from files.run import Run
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


# ---- metrics ------------------------------------------------------------------------------------------------------


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


# ---- resume -------------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(disk.os, "replace", lambda *args: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        run.save_state(optimizer, params, {"step": 4})
    assert (run.folder / STATE).read_bytes() == before and not list(run.folder.glob(".*.part"))


def rewrite(path, change):
    """The state with `change` done to its tensors and its metadata, under a checksum that is right again."""
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    covered = {key: metadata[key] for key in metadata.keys() - {"format", "checksum"}}
    metadata["checksum"] = disk.checksum(tensors, covered)
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


def test_no_flipped_bit_of_a_state_passes(saved):
    """A bit of every fourth byte of the header, where dtypes, step and losses stand, and of bytes of the tensors."""
    run, _ = saved
    path = run.folder / STATE
    whole = path.read_bytes()
    before, about = state.read_state(path)
    rng = random.Random(1)
    header = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    in_tensors = rng.sample(range(header, len(whole)), 100)
    for at in [*range(0, header, 4), *in_tensors]:
        spoilt = bytearray(whole)
        spoilt[at] ^= 1 << rng.randrange(8)
        path.write_bytes(spoilt)
        try:
            after, other = state.read_state(path)
        except UserError as e:
            assert str(path) in str(e) and "\n" not in str(e)
            refused += 1
            continue
        # A flip in what is read by nobody, such as the name of the key `checksum`.
        assert at < header and other == about and before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert refused > header // 4 + 100 - 30


def test_a_checksum_is_of_names_dtypes_shapes_bytes_and_texts():
    whole = {"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.int32)}
    seen = {disk.checksum(whole, {"facts": "1"})}
    others = [
        {"a": torch.ones(3, 2)},
        {"a": torch.ones(2, 3, dtype=torch.float64)},
        {"b": torch.zeros(4)},
        {"a": torch.tensor([[1.0, 1, 1], [1, 1, 1.0000001]])},
        {"b": torch.zeros(4, dtype=torch.uint8)},
        {"c": torch.zeros(0)},
    ]
    seen |= {disk.checksum(whole | other, {"facts": "1"}) for other in others}
    seen |= {disk.checksum(whole, {"facts": "2"}), disk.checksum(whole, {"run": "1"})}
    assert len(seen) == 9
    # It is that of zlib, of the layout that the docstring names: a number of this kind is in every state.
    text = b"facts 1\na torch.float32 [2, 3]\n" + b"\0\0\x80\x3f" * 6
    text += b"b torch.int32 [4]\n" + b"\0" * 16
    assert disk.checksum(whole, {"facts": "1"}) == f"{zlib.crc32(text):08x}"


@pytest.mark.parametrize(
    "change", [{"3.bias": torch.ones(1)}, {"0.weight": torch.ones(9, 4)}], ids=["more", "wider"]
)
def test_a_state_of_another_model_is_refused_and_the_parameter_named(saved, change):
    run, _ = saved
    _, optimizer, params = toy()
    with pytest.raises(UserError, match=next(iter(change))):
        run.load_state(optimizer, params | change)


class PagedAdam(torch.optim.AdamW):
    """What bitsandbytes' paged optimiser has that a resume needs: its own way to make the buffers of states."""

    is_paged = True

    def get_state_buffer(self, p, dtype=torch.float32):
        buffer = torch.zeros_like(p, dtype=dtype)
        buffer.is_paged = p.numel() > 10
        return buffer


def paged_states(params):
    """States as bitsandbytes' 8-bit optimiser has them: codes of a byte, their scales, a step that is a number."""
    made = {}
    for i, p in enumerate(params.values()):
        codes = torch.arange(p.numel(), dtype=torch.uint8).view(p.shape)
        made[p] = {"step": 3, "state1": codes, "state2": codes + 1, "absmax1": torch.ones(1) * i}
    return made


def test_a_paged_state_comes_back_into_paged_memory(tmp_path):
    run, (_, _, params) = Run(tmp_path / "out", resume=False), toy()
    optimizer = PagedAdam(params.values(), lr=0.05)
    optimizer.state.update(paged_states(params))
    run.save_state(optimizer, params, {"step": 3})
    _, _, fresh_params = toy(seed=5)
    fresh = PagedAdam(fresh_params.values(), lr=0.05)
    run.load_state(fresh, fresh_params)
    for p, before in zip(fresh_params.values(), paged_states(params).values(), strict=True):
        after = fresh.state[p]
        assert after.keys() == before.keys() and after["step"] == 3
        for key in ("state1", "state2", "absmax1"):
            assert torch.equal(after[key], before[key]) and after[key].dtype == before[key].dtype
        # The optimiser decides what it pages: not the biases here, and never the scales.
        for key in ("state1", "state2"):
            assert after[key].is_paged == (p.numel() > 10)
        assert not hasattr(after["absmax1"], "is_paged")


def test_a_paged_state_of_another_shape_is_refused(tmp_path):
    run, (_, _, params) = Run(tmp_path / "out", resume=False), toy()
    optimizer = PagedAdam(params.values(), lr=0.05)
    optimizer.state.update(paged_states(params))
    first = next(iter(params.values()))
    optimizer.state[first]["state1"] = torch.zeros(8, 5, dtype=torch.uint8)
    run.save_state(optimizer, params, {"step": 3})
    with pytest.raises(UserError, match=r"state\.safetensors does not fit this model"):
        run.load_state(optimizer, params)


def test_a_state_with_no_numbers_is_not_saved_and_the_one_before_stays(saved):
    run, _ = saved
    model, optimizer, params = toy()
    train(model, optimizer, range(1))
    run.refuse_to_save_no_numbers(optimizer, params, 4)
    optimizer.state[params["2.bias"]]["exp_avg_sq"].fill_(float("inf"))
    with pytest.raises(UserError, match=r"optim\.3\.exp_avg_sq holds nan or inf after step 4, so"):
        run.refuse_to_save_no_numbers(optimizer, params, 4)
    params["0.weight"].data[2, 1] = float("nan")
    with pytest.raises(UserError, match=r"param\.0\.weight holds nan or inf after step 4, so"):
        run.refuse_to_save_no_numbers(optimizer, params, 4)


def test_a_state_is_kept_though_nobody_can_read_its_facts(saved, monkeypatch):
    """The disk is full after the state, before state.json, which is for people only."""
    run, _ = saved
    _, optimizer, params = toy()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk, "write_json", full)
    with pytest.raises(OSError):
        run.save_state(optimizer, params, {"step": 6})
    assert run.saved_at == 6 and run.load_state(optimizer, params) == {"step": 6}


def test_a_save_that_fails_is_not_what_is_kept(saved, monkeypatch):
    run, _ = saved
    _, optimizer, params = toy()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk, "write_tensors", full)
    with pytest.raises(OSError):
        run.save_state(optimizer, params, {"step": 6})
    assert run.saved_at == 3


def test_an_error_is_followed_by_what_is_kept(saved, capsys):
    run, _ = saved
    capsys.readouterr()
    with pytest.raises(KeyboardInterrupt), run.telling_what_is_kept():
        raise KeyboardInterrupt
    said = capsys.readouterr().err
    assert (
        f"{run.out} has the state after step 3. Go on with: python train.py --resume --out" in said
    )
    run.saved_at = None
    with run.telling_what_is_kept():
        pass
    assert not capsys.readouterr().err and "no state to go on from yet" in run.kept()


# ---- a state and a run.json of the first version -------------------------------------------------------------------


def test_a_state_of_the_first_version_is_resumed(tmp_path):
    """Its layout, written here by hand: names of tensors, keys of the metadata."""
    model, optimizer, params = toy(seed=5)
    out = tmp_path / "out"
    out.mkdir()
    tensors = {f"param.{name}": torch.randn(p.shape) for name, p in params.items()}
    for i, p in enumerate(params.values()):
        tensors[f"optim.{i}.exp_avg"] = torch.randn(p.shape)
        tensors[f"optim.{i}.exp_avg_sq"] = torch.rand(p.shape)
        tensors[f"optim.{i}.step"] = torch.tensor(3.0)
        tensors[f"optim.{i}.qmap1"] = torch.arange(256.0)
    torch.manual_seed(77)
    tensors["random.cpu"] = torch.get_rng_state()
    expected = torch.rand(5)
    metadata = {
        "format": "pt",
        "facts": json.dumps({"step": 3, "best": 1.5}),
        "scalars": json.dumps({"0.count": 7, "2.name.with.dots": 0.5}),
        "shapes": json.dumps({name: list(t.shape) for name, t in tensors.items()}),
    }
    save_file(tensors, out / "state.safetensors", metadata=metadata)
    torch.rand(9)
    assert Run(out, resume=True).load_state(optimizer, params) == {"step": 3, "best": 1.5}
    assert torch.equal(torch.rand(5), expected)
    for i, (name, p) in enumerate(params.items()):
        assert torch.equal(p, tensors[f"param.{name}"])
        for key in ("exp_avg", "exp_avg_sq", "step", "qmap1"):
            assert torch.equal(optimizer.state[p][key], tensors[f"optim.{i}.{key}"])
    weight, bias, last_weight, last_bias = params.values()
    assert optimizer.state[weight]["count"] == 7
    assert optimizer.state[last_weight]["name.with.dots"] == 0.5
    assert "count" not in optimizer.state[bias] and "count" not in optimizer.state[last_bias]


def test_a_state_has_the_layout_of_the_first_version(tmp_path):
    """The other way round, so that the test above tests what is written today: three keys of the metadata are new."""
    model, optimizer, params = toy()
    train(model, optimizer, range(1))
    table = torch.arange(256.0)  # bitsandbytes' tables: one tensor that all parameters share
    for p in params.values():
        optimizer.state[p]["qmap1"] = table
        optimizer.state[p]["count"] = 7
    run = Run(tmp_path / "out", resume=False)
    run.save_state(optimizer, params, {"step": 1})
    wanted = {f"param.{name}": p for name, p in params.items()}
    for i, p in enumerate(params.values()):
        for key in ("step", "exp_avg", "exp_avg_sq", "qmap1"):
            wanted[f"optim.{i}.{key}"] = optimizer.state[p][key]
    saved = load_file(run.folder / "state.safetensors")
    assert saved.keys() - {"random.cuda"} == {*wanted, "random.cpu"}
    assert all(torch.equal(saved[name], t) for name, t in wanted.items())
    with safe_open(run.folder / "state.safetensors", "pt") as f:
        metadata = f.metadata()
    new = {"run", "versions", "checksum"}
    assert metadata.keys() == {"format", "facts", "scalars", "shapes"} | new
    assert json.loads(metadata["facts"]) == {"step": 1}
    assert json.loads(metadata["scalars"]) == {f"{i}.count": 7 for i in range(4)}
    assert json.loads(metadata["shapes"]) == {name: list(t.shape) for name, t in saved.items()}


def test_a_state_of_more_parameters_than_the_optimisers_is_refused(saved):
    run, _ = saved
    _, _, params = toy()
    fewer = torch.optim.AdamW(list(params.values())[:2], lr=0.05)
    with pytest.raises(UserError, match=r"state\.safetensors was saved by another version"):
        run.load_state(fewer, params)


INFO = {"config": {"model": "SmolLM2"}, "base_fingerprint": "0123", "titles": ["Bread"]}


@pytest.mark.parametrize("where", [".", "best"])
@pytest.mark.parametrize("more", [{}, {"format": 2}])
def test_a_run_is_read_from_its_folder_and_from_its_best(tmp_path, where, more):
    (tmp_path / "best").mkdir()
    disk.write_json(tmp_path / "run.json", INFO | more)
    assert read_run(tmp_path / where) == INFO | more


def test_a_folder_that_holds_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no run: make one, `python train.py`") as e:
        read_run(tmp_path / "a/b")
    assert str(tmp_path / "a/b") in str(e.value)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "null",
        "{}",
        json.dumps(INFO | {"titles": []}),
        json.dumps(INFO | {"config": {}}),
        json.dumps({key: value for key, value in INFO.items() if key != "base_fingerprint"}),
    ],
)
def test_a_run_json_that_is_not_a_runs_is_named(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=r"run\.json cannot be read as a run's"):
        read_run(tmp_path)


# ---- signals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_noted_and_the_step_goes_on(number, code, capsys):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Stop(None) as stop:
        assert stop.signal is None
        signal.raise_signal(number)  # no exception: the step in hand is finished
        assert stop.signal == number and stop.exit_code == code
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_signal_after_the_block_reaches_no_pipe_of_it():
    """The thread that waits for a second signal ends with the block, and the numbers of its files are free."""
    handles = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with Stop(None):
            signal.raise_signal(signal.SIGTERM)
    until = time.monotonic() + 30
    while len(os.listdir("/proc/self/fd")) > handles and time.monotonic() < until:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) <= handles
    assert signal.set_wakeup_fd(-1) == -1


def test_handlers_are_restored_after_an_error():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), Stop(None):
        assert signal.getsignal(signal.SIGTERM) != before[1]
        1 // 0  # noqa: B018 (raised on purpose)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# ---- facts --------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_is_never_the_best():
    facts = Facts(step=3)
    assert facts.judge(2.0) and (facts.best_val, facts.best_step) == (2.0, 3)
    facts.step = 6
    assert not facts.judge(float("nan"))
    assert not facts.judge(2.0)
    assert (facts.best_val, facts.best_step, facts.without_progress) == (2.0, 3, 2)
    assert facts.judge(1.5) and facts.without_progress == 0


def test_a_run_of_a_newer_version_is_not_resumed(tmp_path):
    info = {"config": {}, "rules": {}, "format": FORMAT + 1}
    (tmp_path / "run.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="made by a newer version"):
        started_with(tmp_path, {"epochs": None}, {})


def test_a_lock_that_cannot_be_opened_is_not_another_process(tmp_path):
    (tmp_path / "out" / ".lock").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        Run(tmp_path / "out", resume=False)


# ---- what a run reads stays readable -------------------------------------------------------------------------------


def a_model(folder):
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text(name)
    return folder


def a_run(folder):
    (folder / "best").mkdir(parents=True)
    for name in ("run.json", STATE, "adapter_model.safetensors", "best/adapter_model.safetensors"):
        (folder / name).write_text("")
    return folder


def linked(link, target):
    """A link at `link`, whose parent is made."""
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)
    return link


# {case: what it makes in a folder -> (--out, base, data files)}. `out` holds a run in each.
LOST = {
    "the base lies in it": lambda t: (t / "out", a_model(a_run(t / "out") / "base"), []),
    "the base lies deep in it": lambda t: (t / "out", a_model(a_run(t / "out") / "a/b"), []),
    "--out is a link": lambda t: (
        linked(t / "link", a_run(t / "out")),
        a_model(t / "out/base"),
        [],
    ),
    "the base is a link into it": lambda t: (
        a_run(t / "out"),
        linked(t / "link", a_model(t / "out/base")),
        [],
    ),
    "the base is a link in it": lambda t: (
        a_run(t / "out"),
        linked(t / "out/link", a_model(t / "base")),
        [],
    ),
    "data in it": lambda t: (a_run(t / "out"), a_model(t / "base"), [str(t / "out/r.csv")]),
    "data that is a link in it": lambda t: (
        a_run(t / "out"),
        a_model(t / "base"),
        [str(linked(t / "out/r.csv", t / "r.csv"))],
    ),
}


@pytest.mark.parametrize("case", LOST)
def test_a_folder_with_what_a_run_reads_is_not_renamed(tmp_path, case):
    out, base, files = LOST[case](tmp_path)
    with pytest.raises(UserError, match=r"lies in --out .* name another --out") as e:
        check_out(out, False, "m", base, files)
    assert "\n" not in str(e.value)
    # A resume renames nothing.
    check_out(out, True, "m", base, files)


def weights_linked(t, name):
    """A base whose weights are a link to a file of the run in out."""
    base = a_model(t / "base")
    (base / "model.safetensors").unlink()
    (base / "model.safetensors").symlink_to(t / "out" / name)
    (t / "out/best").mkdir(parents=True, exist_ok=True)
    (t / "out" / name).write_text("")
    return base


OVERWRITTEN = {
    "the base is --out": lambda t: (t / "out", a_model(t / "out"), []),
    "the base is best/": lambda t: (t / "out", a_model(t / "out/best"), []),
    "through a link": lambda t: (linked(t / "link", a_model(t / "out")), t / "out", []),
    "its weights are out's": lambda t: (t / "out", weights_linked(t, "model.safetensors"), []),
    "they are best's": lambda t: (t / "out", weights_linked(t, "best/model.safetensors"), []),
    "data": lambda t: (t / "out", a_model(t / "base"), [str(t / "out/metrics.jsonl")]),
}


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("case", OVERWRITTEN)
def test_a_run_does_not_write_over_what_it_reads(tmp_path, case, resume):
    out, base, files = OVERWRITTEN[case](tmp_path)
    with pytest.raises(UserError, match=r"is where --out .* is written: name another --out"):
        check_out(out, resume, "m", base, files)


FINE = {
    "--out in the base": lambda t: (t / "base/out", a_model(t / "base"), []),
    "a run in the base": lambda t: (a_run(a_model(t / "base") / "out"), t / "base", []),
    "--out around the base": lambda t: (t, a_model(t / "runs/base"), []),
    "data in a folder without a run": lambda t: (t, a_model(t / "base"), [str(t / "r.csv")]),
    "a name that begins alike": lambda t: (a_run(t / "out"), a_model(t / "out.base"), []),
    "a link to the run in the base": lambda t: (
        a_run(t / "out"),
        linked(a_model(t / "base") / "last", t / "out").parent,
        [],
    ),
}


@pytest.mark.parametrize("case", FINE)
def test_what_loses_nothing_is_allowed(tmp_path, case):
    out, base, files = FINE[case](tmp_path)
    check_out(out, False, "m", base, files)


def test_the_best_of_a_run_is_no_folder_for_another(tmp_path):
    a_run(tmp_path / "out")
    with pytest.raises(UserError, match=r"--out .*best is a part of the run in .*out: name"):
        check_out(tmp_path / "out/best", False, "m", a_model(tmp_path / "base"), [])


def test_a_current_folder_inside_the_run_is_not_renamed(tmp_path, monkeypatch):
    a_run(tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out/best")
    with pytest.raises(UserError, match="the current folder lies in --out"):
        check_out("..", False, "m", a_model(tmp_path / "base"), [])
    with pytest.raises(UserError, match="is or has the current folder"):
        Run("..", resume=False)
    assert names(tmp_path) == ["base", "out"]


def test_a_folder_that_cannot_be_renamed_is_a_sentence(tmp_path, monkeypatch):
    """A volume that is mounted at --out, as containers have it."""
    a_run(tmp_path / "out")

    def busy(*args):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(UserError, match=r"cannot be renamed \(Device or resource busy\): name"):
        Run(tmp_path / "out", resume=False)


def test_a_file_system_without_locks_is_named_and_used(tmp_path, monkeypatch, capsys):
    def no_locks(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(disk.fcntl, "flock", no_locks)
    Run(tmp_path / "out", resume=False)
    assert "cannot be locked here" in capsys.readouterr().err


def test_an_owner_removes_what_a_killed_run_left_half_written(tmp_path):
    a_run(tmp_path / "out")
    for name in (".state.safetensors.0123abcd.part", "best/.model.safetensors.89abcdef.part"):
        (tmp_path / "out" / name).write_text("half")
    Run(tmp_path / "out", resume=True)
    assert not list((tmp_path / "out").rglob("*.part"))


BESIDE = ["config.json", "tokenizer.json", "chat_template.jinja"]


def test_what_stands_beside_the_weights_is_kept_at_the_beginning(tmp_path):
    base = a_model(tmp_path / "base")
    run = Run(tmp_path / "out", resume=False)
    run.keep(base, BESIDE)
    shutil.rmtree(base)
    assert names(run.folder) == [".lock", "config.json", "tokenizer.json"]
    assert (run.folder / "config.json").read_text() == "config.json"


@pytest.mark.parametrize("stale", ["chat_template.jinja", "model.safetensors.index.json"])
def test_files_of_another_model_are_not_mixed_with_a_runs(tmp_path, stale):
    base = a_model(tmp_path / "base")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / stale).write_text("of another model")
    run = Run(tmp_path / "out", resume=False)
    with pytest.raises(UserError, match=f"{stale} belongs to another model than .*base: name"):
        run.keep(base, BESIDE)


# ---- a resume compares what is there, not where it lies -------------------------------------------------------------


def test_a_state_of_another_run_is_refused(saved, tmp_path):
    """Two runs of equal flags: the state of one was copied into the folder of the other."""
    run, _ = saved
    other = Run(tmp_path / "other", resume=False)
    _, optimizer, params = toy()
    other.save_state(optimizer, params, {"step": 3})
    shutil.copy(other.folder / STATE, run.folder / STATE)
    with pytest.raises(UserError, match=r"state\.safetensors and run\.json .* two different runs"):
        run.load_state(optimizer, params, run.id)
    # A run.json of an earlier version has no id to compare.
    assert run.load_state(optimizer, params) == {"step": 3}


def test_run_json_and_the_state_hold_the_same_id_and_versions(saved):
    run, _ = saved
    run.write_about({"titles": ["Bread"]})
    about = run.read_json("run.json")
    with safe_open(run.folder / STATE, "pt") as f:
        metadata = f.metadata()
    assert json.loads(metadata["run"]) == about["id"] == run.id
    assert json.loads(metadata["versions"]) == about["versions"]
    assert about["versions"]["torch"] == torch.__version__
    assert about["versions"]["program"] == disk.program()


@pytest.mark.parametrize(
    "change, says",
    [
        ({}, ""),
        ({"torch": "1.2.3"}, f"torch was 1.2.3, is {torch.__version__}: losses"),
        ({"program": "0123456789ab"}, "this program was 0123456789ab, is "),
        (None, "torch was an earlier version"),
    ],
)
def test_a_resume_under_other_versions_says_which(saved, capsys, change, says):
    run, _ = saved

    def other_versions(tensors, metadata):
        if change is None:
            del metadata["versions"]
        else:
            metadata["versions"] = json.dumps(json.loads(metadata["versions"]) | change)

    rewrite(run.folder / STATE, other_versions)
    _, optimizer, params = toy()
    capsys.readouterr()
    run.load_state(optimizer, params)
    said = capsys.readouterr().err
    assert says in said and len(said.splitlines()) == (change != {})


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["param.0.weight", "optim.1.exp_avg"])
def test_a_state_that_holds_no_number_is_refused_by_the_tensors_name(saved, name, number):
    run, _ = saved
    rewrite(run.folder / STATE, lambda tensors, _: tensors[name].view(-1)[0].fill_(number))
    _, optimizer, params = toy()
    with pytest.raises(UserError, match=rf"state\.safetensors: {name} holds nan or inf"):
        run.load_state(optimizer, params)


SAME = {
    "base_fingerprint": "a",
    "base_tensors": "t",
    "data_fingerprint": "b",
    "dtype": "torch.float32",
    "arithmetic": "torch.float32",
}


def resumed(run, about=SAME, **facts):
    """go_on of a run that saved these facts, with `about` in its run.json."""
    _, optimizer, params = toy()
    run.save_state(optimizer, params, {"step": 2, "total": 9, "val_before": 3.5, **facts})
    disk.write_json(run.folder / "run.json", about)
    return run.go_on(SAME, optimizer, params, 9)


def test_a_run_json_that_lacks_a_fingerprint_is_resumed_and_named(tmp_path, capsys):
    run = Run(tmp_path / "out", resume=False)
    about = {key: value for key, value in SAME.items() if key != "arithmetic"}
    assert resumed(run, about).step == 2
    assert "does not say which dtype of the arithmetic" in capsys.readouterr().err
    with pytest.raises(UserError, match="the base model is not the one"):
        resumed(run, {**about, "base_fingerprint": "c"})


def test_a_state_with_facts_of_another_version_is_refused(tmp_path):
    run = Run(tmp_path / "out", resume=False)
    with pytest.raises(UserError, match=r"state\.safetensors was saved by another version"):
        resumed(run, mood="good")
    with pytest.raises(UserError, match=r"state\.safetensors was saved by another version"):
        resumed(run, step="2")


METRICS = {
    "whole": ([(0, 3.5), (1, None), (2, None)], False),
    "a step is missing": ([(0, 3.5), (2, None)], True),
    "of another run": ([(0, 3.25), (1, None), (2, None)], True),
    "of a longer run": ([(0, 3.5), (1, None), (2, None), (3, None)], False),
    "none": ([], True),
}


@pytest.mark.parametrize("case", METRICS)
def test_metrics_of_another_run_are_named(tmp_path, capsys, case):
    lines, is_told = METRICS[case]
    run = Run(tmp_path / "out", resume=False)
    for step, val_loss in lines:
        run.log({"step": step, "val_loss": val_loss})
    assert resumed(run).step == 2
    assert ("metrics.jsonl has not the steps 0 to 2" in capsys.readouterr().err) == is_told


def test_metrics_hold_null_for_what_is_no_number(tmp_path):
    run = Run(tmp_path / "out", resume=False)
    (run.folder / "metrics.jsonl").write_text('{"step": 0, "val_loss": NaN}\n[1]\n"x"\n')
    run.log({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    wanted = [{"step": 0, "val_loss": None}, {"step": 1, "loss": None, "grad_norm": None}]
    assert run.history() == wanted
    run.forget_after(1)
    assert "NaN" not in (run.folder / "metrics.jsonl").read_text() and run.history() == wanted


def test_facts_that_are_no_numbers_are_null_in_the_state(tmp_path):
    run = Run(tmp_path / "out", resume=False)
    _, optimizer, params = toy()
    run.save_state(optimizer, params, {"step": 1, "val": float("nan")})
    assert "NaN" not in (run.folder / "state.json").read_text()
    assert run.load_state(optimizer, params) == {"step": 1, "val": None}


@pytest.mark.parametrize("first", [float("nan"), float("inf")])
def test_a_first_loss_that_is_no_number_does_not_keep_the_others_out(first):
    facts = Facts()
    assert not facts.judge(first) and facts.best_val is None
    assert facts.judge(2.0) and facts.best_val == 2.0


def test_bad_steps_are_counted_and_only_a_step_that_is_taken_ends_a_row():
    facts = Facts()
    said = []
    for is_bad, is_taken in [(1, 0), (1, 0), (0, 0), (1, 0), (0, 1), (1, 0)]:
        facts.count(is_bad, is_taken)
        said.append((facts.bad_steps, facts.bad_in_a_row))
    assert said == [(1, 1), (2, 2), (2, 2), (3, 3), (3, 0), (4, 1)]


def test_a_state_of_a_version_without_bad_steps_is_resumed(tmp_path):
    """resumed() writes facts of three names only."""
    facts = resumed(Run(tmp_path / "out", resume=False))
    assert (facts.step, facts.bad_steps, facts.bad_in_a_row) == (2, 0, 0)


# ---- when to save ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "every, wanted",
    [("50", (50, None)), (50, (50, None)), ("10m", (None, 600)), ("0.5m", (None, 30))],
)
def test_how_often_a_run_saves(every, wanted):
    assert how_often(every) == wanted


@pytest.mark.parametrize(
    "every", ["", "0", "-5", "0m", "0.0m", "10h", "m", "ten", "1e3", "nanm", "5.5", "10 m", None]
)
def test_what_is_neither_steps_nor_minutes_is_refused(every):
    with pytest.raises(UserError, match="--save_every .*: give steps or minutes, for example 50"):
        how_often(every)


def test_time_to_save(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    run, (_, optimizer, params) = Run(tmp_path / "out", resume=False), toy()
    assert [step for step in range(1, 13) if run.is_time_to_save("5", step)] == [5, 10]
    now[0] += 599
    assert not run.is_time_to_save("10m", 5)
    now[0] += 1
    assert run.is_time_to_save("10m", 5) and not run.is_time_to_save("11m", 5)
    run.save_state(optimizer, params, {"step": 5})
    assert not run.is_time_to_save("10m", 6)
    now[0] += 600
    assert run.is_time_to_save("10m", 7)


# ---- the flags of a resume ------------------------------------------------------------------------------------------


def started(folder, config, given=None, defaults=None):
    info = {"config": config, "rules": {"min_words": 5}, "format": 2}
    (folder / "run.json").write_text(json.dumps(info))
    defaults = {"max_steps": None, "epochs": None, "lr": 1e-3, "min_words": 3} | (defaults or {})
    given = {"max_steps": None, "epochs": None} | (given or {})
    return started_with(str(folder), given, defaults)


def test_a_flag_that_the_version_of_the_run_did_not_have_is_as_by_default(tmp_path):
    flags = started(tmp_path, {"lr": 0.5, "max_steps": 60, "epochs": 1}, defaults={"new": 7})
    assert (flags["new"], flags["lr"], flags["min_words"], flags["resume"]) == (7, 0.5, 5, True)
    refuse_other_flags(flags, {"new": 7, "lr": 0.5})
    with pytest.raises(UserError, match="--new was 7, is 8"):
        refuse_other_flags(flags, {"new": 8, "lr": 0.5})


def test_a_flag_that_this_version_does_not_have_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="with other flags: galore_rank"):
        started(tmp_path, {"lr": 0.5, "galore_rank": 128})


@pytest.mark.parametrize("content", ["[]", "null", '{"config": 1, "rules": {}}', "{", '"x"'])
def test_a_run_json_of_another_kind_is_no_run(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match="holds no run to go on from"):
        started_with(str(tmp_path), {"epochs": None}, {})


@pytest.mark.parametrize(
    "had, given, wanted",
    [
        ({"max_steps": 60, "epochs": 1}, {}, (60, 1)),
        ({"max_steps": 60, "epochs": 1}, {"epochs": 5}, None),
        ({"max_steps": 0, "epochs": 2}, {"epochs": 5}, None),
        ({"max_steps": None, "epochs": 2}, {}, (None, 2)),
    ],
)
def test_epochs_of_a_resume_take_the_place_of_the_steps_before(tmp_path, had, given, wanted):
    flags = started(tmp_path, had, given)
    if wanted is None:
        assert flags["max_steps"] is None
    else:
        assert (flags["max_steps"], flags["epochs"]) == wanted


# ---- signals of a terminal ------------------------------------------------------------------------------------------


def test_a_terminal_that_is_closed_stops_a_run_as_any_signal_does():
    with Stop(None) as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.signal == signal.SIGHUP and stop.exit_code == 129


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_was_ignored_stays_ignored(number):
    """nohup ignores SIGHUP; a shell ignores SIGINT for a program that it starts with &."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with Stop(None) as stop:
            signal.raise_signal(number)
            assert stop.signal is None
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)
