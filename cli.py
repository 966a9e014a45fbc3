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
import codecs
import contextlib
import dataclasses
import errno
import inspect
import io
import itertools
import json
import os
import re
import select
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

# A program that is started with `>&-` or `2>&-` has no such descriptor. The next file that is opened would get its
# number, and whatever a library prints there would go into that file. So put /dev/null there, before torch is imported.
for number in range(3):
    try:
        os.fstat(number)
    except OSError:
        # The system gives the lowest number that is free: this one.
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # noqa: FBT003 (takes no keyword)


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


# --- stdout and stderr: what they cannot encode, and when they go away ---


def json_escapes(error):
    """The codec error handler of stdout and stderr: a character that cannot be encoded is written as JSON writes it.

        in ASCII            ½ becomes \\u00bd, 🍰 becomes \\ud83c\\udf70
        in any encoding     the byte e9 of a file name that is no UTF-8 becomes \\udce9

    So a line of JSON stays JSON, with the same content. Text that is no JSON gets the same escapes.
    Proof: tests/test_cli.py: test_what_stdout_cannot_encode_is_escaped_as_json_is."""
    characters = error.object[error.start : error.end]
    escaped = json.dumps(characters)[1:-1]
    return escaped, error.end


codecs.register_error("json_escapes", json_escapes)


class Terminal:
    """What becomes of stdout and stderr when nobody takes what is written there.

    A terminal hangs up, the `head` behind a pipe ends, the disk behind `> file` is full. What then happens:

        stdout of a program that prints its results     an error; the program ends
        stdout of train.py; stderr of any program       lost: the program goes on, and writes into its log

    Why: what train.py makes is in the run's folder, so no step may depend on a line that is shown beside it.
    What was said before the folder is known is kept for the log. A program without a log drops the rest.
    Proof: tests/test_cli.py: test_training_goes_on_without_its_terminal, test_a_lost_stderr_ends_no_program."""

    def __init__(self):
        # Reentrant, because a signal's handler may write while this thread is inside.
        self.lock = threading.RLock()
        self.lost = []  # the numbers of the lost descriptors, 1 and 2
        self.log = None  # path of the file in the place of a lost descriptor; None: not known yet
        self.unwritten = []  # bytes for the log, until its path is known
        self.error = None  # the error that a stdout of results raised

    def lose(self, number, why, unsaid=b""):
        """Descriptor `number` takes no more. unsaid: the bytes that it did not take"""
        with self.lock:
            if number in self.lost:
                # The log takes no more either, for example because the disk is full.
                return
            self.lost.append(number)
            if number == 2:
                PULSE.hide_bars()
            # Drop what drew a bar: its line is no line of a log.
            if unsaid.startswith(b"\r"):
                unsaid = b""
            note = f"{'terminal':<12} {NAMES[number]} was closed ({why}): going on without it\n"
            self.unwritten += [note.encode(), unsaid]
            self.redirect(os.devnull)
            self.write_log()
        if number == 1 and 2 not in self.lost:
            say("terminal", f"stdout was closed ({why}): going on without it")

    def keep(self, number, data):
        """Keep bytes for the log where their descriptor is lost and the log is not known. -> whether it is so"""
        with self.lock:
            is_kept = number in self.lost and self.log is None
            if is_kept:
                self.unwritten.append(data)
            return is_kept

    def log_in(self, folder):
        """Name the folder of the log, train.log. The file is only written where a descriptor is lost."""
        self.log_to(os.path.join(folder, "train.log"))

    def log_to(self, path):
        with self.lock:
            self.log = path
            self.write_log()

    def write_log(self):
        """Write what was kept into the log, and put the log in the place of the lost descriptors."""
        if self.log is None or not self.lost:
            return
        self.redirect(self.log)
        with contextlib.suppress(OSError):
            os.write(self.lost[0], b"".join(self.unwritten))
        self.unwritten = []

    def redirect(self, path):
        """Open a file as the lost descriptors, so that also libraries and child processes write there."""
        # A log that cannot be written is no reason to end either.
        with contextlib.suppress(OSError):
            file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            for number in self.lost:
                os.dup2(file, number)
            os.close(file)


TERMINAL = Terminal()

# The names of the descriptors.
NAMES = {1: "stdout", 2: "stderr"}


class Outlet(io.FileIO):
    """The raw end of sys.stdout or sys.stderr, below Python's buffers. TERMINAL hears of a write that fails."""

    def __init__(self, number, has_results):
        """has_results: whether what is written here is what the program is for, so that an error ends it"""
        super().__init__(number, "w", closefd=False)
        self.has_results = has_results

    def write(self, data):
        data = bytes(data)
        number = self.fileno()
        if TERMINAL.keep(number, data):
            return len(data)
        try:
            return self.write_waiting(data)
        except OSError as e:
            if self.has_results:
                TERMINAL.error = e
                raise
            TERMINAL.lose(number, e.strerror, data)
            return len(data)

    def write_waiting(self, data):
        """Write to a descriptor that another program may have made non-blocking: wait until there is room."""
        written = super().write(data)
        while written is None:
            select.select([], [self], [])
            written = super().write(data)
        return written


def guarded(number, stream, original, has_results):
    """A stream like sys.stdout or sys.stderr, `stream`, over an Outlet. original: what Python began with"""
    # Leave a stream alone that somebody put there, for example pytest.
    if stream is not original:
        return stream
    buffer = io.BufferedWriter(Outlet(number, has_results))
    if stream is None:
        # Closed from the start, `2>&-`: the descriptor is /dev/null since this file was imported.
        TERMINAL.lose(number, "closed")
        return io.TextIOWrapper(buffer, "utf-8", "json_escapes", line_buffering=True)
    stream.flush()
    by_line = stream.line_buffering or stream.write_through
    return io.TextIOWrapper(buffer, stream.encoding, "json_escapes", line_buffering=by_line)


def guard_streams(outlives_terminal):
    """Put streams over Outlets in the place of sys.stdout and sys.stderr."""
    if not outlives_terminal:
        TERMINAL.log_to(os.devnull)
    sys.stderr = guarded(2, sys.stderr, sys.__stderr__, has_results=False)
    has_results = not outlives_terminal
    sys.stdout = guarded(1, sys.stdout, sys.__stdout__, has_results)


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
            if self.bars and is_shown(self.bars[-1]):
                self.bars[-1].refresh()
                continue
            seconds = now - self.last_line
            print(f"{'…':<12} {seconds:.0f} s since the last line", file=sys.stderr, flush=True)

    def hide_bars(self):
        """Draw no bar any more, because the terminal is gone."""
        for bar in self.bars:
            bar.disable = True


PULSE = Pulse()


def is_shown(bar):
    """Whether a bar is on a terminal. tqdm's bars have this switch themselves."""
    return bar is not None and not bar.disable


# Errors of the system that a user can mend: the disk is full, or the folder cannot be written.
CANNOT_WRITE = {
    errno.EPERM,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EROFS,
    errno.EFBIG,
    errno.EEXIST,
    errno.ENOTDIR,
}


def run(main, outlives_terminal=False):
    """Call main(); turn a user's mistake, a full disk, Ctrl-C and a closed pipe into a sentence and an exit code.

    outlives_terminal: whether main's work is in files, so that it goes on where stdout goes away (see Terminal)"""
    guard_streams(outlives_terminal)
    PULSE.start()
    code, message = outcome(main)
    if message:
        print(message, file=sys.stderr)
    # What stdout did not take was told above.
    with contextlib.suppress(OSError):
        sys.stdout.flush()
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
        code = code_of(main)
        # Flushed here, where a full disk or a closed pipe still becomes a sentence.
        sys.stdout.flush()
    except UserError as e:
        return 2, f"error: {e}"
    except KeyboardInterrupt:
        return 130, "stopped."
    except (MemoryError, OSError) as e:
        if e is TERMINAL.error:
            return of_stdout(e)
        return 1, of_the_host(e)
    except RuntimeError as e:
        # Python up to 3.12 raises this where the links of a path lead in a circle.
        if "Symlink loop" not in str(e):
            raise
        return 1, f"error: {e}. Name another path."
    return code, ""


def code_of(main):
    """The exit code of main(), also where argparse ends the program after --help."""
    try:
        return main() or 0
    except SystemExit as e:
        return e.code or 0


def of_stdout(error):
    """(exit code, what to tell the user) where stdout did not take the results of a program."""
    if error.errno == errno.EPIPE:  # `python data.py --json | head`
        return 0, ""
    return 1, cannot_write(error)


def of_the_host(error):
    """What to tell the user when the host's memory or disk is full. Any other error is raised again."""
    # A file that cannot be mapped and a process that cannot be forked are an OSError.
    if isinstance(error, MemoryError) or error.errno == errno.ENOMEM:
        return "error: the host's memory ran out. Nothing is half-written; free memory, or bring less data."
    if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return f"error: {error.filename!r:.200}: {error.strerror}. Name another path."
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
        if is_shown(self.bar):
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
