"""Rows become recipes: parsed, repaired, judged by readable rules, and every drop is counted with its reason.

    account = Account()
    kept = list(clean(["full_dataset.csv", "mine.jsonl.gz"], Rules(), account))  # texts to train on
    print(account.read, account.kept, account.dropped)

Two passes over the files. The first counts the names of ingredients, so that a rule can tell what is rare. The second
parses, repairs and judges each recipe alone, in a process a core where the files are large; then this process drops
duplicates and near duplicates. `clean` is a generator and holds no recipe, but up to 400 bytes of each one kept.
"""

from cli import Progress, UserError

import gc
import hashlib
import html
import multiprocessing
import os
import re
import signal
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import cycle
from typing import NamedTuple

import numpy as np

import near
from files import sources
from files.sources import BadRow

ROLES = {"system", "user", "assistant"}
EXAMPLES = 3  # kept of each rule, and of the bad rows
MOST_PROCESSES = 16


@dataclass(slots=True)
class Recipe:
    """A recipe as lists or, where `completion` is not None, any other text that people bring."""

    title: str = ""
    ingredients: list[str] = field(default_factory=list)
    directions: list[str] = field(default_factory=list)
    # The names of its ingredients, where somebody has them.
    ner: list[str] = field(default_factory=list, compare=False)
    prompt: str | None = None
    completion: str | None = None
    # The turns of a chat, whose contents are the completion, too.
    messages: list[dict] = field(default_factory=list)

    def text(self):
        """(prompt, completion): the title line without its newline, and everything from the two newlines on."""
        if self.completion is not None:
            return self.prompt, self.completion
        ingredients = "\n- ".join(["\n\nIngredients:", *self.ingredients])
        steps = [f"{n}. {step}" for n, step in enumerate(self.directions, 1)]
        directions = "\n".join(["\n\nDirections:", *steps])
        return self.title, ingredients + directions


@dataclass
class Account:
    """What became of every row: read + bad are the rows of the source, read = kept + the sum of dropped."""

    read: int = 0
    bad: int = 0  # rows that are no recipe: broken JSON, wrong fields
    repaired: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(RULES, 0))
    # Three a rule, as "title: why".
    examples: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in RULES})
    # The first three, as "file:line: why".
    bad_examples: list[str] = field(default_factory=list)

    def add_bad(self, why):
        self.bad += 1
        if self.bad <= EXAMPLES:
            self.bad_examples.append(str(why))

    def refuse(self, why):
        """Count a recipe as a bad row that had been counted as a kept one."""
        self.read -= 1
        self.kept -= 1
        self.add_bad(why)

    def drop(self, rule, example):
        self.dropped[rule] += 1
        if self.dropped[rule] <= EXAMPLES:
            self.examples[rule].append(example)

    def check_bad(self, files, allow_bad):
        """A UserError where the files have no row, or where a larger share than allow_bad is bad."""
        rows = self.read + self.bad
        if not rows:
            raise UserError(f"There is no row in {', '.join(map(str, files))}.")
        if self.bad > allow_bad * rows:
            share = f"{self.bad:,} of {rows:,} rows ({self.bad / rows:.1%})"
            raise UserError(
                f"{share} are no recipes: {'; '.join(self.bad_examples)}. "
                f"Repair them, or allow a larger share with --allow_bad."
            )


# --- parsing: a row becomes a Recipe, or a BadRow says why not ---


def parse(row):
    """The Recipe of a dict of files/sources.py, as it is there; raises BadRow where it is none."""
    recipe = parse_fields(row)
    text = "".join([*recipe.text(), *recipe.ner])
    # A lone surrogate is lost in "ignore". No tokenizer takes one.
    if not text.isascii() and text != text.encode(errors="ignore").decode():
        raise BadRow("a lone surrogate, or bytes that are no UTF-8")
    return recipe


def parse_fields(row):
    if "ingredients" in row or "directions" in row or "steps" in row:
        return parse_lists(row)
    if "messages" in row:
        return parse_chat(row)
    if "completion" in row:
        return Recipe(prompt=text_of(row, "prompt"), completion=text_of(row, "completion"))
    if "text" in row:
        return Recipe(prompt="", completion=text_of(row, "text"))
    raise BadRow(
        "it has neither title, ingredients and directions nor text, prompt and completion, or messages"
    )


def parse_lists(row):
    ner = []
    if row.get("NER"):
        ner = texts_of(row, "NER")
    # The Wikibooks file calls them steps.
    steps = "directions"
    if "steps" in row and "directions" not in row:
        steps = "steps"
    return Recipe(text_of(row, "title"), texts_of(row, "ingredients"), texts_of(row, steps), ner)


def parse_chat(row):
    # Other fields of a turn are left out.
    turns = [
        {"role": text_of(turn, "role"), "content": text_of(turn, "content")}
        for turn in list_of(row, "messages", dict, "list of objects")
    ]
    roles = {turn["role"] for turn in turns}
    unknown = roles - ROLES
    if unknown:
        raise BadRow(f"`messages` has the unknown role {min(unknown)!r:.40}")
    if "assistant" not in roles:
        raise BadRow("`messages` has no turn of the assistant: nothing to learn")
    said = [": ".join(turn.values()) for turn in turns]
    return Recipe(prompt="", completion="\n\n".join(said), messages=turns)


def text_of(row, name):
    text = row.get(name)
    if not isinstance(text, str):
        raise wrong_field(row, name, "text")
    return text


def texts_of(row, name):
    return list_of(row, name, str, "list of texts")


def list_of(row, name, kind, what):
    items = row.get(name)
    if not isinstance(items, list) or not all(isinstance(item, kind) for item in items):
        raise wrong_field(row, name, what)
    return items


def wrong_field(row, name, kind):
    if name not in row:
        return BadRow(f"`{name}` is missing")
    return BadRow(f"`{name}` is no {kind} but {row[name]!r:.40}")


# --- repairing: what can be mended is not dropped ---

# List marks, which text() adds again ("- x", "1. x", a wiki's "*#x"); not "**so** good", "#10 tin", "1.5" or "1. 5 g".
MARK = re.compile(
    r"^(?:[-–—•*](?:\s+|$)|\*#?(?![^*]*\*)\s*|#+\s*(?=[^\W\d_])|\d{1,2}[.)](?:\s+(?!\d)|$))"
)
# Of a page: a footnote with its text, tags ("<5 g" is none), links.
MARKUP = re.compile(
    r"(?is)<ref\b[^<>]*/>|<ref\b[^<>]*>.*?</ref>|</?[a-z]+\d?(?: [^<>]*)?/?>|\[https?://[^]]*\]"
    r"|(?:https?://|www\.)\S+"
)
# Talk about the page, where it is the whole item.
BOILERPLATE = re.compile(
    r"(?i)(?:originally published at|adapted from|recipe (?:by|from|courtesy of)|photo by|©"
    r"|copyright|all rights reserved|click here|subscribe|follow us|print this|advertisement)\b.*|(?:©|source:).*"
)


def tidy(text):
    """Entities become characters (&frac12; is ½), white space (a no-break one, too) single spaces; markup goes."""
    text = html.unescape(text)
    # Few texts have any markup, and the substitution is slow.
    if "<" in text or "://" in text or "www." in text:
        text = MARKUP.sub("", text)
    return " ".join(text.split())


def tidy_items(texts):
    """The texts tidy, without list marks, empty ones and talk about the page."""
    items = [MARK.sub("", tidy(text)) for text in texts]
    return [item for item in items if item and not BOILERPLATE.fullmatch(item)]


def repair(recipe):
    """The recipe with its title and lists tidy; the same object if all was well."""
    # White space has a meaning in a text of one's own.
    if recipe.completion is not None:
        return recipe
    ingredients = tidy_items(recipe.ingredients)
    directions = tidy_items(recipe.directions)
    fixed = Recipe(tidy(recipe.title), ingredients, directions, recipe.ner)
    if fixed == recipe:
        return recipe
    return fixed


# --- the rules: each says why a recipe should go, or nothing ---


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


@dataclass
class Context:
    """What a rule knows beside the recipe before it."""

    rules: Rules | None  # the bounds; None: no rule is asked
    common: set[str] | None = None  # names of ingredients that are not rare, see common()
    keys: set[int] = field(default_factory=set)  # of the recipes before, see key()
    earlier: near.Earlier | None = None  # the recipes before; None in a worker process


def count_words(recipe):
    texts = [recipe.title, *recipe.ingredients, *recipe.directions]
    if recipe.completion is not None:
        texts = [recipe.prompt, recipe.completion]
    return len(" ".join(texts).split())


def no_title(recipe, context):
    """The title is empty: there would be nothing to ask the model for."""
    if not recipe.title:
        return "no title"
    return ""


def too_short(recipe, context):
    """Fewer words than min_words."""
    words = count_words(recipe)
    if words < context.rules.min_words:
        return f"words: {words}"
    return ""


def too_long(recipe, context):
    """More words than max_words."""
    words = count_words(recipe)
    if words > context.rules.max_words:
        return f"words: {words}"
    return ""


def few_ingredients(recipe, context):
    """Fewer than min_ingredients."""
    n = len(recipe.ingredients)
    if n < context.rules.min_ingredients:
        return f"ingredients: {n}"
    return ""


def many_ingredients(recipe, context):
    """More than max_ingredients."""
    n = len(recipe.ingredients)
    if n > context.rules.max_ingredients:
        return f"ingredients: {n}"
    return ""


def few_steps(recipe, context):
    """Fewer than min_steps."""
    n = len(recipe.directions)
    if n < context.rules.min_steps:
        return f"steps: {n}"
    return ""


# A step that sends the reader elsewhere; not "as directed on the package", nor "See that …".
POINTER = re.compile(
    r"(?i)(?:same as|as (?:for|in|above|directed) |follow (?:the )?(?:directions|recipe|instructions)"
    r" (?:for|of|in|above)|see (?-i:[A-Z]\w*)(?= |\.?$)|see (?:no\. ?\d|page|recipe|above|directions)|(?:prepare|make"
    r"|proceed|cook|serve|bake|finish|treat)(?: [\w’'-]+){0,4} (?:(?:exactly |just )?(?:the )?same as|as (?:for|in"
    r"|above|directed (?:for|in|above))|(?:as|like) the (?:above|preceding|previous|last)|according to recipe))"
    r"\b(?!.*\b(?:package|packet|packaging|box|label|tin|jar)\b)"
)


def points_elsewhere(recipe, context):
    """A short step that only points to another recipe ("As for wild duck", "See Pie Crust"): the reader has it not."""
    for step in recipe.directions:
        if len(step.split()) <= 12 and POINTER.match(step):
            return repr(step)
    return ""


# Words of an ingredient that belong to no name.
NO_NAME = set(
    re.findall(
        r"\w+",
        """a about an and bag beaten bottle box bunch c can cans chopped clove cloves coarsely
    cooked crushed cubed cup cupful cups dash diced divided drained finely for fresh freshly from g gallon gram grams
    grated halved head jar kg l large lb lbs medium melted minced ml of optional or ounce ounces oz package peeled piece
    pinch pint pints pkg pound pounds pt qt quart quarts shredded slice sliced slices small softened stick sticks
    tablespoon tablespoons taste tb tbl tbsp tbsps teaspoon teaspoons the thinly to tsp tsps with""",
    )
)
BRACKETS = re.compile(r"\([^)]*\)?|\[[^]]*\]?")
NAME_ENDS = re.compile(r"[,;:]| - ")


@lru_cache(2**16)
def name(item):
    """What remains of an ingredient without quantity, unit, brackets and preparation: in lower case, and singular."""
    text = BRACKETS.sub(" ", tidy(item).casefold())
    head = NAME_ENDS.split(text)[0]
    words = re.findall(r"[^\W\d_]+", head)
    words = [word for word in words if word.isalpha() and word not in NO_NAME]
    if not words:
        return ""
    return " ".join([*words[:-1], singular(words[-1])])


def singular(word):
    word = re.sub(r"(?<=[^aeiou])ies$", "y", word)
    return re.sub(r"(?:(?<=[oxz]|s|h)e)?(?<![su])s$", "", word)


def names(recipe, where=""):
    """The names of its ingredients: from the NER column, where somebody has it."""
    found = map(name, recipe.ner or recipe.ingredients)
    return list(filter(None, found))


ALL = re.compile(
    r"\b(?:ingredients|everything|all together|(?:mix|combine|stir|blend|beat|boil) (?:it |them )?all)\b"
)


def mentioned(recipe):
    """(how many of its ingredients the directions name, how many it has)"""
    text = " ".join(recipe.directions).casefold()
    found = names(recipe)
    named = 0
    for one in found:
        words = [word for word in one.split() if len(word) > 2]
        # Without its last two letters, a word is found in other forms of it, too.
        named += any(word[: max(3, len(word) - 2)] in text for word in words)
    return named, len(found)


def unused_ingredients(recipe, context):
    """Directions that name almost none of the ingredients, nor all of them at once: the two do not belong together."""
    named, n = mentioned(recipe)
    if n < 4 or named >= context.rules.min_mentioned * n:
        return ""
    if ALL.search(" ".join(recipe.directions).casefold()):
        return ""
    return f"{named} of {n} ingredients in the directions"


def common(found, rules):
    """Of the names() of all recipes those that min_share of them have; None below 50,000 recipes.

    Of fewer recipes, half the honest ingredients would be rare."""
    counts = Counter()
    total = 0
    for one in found:
        counts.update(set(one))
        total += 1
    if total < 50_000:
        return None
    return {one for one in counts if counts[one] >= rules.min_share * total}


def rare_ingredient(recipe, context):
    """An ingredient that hardly any other recipe has: mostly a typing error, or a text that is no ingredient."""
    if context.common is None:
        return ""
    for one in names(recipe):
        if one not in context.common:
            return f"{one!r:.60}"
    return ""


def duplicate(judged, context):
    """The content of an earlier recipe, or of one of the held-out file."""
    if judged.key in context.keys:
        return "same content as an earlier one"
    context.keys.add(judged.key)
    return ""


def near_duplicate(judged, context):
    """Such a recipe with other words here and there."""
    if judged.sketch is None:
        return ""
    same = context.earlier.find(*judged.sketch, context.rules.max_similar)
    if same:
        return f"{same:.0%} the same as an earlier one"
    return ""


# What can be said of one recipe alone; a recipe counts for the first rule that it fails.
EARLY = [
    no_title,
    too_short,
    too_long,
    few_ingredients,
    many_ingredients,
    few_steps,
    points_elsewhere,
    unused_ingredients,
    rare_ingredient,
]
EARLY_OF_A_TEXT = [too_short, too_long]  # the other rules make no sense for a text
# Asked last, because only a recipe that stays should make another one a duplicate.
LATE = [duplicate, near_duplicate]
RULES = {rule.__name__: rule for rule in EARLY + LATE}


# --- judging: the larger part of the work, which any process can do ---


class Judged(NamedTuple):
    """One row as it leaves its worker process: as little as has to cross the pipe."""

    where: str  # file:line
    label: str  # the beginning of its title or text, for the account
    prompt: str  # text to train on; empty for a chat and for a recipe that failed
    completion: str
    messages: list[dict]  # of a chat, in place of a text
    key: int  # see key()
    repaired: bool
    failed: tuple | None  # (rule, why), of the first early rule that it fails
    sketch: tuple | None  # see near.sketch; None where near duplicates do not matter
    recipe: Recipe | None  # the whole, where somebody wants to save it


def judge(recipe, where, context, whole=False):
    """Repair a recipe and ask the early rules. Without rules, all recipes stay as they are."""
    fixed = recipe
    failed = None
    sketch = None
    if context.rules is not None:
        fixed = repair(recipe)
        rules = EARLY if fixed.completion is None else EARLY_OF_A_TEXT
        failed = first_failed(rules, fixed, context)
        if not failed:
            sketch = sketch_of(fixed, context.rules)
    prompt = completion = ""
    if not failed and not fixed.messages:
        prompt, completion = fixed.text()
    return Judged(
        where=where,
        label=label_of(fixed),
        prompt=prompt,
        completion=completion,
        messages=fixed.messages,
        key=key(fixed),
        repaired=fixed is not recipe,
        failed=failed,
        sketch=sketch,
        recipe=fixed if whole else None,
    )


def first_failed(rules, what, context):
    """(name, why) of the first of some rules that fails, or None."""
    for rule in rules:
        why = rule(what, context)
        if why:
            return rule.__name__, why
    return None


def sketch_of(recipe, rules):
    if recipe.completion is not None or rules.max_similar > 1:
        return None
    return near.sketch(" ".join(recipe.ingredients + recipe.directions))


def label_of(recipe):
    beginning = recipe.title or (recipe.completion or "")[:500]
    return " ".join(beginning.split())[:60] or "(no title)"


def key(recipe):
    """64 bits that recipes of the same ingredients and directions share, in any case and spacing; or that very text."""
    if recipe.completion is None:
        words = " ".join(recipe.ingredients + recipe.directions).casefold().split()
        content = " ".join(words)
    else:
        content = f"{recipe.prompt}\0{recipe.completion}"
    digest = hashlib.blake2b(content.encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


# --- jobs: what is made of each recipe, in this process or in one a core ---


def make(job, rows):
    """What job(recipe, where) makes of each row of a list; a BadRow that says where and why stands for a bad one."""
    made = []
    for path, line, row in rows:
        where = f"{path}:{line}"
        # Not raised: its traceback would hold the whole list of rows as long as nobody looks for cycles.
        if isinstance(row, BadRow):
            made.append(BadRow(f"{where}: {row}"))
            continue
        try:
            made.append(job(parse(row), where))
        except (BadRow, RecursionError) as why:
            made.append(BadRow(f"{where}: {why}"))
    return made


def here(job, files):
    """What a job makes of the rows of some files, in lists."""
    for rows in sources.read(files):
        yield make(job, rows)


def in_processes(job, files):
    """The lists of `here`, in the same order, made by a process a core."""
    pipes = []
    before = gc.get_threshold()
    # Looking for cycles, where there are none, costs a tenth. A forked process takes this threshold along.
    gc.set_threshold(10**6)
    n = count_processes()
    for rank in range(n):
        pipe, end = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.Process(
            target=work, args=(pipe, end, job, files, rank, n), daemon=True
        )
        process.start()
        end.close()
        pipes.append(pipe)
    try:
        for pipe in cycle(pipes):
            made = pipe.recv()
            if made is None:
                return
            if isinstance(made, UserError):
                raise made
            yield made
    except (EOFError, OSError):
        message = "a process that reads recipes was killed; mostly, memory ran out."
        raise UserError(message) from None
    finally:
        gc.set_threshold(*before)


def count_processes():
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return min(cores, MOST_PROCESSES)


def work(pipe, end, job, files, rank, n):
    """A worker process: send what the job makes of every n-th list of rows, then None; or the error that ended it."""
    # Now only the main process reads. When that ends, the next `send` ends this process, too, by SIGPIPE.
    pipe.close()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    # Ctrl-C is for the process that waits.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for rows in sources.read(files, rank, n):
            end.send(make(job, rows))
        end.send(None)
    except UserError as e:
        end.send(e)


def read(job, files, account, allow_bad):
    """What a job makes of each row. Bad rows are counted and left out; too many of them are a UserError at the end."""
    run = here
    if sources.are_large(files):
        run = in_processes
    for some in run(job, files):
        for made in some:
            if isinstance(made, BadRow):
                account.add_bad(made)
            else:
                account.read += 1
                yield made
    account.check_bad(files, allow_bad)


# --- cleaning: the way from files to the recipes that stay ---


def clean(files, rules, account, allow_bad=0.01, held=(), whole=False):
    """The recipes that fail no rule and are like none of the files `held`, as Judged; everything is counted.

    Without rules (None) every recipe stays, as it is. `whole`: keep the Recipe beside its text."""
    sources.check([*files, *held])
    context = Context(rules, earlier=near.Earlier())
    alone = Context(rules)
    if rules is not None:
        # A held-out recipe counts, whatever is rare here: `common` is not known yet.
        if held:
            others = read(partial(judge, context=alone), held, Account(), allow_bad=1.0)
            remember(others, context)
        if rules.min_share:
            found = read(names, files, Account(), allow_bad)
            alone.common = common(Progress(None, "ingredients").over(found), rules)
    judged = read(partial(judge, context=alone, whole=whole), files, account, allow_bad)
    yield from keep(judged, context, account)


def remember(judged, context):
    """Make recipes known to the late rules, so that no later one is like one of them."""
    for one in judged:
        first_failed(LATE, one, context)


def keep(judged, context, account):
    """Those that no rule drops; `judged` has the answers of the early rules, the late ones are asked here."""
    for one in judged:
        account.repaired += one.repaired
        failed = one.failed
        if not failed and context.rules is not None:
            failed = first_failed(LATE, one, context)
        if failed:
            rule, why = failed
            account.drop(rule, f"{one.label}: {why}")
        else:
            account.kept += 1
            yield one


def row_of(recipe):
    """The row that parse() makes this recipe of."""
    if recipe.messages:
        return {"messages": recipe.messages}
    if recipe.prompt is not None:
        return {"prompt": recipe.prompt, "completion": recipe.completion}
    return {column: getattr(recipe, column.lower()) for column in sources.COLUMNS}


# --- holding out ---


def held_out(keys, n, seed):
    """Which recipes are kept from training, as booleans: n of them, at most half.

    Recipes of one key go together, because of a pair that is split, the loss would praise memory. So there may be a few
    less than n. Files in another order, or a few more recipes, leave nearly the same choice."""
    keys = np.asarray(keys, dtype=np.uint64)
    groups, group_of, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    out = np.zeros(len(groups), dtype=bool)
    left = min(n, len(keys) // 2)
    # Keys are hashes: in the order of their bits, some of them flipped by the seed, they are random enough.
    flipped = np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    for group in np.argsort(groups ^ flipped):
        if sizes[group] <= left:
            out[group] = True
            left -= sizes[group]
    all_are_larger = n > 0 and not out.any()
    if all_are_larger and len(keys) > 1 and sizes.min() <= len(keys) // 2:
        out[sizes.argmin()] = True
    return out[group_of]
