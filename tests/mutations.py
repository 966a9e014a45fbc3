"""Which test notices when the program ignores a flag? A script, run by hand: pytest does not collect it.

    python tests/mutations.py                       # every flag: minutes
    python tests/mutations.py weight_decay attn     # only these
    python tests/mutations.py --program sample.py   # the flags of one program: train.py, recipes.py, sample.py
    python tests/mutations.py --each lora_alpha     # each read of the flag by itself
    python tests/mutations.py --list                # the reads, without a test run
    python tests/mutations.py --jobs 2 --card       # two at a time; also what only a card shows, with `pytest -m gpu`

For each field of the dataclasses of flags every read `cfg.field`, outside the functions named check, is replaced in a
copy of the project by the default, as if the program did not know the flag. A flag with choices has a mutation for each
choice but the default: that one alone is not known. Then the tests that have the flag in their names run there, and
where they pass, all files of tests named for its program. The last line says how many mutations were caught.
"""

import argparse
import ast
import concurrent.futures
import dataclasses
import importlib
import itertools
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import typing
from collections import namedtuple
from pathlib import Path

import matplotlib.figure  # noqa: F401 (imported once, for all the forked processes)
import pytest
import torch

ROOT = Path(__file__).parents[1]

FORK = multiprocessing.get_context("fork")

# the names under which a dataclass of flags goes about in the source: cfg.lr, heap.rules.min_words, self.cfg.seed
RECEIVERS = {"cfg", "data_cfg", "rules", "choice", "show", "what"}

# class of flags, in which files its fields are read, and the files of tests that may catch them, the likeliest first
Program = namedtuple("Program", "config reads tests")
OTHERS = {"sample.py", "generate.py", "bench.py", "export.py", "convert.py"}
PROGRAMS = {
    "train.py": Program(
        "train.Config", lambda name: name not in OTHERS, ["test_witness.py", "test_train.py"]
    ),
    "data.py": Program(
        "data.Data",
        lambda name: name not in OTHERS,
        ["test_witness.py", "test_train.py", "test_data.py"],
    ),
    "recipes.py": Program(
        "recipes.Rules", lambda name: name not in OTHERS, ["test_witness.py", "test_recipes.py"]
    ),
    "sample.py": Program(
        "sample.Config",
        lambda name: name in ("sample.py", "generate.py", "quality.py"),
        ["test_witness.py", "test_sample.py", "test_generate.py"],
    ),
}

# what a CPU cannot show: this choice is taken for that one, and test_gpu.py has to notice
CARD = [("optim", "paged_adamw8bit", "adamw8bit"), ("attn", "cudnn", "flash")]

# words of the tests that see a flag, where these do not have its name
HINTS = {
    "min_share": "rare",
    "min_mentioned": "min_mentioned or never_name",
    "model": "model_is_the_base",
}

Mutation = namedtuple(
    "Mutation", "program flag choice instead"
)  # choice None: every value is taken for the default


def title(mutation):
    choice = "" if mutation.choice is None else f"={mutation.choice}"
    return f"{mutation.program} --{mutation.flag}{choice}"


def config_of(program):
    module, name = PROGRAMS[program].config.split(".")
    return getattr(importlib.import_module(module), name)


def mutations_of(program):
    """A Mutation for each field of the program's flags; for a flag with choices one for each but the default."""
    inherited = set()
    config = config_of(program)
    for base in config.__mro__[1:]:
        inherited |= set(getattr(base, "__annotations__", {}))
    for field in dataclasses.fields(config):
        if field.name in inherited:
            continue
        default = field.default
        if default is dataclasses.MISSING:
            default = field.default_factory()
        choices = [None]
        if typing.get_origin(field.type) is typing.Literal:
            choices = [value for value in typing.get_args(field.type) if value != default]
        for choice in choices:
            yield Mutation(program, field.name, choice, default)


# --- a copy of the project that ignores a flag ---


class Ignore(ast.NodeTransformer):
    """Finds the reads of a flag and what to write in their place. `only`: the number of the one read, or None: all."""

    def __init__(self, mutation, config, only):
        self.mutation, self.config, self.only = mutation, config, only
        self.found, self.edits, self.inside = [], [], []

    def visit_FunctionDef(self, node):
        if node.name == "check":
            return node
        return self.generic_visit(node)

    def visit_ClassDef(self, node):
        self.inside.append(node.name)
        node = self.generic_visit(node)
        self.inside.pop()
        return node

    def visit_JoinedStr(self, node):
        """An f-string is written anew as a whole: Python 3.11 does not know where in it an expression stands."""
        edits, self.edits = self.edits, []
        node = self.generic_visit(node)
        if self.edits:
            edits.append((node, ast.unparse(node)))
        self.edits = edits
        return node

    def is_read(self, node):
        if node.attr != self.mutation.flag or not isinstance(node.ctx, ast.Load):
            return False
        owner = node.value
        if isinstance(owner, ast.Name) and owner.id == "self":
            return self.inside[-1:] == [self.config]
        return getattr(owner, "id", getattr(owner, "attr", None)) in RECEIVERS

    def visit_Attribute(self, node):
        self.generic_visit(node)
        if not self.is_read(node):
            return node
        self.found.append(node.lineno)
        if self.only is not None and self.only != len(self.found) - 1:
            return node
        read, instead = ast.unparse(node), repr(self.mutation.instead)
        if self.mutation.choice is not None:
            instead = f"({instead} if {read} == {self.mutation.choice!r} else {read})"
        self.edits.append((node, instead))
        return ast.parse(instead, mode="eval").body


def edited(source, edits):
    """The source with each (node, text) put in its place, the last one first. Columns are counted in bytes."""
    lines = source.encode().splitlines(keepends=True)
    begins = [0, *itertools.accumulate(map(len, lines))]
    whole = b"".join(lines)
    for node, text in sorted(
        edits, key=lambda edit: (edit[0].lineno, edit[0].col_offset), reverse=True
    ):
        start = begins[node.lineno - 1] + node.col_offset
        end = begins[node.end_lineno - 1] + node.end_col_offset
        whole = whole[:start] + text.encode() + whole[end:]
    ast.parse(whole)
    return whole.decode()


def sources(program):
    """The files in which the program's flags may be read."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("speed/*.py"), *ROOT.glob("files/*.py")]
    return [file for file in sorted(files) if PROGRAMS[program].reads(file.name)]


def mutate(mutation, only=None):
    """{file: its new text} of the files that read the flag, and [file:line] of the reads."""
    texts, reads = {}, []
    config = PROGRAMS[mutation.program].config.split(".")[1]
    for file in sources(mutation.program):
        number = None if only is None else only - len(reads)
        source = file.read_text(encoding="utf-8")
        change = Ignore(mutation, config, number)
        change.visit(ast.parse(source))
        reads += [f"{file.relative_to(ROOT)}:{line}" for line in change.found]
        if change.edits:
            texts[file.relative_to(ROOT)] = edited(source, change.edits)
    return texts, reads


def copy_project(folder):
    """The project's own files, and the cache of the default model and recipes as a link."""
    unwanted = shutil.ignore_patterns(
        ".git", ".cache", "__pycache__", ".pytest_cache", "out*", "*.gguf", "assets"
    )
    shutil.copytree(ROOT, folder, ignore=unwanted)
    if (ROOT / ".cache").exists():
        (folder / ".cache").symlink_to((ROOT / ".cache").resolve())


# --- the tests ---


class FirstFailure:
    """A plugin of pytest that keeps the name of the first test that fails, or whose fixture does."""

    name = ""

    def pytest_runtest_logreport(self, report):
        if report.failed and not self.name:
            self.name = report.nodeid

    def pytest_collectreport(self, report):
        if report.failed and not self.name:
            self.name = report.nodeid


def forget_the_project():
    """Let the modules be imported again, from the folder that pytest runs in."""
    sys.path = [path for path in sys.path if Path(path or ".").resolve() != ROOT]
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and ROOT in Path(file).parents and name != "__main__":
            del sys.modules[name]


def run_in_child(folder, command, answer):
    """Run pytest in a forked process, in which torch is imported already."""
    forget_the_project()
    os.chdir(folder)
    sys.dont_write_bytecode = True
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    first = FirstFailure()
    code = pytest.main(command, plugins=[first])
    if code == pytest.ExitCode.OK or code == pytest.ExitCode.NO_TESTS_COLLECTED:
        answer.send("")
    else:
        answer.send(first.name or f"pytest ended with {code!r}")


def run_tests(folder, files, *how):
    """The name of the first test that fails; "" where all pass, or none was chosen."""
    paths = [f"tests/{name}" for name in files if (folder / "tests" / name).exists()]
    command = ["-x", "-q", "-p", "no:cacheprovider", "--tb=no", "--show-capture=no", *how, *paths]
    here, there = multiprocessing.Pipe(duplex=False)
    child = FORK.Process(target=run_in_child, args=(folder, command, there))
    child.start()
    there.close()
    try:
        said = here.recv()
    except EOFError:
        said = "the tests' process died"
    child.join()
    return said.removeprefix("tests/")


def is_caught(folder, mutation, card):
    if card:
        return run_tests(folder, ["test_gpu.py", "test_witness.py"], "-m", "gpu")
    quick = "not slow and not gpu"
    words = HINTS.get(mutation.flag, mutation.flag)
    if mutation.program == "sample.py":
        words = f"sample and ({mutation.flag})"
    for file in PROGRAMS[mutation.program].tests:
        by = run_tests(folder, [file], "-m", quick, "-k", words)
        if by:
            return by
    rest = (
        mutation.flag if mutation.flag == "compile" else "not compile"
    )  # compiling takes most of the time
    for file in PROGRAMS[mutation.program].tests:
        by = run_tests(folder, [file], "-m", quick, "-k", rest)
        if by:
            return by
    return ""


def judge(mutation, only=None, card=False):
    """(what is mutated, the test that caught it or "", the reads, seconds)"""
    began = time.time()
    texts, reads = mutate(mutation, only)
    what = title(mutation) + ("" if only is None else f" at {reads[only]}")
    if not reads:
        return what, "", ["no read was found: add the receiver's name to RECEIVERS"], 0.0
    with tempfile.TemporaryDirectory(prefix="mutation") as temporary:
        folder = Path(temporary) / "project"
        copy_project(folder)
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8")
        caught = is_caught(folder, mutation, card)
    return what, caught, reads, time.time() - began


def passes_unchanged(programs):
    """Whether the tests pass in an unchanged copy: otherwise a failure would prove nothing."""
    with tempfile.TemporaryDirectory(prefix="mutation") as temporary:
        folder = Path(temporary) / "project"
        copy_project(folder)
        files = sorted({file for program in programs for file in PROGRAMS[program].tests})
        failed = run_tests(folder, files, "-m", "not slow and not gpu")
    if failed:
        print(f"the tests fail without any mutation, in {failed}")
    return not failed


def jobs_of(asked):
    """[(function, arguments)]: the mutations that were asked for."""
    programs = [asked.program] if asked.program else list(PROGRAMS)
    known = [mutation for program in programs for mutation in mutations_of(program)]
    chosen = [m for m in known if not asked.flags or m.flag in asked.flags]
    jobs = []
    for mutation in chosen:
        if asked.each:
            jobs += [(mutation, only) for only in range(len(mutate(mutation)[1]))]
        else:
            jobs.append((mutation, None))
    if asked.card:
        for flag, choice, instead in CARD:
            jobs.append((Mutation("train.py", flag, choice, instead), None, True))
    return programs, jobs


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("flags", nargs="*", help="names of flags; none: all")
    parser.add_argument("--program", choices=PROGRAMS)
    parser.add_argument("--each", action="store_true", help="each read of a flag by itself")
    parser.add_argument("--list", action="store_true", help="the reads, without a test run")
    parser.add_argument("--card", action="store_true", help="also what only a card shows")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument(
        "--unchecked", action="store_true", help="leave out the run without a mutation"
    )
    asked = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    programs, jobs = jobs_of(asked)
    if asked.list:
        for mutation, *_ in jobs:
            print(f"{title(mutation):<40} {' '.join(mutate(mutation)[1])}")
        return 0
    if not asked.unchecked and not passes_unchanged(programs):
        return 1
    missed, total = [], 0
    with concurrent.futures.ThreadPoolExecutor(asked.jobs) as pool:
        for what, caught, reads, seconds in pool.map(lambda job: judge(*job), jobs):
            total += 1
            print(
                f"{what:<44} {caught or 'NOT CAUGHT':<90} {seconds:4.0f} s  {len(reads)} reads",
                flush=True,
            )
            if not caught:
                missed.append(f"{what} ({' '.join(reads)})")
    for line in missed:
        print(f"not caught: {line}")
    print(f"{total - len(missed)} of {total} caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
