"""Each flag: one definition, one use, one line in the README's table, and no option from the environment."""

import dataclasses
import re

import pytest
from conftest import ROOT

import bench
import cli
import data
import recipes
import sample
import train

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = {
    "train.py": [train.Config, recipes.Rules],
    "sample.py": [sample.Config],
    "bench.py": [bench.Config],
}


def source(*names):
    return "\n".join((ROOT / name).read_text(encoding="utf-8") for name in names)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(train.Config)])
def test_every_flag_of_train_is_read(field):
    assert re.search(rf"\bcfg\.{field}\b", source("train.py", "data.py"))


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(sample.Config)])
def test_every_flag_of_sample_is_read(field):
    assert re.search(rf"\bcfg\.{field}\b", source("sample.py", "data.py"))


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(recipes.Rules)])
def test_every_bound_of_the_rules_is_read(field):
    assert re.search(rf"rules\.{field}\b", source("recipes.py"))


@pytest.mark.parametrize(
    "field",
    [
        f.name
        for f in dataclasses.fields(train.Config)
        if f.name not in ("data", "val_data", "model")
    ],
)
def test_every_flag_of_train_has_a_test(field):
    tests = source("tests/test_train.py", "tests/test_data.py", "tests/conftest.py")
    assert f"--{field}" in tests or f"--no-{field}" in tests or f"{field}=" in tests


def test_every_flag_has_a_help_text():
    for config in (data.Data, train.Config, sample.Config, recipes.Rules, data.Show):
        have = {**cli.helps(data.Data), **cli.helps(config)}
        assert not [f.name for f in dataclasses.fields(config) if not have.get(f.name)], config


def flag_table(configs):
    """The README's table, as it must read: one row a flag."""
    rows = ["| flag | default | what it does |", "|---|---|---|"]
    for config in configs:
        helps = {k: v for base in reversed(config.__mro__[:-1]) for k, v in cli.helps(base).items()}
        for f in dataclasses.fields(config):
            default = f.default_factory() if f.default is dataclasses.MISSING else f.default
            shown = {"": "", "[]": "", "True": "on", "False": "off"}.get(str(default), str(default))
            rows.append(f"| `--{f.name}` | {shown} | {helps[f.name].replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_readme_has_the_flags_as_they_are(name):
    assert flag_table(PROGRAMS[name]) in README


def test_no_option_comes_from_the_environment():
    for file in ROOT.glob("*.py"):
        assert not re.search(r"environ|getenv", file.read_text(encoding="utf-8")), file.name


def test_no_import_runs_upwards():
    """The floors of the house: a file imports what stands below it; train.py takes generate from sample.py."""
    below = {
        "cli": set(),
        **{f: {"cli"} for f in ("model", "quant", "lora", "recipes", "convert", "plan", "state")},
        "data": {"cli", "recipes", "convert"},
    }
    below["sample"] = set(below)
    below["train"] = set(below) - {"sample"}
    below["bench"] = {"cli", "lora"}  # it runs the others as programs
    for file, allowed in below.items():
        text = source(f"{file}.py")
        found = set(re.findall(r"^\s*(?:import|from) (\w+)", text, re.MULTILINE)) & set(below) - {
            file
        }
        if file == "train":
            assert "from sample import generate\n" in text
            found.discard("sample")
        assert found <= allowed, (file, found - allowed)
