"""Fine-tune a Llama-architecture model to write recipes, on one GPU or a laptop.

    python train.py                                     # SmolLM2-135M on the Wikibooks Cookbook, which pip fetches once
    python train.py --lora_r 16 --compile --grad_ckpt   # the same adapter, compiled, in a third of the memory
    python train.py --resume --max_steps 200            # continue the run in out/ up to step 200

To understand the code, read rows.py, recipes.py, text.py and data.py, which make a batch; then model.py, quant.py and
lora.py, which make a gradient; then this file. `build` applies each optimisation of speed/, in order. README's
section "How much memory" tells which model fits which card; --plan does so for a run (planner.py).
"""

import cli
from cli import UserError, say

import itertools
import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

import data
import fit
import lora
import model as models
import planner
import quality
import quant
from data import Data
from files import board, disk, hub, tokenizer, weights
from files.run import (
    Facts,
    Run,
    Stop,
    check_out,
    how_often,
    refuse_other_flags,
    started_with,
)
from job import (
    Built,
    Job,
    adapter_settings,
    after_training,
    before_training,
    evaluate_step,
    give_up,
    is_tired,
    save_all,
    say_bad,
    stopped,
)
from recipes import Rules
from speed import checkpoint, compiled, graphs, loss, meters, offload, optim, precision, rate
from text import check_targets


@dataclass
class Config:
    # fmt: off
    out: str = "out"                   # folder of the run: adapter, best/ (lowest val_loss), curve.png, resume state
    resume: bool = False               # continue the run in --out with its flags; --max_steps or --epochs may be raised
    init_adapter: str = ""             # folder of a LoRA adapter (PEFT format) to start from; none: an untrained one
    device: str = "auto"               # device to train on: auto, cuda, mps or cpu
    # --- adapter ---
    lora_r: int = 16                   # rank of the LoRA adapter; 0: no adapter, all weights are trained
    lora_alpha: int = 32               # LoRA scale: the adapter's output is multiplied by lora_alpha / lora_r
    lora_dropout: float = 0.0          # dropout probability on the LoRA adapter's input, in training only; 0: none
    lora_targets: str = "all"          # layers that get a LoRA adapter: all, or names such as q_proj,v_proj
    rslora: bool = False               # multiply the LoRA output by lora_alpha / sqrt(lora_r), not lora_alpha / lora_r
    # --- speed and memory: each can be switched off; the tables in README.md have what each buys ---
    quant: Literal["none", "nf4", "fp8"] = "none"  # how the frozen weights are held: as --dtype says, in 4 or in 8 bits
    fp8: bool = False                  # do products with frozen weights in 8-bit floats (see speed/fp8.py)
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # number format of arithmetic; auto: the device's best
    attn: Literal["naive", "flash", "cudnn"] = "flash"  # attention kernel; only naive holds the score matrix
    fused_loss: bool = True            # compute the loss in chunks, so that all logits are never in memory at once
    grad_ckpt: bool = False            # keep only the input of each transformer block; recompute the rest in backward
    ckpt_blocks: int = 0               # with --grad_ckpt: recompute only the first this many blocks; 0: all
    offload_ckpt: bool = False         # with --grad_ckpt: hold what it keeps for backward in pinned host memory
    offload_embed: bool = False        # keep the input embedding in host memory, to save GPU memory
    compile: bool = False              # compile the model with torch.compile: one graph for all blocks and lengths
    cuda_graph: bool = False           # launch each micro-batch as one CUDA graph: for small batches and slow CPUs
    optim: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"  # AdamW with 32-bit, 8-bit or paged 8-bit states
    grad_accum: int = 1                # micro-batches per optimiser step; together they act as one larger batch
    # --- schedule ---
    lr: float = 1e-3                   # peak learning rate, then cosine to 0; 1e-3 suits 135M weights, 2e-4 suits 8B
    warmup_steps: int = 5              # optimiser steps in which the learning rate rises to --lr
    weight_decay: float = 0.0          # weight decay of AdamW
    grad_clip: float = 1.0             # clip the norm of the gradient to this number; 0: no clipping
    max_steps: int | None = None       # optimiser steps; none: 60, or all of --epochs if given; 0: --epochs decides
    epochs: int | None = None          # passes over the training recipes (none: 1), where --max_steps is none or 0
    patience: int = 0                  # stop after this many evaluations without a lower val_loss; 0: never
    # --- watching ---
    eval_every: int = 30               # optimiser steps between evaluations on the held-out recipes
    save_every: str = "50"             # save the adapter and the resume state every 50 steps, or 10m: every 10 minutes
    max_bad_steps: int = 10            # stop after this many steps in a row whose loss or gradient is nan or infinite
    tensorboard: bool = False          # also write metrics for TensorBoard into --out; needs the package tensorboard
    plan: bool = False                 # print memory, speed and hours of the run that the flags ask for, and stop
    card: str = ""                     # with --plan: plan for this card, H100 or T4 say, and not for this machine
    fit: float = 0                     # GB of a card: train with the fastest flags whose plan fits; 0: as given
    allow: str = ""                    # what --fit may change beside flags that keep the results: quant,fp8,batch
    # fmt: on


def check(cfg, data_cfg):
    """Out-of-range flags, said before anything is loaded."""
    data.check(data_cfg)
    optim.check_length(cfg.max_steps, cfg.epochs)
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
        patience=0,
        ckpt_blocks=0,
        eval_every=1,
        max_bad_steps=1,
    )
    how_often(cfg.save_every)
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
    if cfg.ckpt_blocks and not cfg.grad_ckpt:
        raise UserError(
            "--ckpt_blocks says how many blocks --grad_ckpt recomputes: add --grad_ckpt, or --ckpt_blocks 0."
        )
    if cfg.tensorboard:
        board.check()
    check_plan(cfg)


def check_plan(cfg):
    cli.bound(cfg, fit=0)
    fit.check_allowed(cfg.allow)
    if cfg.allow and not cfg.fit:
        raise UserError("--allow says what --fit may change: add --fit GB.")
    if cfg.card and not cfg.plan:
        raise UserError("--card plans for another card: add --plan.")
    if cfg.fit and cfg.resume:
        raise UserError("--fit chooses flags of a new run, and --resume keeps those of an old one.")


# --- 1. the model, and every optimisation in the order in which they are applied ---


def build(cfg, data_cfg, folder, device, meter, longest=None):
    """The model of a folder with all that the flags ask for: Built. longest: tokens of the longest recipe

    The order: a step may change only what no earlier step has taken hold of. From the inside to the outside:

        recorded (offloaded (checkpoint (compiled (block with adapters (frozen linears)))))"""
    # 1. Pick dtypes and kernels, because the weights are loaded in that dtype.
    kept, compute, why = precision.pick_dtype(cfg.dtype, device, train_all=not cfg.lora_r)
    precision.say_dtype(kept, why)
    how = {"attn": precision.pick_attention(cfg.attn), "longest": longest}
    compiled.wait_for_compiler()

    # 2. Load the weights. Quantise each while it streams off the disk, so that 8B's 16 GB are never held in bf16.
    # Then put adapters around the quantised layers, because an adapter takes the place of the layer that it wraps.
    if cfg.lora_r:
        with meter.loading(folder.name):
            make_linear = quant.make_linear(cfg.quant)
            model = lora.load_model(folder, device, kept, make_linear, stream_dtype=compute, **how)
        meters.say_quantised(cfg.quant, model, kept)
        if cfg.fp8:
            quant.multiply_in_fp8(model, device)
            say("fp8", "frozen matmuls, forward and input gradient, in e4m3 with a scale a row")
        params, trained = add_adapter(model, cfg, data_cfg.seed)
    else:
        # Train the weights in fp32, because bf16 would round most of Adam's steps away. Autocast multiplies in bf16.
        model = models.load(folder, device, torch.float32, **how)
        params, trained = train_all(model)
    precision.say_packed(data_cfg.budget, models.takes_packed(model, device))

    # 3. Choose the loss before step 5, which compiles its chunk: logits a chunk at a time, or all at once.
    sum_loss = loss.chunked if cfg.fused_loss else loss.plain
    built = Built(model, params, trained, compute, sum_loss, meter)

    # 4. Move the embedding to the host. Its place in this order is free, because no block contains the embedding.
    # `check` refuses --cuda_graph with this flag, because a recorded step cannot wait for the host.
    if cfg.offload_embed:
        offload.embedding_to_host(model)

    # 5. Compile before step 6 wraps, so that checkpoints and offloading stay outside the graph. Inside a graph
    # torch.utils.checkpoint keeps three tensors a block (torch 2.11, README). Offloading moves what autograd saves of a
    # compiled part, so it must see the part as a whole. With --offload_ckpt the parts are halves of blocks, so that the
    # inputs of attention and of MLP can both leave the card.
    blocks = len(model.layers)
    # How many blocks are checkpoints: the first ones, because backward comes to them last.
    first = 0
    if cfg.grad_ckpt:
        first = checkpoint.how_many(blocks, cfg.ckpt_blocks)
    recomputed = models.places(model, range(first), halves=cfg.offload_ckpt)
    kept = models.places(model, range(first, blocks))
    by_compiler = False
    if cfg.compile:
        # The compiler's own checkpoint recomputes less than speed/checkpoint.py, because it sees that backward needs no
        # output of down_proj. With dropout it would draw another mask in the recomputation, so it is not used there.
        by_compiler = not cfg.lora_dropout
        # In backward one dequantised weight serves recomputation and input gradient, and is held between the two. Not
        # with --offload_embed, because whoever gives that flag prefers memory to speed.
        once = by_compiler and not cfg.offload_embed
        built.compile(recomputed, kept, by_compiler, once, one_length=data_cfg.budget > 0)

    # 6. Put checkpoints around compiled blocks. Put offloading around checkpoints, because it moves what they keep.
    if not by_compiler:
        checkpoint.apply(recomputed, random=cfg.lora_dropout > 0)
    if cfg.offload_ckpt:
        offload.apply(recomputed, device)

    # 7. Record last, because a CUDA graph replays a whole micro-batch, with everything that was put around the blocks.
    if cfg.cuda_graph:
        built.graphs = graphs.Graphs(built.eager_step, device)
    return built


def add_adapter(model, cfg, seed):
    """-> {PEFT's key: A or B}, [the one flat tensor that they are views of]"""
    # On --resume ignore --init_adapter, because Run.go_on fills the adapter from the saved state.
    init = "" if cfg.resume else cfg.init_adapter
    params = lora.begin(model, adapter_settings(cfg), seed, init)
    return params, [optim.flatten(list(params.values()))]


def train_all(model):
    """--lora_r 0. -> {Hugging Face's name: weight}, [all weights]"""
    params = {weights.hf_name(name): p for name, p in model.named_parameters()}
    say("lora", f"off: all {models.size(model):,} weights are trained, in fp32")
    return params, list(params.values())


def parse_flags():
    """(Config, Data, Rules) of the command line. A resume has those that its run was started with."""
    cfg, data_cfg, rules = cli.parse(__doc__, Config, Data, Rules)
    if cfg.resume:
        old = started_with(cfg.out, asdict(cfg), flags_of(Config(), Data(), Rules()))
        cfg, data_cfg, rules = cli.parse(__doc__, Config, Data, Rules, defaults=old)
        refuse_other_flags(old, flags_of(cfg, data_cfg, rules))
    cfg = disk.at_home(cfg, "out", "init_adapter")
    data_cfg = disk.at_home(data_cfg, "model", "data", "val_data")
    return cfg, data_cfg, rules


def flags_of(*configs):
    """{flag: value} of some dataclasses of flags."""
    flags = {}
    for config in configs:
        flags |= asdict(config)
    return flags


def find_base(cfg, data_cfg):
    """The base model's folder. A model that is no Llama is refused here, before the recipes are read."""
    base = hub.resolve(data_cfg.model, disk.cache_folder(data_cfg.cache))
    check_out(cfg.out, cfg.resume, data_cfg.model, base, data_cfg.data + data_cfg.val_data)
    checkpoint.check(models.read_config(base).num_hidden_layers, cfg.ckpt_blocks)
    return base


def about(job, rules):
    """run.json: what this run is."""
    model = job.built.model
    return {
        "config": flags_of(job.cfg, job.data_cfg),
        "rules": asdict(rules),
        **disk.about_model(job.base),
        **data.about_data(job.dataset, job.held),
        "dtype": str(model.embed_tokens.weight.dtype),
        "arithmetic": str(model.stream_dtype or torch.float32),
        "data": {**job.dataset.account, "held_out": len(job.held.indices)},
        "titles": quality.titles(job.held, job.text),
    }


# --- 3. the run ---


def show_plan(cfg, data_cfg, rules):
    """--plan: print what the run takes, before any weight is read. -> the exit code"""
    device = precision.pick_device(cfg.device)
    cache = disk.cache_folder(data_cfg.cache)
    # Lengths of recipes need a tokenizer. Without --data one small file of a hub's model is enough, and a folder has
    # what it has.
    needs = "config"
    if data_cfg.data and not Path(data_cfg.model).is_dir():
        needs = "tokenizer"
    base = hub.resolve(data_cfg.model, cache, needs)
    config = models.read_config(base)
    checkpoint.check(config.num_hidden_layers, cfg.ckpt_blocks)
    dataset = None
    lengths = None
    if tokenizer.has_files(base) and hub.has_recipes(data_cfg.data, cache):
        dataset, _, _ = data.prepare(data_cfg, rules, base)
        lengths = dataset.lengths(dataset.indices)
    # --allow fp8 asks for the rate of 8-bit products, too.
    card = planner.card_of(cfg.card, device, config, cfg.fp8 or cfg.fit > 0)
    plan = planner.of_run(config, cfg, data_cfg, lengths, 0, card)
    if cfg.fit:
        plan = fit.chosen(plan, cfg.fit * 1e9, cfg.allow, rules)
    planner.show(replace(plan, steps=steps_of_plan(plan, dataset)))
    return 0


def steps_of_plan(plan, dataset):
    """How many steps the run has; None where that depends on recipes, and there are none."""

    def steps_of(epochs):
        if dataset is None:
            return 0
        return data.count_steps(dataset, plan.data_cfg, plan.cfg.grad_accum, epochs)

    steps, _ = optim.how_many_steps(plan.cfg.max_steps, plan.cfg.epochs, steps_of)
    return steps or None


def fitted(cfg, data_cfg, rules, config, lengths, device):
    """--fit: (Config, Data) with the fastest flags whose plan fits."""
    card = planner.card_of("", device, config, fp8=True)
    plan = planner.of_run(config, cfg, data_cfg, lengths, 0, card)
    if cfg.fit * 1e9 > card.memory:
        say("fit", f"{card.name} has {card.memory / 1e9:.1f} GB, less than --fit {cfg.fit:g}")
    plan = fit.chosen(plan, cfg.fit * 1e9, cfg.allow, rules)
    check(plan.cfg, plan.data_cfg)
    say("config", json.dumps(flags_of(plan.cfg, plan.data_cfg), ensure_ascii=False))
    if plan.work.compile:
        compiled.start_compiler()
    return plan.cfg, plan.data_cfg


def set_up(cfg, data_cfg, rules):
    """Everything that the loop needs."""
    say("config", json.dumps(flags_of(cfg, data_cfg), ensure_ascii=False))
    device = precision.pick_device(cfg.device)
    torch.manual_seed(data_cfg.seed)
    if cfg.compile:
        compiled.start_compiler()

    base = find_base(cfg, data_cfg)
    config = models.read_config(base)
    dataset, held, text = data.prepare(data_cfg, rules, base)
    lengths = dataset.lengths(dataset.indices)
    if cfg.fit:
        cfg, data_cfg = fitted(cfg, data_cfg, rules, config, lengths, device)
    plan = planner.of_run(config, cfg, data_cfg, lengths, 0, rate.unmeasured(device))
    steps_of = partial(data.count_steps, dataset, data_cfg, cfg.grad_accum)
    total, why = optim.how_many_steps(cfg.max_steps, cfg.epochs, steps_of)
    say("data", f"{data.sizes(dataset, held)}, {total} steps ({why})")
    check_targets(dataset, text, data_cfg)
    data.say_small(dataset, data_cfg, cfg.grad_accum)

    meter = meters.Meter(device, compiled.graphs_so_far)
    with fit.out_of_memory(device, partial(fit.while_loading, plan)):
        built = build(cfg, data_cfg, base, device, meter, max(dataset.longest, held.longest))
        if cfg.optim != "adamw":
            # Load bitsandbytes here, so that a missing one is a sentence and no traceback.
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
            plan=plan,
        )
        info = about(job, rules)
        job.title = info["titles"][data_cfg.seed % len(info["titles"])]
        job.run = Run(cfg.out, cfg.resume)
        cli.TERMINAL.log_in(job.run.folder)
        if cfg.resume:
            job.facts = job.run.go_on(info, optimizer, built.params, total)
            job.scale = precision.LossScale(built.compute, job.facts.loss_scale)
        if not cfg.lora_r:
            job.run.keep(base, weights.BESIDE_WEIGHTS)
        job.run.write_about(info)
    if cfg.tensorboard:
        job.start_board()
    return job


def one_step(job, batches, lr):
    """One optimiser step on the mean loss over all target tokens of its micro-batches (gradient accumulation).

    Why over tokens: micro-batches have unequal numbers of target tokens. Two of 100 and 300 tokens with mean losses 4
    and 2 have the mean (100 · 4 + 300 · 2) / 400 = 2.5 over tokens. The mean of the two means is 3: there each token of
    the small micro-batch would weigh three times as much, and --grad_accum would change what is optimised. So every
    micro-batch's sum is divided by the target tokens of the whole step, before its backward.
    What it buys: at 8B a micro-batch of 8,192 tokens keeps 2.1 GB with --grad_ckpt; --batch_size 8 --grad_accum 4 keeps
    a fourth of that, and has the gradient of --batch_size 32.
    Cost: as many forward and backward passes as micro-batches, each with fewer tokens to fill the card.
    Proof: tests/test_train.py: test_accumulation_is_the_gradient_of_one_larger_batch. tests/test_witness.py:
    test_grad_accum_is_the_gradient_of_a_larger_batch.

    A step whose loss or gradient is nan or infinite is left out: weights and optimiser stay as they are, bit for bit.
    Cost: once a step the host waits for the card before it launches AdamW.
    Proof: tests/test_train.py: test_a_bad_step_changes_nothing.

    -> (loss, norm of the gradient, what became of the step: TAKEN, OVERFLOW or BAD of speed/precision.py)"""
    built = job.built
    scale = job.scale
    targets = sum(len(b.targets) for b in batches)
    # A micro-batch's sum of losses times `share` is its part of the mean, times the loss scale (fp16: 65,536 at first;
    # else 1). In the example above share is 1 / 400, and the two parts are 400 / 400 = 1 and 600 / 400 = 1.5.
    share = scale.value / targets
    total = 0.0
    for b in batches:
        # Backward adds to the gradients that are there, so after the loop they are those of the whole step.
        scaled = built.forward_backward(b.ids, b.where, b.targets, share, b.cu_seqlens)
        total += scaled / scale.value
    built.meter.launched()
    # Only at the first step: backward must have reached each trained tensor.
    job.watch.check(built.model)
    # Here the gradients are divided by the loss scale, then clipped.
    norm = optim.clip(built.trained, scale.value, job.cfg.grad_clip)
    # An inf or nan among the gradients shows in their norm. With such a step AdamW would write nan into the weights.
    fate = scale.judge(float(total), float(norm))
    if fate == precision.TAKEN:
        job.optimizer.param_groups[0]["lr"] = lr
        job.optimizer.step()
    # An adapter's gradients are views of one tensor (optim.flatten), so they are set to zero and not dropped.
    job.optimizer.zero_grad(set_to_none=not job.cfg.lora_r)
    # float() waits for the GPU, AdamW too, so the clock of meters.Meter stops when the step is done.
    return float(total), float(norm), fate


def main():
    cfg, data_cfg, rules = parse_flags()
    check(cfg, data_cfg)
    if cfg.plan:
        return show_plan(cfg, data_cfg, rules)
    return train(set_up(cfg, data_cfg, rules))


def train(job):
    """The loop. -> the exit code"""
    cfg = job.cfg
    facts = job.facts
    meter = job.built.meter
    job.built.model.train()
    out_of_memory = fit.out_of_memory(job.device, job.out_of_memory)
    with Stop(job.run) as stop, job.run.telling_what_is_kept(), out_of_memory:
        if facts.step == 0 and facts.val_before is None:
            before_training(job)
        bar = cli.Progress(facts.total, "train")
        bar.step(facts.step)
        for batches in feed(job):
            if stop.signal:
                break
            meter.begin()
            lr = optim.lr_at(facts.step + 1, facts.total, cfg.lr, cfg.warmup_steps)
            loss_now, norm, fate = one_step(job, batches, lr)
            speed = meter.end(batches, bar.line)
            # A step that was left out counts, too: its batches are used up, and the schedule goes on.
            facts.step += 1
            facts.count(is_bad=fate == precision.BAD, is_taken=fate == precision.TAKEN)
            # Keep the scale among the facts, so that a resume begins with it.
            facts.loss_scale = job.scale.update(facts.step, fate == precision.OVERFLOW, bar.line)
            line = {
                "step": facts.step,
                "loss": loss_now,
                "lr": lr,
                # JSON has no inf: these are null there.
                "grad_norm": norm,
                **speed,
            }
            if fate == precision.BAD:
                line["bad_rows"] = say_bad(job, loss_now, norm, batches, bar.line)
            rate = speed["tokens_per_s"]
            bar.step(1, f"loss {loss_now:.3f}  {rate:.0f} tok/s  {meter.peak:.2f} GB")

            is_over = facts.step == facts.total
            if is_over or facts.step % cfg.eval_every == 0:
                evaluate_step(job, line, bar.line)
                is_over = is_over or is_tired(job, bar.line)
            job.log(line, bar.line)
            if facts.bad_in_a_row >= cfg.max_bad_steps:
                give_up(job)
            is_time = job.run.is_time_to_save(cfg.save_every, facts.step)
            if is_over or stop.signal or is_time:
                save_all(job)
            if is_over:
                break
            # From here to meter.begin() the loop only waits for its next batches.
            meter.rest()
        bar.close()
        if stop.signal and facts.step < facts.total:
            return stopped(job, stop)
    after_training(job)
    return 0


def feed(job):
    """The batches of each step that is still to be made. A resume leaves out those of the steps that are done."""
    steps = data.steps_of_run(job.dataset, job.data_cfg, job.cfg.grad_accum)
    steps = itertools.islice(steps, job.facts.step, job.facts.total)
    mask_prompt = job.data_cfg.mask_prompt
    return data.feed(job.dataset, steps, job.device, mask_prompt, job.data_cfg.budget)


if __name__ == "__main__":
    cli.run(main, outlives_terminal=True)
