"""Hold --plan beside what train.py measures, in many settings, several of them in a process.

    python benchmarks/plan_on_card.py                                  # 40 settings on a GPU of 80 GB, about 12 minutes
    python benchmarks/plan_on_card.py --shapes 1b 8b --cells extra     # two sizes, the eight further settings
    python benchmarks/plan_on_card.py --read results/plan.json         # plan again what was measured before

stdout has one JSON line a setting: peak memory and tokens a second, planned and measured. results/plan.json keeps them.
A setting is train.py --compile on made-up recipes of one length and random weights, six steps of it.

main cells: {135m, 1b, 3b, 8b} x {bf16, nf4} x {--grad_ckpt, none} x {32 x 256, 2 x 2,048 tokens}
extra cells: --fp8, --offload_ckpt, --offload_embed, --cuda_graph, --ckpt_blocks
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
import statistics
import time
from dataclasses import dataclass, field

from files import disk
from files.made_up import SHAPES, make_model, make_recipes

ROOT = Path(__file__).parents[1]
BATCHES = [(32, 256), (2, 2048)]
STEPS = 6
WARM_UP = 2  # steps whose speed does not count


@dataclass
class Config:
    # fmt: off
    shapes: list[str] = field(default_factory=lambda: ["135m", "1b", "3b", "8b"])  # sizes of the random models
    cells: list[str] = field(default_factory=lambda: ["main", "extra"])            # which settings: main, extra
    read: str = ""                     # file of earlier results: plan its settings again, without training
    to: str = ""                       # file for the results, a JSON list; none: stdout alone
    seconds: int = 100000              # begin no further setting after so many seconds
    cache: str = ".cache"              # folder for the made-up models; if relative, in the code's folder
    # fmt: on


EXTRA = [
    ("8b", 32, 256, "--quant nf4 --grad_ckpt --fp8"),
    ("8b", 32, 256, "--quant fp8 --fp8 --optim adamw8bit"),
    ("8b", 32, 256, "--quant nf4 --grad_ckpt --fp8 --offload_ckpt --optim adamw8bit --attn cudnn"),
    ("8b", 2, 2048, "--quant nf4 --grad_ckpt --offload_ckpt --offload_embed --optim adamw8bit"),
    ("8b", 32, 256, "--quant nf4 --grad_ckpt --fp8 --cuda_graph --optim adamw8bit"),
    ("8b", 32, 256, "--quant fp8 --fp8 --grad_ckpt --ckpt_blocks 16"),
    ("1b", 2, 2048, "--quant nf4 --grad_ckpt --fp8 --cuda_graph"),
    ("1b", 32, 256, "--fp8 --grad_ckpt"),
]


def cells_of(cfg):
    """[(shape, rows, tokens of a row, flags)]"""
    cells = []
    if "main" in cfg.cells:
        ways = itertools.product(cfg.shapes, ["", "--quant nf4"], ["", "--grad_ckpt"], BATCHES)
        for shape, quant, ckpt, (rows, tokens) in ways:
            cells.append((shape, rows, tokens, f"{quant} {ckpt}".strip()))
    if "extra" in cfg.cells:
        cells += [cell for cell in EXTRA if cell[0] in cfg.shapes]
    return cells


def arguments(cell, root, cache):
    """The command line of train.py for a setting, without the program's name."""
    shape, rows, tokens, flags = cell
    vocab = SHAPES[shape].vocab
    # A recipe's end token is a target only, so as many words make a row of as many tokens.
    lengths = [tokens] * (rows * STEPS)
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
        "max_steps": STEPS,
        "eval_every": 10**6,
        "save_every": 10**6,
        "cache": cache,
        "lr": 1e-4,
    }
    words = ["--no-clean", "--compile", *flags.split()]
    for name, value in values.items():
        words += [f"--{name}", str(value)]
    return words


def call(words):
    """Run train.py's main in this process. -> what it printed on stdout"""
    import train

    sys.argv = ["train.py", *words]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        train.main()
    return printed.getvalue()


def measure(cell, root, cache):
    """Train a setting. -> {"peak_gb", "tokens_per_s", "reserved_gb"}, or {"error"} where memory ran out"""
    import torch

    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held_before = torch.cuda.memory_allocated()
    try:
        call(arguments(cell, root, cache))
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


def planned(cell, root, cache, card):
    """What --plan says of a setting. card: a rate.Card, so that it is measured once and not for each setting"""
    import data
    import fit  # noqa: F401 train.py needs it
    import model
    import planner
    import train
    from recipes import Rules

    sys.argv = ["train.py", *arguments(cell, root, cache)]
    cfg, data_cfg, _ = cli.parse("", train.Config, data.Data, Rules)
    shape, rows, tokens, _ = cell
    import numpy as np

    lengths = np.full(rows * STEPS, tokens + 1)
    config = model.read_config(root / shape)
    plan = planner.of_run(config, cfg, data_cfg, lengths, STEPS, card)
    return planner.as_json(plan, plan.peak)


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


def card_of(name):
    """The measured Card of this machine. name: of the card whose figures are read again"""
    import torch

    from speed import rate

    if name:
        return rate.Card(**name)
    from planner import memory

    shape = memory.Shape(C=4096, F=14336, L=1, H=32, K=8, D=128, V=128256, tied=False)
    return rate.measured(torch.device("cuda"), shape, fp8=True)


def main():
    (cfg,) = cli.parse(__doc__, Config)
    began = time.time()
    root = ROOT / cfg.cache / "plan"
    root.mkdir(parents=True, exist_ok=True)
    before = {"card": None, "rows": []}
    if cfg.read:
        before = json.loads(Path(cfg.read).read_text(encoding="utf-8"))
    card = card_of(before["card"])
    rows = []
    earlier = iter(before["rows"])
    for cell in [tuple_of(row) for row in before["rows"]] or cells_of(cfg):
        if time.time() - began > cfg.seconds:
            say("time", f"is over before {cell}")
            break
        make_model(root / cell[0], cell[0])
        plan = planned(cell, root, cfg.cache, card)
        measured = next(earlier) if cfg.read else measure(cell, root, cfg.cache)
        rows.append(compared(cell, plan, measured))
        print(json.dumps(rows[-1]), flush=True)
    found = {"card": vars(card), "summary": summary_of(rows), "rows": rows}
    print(json.dumps(found["summary"]))
    if cfg.to:
        Path(cfg.to).parent.mkdir(exist_ok=True)
        disk.write_json(Path(cfg.to), found)
    return 0


def tuple_of(row):
    return row["shape"], *row["batch"], row["flags"]


if __name__ == "__main__":
    cli.run(main)
