"""recipes.py: what is read, what is refused, what is repaired, what is dropped, and what is held out."""

import csv
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import recipenlg

import recipes
from cli import UserError, helps
from recipes import (
    RULES,
    Account,
    Heap,
    Near,
    Recipe,
    Rules,
    clean,
    common,
    held_out,
    judge,
    key,
    names,
    read,
    repair,
    save,
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


def put(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(*rows, header=("", "title", "ingredients", "directions", "link", "source", "NER")):
    """RecipeNLG's CSV, by Python's writer."""
    out = io.StringIO()
    csv.writer(out).writerows([header, *rows])
    return out.getvalue()


def line(n, title, ingredients, directions):
    return [
        n,
        title,
        json.dumps(ingredients),
        json.dumps(directions),
        "www.x.org/1",
        "Gathered",
        '["flour"]',
    ]


def heap(path, allow_bad=1.0):
    account = Account()
    return list(read([path], account, allow_bad)), account


def cleaned(recipes, rules=LOOSE):
    account = Account()
    return list(clean(iter(recipes), rules, account)), account


# ---- the text -------------------------------------------------------------------------------------------------------


def test_the_text_of_a_recipe():
    assert BREAD.text() == (BREAD_PROMPT, BREAD_COMPLETION)


def test_the_text_of_what_is_no_recipe():
    assert Recipe(prompt="a\n", completion=" b\n").text() == ("a\n", " b\n")


# ---- formats --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.csv.gz", "a.json", "a.json.gz", "A.CSV.GZ"]
)
def test_every_format_gives_the_same_recipe(tmp_path, name):
    kind = name.lower().removesuffix(".gz")
    content = {
        "a.jsonl": json.dumps(ROW) + "\n",
        "a.csv": table(line(0, **ROW)),
        "a.json": json.dumps([ROW]),
    }[kind].encode()
    got, account = heap(
        put(tmp_path / name, gzip.compress(content) if name.lower().endswith(".gz") else content), 0
    )
    assert got == [TEA]
    assert (account.read, account.bad) == (1, 0)


def test_the_wikibooks_json(tmp_path):
    page = {
        "title": "Tea",
        "category": None,
        "servings": "2",
        "time": None,
        "difficulty": None,
        "ingredients": ["water", "tea"],
        "steps": ["Boil.", "Pour."],
    }
    got, _ = heap(
        put(tmp_path / "a.json", json.dumps({"Cookbook:Tea": page, "Cookbook:Tea 2": page}))
    )
    assert got == [TEA, TEA]


def test_rows_that_are_no_recipe_are_left_as_they_are(tmp_path):
    rows = [
        {"text": "  a\n\n&amp; b "},
        {"prompt": "Q: ", "completion": " 1.  x\n"},
        {"title": "T", "text": "page"},
    ]
    got, _ = heap(put(tmp_path / "a.jsonl", jsonl(*rows)))
    assert [r.text() for r in got] == [("", "  a\n\n&amp; b "), ("Q: ", " 1.  x\n"), ("", "page")]
    assert [r.text() for r in cleaned(got)[0]] == [r.text() for r in got]


def test_several_files_are_one_heap(tmp_path):
    a, b = (
        put(tmp_path / "a.jsonl", jsonl(ROW)),
        put(tmp_path / "b.json", json.dumps([ROW | {"title": "B"}])),
    )
    account = Account()
    assert [r.title for r in read([a, str(b)], account)] == ["Tea", "B"]
    assert account.read == 2


def test_a_line_ends_at_a_newline_and_nowhere_else(tmp_path):
    row = json.dumps(ROW | {"title": "a\u2028b\x85c"}, ensure_ascii=False)
    got, account = heap(
        put(tmp_path / "a.jsonl", row + "\r\n" + json.dumps(ROW))
    )  # mixed ends, none behind the last
    assert [r.title for r in got] == ["a\u2028b\x85c", "Tea"]
    assert account.bad == 0


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", jsonl(ROW)),
        ("a.json", json.dumps([ROW])),
        (
            "a.csv",
            table(
                ["Tea", '["water", "tea"]', '["Boil.", "Pour."]'],
                header=("title", "ingredients", "directions"),
            ),
        ),
    ],
)
def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path, name, content):
    assert heap(put(tmp_path / name, b"\xef\xbb\xbf" + content.encode()))[0] == [TEA]


def test_csv_with_newlines_quotes_and_a_huge_field(tmp_path):
    title, step = 'The "best", ever\r\npie', 'Say "oh",\nthen\u2028bake.'
    content = table(
        line(0, title, ["a", "b"], [step]),
        line(1, "Big", ["x" * 5_000_000], ["y"]),
        line(2, "Z", ["a"], "y"),
    )
    got, account = heap(put(tmp_path / "a.csv", content))
    assert got[0] == Recipe(title, ["a", "b"], [step])
    assert len(got[1].ingredients[0]) == 5_000_000
    assert account.bad_examples[0].startswith(
        f"{tmp_path}/a.csv:5: `directions`"
    )  # header, a row of 2 lines, a row


def test_csv_keeps_the_rows_around_a_stray_quote(tmp_path):
    good = table(line(1, **ROW)).split("\r\n", 1)[1]
    header = table()
    got, account = heap(
        put(tmp_path / "a.csv", header + good + '2,"open,[],[],l,s,n\r\n' + good * 3)
    )
    assert (
        account.bad == 1
    )  # the open quote swallows the next row up to that row's first quote, and no more
    assert got == [TEA, TEA, TEA]


# ---- bad rows -------------------------------------------------------------------------------------------------------


def changed(**fields):
    return json.dumps(ROW | fields)


BAD_LINES = {
    "no JSON": ("{'title': 1}", "no JSON"),
    "half an object": ('{"title": "Te', "no JSON"),
    "an empty line": ("", "empty"),
    "white space": (" \t", "empty"),
    "a list": ("[1]", "no JSON object"),
    "null": ("null", "no JSON object"),
    "a number": ("3", "no JSON object"),
    "no known field": ('{"name": "x"}', "neither"),
    "title missing": ('{"ingredients": ["a"], "directions": ["b"]}', "`title` is missing"),
    "ingredients missing": ('{"title": "x", "directions": ["b"]}', "`ingredients` is missing"),
    "directions missing": ('{"title": "x", "ingredients": ["b"]}', "`directions` is missing"),
    "prompt missing": ('{"completion": "x"}', "`prompt` is missing"),
    "title null": (changed(title=None), "`title`"),
    "title a number": (changed(title=3), "`title`"),
    "title a list": (changed(title=["x"]), "`title`"),
    "ingredients null": (changed(ingredients=None), "`ingredients`"),
    "ingredients a text": (changed(ingredients="flour"), "`ingredients`"),
    "ingredients an object": (changed(ingredients={"flour": 1}), "`ingredients`"),
    "a null ingredient": (changed(ingredients=["flour", None]), "`ingredients`"),
    "a number among the steps": (changed(directions=["Boil.", 2]), "`directions`"),
    "a list among the steps": (changed(directions=[["Boil."]]), "`directions`"),
    "text null": ('{"text": null}', "`text`"),
    "text a list": ('{"text": ["a"]}', "`text`"),
    "completion a number": ('{"prompt": "a", "completion": 1}', "`completion`"),
    "prompt null": ('{"prompt": null, "completion": "a"}', "`prompt`"),
    "invalid UTF-8": (b'{"title": "\xff", "ingredients": [], "directions": []}', "UTF-8"),
    "a lone surrogate in the title": (
        r'{"title": "\ud800", "ingredients": [], "directions": []}',
        "surrogate",
    ),
    "a lone surrogate in a step": (
        r'{"title": "x", "ingredients": [], "directions": ["\udc00"]}',
        "surrogate",
    ),
    "a lone surrogate in a text": (r'{"text": "a \ud83c b"}', "surrogate"),
    "a thousand brackets": ("[" * 100_000, "recursion"),
    "seven hundred brackets, closed": ("[" * 700 + "]" * 700, ""),
    "a number of 5,000 digits": ('{"text": ' + "1" * 5000 + "}", ""),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_counted_and_shown_with_its_number(tmp_path, name):
    bad, why = BAD_LINES[name]
    good = jsonl(ROW).encode()
    bad = bad if isinstance(bad, bytes) else bad.encode()
    got, account = heap(put(tmp_path / "a.jsonl", good + bad + b"\n" + good))
    assert got == [TEA, TEA]  # the rows around it are whole
    assert (account.read, account.bad) == (2, 1)
    assert (
        account.bad_examples[0].startswith(f"{tmp_path}/a.jsonl:2: ")
        and why in account.bad_examples[0]
    )
    account.bad_examples[0].encode()  # it can be printed
    with pytest.raises(UserError, match="--allow_bad"):
        heap(tmp_path / "a.jsonl", 0.01)


BAD_CELLS = {
    "broken JSON": ([1, "x", "['a']", '["b"]', "", "", ""], "`ingredients` is no JSON"),
    "an empty cell": ([1, "x", '["a"]', "", "", "", ""], "`directions` is no JSON"),
    "no list": ([1, "x", '"a"', '["b"]', "", "", ""], "`ingredients` is no list"),
    "a null in a list": ([1, "x", '["a"]', '["b", null]', "", "", ""], "`directions` is no list"),
    "a lone surrogate": ([1, "x", r'["\ud800"]', '["b"]', "", "", ""], "surrogate"),
    "too few cells": ([1, "x", '["a"]'], "3 cells under 7 columns"),
    "too many cells": ([1, "x", '["a"]', '["b"]', "", "", "", ""], "8 cells under 7 columns"),
    "an empty line": ([], "empty"),
}


@pytest.mark.parametrize("name", BAD_CELLS)
def test_a_bad_csv_row_is_counted_and_shown_with_its_number(tmp_path, name):
    row, why = BAD_CELLS[name]
    good = line(0, **ROW)
    got, account = heap(put(tmp_path / "a.csv", table(good, row, good)))
    assert got == [TEA, TEA]
    assert (account.read, account.bad) == (2, 1)
    assert (
        account.bad_examples[0].startswith(f"{tmp_path}/a.csv:3: ")
        and why in account.bad_examples[0]
    )


@pytest.mark.parametrize("old", [b"Bad", b"salt", b"Stir"])
def test_a_csv_row_that_is_no_utf8_spoils_only_itself(tmp_path, old):
    good = line(0, **ROW)
    content = (
        table(good, line(1, "Bad", ["salt"], ["Stir"]), good).encode().replace(old, b"\xe9\xff")
    )
    got, account = heap(put(tmp_path / "a.csv", content))
    assert got == [TEA, TEA]
    assert "a.csv:3: " in account.bad_examples[0] and "UTF-8" in account.bad_examples[0]


def test_bad_entries_of_a_json_file_are_counted(tmp_path):
    got, account = heap(put(tmp_path / "a.json", json.dumps([ROW, None, ROW | {"title": 1}])))
    assert got == [TEA]
    assert account.bad == 2
    assert account.bad_examples[0].startswith(f"{tmp_path}/a.json:2: ")


def test_the_first_three_bad_rows_are_shown_and_all_are_counted(tmp_path):
    path = put(tmp_path / "a.jsonl", "1\n" + jsonl(ROW) + "2\n3\n4\n5\n")
    with pytest.raises(UserError) as e:
        heap(path, 0.5)
    message = str(e.value)
    assert "5 of 6 rows (83.3%)" in message and "--allow_bad" in message
    assert all(f"a.jsonl:{n}: " in message for n in (1, 3, 4)) and "a.jsonl:5" not in message


def test_the_share_of_bad_rows_that_is_allowed(tmp_path):
    path = put(tmp_path / "a.jsonl", jsonl(*[ROW] * 99) + "\n")  # 1 of 100: an empty line
    assert heap(path, 0.01)[1].bad == 1  # as many as allowed
    with pytest.raises(UserError, match="1 of 100 rows"):
        heap(path, 0.009)
    rows = read([path], Account(), 0)
    assert (
        len([next(rows) for _ in range(99)]) == 99
    )  # the good rows come first, the verdict at the end
    with pytest.raises(UserError):
        next(rows)


# ---- files that cannot be a heap ------------------------------------------------------------------------------------

GZ = gzip.compress(jsonl(*[ROW | {"title": str(n)} for n in range(2000)]).encode())
BAD_FILES = {
    "gzip cut off": ("a.jsonl.gz", GZ[: len(GZ) // 2], "cut off"),
    "gzip without its tail": ("a.jsonl.gz", GZ[:-4], "cut off"),
    "gzip with bad bytes": (
        "a.jsonl.gz",
        GZ[: len(GZ) // 2] + b"\xff\0\xff\0" + GZ[len(GZ) // 2 + 4 :],
        "to its end",
    ),
    "gzip of no blocks": ("a.jsonl.gz", GZ[:10] + b"\xff" * 99, "to its end"),
    "no gzip": ("a.jsonl.gz", jsonl(ROW), "[Nn]ot a gzipped file"),
    "csv.gz cut off": (
        "a.csv.gz",
        gzip.compress(table(line(0, "Tea", ["a"], ["b"])).encode())[:-9],
        "cut off",
    ),
    "broken json": ("a.json", '[{"title": "a"},\n nonsense]', "broken JSON.*line 2"),
    "json that is no utf-8": ("a.json", b'["\xff"]', "broken JSON"),
    "json that is a number": ("a.json", "3", "1 of 1 rows"),
    "an empty jsonl": ("a.jsonl", "", "no row"),
    "an empty json": ("a.json", "[]", "no row"),
    "a csv of a header": ("a.csv", table(), "no row"),
    "an empty csv": ("a.csv", "", "lacks the columns title, ingredients, directions"),
    "csv without directions": (
        "a.csv",
        "title,ingredients,steps\n",
        "lacks the columns directions.*'steps'",
    ),
    "csv of another kind": (
        "a.csv",
        "name;what\n\xff;2\n".encode("latin-1"),
        "lacks the columns title.*name;what",
    ),
    "an unknown ending": ("a.txt", "Tea", r"\.json, \.jsonl, \.csv"),
    "an unknown ending under gz": ("a.parquet.gz", "Tea", r"\.json, \.jsonl, \.csv"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_a_sentence(tmp_path, name):
    file, content, message = BAD_FILES[name]
    with pytest.raises(UserError, match=f"(?s){message}") as e:
        heap(put(tmp_path / file, content), 0.01)
    assert str(tmp_path / file) in str(e.value)


@pytest.mark.parametrize(
    "name, message", [("folder", r"folder.*\.jsonl"), ("none.jsonl", "does not exist")]
)
def test_no_file_is_a_sentence_before_the_first_row(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    good = put(tmp_path / "a.jsonl", jsonl(ROW))
    with pytest.raises(UserError, match=message):
        next(read([good, tmp_path / name], Account()))


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
    return set(zip(words, words[1:], words[2:]))


def test_near_duplicates_are_those_of_a_slow_loop():
    """2,000 recipes of made-up words, half of them an earlier one with some words changed: of pairs that share 0.8 of
    their word triples at least 95 % are found, and nothing is dropped that shares less with all that stays."""
    rng = np.random.default_rng(3)
    heap = []
    for i in range(2000):
        words = [f"word{n}" for n in rng.integers(0, 3000, 80)]
        if i % 2:
            words = heap[int(rng.integers(0, len(heap)))].directions[0].split()
            for at in rng.integers(0, 80, rng.integers(1, 9)):
                words[at] = words[at] + "x"
        heap.append(Recipe(f"T{i}", ["a b", "c d"], [" ".join(words), "Serve."]))
    got, account = cleaned(heap, Rules(min_words=0, min_mentioned=0))
    stays, should = {r.title for r in got}, 0
    seen = []
    for r in heap:
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
    rng, near = np.random.default_rng(4), Near()
    sets = [np.unique(rng.integers(0, 2**32, 90, dtype=np.uint32)) for _ in range(1020)]
    assert not any(near.find(s.tobytes(), Near.banded(s), 0.8) for s in sets)
    found = 0
    for s in sets[:400]:
        copy = np.concatenate(
            [s[: len(s) - 10], rng.integers(0, 2**32, 10, dtype=np.uint32)]
        )  # 80 of 100: J = 0.8
        same = near.find(np.unique(copy).tobytes(), Near.banded(np.unique(copy)), 0.75)
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
    known = common(read([path], Account(), 0.1, names), rules)
    kept = list(
        clean(read([path], account, 0.1, partial(judge, Heap(rules, known))), rules, account)
    )
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
    got = list(
        clean(
            read([put(tmp_path / "a.jsonl", jsonl(*rows) + "no\n")], account, 0.5), LOOSE, account
        )
    )
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
            yield Recipe("T", ["a", "b"], ["c", str(n)])

    rows = clean(endless(), LOOSE, Account())
    assert [next(rows).directions[1] for _ in range(3)] == ["1", "2", "3"]


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


def test_the_choice_hangs_on_keys_and_seed_only():
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
    list(clean(read([PUBLIC], account, 0), Rules(), account))
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


def test_what_is_rare_is_a_share_of_the_heap_and_the_rule_is_off_below_50_000():
    often, seldom = ["salt", "salt"], ["salt", "yak"]
    heap = [often] * 49_998 + [seldom] * 2
    assert common(heap, Rules(min_share=5e-5)) == {"salt"} and common(
        heap, Rules(min_share=4e-5)
    ) == {"salt", "yak"}
    assert common(heap[1:], Rules(min_share=0.5)) is None
    account = Account()
    made = [Recipe("T", [f"1 {x}", "2 salt"], ["Stir salt.", f"Eat {x}."]) for x in ("yak", "salt")]
    assert list(clean(made, LOOSE, account, {"salt"})) == made[1:]
    assert account.dropped["rare_ingredient"] == 1 and account.examples["rare_ingredient"] == [
        "T: 'yak'"
    ]
    assert list(clean(made, LOOSE, Account())) == made


def test_what_is_like_a_held_out_recipe_is_dropped_and_that_one_is_not_counted():
    words = [f"word{n}" for n in range(40)]
    one = Recipe("A", ["1 egg", "2 eggs"], [" ".join(words), "Serve."])
    like = Recipe("B", one.ingredients, [" ".join([*words[:39], "other"]), "Serve."])
    other = Recipe("C", ["1 egg", "tea"], [" ".join(words[::-1]), "Eat."])
    account, rules = Account(), Rules(min_words=0)
    assert list(clean([like, other, one], rules, account, held=[one])) == [other]
    assert (
        account.dropped == dict.fromkeys(RULES, 0) | {"duplicate": 1, "near_duplicate": 1}
        and account.kept == 1
    )


# ---- a large heap, in several processes -----------------------------------------------------------------------------


def stop_at_ten(recipe):
    if recipe.title == "10":
        os._exit(1)
    return recipe


@pytest.fixture
def three_thousand(tmp_path):
    rows = [ROW | {"title": str(n)} for n in range(3456)]
    return put(tmp_path / "a.jsonl", jsonl(*rows[:7]) + "no\n" + jsonl(*rows[7:]))


def test_several_processes_give_what_one_gives_in_its_order(three_thousand):
    got = [row for rows in recipes._spread(None, [(three_thousand, ".jsonl")]) for row in rows]
    assert [str(r) if isinstance(r, recipes.BadRow) else r for r in got[:9]] == [
        str(r) if isinstance(r, recipes.BadRow) else r
        for r in list(itertools.chain(*recipes._parse(None, [(three_thousand, ".jsonl")])))[:9]
    ]
    assert [r.title for r in got if isinstance(r, Recipe)] == [str(n) for n in range(3456)] and len(
        got
    ) == 3457


def test_a_process_that_is_killed_is_a_sentence(three_thousand):
    with pytest.raises(UserError, match="was killed"):
        list(recipes._spread(stop_at_ten, [(three_thousand, ".jsonl")]))


def test_a_file_that_is_cut_off_is_the_same_sentence_from_several_processes(
    tmp_path, three_thousand
):
    path = put(tmp_path / "a.jsonl.gz", gzip.compress(three_thousand.read_bytes())[:-40])
    with pytest.raises(UserError, match="cannot be read to its end"):
        list(recipes._spread(None, [(path, ".jsonl")]))


def test_no_process_stays_when_the_main_one_is_killed(tmp_path, three_thousand):
    three_thousand.write_bytes(three_thousand.read_bytes() * 40)
    script = (
        "import pathlib, sys, time; sys.path.insert(0, sys.argv[1]); import recipes\n"
        "parts = recipes._spread(None, [(pathlib.Path(sys.argv[2]), '.jsonl')])\n"
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
    (one,), account = heap(put(tmp_path / "a.jsonl", jsonl({"messages": chat, "prompt": "p"})))
    assert one.messages == [{"role": "user", "content": "Pie?"}, TURN] and account.bad == 0
    assert one.completion == "user: Pie?\n\nassistant: Yes."
    save([one, TEA], tmp_path / "b.jsonl.gz")
    assert heap(tmp_path / "b.jsonl.gz")[0] == [one, TEA]


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
    got, account = heap(put(tmp_path / "a.jsonl", jsonl({"messages": messages})))
    assert got == [] and account.bad == 1 and why in account.bad_examples[0]


def test_a_name_is_that_of_the_repaired_ingredient():
    """The first pass counts what the file has, the second asks after what is repaired."""
    for item in ("2 cups&nbsp;sugar", "<b>2 cups sugar</b>", "&frac12; cup sugar"):
        raw = Recipe("Pie", [item], ["Stir."])
        assert recipes.names(raw) == recipes.names(recipes.repair(raw)) == ["sugar"]


def test_a_held_recipe_of_rare_ingredients_still_has_no_double_in_training():
    steps = [
        "Beat it well in the large bowl until it is quite smooth, then let it stand for a night in a cold place.",
        "Bake it for an hour in a slow oven, cut it into thin slices and serve them warm with some sauce.",
    ]
    held, copy = Recipe("a", ["1 egg", "2 yak"], steps), Recipe("b", ["1 egg", "2 tea"], steps)
    left = recipes.clean([copy], Rules(min_words=0), recipes.Account(), {"egg", "tea"}, [held])
    assert not list(left)


def test_a_process_killed_while_it_sends_is_one_sentence(three_thousand, tmp_path):
    """Its last message is cut off: OSError, not EOFError."""
    import multiprocessing

    rows = [json.dumps({"text": f"{i} " + "word " * 3000}) for i in range(9000)]
    (file := tmp_path / "long.jsonl").write_text("\n".join(rows))
    parts = recipes._spread(None, [(file, ".jsonl")])
    next(parts)
    for process in multiprocessing.active_children():
        process.kill()
    with pytest.raises(UserError, match="killed"):
        list(parts)
