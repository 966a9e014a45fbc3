"""files/board.py: metrics.jsonl as event files, read back with TensorBoard's own reader; a resume; a full disk."""

import errno
import json
import sys

import pytest
from conftest import train_here

from files import board

TAGS = {"loss", "lr", "grad_norm", "target_tokens", "tokens_per_s", "padding", "peak_mem_gb"}


def shown(folder):
    """{tag: {step: value}} as TensorBoard shows a folder; a step that is there twice fails."""
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    reader = event_accumulator.EventAccumulator(str(folder), {"scalars": 0})
    reader.Reload()
    curves = {}
    for tag in reader.Tags()["scalars"]:
        events = reader.Scalars(tag)
        curves[tag] = {event.step: event.value for event in events}
        assert len(curves[tag]) == len(events), f"{tag} has a step twice"
    return curves


def silent(*said):
    raise AssertionError(said)


def test_a_line_is_an_event(tmp_path):
    pytest.importorskip("tensorboard")
    events = board.Board(tmp_path, 0)
    events.add({"step": 0, "val_loss": 2.5, "peak_mem_gb": 1.0}, silent)
    events.add(
        {"step": 1, "loss": float("nan"), "grad_norm": None, "lr": 1e-3, "rows": [3]}, silent
    )
    # The file is whole after each line, because a killed run closes nothing.
    curves = shown(tmp_path / "tensorboard")
    assert curves["val_loss"] == {0: 2.5} and curves["lr"] == {1: pytest.approx(1e-3)}
    assert curves["loss"][1] != curves["loss"][1]
    assert set(curves) == {"val_loss", "peak_mem_gb", "loss", "lr"}


def test_what_a_killed_run_wrote_beyond_its_state_is_not_shown(tmp_path):
    pytest.importorskip("tensorboard")
    first = board.Board(tmp_path, 0)
    for step in range(6):
        first.add({"step": step, "loss": step}, silent)
    # The state is of step 3, so steps 4 and 5 are made again.
    again = board.Board(tmp_path, 4)
    again.add({"step": 4, "loss": 40}, silent)
    assert shown(tmp_path / "tensorboard")["loss"] == {0: 0, 1: 1, 2: 2, 3: 3, 4: 40}


def test_a_full_disk_ends_the_events_with_one_line(tmp_path):
    pytest.importorskip("tensorboard")
    events = board.Board(tmp_path, 0)
    events.add({"step": 0, "loss": 1.0}, silent)
    events.file.close()
    # Linux's device that is always full: each flush fails with ENOSPC.
    events.file = open("/dev/full", "wb")
    said = []
    for step in (1, 2):
        events.add({"step": step, "loss": 1.0}, lambda *line: said.append(line))
    assert len(said) == 1 and said[0][0] == "tensorboard"
    assert "No space left on device" in said[0][1] and "metrics.jsonl" in said[0][1]
    assert shown(tmp_path / "tensorboard")["loss"] == {0: 1.0}


def test_a_folder_that_cannot_be_made_ends_no_run(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file")
    said = []
    board.Board(tmp_path, 0).add({"step": 0, "loss": 1.0}, lambda *line: said.append(line))
    assert len(said) == 1 and "left out from here on" in said[0][1]


@pytest.fixture
def flags(tiny_model, tiny_recipes, tmp_path):
    return [
        *("--model", tiny_model, "--data", tiny_recipes, "--cache", tmp_path / "cache"),
        *("--val_recipes", 8, "--batch_size", 4, "--dtype", "fp32", "--device", "cpu"),
        *("--eval_every", 2, "--save_every", 3, "--out", tmp_path / "out"),
    ]


def test_tensorboard_shows_metrics_jsonl_and_a_resume_no_step_twice(
    flags, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("tensorboard")
    out = tmp_path / "out"
    code, _, err = train_here(monkeypatch, capsys, *flags, "--tensorboard", "--max_steps", 3)
    assert code == 0 and f"tensorboard  events go to {out / 'tensorboard'}\n" in err
    state = [(out / name).read_bytes() for name in ("state.safetensors", "metrics.jsonl")]
    code, *_ = train_here(monkeypatch, capsys, "--resume", "--out", out, "--max_steps", 5)
    assert code == 0
    # As if the second run had been killed before it saved: its steps 4 and 5 are made again.
    (out / "state.safetensors").write_bytes(state[0])
    (out / "metrics.jsonl").write_bytes(state[1])
    code, *_ = train_here(monkeypatch, capsys, "--resume", "--out", out, "--max_steps", 6)
    assert code == 0
    assert len(list((out / "tensorboard").iterdir())) == 3
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    curves = shown(out / "tensorboard")
    assert set(curves) == {*TAGS, "val_loss"}
    for tag, curve in curves.items():
        wanted = {line["step"]: line[tag] for line in lines if line.get(tag) is not None}
        if tag == "target_tokens":
            # Step 0 trained on nothing, and has no event of that.
            del wanted[0]
        assert curve == pytest.approx(wanted, rel=1e-6), tag


def test_a_disk_that_fills_up_ends_no_training(flags, tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    write = board.Board.write

    def full(self, **fields):
        if fields.get("step") == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, **fields)

    monkeypatch.setattr(board.Board, "write", full)
    code, _, err = train_here(monkeypatch, capsys, *flags, "--tensorboard", "--max_steps", 4)
    assert code == 0 and err.count("No space left on device") == 1
    assert set(shown(tmp_path / "out" / "tensorboard")["loss"]) == {1}


def test_without_the_package_a_sentence_before_anything_is_loaded(
    flags, tmp_path, monkeypatch, capsys
):
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    code, out, err = train_here(monkeypatch, capsys, *flags, "--tensorboard", "--max_steps", 3)
    assert code == 2 and not out
    assert err.startswith("error: --tensorboard needs the package tensorboard, which cannot be")
    assert "pip install tensorboard, or leave the flag out" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


def test_a_run_without_the_flag_does_without_the_package(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    code, *_ = train_here(monkeypatch, capsys, *flags, "--max_steps", 1)
    assert code == 0 and not (tmp_path / "out" / "tensorboard").exists()
