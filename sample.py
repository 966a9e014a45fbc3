"""Recipes out of a trained run, or out of any model.

    python sample.py                                        # a held-out title of the run in out/
    python sample.py --title "Omelette" --ingredients "eggs, butter" --seed 1
    python sample.py --prompts titles.txt --json            # a prompt a line, or {"title": …}, {"prompt": …}
    python sample.py --model org/name --prompt "Once upon"  # no run: a base model as it is
    python sample.py --eval 32                              # base and run side by side on held-out titles

Follow one token: `Writer.read` takes prompts into free rows in one pass, `Writer.step` feeds the last token of every
row to the model, which looks at the keys and values cached before, `pick` chooses the next, and `write` hands out what
is finished and fills its row anew.
"""

import gc
import json
import math
import re
import time
from collections import Counter, deque
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
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
import recipes
import state
from cli import UserError, say


@dataclass
class Config:
    # fmt: off
    run: str = ""                      # folder of a run, or its best/; out where no --model is named
    model: str = ""                    # a base model without a run (folder, .gguf, org/name); with --run: its base
    title: str = ""                    # title of the recipe to write; none: one that the run held out
    ingredients: str = ""              # what it is made of, with commas; needs --title
    prompt: str = ""                   # any text to go on from
    prompts: str = ""                  # a file: a prompt a line, or JSON objects with prompt, or title and ingredients
    chat: bool = False                 # a prompt is a user's turn, put into the model's own chat template
    json: bool = False                 # one JSON object a text on stdout, in the order of the prompts
    eval: int = 0                      # measure base and run on this many held-out titles
    num_samples: int = 1               # texts for each prompt
    temperature: float = 0.7           # 0: always the likeliest token
    top_k: int = 50                    # choose among the k likeliest; 0: all
    top_p: float = 1.0                 # choose among the likeliest that together have this probability
    min_p: float = 0.0                 # choose among those at least this times as likely as the likeliest
    repetition_penalty: float = 1.0    # above 1: what was there before becomes less likely (CTRL, Keskar et al. 2019)
    max_new_tokens: int = 400          # stop here if the model has not stopped by itself
    seed: int = 1                      # the same prompt and seed give the same text, whatever else is in the batch
    batch_size: int = 16               # texts that are written at a time
    quant: Literal["none", "nf4", "fp8"] = "none"  # how the base's weights are kept: 4 or 8 bits -> quant.py
    merge: bool = False                # add the adapter to the weights: fewer products a token
    compile: bool = False              # torch.compile; a token is then one CUDA graph
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # arithmetic
    device: str = "auto"               # cuda, mps, cpu
    cache: str = ".cache"              # downloads and converted models; beside the code unless absolute
    # fmt: on


def check(cfg):
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
    if sum(map(bool, (cfg.title, cfg.prompt, cfg.prompts, cfg.eval))) > 1:
        raise UserError("--title, --prompt, --prompts and --eval exclude each other.")
    if cfg.ingredients and not cfg.title:
        raise UserError("--ingredients needs --title: a recipe's text begins with its title.")
    if cfg.chat and not (cfg.prompt or cfg.prompts):
        raise UserError("--chat needs --prompt or --prompts: what the user says.")


# --- choosing a token ---
def noise_key(seed, prompt, n):
    """The noise of a text depends on (seed, prompt, number of the sample) alone: a batch around it changes nothing."""
    return int.from_bytes(
        blake2b(f"{seed} {n} {list(prompt)}".encode(), digest_size=8).digest(), "big", signed=True
    )


def noise(keys, pos, V):
    """Gumbel noise [B, V] as a pure function of keys [B], pos [B] and the column: the numbers of splitmix64 (Steele et
    al. 2014), which any device makes alike. The largest of logit + noise is a draw from the softmax."""
    x = (
        keys[:, None]
        + (pos[:, None] * V + torch.arange(V, device=keys.device)) * -0x61C8864680B583EB
    )
    for shift, factor in (30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15):
        x = (
            x ^ (x >> shift & (1 << 64 - shift) - 1)
        ) * factor  # >> of an int64 keeps its sign: the mask takes it off
    u = (
        (x >> 41 & 2**23 - 1) + 0.5
    ) / 2**23  # the best mixed 23 bits; with the half exact in fp32, so never 0 or 1
    return -(-u.log()).log()


def keep_likely(logits, top_k, top_p, min_p):
    """logits [B, V] with all but the likeliest at -inf: the top_k; of those the fewest that together reach top_p; of
    those what has min_p of the largest probability. What is exactly as likely as the last that stays, stays too."""
    best = logits.topk(min(top_k or 2**31, logits.shape[-1])).values  # [B, k], falling
    p = best.softmax(-1)
    keep = (p.cumsum(-1) - p < (top_p if top_p < 1 else 2)) & (
        p >= min_p * p[:, :1]
    )  # a sum may round to above 1
    return logits.masked_fill(
        logits < best.gather(-1, (keep.sum(-1, keepdim=True) - 1).clamp(0)), float("-inf")
    )


def pick(logits, cfg, keys, pos, seen):
    """Next token of each row, [B], from logits [B, V]; seen [B, V]: what the row holds already."""
    logits, V = logits.float(), logits.shape[-1]
    if (r := cfg.repetition_penalty) != 1:
        logits = torch.where(seen, torch.where(logits > 0, logits / r, logits * r), logits)
    if cfg.temperature == 0:
        return logits.argmax(-1)
    logits = logits / cfg.temperature
    if 0 < cfg.top_k < V or cfg.top_p < 1 or cfg.min_p:
        logits = keep_likely(logits, cfg.top_k, cfg.top_p, cfg.min_p)
    return (logits + noise(keys, pos, V)).argmax(-1)


# --- writing ---
class Writer:
    """B texts at a time, in rows of S positions. Token, position, noise and cache of a row are in tensors that stay
    where they are: a step has one shape and waits for nobody, so it can be one CUDA graph."""

    @torch.no_grad()
    def __init__(self, model, prompts, cfg):
        V, window, longest = (
            model.cfg.vocab_size,
            model.cfg.max_position_embeddings,
            max(map(len, prompts)),
        )
        if longest >= window:
            raise UserError(
                f"a prompt has {longest} tokens, the model's window {window}: shorten it."
            )
        self.model, self.cfg, self.device, self.new = model, cfg, model.lm_head.weight.device, ()
        self.B, self.S = B, _ = (
            min(cfg.batch_size, len(prompts)),
            min(window, longest + cfg.max_new_tokens),
        )
        self.token, self.pos, self.keys = (
            torch.zeros(B, dtype=torch.long, device=self.device) for _ in range(3)
        )
        self.seen = torch.zeros(B, V, dtype=torch.bool, device=self.device)
        self.rows, self.caches = (
            torch.arange(B, device=self.device),
            models.new_caches(model, B, self.S),
        )
        if cfg.compile:
            began = time.time()
            for block in model.layers:
                block.compile(dynamic=False)
            self.choose = torch.compile(self.choose, dynamic=False)
            self.step()
            self.step()  # a first call may still have set something up
            self.step = self.record(self.step) or self.step
            say("compile", f"{time.time() - began:.1f} s, for {B} row(s) of {self.S} positions")

    def record(self, work):  # as one CUDA graph, where there are any
        if self.cfg.compile and self.device.type == "cuda":
            with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
                work()
            return graph.replay

    @torch.compiler.set_stance("force_eager")  # each length would be a graph
    def read(self, rows, prompts, numbers):
        """Take a prompt (token ids) into each of these rows and choose its first new token, all in one pass."""
        T = min(self.S, -(-max(map(len, prompts)) // 16) * 16)
        ids = [p + p[-1:] * (T - len(p)) for p in prompts]  # no token sees what follows it
        keys = [noise_key(self.cfg.seed, p, n) for p, n in zip(prompts, numbers)]
        new = [
            torch.tensor(x, device=self.device) for x in (ids, rows, [*map(len, prompts)], keys)
        ]  # [n, T], then [n]
        if [x.shape for x in new] != [x.shape for x in self.new]:
            self.new, self.replay = new, None
        elif not self.replay:  # the shape of the pass before
            self.replay = self.record(self.take)
        torch._foreach_copy_(self.new, new)
        (self.replay or self.take)()

    def take(self):  # what `read` has put into self.new
        ids, rows, ends, keys = self.new
        h = self.model(ids, caches=[models.Cache(c.k, c.v, rows) for c in self.caches])
        self.pos[rows], self.keys[rows] = ends, keys
        self.seen[rows] = torch.zeros_like(self.seen[rows]).scatter_(1, ids, True)
        self.choose(h[self.rows[: len(rows)], ends - 1], rows)

    def step(self):  # one more token for every row
        h = self.model(self.token[:, None], self.pos[:, None], self.caches)[:, 0]
        self.pos.add_(1).clamp_(
            max=self.S - 1
        )  # a row that nobody reads any more stays in its place
        self.choose(h, self.rows)

    def choose(self, h, rows):  # h [n, C]
        logits = models.logits(self.model, h)
        self.token[rows] = token = pick(
            logits, self.cfg, self.keys[rows], self.pos[rows], self.seen[rows]
        )
        self.seen[rows, token] = token >= 0  # yes; a plain True would come from the host

    def keep(self, rows):  # go on with these only
        self.token, self.pos, self.keys, self.seen = (
            x[rows] for x in (self.token, self.pos, self.keys, self.seen)
        )
        self.rows, self.B = self.rows[: len(rows)], len(rows)
        self.caches = [models.Cache(c.k[rows], c.v[rows], self.rows) for c in self.caches]

    def send(self):
        """A function that waits for the tokens chosen last, on their way to the host beside what runs next."""
        if self.device.type != "cuda":
            return self.token.tolist
        host, sent = (
            self.token.to("cpu", non_blocking=True),
            torch.cuda.current_stream().record_event(),
        )
        return lambda: sent.synchronize() or host.tolist()


@torch.no_grad()
def write(writer, prompts, ends, numbers=None, on_token=lambda i, token: None):
    """Go on from each prompt until one of `ends`. Yields (index of the prompt, new ids without the end token, ended) as
    texts are finished; the longest prompts are begun first, and a free row takes the next. numbers: which sample of its
    prompt each is. on_token(index, id) is called as tokens come: on a GPU one step behind, which never waits for it."""
    cfg, numbers = writer.cfg, numbers or [0] * len(prompts)
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    few, slots, out, sent, lag = (
        max(1, writer.B // 8),
        [None] * writer.B,
        {},
        deque(),
        writer.device.type == "cuda",
    )

    def settle(whose):  # send what was chosen for these prompts, and take what has come
        sent.append((writer.send(), whose))
        while len(sent) > lag:
            tokens, whose = sent.popleft()
            for token, i in filter(
                lambda pair: pair[1] in out, zip(tokens(), whose)
            ):  # others finished a step ago
                if not (ended := token in ends):
                    out[i].append(token)
                    on_token(i, token)
                if ended or len(out[i]) == min(cfg.max_new_tokens, writer.S - len(prompts[i])):
                    slots[slots.index(i)] = None
                    yield i, out.pop(i), ended

    while waiting or out:
        free = [row for row, i in enumerate(slots) if i is None]
        if waiting and len(free) >= min(len(waiting), few):  # all others wait: for several at once
            most = min(
                few if out else writer.B, max(1, 8192 // len(prompts[waiting[-1]]))
            )  # tokens of a pass: memory
            new = {row: waiting.pop() for row in free[: min(most, len(waiting))]}
            out |= {i: [] for i in new.values()}
            slots = [new.get(row, i) for row, i in enumerate(slots)]
            writer.read(
                list(new), [prompts[i] for i in new.values()], [numbers[i] for i in new.values()]
            )
            yield from settle([new.get(row) for row in range(writer.B)])
        elif (
            not waiting and not cfg.compile and 2 * len(free) >= writer.B
        ):  # half of the work would be for nobody
            writer.keep(busy := [row for row, i in enumerate(slots) if i is not None])
            slots = [slots[row] for row in busy]
        writer.step()
        yield from settle(list(slots))


def generate(model, prompts, ends, numbers=None, **how):
    """Go on from each prompt, all at once. -> [new ids, without the end token], [ended]; how: fields of Config."""
    writer = Writer(model, prompts, Config(**{"batch_size": len(prompts), **how}))
    _, texts, ended = map(list, zip(*sorted(write(writer, prompts, ends, numbers))))
    return texts, ended


# --- what is asked, and of whom ---
def beginning(text, row, chat=False):
    """(token ids, shown text) of what a model is to go on from: {"prompt"}, or {"title", "ingredients"}: a recipe's
    beginning, up to the number of the first step. chat: of the template's, where it is the assistant's turn."""
    if "prompt" in row and chat:
        try:
            pieces = text.chat([{"role": "user", "content": row["prompt"]}], ask=True)
        except recipes.BadRow as why:
            raise UserError(f"--chat: {why}.") from None
        return [t & (data.PROMPT - 1) for t in text.tokens([pieces])[0]], row["prompt"]
    if "prompt" in row:
        return text.prompt(row["prompt"]), row["prompt"]
    items = row.get("ingredients", "")
    items = [
        i.strip() for i in (items.split(",") if isinstance(items, str) else items) if i.strip()
    ]
    begin = (
        "\n\nIngredients:\n" + "".join(f"- {i}\n" for i in items) + "\nDirections:\n1."
        if items
        else ""
    )
    return text.prompt(row["title"], begin), row["title"] + begin


def read_prompts(path):
    """The rows of a file: a free prompt a line, or a JSON object with prompt, or title and ingredients."""
    rows, n = [], 0
    try:
        for n, line in enumerate(Path(path).read_text(encoding="utf-8-sig").split("\n"), 1):
            if line := line.rstrip("\r") if line.strip() else "":
                rows.append(
                    row := json.loads(line) if line.lstrip().startswith("{") else {"prompt": line}
                )
                "".join(
                    [
                        row["prompt"] if "prompt" in row else row["title"],
                        *row.get("ingredients", ""),
                    ]
                )  # all texts
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--prompts {path} cannot be read ({e}).") from None
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(
            f"{path}:{n}: no JSON object with prompt, or title and ingredients ({e!r})."
        ) from None
    if not rows:
        raise UserError(f"--prompts {path} holds no prompt.")
    return rows


def load(cfg):
    """(model, Text, run.json or None) of a run with its base, or of a base alone."""
    device, began = plan.pick_device(cfg.device), time.time()
    kept, compute, why = plan.pick_dtype(cfg.dtype, device)
    folder = Path(cfg.run or "out")
    info = state.read_run(folder) if cfg.run or not cfg.model else None
    full = info and (folder / "model.safetensors").exists()
    base = (
        folder
        if full
        else convert.resolve(
            cfg.model or (info["config"]["model"] if info else ""), data.cache_folder(cfg)
        )
    )
    if (adapted := info and not full) and state.fingerprint(base) != info["base_fingerprint"]:
        raise UserError(
            f"{base} is not what {folder} was trained on: it has changed. Name the right one with --model."
        )
    if cfg.merge and not adapted:
        raise UserError("--merge: there is no adapter here to add to the weights; leave it out.")
    if cfg.compile:
        plan.start_compiler()
    make = quant.make_linear(cfg.quant)
    make, left = lora.merging(folder, make) if cfg.merge else (make, {})
    model = models.load(base, device, kept, make)
    model.dtype = (
        torch.float32
    )  # the residual stream: costs a writer nothing, and less is rounded off
    model.apply(lambda m: isinstance(m, models.RMSNorm) and setattr(m, "dtype", compute))
    if left:
        raise UserError(f"the adapter's {next(iter(left))} has no place in {base}.")
    if adapted and not cfg.merge:
        lora.load(model, folder)
    quant.for_writing(model)
    model.requires_grad_(False).eval()
    gb = sum(p.nbytes for p in model.parameters()) / 1e9  # a tied head counts once
    how = (
        f" + {folder}" * bool(info)
        + ", merged" * cfg.merge
        + f", linears in {cfg.quant}" * (cfg.quant != "none")
    )
    say(
        "model",
        f"{base.name}{how}, {gb:.2f} GB on {device} in {time.time() - began:.1f} s; {str(kept)[6:]} ({why})",
    )
    if info and (folder / "state.json").exists():
        facts = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if facts["best_step"] < facts["step"]:
            say(
                "note",
                f"this is step {facts['step']}, the best was {facts['best_step']}: --run {folder}/best",
            )
    return model, data.Text(base), info


# --- how good it is ---
def measure(texts):
    """What can be counted in (text behind a title, ended). Shares are of all ingredients, steps and 3-word runs."""
    whole, used, listed, again, steps, runs = 0, 0, 0, 0, 0, Counter()
    for text, ended in texts:
        items, numbered = (
            re.findall(r"^- (.+)", text, re.MULTILINE),
            re.findall(r"^(\d+)\. (.+)", text, re.MULTILINE),
        )
        form = re.fullmatch(
            r"\n\nIngredients:\n(- .+\n){2,}\nDirections:\n(\d+\. .+\n){2,}", text.rstrip() + "\n"
        )
        done, words = [step for _, step in numbered], text.casefold().split()
        named, of = recipes.mentioned(recipes.Recipe(ingredients=items, directions=done))
        whole += bool(
            form and ended and [int(n) for n, _ in numbered] == [*range(1, len(done) + 1)]
        )
        used, listed, again, steps = (
            used + named,
            listed + of,
            again + len(done) - len(set(done)),
            steps + len(done),
        )
        runs.update(zip(words, words[1:], words[2:]))
    return {
        "recipes": whole / len(texts),
        "ingredients_used": used / max(1, listed),
        "steps_repeated": again / max(1, steps),
        "distinct_3": len(runs) / max(1, runs.total()),
    }


@torch.no_grad()
def evaluate(cfg):
    """--eval: run and base on the same held-out titles. -> {"asked", "run": {measure: value}, "base": the same}"""
    folder, out = Path(cfg.run or "out"), {}
    info = state.read_run(folder)
    base = convert.resolve(cfg.model or info["config"]["model"], data.cache_folder(cfg))
    had = {f.name: info["config"][f.name] for f in fields(data.Data)} | {"cache": cfg.cache}
    try:
        heap, held, text = data.prepare(data.Data(**had), recipes.Rules(**info["rules"]), base)
    except UserError as e:
        raise UserError(
            f"the data that {folder} was trained on, as its run.json has it: {e}"
        ) from None
    if [state.fingerprint(base), data.fingerprint(heap, held)] != [
        info["base_fingerprint"],
        info["data_fingerprint"],
    ]:
        raise UserError(
            f"{base} or the data (or its rules) is not what {folder} was trained on: it has changed."
        )
    prompts = [
        text.prompt(title) for title in info["titles"][: cfg.eval]
    ]  # as many as the run held out, at most
    rows = [[held.val[at : at + cfg.batch_size]] for at in range(0, len(held.val), cfg.batch_size)]
    for who, which in (
        ("run", {"run": str(folder)}),
        ("base", {"run": "", "model": str(base), "merge": False}),
    ):
        model, texts, n, total, count = load(replace(cfg, **which))[0], [], len(prompts), 0.0, 0
        for _, ids, end in cli.Progress(n, who).over(
            write(Writer(model, prompts, cfg), prompts, text.ends)
        ):
            texts.append((text.decode(ids), end))
        with torch.compiler.set_stance("force_eager"):  # each length would be a graph
            for (batch,) in data.feed(held, rows, model.lm_head.weight.device, had["mask_prompt"]):
                loss = models.sum_loss(
                    model(batch.ids), model.lm_head.weight, batch.where, batch.targets
                )
                total, count = total + loss.item(), count + len(batch.targets)
        out[who], model = {**measure(texts), "perplexity": math.exp(total / count)}, None
        torch.compiler.reset()
        gc.collect()  # what is compiled refers to itself: two models would be in memory
    table = "".join(
        f"\n{what:<24}{value:>10.3f}{out['run'][what]:>10.3f}"
        for what, value in out["base"].items()
    )
    print(
        json.dumps({"asked": n, **out})
        if cfg.json
        else f"{n:>4} held-out titles{'base':>14}{'run':>10}{table}"
    )


# --- python sample.py ---
def answer(cfg):
    """Write what is asked for: one text as it comes, or all in the order of their prompts."""
    model, text, info = load(cfg)
    titles = info["titles"] if info else ["Pumpkin Bread"]
    rows = (
        read_prompts(cfg.prompts)
        if cfg.prompts
        else [
            {"prompt": cfg.prompt}
            if cfg.prompt
            else {
                "title": cfg.title or titles[cfg.seed % len(titles)],
                "ingredients": cfg.ingredients,
            }
        ]
    )
    if re.search("[\ud800-\udfff]", json.dumps(rows, ensure_ascii=False)):
        raise UserError(
            "a prompt holds a lone surrogate, or bytes that are no UTF-8: no tokenizer takes it."
        )
    asked = ((*beginning(text, row, cfg.chat), n) for row in rows for n in range(cfg.num_samples))
    prompts, shown, numbers = zip(*asked)
    if not all(prompts):
        raise UserError("a prompt is empty, and this model has no BOS token to begin with.")
    stream, streamed = DecodeStream(skip_special_tokens=True), len(prompts) == 1 and not cfg.json
    for token in prompts[0] if streamed else ():  # it knows what came before
        stream.step(text.tokenizer, token)
    writer, began, first, done, at = Writer(model, prompts, cfg), time.time(), [], {}, 0

    def show(i, token):
        first.append(time.time() - began)
        if streamed:  # a piece of text once its bytes are whole characters
            print(stream.step(text.tokenizer, token) or "", end="", flush=True)

    gap = "\n\n" if cfg.chat else ""
    print(shown[0] + gap if streamed else "", end="", flush=True)
    texts = write(writer, prompts, text.ends, numbers, show)
    for i, ids, end in texts if streamed else cli.Progress(len(prompts), "sample").over(texts):
        said = text.decode(prompts[i] + ids)[
            len(text.decode(prompts[i])) :
        ]  # a first token alone may lose its space
        done[i] = {
            "prompt": shown[i],
            "text": said,
            "sample": numbers[i],
            "tokens": len(ids),
            "ended": end,
        }
        while at in done and not streamed:  # in the order of the prompts, as soon as that is known
            row, at = done[at], at + 1
            plain = f"{row['prompt']}{gap}{row['text']}\n\n{'-' * 40}\n"
            print(json.dumps(row, ensure_ascii=False) if cfg.json else plain)
    print(end="\n" * streamed, flush=True)
    taken, tokens, ended = (
        time.time() - began,
        *(sum(row[key] for row in done.values()) for key in ("tokens", "ended")),
    )
    say(
        "sampled",
        f"{len(done)} text(s), {tokens} tokens, {tokens / taken:.1f} tok/s, the first after "
        f"{min(first, default=0):.2f} s; {ended} ended by themselves",
    )


def main():
    (cfg,) = cli.parse(__doc__, Config)
    check(cfg)
    try:
        evaluate(cfg) if cfg.eval else answer(cfg)
    except torch.OutOfMemoryError:
        raise UserError(
            "out of memory: a smaller --batch_size, --max_new_tokens or --quant nf4 takes less."
        ) from None


if __name__ == "__main__":
    cli.run(main)
