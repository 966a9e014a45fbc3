"""How fast, in how much memory: each row runs train.py as a user does, on random weights of a given shape.

    python bench.py                              # every row, on Llama-3-8B's shape
    python bench.py --rows 1 2 4 --peers unsloth   # recipes of the same lengths through Unsloth

One JSON line a row on stdout, as it goes. Only real tokens count; padding is a number of its own. The weights are made
once, as a Hugging Face folder with shards; a word of the made-up tokenizer is a token, so a recipe's length is exact.
"""

import dataclasses
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np

import cli
import lora
from cli import UserError, say

SHAPES = {  # C, F, blocks, H, K, V
    "8b": (4096, 14336, 32, 32, 8, 128256),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "tiny": (256, 512, 2, 4, 2, 1024),
}

CKPT, NF4 = ["--grad_ckpt", "--compile", "--optim", "adamw8bit"], ["--quant", "nf4"]
PACKED = [*NF4, *CKPT, "--fp8", "--cuda_graph", "--batching", "packed", "--batch_tokens"]
ROWS = {  # row: what, its lengths, recipes in a batch, flags
    "1": (
        "32 x 256, bf16 matmuls",
        "fixed",
        32,
        [*NF4, *CKPT, "--offload_ckpt", "--attn", "cudnn"],
    ),
    "2": (
        "32 x 256, fp8 matmuls",
        "fixed",
        32,
        [*NF4, *CKPT, "--offload_ckpt", "--attn", "cudnn", "--fp8"],
    ),
    "3": ("no checkpoints", "fixed", 48, ["--quant", "fp8", "--fp8", *CKPT[1:], "--attn", "cudnn"]),
    "4": ("16 recipes, sorted", "sorted", 16, [*NF4, *CKPT, "--fp8", "--cuda_graph"]),
    "5": ("16 recipes, sorted, bf16 weights", "sorted", 16, [*CKPT, "--fp8", "--cuda_graph"]),
    "6": (
        "1 x 2048, least memory",
        "long",
        1,
        [*NF4, *CKPT, "--offload_ckpt", "--offload_embed", "--attn", "cudnn"],
    ),
    "7": ("to the first step", "fixed", 32, [*NF4, *CKPT, "--fp8"]),
    "8": ("recipes of row 4, packed", "sorted", 16, [*PACKED, "4096"]),
    "9": ("8,192 tokens", "sorted", 16, [*PACKED, "8192"]),
}


@dataclass
class Config:
    # fmt: off
    shape: str = "8b"                  # 8b, 1b, tiny: the widths of the random model
    rows: list[str] = field(default_factory=lambda: list(ROWS))  # which rows
    steps: int = 14                    # optimiser steps a row; the first three are not counted
    peers: list[str] = field(default_factory=list)  # also through these: unsloth, liger, hf
    peer: str = ""                     # be that peer, in this process (bench.py starts itself so)
    cache: str = ".cache"              # the made-up model and recipes
    device: str = "auto"               # as train.py's
    # fmt: on


# --- what is trained, on what ---


def make_model(folder, shape):
    """A Hugging Face folder of random weights in bf16 shards, and a tokenizer whose words w0, w1, … are tokens."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    if (folder / "done").exists():
        return
    C, F, blocks, H, K, V = SHAPES[shape]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    D, place = (
        C // H,
        {"device": "cuda" if torch.cuda.is_available() else "cpu", "dtype": torch.bfloat16},
    )
    shapes = {"model.embed_tokens.weight": (V, C)}
    for i in range(blocks):
        linear = {
            "q_proj": (H * D, C),
            "k_proj": (K * D, C),
            "v_proj": (K * D, C),
            "o_proj": (C, H * D),
            "gate_proj": (F, C),
            "up_proj": (F, C),
            "down_proj": (C, F),
        }
        shapes |= {
            f"model.layers.{i}.{lora.PARENT[name]}.{name}.weight": s for name, s in linear.items()
        }
        shapes |= {
            f"model.layers.{i}.{name}_layernorm.weight": (C,)
            for name in ("input", "post_attention")
        }
    shapes |= {"model.norm.weight": (C,), "lm_head.weight": (V, C)}
    names, shards, where = list(shapes), max(1, blocks // 8), {}
    for s in range(shards):
        mine, file = (
            names[s * len(names) // shards : (s + 1) * len(names) // shards],
            f"model-{s + 1:05d}.safetensors",
        )
        save_file(
            {
                n: (
                    torch.randn(shapes[n], **place) * 0.02
                    if len(shapes[n]) > 1
                    else torch.ones(shapes[n], **place)
                )
                for n in mine
            },
            folder / file,
            metadata={"format": "pt"},
        )
        where |= dict.fromkeys(mine, file)
    words = {"</s>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, V)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": C,
        "intermediate_size": F,
        "num_hidden_layers": blocks,
        "num_attention_heads": H,
        "num_key_value_heads": K,
        "head_dim": D,
        "vocab_size": V,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }
    # random weights never end a text by themselves: every token may, and the recipe that train.py shows is one long
    for name, what in (
        ("config", config),
        ("generation_config", {"eos_token_id": list(range(V))}),
        ("tokenizer_config", {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}),
        ("model.safetensors.index", {"metadata": {}, "weight_map": where}),
    ):
        (folder / f"{name}.json").write_text(json.dumps(what))
    (folder / "done").touch()


def lengths_of(kind, rows, steps):
    """Lengths in tokens: all alike, or log-normal as recipes are (median 200, sigma 0.45, 48 to 512)."""
    if kind != "sorted":
        return [2048 if kind == "long" else 256] * (rows * steps)
    drawn = np.random.default_rng(1).lognormal(np.log(200), 0.45, 320)
    return np.clip(drawn, 48, 512).astype(int).tolist()


def make_recipes(file, lengths, vocab):
    rng = np.random.default_rng(2)
    file.write_text(
        "".join(
            json.dumps({"text": " ".join(f"w{i}" for i in rng.integers(2, vocab, n))}) + "\n"
            for n in lengths
        )
    )
    return file


# --- a row ---


def run_row(cfg, row, root):
    """train.py in a process of its own. -> what its metrics and receipts say"""
    what, kind, rows, flags = ROWS[row]
    steps = (
        60 if kind == "sorted" else cfg.steps
    )  # 20 batches, thrice: the last time every graph is there
    vocab, out = SHAPES[cfg.shape][-1], root / f"row{row}"
    heap = make_recipes(root / f"row{row}.jsonl", lengths_of(kind, rows, steps), vocab)
    held = make_recipes(root / "held_out.jsonl", [256] * 2, vocab)
    shutil.rmtree(out, ignore_errors=True)
    command = [
        sys.executable,
        "train.py",
        "--model",
        root / cfg.shape,
        "--data",
        heap,
        "--val_data",
        held,
        "--val_recipes",
        "2",
        "--no-clean",
        "--out",
        out,
        "--max_len",
        "2049",
        "--batch_size",
        rows,
        "--max_steps",
        steps,
        "--eval_every",
        10**6,
        "--save_every",
        10**6,
        "--cache",
        cfg.cache,
        "--lr",
        "1e-4",
        "--device",
        cfg.device,
        *flags,
    ]
    began = time.time()
    child = subprocess.Popen(
        list(map(str, command)),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
    )
    seen, tail = {}, []
    for line in child.stderr:
        tail = [*tail[-8:], line.rstrip()]
        key, _, text = line.partition(" ")
        seen[key] = text.strip()
        if line.startswith("first step"):
            seen["to_first_step_s"] = round(time.time() - began, 1)
    if child.wait():
        return {"row": row, "what": what, "error": " | ".join(tail)}
    lines = [json.loads(s) for s in (out / "metrics.jsonl").read_text().splitlines()][1:]
    again = lines[40:] if kind == "sorted" else lines[3:]
    result = {
        "row": row,
        "what": what,
        "flags": " ".join(flags),
        **figures([x["tokens_per_s"] for x in again]),
        "padding": round(statistics.mean(x["padding"] for x in again), 4),
    }
    if kind == "sorted":  # lengths that are new; the first steps compile
        result["new_lengths_median"] = statistics.median(x["tokens_per_s"] for x in lines[3:20])
    peak, reserved = (
        re.findall(r"[\d.]+(?= GB)", seen.get("memory", "")) + [lines[-1]["peak_mem_gb"], 0]
    )[:2]
    return result | {
        "peak_gb": float(peak),
        "reserved_gb": float(reserved),
        "loaded": seen.get("loaded"),
        "to_first_step_s": seen["to_first_step_s"],
        "first_step": seen.get("first"),
        "compile": seen.get("compile"),
        "host": seen.get("host"),
    }


def figures(rates):
    return {
        "tokens_per_s": round(statistics.median(rates)),
        "low": round(min(rates)),
        "high": round(max(rates)),
        "steps": len(rates),
    }


# --- a peer: the same lengths, a plain loop around its own model ---


def load_peer(tool, folder, nf4, ckpt):
    """(model, switch(checkpointing)) of Unsloth, or of transformers + peft with or without Liger."""
    import torch

    if tool == "unsloth":
        from unsloth import FastLanguageModel  # it patches transformers, so it comes before that

        model, _ = FastLanguageModel.from_pretrained(
            str(folder),
            load_in_4bit=nf4,
            dtype=torch.bfloat16,
            max_seq_length=2048,
            use_exact_model_name=True,
            use_gradient_checkpointing="unsloth" if ckpt else False,
            local_files_only=True,
        )
        model = FastLanguageModel.get_peft_model(
            model,
            r=16,
            lora_alpha=32,
            target_modules=list(lora.PARENT),
            lora_dropout=0,
            bias="none",
            use_gradient_checkpointing="unsloth" if ckpt else False,
            random_state=1,
        )
        return (
            FastLanguageModel.for_training(
                model, use_gradient_checkpointing="unsloth" if ckpt else False
            )
            or model
        )
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if tool == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    quant = (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        if nf4
        else None
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
    return get_peft_model(
        base, LoraConfig(r=16, lora_alpha=32, target_modules=list(lora.PARENT))
    ).train()


def run_peer(tool, cfg, root):
    """The rows' lengths through a peer, in this process: one line a kind of lengths, so rows 1 and 2 share theirs."""
    began, done, model, kept = time.time(), set(), None, None
    for row in cfg.rows:
        _, kind, rows, flags = ROWS[row]
        kind, rows = (
            ("sorted", 32) if row == "3" else (kind, rows)
        )  # what fits a peer without checkpoints
        want = ("nf4" in flags or row == "3", row != "3")
        if (kind, rows, want) in done or row == "7":
            continue
        done.add((kind, rows, want))
        if want != kept:
            model, kept = (
                load_peer(tool, root / cfg.shape, *want),
                want,
            )  # Unsloth wants to be imported first
            import bitsandbytes
            import torch

            loaded = round(time.time() - began, 1)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        optimizer = bitsandbytes.optim.AdamW8bit(
            [p for p in model.parameters() if p.requires_grad], lr=1e-4
        )
        lengths = sorted(lengths_of(kind, rows, cfg.steps), reverse=True)
        cuts = [lengths[i : i + rows] for i in range(0, len(lengths), rows)]
        rates, first = [], None
        for cut in cuts * (2 if kind == "sorted" else 1):
            real = torch.arange(max(cut)) < torch.tensor(cut)[:, None]
            ids = torch.randint(2, SHAPES[cfg.shape][-1], real.shape) * real
            batch = {"input_ids": ids, "labels": ids.masked_fill(~real, -100)}
            batch |= {} if real.all() else {"attention_mask": real.long()}
            torch.cuda.synchronize()
            start = time.time()
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(**{k: v.cuda() for k, v in batch.items()}).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            rates.append(sum(cut) / (time.time() - start))
            first = first or round(time.time() - began, 1)
        once = (
            len(cuts) if kind == "sorted" else 3
        )  # then every length has come before; or the first steps are over
        new = {"new_lengths_median": statistics.median(rates[3:once])} if kind == "sorted" else {}
        print(
            json.dumps(
                {
                    "row": row,
                    "peer": tool,
                    "lengths": kind,
                    "batch": rows,
                    **new,
                    **figures(rates[once:]),
                    "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
                    "loaded": loaded,
                    "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2),
                    "to_first_step_s": first,
                    "version": metadata.version(
                        {"hf": "peft", "liger": "liger_kernel"}.get(tool, tool)
                    ),
                }
            ),
            flush=True,
        )


def main():
    (cfg,) = cli.parse(__doc__, Config)
    root = Path(__file__).parent / cfg.cache / "bench"
    for row in cfg.rows:
        if row not in ROWS:
            raise UserError(f"--rows: there is no row {row}; choose among {', '.join(ROWS)}.")
    if cfg.shape not in SHAPES:
        raise UserError(f"--shape {cfg.shape} is none of {', '.join(SHAPES)}.")
    names = {"unsloth": "unsloth", "liger": "liger_kernel", "hf": "peft"}
    for tool in cfg.peers:
        if tool not in names or not any(
            d.name.replace("-", "_") == names[tool] for d in metadata.distributions()
        ):
            raise UserError(
                f"--peers {tool}: not one of {', '.join(names)}, or not installed here."
            )
    if cfg.peer:
        return run_peer(cfg.peer, cfg, root)
    make_model(root / cfg.shape, cfg.shape)
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    say("bench", f"{cfg.shape} on {card}, torch {torch.__version__}")
    for row in cfg.rows:
        print(
            json.dumps({**run_row(cfg, row, root), "card": card, "torch": torch.__version__}),
            flush=True,
        )
    for tool in cfg.peers:
        flags = [
            f"--{k}={v}" for k, v in dataclasses.asdict(cfg).items() if isinstance(v, (str, int))
        ]
        offline = [
            "env",
            "HF_HUB_OFFLINE=1",
            "UNSLOTH_DISABLE_STATISTICS=1",
        ]  # a folder is all that they need
        subprocess.run(
            [*offline, sys.executable, __file__, *flags, "--peer", tool, "--rows", *cfg.rows],
            check=False,
        )


if __name__ == "__main__":
    cli.run(main)
