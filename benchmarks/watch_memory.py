"""Memory and file handles of a long training, minute by minute: neither may grow.

    python benchmarks/watch_memory.py --minutes 60 -- --out /tmp/hour --max_steps 1000000 --save_every 1m

What follows the -- are flags of train.py, which is started as a user starts it and stopped by a SIGTERM at the end.
Each minute a line on stderr says the step, the memory and the open files; Linux only. stdout has one JSON line: the
figures of the first minute in which a state was there, and of the last minute. Memory is in kB; anonymous memory
(RssAnon) leaves memory-mapped files out.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import cli
from cli import UserError, say

import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass


@dataclass
class Config:
    # fmt: off
    minutes: int = 60                  # how long to train
    every: float = 60.0                # seconds between two lines
    # fmt: on


def arguments(argv):
    """-> (Config, flags of train.py)"""
    if "--out" not in argv or "--" not in argv:
        raise UserError("name the run's folder: … -- --out FOLDER, among the flags of train.py.")
    at = argv.index("--")
    (cfg,) = cli.parse(__doc__, Config, argv=argv[:at])
    cli.bound(cfg, minutes=1, every=0.1)
    return cfg, argv[at + 1 :]


def figures(number, out):
    """What the system says of a process, and the steps of its run so far."""
    found = {}
    for line in Path(f"/proc/{number}/status").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key in ("VmRSS", "RssAnon"):
            found[key] = int(value.split()[0])  # kB
    found["threads"] = len(os.listdir(f"/proc/{number}/task"))
    found["files"] = len(os.listdir(f"/proc/{number}/fd"))
    return found | {"step": step_of(out), "saved": step_of_state(out)}


def step_of(out):
    metrics = out / "metrics.jsonl"
    if not metrics.exists():
        return None
    lines = metrics.read_text(encoding="utf-8").split("\n")[:-1]
    return json.loads(lines[-1])["step"] if lines else None


def step_of_state(out):
    state = out / "state.json"
    if not state.exists():
        return None
    return json.loads(state.read_text(encoding="utf-8"))["step"]


def main():
    cfg, flags = arguments(sys.argv[1:])
    out = Path(flags[flags.index("--out") + 1])
    program = Path(__file__).parents[1] / "train.py"
    process = subprocess.Popen([sys.executable, str(program), *flags], stdout=subprocess.DEVNULL)
    until = time.monotonic() + 60 * cfg.minutes
    first = last = None
    while time.monotonic() < until and process.poll() is None:
        time.sleep(cfg.every)
        if process.poll() is None:
            last = figures(process.pid, out)
            say("watch", json.dumps(last))
        if first is None and last and last["saved"]:
            first = last
    ended_early = process.poll() is not None
    if not ended_early:
        process.send_signal(signal.SIGTERM)
    code = process.wait()
    print(json.dumps({"first": first, "last": last, "exit_code": code}), flush=True)
    return 1 if ended_early else 0


if __name__ == "__main__":
    cli.run(main)
