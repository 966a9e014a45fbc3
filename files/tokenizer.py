"""The tokenizer of a model folder: which ids a text has, and which tokens a text of somebody's must never have.

    files = read_files(folder)                 # what the folder's files say: end tokens, chat templates, …
    tokenizer, control = load(files)           # tokenizer.json and what the other files add; {"<|im_end|>": 2, …}
    plain(tokenizer, control)                  # "<|im_end|>" in a text is text
    whole(tokenizer)                           # "<|im_end|>" in a text is token 2: for what a chat template printed
    aliased(tokenizer, control)                # "<|im_end|>" is text, and a private character is token 2

The rules are those of transformers' PreTrainedTokenizerFast, so that ids are the same. tokenizer.json says how a text
is cut, and the other files add tokens and names. Each key of tokenizer_config.json is used, known to be harmless, or
refused by name.
"""

from cli import UserError, say

import contextlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

# Keys of tokenizer_config.json that are used below, beside all that end in "_token".
USED = {
    "chat_template",
    "added_tokens_decoder",
    "additional_special_tokens",
    "extra_special_tokens",
    "model_specific_special_tokens",
    "add_prefix_space",
    "legacy",
    "tokenizer_class",
    "split_special_tokens",
}

# Keys that change no token here: {why: keys}. tokenizer.json holds each step in full. Of the classes of transformers
# only LlamaTokenizer is followed (as_transformers_builds).
HARMLESS = {
    "about truncation and padding, which are off": (
        "model_max_length max_length stride truncation truncation_side truncation_strategy padding padding_side"
        " pad_to_multiple_of pad_token_type_id max_len model_input_names return_token_type_ids"
    ),
    "a step that tokenizer.json has in full": (
        "add_bos_token add_eos_token add_dummy_prefix_space sp_model_kwargs do_lower_case"
        " tokenize_chinese_chars strip_accents do_basic_tokenize never_split keep_accents remove_space"
        " wordpieces_prefix unk_id errors fix_mistral_regex trim_offsets from_slow use_fast spm_file byte_fallback"
    ),
    "about decoding": "clean_up_tokenization_spaces spaces_between_special_tokens decode_with_prefix_space",
    "a name of a class, a file or a version": (
        "auto_map processor_class tool_parser_type verbose name_or_path _name_or_path tokenizer_file vocab_file"
        " merges_file special_tokens_map_file added_tokens_file backend is_local local_files_only init_inputs"
        " tokenizer_type transformers_version trust_remote_code _commit_hash revision cache_dir repo_type task"
        " device_map torch_dtype dtype unsloth_fixed tokenizer_object image_processor_type"
    ),
    "a text for chats that only old templates read": "use_default_system_prompt default_system_prompt",
    "a copy of what is known already": "special_tokens added_tokens vocab_size tokens_trie response_schema",
    "what a template may print is read from the template": "chat_template_kwargs system_prompt",
}
KNOWN = USED | {key for keys in HARMLESS.values() for key in keys.split()}

# aliased() gives each control token a character of Unicode's plane 15, which is for private use.
ALIAS = 0xF0000
MOST_ALIASES = 0xFFFD


@dataclass
class TokenizerFiles:
    """What the files of a model folder say of its tokenizer."""

    folder: Path
    # Tokens that tokenizer_config.json lists in full: they replace those of tokenizer.json.
    listed: list[AddedToken] = field(default_factory=list)
    # Tokens that the files only name: they are added where there is no such token.
    mentioned: list[AddedToken] = field(default_factory=list)
    # {"bos_token": "<s>", …}: chat templates print these names. A name without a token is left out.
    named: dict[str, str] = field(default_factory=dict)
    # {"default": chat template, "tool_use": …}
    templates: dict[str, str] = field(default_factory=dict)
    # The ids of config.json and generation_config.json that end a text.
    end_ids: list[int] = field(default_factory=list)
    # How many positions the model has.
    window: int = 2048
    # How many rows the embedding has; None: config.json does not say.
    embeddings: int | None = None
    # "llama", for example.
    model_type: str = ""
    # tokenizer_config.json as it is, of which the class, add_prefix_space and legacy are asked later.
    told: dict = field(default_factory=dict)

    @property
    def path(self):
        return self.folder / "tokenizer.json"


# --- the files ---


def has_files(folder):
    """Whether a folder has a tokenizer. One that was made for a plan may hold config.json alone."""
    return (Path(folder) / "tokenizer.json").exists()


def read_files(folder):
    """The TokenizerFiles of a model folder. A UserError names a file or a key that cannot be used."""
    folder = Path(folder)
    path = folder / "tokenizer_config.json"
    settings = read_json(path)
    refuse_unknown(path, settings)
    if "added_tokens_decoder" not in settings:
        # transformers reads these two older files only then.
        older = folder / "special_tokens_map.json"
        refuse_unknown(older, read_json(older))
        settings |= read_json(older)
        check_added_tokens(folder)
    config = read_json(folder / "config.json")
    generation = read_json(folder / "generation_config.json")
    ends = []
    for name, values in (("config.json", config), ("generation_config.json", generation)):
        ends += end_ids(folder / name, values.get("eos_token_id"))
    with reading(path):
        named = named_tokens(settings)
        listed = listed_tokens(settings)
        mentioned = mentioned_tokens(settings, named)
        templates = chat_templates(folder, settings.get("chat_template"))
    return TokenizerFiles(
        folder=folder,
        listed=listed,
        mentioned=mentioned,
        named=named,
        templates=templates,
        end_ids=ends,
        window=size_of(folder, config, "max_position_embeddings") or 2048,
        embeddings=size_of(folder, config, "vocab_size"),
        model_type=config.get("model_type", ""),
        told=settings,
    )


@contextlib.contextmanager
def reading(path):
    """Inside this block any error becomes a UserError that names the file `path` of the model folder."""
    try:
        yield
    except UserError:
        raise
    # Catch every Exception, because the package tokenizers raises nothing more special.
    except Exception as e:
        raise UserError(f"{path} cannot be read ({e!r}).") from None


def read_json(path):
    """The dict in a JSON file; an empty dict where there is no file."""
    if not path.exists():
        return {}
    with reading(path):
        return dict(json.loads(path.read_bytes()))


def refuse_unknown(path, settings):
    """A UserError for a key that this file does not know, unless its value switches it off."""
    for key, value in settings.items():
        is_known = key in KNOWN or key.endswith(("_token", "_token_id"))
        if not is_known and value:
            raise UserError(
                f"{path} has the key {key} = {value!r:.60}, which this program does not know. "
                "Remove the key if it changes no token."
            )
    if settings.get("split_special_tokens"):
        raise UserError(
            f"{path}: split_special_tokens would cut the chat template's own tokens; remove the key."
        )


def check_added_tokens(folder):
    """A UserError where added_tokens.json names a token that tokenizer.json has not, or has with another id."""
    path = folder / "added_tokens.json"
    older = read_json(path)
    if not older:
        return
    with reading(folder / "tokenizer.json"):
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for token, number in older.items():
        if tokenizer.token_to_id(token) != number:
            raise UserError(
                f"{path}: {token!r} is token {number}, but tokenizer.json says {tokenizer.token_to_id(token)}. "
                "Remove the file that is wrong."
            )


def end_ids(path, value):
    """The ids in an eos_token_id, which is an id, a list of ids or nothing."""
    values = value if isinstance(value, list) else [value]
    ids = [one for one in values if one is not None]
    for one in ids:
        if type(one) is not int or one < 0:
            raise UserError(f"{path}: eos_token_id is {value!r:.60}, where a token's id is wanted.")
    return ids


def size_of(folder, config, key):
    """A size in config.json; None where there is none."""
    value = config.get(key)
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or value != value // 1 or value < 1:
        raise UserError(
            f"{folder / 'config.json'}: {key} is {value!r:.60}, where a number of 1 or more is wanted."
        )
    return int(value)


def named_tokens(settings):
    """{"eos_token": "</s>", …} of all keys that end in _token and name one."""
    named = {}
    for key, token in settings.items():
        # add_bos_token and its like are switches.
        if key.endswith("_token") and token and not isinstance(token, bool):
            text = text_of(token)
            if not isinstance(text, str):
                raise UserError(
                    f"tokenizer_config.json: {key} is {token!r:.60}, which is no token."
                )
            named[key] = text
    extra = settings.get("extra_special_tokens")
    for names in (extra, settings.get("model_specific_special_tokens")):
        if isinstance(names, dict):
            named |= {key: text_of(token) for key, token in names.items()}
    return named


def text_of(token):
    """The text of a token, which is stored as "</s>" or as {"content": "</s>", …}."""
    if isinstance(token, dict):
        return token["content"]
    return token


def listed_tokens(settings):
    """The tokens of added_tokens_decoder, {"2": {"content": "</s>", "special": true, …}}, by their ids."""
    decoder = settings.get("added_tokens_decoder") or {}
    return [added_token(token) for _, token in sorted(decoder.items(), key=by_number)]


def mentioned_tokens(settings, named):
    """The named tokens, and those of extra_special_tokens."""
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        extra = list(extra.values())
    extra = [*extra, *(settings.get("model_specific_special_tokens") or {}).values()]
    return [added_token(token) for token in [*named.values(), *extra]]


def by_number(item):
    number, _ = item
    return int(number)


def added_token(token):
    """A token of a configuration file as the package tokenizers takes it. Without a word about it, it is special."""
    if isinstance(token, str):
        return AddedToken(token, special=True, normalized=False)
    flags = {"special": True, **token}
    return AddedToken(
        flags.pop("content"), **{k: v for k, v in flags.items() if k not in ("id", "__type")}
    )


def chat_templates(folder, stored):
    """{name: template}: those of tokenizer_config.json, and over them the .jinja files of the folder."""
    templates = {}
    if isinstance(stored, list):
        templates = {one["name"]: one["template"] for one in stored}
    elif isinstance(stored, dict):
        templates = dict(stored)
    elif stored:
        templates = {"default": stored}
    beside = folder / "chat_template.jinja"
    if beside.exists():
        with reading(beside):
            templates["default"] = beside.read_text("utf-8")
    for path in sorted(folder.glob("additional_chat_templates/*.jinja")):
        with reading(path):
            templates[path.stem] = path.read_text("utf-8")
    for name, template in templates.items():
        if not isinstance(template, str):
            raise UserError(
                f"{folder}: the chat template {name!r} is no text but {template!r:.40}."
            )
    return templates


# --- tokenizers ---


def load(files):
    """(the Tokenizer of tokenizer.json with the tokens that the other files add, its control tokens {text: id})

    The tokenizer neither pads nor truncates. Only a template or this program may put a control token: these are the
    special tokens, and the end tokens and named tokens even if their flag `special` is off. A token of the ordinary
    vocabulary that is only named, "!" as padding for example, is none."""
    with reading(files.path):
        tokenizer = Tokenizer.from_file(str(files.path))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer = as_transformers_builds(tokenizer, files)
        had = {repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
        tokenizer.add_tokens([token for token in files.listed if repr(token) not in had])
        texts = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        new = [token for token in files.mentioned if token.content not in texts]
        ordinary = {
            token.content for token in new if tokenizer.token_to_id(token.content) is not None
        }
        tokenizer.add_tokens(new)
    ordinary -= {files.named.get("eos_token"), files.named.get("bos_token")}
    control = {}
    for number, token in tokenizer.get_added_tokens_decoder().items():
        is_named = token.content in files.named.values() and token.content not in ordinary
        is_special = token.special and token.content not in ordinary
        if is_special or is_named or number in files.end_ids:
            control[token.content] = number
    return tokenizer, control


def as_transformers_builds(tokenizer, files):
    """transformers 5 takes vocabulary and merges of a LlamaTokenizer, and puts spaces by a rule of its own."""
    kind = str(files.told.get("tokenizer_class")).removesuffix("Fast")
    if kind != "LlamaTokenizer" or files.model_type != "llama":
        return tokenizer
    parts = json.loads(tokenizer.to_str())
    if "ByteLevel" in json.dumps(parts["pre_tokenizer"]) or parts["model"]["type"] != "BPE":
        return tokenizer
    scheme = "always" if files.told.get("legacy") else "first"
    if files.told.get("add_prefix_space") is False:
        scheme = "never"
    spaces = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    return Tokenizer.from_str(json.dumps({**parts, "normalizer": None, "pre_tokenizer": spaces}))


def say_contradictions(tokenizer, files):
    """Notes where transformers may cut a text otherwise than tokenizer.json says."""
    puts_space = begins_with_space(tokenizer)
    told = files.told.get("add_prefix_space")
    if isinstance(told, bool) and told != puts_space:
        say(
            "note",
            f"tokenizer_config.json says add_prefix_space {told}, tokenizer.json {puts_space}: tokenizer.json counts",
        )
    # Classes that transformers 5 builds without the other steps of tokenizer.json.
    kind = str(files.told.get("tokenizer_class")).removesuffix("Fast")
    if kind in ("GPT2Tokenizer", "Qwen2Tokenizer", "GemmaTokenizer"):
        if isinstance(tokenizer.pre_tokenizer, pre_tokenizers.Sequence):
            say(
                "note",
                f"transformers 5 builds a {kind} with other steps than tokenizer.json: tokenizer.json counts",
            )


def begins_with_space(tokenizer):
    """Whether the tokenizer puts a space before a text."""
    text = "a"
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is not None:
        pieces = tokenizer.pre_tokenizer.pre_tokenize_str(text)
        text, _ = pieces[0]
    return text[:1] in ("▁", "Ġ", " ")


# SentencePiece's tokens of single bytes.
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def never_from_text(tokenizer, control, files):
    """The ids of control tokens that no text of somebody's may become.

    All but the unknown token and single bytes, which stand for characters that the vocabulary lacks."""
    usual = {files.named.get("unk_token"), getattr(tokenizer.model, "unk_token", None)}
    if isinstance(tokenizer.model, models.Unigram):
        # A Unigram model has a number in place of a name.
        number = json.loads(tokenizer.to_str())["model"]["unk_id"]
        usual.add(tokenizer.id_to_token(number or 0))
    ids = set(files.end_ids)
    for text, number in control.items():
        if text not in usual and not BYTE.fullmatch(text):
            ids.add(number)
    return ids


def plain(tokenizer, control):
    """The tokenizer, or a copy, for which the control tokens' texts are ordinary text.

    encode_special_tokens does that for tokens whose flag `special` is on, so the copy has that flag on for them. An
    ordinary word that is only named as a special token is an ordinary word in the copy."""
    added = tokenizer.get_added_tokens_decoder().values()
    if any(token.special != (token.content in control) for token in added):
        parts = json.loads(tokenizer.to_str())
        kept = []
        for token in parts["added_tokens"]:
            if token["content"] in control:
                kept.append({**token, "special": True})
            elif not token["special"]:
                kept.append(token)
        tokenizer = Tokenizer.from_str(json.dumps({**parts, "added_tokens": kept}))
    tokenizer.encode_special_tokens = True
    return tokenizer


def whole(tokenizer):
    """A copy of the tokenizer whose offsets are those of the text.

    Some post-processors (trim_offsets of ByteLevel) move a token's beginning behind its space."""
    parts = json.loads(tokenizer.to_str())
    parts["post_processor"] = None
    copy = Tokenizer.from_str(json.dumps(parts))
    copy.encode_special_tokens = False
    return copy


def encode_whole(tokenizer, text):
    """The Encoding of a text, without special tokens beyond those in the text.

    The package panics over some added tokens that take the space on both sides, where two of them share a space."""
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except BaseException as e:
        # A panic of Rust code is no Exception, and its class has no name that could be imported.
        if type(e).__name__ != "PanicException":
            raise
        raise ValueError(f"the package tokenizers fails over it ({e})") from None


def aliases(control):
    """{text of a control token: its alias}, the longest text first, because one may contain another."""
    if len(control) > MOST_ALIASES:
        raise UserError(f"{len(control)} special tokens are more than this program can tell apart.")
    longest_first = sorted(control, key=len, reverse=True)
    return {text: chr(ALIAS + n) for n, text in enumerate(longest_first)}


def aliased(tokenizer, control):
    """(a copy of the tokenizer, {its id of an added token: the true id}): an alias stands for each control token.

    In the copy the alias of "<|im_end|>" is what "<|im_end|>" was, and "<|im_end|>" itself is ordinary text. So one
    text can hold both, and is tokenised in one go. The package gives added tokens new ids, hence the table."""
    alias = aliases(control)
    parts = json.loads(tokenizer.to_str())
    parts["post_processor"] = None
    true_ids = {}
    for token in parts["added_tokens"]:
        token["content"] = alias.get(token["content"], token["content"])
        true_ids[token["content"]] = token["id"]
    copy = Tokenizer.from_str(json.dumps(parts))
    copy.encode_special_tokens = False
    return copy, {copy.token_to_id(text): number for text, number in true_ids.items()}
