"""The folder of a run: one owner, whole files, a resume that changes no bit, signals that save before they stop.

    run = Run("out", resume=False)         # own the folder; rename a run that is already there to out.1
    run.write_json("run.json", {...})      # whole or not at all (files/disk.py)
    run.log({"step": 1, "loss": 2.3})      # add one line to metrics.jsonl; a step has one line
    run.save_state(optimizer, params, {"step": 30})
    facts = run.load_state(optimizer, params)
    with Stop() as stop: ... if stop.signal: save and leave

One file, state.safetensors, holds all that a resume needs, because one file appears in one rename:

    the trained tensors | the optimiser's states | the random generators | step, best loss … as JSON

So a killed run goes on from its last whole state. Weights of step 60 never meet optimiser states of step 30.
tests/test_run.py proves it: test_stopped_and_resumed_is_bit_for_bit_what_uninterrupted_is.
"""

from cli import UserError, say

import contextlib
import errno
import json
import math
import os
import platform
import secrets
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from files import disk

FORMAT = 2  # the version of run.json's layout
STATE = "state.safetensors"
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
    *("max_steps", "epochs", "patience", "eval_every", "save_every", "allow_bad"),
    *("tensorboard", "ckpt_blocks", "plan", "card", "fit", "allow"),
}

# What only the line of a training step can have in metrics.jsonl.
OF_A_STEP = ["loss", "lr", "grad_norm", "tokens_per_s", "padding"]

# The keys of run.json that a resume must find unchanged: {key: its name in an error}.
IDENTITY = {
    "base_fingerprint": "base model",
    "base_tensors": "base model (a tensor of its)",
    "data_fingerprint": "data",
    "data_tokens": "text of the data (or its tokenizer or chat template)",
    "dtype": "dtype of the weights",
    "arithmetic": "dtype of the arithmetic (--dtype)",
}


# What of run.json's versions a state holds too: {key: its name in a sentence}.
VERSIONS = {"torch": "torch", "program": "this program"}

# The errors of a lock on a file system that has none, such as Lustre without -o flock.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@dataclass
class Facts:
    """The numbers that a resume needs beside tensors. state.json shows them to people."""

    step: int = 0
    total: int = 0
    best_val: float | None = None
    best_step: int = 0
    val_before: float | None = None
    val: float | None = None
    without_progress: int = 0
    loss_scale: float = 1.0

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
        # Tells the files of this run from those of another one. A resume has the id in run.json.
        self.id = secrets.token_hex(8)
        # The open metrics.jsonl; None until something is logged.
        self.metrics = None
        self.saved_at = None  # the step of the last save
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
        about = {"format": FORMAT, **info, "id": self.id, "versions": versions()}
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
        self.saved_at = facts.step
        self.forget_after(facts.step)
        self.say_other_metrics(facts)
        note = ""
        if total != facts.total:
            note = f"; the schedule was for {facts.total} steps and is for {total} from here on"
        say("resume", f"after step {facts.step}{note}")
        if facts.step >= total:
            raise UserError(
                f"--resume: {self.folder} has already made its {total} steps; raise --max_steps or --epochs."
            )
        facts.total = total
        return facts

    # --- metrics.jsonl ---

    def log(self, line):
        """Append a line to metrics.jsonl."""
        if self.metrics is None:
            self.metrics = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")
        self.metrics.write(disk.json_line(line) + "\n")
        # Flush, so that a person who watches the file sees the step at once.
        self.metrics.flush()

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
        self.saved_at = facts.get("step")
        tensors = {f"param.{name}": p for name, p in params.items()}
        tensors |= optimizer_tensors(optimizer)
        tensors |= random_states()
        metadata = {
            "facts": disk.json_line(facts),
            "scalars": json.dumps(optimizer_scalars(optimizer)),
            "shapes": json.dumps(shapes_of(tensors)),
            "run": json.dumps(self.id),
            "versions": json.dumps(versions()),
        }
        disk.write_tensors(self.folder / STATE, tensors, metadata)
        # state.json is for people. A resume reads the copy inside STATE, because two files could differ after a kill.
        self.write_json("state.json", disk.finite(facts))

    def load_state(self, optimizer, params, run_id=None):
        """Fill parameters, optimiser and random generators from STATE. -> the facts

        run_id: of run.json; None if that is of a version that wrote none"""
        path = self.folder / STATE
        tensors, about = read_state(path)
        if run_id is not None and about["run"] not in (None, run_id):
            raise UserError(f"--resume: {path} and run.json beside it are of two different runs.")
        refuse_no_numbers(path, tensors)
        fill_params(path, params, tensors)
        saved = [key for key in tensors if key.startswith("optim.")]
        for key in saved:
            fill_optimizer(path, optimizer, key.removeprefix("optim."), tensors[key])
        for key, value in about["scalars"].items():
            fill_optimizer(path, optimizer, key, value)
        set_random_states(tensors)
        say_other_versions(about["versions"])
        return about["facts"]


# --- the content of STATE ---
#
# tensors     param.NAME, optim.NUMBER.KEY (of the optimiser's parameter NUMBER), random.cpu, random.cuda
# metadata    facts, scalars (NUMBER.KEY of the optimiser), shapes, run (the id in run.json) and versions, each as JSON


def trained_by(optimizer):
    """The optimiser's parameters. STATE numbers them in this order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def optimizer_tensors(optimizer):
    """{optim.NUMBER.KEY: tensor} of the optimiser's state."""
    tensors = {}
    for i, p in enumerate(trained_by(optimizer)):
        for key, value in optimizer.state[p].items():
            if not isinstance(value, torch.Tensor):
                continue
            # All parameters share one table of bitsandbytes. Copy it, because safetensors stores no tensor twice.
            if key.startswith("qmap"):
                value = value.clone()
            tensors[f"optim.{i}.{key}"] = value
    return tensors


def optimizer_scalars(optimizer):
    """{NUMBER.KEY: number} of the optimiser's state, because some optimisers count their steps in plain numbers."""
    scalars = {}
    for i, p in enumerate(trained_by(optimizer)):
        for key, value in optimizer.state[p].items():
            if not isinstance(value, torch.Tensor):
                scalars[f"{i}.{key}"] = value
    return scalars


def random_states():
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(tensors):
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])


def shapes_of(tensors):
    return {name: list(t.shape) for name, t in tensors.items()}


def read_state(path):
    """(tensors, {"facts", "scalars", "run", "versions"}) of a state file; UserError if the file is damaged."""
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata()
            tensors = {key: f.get_tensor(key) for key in f.offset_keys()}
        shapes = json.loads(metadata["shapes"])
        if shapes != shapes_of(tensors):
            raise ValueError("its tensors do not have the saved shapes")
        about = {
            "facts": disk.parse_json(metadata["facts"]),
            "scalars": json.loads(metadata["scalars"]),
            # Earlier versions of this program wrote neither of these two.
            "run": json.loads(metadata.get("run", "null")),
            "versions": json.loads(metadata.get("versions", "{}")),
        }
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as e:
        raise UserError(
            f"{path} cannot be read ({e}); start without --resume, which keeps the old run under another name."
        ) from None
    return tensors, about


def facts_of(path, values):
    """Facts of {name: value}; UserError for names that this version does not have."""
    try:
        return Facts(**values)
    except TypeError:
        raise UserError(
            f"{path} was saved by another version of this program: start without --resume."
        ) from None


def refuse_no_numbers(path, tensors):
    """Raise UserError for a state whose training had already failed: it would only go on to fail."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(
                f"{path}: {name} holds nan or inf: begin from what was saved before, in best/ say (--init_adapter)."
            )


def versions():
    """What a run was made with, {name: version}. That of this program is a hash of its code."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "program": disk.program(),
    }


def say_other_versions(saved):
    """A line where another torch or another version of this program saved the state. saved: its versions"""
    now = versions()
    changes = []
    for key, what in VERSIONS.items():
        before = saved.get(key, "an earlier version")
        if before != now[key]:
            changes.append(f"{what} was {before}, is {now[key]}")
    if changes:
        say("resume", f"{'; '.join(changes)}: losses may differ in their last digits")


def fill_params(path, params, tensors):
    for name, p in params.items():
        saved = tensors.get(f"param.{name}")
        if saved is None or saved.shape != p.shape:
            raise UserError(
                f"{path} does not fit this model: {name} is missing or has another shape."
            )
        with torch.no_grad():
            p.copy_(saved)


def fill_optimizer(path, optimizer, key, value):
    """Put one tensor or number back into the optimiser's state. key: NUMBER.KEY"""
    number, _, name = key.partition(".")
    trained = trained_by(optimizer)
    if int(number) >= len(trained):
        raise UserError(
            f"{path} was saved by another version of this program: start without --resume."
        )
    p = trained[int(number)]
    if isinstance(value, torch.Tensor):
        value = value.to(p.device)
    optimizer.state[p][name] = value


class Stop:
    """Within this block, Ctrl-C, SIGTERM and SIGHUP only set stop.signal: the loop finishes its step, saves and leaves.

    SIGHUP comes when the terminal is closed. A signal that was ignored before stays so: nohup ignores SIGHUP, and a
    shell SIGINT for what it starts with &. A second signal raises KeyboardInterrupt at once."""

    def __enter__(self):
        self.signal = None
        self.handlers_before = {}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                self.handlers_before[number] = signal.signal(number, self.heard)
        return self

    def heard(self, number, frame):
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        say("stop", "finishing this step and saving; a second signal stops at once")

    @property
    def exit_code(self):
        """What a shell reports for a program that a signal ended: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + self.signal

    def __exit__(self, *_):
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)
