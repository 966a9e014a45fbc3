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
import shutil
import tempfile
from array import array
from dataclasses import asdict
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path

import numpy as np

import near
import recipes
import rows
import template
from files import disk, sources
from files import tokenizer as tokenizers
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
CACHE_KEY_SOURCES = [sources, tokenizers, near, rows, recipes, template]


class Text:
    """The tokenizer and the chat template of a model folder.

    `bos` are the ids in front of a recipe, none or one. `end` is the id behind a recipe. Any of `ends` stops sampling:
    Llama-3-Instruct, for example, names two end tokens."""

    def __init__(self, folder):
        files = tokenizers.read_files(folder)
        loaded, self.control = tokenizers.load(files)
        tokenizers.say_contradictions(loaded, files)
        ends = list(files.end_ids)
        eos = loaded.token_to_id(files.named.get("eos_token", ""))
        if eos is not None:
            ends.insert(0, eos)
        if not ends:
            raise UserError(
                f"{folder} names no end token (eos_token_id in config.json, or the tokenizer's)."
            )
        self.files = files
        self.end = ends[0]
        self.ends = set(ends)
        self.window = files.window
        # self.control is {text: id} of the tokens that a text of somebody's must not hold: a recipe must not end at
        # "<|im_end|>". `loaded` takes them wherever they stand, `tokenizer` nowhere.
        self.loaded = loaded
        self.tokenizer = tokenizers.plain(loaded, self.control)
        self.never = tokenizers.never_from_text(loaded, self.control, files)
        # Whether the vocabulary has ids for which the embedding has no row.
        self.exceeds = files.embeddings is not None and (
            max(loaded.get_vocab().values(), default=0) >= files.embeddings
        )
        # Whether this tokenizer makes a control token out of plain text all the same: an end token of the ordinary
        # vocabulary, or the text of a control token that is a word of the vocabulary, too.
        made = [not self.ends.issubset(self.control.values())]
        made += [bool(self.never.intersection(ids)) for ids in self.encode(list(self.control))]
        self.leaks = any(made)

        # Ask the tokenizer what it puts in front of a text: one BOS, or nothing.
        encoded = self.tokenizer.encode("a")
        self.bos = encoded.ids[: [*encoded.special_tokens_mask, 0].index(0)]
        for name, ids in {"end": [self.end], "BOS": self.bos}.items():
            if self.is_beyond(ids):
                raise UserError(f"{folder}: the {name} token cannot be used: {self.beyond(ids)}.")

    def encode(self, texts):
        """The ids of each text, without special tokens."""
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [one.ids for one in encoded]

    def decode(self, ids):
        """The text of some ids, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def spell(self, ids):
        """The text of some ids, special tokens included."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def prompt(self, prompt, completion=""):
        """The ids of a prompt and of a completion's beginning, tokenised apart and joined, as in training."""
        prompt_ids, completion_ids = self.encode([prompt, completion])
        ids = self.bos + prompt_ids + completion_ids
        why = self.unusable(prompt_ids + completion_ids)
        if why:
            raise UserError(f"a prompt cannot be used: {why}.")
        return ids

    def pieces(self, recipe):
        """[(text or ids, mark)]: the parts of a recipe that are tokenised apart. The mark is NEVER, PROMPT or 0:

        [([1], NEVER), ("Pumpkin Bread", PROMPT), ("\\n\\nIngredients:\\n- 3½ cups flour …", 0), ([2], 0)]

        Of a chat: its printed text, in which marks stand around what is learned (template.py)."""
        if recipe.chat is not None:
            return self.template.print_marked(recipe.chat, self.end_texts)
        return [
            (self.bos, NEVER),
            (recipe.prompt, PROMPT),
            (recipe.completion, 0),
            ([self.end], 0),
        ]

    def tokens(self, rows):
        """rows: the pieces of each recipe. -> for each an array of marked ids, or the BadRow why it cannot be used

        All texts of all rows go to the tokenizer in one call, because its own threads then share them."""
        texts = [
            part
            for row in rows
            if isinstance(row, list)
            for part, _ in row
            if isinstance(part, str)
        ]
        encoded = iter(self.encode(texts))
        out = []
        for row in rows:
            try:
                if isinstance(row, str):
                    out.append(self.tokens_of_chat(row))
                else:
                    out.append(self.tokens_of_recipe(row, encoded))
            except BadRow as why:
                out.append(why)
        return out

    def tokens_of_recipe(self, row, encoded):
        """The marked ids of a recipe. encoded: an iterator of the ids of its texts"""
        marked = array("I")
        of_texts = []
        for part, mark in row:
            ids = part
            if isinstance(part, str):
                ids = next(encoded)
                of_texts += ids if self.leaks or self.exceeds else []
            if mark:
                ids = [token | mark for token in ids]
            marked += array("I", ids)
        why = self.unusable(of_texts)
        if why:
            raise BadRow(why)
        if len(marked) < 2:
            raise BadRow("it has no token to learn")
        return marked

    # --- ids that must not be there ---

    def is_beyond(self, ids):
        """Whether the embedding has no row for one of the ids."""
        return self.files.embeddings is not None and max(ids, default=0) >= self.files.embeddings

    def beyond(self, ids):
        """A sentence about the largest of some ids."""
        token = max(ids)
        word = self.tokenizer.id_to_token(token)
        return f"{word!r} is token {token}, and the model has embeddings for {self.files.embeddings} only"

    def unusable(self, ids):
        """Why these ids of somebody's text cannot be used; an empty text where they can."""
        if self.exceeds and self.is_beyond(ids):
            return self.beyond(ids)
        leaked = self.never.intersection(ids)
        if leaked:
            word = self.tokenizer.id_to_token(min(leaked))
            return (
                f"this tokenizer has no plain tokens for the text {word!r}, only that special token"
            )
        return ""

    # --- chats ---

    @cached_property
    def template(self):
        return template.Template(
            self.files.templates, self.files.named, self.files.folder, self.control
        )

    @cached_property
    def end_texts(self):
        return [text for text, token in self.control.items() if token in self.ends]

    @cached_property
    def whole(self):
        """The tokenizer of a chat in which nobody wrote a control token."""
        return tokenizers.whole(self.loaded)

    @cached_property
    def aliased(self):
        """(the tokenizer of any other chat, {its id: the true id})"""
        return tokenizers.aliased(self.loaded, self.control)

    def encode_chat(self, printed):
        """A text of template.py -> (its ids, where each begins in the text, the text's spans that are learned)

        The whole text is tokenised in one go, as transformers does it. Raises BadRow for a control token that the
        template did not put."""
        tokenizer = self.whole
        true_ids = {}
        put = self.template.alias
        if rows.PRIVATE.search(printed) and self.template.holds_alias(printed):
            tokenizer, true_ids = self.aliased
            put = self.template.text_of
            printed = self.template.exchanged(printed)
        text, spans = template.unmark(printed)
        try:
            encoded = tokenizers.encode_whole(tokenizer, text)
        except ValueError as why:
            raise BadRow(str(why)) from None
        taken = sum(token in true_ids for token in encoded.ids)
        if true_ids and taken < len(rows.PRIVATE.findall(text)):
            raise BadRow(
                "the tokenizer does not take the template's special tokens beside these words"
            )
        ids = [true_ids.get(token, token) for token in encoded.ids]
        for token, (begin, end) in zip(ids, encoded.offsets, strict=True):
            if token in self.never and text[begin:end].strip() not in put:
                raise BadRow(
                    f"the tokenizer takes {text[begin:end]!r:.40} in a turn for the special token "
                    f"{self.tokenizer.id_to_token(token)!r}"
                )
        if self.is_beyond(ids):
            raise BadRow(self.beyond(ids))
        begins = np.array([begin for begin, _ in encoded.offsets], dtype=np.int64)
        return np.array(ids, dtype=np.uint32), begins, spans

    def tokens_of_chat(self, printed):
        """The marked ids of a chat: what stands between marks is a target, with the end token behind it.

        A token that begins before a mark is no target, even if it ends behind it. A token that begins between two marks
        is one, even if it ends behind the second."""
        ids, begins, spans = self.encode_chat(printed)
        is_target = np.zeros(len(ids), dtype=bool)
        for begin, end in spans:
            # Tokens of the span: first is the first one, behind is the one behind the last.
            first, behind = np.searchsorted(begins, (begin, end))
            is_target[first:behind] = True
            has_end = behind > first and ids[behind - 1] in self.ends
            if not has_end and behind < len(ids) and ids[behind] in self.ends:
                is_target[behind] = True
        if not is_target[1:].any():
            raise BadRow("it has no token to learn")
        return array("I", np.where(is_target, ids, ids | NEVER).astype(np.uint32).tobytes())

    def chat_prompt(self, messages):
        """The ids of a conversation up to where the assistant speaks next. A UserError says why there are none."""
        try:
            turns = rows.parse_turns(messages)
            ids, _, _ = self.encode_chat(self.template.print_prompt(turns))
        except BadRow as why:
            said = str(why).rstrip(".")
            raise UserError(f"--chat: {said}.") from None
        return ids.tolist()


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
    if is_whole(folder):
        return folder
    # Only a broken disk or another program leaves a part of a folder.
    shutil.rmtree(folder, ignore_errors=True)
    account = recipes.Account()
    kept = recipes.clean(files, rules, account, data_cfg.allow_bad, held)
    kept = Progress(None, "tokenise").over(kept)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(".part", dir=folder.parent) as temporary:
        # Rename the folder to its place when it is whole, so that nobody reads the half of a killed program.
        part = Path(temporary, name)
        part.mkdir()
        digest = write_tokens(part, with_pieces(kept, text, account), text, account)
        # Check again after `clean`, because the chat template may have refused rows that `clean` kept.
        account.check_bad(files, data_cfg.allow_bad)
        about = {**asdict(account), "tokens_sha256": digest}
        content = json.dumps(about, ensure_ascii=False)
        # An example names its file, and a file name that is no UTF-8 has lone surrogates.
        content = content.encode(errors="backslashreplace")
        (part / "account.json").write_bytes(content)
        # Ignore an OSError, because then another process has put the same content there.
        with contextlib.suppress(OSError):
            part.rename(folder)
    return folder


def is_whole(folder):
    """Whether a folder of the cache has its three files, and tokens.bin all tokens that rows.bin tells of."""
    try:
        json.loads((folder / "account.json").read_bytes())
        rows = np.fromfile(folder / "rows.bin", dtype=ROW)
        tokens = (folder / "tokens.bin").stat().st_size // 4  # four bytes a token
    except (OSError, ValueError):
        return False
    return int(rows["length"].sum()) == tokens


def cache_key(files, held, rules, text, allow_bad):
    """A hash of all that the tokens depend on: files, rules, tokenizer, chat template, and the code that makes them.

    The content of each file counts, because a file may change and keep its size and time. Hashing 2.2 GB takes 2 s."""
    code = [Path(module.__file__) for module in CACHE_KEY_SOURCES]
    read = [*files, *held, text.files.path, *code, Path(__file__)]
    bounds = None
    if rules is not None:
        bounds = asdict(rules)
    depends_on = {
        "contents": [disk.digest(file) for file in read],
        # An example in the account names its file.
        "names": [str(file) for file in files],
        "held from": len(files),
        "allow_bad": allow_bad,
        "rules": bounds,
        "bos": text.bos,
        "end": text.end,
        "ends": sorted(text.ends),
        "control": text.control,
        # repr() has the flags of a token, lstrip say.
        "added": [repr(token) for token in text.tokenizer.get_added_tokens_decoder().values()],
        "embeddings": text.files.embeddings,
        "named": text.files.named,
        "templates": text.files.templates,
    }
    return hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:16]


def with_pieces(kept, text, account):
    """(recipe, pieces) of each kept recipe. A recipe that the chat template refuses is counted as a bad row instead."""
    for recipe in kept:
        try:
            pieces = text.pieces(recipe)
        except BadRow as why:
            account.refuse(f"{recipe.where}: {why}")
        else:
            yield recipe, pieces


def write_tokens(folder, made, text, account):
    """Write tokens.bin and rows.bin. made: an iterator of (recipe, pieces). -> a hash of all tokens

    A thread tokenises two chunks ahead, while this thread cleans the recipes of the next chunk and writes."""
    made = iter(made)
    chunks = iter(lambda: list(islice(made, CHUNK)), [])
    encoded = ahead(partial(encode, text), chunks, AHEAD)
    digest = hashlib.sha256()
    with open(folder / "tokens.bin", "wb") as out, open(folder / "rows.bin", "wb") as rows:
        for recipe, tokens in chain.from_iterable(encoded):
            if isinstance(tokens, BadRow):
                account.refuse(f"{recipe.where}: {tokens}")
                continue
            start = out.tell() // 4  # four bytes a token
            rows.write(np.array((start, len(tokens), recipe.key), dtype=ROW).tobytes())
            out.write(tokens)
            digest.update(tokens)
    return digest.hexdigest()


def encode(text, chunk):
    """chunk: a list of (recipe, pieces). -> a list of (recipe, marked ids or the BadRow why there are none)"""
    tokens = text.tokens([pieces for _, pieces in chunk])
    return [(recipe, marked) for (recipe, _), marked in zip(chunk, tokens, strict=True)]


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
    """Check 256 recipes before training: each ends in an end token as a target, and BOS stands where it belongs.

    Otherwise a run would end without an error, and the model would never stop writing. What an end token and a BOS are
    say the tokenizer and the weights; where they stand in a chat says the template.
    Proof: tests/test_preflight.py has for each line a run with the fault and one without."""
    sample = dataset.indices[:256]
    targets = 0
    without = 0  # rows that do not begin with the tokenizer's BOS
    several = 0  # rows that hold BOS more than once
    for i in sample:
        ids, at = dataset.recipe(i, cfg.mask_prompt)
        check_end(i, ids, at, text)
        places = np.flatnonzero(np.isin(ids, text.bos))
        if text.bos and text.bos[0] not in text.ends:
            check_bos(i, places, text)
            without += places[:1].tolist() != [0]
            several += len(places) > 1
        targets += len(at)
    share = targets / dataset.lengths(sample).sum()
    say("check", f"an end token ends {len(sample)} of {len(sample)} rows, as a target")
    say("check", f"BOS: {about_bos(text, without, several)}")
    say("check", f"padding: {about_padding(text)}")
    dropped = f"{dataset.account['dropped']['max_len']} recipes dropped for --max_len {cfg.max_len}"
    say("check", f"{dropped}; {share:.0%} of the tokens are targets")
    say_dropped(dataset.account)


def check_end(i, ids, at, text):
    if not len(at) or ids[at[-1]] not in text.ends:
        last = text.spell(ids[at[-1:]].tolist())
        raise UserError(
            f"recipe {i} does not end in an end token as a target, but in {last!r}: the model would not learn to stop. "
            "If that is how the chat template ends a turn, add its id to eos_token_id in generation_config.json."
        )


def check_bos(i, places, text):
    """places: where BOS stands in recipe i"""
    if (np.diff(places) == 1).any():
        who = "the chat template prints"
        if len(text.bos) > 1:
            who = f"the post_processor of {text.files.path} puts"
        raise UserError(f"recipe {i} has two BOS tokens in a row: {who} one too many.")


def about_bos(text, without, several):
    if not text.bos:
        return "this tokenizer has none"
    if text.bos[0] in text.ends:
        return "the tokenizer's BOS is an end token, too"
    if without or several:
        return f"{without} rows begin without it and {several} hold several, as their chat template prints it"
    return "exactly one"


def about_padding(text):
    """Programs that mask every pad token in the loss also mask the ends where both are one token. This one does not."""
    pad = text.files.named.get("pad_token")
    if text.control.get(pad) in text.ends:
        return f"the pad token {pad!r} is an end token, too; padding is known by length, so ends stay targets"
    return "known by length, no token stands for it"


def say_dropped(account):
    """A line for each rule that dropped more than half of all recipes: its bound may be wrong for this dataset."""
    for rule, n in account["dropped"].items():
        if 2 * n > account["read"]:
            say(
                "note",
                f"the rule {rule} dropped {n} of {account['read']} recipes: is that bound right? See data.py",
            )
