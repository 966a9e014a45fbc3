"""Hold --plan beside what train.py measures, in many settings, several of them in a process.

    python benchmarks/plan_on_card.py                                  # 40 settings on a GPU of 80 GB, about 10 minutes
    python benchmarks/plan_on_card.py --shapes 1b 8b --cells extra     # two sizes, the eight further settings
    python benchmarks/plan_on_card.py --read results/plan.json         # plan again what was measured before
    python benchmarks/plan_on_card.py --fit 24 40                      # what --fit chooses, beside other flags

stdout has one JSON line a setting: peak memory and tokens a second, planned and measured. results/plan.json keeps them.
A setting is train.py --compile on made-up recipes of one length and random weights, six steps of it.

main cells: {135m, 1b, 3b, 8b} x {bf16, nf4} x {--grad_ckpt, none} x {32 x 256, 2 x 2,048 tokens}
extra cells: --fp8, --offload_ckpt, --offload_embed, --cuda_graph, --ckpt_blocks

--fit holds this process to so many GB (set_per_process_memory_fraction) and trains 8B with what --fit chooses, with the
plan's next five choices, and with the flags of rows 2 and 4 of bench.py in batches of 16, 32 and 64.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import cli
from cli import UserError, say

import contextlib
import gc
import io
import itertools
import json
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from files import disk
from files.made_up import SHAPES, make_model, make_recipes, model_config

ROOT = Path(__file__).parents[1]
BATCHES = [(32, 256), (2, 2048)]
STEPS = 6
WARM_UP = 2  # steps whose speed does not count


@dataclass
class Config:
    # fmt: off
    shapes: list[str] = field(default_factory=lambda: ["135m", "1b", "3b", "8b"])  # sizes of the random models
    cells: list[str] = field(default_factory=lambda: ["main", "extra"])            # which settings: main, extra
    fit: list[float] = field(default_factory=list)  # GB: measure what --fit chooses on a card of so many; none: cells
    read: str = ""                     # file of earlier results: plan its settings again, without training
    to: str = ""                       # file for the results, a JSON list; none: stdout alone
    warm: bool = True                  # first compile the graphs of all sizes, a process each at the same time
    compile_only: bool = False         # internal: --warm sets this flag for its processes
    seconds: int = 100000              # begin no further setting after so many seconds
    cache: str = ".cache"              # folder for the made-up models; if relative, in the code's folder
    # fmt: on


class Cell(NamedTuple):
    """A setting."""

    shape: str
    rows: int
    tokens: int  # of a row
    flags: str  # of train.py


EXTRA = [
    Cell("8b", 32, 256, "--quant nf4 --grad_ckpt --fp8"),
    Cell("8b", 32, 256, "--quant fp8 --fp8 --optim adamw8bit"),
    Cell(
        "8b", 32, 256, "--quant nf4 --grad_ckpt --fp8 --offload_ckpt --optim adamw8bit --attn cudnn"
    ),
    Cell("8b", 2, 2048, "--quant nf4 --grad_ckpt --offload_ckpt --offload_embed --optim adamw8bit"),
    Cell("8b", 32, 256, "--quant nf4 --grad_ckpt --fp8 --cuda_graph --optim adamw8bit"),
    Cell("8b", 32, 256, "--quant fp8 --fp8 --grad_ckpt --ckpt_blocks 16"),
    Cell("1b", 2, 2048, "--quant nf4 --grad_ckpt --fp8 --cuda_graph"),
    Cell("1b", 32, 256, "--fp8 --grad_ckpt"),
]


def cells_of(cfg):
    """[(shape, rows, tokens of a row, flags)]"""
    cells = []
    if "main" in cfg.cells:
        ways = itertools.product(cfg.shapes, ["", "--quant nf4"], ["", "--grad_ckpt"], BATCHES)
        for shape, quant, ckpt, (rows, tokens) in ways:
            cells.append(Cell(shape, rows, tokens, f"{quant} {ckpt}".strip()))
    if "extra" in cfg.cells:
        cells += [cell for cell in EXTRA if cell.shape in cfg.shapes]
    return cells


def arguments(argv):
    """-> Config"""
    (cfg,) = cli.parse(__doc__, Config, argv=argv)
    for shape in cfg.shapes:
        if shape not in SHAPES:
            raise UserError(f"--shapes {shape} is none of {', '.join(SHAPES)}.")
    for which in cfg.cells:
        if which not in ("main", "extra"):
            raise UserError(f"--cells {which} is neither main nor extra.")
    return cfg


def words_of(cell, root, cache, steps=STEPS):
    """The command line of train.py for a setting, without the program's name."""
    shape, rows, tokens, flags = cell
    vocab = SHAPES[shape].vocab
    # A recipe's end token is a target only, so as many words make a row of as many tokens.
    lengths = [tokens] * (rows * steps)
    recipes = make_recipes(root / f"{rows}x{tokens}-{vocab}.jsonl", lengths, vocab)
    held_out = make_recipes(root / f"held_out-{vocab}.jsonl", [256] * 2, vocab)
    values = {
        "model": root / shape,
        "data": recipes,
        "val_data": held_out,
        "val_recipes": 2,
        "out": root / "out",
        "max_len": 2049,
        "batch_size": rows,
        "max_steps": steps,
        "eval_every": 10**6,
        "save_every": 10**6,
        "cache": cache,
        "lr": 1e-4,
    }
    words = ["--no-clean", "--compile"]
    for name, value in values.items():
        words += [f"--{name}", str(value)]
    # The flags of the setting come last, so that a --batch_size there counts.
    return words + flags.split()


def call(words):
    """Run train.py's main in this process. -> what it printed on stdout"""
    import train

    sys.argv = ["train.py", *words]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        train.main()
    return printed.getvalue()


def warm(cfg):
    """Fill the compiler's cache on disk: a process a size, because one process compiles on few cores."""
    processes = []
    for shape in cfg.shapes:
        command = [sys.executable, __file__, "--compile_only", "--cache", cfg.cache]
        command += ["--shapes", shape, "--cells", *cfg.cells]
        processes.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
    until = time.time() + 150
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(1, until - time.time()))
        # SIGKILL, because train.py finishes its step and saves at any other signal.
        process.kill()


def compile_only(cfg, root):
    """A process of `warm`: two steps of each setting, with few tokens, in a folder of its own."""
    own = root / f"warm-{cfg.shapes[0]}"
    own.mkdir(exist_ok=True)
    shutil.rmtree(own / "out", ignore_errors=True)
    small = [cell._replace(rows=2, tokens=2048) for cell in cells_of(cfg)]
    for cell in dict.fromkeys(small):
        link = own / cell.shape
        if not link.exists():
            link.symlink_to(root / cell.shape)
        with contextlib.suppress(UserError):
            call(words_of(cell, own, cfg.cache, steps=2))


def measure(cell, root, cache):
    """Train a setting. -> {"peak_gb", "tokens_per_s", "reserved_gb"}, or {"error"} where memory ran out"""
    import torch

    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held_before = torch.cuda.memory_allocated()
    try:
        call(words_of(cell, root, cache))
    except UserError as e:
        return {"error": str(e)[:300]}
    summary = json.loads((root / "out" / "summary.json").read_text(encoding="utf-8"))
    metrics = (root / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rates = [json.loads(line)["tokens_per_s"] for line in metrics]
    return {
        "peak_gb": summary["peak_mem_gb"],
        "reserved_gb": round(summary["reserved_mem_gb"], 3),
        "held_before_gb": round(held_before / 1e9, 3),
        "tokens_per_s": round(statistics.median(rates[1 + WARM_UP :]), 1),
        "first_step_s": round(summary["first_step_s"], 1),
    }


def plan_of(cell, root, cache, card):
    """The planner.Plan of a setting. card: a rate.Card, so that it is measured once and not for each setting"""
    import data
    import model
    import planner
    import train
    from recipes import Rules

    shape, rows, tokens, _ = cell
    argv = words_of(cell, root, cache)
    cfg, data_cfg, _ = cli.parse("", train.Config, data.Data, Rules, argv=argv)
    config = model.read_config(made(root, shape))
    lengths = np.full(rows * STEPS, tokens + 1)
    return planner.of_run(config, cfg, data_cfg, lengths, STEPS, card)


def planned(cell, root, cache, card):
    """What --plan says of a setting."""
    import planner

    plan = plan_of(cell, root, cache, card)
    return planner.as_json(plan, plan.peak)


def made(root, shape):
    """A folder with the config.json of a size, which is all that a plan reads."""
    folder = root / shape
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        disk.write_json(folder / "config.json", model_config(SHAPES[shape]))
    return folder


def compared(cell, plan, measured):
    """A row of results/plan.json."""
    shape, rows, tokens, flags = cell
    row = {"shape": shape, "batch": [rows, tokens], "flags": flags}
    for key in ("peak_gb", "tokens_per_s"):
        row[f"plan_{key}"] = plan[key]
        row[key] = measured.get(key)
        if measured.get(key):
            row[f"off_{key}"] = round(plan[key] / measured[key] - 1, 4)
    row["plan_needed_gb"] = plan["needed_gb"]
    return row | {key: value for key, value in measured.items() if key not in row}


# --- --fit ---

ALLOW = "quant,fp8,batch"
ROWS = {
    "row 2": "--quant nf4 --grad_ckpt --offload_ckpt --attn cudnn --fp8",
    "row 4": "--quant nf4 --grad_ckpt --cuda_graph --fp8",
}


def measure_fit(room, root, cache, card):
    """Yield what is printed for a card of `room` GB: what --fit chooses, the next five, rows 2 and 4."""
    import torch

    import fit

    total = torch.cuda.get_device_properties(0).total_memory
    # CUDA's context is outside what torch allocates.
    torch.cuda.set_per_process_memory_fraction((room * 1e9 - card.context) / total)
    usual = Cell("8b", 32, 256, "--optim adamw8bit")
    chosen = f"{usual.flags} --fit {room:g} --allow {ALLOW}"
    ways = {"fit": usual._replace(flags=chosen)}
    plan = plan_of(usual, root, cache, card)
    best = fit.ranked(plan, room * 1e9, ALLOW)
    for number, (flags, _) in enumerate(best[1:6], 2):
        ways[f"plan {number}"] = usual._replace(flags=f"{usual.flags} {fit.written(flags)}")
    for name, flags in ROWS.items():
        for rows in (16, 32, 64):
            ways[f"{name}, batch {rows}"] = usual._replace(
                rows=rows, flags=f"{usual.flags} {flags}"
            )
    for name, cell in ways.items():
        row = {"room_gb": room, "way": name, "rows": cell.rows, "flags": cell.flags}
        yield row | measure(cell, root, cache)
    torch.cuda.set_per_process_memory_fraction(1.0)


# --- all of it ---


def summary_of(rows):
    """How far the plan was off, for README.md."""
    offs = [abs(row["off_peak_gb"]) for row in rows if "off_peak_gb" in row]
    rates = [abs(row["off_tokens_per_s"]) for row in rows if "off_tokens_per_s" in row]
    return {
        "settings": len(rows),
        "peak_within_5_percent": sum(off <= 0.05 for off in offs),
        "peak_within_10_percent": sum(off <= 0.1 for off in offs),
        "worst_peak": max(offs),
        "median_peak": statistics.median(offs),
        "tokens_per_s_within_25_percent": sum(off <= 0.25 for off in rates),
        "worst_tokens_per_s": max(rates),
    }


def card_of(before):
    """The measured Card of this machine, or that of earlier results: before"""
    import torch

    from speed import rate

    if before:
        return rate.Card(**before)
    from speed import memory

    shape = memory.Shape(C=4096, F=14336, L=1, H=32, K=8, D=128, V=128256, tied=False)
    return rate.measured(torch.device("cuda"), shape, fp8=True)


def plan_again(rows, card, cfg, root):
    """--read: rows of the settings that were measured before."""
    for row in rows:
        cell = Cell(row["shape"], *row["batch"], row["flags"])
        yield compared(cell, planned(cell, root, cfg.cache, card), row)


def measure_cells(card, cfg, root):
    """Rows of all settings, as long as there is time."""
    began = time.time()
    for shape in cfg.shapes:
        make_model(root / shape, shape)
    if cfg.warm:
        warm(cfg)
    for cell in cells_of(cfg):
        if time.time() - began > cfg.seconds:
            say("time", f"is over before {cell}")
            return
        plan = planned(cell, root, cfg.cache, card)
        yield compared(cell, plan, measure(cell, root, cfg.cache))


def show_fits(cfg, root):
    make_model(root / "8b", "8b")
    card = card_of(None)
    for room in cfg.fit:
        for row in measure_fit(room, root, cfg.cache, card):
            print(json.dumps(row), flush=True)


def show_cells(cfg, root):
    if cfg.read:
        before = json.loads(Path(cfg.read).read_text(encoding="utf-8"))
        card = card_of(before["card"])
        found = plan_again(before["rows"], card, cfg, root)
    else:
        card = card_of(None)
        found = measure_cells(card, cfg, root)
    rows = []
    for row in found:
        rows.append(row)
        print(json.dumps(row), flush=True)
    summary = summary_of(rows)
    print(json.dumps(summary))
    if cfg.to:
        Path(cfg.to).parent.mkdir(exist_ok=True)
        disk.write_json(Path(cfg.to), {"card": vars(card), "summary": summary, "rows": rows})


def main():
    cfg = arguments(sys.argv[1:])
    root = ROOT / cfg.cache / "plan"
    root.mkdir(parents=True, exist_ok=True)
    if cfg.compile_only:
        compile_only(cfg, root)
    elif cfg.fit:
        show_fits(cfg, root)
    else:
        show_cells(cfg, root)
    return 0


if __name__ == "__main__":
    cli.run(main)
