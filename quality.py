"""How good a model is: its loss on held-out recipes, and what can be counted in the texts that it writes."""

import re
from collections import Counter

import torch

import data
import recipes
from generate import generate

INGREDIENT = re.compile(r"^- (.+)", re.MULTILINE)
STEP = re.compile(r"^(\d+)\. (.+)", re.MULTILINE)
WHOLE_RECIPE = re.compile(r"\n\nIngredients:\n(- .+\n){2,}\nDirections:\n(\d+\. .+\n){2,}")


def held_out_batches(held, cfg, device):
    """The held-out recipes as batches on the device, the longest first."""
    lengths = held.lengths(held.indices)
    order = (-lengths).argsort(kind="stable")
    steps = [[held.indices[rows]] for rows in data.cut(order, lengths, cfg)]
    for (batch,) in data.feed(held, steps, device, cfg.mask_prompt, cfg.budget):
        yield batch


@torch.no_grad()
def held_out_loss(model, loss_of, batches):
    """The mean loss of a target token over `batches`; loss_of(batch) is the sum of one batch's token losses."""
    was_training = model.training
    model.eval()
    total = 0.0
    tokens = 0
    for batch in batches:
        total += loss_of(batch).item()
        tokens += len(batch.targets)
    model.train(mode=was_training)
    return total / tokens


def show_recipe(model, text, title, seed):
    """Print the recipe that the model writes under a title."""
    was_training = model.training
    model.eval()
    (ids,), (ended,) = generate(model, [text.prompt(title)], text.ends, seed=seed)
    model.train(mode=was_training)
    cut = "" if ended else f"[cut off at {len(ids)} tokens]"
    print(f"{title}{text.decode(ids)}\n{cut}", flush=True)


def titles(held, text):
    """The prompts of the held-out recipes: what a run is asked to write."""
    return [title_of(i, held, text) for i in held.indices[:1024]]


def title_of(i, held, text):
    """The prompt of a recipe or, where it has none, its first tokens."""
    ids, at = held.recipe(i, mask_prompt=True)
    completion = at[0]
    bos = len(text.bos)
    if completion > max(1, bos):
        return text.decode(ids[:completion])
    return text.decode(ids[: bos + 8])


def measure(texts):
    """What can be counted in [(text behind a title, whether the model ended it)].

    -> the share of texts that are whole recipes; of all ingredients the share that the steps name; of all steps the
    share that repeats another of its recipe; of all runs of three words the share of different ones"""
    whole_recipes = 0
    ingredients_used = 0
    ingredients_listed = 0
    steps_repeated = 0
    steps_written = 0
    runs = Counter()
    for text, ended in texts:
        ingredients = INGREDIENT.findall(text)
        numbered = STEP.findall(text)
        steps = [step for _, step in numbered]
        numbers = [number for number, _ in numbered]
        if ended and is_whole_recipe(text, numbers):
            whole_recipes += 1

        used, listed = recipes.mentioned(recipes.Recipe(ingredients=ingredients, directions=steps))
        ingredients_used += used
        ingredients_listed += listed
        steps_repeated += len(steps) - len(set(steps))
        steps_written += len(steps)
        runs.update(runs_of_three(text))
    return {
        "recipes": whole_recipes / len(texts),
        "ingredients_used": ingredients_used / max(1, ingredients_listed),
        "steps_repeated": steps_repeated / max(1, steps_written),
        "distinct_3": len(runs) / max(1, runs.total()),
    }


def is_whole_recipe(text, numbers):
    """Whether two ingredients and two steps or more stand where they should, and the steps are counted from 1 on."""
    text = text.rstrip() + "\n"
    if not WHOLE_RECIPE.fullmatch(text):
        return False
    counted = range(1, len(numbers) + 1)
    return [int(number) for number in numbers] == list(counted)


def runs_of_three(text):
    words = text.casefold().split()
    return zip(words, words[1:], words[2:], strict=False)
