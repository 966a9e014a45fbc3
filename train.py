"""Fine-tune a Llama-architecture model to write recipes, on one GPU or a laptop.

    python train.py                                         # SmolLM2-135M on the Wikibooks Cookbook; needs nothing else
    python train.py --lora_r 16 --compile --grad_ckpt          # the same, compiled, with little memory
    python train.py --resume --max_steps 200                   # go on where out/ stopped

Read in this order: recipes.py -> data.py (a batch), model.py -> quant.py -> lora.py (a gradient), then this file.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import platform
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch.utils.checkpoint import checkpoint

import cli
import convert
import data
import lora
import model as models
import plan
import quant
import recipes
import state
from cli import UserError, say
from sample import generate


@dataclass
class Config(
    data.Data
):  # data.py has the flags of the data: --model --data … --batch_tokens --seed --cache
    # fmt: off
    out: str = "out"                   # the run's folder: adapter, best/, metrics.jsonl, curve.png, state
    resume: bool = False               # go on with the run in --out, with its flags
    init_adapter: str = ""             # begin with this adapter (PEFT format) in place of an untrained one
    device: str = "auto"               # cuda, mps, cpu
    # --- adapter ---
    lora_r: int = 16                   # rank; 0 trains all weights
    lora_alpha: int = 32               # the adapter's output is scaled by alpha / r
    lora_dropout: float = 0.0          # on the adapter's input
    lora_targets: str = "all"          # all, or layers with commas: q_proj,v_proj
    rslora: bool = False               # scale by alpha / sqrt(r)
    # --- speed and memory: each can be switched off; the ladder in README.md has what each buys ---
    quant: Literal["none", "nf4", "fp8"] = "none"  # how the frozen weights are kept: 4 or 8 bits -> quant.py
    fp8: bool = False                  # how they are multiplied: in e4m3, on cards that have it -> quant.py
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # of all other weights and arithmetic -> plan.py
    attn: Literal["naive", "flash", "cudnn"] = "flash"  # flash, cudnn: scores are never held; cudnn: for few lengths
    fused_loss: bool = True            # the logits are never held in full -> model.py
    grad_ckpt: bool = False            # keep one tensor a block, compute the block again in backward
    offload_ckpt: bool = False         # keep it, and the MLP's input, in pinned host memory meanwhile
    offload_embed: bool = False        # keep the input embedding in host memory
    compile: bool = False              # torch.compile, one graph for all blocks and lengths
    cuda_graph: bool = False           # launch a micro-batch as one CUDA graph: for small batches and slow hosts
    optim: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"  # 8bit: a quarter of the states; paged: to host
    grad_accum: int = 1                # micro-batches a step: the gradient of one batch that many times larger
    # --- schedule ---
    lr: float = 1e-3                   # peak learning rate, then cosine to 0; measured at 135M, 8B wants 2e-4
    warmup_steps: int = 5              # steps in which it rises
    weight_decay: float = 0.0          # AdamW's
    grad_clip: float = 1.0             # largest norm of the gradient; 0: no limit
    max_steps: int = 60                # optimiser steps; 0: --epochs decides
    epochs: int = 1                    # passes over the heap, where --max_steps is 0
    patience: int = 0                  # stop after this many evaluations without progress; 0: never
    # --- watching ---
    eval_every: int = 30               # steps between evaluations on the held-out recipes
    save_every: int = 50               # steps between saves of adapter and state
    # fmt: on


# what a resumed run may change: everything else would make it another run
FREE = {
    "out",
    "resume",
    "device",
    "cache",
    "model",
    "data",
    "val_data",
    "init_adapter",
    "attn",
    "fused_loss",
    "compile",
    "cuda_graph",
    "grad_ckpt",
    "offload_ckpt",
    "offload_embed",
    "max_steps",
    "epochs",
    "patience",
    "eval_every",
    "save_every",
    "allow_bad",
}


def check(cfg):
    """Out-of-range flags, said before anything is loaded."""
    data.check(cfg)
    big = float("inf")
    cli.bound(
        cfg,
        lora_r=(0, big),
        lora_alpha=(1, big),
        lora_dropout=(0, 0.99),
        grad_accum=(1, big),
        lr=(0, 1),
        warmup_steps=(0, big),
        weight_decay=(0, 1),
        grad_clip=(0, big),
        max_steps=(0, big),
        epochs=(1, big),
        patience=(0, big),
        eval_every=(1, big),
        save_every=(1, big),
    )
    if cfg.init_adapter and not cfg.lora_r:
        raise UserError(
            "--init_adapter needs an adapter to begin with: it cannot go with --lora_r 0."
        )
    if not cfg.lora_r and (cfg.quant != "none" or cfg.fp8 or cfg.dtype == "fp16"):
        raise UserError(
            "--lora_r 0 trains all weights, and 4 or 8 bits or fp16 are too coarse for its small steps: "
            "drop --quant, --fp8 and --dtype fp16, or train an adapter (--lora_r 16)."
        )
    if cfg.cuda_graph and (
        not cfg.lora_r or cfg.lora_dropout or cfg.offload_ckpt or cfg.offload_embed
    ):
        raise UserError(
            "--cuda_graph goes with none of --lora_r 0, --lora_dropout and --offload_…: drop it."
        )
    if cfg.offload_ckpt and not cfg.grad_ckpt:
        raise UserError("--offload_ckpt moves what --grad_ckpt keeps: add --grad_ckpt.")


# --- 1. the model: frozen, with an adapter; or all of it ---


def build(cfg, folder, device):
    """(model, {name: trained parameter}, autocast for --lora_r 0). One receipt a flag."""
    kept, compute, why = plan.pick_dtype(cfg.dtype, device)
    if not cfg.lora_r and compute == torch.float16:
        kept, compute, why = (
            torch.float32,
            torch.float32,
            "all weights are trained: fp16 is too coarse for that",
        )
    say("dtype", f"{str(kept)[6:]} ({why})")
    say(
        "attn",
        "four plain lines"
        if cfg.attn == "naive"
        else "scaled_dot_product_attention: scores are never held",
    )
    if cfg.budget:
        D, x = models.read_config(folder).head_dim, compute if cfg.lora_r else torch.float32
        takes = models.takes_packed(device, x, cfg.attn != "naive", D)
        say(
            "packed",
            f"rows of {cfg.budget} tokens, attention by {'varlen' if takes else 'a mask, which costs time'}",
        )
    # cuDNN's is the quicker one on an H100, but plans for 0.1 s and more at each length that it has not seen
    torch.backends.cuda.enable_cudnn_sdp(cfg.attn == "cudnn")
    torch.backends.cuda.enable_flash_sdp(cfg.attn != "cudnn")
    if cfg.compile:
        plan.start_compiler()
    began = time.time()
    if cfg.lora_r:
        model = models.load(
            folder, device, kept, quant.make_linear(cfg.quant), flash=cfg.attn != "naive"
        )
        model.dtype = compute
        peak = f", {plan.peak_memory(device):.2f} GB at the peak" if device.type == "cuda" else ""
        say("loaded", f"{folder.name} in {time.time() - began:.1f} s{peak}")
        if cfg.quant != "none":
            layers, before, after, rest = plan.count_frozen(model, kept)
            say(
                "quant",
                f"{cfg.quant}: {layers} layers, {before / 1e9:.2f} GB -> {after / 1e9:.2f}; embedding, head "
                f"and norms stay {str(kept)[6:]}: {rest / 1e9:.2f} GB",
            )
        if cfg.fp8:
            quant.multiply_in_fp8(model, device)
            say("fp8", "frozen matmuls, forward and input gradient, in e4m3 with a scale a row")
        if cfg.init_adapter and not cfg.resume:
            have = lora.read_config(cfg.init_adapter)
            if (have["r"], have["alpha"], have["rslora"]) != (
                cfg.lora_r,
                cfg.lora_alpha,
                cfg.rslora,
            ):
                raise UserError(
                    f"--init_adapter {cfg.init_adapter} has r {have['r']}, alpha {have['alpha']}, "
                    f"rslora {have['rslora']}: give --lora_r, --lora_alpha and --rslora the same values."
                )
        layers = lora.adapt(
            model,
            cfg.lora_r,
            cfg.lora_alpha,
            cfg.lora_dropout,
            cfg.lora_targets,
            cfg.rslora,
            cfg.seed,
        )
        params = lora.parameters(model)
        if cfg.init_adapter and not cfg.resume:
            lora.fill(model, lora.read_tensors(cfg.init_adapter))
        count = sum(p.numel() for p in params.values())
        say(
            "lora",
            f"r={cfg.lora_r} on {len(layers)} layers: {count:,} trained parameters"
            + (f", from {cfg.init_adapter}" if cfg.init_adapter else ""),
        )
        autocast = contextlib.nullcontext()
    else:  # fp32 masters: bf16 would lose most of Adam's steps; autocast makes the arithmetic bf16
        model = models.load(folder, device, torch.float32, flash=cfg.attn != "naive")
        params = {models.hf_name(name): p for name, p in model.named_parameters()}
        say(
            "lora",
            f"off: all {sum(p.numel() for p in params.values()):,} weights are trained, in fp32",
        )
        autocast = torch.autocast(device.type, compute, enabled=compute != torch.float32)
    if cfg.offload_embed:
        embed = model.embed_tokens
        if model.cfg.tie_word_embeddings or not cfg.lora_r:
            raise UserError(
                "--offload_embed: this embedding is the head too, or trained: it must stay; drop the flag."
            )
        embed.weight.data = embed.weight.data.cpu()
        say(
            "offload", f"the input embedding, {embed.weight.nbytes / 1e9:.2f} GB, is in host memory"
        )
    if cfg.grad_ckpt:  # Chen et al. 2016: of each block only its input is kept
        say(
            "grad_ckpt",
            f"{len(model.layers)} blocks keep one tensor each and are computed again in backward",
        )
        if not cfg.compile or cfg.lora_dropout:
            model.around = partial(
                checkpoint, use_reentrant=False, preserve_rng_state=cfg.lora_dropout > 0
            )
    if cfg.compile:  # one block is small and all are alike: one graph, for every length
        # the compiler's own checkpoint spares down_proj the second time, too; but it would draw dropout's mask anew
        again = cfg.grad_ckpt and not cfg.lora_dropout
        quant.Frozen.recomputed = (
            again and not cfg.offload_embed
        )  # whoever sends that away wants memory before speed
        plan.compile_blocks(model, again, halves=cfg.offload_ckpt)
        say("compile", "each block, one graph for all lengths; the first step takes longer")
    if cfg.offload_ckpt:
        model.around, model.halves = plan.Offload(model.around, device), True
        say(
            "offload",
            "the inputs of a block and of its MLP are in host memory, so o_proj runs once",
        )
    return model, params, autocast


def make_optimizer(cfg, params, device):
    """The optimiser and what it steps on: an adapter's hundreds of small tensors become views of one, so that a step
    is one kernel instead of hundreds (bitsandbytes waits for the GPU after each)."""
    kinds, note, trained = (
        {"adamw": partial(torch.optim.AdamW, fused=True)},
        "",
        list(params.values()),
    )
    if (
        cfg.optim != "adamw"
    ):  # states in 8 bits with an absmax a block of 256 (Dettmers et al. 2021)
        quant.bitsandbytes(device)
        from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

        pages = device.type == "cuda"
        kinds |= {"adamw8bit": AdamW8bit, "paged_adamw8bit": PagedAdamW8bit if pages else AdamW8bit}
        note = "" if pages or cfg.optim == "adamw8bit" else ", unpaged: only a GPU has pages"
    if cfg.lora_r:
        flat = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in trained]))
        for p, part in zip(trained, flat.detach().split([p.numel() for p in trained])):
            p.data = part.view_as(p)
        trained = [flat]
    states = sum(
        p.numel() * 8 if cfg.optim == "adamw" or p.numel() < 4096 else p.numel() * 65 / 32
        for p in trained
    )
    say("optim", f"{cfg.optim}{note}, {states / 1e6:.0f} MB of states")
    return kinds[cfg.optim](trained, lr=cfg.lr, weight_decay=cfg.weight_decay), trained


# --- 2. checks of the classic silent mistakes ---


def check_data(cfg, heap, text):
    """The end token is a target, BOS is there once, and how much is trained on; an error where one fails."""
    sample = heap.train[:256]
    targets = 0
    for i in sample:
        ids, at = heap.recipe(i, cfg.mask_prompt)
        if not len(at) or ids[at[-1]] != text.end:
            raise UserError(
                f"recipe {i} does not end in the end token as a target: the model would not learn to stop."
            )
        if text.bos and (ids[0] != text.bos[0] or (ids[1:] == text.bos[0]).any()):
            raise UserError(f"recipe {i} does not begin with exactly one BOS token.")
        targets += len(at)
    share = targets / heap.lengths(sample).sum()
    say("check", f"end token {text.end} ends {len(sample)} of {len(sample)} rows, as a target")
    say("check", f"BOS: {'exactly one' if text.bos else 'this tokenizer has none'}")
    dropped = heap.account["dropped"]["max_len"]
    say(
        "check",
        f"{dropped} recipes dropped for --max_len {cfg.max_len}; {share:.0%} of tokens are targets",
    )


def check_gradients(model, params):
    """After the first backward: a LoRA that is not trained looks like a run that learns slowly."""
    if model.dtype == torch.float16 and not all(
        p.grad is None or p.grad.isfinite().all() for p in params.values()
    ):
        return False  # the loss scale is too high yet
    wrong = [
        name
        for name, p in params.items()
        if p.grad is None or not p.grad.isfinite().all() or ".lora_B." in name and not p.grad.any()
    ]
    if wrong:
        raise UserError(
            f"{len(wrong)} trained tensor(s) got no usable gradient, the first is {wrong[0]}."
        )
    trained = {id(p) for p in params.values()}
    leaked = [
        name for name, p in model.named_parameters() if id(p) not in trained and p.grad is not None
    ]
    if leaked:
        raise UserError(f"{leaked[0]} is frozen and got a gradient.")
    say("check", f"all {len(params)} trained tensors get a gradient, no frozen one does")
    return True


# --- 3. schedule and plan: pure functions of the step ---


def lr_at(step, total, cfg):
    """Learning rate of step 1, 2, … total: linear warm-up, then half a cosine. Never 0, not even at first."""
    if step <= cfg.warmup_steps:
        return cfg.lr * step / (cfg.warmup_steps + 1)
    done = (step - 1 - cfg.warmup_steps) / max(1, total - cfg.warmup_steps)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * min(1, done)))


def steps_of_run(heap, cfg):
    """The recipes of step 1, 2, …: a list of micro-batches each, epoch after epoch. No step mixes two of them."""
    lengths = heap.lengths(heap.train)
    for epoch in itertools.count():
        for step in data.plan(lengths, cfg, epoch, cfg.grad_accum):
            yield [heap.train[rows] for rows in step]


def count_steps(heap, cfg):
    epochs = (
        data.plan(heap.lengths(heap.train), cfg, epoch, cfg.grad_accum)
        for epoch in range(cfg.epochs)
    )
    return cfg.max_steps or sum(map(len, epochs))


# --- 4. evaluation ---


@torch.no_grad()
def evaluate(model, held, cfg, text, device, autocast):
    """Held-out loss per target token, through the same loss as training: fused, it never holds the logits."""
    total, count, lengths = 0.0, 0, held.lengths(held.val)
    order = (-lengths).argsort(kind="stable")
    model.eval()
    batches = [[held.val[rows]] for rows in data.cut(order, lengths, cfg)]
    for (batch,) in data.feed(held, batches, device, cfg.mask_prompt, cfg.budget):
        with autocast:
            with torch.set_grad_enabled(
                cfg.compile
            ):  # then training's graph serves here, too: half the compiling
                h = model(batch.ids, cu_seqlens=batch.cu_seqlens).detach()
            part = models.sum_loss(
                h,
                model.lm_head.weight,
                batch.where,
                batch.targets,
                1.0,
                cfg.fused_loss,
                model.loss_chunk,
            )
        total += part.item()
        count += len(batch.targets)
    model.train()
    return total / count


def write_recipe(model, text, title, cfg):
    """One recipe of the model as it is now, on stdout."""
    model.eval()
    with torch.compiler.set_stance("force_eager"):  # the compiled graphs are for training's shapes
        (ids,), (ended,) = generate(model, [text.prompt(title)], text.ends, seed=cfg.seed)
    model.train()
    print(
        f"{title}{text.decode(ids)}\n{'' if ended else f'[cut off at {len(ids)} tokens]'}",
        flush=True,
    )


# --- 5. saving ---


def save(run, params, cfg, base, where=""):
    """The adapter (or all weights) into the run's folder, or its best/, as other programs read it."""
    folder = run.folder / where
    folder.mkdir(exist_ok=True)
    if cfg.lora_r:
        state.write_json(
            folder / "adapter_config.json",
            lora.peft_config(
                cfg.model or convert.DEFAULT_MODEL,
                cfg.lora_r,
                cfg.lora_alpha,
                cfg.lora_dropout,
                cfg.lora_targets,
                cfg.rslora,
            ),
        )
        state.write_tensors(folder / "adapter_model.safetensors", params)
        return
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
    ):
        if (base / name).exists():
            with state.atomic(folder / name) as beside:
                shutil.copyfile(base / name, beside)
    state.write_tensors(folder / "model.safetensors", params)


def draw_curve(run):
    from matplotlib.figure import Figure

    ax = (fig := Figure(figsize=(7, 4), layout="tight")).add_subplot()
    for key, color, label in (
        ("loss", "0.7", "training (lengths differ)"),
        ("val_loss", "tab:red", "held out"),
    ):
        if points := [
            (line["step"], line[key]) for line in run.history() if line.get(key) is not None
        ]:
            ax.plot(
                *zip(*points),
                color=color,
                marker="o" if key == "val_loss" else "",
                lw=1,
                label=label,
            )
    ax.set(xlabel="step", ylabel="loss per target token (nats)")
    ax.legend()
    with state.atomic(run.folder / "curve.png") as beside:
        fig.savefig(beside, dpi=120, format="png")


def about(cfg, rules, base, heap, held, text, model):
    """run.json: what this run is."""
    bos, ends = len(text.bos), {i: held.recipe(i, mask_prompt=True)[1][0] for i in held.val}
    starts = [
        held.ids(i)[: ends[i] if ends[i] > max(1, bos) else bos + 8] for i in held.val
    ]  # no prompt: first tokens
    return {
        "config": dataclasses.asdict(cfg),
        "rules": dataclasses.asdict(rules),
        "base": str(base),
        "base_fingerprint": state.fingerprint(base),
        "data_fingerprint": data.fingerprint(heap, held),
        "dtype": str(model.embed_tokens.weight.dtype),
        "arithmetic": str(model.dtype or torch.float32),
        "data": {**heap.account, "held_out": len(held.val)},
        "titles": [text.decode(s) for s in starts[:1024]],
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def same_run(run, now):
    """An error if a resume would make the run another one."""
    before = run.read_json("run.json")
    for what, key in (
        ("base model", "base_fingerprint"),
        ("data", "data_fingerprint"),
        ("dtype of the weights", "dtype"),
        ("dtype of the arithmetic (--dtype)", "arithmetic"),
    ):
        if before[key] != now[key]:
            raise UserError(
                f"--resume: the {what} is not the one that {run.folder} was trained with."
            )


def resumed_flags(out):
    """(Config, Rules) of a resume: the flags that the run was started with, and those that may change."""
    try:
        before = json.loads((Path(out) / "run.json").read_text(encoding="utf-8"))
        old = {**before["config"], **before["rules"], "resume": True, "out": out}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--resume: {out} holds no run to go on from.") from None
    cfg, rules = cli.parse(__doc__, Config, recipes.Rules, defaults=old)
    new = {**dataclasses.asdict(cfg), **dataclasses.asdict(rules)}
    changed = [
        f"--{k} was {old.get(k)!r}, is {new[k]!r}"
        for k in new
        if k not in FREE and old.get(k) != new[k]
    ]
    if changed:
        raise UserError(f"--resume: these flags make it another run: {'; '.join(changed)}.")
    return cfg, rules


# --- 6. the run ---


def main():
    cfg, rules = cli.parse(__doc__, Config, recipes.Rules)
    if cfg.resume:
        cfg, rules = resumed_flags(cfg.out)
    check(cfg)
    say("config", json.dumps(dataclasses.asdict(cfg), ensure_ascii=False))
    device = plan.pick_device(cfg.device)
    torch.manual_seed(cfg.seed)

    base = convert.resolve(cfg.model, data.cache_folder(cfg))
    if base.resolve() == Path(cfg.out).resolve():
        raise UserError(f"--model {base} is the --out folder too: name another --out.")
    models.read_config(base)  # no Llama: said before the heap is read
    heap, held, text = data.prepare(cfg, rules, base)
    total = count_steps(heap, cfg)
    say("data", f"{len(heap.train)} recipes to train on, {len(held.val)} held out, {total} steps")
    check_data(cfg, heap, text)
    if not (cfg.batch_tokens or cfg.budget) and len(heap.train) < (
        per_step := cfg.grad_accum * cfg.batch_size
    ):
        say(
            "note",
            f"a step wants {per_step} recipes and there are {len(heap.train)}: it trains on those",
        )
    model, params, autocast = build(cfg, base, device)
    for block in model.layers:
        block.longest = int(max(heap.rows["length"].max(), held.rows["length"].max()))
    optimizer, trained = make_optimizer(cfg, params, device)

    info = about(cfg, rules, base, heap, held, text, model)
    run = state.Run(cfg.out, cfg.resume)
    facts = {
        "step": 0,
        "total": total,
        "best_val": None,
        "best_step": 0,
        "val_before": None,
        "val": None,
        "without_progress": 0,
        "loss_scale": 2.0**16 if model.dtype == torch.float16 else 1.0,
    }
    if cfg.resume:
        same_run(run, info)
        facts |= run.load_state(optimizer, params)
        run.forget_after(facts["step"])
        say(
            "resume",
            f"after step {facts['step']}"
            + (
                ""
                if total == facts["total"]
                else f"; the schedule was for {facts['total']} steps and is for {total} from here on"
            ),
        )
        facts["total"] = total
        if facts["step"] >= total:
            raise UserError(
                f"--resume: {run.folder} has made its {total} steps; raise --max_steps or --epochs."
            )
    run.write_json("run.json", info)
    title = info["titles"][cfg.seed % len(info["titles"])]
    peak, seconds, launching, waited, ended, tokens, graphs, checked = (
        0.0,
        0.0,
        0.0,
        0.0,
        0.0,
        0,
        [],
        False,
    )

    def forward_backward(
        ids, where, targets, scale, cu_seqlens
    ):  # its gradients are added to those that are there
        nonlocal peak
        with autocast:
            h = model(ids, cu_seqlens=cu_seqlens)
            loss = models.sum_loss(
                h, model.lm_head.weight, where, targets, scale, cfg.fused_loss, model.loss_chunk
            )
        peak = max(peak, plan.peak_memory(device))
        loss.backward()
        return loss.detach()

    if cfg.cuda_graph:
        forward_backward = plan.Graphs(forward_backward, list(params.values()), device)
        trained[0].grad = forward_backward.grad  # all of them, for good
        say(
            "cuda_graph",
            "one launch a micro-batch; lengths go up to multiples of 8, beside the padding shown",
        )

    def measure():
        """Held-out loss; the best adapter so far is kept in best/."""
        val = evaluate(model, held, cfg, text, device, autocast)
        better = facts["best_val"] is None or val < facts["best_val"]
        if better:
            save(run, params, cfg, base, "best")
        facts.update(val=val, without_progress=0 if better else facts["without_progress"] + 1)
        facts.update({"best_val": val, "best_step": facts["step"]} if better else {})
        return val

    def save_all():
        save(run, params, cfg, base)
        run.save_state(optimizer, params, facts)
        return facts["step"]

    first, saved = facts["step"] + 1, facts["step"] if cfg.resume else None
    model.train()
    with state.Stop() as stop, plan.out_of_memory(cfg, model, device):
        if facts["val_before"] is None:
            say("before", title)
            write_recipe(model, text, title, cfg)
            facts["val_before"] = measure()
            run.log(
                {
                    "step": 0,
                    "loss": None,
                    "lr": None,
                    "grad_norm": None,
                    "target_tokens": 0,
                    "tokens_per_s": None,
                    "padding": None,
                    "peak_mem_gb": round(plan.peak_memory(device), 3),
                    "val_loss": facts["val_before"],
                }
            )
            say("val_loss", f"{facts['val_before']:.4f} before training")
        steps = itertools.islice(steps_of_run(heap, cfg), facts["step"], total)
        bar = cli.Progress(total, "train")
        bar.step(facts["step"])
        for step, batches in enumerate(
            data.feed(heap, steps, device, cfg.mask_prompt, cfg.budget), first
        ):
            if stop.signal:
                break
            began = time.time()
            waited += began - ended if step > first + 1 else 0  # before that the queue fills up
            # one step: the mean over all its target tokens, however they are spread over the micro-batches
            loss, scale = 0.0, facts["loss_scale"]
            targets = sum(len(batch.targets) for batch in batches)
            real, padded = (
                sum(batch.real for batch in batches),
                sum(batch.ids.numel() for batch in batches),
            )
            for b in batches:
                loss += (
                    forward_backward(b.ids, b.where, b.targets, scale / targets, b.cu_seqlens)
                    / scale
                )
            launched = time.time()
            checked = checked or check_gradients(model, params)
            if cfg.lora_r:
                if not cfg.cuda_graph:
                    trained[0].grad = torch.cat([p.grad.flatten() for p in params.values()])
                    model.zero_grad(set_to_none=True)
                trained[0].grad /= scale
            norm = torch.nn.utils.clip_grad_norm_(trained, cfg.grad_clip or math.inf)
            overflow = model.dtype == torch.float16 and not norm.isfinite()
            if not overflow:
                optimizer.param_groups[0]["lr"] = lr_at(step, total, cfg)
                optimizer.step()
            optimizer.zero_grad(set_to_none=not cfg.cuda_graph)

            loss, norm, took = (
                float(loss),
                float(norm),
                time.time() - began,
            )  # float() waits for the GPU
            if (
                not math.isfinite(loss)
                or not math.isfinite(norm)
                and (not overflow or scale < 2**-10)
            ):
                rows = [int(i) for i in batches[-1].rows[:8]]
                raise UserError(
                    f"the loss is {loss} at step {step}, its gradient's norm {norm} (recipes {rows} …): "
                    f"lower --lr or use --dtype fp32. {run.folder} keeps what was last saved."
                )
            facts["loss_scale"] *= (
                0.5 if overflow else 2 if model.dtype == torch.float16 and step % 2000 == 0 else 1
            )
            if overflow:
                bar.line(
                    "overflow",
                    f"step {step} is skipped, the loss scale halved to {facts['loss_scale']:g}",
                )
            if step == first:
                bar.line("first step", f"{took:.1f} s, compilation and warm-up in it")
            else:
                seconds, tokens, launching = (
                    seconds + took,
                    tokens + real,
                    launching + launched - began,
                )
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            facts["step"], peak = step, max(peak, plan.peak_memory(device))
            line = {
                "step": step,
                "loss": loss,
                "lr": lr_at(step, total, cfg),
                "grad_norm": None if overflow else norm,
                "target_tokens": targets,
                "tokens_per_s": round(real / took, 1),
                "padding": round(1 - real / padded, 4),
                "peak_mem_gb": round(peak, 3),
            }
            bar.step(1, f"loss {loss:.3f}  {real / took:.0f} tok/s  {peak:.2f} GB")
            if step % cfg.eval_every == 0 or step == total:
                line["val_loss"] = measure()
                bar.line("val_loss", f"{line['val_loss']:.4f} after step {step}")
            run.log(line)
            tired = cfg.patience and facts["without_progress"] >= cfg.patience
            if step % cfg.save_every == 0 or step == total or stop.signal or tired:
                saved = save_all()
            if tired:
                bar.line(
                    "patience",
                    f"no progress in {cfg.patience} evaluations: stopped after step {step}",
                )
                break
            ended = time.time()
        bar.close()
        if stop.signal and facts["step"] < total:
            if saved != facts["step"]:
                save_all()
            say(
                "stopped",
                f"after step {facts['step']}, saved. Go on with: python train.py --resume --out {cfg.out}",
            )
            return stop.exit_code

    if cfg.compile:
        say(
            "compile",
            f"{graphs[-1]} graphs, {graphs[-1] - graphs[min(10, len(graphs)) - 1]} of them after step 10",
        )
    if seconds:
        say(
            "host",
            f"{launching / seconds:.0%} of a step's time goes by before backward is launched to its end; "
            f"{waited / (seconds + waited):.2%} of all time went by in waiting for data",
        )
    draw_curve(run)
    if device.type == "cuda":
        say(
            "memory",
            f"{peak:.2f} GB allocated at the peak, {torch.cuda.max_memory_reserved() / 1e9:.2f} GB reserved",
        )
    say("after", title)
    write_recipe(model, text, title, cfg)
    print(
        json.dumps(
            {
                "steps": facts["step"],
                "val_loss_before": facts["val_before"],
                "val_loss_after": facts["val"],
                "tokens_per_s": round(tokens / seconds, 1) if seconds else None,
                "peak_mem_gb": round(peak, 3),
            }
        )
    )
    say(
        "saved",
        f"{run.folder}: try `python sample.py{'' if cfg.out == 'out' else f' --run {cfg.out}'}`",
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
