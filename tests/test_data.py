"""data.py: which tokens are targets, which batch a recipe is in, what is made once, what is held out."""

import errno
import gzip
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import ROOT, made_recipes, make_model, program, write_jsonl

import data
import recipes
from cli import UserError
from data import Data
from recipes import Rules

BOS, END = 0, 1  # ids of <s> and </s> in the tiny tokenizers
TEA = {"title": "Tea", "ingredients": ["water", "tea"], "directions": ["Boil.", "Pour."]}
TEA_COMPLETION = "\n\nIngredients:\n- water\n- tea\n\nDirections:\n1. Boil.\n2. Pour."
OPEN = Rules(min_words=0, min_ingredients=0, min_steps=0)
COUNTS = ("random", "sorted")


@pytest.fixture(scope="session")
def bos_model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("bos") / "tiny", bos=True)


@pytest.fixture(scope="session")
def byte_models(tmp_path_factory):
    """{bos: folder} of tokenizers without merges: one token a byte, so that token masks can be written as text."""
    folder = tmp_path_factory.mktemp("bytes")
    return {bos: make_model(folder / str(bos), bos=bos, vocab=258) for bos in (False, True)}


def rendered(row):
    """(prompt, completion) of a row, written a second time."""
    if "completion" in row:
        return row["prompt"], row["completion"]
    if "text" in row:
        return "", row["text"]
    lines = ["", "", "Ingredients:"] + ["- " + x for x in row["ingredients"]] + ["", "Directions:"]
    return row["title"], "\n".join(
        lines + [f"{n + 1}. {x}" for n, x in enumerate(row["directions"])]
    )


class Plain:
    """The tokenizers library alone, to say what the ids should be."""

    def __init__(self, folder):
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def ids(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def spell(self, ids):
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def recipe(self, row, bos):
        prompt, completion = rendered(row)
        return [BOS] * bos + self.ids(prompt) + self.ids(completion) + [END]


def config(tmp_path, rows, **changes):
    """Data for rows (or a file), all of them as they are unless the test says otherwise."""
    file = rows if isinstance(rows, Path) else write_jsonl(tmp_path / "heap.jsonl", rows)
    return Data(
        **{"data": [str(file)], "cache": str(tmp_path / "cache"), "clean": False, **changes}
    )


def tokens(tmp_path, rows, model, **changes):
    """(heap of all rows, text)"""
    cfg, text = config(tmp_path, rows, **changes), data.Text(model)
    return data.Heap(data.tokenise([Path(f) for f in cfg.data], cfg, OPEN, text)), text


def targets(heap, text, row, mask):
    return data.collate(heap, [row], mask).targets.tolist()


# ---- which tokens are targets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bos", "mask", "expected"),
    [
        (False, False, "ea" + TEA_COMPLETION + "</s>"),  # nothing predicts the first token
        (True, False, "Tea" + TEA_COMPLETION + "</s>"),
        (False, True, TEA_COMPLETION + "</s>"),
        (True, True, TEA_COMPLETION + "</s>"),
    ],
    ids=["plain", "bos", "mask", "bos and mask"],
)
def test_targets_of_a_recipe(tmp_path, byte_models, bos, mask, expected):
    heap, _ = tokens(tmp_path, [TEA], byte_models[bos])
    batch, plain = data.collate(heap, [0], mask), Plain(byte_models[bos])
    assert plain.spell(batch.targets) == expected
    everything = "<s>" * bos + "Tea" + TEA_COMPLETION
    assert plain.spell(batch.ids[0]) == everything  # the inputs: all but the end token
    length = bos + 3 + 59 + 1  # one token a byte, and the two special ones
    first = bos + 3 if mask else 1  # index of the first target; the token before it predicts it
    assert batch.where.tolist() == list(range(first - 1, length - 1))


@pytest.mark.parametrize(
    ("row", "mask", "bos", "expected"),
    [
        ({"text": "Boil it."}, False, False, "oil it.</s>"),
        ({"text": "Boil it."}, True, False, "oil it.</s>"),  # no prompt: nothing to mask
        ({"text": "Boil it."}, False, True, "Boil it.</s>"),
        ({"text": "Boil it."}, True, True, "Boil it.</s>"),
        ({"prompt": "Hi.", "completion": " Ho."}, False, False, "i. Ho.</s>"),
        ({"prompt": "Hi.", "completion": " Ho."}, False, True, "Hi. Ho.</s>"),
        ({"prompt": "Hi.", "completion": " Ho."}, True, False, " Ho.</s>"),
        ({"prompt": "Hi.", "completion": " Ho."}, True, True, " Ho.</s>"),
        ({"prompt": "Hi.", "completion": ""}, True, True, "</s>"),
    ],
)
def test_targets_of_other_texts(tmp_path, byte_models, row, mask, bos, expected):
    heap, text = tokens(tmp_path, [row], byte_models[bos])
    assert Plain(byte_models[bos]).spell(targets(heap, text, 0, mask)) == expected


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_one_end_last_and_one_bos_never_a_target(tmp_path, tiny_model, bos_model, bos, mask):
    heap, text = tokens(tmp_path, made_recipes(40), bos_model if bos else tiny_model)
    for i in range(40):
        ids, wanted = heap.ids(i).tolist(), targets(heap, text, i, mask)
        assert ids.count(END) == 1 and ids[-1] == END
        assert wanted.count(END) == 1 and wanted[-1] == END
        assert ids.count(BOS) == bos and ids[:1].count(BOS) == bos
        assert BOS not in wanted


def test_no_bos_where_the_tokenizer_adds_none(tiny_model, bos_model):
    """Both configs name <s> as bos_token_id; only one tokenizer puts it before a text."""
    assert data.Text(tiny_model).bos == [] and data.Text(bos_model).bos == [BOS]


def test_padding_is_told_by_length_not_by_id(tmp_path):
    """A model whose end token is id 0, which is also what pads: one a recipe is a target, and no padding is."""
    model = make_model(tmp_path / "model", eos_token_id=0, bos_token_id=None)
    (model / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')
    rows = made_recipes(12)
    heap, text = tokens(tmp_path, rows, model)
    assert text.end == 0
    batch = data.collate(heap, list(range(12)), False)
    lengths = [len(Plain(model).recipe(row, 0)) for row in rows]
    assert (
        len(set(lengths)) > 5 and (batch.ids == 0).any()
    )  # there is padding, and it looks like the end token
    assert (batch.targets == 0).sum() == 12
    assert len(batch.targets) == sum(n - 1 for n in lengths)


def test_prompt_and_completion_are_tokenised_apart_and_joined(tmp_path, tiny_model):
    row, plain = {"prompt": "Chop the oni", "completion": "ons with the butter"}, Plain(tiny_model)
    joined = plain.ids("Chop the oni") + plain.ids("ons with the butter")
    assert joined != plain.ids("Chop the onions with the butter")  # else this test could not fail
    heap, text = tokens(tmp_path, [row], tiny_model)
    assert heap.ids(0).tolist() == [*joined, END]
    assert targets(heap, text, 0, True) == [*plain.ids("ons with the butter"), END]
    assert text.prompt("Chop the oni", "ons with") == plain.ids("Chop the oni") + plain.ids(
        "ons with"
    )


def test_a_prompt_for_sampling_is_what_training_saw(tmp_path, bos_model):
    rows = made_recipes(20)
    heap, text = tokens(tmp_path, rows, bos_model)
    for i, row in enumerate(rows):
        prompt = text.prompt(row["title"])
        assert heap.ids(i).tolist()[: len(prompt)] == prompt
        assert prompt == [BOS, *Plain(bos_model).ids(row["title"])]


@pytest.mark.parametrize(
    "row",
    [
        {"text": "</s> <s>x</s>"},
        {"prompt": "<s></s>", "completion": "a</s>"},
        {**TEA, "title": "Tea</s>", "directions": ["<s>Boil.</s>", "</s>"]},
    ],
)
def test_text_that_looks_like_a_special_token_stays_text(tmp_path, bos_model, row):
    heap, _ = tokens(tmp_path, [row], bos_model)
    inner = heap.ids(0).tolist()[1:-1]
    assert BOS not in inner and END not in inner
    assert Plain(bos_model).spell(inner) == "".join(rendered(row))


def test_end_tokens_of_both_configs_stop_sampling(tmp_path):
    model = make_model(tmp_path / "model", eos_token_id=[1, 7])
    (model / "generation_config.json").write_text('{"eos_token_id": [1, 9]}')
    text = data.Text(model)
    assert text.end == 1 and text.ends == {1, 7, 9}


def test_a_model_without_an_end_token_is_refused(tmp_path):
    model = make_model(tmp_path / "model", eos_token_id=None)
    (model / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="no end token"):
        data.Text(model)


# ---- collate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_collate_against_a_slow_loop(tmp_path, tiny_model, bos_model, bos, mask):
    model = bos_model if bos else tiny_model
    rows = [*made_recipes(20), {"text": "Just salt."}, {"prompt": "One", "completion": " two"}]
    heap, _ = tokens(tmp_path, rows, model)
    plain, rng = Plain(model), np.random.default_rng(3)
    for _ in range(20):
        which = rng.permutation(len(rows))[: rng.integers(1, 9)].tolist()
        batch = data.collate(heap, which, mask)
        B, T = batch.ids.shape
        pairs, padded, real = [], 0, 0  # (row of the batch, position, next token)
        for b, i in enumerate(which):
            ids, prompt = plain.recipe(rows[i], bos), bos + len(plain.ids(rendered(rows[i])[0]))
            for t in range(T):
                if t < len(ids) - 1:
                    real += 1
                    assert batch.ids[b, t] == ids[t]
                    if not mask or t + 1 >= prompt:
                        pairs.append((b, t, ids[t + 1]))
                else:
                    padded += 1
        assert (B, T) == (len(which), max(len(plain.recipe(rows[i], bos)) for i in which) - 1)
        assert [(w // T, w % T) for w in batch.where.tolist()] == [(b, t) for b, t, _ in pairs]
        assert batch.targets.tolist() == [token for *_, token in pairs]
        assert batch.real == real == B * T - padded
        assert list(batch.rows) == which
        assert batch.ids.dtype == batch.where.dtype == batch.targets.dtype == torch.int64


def test_a_batch_without_any_target_is_an_error_that_names_its_recipes(tmp_path, tiny_model):
    heap, _ = tokens(tmp_path, [TEA, {"text": ""}, {"text": ""}], tiny_model)
    with pytest.raises(UserError, match=r"no target token.*\[1, 2\]"):
        data.collate(heap, [1, 2], False)


# ---- the plan of an epoch -------------------------------------------------------------------------------------------


def made_lengths(n, seed):
    """Like recipes: log-normal, from 20 to 512 tokens."""
    return np.random.default_rng(seed).lognormal(np.log(150), 0.5, n).astype(np.int64).clip(20, 512)


def many_plans(**fixed):
    """(lengths, cfg, grad_accum, plan) over heaps, seeds and batch flags."""
    for seed, n, batching in itertools.product(range(6), (1, 5, 64, 203), COUNTS):
        lengths = made_lengths(n, seed)
        flags = (
            (1, 1, 0),
            (3, 2, 0),
            (8, 1, 0),
            (8, 4, 0),
            (500, 2, 0),
            (8, 1, 1000),
            (8, 3, 2500),
        )
        for size, accum, budget in flags:
            cfg = Data(
                **{
                    "batching": batching,
                    "batch_size": size,
                    "batch_tokens": budget,
                    "seed": seed,
                    **fixed,
                }
            )
            yield lengths, cfg, accum, data.plan(lengths, cfg, seed % 3, accum)


def flat(steps):
    return [int(i) for step in steps for batch in step for i in batch]


def padded_tokens(batch, lengths):
    return len(batch) * max(int(lengths[i]) for i in batch)


def test_every_recipe_is_there_exactly_once_an_epoch():
    for lengths, _, _, steps in many_plans():
        assert sorted(flat(steps)) == list(range(len(lengths)))


def test_batches_and_steps_have_the_size_asked_for():
    """All batches but one are full, and all steps but one; none is empty."""
    for lengths, cfg, accum, steps in many_plans():
        sizes = [len(batch) for step in steps for batch in step]
        assert min(sizes) > 0
        assert sorted(len(step) for step in steps)[1:] == [accum] * (len(steps) - 1)
        if not cfg.batch_tokens:
            assert sorted(sizes, reverse=True)[:-1] == [cfg.batch_size] * (
                len(lengths) // cfg.batch_size - (len(lengths) % cfg.batch_size == 0)
            )


def test_the_plan_is_a_pure_function():
    lengths = made_lengths(200, 0)
    for batching, budget in itertools.product(COUNTS, (0, 2000)):
        cfg = Data(batching=batching, batch_tokens=budget, seed=4)
        first = flat(data.plan(lengths, cfg, 2, 2))
        np.random.seed(1)  # nor does it look at a generator that others share
        np.random.random()
        assert flat(data.plan(lengths.copy(), cfg, 2, 2)) == first
        assert flat(data.plan(lengths, cfg, 3, 2)) != first
        assert (
            flat(data.plan(lengths, Data(batching=batching, batch_tokens=budget, seed=5), 2, 2))
            != first
        )


def test_sorted_batches_hold_neighbours_of_the_length_order():
    for lengths, _, _, steps in many_plans(batching="sorted"):
        spans = sorted(
            ((lengths[b].max(), lengths[b].min()) for step in steps for b in step), reverse=True
        )
        for (_, low), (high, _) in itertools.pairwise(spans):
            assert high <= low


def test_sorted_batches_come_in_random_order():
    lengths = made_lengths(400, 1)
    steps = data.plan(lengths, Data(batching="sorted", batch_size=8), 0)
    widths = [int(lengths[step[0]].max()) for step in steps[1:]]
    assert 15 < sum(a > b for a, b in itertools.pairwise(widths)) < 33  # of 48: about half go down


@pytest.mark.parametrize("batching", COUNTS)
def test_the_first_step_holds_the_longest_recipe(batching):
    for lengths, _, _, steps in many_plans(batching=batching):
        assert max(lengths[i] for i in flat(steps[:1])) == lengths.max()


@pytest.mark.parametrize("batching", COUNTS)
def test_the_first_step_holds_the_widest_batch(batching):
    """Running out of memory shows at step 1: of batches of batch_size recipes, no later one pads to more tokens."""
    for seed, n, (size, accum) in itertools.product(
        range(40), (5, 20, 67, 130), ((8, 1), (8, 2), (3, 4))
    ):
        lengths = made_lengths(n, seed)
        steps = data.plan(lengths, Data(batching=batching, batch_size=size, seed=seed), 0, accum)
        widest = [max(padded_tokens(b, lengths) for b in step) for step in steps]
        assert widest[0] == max(widest), (
            f"seed {seed}, {n} recipes, batches of {size}, accumulated {accum}"
        )


def test_batch_tokens_is_never_exceeded_by_the_padded_size():
    for lengths, cfg, _, steps in many_plans():
        for batch in itertools.chain(*steps) if cfg.batch_tokens else ():
            assert padded_tokens(batch, lengths) <= cfg.batch_tokens


def test_batch_tokens_is_used_up():
    """Sorted: the next shorter recipe would not have fitted into any batch but the last."""
    lengths = made_lengths(300, 2)
    steps = data.plan(lengths, Data(batching="sorted", batch_tokens=2000), 0)
    full = [(len(b) + 1) * lengths[b].max() > 2000 for step in steps for b in step]
    assert full.count(False) <= 1


@pytest.mark.parametrize("flag", ["data", "val_data"])
def test_batch_tokens_below_the_longest_recipe_is_refused(tmp_path, byte_models, flag):
    short, long = (
        write_jsonl(tmp_path / f"{n}.jsonl", [{"text": f"{i:0{n}}"} for i in range(4)])
        for n in (99, 119)
    )
    files = {"data": [str(short)], "val_data": [str(short)], flag: [str(long)]}
    with pytest.raises(UserError, match=r"--batch_tokens 119.*120 tokens"):
        data.prepare(config(tmp_path, long, **files, batch_tokens=119), Rules(), byte_models[False])
    if flag == "data":
        data.prepare(
            config(tmp_path, long, val_recipes=1, batch_tokens=120), Rules(), byte_models[False]
        )


@pytest.mark.parametrize("batching", COUNTS)
def test_accumulated_batches_hold_what_one_large_batch_holds(batching):
    """Step by step and in the same order: N batches of B, and one of N x B."""
    for seed, n, size, accum, step in itertools.product(
        range(30), (7, 64, 203), (2, 8), (2, 5), (1, 150)
    ):
        lengths = made_lengths(n, seed) // step * step + 20  # step 150: many recipes share a length
        small = data.plan(lengths, Data(batching=batching, batch_size=size, seed=seed), 1, accum)
        large = data.plan(
            lengths, Data(batching=batching, batch_size=size * accum, seed=seed), 1, 1
        )
        assert [sorted(flat([step])) for step in small] == [sorted(flat([step])) for step in large]


def test_a_heap_smaller_than_a_batch_is_one_batch():
    for batching, accum in itertools.product(COUNTS, (1, 4)):
        steps = data.plan(made_lengths(5, 0), Data(batching=batching, batch_size=16), 0, accum)
        assert len(steps) == 1 and len(steps[0]) == 1 and sorted(steps[0][0]) == [0, 1, 2, 3, 4]


def test_sorting_takes_the_padding_away():
    """3,000 log-normal lengths in batches of 16: below 1 % of all tokens where random batches have above 30 %."""
    lengths = made_lengths(3000, 7)
    shares = {}
    for batching in COUNTS:
        cfg, total, real = Data(batching=batching, batch_size=16), 0, 0
        for batch in itertools.chain(*data.plan(lengths, cfg, 0)):
            width = max(int(n) for n in lengths[batch])
            total, real = total + width * len(batch), real + sum(int(n) for n in lengths[batch])
        shares[batching] = (total - real) / total
        assert data.padding(lengths, cfg) == pytest.approx(shares[batching], rel=1e-9)
    assert shares["sorted"] < 0.01 and shares["random"] > 0.30


def test_padding_of_four_recipes_by_hand():
    """Sorted pairs (9, 7) and (4, 2) are padded to 18 + 8 tokens, of which 22 are real."""
    assert data.padding(np.array([4, 9, 2, 7]), Data(batch_size=2)) == pytest.approx(4 / 26)


# ---- packed rows ----------------------------------------------------------------------------------------------------


def packed(n, seed, budget=1000, **more):
    lengths = made_lengths(n, seed)
    return lengths, data.plan(
        lengths, Data(batching="packed", batch_tokens=budget, seed=seed), 0, **more
    )


def test_packed_rows_hold_every_recipe_once_and_never_too_many_tokens():
    for seed, n, accum in itertools.product(range(6), (1, 5, 203, 5000), (1, 3)):
        lengths, steps = packed(n, seed, grad_accum=accum)
        assert sorted(flat(steps)) == list(range(n))
        assert max((lengths[b] - 1).sum() for step in steps for b in step) <= 1000
        assert sorted(len(step) for step in steps)[1:] == [accum] * (len(steps) - 1)


def test_packed_rows_are_full():
    """3,000 log-normal lengths in rows of 4,096: below 1 % is free, where padding of random batches is above 30 %."""
    for seed in range(3):
        lengths, steps = packed(3000, seed, 4096)
        free = 1 - (lengths - 1).sum() / (4096 * len(flat_batches := [b for s in steps for b in s]))
        assert len(flat_batches) > 100 and free < 0.01
        cfg = Data(batching="packed", batch_tokens=4096, seed=seed)
        assert data.padding(lengths, cfg) == pytest.approx(free, rel=1e-9)


def test_the_first_packed_step_holds_the_longest_recipe():
    for seed in range(5):
        lengths, steps = packed(5000, seed)
        assert max(lengths[i] for i in flat(steps[:1])) == lengths.max()


def test_packing_four_recipes_by_hand():
    """60 + 68 and 50 + 40 tokens of input; then rows of 128 that would hold four, but take no more than 128 // 64."""
    assert [sorted(r) for r in data.pack(np.arange(4), np.array([61, 51, 69, 41]), 128)] == [
        [0, 2],
        [1, 3],
    ]
    assert [sorted(r) for r in data.pack(np.arange(4), np.array([11, 12, 13, 14]), 128)] == [
        [2, 3],
        [0, 1],
    ]


def test_a_packed_epoch_is_in_random_order():
    lengths, steps = packed(2000, 0)
    longest = [int(lengths[b].max()) for step in steps for b in step]
    assert 0.35 < sum(a > b for a, b in itertools.pairwise(longest)) / len(longest) < 0.65
    other = data.plan(lengths, Data(batching="packed", batch_tokens=1000, seed=0), 1)
    assert {frozenset(b.tolist()) for s in other for b in s} != {
        frozenset(b.tolist()) for s in steps for b in s
    }


@pytest.mark.parametrize("mask", [False, True])
def test_collate_packed_against_a_slow_loop(tmp_path, bos_model, mask):
    heap, text = tokens(tmp_path, made_recipes(9), bos_model)
    which, budget = [4, 2, 7], 1024
    batch = data.collate(heap, which, mask, budget)
    ids, where, targets, ends = [], [], [], [0]
    for i in which:
        t, prompt = heap.ids(i).tolist(), 1 + len(text.encode([made_recipes(9)[i]["title"]])[0])
        for at in range(prompt if mask else 1, len(t)):
            where.append(len(ids) + at - 1)
            targets.append(t[at])
        ids += t[:-1]
        ends.append(len(ids))
    assert batch.ids.shape == (1, budget) and batch.real == len(ids)
    assert batch.ids[0].tolist() == ids + [0] * (budget - len(ids))
    assert batch.where.tolist() == where and batch.targets.tolist() == targets
    cu, longest = batch.cu_seqlens.tolist(), int(heap.rows["length"].max())
    assert cu[:4] == ends and cu[-1] == budget and batch.cu_seqlens.dtype == torch.int32
    assert all(0 <= b - a <= longest for a, b in itertools.pairwise(cu))
    assert len(data.collate(heap, [0], mask, budget).cu_seqlens) == len(cu)


# ---- tokens are made once -------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """Counts the readings of the source, less the first pass of a cleaning."""
    calls, original = [], recipes.read

    def counted(*args):
        calls.extend([args] * (args[-1] is not recipes.names))
        return original(*args)

    monkeypatch.setattr(recipes, "read", counted)
    return calls


def cached(tmp_path):
    return sorted(p.name for p in (tmp_path / "cache/tokens").iterdir())


def test_tokens_are_reused_when_nothing_changed(tmp_path, tiny_model, reads):
    cfg = config(tmp_path, made_recipes(30))
    data.prepare(cfg, Rules(), tiny_model)
    (folder,) = (tmp_path / "cache/tokens").iterdir()
    before = os.stat(folder / "tokens.bin")
    for change in (
        {},
        {"batch_size": 3},
        {"max_len": 500},
        {"seed": 9},
        {"mask_prompt": True},
        {"batching": "random"},
    ):
        data.prepare(Data(**{**vars(cfg), **change}), Rules(), tiny_model)
    after = os.stat(folder / "tokens.bin")
    assert len(reads) == 1 and cached(tmp_path) == [folder.name]
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)


def change_source(file, model):
    write_jsonl(file, made_recipes(31))


def change_tokenizer(file, model):
    make_model(model, vocab=258)


def change_end(file, model):
    (model / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')


@pytest.mark.parametrize("change", [change_source, change_tokenizer, change_end])
def test_tokens_are_made_again_when_a_file_changed(tmp_path, reads, change):
    model, cfg = make_model(tmp_path / "model"), config(tmp_path, made_recipes(30))
    data.prepare(cfg, Rules(), model)
    change(Path(cfg.data[0]), model)
    heap, _, _ = data.prepare(cfg, Rules(), model)
    assert len(reads) == 2 and len(cached(tmp_path)) == 2
    assert len(heap.rows) == (31 if change is change_source else 30)
    assert heap.ids(0).tolist() == [
        *Plain(model).recipe(made_recipes(1)[0], 0)[:-1],
        0 if change is change_end else 1,
    ]


@pytest.mark.parametrize(
    ("flags", "rules"), [({}, Rules(min_words=60)), ({"clean": False}, Rules())]
)
def test_tokens_are_made_again_when_a_rule_changed(tmp_path, tiny_model, reads, flags, rules):
    cfg = config(tmp_path, [*made_recipes(30), TEA], clean=True)
    before = len(data.prepare(cfg, Rules(), tiny_model)[0].rows)
    after = len(data.prepare(Data(**{**vars(cfg), **flags}), rules, tiny_model)[0].rows)
    assert len(reads) == 2 and before == 30 and after != before


@pytest.mark.parametrize(
    "error", [RuntimeError("died"), OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()]
)
def test_a_preparation_that_dies_half_way_leaves_nothing(tmp_path, tiny_model, monkeypatch, error):
    cfg, text = config(tmp_path, made_recipes(30)), data.Text(tiny_model)
    older = data.tokenise(
        [write_jsonl(tmp_path / "older.jsonl", made_recipes(10))], cfg, OPEN, text
    )
    calls = itertools.count()
    original = recipes.key

    def dying(recipe):
        if next(calls) == 20:
            raise error
        return original(recipe)

    with monkeypatch.context() as patch:
        patch.setattr(recipes, "key", dying)
        with pytest.raises(type(error)):
            data.prepare(cfg, Rules(), tiny_model)
    assert next(calls) > 20  # it did die half-way
    assert cached(tmp_path) == [older.name]
    assert (
        len(data.prepare(cfg, Rules(), tiny_model)[0].rows) == 30
    )  # and the next one starts clean


def test_two_preparations_at_once_both_end_well(tmp_path, tiny_model, monkeypatch):
    """Two runs are started together on a new heap: while the first one reads, the second one is ready before it."""
    cfg, text = config(tmp_path, made_recipes(30)), data.Text(tiny_model)
    files, original = [Path(cfg.data[0])], recipes.read

    def overtaken(*args):
        monkeypatch.setattr(recipes, "read", original)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 1)  # another process
            data.tokenise(files, cfg, OPEN, text)
        return original(*args)

    monkeypatch.setattr(recipes, "read", overtaken)
    folder = data.tokenise(files, cfg, OPEN, text)
    assert len(data.Heap(folder).rows) == 30
    assert cached(tmp_path) == [folder.name]


def test_no_text_is_lost(tmp_path, bos_model):
    rows = [
        *made_recipes(50),
        {"text": "½ cup crème fraîche\n\n\tat 180 °C 🥧 "},
        {"text": "\u00a0\u2028x\u0000y"},
        {"prompt": " a ", "completion": "  b\n"},
    ]
    heap, text = tokens(tmp_path, rows, bos_model)
    assert [text.decode(heap.ids(i)) for i in range(len(rows))] == [
        "".join(rendered(row)) for row in rows
    ]


def test_more_recipes_than_one_chunk(tmp_path, byte_models):
    """Recipes are tokenised 2,048 at a time; rows and tokens go on across the seam."""
    rows = [{"text": str(i)} for i in range(2100)]
    heap, text = tokens(tmp_path, rows, byte_models[False])
    assert [text.decode(heap.ids(i)) for i in range(2100)] == [str(i) for i in range(2100)]


# ---- max_len: dropped and counted, never cut ------------------------------------------------------------------------


def test_a_longer_recipe_is_dropped_and_counted_never_cut(tmp_path, byte_models):
    """One token a byte and the end token: texts of 10, 19, 20 and 29 letters have 11, 20, 21 and 30 tokens."""
    rows = [{"prompt": f"{n}:", "completion": "x" * (n - 4) + "!"} for n in (10, 19, 20, 29)]
    heap, _, text = data.prepare(
        config(tmp_path, rows, max_len=20, val_recipes=1), Rules(), byte_models[False]
    )
    assert heap.rows["length"].tolist() == [11, 20]
    assert [text.decode(heap.ids(i)) for i in range(2)] == ["10:xxxxxx!", "19:xxxxxxxxxxxxxxx!"]
    assert (
        heap.account["dropped"]["max_len"] == 2
        and heap.account["kept"] == 2
        and heap.account["read"] == 4
    )
    assert heap.account["examples"]["max_len"] == [
        f"20:{'x' * 16}!: 21 tokens",
        f"29:{'x' * 17}: 30 tokens",
    ]


def test_no_more_than_three_examples_of_long_recipes(tmp_path, tiny_model):
    rows = [*made_recipes(5), *({"text": "x" * 900} for _ in range(5))]
    heap, _, _ = data.prepare(
        config(tmp_path, rows, max_len=450, val_recipes=1), Rules(), tiny_model
    )
    assert heap.account["dropped"]["max_len"] == 5 and len(heap.account["examples"]["max_len"]) == 3


@pytest.mark.parametrize(
    ("flags", "rules", "message"),
    [
        ({"max_len": 2}, Rules(), "of 12 read: max_len took 11"),
        ({"max_len": 1024}, Rules(min_words=500), "of 12 read: too_short took 12"),
        ({"max_len": 1024}, Rules(min_words=0, min_steps=100), "of 12 read: few_steps took 12"),
    ],
)
def test_nothing_left_names_the_rule_that_took_most(tmp_path, tiny_model, flags, rules, message):
    cfg = config(tmp_path, [*made_recipes(11), {**TEA, "directions": []}], clean=True, **flags)
    with pytest.raises(UserError, match=message):
        data.prepare(cfg, rules, tiny_model)


def test_nothing_left_because_every_row_is_bad_blames_no_rule(tmp_path, tiny_model):
    file = tmp_path / "heap.jsonl"
    file.write_text("no JSON\n" * 4)
    with pytest.raises(UserError) as e:
        data.prepare(config(tmp_path, file, allow_bad=1), Rules(), tiny_model)
    assert "bad" in str(e.value) and "took 0" not in str(e.value)


def test_max_len_beyond_the_window_is_refused(tmp_path):
    model = make_model(tmp_path / "model", window=256)
    with pytest.raises(UserError, match=r"--max_len 257 is beyond the 256 positions"):
        data.prepare(config(tmp_path, made_recipes(9), max_len=257), Rules(), model)
    data.prepare(config(tmp_path, made_recipes(9), max_len=256), OPEN, model)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("val_recipes", 0),
        ("max_len", 1),
        ("batch_size", 0),
        ("batch_tokens", -1),
        ("seed", -1),
        ("allow_bad", 1.5),
        ("allow_bad", float("nan")),
    ],
)
def test_flags_out_of_range_are_refused_by_name(flag, value):
    with pytest.raises(UserError, match=f"--{flag} "):
        data.check(Data(**{flag: value}))
    data.check(Data())


@pytest.mark.parametrize("flag", ["data", "val_data"])
def test_a_file_that_is_not_there_is_named_with_its_flag(tmp_path, tiny_model, tiny_recipes, flag):
    cfg = config(tmp_path, tiny_recipes, **{flag: [str(tmp_path / "missing.jsonl")]})
    with pytest.raises(UserError, match=rf"--{flag}\b.*missing\.jsonl"):
        data.prepare(cfg, Rules(), tiny_model)


# ---- what is held out -----------------------------------------------------------------------------------------------


def retitled(rows, n):
    """The same recipes under another title are duplicates."""
    return [{**row, "title": f"{row['title']}, copy {n}"} for row in rows]


def contents(heap, text, which):
    return [text.decode(heap.ids(i)).split("\n", 1)[1] for i in which]


def test_no_duplicate_straddles(tmp_path, tiny_model):
    rows = made_recipes(20)
    rows = [
        *rows,
        *retitled(rows, 2),
        *retitled(rows[:10], 3),
    ]  # ten recipes twice, ten three times
    for seed in range(8):
        heap, held, text = data.prepare(
            config(tmp_path, rows, val_recipes=12, seed=seed), Rules(), tiny_model
        )
        assert held is heap and 11 <= len(heap.val) <= 13  # 12, as near as whole groups come
        assert sorted([*heap.train, *heap.val]) == list(range(50))
        assert not set(contents(heap, text, heap.train)) & set(contents(heap, text, heap.val))


def test_duplicates_of_the_validation_file_are_not_trained_on(tmp_path, tiny_model):
    """Nor are those of its recipes that --val_recipes leaves out of the measurement."""
    rows = made_recipes(30)
    val = write_jsonl(tmp_path / "val.jsonl", retitled(rows[:10], 2))
    heap, held, text = data.prepare(
        config(tmp_path, rows, val_data=[str(val)], val_recipes=3), Rules(), tiny_model
    )
    assert held is not heap and len(held.rows) == 10 and len(set(held.val.tolist())) == 3
    assert heap.train.tolist() == list(range(10, 30))
    assert set(contents(held, text, held.val)) < set(contents(heap, text, range(10)))


def test_the_whole_validation_file_is_held_out_where_it_is_small(tmp_path, tiny_model):
    val = write_jsonl(tmp_path / "val.jsonl", made_recipes(5, seed=9))
    heap, held, _ = data.prepare(
        config(tmp_path, made_recipes(10), val_data=[str(val)]), Rules(), tiny_model
    )
    assert sorted(held.val) == [0, 1, 2, 3, 4] and len(heap.train) == 10


@pytest.mark.parametrize(
    "rows", [made_recipes(1), retitled(made_recipes(1) * 8, 1)], ids=["one", "eight the same"]
)
def test_too_few_recipes_to_hold_some_out(tmp_path, tiny_model, rows):
    with pytest.raises(UserError, match=r"too few.*--val_data"):
        data.prepare(config(tmp_path, rows, val_recipes=2), Rules(), tiny_model)


def test_nothing_to_train_on_beside_the_validation_file(tmp_path, tiny_model):
    val = write_jsonl(tmp_path / "val.jsonl", made_recipes(12))
    with pytest.raises(UserError, match="too few"):
        data.prepare(config(tmp_path, made_recipes(12), val_data=[str(val)]), Rules(), tiny_model)


# ---- the account, and the program -----------------------------------------------------------------------------------


def messy(path):
    """60 recipes, 3 duplicates, 2 stubs, 4 that are too long for 400 tokens, 3 rows that are none: 72 rows."""
    rows = [r for r in made_recipes(150, seed=3) if len(r["directions"]) < 9][:60]
    long = [
        {**r, "directions": [f"{s} {s}" for s in r["directions"] * 2]}
        for r in made_recipes(150, seed=5)
        if len(r["directions"]) == 12
    ][:4]
    stubs = [{**r, "ingredients": r["ingredients"][:1]} for r in made_recipes(2, seed=8)]
    write_jsonl(path, [*rows, *retitled(rows[:3], 2), *stubs, *long])
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"title": "cut off\n[]\n{"title": null, "ingredients": [], "directions": []}\n')
    return rows


JSON_KEYS = {
    "read",
    "bad",
    "repaired",
    "kept",
    "dropped",
    "examples",
    "bad_examples",
    "held_out",
    "tokens",
    "lengths",
    "padding",
    "batch_size",
    "batch_tokens",
}
MESSY_FLAGS = ["--data", "messy.jsonl", "--max_len", 400, "--allow_bad", 0.1, "--val_recipes", 7]


def test_json_is_one_line_and_all_there_is_on_stdout(tmp_path, tiny_model):
    kept = messy(tmp_path / "messy.jsonl")
    done = program(
        "data.py",
        "--model",
        tiny_model,
        "--cache",
        tmp_path / "cache",
        *MESSY_FLAGS,
        "--json",
        cwd=tmp_path,
    )
    assert done.stdout.endswith("\n") and done.stdout.count("\n") == 1
    a = json.loads(done.stdout)
    assert a.keys() == JSON_KEYS
    assert (a["read"], a["bad"], a["kept"], a["held_out"]) == (69, 3, 60, 7)
    assert {rule: n for rule, n in a["dropped"].items() if n} == {
        "duplicate": 3,
        "few_ingredients": 2,
        "max_len": 4,
    }
    assert set(a["dropped"]) == {*recipes.RULES, "max_len"}
    assert a["kept"] == a["read"] - sum(a["dropped"].values())
    lengths = sorted(len(Plain(tiny_model).recipe(row, 0)) for row in kept)
    assert a["tokens"] == sum(lengths) and a["lengths"]["p100"] == lengths[-1]  # with the end token
    assert set(a["padding"]) == {"random", "sorted", "packed"}
    assert 0 < a["padding"]["sorted"] < a["padding"]["random"] < 1


@pytest.fixture
def data_py(tmp_path, tiny_model, monkeypatch, capsys):
    """python data.py with these flags, in this process: (stdout, stderr)"""

    def call(*args, model=tiny_model):
        monkeypatch.setattr(data.convert, "resolve", lambda name, cache: Path(name))
        monkeypatch.chdir(tmp_path)  # where padding.png goes
        flags = ["--model", model, "--cache", tmp_path / "cache", *args]
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, flags)])
        data.main()
        return capsys.readouterr()

    return call


def test_the_account_adds_up_without_cleaning_too(tmp_path, data_py, monkeypatch):
    messy(tmp_path / "messy.jsonl")
    monkeypatch.chdir(tmp_path)
    a = json.loads(data_py(*MESSY_FLAGS, "--no-clean", "--json").out)
    assert (a["read"], a["bad"], a["kept"]) == (69, 3, 65)
    assert sum(a["dropped"].values()) == a["dropped"]["max_len"] == 4


def test_the_account_for_people(tmp_path, data_py, monkeypatch):
    """Without --json it is what stdout is for."""
    messy(tmp_path / "messy.jsonl")
    monkeypatch.chdir(tmp_path)
    out, _ = data_py(*MESSY_FLAGS)
    assert (tmp_path / "padding.png").read_bytes()[:4] == b"\x89PNG"
    for part in (
        "69 recipes, 3 bad rows",
        "messy.jsonl:70: ",
        "3  duplicate",
        "4  max_len",
        "60 recipes, 7 held out",
    ):
        assert part in out


COLOURED = re.compile(r"\x1b\[90m(.*?)\x1b\[0m\x1b\[32m(.*?)\x1b\[0m\n", re.DOTALL)


def test_show_with_masked_prompts_begins_green_right_after_the_title(data_py, tiny_recipes):
    rows = {r["title"]: r for r in made_recipes(60)}
    out, _ = data_py("--data", tiny_recipes, "--show", 2, "--mask_prompt")
    shown = COLOURED.findall(out)
    assert len(shown) == 2 and out.count("\x1b[32m") == 2
    for grey, green in shown:
        assert green == rendered(rows[grey])[1] + "</s>"  # grey: the title, and nothing else


def test_show_without_mask_has_everything_but_bos_in_green(data_py, bos_model, tiny_recipes):
    texts = {"".join(rendered(r)) + "</s>" for r in made_recipes(60)}
    out, _ = data_py("--data", tiny_recipes, "--show", 3, model=bos_model)
    shown = COLOURED.findall(out)
    assert [grey for grey, _ in shown] == ["<s>"] * 3 and {green for _, green in shown} < texts


def test_a_negative_show_is_refused(data_py, tiny_recipes):
    with pytest.raises(UserError, match="--show -1"):
        data_py("--data", tiny_recipes, "--show", -1)


# ---- feed -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fed(tmp_path, tiny_model):
    """(heap, feed): a feed of the heap's batches on the CPU, and afterwards no thread that was not there before."""
    before = set(threading.enumerate())
    heap, _ = tokens(tmp_path, made_recipes(30), tiny_model)

    def one_by_one(batches, **more):
        steps = data.feed(heap, ([rows] for rows in batches), torch.device("cpu"), False, **more)
        yield from itertools.chain.from_iterable(steps)

    yield heap, one_by_one
    assert set(threading.enumerate()) <= before


def test_feed_gives_the_batches_in_order(fed):
    heap, feed = fed
    batches = [
        batch
        for step in data.plan(heap.lengths(slice(None)), Data(batch_size=4), 0)
        for batch in step
    ]
    got = list(feed(batches, n=2))
    assert len(got) == len(batches) == 8
    for one, rows in zip(got, batches):
        other = data.collate(heap, rows, False)
        assert all(
            torch.equal(getattr(one, name), getattr(other, name))
            for name in ("ids", "where", "targets")
        )
        assert one.real == other.real and list(one.rows) == list(rows)


def test_feed_gives_the_micro_batches_of_a_step_together(fed):
    heap, _ = fed
    steps = data.plan(heap.lengths(slice(None)), Data(batch_size=4), 0, 3)
    got = list(data.feed(heap, steps, torch.device("cpu"), False))
    assert [[list(b.rows) for b in step] for step in got] == [
        [list(rows) for rows in step] for step in steps
    ]


def test_feed_works_ahead_but_not_without_end(fed):
    _, feed = fed
    taken = []
    batches = feed((taken.append(i) or [i % 30] for i in itertools.count()), n=3)
    next(batches)
    deadline = time.time() + 10
    while len(taken) < 4 and time.time() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert 4 <= len(taken) <= 5  # the one in use, three that are ready, one in hand
    batches.close()


@pytest.mark.parametrize(
    ("third", "error"),
    [(lambda: [999], IndexError), (lambda: 1 // 0, ZeroDivisionError)],
    ids=["in collate", "in the plan"],
)
def test_an_error_in_the_worker_reaches_the_consumer(fed, third, error):
    _, feed = fed
    got = []
    with pytest.raises(error):
        for batch in feed([i] if i < 2 else third() for i in range(9)):
            got.append(int(batch.rows[0]))
    assert (
        got == [0, 1][: len(got)]
    )  # working ahead, it may fail before the batches that went well are used


def test_closing_early_ends_the_thread(fed):
    """The fixture looks for threads that stayed."""
    _, feed = fed
    batches = feed(([i % 30] for i in itertools.count()), n=1)
    assert [int(batch.rows[0]) for batch in itertools.islice(batches, 3)] == [0, 1, 2]
    assert threading.active_count() > 1
    batches.close()


@pytest.mark.parametrize("name", ["clean.jsonl", "clean.jsonl.gz"])
def test_the_cleaned_heap_is_written_for_other_programs_and_read_again(tmp_path, name):
    steps = ["Boil &amp; wait.", "Pour \u2028 it " * 12]
    rows = [
        {"title": "Tea", "ingredients": ["water", "tea"], "directions": steps},
        {"text": "A text of its own. " * 8},
        {"title": "Stub", "ingredients": ["salt"], "directions": []},
    ]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    done = program("data.py", "--data", source, "--to", tmp_path / name, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == f"2 of 3 recipes are in {tmp_path / name}"
    first, second = (
        [(r.title, r.ingredients, r.directions, r.prompt, r.completion) for r in heap]
        for heap in (
            recipes.clean(
                recipes.read([source], recipes.Account()), recipes.Rules(), recipes.Account()
            ),
            recipes.read([tmp_path / name], recipes.Account()),
        )
    )
    assert first == second and not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("place", ["none/clean.jsonl", "a.jsonl/clean.jsonl"])
def test_a_heap_that_cannot_be_written_is_said(tmp_path, place):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "A text of its own. " * 8}])
    done = program("data.py", "--data", source, "--to", tmp_path / place, check=False)
    assert (
        done.returncode == 2
        and "--to" in done.stderr.splitlines()[-1]
        and "Traceback" not in done.stderr
    )


def test_a_rule_that_takes_more_than_half_says_so(tmp_path):
    rows = [{"text": f"text {i} " * (30 if i < 2 else 2)} for i in range(6)]
    done = program(
        "data.py",
        "--data",
        write_jsonl(tmp_path / "a.jsonl", rows),
        "--val_recipes",
        1,
        cwd=tmp_path,
    )
    (took,) = (line for line in done.stdout.splitlines() if "too_short" in line)
    assert (
        "4  too_short  more than half of all" in took and done.stdout.count("more than half") == 1
    )


# ---- chats ----------------------------------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
TRIMMED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[{{ m.content | trim }}]\n{% else %}"
    "{{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
ONLY_PAIRS = (
    "{% if messages | length % 2 %}{{ raise_exception('turns come in pairs') }}{% endif %}" + CHATML
)
CHAT = [
    {"role": "user", "content": "What is in a pie?"},
    {"role": "assistant", "content": "Apples </s> and\n<s>sugar."},
    {"role": "user", "content": " More?"},
    {"role": "assistant", "content": "No.\n"},
]
COOK = json.dumps({"messages": [{"role": "cook", "content": "x"}]}) + "\n"


def chat_model(folder, template, **more):
    model = make_model(folder, vocab=258, **more)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return model


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    "template, said",
    [
        (
            CHATML,
            [
                ("<s>user\nWhat is in a pie?</s>\n<s>assistant\n", 0),
                ("Apples </s> and\n<s>sugar.</s>", 1),
                ("\n<s>user\nMore?</s>\n<s>assistant\n", 0),
                ("No.</s>", 1),
                ("\n", 0),
            ],
        ),
        (
            TRIMMED,
            [
                ("<s>[What is in a pie?]\n", 0),
                ("Apples </s> and\n<s>sugar.</s>", 1),
                ("[More?]\n", 0),
                ("No.</s>", 1),
            ],
        ),
    ],
    ids=["chatml", "trimmed"],
)
def test_targets_of_a_chat_are_the_assistants_turns_and_their_ends(tmp_path, template, said, bos):
    model = chat_model(tmp_path / "model", template, bos=bos)
    heap, _ = tokens(tmp_path, [{"messages": CHAT}], model)
    ids, at = heap.recipe(0)
    plain, target = Plain(model), set(at.tolist())
    spelled, runs = "", itertools.groupby(range(len(ids)), key=lambda i: i in target)
    assert [(plain.spell(ids[list(run)]), int(green)) for green, run in runs] == said
    assert heap.recipe(0, mask_prompt=True)[1].tolist() == at.tolist()
    spelled = plain.spell(ids)
    controls = [i for i in ids.tolist() if i in (BOS, END)]
    assert (
        spelled.count("<s>") + spelled.count("</s>") == len(controls) + 2
    )  # what the user wrote is text


@pytest.mark.parametrize("template", [CHATML, TRIMMED], ids=["chatml", "trimmed"])
@pytest.mark.parametrize("ask", [False, True])
def test_a_chat_has_the_ids_of_transformers(tmp_path, template, ask):
    transformers = pytest.importorskip("transformers")
    model = chat_model(tmp_path / "model", template)
    chat = [
        {**m, "content": re.sub("</?s>", "", m["content"]).strip()} for m in CHAT[: 3 if ask else 4]
    ]
    text = data.Text(model)
    (ids,) = text.tokens([text.chat(chat, ask)])
    other = transformers.PreTrainedTokenizerFast.from_pretrained(model).apply_chat_template(
        chat, tokenize=True, add_generation_prompt=ask, return_dict=True
    )["input_ids"]
    assert [i & (data.PROMPT - 1) for i in ids] == other


def test_the_template_may_lie_beside_the_tokenizer_or_be_one_of_several(tmp_path):
    wanted = data.Text(chat_model(tmp_path / "a", CHATML)).chat(CHAT)
    several = [{"name": "tools", "template": TRIMMED}, {"name": "default", "template": CHATML}]
    assert data.Text(chat_model(tmp_path / "b", several)).chat(CHAT) == wanted
    model = chat_model(tmp_path / "c", TRIMMED)
    (model / "chat_template.jinja").write_text(CHATML)
    assert data.Text(model).chat(CHAT) == wanted


@pytest.mark.parametrize(
    "template, why",
    [
        (ONLY_PAIRS, "turns come in pairs"),
        ("{{ messages[0].content }}", "leaves out a turn"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses it"),
        ("{{ messages[7].content.x }}", "refuses it"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "leaves out"),
    ],
)
def test_a_chat_that_the_template_refuses_is_a_bad_row(tmp_path, template, why):
    model = chat_model(tmp_path / "model", template)
    heap, _ = tokens(tmp_path, [TEA, {"messages": CHAT[:3]}], model, allow_bad=0.5)
    assert (heap.account["read"], heap.account["bad"], len(heap.rows)) == (1, 1, 1)
    assert why in heap.account["bad_examples"][0]


def test_a_model_without_a_template_cannot_chat(tmp_path, tiny_model):
    with pytest.raises(UserError, match="no chat template"):
        tokens(tmp_path, [{"messages": CHAT}], tiny_model)
    assert not list((tmp_path / "cache/tokens").iterdir())


def test_show_of_a_chat_has_the_assistant_in_green(tmp_path, data_py):
    model = chat_model(tmp_path / "model", CHATML)
    file = write_jsonl(
        tmp_path / "chat.jsonl", [{"messages": CHAT}] * 2 + [{"messages": CHAT[:2]}] * 2
    )
    out, _ = data_py("--data", file, "--show", 1, "--no-clean", "--val_recipes", 2, model=model)
    green = re.findall(r"\x1b\[32m(.*?)\x1b\[0m", out, re.DOTALL)
    assert green[0] == "Apples </s> and\n<s>sugar.</s>" and green[1:] in ([], ["No.</s>"])


# ---- bad input ------------------------------------------------------------------------------------------------------

LONG = {
    "title": "Rice",
    "ingredients": ["rice", "water", "salt"],
    "directions": [
        "Wash the rice in cold water.",
        "Boil it in salt water for twenty minutes, then let it stand.",
    ],
}


def csv_text(*rows, ner='["rice"]', header="title,ingredients,directions,NER"):
    def cell(x):
        return (
            '"'
            + (x if isinstance(x, str) else json.dumps(x, ensure_ascii=False)).replace('"', '""')
            + '"'
        )

    lines = [
        ",".join(map(cell, (r["title"], r["ingredients"], r["directions"], ner))) for r in rows
    ]
    return "\n".join([header, *lines, ""])


def numbered(n=9, **changes):
    """n recipes that no rule drops and none of which is like another."""
    words, out = (
        ["oats", "plums", "figs", "leeks", "dates", "mint", "pears", "limes", "kale", "corn"],
        [],
    )
    for i in range(n):
        steps = [
            f"Stew the {words[i]} in water for {i}2 minutes, and {' '.join(words[:i])} with {words[i]} too.",
            f"Add {words[i]} and eat it all {i} days long, {' and '.join(words[i:])} beside it.",
            "Serve it hot with what is left over.",
        ]
        out.append(
            {
                **LONG,
                "ingredients": [f"{i + 1} {words[i]}", "water"],
                "directions": steps,
                **changes,
            }
        )
    return out


GOOD = "".join(json.dumps(r) + "\n" for r in numbered())
BAD_INPUT = {  # case: file, content, flags, what stderr ends in or what is (read, bad, kept)
    "broken JSON in a column": (
        "a.csv",
        csv_text(*numbered(), {**LONG, "ingredients": '["rice'}),
        (),
        (9, 1, 9),
    ),
    "missing columns": (
        "a.csv",
        "title,text\na,b\n",
        (),
        "lacks the columns ingredients, directions",
    ),
    "newlines and quotes": (
        "a.csv",
        csv_text(*numbered(title='A "good",\r\nold\npie')),
        (),
        (9, 0, 9),
    ),
    "a byte order mark": ("a.csv", "\ufeff" + csv_text(*numbered()), (), (9, 0, 9)),
    "mixed line ends": ("a.jsonl", GOOD.replace("\n", "\r\n", 4), (), (9, 0, 9)),
    "a field of 5 MB": (
        "a.csv",
        csv_text(*numbered(), {**LONG, "title": "x " * 2_500_000}),
        (),
        (10, 0, 9),
    ),
    "a lone surrogate": (
        "a.jsonl",
        GOOD + json.dumps({**LONG, "title": "\ud800"}) + "\n",
        (),
        (9, 1, 9),
    ),
    "U+2028 inside a string": (
        "a.jsonl",
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in numbered(title="a\u2028b")),
        (),
        (9, 0, 9),
    ),
    "the same title again": ("a.jsonl", GOOD, (), (9, 0, 9)),
    "an empty NER": ("a.csv", csv_text(*numbered(), ner=""), (), (9, 0, 9)),
    "an empty list as NER": ("a.csv", csv_text(*numbered(), ner="[]"), (), (9, 0, 9)),
    "gzip cut off": (
        "a.jsonl.gz",
        gzip.compress(GOOD.encode())[:-30],
        (),
        "cannot be read to its end",
    ),
    "an unknown role": ("a.jsonl", GOOD + COOK, (), (9, 1, 9)),
    "nothing is left": (
        "a.jsonl",
        GOOD,
        ("--min_words", 500),
        "no recipe is left of 9 read: too_short took 9",
    ),
    "too many bad rows": ("a.jsonl", GOOD + "no\n" * 9, (), "9 of 18 rows"),
    "nothing in it": ("a.jsonl", "", (), "There is no row"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_a_sentence_or_counted_and_leaves_nothing_half_written(
    tmp_path, data_py, monkeypatch, case
):
    name, content, flags, wanted = BAD_INPUT[case]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.chdir(tmp_path)
    flags = ("--data", tmp_path / name, "--val_recipes", 2, "--allow_bad", 0.2, *flags)
    if isinstance(wanted, str):
        with pytest.raises(UserError, match=re.escape(wanted)):
            data_py(*flags)
    else:
        a = json.loads(data_py(*flags, "--json").out)
        assert (a["read"], a["bad"], a["kept"]) == wanted
    assert not list(tmp_path.glob("cache/tokens/*.part"))


@pytest.mark.parametrize("where", ["tokens", "clean.jsonl"])
def test_a_disk_that_is_full_in_mid_work_leaves_nothing_half_written(tmp_path, tiny_model, where):
    """A limit on the size of a file stands in for the disk."""
    file = write_jsonl(tmp_path / "a.jsonl", made_recipes(400))
    flags = [
        "--data",
        file,
        "--model",
        tiny_model,
        "--cache",
        tmp_path / "cache",
        "--max_similar",
        2,
    ]
    flags += ["--to", tmp_path / where] * (where != "tokens")
    script = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); "
        "sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0].rsplit('/', 1)[0]); "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, ROOT / "data.py", *map(str, flags)],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
    )
    said = done.stderr.strip().splitlines()[-1]
    assert (
        done.returncode in (1, 2)
        and "rror: " in said
        and "written" in said
        and "Traceback" not in done.stderr
    )
    assert not (tmp_path / where).exists() and not list(tmp_path.rglob("*.part"))
    assert not list(tmp_path.glob("cache/tokens/*"))
