"""How good a model is: its loss on held-out recipes, and what can be counted in the texts that it writes."""

from cli import Progress, UserError, say

import re
from collections import Counter

import torch

import data
import recipes
from generate import Stream, generate

INGREDIENT = re.compile(r"^- (.+)", re.MULTILINE)
STEP = re.compile(r"^(\d+)\. (.+)", re.MULTILINE)
WHOLE_RECIPE = re.compile(r"\n\nIngredients:\n(- .+\n){2,}\nDirections:\n(\d+\. .+\n){2,}")


def held_out_batches(held, cfg, device):
    """The held-out recipes as batches on the device, the longest first, so that memory runs out at once or never."""
    lengths = held.lengths(held.indices)
    order = (-lengths).argsort(kind="stable")
    steps = [[held.indices[rows]] for rows in data.cut(order, lengths, cfg)]
    progress = Progress(len(steps), "evaluate", says_end=False)
    for (batch,) in progress.over(data.feed(held, steps, device, cfg.mask_prompt, cfg.budget)):
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
    """Print the recipe that the model writes under a title, token by token as it comes."""
    was_training = model.training
    model.eval()
    prompt = text.prompt(title)
    stream = Stream(text, prompt)
    print(title, end="", flush=True)
    try:
        (ids,), (ended,) = generate(
            model,
            [prompt],
            text.ends,
            on_token=lambda _, token: stream.add(token),
            seed=seed,
        )
        stream.end()
    except UserError as e:
        # The model computed NaN. The caller's losses tell what that means for training.
        say("recipe", f"left out: {e}")
        return
    finally:
        # Put the mode back after an error, too: where memory ran out, the caller goes on training.
        model.train(mode=was_training)
        print(flush=True)
    print("" if ended else f"[cut off at {len(ids)} tokens]", flush=True)


def titles(held, text):
    """The prompts of the first 1,024 held-out recipes: what a run is asked to write."""
    return [title_of(i, held, text) for i in held.indices[:1024]]


def title_of(i, held, text):
    """The prompt of a recipe, or its first 8 tokens where it has no prompt."""
    ids, at = held.recipe(i, mask_prompt=True)
    completion = at[0]
    bos = len(text.bos)
    if completion > max(1, bos):
        return text.decode(ids[:completion])
    return text.decode(ids[: bos + 8])


def measure(texts):
    """Count in texts [(text behind a title, whether the model ended it)]. ->

    recipes             of all texts, the share that is a whole recipe
    ingredients_used    of all listed ingredients, the share that the steps of their recipe name
    steps_repeated      of all steps, the share that repeats an earlier step of its recipe word for word
    distinct_3          of all sequences of three words, the share of different ones: "a b c a b c" has 3 of 4"""
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
    """Whether the text is a list of two or more ingredients, then two or more steps numbered 1, 2, 3 …"""
    text = text.rstrip() + "\n"
    if not WHOLE_RECIPE.fullmatch(text):
        return False
    counted = range(1, len(numbers) + 1)
    return [int(number) for number in numbers] == list(counted)


def runs_of_three(text):
    words = text.casefold().split()
    return zip(words, words[1:], words[2:], strict=False)
