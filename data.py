"""From a heap of recipes to batches on the device.

    python data.py                                    # the default recipes: read, clean, tokenise; print the account
    python data.py --data mine.jsonl more.csv --json  # your own, in any of the formats of recipes.py; for programs
    python data.py --show 3                           # three recipes as the model sees them, target tokens coloured

Follow one recipe: recipes.py reads and cleans it, `tokenise` writes its tokens into a mapped file once, `plan` says
which batch of which step it is in, `collate` pads or packs that batch, `feed` has it on the device before it is needed.
"""
import bisect
import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections import deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

import cli
import convert
import recipes
from cli import UserError


@dataclass
class Data:
    model: str = ""                    # base model: folder, .gguf file or org/name on the hub; none: SmolLM2-135M
    data: list[str] = field(default_factory=list)      # recipe files (.json .jsonl .csv, also .gz); none: Wikibooks
    val_data: list[str] = field(default_factory=list)  # files of held-out recipes; none: a share of --data is held out
    val_recipes: int = 32              # recipes held out of training, on which val_loss is measured
    max_len: int = 1024                # tokens; a longer recipe is dropped and counted, never cut
    mask_prompt: bool = False          # train on the completion only: for recipes, all that follows the title
    batching: Literal["random", "sorted", "packed"] = "sorted"  # sorted: by length; packed: end to end in long rows
    batch_size: int = 2                # recipes in a micro-batch
    batch_tokens: int = 0              # in place of batch_size: tokens in a micro-batch; 0 and packed: 4096
    allow_bad: float = 0.01            # share of rows that may be broken
    clean: bool = True                 # apply the rules; --no-clean takes every recipe as it is
    seed: int = 1                      # of the held-out choice, the order of batches, the adapter's start and dropout
    cache: str = ".cache"              # downloads, converted models, tokens; beside the code unless absolute

    @property
    def budget(self):  # tokens of a packed row, whole tiles of a kernel; 0: not packed
        return -(-(self.batch_tokens or 4096) // 8) * 8 if self.batching == "packed" else 0


def check(cfg):
    """Out-of-range data flags, said before anything is loaded."""
    big = float("inf")
    cli.bound(cfg, val_recipes=(1, big), max_len=(2, big), batch_size=(1, big), batch_tokens=(0, big), allow_bad=(0, 1),
              seed=(0, 2**63))


def cache_folder(cfg):
    return Path(__file__).parent / cfg.cache


# --- tokens ---

NEVER, PROMPT = 1 << 31, 1 << 30  # bits of a stored token that is never a target, or not with --mask_prompt

class Text:
    """The tokenizer of a model folder, with the special tokens that training and sampling need."""

    def __init__(self, folder):
        self.folder, self.path = Path(folder), Path(folder) / "tokenizer.json"
        try:
            self.tokenizer = Tokenizer.from_file(str(self.path))
        except Exception as e:  # noqa: BLE001 (the library raises plain Exception)
            raise UserError(f"{self.path} cannot be read ({e}).") from None
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.tokenizer.encode_special_tokens = True  # "<|im_end|>" inside somebody's recipe is text, not the end token
        files = [self.folder / f"{name}.json" for name in ("tokenizer_config", "config", "generation_config")]
        try:
            tokens, config, generation = (dict(json.loads(f.read_bytes())) if f.exists() else {} for f in files)
        except (OSError, ValueError, TypeError) as e:
            raise UserError(f"a file among {', '.join(map(str, files))} cannot be read ({e}).") from None
        self.named = {k: t["content"] if isinstance(t, dict) else t for k, t in tokens.items() if k.endswith("_token")}
        self.source = tokens.get("chat_template")
        eos = self.tokenizer.token_to_id(self.named["eos_token"]) if self.named.get("eos_token") else None
        ends = [c["eos_token_id"] for c in (config, generation) if c.get("eos_token_id") is not None]
        ends = np.hstack(ends or [[]]).astype(int).tolist()  # a number, or a list of them
        if eos is None and not ends:
            raise UserError(f"{folder} names no end token (eos_token_id in config.json, or the tokenizer's).")
        self.end = ends[0] if eos is None else eos  # what every recipe ends with
        self.ends = {self.end, *ends}               # what stops sampling
        bare, dressed = (self.tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
        self.bos = dressed[:dressed.index(bare[0])]  # what the tokenizer's own post-processor puts before a text
        self.window = config.get("max_position_embeddings") or 2048

    def encode(self, texts):
        return [e.ids for e in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def prompt(self, prompt, completion=""):
        """Tokens of a prompt, and of a completion's beginning, cut where training cuts: tokenised apart and joined."""
        a, b = self.encode([prompt, completion])
        return self.bos + a + b

    def decode(self, ids):
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def pieces(self, recipe):
        """[(text or token ids, NEVER, PROMPT or 0)]: a recipe's parts, which are encoded apart."""
        prompt, completion = recipe.text()
        return self.chat(recipe.messages) if recipe.messages else \
            [(self.bos, NEVER), (prompt, PROMPT), (completion, 0), ([self.end], 0)]

    @cached_property
    def template(self):
        """The model's chat template, in jinja2's sandbox (it is somebody else's code), and a tokenizer for its text."""
        import jinja2.sandbox

        def refuse(message):
            raise jinja2.TemplateError(message)

        file, source = self.folder / "chat_template.jinja", self.source
        source = file.read_text(encoding="utf-8") if file.exists() else source
        source = {t["name"]: t["template"] for t in source}.get("default") if isinstance(source, list) else source
        if not source:
            raise UserError(f"{self.folder} has no chat template, and a chat needs one: name a model that has.")
        box = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                           extensions=["jinja2.ext.loopcontrols"])
        box.globals |= {"raise_exception": refuse, "strftime_now": time.strftime}
        return box.from_string(source), Tokenizer.from_file(str(self.path))

    def chat(self, messages, ask=False):
        """pieces() of a chat, or of a question with `ask`: the assistant's turns and their end tokens are targets. The
        template sees marks in place of the contents, so that "<|im_end|>" in one stays text. BadRow: it refuses."""
        template, tokenizer = self.template
        marks = [{**m, "content": f"\ue000{n}\ue001"} for n, m in enumerate(messages)]
        try:
            text = template.render(messages=marks, add_generation_prompt=ask, **self.named)
        except Exception as e:  # noqa: BLE001 (a template may fail in any way)
            raise recipes.BadRow(f"the chat template refuses it: {e}") from None
        first, *rest = re.split("\ue000(\\d+)\ue001", text)
        if rest[::2] != [str(n) for n in range(len(messages))]:
            raise recipes.BadRow("the chat template leaves out a turn")
        first = tokenizer.encode(first, add_special_tokens=False).ids
        out = [(first if first[:1] == self.bos[:1] else self.bos + first, NEVER)]
        for m, after in zip(messages, rest[1::2]):
            ids, ours = tokenizer.encode(after, add_special_tokens=False).ids, m["role"] == "assistant"
            end = next((n for n, token in enumerate(ids, 1) if token in self.ends), 0) if ours else 0
            out += [(m["content"].strip(), 0 if ours else NEVER), (ids[:end] or [self.end] * ours, 0),
                    (ids[end:], NEVER)]
        return out

    def tokens(self, rows):
        """The marked ids of each list of pieces, as one array a list."""
        ids = iter(self.encode([part for row in rows for part, _ in row if isinstance(part, str)]))
        rows = [[(next(ids) if isinstance(part, str) else part, mark) for part, mark in row] for row in rows]
        return [np.array([t for part, mark in row for t in ([t | mark for t in part] if mark else part)], dtype="<u4")
                for row in rows]

ROW = np.dtype([("start", "u8"), ("length", "u4"), ("key", "u8")])

def cache_key(files, held, cfg, rules, text):
    """Changes with the sources, the rules, the tokenizer and the code that makes the tokens."""
    here, jinja = Path(__file__).parent, text.folder / "chat_template.jinja"
    what = [[(str(f), (s := os.stat(f)).st_size, s.st_mtime_ns) for f in [*files, *held]], len(files), cfg.allow_bad,
            cfg.clean and asdict(rules), text.bos, text.end, text.source, jinja.exists() and jinja.read_text()]
    what += [hashlib.sha256(p.read_bytes()).hexdigest() for p in (text.path, here / "recipes.py", here / "data.py")]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]

def ahead(work, items, n):
    """work(item) of each item, in order, made in a thread up to n items ahead of need."""
    with ThreadPoolExecutor(1) as pool:
        ready = deque()
        for item in items:
            ready.append(pool.submit(work, item))
            if len(ready) > n:
                yield ready.popleft().result()
        yield from (ready.popleft().result() for _ in range(len(ready)))

def ticked(items, what):
    """The items, and progress."""
    bar = cli.Progress(None, what)
    for item in items:
        yield item
        bar.step()
    bar.close()

def cleaned(files, cfg, rules, account, held=()):
    """Two passes over the source: one counts the ingredients, one cleans. On all cores, where the heap is large."""
    common = recipes.common(files, rules, cfg.allow_bad)
    judged = recipes.read(files, account, cfg.allow_bad, partial(recipes.judge, recipes.Heap(rules, common)))
    known = recipes.read(held, recipes.Account(), 1.0) if held else ()
    return recipes.clean(judged, rules, account, common, known)

def tokenise(files, cfg, rules, text, held=()):
    """Read, clean and tokenise once. -> a folder of tokens.bin, rows.bin and account.json, reused where it can be. What
    is like a recipe of the held-out files is dropped."""
    done = cache_folder(cfg) / "tokens" / cache_key(files, held, cfg, rules, text)
    if done.exists():
        return done
    part = done.with_name(f"{done.name}.{os.getpid()}.part")  # renamed when whole: a killed preparation starts clean
    part.mkdir(parents=True, exist_ok=True)
    account, start = recipes.Account(), 0
    heap = cleaned(files, cfg, rules, account, held) if cfg.clean else recipes.read(files, account, cfg.allow_bad)

    def pieces():  # (key, pieces) of each recipe; a chat that the template refuses is a bad row
        for r in ticked(heap, "tokenise"):
            try:
                yield recipes.key(r), text.pieces(r)
            except recipes.BadRow as why:
                account.read, account.kept, account.bad = account.read - 1, account.kept - 1, account.bad + 1
                account.bad_examples += [f"{r.completion[:40]!r}: {why}"] * (account.bad <= 3)

    def encoded(chunk):
        keys, rows = zip(*chunk)
        return keys, text.tokens(rows)

    try:
        each = pieces()
        chunks = iter(lambda: list(itertools.islice(each, 2048)), [])
        with open(part / "tokens.bin", "wb") as out, open(part / "rows.bin", "wb") as rows:
            for key, ids in (pair for chunk in ahead(encoded, chunks, 2) for pair in zip(*chunk)):
                out.write(ids.tobytes())
                rows.write(np.array((start, len(ids), key), dtype=ROW).tobytes())
                start += len(ids)
        (part / "account.json").write_text(json.dumps(asdict(account), ensure_ascii=False), encoding="utf-8")
        try:
            part.rename(done)
        except OSError:
            if not done.exists():  # else another process was quicker, with the same
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return done

class Heap:
    """Tokenised recipes: tokens (memory-mapped), one row of `rows` a recipe, and which of them train."""

    def __init__(self, folder):
        path = folder / "tokens.bin"
        self.tokens = np.memmap(path, dtype="<u4", mode="r") if path.stat().st_size else []
        self.rows = np.fromfile(folder / "rows.bin", dtype=ROW)
        self.account = json.loads((folder / "account.json").read_text(encoding="utf-8"))

    def recipe(self, i, mask_prompt=False):
        """(ids, those of their indices that are targets). Without BOS nothing predicts the first token."""
        start, length, _ = self.rows[i].tolist()
        marked = self.tokens[start:start + length]
        at = np.flatnonzero(marked < (PROMPT if mask_prompt else NEVER))
        return (marked & (PROMPT - 1)).astype(np.int64), at[at > 0]

    def ids(self, i):
        return self.recipe(i)[0]

    def lengths(self, which):
        return self.rows["length"][which].astype(np.int64)

    def drop_long(self, max_len, text):
        """Count and forget what is longer than max_len: the last rule, since it needs the tokens."""
        a, took, long = self.account, self.account["dropped"], np.flatnonzero(self.rows["length"] > max_len)
        self.every = self.rows["length"]
        took["max_len"], a["kept"] = len(long), len(self.rows) - len(long)
        starts = [text.decode(self.ids(i)[:20]).strip().split("\n")[0] for i in long[:3]]
        a["examples"]["max_len"] = [f"{s}: {n} tokens" for s, n in zip(starts, self.rows["length"][long])]
        self.rows = np.delete(self.rows, long)
        if not a["kept"]:
            most = max(took, key=took.get)
            why = f"{most} took {took[most]}; loosen that bound (--help lists them)" if took[most] else \
                f"all {a['bad']} rows are bad: {'; '.join(a['bad_examples'])}"
            raise UserError(f"no recipe is left of {a['read']} read: {why}.")

def prepare(cfg, rules, folder):
    """(Heap, Heap of the held-out recipes, Text). With --val_data the second is a heap of its own, else the same one.
    heap.train and heap.val are the row numbers; no recipe of val has a duplicate in train."""
    text = Text(folder)
    if cfg.max_len > text.window:
        raise UserError(f"--max_len {cfg.max_len} is beyond the {text.window} positions of this model.")

    def load(names, flag, held=()):
        files = [Path(f).resolve() for f in names] or [convert.default_recipes(cache_folder(cfg))]
        if missing := [f for f in files if not f.is_file()]:
            raise UserError(f"{flag}: {missing[0]} is no file.")
        heap = Heap(tokenise(files, cfg, rules, text, held))
        heap.drop_long(cfg.max_len, text)
        if 0 < (most := cfg.budget or cfg.batch_tokens) < (longest := heap.rows["length"].max()):
            raise UserError(f"--batch_tokens {most}: the longest recipe has {longest} tokens; raise it.")
        return heap

    if cfg.val_data:
        held = load(cfg.val_data, "--val_data")
        held.val = np.random.default_rng(cfg.seed).permutation(len(held.rows))[:cfg.val_recipes]
        heap = load(cfg.data, "--data", [Path(f).resolve() for f in cfg.val_data])
        heap.train = np.flatnonzero(~np.isin(heap.rows["key"], held.rows["key"]))
    else:
        heap = held = load(cfg.data, "--data")
        out = recipes.held_out(heap.rows["key"], cfg.val_recipes, cfg.seed)
        heap.train, held.val = np.flatnonzero(~out), np.flatnonzero(out)
    if not len(heap.train) or not len(held.val):
        raise UserError(f"{len(heap.rows)} recipe(s) are too few to train on and hold out: bring more, or --val_data.")
    return heap, held, text


# --- batches ---

def cut(order, lengths, cfg):
    """The recipes of `order` as batches: batch_size of them, or as many as fit into batch_tokens padded, or packed."""
    if cfg.budget:
        return [b for i in range(0, len(order), 4096) for b in pack(order[i:i + 4096], lengths, cfg.budget)]
    if not cfg.batch_tokens:
        return [order[i:i + cfg.batch_size] for i in range(0, len(order), cfg.batch_size)]
    begins, widest = [0], 0
    for i, length in enumerate(lengths[order].tolist()):
        widest = max(widest, length)
        if widest * (i + 1 - begins[-1]) > cfg.batch_tokens:
            begins.append(i)
            widest = length
    return np.split(order, begins[1:])

def pack(order, lengths, budget):
    """Best fit decreasing: the longest first, each into the fullest row that takes it. cut() gives it a window of the
    epoch's random order at a time."""
    rows, room = [], []  # room: (free tokens, row) of the rows that are not full, sorted
    for i in order[np.argsort(-lengths[order], kind="stable")].tolist():
        need = int(lengths[i]) - 1  # the last token is a target only
        at = bisect.bisect_left(room, need, key=lambda pair: pair[0])
        free, row = room.pop(at) if at < len(room) else (budget, rows.append([]) or rows[-1])
        row.append(i)
        if len(row) < budget // 64:
            bisect.insort(room, (free - need, row), key=lambda pair: pair[0])
    return [np.array(row) for row in rows]

def plan(lengths, cfg, epoch, grad_accum=1):
    """An epoch: a list of steps, a step a list of grad_accum micro-batches, those arrays of positions in `lengths`. A
    pure function. The step with the longest recipe comes first: running out of memory shows at once (lit-llama's
    length_grouped_sampler). Micro-batches of a step are neighbours: accumulation changes no loss."""
    rng = np.random.default_rng([cfg.seed, epoch])
    order = rng.permutation(len(lengths))
    if cfg.batching == "sorted":
        order = order[np.argsort(-lengths[order], kind="stable")]  # equal lengths stay in random order
    longest = lengths[order].argmax()
    order[[0, longest]] = order[[longest, 0]]
    batches = cut(order, lengths, cfg)
    if cfg.budget:  # of a window the first rows hold the longest recipes, the last many short ones
        batches[1:] = [batches[i] for i in 1 + rng.permutation(len(batches) - 1)]
    steps = [batches[i:i + grad_accum] for i in range(0, len(batches), grad_accum)]
    rng.shuffle(later := steps[1:])
    return steps[:1] + later

def padding(lengths, cfg):
    """Share of an epoch's tokens that are padding."""
    batches = [b for step in plan(lengths, cfg, 0) for b in step]
    return float(1 - (lengths - bool(cfg.budget)).sum() / sum(cfg.budget or len(b) * lengths[b].max() for b in batches))

# ids [B, T]; where [N] = b * T + t of the positions whose next token is a target; targets [N], those tokens; cu_seqlens
# of a packed row, or None; real: inputs that are no padding; rows: which recipes
Batch = namedtuple("Batch", "ids where targets cu_seqlens real rows")

def collate(heap, rows, mask_prompt, budget=0):
    """Recipes as one Batch on the CPU, a row each and padded; with a budget end to end in one row that long. Padding is
    told by length: a model may pad with its end token."""
    import torch
    taken, longest = [heap.recipe(i, mask_prompt) for i in rows], int(heap.rows["length"].max())
    needs = [len(ids) - 1 for ids, _ in taken]
    T = budget or max(needs)
    begins = np.cumsum([0, *(needs if budget else [T] * len(rows))])
    ids = np.zeros(budget or begins[-1], dtype=np.int64)
    for (t, _), begin in zip(taken, begins):
        ids[begin:begin + len(t) - 1] = t[:-1]
    where = np.concatenate([begin + at - 1 for (_, at), begin in zip(taken, begins)])
    targets = np.concatenate([t[at] for t, at in taken])
    if not len(targets):
        raise UserError(f"a batch has no target token: recipe(s) {[int(i) for i in rows]} of the heap are all prompt.")
    # as many entries in every batch; the free tail is cut into documents no longer than a recipe
    ends = [*begins, *range(begins[-1] + longest, budget, longest)]
    cu = np.array(ends + [budget] * (budget // 64 + budget // longest + 3 - len(ends)), dtype=np.int32)
    ids, where, targets, cu = map(torch.from_numpy, (ids.reshape(-1, T), where, targets, cu))
    return Batch(ids, where, targets, cu if budget else None, sum(needs), rows)

def feed(heap, steps, device, mask_prompt, budget=0, n=4):
    """The Batches of each step, a list a step, on the device and in order. A thread collates, pins and copies them
    ahead of need, so the GPU never waits for one."""
    def send(x):  # a tensor; the others stay
        x = x.pin_memory() if device.type == "cuda" and hasattr(x, "pin_memory") else x
        return x.to(device, non_blocking=True) if hasattr(x, "to") else x

    return ahead(lambda step: [Batch(*map(send, collate(heap, rows, mask_prompt, budget))) for rows in step], steps, n)


# --- python data.py ---

@dataclass
class Show:
    json: bool = False                 # the account as JSON on stdout
    show: int = 0                      # print this many recipes with their target tokens coloured
    to: str = ""                       # write the recipes here, always cleaned, .jsonl or .jsonl.gz

def full_account(heap, held, cfg):
    """Everything that data.py prints, as one dict."""
    lengths = heap.lengths(slice(None))
    kinds = ("random", "sorted", "packed")[:3 if lengths.max() <= (cfg.batch_tokens or 4096) else 2]
    shares = [padding(heap.lengths(heap.train), replace(cfg, batching=kind)) for kind in kinds]
    spread = {f"p{p}": int(np.percentile(lengths, p)) for p in (5, 50, 95, 99, 100)}
    return {**heap.account, "held_out": len(held.val), "tokens": int(lengths.sum()), "lengths": spread,
            "padding": dict(zip(kinds, shares)), "batch_size": cfg.batch_size, "batch_tokens": cfg.batch_tokens}

def print_account(a):
    lines = [("read", f"{a['read']} recipes, {a['bad']} bad rows, {a['repaired']} repaired"),
             *(("", f"    bad: {example}") for example in a["bad_examples"])]
    for rule, count in a["dropped"].items():
        most = "  more than half of all: is that bound right?" if 2 * count > a["read"] else ""
        lines += [("dropped", f"{count:>7}  {rule}{most}"), *(("", f"{'':13}{e}") for e in a["examples"].get(rule, []))]
    size = f"{a['batch_tokens']} tokens" if a["batch_tokens"] else f"{a['batch_size']} recipes"
    lines += [("kept", f"{a['kept']} recipes, {a['held_out']} held out"),
              ("tokens", f"{a['tokens']:,}; a recipe has " + ", ".join(f"{v} ({k})" for k, v in a["lengths"].items())),
              ("padding", f"batches of {size}: " + ", ".join(f"{k} {v:.2%}" for k, v in a["padding"].items()))]
    print("\n".join(f"{what:<12} {text}".rstrip() for what, text in lines))

def show(heap, text, cfg, n):
    """Print recipes as the model sees them: green what it is trained to write, grey what it only reads."""
    for i in np.random.default_rng(cfg.seed).permutation(heap.train)[:n]:
        ids, at = heap.recipe(i, cfg.mask_prompt)
        green = np.isin(np.arange(len(ids)), at)
        for run in np.split(np.arange(len(ids)), np.flatnonzero(np.diff(green)) + 1):
            said = text.tokenizer.decode(ids[run].tolist(), skip_special_tokens=False)
            print(f"\033[{32 if green[run[0]] else 90}m{said}\033[0m", end="")
        print("\n")

def draw(heap, cfg, shares, path):
    """padding.png: the first recipes as random, sorted and packed batches, padding in red; and the lengths."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    fig = Figure(figsize=(11, 8), layout="constrained")
    *axes, last = fig.subplots(2, 2).flat
    lengths = heap.lengths(heap.train[:192])
    for ax, (kind, share) in zip(axes, shares.items()):
        c, picture = replace(cfg, batching=kind), []
        for batch in (b for step in plan(lengths, c, 0) for b in step):
            for row in [batch] if c.budget else batch[:, None]:
                cells, width = np.repeat(1 + np.arange(len(row)) % 2, lengths[row]), c.budget or lengths[batch].max()
                picture.append(np.pad(cells[:width], (0, max(0, width - len(cells))), constant_values=3))
        most = max(map(len, picture))
        ax.imshow([np.pad(row, (0, most - len(row))) for row in picture], aspect="auto", interpolation="nearest",
                  vmin=0, vmax=3, cmap=ListedColormap(["white", "tab:blue", "lightskyblue", "tab:red"]))
        ax.set(title=f"{kind}: {share:.2%} padding", xlabel="tokens", ylabel="rows")
    last.hist(heap.every.clip(max=2 * cfg.max_len), bins=100, color="tab:blue")
    last.axvline(cfg.max_len, color="tab:red", label=f"max_len: {heap.account['dropped']['max_len']} dropped")
    last.set(title="lengths", xlabel="tokens", ylabel="recipes")
    last.legend()
    fig.savefig(path, dpi=120)

def main():
    cfg, rules, what = cli.parse(__doc__, Data, recipes.Rules, Show)
    check(cfg)
    cli.bound(what, show=(0, float("inf")))
    if what.to:
        files, account = cfg.data or [convert.default_recipes(cache_folder(cfg))], recipes.Account()
        recipes.save(cleaned(files, cfg, rules, account), Path(what.to))
        return print(f"{account.kept} of {account.read} recipes are in {what.to}")
    heap, held, text = prepare(cfg, rules, convert.resolve(cfg.model, cache_folder(cfg)))
    if what.show:
        return show(heap, text, cfg, what.show)
    account = full_account(heap, held, cfg)
    print(json.dumps(account, ensure_ascii=False)) if what.json else print_account(account)
    draw(heap, cfg, account["padding"], "padding.png")
    cli.say("picture", "padding.png")


if __name__ == "__main__":
    cli.run(main)
