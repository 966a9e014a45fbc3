"""--fit: the fastest flags that fit a card. And what takes less where memory ran out.

    plan = chosen(plan, 24e9, "quant,fp8,batch", rules)    # the Plan with the fastest flags that fit 24 GB
    with out_of_memory(device, account): …                 # a failed allocation becomes the plan's own account

Both ask the same question of planner.Plan: how much does the run take with other flags?

--fit tries all combinations of flags that keep the results: --compile, --cuda_graph, --offload_embed, and checkpoints
of no block, of as few as fit, of all, and of all in host memory. --allow adds --quant, --fp8 and batch sizes.
The plan is arithmetic, so hundreds of combinations take a second.

Cost: no choice is tried on the card, so the fastest is the fastest by speed/rate.py.
Proof: tests/test_fit.py. `benchmarks/plan_on_card.py --fit 24 40` holds the choices beside other flags on a card.
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
from speed import compiled, memory, meters, precision

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


def chosen(plan, room, allow, rules):
    """The Plan with the fastest flags that fit; says the command line that trains with them. rules: recipes.Rules"""
    found = plan.changed(fit(plan, room, allow))
    # The line is that of a run, which neither plans nor chooses.
    cfg = replace(found.cfg, fit=0, allow="", plan=False, card="")
    say("fit", command_line("python train.py", cfg, found.data_cfg, rules))
    return found.changed({"fit": 0, "allow": "", "plan": False, "card": ""})


def fit(plan, room, allow):
    """{flag: value} of the fastest choice that needs at most `room` bytes; says the first five."""
    if "batch" in check_allowed(allow) and in_tokens(plan):
        say("fit", "--allow batch changes nothing: --batch_tokens or packed rows cut the batches")
    best = ranked(plan, room, allow)
    for number, (flags, one) in enumerate(best[:5], 1):
        size = f"{gigabytes(one.needed)}, {one.tokens_per_s:.0f} tokens/s"
        line = f"{number}. {size}: {written(flags)}"
        if not in_tokens(plan) and recipes_of_a_step(one) != recipes_of_a_step(plan):
            line += f", a step of {recipes_of_a_step(one)} recipes"
        say("fit", line)
    flags, _ = best[0]
    return flags


def in_tokens(plan):
    """Whether tokens and not recipes cut the batches."""
    return plan.data_cfg.batch_tokens > 0 or plan.data_cfg.budget > 0


def recipes_of_a_step(plan):
    return plan.data_cfg.batch_size * plan.cfg.grad_accum


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
    """[{flag: value}]: what --allow batch tries.

    A smaller micro-batch is accumulated, so that the step stays; so it must divide the step. A micro-batch that is
    larger than the step makes a larger step, as fit() says."""
    if "batch" not in allowed or in_tokens(plan):
        return [{}]
    own = plan.data_cfg.batch_size
    step = recipes_of_a_step(plan)
    most = len(plan.lengths)
    if plan.note:
        # Without data no row is the last.
        most = planner.FULL
    tried = []
    for B in sorted(SIZES_OF_BATCHES | {own}):
        if B <= max(own, most) and (B > step or step % B == 0):
            tried.append({"batch_size": B, "grad_accum": max(1, step // B)})
    return tried


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
    return ["none", *smaller_formats(plan.shape, plan.card.device)]


def smaller_formats(shape, device):
    """The formats of --quant that a model of this shape may have. device: cuda, mps or cpu"""
    # NF4 keeps 64 weights of a row in a block.
    widths = {inputs for inputs, _ in shape.linears().values()}
    has_blocks = all(width % 64 == 0 for width in widths)
    if has_blocks and has_bitsandbytes(device):
        return ["fp8", "nf4"]
    return ["fp8"]


def has_bitsandbytes(device):
    """Whether it is installed, and may have a library for that device (quant.bitsandbytes)."""
    return device in ("cuda", "cpu") and importlib.util.find_spec("bitsandbytes") is not None


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
    saved = savings(plan, alternatives(plan), lambda plan: plan.peak.bytes)
    return f"{largest(plan.peak.parts)} {helps(saved)}"


def while_loading(plan):
    """(what was done, the account) of a model that found no memory while it was loaded."""
    saved = savings(plan, alternatives(plan), before_a_step)
    said = f"By the plan that takes {gigabytes(before_a_step(plan))}. {helps(saved)}"
    return "while the model was loaded and made ready", said


def evaluation_account(plan, lengths):
    """The account of an evaluation: two sentences. lengths: tokens of each held-out recipe

    --batch_size and --batch_tokens shape its batches, too. Checkpoints and optimisers are no matter of it."""

    def parts_of(plan):
        return memory.of_evaluation(plan.shape, plan.evaluating(lengths))

    longest = max(plan.lengths.max(), lengths.max())
    tried = of_kernels() | of_weights(plan) | of_batches(plan, plan.evaluating(lengths), longest)
    saved = savings(plan, tried, lambda plan: sum(parts_of(plan).values()))
    return f"{largest(parts_of(plan))} {helps(saved)}"


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


def savings(plan, tried, taken):
    """{flag as the user writes it: bytes that it takes off}, without what saves next to nothing.

    tried: {flag as the user writes it: {name: value}}. taken(plan): the bytes that count, of the peak or of loading"""
    now = taken(plan)
    saved = {text: now - taken(plan.changed(flags)) for text, flags in tried.items()}
    return worth_it(saved, now)


def worth_it(saved, now):
    """Of {flag: bytes} those above 1 % of now."""
    return {flag: size for flag, size in saved.items() if size > 0.01 * now}


def alternatives(plan):
    """{flag as the user writes it: {name: value}}: what may be changed in a run that found no memory.

    Among them are flags that the run has already. They save nothing, so `savings` leaves them out."""
    cfg = plan.cfg
    tried = {"--grad_ckpt": {"grad_ckpt": True}}
    if cfg.grad_ckpt:
        tried["--ckpt_blocks 0"] = {"ckpt_blocks": 0}
    if cfg.optim == "adamw" and has_bitsandbytes(plan.card.device):
        tried["--optim adamw8bit"] = {"optim": "adamw8bit"}
    if plan.card.is_gpu and cfg.grad_ckpt and not cfg.cuda_graph:
        tried["--offload_ckpt"] = {"offload_ckpt": True}
    if not cfg.lora_r:
        tried["an adapter (--lora_r 16)"] = {"lora_r": 16}
    of_training = of_batches(plan, plan.work, plan.lengths.max())
    return tried | of_kernels() | of_weights(plan) | of_training


def of_kernels():
    """Those of the alternatives that compute the same in another way, in training and in evaluation."""
    return {"--fused_loss": {"fused_loss": True}, "--attn flash": {"attn": "flash"}}


def of_weights(plan):
    """Those of the alternatives that make the frozen model smaller."""
    cfg = plan.cfg
    if not cfg.lora_r:
        return {}
    formats = smaller_formats(plan.shape, plan.card.device)
    tried = {f"--quant {kind}": {"quant": kind} for kind in formats}
    if plan.weight == 4:
        half = "bf16" if plan.card.has_bf16 else "fp16"
        tried[f"--dtype {half}"] = {"dtype": half}
    if plan.card.is_gpu and not cfg.cuda_graph:
        tried["--offload_embed"] = {"offload_embed": True}
    return tried


def of_batches(plan, work, longest):
    """The alternative of a smaller micro-batch, in tokens or in rows: half of what `work` has, or less.

    longest: tokens of the longest recipe"""
    if in_tokens(plan):
        tokens = work.n // 2
        # A recipe must have room.
        if tokens < longest:
            return {}
        return {f"--batch_tokens {tokens}": {"batch_tokens": tokens}}
    if work.rows == 1:
        return {}
    # The step stays as it is, so its recipes must be whole micro-batches.
    step = recipes_of_a_step(plan)
    rows = max(B for B in range(1, work.rows // 2 + 1) if step % B == 0)
    flags = {"batch_size": rows, "grad_accum": step // rows}
    return {written(flags): flags}


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


# --- 3. memory that ran out in sample.py. cfg: its Config; folder: of the base ---


def while_a_base_is_loaded(folder, cfg):
    """(what was done, the account). Only weights are there."""
    shape = planner.shape_of(models.read_config(folder))
    now = memory.of_loading(shape, sampling(cfg))
    saved = {}
    for flag, smaller in smaller_bases(shape, cfg).items():
        saved[flag] = now - memory.of_loading(shape, sampling(smaller))
    said = f"By the plan that takes {gigabytes(now)}. {helps(worth_it(saved, now))}"
    return "while the model was loaded", said


def while_sampling(folder, cfg, rows):
    """(what was done, the account). rows: texts at a time"""
    config = models.read_config(folder)
    shape = planner.shape_of(config)

    def parts_of(cfg, rows):
        # A prompt is short beside what is written.
        slots = min(cfg.max_new_tokens + 64, config.max_position_embeddings)
        return memory.of_sampling(shape, replace(sampling(cfg), rows=rows), slots)

    parts = parts_of(cfg, rows)
    others = {flag: parts_of(one, rows) for flag, one in smaller_bases(shape, cfg).items()}
    tokens = cfg.max_new_tokens // 2
    if tokens:
        flag = f"--max_new_tokens {tokens}"
        others[flag] = parts_of(replace(cfg, max_new_tokens=tokens), rows)
    if rows > 1:
        others[f"--batch_size {rows // 2}"] = parts_of(cfg, rows // 2)
    now = sum(parts.values())
    saved = {flag: now - sum(other.values()) for flag, other in others.items()}
    return "while texts were written", f"{largest(parts)} {helps(worth_it(saved, now))}"


def smaller_bases(shape, cfg):
    """{flag as the user writes it: cfg with it} of formats of the base's weights."""
    device = precision.pick_device(cfg.device)
    formats = smaller_formats(shape, device.type)
    tried = {f"--quant {kind}": replace(cfg, quant=kind) for kind in formats}
    has_no_bf16 = device.type == "cuda" and not precision.has_bf16(device)
    half = "fp16" if has_no_bf16 else "bf16"
    tried[f"--dtype {half}"] = replace(cfg, dtype=half)
    return tried


def sampling(cfg):
    """The memory.Work of a text that is written."""
    device = precision.pick_device(cfg.device)
    # A CPU without bf16 instructions keeps weights in bf16 and works in fp32.
    kept, compute, _ = precision.pick_dtype(cfg.dtype, device)
    return memory.Work(
        rows=1,
        tokens=1,
        targets=0,
        quant=cfg.quant,
        bytes_of_a_weight=kept.itemsize,
        bytes_of_a_number=compute.itemsize,
        on_gpu=device.type == "cuda",
    )
