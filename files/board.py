"""Event files for TensorBoard (--tensorboard): the curves of a run in a browser, while it trains and beside other runs.

    check()                                           # a UserError where the package tensorboard is missing
    board = Board("out", 31)                          # out/tensorboard/, from step 31 on
    board.add({"step": 31, "loss": 1.9}, say)         # one event, a number a curve

    tensorboard --logdir .                            # shows them; metrics.jsonl has the same numbers

Write each event and flush, without the thread of torch's SummaryWriter: an error comes out of `add`, where it can be
handled, and not as a traceback out of a thread. The parts of the package are those that torch itself uses.
"""

from cli import UserError

import contextlib
import time
from pathlib import Path


def check():
    """Raise a UserError where the package tensorboard cannot be imported."""
    try:
        parts()
    # protobuf raises a TypeError over a package that was made for another version of it.
    except (ImportError, TypeError, AttributeError) as e:
        reason = (str(e) or repr(e)).splitlines()[0]
        raise UserError(
            f"--tensorboard needs the package tensorboard, which cannot be used here ({reason}): "
            "pip install tensorboard, or leave the flag out."
        ) from None


def parts():
    """(Event, SessionLog, Summary, RecordWriter). Imported only here, because the package is optional."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    return Event, SessionLog, Summary, RecordWriter


class Board:
    """The event file of one process in folder/tensorboard/. An error of the disk ends the file and not the run."""

    def __init__(self, folder, first):
        """first: the first step that this process makes. TensorBoard drops what older files have from there on"""
        self.folder = Path(folder) / "tensorboard"
        self.first = first
        event, session, _, records = parts()
        self.event = event
        self.session = session
        self.records = records
        self.file = None
        self.has_failed = False

    def add(self, line, tell):
        """Add a line of metrics.jsonl. tell(what, text) reports an error, once."""
        if self.has_failed:
            return
        try:
            if self.file is None:
                self.open()
            self.write(step=line["step"], summary=summary_of(line))
            # Flush, so that a person who watches sees the step at once.
            self.file.flush()
        except OSError as e:
            self.has_failed = True
            tell("tensorboard", f"left out from here on: {e}. metrics.jsonl has all steps")
            if self.file is not None:
                # Closing writes what is left once more, and fails once more.
                with contextlib.suppress(OSError):
                    self.file.close()

    def open(self):
        self.folder.mkdir(exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        self.file = open(self.folder / f"events.out.tfevents.{time.time_ns()}", "xb")
        self.write(file_version="brain.Event:2")
        # The sign that a process began here: what older files have from step `first` on is not shown.
        self.write(step=self.first, session_log=self.session(status=self.session.START))

    def write(self, **fields):
        event = self.event(wall_time=time.time(), **fields)
        self.records(self.file).write(event.SerializeToString())


def summary_of(line):
    """The numbers of a line of metrics.jsonl but its step, as TensorBoard's Summary. What is no number is left out."""
    _, _, summary, _ = parts()
    values = []
    for tag, number in line.items():
        if tag != "step" and isinstance(number, int | float):
            values.append(summary.Value(tag=tag, simple_value=number))
    return summary(value=values)
