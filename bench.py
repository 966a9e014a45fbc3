"""Measure speed and memory of training. A numbered row is a set of train.py flags (README.md lists them): each is run
as a user runs train.py, on a model with random weights.

    python bench.py                                # every row, on a model of Llama-3-8B's size
    python bench.py --rows 1 2 4 --peers unsloth   # and train with Unsloth on recipes of the same lengths

stdout has one JSON line for each row. Tokens per second leave padding out, and the share of padding is a number of its
own. The random model is written once and used again. Recipes and tokenizer are made up, too: one word is one token, so
lengths are exact.

The other trainers (peers) multiply in bf16, as row 1 does. Rows that pass --fp8 to train.py multiply in 8-bit floats:
for equal arithmetic compare a peer with row 1.
"""

import cli
from cli import UserError, say

import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np

from files.made_up import SHAPES, make_model, make_recipes

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Row:
    what: str
    lengths: str  # of the recipes: fixed, long or sorted, see `lengths_of`
    batch: int  # recipes in a batch
    flags: str  # of train.py

    @property
    def is_sorted(self):
        return self.lengths == "sorted"


NF4 = "--quant nf4"
CKPT = "--grad_ckpt --compile --optim adamw8bit"
PACKED = f"{NF4} {CKPT} --fp8 --cuda_graph --batching packed --batch_tokens"
ROWS = {
    "1": Row(
        "32 x 256, bf16 matmuls",
        lengths="fixed",
        batch=32,
        flags=f"{NF4} {CKPT} --offload_ckpt --attn cudnn",
    ),
    "2": Row(
        "32 x 256, fp8 matmuls",
        lengths="fixed",
        batch=32,
        flags=f"{NF4} {CKPT} --offload_ckpt --attn cudnn --fp8",
    ),
    "3": Row(
        "no checkpoints",
        lengths="fixed",
        batch=48,
        flags="--quant fp8 --fp8 --compile --optim adamw8bit --attn cudnn",
    ),
    "4": Row(
        "16 recipes, sorted",
        lengths="sorted",
        batch=16,
        flags=f"{NF4} {CKPT} --fp8 --cuda_graph",
    ),
    "5": Row(
        "16 recipes, sorted, bf16 weights",
        lengths="sorted",
        batch=16,
        flags=f"{CKPT} --fp8 --cuda_graph",
    ),
    "6": Row(
        "1 x 2048, least memory",
        lengths="long",
        batch=1,
        flags=f"{NF4} {CKPT} --offload_ckpt --offload_embed --attn cudnn",
    ),
    "7": Row("to the first step", lengths="fixed", batch=32, flags=f"{NF4} {CKPT} --fp8"),
    "8": Row("recipes of row 4, packed", lengths="sorted", batch=16, flags=f"{PACKED} 4096"),
    "9": Row("8,192 tokens", lengths="sorted", batch=16, flags=f"{PACKED} 8192"),
}
WARM_UP = 3  # steps that do not count, because they compile and load kernels
SORTED_BATCHES = 20  # batches in an epoch of a sorted row: 320 recipes, 16 in a batch
PEERS = {"unsloth": "unsloth", "liger": "liger_kernel", "hf": "peft"}  # {peer: its package}


@dataclass
class Config:
    # fmt: off
    shape: str = "8b"                  # size of the random model: 8b (Llama-3-8B), 1b or tiny
    rows: list[str] = field(default_factory=lambda: list(ROWS))  # numbers of the rows (sets of train.py flags)
    steps: int = 14                    # optimiser steps per row, 3 of them untimed; sorted recipes always make 60
    peers: list[str] = field(default_factory=list)  # other trainers to measure, too: unsloth, liger, hf
    peer: str = ""                     # internal: bench.py sets this flag to measure one other trainer in this process
    cache: str = ".cache"              # folder for the made-up model and recipes; if relative, in the code's folder
    device: str = "auto"               # device that train.py runs on: auto, cuda, mps or cpu
    # fmt: on


def check(cfg):
    """Refuse wrong flags before anything is made."""
    cli.bound(cfg, steps=WARM_UP + 1)
    for row in cfg.rows:
        if row not in ROWS:
            raise UserError(f"--rows: there is no row {row}; choose among {', '.join(ROWS)}.")
    if cfg.shape not in SHAPES:
        raise UserError(f"--shape {cfg.shape} is none of {', '.join(SHAPES)}.")
    for tool in [*cfg.peers, cfg.peer]:
        if tool and tool not in PEERS:
            raise UserError(f"--peers {tool}: not one of {', '.join(PEERS)}.")


def check_installed(peers):
    installed = {d.name.replace("-", "_") for d in metadata.distributions()}
    for tool in peers:
        if PEERS[tool] not in installed:
            raise UserError(f"--peers {tool}: {PEERS[tool]} is not installed here.")


# --- the made-up recipes ---


def lengths_of(kind, rows, steps):
    """Lengths in tokens: all 2,048 or 256, or for sorted rows log-normal, as the lengths of recipes are.

    The log-normal ones have a median of 200 and a sigma of 0.45, and are cut to 48 to 512."""
    if kind == "long":
        return [2048] * (rows * steps)
    if kind == "fixed":
        return [256] * (rows * steps)
    drawn = np.random.default_rng(1).lognormal(np.log(200), 0.45, 320)
    return np.clip(drawn, 48, 512).astype(int).tolist()


# --- a row: train.py in a process of its own ---


def run_row(cfg, name, root):
    """Run train.py on a row's recipes with its flags. -> the figures of its metrics.jsonl and summary.json"""
    row = ROWS[name]
    # Make three epochs of sorted batches and count the last, because by then every CUDA graph is recorded.
    steps = 3 * SORTED_BATCHES if row.is_sorted else cfg.steps
    vocab = SHAPES[cfg.shape].vocab
    out = root / f"row{name}"
    recipes = make_recipes(
        root / f"row{name}.jsonl", lengths_of(row.lengths, row.batch, steps), vocab
    )
    held_out = make_recipes(root / "held_out.jsonl", [256] * 2, vocab)
    shutil.rmtree(out, ignore_errors=True)
    done = subprocess.run(
        train_command(cfg, row, steps, [root / cfg.shape, recipes, held_out, out]),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        cwd=Path(__file__).parent,
        check=False,
    )
    head = {"row": name, "what": row.what}
    if done.returncode:
        return head | {"error": " | ".join(done.stderr.splitlines()[-9:])}
    return head | {"flags": row.flags} | rates_of_run(out, row) | figures_of_run(out)


def train_command(cfg, row, steps, paths):
    model, recipes, held_out, out = paths
    never = 10**6
    flags = {
        "--model": model,
        "--data": recipes,
        "--val_data": held_out,
        "--val_recipes": 2,
        "--out": out,
        "--max_len": 2049,
        "--batch_size": row.batch,
        "--max_steps": steps,
        "--eval_every": never,
        "--save_every": never,
        "--cache": cfg.cache,
        "--lr": 1e-4,
        "--device": cfg.device,
    }
    command = [sys.executable, "train.py", "--no-clean"]
    for flag, value in flags.items():
        command += [flag, str(value)]
    return command + row.flags.split()


def rates_of_run(out, row):
    """Tokens a second and padding of the steps that count; for sorted rows also the speed of new lengths."""
    metrics = (out / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in metrics.splitlines()]
    steps = lines[1:]
    counted = steps[2 * SORTED_BATCHES :] if row.is_sorted else steps[WARM_UP:]
    found = summary_of_rates([step["tokens_per_s"] for step in counted])
    found["padding"] = round(statistics.mean(step["padding"] for step in counted), 4)
    if row.is_sorted:
        new = steps[WARM_UP:SORTED_BATCHES]
        found["new_lengths_median"] = statistics.median(step["tokens_per_s"] for step in new)
    return found


def summary_of_rates(rates):
    return {
        "tokens_per_s": round(statistics.median(rates)),
        "low": round(min(rates)),
        "high": round(max(rates)),
        "steps": len(rates),
    }


FIGURES = [
    "load_s",
    "load_peak_gb",
    "to_first_step_s",
    "first_step_s",
    "graphs",
    "graphs_after_step_10",
    "host_share",
    "waiting_share",
]


def figures_of_run(out):
    """The figures that train.py measured. Seconds to the first step count from the start of its process."""
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    found = {name: summary[name] for name in FIGURES}
    found["peak_gb"] = summary["peak_mem_gb"]
    found["reserved_gb"] = summary["reserved_mem_gb"]
    return found


# --- a peer: its own model in a plain training loop, on recipes of the same lengths ---


def load_peer(tool, folder, nf4, ckpt):
    """A peer's model with an adapter, ready to train: Unsloth, transformers + peft (hf), or these with Liger."""
    if tool == "unsloth":
        return load_unsloth(folder, nf4, ckpt)
    if tool == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    return load_transformers(folder, nf4, ckpt)


def load_unsloth(folder, nf4, ckpt):
    # Import Unsloth before transformers, because Unsloth patches transformers.
    import torch
    from unsloth import FastLanguageModel

    checkpoints = "unsloth" if ckpt else False
    base, _ = FastLanguageModel.from_pretrained(
        str(folder),
        load_in_4bit=nf4,
        dtype=torch.bfloat16,
        max_seq_length=2048,
        use_exact_model_name=True,
        use_gradient_checkpointing=checkpoints,
        local_files_only=True,
    )
    model = FastLanguageModel.get_peft_model(
        base,
        r=16,
        lora_alpha=32,
        target_modules=LINEARS,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing=checkpoints,
        random_state=1,
    )
    switched = FastLanguageModel.for_training(model, use_gradient_checkpointing=checkpoints)
    return switched or model


def load_transformers(folder, nf4, ckpt):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quant = None
    if nf4:
        quant = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    base = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        quantization_config=quant,
        device_map={"": 0},
        attn_implementation="sdpa",
    )
    base.config.use_cache = False
    if ckpt:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS)
    return get_peft_model(base, adapter).train()


@dataclass(frozen=True)
class PeerRow:
    """The part of a row that a peer knows. Rows 1 and 2 differ only in --fp8, so they are one row of a peer."""

    lengths: str
    batch: int
    nf4: bool
    ckpt: bool


def peer_row(name):
    row = ROWS[name]
    if name == "3":
        # Without checkpoints a card of 80 GB holds no more of a peer than NF4 weights and 32 sorted recipes.
        return PeerRow("sorted", 32, nf4=True, ckpt=False)
    return PeerRow(row.lengths, row.batch, nf4=NF4 in row.flags, ckpt=True)


def run_peer(tool, cfg, root):
    """Measure a peer in this process. stdout has one JSON line for each different PeerRow."""
    began = time.time()
    done = set()
    model = loaded = None
    for name in cfg.rows:
        row = peer_row(name)
        if row in done or name == "7":
            continue
        done.add(row)
        if loaded != (row.nf4, row.ckpt):
            # Free the old model before the next one is loaded.
            model = None
            model = load_peer(tool, root / cfg.shape, row.nf4, row.ckpt)
            loaded = (row.nf4, row.ckpt)
            load_s = round(time.time() - began, 1)
        result = {"row": name, "peer": tool, "lengths": row.lengths, "batch": row.batch}
        result |= measure_peer(model, row, cfg, began)
        result |= {"load_s": load_s, "version": metadata.version(PEERS[tool])}
        print(json.dumps(result), flush=True)


def measure_peer(model, row, cfg, began):
    """Train the peer's model on the row's lengths. -> tokens a second, memory, seconds to the first step"""
    import bitsandbytes
    import torch

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = bitsandbytes.optim.AdamW8bit(trained, lr=1e-4)
    lengths = sorted(lengths_of(row.lengths, row.batch, cfg.steps), reverse=True)
    batches = [lengths[i : i + row.batch] for i in range(0, len(lengths), row.batch)]
    is_sorted = row.lengths == "sorted"
    # Make two epochs of sorted batches and count the second, because by then each length has come before.
    epochs, uncounted = (2, len(batches)) if is_sorted else (1, WARM_UP)
    rates, to_first_step = [], None
    for batch in batches * epochs:
        took = peer_step(model, optimizer, batch, SHAPES[cfg.shape].vocab)
        rates.append(sum(batch) / took)
        if to_first_step is None:
            to_first_step = round(time.time() - began, 1)
    found = summary_of_rates(rates[uncounted:])
    if is_sorted:
        found["new_lengths_median"] = statistics.median(rates[WARM_UP:uncounted])
    found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    found["reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
    found["to_first_step_s"] = to_first_step
    return found


def peer_step(model, optimizer, lengths, vocab):
    """Make one step on random tokens, padded to the longest. -> seconds"""
    import torch

    is_real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # (R, T)
    ids = torch.randint(2, vocab, is_real.shape) * is_real
    batch = {"input_ids": ids, "labels": ids.masked_fill(~is_real, -100)}
    if not is_real.all():
        batch["attention_mask"] = is_real.long()
    torch.cuda.synchronize()
    start = time.time()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(**{name: tensor.cuda() for name, tensor in batch.items()}).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    return time.time() - start


def start_peer(tool, cfg):
    """Run bench.py again for one peer, in a process of its own, because some peers patch transformers."""
    values = dataclasses.asdict(cfg) | {"peer": tool}
    flags = [f"--{name}={value}" for name, value in values.items() if not isinstance(value, list)]
    # Keep the peers off the network: they need nothing but the folder.
    offline = ["env", "HF_HUB_OFFLINE=1", "UNSLOTH_DISABLE_STATISTICS=1"]
    command = [*offline, sys.executable, __file__, *flags, "--rows", *cfg.rows]
    subprocess.run(command, check=False)


def main():
    (cfg,) = cli.parse(__doc__, Config)
    check(cfg)
    check_installed(cfg.peers)
    root = Path(__file__).parent / cfg.cache / "bench"
    if cfg.peer:
        return run_peer(cfg.peer, cfg, root)
    make_model(root / cfg.shape, cfg.shape)
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    say("bench", f"{cfg.shape} on {card}, torch {torch.__version__}")
    for name in cfg.rows:
        result = run_row(cfg, name, root)
        result |= {"card": card, "torch": torch.__version__}
        print(json.dumps(result), flush=True)
    for tool in cfg.peers:
        start_peer(tool, cfg)
    return 0


if __name__ == "__main__":
    cli.run(main)
