"""The heap: read recipes from files, repair them, drop the bad ones, account for every drop, hold some out.

Nothing here holds the heap: `read` and `clean` are generators, and they keep 400 bytes a recipe at most.
In a notebook:

    from recipes import Account, Rules, clean, read
    heap = list(clean(read(["full_dataset.csv", "mine.jsonl.gz"], account := Account()), Rules(), account))
    print(account.dropped, "".join(heap[0].text()))
"""
import csv
import gzip
import hashlib
import html
import io
import json
import os
import re
import tempfile
import zlib
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cli import UserError


@dataclass(slots=True)
class Recipe:
    """A recipe as lists or, where `completion` is not None, any other text that people bring."""
    title: str = ""
    ingredients: list[str] = field(default_factory=list)
    directions: list[str] = field(default_factory=list)
    prompt: str | None = None
    completion: str | None = None

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

    def drop(self, rule, recipe, why):
        """Count a recipe for a rule, and keep the first three to show."""
        self.dropped[rule] = self.dropped.get(rule, 0) + 1
        if len(self.examples.setdefault(rule, [])) < 3:
            title = " ".join((recipe.title or recipe.prompt or recipe.completion or "").split())
            self.examples[rule].append(f"{title[:60] or '(no title)'}: {why}")


# ---- reading --------------------------------------------------------------------------------------------------------
class BadRow(Exception):
    """Why a row is no recipe. It travels in the place of a value, so that one bad row does not end its file."""

def read(paths, account, allow_bad=0.01):
    """The recipes of several files as one heap, as they are. Bad rows are counted in the account and skipped; if their
    share is above `allow_bad`, that is a UserError after the last row. Who goes without `clean` sets account.kept."""
    paths = [Path(p) for p in ([paths] if isinstance(paths, (str, Path)) else paths)]
    kinds = [Path(path.name.lower().removesuffix(".gz")).suffix for path in paths]
    for path, kind in zip(paths, kinds):  # all of them before the first row: a typo in the last should cost no time
        wrong = "does not exist" if not path.exists() else "is a folder" if path.is_dir() else "has another ending"
        if not path.is_file() or kind not in FORMATS:
            raise UserError(f"{path} {wrong}: --data takes {', '.join(FORMATS)} files, each also with .gz behind it.")
    for path, kind in zip(paths, kinds):
        try:
            with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
                for line, row in FORMATS[kind](file, path):
                    try:
                        recipe = _recipe(row)
                    except (BadRow, RecursionError) as why:
                        account.bad += 1
                        account.bad_examples += [f"{path}:{line}: {why}"] * (account.bad <= 3)
                    else:
                        account.read += 1
                        yield recipe
        except (EOFError, zlib.error, OSError, csv.Error) as e:  # mostly gzip that is cut off, corrupt, or none
            raise UserError(f"{path} cannot be read to its end: {e}. Fetch it again if it was cut off.") from e
    rows = account.read + account.bad
    if rows == 0:
        raise UserError(f"There is no row in {', '.join(map(str, paths))}.")
    if account.bad > allow_bad * rows:
        raise UserError(f"{account.bad:,} of {rows:,} rows ({account.bad / rows:.1%}) are no recipes: "
                        f"{'; '.join(account.bad_examples)}. Repair them, or allow a larger share with --allow_bad.")

def _json_rows(file, path):
    """(entry number, row) of a JSON file: a list of rows, or an object of them."""
    try:
        heap = json.loads(file.read().decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:  # ValueError: broken JSON or UTF-8, and the message says where
        raise UserError(f"{path} is broken JSON: {e}.") from e
    heap = list(heap.values()) if isinstance(heap, dict) else heap
    return enumerate(heap if isinstance(heap, list) else [heap], 1)

def _jsonl_rows(file, path):
    """(line number, row) of bytes, which are cut at \\n only: in text a U+2028 inside a string may end a line too."""
    return ((n, _json(line, "the line")) for n, line in enumerate(file, 1))

def _csv_rows(file, path):
    """(number of its first line, row) of a CSV in the columns of RecipeNLG, where a list is JSON inside its cell."""
    csv.field_size_limit(2**31 - 1)
    # surrogateescape: a byte that is no UTF-8 spoils its own row (see _recipe) and not the rest of the file
    reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=""))
    header = next(reader, [])
    missing = [name for name in ("title", "ingredients", "directions") if name not in header]
    if missing:
        found = repr([name[:40] for name in header[:12]])  # repr: the bytes may be anything
        raise UserError(f"{path} lacks the columns {', '.join(missing)}; its first line has {found}.")
    line = reader.line_num + 1
    for cells in reader:
        if len(cells) == len(header):
            row = dict(zip(header, cells))
            yield line, row | {name: _json(row[name], f"`{name}`") for name in ("ingredients", "directions")}
        else:
            yield line, BadRow(f"{len(cells)} cells under {len(header)} columns" if cells else "an empty line")
        line = reader.line_num + 1

FORMATS = {".json": _json_rows, ".jsonl": _jsonl_rows, ".csv": _csv_rows}

def _json(text, what):
    """The value of a JSON text (or of its bytes), or a BadRow in its place."""
    try:
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as e:  # ValueError: broken JSON, broken UTF-8, a number of 5,000 digits
        why = getattr(e, "msg", e) if text.strip() else "it is empty"
        return BadRow(f"{what} is no JSON in UTF-8 ({why})")

def _recipe(row):
    """The Recipe of a JSON object; BadRow if it is none."""
    if not isinstance(row, dict):
        raise row if isinstance(row, BadRow) else BadRow(f"no JSON object but {row!r:.40}")
    steps = "steps" if "steps" in row and "directions" not in row else "directions"  # the Wikibooks file says steps
    if "ingredients" in row or steps in row:
        recipe = Recipe(_field(row, "title"), _field(row, "ingredients", many=True), _field(row, steps, many=True))
    elif "completion" in row:
        recipe = Recipe(prompt=_field(row, "prompt"), completion=_field(row, "completion"))
    elif "text" in row:
        recipe = Recipe(prompt="", completion=_field(row, "text"))
    else:
        raise BadRow("it has neither title, ingredients and directions nor text nor prompt and completion")
    try:
        "".join(recipe.text()).encode()
    except UnicodeEncodeError as e:  # no tokenizer takes it
        raise BadRow("a lone surrogate, or bytes that are no UTF-8") from e
    return recipe

def _field(row, name, many=False):
    """The text under a name or, with `many`, the list of texts."""
    value = row.get(name, BadRow(f"`{name}` is missing"))
    if isinstance(value, BadRow):
        raise value
    if isinstance(value, list) != many or not all(isinstance(text, str) for text in (value if many else [value])):
        raise BadRow(f"`{name}` is no {'list of texts' if many else 'text'} but {value!r:.40}")
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
    fixed = Recipe(tidy(recipe.title), ingredients, directions)
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
    min_mentioned: float = 0.2  # drop recipes of 4 or more ingredients if the directions name a smaller share of them

@dataclass
class Heap:
    """What a rule may know besides the recipe: the bounds, and what came before."""
    rules: Rules
    near: "Near"
    seen: set[int] = field(default_factory=set)  # keys

def _outside(n, what, low=0, high=float("inf")):
    return "" if low <= n <= high else f"{n} {what}{'' if n == 1 else 's'}"
def _words(recipe):
    parts = [recipe.title, *recipe.ingredients, *recipe.directions, recipe.prompt or "", recipe.completion or ""]
    return len(" ".join(parts).split())

def no_title(recipe, heap):
    """The title is empty: there would be nothing to ask the model for."""
    return "" if recipe.title else "no title"

def too_short(recipe, heap):
    """Fewer words than min_words."""
    return _outside(_words(recipe), "word", low=heap.rules.min_words)

def too_long(recipe, heap):
    """More words than max_words."""
    return _outside(_words(recipe), "word", high=heap.rules.max_words)

def few_ingredients(recipe, heap):
    """Fewer than min_ingredients."""
    return _outside(len(recipe.ingredients), "ingredient", low=heap.rules.min_ingredients)

def many_ingredients(recipe, heap):
    """More than max_ingredients."""
    return _outside(len(recipe.ingredients), "ingredient", high=heap.rules.max_ingredients)

def few_steps(recipe, heap):
    """Fewer than min_steps."""
    return _outside(len(recipe.directions), "step", low=heap.rules.min_steps)

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

UNITS = set(re.findall(r"\w+", """cup cups cupful tablespoon tablespoons teaspoon teaspoons tbsp tsp ounce ounces pound
    pounds gram grams pint pints quart quarts large small medium fresh pinch dash can cans piece and the with from"""))
ALL = re.compile(r"\b(?:ingredients|everything|all together|(?:mix|combine|stir|blend|beat|boil) (?:it |them )?all)\b")

def unused_ingredients(recipe, heap):
    """Directions that name almost none of the ingredients, nor all of them at once: the two do not belong together."""
    text = " ".join(recipe.directions).casefold()
    words = (re.findall(r"[^\W\d_]{3,}", item.casefold()) for item in recipe.ingredients)
    names = [n for found in words if (n := [w for w in found if w not in UNITS])]
    named = sum(any(w[:max(3, len(w) - 2)] in text for w in n) for n in names)  # less the plural's ending
    if len(names) < 4 or named >= heap.rules.min_mentioned * len(names) or ALL.search(text):
        return ""
    return f"{named} of {len(names)} ingredients in the directions"

def duplicate(recipe, heap):
    """The content of an earlier recipe. Late among the rules: only what stays should make another one a duplicate."""
    before = len(heap.seen)
    heap.seen.add(key(recipe))
    return "same content as an earlier one" if len(heap.seen) == before else ""

class Near:
    """Which recipes share most of their 3-word shingles: MinHash with banding (Broder 1997). Of two that share 0.8
    (Jaccard) 98.5 % share one of 8 bands of 4 minima; who had it last is looked up, and compared from a file."""
    A = np.random.default_rng(0).integers(0, 2**31, 32).astype(np.uint32) * 2 + 1  # odd: x -> x * a is one to one
    def __init__(self):
        self.file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (until the heap is clean)
        self.ends, self.bands = array("Q", [0]), array("I")
        self.table = np.zeros((8, 2**12), np.uint32)  # [band, its hash] -> the last recipe that had it, from 1

    @staticmethod
    def shingles(recipe):
        words = re.findall(r"\w+", " ".join(recipe.ingredients + recipe.directions).casefold())
        h = np.array(list(map(zlib.crc32, map(str.encode, words))), dtype=np.uint32)
        return np.unique(((h[:-2] * Near.A[0] ^ h[1:-1]) * Near.A[1] ^ h[2:]) * Near.A[2])

    def find(self, mine, least):
        """How much an earlier recipe shares, if it is at least that; else 0, and this one is remembered."""
        bands = ((mine[:, None] * self.A).min(0).reshape(8, 4) * self.A[:4]).sum(1, dtype=np.uint32)
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

def near_duplicate(recipe, heap):
    """An earlier recipe with other words here and there."""
    least, mine = heap.rules.max_similar, heap.near.shingles(recipe)
    same = heap.near.find(mine, least) if least <= 1 and len(mine) else 0
    return f"{same:.0%} the same as an earlier one" if same else ""

RULES = {rule.__name__: rule for rule in  # the first that a recipe fails counts it
         (no_title, too_short, too_long, few_ingredients, many_ingredients, few_steps, points_elsewhere,
          unused_ingredients, duplicate, near_duplicate)}
ANY_TEXT = {"too_short", "too_long", "duplicate"}  # the rules that make sense for a text that is no recipe

def clean(recipes, rules, account):
    """Repair each recipe, drop it by the first rule that it fails, yield the rest; all of it counted in the account."""
    heap = Heap(rules, Near())
    for recipe in recipes:
        fixed = repair(recipe)
        account.repaired += fixed is not recipe
        for name, rule in RULES.items():
            if (fixed.completion is None or name in ANY_TEXT) and (why := rule(fixed, heap)):
                account.drop(name, fixed, why)
                break
        else:
            account.kept += 1
            yield fixed

def key(recipe):
    """64 bits that recipes of the same content share: ingredients and directions without case and white space (another
    title makes no other recipe), or a text exactly as it is."""
    if recipe.completion is None:
        content = " ".join(" ".join(recipe.ingredients + recipe.directions).casefold().split())
    else:
        content = f"{recipe.prompt}\0{recipe.completion}"
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little")

def save(recipes, path):
    """Write recipes as JSON Lines that `read` takes, gzipped if the name ends in .gz. All of them or no file."""
    part = path.with_name(f"{path.name}.part")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(part, "wt", encoding="utf-8") as out:
            for r in recipes:
                row = ("title", "ingredients", "directions") if r.completion is None else ("prompt", "completion")
                out.write(json.dumps({name: getattr(r, name) for name in row}, ensure_ascii=False) + "\n")
        part.replace(path)
    except OSError as e:
        raise UserError(f"--to {path} cannot be written ({e}).") from None
    finally:
        if part.is_file():
            part.unlink()

def held_out(keys, n, seed):
    """Which recipes are kept from training, as booleans: n of them, or as many as whole groups of a key come to, never
    more than half of the heap. Recipes that share a key stay on one side, else the held-out loss would praise memory.
    The choice hangs on keys, n and seed alone: files in another order, or a few more recipes, leave nearly the same."""
    groups, group_of, sizes = np.unique(np.asarray(keys, dtype=np.uint64), return_inverse=True, return_counts=True)
    x = groups + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)  # splitmix64, the same with every version of numpy:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)   # it gives each key a number, and each seed its own
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)   # order of the groups
    total, out, half = 0, np.zeros(len(groups), dtype=bool), len(group_of) // 2
    for g in np.argsort(x ^ (x >> np.uint64(31))):
        if total + sizes[g] <= min(n, half):
            out[g], total = True, total + sizes[g]
    if n > 0 and not total and len(sizes) and sizes.min() <= half:  # all are larger than n
        out[sizes.argmin()] = True
    return out[group_of]
