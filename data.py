"""From recipes to batches on the device: which recipes, in which batch, padded or packed, and there ahead of need.

    python data.py                                    # the default recipes: read, clean, tokenise; print the account
    python data.py --data mine.jsonl more.csv --json  # your own, in any of the formats of files/sources.py
    python data.py --show 3                           # three recipes as the model sees them, target tokens coloured

The way of a batch: files/sources.py reads rows, recipes.py makes recipes of them and drops the bad ones, text.py makes
tokens. Here `plan` says in which batch a recipe is, `collate` pads or packs the batch, `feed` has it on the device.
"""

from cli import UserError, ahead, bound, parse, run, say

import bisect
import hashlib
import itertools
import json
from collections import namedtuple
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

import recipes
from files import disk, hub, pictures, sources
from recipes import Account, Rules
from text import Text, TokenFile, drop_long, tokenise, why_nothing_is_left

PACKED_TOKENS = 4096  # of a packed row, where --batch_tokens is not given
WINDOW = 4096  # recipes that are packed together
TILE = 8  # tokens: a packed row is whole tiles of a kernel
SHORTEST = 64  # tokens: a packed row takes no more recipes than if all were this short


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
    def budget(self):
        """Tokens of a packed row; 0: not packed."""
        if self.batching != "packed":
            return 0
        tokens = self.batch_tokens or PACKED_TOKENS
        return -(-tokens // TILE) * TILE  # rounded up


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


# --- datasets ---


class Dataset:
    """Tokenised recipes: one row of `rows` (text.ROW) a recipe, and the `indices` of those rows that are to be used."""

    def __init__(self, source, rows, account, indices):
        self.source = source  # the TokenFile
        self.rows = rows  # its rows without the recipes that are longer than max_len
        self.account = account  # what became of every row that was read
        self.indices = indices
        self.all_lengths = source.rows["length"]

    def recipe(self, i, mask_prompt=False):
        """(ids, those of their indices that are targets) of row i."""
        start, length, _ = self.rows[i].tolist()
        return self.source.recipe(start, length, mask_prompt)

    def ids(self, i):
        ids, _ = self.recipe(i)
        return ids

    def lengths(self, which):
        """How many tokens those rows have."""
        return self.rows["length"][which].astype(np.int64)

    @property
    def longest(self):
        """Tokens of the longest recipe."""
        return int(self.rows["length"].max())

    def using(self, indices):
        """This dataset with other indices."""
        return Dataset(self.source, self.rows, self.account, indices)


def prepare(cfg, rules, folder):
    """(dataset, held, text): what to train on, what is held out, and the tokenizer of a model folder."""
    text = Text(folder)
    if cfg.max_len > text.window:
        raise UserError(
            f"--max_len {cfg.max_len} is beyond the {text.window} positions of this model."
        )
    if cfg.val_data:
        held = load(cfg.val_data, "--val_data", cfg, rules, text)
        dataset = load(cfg.data, "--data", cfg, rules, text, cfg.val_data)
        # A recipe of the held-out file is not trained on, even if it is not among the val_recipes.
        train = ~np.isin(dataset.rows["key"], held.rows["key"])
        chosen = np.random.default_rng(cfg.seed).permutation(len(held.rows))[: cfg.val_recipes]
    else:
        held = dataset = load(cfg.data, "--data", cfg, rules, text)
        out = recipes.held_out(dataset.rows["key"], cfg.val_recipes, cfg.seed)
        train = ~out
        chosen = np.flatnonzero(out)
    dataset = dataset.using(np.flatnonzero(train))
    held = held.using(chosen)
    if not len(dataset.indices) or not len(held.indices):
        n = len(dataset.rows)
        raise UserError(
            f"{n} recipe(s) are too few to train on and hold out: bring more, or --val_data."
        )
    return dataset, held, text


def load(names, flag, cfg, rules, text, held=()):
    """The Dataset of all recipes of some files that are not longer than max_len."""
    files = hub.recipe_files(names, flag, disk.cache_folder(cfg.cache))
    held = [Path(name).resolve() for name in held]
    source = TokenFile(tokenise(files, cfg, rules, text, held))
    rows, account = drop_long(source, text, cfg.max_len)
    if not len(rows):
        raise UserError(why_nothing_is_left(account))
    most = cfg.budget or cfg.batch_tokens
    longest = rows["length"].max()
    if 0 < most < longest:
        raise UserError(
            f"--batch_tokens {most}: the longest recipe has {longest} tokens; raise it."
        )
    return Dataset(source, rows, account, np.arange(len(rows)))


def fingerprint(dataset, held):
    """What a resumed run must find again: all rows of the one, the held-out rows of the other."""
    rows = dataset.rows.tobytes() + held.rows[held.indices].tobytes()
    return hashlib.sha256(rows).hexdigest()[:16]


# --- which recipe is in which batch ---


def plan(lengths, cfg, epoch, grad_accum=1):
    """The steps of an epoch: lists of grad_accum micro-batches of positions in `lengths`. A pure function.

    The longest recipe is in the first step, so that running out of memory shows at once (as in lit-llama). The batches
    of a step are neighbours: accumulation changes no loss."""
    rng = np.random.default_rng([cfg.seed, epoch])
    order = rng.permutation(len(lengths))
    if cfg.batching == "sorted":
        # The sort is stable, so recipes of equal length stay in random order.
        order = order[np.argsort(-lengths[order], kind="stable")]
    longest = lengths[order].argmax()
    order[[0, longest]] = order[[longest, 0]]
    batches = cut(order, lengths, cfg)
    if cfg.budget:
        # The first rows of each window hold the longest recipes and the last many short ones.
        shuffled = 1 + rng.permutation(len(batches) - 1)
        batches[1:] = [batches[i] for i in shuffled]
    steps = [batches[i : i + grad_accum] for i in range(0, len(batches), grad_accum)]
    later = steps[1:]
    rng.shuffle(later)
    return steps[:1] + later


def cut(order, lengths, cfg):
    """The recipes of `order` as batches: batch_size of them, or as many as fit into batch_tokens padded, or packed."""
    if cfg.budget:
        return pack_windows(order, lengths, cfg.budget)
    if cfg.batch_tokens:
        return cut_by_tokens(order, lengths, cfg.batch_tokens)
    size = cfg.batch_size
    return [order[i : i + size] for i in range(0, len(order), size)]


def cut_by_tokens(order, lengths, batch_tokens):
    """Batches that are padded to at most batch_tokens: the next one begins where a recipe would not fit any more."""
    begins = [0]
    widest = 0
    for i, length in enumerate(lengths[order].tolist()):
        widest = max(widest, length)
        recipes_in_batch = i + 1 - begins[-1]
        if widest * recipes_in_batch > batch_tokens:
            begins.append(i)
            widest = length
    return np.split(order, begins[1:])


def pack_windows(order, lengths, budget):
    """Packed rows of the whole order, one window of it after another."""
    rows = []
    for i in range(0, len(order), WINDOW):
        rows += pack(order[i : i + WINDOW], lengths, budget)
    return rows


def pack(order, lengths, budget):
    """Best fit decreasing, on a window of the epoch's order: the longest first, each into the fullest row with room."""
    rows = []
    room = []  # (free tokens, row) of the rows that are not full, sorted
    longest_first = order[np.argsort(-lengths[order], kind="stable")]
    for i in longest_first.tolist():
        need = int(lengths[i]) - 1  # the last token is a target only
        fullest = bisect.bisect_left(room, need, key=free_tokens)
        if fullest < len(room):
            free, row = room.pop(fullest)
        else:
            free = budget
            row = []
            rows.append(row)
        row.append(i)
        if len(row) < budget // SHORTEST:
            bisect.insort(room, (free - need, row), key=free_tokens)
    return [np.array(row) for row in rows]


def free_tokens(pair):
    free, _ = pair
    return free


def padding(lengths, cfg):
    """Share of an epoch's tokens that are padding."""
    batches = list(itertools.chain(*plan(lengths, cfg, 0)))
    if cfg.budget:
        # The last token of a packed recipe is a target only.
        real = (lengths - 1).sum()
        total = cfg.budget * len(batches)
    else:
        real = lengths.sum()
        total = sum(len(batch) * lengths[batch].max() for batch in batches)
    return float(1 - real / total)


# --- a batch ---


Batch = namedtuple(
    "Batch",
    [
        "ids",  # (B, T); packed: (1, budget)
        "where",  # (N,) b * T + t of the positions whose next token is a target
        "targets",  # (N,) those next tokens
        "cu_seqlens",  # where documents begin and end in a packed row; else None
        "real",  # inputs that are no padding, a number
        "rows",  # which recipes
    ],
)


def collate(dataset, rows, mask_prompt, budget=0):
    """Recipes as one Batch on the CPU: a row each, padded, or with a budget end to end in one row of that length."""
    # Here, so that a program that makes no batch starts without torch.
    from torch import from_numpy

    taken = [dataset.recipe(i, mask_prompt) for i in rows]
    # Padding is told by length, because a model may pad with its end token. The last token is a target only.
    needs = [len(ids) - 1 for ids, _ in taken]
    if budget:
        T = budget
        begins = np.cumsum([0, *needs])
    else:
        T = max(needs)
        begins = np.arange(len(rows) + 1) * T
    ids = np.zeros(budget or len(rows) * T, dtype=np.int64)
    where = []
    targets = []
    for (recipe_ids, at), need, begin in zip(taken, needs, begins, strict=False):
        ids[begin : begin + need] = recipe_ids[:-1]
        where.append(begin + at - 1)
        targets.append(recipe_ids[at])
    targets = np.concatenate(targets)
    if not len(targets):
        raise UserError(
            f"a batch has no target token: recipe(s) {[int(i) for i in rows]} of the heap are all prompt."
        )
    cu_seqlens = None
    if budget:
        longest = int(dataset.rows["length"].max())
        cu_seqlens = from_numpy(document_ends(begins, longest, budget))
    return Batch(
        ids=from_numpy(ids.reshape(-1, T)),
        where=from_numpy(np.concatenate(where)),
        targets=from_numpy(targets),
        cu_seqlens=cu_seqlens,
        real=sum(needs),
        rows=rows,
    )


def document_ends(begins, longest, budget):
    """Where the documents of a packed row begin and end, for attention; equally many in all rows, so one shape."""
    # The free tail is cut into documents, too, each as long as the longest recipe.
    tail = range(begins[-1] + longest, budget, longest)
    ends = [*begins, *tail]
    most = budget // SHORTEST + budget // longest + 3
    ends += [budget] * (most - len(ends))
    return np.array(ends, dtype=np.int32)


def feed(dataset, steps, device, mask_prompt, budget=0, n=4):
    """A list of Batches on the device for each step, made and copied in a thread n steps ahead of need.

    Reading, padding and copying then run while the device works, so the device never waits for a batch."""
    make = partial(make_step, dataset, device, mask_prompt, budget)
    return ahead(make, steps, n)


def make_step(dataset, device, mask_prompt, budget, step):
    batches = [collate(dataset, rows, mask_prompt, budget) for rows in step]
    return [send(batch, device) for batch in batches]


def send(batch, device):
    """A Batch with its tensors on the device."""
    tensors = {name: x for name, x in batch._asdict().items() if hasattr(x, "to")}
    if device.type == "cuda":
        # Only a copy from pinned memory runs while the GPU works.
        tensors = {name: x.pin_memory() for name, x in tensors.items()}
    sent = {name: x.to(device, non_blocking=True) for name, x in tensors.items()}
    return batch._replace(**sent)


# --- the steps of a run ---


def steps_of_run(dataset, cfg, grad_accum):
    """The recipes of step 1, 2, …: a list of micro-batches each, epoch after epoch. No step mixes two of them."""
    lengths = dataset.lengths(dataset.indices)
    for epoch in itertools.count():
        for step in plan(lengths, cfg, epoch, grad_accum):
            yield [dataset.indices[rows] for rows in step]


def count_steps(dataset, cfg, grad_accum, epochs):
    lengths = dataset.lengths(dataset.indices)
    return sum(len(plan(lengths, cfg, epoch, grad_accum)) for epoch in range(epochs))


def sizes(dataset, held):
    return f"{len(dataset.indices)} recipes to train on, {len(held.indices)} held out"


def say_small(dataset, cfg, grad_accum):
    """A note where a step wants more recipes than there are."""
    wanted = grad_accum * cfg.batch_size
    have = len(dataset.indices)
    if not cfg.batch_tokens and not cfg.budget and have < wanted:
        say("note", f"a step wants {wanted} recipes and there are {have}: it trains on those")


# --- python data.py ---


@dataclass
class Show:
    # fmt: off
    json: bool = False                 # the account as JSON on stdout
    show: int = 0                      # print this many recipes with their target tokens coloured
    to: str = ""                       # write the recipes here, always cleaned, .jsonl or .jsonl.gz
    # fmt: on


def write_cleaned(cfg, rules, to):
    """--to: the recipes that the rules leave, for other programs."""
    files = hub.recipe_files(cfg.data, "--data", disk.cache_folder(cfg.cache))
    held = [Path(name) for name in cfg.val_data]
    account = Account()
    kept = recipes.clean(files, rules, account, cfg.allow_bad, held, whole=True)
    sources.save((recipes.row_of(judged.recipe) for judged in kept), Path(to))
    print(f"{account.kept} of {account.read} recipes are in {to}")


def show(dataset, text, cfg, n):
    """Print recipes as the model sees them: green what it is trained to write, grey what it only reads."""
    shuffled = np.random.default_rng(cfg.seed).permutation(dataset.indices)
    for i in shuffled[:n]:
        ids, at = dataset.recipe(i, cfg.mask_prompt)
        targets = set(at.tolist())
        runs = itertools.groupby(range(len(ids)), key=lambda t: t in targets)
        for is_target, places in runs:
            said = text.tokenizer.decode(ids[list(places)].tolist(), skip_special_tokens=False)
            colour = 32 if is_target else 90  # green, grey
            print(f"\033[{colour}m{said}\033[0m", end="")
        print("\n")


def padding_shares(dataset, cfg):
    """{batching: share of padding} of the ways of batching that hold the longest recipe."""
    kinds = ["random", "sorted"]
    if dataset.rows["length"].max() <= (cfg.batch_tokens or PACKED_TOKENS):
        kinds.append("packed")
    lengths = dataset.lengths(dataset.indices)
    return {kind: padding(lengths, replace(cfg, batching=kind)) for kind in kinds}


def full_account(dataset, held, cfg, shares):
    """The account of a dataset with what is known of its tokens and batches."""
    lengths = dataset.lengths(slice(None))
    percentiles = {f"p{p}": int(np.percentile(lengths, p)) for p in (5, 50, 95, 99, 100)}
    return {
        **dataset.account,
        "held_out": len(held.indices),
        "tokens": int(lengths.sum()),
        "lengths": percentiles,
        "padding": shares,
        "batch_size": cfg.batch_size,
        "batch_tokens": cfg.batch_tokens,
    }


def print_account(a):
    print(f"read         {a['read']} recipes, {a['bad']} bad rows, {a['repaired']} repaired")
    for example in a["bad_examples"]:
        print(f"{'':17}bad: {example}")
    for rule, n in a["dropped"].items():
        most = ""
        if 2 * n > a["read"]:
            most = "  more than half of all: is that bound right?"
        print(f"dropped      {n:>7}  {rule}{most}")
        for example in a["examples"].get(rule, []):
            print(f"{'':26}{example}")
    size = f"{a['batch_size']} recipes"
    if a["batch_tokens"]:
        size = f"{a['batch_tokens']} tokens"
    lengths = ", ".join(f"{n} ({p})" for p, n in a["lengths"].items())
    shares = ", ".join(f"{kind} {share:.2%}" for kind, share in a["padding"].items())
    print(f"kept         {a['kept']} recipes, {a['held_out']} held out")
    print(f"tokens       {a['tokens']:,}; a recipe has {lengths}")
    print(f"padding      batches of {size}: {shares}")


def draw_padding(dataset, cfg, shares, path):
    """padding.png: the first recipes as random, sorted and packed batches, padding in red; and the lengths."""
    lengths = dataset.lengths(dataset.indices[:192])
    panels = []
    for kind, share in shares.items():
        rows = rows_of_batches(lengths, replace(cfg, batching=kind))
        panels.append((f"{kind}: {share:.2%} padding", rows))
    dropped = dataset.account["dropped"]["max_len"]
    pictures.padding(path, panels, dataset.all_lengths, cfg.max_len, dropped)


def rows_of_batches(lengths, cfg):
    """[(lengths of the recipes in a row, its width)] of an epoch's batches."""
    rows = []
    for batch in itertools.chain(*plan(lengths, cfg, 0)):
        if cfg.budget:
            rows.append((lengths[batch], cfg.budget))
        else:
            width = lengths[batch].max()
            rows += [(lengths[[i]], width) for i in batch]
    return rows


def main():
    cfg, rules, what = parse(__doc__, Data, Rules, Show)
    check(cfg)
    bound(what, show=0)
    if what.to:
        write_cleaned(cfg, rules, what.to)
        return
    folder = hub.resolve(cfg.model, disk.cache_folder(cfg.cache))
    dataset, held, text = prepare(cfg, rules, folder)
    if what.show:
        show(dataset, text, cfg, what.show)
        return
    shares = padding_shares(dataset, cfg)
    account = full_account(dataset, held, cfg, shares)
    if what.json:
        print(json.dumps(account, ensure_ascii=False))
    else:
        print_account(account)
    draw_padding(dataset, cfg, shares, "padding.png")
    say("picture", "padding.png")


if __name__ == "__main__":
    run(main)
