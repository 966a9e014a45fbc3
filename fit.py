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

import bisect
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

ALLOWED = ("quant", "fp8", "batch")
# The sizes of micro-batches that --allow batch tries.
SIZES_OF_BATCHES = [1, 2, 4, 8, 16, 32, 64, 128]


def check_allowed(allow):
    """The names in --allow; UserError for one that is none."""
    names = [name for name in allow.split(",") if name]
    for name in names:
        if name not in ALLOWED:
            raise UserError(f"--allow {name} is none of {', '.join(ALLOWED)}.")
    return names


def fit(plan, room, allow):
    """{flag: value} of the fastest choice that needs at most `room` bytes; says the first five."""
    best = ranked(plan, room, allow)
    for number, (flags, one) in enumerate(best[:5], 1):
        size = f"{one.needed / 1e9:.1f} GB, {one.tokens_per_s:.0f} tokens/s"
        say("fit", f"{number}. {size}: {written(flags)}")
    chosen, _ = best[0]
    return chosen


def ranked(plan, room, allow):
    """[({flag: value}, Plan)] of all choices that need at most `room` bytes, the fastest first."""
    allowed = check_allowed(allow)
    tried = []
    for batch in batch_sizes(plan, allowed):
        resized = plan.changed(batch)
        for flags in same_mathematics(resized, allowed):
            tried += [batch | more for more in with_checkpoints(resized, flags, room)]
    plans = [(flags, plan.changed(flags)) for flags in tried]
    that_fit = [(flags, one) for flags, one in plans if one.needed <= room]
    if not that_fit:
        flags, least = min(plans, key=lambda pair: pair[1].needed)
        raise UserError(
            f"--fit {room / 1e9:g}: nothing fits; the least is {least.needed / 1e9:.1f} GB, with {written(flags)}."
        )
    # Of equally fast choices take the one with fewer flags.
    return sorted(that_fit, key=lambda pair: (-pair[1].tokens_per_s, len(written(pair[0]))))


def batch_sizes(plan, allowed):
    """[{flag: value}]: what --allow batch tries. A smaller micro-batch is accumulated, so that the step stays."""
    if "batch" not in allowed or plan.data_cfg.batch_tokens or plan.data_cfg.budget:
        return [{}]
    step = plan.data_cfg.batch_size * plan.cfg.grad_accum
    sizes = [B for B in SIZES_OF_BATCHES if B <= len(plan.lengths)]
    return [{"batch_size": B, "grad_accum": max(1, step // B)} for B in sizes]


def same_mathematics(plan, allowed):
    """Yield {flag: value}: what changes speed and memory, and the arithmetic only where it is allowed to."""
    cfg = plan.cfg
    on_gpu = plan.card.name != "cpu"
    quants = [cfg.quant]
    fp8s = [cfg.fp8]
    if "quant" in allowed and cfg.lora_r:
        quants = (
            ["none", "fp8", "nf4"] if importlib.util.find_spec("bitsandbytes") else ["none", "fp8"]
        )
    if "fp8" in allowed and cfg.lora_r and plan.card.fp8:
        fp8s = [False, True]
    can_record = on_gpu and cfg.lora_r and not cfg.lora_dropout
    can_offload = cfg.lora_r and not plan.shape.tied
    compiles = [cfg.compile or (on_gpu and compiled.has_compiler())]
    graphs = [False, True] if can_record else [False]
    embeds = [False, True] if can_offload else [False]
    names = ["quant", "fp8", "compile", "cuda_graph", "offload_embed"]
    for values in itertools.product(quants, fp8s, compiles, graphs, embeds):
        flags = dict(zip(names, values, strict=True))
        # A recorded step cannot wait for the host.
        if not (flags["cuda_graph"] and flags["offload_embed"]):
            yield flags


def with_checkpoints(plan, flags, room):
    """The flags with no checkpoints, with as few as fit, with all, and with all in host memory: [{flag: value}]."""
    none = {"grad_ckpt": False, "ckpt_blocks": 0, "offload_ckpt": False}
    every = none | {"grad_ckpt": True}
    ways = [none, every]
    few = fewest_checkpoints(plan.changed(flags | every), room)
    if few:
        ways.append(every | {"ckpt_blocks": few})
    if plan.card.name != "cpu" and not flags["cuda_graph"]:
        ways.append(every | {"offload_ckpt": True})
    return [flags | way for way in ways]


def fewest_checkpoints(plan, room):
    """The least --ckpt_blocks, below all, that needs at most `room` bytes; 0 if there is none."""
    blocks = range(1, plan.shape.L)
    # More checkpoints need less, so search by halves.
    few = bisect.bisect_left(
        blocks, 1, key=lambda n: int(plan.changed({"ckpt_blocks": n}).needed <= room)
    )
    return blocks[few] if few < len(blocks) else 0


def written(flags):
    """Flags as a command line has them."""
    return (
        " ".join(
            one_written(name, value)
            for name, value in flags.items()
            if value not in (False, 0, "none")
        )
        or "no flag"
    )


def one_written(name, value):
    return f"--{name}" if value is True else f"--{name} {shlex.quote(str(value))}"


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
    now = plan.peak.loading
    saved = {}
    for text, flags in alternatives(plan).items():
        less = now - plan.changed(flags).peak.loading
        if less > 0:
            saved[text] = less
    said = f"By the plan loading takes {now / 1e9:.1f} GB. {helps(saved)}"
    return "while the model was loaded and made ready", said


def largest(parts):
    most = sorted(parts.items(), key=lambda part: -part[1])[:4]
    said = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in most)
    return f"By the plan the largest parts are {said}."


def helps(saved):
    """saved {flag: bytes} as a sentence."""
    if not saved:
        return "No flag takes less: choose a smaller --model, or a card with more memory."
    by_gain = sorted(saved.items(), key=lambda pair: -pair[1])
    flags = ", ".join(f"{flag} ({size / 1e9:.1f} GB less)" for flag, size in by_gain)
    return f"In order of gain, these take less: {flags}."


def savings(plan):
    """{flag as the user writes it: bytes that it takes off the peak}, without what saves nothing."""
    now = plan.peak.bytes
    saved = {}
    for text, flags in alternatives(plan).items():
        size = now - plan.changed(flags).peak.bytes
        if size > 0.01 * now:
            saved[text] = size
    return saved


def alternatives(plan):
    """{flag as the user writes it: {name: value}}: what may be changed in a run that found no memory.

    Among them are flags that the run has already. They save nothing, so `savings` leaves them out."""
    cfg = plan.cfg
    work = plan.work
    adapts = cfg.lora_r > 0
    records = cfg.cuda_graph
    half_rows = max(1, work.rows // 2)
    half_tokens = work.n // 2
    by_tokens = plan.data_cfg.batch_tokens > 0 or plan.data_cfg.budget > 0
    accumulated = f"--batch_size {half_rows} --grad_accum {2 * cfg.grad_accum}"
    table = [
        ("--grad_ckpt", {"grad_ckpt": True}, True),
        ("--ckpt_blocks 0", {"ckpt_blocks": 0}, cfg.grad_ckpt),
        ("--offload_ckpt", {"offload_ckpt": True}, cfg.grad_ckpt and not records),
        ("--offload_embed", {"offload_embed": True}, adapts and not records),
        ("--quant nf4", {"quant": "nf4"}, adapts),
        ("--quant fp8", {"quant": "fp8"}, adapts and cfg.quant == "none"),
        ("an adapter (--lora_r 16)", {"lora_r": 16}, not adapts),
        ("--fused_loss", {"fused_loss": True}, True),
        ("--attn flash", {"attn": "flash"}, cfg.attn == "naive"),
        ("--optim adamw8bit", {"optim": "adamw8bit"}, cfg.optim == "adamw"),
        ("--dtype bf16", {"dtype": "bf16"}, adapts and work.bytes_of_a_number == 4),
        (accumulated, {"batch_size": half_rows}, not by_tokens),
        (f"--batch_tokens {half_tokens}", {"batch_tokens": half_tokens}, by_tokens),
    ]
    return {text: flags for text, flags, is_possible in table if is_possible}


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
    work = memory.Work(rows=rows, tokens=slots, targets=0, quant=quant, bytes_of_a_number=size)
    parts = memory.of_sampling(shape, work, slots)
    half = max(1, rows // 2)
    others = {
        f"--batch_size {half}": memory.of_sampling(shape, replace(work, rows=half), slots),
        "--quant nf4": memory.of_sampling(shape, replace(work, quant="nf4"), slots),
        "--dtype bf16": memory.of_sampling(shape, replace(work, bytes_of_a_number=2), slots),
        "half of --max_new_tokens": memory.of_sampling(shape, work, slots // 2),
    }
    now = sum(parts.values())
    saved = {flag: now - sum(other.values()) for flag, other in others.items()}
    saved = {flag: size for flag, size in saved.items() if size > 0.01 * now}
    return doing, f"{largest(parts)} {helps(saved)}"
