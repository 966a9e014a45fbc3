"""A training process is killed at random moments and resumed: it ends bit for bit as an uninterrupted one.

benchmarks/kill_and_resume.py does it, on real processes: this file says what must come out."""

from cli import UserError

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, program, write_jsonl
from safetensors.torch import save_file

from benchmarks import kill_and_resume

KILLER = "benchmarks/kill_and_resume.py"
# Dropout and 8-bit states: what a resume can lose without an error.
FLAGS = ["--device", "cpu", "--dtype", "fp32", "--lora_dropout", 0.1, "--optim", "adamw8bit"]


def killed(model, recipes, folder, *how, flags=()):
    """The JSON line of the driver."""
    paths = ["--model", model, "--data", recipes, "--folder", folder]
    done = program(KILLER, *how, *paths, "--", *FLAGS, *flags, timeout=1800)
    return json.loads(done.stdout)


def check(out, kills, folder):
    """What must be so however often the process was killed. A state that cannot be read ends the driver."""
    assert out["kills"] == kills and out["equal"] and out["steps"] and out["difference"] == 0
    # Not all runs are the same by themselves: an adapter of another seed would differ.
    assert (folder / "cut/adapter_model.safetensors").stat().st_size > 10_000
    states = [at["state"] for at in out["found"] if at["state"] is not None]
    assert states == sorted(states) and len(set(states)) > 2, "the resumes brought it no further"


def test_five_kills_change_no_bit(tiny_model, tiny_recipes, tmp_path):
    """Five SIGKILLs, then a SIGTERM, a Ctrl-C, and two Ctrl-C of which the second falls into a save."""
    out = killed(tiny_model, tiny_recipes, tmp_path, "--kills", 5, "--signals")
    check(out, 5, tmp_path)
    assert out["in_a_save"] >= 1
    term, interrupt, twice = out["found"][5:]
    assert (term["code"], interrupt["code"], twice["code"]) == (143, 130, 130)
    for at in (term, interrupt):
        assert at["state"] == at["step"], "the step in hand was not saved"
    for at in (term, interrupt, twice):
        said = f"has the state after step {at['state']}. Go on with: python train.py --resume --out"
        assert said in at["said"]
    assert "at once" in twice["said"] and twice["state"] < twice["step"]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--batching", "packed", "--batch_tokens", 700]], ids=str)
def test_thirty_kills_change_no_bit(tiny_model, tiny_recipes, tmp_path, flags):
    flags = ["--max_steps", 120, *flags]
    out = killed(tiny_model, tiny_recipes, tmp_path, "--kills", 30, "--signals", flags=flags)
    check(out, 30, tmp_path)
    assert out["in_a_save"] >= 8


def made_run(folder, value, loss):
    """What the driver compares: two adapters and the metrics."""
    for name in ("adapter_model.safetensors", "best/adapter_model.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file({"a": torch.tensor([1.0, value])}, folder / name)
    write_jsonl(folder / "metrics.jsonl", [{"step": 1, "loss": loss, "tokens_per_s": value}])
    return folder


def test_the_driver_notices_a_run_that_is_another(tmp_path):
    """Without this the tests above could not fail."""
    one = made_run(tmp_path / "one", 2.0, 3.5)
    same = made_run(tmp_path / "same", 2.0, 3.5)
    other = made_run(tmp_path / "other", 2.25, 3.5)
    later = made_run(tmp_path / "later", 2.0, 3.25)
    assert kill_and_resume.are_equal(one, same) and kill_and_resume.difference(one, same) == 0
    assert not kill_and_resume.are_equal(one, other)
    assert kill_and_resume.difference(one, other) == 0.25
    assert not kill_and_resume.are_equal(one, later)


def test_the_driver_ends_where_a_state_cannot_be_read(tmp_path):
    assert kill_and_resume.step_of_state(tmp_path) is None
    (tmp_path / "state.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="cannot be read"):
        kill_and_resume.step_of_state(tmp_path)


# --- a second signal ---

# The main thread is in a call of C that takes minutes, as it may be in a wait for the card: no handler of Python runs.
STUCK = """import hashlib
from files.run import Run, Stop
run = Run({out!r}, resume=False)
run.saved_at = {saved!r}
with Stop(run):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 10**9)
"""


@pytest.mark.parametrize(
    "second, code, saved, says",
    [
        (signal.SIGINT, 130, 7, "has the state after step 7. Go on with: python train.py --resume"),
        (signal.SIGTERM, 143, None, "holds no state to go on from yet"),
    ],
)
def test_a_second_signal_stops_at_once(tmp_path, second, code, saved, says):
    source = STUCK.format(out=str(tmp_path / "my out"), saved=saved)
    process = subprocess.Popen(
        [sys.executable, "-c", source],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        # A terminal that is closed sends two of these: the second is none.
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
        process.send_signal(second)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == code
    assert "stopped      at once:" in said and says in said
    if saved:
        assert f"--out '{tmp_path}/my out'" in said
