"""files/sources.py: which rows the formats give, which rows are bad, and which files are refused."""

from cli import UserError

import csv
import gzip
import io
import json
import tracemalloc

import pytest
from conftest import jsonl, put, read_recipes

from files import sources
from files.sources import BadRow
from recipes import Account, Recipe, Rules, clean

ROW = {"title": "Tea", "ingredients": ["water", "tea"], "directions": ["Boil.", "Pour."]}
TEA = Recipe("Tea", ["water", "tea"], ["Boil.", "Pour."])


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
    got, account = read_recipes(
        put(tmp_path / name, gzip.compress(content) if name.lower().endswith(".gz") else content),
        allow_bad=0,
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
    got, _ = read_recipes(
        put(tmp_path / "a.json", json.dumps({"Cookbook:Tea": page, "Cookbook:Tea 2": page}))
    )
    assert got == [TEA, TEA]


def test_rows_that_are_no_recipe_are_left_as_they_are(tmp_path):
    rows = [
        {"text": "  a\n\n&amp; b "},
        {"prompt": "Q: ", "completion": " 1.  x\n"},
        {"title": "T", "text": "page"},
    ]
    got, _ = read_recipes(put(tmp_path / "a.jsonl", jsonl(*rows)))
    assert [r.text() for r in got] == [("", "  a\n\n&amp; b "), ("Q: ", " 1.  x\n"), ("", "page")]
    kept = clean([tmp_path / "a.jsonl"], Rules(min_words=0), Account())
    assert [(judged.prompt, judged.completion) for judged in kept] == [r.text() for r in got]


def test_several_files_are_read_as_one(tmp_path):
    a, b = (
        put(tmp_path / "a.jsonl", jsonl(ROW)),
        put(tmp_path / "b.json", json.dumps([ROW | {"title": "B"}])),
    )
    got, account = read_recipes(a, str(b))
    assert [r.title for r in got] == ["Tea", "B"]
    assert account.read == 2


def test_a_line_ends_at_a_newline_and_nowhere_else(tmp_path):
    row = json.dumps(ROW | {"title": "a\u2028b\x85c"}, ensure_ascii=False)
    got, account = read_recipes(
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
    assert read_recipes(put(tmp_path / name, b"\xef\xbb\xbf" + content.encode()))[0] == [TEA]


def test_csv_with_newlines_quotes_and_a_huge_field(tmp_path):
    title, step = 'The "best", ever\r\npie', 'Say "oh",\nthen\u2028bake.'
    content = table(
        line(0, title, ["a", "b"], [step]),
        line(1, "Big", ["x" * 5_000_000], ["y"]),
        line(2, "Z", ["a"], "y"),
    )
    got, account = read_recipes(put(tmp_path / "a.csv", content))
    assert got[0] == Recipe(title, ["a", "b"], [step])
    assert len(got[1].ingredients[0]) == 5_000_000
    assert account.bad_examples[0].startswith(
        f"{tmp_path}/a.csv:5: `directions`"
    )  # header, a row of 2 lines, a row


def test_csv_keeps_the_rows_around_a_stray_quote(tmp_path):
    good = table(line(1, **ROW)).split("\r\n", 1)[1]
    header = table()
    got, account = read_recipes(
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
    got, account = read_recipes(put(tmp_path / "a.jsonl", good + bad + b"\n" + good))
    assert got == [TEA, TEA]  # the rows around it are whole
    assert (account.read, account.bad) == (2, 1)
    assert (
        account.bad_examples[0].startswith(f"{tmp_path}/a.jsonl:2: ")
        and why in account.bad_examples[0]
    )
    account.bad_examples[0].encode()  # it can be printed
    with pytest.raises(UserError, match="--allow_bad"):
        read_recipes(tmp_path / "a.jsonl", allow_bad=0.01)


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
    got, account = read_recipes(put(tmp_path / "a.csv", table(good, row, good)))
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
    got, account = read_recipes(put(tmp_path / "a.csv", content))
    assert got == [TEA, TEA]
    assert "a.csv:3: " in account.bad_examples[0] and "UTF-8" in account.bad_examples[0]


def test_bad_entries_of_a_json_file_are_counted(tmp_path):
    got, account = read_recipes(
        put(tmp_path / "a.json", json.dumps([ROW, None, ROW | {"title": 1}]))
    )
    assert got == [TEA]
    assert account.bad == 2
    assert account.bad_examples[0].startswith(f"{tmp_path}/a.json:2: ")


def test_the_first_three_bad_rows_are_shown_and_all_are_counted(tmp_path):
    path = put(tmp_path / "a.jsonl", "1\n" + jsonl(ROW) + "2\n3\n4\n5\n")
    with pytest.raises(UserError) as e:
        read_recipes(path, allow_bad=0.5)
    message = str(e.value)
    assert "5 of 6 rows (83.3%)" in message and "--allow_bad" in message
    assert all(f"a.jsonl:{n}: " in message for n in (1, 3, 4)) and "a.jsonl:5" not in message


def test_the_share_of_bad_rows_that_is_allowed(tmp_path):
    path = put(tmp_path / "a.jsonl", "\n" + jsonl(*[ROW] * 99))  # 1 of 100: an empty line
    assert read_recipes(path, allow_bad=0.01)[1].bad == 1  # as many as allowed
    with pytest.raises(UserError, match="1 of 100 rows"):
        read_recipes(path, allow_bad=0.009)
    rows = clean([path], None, Account(), 0)
    assert (
        len([next(rows) for _ in range(99)]) == 99
    )  # the good rows come first, the verdict at the end
    with pytest.raises(UserError):
        next(rows)


# ---- files that cannot be read ------------------------------------------------------------------------------------

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
        read_recipes(put(tmp_path / file, content), allow_bad=0.01)
    assert str(tmp_path / file) in str(e.value)


@pytest.mark.parametrize(
    "name, message", [("folder", r"folder.*\.jsonl"), ("none.jsonl", "does not exist")]
)
def test_no_file_is_a_sentence_before_the_first_row(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    good = put(tmp_path / "a.jsonl", jsonl(ROW))
    with pytest.raises(UserError, match=message):
        next(clean([good, tmp_path / name], None, Account()))


# ---- one list of rows after another ---------------------------------------------------------------------------------


def test_lists_of_a_thousand_and_each_process_has_every_nth(tmp_path):
    """The n processes together have what one has; the numbers are those of the lines."""
    path = put(tmp_path / "a.jsonl", jsonl(*[{"text": str(n)} for n in range(4321)]))
    lists = list(sources.read([path]))
    assert [len(rows) for rows in lists] == [1000, 1000, 1000, 1000, 321]
    assert [row for rows in lists for row in rows][4320] == (path, 4321, {"text": "4320"})
    shares = [list(sources.read([path], rank, 3)) for rank in range(3)]
    assert [shares[0], shares[1], shares[2]] == [lists[0::3], lists[1::3], lists[2::3]]


def test_a_row_is_a_dict_or_says_why_not(tmp_path):
    path = put(tmp_path / "a.csv", table(line(0, **ROW), [1]))
    ((_, first, row), (_, second, bad)) = next(sources.read([path]))
    assert (first, row) == (2, {**ROW, "NER": ["flour"]})
    assert second == 3 and isinstance(bad, BadRow) and str(bad) == "1 cells under 7 columns"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_what_is_saved_is_read_again(tmp_path, name):
    rows = [{"text": "½ \u2028"}, {"title": "Tea"}]
    sources.save(iter(rows), tmp_path / name)
    assert [row for _, _, row in next(sources.read([tmp_path / name]))] == rows
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_several_processes_are_for_large_files_of_lines(tmp_path, monkeypatch):
    lines = put(tmp_path / "a.jsonl", jsonl(ROW))
    value = put(tmp_path / "a.json", json.dumps([ROW]))
    assert not sources.are_large([lines])
    monkeypatch.setattr(sources, "LARGE", 10)
    assert sources.are_large([lines])
    assert not sources.are_large([lines, value])


# ---- empty lines -----------------------------------------------------------------------------------------------------

LINE = json.dumps(ROW)
TABLE = table(line(0, **ROW)).removesuffix("\r\n")
ENDS = ["", "\n", "\r\n", "\n\n\n", "\n \t\r\n\r\n", "\n\f\n", "\n  ", "\n\x0b\n\n"]


@pytest.mark.parametrize("end", ENDS, ids=repr)
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "byte order mark"])
@pytest.mark.parametrize(
    "name, content",
    [("a.jsonl", LINE), ("a.jsonl.gz", LINE), ("a.csv", TABLE), ("a.csv.gz", TABLE)],
)
def test_empty_lines_at_the_end_are_no_rows(tmp_path, name, content, mark, end):
    data = (mark + content + end).encode()
    if name.endswith(".gz"):
        data = gzip.compress(data)
    got, account = read_recipes(put(tmp_path / name, data), allow_bad=0)
    assert got == [TEA]
    assert (account.read, account.bad) == (1, 0)


@pytest.mark.parametrize(
    "name, content, numbers",
    [
        ("a.jsonl", f"{LINE}\n\n \n{LINE}\n\n\n", [2, 3]),
        ("a.jsonl", f"\n{LINE}\r\n\r\n{LINE}\r\n\r\n", [1, 3]),
        ("a.csv", f"{TABLE}\r\n\r\n \r\n{TABLE.splitlines()[1]}\r\n\r\n", [3, 4]),
    ],
)
def test_empty_lines_before_a_row_stay_bad_rows_with_their_numbers(
    tmp_path, name, content, numbers
):
    path = put(tmp_path / name, content)
    got, account = read_recipes(path)
    assert got == [TEA, TEA]
    assert (account.read, account.bad) == (2, 2)
    bad = [n for rows in sources.read([path]) for _, n, row in rows if isinstance(row, BadRow)]
    assert bad == numbers


@pytest.mark.parametrize("content", ["", "\n", "\ufeff", "\ufeff\r\n", " \n\n"], ids=repr)
def test_a_file_of_empty_lines_has_no_row(tmp_path, content):
    assert list(sources.read([put(tmp_path / "a.jsonl", content)])) == []


def test_empty_lines_are_shared_out_like_other_rows(tmp_path):
    """Each process finds the end of every file itself."""
    first = put(tmp_path / "a.jsonl", f"{LINE}\n\n" * 1500 + "\n" * 700)
    second = put(tmp_path / "b.jsonl", f"{LINE}\n" * 1500 + "\n" * 700)
    lists = list(sources.read([first, second]))
    assert sum(map(len, lists)) == 1500 + 1499 + 1500
    shares = [list(sources.read([first, second], rank, 3)) for rank in range(3)]
    assert [[len(rows) for rows in share] for share in shares] == [
        [len(rows) for rows in lists[rank::3]] for rank in range(3)
    ]


# ---- what expands to more than memory holds --------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """The bounds a thousand times smaller."""
    monkeypatch.setattr(sources, "LARGEST_ROW", 2**14)
    monkeypatch.setattr(sources, "LARGEST_JSON", 2**21)
    monkeypatch.setattr(sources, "MOST_EMPTY_LINES", 1000)
    monkeypatch.setattr(sources, "BYTES_OF_A_LIST", 2**16)


CELLS = '"\n",' * 10_000
BOMBS = {
    "a long line": ("a.jsonl", b'{"text": "' + b"x" * 10**6 + b'"}\n'),
    "no newline": ("a.jsonl", b"x" * 10**6),
    "a million keys": ("a.jsonl", json.dumps(dict.fromkeys(map(str, range(10**5)))).encode()),
    "a long cell": ("a.csv", f"{TABLE}\r\n1,{'x' * 10**6},[],[],,,".encode()),
    "a cell that never ends": ("a.csv", f'{TABLE}\r\n1,"Tea\n'.encode() + b"x\n" * 10**5),
    "a row of many lines": ("a.csv", f"{TABLE}\r\n{CELLS}".encode()),
    "a long header": ("a.csv", b"title," * 10**5),
    "empty lines": ("a.jsonl", b"\n" * 10**5 + LINE.encode()),
    "empty lines at the end": ("a.jsonl", LINE.encode() + b"\n" * 10**5),
    "a long json": ("a.json", json.dumps([ROW] * 40_000).encode()),
}


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("name", BOMBS)
def test_what_expands_too_far_is_a_sentence(tmp_path, small, name, ending):
    file, content = BOMBS[name]
    if ending:
        content = gzip.compress(content)
    path = put(tmp_path / (file + ending), content)
    with pytest.raises(UserError) as e:
        list(sources.read([path]))
    assert str(path) in str(e.value) and len(str(e.value)) < 400


def test_a_json_that_gzip_makes_a_thousand_times_smaller_is_refused_before_it_is_in_memory(
    tmp_path,
):
    """100 MB of zeros: the peak stays far below."""
    path = tmp_path / "a.json.gz"
    with gzip.open(path, "wb") as out:
        for _ in range(100):
            out.write(bytes(2**20))
    tracemalloc.start()
    with pytest.raises(UserError, match="too much"):
        list(sources.read([path]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**26


def test_a_line_that_never_ends_is_refused_before_it_is_in_memory(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb") as out:
        for _ in range(200):
            out.write(b"x" * 2**20)
    tracemalloc.start()
    with pytest.raises(UserError, match="no recipe"):
        list(sources.read([path]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 * 2**20


def test_long_rows_come_in_short_lists(tmp_path, small):
    """All rows come, in order, and each process has its own."""
    rows = [{"text": str(n) + "x" * 10_000} for n in range(40)]
    path = put(tmp_path / "a.jsonl", jsonl(*rows))
    lists = list(sources.read([path]))
    assert [len(some) for some in lists] == [7] * 5 + [5]
    assert [row for some in lists for _, _, row in some] == rows
    assert list(sources.read([path], 1, 2)) == lists[1::2]


def test_rows_as_long_as_people_have_them_are_read(tmp_path):
    rows = [ROW, {"text": "x" * 10_000_000}, ROW]
    got, account = read_recipes(put(tmp_path / "a.jsonl.gz", gzip.compress(jsonl(*rows).encode())))
    assert len(got) == 3 and account.bad == 0
