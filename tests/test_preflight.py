"""What a run checks and says before its first step: each line beside a run that has the fault, and a twin without it.

`begin` sets up a run of train.py in this process, as a user would start it, on a tiny model. A fault lies in what the
run is given: a tokenizer, a chat template, a dataset, weights, a folder. Only where no file can have the fault (a card
without bf16, a block that ignores its adapter) is something replaced in the program or under it. A pair differs in the
fault alone. The lines, in the order of a run:

    what is asked                                        where                       here
    flags that cannot go together                        train.check, data.check     test_train.py: a_mistake_gets_one…
    the device is there                                  precision.pick_device       a_device_that_is_not_there
    a compiler for --compile                             compiled.start_compiler     compile_without_a_compiler
    weights, tokenizer, configuration are there          hub.check_folder            a_folder_without_weights
    --out is nobody's else, and not what is read         run.check_out, Run.own      an_out_folder
    --out holds a run; its disk has no locks             run.rename_old_run, own     test_train.py, test_run.py
    what the cache has is whole and of this version      hub.is_whole, made_by       test_hub.py
    the model is a Llama of known settings               model_config.read           a_model_that_is_no_llama
    there is an end token                                text.Text                   no_end_token
    end token and BOS have an embedding                  text.Text                   a_token_without_an_embedding
    tokenizer.json and its settings agree                tokenizer.say_contradic…    files_that_contradict
    --max_len is within the model's positions            data.prepare                max_len_beyond
    rows can be read                                     recipes.check_bad           rows_that_are_bad
    something is left to train on                        text.why_nothing_is_left    every_row_above_max_len
    enough to train on and hold out                      data.prepare                too_few
    the longest recipe fits --batch_tokens               data.load_dataset           a_recipe_longer_than_a_batch
    an end token ends each row, as a target              text.check_end              an_end_that_is_masked
    BOS: exactly one, none, several                      text.check_bos, about_bos   two_bos, the_line_about_bos
    padding hides no end                                 text.about_padding          a_pad_token_that_is_the_end
    how many were dropped; the share of targets          text.check_targets          the_share_of_targets
    more than half was dropped                           text.say_dropped            more_than_half_dropped
    a step larger than the dataset                       data.say_small              a_step_larger
    bf16, or the device's next best                      precision.pick_dtype        bf16
    weights that are read, whole and finite              weights.read, not_read      weights_that
    --lora_targets are layers                            lora.adapt                  test_train.py: a_mistake_gets_one…
    --quant nf4 fits the sizes; --fp8 the device         quant.make_linear, …        quantisation_that; test_quant.py
    an embedding that may move                           offload.embedding_to_host   test_train.py: a_mistake_gets_one…
    bitsandbytes for 8-bit states; paged on a CPU        quant.bitsandbytes, optim   eight_bit_states
    a run that is resumed is the same run                run.IDENTITY, fill_params   test_run.py, test_train.py
    each trained tensor gets a gradient, no frozen one   optim.check_gradients       a_lora_without, a_frozen, zeros
    loss and gradient are numbers                        precision.LossScale         a_model_that_leaves_the_range
"""

import cli

import importlib.util
import json
import shutil
import sys
from collections import namedtuple

import chats
import pytest
import torch
from conftest import made_recipes, make_model, write_jsonl
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, pre_tokenizers, processors

import job
import lora
import train
from files import pictures
from speed import compiled, precision

Begun = namedtuple("Begun", "code said")


@pytest.fixture(scope="session")
def sound(tmp_path_factory):
    """A model and recipes that are as they should be."""
    folder = tmp_path_factory.mktemp("sound")
    model = make_model(folder / "model", bos=True, layers=1)
    return model, write_jsonl(folder / "recipes.jsonl", made_recipes(24))


def set_up():
    """All that train.main does before its loop."""
    cfg, data_cfg, rules = train.parse_flags()
    train.check(cfg, data_cfg)
    return int(train.set_up(cfg, data_cfg, rules) is None)


@pytest.fixture
def begin(sound, monkeypatch, capsys, tmp_path):
    """begin(*flags, model, rows) -> Begun(exit code, what was said) of a set-up; with `steps` also of a first step."""
    n = 0

    def call(*flags, model=None, rows=None, steps=False):
        nonlocal n
        n += 1
        model = model or sound[0]
        file = sound[1] if rows is None else write_jsonl(tmp_path / f"rows{n}.jsonl", rows)
        argv = [
            *("--model", model, "--data", file, "--cache", tmp_path / "cache"),
            *("--out", tmp_path / f"out{n}", "--device", "cpu", "--dtype", "fp32", "--no-clean"),
            *("--val_recipes", 4, "--max_steps", 1, "--lora_r", 2, *flags),
        ]
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
        monkeypatch.setattr(job, "write_recipe", lambda *_: None)
        monkeypatch.setattr(pictures, "curve", lambda *_: None)
        program = train.main if steps else set_up
        with pytest.raises(SystemExit) as stop:
            cli.run(program)
        return Begun(stop.value.code, capsys.readouterr().err)

    return call


def told(fault, twin, sentence, code=2):
    """Whether the fault gets its sentence, once, and its exit code, and the twin is set up without a word of it."""
    assert fault.code == code, fault.said
    assert fault.said.count(sentence) == 1, fault.said
    assert "Traceback" not in fault.said
    if code:
        assert sentence in fault.said.splitlines()[-1]
    assert twin.code == 0, twin.said
    assert sentence not in twin.said


@pytest.fixture
def model_with(sound, tmp_path):
    """model_with(name, file={key: value}): a copy of the sound model, some keys of its JSON files changed."""

    def change(name, **files):
        folder = tmp_path / name
        shutil.copytree(sound[0], folder)
        for stem, changes in files.items():
            path = folder / f"{stem}.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return folder

    return change


# --- what a run is given: device, folders, model ---


def test_a_device_that_is_not_there(begin):
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    told(begin("--device", "cuda"), begin(), "--device cuda does not work here")


def test_compile_without_a_compiler(begin, monkeypatch):
    twin = begin()
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    told(begin("--compile"), twin, "--compile needs a C++ compiler")


def test_a_folder_without_weights(begin, model_with):
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        model = model_with(f"without {name}")
        (model / name).unlink()
        shown = "*.safetensors" if name.startswith("model") else name
        told(begin(model=model), begin(), f"has no {shown}. --model wants a folder")


def test_an_out_folder_that_another_process_owns_or_that_is_read(begin, sound, tmp_path):
    twin = begin("--out", tmp_path / "free")
    owner = train.Run(tmp_path / "taken", resume=False)
    told(begin("--out", owner.folder), twin, "another process is training in")
    told(begin("--out", sound[0]), twin, "is where --out")


def test_a_model_that_is_no_llama_or_has_an_unknown_setting(begin, model_with):
    twin = begin(model=model_with("sound", config={"torch_dtype": "float32"}))
    other = model_with("other", config={"architectures": ["GPT2LMHeadModel"]})
    told(begin(model=other), twin, "which is no Llama-architecture model")
    scaled = model_with("scaled", config={"logit_scale": 2.0})
    told(begin(model=scaled), twin, "logit_scale is 2.0, which is not supported")


# --- the tokenizer ---


def test_no_end_token(begin, model_with):
    nothing = {"eos_token": None}
    fault = model_with("fault", config={"eos_token_id": None}, tokenizer_config=nothing)
    twin = model_with("twin", config={"eos_token_id": 1}, tokenizer_config=nothing)
    told(begin(model=fault), begin(model=twin), "names no end token")


def test_a_token_without_an_embedding(begin, model_with):
    """Somebody added an end token and did not resize the embedding."""
    said = begin(model=with_added_end(model_with("fault"), 400))
    twin = begin(model=with_added_end(model_with("twin"), None))
    told(said, twin, "the end token cannot be used: '<|im_end|>' is token")


def with_added_end(model, number):
    """A model whose end token is a new one; number None: one that has an embedding, in place of an old token."""
    path = model / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    if number is None:
        parts = json.loads(tokenizer.to_str().replace('"</s>"', '"<|im_end|>"'))
        path.write_text(json.dumps(parts))
    else:
        tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
        tokenizer.save(str(path))
    settings = {"eos_token": "<|im_end|>", "bos_token": "<s>"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    return model


def test_files_that_contradict_each_other(begin, model_with):
    sentence = "says add_prefix_space True, tokenizer.json False: tokenizer.json counts"
    fault = model_with("fault", tokenizer_config={"add_prefix_space": True})
    twin = model_with("twin", tokenizer_config={"add_prefix_space": False})
    told(begin(model=fault), begin(model=twin), sentence, code=0)


def test_a_tokenizer_of_more_steps_than_its_class_has(begin, model_with):
    fault = model_with("fault", tokenizer_config={"tokenizer_class": "GPT2Tokenizer"})
    twin = model_with("twin", tokenizer_config={"tokenizer_class": "GPT2Tokenizer"})
    tokenizer = Tokenizer.from_file(str(fault / "tokenizer.json"))
    steps = [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.save(str(fault / "tokenizer.json"))
    sentence = "transformers 5 builds a GPT2Tokenizer with other steps"
    told(begin(model=fault), begin(model=twin), sentence, code=0)


# --- the dataset ---


def test_max_len_beyond_the_positions(begin):
    sentence = "--max_len 1025 is beyond the 1024 positions of this model"
    told(begin("--max_len", 1025), begin("--max_len", 1024), sentence)


def test_rows_that_are_bad(begin):
    rows = made_recipes(24)
    broken = [{**row, "directions": 7} for row in rows[:2]]
    told(begin(rows=[*broken, *rows[2:]]), begin(rows=rows), "2 of 24 rows (8.3%) are no recipes")


def test_every_row_above_max_len(begin):
    sentence = "no recipe is left of 24 read: max_len took 24; loosen that bound"
    told(begin("--max_len", 8), begin("--max_len", 1000), sentence)


def test_too_few_to_train_on_and_hold_out(begin):
    fault = begin(rows=made_recipes(1))
    told(fault, begin(rows=made_recipes(2)), "1 recipe(s) are too few to train on and hold out")


def test_a_recipe_longer_than_a_batch(begin):
    fault, twin = begin("--batch_tokens", 30), begin("--batch_tokens", 1000)
    told(fault, twin, "--batch_tokens 30: the longest recipe has ")


# --- the classic silent mistakes: ends, BOS, padding, what is dropped, what is learned ---


@pytest.fixture
def chat_model(tmp_path):
    """chat_model(name, template, **settings): its tokenizer has a BOS, and end tokens of many models."""

    def make(name, template, **settings):
        tokenizer = chats.byte_level(vocab=256)
        tokens = [AddedToken(t, special=True, normalized=False) for t in chats.CONTROL]
        tokenizer.add_tokens(tokens)
        return chats.save(tmp_path / name, chats.with_bos(tokenizer), template, **settings)

    return make


def chat_rows():
    """Six conversations of two questions. Three are held out, because at most half of all may be."""
    talks = [chats.turns(f"What is in pie {i}?", "Apples.", "More?", "Sugar.") for i in range(6)]
    return [{"messages": talk} for talk in talks]


MARKED = "{{- message.content + '<|im_end|>' }}{%- endgeneration %}"
MASKED = "{{- message.content }}{%- endgeneration %}{{- '\\n<|im_end|>' }}"


def test_an_end_that_the_template_masks(begin, chat_model):
    """The template says what is learned; in the fault the end token stands behind that, after a line break."""
    fault = chat_model("fault", chats.GENERATION.replace(MARKED, MASKED))
    twin = chat_model("twin", chats.GENERATION)
    said = begin(model=fault, rows=chat_rows()), begin(model=twin, rows=chat_rows())
    told(*said, "does not end in an end token as a target, but in '.'")
    assert "an end token ends 3 of 3 rows, as a target" in said[1].said


def test_a_template_without_ends(begin, chat_model):
    fault = chat_model("fault", chats.CHATML.replace("<|im_end|>", ""))
    told(
        begin(model=fault, rows=chat_rows()),
        begin(model=chat_model("twin", chats.CHATML), rows=chat_rows()),
        "the model would not learn to stop",
    )


def test_two_bos_of_a_template(begin, chat_model):
    fault = chat_model("fault", "{{ bos_token }}{{ bos_token }}" + chats.CHATML)
    twin = chat_model("twin", "{{ bos_token }}" + chats.CHATML)
    said = begin(model=fault, rows=chat_rows()), begin(model=twin, rows=chat_rows())
    told(*said, "has two BOS tokens in a row: the chat template prints one too many")
    assert "BOS: exactly one" in said[1].said


def with_post_processor(model, single):
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokens = [("<s>", 0), ("</s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    tokenizer.save(str(model / "tokenizer.json"))
    return model


def test_two_bos_of_a_tokenizer(begin, model_with):
    fault = with_post_processor(model_with("fault"), "<s> <s> $A")
    twin = with_post_processor(model_with("twin"), "<s> $A")
    sentence = f"has two BOS tokens in a row: the post_processor of {fault / 'tokenizer.json'} puts"
    told(begin(model=fault), begin(model=twin), sentence)


LINES_ABOUT_BOS = {
    "BOS: exactly one": "<s> $A",
    "BOS: this tokenizer has none": "$A",
    "BOS: the tokenizer's BOS is an end token, too": "</s> $A",
}


@pytest.mark.parametrize("line", LINES_ABOUT_BOS)
def test_the_line_about_bos(begin, model_with, line):
    said = begin(model=with_post_processor(model_with("m"), LINES_ABOUT_BOS[line]))
    assert said.code == 0
    assert [other in said.said for other in LINES_ABOUT_BOS] == [
        other == line for other in LINES_ABOUT_BOS
    ]


def test_a_template_without_bos_or_with_several(begin, chat_model):
    rows = chat_rows()
    without = begin(model=chat_model("without", chats.CHATML), rows=rows)
    several = begin(model=chat_model("several", chats.LLAMA2, ends=["</s>"]), rows=rows)
    once = begin(model=chat_model("once", "{{ bos_token }}" + chats.CHATML), rows=rows)
    told(without, once, "BOS: 3 rows begin without it and 0 hold several", code=0)
    told(several, once, "BOS: 0 rows begin without it and 3 hold several", code=0)
    assert "BOS: exactly one" in once.said


def test_a_pad_token_that_is_the_end_token(begin, model_with, monkeypatch):
    fault = model_with("fault", tokenizer_config={"pad_token": "</s>"})
    twin = model_with("twin", tokenizer_config={"pad_token": "<s>"})
    said = begin(model=fault, steps=True), begin(model=twin, steps=True)
    told(*said, "padding: the pad token '</s>' is an end token, too;", code=0)
    assert "padding: known by length, no token stands for it" in said[1].said
    # What the line promises: the ends are targets in padded batches all the same.
    targets = []
    step = job.Built.forward_backward

    def watched(built, ids, where, batch_targets, *more):
        targets.append((len(ids), batch_targets.tolist()))
        return step(built, ids, where, batch_targets, *more)

    monkeypatch.setattr(job.Built, "forward_backward", watched)
    begin("--batch_size", 8, "--batching", "random", model=fault, steps=True)
    ((recipes, learned),) = targets
    assert recipes == learned.count(1) == 8


def test_the_share_of_targets_and_of_what_is_dropped(begin, byte_models):
    """A byte is a token here: 4 of prompt, 3 of completion and the end, so 4 of 8 tokens or all but none."""
    rows = [{"prompt": f"cut{i}", "completion": f"ab{i}"} for i in range(8)]
    long = [{"prompt": f"cut{i}", "completion": "abcdefghijkl"} for i in range(3)]
    model = byte_models[False]
    masked = begin("--mask_prompt", model=model, rows=rows)
    assert "0 recipes dropped for --max_len 1024; 50% of the tokens are targets" in masked.said
    # The first token of a row has none before it, and is no target: 7 of 8.
    whole = begin(model=model, rows=rows)
    assert "0 recipes dropped for --max_len 1024; 88% of the tokens are targets" in whole.said
    dropped = begin("--max_len", 8, model=model, rows=[*rows, *long])
    assert "3 recipes dropped for --max_len 8; 88% of the tokens are targets" in dropped.said


def test_more_than_half_dropped_for_max_len(begin, byte_models):
    rows = [{"prompt": f"cut{i}", "completion": f"ab{i}"} for i in range(4)]
    long = [{"prompt": f"cut{i}", "completion": "abcdefghijkl"} for i in range(5)]
    model = byte_models[False]
    fault = begin("--max_len", 8, model=model, rows=[*rows, *long])
    twin = begin("--max_len", 8, model=model, rows=[*rows, *long[1:]])
    told(fault, twin, "the rule max_len dropped 5 of 9 recipes: is that bound right?", code=0)


def test_more_than_half_dropped_by_a_rule(begin):
    """Of one recipe that is there n times, n - 1 are duplicates."""
    made = made_recipes(13)
    fault = begin("--clean", "--min_words", 0, rows=[made[0]] * 15 + made[1:])
    twin = begin("--clean", "--min_words", 0, rows=[made[0]] * 14 + made[1:])
    told(fault, twin, "note         the rule duplicate dropped 14 of 27 recipes: is that", code=0)


def test_a_step_larger_than_the_dataset(begin):
    sentence = "a step wants 24 recipes and there are 20: it trains on those"
    told(begin("--batch_size", 24), begin("--batch_size", 20), sentence, code=0)


# --- the model as it is loaded ---


def test_bf16_where_the_processor_has_none(begin, monkeypatch):
    monkeypatch.setattr(precision, "has_bf16", lambda device: False)
    fault = begin("--dtype", "auto"), begin("--dtype", "bf16")
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    twin = begin("--dtype", "auto")
    told(fault[0], twin, "float32 (this cpu has no bf16 instructions)", code=0)
    told(fault[1], twin, "arithmetic in fp32: this cpu has no bf16 instructions", code=0)
    assert "bfloat16 (this cpu has bf16 instructions)" in twin.said


def changed_weights(model, change):
    path = model / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return model


def test_weights_that_are_no_numbers(begin, model_with):
    def plant(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = float("nan")

    fault = changed_weights(model_with("fault"), plant)
    told(begin(model=fault), begin(), "model.layers.0.mlp.up_proj.weight")


def test_weights_that_lack_a_tensor(begin, model_with):
    fault = changed_weights(model_with("fault"), lambda tensors: tensors.pop("model.norm.weight"))
    told(begin(model=fault), begin(), "lacks 1 tensor(s), the first is model.norm.weight")


def test_weights_that_are_not_read(begin, model_with):
    fault = model_with("fault")
    shutil.copy(fault / "model.safetensors", fault / "model.fp16.safetensors")
    told(begin(model=fault), begin(), "has files that are not read: model.fp16.safetensors", code=0)


def test_quantisation_that_the_sizes_forbid(begin, tmp_path):
    odd = make_model(tmp_path / "odd", layers=1, intermediate_size=100)

    def narrow(tensors):
        at = "model.layers.0.mlp."
        for name in ("gate_proj", "up_proj"):
            tensors[f"{at}{name}.weight"] = tensors[f"{at}{name}.weight"][:100].contiguous()
        down = tensors[f"{at}down_proj.weight"]
        tensors[f"{at}down_proj.weight"] = down[:, :100].contiguous()

    changed_weights(odd, narrow)
    sentence = "--quant nf4 keeps weights in blocks of 64, but layers.0.mlp.down_proj is 100 wide"
    told(begin("--quant", "nf4", model=odd), begin("--quant", "nf4"), sentence)


def test_eight_bit_states_without_the_package_and_without_a_card(begin, monkeypatch):
    twin = begin("--optim", "adamw8bit")
    paged = begin("--optim", "paged_adamw8bit")
    told(paged, twin, "(unpaged, because only a GPU has paged memory)", code=0)
    train.quant.bitsandbytes.cache_clear()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "bitsandbytes" else find_spec(name, *more),
    )
    told(begin("--optim", "adamw8bit"), twin, "8-bit optimizers need bitsandbytes (pip install")


# --- the first step ---


def test_a_lora_without_a_gradient(begin, monkeypatch):
    """A block that ignores the adapter of a layer: the loss does not depend on it."""
    twin = begin(steps=True)
    assert "all 14 trained tensors get a gradient, no frozen one does" in twin.said
    project = lora.project

    def ignores_single_layers(x, layers):
        if len(layers) > 1:
            return project(x, layers)
        return [layers[0].base(x)]

    monkeypatch.setattr(lora, "project", ignores_single_layers)
    # o_proj and down_proj, an A and a B each.
    told(begin(steps=True), twin, "4 trained tensor(s) got no gradient")


def test_a_frozen_tensor_with_a_gradient(begin, monkeypatch):
    twin = begin(steps=True)
    start = lora.begin

    def forgets_a_norm(model, *more):
        params = start(model, *more)
        model.norm.weight.requires_grad_()
        return params

    monkeypatch.setattr(lora, "begin", forgets_a_norm)
    told(begin(steps=True), twin, "norm.weight is frozen and got a gradient")


def test_gradients_of_zeros_at_the_first_step(begin, model_with):
    """Where o_proj of the base is zero, q, k and v cannot change the loss yet."""

    def no_output(tensors):
        tensors["model.layers.0.self_attn.o_proj.weight"].zero_()

    fault = begin(model=changed_weights(model_with("fault"), no_output), steps=True)
    told(fault, begin(steps=True), "3 of these gradients are all zeros at the first step", code=0)


def test_a_model_that_leaves_the_range_of_its_numbers(begin, model_with):
    """The weights are finite, and their products are not."""

    def explode(tensors):
        tensors["model.layers.0.mlp.down_proj.weight"].fill_(1e38)

    model = changed_weights(model_with("fault"), explode)
    fault = begin("--max_bad_steps", 1, model=model, steps=True)
    told(fault, begin(steps=True), "no weight was changed before, so numbers of the model leave")
