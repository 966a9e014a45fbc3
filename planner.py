"""--plan: what a run takes and how long it goes on, before any weight is read.

    plan = of_run(config, cfg, data_cfg, lengths, steps, card)
    show(plan)                                      # a table to stderr, one JSON line to stdout

speed/memory.py has the arithmetic of memory, speed/rate.py that of time. Here they meet the flags and the data: the
largest micro-batch decides on the peak, all micro-batches of an epoch on the hours.
"""

from cli import UserError

import functools
import itertools
import sys
from dataclasses import dataclass, replace

import numpy as np
import torch

import data
import lora
from files import disk
from speed import checkpoint, memory, precision, rate

# --- 1. a run in numbers ---

# So many recipes tell the sizes of an epoch's batches well enough, unless a micro-batch has more.
MOST_LENGTHS = 50_000
# Recipes of a plan without data.
FULL = 128


def shape_of(config):
    """The memory.Shape of a model.ModelConfig."""
    return memory.Shape(
        C=config.hidden_size,
        F=config.intermediate_size,
        L=config.num_hidden_layers,
        H=config.num_attention_heads,
        K=config.num_key_value_heads,
        D=config.head_dim,
        V=config.vocab_size,
        tied=config.tie_word_embeddings,
    )


# The flags that memory.Work knows by the same name.
SAME_NAME = [
    "lora_r",
    "quant",
    "fp8",
    "fused_loss",
    "grad_ckpt",
    "ckpt_blocks",
    "offload_ckpt",
    "offload_embed",
    "compile",
    "cuda_graph",
]


@dataclass(frozen=True)
class Plan:
    """A run that has not begun: its model, flags and data, and the card that it is planned for."""

    shape: memory.Shape
    cfg: object  # train.Config
    data_cfg: data.Data
    lengths: np.ndarray  # tokens of each recipe that is trained on
    steps: int | None  # none: it depends on recipes, and there are none
    card: rate.Card
    weight: int  # bytes of a frozen weight in --dtype
    number: int  # bytes of a number of the arithmetic
    note: str = ""  # what was assumed

    @functools.cached_property
    def batches(self):
        """The micro-batches of an epoch, the largest first: [rows, tokens of a row, real tokens] each."""
        steps = data.plan(self.lengths, self.data_cfg, 0, self.cfg.grad_accum)
        return self.sizes(self.lengths, itertools.chain(*steps))

    def sizes(self, lengths, batches):
        """[rows, tokens of a row, real tokens] of each batch, the largest first. batches: positions in `lengths`"""
        # On a GPU a padded row is a multiple of 8 tokens (data.make_step).
        tile = data.TILE if self.card.is_gpu else 1
        # A recipe's last token is a target only, never an input.
        inputs = lengths - 1
        found = []
        for rows in batches:
            longest = -(-int(inputs[rows].max()) // tile) * tile
            shape = (len(rows), longest)
            if self.data_cfg.budget:
                shape = (1, self.data_cfg.budget)
            found.append((*shape, int(inputs[rows].sum())))
        found = np.array(found)
        return found[np.argsort(-found[:, 0] * found[:, 1], kind="stable")]

    @functools.cached_property
    def work(self):
        """The memory.Work of the largest micro-batch."""
        return self.work_of(self.lengths, self.batches)

    def evaluating(self, lengths):
        """The memory.Work of the largest held-out batch. lengths: tokens of each held-out recipe"""
        order = (-lengths).argsort(kind="stable")
        return self.work_of(lengths, self.sizes(lengths, data.cut(order, lengths, self.data_cfg)))

    def work_of(self, lengths, batches):
        """The memory.Work of the first of `batches`."""
        rows, tokens, real = batches[0].tolist()
        same = {name: getattr(self.cfg, name) for name in SAME_NAME}
        document = 0
        if self.data_cfg.budget and self.takes_documents:
            document = int(lengths.mean())
        return memory.Work(
            rows=rows,
            tokens=tokens,
            targets=real,
            lora_targets=self.targets,
            dropout=self.cfg.lora_dropout > 0,
            bytes_of_a_weight=self.weight,
            bytes_of_a_number=self.number,
            attn=self.attention,
            optim=self.optimizer,
            on_gpu=self.card.is_gpu,
            document=document,
            masked=self.data_cfg.budget > 0 and not self.takes_documents,
            **same,
        )

    @property
    def takes_documents(self):
        """Whether varlen attention keeps the recipes of a packed row apart, as model.takes_documents says."""
        if self.cfg.attn == "naive" or not (self.card.is_gpu and self.card.flash):
            return False
        # With --lora_r 0 the residual stream is fp32.
        in_16_bits = self.number == 2 and self.cfg.lora_r > 0
        return in_16_bits and self.shape.D % 8 == 0 and self.shape.D <= 256

    @property
    def targets(self):
        """The layers of --lora_targets, each once."""
        names = lora.target_names(self.cfg.lora_targets)
        lora.check_targets(names)
        return tuple(name for name in lora.PARENT if name in names)

    @property
    def attention(self):
        """The kernel of --attn, or what PyTorch takes where flash has none: for grouped heads before Ampere."""
        grouped = self.shape.K < self.shape.H
        if self.cfg.attn != "naive" and grouped and not self.card.flash:
            return "math"
        return self.cfg.attn

    @property
    def optimizer(self):
        """Only a GPU has paged states."""
        if self.cfg.optim == "paged_adamw8bit" and not self.card.is_gpu:
            return "adamw8bit"
        return self.cfg.optim

    @functools.cached_property
    def peak(self):
        return memory.peak(self.shape, self.work)

    @property
    def needed(self):
        """Bytes of the card."""
        return memory.needed(self.peak, self.card.context)

    @property
    def host(self):
        """Bytes of host memory."""
        if not self.card.is_gpu:
            return self.needed
        return sum(memory.of_host(self.shape, self.work).values())

    @functools.cached_property
    def tokens_per_s(self):
        """Real tokens a second: those of some micro-batches, evenly spread over the epoch, over their seconds."""
        tokens = 0
        seconds = 0.0
        update = rate.updating(self.shape, self.work, self.card) / self.cfg.grad_accum
        every = max(1, len(self.batches) // 64)
        for rows, length, real in self.batches[::every].tolist():
            work = replace(self.work, rows=rows, tokens=length, targets=real)
            seconds += rate.step_seconds(self.shape, work, self.card) + update
            tokens += real
        return tokens / seconds

    @property
    def hours(self):
        """Of training alone: not of the first step, which compiles, nor of evaluations. None where steps are."""
        if self.steps is None:
            return None
        batches = self.cfg.grad_accum
        if not self.note:
            # A step that asks for more recipes than there are trains on those.
            batches = min(batches, len(self.batches))
        real = float(self.batches[:, 2].mean()) * batches * self.steps
        return real / self.tokens_per_s / 3600

    def changed(self, flags):
        """The same run with other flags. flags {name: value}: of Config, and batch_size of Data"""
        of_data = {name: flags[name] for name in flags if name in ("batch_size", "batch_tokens")}
        of_cfg = {name: flags[name] for name in flags if name not in of_data}
        cfg = replace(self.cfg, **of_cfg)
        changed = replace(self, cfg=cfg, data_cfg=replace(self.data_cfg, **of_data))
        if "dtype" in of_cfg:
            weight, number = sizes_of(cfg, self.card)
            changed = replace(changed, weight=weight, number=number)
        if not of_data and cfg.grad_accum == self.cfg.grad_accum:
            # The batches stay, and to plan them takes longer than all else.
            vars(changed)["batches"] = self.batches
        return changed


def of_run(config, cfg, data_cfg, lengths, steps, card):
    """The Plan of a run. config: model.ModelConfig. lengths: tokens of each recipe; None: of a run without data"""
    shape = shape_of(config)
    checkpoint.check(shape.L, cfg.ckpt_blocks)
    note = ""
    why = ""
    if lengths is None:
        note = f", because without a tokenizer and recipes every row is taken as --max_len {data_cfg.max_len} long"
        why = f" (as --max_len {data_cfg.max_len} says, because there are no recipes to count)"
        if data_cfg.batch_size > MOST_LENGTHS:
            note += f", and a micro-batch as {MOST_LENGTHS} recipes at most"
        lengths = full_length(data_cfg, cfg.grad_accum)
    check_tokens(data_cfg, int(lengths.max()), why)
    most = max(MOST_LENGTHS, recipes_of_a_batch(data_cfg, lengths))
    if len(lengths) > most:
        some = lengths[:: len(lengths) // most]
        lengths = np.append(some, lengths.max())
    weight, number = sizes_of(cfg, card)
    return Plan(shape, cfg, data_cfg, lengths, steps, card, weight, number, note)


def check_tokens(data_cfg, longest, why):
    """An error where the longest recipe does not fit into --batch_tokens. With recipes data.load_dataset says so."""
    most = data_cfg.budget or data_cfg.batch_tokens
    if 0 < most < longest:
        raise UserError(
            f"--batch_tokens {most}: the longest recipe has {longest} tokens{why}; raise it."
        )


def recipes_of_a_batch(data_cfg, lengths):
    """About how many recipes a micro-batch asks for."""
    tokens = data_cfg.budget or data_cfg.batch_tokens
    if tokens:
        return int(tokens / lengths.mean())
    return data_cfg.batch_size


def full_length(data_cfg, grad_accum):
    """Lengths for a plan without data: recipes of whole steps, each --max_len long, at least FULL of them.

    So many rows are there for the largest batch that --fit tries. Of a step of more than MOST_LENGTHS recipes only so
    many are there."""
    longest = np.full(1, data_cfg.max_len)
    rows = min(max(1, recipes_of_a_batch(data_cfg, longest)), MOST_LENGTHS)
    step = rows * max(1, min(grad_accum, MOST_LENGTHS // rows))
    return np.full(step * -(-FULL // step), data_cfg.max_len, dtype=np.int64)


def card_of(name, device, config, fp8):
    """The Card of --card, or this machine's, measured in a second. fp8: its products in 8 bits, too"""
    if not name:
        return rate.measured(device, shape_of(config), fp8)
    found = rate.CARDS.get(name.lower().replace(" ", ""))
    if found is None:
        known = ", ".join(card.name for card in rate.CARDS.values())
        raise UserError(f"--card {name} is not known; choose one of {known}.")
    return found


def sizes_of(cfg, card):
    """Bytes of a frozen weight, and of a number of the arithmetic. Every GPU works in 16 bits; a CPU may not.

    fp16 is too coarse to train all weights with, so --lora_r 0 works in fp32 where there is no bf16."""
    if card.is_gpu:
        if cfg.dtype == "bf16" and not card.has_bf16:
            raise UserError(f"--dtype bf16: {card.name} has no bf16; use --dtype fp16.")
        in_fp32 = cfg.dtype == "fp32" or not (cfg.lora_r or card.has_bf16)
        size = 4 if in_fp32 else 2
        return size, size
    kept, compute, _ = precision.pick_dtype(cfg.dtype, torch.device(card.device), not cfg.lora_r)
    return kept.itemsize, compute.itemsize


# --- 2. --plan ---

MEANS = {
    "base": "linears of the blocks",
    "quant constants": "scales of the quantised weights",
    "embedding and head": "and the norms",
    "adapter": "A and B of LoRA, fp32",
    "gradients": "fp32",
    "optimizer": "AdamW's two states",
    "workspace": "of cuBLAS, measured",
    "kept for backward": "of blocks that are no checkpoints",
    "checkpoints": "the input of each checkpoint",
    "last norm": "what the last norm and the loss read",
    "loss chunk": "logits and their gradient",
    "norm in fp32": "backward of the last norm",
    "one block": "a block recomputed, and its backward",
    "scores": "attention at work",
}


def show(plan):
    """The table to stderr, the JSON line to stdout."""
    if plan.cfg.fp8 and plan.card.is_gpu and not plan.card.fp8:
        raise UserError(
            f"--fp8: {plan.card.name} multiplies no 8-bit floats, or none of these sizes; drop --fp8."
        )
    at = plan.peak
    for line in table(plan, at):
        print(line, file=sys.stderr)
    print(disk.json_line(as_json(plan, at)))


def table(plan, at):
    shape = plan.shape
    work = plan.work
    weights = shape.weights() / 1e9
    lines = [
        f"{weights:.2f} billion weights: {shape.L} blocks, C {shape.C}, F {shape.F}, V {shape.V}",
        f"largest micro-batch: {work.rows} x {work.tokens} tokens{plan.note}",
        "",
        f"{'GB':>8}  held at the peak, which is the moment of: {at.moment}",
    ]
    for name, size in at.parts.items():
        if size:
            lines.append(f"{size / 1e9:8.2f}  {name}: {MEANS[name]}")
    in_all = "in all, the peak"
    if plan.card.is_gpu:
        in_all += " (torch.cuda.max_memory_allocated)"
    lines.append(f"{at.bytes / 1e9:8.2f}  {in_all}")
    others = [f"{name} {size / 1e9:.2f}" for name, size in at.moments.items() if name != at.moment]
    lines.append(
        f"{'':>8}  other moments: {', '.join(others)}; while loading {at.loading / 1e9:.2f}"
    )
    kept = [f"{way} {size:.2f}" for way, size in ways_to_keep(plan).items()]
    lines.append(f"{'':>8}  kept from forward to backward: {', '.join(kept)}")
    lines += ["", f"{plan.host / 1e9:8.2f}  host memory", ""]
    for name, size in memory.beside(at, plan.card.context).items():
        lines.append(f"{size / 1e9:8.2f}  {name}: {beside_the_peak(plan)[name]}")
    lines.append(f"{plan.needed / 1e9:8.2f}  needed: the peak and these two")
    for name, does in fits(plan).items():
        lines.append(f"{'fits' if does else '-':>8}  {name}")
    lines += ["", f"{plan.tokens_per_s:8.0f}  tokens/s on {plan.card.name}"]
    if plan.hours is not None:
        lines.append(f"{plan.hours:8.2f}  hours for {plan.steps} steps")
    return lines


def beside_the_peak(plan):
    """What the parts of memory.beside are."""
    context = "what CUDA takes before the first tensor"
    if not plan.card.is_gpu:
        context = "Python and torch before the model"
    return {
        "allocator": "free memory between its blocks, or what loading takes more",
        "context": context,
    }


def ways_to_keep(plan):
    """{flags: GB that all blocks keep from forward to backward}."""
    ways = {
        "without --grad_ckpt": {"grad_ckpt": False, "offload_ckpt": False},
        "with it": {"grad_ckpt": True, "ckpt_blocks": 0, "offload_ckpt": False},
        "and --offload_ckpt": {"grad_ckpt": True, "ckpt_blocks": 0, "offload_ckpt": True},
    }
    kept = {}
    for way, flags in ways.items():
        parts = memory.kept(plan.shape, replace(plan.work, **flags))
        kept[way] = sum(parts.values()) / 1e9
    return kept


def fits(plan):
    """{card: whether the run fits}."""
    sizes = {f"{size} GB": size * 1e9 for size in rate.SIZES}
    sizes[plan.card.name] = plan.card.memory
    needed = plan.needed
    return {name: needed <= size for name, size in sizes.items()}


def as_json(plan, at):
    beside = memory.beside(at, plan.card.context)
    gigabytes = {name: round(size / 1e9, 4) for name, size in at.parts.items() if size}
    return {
        "peak_gb": round(at.bytes / 1e9, 4),
        "moment": at.moment,
        "parts": gigabytes,
        "moments": {name: round(size / 1e9, 3) for name, size in at.moments.items()},
        "kept": {name: round(size, 3) for name, size in ways_to_keep(plan).items()},
        "loading_gb": round(at.loading / 1e9, 3),
        "host_gb": round(plan.host / 1e9, 3),
        "beside": {name: round(size / 1e9, 3) for name, size in beside.items()},
        "needed_gb": round(plan.needed / 1e9, 3),
        "fits": fits(plan),
        "card": plan.card.name,
        "batch": [plan.work.rows, plan.work.tokens],
        "tokens_per_s": round(plan.tokens_per_s, 1),
        "steps": plan.steps,
        "hours": None if plan.hours is None else round(plan.hours, 4),
    }
