"""recipes.py and near.py: what is repaired, what is dropped and why, in one or several processes, what is held out."""

from cli import UserError, helps

import gc
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import jsonl, put, read_recipes, recipenlg

import near
import recipes
from files import sources
from recipes import (
    RULES,
    Account,
    Context,
    Recipe,
    Rules,
    clean,
    common,
    drop_and_count,
    held_out,
    judge,
    key,
    names,
    remember,
    repair,
    run_job,
)
from recipes import name as name_of

PUBLIC = Path(__file__).parents[2] / "shared/data/recipes_public.jsonl.gz"
BREAD = Recipe(
    "Pumpkin Bread",
    ["3½ cups flour", "2 teaspoons baking soda"],
    ["Preheat the oven to 180°C (350°F).", "Sift the dry ingredients together."],
)
BREAD_PROMPT = "Pumpkin Bread"
BREAD_COMPLETION = """

Ingredients:
- 3½ cups flour
- 2 teaspoons baking soda

Directions:
1. Preheat the oven to 180°C (350°F).
2. Sift the dry ingredients together."""
ROW = {"title": "Tea", "ingredients": ["water", "tea"], "directions": ["Boil.", "Pour."]}
TEA = Recipe("Tea", ["water", "tea"], ["Boil.", "Pour."])
LOOSE = Rules(min_words=0, max_similar=2)  # for fixtures that are not about length or likeness


def cleaned(made, rules=LOOSE, common=None, held=()):
    """(those of the recipes that stay, account)"""
    account = Account()
    alone = Context(rules, common)
    context = Context(rules, earlier=near.Earlier())
    remember([judge(recipe, "", Context(rules)) for recipe in held], context)
    judged = [judge(recipe, "", alone, whole=True) for recipe in made]
    return [one.recipe for one in drop_and_count(judged, context, account)], account


# ---- the text -------------------------------------------------------------------------------------------------------


def test_the_text_of_a_recipe():
    assert BREAD.text() == (BREAD_PROMPT, BREAD_COMPLETION)


def test_the_text_of_what_is_no_recipe():
    assert Recipe(prompt="a\n", completion=" b\n").text() == ("a\n", " b\n")


# ---- repairs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "before, after",
    [
        ("&frac12; cup", "½ cup"),
        ("1 &#8532; cups", "1 ⅔ cups"),
        ("salt &amp; pepper", "salt & pepper"),
        ("a&nbsp;b\u00a0 c", "a b c"),
        ("  a\t b\r\n c ", "a b c"),
        ("- flour", "flour"),
        ("* flour", "flour"),
        ("• flour", "flour"),
        ("– flour", "flour"),
        ("*flour", "flour"),
        ("*#flour", "flour"),
        ("#Bake it", "Bake it"),
        ("1. Mix", "Mix"),
        ("12) Mix", "Mix"),
        (" 3.\tMix", "Mix"),
        ("* 1–3 g chili", "1–3 g chili"),
        ("* Use * here", "Use * here"),
    ],
)
def test_repaired(before, after):
    got = repair(Recipe("T", [before], [before]))
    assert (got.ingredients, got.directions) == ([after], [after])


@pytest.mark.parametrize(
    "text",
    [
        "1 cup flour",
        "1.5 cups",
        "1. 5 cups",
        "10 eggs",
        "-5°C is cold",
        "#10 tin",
        "*really* good",
        "**Note** it",
        "1/2 cup",
        "½ cup",
        "A & B",
        "7-Up",
        "350. degrees",
    ],
)
def test_not_repaired(text):
    recipe = Recipe(text, [text], [text])
    assert repair(recipe) is recipe


def test_empty_items_go_and_the_title_is_tidied_and_each_repair_is_counted_once():
    dirty = Recipe(
        " Fish &amp;\u00a0Chips ",
        ["", "fish", " - ", "*", "&nbsp;", "chips"],
        ["1.", "1. Fry.", "2. Eat."],
    )
    got, account = cleaned([dirty, BREAD])
    assert got == [Recipe("Fish & Chips", ["fish", "chips"], ["Fry.", "Eat."]), BREAD]
    assert account.repaired == 1
    assert (
        dirty.ingredients[1] == "fish" and len(dirty.ingredients) == 6
    )  # the recipe that came in is not changed


# ---- rules ----------------------------------------------------------------------------------------------------------


def recipe(words=40, ingredients=3, steps=2, title="Tea"):
    """A recipe of so many words, unlike every other one by its last word."""
    recipe.made = getattr(recipe, "made", 0) + 1
    items = [f"item{n}" for n in range(ingredients)]
    parts = [f"step{n}" for n in range(steps)]
    fill = words - len(title.split()) - ingredients - steps
    if steps:
        parts[-1] += " w" * (fill - 1) + f" n{recipe.made}"
    return Recipe(title, items, parts)


BOUNDS = Rules(
    min_words=20,
    max_words=60,
    min_ingredients=2,
    max_ingredients=5,
    min_steps=2,
    min_mentioned=0,
    max_similar=2,
)
RULE_CASES = {  # rule: what it drops, what just passes, and the example
    "no_title": ({"title": ""}, {"title": "T"}, "(no title): no title"),
    "too_short": ({"words": 19}, {"words": 20}, "Tea: words: 19"),
    "too_long": ({"words": 61}, {"words": 60}, "Tea: words: 61"),
    "few_ingredients": ({"ingredients": 1}, {"ingredients": 2}, "Tea: ingredients: 1"),
    "many_ingredients": ({"ingredients": 6}, {"ingredients": 5}, "Tea: ingredients: 6"),
    "few_steps": ({"steps": 1}, {"steps": 2}, "Tea: steps: 1"),
}


def test_every_rule_has_a_case_a_docstring_and_a_count_of_zero():
    assert [
        *RULE_CASES,
        "points_elsewhere",
        "unused_ingredients",
        "rare_ingredient",
        "duplicate",
        "near_duplicate",
    ] == list(RULES)
    assert all(rule.__doc__ for rule in RULES.values())
    assert Account().dropped == dict.fromkeys(RULES, 0)
    assert Account().examples == {name: [] for name in RULES}


@pytest.mark.parametrize("rule", RULE_CASES)
def test_a_rule_drops_what_is_beyond_its_bound_and_only_that(rule):
    beyond, within, example = RULE_CASES[rule]
    good = [recipe(**within) for _ in range(2)]
    got, account = cleaned([good[0], recipe(**beyond), recipe(**beyond), good[1]], BOUNDS)
    assert got == good
    assert account.dropped == dict.fromkeys(RULES, 0) | {rule: 2}
    assert account.examples[rule] == [example] * 2
    assert account.kept == 2


@pytest.mark.parametrize(
    "step",
    [
        "Prepare the duck as for wild duck.",
        "Prepare as above",
        "Same as the last.",
        "See Pie Crust.",
        "see page 12",
        "Cook this pudding like the previous one",
        "Follow recipe for mixing butter cakes.",
        "Bake the same as any bread",
        "Make a syrup as for Lemon Ice",
        "Treat further as for Ham Strudel (No. 1229)",
        "As directed above.",
    ],
)
def test_a_step_that_only_points_to_another_recipe(step):
    rest = ["Sift flour and soda.", "Bake for an hour."]
    got, account = cleaned([Recipe("Bread", BREAD.ingredients, [*rest, step])], LOOSE)
    assert got == [] and account.dropped == dict.fromkeys(RULES, 0) | {"points_elsewhere": 1}
    assert account.examples["points_elsewhere"] == [f"Bread: {step!r}"]


@pytest.mark.parametrize(
    "step",
    [
        "Cook the pasta as directed on the package.",
        "See that the oven is hot.",
        "Serve as a starter.",
        "Make the pudding as directed on the box; let stand.",
        "Cook as for a crowd," + " and stir" * 8,
        "Serve with cream as in summer berries are plenty and cheap enough for all to eat",
        "Bake as long as it takes.",
    ],
)
def test_a_step_that_says_what_to_do_stays(step):
    recipe = Recipe("Bread", BREAD.ingredients, ["Sift flour and soda.", step])
    assert cleaned([recipe], LOOSE)[0] == [recipe]


ITEMS = ["2 cups flour", "3 large tomatoes", "1 egg", "a pinch of salt"]


@pytest.mark.parametrize(
    "ingredients, directions, stays",
    [
        (ITEMS, "Bake it. Eat it.", False),
        (ITEMS, "Bake a tomato.", True),  # 1 of 4, in the singular
        ([*ITEMS, "butter", "honey"], "Stir the honey.", False),  # 1 of 6 is less than a fifth
        (ITEMS, "Mix all the ingredients.", True),
        (ITEMS, "Put everything into a bowl.", True),
        (ITEMS[:3], "Bake it. Eat it.", True),  # too few to tell
        (["1 cup", "2 large", "3", "4"], "Bake it.", True),  # no names at all
    ],
)
def test_ingredients_that_the_directions_never_name(ingredients, directions, stays):
    got, account = cleaned([Recipe("Pie", ingredients, [directions, "Serve."])], LOOSE)
    assert len(got) == stays == 1 - account.dropped["unused_ingredients"]
    if not stays:
        n = 1 if "honey" in directions else 0
        why = f"{n} of {len(ingredients)} ingredients in the directions"
        assert account.examples["unused_ingredients"] == [f"Pie: {why}"]


@pytest.mark.parametrize(
    "before, after",
    [
        ("Stir.<ref>Cook, 1899</ref> Serve.", "Stir. Serve."),
        ("Stir<ref name=a/> well", "Stir well"),
        ("<b>Stir</b> <br/>well", "Stir well"),
        ("Beat ([https://x.org/v see]) it", "Beat () it"),
        ("Read https://x.org/a?b=1 first", "Read first"),
        ("<span class='x'>½ cup</span>", "½ cup"),
    ],
)
def test_markup_and_links_go(before, after):
    assert repair(Recipe("T", [before], [before])) == Recipe("T", [after], [after])


@pytest.mark.parametrize(
    "text", ["under <5 g of salt", "a < b > c", "x <3 y", "Source a good ham.", "Adapt it"]
)
def test_what_only_looks_like_markup_or_boilerplate_stays(text):
    recipe = Recipe("T", [text], [text])
    assert repair(recipe) is recipe


@pytest.mark.parametrize(
    "item",
    [
        "Originally published at https://x.org/food",
        "© 1999 A. Cook",
        "Recipe by A. Cook",
        "All rights reserved.",
        "Source: somebody's blog",
        "Click here to print",
    ],
)
def test_items_about_the_page_go(item):
    assert repair(Recipe("T", ["tea", item], ["Stir.", item])) == Recipe("T", ["tea"], ["Stir."])


def test_duplicates_by_content_whatever_the_title_case_and_white_space():
    other = Recipe("Pumpkin Bread", BREAD.ingredients, [*BREAD.directions, "Eat."])
    again = Recipe(
        "Bread",
        [s.upper() for s in BREAD.ingredients],
        [s.replace(" ", "\xa0  ") for s in BREAD.directions],
    )
    got, account = cleaned([BREAD, other, again, BREAD], LOOSE)
    assert got == [BREAD, other]
    assert account.dropped["duplicate"] == 2
    why = "same content as an earlier one"
    assert account.examples["duplicate"] == [f"Bread: {why}", f"Pumpkin Bread: {why}"]


def triples(recipe):
    words = re.findall(r"\w+", " ".join(recipe.ingredients + recipe.directions).lower())
    return set(zip(words, words[1:], words[2:], strict=False))


def test_near_duplicates_are_those_of_a_slow_loop():
    """2,000 recipes of made-up words, half of them an earlier one with some words changed: of pairs that share 0.8 of
    their word triples at least 95 % are found, and nothing is dropped that shares less with all that stays."""
    rng = np.random.default_rng(3)
    made = []
    for i in range(2000):
        words = [f"word{n}" for n in rng.integers(0, 3000, 80)]
        if i % 2:
            words = made[int(rng.integers(0, len(made)))].directions[0].split()
            for at in rng.integers(0, 80, rng.integers(1, 9)):
                words[at] = words[at] + "x"
        made.append(Recipe(f"T{i}", ["a b", "c d"], [" ".join(words), "Serve."]))
    got, account = cleaned(made, Rules(min_words=0, min_mentioned=0))
    stays, should = {r.title for r in got}, 0
    seen = []
    for r in made:
        mine = triples(r)
        most = max((len(mine & other) / len(mine | other) for other in seen), default=0)
        if r.title in stays:
            seen.append(mine)
            should += most >= 0.8
        else:
            assert most >= 0.8, r.title
    assert account.dropped["near_duplicate"] == 2000 - len(got) > 300
    assert should <= 0.05 * account.dropped["near_duplicate"]


def test_near_duplicates_of_the_first_recipes_are_still_found():
    """When the table is as full as it gets: copies, 0.8 the same, of the first 400 of 1,020."""
    rng = np.random.default_rng(4)
    earlier = near.Earlier()
    sets = [np.unique(rng.integers(0, 2**32, 90, dtype=np.uint32)) for _ in range(1020)]
    assert not any(earlier.find_or_remember(s.tobytes(), near.bands_of(s), 0.8) for s in sets)
    found = 0
    for s in sets[:400]:
        copy = np.concatenate(
            [s[: len(s) - 10], rng.integers(0, 2**32, 10, dtype=np.uint32)]
        )  # 80 of 100: J = 0.8
        same = earlier.find_or_remember(
            np.unique(copy).tobytes(), near.bands_of(np.unique(copy)), 0.75
        )
        found += same > 0
        assert same == 0 or 0.75 <= same <= 0.82
    assert found >= 0.93 * 400


def test_near_duplicates_by_hand():
    """12 words are 10 triples; one changed in the middle leaves 7 of 13, one at the end 9 of 11, which is above 0.8."""
    words = ["a1", "b2", "c3", "d4", "e5", "f6", "g7", "h8"]

    def made(*steps):
        return Recipe("T", ["i1", "j2"], [" ".join(words), *steps])

    one, middle, end = made("k1 l2"), made("k1 l2"), made("k1 l3")
    middle.directions = [middle.directions[0].replace("d4", "d5"), "k1 l2"]
    got, account = cleaned([one, middle, end], Rules(min_words=0, min_mentioned=0))
    assert got == [one, middle]
    assert account.examples["near_duplicate"] == ["T: 82% the same as an earlier one"]
    assert cleaned([one, middle, end], LOOSE)[0] == [one, middle, end]


@pytest.mark.parametrize("rows", [5000, 52_000])
def test_the_account_of_a_made_up_recipenlg_is_what_was_planted(tmp_path, rows):
    """The larger one is read by several processes, and its rare ingredients count."""
    path, account, rules = tmp_path / "full_dataset.csv", Account(), Rules(min_share=3e-5)
    planted = recipenlg(path, rows, rows, share=0.025)
    known = common(run_job(names, [path], Account(), 0.1), rules)
    kept = list(clean([path], rules, account, 0.1))
    if rows < 50_000:
        assert known is None
        planted["kept"] += planted.pop("rare_ingredient")
    missed = planted["near_duplicate"] - account.dropped["near_duplicate"]
    assert min(planted.values()) > 100 and account.bad == planted.pop("bad")
    assert len(kept) == account.kept == planted.pop("kept") + missed
    assert (
        0 <= missed <= 0.05 * planted.pop("near_duplicate")
    )  # none that is honest, or the count would be above
    account.dropped.pop("near_duplicate")
    assert account.dropped == dict.fromkeys(account.dropped, 0) | planted


def test_a_dropped_recipe_makes_no_duplicate():
    untitled = Recipe("", BREAD.ingredients, BREAD.directions)
    got, account = cleaned([untitled, BREAD])
    assert got == [BREAD]
    assert account.dropped == dict.fromkeys(RULES, 0) | {"no_title": 1}


def test_the_first_rule_that_fails_counts():
    _, account = cleaned(
        [recipe(words=5, ingredients=1, steps=1), recipe(words=61, ingredients=9, steps=1)], BOUNDS
    )
    assert account.dropped == dict.fromkeys(RULES, 0) | {"too_short": 1, "too_long": 1}


def test_words_are_the_texts_words_and_not_the_formats():
    rules = Rules(
        min_words=19, max_words=19
    )  # Pumpkin Bread 2, ingredients 3 + 4, steps 6 + 5 = 20 words
    assert cleaned([BREAD], rules)[1].examples["too_long"] == ["Pumpkin Bread: words: 20"]


def test_a_text_is_asked_only_what_makes_sense_for_it():
    texts = [
        Recipe(prompt="", completion="a " * 30),
        Recipe(prompt="", completion="too\nshort"),
        Recipe(prompt="p " * 31, completion="c " * 30),
        Recipe(prompt="", completion="a " * 30),
        Recipe(prompt="", completion="a  " * 30),
    ]  # other white space is another text
    got, account = cleaned(texts, BOUNDS)
    assert got == [texts[0], texts[4]]
    assert account.dropped == dict.fromkeys(RULES, 0) | {
        "too_short": 1,
        "too_long": 1,
        "duplicate": 1,
    }
    assert account.examples["too_short"] == ["too short: words: 2"]
    assert account.repaired == 0


def test_the_account_adds_up_and_shows_three_examples(tmp_path):
    stubs = [ROW | {"title": f"Stub {n}", "directions": []} for n in range(5)]
    rows = [*stubs, ROW, ROW, ROW | {"ingredients": ["&frac12; tea", "water"]}]
    account = Account()
    path = put(tmp_path / "a.jsonl", jsonl(*rows) + "no\n")
    got = [judged.recipe for judged in clean([path], LOOSE, account, 0.5, whole=True)]
    assert [r.ingredients for r in got] == [["water", "tea"], ["½ tea", "water"]]
    assert (account.read, account.bad, account.repaired, account.kept) == (8, 1, 1, 2)
    assert account.dropped == dict.fromkeys(RULES, 0) | {"few_steps": 5, "duplicate": 1}
    assert account.examples["few_steps"] == [
        "Stub 0: steps: 0",
        "Stub 1: steps: 0",
        "Stub 2: steps: 0",
    ]


def test_cleaning_streams():
    def endless():
        n = 0
        while True:
            n += 1
            recipe = Recipe("T", ["a", "b"], ["c", str(n)])
            yield judge(recipe, "", Context(LOOSE), whole=True)

    rows = drop_and_count(endless(), Context(LOOSE, earlier=near.Earlier()), Account())
    assert [next(rows).recipe.directions[1] for _ in range(3)] == ["1", "2", "3"]


def test_every_bound_has_a_help_text():
    assert all(helps(Rules).values()) and len(helps(Rules)) == 8


# ---- keys and holding out -------------------------------------------------------------------------------------------


def test_a_key_is_64_bits_and_stays_the_same_between_programs():
    content = b"water tea boil. pour."
    assert key(TEA) == int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
    assert 0 <= key(BREAD) < 2**64
    assert key(Recipe(prompt="a", completion="bc")) != key(Recipe(prompt="ab", completion="c"))


def some_keys(n, seed=0):
    return np.random.default_rng(seed).integers(0, 2**64, n, dtype=np.uint64)


def test_held_out_counts_exactly_where_it_can_and_never_more_than_half():
    keys = some_keys(1000)
    assert [held_out(keys, n, 1).sum() for n in (0, -1, 1, 64, 500, 501, 10_000)] == [
        0,
        0,
        1,
        64,
        500,
        500,
        500,
    ]
    assert [held_out(some_keys(n), 64, 1).sum() for n in (0, 1, 2, 3, 5)] == [0, 0, 1, 1, 2]
    assert held_out(keys, 64, 1).dtype == bool and held_out(keys, 64, 1).shape == (1000,)


@pytest.mark.parametrize(
    "sizes, n, wanted",
    [
        ([3] * 10, 4, 3),
        ([3] * 10, 5, 3),
        ([3] * 10, 9, 9),
        ([50] + [1] * 50, 20, 20),
        # all are larger: the smallest; half is never passed
        ([10, 10], 4, 10),
        ([10, 9], 6, 9),
        ([12, 1], 6, 1),
        ([8, 8, 2], 7, 2),
        ([7], 3, 0),
    ],
)
def test_whole_groups_as_many_as_fit(sizes, n, wanted):
    keys = np.repeat(some_keys(len(sizes)), sizes)
    assert {int(held_out(keys, n, seed).sum()) for seed in range(20)} == {wanted}


def test_no_key_is_on_both_sides():
    keys = some_keys(1000)[np.random.default_rng(1).integers(0, 1000, 3000)]  # about three of each
    out = held_out(keys, 300, 1)
    assert out.sum() == 300
    assert not set(keys[out].tolist()) & set(keys[~out].tolist())


def test_the_choice_depends_on_keys_and_seed_only():
    keys = some_keys(1000)
    out = held_out(keys, 64, 1)
    assert (held_out(list(map(int, keys)), 64, 1) == out).all()  # a list will do
    shuffled = np.random.default_rng(2).permutation(1000)
    assert (held_out(keys[shuffled], 64, 1) == out[shuffled]).all()
    others = [set(keys[held_out(keys, 64, seed)].tolist()) for seed in range(5)]
    assert all(
        len(a & b) < 20 for i, a in enumerate(others) for b in others[:i]
    )  # by chance: 64 * 64 / 1000 = 4
    more = held_out(np.concatenate([keys, some_keys(100, seed=9)]), 64, 1)[:1000]
    assert (more & out).sum() > 48  # 100 more recipes push few of the 64 out (by chance 6)
    counts = np.sum([held_out(keys[:100], 10, seed) for seed in range(200)], axis=0)
    assert 5 <= counts.min() and counts.max() <= 50  # each about 20 times


# ---- real data ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not PUBLIC.exists(), reason="the public recipes are not here")
def test_the_public_recipes_are_read_to_the_last_row():
    account = Account()
    list(clean([PUBLIC], Rules(), account, 0))
    assert (account.read, account.bad) == (54_888, 0)
    assert account.read == account.kept + sum(account.dropped.values())
    assert account.kept > 50_000


# ---- names, and what is rare ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "item, wanted",
    [
        ("2 cups (packed) Brown Sugar", "brown sugar"),
        ("1 lb. ripe tomatoes, peeled and diced", "ripe tomato"),
        ("3 large eggs", "egg"),
        ("½ cup of blueberries", "blueberry"),
        ("1 (8 oz.) pkg. cream cheese", "cream cheese"),
        ("2 peaches; sliced", "peach"),
        ("2 glasses water", "glasses water"),
        ("1 bunch asparagus", "asparagus"),
        ("salt - to taste", "salt"),
        ("500 g rice [long", "rice"),
        ("cheese", "cheese"),
        ("2 cups", ""),
        ("", ""),
        ("1/2 TSP. freshly grated NUTMEG", "nutmeg"),
        ("potatoes", "potato"),
        ("radishes", "radish"),
        ("1 cress", "cress"),
    ],
)
def test_the_name_of_an_ingredient(item, wanted):
    assert name_of(item) == wanted


def test_names_come_from_the_ner_column_where_it_is():
    assert names(Recipe("T", ["2 cups flour", "1 egg"], [], ["Eggs"])) == ["egg"]
    assert names(Recipe("T", ["2 cups flour", "1"], [])) == ["flour"]


def test_what_is_rare_is_a_share_of_all_and_the_rule_is_off_below_50_000():
    often, seldom = ["salt", "salt"], ["salt", "yak"]
    found = [often] * 49_998 + [seldom] * 2
    assert common(found, Rules(min_share=5e-5)) == {"salt"} and common(
        found, Rules(min_share=4e-5)
    ) == {"salt", "yak"}
    assert common(found[1:], Rules(min_share=0.5)) is None
    made = [Recipe("T", [f"1 {x}", "2 salt"], ["Stir salt.", f"Eat {x}."]) for x in ("yak", "salt")]
    got, account = cleaned(made, LOOSE, common={"salt"})
    assert got == made[1:]
    assert account.dropped["rare_ingredient"] == 1
    assert account.examples["rare_ingredient"] == ["T: 'yak'"]
    assert cleaned(made, LOOSE)[0] == made


def test_what_is_like_a_held_out_recipe_is_dropped_and_that_one_is_not_counted():
    words = [f"word{n}" for n in range(40)]
    one = Recipe("A", ["1 egg", "2 eggs"], [" ".join(words), "Serve."])
    like = Recipe("B", one.ingredients, [" ".join([*words[:39], "other"]), "Serve."])
    other = Recipe("C", ["1 egg", "tea"], [" ".join(words[::-1]), "Eat."])
    got, account = cleaned([like, other, one], Rules(min_words=0), held=[one])
    assert got == [other]
    assert (
        account.dropped == dict.fromkeys(RULES, 0) | {"duplicate": 1, "near_duplicate": 1}
        and account.kept == 1
    )


# ---- large files, in several processes ------------------------------------------------------------------------------


def itself(recipe, where):
    """A job that changes nothing."""
    return recipe


def stop_at_ten(recipe, where):
    if recipe.title == "10":
        os._exit(1)
    return recipe


@pytest.fixture
def three_thousand(tmp_path):
    rows = [ROW | {"title": str(n)} for n in range(3456)]
    return put(tmp_path / "a.jsonl", jsonl(*rows[:7]) + "no\n" + jsonl(*rows[7:]))


def test_several_processes_give_what_one_gives_in_its_order(three_thousand, monkeypatch):
    monkeypatch.setattr(recipes, "count_processes", lambda: 3)
    got = [made for some in recipes.in_processes(itself, [three_thousand]) for made in some]
    alone = [made for some in recipes.in_this_process(itself, [three_thousand]) for made in some]
    assert list(map(str, got)) == list(map(str, alone))
    assert str(got[7]).startswith(f"{three_thousand}:8: ") and len(got) == 3457
    assert [r.title for r in got if isinstance(r, Recipe)] == [str(n) for n in range(3456)]


def test_large_files_are_cleaned_by_several_processes_to_the_same_account(
    three_thousand, monkeypatch
):
    accounts = []
    for large in (2**30, 10):
        monkeypatch.setattr(sources, "LARGE", large)
        accounts.append(Account())
        kept = [judged.key for judged in clean([three_thousand], LOOSE, accounts[-1])]
        assert len(kept) == accounts[-1].kept == 1  # all but the title is the same
    assert accounts[0] == accounts[1] and accounts[0].bad == 1


def test_bad_rows_leave_no_cycle_that_holds_their_list():
    """Worker processes hardly ever look for cycles: one with a traceback in it would hold a thousand rows for good."""
    bad = [sources.BadRow("an empty line"), {"title": 1}, {"messages": []}, {"text": "\ud800"}]
    rows = [(Path("a.jsonl"), n, row) for n, row in enumerate(bad)]
    gc.collect()
    gc.disable()
    try:
        made = recipes.make(itself, rows)
        assert gc.collect() == 0
    finally:
        gc.enable()
    assert [type(one) for one in made] == [sources.BadRow] * 4


def no_memory_at_ten(recipe, where):
    if recipe.title == "10":
        raise MemoryError
    return recipe


@pytest.mark.parametrize("job", [stop_at_ten, no_memory_at_ten])
def test_a_process_that_is_killed_is_a_sentence(three_thousand, job, capfd):
    with pytest.raises(UserError, match="was killed or ran out of memory"):
        list(recipes.in_processes(job, [three_thousand]))
    assert "Traceback" not in capfd.readouterr().err


def test_a_file_that_is_cut_off_is_the_same_sentence_from_several_processes(
    tmp_path, three_thousand
):
    path = put(tmp_path / "a.jsonl.gz", gzip.compress(three_thousand.read_bytes())[:-40])
    with pytest.raises(UserError, match="cannot be read to its end"):
        list(recipes.in_processes(itself, [path]))


def test_no_process_stays_when_the_main_one_is_killed(tmp_path, three_thousand):
    three_thousand.write_bytes(three_thousand.read_bytes() * 40)
    script = (
        "import pathlib, sys, time; sys.path.insert(0, sys.argv[1]); import recipes\n"
        "parts = recipes.in_processes(recipes.names, [pathlib.Path(sys.argv[2])])\n"
        "for _ in parts: time.sleep(print('on', flush=True) or 9)"
    )
    call = [sys.executable, "-c", script, str(Path(recipes.__file__).parent), str(three_thousand)]
    main = subprocess.Popen(call, stdout=subprocess.PIPE, text=True)
    assert main.stdout.readline() == "on\n"
    mine = Path(f"/proc/{main.pid}/task/{main.pid}/children")
    if not mine.exists():
        pytest.skip("no list of children without Linux's /proc")
    children = mine.read_text().split()
    assert len(children) >= 1
    main.kill()
    main.wait()
    deadline = time.time() + 20
    while any(
        Path(f"/proc/{c}/cmdline").exists() and Path(f"/proc/{c}/cmdline").read_bytes()
        for c in children
    ):
        assert time.time() < deadline, children
        time.sleep(0.1)


# ---- chats ----------------------------------------------------------------------------------------------------------

TURN = {"role": "assistant", "content": "Yes."}


def test_a_chat_is_a_row(tmp_path):
    chat = [{"role": "user", "content": "Pie?", "name": "x"}, TURN]
    (one,), account = read_recipes(
        put(tmp_path / "a.jsonl", jsonl({"messages": chat, "prompt": "p"}))
    )
    assert one.chat.messages == chat and account.bad == 0 and account.unused == {"prompt": 1}
    assert one.completion == "user: Pie?\n\nassistant: Yes."
    sources.save(map(recipes.row_of, [one, TEA]), tmp_path / "b.jsonl.gz")
    assert read_recipes(tmp_path / "b.jsonl.gz")[0] == [one, TEA]


@pytest.mark.parametrize(
    "messages, why",
    [
        ([{"role": "cook", "content": "x"}, TURN], "unknown role 'cook'"),
        ([], "no turn of the assistant"),
        ([{"role": "user", "content": "x"}], "no turn of the assistant"),
        ("x", "no list of objects"),
        (["x"], "no list"),
        ([{"role": "user", "content": None}, TURN], "`content`"),
        ([{"content": "x"}, TURN], "`role` is missing"),
    ],
)
def test_a_chat_that_is_none_is_a_bad_row(tmp_path, messages, why):
    got, account = read_recipes(put(tmp_path / "a.jsonl", jsonl({"messages": messages})))
    assert got == [] and account.bad == 1 and why in account.bad_examples[0]


def test_a_name_is_that_of_the_repaired_ingredient():
    """The first pass counts what the file has, the second asks after what is repaired."""
    for item in ("2 cups&nbsp;sugar", "<b>2 cups sugar</b>", "&frac12; cup sugar"):
        raw = Recipe("Pie", [item], ["Stir."])
        assert recipes.names(raw) == recipes.names(recipes.repair(raw)) == ["sugar"]


def test_a_held_recipe_of_rare_ingredients_still_has_no_duplicate_in_training():
    steps = [
        "Beat it well in the large bowl until it is quite smooth, then let it stand for a night in a cold place.",
        "Bake it for an hour in a slow oven, cut it into thin slices and serve them warm with some sauce.",
    ]
    held, copy = Recipe("a", ["1 egg", "2 yak"], steps), Recipe("b", ["1 egg", "2 tea"], steps)
    left, _ = cleaned([copy], Rules(min_words=0), common={"egg", "tea"}, held=[held])
    assert left == []


def test_a_process_killed_while_it_sends_is_one_sentence(three_thousand, tmp_path):
    """Its last message is cut off: OSError, not EOFError."""
    import multiprocessing

    rows = [json.dumps({"text": f"{i} " + "word " * 3000}) for i in range(9000)]
    (file := tmp_path / "long.jsonl").write_text("\n".join(rows))
    parts = recipes.in_processes(itself, [file])
    next(parts)
    for process in multiprocessing.active_children():
        process.kill()
    with pytest.raises(UserError, match="killed"):
        list(parts)


def test_columns_of_a_csv_that_are_not_used_are_named(tmp_path):
    header = [
        "",
        "title",
        "ingredients",
        "directions",
        "link",
        "source",
        "NER",
        "rating",
        "cuisine",
    ]
    cells = ["0", "Tea", '["water"]', '["Boil."]', "x", "y", "", "5", "none"]
    lines = "\n".join(
        ",".join(f'"{c.replace(chr(34), chr(34) * 2)}"' for c in r) for r in (header, cells, cells)
    )
    (one, _), account = read_recipes(put(tmp_path / "a.csv", lines))
    assert one.title == "Tea" and account.unused == {"rating": 2, "cuisine": 2}
    with pytest.raises(UserError, match="the column title twice"):
        read_recipes(put(tmp_path / "b.csv", lines.replace("rating", "title", 1)))
