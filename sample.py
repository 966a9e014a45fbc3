"""Write recipes with a trained run, or continue any text with any model.

    python sample.py                                        # a recipe for a title that the run in out/ held out
    python sample.py --title "Omelette" --ingredients "eggs, butter" --seed 1
    python sample.py --prompts titles.txt --json            # a prompt a line, or {"title": …}, {"prompt": …}
    python sample.py --model org/name --prompt "Once upon"  # no run: a base model as it is
    python sample.py --eval 32                              # measure base model and run on 32 held-out titles

This file reads the prompts, loads the model and prints the texts. generate.py writes a text token by token; quality.py
computes the numbers of --eval.
"""

import cli
from cli import UserError, say

import gc
import itertools
import json
import math
import re
import time
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

import data
import fit
import lora
import quality
import quant
import recipes
from files import disk, hub
from files.run import read_run
from generate import Engine, Sampling, Scheduler, Stream, said
from speed import compiled, precision
from speed.loss import chunked
from text import Text


@dataclass
class Config:
    # fmt: off
    run: str | None = None             # folder of a train.py run, or its best/; default: out, but none with --model
    model: str | None = None           # base model (folder, .gguf, org/name) to sample; with --run: its adapter's base
    title: str | None = None           # title of the recipe to write; none: a title from the run's held-out recipes
    ingredients: str | None = None     # ingredients of the recipe to write, separated by commas; needs --title
    prompt: str | None = None          # free text for the model to continue, instead of a recipe title
    prompts: str | None = None         # file of prompts: one a line, or JSON lines with "prompt", or "title"
    chat: bool = False                 # wrap each prompt as a user message in the model's own chat template
    json: bool = False                 # print each written text as one JSON line on stdout, in the order of the prompts
    eval: int = 0                      # compare base model and run on this many held-out titles; 0: write texts
    num_samples: int = 1               # texts to write for each prompt
    temperature: float = 0.7           # randomness: a higher number is more varied; 0: always the likeliest token
    top_k: int = 50                    # sample only from this many likeliest tokens; 0: from all tokens
    top_p: float = 1.0                 # sample only from the likeliest tokens that together have this probability
    min_p: float = 0.0                 # sample only from tokens with this share of the likeliest token's probability
    repetition_penalty: float = 1.0    # above 1: tokens already in the text become less likely (CTRL, Keskar 2019)
    max_new_tokens: int = 400          # most tokens of a text, if the model does not end the text earlier
    seed: int = 1                      # random seed: same prompt and seed give the same text, in any batch
    batch_size: int = 16               # texts that are written at the same time
    quant: Literal["none", "nf4", "fp8"] = "none"  # how the base's weights are held: as --dtype says, in 4 or in 8 bits
    merge: bool = False                # add the LoRA adapter into the base weights first: fewer products for each token
    compile: bool = False              # use torch.compile: starts later, writes faster
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # number format of arithmetic; auto: the device's best
    device: str = "auto"               # device to run the model on: auto, cuda, mps or cpu
    cache: str = ".cache"              # folder for downloads and converted models; if relative, in the code's folder
    # fmt: on


def check(cfg):
    """Refuse flags that are out of range or exclude each other, before anything is loaded."""
    cli.bound(
        cfg,
        num_samples=(1, 10**6),
        temperature=(0, 100),
        top_k=0,
        top_p=(1e-6, 1),
        min_p=(0, 1),
        eval=0,
        repetition_penalty=(0.01, 100),
        max_new_tokens=1,
        batch_size=1,
        seed=(0, 2**63),
    )
    # A flag that is given empty is given: "$TITLE" of a shell may be empty by mistake.
    for name in ("run", "model", "prompts", "cache"):
        if getattr(cfg, name) == "":
            raise UserError(f'--{name} "" names nothing: give a name, or leave the flag out.')
    given = [text for text in (cfg.title, cfg.prompt, cfg.prompts) if text is not None]
    if len(given) + bool(cfg.eval) > 1:
        raise UserError("--title, --prompt, --prompts and --eval exclude each other.")
    if cfg.ingredients is not None:
        if cfg.title is None:
            raise UserError("--ingredients needs --title: a recipe's text begins with its title.")
        if not recipe_beginning(cfg.ingredients):
            raise UserError("--ingredients names no ingredient: give some, or leave the flag out.")
    if cfg.chat and cfg.prompt is None and cfg.prompts is None:
        raise UserError("--chat needs --prompt or --prompts: what the user says.")


def sampling(cfg):
    """The part of Config that generate.py takes."""
    return Sampling(
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        min_p=cfg.min_p,
        repetition_penalty=cfg.repetition_penalty,
        max_new_tokens=cfg.max_new_tokens,
        seed=cfg.seed,
        batch_size=cfg.batch_size,
        compile=cfg.compile,
    )


# --- what is asked ---


@dataclass
class Asked:
    """One text to write."""

    ids: list[int]  # what the model goes on from
    shown: str  # the same, for people
    number: int  # which sample of its prompt


def all_asked(cfg, text, info):
    """Every text to write, num_samples for each prompt, in the order of the prompts."""
    asked = []
    for row in prompt_rows(cfg, info):
        if re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False)):
            raise UserError(
                "a prompt holds a lone surrogate, or bytes that are no UTF-8: no tokenizer takes it."
            )
        ids, shown = beginning(text, row, cfg.chat)
        if not ids:
            raise UserError("a prompt is empty, and this model has no BOS token to begin with.")
        asked += [Asked(ids, shown, n) for n in range(cfg.num_samples)]
    return asked


def typed(text):
    """A text of the command line. Python gives bytes that its locale cannot read as lone surrogates.

    In the C locale that is each byte beyond ASCII: read as UTF-8 they are what was typed."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        # No UTF-8: all_asked refuses the surrogates.
        return text


def prompt_rows(cfg, info):
    """[{"prompt"} or {"title", "ingredients"}], as the flags name them; with none of these a held-out title."""
    if cfg.prompts is not None:
        return read_prompts(cfg.prompts)
    if cfg.prompt is not None:
        return [{"prompt": typed(cfg.prompt)}]
    if cfg.title is not None:
        return [{"title": typed(cfg.title), "ingredients": typed(cfg.ingredients or "")}]
    titles = info["titles"] if info else ["Pumpkin Bread"]
    return [{"title": titles[cfg.seed % len(titles)]}]


def read_prompts(path):
    """The rows of a file: a free prompt a line, or a JSON object with prompt, or title and ingredients."""
    try:
        path = disk.user_path(path, "--prompts")
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--prompts {path} cannot be read ({e}).") from None

    rows = []
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(read_prompt(line.rstrip("\r")))
        except (ValueError, RecursionError) as e:
            raise UserError(
                f"{path}:{n}: no JSON object with prompt, or title and ingredients ({e})."
            ) from None
    if not rows:
        raise UserError(f"--prompts {path} holds no prompt.")
    return rows


def read_prompt(line):
    """The row of a line. Raises ValueError where a line that begins as JSON is no such row."""
    if not line.lstrip().startswith(("{", "[{")):
        return {"prompt": line}
    row = json.loads(line, object_pairs_hook=without_repeats)
    if not isinstance(row, dict):
        raise ValueError("a list: write an object a line")
    what = "prompt" if "prompt" in row else "title"
    known = {"prompt"} if what == "prompt" else {"title", "ingredients"}
    unknown = sorted(row.keys() - known)
    if unknown:
        raise ValueError(
            f"beside {what!r} it has {', '.join(unknown)}, which this program does not use"
        )
    if not isinstance(row.get(what), str):
        raise ValueError(f"{what} is no text")
    if not are_ingredients(row.get("ingredients", "")):
        raise ValueError("ingredients are neither a text nor a list of texts")
    return row


def without_repeats(pairs):
    """The dict of a JSON object's (key, value) pairs. ValueError where a key stands twice: json takes the last."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a key stands there twice")
    return row


def are_ingredients(value):
    if isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    return isinstance(value, str)


def beginning(text, row, chat=False):
    """(token ids, shown text) that the model continues.

    {"prompt"}                     the prompt; with `chat`, the template up to where the assistant's turn begins
    {"title"}                      the title
    {"title", "ingredients"}       title, list of ingredients, "Directions:" and the number of the first step"""
    if "prompt" not in row:
        completion = recipe_beginning(row.get("ingredients", ""))
        return text.prompt(row["title"], completion), row["title"] + completion
    if chat:
        return chat_ids(text, row["prompt"]), row["prompt"]
    return text.prompt(row["prompt"]), row["prompt"]


def recipe_beginning(ingredients):
    """The text of a recipe between its title and its first step. ingredients: a list, or a text with commas"""
    if isinstance(ingredients, str):
        ingredients = ingredients.split(",")
    items = [item.strip() for item in ingredients if item.strip()]
    if not items:
        return ""
    lines = "".join(f"- {item}\n" for item in items)
    return f"\n\nIngredients:\n{lines}\nDirections:\n1."


def chat_ids(text, prompt):
    """The ids of a user's turn in the model's own template."""
    return text.chat_prompt([{"role": "user", "content": prompt}])


# --- who is asked ---


@dataclass
class Source:
    """Where a model comes from. A base alone has no run; a run with --lora_r 0 is its own base and has no adapter."""

    base: Path  # folder of a whole model
    run: Path | None = None  # folder of the run
    info: dict | None = None  # run.json
    adapter: Path | None = None  # the run's folder, where it trained an adapter


def find(cfg):
    """The Source that --run and --model name."""
    cache = disk.cache_folder(cfg.cache)
    if cfg.model is not None and cfg.run is None:
        return Source(hub.resolve(cfg.model, cache))

    run = Path(disk.user_path(cfg.run or "out", "--run"))
    disk.refuse_no_utf8(run, "--run")
    info = read_run(run)
    if (run / "model.safetensors").exists():  # all weights were trained
        return Source(run, run, info)
    base = hub.resolve(cfg.model or info["config"]["model"], cache)
    if not disk.is_model(base, info):
        raise UserError(
            f"{base} is not what {run} was trained on: it has changed. Name the right one with --model."
        )
    return Source(base, run, info, adapter=run)


def load(cfg):
    """(model, Text, run.json or None) of a run with its base, or of a base alone."""
    device = precision.pick_device(cfg.device)
    began = time.time()
    kept, compute, why = precision.pick_dtype(cfg.dtype, device)
    source = find(cfg)
    if cfg.merge and source.adapter is None:
        raise UserError("--merge: there is no adapter here to add to the weights; leave it out.")
    if cfg.compile:
        compiled.start_compiler()
        compiled.wait_for_compiler()

    with fit.out_of_memory(device, partial(fit.while_a_base_is_loaded, source.base, cfg)):
        model = lora.load_model(
            source.base,
            device,
            kept,
            quant.make_linear(cfg.quant),
            adapter=source.adapter,
            merge=cfg.merge,
            # Keep the residual stream in fp32, because that rounds less, and costs nothing with few rows.
            stream_dtype=torch.float32,
            product_dtype=compute,
        )
        quant.for_few_rows(model)
        lora.cast_once(model)
    model.requires_grad_(requires_grad=False).eval()

    taken = time.time() - began
    gb = sum(p.nbytes for p in model.parameters()) / 1e9  # a tied head counts once
    name = described(cfg, source)
    dtype = str(kept).removeprefix("torch.")
    say("model", f"{name}, {gb:.2f} GB on {device} in {taken:.1f} s; {dtype} ({why})")
    if source.run is not None:
        say_if_not_best(source.run)
    return model, Text(source.base), source.info


def at_once(cfg):
    """How many texts are written at a time, at most."""
    if cfg.eval:
        return min(cfg.eval, cfg.batch_size)
    texts = cfg.num_samples
    if cfg.prompts is not None:
        # Not read again, because a pipe can be read only once.
        texts = cfg.batch_size
    return min(texts, cfg.batch_size)


def described(cfg, source):
    """A model's name on its receipt."""
    name = source.base.name
    if source.run is not None:
        name += f" + {source.run}"
    if cfg.merge:
        name += ", merged"
    if cfg.quant != "none":
        name += f", linears in {cfg.quant}"
    return name


def say_if_not_best(run):
    """A note where best/ holds an earlier step that was better than the last one, which the run's folder holds."""
    path = run / "state.json"
    if not path.exists():
        return
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        step = int(facts["step"])
        best = int(facts["best_step"])
    except (OSError, ValueError, LookupError, TypeError):
        # The file is for people, so a broken one costs a note only.
        return
    if best < step:
        say("note", f"this is step {step}, the best was {best}: --run {run}/best")


# --- the answer ---


def answer(cfg):
    """Write the texts: a single one token by token, several in the order of their prompts."""
    model, text, info = load(cfg)
    asked = all_asked(cfg, text, info)
    prompts = [one.ids for one in asked]
    numbers = [one.number for one in asked]
    stream = None
    if len(asked) == 1 and not cfg.json:
        stream = Stream(text, prompts[0])
    engine = Engine(model, prompts, sampling(cfg))

    began = time.time()
    times = []  # at which each token came
    progress = None if stream is not None else cli.Progress(len(asked), "sample")

    def on_token(i, token):
        times.append(time.time())
        if stream is not None:
            stream.add(token)
        else:
            progress.step(0, f"{len(times)} tokens")

    texts = Scheduler(engine, prompts, text.ends, numbers, on_token)
    if stream is not None:
        replies = stream_one(cfg, text, asked, texts, stream)
    else:
        replies = print_all(cfg, text, asked, progress.over(texts))

    taken = time.time() - began
    first = min(times, default=began) - began
    tokens = sum(reply["tokens"] for reply in replies)
    ended = sum(reply["ended"] for reply in replies)
    speed = f"{tokens / taken:.1f} tok/s, the first after {first:.2f} s"
    say(
        "sampled",
        f"{len(replies)} text(s), {tokens} tokens, {speed}; {ended} ended by themselves",
    )


def stream_one(cfg, text, asked, texts, stream):
    """Print the prompt; the Stream prints what follows. -> the one reply, in a list"""
    print(asked[0].shown + gap(cfg), end="", flush=True)
    replies = [reply(text, asked[i], ids, ended) for i, ids, ended in texts]
    stream.end()
    print(flush=True)
    return replies


def print_all(cfg, text, asked, texts):
    """Print the texts in the order of their prompts, each as soon as all before it are printed. -> the replies"""
    done = {}
    printed = 0
    for i, ids, ended in texts:
        done[i] = reply(text, asked[i], ids, ended)
        while printed in done:
            print(formatted(cfg, done[printed]))
            printed += 1
    return list(done.values())


def reply(text, one, ids, ended):
    """One text as a row of --json."""
    return {
        "prompt": one.shown,
        "text": said(text, one.ids, ids),
        "sample": one.number,
        "tokens": len(ids),
        "ended": ended,
    }


def formatted(cfg, row):
    if cfg.json:
        return json.dumps(row, ensure_ascii=False)
    line = "-" * 40
    return f"{row['prompt']}{gap(cfg)}{row['text']}\n\n{line}\n"


def gap(cfg):
    """Between a prompt and what follows: a chat's answer stands apart."""
    return "\n\n" if cfg.chat else ""


# --- --eval ---


@torch.no_grad()
def evaluate(cfg):
    """--eval: measure run and base on the same held-out titles and recipes. A table or a JSON line on stdout."""
    run = Path(disk.user_path(cfg.run or "out", "--run"))
    info = read_run(run)
    base = hub.resolve(cfg.model or info["config"]["model"], disk.cache_folder(cfg.cache))
    held, text = held_out(cfg, run, info, base)
    titles = info["titles"][: cfg.eval]  # as many as the run held out, at most

    ways = {
        "run": replace(cfg, run=str(run)),
        "base": replace(cfg, run=None, model=str(base), merge=False),
    }
    measures = {}
    for who, way in ways.items():
        measures[who] = measured(way, who, titles, text, held, info)
        # Free the first model before the second is loaded. A compiled model refers to itself, so only these do free it.
        torch.compiler.reset()
        gc.collect()

    if cfg.json:
        print(disk.json_line({"asked": len(titles), **measures}))
    else:
        print(table(len(titles), measures))


def held_out(cfg, run, info, base):
    """(the held-out recipes of a run, its Text). An error if recipes or base have changed since the run."""
    had = {f.name: info["config"][f.name] for f in fields(data.Data)}
    had["cache"] = cfg.cache
    rules = recipes.Rules(**info["rules"])
    try:
        dataset, held, text = data.prepare(data.Data(**had), rules, base)
    except UserError as e:
        raise UserError(
            f"the data that {run} was trained on, as its run.json has it: {e}"
        ) from None

    now = data.about_data(dataset, held)
    same_data = all(info.get(key, now[key]) == now[key] for key in now)
    if not (disk.is_model(base, info) and same_data):
        raise UserError(
            f"{base} or the data (or its rules) is not what {run} was trained on: it has changed."
        )
    return held, text


def measured(cfg, who, titles, text, held, info):
    """{measure: value} of one model."""
    model, _, _ = load(cfg)
    texts = written(cfg, who, model, titles, text)

    def loss_of(batch):
        h = model(batch.ids)
        return chunked(h, model.lm_head.weight, batch.where, batch.targets)

    device = model.lm_head.weight.device
    batches = recipe_batches(held, cfg.batch_size, device, info["config"]["mask_prompt"])
    # Do not use compiled blocks, because each new length would compile a graph.
    with compiled.not_compiled(cfg.compile):
        loss = quality.held_out_loss(model, loss_of, batches)
    # A float64 holds e to the power of 709 at most.
    perplexity = math.exp(loss) if loss < 709 else math.inf
    return {**quality.measure(texts), "perplexity": perplexity}


def written(cfg, who, model, titles, text):
    """[(text behind a title, ended)], as they are finished"""
    prompts = [text.prompt(title) for title in titles]
    engine = Engine(model, prompts, sampling(cfg))
    progress = cli.Progress(len(prompts), who)
    count = itertools.count(1)
    texts = Scheduler(
        engine,
        prompts,
        text.ends,
        on_token=lambda _, token: progress.step(0, f"{next(count)} tokens"),
    )
    finished = progress.over(texts)
    return [(said(text, prompts[i], ids), ended) for i, ids, ended in finished]


def recipe_batches(held, batch_size, device, mask_prompt):
    """The held-out recipes as Batches on the device."""
    which = held.indices
    steps = [[which[at : at + batch_size]] for at in range(0, len(which), batch_size)]
    progress = cli.Progress(len(steps), "perplexity", says_end=False)
    for step in progress.over(data.feed(held, steps, device, mask_prompt, budget=0)):
        yield from step


def table(n, measures):
    """Base and run side by side."""
    lines = [f"{n:>4} held-out titles{'base':>14}{'run':>10}"]
    for what, value in measures["base"].items():
        lines.append(f"{what:<24}{value:>10.3f}{measures['run'][what]:>10.3f}")
    return "\n".join(lines)


def main():
    (cfg,) = cli.parse(__doc__, Config)
    check(cfg)
    device = precision.pick_device(cfg.device)
    with fit.out_of_memory(device, lambda: fit.while_sampling(find(cfg).base, cfg, at_once(cfg))):
        if cfg.eval:
            evaluate(cfg)
        else:
            answer(cfg)


if __name__ == "__main__":
    cli.run(main)
