"""Each flag: one definition, a use that is no check and no receipt, a test that names it, a row of the README.

Both questions are asked of the syntax trees. A flag is used where its value is read as an attribute of its config
(`cfg.lora_r`). Functions that check or show do not count, nor what is only said (`say(…)`, errors), nor an `if` that
does nothing but that. A flag has a test where a test itself, its decorators or a table of the same file that it names,
writes the flag out: as an argument of a command (`"--lora_r"`) or of a config (`Config(lora_r=…)`).
"""

import cli

import ast
import dataclasses
import functools
import re

import pytest
from conftest import ROOT

import bench
import data
import recipes
import sample
import train

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = {
    "train.py": [data.Data, train.Config, recipes.Rules],
    "sample.py": [sample.Config],
    "bench.py": [bench.Config],
}
CONFIGS = [train.Config, data.Data, recipes.Rules, data.Show, sample.Config, bench.Config]


def names(config):
    return [f.name for f in dataclasses.fields(config)]


def label(value):
    return f"{value.__module__}.{value.__name__}" if isinstance(value, type) else value


FLAGS = [(config, name) for config in CONFIGS for name in names(config)]


@functools.cache
def used_flags(config):
    """The fields of a config that the program reads."""
    files, instances = READERS[config]
    return set().union(*(uses(tree, instances) for tree in trees(files)))


@functools.cache
def flags_of_tests(config):
    """The flags that the tests of a config write out."""
    files = [f"tests/{name}" for name in files_of_tests(config)]
    return set().union(*(flags_written_out(tree) for tree in trees(files)))


def trees(files):
    paths = [ROOT / name for name in files]
    return [ast.parse(p.read_text(encoding="utf-8")) for p in paths if p.exists()]


# --- is it used? ---

# of a config: the files that get one, and what its instances are called there
READERS = {
    train.Config: (["train.py", "job.py"], {"cfg"}),
    data.Data: (["data.py", "text.py", "train.py", "job.py"], {"cfg", "data_cfg"}),
    recipes.Rules: (["recipes.py"], {"rules"}),
    data.Show: (["data.py"], {"show_cfg", "what"}),
    sample.Config: (["sample.py"], {"cfg"}),
    bench.Config: (["bench.py"], {"cfg"}),
}
# functions that check, or only tell the user about what is done elsewhere
# (the result of show_plan is a plan, which is what --plan is for)
ASIDE = r"check|show(?!_plan)|draw|print|described|\w*account"
SAYING = {"say", "line", "print", "UserError"}


def callee(call):
    return ast.unparse(call.func).rpartition(".")[2]


def only_says(statement):
    """A receipt or an error, and nothing else."""
    if isinstance(statement, ast.Raise):
        return True
    call = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(call, ast.Call) and callee(call) in SAYING


def uses(node, instances, owner=""):
    """The names of all fields that are read of the instances, but for checks and what is said."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and re.match(ASIDE, node.name):
        return set()
    if isinstance(node, ast.Call) and callee(node) in SAYING:
        return set()
    if isinstance(node, ast.If) and not node.orelse and all(only_says(s) for s in node.body):
        return set()
    found = set()
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        read_of = ast.unparse(node.value).rpartition(".")[2]
        if read_of in instances or (read_of == "self" and owner):
            found.add(node.attr)
    if isinstance(node, ast.ClassDef):
        owner = node.name in {"Data", "Config", "Rules"}
    for child in ast.iter_child_nodes(node):
        found |= uses(child, instances, owner)
    return found


@pytest.mark.parametrize("config, name", FLAGS, ids=label)
def test_a_flag_is_used(config, name):
    files, _ = READERS[config]
    assert name in used_flags(config), f"read nowhere but in checks and receipts of {files}"


@pytest.mark.parametrize(
    "source, used",
    [
        ("x = cfg.fp8", True),
        ("if cfg.fp8:\n    multiply()", True),
        ("f(fp8=cfg.fp8)", True),
        ("def build(cfg):\n    return [1 for a in b if cfg.fp8]", True),
        ("def check(cfg):\n    return cfg.fp8", False),
        ("def check_data(cfg):\n    return cfg.fp8", False),
        ("def full_account(cfg):\n    return {'fp8': cfg.fp8}", False),
        ("def show(cfg):\n    return cfg.fp8", False),
        ("say('fp8', f'{cfg.fp8}')", False),
        ("bar.line('fp8', cfg.fp8)", False),
        ("if cfg.fp8:\n    say('fp8')", False),
        ("if cfg.fp8:\n    raise UserError('no')", False),
        ("cfg.fp8 = True", False),
        ("x = other.fp8", False),
        ("x = cfg.quant", False),
        ("# cfg.fp8", False),
        ("x = 'cfg.fp8'", False),
    ],
)
def test_what_counts_as_a_use(source, used):
    assert ("fp8" in uses(ast.parse(source), {"cfg"})) == used


# --- has it a test? ---

ABOUT_TEXT = {"test_flags.py", "test_readme.py", "test_house.py", "test_bench.py"}
ABOUT_SAMPLING = {"test_sample.py", "test_generate.py", "test_quality.py"}
CONFIG_NAMES = {"Config", "Data", "Rules", "Show", "replace"}


def files_of_tests(config):
    every = {p.name for p in (ROOT / "tests").glob("test_*.py")}
    if config is bench.Config:
        return ["test_bench.py"]
    if config is sample.Config:
        return sorted(ABOUT_SAMPLING & every)
    return sorted(every - ABOUT_TEXT - ABOUT_SAMPLING)


def written_flags(node, makers):
    """The names of all flags that a piece of a test writes out."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            words = [w for w in part.value.split() if w.startswith("--")]
            flags = [w.removeprefix("--").partition("=")[0] for w in words]
            found |= {flag.removeprefix("no-") for flag in flags}
        elif isinstance(part, ast.Call) and callee(part) in makers:
            found |= {k.arg for k in part.keywords if k.arg}
    return found


def without_docstring(function):
    body = function.body
    if ast.get_docstring(function):
        body = body[1:]
    return [*function.decorator_list, function.args, *body]


def flags_written_out(tree):
    """The names of all flags that the tests of a file write out."""
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
    tests = [f for f in functions if f.name.startswith("test_")]
    # helpers that hand their keywords on to a config
    makers = CONFIG_NAMES | {f.name for f in functions if f.args.kwarg}
    tables = {}
    for statement in tree.body:
        if isinstance(statement, ast.Assign):
            tables |= {ast.unparse(t): statement.value for t in statement.targets}
    found = set()
    for test in tests:
        for part in without_docstring(test):
            found |= written_flags(part, makers)
            named = {n.id for n in ast.walk(part) if isinstance(n, ast.Name)}
            for table in named & set(tables):
                found |= written_flags(tables[table], makers)
    return found


@pytest.mark.parametrize("config, name", FLAGS, ids=label)
def test_a_flag_has_a_test(config, name):
    files = ", ".join(files_of_tests(config))
    assert name in flags_of_tests(config), f"no test of {files} writes --{name} out"


@pytest.mark.parametrize(
    "source, tested",
    [
        ("def test_a():\n    run('--fp8')", True),
        ("def test_a():\n    run('--no-fp8')", True),
        ("def test_a():\n    run('--fp8=1 --lr 2')", True),
        ("def test_a():\n    train.Config(fp8=True)", True),
        ("def config(**more):\n    pass\ndef test_a():\n    config(fp8=True)", True),
        ("@mark('a', ['--fp8'])\ndef test_a(a):\n    pass", True),
        ("ROWS = ['--fp8']\n@mark('a', ROWS)\ndef test_a(a):\n    pass", True),
        ("ROWS = ['--fp8']\ndef test_a():\n    pass", False),
        ("def helper():\n    run('--fp8')\ndef test_a():\n    helper()", False),
        ("def test_a():\n    '''--fp8'''", False),
        ("def test_a():\n    pass  # --fp8", False),
        ("def test_a():\n    other(fp8=True)", False),
        ("def test_a():\n    run('--fp8_kept')", False),
    ],
)
def test_what_counts_as_a_test(source, tested):
    assert ("fp8" in flags_written_out(ast.parse(source))) == tested


# --- its words ---


def test_no_flag_is_defined_twice():
    for program in (
        [data.Data, train.Config, recipes.Rules],
        [data.Data, recipes.Rules, data.Show],
    ):
        defined = [name for config in program for name in names(config)]
        assert len(defined) == len(set(defined))


def test_every_flag_has_a_help_text():
    for config in CONFIGS:
        helps = cli.helps(config)
        assert not [name for name in names(config) if not helps.get(name)], config


def flag_table(configs):
    """The README's table, as it must read: one row a flag."""
    rows = ["| flag | default | what it does |", "|---|---|---|"]
    for config in configs:
        helps = cli.helps(config)
        for f in dataclasses.fields(config):
            default = f.default_factory() if f.default is dataclasses.MISSING else f.default
            shown = {"": "", "[]": "", "None": "", "True": "on", "False": "off"}.get(
                str(default), str(default)
            )
            rows.append(f"| `--{f.name}` | {shown} | {helps[f.name].replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_readme_has_the_flags_as_they_are(name):
    assert flag_table(PROGRAMS[name]) in README
