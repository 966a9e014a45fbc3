"""The README and the docstrings say what is so: commands are taken, and files and tests that are named exist.

A printed command is parsed by its program's own parser, and then asked of its own `check`: nothing is run.
"""

import cli

import ast
import dataclasses
import importlib
import re
import shlex
import sys

import pytest
from conftest import ROOT

import bench
import convert
import data
import recipes
import sample
import train
from files import gguf_file

README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = ("speed", "files", "benchmarks")
FILES = [*ROOT.glob("*.py"), *(p for folder in FOLDERS for p in (ROOT / folder).glob("*.py"))]
NAMES = sorted(p.relative_to(ROOT).as_posix() for p in FILES)
DOCS = {
    name: ast.get_docstring(ast.parse((ROOT / name).read_text(encoding="utf-8"))) for name in NAMES
}


# --- what each program makes of its arguments: parse, then check ---


def take_train(arguments):
    cfg, data_cfg, _ = cli.parse("", train.Config, data.Data, recipes.Rules, argv=arguments)
    train.check(cfg, data_cfg)


def take_sample(arguments):
    (cfg,) = cli.parse("", sample.Config, argv=arguments)
    sample.check(cfg)


def take_data(arguments):
    data_cfg, _, _ = cli.parse("", data.Data, recipes.Rules, data.Show, argv=arguments)
    data.check(data_cfg)


def take_bench(arguments):
    (cfg,) = cli.parse("", bench.Config, argv=arguments)
    bench.check(cfg)


TAKE = {
    "train.py": take_train,
    "sample.py": take_sample,
    "data.py": take_data,
    "bench.py": take_bench,
}


def take_benchmark(name, arguments):
    """A file of benchmarks/ has a function `arguments(argv)`, which parses and checks."""
    module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
    module.arguments(arguments)


def take(command, monkeypatch, tmp_path):
    name, *arguments = shlex.split(command)
    if name == "convert.py":
        take_convert(arguments, monkeypatch, tmp_path)
    elif name.startswith("benchmarks/"):
        take_benchmark(name, arguments)
    else:
        assert name in TAKE, f"{name} is no program, or its parser is not in this test"
        TAKE[name](arguments)


def take_convert(arguments, monkeypatch, tmp_path):
    """convert.py has no flags: its main() is run where a file of that name is, with the work itself replaced."""
    converted = []
    monkeypatch.setattr(gguf_file, "convert", lambda *paths: converted.append(paths))
    monkeypatch.setattr(sys, "argv", ["convert.py", *arguments])
    monkeypatch.chdir(tmp_path)
    source = [a for a in arguments if a.endswith(".gguf")]
    for name in source:
        (tmp_path / name).touch()
    convert.main()
    assert len(converted) == 1


# --- the commands ---


def commands_in_block(text):
    """`python X.py …` and `torchrun … X.py …`, up to a comment, a pipe, `&` or the end of the line."""
    found = re.findall(r"\b(?:python3?|torchrun(?: -\S+)+) +([\w/]+\.py[^\n|&>]*)", text)
    return [command.split(" #")[0].strip() for command in found]


def commands_in_prose(text):
    """The same between backticks, also in tables, and `X.py --flag …` without the python."""
    found = []
    for code in re.findall(r"`([^`\n]+)`", text):
        if code.startswith(("python ", "torchrun ")):
            found += commands_in_block(code)
        elif re.match(r"[\w/]+\.py --", code):
            found.append(code)
    return found


def commands():
    blocks = re.findall(r"```\w*\n(.*?)```", README, re.DOTALL)
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    found = commands_in_prose(prose)
    for text in blocks:
        found += commands_in_block(text)
    for text in DOCS.values():
        # In a docstring a command stands on a line of its own, indented or not.
        lines = [
            line for line in (text or "").splitlines() if re.match(r" *(python|torchrun) ", line)
        ]
        found += commands_in_block("\n".join(lines)) + commands_in_prose(text or "")
    return sorted(set(found))


COMMANDS = commands()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_printed_command_is_one_that_the_program_takes(command, monkeypatch, tmp_path):
    take(command, monkeypatch, tmp_path)


@pytest.mark.parametrize(
    "command",
    [
        "train.py",  # the README's table has it
        "train.py --lora_r 16 --compile --grad_ckpt",
        "train.py --resume --max_steps 200",
        "sample.py --eval 32",
        "data.py --show 3",
        "convert.py model.gguf folder/",
        "bench.py --rows 1 2 4",
    ],
)
def test_commands_of_all_places_are_found(command):
    assert command in COMMANDS


@pytest.mark.parametrize(
    "text, found",
    [
        ("cd x && python train.py --lr 1 # why", ["train.py --lr 1"]),
        ("python sample.py --json | head", ["sample.py --json"]),
        ("torchrun --nproc_per_node=2 train.py --shard", ["train.py --shard"]),
        ("python benchmarks/speed.py a:1", ["benchmarks/speed.py a:1"]),
        ("python -m pytest tests/test_cli.py", []),
    ],
)
def test_what_is_a_command(text, found):
    assert commands_in_block(text) == found


def test_what_is_a_command_between_backticks():
    text = "| `python train.py --fp8` | `sample.py --merge` | `train.py` | `--lr` | `python -c 1` |"
    assert commands_in_prose(text) == ["train.py --fp8", "sample.py --merge"]


@pytest.mark.parametrize(
    "command",
    [
        "train.py --no_such_flag",
        "train.py --offload_ckpt",
        "train.py --batch_size 0",
        "sample.py --ingredients eggs",
        "data.py --max_len 0",
        "bench.py --rows 99",
        "convert.py model.gguf",
    ],
)
def test_a_command_that_the_program_refuses_is_found(command, monkeypatch, tmp_path):
    with pytest.raises(cli.UserError):
        take(command, monkeypatch, tmp_path)


def test_a_flag_that_is_named_exists():
    configs = [train.Config, data.Data, recipes.Rules, data.Show, sample.Config, bench.Config]
    flags = {f.name for config in configs for f in dataclasses.fields(config)}
    for code in re.findall(r"`(--[^`\n]+)`", README):
        for dashes, name, rest in re.findall(r"(--(?:no-)?)(\w+)(…?)", code):
            if rest:
                assert any(flag.startswith(name) for flag in flags), dashes + name
            else:
                assert name in flags, dashes + name


# --- files and tests ---


def test_the_file_table_has_every_file_and_no_other():
    assert sorted(re.findall(r"^\| `([\w/]+\.py)` \|", README, re.MULTILINE)) == NAMES


def tables():
    """Of each table of the README: [{column: cell}]."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", README, re.MULTILINE):
        lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()]
        header, _, *rows = [[cell.strip() for cell in line] for line in lines]
        found.append([dict(zip(header, row, strict=True)) for row in rows])
    return found


PLACES = [row for table in tables() for row in table if "where" in row]


def test_there_is_a_table_of_places():
    assert len(PLACES) >= 12


@pytest.mark.parametrize("row", PLACES, ids=lambda row: next(iter(row.values())))
def test_a_method_is_where_the_table_says(row):
    places = re.findall(r"[\w/]+\.py", row["where"])
    assert places and set(places) <= set(NAMES), row["where"]


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\b(test_\w+)(?![\w.])", README))))
def test_a_test_that_is_named_exists(name):
    assert any(f"def {name}(" in f.read_text(encoding="utf-8") for f in ROOT.glob("tests/*.py"))


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"(?:tests|assets|benchmarks|speed|files)/\w[\w.]*\w", README)))
)
def test_a_file_that_is_named_exists(name):
    assert (ROOT / name).exists()


def named_files(text):
    return set(re.findall(r"(?<![\w/.-])(?:\w+/)?\w+\.py\b", text))


@pytest.mark.parametrize("name", sorted(named_files(README)))
def test_a_python_file_that_is_named_exists(name):
    assert (ROOT / name).exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_docstring_names_files_that_exist(name):
    here = (ROOT / name).parent
    for file in named_files(DOCS[name] or ""):
        assert (ROOT / file).exists() or (here / file).exists(), file


def test_no_placeholder_is_left():
    assert "@@" not in README
