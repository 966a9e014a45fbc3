"""Sampling: against transformers' greedy search, its distribution, its stops, batches, streaming, mistakes."""

import json
import sys

import pytest
import torch
from conftest import make_model, program
from transformers import LlamaForCausalLM

import cli
import data
import model as models
import sample


@pytest.fixture(scope="module")
def tiny(tiny_model):
    model = models.load(tiny_model)
    return model.requires_grad_(False).eval(), data.Text(tiny_model)


@pytest.fixture(scope="module")
def trained(tiny_model, tiny_recipes, tmp_path_factory):
    """A run of a few steps: (its folder, the cache)."""
    out, cache = tmp_path_factory.mktemp("run") / "out", tmp_path_factory.mktemp("cache")
    program(
        "train.py",
        "--model",
        tiny_model,
        "--data",
        tiny_recipes,
        "--cache",
        cache,
        "--val_recipes",
        8,
        "--max_steps",
        4,
        "--lr",
        1e-2,
        "--eval_every",
        2,
        "--out",
        out,
    )
    return out, cache


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.run(sample.main)
        said = capsys.readouterr()
        return stop.value.code, said.out, said.err

    return call


PROMPTS = ["Flour and eggs", "Rice", "A much longer title with beans and carrots and onions", "Milk number 7"]


def test_greedy_text_is_transformers_greedy_text(tiny, tiny_model):
    """Each prompt alone and all in one batch of different lengths, 40 tokens, fp32."""
    model, text = tiny
    reference = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    prompts = [text.prompt(p) for p in PROMPTS]
    want = []
    for p in prompts:
        out = reference.generate(torch.tensor([p]), max_new_tokens=40, do_sample=False, pad_token_id=1, eos_token_id=1)[
            0, len(p) :
        ].tolist()
        want.append(out[: out.index(1)] if 1 in out else out)
    alone = [sample.generate(model, [p], {1}, 40, temperature=0)[0][0] for p in prompts]
    together, _ = sample.generate(model, prompts, {1}, 40, temperature=0)
    assert alone == want and together == want


def test_a_sampled_text_does_not_depend_on_its_batch(tiny):
    model, text = tiny
    prompts = [text.prompt(p) for p in PROMPTS]
    alone = [sample.generate(model, [p], {1}, 30, seed=5)[0][0] for p in prompts]
    assert sample.generate(model, prompts[::-1], {1}, 30, seed=5)[0] == alone[::-1]
    assert sample.generate(model, prompts, {1}, 30, seed=6)[0] != alone


def test_samples_of_one_prompt_differ(tiny):
    model, text = tiny
    out, _ = sample.generate(model, [text.prompt("Rice")] * 3, {1}, 20, numbers=[0, 1, 2])
    assert out[0] != out[1] != out[2]


def test_each_row_stops_at_any_end_token_and_only_there(tiny):
    """An end token is planted by choosing one that greedy search writes."""
    model, text = tiny
    prompts = [text.prompt(p) for p in PROMPTS]
    free, _ = sample.generate(model, prompts, set(), 12, temperature=0)
    ends = {free[0][3], free[1][5]}
    out, ended = sample.generate(model, prompts, ends, 12, temperature=0)
    for row, whole in zip(out, free):
        first = next((i for i, t in enumerate(whole) if t in ends), len(whole))
        assert row == whole[:first]
    assert ended == [any(t in ends for t in whole) for whole in free] and any(ended)


def test_pick_draws_from_the_softmax():
    """Chi-square over 20,000 draws of six tokens: 5 degrees of freedom, 20.5 is its 99.9th percentile."""
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -2.0]])
    p = (logits[0].double() / 0.7).softmax(-1)
    g = [torch.Generator().manual_seed(3)]
    n = 20_000
    counts = torch.bincount(torch.cat([sample.pick(logits, 0.7, 0, 1.0, g) for _ in range(n)]), minlength=6)
    assert float(((counts - n * p) ** 2 / (n * p)).sum()) < 20.5


@pytest.mark.parametrize(
    "top_k, top_p, kept",
    [
        (0, 1.0, {0, 1, 2, 3, 4}),
        (2, 1.0, {0, 1}),
        (99, 1.0, {0, 1, 2, 3, 4}),
        (1, 1.0, {0}),
        (0, 0.5, {0}),
        (0, 0.51, {0, 1}),
        (0, 0.75, {0, 1}),
        (0, 0.76, {0, 1, 2}),
        (2, 0.9, {0, 1}),
        (0, 1e-6, {0}),
    ],
)
def test_top_k_and_top_p_keep_exactly_the_likeliest(top_k, top_p, kept):
    """Probabilities 1/2, 1/4, 1/8, 1/16, 1/16, in an order that is not theirs."""
    p = torch.tensor([[0.0625, 0.5, 0.125, 0.25, 0.0625]])
    order = [1, 3, 2, 0, 4]
    out = sample.keep_likely(p.log(), top_k, top_p)
    assert {order.index(i) for i in torch.isfinite(out[0]).nonzero().flatten().tolist()} == kept


def test_a_prompt_beyond_the_window_is_refused_and_the_text_ends_at_it(tmp_path):
    model = models.load(make_model(tmp_path / "short", window=32)).requires_grad_(False)
    with pytest.raises(cli.UserError, match="window"):
        sample.generate(model, [list(range(5, 37))], {1}, 5)
    assert len(sample.generate(model, [list(range(5, 25))], set(), 50)[0][0]) == 12


def test_a_beginning_is_made_of_the_tokens_that_training_saw(tiny):
    """The title, and title with ingredients, are the first tokens of the rendered recipe."""
    _, text = tiny
    recipe = data.recipes.Recipe("Rice pudding", ["2 cups rice", "milk"], ["Stir the rice.", "Boil it."])
    prompt, completion = recipe.text()
    whole = text.prompt(prompt, completion)
    for ids, shown in (
        sample.with_ingredients(text, "Rice pudding"),
        sample.with_ingredients(text, "Rice pudding", "2 cups rice, milk"),
    ):
        assert whole[: len(ids)] == ids and (prompt + completion).startswith(shown)


def test_special_token_text_in_a_prompt_stays_text(tiny):
    _, text = tiny
    assert 1 not in text.prompt("Bread</s>") and 0 not in text.prompt("<s>Bread")


def test_the_program_streams_what_it_samples(trained, run):
    """One prompt is streamed; the same seed gives the same text; --json and the batch path give it too."""
    out, cache = trained
    flags = ["--run", out, "--cache", cache, "--max_new_tokens", 40]
    code, first, err = run(*flags, "--title", "Rice pie", "--seed", 4)
    assert code == 0 and first.startswith("Rice pie"), err
    assert run(*flags, "--title", "Rice pie", "--seed", 4)[1] == first
    assert run(*flags, "--title", "Rice pie", "--seed", 5)[1] != first
    row = json.loads(run(*flags, "--title", "Rice pie", "--seed", 4, "--json")[1])
    assert row["prompt"] + row["text"] == first.rstrip("\n") or row["text"].endswith("\ufffd")


def test_without_a_prompt_a_held_out_title_is_asked(trained, run):
    out, cache = trained
    titles = json.loads((out / "run.json").read_text())["titles"]
    rows = [
        json.loads(run("--run", out, "--cache", cache, "--json", "--max_new_tokens", 2, "--seed", s)[1])["prompt"]
        for s in (1, 2)
    ]
    assert rows[0] in titles and rows[1] in titles and rows[0] != rows[1]


def test_a_file_of_prompts_is_answered_in_its_order(trained, run, tmp_path):
    out, cache = trained
    file = tmp_path / "prompts.txt"
    file.write_text(
        'A long prompt about rice and beans\n\n{"title": "Pie", "ingredients": ["eggs", "milk"]}\n{"prompt": "Rice"}\n'
    )
    code, said, err = run(
        "--run",
        out,
        "--cache",
        cache,
        "--prompts",
        file,
        "--json",
        "--num_samples",
        2,
        "--max_new_tokens",
        6,
        "--batch_size",
        4,
    )
    rows = [json.loads(line) for line in said.splitlines()]
    assert code == 0 and [r["sample"] for r in rows] == [0, 1] * 3, err
    assert [r["prompt"].split("\n")[0] for r in rows[::2]] == ["A long prompt about rice and beans", "Pie", "Rice"]
    assert "- eggs\n- milk\n" in rows[2]["prompt"]


def test_best_and_a_base_model_can_be_asked(trained, run, tiny_model):
    out, cache = trained
    for flags in (["--run", out / "best"], ["--model", tiny_model]):
        code, said, err = run(
            *flags, "--cache", cache, "--max_new_tokens", 3, "--title", "Pie", "--top_p", 0.9, "--dtype", "bf16"
        )
        assert code == 0 and said.startswith("Pie"), err


def test_a_run_and_where_its_base_is_now(trained, run, tiny_model, tmp_path, monkeypatch):
    """--run with --model: the adapter of the one on the other, also for the run that is called out."""
    import shutil

    out, cache = trained
    flags = ["--cache", cache, "--max_new_tokens", 20, "--title", "Pie", "--temperature", 0]
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    shutil.copytree(out, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    wanted = run("--run", out, *flags)[1]
    assert (
        run("--run", "out", "--model", moved, *flags)[1] == run(*flags)[1] == wanted != run("--model", moved, *flags)[1]
    )


def test_the_adapter_is_used(trained, run, tiny_model):
    out, cache = trained
    flags = ["--cache", cache, "--max_new_tokens", 20, "--title", "Pie", "--temperature", 0]
    assert run("--run", out, *flags)[1] != run("--model", tiny_model, *flags)[1]


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--temperature", -1], "--temperature"),
        (["--top_p", 0], "--top_p"),
        (["--num_samples", 0], "--num_samples"),
        (["--run", "/nowhere"], "/nowhere"),
        (["--ingredients", "eggs"], "--title"),
        (["--title", "a", "--prompt", "b"], "exclude"),
        (["--prompts", "/nowhere.txt"], "/nowhere.txt"),
        (["--prompt", "rice " * 3000], "window"),
        (["--temprature", 1], "temprature"),
        (["--max_new_tokens", 0], "--max_new_tokens"),
        (["--device", "gpu"], "gpu"),
        (["--model", "/nowhere"], "/nowhere"),
    ],
    ids=str,
)
def test_a_mistake_gets_one_sentence(trained, run, flags, word):
    out, cache = trained
    code, _, err = run(*([] if "--run" in flags else ["--run", out]), "--cache", cache, *flags)
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and word in last and "Traceback" not in err


@pytest.mark.parametrize(
    "text, word", [("", "no prompt"), ("{broken", "prompts.txt:1"), ('{"titel": 1}', "prompts.txt:1")]
)
def test_a_broken_file_of_prompts_is_refused(trained, run, tmp_path, text, word):
    out, cache = trained
    (tmp_path / "prompts.txt").write_text(text)
    code, _, err = run("--run", out, "--cache", cache, "--prompts", tmp_path / "prompts.txt")
    assert code == 2 and word in err and "Traceback" not in err


def test_a_base_that_changed_is_refused(run, tiny_recipes, tmp_path):
    base = make_model(tmp_path / "base")
    program(
        "train.py",
        "--model",
        base,
        "--data",
        tiny_recipes,
        "--cache",
        tmp_path / "c",
        "--val_recipes",
        8,
        "--max_steps",
        1,
        "--out",
        tmp_path / "out",
    )
    make_model(base, seed=9)
    code, _, err = run("--run", tmp_path / "out", "--cache", tmp_path / "c")
    assert code == 2 and "it has changed" in err


@pytest.mark.parametrize(
    "name, word", [("adapter_model.safetensors", "adapter_model"), ("adapter_config.json", "adapter_config")]
)
def test_a_damaged_adapter_is_refused(trained, run, tmp_path, name, word):
    import shutil

    out, cache = trained
    copy = shutil.copytree(out, tmp_path / "copy")
    (copy / name).write_bytes((out / name).read_bytes()[:100])
    code, _, err = run("--run", copy, "--cache", cache)
    assert code == 2 and word in err and "Traceback" not in err
