"""The heap: read recipes from files, repair them, drop the bad ones, account for every drop, hold some out.

    heap = list(clean(read(["full_dataset.csv", "mine.jsonl.gz"], account := Account()), Rules(), account))

Nothing here holds the heap: `read` and `clean` are generators, and they keep about 400 bytes a recipe."""

import csv
import gc
import gzip
import hashlib
import html
import io
import json
import multiprocessing
import os
import re
import signal
import tempfile
import zlib
from array import array
from collections import Counter, namedtuple
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, cycle, islice, starmap, takewhile
from pathlib import Path

import numpy as np

from cli import UserError

COLUMNS = (
    "title",
    "ingredients",
    "directions",
    "NER",
)  # of RecipeNLG's CSV: a list is JSON inside its cell


@dataclass(slots=True)
class Recipe:
    """A recipe as lists or, where `completion` is not None, any other text that people bring."""

    title: str = ""
    ingredients: list[str] = field(default_factory=list)
    directions: list[str] = field(default_factory=list)
    ner: list[str] = field(
        default_factory=list, compare=False
    )  # names of its ingredients, where somebody has them
    prompt: str | None = None
    completion: str | None = None
    messages: list[dict] = field(
        default_factory=list
    )  # of a chat, whose contents are the completion too
    hash: int = field(default=0, compare=False, repr=False)  # see key()

    def __reduce__(self):  # quicker than a dataclass's own: millions go from process to process
        return Recipe, tuple(getattr(self, name) for name in self.__slots__)

    def text(self):
        """(prompt, completion): the title line without its newline, and everything from the two newlines on."""
        if self.completion is not None:
            return self.prompt, self.completion
        steps = (f"{n}. {step}" for n, step in enumerate(self.directions, 1))
        return self.title, "\n".join(
            ["\n- ".join(["\n\nIngredients:", *self.ingredients]), "\nDirections:", *steps]
        )


@dataclass
class Account:
    """What became of every row: read + bad are the rows of the source, read = kept + the sum of dropped."""

    read: int = 0
    bad: int = 0  # rows that are no recipe: broken JSON, wrong fields
    repaired: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(RULES, 0))
    examples: dict[str, list[str]] = field(
        default_factory=lambda: {name: [] for name in RULES}
    )  # three a rule
    bad_examples: list[str] = field(default_factory=list)  # the first three, as "file:line: why"


# ---- reading --------------------------------------------------------------------------------------------------------
class BadRow(Exception):
    """Why a row is no recipe."""


def read(paths, account, allow_bad=0.01, then=None):
    """The recipes of several files as one heap, as they are, or what `then` makes of each, in worker processes. Bad
    rows are counted in the account and skipped; if their share is above `allow_bad`, that is a UserError at the end."""
    paths = [Path(p) for p in ([paths] if isinstance(paths, (str, Path)) else paths)]
    files = [(path, Path(path.name.lower().removesuffix(".gz")).suffix) for path in paths]
    for (
        path,
        kind,
    ) in files:  # all of them before the first row: a typo in the last should cost no time
        if not path.is_file() or kind not in FORMATS:
            wrong = (
                "does not exist"
                if not path.exists()
                else "is a folder"
                if path.is_dir()
                else "has another ending"
            )
            raise UserError(
                f"{path} {wrong}: --data takes {', '.join(FORMATS)} files, each also with .gz behind it."
            )
    large = (
        sum(path.stat().st_size for path in paths) > 2**25 and ".json" not in dict(files).values()
    )  # a .json is one
    for got in chain.from_iterable((_spread if large else _parse)(then, files)):
        if isinstance(got, BadRow):
            account.bad += 1
            account.bad_examples += [str(got)] * (account.bad <= 3)
        else:
            account.read += 1
            yield got
    if not (rows := account.read + account.bad):
        raise UserError(f"There is no row in {', '.join(map(str, paths))}.")
    if account.bad > allow_bad * rows:
        raise UserError(
            f"{account.bad:,} of {rows:,} rows ({account.bad / rows:.1%}) are no recipes: "
            f"{'; '.join(account.bad_examples)}. Repair them, or allow a larger share with --allow_bad."
        )


def _rows(path, kind):
    """(file, line, raw row) of each row of a file, in binary: in a text, U+2028 inside a string may end a line too."""
    try:
        with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
            yield from ((path, line, row) for line, row in FORMATS[kind](file, path))
    except (
        EOFError,
        zlib.error,
        OSError,
        csv.Error,
    ) as e:  # mostly gzip that is cut off, corrupt, or none
        raise UserError(
            f"{path} cannot be read to its end: {e}. Fetch it again if it was cut off."
        ) from e
    except (
        ValueError,
        RecursionError,
    ) as e:  # of a .json; ValueError: broken JSON or UTF-8, and it says where
        raise UserError(f"{path} is broken JSON: {e}.") from e


def _json_rows(file, path):
    """(entry number, row) of a JSON file: a list of rows, or an object of them."""
    heap = json.loads(file.read())
    return enumerate(
        heap.values() if isinstance(heap, dict) else heap if isinstance(heap, list) else [heap], 1
    )


def _csv_rows(file, path):
    """(number of its first line, cells of COLUMNS) of a CSV. A byte that is no UTF-8 spoils only its row."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(
        io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    )
    header = next(reader, [])
    if missing := [name for name in COLUMNS[:3] if name not in header]:
        raise UserError(
            f"{path} lacks the columns {', '.join(missing)}; its first line has {header[:12]!r:.400}."
        )
    at = [header.index(name) for name in COLUMNS if name in header]
    for line, cells in zip(iter(lambda: reader.line_num + 1, 0), reader):
        wrong = f"{len(cells)} cells under {len(header)} columns" if cells else "an empty line"
        yield line, tuple(cells[i] for i in at) if len(cells) == len(header) else BadRow(wrong)


FORMATS = {".json": _json_rows, ".jsonl": lambda file, path: enumerate(file, 1), ".csv": _csv_rows}


def _parse(then, files, rank=0, n=1):
    """Lists of a thousand rows as Recipes, through `then` if it is given, or as BadRows: every n-th of the lists."""
    rows = chain.from_iterable(starmap(_rows, files))
    for chunk in islice(iter(lambda: list(islice(rows, 1000)), []), rank, None, n):
        yield [_parse_row(then, *row) for row in chunk]


def _spread(then, files):
    """The lists of _parse, in order, from a process a core: each reads all rows, which is quick, and parses its own."""
    pipes, n = (
        [],
        min(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), 16
        ),
    )
    before = gc.get_threshold()
    gc.set_threshold(
        10**6
    )  # and in what is forked: to look for cycles, where there are none, costs a tenth
    for rank in range(n):
        pipe, end = multiprocessing.Pipe(duplex=False)
        multiprocessing.Process(
            target=_work, args=(pipe, end, then, files, rank, n), daemon=True
        ).start()
        end.close()
        pipes.append(pipe)
    try:
        for got in takewhile(bool, (pipe.recv() for pipe in cycle(pipes))):
            if isinstance(got, UserError):
                raise got
            yield got
    except (EOFError, OSError):
        raise UserError(
            "a process that reads recipes was killed; mostly, memory ran out."
        ) from None
    finally:
        gc.set_threshold(*before)


def _work(pipe, end, *job):
    pipe.close()  # now only the main process reads: when that ends, the next `send` ends this one too, by SIGPIPE
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits
    try:
        for out in chain(_parse(*job), [None]):
            end.send(out)
    except UserError as e:
        end.send(e)


def _json(text, what):
    try:
        return json.loads(text)
    except (
        ValueError,
        RecursionError,
    ) as e:  # ValueError: broken JSON, broken UTF-8, a number of 5,000 digits
        raise BadRow(
            f"{what} is no JSON in UTF-8 ({getattr(e, 'msg', e) if text.strip() else 'it is empty'})"
        )


def _parse_row(then, path, line, row):
    try:
        row = _json(row, "the line") if isinstance(row, bytes) else row
        if isinstance(row, tuple):  # of a CSV, where an empty NER is none
            row = {
                n: c if n == "title" else _json(c, f"`{n}`")
                for n, c in zip(COLUMNS, row)
                if c or n != "NER"
            }
        if not isinstance(row, dict):
            raise row if isinstance(row, BadRow) else BadRow(f"no JSON object but {row!r:.40}")
        recipe = _recipe(row)
        text = "".join([*recipe.text(), *recipe.ner])
        if not text.isascii() and text != text.encode(errors="ignore").decode():
            raise BadRow("a lone surrogate, or bytes that are no UTF-8")  # no tokenizer takes it
        return then(recipe) if then else recipe
    except (BadRow, RecursionError) as why:
        return BadRow(f"{path}:{line}: {why}")


def _recipe(row):
    steps = (
        "steps" if "steps" in row and "directions" not in row else "directions"
    )  # the Wikibooks file says steps
    if "ingredients" in row or steps in row:
        ner = _field(row, "NER", "list of texts") if row.get("NER") else []
        return Recipe(
            _field(row, "title"),
            *(_field(row, n, "list of texts") for n in ("ingredients", steps)),
            ner,
        )
    if "messages" in row:
        turns = [
            {n: _field(m, n) for n in ("role", "content")}
            for m in _field(row, "messages", "list of objects")
        ]
        if unknown := {m["role"] for m in turns} - {"system", "user", "assistant"}:
            raise BadRow(f"`messages` has the unknown role {min(unknown)!r:.40}")
        if not any(m["role"] == "assistant" for m in turns):
            raise BadRow("`messages` has no turn of the assistant: nothing to learn")
        return Recipe(
            prompt="", completion="\n\n".join(": ".join(m.values()) for m in turns), messages=turns
        )
    if (text := "completion" if "completion" in row else "text") in row:
        return Recipe(
            prompt="" if text == "text" else _field(row, "prompt"), completion=_field(row, text)
        )
    raise BadRow(
        "it has neither title, ingredients and directions nor text, prompt and completion, or messages"
    )


def _field(row, name, kind="text"):
    """What a row has under a name: a text, a list of texts or a list of objects."""
    items = [row.get(name)] if kind == "text" else row.get(name)
    if not isinstance(items, list) or not all(
        isinstance(x, dict if kind == "list of objects" else str) for x in items
    ):
        raise BadRow(
            f"`{name}` is no {kind} but {row[name]!r:.40}"
            if name in row
            else f"`{name}` is missing"
        )
    return row[name]


# ---- repairing: what can be mended is not dropped -------------------------------------------------------------------
# List marks, which text() adds again ("- x", "1. x", a wiki's "*#x"); not "**so** good", "#10 tin", "1.5" or "1. 5 g".
MARK = re.compile(
    r"^(?:[-–—•*](?:\s+|$)|\*#?(?![^*]*\*)\s*|#+\s*(?=[^\W\d_])|\d{1,2}[.)](?:\s+(?!\d)|$))"
)
MARKUP = re.compile(
    r"(?is)<ref\b[^<>]*/>|<ref\b[^<>]*>.*?</ref>|</?[a-z]+\d?(?: [^<>]*)?/?>|\[https?://[^]]*\]"
    r"|(?:https?://|www\.)\S+"
)  # a footnote with its text, tags ("<5 g" is none), links
BOILERPLATE = re.compile(
    r"(?i)(?:originally published at|adapted from|recipe (?:by|from|courtesy of)|photo by|©"
    r"|copyright|all rights reserved|click here|subscribe|follow us|print this|advertisement)\b.*|(?:©|source:).*"
)


def tidy(text):
    """Entities become characters (&frac12; is ½), white space (a no-break one too) single spaces; markup goes."""
    text = html.unescape(text)
    text = (
        MARKUP.sub("", text) if "<" in text or "://" in text or "www." in text else text
    )  # few have any; sub is slow
    return " ".join(text.split())


def repair(recipe):
    """The recipe tidy, without list marks, empty items and talk of the page; the same object if all was well."""
    lists = (
        [
            item
            for text in texts
            if (item := MARK.sub("", tidy(text))) and not BOILERPLATE.fullmatch(item)
        ]
        for texts in (recipe.ingredients, recipe.directions)
    )
    fixed = Recipe(tidy(recipe.title), *lists, recipe.ner)
    return (
        recipe if fixed == recipe or recipe.completion is not None else fixed
    )  # a text's white space has a meaning


# ---- the rules: each says why a recipe should go, or nothing --------------------------------------------------------
@dataclass
class Rules:
    """The bounds. Stubs teach a model to stop early; a list of thirty ingredients is mostly several recipes in one."""

    # fmt: off
    min_words: int = 25        # drop recipes of fewer words (title, ingredients and directions)
    max_words: int = 600       # drop recipes of more words
    min_ingredients: int = 2   # drop recipes of fewer ingredients
    max_ingredients: int = 25  # drop recipes of more ingredients
    min_steps: int = 2         # drop recipes of fewer steps
    max_similar: float = 0.8   # drop recipes as like an earlier one (Jaccard of 3-word runs); 2: none
    min_share: float = 1e-5    # drop recipes with an ingredient that fewer have (share of a heap of 50,000 or more)
    min_mentioned: float = 0.2  # drop recipes of 4 or more ingredients if the directions name a smaller share of them
    # fmt: on


Heap = namedtuple(
    "Heap", "rules common near", defaults=(None, None)
)  # what a rule knows: bounds, common(), a Near


def _words(r):
    return len(
        " ".join(
            [r.title, *r.ingredients, *r.directions, r.prompt or "", r.completion or ""]
        ).split()
    )


def no_title(recipe, heap):
    """The title is empty: there would be nothing to ask the model for."""
    return "" if recipe.title else "no title"


def too_short(recipe, heap):
    """Fewer words than min_words."""
    return (n := _words(recipe)) < heap.rules.min_words and f"words: {n}"


def too_long(recipe, heap):
    """More words than max_words."""
    return (n := _words(recipe)) > heap.rules.max_words and f"words: {n}"


def few_ingredients(recipe, heap):
    """Fewer than min_ingredients."""
    return (n := len(recipe.ingredients)) < heap.rules.min_ingredients and f"ingredients: {n}"


def many_ingredients(recipe, heap):
    """More than max_ingredients."""
    return (n := len(recipe.ingredients)) > heap.rules.max_ingredients and f"ingredients: {n}"


def few_steps(recipe, heap):
    """Fewer than min_steps."""
    return (n := len(recipe.directions)) < heap.rules.min_steps and f"steps: {n}"


POINTER = re.compile(
    r"(?i)(?:same as|as (?:for|in|above|directed) |follow (?:the )?(?:directions|recipe|instructions)"
    r" (?:for|of|in|above)|see (?-i:[A-Z]\w*)(?= |\.?$)|see (?:no\. ?\d|page|recipe|above|directions)|(?:prepare|make"
    r"|proceed|cook|serve|bake|finish|treat)(?: [\w’'-]+){0,4} (?:(?:exactly |just )?(?:the )?same as|as (?:for|in"
    r"|above|directed (?:for|in|above))|(?:as|like) the (?:above|preceding|previous|last)|according to recipe))"
    r"\b(?!.*\b(?:package|packet|packaging|box|label|tin|jar)\b)"
)  # not "as directed on the package", "See that …"


def points_elsewhere(recipe, heap):
    """A short step that only points to another recipe ("As for wild duck", "See Pie Crust"): the reader has it not."""
    return next(
        (
            repr(step)
            for step in recipe.directions
            if len(step.split()) <= 12 and POINTER.match(step)
        ),
        "",
    )


NO_NAME = set(
    re.findall(
        r"\w+",
        """a about an and bag beaten bottle box bunch c can cans chopped clove cloves coarsely
    cooked crushed cubed cup cupful cups dash diced divided drained finely for fresh freshly from g gallon gram grams
    grated halved head jar kg l large lb lbs medium melted minced ml of optional or ounce ounces oz package peeled piece
    pinch pint pints pkg pound pounds pt qt quart quarts shredded slice sliced slices small softened stick sticks
    tablespoon tablespoons taste tb tbl tbsp tbsps teaspoon teaspoons the thinly to tsp tsps with""",
    )
)  # no names


@lru_cache(2**16)
def name(item):
    """What remains of an ingredient without quantity, unit, brackets and preparation: in lower case, and singular."""
    head = re.split(r"[,;:]| - ", re.sub(r"\([^)]*\)?|\[[^]]*\]?", " ", tidy(item).casefold()))[0]
    *first, last = [
        w for w in re.findall(r"[^\W\d_]+", head) if w.isalpha() and w not in NO_NAME
    ] or [""]
    return " ".join(
        [
            *first,
            re.sub(r"(?:(?<=[oxz]|s|h)e)?(?<![su])s$", "", re.sub(r"(?<=[^aeiou])ies$", "y", last)),
        ]
    )


def names(recipe):
    """The names of its ingredients: from the NER column, where somebody has it."""
    return [found for item in recipe.ner or recipe.ingredients if (found := name(item))]


ALL = re.compile(
    r"\b(?:ingredients|everything|all together|(?:mix|combine|stir|blend|beat|boil) (?:it |them )?all)\b"
)


def mentioned(recipe):
    """(how many of its ingredients the directions name, how many it has)"""
    text, found = " ".join(recipe.directions).casefold(), names(recipe)
    return sum(
        any(w[: max(3, len(w) - 2)] in text for w in n.split() if len(w) > 2) for n in found
    ), len(found)


def unused_ingredients(recipe, heap):
    """Directions that name almost none of the ingredients, nor all of them at once: the two do not belong together."""
    named, n = mentioned(recipe)
    wrong = (
        n >= 4
        and named < heap.rules.min_mentioned * n
        and not ALL.search(" ".join(recipe.directions).casefold())
    )
    return wrong and f"{named} of {n} ingredients in the directions"


def common(found, rules):
    """Of all names() of a heap those that min_share of it have. None below 50,000: half the honest are rare there."""
    counts, total = Counter(), 0
    for total, one in enumerate(found, 1):
        counts.update(set(one))
    return {n for n in counts if counts[n] >= rules.min_share * total} if total >= 50_000 else None


def rare_ingredient(recipe, heap):
    """An ingredient that hardly any other recipe has: mostly a typing error, or a text that is no ingredient."""
    return heap.common is not None and next(
        (f"{n!r:.60}" for n in names(recipe) if n not in heap.common), ""
    )


def duplicate(judged, heap):
    """The content of an earlier recipe, or of one of the held-out file."""
    known = judged.recipe.hash in heap.near.keys
    heap.near.keys.add(judged.recipe.hash)
    return known and "same content as an earlier one"


def near_duplicate(judged, heap):
    """Such a recipe with other words here and there."""
    same = judged.sketch and heap.near.find(*judged.sketch, heap.rules.max_similar)
    return same and f"{same:.0%} the same as an earlier one"


class Near:
    """What came before: keys, and sets of 3-word shingles. MinHash with banding (Broder 1997): of two that share 0.8
    (Jaccard) 98.5 % share one of 8 bands of 4 minima; who had it last is looked up, and compared from a file."""

    A = (
        np.random.default_rng(0).integers(0, 2**31, 32).astype(np.uint32) * 2 + 1
    )  # odd: x -> x * a is one to one
    SPACES = "".join(
        c if c.isalnum() else " " for c in map(chr, range(128))
    )  # ten times as quick as a regex
    crc = staticmethod(lru_cache(2**16)(lambda word: zlib.crc32(word.encode())))

    def __init__(self):
        self.file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (until the heap is clean)
        self.keys, self.ends, self.bands = set(), array("Q", [0]), array("I")
        self.size, self.table = (
            2**12,
            array("I", bytes(2**17)),
        )  # [band, its hash] -> the last that had it, from 1

    @staticmethod
    def banded(mine):
        return (
            ((mine * Near.A[:, None]).min(1).reshape(8, 4) * Near.A[:4])
            .sum(1, dtype=np.uint32)
            .tolist()
        )

    @staticmethod
    def sketch(r):
        """(shingles: sorted hashes as bytes, their 8 bands), or None where there are no three words."""
        words = " ".join(r.ingredients + r.directions).casefold().translate(Near.SPACES).split()
        h = np.fromiter(map(Near.crc, words), np.uint32, len(words))
        h = np.sort(((h[:-2] * Near.A[0] ^ h[1:-1]) * Near.A[1] ^ h[2:]) * Near.A[2])
        return (
            ((mine := h[np.append(True, h[1:] != h[:-1])]).tobytes(), Near.banded(mine))
            if len(h)
            else None
        )

    def find(self, mine, bands, least):
        """How much an earlier recipe shares, if it is at least that; else 0, and this one is remembered."""
        at, n = [b * self.size + band % self.size for b, band in enumerate(bands)], len(self.ends)
        last = [self.table[i] for i in at]
        for j in {j for b, j in enumerate(last) if j and self.bands[8 * j - 8 + b] == bands[b]}:
            content = os.pread(
                self.file.fileno(), self.ends[j] - self.ends[j - 1], self.ends[j - 1]
            )
            both = len(
                np.intersect1d(
                    *(np.frombuffer(x, np.uint32) for x in (mine, content)), assume_unique=True
                )
            )
            if (same := both / ((len(mine) + len(content)) / 4 - both)) >= least:
                return same
        self.ends.append(self.ends[-1] + self.file.write(mine))
        self.bands.extend(bands)
        for i in at:
            self.table[i] = n
        if 4 * n > self.size:  # a fuller table would forget too many
            self.size, self.table = (
                2 * self.size,
                None,
            )  # the old one need not be there beside the new one
            table, hashes = (
                np.zeros((8, self.size), np.uint32),
                np.array(self.bands).reshape(n, 8) % self.size,
            )
            table[range(8), hashes] = np.arange(1, n + 1)[:, None]
            self.table = memoryview(table.reshape(-1))
        return 0


EARLY = (
    no_title,
    too_short,
    too_long,
    few_ingredients,
    many_ingredients,
    few_steps,
    points_elsewhere,
    unused_ingredients,
    rare_ingredient,
)
LATE = (duplicate, near_duplicate)  # only what stays should make another one a duplicate
RULES = {rule.__name__: rule for rule in EARLY + LATE}  # the first that a recipe fails counts it
Judged = namedtuple(
    "Judged", "recipe repaired failed sketch"
)  # failed: (rule, why) or None; sketch: (shingles, bands)


def _failed(rules, what, heap):
    return next(((rule.__name__, why) for rule in rules if (why := rule(what, heap))), None)


def judge(heap, recipe):
    """All that can be said of a recipe alone: the larger part of the work, and any process can do it."""
    fixed = repair(recipe)
    failed = _failed(
        EARLY if fixed.completion is None else (too_short, too_long), fixed, heap
    )  # the rest is no text's
    key(fixed)
    alone = failed or fixed.completion is not None or heap.rules.max_similar > 1
    return Judged(fixed, fixed is not recipe, failed, None if alone else Near.sketch(fixed))


def clean(recipes, rules, account, common=None, held=()):
    """Recipes, repaired, that fail no rule and are like none of `held`, another file's; all counted. Or judged ones."""
    heap = Heap(rules, common, Near())
    for other in held:  # known now
        _failed(LATE, judge(Heap(rules), other), heap)  # kept, whatever is rare here
    for judged in (
        recipe if isinstance(recipe, Judged) else judge(heap, recipe) for recipe in recipes
    ):
        account.repaired += judged.repaired
        if failed := judged.failed or _failed(LATE, judged, heap):
            rule, why = failed
            account.dropped[rule] += 1
            title = (
                " ".join((judged.recipe.title or judged.recipe.completion or "").split())[:60]
                or "(no title)"
            )
            account.examples[rule] += [f"{title}: {why}"] * (account.dropped[rule] <= 3)
        else:
            account.kept += 1
            yield judged.recipe


def key(recipe):
    """64 bits that recipes of the same ingredients and directions share, in any case and spacing; or that very text."""
    if not recipe.hash:
        words = " ".join(recipe.ingredients + recipe.directions).casefold().split()
        content = (
            " ".join(words)
            if recipe.completion is None
            else f"{recipe.prompt}\0{recipe.completion}"
        )
        recipe.hash = int.from_bytes(
            hashlib.blake2b(content.encode(), digest_size=8).digest(), "little"
        )
    return recipe.hash


def save(recipes, path):
    """Write recipes as JSON Lines that `read` takes, gzipped if the name ends in .gz. All of them or no file."""
    try:
        with tempfile.TemporaryDirectory(".part", dir=path.parent) as folder:
            with (gzip.open if path.suffix == ".gz" else open)(
                part := f"{folder}/heap", "wt", encoding="utf-8"
            ) as out:
                for r in recipes:
                    names = (
                        ["messages"]
                        if r.messages
                        else COLUMNS
                        if r.prompt is None
                        else ["prompt", "completion"]
                    )
                    out.write(
                        json.dumps({n: getattr(r, n.lower()) for n in names}, ensure_ascii=False)
                        + "\n"
                    )
            os.replace(part, path)
    except OSError as e:
        raise UserError(f"--to {path} cannot be written ({e}).") from None


def held_out(keys, n, seed):
    """Which recipes are kept from training, as booleans: n, or what whole groups of a key come to (split, they would
    make the loss praise memory), at most half. Files in another order, or a few more recipes, leave nearly the same."""
    groups, group_of, sizes = np.unique(
        np.asarray(keys, dtype=np.uint64), return_inverse=True, return_counts=True
    )
    out, left = np.zeros(len(groups), dtype=bool), min(n, len(keys) // 2)
    for g in np.argsort(
        groups ^ np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    ):  # keys are hashes: random enough
        if sizes[g] <= left:
            out[g], left = True, left - sizes[g]
    if (
        n > 0 and not out.any() and len(keys) > 1 and sizes.min() <= len(keys) // 2
    ):  # all are larger than n
        out[sizes.argmin()] = True
    return out[group_of]
