"""Rows become recipes: parsed, repaired, judged by readable rules. Each dropped recipe is counted under its rule.

    account = Account()
    kept = list(clean(["full_dataset.csv", "mine.jsonl.gz"], Rules(), account))  # texts to train on
    print(account.read, account.kept, account.dropped)

The rules, in the order in which they are asked (each is a function below; the bounds are the class Rules):

    no_title, too_short, too_long                   no_title and the bounds on words
    few_ingredients, many_ingredients, few_steps    the bounds on lists
    points_elsewhere                                "Prepare the duck as for wild duck."
    unused_ingredients                              directions that name almost none of the ingredients
    rare_ingredient                                 an ingredient that hardly any other recipe has
    duplicate, near_duplicate                       the content of an earlier recipe, exactly or nearly

Why cleaning helps: a stub teaches a model to stop early, a duplicate takes the time of a new recipe and teaches
nothing. Measured on 57,448 recipes, of which the rules drop 7 %; SmolLM2-135M, 2,000 steps, held-out loss of seeds 1, 2
and 3 on 337 modern recipes (README.md has the setting):

    trained on                seed 1    seed 2    seed 3    mean
    everything                2.2069    2.2114    2.2107    2.2097
    what the rules leave      2.2056    2.2087    2.2075    2.2073
    as many at random         2.2120    2.2098    2.2116    2.2111

Clean is best with each seed, by 0.001 to 0.006. That is little, because only 7 % are dropped, and the seeds alone
differ by up to 0.005. The other gain is time. In 2.2 million rows of which 8 % are defects, the rules drop 178,000
recipes. At 255 tokens each these are 45 million tokens: 41 minutes an epoch for 8B at 18,283 tokens a second.

Cost: reading, cleaning and tokenising 2.2 million rows takes 1,527 s on two cores and 197 s on 16, once; after that the
tokens are in the cache. And rules drop honest recipes, too: `python data.py` shows three recipes of each rule.

Proof: test_a_rule_drops_what_is_beyond_its_bound_and_only_that and
test_the_account_of_a_made_up_recipenlg_is_what_was_planted (tests/test_recipes.py).

How: `clean` passes over the files twice. The first pass counts the names of ingredients, because rare_ingredient has to
know what is rare. The second pass parses, repairs and judges each recipe alone, in a process a core where the files
are large. Then the main process drops duplicates. `clean` is a generator that holds no recipe. Up to 400 bytes of each
kept recipe stay in memory, to find duplicates by.
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
from rows import Chat, Recipe, parse

# Examples that an Account shows of each rule, and of the bad rows.
EXAMPLES = 3
MOST_PROCESSES = 16


@dataclass
class Account:
    """What became of every row. 10 rows, 1 of them broken and 2 duplicates: bad 1, read 9, dropped 2, kept 7.

    Always read + bad = rows of the files, and read = kept + the sum of dropped."""

    # Rows that are a recipe.
    read: int = 0
    # Rows that are no recipe: broken JSON, wrong fields, a chat that the template refuses.
    bad: int = 0
    # Recipes that `repair` changed, kept or not.
    repaired: int = 0
    kept: int = 0
    # How many recipes each rule dropped.
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(RULES, 0))
    # Three dropped recipes a rule, as "title: why".
    examples: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in RULES})
    # The first three bad rows, as "file:line: why".
    bad_examples: list[str] = field(default_factory=list)
    # {field: in how many rows it stands beside those that are used}
    unused: dict[str, int] = field(default_factory=dict)

    def add_bad(self, why):
        """Count a bad row. why: "file:line: why" """
        self.bad += 1
        if self.bad <= EXAMPLES:
            self.bad_examples.append(str(why))

    def refuse(self, why):
        """Count as a bad row a recipe that was counted as kept: its chat cannot be tokenised."""
        self.read -= 1
        self.kept -= 1
        self.add_bad(why)

    def note_unused(self, fields):
        """Count the fields of a row that were not used. Name a hundred at most, because rows may differ in them."""
        for name in fields:
            if name in self.unused or len(self.unused) < 100:
                self.unused[name] = self.unused.get(name, 0) + 1

    def drop(self, rule, example):
        """Count a recipe that a rule dropped. example: "title: why" """
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


# --- repairing: what can be mended is not dropped ---

# List marks ("- x", "1. x", a wiki's "*#x"), because Recipe.text() adds its own. No list marks are in "**so** good",
# "#10 tin", "1.5" and "1. 5 g".
MARK = re.compile(
    r"^(?:[-–—•*](?:\s+|$)|\*#?(?![^*]*\*)\s*|#+\s*(?=[^\W\d_])|\d{1,2}[.)](?:\s+(?!\d)|$))"
)
# What is left of a web page: a footnote with its text, tags (but "<5 g" is no tag), links.
MARKUP = re.compile(
    r"(?is)<ref\b[^<>]*/>|<ref\b[^<>]*>.*?</ref>|</?[a-z]+\d?(?: [^<>]*)?/?>|\[https?://[^]]*\]"
    r"|(?:https?://|www\.)\S+"
)
# Sentences about the page, where one is a whole ingredient or step: "Photo by …", "Subscribe", "© 2010 …".
BOILERPLATE = re.compile(
    r"(?i)(?:originally published at|adapted from|recipe (?:by|from|courtesy of)|photo by|©"
    r"|copyright|all rights reserved|click here|subscribe|follow us|print this|advertisement)\b.*|(?:©|source:).*"
)


def tidy(text):
    """A text without markup. Entities become characters (&frac12; is ½), white space of any kind single spaces."""
    text = html.unescape(text)
    # Look for markup before substituting, because few texts have any and the substitution is slow.
    if "<" in text or "://" in text or "www." in text:
        text = MARKUP.sub("", text)
    return " ".join(text.split())


def tidy_items(texts):
    """The ingredients or steps, tidy and without list marks. Empty ones and sentences about the page are left out."""
    items = [MARK.sub("", tidy(text)) for text in texts]
    return [item for item in items if item and not BOILERPLATE.fullmatch(item)]


def repair(recipe):
    """The recipe with title and lists tidy; the same object if nothing changed, so that repairs can be counted."""
    # Leave other texts as they are, because their white space has a meaning.
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
    """The bounds of the rules. Why bounds: a stub teaches a model to stop early, and a list of thirty ingredients is
    mostly several recipes in one."""

    # fmt: off
    min_words: int = 25        # drop recipes with fewer words (title, ingredients, directions) than this
    max_words: int = 600       # drop recipes with more words (title, ingredients, directions) than this
    min_ingredients: int = 2   # drop recipes with fewer ingredients than this
    max_ingredients: int = 25  # drop recipes with more ingredients than this
    min_steps: int = 2         # drop recipes with fewer steps of directions than this
    max_similar: float = 0.8   # drop recipes that share this much of their 3-word runs with an earlier one; 2: off
    min_share: float = 1e-5    # drop recipes with an ingredient in less than this share of all (50,000+ recipes)
    min_mentioned: float = 0.2  # drop recipes (4+ ingredients) whose directions name less than this share of them
    # fmt: on


@dataclass
class Context:
    """What a rule knows beside the recipe that it is asked about. `clean` makes two of them:

        alone     for the early rules, in each worker process. `clean` sets `common` once, between the two passes.
        context   for the late rules, in the main process. The rule `duplicate` adds a recipe's key to `keys`, the rule
                  `near_duplicate` adds its 3-word runs to `earlier`, so that later recipes are compared with it.

    No other code changes a Context."""

    # The bounds; None (--no-clean): no rule is asked.
    rules: Rules | None
    # Names of the ingredients that are not rare; None: not counted, so nothing is rare.
    common: set[str] | None = None
    # key() of each recipe so far.
    keys: set[int] = field(default_factory=set)
    # The 3-word runs of each recipe so far; None where only early rules are asked.
    earlier: near.Earlier | None = None


def count_words(recipe):
    texts = [recipe.title, *recipe.ingredients, *recipe.directions]
    if recipe.completion is not None:
        texts = [recipe.prompt, recipe.completion]
    return len(" ".join(texts).split())


def no_title(recipe, context):
    """The title is empty, and the title is what the model is asked for."""
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


# A step that sends the reader elsewhere: "as for", "see page 3"; not "as directed on the package" or "See that …".
POINTER = re.compile(
    r"(?i)(?:same as|as (?:for|in|above|directed) |follow (?:the )?(?:directions|recipe|instructions)"
    r" (?:for|of|in|above)|see (?-i:[A-Z]\w*)(?= |\.?$)|see (?:no\. ?\d|page|recipe|above|directions)|(?:prepare|make"
    r"|proceed|cook|serve|bake|finish|treat)(?: [\w’'-]+){0,4} (?:(?:exactly |just )?(?:the )?same as|as (?:for|in"
    r"|above|directed (?:for|in|above))|(?:as|like) the (?:above|preceding|previous|last)|according to recipe))"
    r"\b(?!.*\b(?:package|packet|packaging|box|label|tin|jar)\b)"
)


def points_elsewhere(recipe, context):
    """A short step only points to another recipe ("As for wild duck"), which the reader does not have."""
    for step in recipe.directions:
        if len(step.split()) <= 12 and POINTER.match(step):
            return repr(step)
    return ""


# Words of an ingredient that are no part of its name: quantities, units, preparations.
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
    """The name in an ingredient, in lower case and singular: "2 large Eggs (beaten), at room temperature" is "egg"."""
    text = BRACKETS.sub(" ", tidy(item).casefold())
    head = NAME_ENDS.split(text)[0]
    words = re.findall(r"[^\W\d_]+", head)
    words = [word for word in words if word.isalpha() and word not in NO_NAME]
    if not words:
        return ""
    return " ".join([*words[:-1], singular(words[-1])])


def singular(word):
    """berries: berry, tomatoes: tomato, eggs: egg, glass: glass."""
    word = re.sub(r"(?<=[^aeiou])ies$", "y", word)
    return re.sub(r"(?:(?<=[oxz]|s|h)e)?(?<![su])s$", "", word)


def names(recipe, where=""):
    """The names of a recipe's ingredients, from the NER column where the row has one. A job: `where` is not used."""
    found = map(name, recipe.ner or recipe.ingredients)
    return list(filter(None, found))


# Words in directions that mean every ingredient at once.
ALL = re.compile(
    r"\b(?:ingredients|everything|all together|(?:mix|combine|stir|blend|beat|boil) (?:it |them )?all)\b"
)


def mentioned(recipe):
    """(how many ingredients the directions name, how many ingredients the recipe has)"""
    text = " ".join(recipe.directions).casefold()
    found = names(recipe)
    named = 0
    for one in found:
        words = [word for word in one.split() if len(word) > 2]
        # Leave out the last two letters, so that "cherry" is found in "cherries".
        named += any(word[: max(3, len(word) - 2)] in text for word in words)
    return named, len(found)


def unused_ingredients(recipe, context):
    """The directions name almost none of the ingredients, nor all at once: the lists are of two different recipes."""
    named, n = mentioned(recipe)
    if n < 4 or named >= context.rules.min_mentioned * n:
        return ""
    if ALL.search(" ".join(recipe.directions).casefold()):
        return ""
    return f"{named} of {n} ingredients in the directions"


def common(found, rules):
    """found: the names() of each recipe. -> the set of names that a share of min_share or more of the recipes has

    None below 50,000 recipes, because in few recipes many honest ingredients stand only once."""
    counts = Counter()
    total = 0
    for one in found:
        counts.update(set(one))
        total += 1
    if total < 50_000:
        return None
    return {one for one in counts if counts[one] >= rules.min_share * total}


def rare_ingredient(recipe, context):
    """An ingredient that hardly any other recipe has is mostly a typing error, or a text that is no ingredient."""
    if context.common is None:
        return ""
    for one in names(recipe):
        if one not in context.common:
            return f"{one!r:.60}"
    return ""


def duplicate(judged, context):
    """The content is that of an earlier recipe or of one in --val_data. Otherwise the recipe's key is remembered."""
    if judged.key in context.keys:
        return "same content as an earlier one"
    context.keys.add(judged.key)
    return ""


def near_duplicate(judged, context):
    """The content is nearly that of an earlier recipe. Otherwise the recipe's 3-word runs are remembered."""
    if judged.sketch is None:
        return ""
    same = context.earlier.find_or_remember(*judged.sketch, context.rules.max_similar)
    if same:
        return f"{same:.0%} the same as an earlier one"
    return ""


# The early rules look at one recipe alone, so worker processes ask them. A recipe counts under the first rule it fails.
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
# The early rules for other texts and chats, which have no lists.
EARLY_OF_A_TEXT = [too_short, too_long]
# The late rules compare with earlier recipes. Ask them last, because only a kept recipe may make another a duplicate.
LATE = [duplicate, near_duplicate]
RULES = {rule.__name__: rule for rule in EARLY + LATE}


# --- judging: the larger part of the work, which any process can do ---


class Judged(NamedTuple):
    """A recipe after the early rules, as a worker process sends it: little, because each goes through a pipe."""

    # "file:line"
    where: str
    # The beginning of the title or text, for examples in the account.
    label: str
    # The text to train on; both are empty for a chat and for a recipe that failed.
    prompt: str
    completion: str
    chat: Chat | None
    # The recipe's key(): recipes of one key are duplicates.
    key: int
    # Whether `repair` changed the recipe.
    repaired: bool
    # (rule, why) of the first early rule that the recipe fails.
    failed: tuple | None
    # What near.sketch() gives; None: not compared with others for near duplicates.
    sketch: tuple | None
    # The fields of the row that were not used.
    unused: tuple
    # The repaired Recipe, for `python data.py --to`; else None.
    recipe: Recipe | None


def judge(recipe, where, context, whole=False):
    """A job: repair a recipe and ask the early rules. -> Judged. Without rules the recipe stays as it is."""
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
    if not failed and fixed.chat is None:
        prompt, completion = fixed.text()
    return Judged(
        where=where,
        label=label_of(fixed),
        prompt=prompt,
        completion=completion,
        chat=fixed.chat,
        key=key(fixed),
        repaired=fixed is not recipe,
        failed=failed,
        sketch=sketch,
        unused=recipe.unused,
        recipe=fixed if whole else None,
    )


def first_failed(rules, what, context):
    """(name, why) of the first rule that `what` (a Recipe or Judged) fails, or None."""
    for rule in rules:
        why = rule(what, context)
        if why:
            return rule.__name__, why
    return None


def sketch_of(recipe, rules):
    """near.sketch() of the ingredients and directions; None for other texts, and where max_similar is off."""
    if recipe.completion is not None or rules.max_similar > 1:
        return None
    return near.sketch(" ".join(recipe.ingredients + recipe.directions))


def label_of(recipe):
    """The first 60 characters of the title or, where there is none, of the text."""
    beginning = recipe.title or (recipe.completion or "")[:500]
    return " ".join(beginning.split())[:60] or "(no title)"


def key(recipe):
    """64-bit hash of ingredients and directions, whatever their case and white space. Of another text: of all of it."""
    if recipe.completion is None:
        words = " ".join(recipe.ingredients + recipe.directions).casefold().split()
        content = " ".join(words)
    else:
        content = f"{recipe.prompt}\0{recipe.completion}"
        if recipe.chat is not None:
            content += recipe.chat.extras()
    digest = hashlib.blake2b(content.encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


# --- running a job, which is a function job(recipe, where), on all rows: in this process or in a process a core ---


def make(job, rows):
    """rows: [(path, line, row)]. -> what job(recipe, where) makes of each row, and a BadRow for each bad row"""
    made = []
    for path, line, row in rows:
        where = f"{path}:{line}"
        # Do not raise the BadRow, because its traceback would hold the whole list of rows in a cycle.
        if isinstance(row, BadRow):
            made.append(BadRow(f"{where}: {row}"))
            continue
        try:
            made.append(job(parse(row), where))
        except (BadRow, RecursionError) as why:
            made.append(BadRow(f"{where}: {why}"))
    return made


def in_this_process(job, files):
    """What a job makes of the rows of some files, in lists of a thousand."""
    for rows in sources.read(files):
        yield make(job, rows)


def in_processes(job, files):
    """The lists of `in_this_process`, in the same order, made by a process a core. With 3 processes:

        process 0 makes lists 0, 3, 6 …; process 1 makes 1, 4, 7 …; process 2 makes 2, 5, 8 …

    Reading the pipes in turns therefore keeps the order."""
    pipes = []
    before = gc.get_threshold()
    # Let Python look for cycles of objects seldom, because there are none and looking costs a tenth of the time.
    # A process takes over this threshold when it is forked.
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
        message = "a process that reads recipes was killed or ran out of memory: free memory, or bring less data."
        raise UserError(message) from None
    finally:
        gc.set_threshold(*before)


def count_processes():
    """One process for each core that this process may use, and at most 16."""
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return min(cores, MOST_PROCESSES)


def work(pipe, end, job, files, rank, n):
    """A worker process: send what the job makes of every n-th list of rows, then None. A UserError is sent, too."""
    # Close this copy of the reading end, so that only the main process has one. When the main process ends, the next
    # `send` ends this process by SIGPIPE: test_no_process_stays_when_the_main_one_is_killed.
    pipe.close()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    # Ignore Ctrl-C, because the main process answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for rows in sources.read(files, rank, n):
            end.send(make(job, rows))
        end.send(None)
    except UserError as e:
        end.send(e)
    except MemoryError:
        # The main process finds the pipe closed, and says so.
        return


def run_job(job, files, account, allow_bad):
    """What a job makes of each recipe of some files. Bad rows are counted; too many are a UserError at the end."""
    run = in_this_process
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
    """The recipes of some files that fail no rule, as Judged. The account counts every row.

    rules None: every recipe stays as it is. held: files whose recipes make others duplicates, and are not counted.
    whole: each Judged holds its Recipe, too."""
    sources.check([*files, *held])
    context = Context(rules, earlier=near.Earlier())
    alone = Context(rules)
    if rules is not None:
        # Remember held-out recipes before `common` is set, because none of them may be dropped as rare.
        if held:
            others = run_job(partial(judge, context=alone), held, Account(), allow_bad=1.0)
            remember(others, context)
        # The first pass.
        if rules.min_share:
            found = run_job(names, files, Account(), allow_bad)
            alone.common = common(Progress(None, "ingredients").over(found), rules)
    # The second pass.
    judged = run_job(partial(judge, context=alone, whole=whole), files, account, allow_bad)
    yield from drop_and_count(judged, context, account)


def remember(judged, context):
    """Ask the late rules about held-out recipes for their effect only: they remember each recipe."""
    for one in judged:
        first_failed(LATE, one, context)


def drop_and_count(judged, context, account):
    """The recipes that fail no rule. Each of `judged` has the early rules' answer; the late rules are asked here."""
    for one in judged:
        account.repaired += one.repaired
        account.note_unused(one.unused)
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
    """A row from which parse() makes this recipe again, for `python data.py --to`."""
    if recipe.chat is not None:
        return recipe.chat.row()
    if recipe.prompt is not None:
        return {"prompt": recipe.prompt, "completion": recipe.completion}
    return {column: getattr(recipe, column.lower()) for column in sources.COLUMNS}


def print_account(a):
    """Print an account for people: that of this file, and the tokens, lengths and padding that data.py adds."""
    print(f"read         {a['read']} recipes, {a['bad']} bad rows, {a['repaired']} repaired")
    for example in a["bad_examples"]:
        print(f"{'':17}bad: {example}")
    for name, n in a["unused"].items():
        print(f"unused       {n:>7}  rows have the field {name}")
    for rule, n in a["dropped"].items():
        most = ""
        if 2 * n > a["read"]:
            most = "  more than half of all: is that bound right?"
        print(f"dropped      {n:>7}  {rule}{most}")
        for example in a["examples"].get(rule, []):
            print(f"{'':26}{example}")
    size = f"{a['batch_size']} recipes"
    if a["batch_tokens"]:
        size = f"{a['batch_tokens']} tokens"
    lengths = ", ".join(f"{n} ({p})" for p, n in a["lengths"].items())
    shares = ", ".join(f"{kind} {share:.2%}" for kind, share in a["padding"].items())
    print(f"kept         {a['kept']} recipes, {a['held_out']} held out")
    print(f"tokens       {a['tokens']:,}; a recipe has {lengths}")
    print(f"padding      batches of {size}: {shares}")


# --- holding out ---


def held_out(keys, n, seed):
    """Which recipes are held out of training, as booleans: n recipes, and at most half of all.

    Hold out all recipes of one key or none, because a copy in training would lower the held-out loss. So there may be
    a few less than n. The choice depends on keys and seed only: other recipes in the files hardly change it."""
    keys = np.asarray(keys, dtype=np.uint64)
    groups, group_of, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    out = np.zeros(len(groups), dtype=bool)
    left = min(n, len(keys) // 2)
    # Sort the keys after flipping some of their bits by the seed. Keys are hashes, so their order is random.
    flipped = np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    for group in np.argsort(groups ^ flipped):
        if sizes[group] <= left:
            out[group] = True
            left -= sizes[group]
    all_are_larger = n > 0 and not out.any()
    if all_are_larger and len(keys) > 1 and sizes.min() <= len(keys) // 2:
        out[sizes.argmin()] = True
    return out[group_of]
