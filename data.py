"""Read, clean and tokenise recipes, and print how many are kept and why others are dropped. train.py makes its batches
with the same code, padded or packed, and has them on the device ahead of need.

    python data.py                                    # the default recipes; print the counts
    python data.py --data mine.jsonl more.csv --json  # your own files; print one JSON object
    python data.py --show 3                           # three recipes, with the tokens that count in the loss coloured

The way of a batch, and who does the work:

    files/sources.py   reads rows                    small files: the main thread; large ones: a process a core
    recipes.py         repairs, applies the rules    the same processes; duplicates: the main thread
    text.py            tokenises                     one thread, which calls the tokenizer's own threads
    plan               which recipe in which batch   the main thread, once an epoch
    feed               pads or packs, copies         one thread, four steps ahead of the training loop

    (plan and feed are functions of data.py)

The first three lines run once. The next run with the same files and rules finds the tokens in the cache. Of --model
only the tokenizer is needed, so no weights are fetched.
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

# Tokens of a packed row, where --batch_tokens is not given.
PACKED_TOKENS = 4096
# Recipes that are packed together: large enough to fill rows well, small enough to keep the epoch's random order.
WINDOW = 4096
# A packed row is a multiple of 8 tokens, because the kernels of matmuls work in tiles.
TILE = 8
# A packed row takes no more recipes than if each had 64 tokens: 64 of them in a row of 4,096. The bound is there
# because `document_ends` gives all rows equally many documents; more room for short recipes costs empty documents.
SHORTEST = 64


@dataclass
class Data:
    # fmt: off
    model: str = ""                    # base model: folder, .gguf file or org/name on Hugging Face; none: SmolLM2-135M
    data: list[str] = field(default_factory=list)      # recipe files (.json .jsonl .csv, also .gz); none: Wikibooks
    val_data: list[str] = field(default_factory=list)  # held-out recipe files; none: hold out some of --data
    val_recipes: int = 32              # how many recipes are held out of training, to measure val_loss
    max_len: int = 1024                # drop recipes longer than this many tokens; none is cut short
    mask_prompt: bool = False          # compute the loss only on the completion: in a recipe, on all after the title
    batching: Literal["random", "sorted", "packed"] = "sorted"  # put recipes together at random, by length, or packed
    batch_size: int = 2                # recipes per micro-batch; unused with --batch_tokens or --batching packed
    batch_tokens: int = 0              # tokens per micro-batch or packed row; 0: by --batch_size (packed: 4096)
    allow_bad: float = 0.01            # stop if more than this share of the rows cannot be read as recipes
    clean: bool = True                 # drop recipes that are too short, long, similar or odd; --no-clean: keep them
    seed: int = 1                      # random seed: held-out recipes, batches, the adapter's initial weights, dropout
    cache: str = ".cache"              # folder for downloads, models and tokens; if relative, in the code's folder
    # fmt: on

    @property
    def budget(self):
        """Tokens of a packed row; 0: batches are padded, not packed."""
        if self.batching != "packed":
            return 0
        tokens = self.batch_tokens or PACKED_TOKENS
        return -(-tokens // TILE) * TILE  # rounded up


def check(cfg):
    """A UserError for a data flag out of its range, before anything is loaded."""
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
    """Tokenised recipes, and which of them are used. A recipe's number, everywhere in this file, is its row in `rows`.

        rows       0  1  2  3  4 …
        indices    0  2  3 …           of the dataset to train on
        indices    1  4 …              of the held-out dataset

    The two datasets share the rows and the tokens."""

    def __init__(self, source, rows, account, indices):
        # The TokenFile: all tokens, mapped into memory.
        self.source = source
        # One text.ROW (start, length, key) a recipe of at most max_len tokens.
        self.rows = rows
        # What became of every row that was read: a dict of counts and examples.
        self.account = account
        # Which of the rows are used.
        self.indices = indices
        # Tokens of each recipe, those that max_len dropped included: for the picture.
        self.all_lengths = source.rows["length"]

    def recipe(self, i, mask_prompt=False):
        """(ids, at) of recipe i: its token ids, and at which of them a target stands."""
        start, length, _ = self.rows[i].tolist()
        return self.source.recipe(start, length, mask_prompt)

    def ids(self, i):
        """The token ids of recipe i."""
        ids, _ = self.recipe(i)
        return ids

    def lengths(self, which):
        """How many tokens each of the recipes `which` has."""
        return self.rows["length"][which].astype(np.int64)

    @property
    def longest(self):
        """Tokens of the longest recipe, used or not."""
        return int(self.rows["length"].max())

    def using(self, indices):
        """A Dataset of the same recipes, of which others are used."""
        return Dataset(self.source, self.rows, self.account, indices)


def prepare(cfg, rules, folder):
    """(dataset, held, text): the Dataset to train on, the held-out Dataset, and the Text of a model folder."""
    text = Text(folder)
    if cfg.max_len > text.window:
        raise UserError(
            f"--max_len {cfg.max_len} is beyond the {text.window} positions of this model."
        )
    if cfg.val_data:
        held = load_dataset(cfg.val_data, "--val_data", cfg, rules, text)
        dataset = load_dataset(cfg.data, "--data", cfg, rules, text, cfg.val_data)
        # No recipe of the held-out file is trained on, whether val_recipes chooses it or not.
        train = ~np.isin(dataset.rows["key"], held.rows["key"])
        chosen = np.random.default_rng(cfg.seed).permutation(len(held.rows))[: cfg.val_recipes]
    else:
        held = dataset = load_dataset(cfg.data, "--data", cfg, rules, text)
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


def load_dataset(names, flag, cfg, rules, text, held=()):
    """The Dataset of all recipes of some files, except those longer than max_len.

    names: what was given for the flag. held: files whose recipes, and recipes like them, are dropped."""
    files = hub.recipe_files(names, flag, disk.cache_folder(cfg.cache))
    held = [Path(disk.user_path(name, "--val_data")).resolve() for name in held]
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
    """A hash of all rows of the dataset and the held-out rows. --resume refuses to go on where the hash differs."""
    rows = dataset.rows.tobytes() + held.rows[held.indices].tobytes()
    return hashlib.sha256(rows).hexdigest()[:16]


def about_data(dataset, held):
    """What run.json says of the data: two hashes that tell it from other data, another tokenizer or chat template."""
    tokens = [one.account["tokens_sha256"] for one in (dataset, held)]
    return {"data_fingerprint": fingerprint(dataset, held), "data_tokens": tokens}


# --- which recipe is in which batch ---


def plan(lengths, cfg, epoch, grad_accum=1):
    """The steps of an epoch. A step is a list of grad_accum micro-batches, a micro-batch an array of positions in
    `lengths`. The function is pure: a resumed run makes the same plan again.

        lengths 4 9 2 7, two a batch    batches        padded to          real
        random                          4 9 | 2 7      18 + 14 = 32       22
        sorted                          9 7 | 4 2      18 +  8 = 26       22

    Why sorted: a batch is padded to its longest recipe, and a token of padding costs what a real token costs. At 8B
    with --grad_ckpt that is 6 operations * 6.98e9 linear weights = 42 GFLOP (speed/checkpoint.py counts them). Share of
    padding on the default recipes in batches of 2, and on 50,683 recipes in batches of 16:

        random    20 %  and 50 %      1.25 and 2 times the arithmetic
        sorted  0.05 %  and 0.08 %    less than 1.001 times
        packed   0.4 %  and 0.4 %     1.004 times, in rows of 4,096 tokens: see `pack`

    Cost: a sorted batch holds recipes of one length, so a step's gradient is that of short or of long recipes. The
    losses of the steps look like a saw, because short recipes have another loss than long ones. Each epoch has its
    steps in another random order, because otherwise training would run from long recipes to short ones.
    Measured, 500 steps of about 480 tokens on the default recipes of at most 512 tokens, one seed: held-out loss 1.763
    with random batches, 1.769 with sorted, 1.785 with packed rows of 512 tokens (before training 2.232). Sorted batches
    lose 0.006 a step, and make 1.2 steps while random batches make one.
    Proof, in tests/test_data.py: test_sorting_takes_the_padding_away, test_sorted_batches_come_in_random_order,
    test_every_recipe_is_there_exactly_once_an_epoch.

    Accumulation: the micro-batches of a step are neighbours in the order. With --grad_accum 4 and --batch_size 2 a step
    holds the very recipes of a batch of 8, so both have the same gradient. Proof:
    test_accumulated_batches_hold_what_one_large_batch_holds (tests/test_data.py),
    test_accumulation_is_the_gradient_of_one_larger_batch (tests/test_train.py)."""
    rng = np.random.default_rng([cfg.seed, epoch])
    order = rng.permutation(len(lengths))
    if cfg.batching == "sorted":
        # Sort stably, because recipes of equal length then stay in random order.
        order = order[np.argsort(-lengths[order], kind="stable")]
    # The longest recipe comes into the first step, so that running out of memory shows at once (as in lit-llama).
    longest = lengths[order].argmax()
    order[[0, longest]] = order[[longest, 0]]
    batches = cut(order, lengths, cfg)
    if cfg.budget:
        # Shuffle packed rows, because the first rows of a window hold the longest recipes, the last ones short recipes.
        shuffled = 1 + rng.permutation(len(batches) - 1)
        batches[1:] = [batches[i] for i in shuffled]
    steps = [batches[i : i + grad_accum] for i in range(0, len(batches), grad_accum)]
    later = steps[1:]
    rng.shuffle(later)
    return steps[:1] + later


def cut(order, lengths, cfg):
    """Cut `order` into batches: of batch_size recipes, of as many as fit into batch_tokens when padded, or packed."""
    if cfg.budget:
        return pack_windows(order, lengths, cfg.budget)
    if cfg.batch_tokens:
        return cut_by_tokens(order, lengths, cfg.batch_tokens)
    size = cfg.batch_size
    return [order[i : i + size] for i in range(0, len(order), size)]


def cut_by_tokens(order, lengths, batch_tokens):
    """Batches of at most batch_tokens tokens, padding included.

    With 20 tokens the lengths 9 7 4 2 become 9 7 | 4 2: three rows of 9 would be 27 tokens."""
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
    """Packed rows of the whole order: each window of 4,096 recipes is packed for itself."""
    rows = []
    for i in range(0, len(order), WINDOW):
        rows += pack(order[i : i + WINDOW], lengths, budget)
    return rows


def pack(order, lengths, budget):
    """Pack the recipes of a window into rows of `budget` tokens, by best fit decreasing: the longest recipe first, each
    into the fullest row that has room. No recipe is cut. Inputs of 60, 50, 68 and 40 tokens in rows of 128:

        68 opens row A (60 free); 60 goes into A (0 free); 50 opens row B (78 free); 40 goes into B (38 free)

    Why: rows have no padding but their free tail, 0.4 % in rows of 4,096 tokens. All batches have one shape, which
    --compile and --cuda_graph like best. A row mixes long recipes with short ones, where a sorted batch has one length.
    Cost: attention has to keep neighbours apart, which needs varlen attention (CUDA from Ampere on) or a mask.
    What keeps recipes apart: each recipe begins at position 0. A token attends to its own recipe only
    (model.Documents). No token is trained to predict the first token of the next recipe (`collate`).
    Proof, in tests/test_train.py: test_packed_sorted_and_alone_every_recipe_has_the_same_loss, and
    test_a_neighbours_tokens_do_not_change_a_packed_recipe_at_all. The rows: test_packing_four_recipes_by_hand."""
    rows = []
    # (free tokens, row) of each row that takes more recipes, sorted by free tokens: the fullest row first.
    room = []
    longest_first = order[np.argsort(-lengths[order], kind="stable")]
    for i in longest_first.tolist():
        # A recipe's last token is a target only, never an input.
        need = int(lengths[i]) - 1
        # The first row of `room` with enough free tokens.
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
    """The free tokens of a pair (free tokens, row): what `room` is sorted by."""
    free, _ = pair
    return free


def padding(lengths, cfg):
    """The share of the tokens of an epoch's batches that are padding."""
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
        # Inputs (B, T); packed: (1, budget).
        "ids",
        # b * T + t of each input whose next token is a target (N,).
        "where",
        # The next token of each of these inputs (N,).
        "targets",
        # Where documents begin and end in a packed row, see model.Documents; None: padded.
        "cu_seqlens",
        # How many inputs are no padding.
        "real",
        # Which recipes: their rows in Dataset.rows.
        "rows",
    ],
)


def collate(dataset, rows, mask_prompt, budget=0, multiple=1):
    """Recipes as one Batch on the CPU. multiple: padded rows are as long as a multiple of that many tokens.

    Two recipes of four and three tokens, E their end tokens:

        tokens         a0 a1 a2 E   and   b0 b1 E
        padded ids     a0 a1 a2 | b0 b1 0                 budget 0: a row a recipe
        packed ids     a0 a1 a2   b0 b1   0 0 0           budget 8: one row; documents end at 3 and 5
        targets        a1 a2 E    b1 E                    of the inputs `where`: 0 1 2 3 4

    The last token E is a target and no input. So a2 predicts E, and no input predicts b0 of the next recipe."""
    # Import torch here, because `python data.py` makes no batch and starts faster without.
    from torch import from_numpy

    taken = [dataset.recipe(i, mask_prompt) for i in rows]
    # Padding is known by the length of a recipe, never by its id: a model may pad with its end token.
    needs = [len(ids) - 1 for ids, _ in taken]
    if budget:
        T = budget
        begins = np.cumsum([0, *needs])
    else:
        T = -(-max(needs) // multiple) * multiple
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
            f"a batch has no target token: recipe(s) {[int(i) for i in rows]} of the dataset are all prompt."
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
    """Where the documents of a packed row begin and end (cu_seqlens), as many numbers for every row of an epoch.

        begins 0 100 150, longest 120, budget 400     ->     0 100 150 270 390 400 400 400 400 400 … 12 in all

    Two recipes are followed by a free tail of 250 tokens. Varlen attention is told that no document is longer than
    `longest`, so the tail is cut into documents, too: 150 to 270, 270 to 390, 390 to 400. The rest are empty
    documents, because --compile and --cuda_graph want one shape."""
    tail = range(begins[-1] + longest, budget, longest)
    ends = [*begins, *tail]
    # The most numbers that a row can need: one for each recipe, of which `pack` allows budget // SHORTEST; one for each
    # document of the tail; and 3: the 0 in front, the budget, and one recipe where budget // SHORTEST is 0.
    most = budget // SHORTEST + budget // longest + 3
    ends += [budget] * (most - len(ends))
    return np.array(ends, dtype=np.int32)


def feed(dataset, steps, device, mask_prompt, budget=0, n=4):
    """The loader: for each step its list of Batches on the device, made in one thread, n steps ahead of need.

        main thread      launches step 1, waits for the GPU         | step 2 | step 3 …
        loader thread    reads, pads, pins and copies steps 2 to 5  | step 6 | step 7 …

    Why: without this thread the GPU would stand still while a batch is made. One thread is enough for 8,192 tokens a
    step, which takes 451 ms at 8B. These are 33 kB in the mapped file, 4 bytes each: a read of microseconds. On their
    way to the GPU they are 197 kB (ids, where and targets, 8 bytes each): 4 µs at 51 GB/s from pinned memory to an
    H100. Processes would bring nothing, because Python's lock is free while the main thread waits for the GPU.
    Cost: the batches of five steps are held on the GPU, 1 MB at 8,192 tokens a step.
    How it is known that the GPU does not wait: speed/memory.py measures the time from the end of a step to the next
    batch. train.py prints the share ("waiting for data") and writes it into summary.json as waiting_share. The
    quickest run in README.md, 135M at 23 ms for 4,096 tokens, waited 0.19 % of the time: 44 µs a step.
    Proof, in tests/test_data.py: test_feed_works_ahead_but_not_without_end, test_feed_gives_the_batches_in_order."""
    make = partial(make_step, dataset, device, mask_prompt, budget)
    return ahead(make, steps, n)


def make_step(dataset, device, mask_prompt, budget, step):
    """The Batches of one step on the device. step: the recipes of each micro-batch"""
    # On a GPU the compiler makes one graph for lengths that are multiples of 8, and another one for the rest. A second
    # graph takes 8 to 13 s to compile; padding to multiples of 8 costs 1 % of the tokens.
    multiple = TILE if device.type == "cuda" else 1
    batches = [collate(dataset, rows, mask_prompt, budget, multiple) for rows in step]
    return [send(batch, device) for batch in batches]


def send(batch, device):
    """A Batch with its tensors on the device."""
    tensors = {name: x for name, x in batch._asdict().items() if hasattr(x, "to")}
    if device.type == "cuda":
        # Pin the memory, because only from there a copy is queued on the GPU and returns at once. Proof:
        # test_batches_are_copied_from_pinned_memory (tests/test_gpu.py).
        tensors = {name: x.pin_memory() for name, x in tensors.items()}
    sent = {name: x.to(device, non_blocking=True) for name, x in tensors.items()}
    return batch._replace(**sent)


# --- the steps of a run ---


def steps_of_run(dataset, cfg, grad_accum):
    """For step 1, 2, … the recipes of its micro-batches, epoch after epoch without end. No step mixes two epochs."""
    lengths = dataset.lengths(dataset.indices)
    for epoch in itertools.count():
        for step in plan(lengths, cfg, epoch, grad_accum):
            yield [dataset.indices[rows] for rows in step]


def count_steps(dataset, cfg, grad_accum, epochs):
    """How many optimiser steps so many epochs have."""
    lengths = dataset.lengths(dataset.indices)
    return sum(len(plan(lengths, cfg, epoch, grad_accum)) for epoch in range(epochs))


def sizes(dataset, held):
    """A receipt: how many recipes are trained on and held out."""
    return f"{len(dataset.indices)} recipes to train on, {len(held.indices)} held out"


def say_small(dataset, cfg, grad_accum):
    """A receipt where a step asks for more recipes than the dataset has."""
    wanted = grad_accum * cfg.batch_size
    have = len(dataset.indices)
    if not cfg.batch_tokens and not cfg.budget and have < wanted:
        say("note", f"a step wants {wanted} recipes and there are {have}: it trains on those")


# --- python data.py ---


@dataclass
class Show:
    # fmt: off
    json: bool = False                 # print the counts as one JSON object; with --show one object a recipe
    show: int = 0                      # print this many recipes, with the tokens that count in the loss coloured
    to: str = ""                       # write the recipes that pass the rules to this file (.jsonl or .jsonl.gz)
    # fmt: on


def write_cleaned(cfg, rules, to):
    """--to: write the recipes that the rules leave, for other programs."""
    files = hub.recipe_files(cfg.data, "--data", disk.cache_folder(cfg.cache))
    held = [Path(disk.user_path(name, "--val_data")) for name in cfg.val_data]
    account = Account()
    kept = recipes.clean(files, rules, account, cfg.allow_bad, held, whole=True)
    sources.save(
        (recipes.row_of(judged.recipe) for judged in kept), Path(disk.user_path(to, "--to"))
    )
    print(f"{account.kept} of {account.read} recipes are in {to}")


def show(cfg, rules, folder, n, as_json):
    """Print n recipes as the model sees them: targets in green, tokens that the model only reads in grey.

    --json: the first n in the order of the files, each as {"text", "ids", "targets": [0 or 1 of each id]}."""
    text = Text(folder)
    dataset = load_dataset(cfg.data, "--data", cfg, rules, text)
    chosen = dataset.indices
    if not as_json:
        chosen = np.random.default_rng(cfg.seed).permutation(chosen)
    for i in chosen[:n]:
        ids, at = dataset.recipe(i, cfg.mask_prompt)
        targets = np.zeros(len(ids), dtype=int)
        targets[at] = 1
        if as_json:
            row = {"text": text.spell(ids), "ids": ids.tolist(), "targets": targets.tolist()}
            print(json.dumps(row, ensure_ascii=False))
            continue
        for is_target, places in itertools.groupby(range(len(ids)), key=targets.__getitem__):
            colour = 32 if is_target else 90  # green, grey
            print(f"\033[{colour}m{text.spell(ids[list(places)])}\033[0m", end="")
        print("\n")


def padding_shares(dataset, cfg):
    """{batching: share of padding}. Packed is left out where the longest recipe is longer than a packed row."""
    kinds = ["random", "sorted"]
    if dataset.rows["length"].max() <= (cfg.batch_tokens or PACKED_TOKENS):
        kinds.append("packed")
    lengths = dataset.lengths(dataset.indices)
    return {kind: padding(lengths, replace(cfg, batching=kind)) for kind in kinds}


def full_account(dataset, held, cfg, shares):
    """What became of every row, and the dataset's tokens, lengths and padding: the object of --json."""
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


def draw_padding(dataset, cfg, shares, path):
    """Draw padding.png: the first 192 recipes as random, sorted and packed batches, and the lengths of all recipes."""
    lengths = dataset.lengths(dataset.indices[:192])
    panels = []
    for kind, share in shares.items():
        rows = rows_of_batches(lengths, replace(cfg, batching=kind))
        panels.append((f"{kind}: {share:.2%} padding", rows))
    dropped = dataset.account["dropped"]["max_len"]
    pictures.padding(path, panels, dataset.all_lengths, cfg.max_len, dropped)


def rows_of_batches(lengths, cfg):
    """[(lengths of the recipes in a row, width of the row)] for each row of an epoch's batches."""
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
    folder = hub.resolve(cfg.model, disk.cache_folder(cfg.cache), "tokenizer")
    if what.show:
        show(cfg, rules, folder, what.show, what.json)
        return
    dataset, held, _ = prepare(cfg, rules, folder)
    shares = padding_shares(dataset, cfg)
    account = full_account(dataset, held, cfg, shares)
    if what.json:
        print(json.dumps(account, ensure_ascii=False))
    else:
        recipes.print_account(account)
    draw_padding(dataset, cfg, shares, "padding.png")
    say("picture", "padding.png")


if __name__ == "__main__":
    run(main)
