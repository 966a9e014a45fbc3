"""Kill a training process again and again, resume it each time, and compare what it makes with an uninterrupted run.

    python benchmarks/kill_and_resume.py --kills 5 --signals
    python benchmarks/kill_and_resume.py --kills 5 --shape 1b -- --quant nf4 --fp8 --cuda_graph --batching packed
    python benchmarks/kill_and_resume.py --kills 30 --model folder --data recipes.jsonl -- --lora_dropout 0.1

What follows the -- are flags of train.py. A kill is a SIGKILL, which no program can handle. The kills fall by turns at
a random moment of training, into a save (as soon as a half-written file is seen) and into an evaluation. --signals adds
a SIGTERM, a Ctrl-C, and two Ctrl-C of which the second falls into the save that the first one asks for.

Each run is a process of its own that is forked from this one, because importing torch takes longer than a small run. In
that process train.py's main is called as `python train.py` calls it. Its evaluation is wrapped, to tell when it begins,
and no recipe is written, because that takes longer than all else. stdout has one JSON line. Exit code 1: a state was
not readable, a step is missing, or an exit code is wrong.

`equal` says whether adapter, best adapter and metrics are those of the uninterrupted run, bit for bit. Where they are
not, as on a card whose kernels add in any order, a second uninterrupted run says how much two of them differ.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import cli
from cli import UserError, say

import importlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from dataclasses import dataclass

USUAL = {
    "--max_steps": 40,
    "--eval_every": 4,
    "--save_every": 3,
    "--val_recipes": 8,
    "--batch_size": 4,
    "--warmup_steps": 2,
}
# What of a line of metrics.jsonl must be the same.
ESSENCE = ["step", "loss", "lr", "grad_norm", "target_tokens", "val_loss", "bad_rows"]
ADAPTERS = ("adapter_model.safetensors", "best/adapter_model.safetensors")


@dataclass
class Config:
    # fmt: off
    kills: int = 5                     # how many times the process is killed
    signals: bool = False              # also send a SIGTERM, a Ctrl-C, and two Ctrl-C
    seed: int = 1                      # random seed: of the moments
    model: str = ""                    # base model: folder; none: random weights of --shape
    data: str = ""                     # recipe file; none: made-up recipes
    shape: str = "tiny"                # size of the random model: tiny, 1b or 8b
    folder: str = ""                   # folder of the two runs, which stay there; none: a temporary one
    limit: int = 240                   # seconds that one process may take
    # fmt: on


def arguments(argv):
    """-> (Config, flags of train.py)"""
    import bench

    flags = []
    if "--" in argv:
        at = argv.index("--")
        flags = argv[at + 1 :]
        argv = argv[:at]
    (cfg,) = cli.parse(__doc__, Config, argv=argv)
    cli.bound(cfg, kills=0, limit=1)
    if cfg.shape not in bench.SHAPES:
        raise UserError(f"--shape {cfg.shape} is none of {', '.join(bench.SHAPES)}.")
    return cfg, flags


# --- processes ---


def forked(function, log):
    """Call the function in a process of its own, whose output goes into the file `log`. -> its number"""
    number = os.fork()
    if number:
        return number
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        function()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def exit_code(number, limit):
    """Wait for a process. -> its exit code, negative for a signal; it is killed after `limit` seconds"""
    until = time.monotonic() + limit
    while time.monotonic() < until:
        ended, status = os.waitpid(number, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(number, signal.SIGKILL)
    os.waitpid(number, 0)
    raise SystemExit(f"a process took more than {limit} s")


def make_base(cfg, root):
    """Random weights and made-up recipes. -> (model, data)"""
    import bench

    log = root / "made.log"
    if not cfg.model:
        code = exit_code(
            forked(lambda: bench.make_model(root / "model", cfg.shape), log), cfg.limit
        )
        if code:
            raise SystemExit(log.read_text(encoding="utf-8"))
    recipes = root / "recipes.jsonl"
    if not cfg.data:
        vocab = bench.SHAPES[cfg.shape].vocab
        bench.make_recipes(recipes, [40 + 7 * n % 160 for n in range(100)], vocab)
    return cfg.model or root / "model", cfg.data or recipes


class Training:
    """One folder of a run, and the process that trains in it."""

    def __init__(self, out, flags, limit):
        self.out = out
        self.log = out.with_name(out.name + ".log")
        # A file that is there while the process evaluates.
        self.evaluating = out.with_name(out.name + ".evaluating")
        self.flags = flags
        self.limit = limit
        self.number = None
        self.before = None

    def start(self):
        """Start, or go on where there is a state."""
        self.evaluating.unlink(missing_ok=True)
        self.before = self.stamp()
        how = ["--out", str(self.out)]
        if (self.out / "state.safetensors").exists():
            how.append("--resume")
        else:
            how += self.flags
        self.number = forked(lambda: self.train(how), self.log)

    def train(self, how):
        """What the process does."""
        import job
        import quality
        import train

        measure = quality.held_out_loss

        def announced(*args):
            self.evaluating.touch()
            loss = measure(*args)
            self.evaluating.unlink()
            return loss

        quality.held_out_loss = announced
        job.write_recipe = lambda job: None
        sys.argv = ["train.py", *how]
        cli.run(train.main, outlives_terminal=True)

    def stamp(self):
        """What tells this metrics.jsonl from the next one: each process begins a new file."""
        try:
            stat = os.stat(self.out / "metrics.jsonl")
        except FileNotFoundError:
            return None
        return stat.st_ino, stat.st_ctime_ns

    def wait_for_step(self, step):
        """Wait until the process that was started has made this step. -> seconds that a step took"""
        self.wait_until(lambda: self.stamp() not in (None, self.before))
        began = time.monotonic()
        first = last_step(self.out)
        self.wait_until(lambda: last_step(self.out) >= max(step, first + 1))
        steps = last_step(self.out) - first
        return (time.monotonic() - began) / steps

    def wait_until(self, is_so, pause=0.001):
        until = time.monotonic() + self.limit
        while not is_so():
            ended, _ = os.waitpid(self.number, os.WNOHANG)
            if ended or time.monotonic() > until:
                raise SystemExit(f"the process ended or hung:\n{self.said()[-3000:]}")
            time.sleep(pause)

    def wait_for_a_save(self):
        """Wait until a half-written file is there. Look without a pause, because it is there for milliseconds."""
        self.wait_until(lambda: parts(self.out), pause=0)

    def end(self, number):
        """Send a signal. -> the exit code"""
        os.kill(self.number, number)
        return exit_code(self.number, self.limit)

    def said(self):
        return self.log.read_text(encoding="utf-8", errors="replace")


def parts(out):
    """The half-written files of a run."""
    names = os.listdir(out)
    if "best" in names:
        names += os.listdir(out / "best")
    return [name for name in names if name.endswith(".part")]


def lines_of(out):
    """The whole lines of metrics.jsonl."""
    try:
        text = (out / "metrics.jsonl").read_bytes()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.split(b"\n")[:-1]]


def last_step(out):
    lines = lines_of(out)
    return lines[-1]["step"] if lines else -1


# --- the moments ---


def kill(training, kind, step, rng):
    """Kill the process at a moment of this kind, after this step. -> what was found then"""
    training.start()
    seconds = training.wait_for_step(step)
    if kind == "training":
        time.sleep(rng.uniform(0, seconds))
    elif kind == "save":
        training.wait_for_a_save()
        time.sleep(rng.choice([0, 0, rng.uniform(0, 0.002)]))
    else:
        training.wait_until(training.evaluating.exists)
        time.sleep(rng.uniform(0, seconds))
    code = training.end(signal.SIGKILL)
    found = {"kind": kind, "step": last_step(training.out), "code": code}
    return found | {"parts": len(parts(training.out)), "state": step_of_state(training.out)}


def ask(training, kind, step):
    """Send a signal that train.py handles. -> its exit code and last line"""
    training.start()
    training.wait_for_step(step)
    if kind == "twice":
        os.kill(training.number, signal.SIGINT)
        training.wait_for_a_save()
        code = training.end(signal.SIGINT)
    else:
        code = training.end(signal.Signals[kind])
    found = {"kind": kind, "step": last_step(training.out), "code": code}
    state = step_of_state(training.out)
    return found | {"state": state, "said": training.said().splitlines()[-1]}


def step_of_state(out):
    """The step of the state, which is read as a resume reads it; None where there is none yet."""
    from files import state

    path = out / state.STATE
    if not path.exists():
        return None
    _, about = state.read_state(path)
    return about["facts"]["step"]


def moments(cfg, steps, rng):
    """[(kind, step)] in the order of the steps."""
    kinds = [("training", "save", "evaluation")[i % 3] for i in range(cfg.kills)]
    rng.shuffle(kinds)
    if cfg.signals:
        kinds += ["SIGTERM", "SIGINT", "twice"]
    # Leave room at the end, so that each process is there long enough.
    room = max(1, steps - 8)
    at = [int((i + rng.random()) * room / max(1, len(kinds))) for i in range(len(kinds))]
    return list(zip(kinds, at, strict=True))


# --- what came out ---


def essence(out):
    return [[line.get(key) for key in ESSENCE] for line in lines_of(out)]


def difference(one, other):
    """The greatest difference of two runs' adapters."""
    from safetensors.torch import load_file

    greatest = 0.0
    for name in ADAPTERS:
        a, b = load_file(one / name), load_file(other / name)
        for key, tensor in a.items():
            greatest = max(greatest, (tensor - b[key]).abs().max().item())
    return greatest


def are_equal(one, other):
    same = [(one / name).read_bytes() == (other / name).read_bytes() for name in ADAPTERS]
    return all(same) and essence(one) == essence(other)


def uninterrupted(out, flags, limit):
    training = Training(out, flags, limit)
    training.start()
    if exit_code(training.number, limit):
        raise SystemExit(training.said()[-3000:])
    return out


def measure(cfg, flags, root):
    """Train once, then with all the kills. -> the content of the JSON line"""
    rng = random.Random(cfg.seed)
    model, data = make_base(cfg, root)
    usual = [str(word) for pair in USUAL.items() for word in pair]
    flags = ["--model", str(model), "--data", str(data), "--no-clean", *usual, *flags]
    began = time.monotonic()
    whole = uninterrupted(root / "whole", flags, cfg.limit)
    say("whole", f"{time.monotonic() - began:.1f} s")
    steps = last_step(whole)
    training = Training(root / "cut", flags, cfg.limit)
    found = []
    for kind, step in moments(cfg, steps, rng):
        if kind in ("training", "save", "evaluation"):
            found.append(kill(training, kind, step, rng))
        else:
            found.append(ask(training, kind, step))
        say("kill", json.dumps(found[-1]))
    training.start()
    if exit_code(training.number, cfg.limit):
        raise SystemExit(training.said()[-3000:])
    cut = training.out
    out = {
        "kills": sum(at["code"] == -signal.SIGKILL for at in found),
        "in_a_save": sum(at.get("parts", 0) > 0 for at in found),
        "equal": are_equal(whole, cut),
        "difference": difference(whole, cut),
        "difference_of_two_whole_runs": None,
        "steps": [line["step"] for line in lines_of(cut)] == list(range(steps + 1)),
        "found": found,
        "seconds": round(time.monotonic() - began, 1),
    }
    if not out["equal"]:
        other = uninterrupted(root / "again", flags, cfg.limit)
        out["difference_of_two_whole_runs"] = difference(whole, other)
    return out


def main():
    cfg, flags = arguments(sys.argv[1:])
    # Import these once, for all the processes. AdamW imports the second one, curve.png the third.
    for name in ("train", "torch._dynamo", "matplotlib.figure"):
        importlib.import_module(name)
    root = Path(cfg.folder or tempfile.mkdtemp()).absolute()
    root.mkdir(parents=True, exist_ok=True)
    out = measure(cfg, ["--cache", str(root / "cache"), *flags], root)
    print(json.dumps(out), flush=True)
    if not cfg.folder:
        shutil.rmtree(root)
    codes = {"SIGTERM": 143, "SIGINT": 130, "twice": 130}
    wrong = [at for at in out["found"] if at["code"] != codes.get(at["kind"], -signal.SIGKILL)]
    return 1 if wrong or not out["steps"] else 0


if __name__ == "__main__":
    cli.run(main)
