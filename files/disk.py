"""Write files whole or not at all; lock a folder; recognise a model folder; find the cache folder.

    write_json("run.json", {...})          # write under another name, sync, rename
    write_tensors("a.safetensors", {...})
    with atomic("curve.png") as beside: figure.savefig(beside)
    append(file, b"…\\n")                   # the whole line or nothing of it
    with go_on_without("curve.png"): …     # a full disk costs this file only
    held = lock(folder)                    # one process owns the folder until that process ends
    fingerprint(model_folder)              # tells two models apart in a fraction of a second
    cache_folder(".cache")                 # beside the code, unless the path is absolute
    program()                              # tells two versions of this program apart

A program that is killed while it writes leaves the old file or the new one, never half a file:

    killed while writing .run.json.5f0c9a1e.part     run.json is still the old one
    killed after the rename                          run.json is the new one, all of it on the disk
"""

import cli
from cli import UserError, say

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import secrets
import zlib
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    raise SystemExit(
        "error: this program needs Linux or macOS; on Windows run it under WSL."
    ) from None

ROOT = Path(__file__).parents[1]  # the folder of the project

# The folder of a run that trained all weights is a model folder, too. A fingerprint leaves these two files out,
# because a run writes them without changing its model.
NO_WEIGHTS_OF_A_MODEL = ("state.safetensors", "adapter_model.safetensors")

# A fingerprint reads this many samples of each shard, each this long.
SAMPLES = 65
SAMPLE_BYTES = 65536

# Of each tensor three places are read, each this long.
TENSOR_BYTES = 16384


# What `atomic` calls a file that is being written.
PART = re.compile(r"\..+\.[0-9a-f]{8}\.part")


@contextlib.contextmanager
def atomic(path):
    """Yield a path beside `path` to write to. Sync and rename that file at the end; remove it after an error.

    The path has a random name. The number of the process would not do: two containers that share a volume both have a
    process 1, and so has the container that died here yesterday."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield beside
        # Sync the content before the rename, because a power cut could else leave the new name on an empty file.
        put_in_place(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def put_in_place(beside, path):
    """Sync a finished file and rename it to `path`."""
    sync(beside)
    set_usual_mode(beside)
    os.replace(beside, path)
    # Sync the folder, too, because the folder holds the name.
    sync(path.parent)


def remove_parts(folder):
    """Remove what killed programs left half-written in a folder. Only the owner of the folder may do so."""
    for path in Path(folder).glob(".*.part"):
        if PART.fullmatch(path.name):
            path.unlink()


def sync(path):
    """Wait until the system has put a file or a folder on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def append(file, data):
    """Append bytes to a file that is open without a buffer. Where the disk is full the file stays as it was, and
    OSError is raised."""
    size = file.seek(0, os.SEEK_END)
    try:
        while data:
            data = data[file.write(data) :]
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(size)
        raise


@contextlib.contextmanager
def go_on_without(path):
    """A `with` block that writes a file on which nothing depends. Where it cannot be written, a line says so.

    An old file of that name is removed, because it would tell of an earlier end of the run."""
    try:
        yield
    except OSError as e:
        if e.errno not in cli.CANNOT_WRITE:
            raise
        say("note", f"{path} is not written ({e.strerror}): going on without it")
        with contextlib.suppress(OSError):
            Path(path).unlink(missing_ok=True)


def set_usual_mode(path):
    """Give a file the permissions of any new file, because safetensors makes files that only their owner can read."""
    # Set the umask to read the umask: there is no other way.
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def write_json(path, value):
    """Write a value as strict JSON. A nan or inf, for which JSON has no word, raises UserError."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError:
        raise UserError(
            f"{path} is not written, because it would hold a number that is nan or infinite."
        ) from None
    with atomic(path) as beside:
        # A file name that is no UTF-8 has lone surrogates in Python. Here "\udce9" is written as JSON's own escape.
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")


def finite(value):
    """The value (numbers, texts, lists, dicts) with None in the place of each nan and inf, so that it is JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def json_line(value):
    """A value as one line of strict ASCII JSON, with null in the place of each nan and inf."""
    return json.dumps(finite(value), allow_nan=False)


def parse_json(text):
    """The value of a JSON text. NaN and Infinity, which earlier versions of this program wrote, become None."""
    return json.loads(text, parse_constant=lambda name: None)


def write_tensors(path, tensors, metadata=None):
    """Write {name: tensor} as safetensors, from any device. A full disk raises OSError, as for any other file."""
    # Import here, because these modules import torch, which takes seconds and which data.py does not need.
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    on_cpu = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    metadata = {"format": "pt", **(metadata or {})}
    with atomic(path) as beside:
        try:
            save_file(on_cpu, beside, metadata=metadata)
        except SafetensorError as e:
            raise OSError(error_number(e) or errno.EIO, str(e), str(path)) from None


def checksum(tensors, texts):
    """A CRC-32 of {name: tensor on the CPU}, with dtypes and shapes, and of {name: text}, as 8 hex digits.

    Why: a safetensors file has none, so a bit that a disk flipped would only train on. Cost: half a second a GB."""
    import torch

    crc = 0
    for name in sorted(texts):
        crc = zlib.crc32(f"{name} {texts[name]}\n".encode(), crc)
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode(), crc)
        crc = zlib.crc32(tensor.flatten().view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def error_number(error):
    """The system's error number in a Rust library's message, 28 in "… (os error 28)"; 0 if the message has none."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


def lock(folder):
    """Own a folder as long as the returned file is open. Raise BlockingIOError if another process owns the folder.

    The system releases a flock when its process ends, even by a kill, so nobody ever removes a stale lock by hand."""
    held = open(Path(folder) / ".lock", "w")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        held.close()
        raise
    return held


def fingerprint(folder):
    """A hash that tells model folders apart, of config.json and of each shard's size and 65 samples of 64 kB.

    The first sample is a shard's begin, the last its end. Samples are enough for a fine-tune, which changes weights
    everywhere: 16 GB in 4 shards need 17 MB of reading. Between two samples a whole tensor may lie, so a run compares
    `tensor_samples` too. This hash stays as it is, because runs of all versions of this program have it."""
    folder = Path(folder)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for shard in sorted(folder.glob("*.safetensors")):
        if shard.name not in NO_WEIGHTS_OF_A_MODEL:
            add_samples(digest, shard)
    return digest.hexdigest()[:16]


def digest(path):
    """The sha256 of a file's content, as hex digits. 1 GB takes about a second."""
    sha = hashlib.sha256()
    with open(path, "rb") as f:
        while True:
            part = f.read(2**20)
            if not part:
                return sha.hexdigest()
            sha.update(part)


def add_samples(digest, shard):
    with open(shard, "rb") as f:
        size = f.seek(0, os.SEEK_END)
        digest.update(str(size).encode())
        for i in range(SAMPLES):
            start = (size - SAMPLE_BYTES) * i // (SAMPLES - 1)
            f.seek(max(0, start))
            digest.update(f.read(SAMPLE_BYTES))


def tensor_samples(folder):
    """A hash of each shard's header, and of the begin, middle and end of each tensor: 16 kB of each place.

    So an exchanged tensor is always noticed. All bytes are not read, because 70B would be read from the disk twice, 140
    GB each time. 8B needs 14 MB of reading. A change of some numbers inside a tensor may go unnoticed."""
    digest = hashlib.sha256()
    for shard in sorted(Path(folder).glob("*.safetensors")):
        if shard.name not in NO_WEIGHTS_OF_A_MODEL:
            # A file that is no safetensors is none of the model's weights: they were loaded before.
            with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
                add_tensors(digest, shard)
    return digest.hexdigest()[:16]


def add_tensors(digest, shard):
    """One shard's part of `tensor_samples`: 8 bytes are the length of the header, which lists the tensors."""
    with open(shard, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        # No header is longer than its file.
        header = f.read(min(length, shard.stat().st_size))
        digest.update(header)
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        for tensor in tensors.values():
            begin, end = tensor["data_offsets"]
            for start in (begin, (begin + end) // 2, end - TENSOR_BYTES):
                first = max(begin, start)
                f.seek(8 + length + first)
                digest.update(f.read(min(TENSOR_BYTES, end - first)))


def about_model(folder):
    """What run.json says of a base model: where it lies, and two hashes that tell it from others."""
    return {
        "base": str(folder),
        "base_fingerprint": fingerprint(folder),
        "base_tensors": tensor_samples(folder),
    }


def is_model(folder, info):
    """Whether a folder is the model that a run.json tells of. Earlier versions wrote the first hash only."""
    now = about_model(folder)
    return all(info.get(key, now[key]) == now[key] for key in ("base_fingerprint", "base_tensors"))


def cache_folder(cache):
    """The folder that --cache names: beside the code, unless the path is absolute."""
    return ROOT / user_path(cache, "--cache")


def user_path(name, flag):
    """The path that a flag names, with the home folder in the place of ~ or ~user.

    A shell does so itself, but not inside quotes and not in --out=~/x. A file here that is called ~ stays that file."""
    name = str(name)
    if not name.startswith("~") or os.path.lexists(name):
        return name
    path = os.path.expanduser(name)
    if path == name:
        user, _, _ = name.partition("/")
        raise UserError(f"{flag} {name}: there is no user and no file {user}; name another path.")
    return path


def refuse_no_utf8(path, flag):
    """A UserError for a path that is no UTF-8: the packages safetensors and tokenizers open no such file."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{flag} {path}: the name is no UTF-8, so the files in it could not be opened again; rename it."
        ) from None


def at_home(config, *names):
    """A dataclass of flags, of which those named, paths or lists of paths, went through user_path."""
    changes = {}
    for name in names:
        value = getattr(config, name)
        if isinstance(value, list):
            changes[name] = [user_path(item, f"--{name}") for item in value]
        else:
            changes[name] = user_path(value, f"--{name}")
    return dataclasses.replace(config, **changes)


def program():
    """A hash of this program's own code: of the names and contents of its .py files."""
    digest = hashlib.sha256()
    for pattern in ("*.py", "speed/*.py", "files/*.py"):
        for file in sorted(ROOT.glob(pattern)):
            digest.update(f"{file.relative_to(ROOT)}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
