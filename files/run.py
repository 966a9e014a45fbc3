"""The folder of a run: one owner, whole files, a resume that changes no bit, signals that save before they stop.

    run = Run("out", resume=False)         # own the folder; rename a run that is already there to out.1
    run.write_json("run.json", {...})      # whole or not at all (files/disk.py)
    run.log({"step": 1, "loss": 2.3})      # add one line to metrics.jsonl; a step has one line
    run.save_state(optimizer, params, {"step": 30})
    facts = run.load_state(optimizer, params)
    with Stop(run) as stop: ... if stop.signal: save and leave

A killed run goes on from its last whole state, state.safetensors (files/state.py). tests/test_kill.py proves it on real
processes, which it also kills while they save.
"""

import cli
from cli import UserError, say

import contextlib
import errno
import math
import os
import re
import secrets
import shlex
import shutil
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from files import disk, state
from files.state import STATE

FORMAT = 2  # the version of run.json's layout
WEIGHTS = ("adapter_model.safetensors", "model.safetensors")
BEST_WEIGHTS = tuple(f"best/{name}" for name in WEIGHTS)

# A folder with none of these files holds no run.
MADE_HERE = (STATE,) + WEIGHTS + BEST_WEIGHTS

# The files that a run writes over, in its folder or in best/.
WRITTEN = {
    *(STATE, *WEIGHTS, "state.json", "adapter_config.json"),
    *("run.json", "metrics.jsonl", "summary.json", "curve.png"),
}
# The index of sharded weights. A run writes one file of weights, so an index in its folder is of another model.
INDEX = "model.safetensors.index.json"


# The flags that a resume may change. Any other flag would train another model. A model or data in another place is
# fine, because IDENTITY below compares their content.
FREE = {
    *("out", "resume", "device", "cache", "model", "data", "val_data", "init_adapter"),
    *("attn", "fused_loss", "compile", "cuda_graph", "grad_ckpt", "offload_ckpt", "offload_embed"),
    *("max_steps", "epochs", "patience", "eval_every", "save_every", "max_bad_steps", "allow_bad"),
    *("tensorboard", "ckpt_blocks", "plan", "card", "fit", "allow"),
}

# What only the line of a training step can have in metrics.jsonl.
OF_A_STEP = ["loss", "lr", "grad_norm", "tokens_per_s", "padding"]

# The keys of run.json that a resume must find unchanged: {key: its name in an error}.
IDENTITY = {
    "base_fingerprint": "base model",
    "base_tensors": "base model (a tensor of its)",
    "data_fingerprint": "data (or its tokenizer)",
    "data_tokens": "text of the data (or its tokenizer or chat template)",
    "dtype": "dtype of the weights",
    "arithmetic": "dtype of the arithmetic (--dtype)",
}


# The errors of a lock on a file system that has none, such as Lustre without -o flock.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@dataclass
class Facts:
    """The numbers that a resume needs beside tensors. state.json shows them to people.

    Each has a default, because a state of an earlier version may not have it."""

    step: int = 0
    total: int = 0
    best_val: float | None = None
    best_step: int = 0
    val_before: float | None = None
    val: float | None = None
    without_progress: int = 0
    loss_scale: float = 1.0
    bad_steps: int = 0  # steps that were left out, because their loss or gradient was not finite
    bad_in_a_row: int = 0

    def count(self, is_bad, is_taken):
        """Note a step. In fp16 a step may be neither bad nor taken: then the loss scale was too large."""
        if is_taken:
            self.bad_in_a_row = 0
        if is_bad:
            self.bad_steps += 1
            self.bad_in_a_row += 1

    def judge(self, val):
        """Note a held-out loss. -> whether it is the best so far"""
        self.val = val
        # A loss that is nan or infinite is never the best, not even the first: no later loss would be lower than nan.
        is_best = math.isfinite(val) and (self.best_val is None or val < self.best_val)
        if not is_best:
            self.without_progress += 1
            return False
        self.best_val = val
        self.best_step = self.step
        self.without_progress = 0
        return True


def started_with(out, given, defaults):
    """{flag: value} with which the run in the folder `out` was started, before this command line changes them.

    given, defaults {flag: value}: of this command line, and of this version for flags that the run did not have"""
    folder = Path(disk.user_path(out, "--out"))
    try:
        before = disk.parse_json((folder / "run.json").read_text(encoding="utf-8"))
        if before.get("format", 1) > FORMAT:
            raise UserError(f"--resume: {out} was made by a newer version of this program.")
        flags = {**before["config"], **before["rules"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"--resume: {out} holds no run to go on from.") from None
    unknown = sorted(flags.keys() - defaults.keys())
    if unknown:
        raise UserError(
            f"--resume: {out} was made by a version of this program with other flags: {', '.join(unknown)}."
        )
    flags = {**defaults, **flags, "resume": True, "out": out}
    # Who gives --epochs alone wants it to decide, so it takes away the --max_steps of before.
    if given["epochs"] is not None:
        flags["max_steps"] = None
    return flags


def refuse_other_flags(old, new):
    """Raise UserError if a flag changed that a resume may not change."""
    changed = [
        f"--{flag} was {old.get(flag)!r}, is {value!r}"
        for flag, value in new.items()
        if flag not in FREE and old.get(flag) != value
    ]
    if changed:
        raise UserError(f"--resume: these flags make it another run: {'; '.join(changed)}.")


def how_often(every):
    """(steps, seconds) between two saves, one of them None. every: of --save_every, "50" or "10m" (10 minutes)"""
    # Earlier versions wrote a number into run.json.
    text = str(every)
    if re.fullmatch(r"[0-9]+", text) and int(text) > 0:
        return int(text), None
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?m", text) and float(text[:-1]) > 0:
        return None, float(text[:-1]) * 60
    raise UserError(f"--save_every {text}: give steps or minutes, for example 50 or 10m.")


def read_run(folder):
    """The content of run.json, for programs that sample from a run. folder: a run's folder, or its best/."""
    folder = Path(folder)
    for path in (folder / "run.json", folder.parent / "run.json"):
        if path.exists():
            return read_run_json(path)
    raise UserError(
        f"{folder} holds no run: make one, `python train.py`, or name a --run or --model."
    )


def read_run_json(path):
    try:
        info = disk.parse_json(path.read_text(encoding="utf-8"))
        # Read what every program needs, so that a file of another kind fails here.
        info["config"]["model"]
        info["base_fingerprint"]
        info["titles"][0]
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise UserError(f"{path} cannot be read as a run's run.json ({e!r}).") from None
    return info


# --- --out ---


def holds_a_run(folder):
    return any((folder / name).exists() for name in MADE_HERE)


def check_out(out, resume, model, base, files):
    """Raise UserError if a run in --out would write over what it reads, or would rename it away with an older run.

    model: as --model says. base: the folder of the model. files: those of --data and --val_data. An adapter to begin
    with is read before anything is renamed, so it may lie in --out. Call this before all work: nothing is changed."""
    disk.refuse_no_utf8(Path(out).absolute(), "--out")
    folder = Path(out).resolve()
    if folder.name == "best" and (folder.parent / "run.json").exists():
        raise UserError(f"--out {out} is a part of the run in {folder.parent}: name another --out.")
    reads = files_of_a_model(model, base)
    for file in files:
        reads[f"the data file {file}"] = Path(file)
    for what, path in reads.items():
        if is_written(folder, path.resolve()):
            raise UserError(f"{what} is where --out {out} is written: name another --out.")
    if resume or not holds_a_run(folder):
        return
    needed = {**reads, "the current folder": Path.cwd(), "this program": disk.ROOT}
    for what, path in needed.items():
        if lies_in(path, out):
            raise UserError(
                f"{what} lies in --out {out}. That folder holds a run, which a new run would rename: "
                "name another --out."
            )


def is_written(folder, path):
    """Whether a run in `folder` writes this file, or its files into this folder."""
    places = (folder, folder / "best")
    if path.is_dir():
        return path in places
    return path.parent in places and path.name in WRITTEN


def lies_in(path, out):
    """Whether a path leads into or through the folder `out`, as it is written or with all links followed."""
    as_written = Path(os.path.abspath(path))
    if as_written.is_relative_to(os.path.abspath(out)):
        return True
    return path.resolve().is_relative_to(Path(out).resolve())


def files_of_a_model(name, folder):
    """{what to call it: path} of a model folder and its files, each of which may be a link to another place."""
    reads = {f"--model {name or folder}": folder}
    for file in folder.iterdir():
        if file.is_file():
            reads[f"{file} of --model"] = file
    return reads


class Run:
    def __init__(self, folder, resume):
        """Own the folder. Without `resume`, a run that is there is renamed to folder.1, .2, …, never deleted."""
        self.folder = Path(folder).resolve()
        self.out = str(folder)  # as the user wrote it
        # Tells the files of this run from those of another one. A resume has the id in run.json.
        self.id = secrets.token_hex(8)
        # The open metrics.jsonl; None until something is logged.
        self.metrics = None
        # Lines that metrics.jsonl did not take yet, because the disk was full.
        self.unlogged = b""
        self.saved_at = None  # the step of the last save
        self.saved_when = time.monotonic()
        # Hold the lock files, because a lock ends when its file is closed.
        self.locks = []
        if resume and not (self.folder / STATE).exists():
            raise UserError(f"--resume: {self.folder} holds no {STATE} to go on from.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"--out {folder} is a file, or lies in one; name a folder.") from None
        self.own()
        disk.remove_parts(self.folder)
        disk.remove_parts(self.folder / "best")
        if resume:
            return
        if holds_a_run(self.folder):
            self.rename_old_run(folder)
        # A run that stopped before its first save is not renamed, so its metrics may still be here.
        (self.folder / "metrics.jsonl").unlink(missing_ok=True)

    def own(self):
        try:
            self.locks.append(disk.lock(self.folder))
        except BlockingIOError:
            raise UserError(
                f"another process is training in {self.folder}; wait, or choose another --out."
            ) from None
        except OSError as e:
            if e.errno not in NO_LOCKS:
                raise
            say("note", f"{self.folder} cannot be locked here: start no second run in it")

    def rename_old_run(self, said):
        """Rename the old run to folder.1, or to the next free number. said: --out as the user wrote it"""
        if Path.cwd().is_relative_to(self.folder):
            raise UserError(
                f"--out {said} is or has the current folder and holds a run: name another --out."
            )
        n = 1
        while os.path.lexists(self.folder.with_name(f"{self.folder.name}.{n}")):
            n += 1
        old = self.folder.with_name(f"{self.folder.name}.{n}")
        # The old folder keeps its lock until this process ends; the new folder gets one of its own.
        try:
            self.folder.rename(old)
        except OSError as e:
            # A volume of a container is such a folder, or one in a folder that cannot be written.
            raise UserError(
                f"--out {said} holds a run and cannot be renamed ({e.strerror}): name another --out."
            ) from None
        say("run", f"{self.folder} already held a run: that run is {old} now")
        self.folder.mkdir()
        self.own()

    def keep(self, base, names):
        """Copy files of the base model into the folder of a run that trains all weights, before it trains.

        names: what a model folder has beside its weights. Each save takes these files from here. So what is saved is a
        whole model even if the base is gone by then. Raise UserError if the folder has such files of another model."""
        for name in (*names, INDEX):
            is_of_base = name != INDEX and (base / name).exists()
            if is_of_base:
                with disk.atomic(self.folder / name) as beside:
                    shutil.copyfile(base / name, beside)
            elif (self.folder / name).exists():
                raise UserError(
                    f"{self.folder / name} belongs to another model than {base}: name another --out."
                )

    def write_json(self, name, value):
        disk.write_json(self.folder / name, value)

    def read_json(self, name):
        path = self.folder / name
        try:
            return disk.parse_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise UserError(f"{path} cannot be read ({e}).") from None

    def write_about(self, info):
        """Write run.json, which says what this run is."""
        about = {"format": FORMAT, **info, "id": self.id, "versions": state.versions()}
        self.write_json("run.json", about)

    def go_on(self, info, optimizer, params, total):
        """Load the state in this folder for a run of `total` steps. -> Facts

        Raise UserError if the state is of another run, or if all steps are done."""
        before = self.read_json("run.json")
        for key, what in IDENTITY.items():
            if key not in before:
                say("resume", f"run.json does not say which {what} this run had: not compared")
            elif before[key] != info[key]:
                raise UserError(
                    f"--resume: the {what} is not the one that {self.folder} was trained with."
                )
        self.id = before.get("id", self.id)
        facts = facts_of(self.folder / STATE, self.load_state(optimizer, params, before.get("id")))
        if facts.step >= total:
            raise UserError(
                f"--resume: {self.folder} has already made its {total} steps; raise --max_steps or --epochs."
            )
        self.saved_at = facts.step
        self.forget_after(facts.step)
        self.say_other_metrics(facts)
        note = ""
        if total != facts.total:
            note = f"; the schedule was for {facts.total} steps and is for {total} from here on"
        say("resume", f"after step {facts.step}{note}")
        facts.total = total
        return facts

    # --- metrics.jsonl ---

    def log(self, line):
        """Append a line to metrics.jsonl, at once, so that a person who watches the file sees the step.

        Training needs no metrics, so a full disk ends no run here. The next call brings the line again."""
        is_first = not self.unlogged
        self.unlogged += disk.json_line(line).encode() + b"\n"
        try:
            if self.metrics is None:
                self.metrics = open(self.folder / "metrics.jsonl", "ab", buffering=0)
            disk.append(self.metrics, self.unlogged)
        except OSError as e:
            if e.errno not in cli.CANNOT_WRITE:
                raise
            if is_first:
                say("note", f"metrics.jsonl takes no line ({e.strerror}): its lines are kept")
            return
        self.unlogged = b""

    def log_start(self, val_loss, peak_mem_gb):
        """Append the line of step 0, an evaluation before training. What only a step has is None."""
        line = {"step": 0, "target_tokens": 0, "peak_mem_gb": peak_mem_gb, "val_loss": val_loss}
        self.log({**line, **dict.fromkeys(OF_A_STEP)})

    def history(self):
        """The lines of metrics.jsonl as dicts, without a last line that a kill cut off."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return []
        lines = []
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                line = disk.parse_json(text)
                if isinstance(line, dict) and isinstance(line.get("step"), int):
                    lines.append(line)
        return lines

    def forget_after(self, step):
        """Drop the metrics of later steps, because a resume makes those steps again."""
        kept = [line for line in self.history() if line["step"] <= step]
        if self.metrics is not None:
            # Close the old file, because the rename below puts another file in its place.
            self.metrics.close()
            self.metrics = None
        text = "".join(disk.json_line(line) + "\n" for line in kept)
        with disk.atomic(self.folder / "metrics.jsonl") as beside:
            beside.write_text(text, encoding="utf-8")

    def say_other_metrics(self, facts):
        """A line where metrics.jsonl has not the steps of this run. Training needs no metrics, so a resume goes on."""
        lines = self.history()
        steps = [line["step"] for line in lines]
        is_whole = steps == list(range(facts.step + 1))
        if is_whole and lines[0].get("val_loss") == facts.val_before:
            return
        say(
            "note",
            f"metrics.jsonl has not the steps 0 to {facts.step} of this run: nor will curve.png",
        )

    # --- resume ---

    def save_state(self, optimizer, params, facts):
        """Save all that a resume needs. params: {name: parameter}; facts: a dict of JSON values (step, best loss, …)"""
        state.save(self.folder / STATE, optimizer, params, facts, self.id)
        self.saved_at = facts.get("step")
        self.saved_when = time.monotonic()
        # state.json is for people. A resume reads the copy inside STATE, because two files could differ after a kill.
        self.write_json("state.json", disk.finite(facts))

    def is_time_to_save(self, every, step):
        """Whether to save after this step. every: of --save_every, steps or minutes"""
        steps, seconds = how_often(every)
        if steps is None:
            return time.monotonic() - self.saved_when >= seconds
        return step % steps == 0

    def refuse_to_save_no_numbers(self, optimizer, params, step):
        """Raise UserError for a state with nan or inf: the state that was saved before is better than this one."""
        name = state.first_with_no_number(state.tensors_of(optimizer, params))
        if name:
            raise UserError(
                f"{name} holds nan or inf after step {step}, so nothing was saved there: lower --lr, or use --dtype "
                "fp32, in a new run."
            )

    def kept(self):
        """What is there to go on from, in a sentence."""
        if self.saved_at is None:
            return f"{self.out} holds no state to go on from yet"
        go_on_with = f"python train.py --resume --out {shlex.quote(self.out)}"
        return f"{self.out} has the state after step {self.saved_at}. Go on with: {go_on_with}"

    @contextlib.contextmanager
    def telling_what_is_kept(self):
        """A `with` block. Where an error ends the block, a line says which state is there to go on from."""
        try:
            yield
        except BaseException:
            say("kept", self.kept())
            raise

    def load_state(self, optimizer, params, run_id=None):
        """Fill parameters, optimiser and random generators from STATE. -> the facts

        run_id: of run.json; None if that is of a version that wrote none"""
        return state.load(self.folder / STATE, optimizer, params, run_id)


def facts_of(path, values):
    """Facts of {name: value}; UserError for names that this version does not have."""
    try:
        facts = Facts(**values)
        # A state of an earlier version has no checksum, so look whether this is a step.
        range(facts.step)
        return facts
    except TypeError:
        raise UserError(
            f"{path} was saved by another version of this program: start without --resume."
        ) from None


# --- signals ---


class Stop:
    """Within this block, Ctrl-C, SIGTERM and SIGHUP only set stop.signal: the loop finishes its step, saves and leaves.

    SIGHUP comes when the terminal is closed. A signal that was ignored before stays so: nohup ignores SIGHUP, and a
    shell SIGINT for what it starts with &.

    A second Ctrl-C or SIGTERM ends the process at once, even where it waits for the card or the disk. A thread of its
    own waits for that signal, because Python runs a handler only when the main thread comes back from such a wait.
    Nothing is lost, because files are written beside their place (files/disk.py): the state of before stays whole. A
    second SIGHUP does not count, because a terminal that is closed sends two: the system's, and the shell's.
    Proof: tests/test_kill.py: test_a_second_signal_stops_at_once."""

    def __init__(self, run):
        self.run = run

    def __enter__(self):
        self.signal = None
        self.handlers_before = {}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                self.handlers_before[number] = signal.signal(number, self.heard)
        # The system writes the number of each signal into this pipe, whatever the main thread does.
        reader, self.pipe = os.pipe()
        os.set_blocking(self.pipe, False)
        self.pipe_before = signal.set_wakeup_fd(self.pipe)
        threading.Thread(target=self.wait_for_second, args=(reader,), daemon=True).start()
        return self

    def heard(self, number, frame):
        if self.signal is None:
            self.signal = number
            say("stop", "finishing this step and saving; a second Ctrl-C stops at once")

    def wait_for_second(self, reader):
        """What the thread does. The pipe ends when the block is left."""
        first = None
        while True:
            byte = os.read(reader, 1)
            if not byte:
                os.close(reader)
                return
            number = byte[0]
            if number not in self.handlers_before:
                continue
            if first is not None and number != signal.SIGHUP:
                say("stopped", f"at once: {self.run.kept()}")
                cli.leave(128 + number)
            first = number

    @property
    def exit_code(self):
        """What a shell reports for a program that a signal ended: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + self.signal

    def __exit__(self, *_):
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.pipe_before)
        os.close(self.pipe)
