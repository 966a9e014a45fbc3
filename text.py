"""From text to tokens: each recipe becomes token ids with marks that say which of them are targets, in one file.

    text = Text("SmolLM2-135M-Instruct")               # the tokenizer of a model folder, and its chat template
    folder = tokenise(files, data_cfg, rules, text)    # read, clean, tokenise; again: taken from the cache
    source = TokenFile(folder)                         # the tokens, mapped into memory

Tokenise prompt and completion apart and join their ids, in training and in sampling. Otherwise a token could span the
seam, and sampling would begin with a prompt of tokens that training never saw.
"""

from cli import Progress, UserError, ahead, say

import contextlib
import hashlib
import json
import re
import tempfile
import time
from array import array
from dataclasses import asdict
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

import near
import recipes
from files import disk, sources
from recipes import BadRow

# A stored token has 32 bits: two marks, and the id in the other 30.
# Bit 31: the token is never a target, for example BOS.
NEVER = 1 << 31
# Bit 30: the token belongs to the prompt, so it is no target with --mask_prompt.
PROMPT = 1 << 30
# The bits of the id.
IDS = PROMPT - 1

# A row of rows.bin: where a recipe's tokens begin in tokens.bin, how many they are, and the recipe's recipes.key().
ROW = np.dtype([("start", "u8"), ("length", "u4"), ("key", "u8")])

# Recipes that are tokenised at a time, and how many such chunks are tokenised ahead of need.
CHUNK = 2048
AHEAD = 2

# The sources of these modules and of this file are in the cache key, because the tokens depend on their code.
CACHE_KEY_SOURCES = [sources, near, recipes]


class Text:
    """The tokenizer and the chat template of a model folder.

    `bos` are the ids in front of a recipe, none or one. `end` is the id behind a recipe. Any of `ends` stops sampling:
    Llama-3-Instruct, for example, names two end tokens."""

    def __init__(self, folder):
        self.path = Path(folder, "tokenizer.json")
        with reading(self.path):
            self.tokenizer = Tokenizer.from_file(str(self.path))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        # Encode "<|im_end|>" inside a recipe as text, because a recipe must not end there.
        self.tokenizer.encode_special_tokens = True

        tokens = read_json(Path(folder, "tokenizer_config.json"))
        config = read_json(Path(folder, "config.json"))
        generation = read_json(Path(folder, "generation_config.json"))

        # The chat template as the folder has it: a text, a list of {"name", "template"}, or None.
        self.source = tokens.get("chat_template")
        beside = Path(folder, "chat_template.jinja")
        if beside.exists():
            with reading(beside):
                self.source = beside.read_text("utf-8")

        # {"eos_token": "</s>", …}: chat templates print these names.
        self.named = {k: token_text(t) for k, t in tokens.items() if k.endswith("_token")}
        eos = self.tokenizer.token_to_id(self.named.get("eos_token") or "")
        ends = ids_in(eos, config.get("eos_token_id"), generation.get("eos_token_id"))
        if not ends:
            raise UserError(
                f"{folder} names no end token (eos_token_id in config.json, or the tokenizer's)."
            )
        self.end = ends[0]
        self.ends = set(ends)
        self.window = config.get("max_position_embeddings") or 2048

        # Ask the tokenizer what it puts in front of a text: one BOS, or nothing.
        encoded = self.tokenizer.encode("a")
        self.bos = encoded.ids[: encoded.special_tokens_mask.index(0)]

    def encode(self, texts):
        """The ids of each text, without special tokens."""
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [one.ids for one in encoded]

    def decode(self, ids):
        """The text of some ids, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def prompt(self, prompt, completion=""):
        """The ids of a prompt and of a completion's beginning, tokenised apart and joined, as in training."""
        prompt_ids, completion_ids = self.encode([prompt, completion])
        return self.bos + prompt_ids + completion_ids

    def pieces(self, recipe):
        """[(text or ids, mark)]: the parts of a recipe that are tokenised apart. The mark is NEVER, PROMPT or 0:

        [([1], NEVER), ("Pumpkin Bread", PROMPT), ("\\n\\nIngredients:\\n- 3½ cups flour …", 0), ([2], 0)]"""
        if recipe.messages:
            return self.chat(recipe.messages)
        return [
            (self.bos, NEVER),
            (recipe.prompt, PROMPT),
            (recipe.completion, 0),
            ([self.end], 0),
        ]

    def tokens(self, rows):
        """rows: a list of pieces for each recipe. -> an array of marked ids for each recipe

        All texts of all rows go to the tokenizer in one call, because its own threads then share them."""
        texts = [part for row in rows for part, _ in row if isinstance(part, str)]
        encoded = iter(self.encode(texts))
        out = []
        for row in rows:
            marked = array("I")
            for part, mark in row:
                ids = part
                if isinstance(part, str):
                    ids = next(encoded)
                if mark:
                    ids = [token | mark for token in ids]
                marked += array("I", ids)
            out.append(marked)
        return out

    # --- chats ---

    @cached_property
    def template(self):
        """(the model's chat template, a second tokenizer). Special tokens that the template itself prints are special:
        this tokenizer encodes "<|im_end|>" as the end token."""
        from jinja2 import StrictUndefined, ext, sandbox

        named = self.source
        if not isinstance(named, list):
            named = [{"name": "default", "template": self.source}]
        source = {one["name"]: one["template"] for one in named}.get("default")
        if not source:
            folder = self.path.parent
            raise UserError(
                f"{folder} has no chat template, and a chat needs one: name a model that has."
            )
        # Run the template in jinja2's sandbox, because a template is code that came with the model.
        box = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols]
        )
        # A template that refuses a chat prints raise_exception("why"). A StrictUndefined raises when it is printed.
        box.globals["raise_exception"] = StrictUndefined
        box.globals["strftime_now"] = time.strftime
        return box.from_string(source), Tokenizer.from_file(str(self.path))

    def chat(self, messages, ask=False):
        """The pieces of a chat: the assistant's turns and their end tokens are targets, all else is never a target.

        ask: put the beginning of the assistant's turn behind the last turn, for sampling. Raises BadRow where the
        template refuses the chat, or does not print each turn once and in order."""
        first, *after = self.around_contents(messages, ask)
        if first[:1] != self.bos[:1]:
            first = self.bos + first
        pieces = [(first, NEVER)]
        for turn, ids in zip(messages, after, strict=True):
            content = turn["content"].strip()
            if turn["role"] == "assistant":
                end = self.end_in(ids)
                pieces += [(content, 0), (ids[:end] or [self.end], 0), (ids[end:], NEVER)]
            else:
                pieces += [(content, NEVER), (ids, NEVER)]
        return pieces

    def around_contents(self, messages, ask):
        """What the template prints around the contents of a chat: ids before the first content, then behind each one.

        The template never sees the contents, because "<|im_end|>" in a content must stay text. It renders numbers
        between two characters of Unicode's private use area, which no template prints. With « for U+E000, » for U+E001:

            rendered   "<|im_start|>user\\n«0»<|im_end|>\\n<|im_start|>assistant\\n«1»<|im_end|>\\n"
            split      "<|im_start|>user\\n", "<|im_end|>\\n<|im_start|>assistant\\n", "<|im_end|>\\n"

        Proof: test_a_chat_has_the_ids_of_transformers (tests/test_text.py)."""
        template, tokenizer = self.template
        numbered = [{**turn, "content": f"\ue000{n}\ue001"} for n, turn in enumerate(messages)]
        try:
            rendered = template.render(messages=numbered, add_generation_prompt=ask, **self.named)
        # Catch every Exception, because a template is code that may fail in any way.
        except Exception as e:
            raise BadRow(f"the chat template refuses it: {e}") from None
        # [text, number, text, number, …, text]: the pattern's group makes `split` return the numbers, too.
        parts = re.split("\ue000(\\d+)\ue001", rendered)
        if parts[1::2] != [str(n) for n in range(len(messages))]:
            raise BadRow("the chat template leaves out a turn")
        return [tokenizer.encode(text, add_special_tokens=False).ids for text in parts[::2]]

    def end_in(self, ids):
        """How many ids there are up to the first end token, which is counted too; 0 where there is no end token."""
        for n, token in enumerate(ids, 1):
            if token in self.ends:
                return n
        return 0


@contextlib.contextmanager
def reading(path):
    """Inside this block any error becomes a UserError that names the file `path` of the model folder."""
    try:
        yield
    # Catch every Exception, because the package tokenizers raises nothing more special.
    except Exception as e:
        raise UserError(f"{path} cannot be read ({e}).") from None


def read_json(path):
    """The dict in a JSON file; an empty dict where there is no file."""
    if not path.exists():
        return {}
    with reading(path):
        return dict(json.loads(path.read_bytes()))


def token_text(token):
    """The text of a token of tokenizer_config.json, which is stored as "</s>" or as {"content": "</s>", …}."""
    if isinstance(token, dict):
        return token["content"]
    return token


def ids_in(*values):
    """All token ids among the values, each of which is an id, a list of ids or None."""
    ids = []
    for value in values:
        if isinstance(value, list):
            ids += value
        elif value is not None:
            ids.append(value)
    return ids


# --- from files to a file of tokens ---


def tokenise(files, data_cfg, rules, text, held=()):
    """Read, clean and tokenise some files, if the cache has not their tokens yet. -> the folder with three files:

        tokens.bin     the marked ids of all recipes end to end, 4 bytes a token
        rows.bin       one ROW a recipe
        account.json   what became of every row that was read

    held: files whose recipes, and recipes like them, are dropped. Of data_cfg are used: clean, allow_bad and cache."""
    if not data_cfg.clean:
        rules = None
    name = cache_key(files, held, rules, text, data_cfg.allow_bad)
    folder = disk.cache_folder(data_cfg.cache) / "tokens" / name
    if folder.exists():
        return folder
    account = recipes.Account()
    kept = recipes.clean(files, rules, account, data_cfg.allow_bad, held)
    kept = Progress(None, "tokenise").over(kept)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(".part", dir=folder.parent) as temporary:
        # Rename the folder to its place when it is whole, so that nobody reads the half of a killed program.
        part = Path(temporary, name)
        part.mkdir()
        write_tokens(part, keys_and_pieces(kept, text, account), text)
        # Check again after `clean`, because the chat template may have refused rows that `clean` kept.
        account.check_bad(files, data_cfg.allow_bad)
        content = json.dumps(asdict(account), ensure_ascii=False)
        (part / "account.json").write_text(content, encoding="utf-8")
        # Ignore an OSError, because then another process has put the same content there.
        with contextlib.suppress(OSError):
            part.rename(folder)
    return folder


def cache_key(files, held, rules, text, allow_bad):
    """A hash of all that the tokens depend on: files, rules, tokenizer, chat template, and the code that makes them."""
    every = [*files, *held]
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in every]
    code = [Path(module.__file__) for module in CACHE_KEY_SOURCES]
    bounds = None
    if rules is not None:
        bounds = asdict(rules)
    contents = [file.read_text("utf-8") for file in [text.path, *code, Path(__file__)]]
    depends_on = {
        "files": stats,
        "held from": len(files),
        "allow_bad": allow_bad,
        "rules": bounds,
        "bos": text.bos,
        "end": text.end,
        "ends": sorted(text.ends),
        "named": text.named,
        "template": text.source,
        "contents": contents,
    }
    return hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:16]


def keys_and_pieces(kept, text, account):
    """(key, pieces) of each kept recipe. A recipe that the chat template refuses is counted as a bad row instead."""
    for recipe in kept:
        try:
            pieces = text.pieces(recipe)
        except BadRow as why:
            account.refuse(f"{recipe.where}: {why}")
        else:
            yield recipe.key, pieces


def write_tokens(folder, made, text):
    """Write tokens.bin and rows.bin. made: an iterator of (key, pieces), one a recipe

    A thread tokenises two chunks ahead, while this thread cleans the recipes of the next chunk and writes."""
    made = iter(made)
    chunks = iter(lambda: list(islice(made, CHUNK)), [])
    encoded = ahead(partial(encode, text), chunks, AHEAD)
    with open(folder / "tokens.bin", "wb") as out, open(folder / "rows.bin", "wb") as rows:
        for key, tokens in chain.from_iterable(encoded):
            start = out.tell() // 4  # four bytes a token
            rows.write(np.array((start, len(tokens), key), dtype=ROW).tobytes())
            out.write(tokens)


def encode(text, chunk):
    """chunk: a list of (key, pieces). -> a list of (key, marked ids)"""
    tokens = text.tokens([pieces for _, pieces in chunk])
    return [(key, marked) for (key, _), marked in zip(chunk, tokens, strict=True)]


class TokenFile:
    """The folder that `tokenise` made: `rows` has one ROW a recipe, `tokens` all marked ids.

    The file of the tokens is mapped into memory: the system reads the pages that a batch needs, and frees them again.
    So 523 million tokens, 2.1 GB, are no memory of the process."""

    def __init__(self, folder):
        self.rows = np.fromfile(folder / "rows.bin", dtype=ROW)
        self.tokens = np.zeros(0, dtype="<u4")
        # Map the file only if there are recipes, because an empty file cannot be mapped.
        if len(self.rows):
            self.tokens = np.memmap(folder / "tokens.bin", dtype="<u4", mode="r")
        self.account = json.loads((folder / "account.json").read_text(encoding="utf-8"))

    def recipe(self, start, length, mask_prompt=False):
        """(ids, at): the ids of the recipe whose tokens begin at `start`, and at which of them a target stands."""
        marked = self.tokens[start : start + length]
        # The marks are the two highest bits, so a number below the lowest mark is a target.
        lowest_mark = NEVER
        if mask_prompt:
            lowest_mark = PROMPT
        targets = np.flatnonzero(marked < lowest_mark)
        # The first token is no target, because no token stands before it to predict it.
        targets = targets[targets > 0]
        return (marked & IDS).astype(np.int64), targets


def drop_long(source, text, max_len):
    """(rows, account) of a TokenFile without the recipes longer than max_len.

    max_len is the last rule, because it counts tokens. The token file itself serves any max_len."""
    lengths = source.rows["length"]
    long = np.flatnonzero(lengths > max_len)
    rows = np.delete(source.rows, long)
    examples = []
    for start, length, _ in source.rows[long[:3]].tolist():
        ids, _ = source.recipe(start, length)
        beginning = text.decode(ids[:20]).strip().split("\n")[0]
        examples.append(f"{beginning}: {length} tokens")
    account = {
        **source.account,
        "kept": len(rows),
        "dropped": {**source.account["dropped"], "max_len": len(long)},
        "examples": {**source.account["examples"], "max_len": examples},
    }
    return rows, account


def why_nothing_is_left(account):
    """A sentence for the user: the rule that dropped most, or that all rows are bad."""
    dropped = account["dropped"]
    rule = max(dropped, key=dropped.get)
    if dropped[rule]:
        why = f"{rule} took {dropped[rule]}; loosen that bound (--help lists them)"
    else:
        why = f"all {account['bad']} rows are bad: {'; '.join(account['bad_examples'])}"
    return f"no recipe is left of {account['read']} read: {why}."


# --- a check of the classic silent mistakes ---


def check_targets(dataset, text, cfg):
    """Check 256 recipes before training: each ends in the end token as a target, and has one BOS where there is one.

    Otherwise a run would end without an error, and the model would never stop writing."""
    sample = dataset.indices[:256]
    targets = 0
    for i in sample:
        ids, at = dataset.recipe(i, cfg.mask_prompt)
        if not len(at) or ids[at[-1]] != text.end:
            raise UserError(
                f"recipe {i} does not end in the end token as a target: the model would not learn to stop."
            )
        if text.bos and (ids[0] != text.bos[0] or (ids[1:] == text.bos[0]).any()):
            raise UserError(f"recipe {i} does not begin with exactly one BOS token.")
        targets += len(at)
    share = targets / dataset.lengths(sample).sum()
    dropped = dataset.account["dropped"]["max_len"]
    say("check", f"end token {text.end} ends {len(sample)} of {len(sample)} rows, as a target")
    say("check", f"BOS: {'exactly one' if text.bos else 'this tokenizer has none'}")
    dropped = f"{dropped} recipes dropped for --max_len {cfg.max_len}"
    say("check", f"{dropped}; {share:.0%} of the tokens are targets")
