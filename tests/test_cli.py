"""cli.py: flags from dataclasses, mistakes as a sentence and an exit code, progress on stderr."""

import errno
import fcntl
import io
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import conftest
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import cli
from cli import UserError

ROOT = Path(__file__).parents[1]


@dataclass
class Train:
    lr: float = 2e-4  # peak learning rate; 100% of it after the warm-up
    batch_size: int = 8  # recipes in a micro-batch
    data: list[str] = field(default_factory=list)  # recipe files; "a#b" is one name
    sizes: list[int] = field(default_factory=lambda: [1, 2])
    batching: Literal["random", "sorted"] = "sorted"  # how batches are cut
    resume: bool = False  # go on with the run
    clean: bool = True  # apply the rules
    title: str | None = None  # what is asked


@dataclass
class Rules:
    """Bounds."""

    min_words: int = 25  # fewer: dropped


def parse(*argv, **defaults):
    (train,) = cli.parse("Trains.", Train, argv=list(argv), defaults=defaults)
    return train


# ---- flags ----------------------------------------------------------------------------------------------------------


def test_no_flags_give_the_dataclass_as_it_stands():
    assert parse() == Train(
        lr=2e-4,
        batch_size=8,
        data=[],
        sizes=[1, 2],
        batching="sorted",
        resume=False,
        clean=True,
        title=None,
    )


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--lr", "1e-3"], "lr", 0.001),
        (["--lr=1"], "lr", 1.0),
        (["--lr", "-1"], "lr", -1.0),
        (["--lr=-1e-3"], "lr", -0.001),
        (["--batch_size", "16"], "batch_size", 16),
        (["--batch_size", "-3"], "batch_size", -3),
        (["--data", "a.csv"], "data", ["a.csv"]),
        (["--data", "a.csv", "b c.json"], "data", ["a.csv", "b c.json"]),
        (["--sizes", "3", "4", "5"], "sizes", [3, 4, 5]),
        (["--batching", "random"], "batching", "random"),
        (["--resume"], "resume", True),
        (["--no-resume"], "resume", False),
        (["--no-clean"], "clean", False),
        (["--clean"], "clean", True),
        (["--title", "Pumpkin bread"], "title", "Pumpkin bread"),
        (["--title", "a=b"], "title", "a=b"),
        (["--title=a=b"], "title", "a=b"),
        (["--title="], "title", ""),
        (["--title=--lr"], "title", "--lr"),
        (["--lr", "1", "--lr", "2"], "lr", 2.0),  # the last one counts
    ],
)
def test_one_flag_changes_one_field(argv, name, value):
    got, expected = vars(parse(*argv)), vars(Train())
    assert got == {**expected, name: value}
    assert type(got[name]) is type(value)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--batch_sice", "8"], "--batch_sice"),
        (["--batch", "8"], "--batch"),  # shortened
        (["--res"], "--res"),
        (["--batch-size", "8"], "--batch-size"),
        (["--no_clean"], "--no_clean"),
        (["leftover"], "leftover"),
        (["--batch_size", "8.5"], "--batch_size"),
        (["--batch_size", "many"], "--batch_size"),
        (["--batch_size"], "--batch_size"),
        (["--lr", "fast"], "--lr"),
        (["--lr", "--resume"], "--lr"),
        (["--data"], "--data"),
        (["--sizes", "1", "x"], "--sizes"),
        (["--batching", "packedd"], "--batching"),
        (["--clean=yes"], "--clean"),
        (["--clean", "yes"], "yes"),
        (["--resume", "out"], "out"),
    ],
)
def test_a_wrong_flag_is_one_sentence_that_names_it(argv, named):
    with pytest.raises(UserError) as e:
        parse(*argv)
    assert named in str(e.value) and "--help" in str(e.value)
    assert "\n" not in str(e.value)


def test_a_wrong_choice_lists_the_right_ones():
    with pytest.raises(UserError, match=r"fast.*random.*sorted"):
        parse("--batching", "fast")


def test_defaults_stand_in_for_the_dataclasses_own():
    got = parse("--batch_size", "3", batch_size=5, lr=0.5, clean=False, data=["x"])
    assert got == Train(lr=0.5, batch_size=3, clean=False, data=["x"])


def test_lists_are_not_shared_between_two_calls():
    parse().data.append("mine")
    assert parse().data == []


def test_several_dataclasses_share_one_command_line(monkeypatch):
    train, rules = cli.parse("", Train, Rules, argv=["--min_words", "3", "--lr", "1"])
    assert train == Train(lr=1.0) and rules == Rules(min_words=3)
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--min_words", "4"]
    )  # without argv: what the program was called with
    assert cli.parse("", Train, Rules)[1] == Rules(min_words=4)


def test_help_is_the_comments(capsys):
    with pytest.raises(SystemExit) as e:
        cli.parse(
            "Trains: 100% of it.\n\n    python x.py  # line by line", Train, Rules, argv=["--help"]
        )
    out = " ".join(capsys.readouterr().out.split())
    assert e.value.code == 0
    assert "Trains: 100% of it. python x.py # line by line" in out
    for text in (
        "--lr FLOAT peak learning rate; 100% of it after the warm-up",
        "--min_words INT fewer: dropped",
        "--clean, --no-clean apply the rules",
        '--data DATA [DATA ...] recipe files; "a#b" is one name',
        "--batching {random,sorted} how batches are cut",
        "--title STR what is asked",
    ):
        assert text in out


# ---- bounds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [0, 0.5, 1])
def test_bounds_are_inclusive(lr):
    cli.bound(Train(lr=lr), lr=(0, 1), batch_size=(8, float("inf")))


@pytest.mark.parametrize(
    ("lr", "low", "high", "sentence"),
    [
        (-0.1, 0, 1, "--lr -0.1 is out of range: it must be at least 0 and at most 1."),
        (1.5, 0, 1, "--lr 1.5 is out of range: it must be at least 0 and at most 1."),
        (float("nan"), 0, 1, "--lr nan is out of range: it must be at least 0 and at most 1."),
        (1, 2, float("inf"), "--lr 1 is out of range: it must be at least 2."),
        (float("nan"), 0, float("inf"), "--lr nan is out of range: it must be at least 0."),
    ],
)
def test_out_of_bounds(lr, low, high, sentence):
    with pytest.raises(UserError) as e:
        cli.bound(Train(lr=lr), batch_size=(1, 8), lr=(low, high))
    assert str(e.value) == sentence


# ---- run: exit codes and sentences ----------------------------------------------------------------------------------


def ended(capsys, main):
    """(exit code, stdout, stderr) of run(main)"""
    with pytest.raises(SystemExit) as e:
        cli.run(main)
    return e.value.code, *capsys.readouterr()


def raising(error):
    def main():
        raise error

    return main


def test_success_is_0_and_silent(capsys):
    assert ended(capsys, lambda: None) == (0, "", "")


def test_what_main_returns_is_the_exit_code(capsys):
    assert ended(capsys, lambda: 143) == (143, "", "")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("--lr is too large."), 2, "error: --lr is too large.\n"),
        (KeyboardInterrupt(), 130, "stopped.\n"),
    ],
)
def test_a_mistake_and_ctrl_c_are_one_line_on_stderr(capsys, error, code, line):
    assert ended(capsys, raising(error)) == (code, "", line)


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG]
)
def test_a_disk_that_takes_no_more_is_one_line_that_names_the_file(capsys, number):
    text = os.strerror(number)
    code, out, err = ended(capsys, raising(OSError(number, text, "out/run.json")))
    assert code == 1 and out == "" and err.count("\n") == 1
    assert err.startswith("error: cannot write (out/run.json): " + text)


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("ours"),
        OSError(errno.EIO, "Input/output error"),
        KeyError("x"),
        # A pipe of our own, for example to a worker: it is not stdout that was closed.
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
    ],
)
def test_an_error_of_ours_is_not_hidden(error):
    with pytest.raises(type(error)):
        cli.run(raising(error))


def python(code, stdout=subprocess.PIPE):
    """A program of one line in a process of its own, with stdout buffered as in a user's shell."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", f"import cli\n{code}"],
        cwd=ROOT,
        env=env,
        text=True,
        timeout=60,
        stdout=stdout,
        stderr=subprocess.PIPE,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_no_traceback_for_a_mistake():
    code = "def main(): cli.parse('', argv=['--x'])\ncli.run(main)"
    assert python(code) == (2, "", "error: unrecognized arguments: --x (see --help)\n")


def test_a_traceback_for_an_error_of_ours():
    code, _, err = python("cli.run(lambda: 1 // 0)")
    assert code == 1 and err.startswith("Traceback") and "\nZeroDivisionError: " in err


@pytest.mark.parametrize("letters", [10, 1_000_000], ids=["short output", "long output"])
def test_a_closed_pipe_is_a_silent_end(letters):
    """`python data.py --json | head -0`: a short output is still in Python's buffer when main() ends."""
    read, write = os.pipe()
    os.close(read)
    try:
        code, _, err = python(f"cli.run(lambda: print('x' * {letters}))", stdout=write)
    finally:
        os.close(write)
    assert (code, err) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("letters", [10, 1_000_000], ids=["short output", "long output"])
def test_results_that_find_no_space_are_an_error(letters):
    """`python data.py --json > account.json` on a full disk."""
    with open("/dev/full", "w") as full:
        code, _, err = python(f"cli.run(lambda: print('x' * {letters}))", stdout=full)
    assert (
        code == 1
        and err.startswith("error: cannot write: No space left on device")
        and err.count("\n") == 1
    )


# ---- what stdout cannot encode ---------------------------------------------------------------------------------------

ENCODINGS = [
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "latin-1"},
    {"PYTHONIOENCODING": "cp1252"},
    {"PYTHONIOENCODING": "utf-8"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"LC_ALL": "C"},
]
# The last character is how Python has the byte e9 of a file name that is no UTF-8.
STRANGE = "½ cup “crème” – 🍰 \udce9"


def shell(command, env=None):
    """A shell's command line in the project's folder. -> (exit code, stdout, stderr), both as bytes"""
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env={**os.environ, "PY": sys.executable, **(env or {})},
        capture_output=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("env", ENCODINGS, ids=str)
@pytest.mark.parametrize("outlives", [False, True])
def test_what_stdout_cannot_encode_is_escaped_as_json_is(tmp_path, env, outlives):
    """A line of JSON is read back as it was, and a receipt and an error are no traceback."""
    (tmp_path / "x.py").write_text(
        f"""
import cli, json
def main():
    text = {ascii(STRANGE)}
    cli.say("read", text)
    print(json.dumps([text], ensure_ascii=False))
    raise cli.UserError(text)
cli.run(main{", outlives_terminal=True" * outlives})
""",
        encoding="ascii",
    )
    code, out, err = shell(f"PYTHONPATH=. $PY {tmp_path / 'x.py'}", env)
    encoding = env.get("PYTHONIOENCODING", "utf-8")
    assert json.loads(out.decode(encoding)) == [STRANGE]
    assert code == 2 and b"Traceback" not in err
    receipt, sentence = err.decode(encoding).splitlines()
    assert receipt.startswith("read") and sentence.startswith("error: ")
    assert json.loads(f'"{sentence[7:]}"') == STRANGE


def test_an_escape_is_what_json_writes():
    """Written down by hand: four digits, and two surrogates for what is beyond them."""
    assert "½🍰".encode("ascii", "json_escapes") == rb"\u00bd\ud83c\udf70"
    assert "–\udce9".encode("latin-1", "json_escapes") == rb"\u2013\udce9"


# ---- a terminal that goes away ---------------------------------------------------------------------------------------

WORKER = """
import cli, sys, time, warnings
cli.PULSE.QUIET = 0.0
def main():
    bar = cli.Progress(40, "work", every=0)
    for n in range(40):
        print("text", n, flush=True)
        bar.step(1, f"step {n}")
        warnings.warn(f"warning {n}")
        if n == 20:
            cli.TERMINAL.log_to(sys.argv[1] + "/train.log")
        time.sleep(0.01)
    bar.close()
    open(sys.argv[1] + "/done", "w").close()
cli.run(main, outlives_terminal=True)
"""

# How a shell's user loses stdout, stderr or both. PROGRAM stands for the program with its arguments.
LOST = {
    "both into a closed pipe": ("PROGRAM 2>&1 | head -n 2", {"stdout", "stderr"}),
    "stdout into a closed pipe": ("PROGRAM 2>/dev/null | head -n 2", {"stdout"}),
    "stderr into a closed pipe": ("PROGRAM 2>&1 >/dev/null | head -n 2", {"stderr"}),
    "stdout closed": ("PROGRAM >&- 2>/dev/null", {"stdout"}),
    "stderr closed": ("PROGRAM 2>&- >/dev/null", {"stderr"}),
    "both closed": ("PROGRAM >&- 2>&-", {"stdout", "stderr"}),
    "all three closed": ("PROGRAM <&- >&- 2>&-", {"stdout", "stderr"}),
    "stdout on a full disk": ("PROGRAM > /dev/full 2>/dev/null", {"stdout"}),
    "both on a full disk": ("PROGRAM > /dev/full 2>&1", {"stdout", "stderr"}),
}


def lose(tmp_path, command, env=None):
    """(exit code of the program, stderr of the shell, what its log says) of WORKER under a command of LOST."""
    if "/dev/full" in command and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / "worker.py").write_text(WORKER, encoding="utf-8")
    program = f"$PY {tmp_path / 'worker.py'} {tmp_path}"
    line = command.replace("PROGRAM", f"PYTHONPATH=. {program}") + "; exit ${PIPESTATUS[0]}"
    code, _, err = shell(line, env)
    assert (tmp_path / "done").exists()
    return code, err, (tmp_path / "train.log").read_text(encoding="utf-8")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command, lost", LOST.values(), ids=LOST.keys())
def test_work_goes_on_without_its_terminal(tmp_path, command, lost, unbuffered):
    """To its end, exit code 0. The log says what was lost, then what was said; before it was named, too."""
    code, err, log = lose(tmp_path, command, {"PYTHONUNBUFFERED": unbuffered})
    assert code == 0 and b"Traceback" not in err
    lines = log.splitlines()
    assert lines[0].startswith("terminal") and "was closed" in lines[0]
    assert {line.split()[1] for line in lines if line.startswith("terminal")} == lost
    for n in range(10, 40):
        assert (f"text {n}" in lines) == ("stdout" in lost)
        assert (f"warning {n}\n" in log) == ("stderr" in lost)
        assert (f"step {n} " in log) == ("stderr" in lost)


@pytest.mark.parametrize("end", ["2>&1 | head -n 2", ">&- 2>&-"])
def test_training_goes_on_without_its_terminal(tmp_path, tiny_model, tiny_recipes, end):
    """All steps, the adapter and the summary, exit code 0; train.log has what nobody took."""
    flags = f"--model {tiny_model} --data {tiny_recipes} --cache {tmp_path}/cache --val_recipes 8"
    flags += f" --max_steps 3 --device cpu --out {tmp_path}/out"
    code, _, err = shell(f"$PY train.py {flags} {end}; exit ${{PIPESTATUS[0]}}")
    assert code == 0 and err == b""
    assert json.loads((tmp_path / "out/summary.json").read_text(encoding="utf-8"))["steps"] == 3
    assert (tmp_path / "out/adapter_model.safetensors").exists()
    log = (tmp_path / "out/train.log").read_text(encoding="utf-8")
    assert log.startswith("terminal     stderr was closed") and "val_loss_after" in log
    assert "loaded " in log and "after step 3" in log and "Traceback" not in log


def test_no_log_is_written_where_the_terminal_stays(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER, encoding="utf-8")
    code, out, _ = shell(f"PYTHONPATH=. $PY {tmp_path / 'worker.py'} {tmp_path}")
    assert code == 0 and out.count(b"text") == 40 and not (tmp_path / "train.log").exists()


def test_work_goes_on_when_the_terminal_hangs_up(tmp_path):
    """An ssh session that ends: each write is EIO. Where a bar was, plain lines are in the log."""
    (tmp_path / "worker.py").write_text(WORKER, encoding="utf-8")
    mine, its = pty.openpty()
    # 24 lines of 80 columns; a new terminal has none, and tqdm draws no bar there.
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    worker = subprocess.Popen(
        [sys.executable, str(tmp_path / "worker.py"), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
    )
    os.close(its)
    shown = b""
    while b"text 3" not in shown:
        shown += os.read(mine, 1000)
    os.close(mine)
    assert worker.wait(60) == 0 and (tmp_path / "done").exists()
    assert b"\rwork" in shown
    log = (tmp_path / "train.log").read_bytes()
    assert log.startswith(b"terminal") and b"Input/output error" in log.splitlines()[0]
    assert b"\r" not in log and b"40/40  step 39" in log


def test_a_log_that_cannot_be_written_ends_no_work(tmp_path):
    """For example on the disk that is full."""
    (tmp_path / "train.log").mkdir()
    (tmp_path / "worker.py").write_text(WORKER, encoding="utf-8")
    code, _, _ = shell(f"PYTHONPATH=. $PY {tmp_path / 'worker.py'} {tmp_path} >&- 2>&-")
    assert code == 0 and (tmp_path / "done").exists()


def test_a_terminal_that_another_program_made_non_blocking_is_waited_for():
    """A pipe holds 64 kB. Python's own stream raises BlockingIOError there."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    code = "def main():\n    for n in range(20): print(str(n) * 9000, flush=True)\n"
    program = subprocess.Popen(
        [sys.executable, "-c", f"import cli\n{code}cli.run(main, outlives_terminal=True)"],
        cwd=ROOT,
        stdout=write,
    )
    os.close(write)
    # Nothing is read for a second, in which the pipe becomes full.
    with pytest.raises(subprocess.TimeoutExpired):
        program.wait(1)
    with open(read, "rb") as pipe:
        out = pipe.read()
    assert program.wait(60) == 0
    assert out.decode() == "".join(str(n) * 9000 + "\n" for n in range(20))


@pytest.mark.parametrize("lost", ["2>&-", "2>/dev/full", "2> >(head -n 0)"])
def test_a_lost_stderr_ends_no_program(lost):
    """What a program prints is on stdout, so receipts that nobody takes are no reason to end."""
    code = "import cli, time"
    code += "\ndef main():\n  for n in range(9): cli.say('n', n); time.sleep(0.02)\n  print('all')"
    code, out, _ = shell(f'$PY -c "{code}\ncli.run(main)" {lost}')
    assert (code, out) == (0, b"all\n")


def test_results_into_a_closed_stdout_are_said_to_be_lost():
    code, _, err = shell('$PY -c "import cli; cli.run(lambda: print(1))" >&-')
    assert code == 0 and b"stdout was closed" in err and b"Traceback" not in err


def test_a_file_does_not_get_the_number_of_a_closed_stdout(tmp_path):
    """What a library prints to descriptor 1 or 2 would go into the first file that is opened."""
    file = tmp_path / "weights"
    code = f"import cli, os; f = open('{file}', 'wb'); g = open('{file}', 'ab')"
    code += "; os.write(1, b'x'); os.write(2, b'y')"
    assert shell(f'$PY -c "{code}" >&- 2>&-')[0] == 0
    assert file.read_bytes() == b""


def test_help_into_a_closed_pipe_is_a_silent_end():
    code = "import cli; cli.run(lambda: cli.parse('', argv=['--help']))"
    code, _, err = shell(f'$PY -c "{code}" | true; exit ${{PIPESTATUS[0]}}')
    assert (code, err) == (0, b"")


# ---- receipts and progress ------------------------------------------------------------------------------------------


def test_a_receipt_is_one_line_on_stderr(capsys):
    cli.say("read", "3 recipes")
    cli.say("", "")
    assert capsys.readouterr() == ("", "read         3 recipes\n\n")


def test_progress_without_a_terminal_is_plain_lines(capsys):
    bar = cli.Progress(4, "train", every=0)
    for n in range(4):
        bar.step(text=f"loss {n}")
    bar.line("saved", "out")
    bar.close()
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and "\r" not in err and "\x1b" not in err
    assert [line.split()[:2] for line in lines] == [
        *(["train", f"{n}/4"] for n in (1, 2, 3, 4)),
        ["saved", "out"],
    ]
    assert "loss 2" in lines[2] and lines[3].endswith(" 0 s left")


def test_progress_without_a_terminal_is_not_a_line_a_step(capsys, monkeypatch):
    """A line every three seconds, and one at the end."""
    now = [100.0]
    monkeypatch.setattr(cli.time, "time", lambda: now[0])
    bar = cli.Progress(16, "train")
    for _ in range(16):
        now[0] += 1
        bar.step()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == [
        "3/16",
        "6/16",
        "9/16",
        "12/16",
        "15/16",
        "16/16",
    ]
    assert [line.split("  ")[-1].strip() for line in lines] == [
        f"{n} s left" for n in (13, 10, 7, 4, 1, 0)
    ]


def test_progress_of_unknown_length(capsys):
    bar = cli.Progress(None, "tokenise", every=0)
    bar.step(2048)
    bar.step(2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split() for line in lines] == [["tokenise", "2048"], ["tokenise", "2050"]]


def test_progress_on_a_terminal_is_a_bar_that_receipts_do_not_tear(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = cli.Progress(3, "train")
    bar.step(2, "loss 1.5")
    bar.line("saved", "out")
    bar.bar.refresh()
    bar.close()
    shown = sys.stderr.getvalue()
    assert "\rtrain" in shown and "2/3" in shown and "loss 1.5" in shown
    assert any(
        line.endswith("\rsaved        out") for line in shown.split("\n")
    )  # at the start of a line


# ---- nothing is silent, nobody spins --------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "wanted"), [(None, "passive"), ("active", "active")])
def test_openmp_waits_asleep_unless_the_user_says_otherwise(given, wanted):
    """Seen by torch: its OpenMP prints what it took from the environment when it is loaded."""
    mine = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    env = {k: v for k, v in os.environ.items() if k not in mine}
    env |= {"OMP_DISPLAY_ENV": "true", "PYTHONPATH": str(ROOT)}
    if given:
        env["OMP_WAIT_POLICY"] = given
    for program in ("train", "sample", "data"):
        code = f"import {program}, torch, os; print(os.environ['OMP_WAIT_POLICY'])"
        code += "; assert ('GOMP_SPINCOUNT' in os.environ) == (os.environ['OMP_WAIT_POLICY'] == 'passive')"
        ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert ran.stdout.strip() == wanted, ran.stderr
        assert f"OMP_WAIT_POLICY = '{wanted.upper()}'" in ran.stderr


def test_a_program_that_says_nothing_for_five_seconds_says_that_it_lives(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(cli.time, "time", lambda: now[0])
    naps = iter([1.0] * 12)

    def sleep(_):
        now[0] += next(naps)

    monkeypatch.setattr(cli.time, "sleep", sleep)
    monkeypatch.setattr(cli, "PULSE", cli.Pulse())
    cli.say("loaded", "a model")
    with pytest.raises(StopIteration):
        cli.PULSE.beat()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].split() == ["loaded", "a", "model"]
    assert [line.split()[1] for line in lines[1:]] == ["5", "10"]


def test_a_long_step_is_not_silent(tmp_path):
    code = """
import cli, time
cli.PULSE.QUIET = 0.5
def main():
    cli.say("work", "begins")
    time.sleep(2.2)
cli.run(main)
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert ran.returncode == 0
    assert ran.stderr.count("since the last line") >= 2


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")])
def test_the_hosts_memory_running_out_is_a_sentence(capsys, error):
    """An array in a file that cannot be mapped, and a process that cannot be forked, are an OSError."""
    code, _, err = ended(capsys, raising(error))
    assert code == 1 and "memory ran out" in err and "Traceback" not in err


@pytest.mark.parametrize("flag", ["--data", "--model", "--cache"])
def test_a_name_that_is_too_long_is_one_sentence(tmp_path, flag):
    name = tmp_path / ("x" * 300)
    done = conftest.program("data.py", flag, name, cwd=tmp_path, check=False)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr
    assert "File name too long" in done.stderr


@pytest.mark.parametrize("flag", ["--out", "--data", "--model"])
def test_links_in_a_circle_are_one_sentence(tmp_path, tiny_model, flag):
    (tmp_path / "loop").symlink_to("loop")
    flags = {"--model": tiny_model, "--data": tmp_path / "none.jsonl", flag: tmp_path / "loop"}
    parts = [part for pair in flags.items() for part in pair]
    done = conftest.program("train.py", *parts, cwd=tmp_path, check=False)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    "name, flag", [("train.py", "--out"), ("train.py", "--model"), ("sample.py", "--run")]
)
def test_a_folder_that_could_not_be_opened_again_is_refused(tmp_path, tiny_model, name, flag):
    """The package safetensors opens no file whose path is no UTF-8."""
    folder = tmp_path / os.fsdecode(b"cr\xe8me")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    done = conftest.program(name, flag, folder, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "the name is no UTF-8" in done.stderr
