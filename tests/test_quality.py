"""How good a model is: what can be counted in texts, and the mean loss of held-out recipes."""

from types import SimpleNamespace

import pytest
import torch

import model as models
import quality
from text import Text

GOOD = (
    "\n\nIngredients:\n- 2 cups flour\n- 1 egg\n\nDirections:\n1. Mix the flour.\n2. Bake it now.\n"
)


@pytest.mark.parametrize(
    "text, ended, recipe",
    [
        (GOOD, True, 1),
        (GOOD.rstrip("\n"), True, 1),
        (GOOD, False, 0),
        (GOOD.replace("2. Bake it now.\n", ""), True, 0),
        (GOOD.replace("- 1 egg\n", ""), True, 0),
        (GOOD.replace("2. Bake", "3. Bake"), True, 0),
        (GOOD.replace("\nDirections:\n", ""), True, 0),
        (" is a fine thing.\n" + GOOD, True, 0),
    ],
)
def test_what_counts_as_a_recipe(text, ended, recipe):
    assert quality.measure([(text, ended)])["recipes"] == recipe


def test_the_measures_of_a_text_worked_out_by_hand():
    """Flour of two ingredients is named; one of three steps says the same as another; of the 3-word runs of 'mix the
    flour. 2. bake ...' some come again."""
    again = "\n\nIngredients:\n- 2 cups flour\n- 1 egg\n\nDirections:\n1. Mix the flour.\n2. Rest.\n3. Mix the flour.\n"
    got = quality.measure([(again, True), ("nothing at all", True)])
    words = (
        again.casefold().split()
    )  # ingredients: - 2 cups flour - 1 egg directions: 1. mix the flour. 2. rest. …
    assert (
        len(words) == 19 and got["distinct_3"] == 17 / 18
    )  # 17 runs and 1; 'mix the flour.' stands there twice
    assert (
        got["recipes"] == 0.5 and got["ingredients_used"] == 0.5 and got["steps_repeated"] == 1 / 3
    )


def test_the_held_out_loss_is_a_mean_over_tokens_not_over_batches():
    """And the model is in eval() meanwhile, so without dropout, and afterwards as it was."""
    model = torch.nn.Linear(1, 1)
    sums = {1: 5.0, 9: 9.0}  # {tokens of a batch: the sum of their losses}
    batches = [SimpleNamespace(targets=torch.zeros(n)) for n in sums]

    def loss_of(batch):
        assert not model.training
        return torch.tensor(sums[len(batch.targets)])

    assert quality.held_out_loss(model, loss_of, iter(batches)) == 14 / 10
    assert model.training


def test_a_recipe_that_cannot_be_written_ends_no_training(tiny_model, capsys):
    """NaN among the logits: train.py goes on, because its losses tell whether training can."""
    model = models.load(tiny_model).requires_grad_(False)
    model.norm.weight[0] = float("nan")
    quality.show_recipe(model.train(), Text(tiny_model), "Pie", seed=1)
    out, err = capsys.readouterr()
    assert out == "Pie\n" and "NaN or inf" in err and model.training
