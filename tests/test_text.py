"""text.py: which tokens are targets, in recipes, other texts and chats; and that tokens are made once."""

from cli import UserError

import errno
import itertools
import os
import re
from pathlib import Path

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
    put,
    rendered,
    tokenised,
    write_jsonl,
)

import data
import recipes
from data import Data
from recipes import Rules
from text import PROMPT, Text, TokenFile, tokenise

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


@pytest.mark.parametrize("template", [CHATML, TRIMMED], ids=["chatml", "trimmed"])
@pytest.mark.parametrize("ask", [False, True])
def test_a_chat_has_the_ids_of_transformers(tmp_path, template, ask):
    transformers = pytest.importorskip("transformers")
    model = chat_model(tmp_path / "model", template)
    chat = [
        {**m, "content": re.sub("</?s>", "", m["content"]).strip()} for m in CHAT[: 3 if ask else 4]
    ]
    text = Text(model)
    (ids,) = text.tokens([text.chat(chat, ask)])
    other = transformers.PreTrainedTokenizerFast.from_pretrained(model).apply_chat_template(
        chat, tokenize=True, add_generation_prompt=ask, return_dict=True
    )["input_ids"]
    assert [i & (PROMPT - 1) for i in ids] == other


def test_the_template_may_lie_beside_the_tokenizer_or_be_one_of_several(tmp_path):
    wanted = Text(chat_model(tmp_path / "a", CHATML)).chat(CHAT)
    several = [{"name": "tools", "template": TRIMMED}, {"name": "default", "template": CHATML}]
    assert Text(chat_model(tmp_path / "b", several)).chat(CHAT) == wanted
    model = chat_model(tmp_path / "c", TRIMMED)
    (model / "chat_template.jinja").write_text(CHATML)
    assert Text(model).chat(CHAT) == wanted


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
