"""The basement: what every program here shares with its user.

A parser made from dataclasses (one definition of a flag, its default and its help), receipts and progress on stderr,
and the one exception for a user's mistake, which becomes a sentence and an exit code instead of a traceback.
"""

import argparse
import dataclasses
import errno
import inspect
import os
import re
import sys
import time
import types
import typing


class UserError(Exception):
    """A mistake of the user's: one or two sentences saying what is wrong, where, and what to do."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def helps(config):
    """{field: its comment}: the comment behind a field in the source is its help text, so it is written once."""
    sources = "".join(
        inspect.getsource(c) for c in reversed(config.__mro__[:-1])
    )  # inherited fields first
    return dict(re.findall(r"^    (\w+): [^#\n]*?(?:# *(.*))?$", sources, re.MULTILINE))


def add_flags(parser, config):
    """One --flag for each field of a dataclass: underscores, --flag / --no-flag for a bool, choices for a Literal."""
    group, text = parser.add_argument_group(config.__name__), helps(config)
    for f in dataclasses.fields(config):
        default = f.default_factory() if f.default is dataclasses.MISSING else f.default
        kind, how = (
            f.type,
            {"default": default, "dest": f.name, "help": text.get(f.name, "").replace("%", "%%")},
        )
        if (
            isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
        ):  # `str | None`: a str
            kind = next(t for t in typing.get_args(kind) if t is not type(None))
        if kind is bool:
            how["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is list:
            how |= {"nargs": "+", "type": typing.get_args(kind)[0], "metavar": f.name.upper()}
        elif typing.get_origin(kind) is typing.Literal:
            how["choices"] = typing.get_args(kind)
        else:
            how |= {"type": kind, "metavar": kind.__name__.upper()}
        group.add_argument(f"--{f.name}", **how)


def parse(doc, *configs, argv=None, defaults=None):
    """One instance of each dataclass in `configs`, filled from the command line. Unknown or shortened flags are errors.
    defaults {field: value} stand in for the dataclasses' own: a resumed run has those it was started with."""
    parser = Parser(
        description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for config in configs:
        add_flags(parser, config)
    parser.set_defaults(**(defaults or {}))
    got = vars(parser.parse_args(argv))
    return [
        config(**{f.name: got[f.name] for f in dataclasses.fields(config)}) for config in configs
    ]


def bound(config, **bounds):
    """A UserError for a numeric flag outside its bounds: bound(cfg, lr=(0, 1), n=1) wants 0 <= lr <= 1, 1 <= n."""
    for name, limits in bounds.items():
        value, (low, high) = (
            getattr(config, name),
            limits if isinstance(limits, tuple) else (limits, float("inf")),
        )
        if not low <= value <= high:  # also false for nan
            most = "" if high == float("inf") else f" and at most {high}"
            raise UserError(f"--{name} {value} is out of range: it must be at least {low}{most}.")


def say(what, text=""):
    """A receipt: one line on stderr."""
    print(f"{what:<12} {text}".rstrip(), file=sys.stderr, flush=True)


CANNOT_WRITE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EROFS,
    errno.EFBIG,
    errno.EEXIST,
    errno.ENOTDIR,
)


def run(main):
    """Call main(); turn a user's mistake, a full disk, Ctrl-C and a closed pipe into a sentence and an exit code."""
    try:
        code, message = main() or 0, ""
        sys.stdout.flush()  # here, where a full disk or a closed pipe is still a sentence
    except UserError as e:
        code, message = 2, f"error: {e}"
    except KeyboardInterrupt:
        code, message = 130, "stopped."
    except BrokenPipeError:  # `python data.py --json | head`
        code, message = 0, ""
    except OSError as e:
        if e.errno not in CANNOT_WRITE:
            raise
        code, where = 1, f" ({e.filename})" if e.filename else ""
        message = f"error: cannot write{where}: {e.strerror}. Nothing is half-written; free space, or another folder."
    if message:
        print(message, file=sys.stderr)
    try:
        sys.stdout.flush()
    except (
        OSError
    ):  # what could not be written would fail once more at Python's exit, with a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


class Progress:
    """A bar on a terminal (tqdm), a plain line every `every` seconds elsewhere; on stderr either way."""

    def __init__(self, total, what, every=10.0):
        self.total, self.what, self.every = total, what, every
        self.done, self.began, self.last, self.bar = 0, time.time(), time.time(), None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=total, desc=what, file=sys.stderr, dynamic_ncols=True, leave=False
            )

    def step(self, n=1, text=""):
        self.done += n
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(n)
        elif time.time() - self.last >= self.every or self.done == self.total:
            self.last = time.time()
            left = (
                (self.last - self.began)
                / max(self.done, 1)
                * ((self.total or self.done) - self.done)
            )
            of = f"/{self.total}  {text}  {left:.0f} s left" if self.total else f"  {text}"
            say(self.what, f"{self.done}{of}")

    def over(self, items):
        for item in items:
            yield item
            self.step()
        self.close()

    def line(self, what, text=""):
        """A receipt that does not tear the bar."""
        if self.bar is not None:
            self.bar.clear()
        say(what, text)

    def close(self):
        if self.bar is not None:
            self.bar.close()
