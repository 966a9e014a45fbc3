"""From a heap of recipes to batches on the device: recipes.py reads and cleans one, `tokenise` writes its tokens into a
mapped file, `plan` says in which batch it is, `collate` pads or packs that, `feed` has it on the device ahead of need.

    python data.py                                    # the default recipes: read, clean, tokenise; print the account
    python data.py --data mine.jsonl more.csv --json  # your own, in any of the formats of recipes.py; for programs
    python data.py --show 3                           # three recipes as the model sees them, target tokens coloured
"""

import bisect
import contextlib
import hashlib
import itertools
import json
import re
import tempfile
import time
from array import array
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

import convert
import recipes
from cli import Progress, UserError, bound, parse, run, say

NEVER, PROMPT = (
    1 << 31,
    1 << 30,
)  # bits of a stored token that is never a target, or not with --mask_prompt
ROW = np.dtype(
    [("start", "u8"), ("length", "u4"), ("key", "u8")]
)  # of rows.bin: where in tokens.bin; recipes.key()


@dataclass
class Data:
    # fmt: off
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
    # fmt: on
    @property
    def budget(self):  # tokens of a packed row, whole tiles of a kernel; 0: not packed
        return -(-(self.batch_tokens or 4096) // 8) * 8 if self.batching == "packed" else 0


def check(cfg):
    """Out-of-range data flags, said before anything is loaded."""
    bound(
        cfg,
        val_recipes=1,
        max_len=2,
        batch_size=1,
        batch_tokens=0,
        allow_bad=(0, 1),
        seed=(0, 2**63),
    )


def cache_folder(cfg):
    return Path(__file__).parent / cfg.cache


# --- tokens ---
class Text:
    """The tokenizer of a model folder. `bos` begins a recipe and `end` ends it; any of `ends` stops sampling."""

    def __init__(self, folder):
        self.path, *rest, jinja = (
            Path(folder, name)
            for name in (
                "tokenizer.json",
                "tokenizer_config.json",
                "config.json",
                "generation_config.json",
                "chat_template.jinja",
            )
        )
        try:
            self.tokenizer = Tokenizer.from_file(str(file := self.path))
            tokens, config, more = (
                dict(json.loads(f.read_bytes())) if (file := f).exists() else {} for f in rest
            )
            self.source = (
                jinja.read_text("utf-8")
                if (file := jinja).exists()
                else tokens.get("chat_template")
            )
        except Exception as e:  # noqa: BLE001 (tokenizers raises no other)
            raise UserError(f"{file} cannot be read ({e}).") from None
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.tokenizer.encode_special_tokens = (
            True  # "<|im_end|>" inside somebody's recipe is text, not the end token
        )
        self.named = {
            k: t["content"] if isinstance(t, dict) else t
            for k, t in tokens.items()
            if k.endswith("_token")
        }
        eos = self.tokenizer.token_to_id(self.named.get("eos_token") or "")
        ends = [
            e for e in (eos, config.get("eos_token_id"), more.get("eos_token_id")) if e is not None
        ]
        if not (
            ends := np.hstack(ends or [[]]).astype(int).tolist()
        ):  # each a number, or a list of them
            raise UserError(
                f"{folder} names no end token (eos_token_id in config.json, or the tokenizer's)."
            )
        self.end, self.ends, self.window = (
            ends[0],
            set(ends),
            config.get("max_position_embeddings") or 2048,
        )
        self.bos = (a := self.tokenizer.encode("a")).ids[
            : a.special_tokens_mask.index(0)
        ]  # by its post-processor

    def __reduce__(self):  # on its way to another process: without what it made of the template
        return Text, (self.path.parent,)

    def encode(self, texts):
        return [e.ids for e in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids):
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def prompt(self, prompt, completion=""):
        """Tokens of a prompt, and of a completion's beginning, cut where training cuts: tokenised apart and joined."""
        return sum(self.encode([prompt, completion]), self.bos)

    def pieces(self, recipe):
        """[(text or token ids, NEVER, PROMPT or 0)]: a recipe's parts, which are encoded apart."""
        plain = zip([self.bos, *recipe.text(), [self.end]], [NEVER, PROMPT, 0, 0])
        return self.chat(recipe.messages) if recipe.messages else list(plain)

    @cached_property
    def template(self):
        """The model's chat template, in jinja2's sandbox (it is somebody else's code), and a tokenizer for its text."""
        from jinja2 import StrictUndefined, ext, sandbox

        listed = (
            self.source
            if isinstance(self.source, list)
            else [{"name": "default", "template": self.source}]
        )
        if not (source := {t["name"]: t["template"] for t in listed}.get("default")):
            raise UserError(
                f"{self.path.parent} has no chat template, and a chat needs one: name a model that has."
            )
        box = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols]
        )
        box.globals |= {
            "raise_exception": StrictUndefined,
            "strftime_now": time.strftime,
        }  # it raises where printed
        return box.from_string(source), Tokenizer.from_file(str(self.path))

    def chat(self, messages, ask=False):
        """pieces() of a chat, or of a question with `ask`: the assistant's turns and their ends are targets."""
        template, tokenizer = self.template
        marked = [
            {**m, "content": f"\ue000{n}\ue001"} for n, m in enumerate(messages)
        ]  # a content stays text
        try:
            text = template.render(messages=marked, add_generation_prompt=ask, **self.named)
        except Exception as e:  # noqa: BLE001 (a template may fail in any way)
            raise recipes.BadRow(f"the chat template refuses it: {e}") from None
        text = re.split(
            "\ue000(\\d+)\ue001", text
        )  # before the first content, its number, what follows it, ...
        if text[1::2] != [str(n) for n in range(len(messages))]:
            raise recipes.BadRow("the chat template leaves out a turn")
        first, *rest = (
            tokenizer.encode(between, add_special_tokens=False).ids for between in text[::2]
        )
        out = [(first if first[:1] == self.bos[:1] else self.bos + first, NEVER)]
        for m, ids in zip(messages, rest):
            ours, end = (
                m["role"] == "assistant",
                next((n for n, token in enumerate(ids, 1) if token in self.ends), 0),
            )
            out += (
                [(m["content"].strip(), 0), (ids[:end] or [self.end], 0), (ids[end:], NEVER)]
                if ours
                else [(m["content"].strip(), NEVER), (ids, NEVER)]
            )
        return out

    def tokens(self, rows):
        """The marked ids of each list of pieces, as one array a list."""
        ids = iter(self.encode([part for row in rows for part, _ in row if type(part) is str]))
        rows = [
            [(next(ids) if type(part) is str else part, mark) for part, mark in row] for row in rows
        ]
        return [
            sum((array("I", [t | m for t in ids] if m else ids) for ids, m in row), array("I"))
            for row in rows
        ]


def ahead(work, items, n):
    """work(item) of each item, in order, made in a thread up to n items ahead of need."""
    with ThreadPoolExecutor(1) as pool:
        jobs = (pool.submit(work, item) for item in items)
        ready = list(itertools.islice(jobs, n + 1))
        while ready:
            yield ready.pop(0).result()
            ready += itertools.islice(jobs, 1)


Rendered = namedtuple(
    "Rendered", "title completion hash pieces"
)  # a recipe, as little as has to leave its process


def render(text, heap, recipe):
    """The pieces of a recipe and what the rules of `heap` (None: no rules) say of it. Any process can do that."""
    judged = recipes.judge(heap, recipe) if heap else recipes.Judged(recipe, False, None, None)
    r = judged.recipe
    pieces = () if judged.failed else text.pieces(r)
    short = Rendered(r.title, r.completion and r.completion[:500], recipes.key(r), pieces)
    return judged._replace(recipe=short) if heap else short


def cleaned(files, cfg, rules, account, held=(), judge=recipes.judge):
    """Two passes over the source: one counts the ingredients, one cleans. On all cores, where the heap is large."""
    found = (
        recipes.read(files, recipes.Account(), cfg.allow_bad, recipes.names)
        if rules.min_share
        else ()
    )
    common = recipes.common(Progress(None, "ingredients").over(found), rules)
    judged = recipes.read(
        files, account, cfg.allow_bad, partial(judge, recipes.Heap(rules, common))
    )
    return recipes.clean(
        judged, rules, account, common, recipes.read(held, recipes.Account(), 1.0) if held else ()
    )


def tokenise(files, cfg, rules, text, held=()):
    """Read, clean, tokenise once. -> folder of tokens.bin, rows.bin, account.json. Cleaning drops doubles of `held`."""
    hangs_on = [
        [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in [*files, *held]],
        len(files),
        cfg.allow_bad,
        cfg.clean and asdict(rules),
        text.bos,
        text.end,
        sorted(text.ends),
        text.named,
        text.source,
        *(f.read_text("utf-8") for f in (text.path, Path(recipes.__file__), Path(__file__))),
    ]
    done = (
        cache_folder(cfg)
        / "tokens"
        / hashlib.sha256(json.dumps(hangs_on).encode()).hexdigest()[:16]
    )
    if done.exists():
        return done
    account = recipes.Account()
    heap = (
        cleaned(files, cfg, rules, account, held, partial(render, text))
        if cfg.clean
        else recipes.read(files, account, cfg.allow_bad, partial(render, text, None))
    )
    heap = Progress(None, "tokenise").over(heap)
    chunks = iter(lambda: list(itertools.islice(heap, 2048)), [])
    made = ahead(lambda chunk: zip(chunk, text.tokens([r.pieces for r in chunk])), chunks, 2)
    done.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(".part", dir=done.parent) as folder:
        (
            part := Path(folder, done.name)
        ).mkdir()  # moved when whole: a killed preparation starts clean
        with open(part / "tokens.bin", "wb") as out, open(part / "rows.bin", "wb") as rows:
            for r, ids in itertools.chain.from_iterable(made):
                rows.write(np.array((out.tell() // 4, len(ids), r.hash), dtype=ROW).tobytes())
                out.write(ids)
        (part / "account.json").write_text(
            json.dumps(asdict(account), ensure_ascii=False), encoding="utf-8"
        )
        with contextlib.suppress(OSError):  # another process was quicker, with the same
            part.rename(done)
    return done


class Heap:
    """Tokenised recipes: tokens (memory-mapped), one row of `rows` a recipe, and which of them train."""

    def __init__(self, folder):
        self.rows = np.fromfile(folder / "rows.bin", dtype=ROW)
        self.tokens = (
            np.memmap(folder / "tokens.bin", dtype="<u4", mode="r") if len(self.rows) else []
        )
        self.account = json.loads((folder / "account.json").read_text(encoding="utf-8"))

    def recipe(self, i, mask_prompt=False):
        """(ids, those of their indices that are targets). Without BOS nothing predicts the first token."""
        start, length, _ = self.rows[i].tolist()
        marked = self.tokens[start : start + length]
        at = np.flatnonzero(marked < (PROMPT if mask_prompt else NEVER))
        return (marked & (PROMPT - 1)).astype(np.int64), at[at > 0]

    def ids(self, i):
        return self.recipe(i)[0]

    def lengths(self, which):
        return self.rows["length"][which].astype(np.int64)


def load(names, flag, cfg, rules, text, held=()):
    """The Heap of some files, without what is longer than max_len: the last rule, since it needs the tokens."""
    files = [Path(f).resolve() for f in names] or [convert.default_recipes(cache_folder(cfg))]
    if missing := [f for f in files if not f.is_file()]:
        raise UserError(f"{flag}: {missing[0]} is no file.")
    heap = Heap(tokenise(files, cfg, rules, text, [Path(f).resolve() for f in held]))
    a, took, heap.every = heap.account, heap.account["dropped"], heap.rows["length"]
    long = np.flatnonzero(heap.every > cfg.max_len)
    starts = [text.decode(heap.ids(i)[:20]).strip().split("\n")[0] for i in long[:3]]
    a["examples"]["max_len"] = [f"{s}: {n} tokens" for s, n in zip(starts, heap.every[long])]
    heap.rows, took["max_len"], a["kept"] = (
        np.delete(heap.rows, long),
        len(long),
        len(heap.rows) - len(long),
    )
    if not len(heap.rows):
        most, bad = (
            max(took, key=took.get),
            f"all {a['bad']} rows are bad: {'; '.join(a['bad_examples'])}",
        )
        why = (
            f"{most} took {took[most]}; loosen that bound (--help lists them)"
            if took[most]
            else bad
        )
        raise UserError(f"no recipe is left of {a['read']} read: {why}.")
    if 0 < (most := cfg.budget or cfg.batch_tokens) < (longest := heap.rows["length"].max()):
        raise UserError(
            f"--batch_tokens {most}: the longest recipe has {longest} tokens; raise it."
        )
    return heap


def prepare(cfg, rules, folder):
    """(Heap, that of the held-out recipes, Text). Their .train and .val are row numbers; train has no double of val."""
    if cfg.max_len > (text := Text(folder)).window:
        raise UserError(
            f"--max_len {cfg.max_len} is beyond the {text.window} positions of this model."
        )
    if cfg.val_data:
        held = load(cfg.val_data, "--val_data", cfg, rules, text)
        held.val = np.random.default_rng(cfg.seed).permutation(len(held.rows))[: cfg.val_recipes]
        heap = load(cfg.data, "--data", cfg, rules, text, cfg.val_data)
        heap.train = np.flatnonzero(~np.isin(heap.rows["key"], held.rows["key"]))
    else:
        heap = held = load(cfg.data, "--data", cfg, rules, text)
        out = recipes.held_out(heap.rows["key"], cfg.val_recipes, cfg.seed)
        heap.train, held.val = np.flatnonzero(~out), np.flatnonzero(out)
    if not len(heap.train) or not len(held.val):
        raise UserError(
            f"{len(heap.rows)} recipe(s) are too few to train on and hold out: bring more, or --val_data."
        )
    return heap, held, text


def fingerprint(heap, held):
    return hashlib.sha256(heap.rows.tobytes() + held.rows[held.val].tobytes()).hexdigest()[:16]


# --- batches ---
def cut(order, lengths, cfg):
    """The recipes of `order` as batches: batch_size of them, or as many as fit into batch_tokens padded, or packed."""
    if cfg.budget:
        return [
            b
            for i in range(0, len(order), 4096)
            for b in pack(order[i : i + 4096], lengths, cfg.budget)
        ]
    if not cfg.batch_tokens:
        return [order[i : i + cfg.batch_size] for i in range(0, len(order), cfg.batch_size)]
    begins, widest = [0], 0
    for i, length in enumerate(lengths[order].tolist()):
        if (widest := max(widest, length)) * (i + 1 - begins[-1]) > cfg.batch_tokens:
            begins.append(i)
            widest = length
    return np.split(order, begins[1:])


def pack(order, lengths, budget):
    """Best fit decreasing, on a window of the epoch's order: the longest first, each into the fullest row with room."""
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
    """The steps of an epoch: lists of grad_accum micro-batches of positions in `lengths`. A pure function. The longest
    recipe is in the first: out of memory shows at once (lit-llama). Neighbours: accumulation changes no loss."""
    rng = np.random.default_rng([cfg.seed, epoch])
    order = rng.permutation(len(lengths))
    order = (
        order[np.argsort(-lengths[order], kind="stable")] if cfg.batching == "sorted" else order
    )  # equal: random
    longest = lengths[order].argmax()
    order[[0, longest]] = order[[longest, 0]]
    batches = cut(order, lengths, cfg)
    if cfg.budget:  # of a window the first rows hold the longest recipes, the last many short ones
        batches[1:] = [batches[i] for i in 1 + rng.permutation(len(batches) - 1)]
    steps = [batches[i : i + grad_accum] for i in range(0, len(batches), grad_accum)]
    rng.shuffle(later := steps[1:])
    return steps[:1] + later


def padding(lengths, cfg):
    """Share of an epoch's tokens that are padding."""
    batches = [b for step in plan(lengths, cfg, 0) for b in step]
    return float(
        1
        - (lengths - bool(cfg.budget)).sum()
        / sum(cfg.budget or len(b) * lengths[b].max() for b in batches)
    )


# ids [B, T]; where [N]: b * T + t of positions whose next token is a target; targets [N]; cu_seqlens, if packed
Batch = namedtuple(
    "Batch", "ids where targets cu_seqlens real rows"
)  # real: inputs but padding; rows: which recipes


def collate(heap, rows, mask_prompt, budget=0):
    """Recipes as one Batch on the CPU: a row each, padded, or with a budget end to end in one row of that length."""
    from torch import from_numpy as tensor

    taken = [heap.recipe(i, mask_prompt) for i in rows]
    needs = [
        len(ids) - 1 for ids, _ in taken
    ]  # padding is told by length: a model may pad with its end token
    T, longest = budget or max(needs), int(heap.rows["length"].max())
    begins = np.cumsum([0, *(needs if budget else [T] * len(rows))])
    ids = np.zeros(budget or begins[-1], dtype=np.int64)
    for (t, _), begin in zip(taken, begins):
        ids[begin : begin + len(t) - 1] = t[:-1]
    where = np.concatenate([begin + at - 1 for (_, at), begin in zip(taken, begins)])
    if not len(targets := np.concatenate([t[at] for t, at in taken])):
        raise UserError(
            f"a batch has no target token: recipe(s) {[int(i) for i in rows]} of the heap are all prompt."
        )
    ends = [
        *begins,
        *range(begins[-1] + longest, budget, longest),
    ]  # the free tail: documents as long as a recipe
    cu = np.array(
        ends + [budget] * (budget // 64 + budget // longest + 3 - len(ends)), dtype=np.int32
    )  # equally many
    return Batch(
        *map(tensor, (ids.reshape(-1, T), where, targets)),
        tensor(cu) if budget else None,
        sum(needs),
        rows,
    )


def feed(heap, steps, device, mask_prompt, budget=0, n=4):
    """A list of Batches on the device for each step. A thread makes and copies them: the GPU never waits for one."""

    def send(x):  # a tensor; the others stay
        return (
            (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)
            if hasattr(x, "to")
            else x
        )

    return ahead(
        lambda step: [Batch(*map(send, collate(heap, rows, mask_prompt, budget))) for rows in step],
        steps,
        n,
    )


# --- python data.py ---
@dataclass
class Show:
    # fmt: off
    json: bool = False                 # the account as JSON on stdout
    show: int = 0                      # print this many recipes with their target tokens coloured
    to: str = ""                       # write the recipes here, always cleaned, .jsonl or .jsonl.gz
    # fmt: on


def print_account(a):
    print(
        f"read         {a['read']} recipes, {a['bad']} bad rows, {a['repaired']} repaired",
        *(f"{'':17}bad: {example}" for example in a["bad_examples"]),
        sep="\n",
    )
    for rule, n in a["dropped"].items():
        most = "  more than half of all: is that bound right?" if 2 * n > a["read"] else ""
        print(
            f"dropped      {n:>7}  {rule}{most}",
            *(f"{'':26}{e}" for e in a["examples"].get(rule, [])),
            sep="\n",
        )
    size = f"{a['batch_tokens']} tokens" if a["batch_tokens"] else f"{a['batch_size']} recipes"
    print(f"kept         {a['kept']} recipes, {a['held_out']} held out")
    print(
        f"tokens       {a['tokens']:,}; a recipe has",
        ", ".join(f"{n} ({p})" for p, n in a["lengths"].items()),
    )
    print(
        f"padding      batches of {size}:",
        ", ".join(f"{kind} {share:.2%}" for kind, share in a["padding"].items()),
    )


def show(heap, text, cfg, n):
    """Print recipes as the model sees them: green what it is trained to write, grey what it only reads."""
    for i in np.random.default_rng(cfg.seed).permutation(heap.train)[:n]:
        ids, at = heap.recipe(i, cfg.mask_prompt)
        for green, turn in itertools.groupby(range(len(ids)), set(at.tolist()).__contains__):
            said = text.tokenizer.decode(ids[list(turn)].tolist(), skip_special_tokens=False)
            print(f"\033[{32 if green else 90}m{said}\033[0m", end="")
        print("\n")


def draw(heap, cfg, shares, path):
    """padding.png: the first recipes as random, sorted and packed batches, padding in red; and the lengths."""
    from matplotlib import colors, figure

    fig, lengths = (
        figure.Figure(figsize=(11, 8), layout="constrained"),
        heap.lengths(heap.train[:192]),
    )
    (*axes, last), palette = (
        fig.subplots(2, 2).flat,
        colors.to_rgba_array(["white", "C0", "lightskyblue", "C3"]),
    )
    for ax, (kind, share) in zip(axes, shares.items()):
        c, picture = replace(cfg, batching=kind), []
        for batch in itertools.chain(*plan(lengths, c, 0)):
            width, rows = (
                (c.budget, [batch]) if c.budget else (lengths[batch].max(), batch[:, None])
            )
            picture += [
                np.append(np.repeat(1 + np.arange(len(r)) % 2, lengths[r]), [3] * width)[:width]
                for r in rows
            ]
        cells = np.array([*itertools.zip_longest(*picture, fillvalue=0)]).T
        ax.imshow(palette[cells], aspect="auto", interpolation="nearest")
        ax.set(title=f"{kind}: {share:.2%} padding", xlabel="tokens", ylabel="rows")
    last.hist(heap.every.clip(max=2 * cfg.max_len), bins=100, color="tab:blue")
    last.axvline(
        cfg.max_len, color="tab:red", label=f"max_len: {heap.account['dropped']['max_len']} dropped"
    )
    last.set(title="lengths", xlabel="tokens", ylabel="recipes")
    last.legend()
    fig.savefig(path, dpi=120)


def main():
    cfg, rules, what = parse(__doc__, Data, recipes.Rules, Show)
    check(cfg)
    bound(what, show=0)
    if what.to:
        files, account = cfg.data or [convert.default_recipes(cache_folder(cfg))], recipes.Account()
        recipes.save(
            cleaned(files, cfg, rules, account, list(map(Path, cfg.val_data))), Path(what.to)
        )
        return print(f"{account.kept} of {account.read} recipes are in {what.to}")
    heap, held, text = prepare(cfg, rules, convert.resolve(cfg.model, cache_folder(cfg)))
    if what.show:
        return show(heap, text, cfg, what.show)
    lengths = heap.lengths(slice(None))
    kinds = ("random", "sorted", "packed")[
        : 3 if lengths.max() <= (cfg.batch_tokens or 4096) else 2
    ]
    shares = {
        kind: padding(heap.lengths(heap.train), replace(cfg, batching=kind)) for kind in kinds
    }
    account = {
        **heap.account,
        "held_out": len(held.val),
        "tokens": int(lengths.sum()),
        "lengths": {f"p{p}": int(np.percentile(lengths, p)) for p in (5, 50, 95, 99, 100)},
        "padding": shares,
        "batch_size": cfg.batch_size,
        "batch_tokens": cfg.batch_tokens,
    }
    print(json.dumps(account, ensure_ascii=False)) if what.json else print_account(account)
    draw(heap, cfg, shares, "padding.png")
    say("picture", "padding.png")


if __name__ == "__main__":
    run(main)
