"""--fit: the fastest flags that fit a card. And what takes less where memory ran out.

    chosen = fit(plan, 24e9, "quant,fp8,batch")     # {flag: value} of the fastest flags that fit 24 GB
    with out_of_memory(device, account): …          # a failed allocation becomes the plan's own account

Both ask the same question of planner.Plan: how much does the run take with other flags?

--fit tries all combinations of flags that keep the results: --compile, --cuda_graph, --offload_embed, and checkpoints
of no block, of as few as fit, of all, and of all in host memory. --allow adds --quant, --fp8 and batch sizes.
The plan is arithmetic, so hundreds of combinations take a second.

Proof: tests/test_fit.py. README.md has two searches beside measured runs.
"""

import cli
from cli import UserError, say

import contextlib
import dataclasses
import importlib.util
import itertools
import shlex
from dataclasses import replace

import model as models
import planner
from speed import compiled, memory, meters

# --- 1. --fit: the fastest flags that fit ---

ALLOWED = ["quant", "fp8", "batch"]
# The sizes of micro-batches that --allow batch tries.
SIZES_OF_BATCHES = {1, 2, 4, 8, 16, 32, 64, 128}


def check_allowed(allow):
    """The names in --allow; UserError for one that is none."""
    names = [name.strip() for name in allow.split(",") if name.strip()]
    for name in names:
        if name not in ALLOWED:
            raise UserError(f"--allow {name} is none of {', '.join(ALLOWED)}.")
    return names


def fit(plan, room, allow):
    """{flag: value} of the fastest choice that needs at most `room` bytes; says the first five."""
    best = ranked(plan, room, allow)
    for number, (flags, one) in enumerate(best[:5], 1):
        size = f"{gigabytes(one.needed)}, {one.tokens_per_s:.0f} tokens/s"
        say("fit", f"{number}. {size}: {written(flags)}")
    chosen, _ = best[0]
    return chosen


def chosen(plan, room, allow, rules):
    """The Plan with the fastest flags that fit; says its command line. rules: recipes.Rules, for that line"""
    plan = plan.changed(fit(plan, room, allow))
    cfg = replace(plan.cfg, fit=0, allow="", plan=False, card="")
    plan = replace(plan, cfg=cfg)
    say("fit", command_line("python train.py", plan.cfg, plan.data_cfg, rules))
    return plan


def ranked(plan, room, allow):
    """[({flag: value}, Plan)] of all choices that need at most `room` bytes, the fastest first."""
    allowed = check_allowed(allow)
    plans = []
    for batch in batch_sizes(plan, allowed):
        resized = plan.changed(batch)
        for flags in same_mathematics(resized, allowed):
            for more in with_checkpoints(resized, flags, room):
                plans.append((batch | more, resized.changed(more)))
    that_fit = [(flags, one) for flags, one in plans if one.needed <= room]
    if not that_fit:
        flags, least = min(plans, key=lambda pair: pair[1].needed)
        raise UserError(
            f"--fit {room / 1e9:g}: nothing fits; the least is {gigabytes(least.needed)}, with {written(flags)}."
        )
    # Of equally fast choices take the one with fewer flags.
    return sorted(that_fit, key=lambda pair: (-pair[1].tokens_per_s, len(written(pair[0]))))


def batch_sizes(plan, allowed):
    """[{flag: value}]: what --allow batch tries. A smaller micro-batch is accumulated, so that the step stays."""
    own = plan.data_cfg.batch_size
    if "batch" not in allowed or plan.data_cfg.batch_tokens or plan.data_cfg.budget:
        return [{}]
    step = own * plan.cfg.grad_accum
    most = len(plan.lengths)
    if plan.note:
        # Without data no row is the last.
        most = planner.FULL
    sizes = sorted(B for B in SIZES_OF_BATCHES | {own} if B <= max(own, most))
    return [{"batch_size": B, "grad_accum": max(1, step // B)} for B in sizes]


def same_mathematics(plan, allowed):
    """Yield {flag: value}: what changes speed and memory, and the arithmetic only where it is allowed to."""
    cfg = plan.cfg
    on_gpu = plan.card.is_gpu
    can_record = on_gpu and cfg.lora_r and not cfg.lora_dropout
    can_offload = on_gpu and cfg.lora_r and not plan.shape.tied
    compiles = [cfg.compile or (on_gpu and compiled.has_compiler())]
    graphs = [False, True] if can_record else [False]
    embeds = [False, True] if can_offload else [False]
    names = ["quant", "fp8", "compile", "cuda_graph", "offload_embed"]
    choices = [quants(plan, allowed), fp8s(plan, allowed), compiles, graphs, embeds]
    for values in itertools.product(*choices):
        flags = dict(zip(names, values, strict=True))
        # A recorded step cannot wait for the host.
        if not (flags["cuda_graph"] and flags["offload_embed"]):
            yield flags


def quants(plan, allowed):
    """The values of --quant to try."""
    if "quant" not in allowed or not plan.cfg.lora_r:
        return [plan.cfg.quant]
    # NF4 keeps 64 weights of a row in a block.
    widths = {inputs for inputs, _ in plan.shape.linears().values()}
    has_blocks = all(width % 64 == 0 for width in widths)
    if has_blocks and importlib.util.find_spec("bitsandbytes"):
        return ["none", "fp8", "nf4"]
    return ["none", "fp8"]


def fp8s(plan, allowed):
    """The values of --fp8 to try."""
    if "fp8" in allowed and plan.cfg.lora_r and plan.card.fp8:
        return [False, True]
    return [plan.cfg.fp8]


def with_checkpoints(plan, flags, room):
    """The flags with no checkpoints, with as few as fit, with all, and with all in host memory: [{flag: value}]."""
    none = {"grad_ckpt": False, "ckpt_blocks": 0, "offload_ckpt": False}
    every = none | {"grad_ckpt": True}
    ways = [none, every]
    few = fewest_checkpoints(plan.changed(flags | every), room)
    if few:
        ways.append(every | {"ckpt_blocks": few})
    if plan.card.is_gpu and not flags["cuda_graph"]:
        ways.append(every | {"offload_ckpt": True})
    return [flags | way for way in ways]


def fewest_checkpoints(plan, room):
    """The least --ckpt_blocks, below all, that needs at most `room` bytes; 0 if there is none.

    Try each, because more checkpoints keep less for the loss but are more when the last of them is recomputed."""
    for n in range(1, plan.shape.L):
        if plan.changed({"ckpt_blocks": n}).needed <= room:
            return n
    return 0


def written(flags):
    """Flags as a command line has them, without those that are off."""
    words = [one_written(name, value) for name, value in flags.items() if is_on(value)]
    if not words:
        return "no flag"
    return " ".join(words)


def is_on(value):
    return value not in [False, 0, "none"]


def one_written(name, value):
    if value is True:
        return f"--{name}"
    text = shlex.quote(str(value))
    # A value that begins like a flag must stand in one word with its own.
    return f"--{name}={text}" if text.startswith("-") else f"--{name} {text}"


def command_line(program, *configs):
    """The command line that gives these dataclasses of flags their values."""
    words = [program]
    for config in configs:
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if value == cli.default_of(field):
                continue
            if isinstance(value, list):
                words.append(f"--{field.name} {shlex.join(value)}")
            elif value is False:
                words.append(f"--no-{field.name}")
            else:
                words.append(one_written(field.name, value))
    return " ".join(words)


# --- 2. memory that ran out ---


def account(plan):
    """What was largest, and which flags would take how much less: two sentences."""
    return f"{largest(plan.peak.parts)} {helps(savings(plan))}"


def while_loading(plan):
    """(what was done, the account) of a model that found no memory while it was loaded."""
    said = f"By the plan that takes {gigabytes(before_a_step(plan))}. {helps(savings(plan, before_a_step))}"
    return "while the model was loaded and made ready", said


def before_a_step(plan):
    """Bytes of loading, or of what is held when a resumed run has its optimiser's state, whichever is more."""
    held = memory.static(plan.shape, plan.work)
    return max(plan.peak.loading, sum(held.values()))


def largest(parts):
    most = sorted(parts.items(), key=lambda part: -part[1])[:4]
    said = ", ".join(f"{name} {gigabytes(size)}" for name, size in most if size)
    return f"By the plan the largest parts are {said}."


def gigabytes(size):
    """Bytes as a user reads them: 3.6 GB; 12 MB below 0.1 GB, 0.3 MB below 1 MB."""
    if size >= 1e8:
        return f"{size / 1e9:.1f} GB"
    if size >= 1e6:
        return f"{size / 1e6:.0f} MB"
    return f"{size / 1e6:.1f} MB"


def helps(saved):
    """saved {flag: bytes} as a sentence."""
    if not saved:
        return (
            "No flag takes less: choose a smaller --max_len or --model, or a card with more memory."
        )
    by_gain = sorted(saved.items(), key=lambda pair: -pair[1])
    flags = ", ".join(f"{flag} ({gigabytes(size)} less)" for flag, size in by_gain)
    return f"In order of gain, these take less: {flags}."


def savings(plan, taken=lambda plan: plan.peak.bytes):
    """{flag as the user writes it: bytes that it takes off}, without what saves next to nothing.

    taken(plan): the bytes that count, of the peak or of loading"""
    now = taken(plan)
    saved = {}
    for text, flags in alternatives(plan).items():
        saved[text] = now - taken(plan.changed(flags))
    return worth_it(saved, now)


def worth_it(saved, now):
    """Of {flag: bytes} those above 1 % of now."""
    return {flag: size for flag, size in saved.items() if size > 0.01 * now}


def alternatives(plan):
    """{flag as the user writes it: {name: value}}: what may be changed in a run that found no memory.

    Among them are flags that the run has already. They save nothing, so `savings` leaves them out."""
    cfg = plan.cfg
    tried = {
        "--grad_ckpt": {"grad_ckpt": True},
        "--fused_loss": {"fused_loss": True},
        "--attn flash": {"attn": "flash"},
    }
    if cfg.grad_ckpt:
        tried["--ckpt_blocks 0"] = {"ckpt_blocks": 0}
    if cfg.optim == "adamw":
        tried["--optim adamw8bit"] = {"optim": "adamw8bit"}
    if plan.card.is_gpu and cfg.grad_ckpt and not cfg.cuda_graph:
        tried["--offload_ckpt"] = {"offload_ckpt": True}
    return tried | of_weights(plan) | of_batches(plan)


def of_weights(plan):
    """Those of the alternatives that make the model smaller."""
    cfg = plan.cfg
    if not cfg.lora_r:
        return {"an adapter (--lora_r 16)": {"lora_r": 16}}
    tried = {}
    for kind in quants(plan, ["quant"]):
        if kind != "none":
            tried[f"--quant {kind}"] = {"quant": kind}
    if plan.weight == 4:
        tried["--dtype bf16"] = {"dtype": "bf16"}
    if plan.card.is_gpu and not cfg.cuda_graph:
        tried["--offload_embed"] = {"offload_embed": True}
    return tried


def of_batches(plan):
    """The alternative of a smaller micro-batch, in tokens or in rows."""
    cfg = plan.data_cfg
    work = plan.work
    if cfg.batch_tokens or cfg.budget:
        tokens = work.n // 2
        # A recipe must have room.
        if tokens < plan.lengths.max():
            return {}
        return {f"--batch_tokens {tokens}": {"batch_tokens": tokens}}
    if work.rows == 1:
        return {}
    rows = work.rows // 2
    text = f"--batch_size {rows} --grad_accum {2 * plan.cfg.grad_accum}"
    return {text: {"batch_size": rows}}


@contextlib.contextmanager
def out_of_memory(device, account):
    """A `with` block. Where memory runs out in it, a UserError says what was done, what is held, which flags help.

    account() -> (what was done, sentences), made when they are needed"""
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if not meters.is_out_of_memory(e):
            raise
        held = meters.peak_memory(device)
        doing, said = account()
        raise UserError(
            f"out of memory {doing}, with {held:.1f} GB in use. {said} ({meters.reason(e)})"
        ) from None


def sampling_account(folder, doing, rows, new_tokens, quant, size):
    """The account of sample.py. folder: of the base. rows: texts at a time. size: bytes of a number of --dtype"""
    config = models.read_config(folder)
    shape = planner.shape_of(config)
    # A prompt is short beside what is written.
    slots = min(new_tokens + 64, config.max_position_embeddings)
    work = memory.Work(
        rows=rows,
        tokens=slots,
        targets=0,
        quant=quant,
        bytes_of_a_weight=size,
        bytes_of_a_number=size,
    )
    half = max(1, rows // 2)
    in_bf16 = replace(work, bytes_of_a_weight=2, bytes_of_a_number=2)
    parts = memory.of_sampling(shape, work, slots)
    others = {
        f"--batch_size {half}": memory.of_sampling(shape, replace(work, rows=half), slots),
        "--quant nf4": memory.of_sampling(shape, replace(work, quant="nf4"), slots),
        "--dtype bf16": memory.of_sampling(shape, in_bf16, slots),
        "half of --max_new_tokens": memory.of_sampling(shape, work, slots // 2),
    }
    now = sum(parts.values())
    saved = {flag: now - sum(other.values()) for flag, other in others.items()}
    return doing, f"{largest(parts)} {helps(worth_it(saved, now))}"
