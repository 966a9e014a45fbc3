"""data.py: which batch a recipe is in, what is in a batch, what is too long, what is held out; and the program."""

from cli import UserError

import gzip
import itertools
import json
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import (
    CHAT,
    CHATML,
    OPEN,
    ROOT,
    PlainTokenizer,
    chat_model,
    data_config,
    made_recipes,
    make_model,
    program,
    read_recipes,
    rendered,
    tokenised,
    write_jsonl,
)

import data
import recipes
from data import Data
from recipes import Rules
from text import NEVER

TEA = {"title": "Tea", "ingredients": ["water", "tea"], "directions": ["Boil.", "Pour."]}
COUNTS = ("random", "sorted")


# ---- collate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_collate_against_a_slow_loop(tmp_path, tiny_model, bos_model, bos, mask):
    model = bos_model if bos else tiny_model
    rows = [*made_recipes(20), {"text": "Just salt."}, {"prompt": "One", "completion": " two"}]
    dataset, _ = tokenised(tmp_path, rows, model)
    plain, rng = PlainTokenizer(model), np.random.default_rng(3)
    for _ in range(20):
        which = rng.permutation(len(rows))[: rng.integers(1, 9)].tolist()
        recipes_ids = [plain.recipe(rows[i], bos) for i in which]
        batch = data.collate(dataset, which, mask)
        B, T = batch.ids.shape
        assert (B, T) == (len(which), max(map(len, recipes_ids)) - 1)
        pairs = []  # (row of the batch, position, next token)
        for b, (i, ids) in enumerate(zip(which, recipes_ids, strict=True)):
            prompt = bos + len(plain.ids(rendered(rows[i])[0]))
            first = prompt - 1 if mask else 0
            pairs += [(b, t, ids[t + 1]) for t in range(max(0, first), len(ids) - 1)]
            assert batch.ids[b].tolist() == ids[:-1] + [0] * (T - len(ids) + 1)
        assert [(w // T, w % T) for w in batch.where.tolist()] == [(b, t) for b, t, _ in pairs]
        assert batch.targets.tolist() == [token for *_, token in pairs]
        assert batch.real == sum(len(ids) - 1 for ids in recipes_ids)
        assert list(batch.rows) == which
        assert batch.ids.dtype == batch.where.dtype == batch.targets.dtype == torch.int64


def test_a_batch_without_any_target_is_an_error_that_names_its_recipes(tmp_path, tiny_model):
    dataset, _ = tokenised(tmp_path, [TEA, {"text": "a"}, {"text": "b"}], tiny_model)
    dataset.source.tokens = dataset.source.tokens | NEVER
    with pytest.raises(UserError, match=r"no target token.*\[1, 2\]"):
        data.collate(dataset, [1, 2], False)


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
        data.prepare(
            data_config(tmp_path, long, **files, batch_tokens=119), Rules(), byte_models[False]
        )
    if flag == "data":
        data.prepare(
            data_config(tmp_path, long, val_recipes=1, batch_tokens=120),
            Rules(),
            byte_models[False],
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
    dataset, text = tokenised(tmp_path, made_recipes(9), bos_model)
    which, budget = [4, 2, 7], 1024
    batch = data.collate(dataset, which, mask, budget)
    ids, where, targets, ends = [], [], [], [0]
    for i in which:
        t, prompt = dataset.ids(i).tolist(), 1 + len(text.encode([made_recipes(9)[i]["title"]])[0])
        for at in range(prompt if mask else 1, len(t)):
            where.append(len(ids) + at - 1)
            targets.append(t[at])
        ids += t[:-1]
        ends.append(len(ids))
    assert batch.ids.shape == (1, budget) and batch.real == len(ids)
    assert batch.ids[0].tolist() == ids + [0] * (budget - len(ids))
    assert batch.where.tolist() == where and batch.targets.tolist() == targets
    cu, longest = batch.cu_seqlens.tolist(), int(dataset.rows["length"].max())
    assert cu[:4] == ends and cu[-1] == budget and batch.cu_seqlens.dtype == torch.int32
    assert all(0 <= b - a <= longest for a, b in itertools.pairwise(cu))
    assert len(data.collate(dataset, [0], mask, budget).cu_seqlens) == len(cu)


# ---- max_len: dropped and counted, never cut ------------------------------------------------------------------------


def test_a_longer_recipe_is_dropped_and_counted_never_cut(tmp_path, byte_models):
    """One token a byte and the end token: texts of 10, 19, 20 and 29 letters have 11, 20, 21 and 30 tokens."""
    rows = [{"prompt": f"{n}:", "completion": "x" * (n - 4) + "!"} for n in (10, 19, 20, 29)]
    dataset, _, text = data.prepare(
        data_config(tmp_path, rows, max_len=20, val_recipes=1), Rules(), byte_models[False]
    )
    assert dataset.rows["length"].tolist() == [11, 20]
    assert [text.decode(dataset.ids(i)) for i in range(2)] == ["10:xxxxxx!", "19:xxxxxxxxxxxxxxx!"]
    assert (
        dataset.account["dropped"]["max_len"] == 2
        and dataset.account["kept"] == 2
        and dataset.account["read"] == 4
    )
    assert dataset.account["examples"]["max_len"] == [
        f"20:{'x' * 16}!: 21 tokens",
        f"29:{'x' * 17}: 30 tokens",
    ]


def test_no_more_than_three_examples_of_long_recipes(tmp_path, tiny_model):
    rows = [*made_recipes(5), *({"text": "x" * 900} for _ in range(5))]
    dataset, _, _ = data.prepare(
        data_config(tmp_path, rows, max_len=450, val_recipes=1), Rules(), tiny_model
    )
    assert (
        dataset.account["dropped"]["max_len"] == 5
        and len(dataset.account["examples"]["max_len"]) == 3
    )


@pytest.mark.parametrize(
    ("flags", "rules", "message"),
    [
        ({"max_len": 2}, Rules(), "of 12 read: max_len took 11"),
        ({"max_len": 1024}, Rules(min_words=500), "of 12 read: too_short took 12"),
        ({"max_len": 1024}, Rules(min_words=0, min_steps=100), "of 12 read: few_steps took 12"),
    ],
)
def test_nothing_left_names_the_rule_that_took_most(tmp_path, tiny_model, flags, rules, message):
    cfg = data_config(tmp_path, [*made_recipes(11), {**TEA, "directions": []}], clean=True, **flags)
    with pytest.raises(UserError, match=message):
        data.prepare(cfg, rules, tiny_model)


def test_nothing_left_because_every_row_is_bad_blames_no_rule(tmp_path, tiny_model):
    file = tmp_path / "rows.jsonl"
    file.write_text("no JSON\n" * 4)
    with pytest.raises(UserError) as e:
        data.prepare(data_config(tmp_path, file, allow_bad=1), Rules(), tiny_model)
    assert "bad" in str(e.value) and "took 0" not in str(e.value)


def test_max_len_beyond_the_window_is_refused(tmp_path):
    model = make_model(tmp_path / "model", window=256)
    with pytest.raises(UserError, match=r"--max_len 257 is beyond the 256 positions"):
        data.prepare(data_config(tmp_path, made_recipes(9), max_len=257), Rules(), model)
    data.prepare(data_config(tmp_path, made_recipes(9), max_len=256), Rules(**OPEN), model)


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
    cfg = data_config(tmp_path, tiny_recipes, **{flag: [str(tmp_path / "missing.jsonl")]})
    with pytest.raises(UserError, match=rf"--{flag}\b.*missing\.jsonl"):
        data.prepare(cfg, Rules(), tiny_model)


# ---- what is held out -----------------------------------------------------------------------------------------------


def retitled(rows, n):
    """The same recipes under another title are duplicates."""
    return [{**row, "title": f"{row['title']}, copy {n}"} for row in rows]


def contents(dataset, text, which):
    return [text.decode(dataset.ids(i)).split("\n", 1)[1] for i in which]


def test_no_duplicate_straddles(tmp_path, tiny_model):
    rows = made_recipes(20)
    rows = [
        *rows,
        *retitled(rows, 2),
        *retitled(rows[:10], 3),
    ]  # ten recipes twice, ten three times
    for seed in range(8):
        dataset, held, text = data.prepare(
            data_config(tmp_path, rows, val_recipes=12, seed=seed), Rules(), tiny_model
        )
        assert (
            held.rows is dataset.rows and 11 <= len(held.indices) <= 13
        )  # 12, as near as whole groups come
        assert sorted([*dataset.indices, *held.indices]) == list(range(50))
        assert not set(contents(dataset, text, dataset.indices)) & set(
            contents(dataset, text, held.indices)
        )


def test_duplicates_of_the_validation_file_are_not_trained_on(tmp_path, tiny_model):
    """Nor are those of its recipes that --val_recipes leaves out of the measurement."""
    rows = made_recipes(30)
    val = write_jsonl(tmp_path / "val.jsonl", retitled(rows[:10], 2))
    dataset, held, text = data.prepare(
        data_config(tmp_path, rows, val_data=[str(val)], val_recipes=3), Rules(), tiny_model
    )
    assert (
        held.rows is not dataset.rows
        and len(held.rows) == 10
        and len(set(held.indices.tolist())) == 3
    )
    assert dataset.indices.tolist() == list(range(10, 30))
    assert set(contents(held, text, held.indices)) < set(contents(dataset, text, range(10)))


def test_the_whole_validation_file_is_held_out_where_it_is_small(tmp_path, tiny_model):
    val = write_jsonl(tmp_path / "val.jsonl", made_recipes(5, seed=9))
    dataset, held, _ = data.prepare(
        data_config(tmp_path, made_recipes(10), val_data=[str(val)]), Rules(), tiny_model
    )
    assert sorted(held.indices) == [0, 1, 2, 3, 4] and len(dataset.indices) == 10


@pytest.mark.parametrize(
    "rows", [made_recipes(1), retitled(made_recipes(1) * 8, 1)], ids=["one", "eight the same"]
)
def test_too_few_recipes_to_hold_some_out(tmp_path, tiny_model, rows):
    with pytest.raises(UserError, match=r"too few.*--val_data"):
        data.prepare(data_config(tmp_path, rows, val_recipes=2), Rules(), tiny_model)


def test_nothing_to_train_on_beside_the_validation_file(tmp_path, tiny_model):
    val = write_jsonl(tmp_path / "val.jsonl", made_recipes(12))
    with pytest.raises(UserError, match="too few"):
        data.prepare(
            data_config(tmp_path, made_recipes(12), val_data=[str(val)]), Rules(), tiny_model
        )


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
    "unused",
    "tokens_sha256",
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
    lengths = sorted(len(PlainTokenizer(tiny_model).recipe(row, 0)) for row in kept)
    assert a["tokens"] == sum(lengths) and a["lengths"]["p100"] == lengths[-1]  # with the end token
    assert set(a["padding"]) == {"random", "sorted", "packed"}
    assert 0 < a["padding"]["sorted"] < a["padding"]["random"] < 1


@pytest.fixture
def data_py(tmp_path, tiny_model, monkeypatch, capsys):
    """python data.py with these flags, in this process: (stdout, stderr)"""

    def call(*args, model=tiny_model):
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
    """(dataset, feed): a feed of its batches on the CPU, and afterwards no thread that was not there before."""
    before = set(threading.enumerate())
    dataset, _ = tokenised(tmp_path, made_recipes(30), tiny_model)

    def one_by_one(batches, **more):
        steps = data.feed(dataset, ([rows] for rows in batches), torch.device("cpu"), False, **more)
        yield from itertools.chain.from_iterable(steps)

    yield dataset, one_by_one
    assert set(threading.enumerate()) <= before


def test_feed_gives_the_batches_in_order(fed):
    dataset, feed = fed
    batches = [
        batch
        for step in data.plan(dataset.lengths(slice(None)), Data(batch_size=4), 0)
        for batch in step
    ]
    got = list(feed(batches, n=2))
    assert len(got) == len(batches) == 8
    for one, rows in zip(got, batches, strict=True):
        other = data.collate(dataset, rows, False)
        assert all(
            torch.equal(getattr(one, name), getattr(other, name))
            for name in ("ids", "where", "targets")
        )
        assert one.real == other.real and list(one.rows) == list(rows)


def test_feed_gives_the_micro_batches_of_a_step_together(fed):
    dataset, _ = fed
    steps = data.plan(dataset.lengths(slice(None)), Data(batch_size=4), 0, 3)
    got = list(data.feed(dataset, steps, torch.device("cpu"), False))
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
    kept = recipes.clean([source], Rules(), recipes.Account(), whole=True)
    again, _ = read_recipes(tmp_path / name)
    assert [judged.recipe for judged in kept] == again and not list(tmp_path.glob("*.part"))


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


COOK = json.dumps({"messages": [{"role": "cook", "content": "x"}]}) + "\n"


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


def test_show_of_a_chat_has_the_assistant_in_green(tmp_path, data_py):
    model = chat_model(tmp_path / "model", CHATML)
    file = write_jsonl(
        tmp_path / "chat.jsonl", [{"messages": CHAT}] * 2 + [{"messages": CHAT[:2]}] * 2
    )
    out, _ = data_py("--data", file, "--show", 1, "--no-clean", "--val_recipes", 2, model=model)
    green = re.findall(r"\x1b\[32m(.*?)\x1b\[0m", out, re.DOTALL)
    assert green[0] == "Apples </s> and\n<s>sugar.</s>" and green[1:] in ([], ["No.\n</s>"])
