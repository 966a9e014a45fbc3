"""How every file of ours reaches the disk: whole or not at all.

    write_json("run.json", {...})          # written beside its place, synced, renamed
    write_tensors("a.safetensors", {...})
    with atomic("curve.png") as beside: figure.savefig(beside)
    held = lock(folder)                    # one process owns the folder, until this one ends
    fingerprint(model_folder)              # which model, in a fraction of a second
    cache_folder(".cache")                 # beside the code, unless the path is absolute

A program that is killed between any two of its writes leaves whole files only.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    raise SystemExit(
        "error: this program needs Linux or macOS; on Windows run it under WSL."
    ) from None

ROOT = Path(__file__).parents[1]  # of the project

# A run that trained all weights is a model folder, too. These two files of it change without the model changing.
NO_WEIGHTS_OF_A_MODEL = ("state.safetensors", "adapter_model.safetensors")

SAMPLES = 65  # places of a shard that its fingerprint reads
SAMPLE_BYTES = 65536


@contextlib.contextmanager
def atomic(path):
    """Give a path beside `path` to write to; sync and rename it when the block ends well, else remove it."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        # The content is on the disk before the name points to it, and the name before this returns.
        sync(beside)
        set_usual_mode(beside)
        os.replace(beside, path)
        sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def sync(path):
    """Wait until a file or a folder is on the disk."""
    number = os.open(path, os.O_RDONLY)
    os.fsync(number)
    os.close(number)


def set_usual_mode(path):
    """Give a file the mode of any new file: safetensors makes files that only their owner reads."""
    mask = os.umask(0)  # the only way to read the umask is to set it
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def write_json(path, value):
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with atomic(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_tensors(path, tensors, metadata=None):
    """{name: tensor} as safetensors, from any device. A full disk is an OSError like any other."""
    # These import torch, which takes seconds that data.py does not need.
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    on_cpu = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    metadata = {"format": "pt", **(metadata or {})}
    with atomic(path) as beside:
        try:
            save_file(on_cpu, beside, metadata=metadata)
        except SafetensorError as e:
            raise OSError(error_number(e) or errno.EIO, str(e), str(path)) from None


def error_number(error):
    """The system's number of an error in the words of a Rust library, "… (os error 28)"; 0 where it names none."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


def lock(folder):
    """Own a folder as long as the returned file is open; raise BlockingIOError where another process owns it.

    The system lets go of a flock when its process dies, however it dies: no stale lock has to be removed by hand."""
    held = open(Path(folder) / ".lock", "w")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        held.close()
        raise
    return held


def fingerprint(folder):
    """A model folder's identity in a fraction of a second: config.json, and of each shard its size and 64 kB at 65
    places, the first at its header, the last at its end. A fine-tune changes weights everywhere; a forger need not."""
    folder = Path(folder)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for shard in sorted(folder.glob("*.safetensors")):
        if shard.name not in NO_WEIGHTS_OF_A_MODEL:
            add_samples(digest, shard)
    return digest.hexdigest()[:16]


def add_samples(digest, shard):
    with open(shard, "rb") as f:
        size = f.seek(0, os.SEEK_END)
        digest.update(str(size).encode())
        for i in range(SAMPLES):
            start = (size - SAMPLE_BYTES) * i // (SAMPLES - 1)
            f.seek(max(0, start))
            digest.update(f.read(SAMPLE_BYTES))


def cache_folder(cache):
    """The folder of --cache: beside the code, unless its path is absolute."""
    return ROOT / cache
