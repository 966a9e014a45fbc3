"""The README says what is so: its commands parse, its files and tests exist, its line counts are right."""

import re
import shlex

import pytest
from conftest import ROOT

import bench
import cli
import data
import recipes
import sample
import train

README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = ["README.md", *(f.name for f in ROOT.glob("*.py"))]
CONFIGS = {
    "train.py": [train.Config, recipes.Rules],
    "sample.py": [sample.Config],
    "data.py": [data.Data, recipes.Rules, data.Show],
    "bench.py": [bench.Config],
}


def commands():
    """Every `python X.py …` of the README's code blocks and of the programs' docstrings."""
    texts = [block for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)]
    texts += [(ROOT / name).read_text(encoding="utf-8").split('"""')[1] for name in CONFIGS]
    found = re.findall(r"\bpython ((?:train|sample|data|bench)\.py[^\n&|]*)", "\n".join(texts))
    return sorted({c.split(" #")[0].strip() for c in found})


@pytest.mark.parametrize("command", commands())
def test_a_printed_command_is_one_that_the_program_takes(command):
    name, *flags = shlex.split(command)
    cli.parse("", *CONFIGS[name], argv=flags)


def test_there_are_commands_to_check():
    assert "train.py --lora_r 16 --compile --grad_ckpt" in commands() and len(commands()) > 10


def test_the_file_table_has_every_file():
    assert set(re.findall(r"^\| `(\w+\.py)` \|", README, re.MULTILINE)) == {
        f.name for f in ROOT.glob("*.py")
    }


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(test_\w+)`", README))))
def test_a_test_that_is_named_exists(name):
    assert any(f"def {name}(" in f.read_text(encoding="utf-8") for f in ROOT.glob("tests/*.py"))


@pytest.mark.parametrize("name", sorted(set(re.findall(r"(?:tests/|assets/)[\w.]+", README))))
def test_a_file_that_is_named_exists(name):
    assert (ROOT / name).exists()


def test_no_placeholder_is_left():
    assert "@@" not in README
