"""A run's folder: one owner, atomic writes, exact resume, signals that save before they stop.

    run = Run("out", resume=False)         # locked; a run that stood there is now out.1
    run.write_json("run.json", {...})      # written beside its place, synced, renamed
    run.log({"step": 1, "loss": 2.3})      # one line of metrics.jsonl; a step stands there once
    run.save_state(optimizer, params, {"step": 30})
    state = run.load_state(optimizer, params)
    with Stop() as stop: ... if stop.signal: save and leave

What makes a resume exact: the trained tensors, the optimiser's, the random generators and the JSON beside them lie in
ONE file, which appears in one rename. A run killed between any two writes goes on from the last whole state.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import signal
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cli import UserError, say

try:
    import fcntl
except ImportError:  # Windows
    raise SystemExit(
        "error: this program needs Linux or macOS; on Windows run it under WSL."
    ) from None

STATE = "state.safetensors"
WEIGHTS = ("adapter_model.safetensors", "model.safetensors")
MADE_HERE = (
    STATE,
    *WEIGHTS,
    *(f"best/{name}" for name in WEIGHTS),
)  # a folder with none of these holds no run


@contextlib.contextmanager
def atomic(path):
    """Give a path beside `path` to write to; sync and rename it when the block ends well, else remove it."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        with open(beside, "rb") as f:
            os.fsync(f.fileno())  # the content is on the disk before the name points to it
        mode = os.umask(0)
        os.umask(mode)
        os.chmod(beside, 0o666 & ~mode)  # safetensors makes files that only their owner reads
        os.replace(beside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path, value):
    with atomic(path) as beside:
        beside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tensors(path, tensors, metadata=None):
    """{name: tensor} as safetensors, from any device. A full disk is an OSError like any other."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with atomic(path) as beside:
        try:
            save_file(tensors, beside, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as e:
            number = re.search(r"os error (\d+)", str(e))
            raise OSError(int(number[1]) if number else errno.EIO, str(e), str(path)) from None


def fingerprint(folder):
    """A model folder's identity in a fraction of a second: config.json, and of each shard its size and 64 kB at 65
    places, the first at its header, the last at its end. A fine-tune changes weights everywhere; a forger need not."""
    digest = hashlib.sha256((Path(folder) / "config.json").read_bytes())
    for shard in sorted(Path(folder).glob("*.safetensors")):
        if shard.name in (STATE, "adapter_model.safetensors"):
            continue
        with open(shard, "rb") as f:
            size = f.seek(0, os.SEEK_END)
            digest.update(str(size).encode())
            for i in range(65):
                f.seek(max(0, size - 65536) * i // 64)
                digest.update(f.read(65536))
    return digest.hexdigest()[:16]


def read_run(folder):
    """run.json of a run's folder, or of its best/'s run, for who samples from it."""
    try:
        path = next(p for p in (folder / "run.json", folder.parent / "run.json") if p.exists())
        info = json.loads(path.read_text(encoding="utf-8"))
        info["config"]["model"], info["base_fingerprint"], info["titles"][0]
        return info
    except StopIteration:
        raise UserError(
            f"{folder} holds no run: make one, `python train.py`, or name a --run or --model."
        ) from None
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise UserError(f"{path} cannot be read as a run's ({e!r}).") from None


class Run:
    def __init__(self, folder, resume):
        """Own the folder. A run that is there already is resumed, or renamed to folder.1, .2, …; none is lost."""
        self.folder = Path(folder).resolve()
        if resume and not (self.folder / STATE).exists():
            raise UserError(f"--resume: {self.folder} holds no {STATE} to go on from.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"--out {folder} is a file, or lies in one; name a folder.") from None
        self.lock = self.own()
        if (
            not resume
            and self.folder == Path.cwd()
            and any((self.folder / name).exists() for name in MADE_HERE)
        ):
            raise UserError(
                f"--out {folder} is the current folder and holds a run: name another --out."
            )
        if not resume and any((self.folder / name).exists() for name in MADE_HERE):
            n = 1
            while (old := self.folder.with_name(f"{self.folder.name}.{n}")).exists():
                n += 1
            self.folder.rename(old)  # the lock went with it, and stays held until this process ends
            say("run", f"{self.folder} held a run already: it is {old} now")
            self.folder.mkdir()
            self.old_lock, self.lock = self.lock, self.own()
        self.metrics = None
        if not resume:
            (self.folder / "metrics.jsonl").unlink(
                missing_ok=True
            )  # of a run that stopped before its first save

    def own(self):
        """flock is let go by the system when a process dies, however it dies: no stale lock to remove by hand."""
        lock = open(self.folder / ".lock", "w")  # noqa: SIM115 (held open as long as the run lives)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another process is training in {self.folder}; wait, or choose another --out."
            ) from None
        return lock

    def write_json(self, name, value):
        write_json(self.folder / name, value)

    def read_json(self, name):
        path = self.folder / name
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise UserError(f"{path} cannot be read ({e}).") from None

    # --- metrics.jsonl ---

    def log(self, line):
        if self.metrics is None:
            self.metrics = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self.metrics.write(json.dumps(line) + "\n")
        self.metrics.flush()  # whoever watches the file sees the step at once

    def history(self):
        """The lines of metrics.jsonl; a last line that a kill cut off is passed over."""
        path, lines = self.folder / "metrics.jsonl", []
        for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError):
                lines.append(json.loads(text))
        return lines

    def forget_after(self, step):
        """Drop the metrics of steps that will be made again."""
        lines = [line for line in self.history() if line["step"] <= step]
        self.metrics = (
            self.metrics and self.metrics.close()
        )  # it is open on the file that is replaced now
        with atomic(self.folder / "metrics.jsonl") as beside:
            beside.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    # --- resume ---

    def save_state(self, optimizer, params, facts):
        """params {name: parameter}, the optimiser, the random generators and facts (JSON: step, best loss, …)."""
        tensors = {f"param.{name}": p for name, p in params.items()}
        scalars = {}
        for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            for key, value in optimizer.state[p].items():
                if isinstance(
                    value, torch.Tensor
                ):  # bitsandbytes' tables are one tensor for all: not in safetensors
                    tensors[f"optim.{i}.{key}"] = value.clone() if key.startswith("qmap") else value
                else:
                    scalars[f"{i}.{key}"] = value
        tensors["random.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        shapes = {name: list(t.shape) for name, t in tensors.items()}
        write_tensors(
            self.folder / STATE,
            tensors,
            {
                k: json.dumps(v)
                for k, v in (("facts", facts), ("scalars", scalars), ("shapes", shapes))
            },
        )
        write_json(
            self.folder / "state.json", facts
        )  # for people; the resume reads the copy inside STATE

    def load_state(self, optimizer, params):
        """Fill params, optimiser and random generators; return the facts."""
        path = self.folder / STATE
        try:
            with safe_open(path, framework="pt") as f:
                meta, tensors = f.metadata(), {key: f.get_tensor(key) for key in f.offset_keys()}
            facts, scalars, shapes = (
                json.loads(meta[key]) for key in ("facts", "scalars", "shapes")
            )
            if shapes != {name: list(t.shape) for name, t in tensors.items()}:
                raise ValueError("its tensors are not those that were saved")
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as e:
            raise UserError(
                f"{path} cannot be read ({e}); start without --resume: the old run is kept."
            ) from None
        for name, p in params.items():
            saved = tensors.get(f"param.{name}")
            if saved is None or saved.shape != p.shape:
                raise UserError(
                    f"{path} does not fit this model: {name} is missing or has another shape."
                )
            with torch.no_grad():
                p.copy_(saved)
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        for key, value in [*tensors.items(), *((f"optim.{k}", v) for k, v in scalars.items())]:
            if key.startswith("optim."):
                _, i, name = key.split(".", 2)
                if int(i) >= len(trained):
                    raise UserError(
                        f"{path} was saved by another version of this program: start without --resume."
                    )
                p = trained[int(i)]
                optimizer.state[p][name] = (
                    value.to(p.device) if isinstance(value, torch.Tensor) else value
                )
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random.cuda"])
        return facts


class Stop:
    """Ctrl-C and SIGTERM end the run after the step in hand: stop.signal is set, and the loop saves and leaves. A
    second one ends it at once."""

    def __enter__(self):
        self.signal, self.before = None, {}
        for s in (signal.SIGINT, signal.SIGTERM):
            self.before[s] = signal.signal(s, self.heard)
        return self

    def heard(self, number, frame):
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        say("stop", "the step in hand is finished and saved first; once more stops at once")

    @property
    def exit_code(self):
        return 128 + self.signal  # 130 for Ctrl-C, 143 for SIGTERM: what a shell reports for them

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)
