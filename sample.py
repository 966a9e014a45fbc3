"""Recipes out of a trained run, or out of any model.

    python sample.py                                        # a held-out title of the run in out/
    python sample.py --title "Pumpkin bread" --seed 1
    python sample.py --title "Omelette" --ingredients "eggs, butter"
    python sample.py --prompts titles.txt --json            # a prompt a line, or {"title": …} / {"prompt": …} objects
    python sample.py --model org/name --prompt "Once upon"  # no run: a base model as it is

Follow one token: `generate` reads all prompts in one pass, then each step feeds the last token of every row to the
model, which looks at the keys and values it cached before, and `pick` chooses the next one.
"""
import hashlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers.decoders import DecodeStream

import cli
import convert
import data
import lora
import model as models
import plan
import quant
import state
from cli import UserError, say


@dataclass
class Config:
    run: str = ""                      # folder of a run, or its best/; out where no --model is named
    model: str = ""                    # a base model without a run (folder, .gguf, org/name); with --run: its base
    title: str = ""                    # title of the recipe to write; none: one that the run held out
    ingredients: str = ""              # what it is made of, with commas; needs --title
    prompt: str = ""                   # any text to go on from
    prompts: str = ""                  # a file: a prompt a line, or JSON objects with prompt, or title and ingredients
    json: bool = False                 # one JSON object a text on stdout, in the order of the prompts
    num_samples: int = 1               # texts for each prompt
    temperature: float = 0.7           # 0: always the likeliest token
    top_k: int = 50                    # choose among the k likeliest; 0: all
    top_p: float = 1.0                 # choose among the likeliest that together have this probability
    max_new_tokens: int = 400          # stop here if the model has not stopped by itself
    seed: int = 1                      # the same prompt and seed give the same text, whatever else is in the batch
    batch_size: int = 16               # prompts read and written at a time
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # arithmetic
    device: str = "auto"               # cuda, mps, cpu
    cache: str = ".cache"              # downloads and converted models; beside the code unless absolute


def check(cfg):
    big = float("inf")
    cli.bound(cfg, num_samples=(1, 10**6), temperature=(0, 100), top_k=(0, big), top_p=(1e-6, 1),
              max_new_tokens=(1, big), batch_size=(1, big), seed=(0, 2**63))
    if sum(map(bool, (cfg.title, cfg.prompt, cfg.prompts))) > 1:
        raise UserError("--title, --prompt and --prompts exclude each other.")
    if cfg.ingredients and not cfg.title:
        raise UserError("--ingredients needs --title: a recipe's text begins with its title.")


# --- choosing a token ---


def noise_seed(seed, prompt, n):
    """The noise of a text depends on (seed, prompt, number of the sample) alone: a batch around it changes nothing."""
    return int.from_bytes(hashlib.sha256(json.dumps([seed, list(prompt), n]).encode()).digest()[:8], "little") >> 1


def keep_likely(logits, top_k, top_p):
    """logits [B, V] with all but the likeliest set to -inf: the top_k, then the fewest that together reach top_p."""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    if top_p < 1:
        ordered, index = logits.sort(descending=True)
        p = ordered.softmax(-1)
        drop = p.cumsum(-1) - p >= top_p  # what stands before it already reaches top_p; the first always stays
        logits = logits.masked_fill(drop.scatter(-1, index, drop), float("-inf"))
    return logits


def pick(logits, temperature, top_k, top_p, generators):
    """Next token of each row, [B], from logits [B, V]. The largest of p / e with e exponential is a draw from p."""
    if temperature == 0:
        return logits.argmax(-1)
    p = keep_likely(logits.float() / temperature, top_k, top_p).softmax(-1)
    e = torch.stack([torch.empty(p.shape[-1]).exponential_(generator=g) for g in generators])  # same on any device
    return (p / e.to(p.device)).argmax(-1)


class Cache:
    """Keys and values of one block, [B, K, S, D] each, allocated once. A row writes at its own positions, so rows of
    different lengths share a batch: what padding left in a row is overwritten before the row's mask reaches it."""

    def __init__(self, cfg, B, S, device, dtype):
        self.k, self.v = torch.zeros(2, B, cfg.num_key_value_heads, S, cfg.head_dim, device=device, dtype=dtype)

    def put(self, k, v, pos):
        """k, v [B, K, T, D] at pos [B, T]. A prompt (T > 1) attends to itself, a single token to the whole cache."""
        rows = torch.arange(pos.shape[0], device=pos.device)[:, None]
        self.k[rows, :, pos], self.v[rows, :, pos] = k.transpose(1, 2), v.transpose(1, 2)
        return (self.k, self.v) if k.shape[2] == 1 else (k, v)


@torch.no_grad()
def generate(model, prompts, ends, max_new_tokens=Config.max_new_tokens, temperature=Config.temperature,
             top_k=Config.top_k, top_p=Config.top_p, seed=Config.seed, numbers=None, on_token=None):
    """Go on from each prompt (a list of token ids) until one of `ends`. -> [new ids, without the end token], [ended]

    numbers: number of the sample for each row, so that the same prompt can be asked for several texts. on_token(row,
    id) is called as tokens come."""
    device, cfg = model.lm_head.weight.device, model.cfg
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    T, B = int(lengths.max()), len(prompts)
    if T >= cfg.max_position_embeddings:
        raise UserError(f"a prompt has {T} tokens, the model's window {cfg.max_position_embeddings}: shorten it.")
    max_new_tokens = min(max_new_tokens, cfg.max_position_embeddings - T)
    dtype = model.dtype or model.embed_tokens.weight.dtype
    caches = [Cache(cfg, B, T + max_new_tokens, device, dtype) for _ in model.layers]
    generators = [torch.Generator().manual_seed(noise_seed(seed, p, n)) for p, n in zip(prompts, numbers or [0] * B)]
    ids = torch.zeros(B, T, dtype=torch.long, device=device)  # padded on the right: causal attention never sees it
    for row, p in enumerate(prompts):
        ids[row, :len(p)] = torch.tensor(p)
    pos = torch.arange(T, device=device).expand(B, T)
    h = model(ids, pos, caches)[torch.arange(B, device=device), lengths - 1]  # [B, C]
    out, ended = [[] for _ in prompts], [False] * B
    for step in range(max_new_tokens):
        chosen = pick(models.logits(model, h), temperature, top_k, top_p, generators)
        for row, token in enumerate(chosen.tolist()):
            if not ended[row]:
                ended[row] = token in ends
                if not ended[row]:
                    out[row].append(token)
                    if on_token:
                        on_token(row, token)
        if all(ended) or step == max_new_tokens - 1:
            break
        h = model(chosen[:, None], (lengths + step)[:, None], caches)[:, 0]
    return out, ended


# --- what is asked, and of whom ---


TITLE = "Pumpkin Bread"  # asked of a model that has no run


def with_ingredients(text, title, ingredients=""):
    """Token ids of a recipe's beginning: the title, or title and ingredients up to the number of the first step."""
    items = [i.strip() for i in (ingredients.split(",") if isinstance(ingredients, str) else ingredients) if i.strip()]
    begin = "\n\nIngredients:\n" + "".join(f"- {i}\n" for i in items) + "\nDirections:\n1." if items else ""
    return text.prompt(title, begin), title + begin


def read_prompts(path, text):
    """[(ids, shown text)] of a file: a free prompt a line, or a JSON object with prompt, or title and ingredients."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--prompts {path} cannot be read ({e}).") from None
    asked = []
    for n, line in enumerate(lines, 1):
        if line.startswith("{"):
            try:
                row = json.loads(line)
                asked.append((text.prompt(row["prompt"]), row["prompt"]) if "prompt" in row else
                             with_ingredients(text, row["title"], row.get("ingredients", "")))
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                raise UserError(f"{path}:{n}: no JSON object with prompt, or title and ingredients ({e!r}).") from None
        elif line.strip():
            asked.append((text.prompt(line.rstrip("\r")), line.rstrip("\r")))
    if not asked:
        raise UserError(f"--prompts {path} holds no prompt.")
    return asked


def load(cfg):
    """(model, Text, run.json or None) of a run with its base, or of a base alone."""
    device = plan.pick_device(cfg.device)
    kept, compute, why = plan.pick_dtype(cfg.dtype, device)
    folder, info = Path(cfg.run or "out"), None
    if cfg.run or not cfg.model:
        in_run = next((p for p in (folder / "run.json", folder.parent / "run.json") if p.exists()), None)
        if in_run is None:
            raise UserError(f"{folder} holds no run: train one with `python train.py`, or name a --run or a --model.")
        try:
            info = json.loads(in_run.read_text(encoding="utf-8"))
            info["config"]["model"], info["base_fingerprint"], info["titles"][0]
        except (OSError, ValueError, LookupError, TypeError) as e:
            raise UserError(f"{in_run} cannot be read as a run's ({e!r}).") from None
    cache = data.cache_folder(cfg)
    full = info and (folder / "model.safetensors").exists()
    base = folder if full else convert.resolve(cfg.model or (info["config"]["model"] if info else ""), cache)
    if info and not full and state.fingerprint(base) != info["base_fingerprint"]:
        raise UserError(f"{base} is not what {folder} was trained on: it has changed. Name the right one with --model.")
    model = models.load(base, device, kept, quant.make_linear("none"))
    model.dtype = compute
    if info and not full:
        lora.load(model, folder)
    model.requires_grad_(False).eval()
    say("model", f"{base.name}{f' + {folder}' if info else ''}, {str(kept)[6:]} on {device} ({why})")
    if info and folder == in_run.parent and (folder / "state.json").exists():
        facts = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if facts["best_step"] < facts["step"]:
            say("note", f"this is step {facts['step']}, the best was {facts['best_step']}: --run {folder}/best")
    return model, data.Text(base), info


def main():
    cfg, = cli.parse(__doc__, Config)
    check(cfg)
    model, text, info = load(cfg)
    if cfg.prompts:
        asked = read_prompts(cfg.prompts, text)
    elif cfg.prompt:
        asked = [(text.prompt(cfg.prompt), cfg.prompt)]
    else:
        titles = info["titles"] if info else [TITLE]
        asked = [with_ingredients(text, cfg.title or titles[cfg.seed % len(titles)], cfg.ingredients)]
    if not all(ids for ids, _ in asked):
        raise UserError("a prompt is empty, and this model has no BOS token to begin with.")
    jobs = [(ids, shown, n) for ids, shown in asked for n in range(cfg.num_samples)]
    order = sorted(range(len(jobs)), key=lambda i: len(jobs[i][0]))  # a batch of like lengths reads little padding
    streamed, results, began, count = len(jobs) == 1 and not cfg.json, {}, time.time(), 0
    stream = DecodeStream(skip_special_tokens=True)  # gives a piece of text once its bytes are whole characters

    def show(row, token):
        print(stream.step(text.tokenizer, token) or "", end="", flush=True)

    if streamed:
        print(jobs[0][1], end="", flush=True)
    for i in range(0, len(order), cfg.batch_size):
        rows = order[i:i + cfg.batch_size]
        out, ended = generate(model, [jobs[r][0] for r in rows], text.ends, cfg.max_new_tokens, cfg.temperature,
                              cfg.top_k, cfg.top_p, cfg.seed, [jobs[r][2] for r in rows], show if streamed else None)
        for r, ids, end in zip(rows, out, ended):
            results[r] = {"prompt": jobs[r][1], "text": text.decode(ids), "sample": jobs[r][2], "tokens": len(ids),
                          "ended": end}
            count += len(ids)
    if streamed:
        print()
    for r in range(len(jobs)):
        if cfg.json:
            print(json.dumps(results[r], ensure_ascii=False))
        elif not streamed:
            print(f"{results[r]['prompt']}{results[r]['text']}\n\n{'-' * 40}\n")
    sys.stdout.flush()
    taken = time.time() - began
    say("sampled", f"{len(jobs)} text(s), {count} tokens, {count / taken:.1f} tok/s, "
        f"{sum(r['ended'] for r in results.values())} ended by themselves")


if __name__ == "__main__":
    cli.run(main)
