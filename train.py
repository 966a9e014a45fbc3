"""Fine-tune a Llama-architecture model to write recipes, on one GPU or a laptop.

    python train.py                                         # SmolLM2-135M on the Wikibooks Cookbook; needs nothing else
    python train.py --lora_r 16 --compile --grad_ckpt          # the same, compiled, with little memory
    python train.py --resume --max_steps 200                   # go on where out/ stopped

Read in this order: recipes.py -> text.py -> data.py (a batch), model.py -> quant.py -> lora.py (a gradient), then this
file; `build` names each optimisation of speed/ in the order in which they are applied.
"""

import cli
from cli import UserError, say

import contextlib
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

import data
import lora
import model as models
import quality
import quant
from data import Data
from files import disk, hub, pictures, weights
from files.run import Facts, Run, Stop, refuse_other_flags, started_with
from recipes import Rules
from speed import checkpoint, compiled, graphs, loss, memory, offload, optim, precision
from text import check_targets


@dataclass
class Config:
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
    # --- speed and memory: each can be switched off; the tables in README.md have what each buys ---
    quant: Literal["none", "nf4", "fp8"] = "none"  # how the frozen weights are kept: 4 or 8 bits -> quant.py
    fp8: bool = False                  # how they are multiplied: in e4m3, on cards that have it -> speed/fp8.py
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # of all other weights and arithmetic -> speed/precision.py
    attn: Literal["naive", "flash", "cudnn"] = "flash"  # flash, cudnn: scores are never held; cudnn: for few lengths
    fused_loss: bool = True            # the logits are never held in full -> speed/loss.py
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


def check(cfg, data_cfg):
    """Out-of-range flags, said before anything is loaded."""
    data.check(data_cfg)
    cli.bound(
        cfg,
        lora_r=0,
        lora_alpha=1,
        lora_dropout=(0, 0.99),
        grad_accum=1,
        lr=(0, 1),
        warmup_steps=0,
        weight_decay=(0, 1),
        grad_clip=0,
        max_steps=0,
        epochs=1,
        patience=0,
        eval_every=1,
        save_every=1,
    )
    if cfg.init_adapter and not cfg.lora_r:
        raise UserError(
            "--init_adapter needs an adapter to begin with: it cannot go with --lora_r 0."
        )
    coarse = cfg.quant != "none" or cfg.fp8 or cfg.dtype == "fp16"
    if coarse and not cfg.lora_r:
        raise UserError(
            "--lora_r 0 trains all weights, and 4 or 8 bits or fp16 are too coarse for its small steps: "
            "drop --quant, --fp8 and --dtype fp16, or train an adapter (--lora_r 16)."
        )
    offloads = cfg.offload_ckpt or cfg.offload_embed
    changes = not cfg.lora_r or cfg.lora_dropout or offloads
    if cfg.cuda_graph and changes:
        raise UserError(
            "--cuda_graph goes with none of --lora_r 0, --lora_dropout and --offload_…: drop it."
        )
    if cfg.offload_ckpt and not cfg.grad_ckpt:
        raise UserError("--offload_ckpt moves what --grad_ckpt keeps: add --grad_ckpt.")


# --- 1. the model, and every optimisation in the order in which they are applied ---


@dataclass
class Built:
    """A model that is ready for training, and the two ways in which it is called."""

    model: torch.nn.Module
    params: dict  # {name in a checkpoint: trained parameter}
    trained: list  # what the optimiser steps on: an adapter's one flat tensor, or all weights
    compute: torch.dtype  # of the products
    sum_loss: Callable  # of speed/loss.py
    meter: memory.Meter
    is_compiled: bool = False
    graphs: Callable | None = None  # --cuda_graph

    def autocast(self):
        """An adapter's model has its dtypes by itself. Of --lora_r 0 the weights are fp32, the products are not."""
        if self.model.stream_dtype is not None or self.compute == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.model.frequencies.device.type, self.compute)

    def forward_backward(self, ids, where, targets, scale, cu_seqlens):
        """Add the gradients of scale * loss to those that are there. -> scale * loss"""
        step = self.eager_step if self.graphs is None else self.graphs
        return step(ids, where, targets, scale, cu_seqlens)

    def eager_step(self, ids, where, targets, scale, cu_seqlens):
        with self.autocast():
            h = self.model(ids, cu_seqlens=cu_seqlens)  # [B, T, C]
            total = self.sum_loss(h, self.model.lm_head.weight, where, targets, scale)
        # Most memory is in use now.
        self.meter.look()
        total.backward()
        return total.detach()

    def compile(self, places, recompute, decode_once):
        """The blocks (or halves of blocks) at these places, and the chunk of the loss."""
        compiled.apply(places, recompute)
        if recompute and decode_once:
            quant.decode_once(self.model)
        self.is_compiled = True
        if self.sum_loss is loss.chunked:
            self.sum_loss = partial(loss.chunked, chunk=compiled.compile_function(loss.one_chunk))

    def loss_of(self, batch):
        """Sum of the losses of a held-out batch: the same loss as in training, so logits are not held here either."""
        with self.autocast():
            # With gradients on, a compiled block reuses training's graph: half the compiling.
            with torch.set_grad_enabled(self.is_compiled):
                h = self.model(batch.ids, cu_seqlens=batch.cu_seqlens).detach()
            return self.sum_loss(h, self.model.lm_head.weight, batch.where, batch.targets)


def build(cfg, data_cfg, folder, device, meter, longest=None):
    """The model of a folder with all that the flags ask for: Built. longest: tokens of the longest recipe"""
    # 1. Numbers and kernels. The compiler's processes start while the weights load.
    kept, compute, why = precision.pick_dtype(cfg.dtype, device, train_all=not cfg.lora_r)
    precision.say_dtype(kept, why)
    how = {"attn": precision.pick_attention(cfg.attn), "longest": longest}
    if cfg.compile:
        compiled.start_compiler()

    # 2. Weights, quantised while they stream off the disk, and what is trained of them.
    if cfg.lora_r:
        with meter.loading(folder.name):
            make_linear = quant.make_linear(cfg.quant)
            model = lora.load_model(folder, device, kept, make_linear, stream_dtype=compute, **how)
        memory.say_quantised(cfg.quant, model, kept)
        if cfg.fp8:
            quant.multiply_in_fp8(model, device)
            say("fp8", "frozen matmuls, forward and input gradient, in e4m3 with a scale a row")
        params, trained = add_adapter(model, cfg, data_cfg.seed)
    else:
        # fp32 masters: bf16 would lose most of Adam's steps. Autocast makes the products bf16.
        model = models.load(folder, device, torch.float32, **how)
        params, trained = train_all(model)
    precision.say_packed(data_cfg.budget, models.takes_packed(model, device))

    # 3. The loss: logits a chunk at a time, or all at once.
    sum_loss = loss.chunked if cfg.fused_loss else loss.plain
    built = Built(model, params, trained, compute, sum_loss, meter)

    # 4. The embedding leaves the card before anything is captured.
    if cfg.offload_embed:
        offload.embedding_to_host(model)

    # 5. Blocks are compiled where they stand; with offloading their halves are, so that both inputs can leave.
    places = models.places(model, halves=cfg.offload_ckpt)
    by_compiler = False
    if cfg.compile:
        # The compiler's own checkpoint spares down_proj the second time; but it would draw dropout's mask anew.
        by_compiler = cfg.grad_ckpt and not cfg.lora_dropout
        # Backward then decodes a weight once for both; --offload_embed wants memory before speed.
        built.compile(places, by_compiler, decode_once=not cfg.offload_embed)

    # 6. Checkpoints go around what is compiled, and the way to the host goes around checkpoints.
    if cfg.grad_ckpt:
        checkpoint.say_kept(len(model.layers))
        if not by_compiler:
            checkpoint.apply(places, random=cfg.lora_dropout > 0)
    if cfg.offload_ckpt:
        offload.apply(places, device)

    # 7. Last, a whole micro-batch is recorded, with all that is in it.
    if cfg.cuda_graph:
        built.graphs = graphs.Graphs(built.eager_step, device)
    return built


def add_adapter(model, cfg, seed):
    """-> {PEFT's key: A or B}, [the one flat tensor that they are views of]"""
    # A resumed run has its adapter in its state.
    init = "" if cfg.resume else cfg.init_adapter
    params = lora.begin(model, adapter_settings(cfg), seed, init)
    return params, [optim.flatten(list(params.values()))]


def train_all(model):
    """--lora_r 0. -> {Hugging Face's name: weight}, [all weights]"""
    params = {weights.hf_name(name): p for name, p in model.named_parameters()}
    say("lora", f"off: all {models.size(model):,} weights are trained, in fp32")
    return params, list(params.values())


def adapter_settings(cfg):
    return lora.Settings(
        r=cfg.lora_r,
        alpha=cfg.lora_alpha,
        dropout=cfg.lora_dropout,
        targets=cfg.lora_targets,
        rslora=cfg.rslora,
    )


# --- 2. the schedule: a pure function of the step ---


def lr_at(step, total, cfg):
    """Learning rate of step 1, 2, … total: linear warm-up, then half a cosine. Never 0, not even at first."""
    if step <= cfg.warmup_steps:
        return cfg.lr * step / (cfg.warmup_steps + 1)
    done = (step - 1 - cfg.warmup_steps) / max(1, total - cfg.warmup_steps)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * min(1, done)))


# --- 3. what the functions below share ---


@dataclass
class Job:
    """All that is set up before the loop."""

    cfg: Config
    data_cfg: Data
    device: torch.device
    base: Path  # the base model's folder
    dataset: data.Dataset
    held: data.Dataset  # the held-out recipes
    text: object  # the tokenizer
    built: Built
    optimizer: torch.optim.Optimizer
    scale: precision.LossScale
    watch: optim.GradientWatch
    facts: Facts
    run: Run | None = None
    title: str = ""  # of the recipe that is written before and after
    saved_at: int | None = None  # the step of the last save


# --- 4. evaluation ---


def evaluate(job):
    """Held-out loss per target token; the best adapter so far is kept in best/."""
    batches = quality.held_out_batches(job.held, job.data_cfg, job.device)
    val = quality.held_out_loss(job.built.model, job.built.loss_of, batches)
    if job.facts.judge(val):
        save(job, "best")
    return val


def write_recipe(job):
    """One recipe of the model as it is now, on stdout."""
    # The compiled graphs are for training's shapes.
    with torch.compiler.set_stance("force_eager"):
        quality.show_recipe(job.built.model, job.text, job.title, job.data_cfg.seed)


# --- 5. saving, and going on ---


def save(job, where=""):
    """The adapter (or all weights) into the run's folder, or its best/, as other programs read it."""
    folder = job.run.folder / where
    folder.mkdir(exist_ok=True)
    if job.cfg.lora_r:
        base = job.data_cfg.model or hub.DEFAULT_MODEL
        lora.save(folder, job.built.params, base, adapter_settings(job.cfg))
    else:
        weights.save_model(folder, job.built.params, job.base)


def save_all(job):
    """Adapter and state, from which --resume goes on."""
    save(job)
    job.run.save_state(job.optimizer, job.built.params, asdict(job.facts))
    job.saved_at = job.facts.step


def parse_flags():
    """(Config, Data, Rules) of the command line. A resume has those that its run was started with."""
    cfg, data_cfg, rules = cli.parse(__doc__, Config, Data, Rules)
    if cfg.resume:
        old = started_with(cfg.out)
        cfg, data_cfg, rules = cli.parse(__doc__, Config, Data, Rules, defaults=old)
        refuse_other_flags(old, {**flags_of(cfg, data_cfg), **asdict(rules)})
    return cfg, data_cfg, rules


def flags_of(cfg, data_cfg):
    return {**asdict(data_cfg), **asdict(cfg)}


def find_base(cfg, data_cfg):
    """The base model's folder; what is no Llama is said before the recipes are read."""
    base = hub.resolve(data_cfg.model, disk.cache_folder(data_cfg.cache))
    if base.resolve() == Path(cfg.out).resolve():
        raise UserError(f"--model {base} is the --out folder too: name another --out.")
    models.read_config(base)
    return base


def about(job, rules):
    """run.json: what this run is."""
    model = job.built.model
    return {
        "config": flags_of(job.cfg, job.data_cfg),
        "rules": asdict(rules),
        "base": str(job.base),
        "base_fingerprint": disk.fingerprint(job.base),
        "data_fingerprint": data.fingerprint(job.dataset, job.held),
        "dtype": str(model.embed_tokens.weight.dtype),
        "arithmetic": str(model.stream_dtype or torch.float32),
        "data": {**job.dataset.account, "held_out": len(job.held.indices)},
        "titles": quality.titles(job.held, job.text),
    }


# --- 6. the run ---


def set_up():
    """Everything that the loop needs."""
    cfg, data_cfg, rules = parse_flags()
    check(cfg, data_cfg)
    say("config", json.dumps(flags_of(cfg, data_cfg), ensure_ascii=False))
    device = precision.pick_device(cfg.device)
    torch.manual_seed(data_cfg.seed)

    base = find_base(cfg, data_cfg)
    dataset, held, text = data.prepare(data_cfg, rules, base)
    total = cfg.max_steps or data.count_steps(dataset, data_cfg, cfg.grad_accum, cfg.epochs)
    say("data", f"{data.sizes(dataset, held)}, {total} steps")
    check_targets(dataset, text, data_cfg)
    data.say_small(dataset, data_cfg, cfg.grad_accum)

    meter = memory.Meter(device, compiled.graphs_so_far)
    built = build(cfg, data_cfg, base, device, meter, max(dataset.longest, held.longest))
    if cfg.optim != "adamw":
        # A sentence where bitsandbytes is missing or knows nothing of this device.
        quant.bitsandbytes(device)
    optimizer = optim.make_optimizer(cfg.optim, built.trained, device, cfg.lr, cfg.weight_decay)
    scale = precision.LossScale(built.compute)
    job = Job(
        cfg=cfg,
        data_cfg=data_cfg,
        device=device,
        base=base,
        dataset=dataset,
        held=held,
        text=text,
        built=built,
        optimizer=optimizer,
        scale=scale,
        watch=optim.GradientWatch(built.params),
        facts=Facts(total=total, loss_scale=scale.value),
    )
    info = about(job, rules)
    job.title = info["titles"][data_cfg.seed % len(info["titles"])]
    job.run = Run(cfg.out, cfg.resume)
    if cfg.resume:
        job.facts = job.run.go_on(info, optimizer, built.params, total)
        job.scale = precision.LossScale(built.compute, job.facts.loss_scale)
        job.saved_at = job.facts.step
    job.run.write_about(info)
    return job


def before_training(job):
    """A recipe and the held-out loss of the untrained adapter: step 0 of metrics.jsonl."""
    say("before", job.title)
    write_recipe(job)
    val = evaluate(job)
    job.facts.val_before = val
    nothing = dict.fromkeys(["loss", "lr", "grad_norm", "tokens_per_s", "padding"])
    peak = round(memory.peak_memory(job.device), 3)
    line = {"step": 0, "target_tokens": 0, "peak_mem_gb": peak, "val_loss": val}
    job.run.log({**line, **nothing})
    say("val_loss", f"{val:.4f} before training")


def one_step(job, batches, lr):
    """The mean loss over all target tokens of a step, however they are spread over the micro-batches, and one step of
    the optimiser on its gradient. -> (loss, norm of the gradient, whether an overflow forbade the step)"""
    built = job.built
    scale = job.scale
    targets = sum(len(b.targets) for b in batches)
    share = scale.value / targets
    total = 0.0
    for b in batches:
        scaled = built.forward_backward(b.ids, b.where, b.targets, share, b.cu_seqlens)
        total += scaled / scale.value
    built.meter.launched()
    job.watch.check(built.model, scale.used)
    norm = optim.clip(built.trained, scale.value, job.cfg.grad_clip)
    overflowed = scale.overflowed(norm)
    if not overflowed:
        job.optimizer.param_groups[0]["lr"] = lr
        job.optimizer.step()
    # The gradients of an adapter are views of one tensor, which stays.
    job.optimizer.zero_grad(set_to_none=not job.cfg.lora_r)
    # float() waits for the GPU.
    return float(total), float(norm), overflowed


def main():
    job = set_up()
    cfg = job.cfg
    facts = job.facts
    meter = job.built.meter
    job.built.model.train()
    flags = flags_of(cfg, job.data_cfg)
    with Stop() as stop, memory.out_of_memory(job.built.model, job.device, flags):
        if facts.val_before is None:
            before_training(job)
        bar = cli.Progress(facts.total, "train")
        bar.step(facts.step)
        for batches in feed(job):
            if stop.signal:
                break
            meter.begin()
            lr = lr_at(facts.step + 1, facts.total, cfg)
            loss_now, norm, overflowed = one_step(job, batches, lr)
            speed = meter.end(batches, bar.line)
            facts.step += 1
            job.scale.refuse_no_number(loss_now, norm, facts.step, batches[-1].rows, job.run.folder)
            facts.loss_scale = job.scale.update(facts.step, overflowed, bar.line)
            line = {
                "step": facts.step,
                "loss": loss_now,
                "lr": lr,
                "grad_norm": None if overflowed else norm,
                **speed,
            }
            rate = speed["tokens_per_s"]
            bar.step(1, f"loss {loss_now:.3f}  {rate:.0f} tok/s  {meter.peak:.2f} GB")

            is_over = facts.step == facts.total
            if is_over or facts.step % cfg.eval_every == 0:
                line["val_loss"] = evaluate(job)
                bar.line("val_loss", f"{line['val_loss']:.4f} after step {facts.step}")
            job.run.log(line)
            if 0 < cfg.patience <= facts.without_progress:
                is_over = True
                tired = f"no progress in {cfg.patience} evaluations: stopped after step"
                bar.line("patience", f"{tired} {facts.step}")
            if is_over or stop.signal or facts.step % cfg.save_every == 0:
                save_all(job)
            if is_over:
                break
            meter.rest()
        bar.close()
        if stop.signal and facts.step < facts.total:
            return stopped(job, stop)
    after_training(job)
    return 0


def feed(job):
    """The batches of each step that is still to be made."""
    steps = data.steps_of_run(job.dataset, job.data_cfg, job.cfg.grad_accum)
    steps = itertools.islice(steps, job.facts.step, job.facts.total)
    mask_prompt = job.data_cfg.mask_prompt
    return data.feed(job.dataset, steps, job.device, mask_prompt, job.data_cfg.budget)


def stopped(job, stop):
    """A signal ended the loop: the state is saved. -> the exit code"""
    step = job.facts.step
    if job.saved_at != step:
        save_all(job)
    go_on_with = f"python train.py --resume --out {job.cfg.out}"
    say("stopped", f"after step {step}, saved. Go on with: {go_on_with}")
    return stop.exit_code


def after_training(job):
    """The receipts, curve.png, the recipe after, and the run's figures on stdout and in summary.json."""
    facts = job.facts
    meter = job.built.meter
    meter.say_summary(job.built.is_compiled)
    pictures.curve(job.run.folder / "curve.png", job.run.history())
    say("after", job.title)
    write_recipe(job)
    summary = {
        "steps": facts.step,
        "val_loss_before": facts.val_before,
        "val_loss_after": facts.val,
        **meter.summary(),
    }
    job.run.write_json("summary.json", summary)
    print(json.dumps({key: summary[key] for key in RESULT}))
    where = "" if job.cfg.out == "out" else f" --run {job.cfg.out}"
    say("saved", f"{job.run.folder}: try `python sample.py{where}`")


# What programs that call this one read on stdout.
RESULT = ["steps", "val_loss_before", "val_loss_after", "tokens_per_s", "peak_mem_gb"]


if __name__ == "__main__":
    cli.run(main)
