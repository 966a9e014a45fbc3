"""What every program here shares with its user.

A parser made from dataclasses (one definition of a flag, its default and its help), receipts and progress on stderr,
and the one exception for a user's mistake, which becomes a sentence and an exit code instead of a traceback. Every
program imports this file before torch, so what OpenMP must find in the environment is set here.

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
import threading
import time
import types
import typing
from concurrent.futures import ThreadPoolExecutor

# When this process began. Every program imports this file first, so little was done before.
STARTED = time.time()

# OpenMP's threads wait for each other by spinning. On a core that another program uses too, a spinning thread keeps the
# late thread from running. So let them spin for a moment, then sleep. Training on two cores, in tokens/s:
#
#                    spin    sleep at once    spin, then sleep
#     busy cores       16              166                 116
#     quiet cores     269              229                 251
#
# A user's own choice stays.
if os.environ.setdefault("OMP_WAIT_POLICY", "passive") == "passive":
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


class UserError(Exception):
    """A mistake of the user's. Its one or two sentences say what is wrong, where, and what to do."""


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
        default = default_of(field)
        text = texts.get(field.name, "")
        if default not in ("", [], None):
            text += f" (default: {default})"
        # argparse takes a % for the beginning of a format.
        text = text.replace("%", "%%")
        group.add_argument(
            f"--{field.name}",
            dest=field.name,
            default=default,
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
    """str of `str | None`, so that argparse reads a str. Any other type comes back as it is."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return next(t for t in typing.get_args(kind) if t is not type(None))
    return kind


def parse(doc, *configs, argv=None, defaults=None):
    """One instance of each dataclass in `configs`, filled from the command line. Unknown or shortened flags are errors.

    defaults {field: value} replace those of the dataclasses: a resumed run takes the flags that it was started with."""
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
        # Ask for `not inside`, because nan is neither inside nor below nor above.
        if not low <= value <= high:
            most = "" if high == float("inf") else f" and at most {high}"
            raise UserError(f"--{name} {value} is out of range: it must be at least {low}{most}.")


# --- receipts, and how a program ends ---


def say(what, text=""):
    """A receipt: one line on stderr."""
    PULSE.heard()
    print(f"{what:<12} {text}".rstrip(), file=sys.stderr, flush=True)


class Pulse:
    """Prints a line on stderr when a program has been silent for 5 seconds, so that nobody takes it for hung:

        …            5 s since the last line

    Whoever writes calls `heard`. A thread of its own compares the clock with the last call twice a second, because the
    main thread may be busy in one long call. Where a bar is on the terminal, the thread redraws the bar instead.
    Proof: tests/test_cli.py: test_a_program_that_says_nothing_for_five_seconds_says_that_it_lives."""

    QUIET = 5.0  # seconds

    def __init__(self):
        self.last_line = STARTED  # when the program last wrote
        self.last = STARTED  # when the program or this thread last wrote
        self.bars = []  # tqdm's bars on the terminal; the innermost is the last
        self.thread = None

    def heard(self):
        """Note that the program wrote something now."""
        self.last_line = time.time()
        self.last = self.last_line

    def start(self):
        """Start the thread. As a daemon it ends with the program."""
        if self.thread is None:
            self.thread = threading.Thread(target=self.beat, daemon=True)
            self.thread.start()

    def beat(self):
        """What the thread does."""
        while True:
            time.sleep(0.5)
            now = time.time()
            if now - self.last < self.QUIET:
                continue
            self.last = now
            if self.bars:
                self.bars[-1].refresh()
                continue
            seconds = now - self.last_line
            print(f"{'…':<12} {seconds:.0f} s since the last line", file=sys.stderr, flush=True)


PULSE = Pulse()


# Errors of the system that a user can mend: the disk is full, or the folder cannot be written.
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
    PULSE.start()
    code, message = outcome(main)
    if message:
        print(message, file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        # Send stdout nowhere. Else Python would try to write the rest once more at its end, and print a traceback.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
    leave(code)


def leave(code):
    """End the process at once, by os._exit.

    Why: sys.exit would first free the model and stop the compiler's workers piece by piece, which takes 1 to 4 s. The
    system frees everything anyway. Cost: nothing else is flushed or closed, so `run` flushes stdout first, and every
    file must be whole before main() returns (files/disk.py)."""
    sys.stderr.flush()
    os._exit(code)


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
    except (MemoryError, OSError) as e:
        return 1, of_the_host(e)
    return code, ""


def of_the_host(error):
    """What to tell the user when the host's memory or disk is full. Any other error is raised again."""
    # A file that cannot be mapped and a process that cannot be forked are an OSError.
    if isinstance(error, MemoryError) or error.errno == errno.ENOMEM:
        return "error: the host's memory ran out. Nothing is half-written; free memory, or bring less data."
    if error.errno not in CANNOT_WRITE:
        raise error
    return cannot_write(error)


def cannot_write(error):
    where = f" ({error.filename})" if error.filename else ""
    return (
        f"error: cannot write{where}: {error.strerror}. "
        "Nothing is half-written; free space, or another folder."
    )


# --- progress ---


def ahead(work, items, n):
    """work(item) of each item, in order, made in one thread up to n items ahead of need.

    n = 2: while the caller has the result of item 0, the thread makes those of items 1 and 2."""
    with ThreadPoolExecutor(1) as pool:
        jobs = (pool.submit(work, item) for item in items)
        ready = list(itertools.islice(jobs, n + 1))
        while ready:
            yield ready.pop(0).result()
            ready += itertools.islice(jobs, 1)


class Progress:
    """Progress on stderr: a bar (tqdm) on a terminal, elsewhere a plain line every `every` seconds."""

    def __init__(self, total, what, every=3.0, says_end=True):
        """says_end: whether the last step gets a line even if the last line was less than `every` seconds ago"""
        self.total = total  # None: not known
        self.what = what
        self.every = every
        self.says_end = says_end
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
            PULSE.bars.append(self.bar)

    def step(self, n=1, text=""):
        self.done += n
        if self.bar is not None:
            PULSE.heard()
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(n)
            return
        now = time.time()
        is_over = self.says_end and n > 0 and self.done == self.total
        if now - self.last >= self.every or is_over:
            self.last = now
            say(self.what, self.plain_line(text))

    def plain_line(self, text):
        if not self.total:
            return f"{self.done}  {text}"
        line = f"{self.done}/{self.total}  {text}"
        if self.done == 0:
            return line
        left = (self.last - self.began) / self.done * (self.total - self.done)
        return f"{line}  {left:.0f} s left"

    def over(self, items):
        for item in items:
            yield item
            self.step()
        self.close()

    def line(self, what, text=""):
        """A receipt above the bar: clear the bar first, or both would stand in one line."""
        if self.bar is not None:
            self.bar.clear()
        say(what, text)

    def close(self):
        if self.bar is not None:
            PULSE.bars.remove(self.bar)
            self.bar.close()
            self.bar = None
