"""A run of train.py: the model that is trained, and what a run does beside training it: evaluate, write a recipe, save,
report.

    Built           a model with every optimisation that train.build put around it, and its two calls
    Job             all that a run needs; train.set_up makes it
    evaluate        held-out loss; the best adapter goes into best/
    save_all        the adapter, and the state from which --resume goes on
    say_bad, give_up: what a run says of steps whose loss or gradient is nan or infinite
    before_training, stopped, after_training: what a run says at its ends

train.py has the flags, the order of the optimisations and the loop.
"""

from cli import UserError, say

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

import data
import fit
import lora
import planner
import quality
import quant
from data import Data
from files import disk, hub, pictures, weights
from files.board import Board
from files.run import Facts, Run
from speed import compiled, loss, meters, optim, precision

# --- 1. the model ---


@dataclass
class Built:
    """A model that is ready for training, with the two calls that a run makes: forward_backward and loss_of.

    set by `build`, when the model is loaded       model, params, trained, compute, sum_loss, meter
    changed by `compile`, step 5 of `build`        is_compiled, and sum_loss gets a compiled chunk
    set by step 7 of `build`                       graphs

    Nothing is set after `build`. Training changes only the numbers inside the tensors."""

    model: torch.nn.Module
    params: dict  # {name in a checkpoint: trained parameter}
    trained: list  # what the optimiser steps on: an adapter's one flat tensor, or all weights
    compute: torch.dtype  # of the products
    sum_loss: Callable  # of speed/loss.py
    meter: meters.Meter
    is_compiled: bool = False
    graphs: Callable | None = None  # --cuda_graph

    def autocast(self):
        """With --lora_r 0 torch's autocast, which casts the fp32 weights for each product; else nothing.

        A model with an adapter casts by itself: `build` gave it a stream_dtype, and its frozen weights have theirs."""
        if self.model.stream_dtype is not None:
            return contextlib.nullcontext()
        return precision.autocast(self.model.frequencies.device, self.compute)

    def forward_backward(self, ids, where, targets, scale, cu_seqlens):
        """Add the gradients of scale * loss to those that are there. -> scale * loss"""
        step = self.eager_step if self.graphs is None else self.graphs
        return step(ids, where, targets, scale, cu_seqlens)

    def eager_step(self, ids, where, targets, scale, cu_seqlens):
        with self.autocast():
            h = self.model(ids, cu_seqlens=cu_seqlens)  # [B, T, C]
            total = self.sum_loss(h, self.model.lm_head.weight, where, targets, scale)
        # Look between forward and backward: on a CPU peak_memory reads this moment, when most is kept for backward.
        self.meter.look()
        total.backward()
        return total.detach()

    def compile(self, recomputed, kept, by_compiler, decode_once, one_length):
        """The blocks (or halves of blocks) at two lists of places, and the chunk of the loss.

        recomputed: of the blocks that backward recomputes; kept: of the others
        by_compiler: recompute by the compiler's own checkpoint; decode_once: see quant.decode_once"""
        compiled.apply(recomputed, kept, by_compiler, one_length)
        if decode_once:
            for parent, name in recomputed:
                quant.decode_once(getattr(parent, name))
        self.is_compiled = True
        if self.sum_loss is loss.chunked:
            self.sum_loss = partial(loss.chunked, chunk=compiled.compile_function(loss.one_chunk))

    def loss_of(self, batch):
        """Sum of the losses of a held-out batch: the same loss as in training, so logits are not held here either."""
        with self.autocast():
            # Keep gradients on, so that a compiled block reuses the training graph: half the compiling.
            with torch.set_grad_enabled(self.is_compiled):
                h = self.model(batch.ids, cu_seqlens=batch.cu_seqlens).detach()
            return self.sum_loss(h, self.model.lm_head.weight, batch.where, batch.targets)


# --- 2. what a run needs ---


@dataclass
class Job:
    """All that a run needs, set up before the loop.

    what                    set by                                  changed later by
    cfg … text              set_up                                  nothing
    built, optimizer        set_up; a resume fills their tensors    one_step, inside their tensors
    scale (fp16)            set_up; a resume: from facts            train, after each step
    watch                   set_up                                  the first step, then it is done
    facts                   set_up; a resume: Run.go_on             train counts steps, evaluate notes losses
    run, title, board       set_up, when the folder is owned        nothing
    plan                    set_up                                  nothing"""

    cfg: object  # train.Config
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
    board: Board | None = None  # --tensorboard
    plan: planner.Plan | None = None

    def out_of_memory(self):
        """What a lack of memory means for this run: (what was done, which flags take less)."""
        # quality.held_out_loss puts the model into evaluation mode.
        if self.built.model.training:
            return "while training", fit.account(self.plan)
        lengths = self.held.lengths(self.held.indices)
        said = fit.evaluation_account(self.plan, lengths)
        return "while the held-out loss was measured", said

    def start_board(self):
        """Before the first step of this process, the evaluation at step 0 of a new run included."""
        first = 0
        if self.cfg.resume:
            first = self.facts.step + 1
        self.board = Board(self.run.folder, first)
        say("tensorboard", f"events go to {self.board.folder}")

    def log(self, line, tell):
        """Write a line of metrics.jsonl, with --tensorboard also as an event. tell(what, text) reports an error."""
        self.run.log(line)
        if self.board is not None:
            self.board.add(line, tell)


def adapter_settings(cfg):
    return lora.Settings(
        r=cfg.lora_r,
        alpha=cfg.lora_alpha,
        dropout=cfg.lora_dropout,
        targets=cfg.lora_targets,
        rslora=cfg.rslora,
    )


# --- 3. evaluation ---


def evaluate(job):
    """Held-out loss per target token; the best adapter so far is kept in best/."""
    built = job.built
    batches = quality.held_out_batches(job.held, job.data_cfg, job.device)
    # A compiled block evaluates with the training graph, which contains the casts of A and B, so leave those there.
    with lora.standing_still(built.model, unless=built.is_compiled):
        val = quality.held_out_loss(built.model, built.loss_of, batches)
    if job.facts.judge(val):
        save(job, "best")
    return val


def is_tired(job, tell):
    """Whether --patience evaluations in a row brought no lower loss."""
    patience = job.cfg.patience
    if patience == 0 or job.facts.without_progress < patience:
        return False
    tell("patience", f"no progress in {patience} evaluations: stopped after step {job.facts.step}")
    return True


def evaluate_step(job, line, tell):
    """An evaluation after a step, whose line of metrics.jsonl gets the loss. tell(what, text) says the loss.

    Where memory runs out, what was trained is saved first, because an evaluation must not cost the steps before it."""
    failure = None
    try:
        line["val_loss"] = evaluate(job)
    except (RuntimeError, MemoryError) as e:
        if not meters.is_out_of_memory(e):
            raise
        # Without its traceback, which holds the tensors of the evaluation.
        failure = e.with_traceback(None)
    if failure is not None:
        job.log(line, tell)
        save_all(job)
        raise failure
    tell("val_loss", f"{line['val_loss']:.4f} after step {job.facts.step}")


def write_recipe(job):
    """One recipe of the model as it is now, on stdout."""
    model = job.built.model
    # Do not use compiled blocks, because each new length would compile a graph. Where memory runs out, go on without a
    # recipe, because training does not need it.
    with meters.go_on_without("recipe", job.cfg.out), compiled.not_compiled(job.built.is_compiled):
        with lora.standing_still(model):
            quality.show_recipe(model, job.text, job.title, job.data_cfg.seed)


# --- 4. saving ---


def save(job, where=""):
    """The adapter (or all weights) into the run's folder, or its best/, as other programs read it."""
    folder = job.run.folder / where
    folder.mkdir(exist_ok=True)
    if job.cfg.lora_r:
        base = job.data_cfg.model or hub.DEFAULT_MODEL
        lora.save(folder, job.built.params, base, adapter_settings(job.cfg))
    else:
        # The run's folder has the base's other files (Run.keep), even if the base is gone by now.
        weights.save_model(folder, job.built.params, job.run.folder)


def save_all(job):
    """Adapter and state, from which --resume goes on. Raise UserError, and write nothing, where these hold nan."""
    job.run.refuse_to_save_no_numbers(job.optimizer, job.built.params, job.facts.step)
    save(job)
    job.run.save_state(job.optimizer, job.built.params, asdict(job.facts))


# --- 5. steps that were left out ---


def say_bad(job, loss, norm, batches, tell):
    """A receipt of a step whose loss or gradient is nan or infinite. -> the numbers of the recipes of its batches"""
    facts = job.facts
    rows = [int(i) for batch in batches for i in batch.rows]
    some = ", ".join(str(i) for i in rows[:8])
    tell(
        "bad step",
        f"{facts.step} is skipped: loss {loss:.4g}, gradient's norm {norm:.4g} (recipes {some} …); "
        f"{facts.bad_in_a_row} in a row, {facts.bad_steps} in all",
    )
    return rows


def give_up(job):
    """End a run of which --max_bad_steps steps in a row were left out. The state is saved: no bad step changed it."""
    save_all(job)
    count = job.facts.bad_in_a_row
    why = precision.why_no_numbers(is_untrained=not optim.has_stepped(job.optimizer))
    raise UserError(
        f"{count} steps in a row had a loss or a gradient that is nan or infinite, and were skipped: {why}."
    )


# --- 6. the ends of a run ---


def before_training(job):
    """A recipe and the held-out loss of the untrained adapter: step 0 of metrics.jsonl."""
    say("before", job.title)
    write_recipe(job)
    val = evaluate(job)
    job.facts.val_before = val
    peak = round(meters.peak_memory(job.device), 3)
    job.run.log_start(val, peak)
    if job.board is not None:
        job.board.add({"step": 0, "val_loss": val, "peak_mem_gb": peak}, say)
    say("val_loss", f"{val:.4f} before training")


def stopped(job, stop):
    """A signal ended the loop: the state is saved. -> the exit code"""
    if job.run.saved_at != job.facts.step:
        save_all(job)
    say("stopped", job.run.kept())
    return stop.exit_code


def after_training(job):
    """The receipts, curve.png, the recipe after, and the run's figures on stdout and in summary.json."""
    facts = job.facts
    meter = job.built.meter
    meter.say_summary(job.built.is_compiled)
    # The adapter is saved by now. Neither a picture nor a figure may end a run whose disk is full.
    picture = job.run.folder / "curve.png"
    with disk.go_on_without(picture):
        pictures.curve(picture, job.run.history())
    say("after", job.title)
    write_recipe(job)
    summary = {
        "steps": facts.step,
        "val_loss_before": facts.val_before,
        "val_loss_after": facts.val,
        "bad_steps": facts.bad_steps,
        **meter.summary(),
    }
    with disk.go_on_without(job.run.folder / "summary.json"):
        job.run.write_json("summary.json", disk.finite(summary))
    print(disk.json_line({key: summary[key] for key in RESULT}))
    say("saved", f"{job.run.folder}: try `python sample.py --run {job.cfg.out}`")


# The keys of the one JSON line on stdout, for programs that call this one.
RESULT = [
    *("steps", "val_loss_before", "val_loss_after", "bad_steps", "tokens_per_s", "peak_mem_gb"),
]
