"""The heap: read recipes from files, repair them, drop the bad ones, account for every drop, hold some out.

Nothing here holds the heap: `read` and `clean` are generators, and they keep 300 bytes a recipe at most. In a notebook:

    from recipes import Account, Rules, clean, read
    heap = list(clean(read(["full_dataset.csv", "mine.jsonl.gz"], account := Account()), Rules(), account))
    print(account.dropped, "".join(heap[0].text()))
"""
import contextlib
import csv
import gzip
import hashlib
import html
import io
import itertools
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
from pathlib import Path

import numpy as np

from cli import UserError


@dataclass(slots=True)
class Recipe:
    """A recipe as lists or, where `completion` is not None, any other text that people bring."""
    title: str = ""
    ingredients: list[str] = field(default_factory=list)
    directions: list[str] = field(default_factory=list)
    ner: list[str] = field(default_factory=list, compare=False)  # names of its ingredients, where somebody has them
    prompt: str | None = None
    completion: str | None = None
    messages: list[dict] = field(default_factory=list)  # of a chat, whose contents are the completion too
    hash: int = field(default=0, compare=False, repr=False)  # see key()

    def text(self):
        """(prompt, completion): the title line without its newline, and everything from the two newlines on."""
        if self.completion is not None:
            return self.prompt, self.completion
        ingredients = "".join(f"\n- {item}" for item in self.ingredients)
        directions = "".join(f"\n{n}. {step}" for n, step in enumerate(self.directions, 1))
        return self.title, f"\n\nIngredients:{ingredients}\n\nDirections:{directions}"


@dataclass
class Account:
    """What became of every row: read + bad are the rows of the source, read = kept + the sum of dropped."""
    read: int = 0
    bad: int = 0  # rows that are no recipe: broken JSON, wrong fields
    repaired: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(RULES, 0))
    examples: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in RULES})  # three a rule
    bad_examples: list[str] = field(default_factory=list)  # the first three, as "file:line: why"


# ---- reading --------------------------------------------------------------------------------------------------------
class BadRow(Exception):
    """Why a row is no recipe."""

def read(paths, account, allow_bad=0.01, then=None):
    """The recipes of several files as one heap, as they are, or what `then` makes of each, in worker processes. Bad
    rows are counted in the account and skipped; if their share is above `allow_bad`, that is a UserError at the end."""
    paths = [Path(p) for p in ([paths] if isinstance(paths, (str, Path)) else paths)]
    for path in paths:  # all of them before the first row: a typo in the last should cost no time
        wrong = "does not exist" if not path.exists() else "is a folder" if path.is_dir() else "has another ending"
        if not path.is_file() or _kind(path) not in FORMATS:
            raise UserError(f"{path} {wrong}: --data takes {', '.join(FORMATS)} files, each also with .gz behind it.")
    large = sum(path.stat().st_size for path in paths) > 2**25 and ".json" not in map(_kind, paths)  # which no one streams
    for got in itertools.chain.from_iterable(_spread(then, paths) if large else _parse(then, paths)):
        if isinstance(got, BadRow):
            account.bad += 1
            account.bad_examples += [str(got)] * (account.bad <= 3)
        else:
            account.read += 1
            yield got
    rows = account.read + account.bad
    if rows == 0:
        raise UserError(f"There is no row in {', '.join(map(str, paths))}.")
    if account.bad > allow_bad * rows:
        raise UserError(f"{account.bad:,} of {rows:,} rows ({account.bad / rows:.1%}) are no recipes: "
                        f"{'; '.join(account.bad_examples)}. Repair them, or allow a larger share with --allow_bad.")

def _kind(path):
    return Path(path.name.lower().removesuffix(".gz")).suffix

def _rows(path):
    """("file:line", raw row) of each row of a file."""
    try:
        with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
            yield from ((f"{path}:{line}", row) for line, row in FORMATS[_kind(path)](file, path))
    except (EOFError, zlib.error, OSError, csv.Error) as e:  # mostly gzip that is cut off, corrupt, or none
        raise UserError(f"{path} cannot be read to its end: {e}. Fetch it again if it was cut off.") from e

def _json_rows(file, path):
    """(entry number, row) of a JSON file: a list of rows, or an object of them."""
    try:
        heap = json.loads(file.read().decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:  # ValueError: broken JSON or UTF-8, and the message says where
        raise UserError(f"{path} is broken JSON: {e}.") from e
    heap = list(heap.values()) if isinstance(heap, dict) else heap
    return enumerate(heap if isinstance(heap, list) else [heap], 1)

COLUMNS = ("title", "ingredients", "directions", "NER")  # of RecipeNLG's CSV: a list is JSON inside its cell

def _csv_rows(file, path):
    """(number of its first line, cells of the columns above) of a CSV."""
    csv.field_size_limit(2**31 - 1)
    # surrogateescape: a byte that is no UTF-8 spoils its own row (see _recipe) and not the rest of the file
    reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=""))
    header = next(reader, [])
    if missing := [name for name in COLUMNS[:3] if name not in header]:
        found = repr([name[:40] for name in header[:12]])  # repr: the bytes may be anything
        raise UserError(f"{path} lacks the columns {', '.join(missing)}; its first line has {found}.")
    at, line = [header.index(name) for name in COLUMNS if name in header], reader.line_num + 1
    for cells in reader:
        wrong = f"{len(cells)} cells under {len(header)} columns" if cells else "an empty line"
        yield line, tuple(cells[i] for i in at) if len(cells) == len(header) else BadRow(wrong)
        line = reader.line_num + 1

# Lines are cut at \n only: in text, a U+2028 inside a string may end a line too.
FORMATS = {".json": _json_rows, ".jsonl": lambda file, path: enumerate(file, 1), ".csv": _csv_rows}

def _parse(then, paths, rank=0, n=1):
    """Lists of a thousand rows as Recipes, through `then` if it is given, or as BadRows: every n-th of the lists."""
    rows = itertools.chain.from_iterable(map(_rows, paths))
    for chunk in itertools.islice(iter(lambda: list(itertools.islice(rows, 1000)), []), rank, None, n):
        out = []
        for where, row in chunk:
            try:
                recipe = _recipe(row)
                out.append(then(recipe) if then else recipe)
            except (BadRow, RecursionError) as why:
                out.append(BadRow(f"{where}: {why}"))
        yield out

def _spread(then, paths):
    """The lists of _parse, in order, from a process a core. Each reads all rows, which is quick, and waits with its list
    until that is taken."""
    pipes, n = [], min(os.cpu_count(), 16)
    for rank in range(n):
        pipe, end = multiprocessing.Pipe(duplex=False)
        multiprocessing.Process(target=_work, args=(end, then, paths, rank, n), daemon=True).start()
        end.close()
        pipes.append(pipe)
    try:
        for pipe in itertools.cycle(pipes):
            if (got := pipe.recv()) is None:
                return
            if isinstance(got, UserError):
                raise got
            yield got
    except EOFError:
        raise UserError("a process that reads recipes was killed; mostly, memory ran out.") from None

def _work(pipe, *job):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits
    with contextlib.suppress(BrokenPipeError):  # which may have ended
        try:
            for out in _parse(*job):
                pipe.send(out)
            pipe.send(None)
        except UserError as e:
            pipe.send(e)

def _json(text, what):
    try:
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as e:  # ValueError: broken JSON, broken UTF-8, a number of 5,000 digits
        why = getattr(e, "msg", e) if text.strip() else "it is empty"
        raise BadRow(f"{what} is no JSON in UTF-8 ({why})") from None

def _recipe(row):
    """The Recipe of a raw row; BadRow if it is none."""
    if isinstance(row, bytes):
        row = _json(row, "the line")
    elif isinstance(row, tuple):  # of a CSV; an empty NER is none
        row = {name: cell if name == "title" else _json(cell, f"`{name}`")
               for name, cell in zip(COLUMNS, row) if cell or name != "NER"}
    if not isinstance(row, dict):
        raise row if isinstance(row, BadRow) else BadRow(f"no JSON object but {row!r:.40}")
    steps = "steps" if "steps" in row and "directions" not in row else "directions"  # the Wikibooks file says steps
    if "ingredients" in row or steps in row:
        lists = [_field(row, name, list) for name in ("ingredients", steps, *["NER"] * bool(row.get("NER")))]
        recipe = Recipe(_field(row, "title"), *lists)
    elif "messages" in row:
        turns = [{name: _field(m, name) for name in ("role", "content")} for m in _field(row, "messages", list, dict)]
        if unknown := {m["role"] for m in turns} - {"system", "user", "assistant"}:
            raise BadRow(f"`messages` has the unknown role {min(unknown)!r:.40}")
        if not any(m["role"] == "assistant" for m in turns):
            raise BadRow("`messages` has no turn of the assistant: nothing to learn")
        recipe = Recipe(prompt="", completion="\n\n".join(": ".join(m.values()) for m in turns), messages=turns)
    elif "completion" in row:
        recipe = Recipe(prompt=_field(row, "prompt"), completion=_field(row, "completion"))
    elif "text" in row:
        recipe = Recipe(prompt="", completion=_field(row, "text"))
    else:
        raise BadRow("it has neither title, ingredients and directions nor text, prompt and completion, or messages")
    try:
        "".join([*recipe.text(), *recipe.ner]).encode()
    except UnicodeEncodeError as e:  # no tokenizer takes it
        raise BadRow("a lone surrogate, or bytes that are no UTF-8") from e
    return recipe

def _field(row, name, kind=str, of=str):
    """The text under a name, or the list of texts (or of other things)."""
    if name not in row:
        raise BadRow(f"`{name}` is missing")
    if not isinstance(value := row[name], kind) or kind is list and not all(isinstance(x, of) for x in value):
        what = "text" if kind is str else "list of texts" if of is str else "list of objects"
        raise BadRow(f"`{name}` is no {what} but {value!r:.40}")
    return value


# ---- repairing: what can be mended is not dropped -------------------------------------------------------------------
# List marks, which the text format adds again: "- x", "* x", "1. x", and a wiki's "*x", "*#x" and "#x". Not marks:
# "*so* good" and "**so** good" (emphasis), "#10 tin", "1.5 cups", and "1. 5 cups" (a decimal point, a space too many).
MARK = re.compile(r"^(?:[-–—•*](?:\s+|$)|\*#?(?![^*]*\*)\s*|#+\s*(?=[^\W\d_])|\d{1,2}[.)](?:\s+(?!\d)|$))")

# A footnote with what is in it, other tags without ("<5 g" is none), a link in a wiki's brackets, a bare link.
MARKUP = re.compile(r"(?is)<ref\b[^<>]*/>|<ref\b[^<>]*>.*?</ref>|</?[a-z]+\d?(?: [^<>]*)?/?>|\[https?://[^]]*\]"
                    r"|(?:https?://|www\.)\S+")
# Whole items that speak of the page and not of the food.
BOILERPLATE = re.compile(r"(?:originally published at|adapted from|recipe (?:by|from|courtesy of)|photo by|©"
                         r"|copyright|all rights reserved|click here|subscribe|follow us|print this|advertisement)\b.*"
                         r"|(?:©|source:).*", re.IGNORECASE)

def tidy(text):
    """Entities become characters (&frac12; is ½), white space (a no-break one too) single spaces; markup goes."""
    text = html.unescape(text)
    if "<" in text or "://" in text or "www." in text:  # few have any: the search is slower than the rest
        text = MARKUP.sub("", text)
    return " ".join(text.split())

def repair(recipe):
    """The recipe with tidy texts, without list marks, empty items and boilerplate; the same object if all was well."""
    if recipe.completion is not None:  # a text that is no recipe is its owner's: its white space may mean something
        return recipe
    ingredients, directions = ([item for item in (MARK.sub("", tidy(text)) for text in texts)
                                if item and not BOILERPLATE.fullmatch(item)]
                               for texts in (recipe.ingredients, recipe.directions))
    fixed = Recipe(tidy(recipe.title), ingredients, directions, recipe.ner)
    return recipe if fixed == recipe else fixed


# ---- the rules: each says why a recipe should go, or "" -------------------------------------------------------------
@dataclass
class Rules:
    """The bounds. Stubs teach a model to stop early; a list of thirty ingredients is mostly several recipes in one."""
    min_words: int = 25        # drop recipes of fewer words (title, ingredients and directions)
    max_words: int = 600       # drop recipes of more words
    min_ingredients: int = 2   # drop recipes of fewer ingredients
    max_ingredients: int = 25  # drop recipes of more ingredients
    min_steps: int = 2         # drop recipes of fewer steps
    max_similar: float = 0.8   # drop recipes as like an earlier one (Jaccard of 3-word runs); 2: none
    min_share: float = 1e-5    # drop recipes with an ingredient that fewer have (share of a heap of 50,000 or more)
    min_mentioned: float = 0.2  # drop recipes of 4 or more ingredients if the directions name a smaller share of them

@dataclass
class Heap:
    """What a rule may know besides the recipe: the bounds, and what came before."""
    rules: Rules
    common: set[str] | None = None  # see common()
    seen: set[int] = field(default_factory=set)  # keys
    near: "Near" = None

def _words(recipe):
    parts = [recipe.title, *recipe.ingredients, *recipe.directions, recipe.prompt or "", recipe.completion or ""]
    return len(" ".join(parts).split())

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

# "Prepare the duck as for wild duck", "Same as above", "See Pie Crust"; not "as directed on the package", "See that …"
POINTER = re.compile(
    r"(?:same as|as (?:for|in|above|directed) |follow (?:the )?(?:directions|recipe|instructions) (?:for|of|in|above)"
    r"|see (?-i:[A-Z]\w*)(?= |\.?$)|see (?:no\. ?\d|page|recipe|above|directions)"
    r"|(?:prepare|make|proceed|cook|serve|bake|finish|treat)(?: [\w’'-]+){0,4} (?:(?:exactly |just )?(?:the )?same as"
    r"|as (?:for|in|above|directed (?:for|in|above)|the (?:above|preceding|previous|last))|like the (?:above|preceding"
    r"|previous|last)|according to recipe))\b(?!.*\b(?:package|packet|packaging|box|label|tin|jar)\b)", re.IGNORECASE)

def points_elsewhere(recipe, heap):
    """A short step that only points to another recipe, which the reader does not have."""
    return next((repr(step) for step in recipe.directions if len(step.split()) <= 12 and POINTER.match(step)), "")

# Words of an ingredient that are no part of its name.
NO_NAME = set(re.findall(r"\w+", """a about an and bag beaten bottle box bunch c can cans chopped clove cloves coarsely cooked
    crushed cubed cup cupful cups dash diced divided drained finely for fresh freshly from g gallon gram grams grated halved
    head jar kg l large lb lbs medium melted minced ml of optional or ounce ounces oz package peeled piece pinch pint pints
    pkg pound pounds pt qt quart quarts shredded slice sliced slices small softened stick sticks tablespoon tablespoons taste
    tb tbl tbsp tbsps teaspoon teaspoons the thinly to tsp tsps with"""))

@lru_cache(2**16)
def name(item):
    """What remains of an ingredient without quantity, unit, brackets and preparation: in lower case, and singular."""
    head = re.split(r"[,;:]| - ", re.sub(r"\([^)]*\)?|\[[^]]*\]?", " ", item.casefold()))[0]
    *first, last = [w for w in re.findall(r"[^\W\d_]+", head) if w not in NO_NAME] or [""]
    last = re.sub(r"(?:(?<=[oxz]|s|h)e)?(?<![su])s$", "", re.sub(r"(?<=[^aeiou])ies$", "y", last))
    return " ".join([*first, last])

def names(recipe):
    """The names of its ingredients: from the NER column, where somebody has it."""
    return [found for item in recipe.ner or recipe.ingredients if (found := name(item))]

ALL = re.compile(r"\b(?:ingredients|everything|all together|(?:mix|combine|stir|blend|beat|boil) (?:it |them )?all)\b")

def unused_ingredients(recipe, heap):
    """Directions that name almost none of the ingredients, nor all of them at once: the two do not belong together."""
    text, found = " ".join(recipe.directions).casefold(), names(recipe)
    named = sum(any(w[:max(3, len(w) - 2)] in text for w in n.split() if len(w) > 2) for n in found)
    if len(found) < 4 or named >= heap.rules.min_mentioned * len(found) or ALL.search(text):
        return ""
    return f"{named} of {len(found)} ingredients in the directions"

def common(paths, rules, allow_bad=0.01):
    """The names that at least min_share of the recipes have: the first pass over the source. None, and no recipe is
    dropped for a rare one, below 50,000, where every second honest recipe has a rare thing."""
    counts, account = Counter(), Account()
    for found in read(paths, account, allow_bad, names) if rules.min_share else ():
        counts.update(set(found))
    least = rules.min_share * account.read
    return {name for name, n in counts.items() if n >= least} if account.read >= 50_000 else None

def rare_ingredient(recipe, heap):
    """An ingredient that hardly any other recipe has: mostly a typing error, or a text that is no ingredient."""
    rare = heap.common is not None and [name for name in names(recipe) if name not in heap.common]
    return f"{rare[0]!r:.60}" if rare else ""

def duplicate(judged, heap):
    """The content of an earlier recipe, or of one of the held-out file."""
    before = len(heap.seen)
    heap.seen.add(judged.recipe.hash)
    return "same content as an earlier one" if len(heap.seen) == before else ""

class Near:
    """Which recipes share most of their 3-word shingles: MinHash with banding (Broder 1997). Of two that share 0.8
    (Jaccard) 98.5 % share one of 8 bands of 4 minima; who had it last is looked up, and compared from a file."""
    A = np.random.default_rng(0).integers(0, 2**31, 32).astype(np.uint32) * 2 + 1  # odd: x -> x * a is one to one
    crc = staticmethod(lru_cache(2**16)(lambda word: zlib.crc32(word.encode())))
    def __init__(self):
        self.file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (until the heap is clean)
        self.ends, self.bands = array("Q", [0]), array("I")
        self.table = np.zeros((8, 2**12), np.uint32)  # [band, its hash] -> the last recipe that had it, from 1

    @staticmethod
    def shingles(recipe):
        words = re.findall(r"\w+", " ".join(recipe.ingredients + recipe.directions).casefold())
        h = np.array(list(map(Near.crc, words)), np.uint32)
        h = np.sort(((h[:-2] * Near.A[0] ^ h[1:-1]) * Near.A[1] ^ h[2:]) * Near.A[2])
        return h[np.append(True, h[1:] != h[:-1])] if len(h) else h  # each once

    @staticmethod
    def banded(mine):
        return ((mine * Near.A[:, None]).min(1).reshape(8, 4) * Near.A[:4]).sum(1, dtype=np.uint32)

    def find(self, mine, bands, least):
        """How much an earlier recipe shares, if it is at least that; else 0, and this one is remembered."""
        last = self.table[np.arange(8), bands % self.table.shape[1]].tolist()
        for j in {j for b, j in enumerate(last) if j and self.bands[8 * j - 8 + b] == bands[b]}:
            begin, end = self.ends[j - 1:j + 1]
            other = np.frombuffer(os.pread(self.file.fileno(), end - begin, begin), dtype=np.uint32)
            both = len(np.intersect1d(mine, other, assume_unique=True))
            if (same := both / (len(mine) + len(other) - both)) >= least:
                return same
        self.file.write(mine.tobytes())
        self.ends.append(self.ends[-1] + mine.nbytes)
        self.bands.extend(bands.tolist())
        bands, n = bands[:, None], len(self.ends) - 1  # [8, 1]
        if 4 * n > self.table.shape[1]:  # a fuller table would forget too many
            self.table, bands = np.zeros((8, 2 * self.table.shape[1]), np.uint32), np.array(self.bands).reshape(n, 8).T
        self.table[np.arange(8)[:, None], bands % self.table.shape[1]] = np.arange(n - bands.shape[1], n) + 1
        return 0

def near_duplicate(judged, heap):
    """Such a recipe with other words here and there."""
    same = heap.near.find(*judged.sketch, heap.rules.max_similar) if judged.sketch else 0
    return f"{same:.0%} the same as an earlier one" if same else ""

EARLY = (no_title, too_short, too_long, few_ingredients, many_ingredients, few_steps, points_elsewhere,
         unused_ingredients, rare_ingredient)
LATE = (duplicate, near_duplicate)  # only what stays should make another one a duplicate
RULES = {rule.__name__: rule for rule in EARLY + LATE}  # the first that a recipe fails counts it
ANY_TEXT = {too_short, too_long, duplicate}  # the rules that make sense for a text that is no recipe

# A recipe after its repair, what a rule says against it, and for near_duplicate its (shingles, bands)
Judged = namedtuple("Judged", "recipe repaired rule why sketch")

def judge(heap, recipe):
    """All that can be said of a recipe alone: the larger part of the work, and any process can do it."""
    fixed = repair(recipe)
    for rule in EARLY:
        if (fixed.completion is None or rule in ANY_TEXT) and (why := rule(fixed, heap)):
            return Judged(fixed, fixed is not recipe, rule.__name__, why, None)
    key(fixed)
    mine = Near.shingles(fixed) if fixed.completion is None and heap.rules.max_similar <= 1 else ()
    return Judged(fixed, fixed is not recipe, "", "", (mine, Near.banded(mine)) if len(mine) else None)

def clean(recipes, rules, account, common=None, held=()):
    """Repair each recipe, drop it by the first rule that it fails, yield the rest; all of it counted in the account.
    What is like one of `held`, the held-out recipes of another file, goes too. Recipes may come judged already."""
    heap = Heap(rules, common, near=Near())
    for other in held:  # known now
        any(rule(judge(heap, other), heap) for rule in LATE)
    for recipe in recipes:
        judged = recipe if isinstance(recipe, Judged) else judge(heap, recipe)
        rule, why = judged.rule, judged.why
        if not why:
            rule, why = next(((late.__name__, why) for late in LATE if (why := late(judged, heap))), ("", ""))
        account.repaired += judged.repaired
        if why:
            account.dropped[rule] += 1
            if len(account.examples[rule]) < 3:
                title = " ".join((judged.recipe.title or judged.recipe.completion or "").split())
                account.examples[rule].append(f"{title[:60] or '(no title)'}: {why}")
        else:
            account.kept += 1
            yield judged.recipe

def key(recipe):
    """64 bits that recipes of the same content share: ingredients and directions without case and white space (another
    title makes no other recipe), or a text exactly as it is."""
    if recipe.completion is None:
        content = " ".join(" ".join(recipe.ingredients + recipe.directions).casefold().split())
    else:
        content = f"{recipe.prompt}\0{recipe.completion}"
    recipe.hash = recipe.hash or int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little")
    return recipe.hash

def save(recipes, path):
    """Write recipes as JSON Lines that `read` takes, gzipped if the name ends in .gz. All of them or no file."""
    part = path.with_name(f"{path.name}.part")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(part, "wt", encoding="utf-8") as out:
            for r in recipes:
                names = ("prompt", "completion") if r.prompt is not None else ("title", "ingredients", "directions", "NER")
                row = {name: getattr(r, name.lower()) for name in (names if not r.messages else ["messages"])}
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
        part.replace(path)
    except OSError as e:
        raise UserError(f"--to {path} cannot be written ({e}).") from None
    finally:
        with contextlib.suppress(OSError):  # it has its name already
            part.unlink()

def held_out(keys, n, seed):
    """Which recipes are kept from training, as booleans: n of them, or as many as whole groups of a key come to, never
    more than half of the heap. Recipes that share a key stay on one side, else the held-out loss would praise memory.
    The choice hangs on keys, n and seed alone: files in another order, or a few more recipes, leave nearly the same."""
    groups, group_of, sizes = np.unique(np.asarray(keys, dtype=np.uint64), return_inverse=True, return_counts=True)
    order = np.argsort(groups ^ np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64))  # keys are hashes: random enough
    total, out, half = 0, np.zeros(len(groups), dtype=bool), len(group_of) // 2
    for g in order:
        if total + sizes[g] <= min(n, half):
            out[g], total = True, total + sizes[g]
    if n > 0 and not total and len(sizes) and sizes.min() <= half:  # all are larger than n
        out[sizes.argmin()] = True
    return out[group_of]
