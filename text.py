"""From text to tokens: recipes become ids that know whether they are targets, in one file that is mapped into memory.

    text = Text("SmolLM2-135M-Instruct")               # the tokenizer of a model folder, and its chat template
    folder = tokenise(files, data_cfg, rules, text)    # read, clean, tokenise; once, then the cache has it
    source = TokenFile(folder)

Prompt and completion are tokenised apart and joined, in training and in sampling: a prompt is tokens that training saw.
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

NEVER = 1 << 31  # this bit of a stored token says that it is never a target
PROMPT = 1 << 30  # and this one that it is none with --mask_prompt
IDS = PROMPT - 1  # the bits of the id itself

# A row of rows.bin: where a recipe's tokens are in tokens.bin, and recipes.key() of it.
ROW = np.dtype([("start", "u8"), ("length", "u4"), ("key", "u8")])

CHUNK = 2048  # recipes that are tokenised at a time
AHEAD = 2  # chunks that are tokenised ahead of need

CACHE_KEY_SOURCES = [sources, near, recipes]  # and this file: the tokens change with their code


class Text:
    """The tokenizer of a model folder. `bos` begins a recipe and `end` ends it; any of `ends` stops sampling."""

    def __init__(self, folder):
        self.path = Path(folder, "tokenizer.json")
        with reading(self.path):
            self.tokenizer = Tokenizer.from_file(str(self.path))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        # "<|im_end|>" inside somebody's recipe is text, not the end token.
        self.tokenizer.encode_special_tokens = True

        tokens = read_json(Path(folder, "tokenizer_config.json"))
        config = read_json(Path(folder, "config.json"))
        generation = read_json(Path(folder, "generation_config.json"))

        # The source of the chat template: a text, a list of named ones, or None.
        self.source = tokens.get("chat_template")
        beside = Path(folder, "chat_template.jinja")
        if beside.exists():
            with reading(beside):
                self.source = beside.read_text("utf-8")

        # {"eos_token": "</s>", ...}, which chat templates print
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

        # What the tokenizer's post-processor puts before a text: one BOS, or nothing.
        encoded = self.tokenizer.encode("a")
        self.bos = encoded.ids[: encoded.special_tokens_mask.index(0)]

    def encode(self, texts):
        """The ids of each text, without special tokens."""
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [one.ids for one in encoded]

    def decode(self, ids):
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def prompt(self, prompt, completion=""):
        """Ids of a prompt, and of a completion's beginning, cut where training cuts: tokenised apart and joined."""
        prompt_ids, completion_ids = self.encode([prompt, completion])
        return self.bos + prompt_ids + completion_ids

    def pieces(self, recipe):
        """[(text or ids, mark)]: the parts of a recipe that are encoded apart; mark is NEVER, PROMPT or 0."""
        if recipe.messages:
            return self.chat(recipe.messages)
        return [
            (self.bos, NEVER),
            (recipe.prompt, PROMPT),
            (recipe.completion, 0),
            ([self.end], 0),
        ]

    def tokens(self, rows):
        """The marked ids of each list of pieces, as one array a list."""
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
        """The model's chat template, and a tokenizer for its text, in which special tokens are special."""
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
        # A template is somebody else's code, so it runs in jinja2's sandbox.
        box = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols]
        )
        # A StrictUndefined raises where a template prints it.
        box.globals["raise_exception"] = StrictUndefined
        box.globals["strftime_now"] = time.strftime
        return box.from_string(source), Tokenizer.from_file(str(self.path))

    def chat(self, messages, ask=False):
        """pieces() of a chat, or of a question with `ask`: the assistant's turns and their ends are targets.

        The template renders numbers in the contents' places, so that a content that looks like a special token stays
        text. BadRow where the template refuses the chat, or prints not every turn once."""
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
        """The ids that a chat's template puts before the first content, and those behind each content."""
        template, tokenizer = self.template
        numbered = [{**turn, "content": f"\ue000{n}\ue001"} for n, turn in enumerate(messages)]
        try:
            rendered = template.render(messages=numbered, add_generation_prompt=ask, **self.named)
        except Exception as e:  # a template may fail in any way
            raise BadRow(f"the chat template refuses it: {e}") from None
        # What is before the first content, its number, what follows it, the next number, ...
        parts = re.split("\ue000(\\d+)\ue001", rendered)
        if parts[1::2] != [str(n) for n in range(len(messages))]:
            raise BadRow("the chat template leaves out a turn")
        return [tokenizer.encode(text, add_special_tokens=False).ids for text in parts[::2]]

    def end_in(self, ids):
        """How many ids there are up to and with the first end token; 0 where there is none."""
        for n, token in enumerate(ids, 1):
            if token in self.ends:
                return n
        return 0


@contextlib.contextmanager
def reading(path):
    """Whatever is wrong with a file of the model folder becomes a sentence that names the file."""
    try:
        yield
    except Exception as e:  # tokenizers raises nothing more special
        raise UserError(f"{path} cannot be read ({e}).") from None


def read_json(path):
    """The object in a JSON file; an empty one where there is no file."""
    if not path.exists():
        return {}
    with reading(path):
        return dict(json.loads(path.read_bytes()))


def token_text(token):
    """A token of tokenizer_config.json: its text, or an object with that as its content."""
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
    """Read, clean and tokenise once. -> folder of tokens.bin, rows.bin and account.json

    What is like a recipe of the files `held` is dropped. data_cfg: clean, allow_bad and cache are read."""
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
        # The folder gets its place when it is whole: a preparation that was killed starts again from nothing.
        part = Path(temporary, name)
        part.mkdir()
        write_tokens(part, keys_and_pieces(kept, text, account), text)
        # Once more, because the chat template may have refused some.
        account.check_bad(files, data_cfg.allow_bad)
        content = json.dumps(asdict(account), ensure_ascii=False)
        (part / "account.json").write_text(content, encoding="utf-8")
        # An OSError: another process was quicker, with the same content.
        with contextlib.suppress(OSError):
            part.rename(folder)
    return folder


def cache_key(files, held, rules, text, allow_bad):
    """A name that changes with all that the tokens depend on: files, rules, tokenizer, and the code that makes them."""
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
    """(key, pieces) of each recipe. One that the chat template refuses is counted as a bad row after all."""
    for recipe in kept:
        try:
            pieces = text.pieces(recipe)
        except BadRow as why:
            account.refuse(f"{recipe.where}: {why}")
        else:
            yield recipe.key, pieces


def write_tokens(folder, made, text):
    """tokens.bin and rows.bin of the (key, pieces) that are made, encoded ahead of need in a thread."""
    made = iter(made)
    chunks = iter(lambda: list(islice(made, CHUNK)), [])
    encoded = ahead(partial(encode, text), chunks, AHEAD)
    with open(folder / "tokens.bin", "wb") as out, open(folder / "rows.bin", "wb") as rows:
        for key, tokens in chain.from_iterable(encoded):
            start = out.tell() // 4  # four bytes a token
            rows.write(np.array((start, len(tokens), key), dtype=ROW).tobytes())
            out.write(tokens)


def encode(text, chunk):
    """[(key, marked tokens)] of a chunk of (key, pieces)."""
    tokens = text.tokens([pieces for _, pieces in chunk])
    return [(key, marked) for (key, _), marked in zip(chunk, tokens, strict=True)]


class TokenFile:
    """What tokenise left in a folder: tokens, mapped into memory, and one of `rows` (ROW) a recipe."""

    def __init__(self, folder):
        self.rows = np.fromfile(folder / "rows.bin", dtype=ROW)
        self.tokens = np.zeros(0, dtype="<u4")
        # An empty file cannot be mapped.
        if len(self.rows):
            self.tokens = np.memmap(folder / "tokens.bin", dtype="<u4", mode="r")
        self.account = json.loads((folder / "account.json").read_text(encoding="utf-8"))

    def recipe(self, start, length, mask_prompt=False):
        """(ids, those of their indices that are targets) of the recipe whose tokens are there."""
        marked = self.tokens[start : start + length]
        # The marks are the two highest bits, so a smaller number is a target.
        lowest_mark = NEVER
        if mask_prompt:
            lowest_mark = PROMPT
        targets = np.flatnonzero(marked < lowest_mark)
        # Without BOS nothing predicts the first token.
        targets = targets[targets > 0]
        return (marked & IDS).astype(np.int64), targets


def drop_long(source, text, max_len):
    """(rows, account) of a TokenFile without the recipes longer than max_len: the last rule, as it needs the tokens."""
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
    dropped = account["dropped"]
    rule = max(dropped, key=dropped.get)
    if dropped[rule]:
        why = f"{rule} took {dropped[rule]}; loosen that bound (--help lists them)"
    else:
        why = f"all {account['bad']} rows are bad: {'; '.join(account['bad_examples'])}"
    return f"no recipe is left of {account['read']} read: {why}."


# --- a check of the classic silent mistakes ---


def check_targets(dataset, text, cfg):
    """The end token is a target, BOS is there once, and how much is trained on; an error where one fails."""
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
    say("check", f"{dropped}; {share:.0%} of tokens are targets")
