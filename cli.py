"""What every program here shares with its user.

A parser made from dataclasses (one definition of a flag, its default and its help), receipts and progress on stderr,
and the one exception for a user's mistake, which becomes a sentence and an exit code instead of a traceback.

    cfg, rules = parse(__doc__, Config, Rules)
    bound(cfg, lr=(0, 1), batch_size=1)
    say("read", "3 recipes")
    run(main)
"""

import argparse
import dataclasses
import errno
import inspect
import itertools
import os
import re
import sys
import time
import types
import typing
from concurrent.futures import ThreadPoolExecutor

# When this process began, as near as Python can tell: every program imports this file first.
STARTED = time.time()


class UserError(Exception):
    """A mistake of the user's: one or two sentences saying what is wrong, where, and what to do."""


# --- flags ---


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def helps(config):
    """{field: its comment}: the comment behind a field in the source is its help text, so it is written once."""
    source = inspect.getsource(config)
    return dict(re.findall(r"^    (\w+): [^#\n]*?(?:# *(.*))?$", source, re.MULTILINE))


def add_flags(parser, config):
    """One --flag for each field of a dataclass: underscores, --flag / --no-flag for a bool, choices for a Literal."""
    group = parser.add_argument_group(config.__name__)
    texts = helps(config)
    for field in dataclasses.fields(config):
        # argparse takes a % for the beginning of a format.
        text = texts.get(field.name, "").replace("%", "%%")
        group.add_argument(
            f"--{field.name}",
            dest=field.name,
            default=default_of(field),
            help=text,
            **how_to_read(field),
        )


def default_of(field):
    if field.default is dataclasses.MISSING:
        return field.default_factory()
    return field.default


def how_to_read(field):
    """What argparse has to know of a field's type."""
    kind = without_none(field.type)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    origin = typing.get_origin(kind)
    if origin is list:
        (item,) = typing.get_args(kind)
        return {"nargs": "+", "type": item, "metavar": field.name.upper()}
    if origin is typing.Literal:
        return {"choices": typing.get_args(kind)}
    return {"type": kind, "metavar": kind.__name__.upper()}


def without_none(kind):
    """`str | None` is read as a str; any other type is what it is."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return next(t for t in typing.get_args(kind) if t is not type(None))
    return kind


def parse(doc, *configs, argv=None, defaults=None):
    """One instance of each dataclass in `configs`, filled from the command line. Unknown or shortened flags are errors.

    defaults {field: value} stand in for the dataclasses' own: a resumed run has those it was started with."""
    parser = Parser(
        description=doc,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for config in configs:
        add_flags(parser, config)
    parser.set_defaults(**(defaults or {}))
    values = vars(parser.parse_args(argv))
    return [filled(config, values) for config in configs]


def filled(config, values):
    """An instance of the dataclass from {field: value}, which may hold fields of other dataclasses."""
    own = {field.name: values[field.name] for field in dataclasses.fields(config)}
    return config(**own)


def bound(config, **bounds):
    """A UserError for a numeric flag outside its bounds: bound(cfg, lr=(0, 1), n=1) wants 0 <= lr <= 1, 1 <= n."""
    for name, limits in bounds.items():
        low = limits
        high = float("inf")
        if isinstance(limits, tuple):
            low, high = limits
        value = getattr(config, name)
        # Both comparisons are false for nan, which is out of any range.
        if not low <= value <= high:
            most = "" if high == float("inf") else f" and at most {high}"
            raise UserError(f"--{name} {value} is out of range: it must be at least {low}{most}.")


# --- receipts, and how a program ends ---


def say(what, text=""):
    """A receipt: one line on stderr."""
    print(f"{what:<12} {text}".rstrip(), file=sys.stderr, flush=True)


CANNOT_WRITE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EROFS,
    errno.EFBIG,
    errno.EEXIST,
    errno.ENOTDIR,
}


def run(main):
    """Call main(); turn a user's mistake, a full disk, Ctrl-C and a closed pipe into a sentence and an exit code."""
    code, message = outcome(main)
    if message:
        print(message, file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        # What could not be written would fail once more when Python ends, with a traceback.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
    sys.exit(code)


def outcome(main):
    """(exit code, what to tell the user) of main()."""
    try:
        code = main() or 0
        # Flushed here, where a full disk or a closed pipe still becomes a sentence.
        sys.stdout.flush()
    except UserError as e:
        return 2, f"error: {e}"
    except KeyboardInterrupt:
        return 130, "stopped."
    except BrokenPipeError:  # `python data.py --json | head`
        return 0, ""
    except OSError as e:
        if e.errno not in CANNOT_WRITE:
            raise
        return 1, cannot_write(e)
    return code, ""


def cannot_write(error):
    where = f" ({error.filename})" if error.filename else ""
    return (
        f"error: cannot write{where}: {error.strerror}. "
        "Nothing is half-written; free space, or another folder."
    )


# --- progress ---


def ahead(work, items, n):
    """work(item) of each item, in order, made in a thread up to n items ahead of need."""
    with ThreadPoolExecutor(1) as pool:
        jobs = (pool.submit(work, item) for item in items)
        ready = list(itertools.islice(jobs, n + 1))
        while ready:
            yield ready.pop(0).result()
            ready += itertools.islice(jobs, 1)


class Progress:
    """A bar on a terminal (tqdm), a plain line every `every` seconds elsewhere; on stderr either way."""

    def __init__(self, total, what, every=10.0):
        self.total = total  # None: not known
        self.what = what
        self.every = every
        self.done = 0
        self.began = time.time()
        self.last = self.began  # when the last line was written
        self.bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=total,
                desc=what,
                file=sys.stderr,
                dynamic_ncols=True,
                leave=False,
            )

    def step(self, n=1, text=""):
        self.done += n
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(n)
            return
        now = time.time()
        if now - self.last >= self.every or self.done == self.total:
            self.last = now
            say(self.what, self.plain_line(text))

    def plain_line(self, text):
        if not self.total:
            return f"{self.done}  {text}"
        seconds_each = (self.last - self.began) / max(self.done, 1)
        left = seconds_each * (self.total - self.done)
        return f"{self.done}/{self.total}  {text}  {left:.0f} s left"

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
