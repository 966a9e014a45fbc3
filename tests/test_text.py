"""text.py: which tokens are targets, in recipes, other texts and chats; and that tokens are made once."""

from cli import UserError

import errno
import itertools
import json
import os
import re
from pathlib import Path

import chats
import numpy as np
import pytest
from conftest import (
    BOS,
    CHAT,
    CHATML,
    END,
    OPEN,
    PlainTokenizer,
    chat_model,
    data_config,
    jsonl,
    made_recipes,
    make_model,
    program,
    put,
    rendered,
    tokenised,
    write_jsonl,
)
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models

import data
import recipes
import rows
import template as templates
import text as text_module
from data import Data
from files.sources import BadRow
from recipes import Rules
from text import IDS, PROMPT, Text, TokenFile, check_targets, tokenise

TEA = {"title": "Tea", "ingredients": ["water", "tea"], "directions": ["Boil.", "Pour."]}
TEA_COMPLETION = "\n\nIngredients:\n- water\n- tea\n\nDirections:\n1. Boil.\n2. Pour."


def targets(dataset, text, row, mask):
    return data.collate(dataset, [row], mask).targets.tolist()


# ---- which tokens are targets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bos", "mask", "expected"),
    [
        (False, False, "ea" + TEA_COMPLETION + "</s>"),  # nothing predicts the first token
        (True, False, "Tea" + TEA_COMPLETION + "</s>"),
        (False, True, TEA_COMPLETION + "</s>"),
        (True, True, TEA_COMPLETION + "</s>"),
    ],
    ids=["plain", "bos", "mask", "bos and mask"],
)
def test_targets_of_a_recipe(tmp_path, byte_models, bos, mask, expected):
    dataset, _ = tokenised(tmp_path, [TEA], byte_models[bos])
    batch, plain = data.collate(dataset, [0], mask), PlainTokenizer(byte_models[bos])
    assert plain.spell(batch.targets) == expected
    everything = "<s>" * bos + "Tea" + TEA_COMPLETION
    assert plain.spell(batch.ids[0]) == everything  # the inputs: all but the end token
    length = bos + 3 + 59 + 1  # one token a byte, and the two special ones
    first = bos + 3 if mask else 1  # index of the first target; the token before it predicts it
    assert batch.where.tolist() == list(range(first - 1, length - 1))


@pytest.mark.parametrize(
    ("row", "mask", "bos", "expected"),
    [
        ({"text": "Boil it."}, False, False, "oil it.</s>"),
        ({"text": "Boil it."}, True, False, "oil it.</s>"),  # no prompt: nothing to mask
        ({"text": "Boil it."}, False, True, "Boil it.</s>"),
        ({"text": "Boil it."}, True, True, "Boil it.</s>"),
        ({"prompt": "Hi.", "completion": " Ho."}, False, False, "i. Ho.</s>"),
        ({"prompt": "Hi.", "completion": " Ho."}, False, True, "Hi. Ho.</s>"),
        ({"prompt": "Hi.", "completion": " Ho."}, True, False, " Ho.</s>"),
        ({"prompt": "Hi.", "completion": " Ho."}, True, True, " Ho.</s>"),
        ({"prompt": "Hi.", "completion": ""}, True, True, "</s>"),
    ],
)
def test_targets_of_other_texts(tmp_path, byte_models, row, mask, bos, expected):
    dataset, text = tokenised(tmp_path, [row], byte_models[bos])
    assert PlainTokenizer(byte_models[bos]).spell(targets(dataset, text, 0, mask)) == expected


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_one_end_last_and_one_bos_never_a_target(tmp_path, tiny_model, bos_model, bos, mask):
    dataset, text = tokenised(tmp_path, made_recipes(40), bos_model if bos else tiny_model)
    for i in range(40):
        ids, wanted = dataset.ids(i).tolist(), targets(dataset, text, i, mask)
        assert ids.count(END) == 1 and ids[-1] == END
        assert wanted.count(END) == 1 and wanted[-1] == END
        assert ids.count(BOS) == bos and ids[:1].count(BOS) == bos
        assert BOS not in wanted


def test_no_bos_where_the_tokenizer_adds_none(tiny_model, bos_model):
    """Both configs name <s> as bos_token_id; only one tokenizer puts it before a text."""
    assert Text(tiny_model).bos == [] and Text(bos_model).bos == [BOS]


def test_padding_is_told_by_length_not_by_id(tmp_path):
    """A model whose end token is id 0, which is also what pads: one a recipe is a target, and no padding is."""
    model = make_model(tmp_path / "model", eos_token_id=0, bos_token_id=None)
    (model / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')
    rows = made_recipes(12)
    dataset, text = tokenised(tmp_path, rows, model)
    assert text.end == 0
    batch = data.collate(dataset, list(range(12)), False)
    lengths = [len(PlainTokenizer(model).recipe(row, 0)) for row in rows]
    assert (
        len(set(lengths)) > 5 and (batch.ids == 0).any()
    )  # there is padding, and it looks like the end token
    assert (batch.targets == 0).sum() == 12
    assert len(batch.targets) == sum(n - 1 for n in lengths)


def test_prompt_and_completion_are_tokenised_apart_and_joined(tmp_path, tiny_model):
    row, plain = (
        {"prompt": "Chop the oni", "completion": "ons with the butter"},
        PlainTokenizer(tiny_model),
    )
    joined = plain.ids("Chop the oni") + plain.ids("ons with the butter")
    assert joined != plain.ids("Chop the onions with the butter")  # else this test could not fail
    dataset, text = tokenised(tmp_path, [row], tiny_model)
    assert dataset.ids(0).tolist() == [*joined, END]
    assert targets(dataset, text, 0, True) == [*plain.ids("ons with the butter"), END]
    assert text.prompt("Chop the oni", "ons with") == plain.ids("Chop the oni") + plain.ids(
        "ons with"
    )


def test_a_prompt_for_sampling_is_what_training_saw(tmp_path, bos_model):
    rows = made_recipes(20)
    dataset, text = tokenised(tmp_path, rows, bos_model)
    for i, row in enumerate(rows):
        prompt = text.prompt(row["title"])
        assert dataset.ids(i).tolist()[: len(prompt)] == prompt
        assert prompt == [BOS, *PlainTokenizer(bos_model).ids(row["title"])]


@pytest.mark.parametrize(
    "row",
    [
        {"text": "</s> <s>x</s>"},
        {"prompt": "<s></s>", "completion": "a</s>"},
        {**TEA, "title": "Tea</s>", "directions": ["<s>Boil.</s>", "</s>"]},
    ],
)
def test_text_that_looks_like_a_special_token_stays_text(tmp_path, bos_model, row):
    dataset, _ = tokenised(tmp_path, [row], bos_model)
    inner = dataset.ids(0).tolist()[1:-1]
    assert BOS not in inner and END not in inner
    assert PlainTokenizer(bos_model).spell(inner) == "".join(rendered(row))


def test_end_tokens_of_both_configs_stop_sampling(tmp_path):
    model = make_model(tmp_path / "model", eos_token_id=[1, 7])
    (model / "generation_config.json").write_text('{"eos_token_id": [1, 9]}')
    text = Text(model)
    assert text.end == 1 and text.ends == {1, 7, 9}


def test_a_model_without_an_end_token_is_refused(tmp_path):
    model = make_model(tmp_path / "model", eos_token_id=None)
    (model / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="no end token"):
        Text(model)


# ---- tokens are made once -------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """Counts how often files are read and cleaned."""
    calls = []
    original = recipes.clean

    def counted(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(recipes, "clean", counted)
    return calls


def cached(tmp_path):
    return sorted(p.name for p in (tmp_path / "cache/tokens").iterdir())


def test_tokens_are_reused_when_nothing_changed(tmp_path, tiny_model, reads):
    cfg = data_config(tmp_path, made_recipes(30))
    data.prepare(cfg, Rules(), tiny_model)
    (folder,) = (tmp_path / "cache/tokens").iterdir()
    before = os.stat(folder / "tokens.bin")
    for change in (
        {},
        {"batch_size": 3},
        {"max_len": 500},
        {"seed": 9},
        {"mask_prompt": True},
        {"batching": "random"},
    ):
        data.prepare(Data(**{**vars(cfg), **change}), Rules(), tiny_model)
    after = os.stat(folder / "tokens.bin")
    assert len(reads) == 1 and cached(tmp_path) == [folder.name]
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)


def change_source(file, model):
    write_jsonl(file, made_recipes(31))


def change_tokenizer(file, model):
    make_model(model, vocab=258)


def change_end(file, model):
    (model / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')


@pytest.mark.parametrize("change", [change_source, change_tokenizer, change_end])
def test_tokens_are_made_again_when_a_file_changed(tmp_path, reads, change):
    model, cfg = make_model(tmp_path / "model"), data_config(tmp_path, made_recipes(30))
    data.prepare(cfg, Rules(), model)
    change(Path(cfg.data[0]), model)
    dataset, _, _ = data.prepare(cfg, Rules(), model)
    assert len(reads) == 2 and len(cached(tmp_path)) == 2
    assert len(dataset.rows) == (31 if change is change_source else 30)
    assert dataset.ids(0).tolist() == [
        *PlainTokenizer(model).recipe(made_recipes(1)[0], 0)[:-1],
        0 if change is change_end else 1,
    ]


@pytest.mark.parametrize(
    ("flags", "rules"), [({}, Rules(min_words=60)), ({"clean": False}, Rules())]
)
def test_tokens_are_made_again_when_a_rule_changed(tmp_path, tiny_model, reads, flags, rules):
    cfg = data_config(tmp_path, [*made_recipes(30), TEA], clean=True)
    before = len(data.prepare(cfg, Rules(), tiny_model)[0].rows)
    after = len(data.prepare(Data(**{**vars(cfg), **flags}), rules, tiny_model)[0].rows)
    assert len(reads) == 2 and before == 30 and after != before


@pytest.mark.parametrize(
    "error", [RuntimeError("died"), OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()]
)
def test_a_preparation_that_dies_half_way_leaves_nothing(tmp_path, tiny_model, monkeypatch, error):
    cfg, text = data_config(tmp_path, made_recipes(30)), Text(tiny_model)
    older = tokenise(
        [write_jsonl(tmp_path / "older.jsonl", made_recipes(10))], cfg, Rules(**OPEN), text
    )
    calls = itertools.count()
    original = recipes.key

    def dying(recipe):
        if next(calls) == 20:
            raise error
        return original(recipe)

    with monkeypatch.context() as patch:
        patch.setattr(recipes, "key", dying)
        with pytest.raises(type(error)):
            data.prepare(cfg, Rules(), tiny_model)
    assert next(calls) > 20  # it did die half-way
    assert cached(tmp_path) == [older.name]
    assert (
        len(data.prepare(cfg, Rules(), tiny_model)[0].rows) == 30
    )  # and the next one starts clean


def test_two_preparations_at_once_both_end_well(tmp_path, tiny_model, monkeypatch):
    """Two runs are started together on a new dataset: while the first one reads, the second one is ready before it."""
    cfg, text = data_config(tmp_path, made_recipes(30)), Text(tiny_model)
    files, original = [Path(cfg.data[0])], recipes.clean

    def overtaken(*args):
        monkeypatch.setattr(recipes, "clean", original)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 1)  # another process
            tokenise(files, cfg, Rules(**OPEN), text)
        return original(*args)

    monkeypatch.setattr(recipes, "clean", overtaken)
    folder = tokenise(files, cfg, Rules(**OPEN), text)
    assert len(TokenFile(folder).rows) == 30
    assert cached(tmp_path) == [folder.name]


def test_no_text_is_lost(tmp_path, bos_model):
    rows = [
        *made_recipes(50),
        {"text": "½ cup crème fraîche\n\n\tat 180 °C 🥧 "},
        {"text": "\u00a0\u2028x\u0000y"},
        {"prompt": " a ", "completion": "  b\n"},
    ]
    dataset, text = tokenised(tmp_path, rows, bos_model)
    assert [text.decode(dataset.ids(i)) for i in range(len(rows))] == [
        "".join(rendered(row)) for row in rows
    ]


def test_more_recipes_than_one_chunk(tmp_path, byte_models):
    """Recipes are tokenised 2,048 at a time; rows and tokens go on across the seam."""
    rows = [{"text": str(i)} for i in range(2100)]
    dataset, text = tokenised(tmp_path, rows, byte_models[False])
    assert [text.decode(dataset.ids(i)) for i in range(2100)] == [str(i) for i in range(2100)]


# ---- chats ----------------------------------------------------------------------------------------------------------

TRIMMED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[{{ m.content | trim }}]\n{% else %}"
    "{{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
ONLY_PAIRS = (
    "{% if messages | length % 2 %}{{ raise_exception('turns come in pairs') }}{% endif %}" + CHATML
)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    "template, said",
    [
        (
            CHATML,
            [
                ("<s>user\nWhat is in a pie?</s>\n<s>assistant\n", 0),
                ("Apples </s> and\n<s>sugar.</s>", 1),
                ("\n<s>user\n More?</s>\n<s>assistant\n", 0),
                ("No.\n</s>", 1),
                ("\n", 0),
            ],
        ),
        (
            TRIMMED,
            [
                ("<s>[What is in a pie?]\n", 0),
                ("Apples </s> and\n<s>sugar.</s>", 1),
                ("[More?]\n", 0),
                ("No.</s>", 1),
            ],
        ),
    ],
    ids=["chatml", "trimmed"],
)
def test_targets_of_a_chat_are_the_assistants_turns_and_their_ends(tmp_path, template, said, bos):
    model = chat_model(tmp_path / "model", template, bos=bos)
    dataset, _ = tokenised(tmp_path, [{"messages": CHAT}], model)
    ids, at = dataset.recipe(0)
    plain, target = PlainTokenizer(model), set(at.tolist())
    spelled, runs = "", itertools.groupby(range(len(ids)), key=lambda i: i in target)
    assert [(plain.spell(ids[list(run)]), int(green)) for green, run in runs] == said
    assert dataset.recipe(0, mask_prompt=True)[1].tolist() == at.tolist()
    spelled = plain.spell(ids)
    controls = [i for i in ids.tolist() if i in (BOS, END)]
    assert (
        spelled.count("<s>") + spelled.count("</s>") == len(controls) + 2
    )  # what the user wrote is text


def fed(text, chat):
    """(ids, which of them are targets) of a row with messages; a BadRow is raised."""
    (marked,) = text.tokens([text.pieces(rows.parse(chat))])
    if isinstance(marked, BadRow):
        raise marked
    return [i & IDS for i in marked], [int(i < PROMPT) for i in marked]


@pytest.mark.parametrize("template", chats.TEMPLATES)
@pytest.mark.parametrize("kind", chats.TOKENIZERS)
def test_ids_of_a_chat(tmp_path, kind, template):
    """Those of transformers on the same folder. Targets: as written down by hand, by transformers' offsets."""
    transformers = pytest.importorskip("transformers")
    model = chats.folder_of(tmp_path / "model", kind, chats.TEMPLATES[template])
    text, other = Text(model), transformers.PreTrainedTokenizerFast.from_pretrained(model)
    equal = 0
    for name, chat in chats.CHATS.items():
        try:
            ids, targets = fed(text, chat)
        except BadRow:
            # Everywhere else the template prints all that is there.
            assert (template, name) in chats.REFUSED, name
            continue
        assert (template, name) not in chats.REFUSED
        how = {"tools": chat.get("tools"), "add_generation_prompt": False}
        assert ids == other.apply_chat_template(
            chat["messages"], tokenize=True, return_dict=False, **how
        )
        equal += 1
        printed = chats.PRINTED.get((template, name))
        if printed is None or kind == "trim_offsets":
            continue
        plain, spans = chats.by_hand(printed)
        assert plain == other.apply_chat_template(chat["messages"], tokenize=False, **how)
        offsets = other(plain, add_special_tokens=False, return_offsets_mapping=True)
        assert offsets["input_ids"] == ids
        assert targets == [
            int(any(begin <= start < end for begin, end in spans))
            for start, _ in offsets["offset_mapping"]
        ]
    assert equal >= 5


@pytest.mark.parametrize("printed", chats.PRINTED, ids="-".join)
def test_targets_of_a_chat(tmp_path, printed):
    """A token a byte, so that ids and targets can be written down for each character."""
    template, name = printed
    model = chats.byte_folder(tmp_path / "model", chats.TEMPLATES[template])
    text = Text(model)
    ids, targets = fed(text, chats.CHATS[name])
    plain, spans = chats.by_hand(chats.PRINTED[printed])
    said = "".join(text.spell([i]) for i, target in zip(ids, targets, strict=True) if target)
    assert said == "".join(plain[begin:end] for begin, end in spans)
    assert text.spell(ids) == plain


@pytest.mark.parametrize("template", chats.TEMPLATES)
def test_special_tokens_that_somebody_wrote_stay_text(tmp_path, template):
    """« and » stand around the template's own control tokens; everything else is a token a byte, by hand."""
    model = chats.byte_folder(tmp_path / "model", chats.TEMPLATES[template])
    text = Text(model)
    ids, targets = fed(text, {"messages": chats.SPECIAL})
    by_hand = []
    for part in re.split("(«[^»]+»)", chats.SPECIAL_PRINTED[template]):
        if part.startswith("«"):
            by_hand.append(text.tokenizer.token_to_id(part[1:-1]))
        else:
            by_hand += [text.tokenizer.token_to_id(c) for c in chats.byte_characters(part)]
    assert ids == by_hand
    ends = [i for i, target in zip(ids, targets, strict=True) if target and i in text.ends]
    assert len(ends) == 2


@pytest.mark.parametrize("kind", [k for k in chats.TOKENIZERS if k != "word_piece"])
@pytest.mark.parametrize("template", ["chatml", "llama2", "qwen3"])
def test_no_tokenizer_takes_written_tokens_for_control_tokens(tmp_path, kind, template):
    model = chats.folder_of(tmp_path / "model", kind, chats.TEMPLATES[template])
    text = Text(model)
    plain = {"messages": chats.turns("Hi", "Ho", "And?", "So.")}
    control = {text.control[token] for token in chats.CONTROL if token != "<unk>"}
    expected = [i for i in fed(text, plain)[0] if i in control]
    ids, _ = fed(text, {"messages": chats.SPECIAL})
    assert [i for i in ids if i in control] == expected
    for turn in chats.SPECIAL:
        assert turn["content"].strip() in text.spell(ids)


def test_a_seam_or_a_template_that_looks_is_a_bad_row(tmp_path):
    seam = "{% for m in messages %}<{{ m.content }}>{{ eos_token }}{% endfor %}"
    text = Text(chats.byte_folder(tmp_path / "a", seam))
    assert fed(text, {"messages": chats.turns("Hi", "Ho")})
    with pytest.raises(BadRow, match="together spell '</s>'"):
        fed(text, {"messages": chats.turns("Hi", "/s")})
    looks = "{% for m in messages %}{{ m.content if '</s>' in m.content else m.content | upper }}</s>{% endfor %}"
    text = Text(chats.byte_folder(tmp_path / "b", looks))
    with pytest.raises(BadRow, match="looks at a special token"):
        fed(text, {"messages": chats.turns("Hi", "x</s>y")})


def test_text_that_the_tokenizer_has_no_plain_tokens_for_is_a_bad_row(tmp_path):
    """Words are cut at spaces, and "</s>" is a word of the vocabulary."""
    words = {"<unk>": 0, "</s>": 1, "a": 2, "</S>": 3}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    model = chats.save(tmp_path / "model", tokenizer, chats.CHATML, ends=["</s>"])
    dataset, text = tokenised(tmp_path, [{"text": "a a"}, {"text": "a </s> a"}], model, allow_bad=1)
    assert [list(dataset.ids(i)) for i in range(len(dataset.rows))] == [[2, 2, 1]]
    assert "no plain tokens for the text '</s>'" in dataset.account["bad_examples"][0]
    with pytest.raises(UserError, match="no plain tokens"):
        text.prompt("a </s>")


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_a_prompt_of_a_chat_has_the_ids_of_transformers(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    for template in chats.TEMPLATES:
        model = chats.folder_of(tmp_path / template, kind, chats.TEMPLATES[template])
        other = transformers.PreTrainedTokenizerFast.from_pretrained(model)
        messages = chats.turns("Hi ", "Ho", "And?")
        assert Text(model).chat_prompt(messages) == other.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=False
        )


def test_the_template_may_lie_beside_the_tokenizer_or_be_one_of_several(tmp_path):
    chat = {"messages": CHAT}
    wanted = fed(Text(chat_model(tmp_path / "a", CHATML)), chat)
    several = [{"name": "tool_use", "template": TRIMMED}, {"name": "default", "template": CHATML}]
    assert fed(Text(chat_model(tmp_path / "b", several)), chat) == wanted
    model = chat_model(tmp_path / "c", TRIMMED)
    (model / "chat_template.jinja").write_text(CHATML)
    assert fed(Text(model), chat) == wanted
    # With tools the template of that name is taken, as by transformers.
    named = [
        {"name": "default", "template": TRIMMED},
        {"name": "tool_use", "template": chats.CHATML},
    ]
    text = Text(chats.byte_folder(tmp_path / "d", named))
    assert "Tools:" in text.spell(fed(text, chats.CHATS["tool"])[0])


@pytest.mark.parametrize(
    "template, why",
    [
        (ONLY_PAIRS, "turns come in pairs"),
        ("{{ messages[0].content }}", "leaves out a turn"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses it"),
        ("{{ messages[7].content.x }}", "refuses it"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "leaves out"),
    ],
)
def test_a_chat_that_the_template_refuses_is_a_bad_row(tmp_path, template, why):
    model = chat_model(tmp_path / "model", template)
    dataset, _ = tokenised(tmp_path, [TEA, {"messages": CHAT[:3]}], model, allow_bad=0.5)
    assert (dataset.account["read"], dataset.account["bad"], len(dataset.rows)) == (1, 1, 1)
    assert why in dataset.account["bad_examples"][0]


def test_a_refused_chat_is_a_bad_row_of_its_line_and_no_kept_one(tmp_path):
    """It is counted when tokens are made, and yet between those that were bad when they were read."""
    model = chat_model(tmp_path / "model", ONLY_PAIRS)
    pair, refused = {"messages": CHAT[:2]}, {"messages": CHAT[:3]}
    path = put(tmp_path / "a.jsonl", "no\n" + jsonl(pair, refused, TEA) + "3\n")
    dataset, _ = tokenised(tmp_path, path, model, allow_bad=0.6)
    account = dataset.account
    assert (account["read"], account["bad"], account["kept"], len(dataset.rows)) == (2, 3, 2, 2)
    lines = [example.removeprefix(f"{path}:").split(":")[0] for example in account["bad_examples"]]
    assert lines == ["1", "3", "5"] and "turns come in pairs" in account["bad_examples"][1]
    with pytest.raises(UserError, match="3 of 5 rows"):
        tokenised(tmp_path, path, model, allow_bad=0.5)
    assert len(cached(tmp_path)) == 1  # of the first call


def test_a_model_without_a_template_cannot_chat(tmp_path, tiny_model):
    with pytest.raises(UserError, match="no chat template"):
        tokenised(tmp_path, [{"messages": CHAT}], tiny_model)
    assert not list((tmp_path / "cache/tokens").iterdir())


@pytest.mark.parametrize(
    "template, why",
    [
        ("{% for m in messages %}{{ m.content }}", "line 1"),
        ("{{ messages[0].content | no_such_filter }}", "no_such_filter"),
        ("a\n{% no_such_tag %}", "line 2.*no_such_tag"),
        ("{% generation %}x", "line 1"),
        ("{{ 'x' * 10 ** 11 }}", "GB"),
    ],
)
def test_a_template_that_cannot_be_read_is_one_sentence(tmp_path, template, why):
    text = Text(chats.byte_folder(tmp_path / "model", template))
    with pytest.raises(UserError, match=why):
        fed(text, chats.CHATS["one"])


FOR_EVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLED = (
    "{% set n = namespace(s='x') %}{% for a in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}"
)
RECURSIVE = "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}"


@pytest.mark.parametrize(
    "template, error, why",
    [
        (FOR_EVER, UserError, "0.2 s for one chat"),
        (DOUBLED, UserError, "for one chat"),
        ("{% set n = 9 ** messages | length %}{{ n ** n ** n }}", BadRow, "too large"),
        ("{{ messages[0].content * 10 ** 11 }}", UserError, "GB for one chat"),
        ("{{ messages[0].content.ljust(10 ** 11) }}", UserError, "GB for one chat"),
        (RECURSIVE, BadRow, "recursion"),
    ],
)
def test_a_template_without_end_is_stopped(tmp_path, monkeypatch, template, error, why):
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    monkeypatch.setattr(templates, "BYTES", 3 * 10**8)
    text = Text(chats.byte_folder(tmp_path / "model", template))
    with pytest.raises(error, match=why):
        fed(text, chats.CHATS["one"])


@pytest.mark.parametrize("nothing", [None, ""])
def test_a_named_token_that_is_null_prints_nothing(tmp_path, nothing):
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    model = chats.byte_folder(tmp_path / "model", template)
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": nothing}))
    text = Text(model)
    assert text.spell(fed(text, chats.CHATS["one"])[0]) == (
        "What is in a pie?</s>Apples, of course.</s>"
    )


def test_what_is_not_there_is_none_and_not_undefined(tmp_path):
    template = (
        "{% if tools is not none or documents is not none %}{{ raise_exception('tools') }}{% endif %}"
        + chats.CHATML
    )
    text = Text(chats.byte_folder(tmp_path / "model", template))
    assert fed(text, chats.CHATS["one"])


@pytest.mark.parametrize("special", [True, False])
def test_an_end_token_that_is_not_special_stays_text(tmp_path, special):
    """In a recipe, a prompt and a turn; and no end token is written out by decode."""
    tokenizer = chats.byte_level(vocab=256)
    tokenizer.add_tokens(["<s>", AddedToken("</s>", special=special, normalized=False)])
    model = chats.save(tmp_path / "model", tokenizer, CHATML, ends=["</s>"])
    dataset, text = tokenised(tmp_path, [{"prompt": "a</s>", "completion": "</s>b"}], model)
    end = tokenizer.token_to_id("</s>")
    assert dataset.ids(0).tolist().count(end) == 1 and dataset.ids(0)[-1] == end
    assert end not in text.prompt("a</s>", "</s>b")
    ids, _ = fed(text, {"messages": chats.turns("a</s>", "</s>b")})
    assert ids.count(end) == 2
    assert text.decode(dataset.ids(0)) == "a</s></s>b"


# ---- what a row says beside its text ----


def row(*turns, **more):
    return {"messages": list(turns), **more}


USER = {"role": "user", "content": "Hi"}
SAID = {"role": "assistant", "content": "Ho"}


@pytest.mark.parametrize(
    "bad, why",
    [
        (
            row(USER, {**SAID, "content": "", "tool_calls": [chats.CALL]}),
            "does not print `tool_calls`",
        ),
        (row(USER, SAID, tools=[chats.TOOL]), "does not print `tools`"),
        (row(USER, SAID, tools="[{]"), "`tools` is no JSON"),
        (row(USER, SAID, tools={"a": 1}), "`tools` is no list of objects"),
        (row(USER, SAID, documents=[{"title": "a", "text": "b"}]), "does not print `documents`"),
        (row(USER, SAID, functions=[chats.TOOL]), "`functions` beside"),
        (row(USER, SAID, images=["a.png"]), "`images` beside"),
        (row(USER, SAID, system="Be kind."), "`system` beside"),
        (row(USER, {**SAID, "weight": 0}), "weight of 1"),
        (row(USER, {**SAID, "weight": 0.5}), "`weight` is 0.5"),
        (row(USER, {**SAID, "weight": True}), "`weight` is True"),
        (row(USER, {**SAID, "train": False}, SAID), "does not print `train`"),
        (row(USER, {**SAID, "loss": 0}, SAID), "does not print `loss`"),
        (row(USER, SAID, weight=0), "`weight` beside `messages`"),
        (row(USER, SAID, train=False), "`train` beside `messages`"),
        ({"text": "x", "weight": 0}, "`weight` beside `text`"),
        ({"prompt": "x", "completion": "y", "weight": 0.0}, "`weight` beside `completion`"),
        (row(USER, {**SAID, "train": True}), "does not print `train`"),
        (row(USER, {**SAID, "reasoning_content": "Hm."}), "does not print `reasoning_content`"),
        (row(USER, {"role": "assistant"}), "`content` is missing"),
        (row(USER, {"role": "assistant", "content": None}), "`content` is missing"),
        (row(USER, {**SAID, "content": [{"type": "text", "text": "Ho"}]}), "`content` is no text"),
        (row({**USER, "tool_calls": [chats.CALL]}, SAID), "in a turn of the user"),
        (row(USER, {**SAID, "content": "\U00100000"}), "private planes"),
        (row(USER, {**SAID, "name": "\ud800"}), "surrogate"),
        (row(USER, SAID, chat_template_kwargs=3), "`chat_template_kwargs` is no object"),
        (row(USER, SAID, chat_template_kwargs={"thinking": True}), "does not read `thinking`"),
    ],
)
def test_what_a_row_says_beside_its_text_is_honoured_or_refused(tmp_path, bad, why):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    text = Text(chats.byte_folder(tmp_path / "model", template))
    with pytest.raises(BadRow, match=re.escape(why)):
        fed(text, bad)


def test_a_turn_of_weight_0_is_read_and_not_learned(tmp_path):
    text = Text(chats.byte_folder(tmp_path / "model", chats.CHATML))
    generation = Text(chats.byte_folder(tmp_path / "other", chats.GENERATION))
    for one in (text, generation):
        messages = chats.turns("Hi", "Ho", "And?", "So.")
        ids, both = fed(one, {"messages": messages})
        messages[1]["weight"] = 0
        same, second = fed(one, {"messages": messages})
        assert same == ids
        said = "".join(one.spell([i]) for i, target in zip(ids, second, strict=True) if target)
        assert said == "So.<|im_end|>" and sum(both) > sum(second)


def test_null_is_as_good_as_nothing(tmp_path):
    """As transformers does: null content beside a call, null calls, null tools."""
    text = Text(chats.byte_folder(tmp_path / "model", chats.QWEN3))
    call = {"role": "assistant", "content": None, "tool_calls": [chats.CALL], "name": None}
    ids, _ = fed(text, row(USER, call, tools=None))
    same, _ = fed(text, row(USER, {**call, "content": ""}))
    assert ids == same and "None" not in text.spell(ids)
    assert fed(text, row(USER, {**SAID, "tool_calls": None})) == fed(text, row(USER, SAID))


def test_tools_may_be_a_json_text_and_settings_reach_the_template(tmp_path):
    text = Text(chats.byte_folder(tmp_path / "model", chats.LLAMA3))
    tool = chats.CHATS["tool"]
    assert fed(text, tool) == fed(text, {**tool, "tools": json.dumps(tool["tools"])})
    dated = row(USER, SAID, chat_template_kwargs={"date_string": "1 May 1900"})
    assert "Today Date: 1 May 1900" in text.spell(fed(text, dated)[0])


def test_chats_that_differ_beside_their_words_are_no_duplicates():
    one = row(USER, {**SAID, "tool_calls": [chats.CALL]})
    other = row(USER, {**SAID, "tool_calls": [{**chats.CALL, "id": "7"}]})
    weighted = row(USER, {**SAID, "weight": 1})
    plain = row(USER, SAID)
    keys = [recipes.key(rows.parse(r)) for r in (one, other, weighted, plain, plain)]
    assert len(set(keys)) == 4
    assert [rows.parse(recipes.row_of(rows.parse(r))).chat for r in (one, weighted)] == [
        rows.parse(r).chat for r in (one, weighted)
    ]


@pytest.mark.parametrize("flag", ["data", "val_data"])
def test_a_row_without_a_target_is_bad_before_the_first_step(tmp_path, tiny_model, flag):
    good, empty = made_recipes(8), [{"text": ""}]
    files = {
        name: [str(write_jsonl(tmp_path / f"{name}.jsonl", good + empty * (name == flag)))]
        for name in ("data", "val_data")
    }
    cfg = Data(**files, cache=str(tmp_path / "cache"), clean=False, allow_bad=0)
    with pytest.raises(UserError, match=rf"{flag}.jsonl:9: it has no token to learn"):
        data.prepare(cfg, Rules(), tiny_model)


def test_fields_that_are_not_used_are_counted_by_name(tmp_path, tiny_model):
    made = [{**r, "cuisine": "x", "source": "y"} for r in made_recipes(5)]
    dataset, _ = tokenised(tmp_path, [*made, {"text": "Boil it.", "rating": 5}], tiny_model)
    assert dataset.account["unused"] == {"cuisine": 5, "rating": 1}


# ---- ids that the model has no embedding for ----


def test_ids_beyond_the_embedding_are_named(tmp_path, tiny_model):
    model = make_model(tmp_path / "model", eos_token_id=1)
    have = json.loads((model / "config.json").read_text())["vocab_size"]

    def smaller(by, **config):
        changed = {**json.loads((model / "config.json").read_text()), "vocab_size": have - by}
        (model / "config.json").write_text(json.dumps(changed | config))
        return Text(model)

    text = smaller(1)
    word = text.tokenizer.id_to_token(have - 1).replace("Ġ", " ")
    assert text.encode([word]) == [[have - 1]]  # the last word of the vocabulary
    with pytest.raises(
        UserError, match=f"is token {have - 1}, and the model has embeddings for {have - 1}"
    ):
        text.prompt(word)
    assert text.prompt("a b")  # a vocabulary may be larger, if nothing of it occurs
    dataset, _ = tokenised(tmp_path, [{"text": "a b"}, {"text": word}], model, allow_bad=1)
    assert (dataset.account["kept"], dataset.account["bad"]) == (1, 1)
    assert "has embeddings for" in dataset.account["bad_examples"][0]
    (model / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="the end token cannot be used"):
        smaller(1, eos_token_id=have - 1 + 1)


def test_a_templates_token_beyond_the_embedding_makes_a_bad_row(tmp_path):
    model = chats.byte_folder(
        tmp_path / "model", "{% for m in messages %}{{ m.content }}</s><|new|>{% endfor %}"
    )
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "<|new|>"}))
    with pytest.raises(BadRow, match=r"'<\|new\|>' is token"):
        fed(Text(model), chats.CHATS["one"])


@pytest.mark.parametrize(
    "name, content, why",
    [
        ("config.json", {"eos_token_id": "2"}, "eos_token_id is '2'"),
        ("config.json", {"eos_token_id": [1, -1]}, "eos_token_id is"),
        ("config.json", {"max_position_embeddings": "16"}, "max_position_embeddings is '16'"),
        ("config.json", {"vocab_size": 0.5}, "vocab_size is 0.5"),
        ("generation_config.json", {"eos_token_id": True}, "eos_token_id is True"),
        ("generation_config.json", [], "cannot be read|no end token"),
        ("tokenizer_config.json", {"split_special_tokens": True}, "split_special_tokens"),
        ("tokenizer_config.json", {"new_trick": 3}, "the key new_trick = 3"),
        ("tokenizer_config.json", {"chat_template": 3}, "is no text but 3"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": 3}}, "cannot be read"),
        ("added_tokens.json", {"<new>": 9000}, "'<new>' is token 9000, but"),
        ("special_tokens_map.json", "no", "cannot be read"),
        ("special_tokens_map.json", {"new_trick": 3}, "the key new_trick = 3"),
    ],
)
def test_a_key_that_cannot_be_used_is_named(tmp_path, name, content, why):
    model = make_model(tmp_path / "model", eos_token_id=None)
    (model / "tokenizer_config.json").write_text("{}")
    (model / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=why):
        Text(model)


def test_named_tokens_of_the_older_files_count_as_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = make_model(tmp_path / "model", eos_token_id=None)
    (model / "tokenizer_config.json").write_text('{"eos_token": "<s>", "model_max_length": 5}')
    (model / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}}')
    other = transformers.PreTrainedTokenizerFast.from_pretrained(model)
    assert Text(model).end == other.eos_token_id == 1
    (model / "tokenizer_config.json").write_text('{"eos_token": "<s>", "added_tokens_decoder": {}}')
    other = transformers.PreTrainedTokenizerFast.from_pretrained(model)
    assert Text(model).end == other.eos_token_id == 0


# ---- the checks before training ----


def checked(tmp_path, model, messages):
    dataset, text = tokenised(tmp_path, [{"messages": m} for m in messages], model, allow_bad=0)
    dataset.indices = np.arange(len(dataset.rows))
    dataset.account["dropped"]["max_len"] = 0
    check_targets(dataset, text, Data())


TWO = chats.turns("Hi", "Ho", "And?", "So.")


@pytest.mark.parametrize("template", chats.TEMPLATES)
@pytest.mark.parametrize("bos", [False, True])
def test_every_right_layout_of_chats_passes_the_checks(tmp_path, capsys, template, bos):
    tokenizer = chats.byte_level(vocab=256)
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in chats.CONTROL])
    if bos:
        chats.with_bos(tokenizer)
    model = chats.save(tmp_path / "model", tokenizer, chats.TEMPLATES[template])
    checked(tmp_path, model, [TWO])
    said = capsys.readouterr().err
    assert "an end token ends 1 of 1 rows" in said
    if bos:
        prints_one = template in ("mistral", "r1", "gemma")
        assert ("BOS: exactly one" in said) == prints_one
        assert ("1 hold several" in said) == (template == "llama2")
    else:
        assert "BOS: this tokenizer has none" in said


def test_bos_may_be_the_end_token(tmp_path, capsys):
    tokenizer = chats.byte_level(vocab=256)
    tokenizer.add_tokens([AddedToken("</s>", special=True, normalized=False)])
    chats.with_bos(tokenizer, "</s>")
    model = chats.save(tmp_path / "model", tokenizer, chats.LLAMA2, ["</s>"], bos_token="</s>")
    checked(tmp_path, model, [TWO])
    dataset, text = tokenised(tmp_path, made_recipes(3), model)
    dataset.account["dropped"]["max_len"] = 0
    check_targets(dataset.using(np.arange(3)), text, Data())
    assert "is an end token, too" in capsys.readouterr().err


@pytest.mark.parametrize(
    "template, why",
    [
        ("{{ bos_token }}<s>" + chats.CHATML, "two BOS tokens in a row"),
        (chats.CHATML.replace("<|im_end|>", "[/INST]"), r"but in '\\n'.*would not learn to stop"),
    ],
)
def test_a_wrong_layout_is_found(tmp_path, template, why):
    tokenizer = chats.byte_level(vocab=256)
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in chats.CONTROL])
    model = chats.save(tmp_path / "model", chats.with_bos(tokenizer), template)
    with pytest.raises(UserError, match=why):
        checked(tmp_path, model, [TWO])


# ---- identity is content ----


def test_a_file_that_changed_and_kept_size_and_time_is_tokenised_again(tmp_path, tiny_model, reads):
    cfg = data_config(tmp_path, [{"text": "Boil an egg."}, {"text": "Fry an egg."}])
    file = Path(cfg.data[0])
    before = data.load_dataset(cfg.data, "--data", cfg, Rules(), Text(tiny_model))
    stat = os.stat(file)
    file.write_bytes(file.read_bytes().replace(b"an egg", b"a herb"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert os.stat(file).st_size == stat.st_size
    after = data.load_dataset(cfg.data, "--data", cfg, Rules(), Text(tiny_model))
    assert len(reads) == 2 and before.ids(0).tolist() != after.ids(0).tolist()


@pytest.mark.parametrize("name", ["tokens.bin", "rows.bin", "account.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_half_a_cache_is_made_again(tmp_path, tiny_model, reads, name, damage):
    cfg = data_config(tmp_path, made_recipes(9))
    files, text = [Path(cfg.data[0])], Text(tiny_model)
    whole = {f.name: f.read_bytes() for f in tokenise(files, cfg, Rules(**OPEN), text).iterdir()}
    path = tmp_path / "cache/tokens" / cached(tmp_path)[0] / name
    path.unlink() if damage == "gone" else path.write_bytes(whole[name][:-20])
    folder = tokenise(files, cfg, Rules(**OPEN), text)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == whole and len(reads) == 2


def test_another_template_of_the_same_length_is_other_data(tmp_path):
    made = [{"messages": chats.turns(f"Hi {n}", "Ho")} for n in range(6)]
    prints = []
    for name, word in (("a", "cook"), ("b", "chef")):
        template = chats.CHATML.replace("+ message.role +", f"+ '{word}' +")
        model = chats.byte_folder(tmp_path / name, template)
        cfg = data_config(tmp_path, made)
        dataset, held, _ = data.prepare(cfg, Rules(), model)
        prints.append((data.about_data(dataset, held), dataset.rows["length"].tolist()))
    assert prints[0][1] == prints[1][1] and prints[0][0] != prints[1][0]


def test_show_as_json_is_what_the_model_is_fed(tmp_path):
    model = chats.byte_folder(tmp_path / "model", chats.CHATML)
    made = [{"messages": TWO}, {"prompt": "a", "completion": "b"}]
    file = write_jsonl(tmp_path / "rows.jsonl", made)
    flags = ["--data", file, "--model", model, "--cache", tmp_path / "cache", "--no-clean"]
    done = program("data.py", *flags, "--show", 9, "--json", "--mask_prompt")
    first, second = map(json.loads, done.stdout.splitlines())
    assert first["ids"], first["targets"] == fed(Text(model), made[0])
    assert (second["text"], second["targets"]) == ("ab</s>", [0, 1, 1])
    assert first.keys() == {"text", "ids", "targets"}


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "normalized", "single_word"])
def test_a_flag_of_a_token_is_a_part_of_the_cache_key(tmp_path, flag):
    """added_tokens_decoder replaces the tokens of tokenizer.json, so other flags there are other tokens."""
    template = "{% for m in messages %}{{ m.content }} </s> {% endfor %}"
    keys = set()
    for value in (False, True):
        model = chats.byte_folder(tmp_path / str(value), template)
        text = Text(model)
        token = {"content": "</s>", "special": True, "normalized": False, flag: value}
        number = str(text.control["</s>"])
        path = model / "tokenizer_config.json"
        settings = json.loads(path.read_text()) | {"added_tokens_decoder": {number: token}}
        path.write_text(json.dumps(settings))
        keys.add(text_module.cache_key([], [], None, Text(model), 0))
    assert len(keys) == 2


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("told", [False, True, None])
def test_add_prefix_space_that_tokenizer_json_contradicts_is_said(tmp_path, capsys, prefix, told):
    tokenizer = chats.byte_level(prefix=prefix)
    tokenizer.add_tokens(["</s>"])
    model = chats.save(tmp_path / "model", tokenizer, None, ["</s>"], add_prefix_space=told)
    Text(model)
    assert ("tokenizer.json counts" in capsys.readouterr().err) == (
        told is not None and told != prefix
    )


@pytest.mark.parametrize("token", [5, {"content": None}, ["</s>"]])
def test_a_named_token_that_is_no_token_is_refused(tmp_path, token):
    model = make_model(tmp_path / "model")
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
    with pytest.raises(UserError, match="eos_token|cannot be read"):
        Text(model)


def test_a_folder_that_transformers_saved_is_read(tmp_path):
    """With a named token of its own, which the template prints."""
    transformers = pytest.importorskip("transformers")
    template = "{% for m in messages %}{{ turn_token }}{{ m.content }}</s>{% endfor %}"
    for extra in ({"turn_token": "[INST]"}, {"extra_special_tokens": {"turn_token": "[INST]"}}):
        model = chats.byte_folder(tmp_path / str(len(extra)), template)
        path = model / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | extra))
        other = transformers.AutoTokenizer.from_pretrained(model)
        wanted = other.apply_chat_template(TWO, return_dict=False)
        assert fed(Text(model), {"messages": TWO})[0] == wanted
        assert wanted.count(other.convert_tokens_to_ids("[INST]")) == 4
        other.save_pretrained(model)
        assert fed(Text(model), {"messages": TWO})[0] == wanted


@pytest.mark.parametrize("kind", ["sentencepiece", "no_dummy_prefix", "metaspace_first"])
@pytest.mark.parametrize(
    "told", [{}, {"legacy": True}, {"legacy": False}, {"add_prefix_space": False}]
)
def test_a_llama_tokenizer_has_the_spaces_of_transformers(tmp_path, kind, told):
    transformers = pytest.importorskip("transformers")
    template = chats.TEMPLATES["mistral"]
    model = chats.folder_of(tmp_path / "model", kind, template)
    path = model / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | told | {"tokenizer_class": "LlamaTokenizerFast"}
    path.write_text(json.dumps(settings))
    other = transformers.AutoTokenizer.from_pretrained(model)
    for name in ("two", "spaces", "system"):
        chat = chats.CHATS[name]
        ids, _ = fed(Text(model), chat)
        assert ids == other.apply_chat_template(chat["messages"], return_dict=False)


def test_a_call_without_content_is_that_of_transformers(tmp_path):
    """The form of OpenAI's files. Without its call such a turn would be another one, or none."""
    transformers = pytest.importorskip("transformers")
    call = {"role": "assistant", "content": None, "tool_calls": [chats.CALL]}
    tool = {"role": "tool", "content": "Apples"}
    counts = (
        "{% set n = namespace(n=0) %}{% for m in messages %}"
        "{% if m.tool_calls %}[TOOL_CALLS]{{ m.tool_calls | tojson }}"
        "{% elif m.role == 'tool' %}{{ m.content }}"
        "{% else %}{% if (m.role == 'user') != (n.n % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}"
        "{% set n.n = n.n + 1 %}{{ m.content }}{% endif %}</s>{% endfor %}"
    )
    model = chats.byte_folder(tmp_path / "model", counts)
    other = transformers.PreTrainedTokenizerFast.from_pretrained(model)
    messages = [USER, call, tool, SAID]
    assert fed(Text(model), row(*messages))[0] == other.apply_chat_template(
        messages, return_dict=False
    )


def test_a_template_that_ends_a_conversation_otherwise(tmp_path):
    """Phi-3's prints an end token behind the last turn, unless it asks for more."""
    template = (
        "{% for m in messages %}{{ '[INST]' + m.role + '\\n' + m.content + '<|im_end|>' }}{% endfor %}"
        "{{ '[INST]assistant\\n' if add_generation_prompt else eos_token }}"
    )
    text = Text(chats.byte_folder(tmp_path / "model", template))
    ids, targets = fed(text, {"messages": TWO})
    said = text.spell([i for i, target in zip(ids, targets, strict=True) if target])
    assert said == "Ho<|im_end|>So.<|im_end|>"


def test_a_control_token_in_a_key_stays_text(tmp_path):
    text = Text(chats.byte_folder(tmp_path / "model", chats.CHATML))
    call = {"function": {"name": "a", "arguments": {"</s><|im_end|>": "x"}}}
    ids, _ = fed(text, row(USER, {**SAID, "tool_calls": [call]}))
    assert "</s><|im_end|>" in text.spell(ids)
    assert text.control["</s>"] not in ids and ids.count(text.control["<|im_end|>"]) == 2


def test_a_token_that_must_stand_alone_is_never_lost(tmp_path):
    """single_word: beside a word the alias of such a token is not taken, so the row is bad."""
    tokenizer = chats.byte_level(vocab=256)
    tokenizer.add_tokens([AddedToken("</s>", special=True, single_word=True, normalized=False)])
    template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    text = Text(chats.save(tmp_path / "model", tokenizer, template, ["</s>"]))
    assert fed(text, {"messages": chats.turns("a ", "b ")})
    with pytest.raises(BadRow, match="does not take the template's special tokens"):
        fed(text, {"messages": chats.turns("a </s> b", "c")})


def test_an_unknown_character_of_a_unigram_model_is_no_control_token(tmp_path):
    words = [("<unk>", 0.0), ("</s>", -1.0), ("▁a", -2.0), ("b", -3.0)]
    tokenizer = Tokenizer(tokenizer_models.Unigram(words, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    text = Text(chats.save(tmp_path / "model", tokenizer, template, ["</s>"]))
    ids, _ = fed(text, {"messages": chats.turns("a, b", "b!")})
    assert 0 in ids
    with pytest.raises(BadRow, match="special token '</s>'"):
        fed(text, {"messages": chats.turns("a</s>", "b")})


def test_a_named_token_that_is_an_ordinary_word_stays_one(tmp_path):
    model = chats.byte_folder(tmp_path / "model", chats.CHATML)
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "!"}))
    dataset, text = tokenised(tmp_path, [{"text": "Hi!"}, {"messages": TWO}], model, allow_bad=0)
    assert text.decode(dataset.ids(0)) == "Hi!"
    assert fed(text, {"messages": chats.turns("Hi!", "Ho!")})


@pytest.mark.parametrize("said", ["", "Ho"])
def test_the_end_behind_a_marked_part_is_learned(tmp_path, said):
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}[INST]{% generation %}{{ m.content }}"
        "{% endgeneration %}<|im_end|>{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    text = Text(chats.byte_folder(tmp_path / "model", template))
    ids, targets = fed(text, {"messages": chats.turns("Hi", said)})
    assert text.spell([i for i, t in zip(ids, targets, strict=True) if t]) == said + "<|im_end|>"


def test_a_template_that_is_not_wanted_does_no_harm(tmp_path):
    several = [{"name": "default", "template": chats.CHATML}, {"name": "rag", "template": "{% if"}]
    text = Text(chats.byte_folder(tmp_path / "a", several))
    assert fed(text, chats.CHATS["two"])
    surrogate = Text(chats.byte_folder(tmp_path / "b", chats.CHATML + "\udc80"))
    with pytest.raises(UserError, match="chat template 'default'"):
        fed(surrogate, chats.CHATS["two"])


def test_no_tools_are_what_the_row_says(tmp_path):
    """As in transformers: an empty list is a list, and null is none."""
    template = "{{ 'none' if tools is none else 'some' }}{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    text = Text(chats.byte_folder(tmp_path / "model", template))
    assert text.spell(fed(text, row(USER, SAID, tools=[]))[0]).startswith("some")
    assert text.spell(fed(text, row(USER, SAID, tools=None))[0]).startswith("none")


def test_a_second_end_token_of_the_ordinary_vocabulary_is_found_in_a_text(tmp_path):
    """Sampling stops at both, so a text that holds one in its middle is a bad row."""
    model = make_model(tmp_path / "model")
    plain = PlainTokenizer(model)
    (flour,) = plain.ids(" flour")
    config = json.loads((model / "config.json").read_text()) | {"eos_token_id": [1, flour]}
    (model / "config.json").write_text(json.dumps(config))
    dataset, _ = tokenised(
        tmp_path, [{"text": "Mix flour."}, {"text": "Boil."}], model, allow_bad=1
    )
    assert (dataset.account["kept"], dataset.account["bad"]) == (1, 1)
