"""sample.py: what is asked, of which model, what is printed, --eval, mistakes."""

import cli

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import make_model, program, put
from safetensors.torch import load_file, save_file
from tokenizers import decoders
from transformers import LlamaForCausalLM

import data
import generate
import lora
import model as models
import quant
import recipes
import sample
from files import weights
from speed import precision
from text import Text


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


def test_the_defaults_of_the_flags_are_those_of_generate():
    assert sample.sampling(sample.Config()) == generate.Sampling()


def test_each_number_of_sampling_is_handed_over():
    numbers = {f.name: n for n, f in enumerate(dataclasses.fields(generate.Sampling), 2)}
    assert sample.sampling(sample.Config(**numbers)) == generate.Sampling(**numbers)


def test_a_model_in_bf16_keeps_its_residual_stream_in_fp32(tmp_path, monkeypatch):
    """A block adds little to what came before it, of which bf16 would round off much; the products stay bf16."""
    monkeypatch.setattr(
        precision, "pick_dtype", lambda name, device: (torch.bfloat16, torch.bfloat16, "as asked")
    )
    make_model(tmp_path, layers=12, vocab=300)
    cfg, ids = sample.Config(model=str(tmp_path), device="cpu"), torch.arange(5, 69)[None]
    with torch.no_grad():
        kept = sample.load(cfg)[0]
        rounded = models.load(tmp_path, dtype=torch.bfloat16)
        exact = models.load(tmp_path, dtype=torch.bfloat16).double()
        want = exact(ids)
        h = kept(ids)
        assert (
            h.dtype == torch.bfloat16 and models.new_caches(kept, 1, 8)[0].k.dtype == torch.bfloat16
        )
        assert (h - want).norm() < 0.9 * (rounded(ids) - want).norm()


def merged(folder, adapter, kind):
    make_linear = quant.make_linear(kind)
    return lora.load_model(folder, "cpu", None, make_linear, adapter=adapter, merge=True)


def test_a_merged_adapter_is_quantised_with_the_weights(tiny_model, adapter):
    """NF4 is made of the sum W + BA as fp32 has it, not of W before."""
    plain = merged(tiny_model, adapter, "none")
    small = merged(tiny_model, adapter, "nf4")
    before = models.load(tiny_model)
    W, Q, old = (m.layers[0].self_attn.q_proj for m in (plain, small, before))
    assert torch.equal(Q.full(torch.float32), quant.NF4(W.weight).full(torch.float32))
    assert (W.weight - old.weight).norm() > 0.1 * old.weight.norm()


@pytest.mark.parametrize("spoil, word", [("missing", "k_proj"), ("shape", "k_proj")])
def test_an_adapter_that_does_not_fit_is_not_merged(tiny_model, adapter, tmp_path, spoil, word):
    import shutil

    from safetensors.torch import save_file

    shutil.copytree(adapter, tmp_path / "a")
    tensors = lora.read_tensors(adapter)
    key = next(k for k in tensors if "k_proj.lora_B" in k)
    tensors[key] = torch.zeros(3, 4)
    tensors = {k: v for k, v in tensors.items() if spoil == "shape" or k != key}
    save_file(tensors, tmp_path / "a/adapter_model.safetensors")
    with pytest.raises(cli.UserError, match=word):
        merged(tiny_model, tmp_path / "a", "none")


def test_a_beginning_is_made_of_the_tokens_that_training_saw(tiny_model):
    """The title, and title with ingredients, are the first tokens of the rendered recipe."""
    text = Text(tiny_model)
    recipe = recipes.Recipe("Rice pudding", ["2 cups rice", "milk"], ["Stir the rice.", "Boil it."])
    prompt, completion = recipe.text()
    whole = text.prompt(prompt, completion)
    for ids, shown in (
        sample.beginning(text, {"title": "Rice pudding"}),
        sample.beginning(text, {"title": "Rice pudding", "ingredients": "2 cups rice, milk"}),
        sample.beginning(text, {"title": "Rice pudding", "ingredients": ["2 cups rice", "milk"]}),
    ):
        assert whole[: len(ids)] == ids and (prompt + completion).startswith(shown)


def test_special_token_text_in_a_prompt_stays_text(tiny_model):
    text = Text(tiny_model)
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
        json.loads(
            run("--run", out, "--cache", cache, "--json", "--max_new_tokens", 2, "--seed", s)[1]
        )["prompt"]
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
    assert [r["prompt"].split("\n")[0] for r in rows[::2]] == [
        "A long prompt about rice and beans",
        "Pie",
        "Rice",
    ]
    assert "- eggs\n- milk\n" in rows[2]["prompt"]


def test_more_prompts_than_rows_are_answered_in_order_as_each_alone(trained, run, tmp_path):
    out, cache = trained
    titles = [f"{'Rice and beans ' * (n % 4)}number {n}" for n in range(11)]
    (tmp_path / "p.txt").write_text("\n".join(titles))
    flags = ["--run", out, "--cache", cache, "--json", "--max_new_tokens", 12, "--dtype", "fp32"]
    said = run(*flags, "--prompts", tmp_path / "p.txt", "--batch_size", 3)[1]
    rows = [json.loads(line) for line in said.splitlines()]
    assert [row["prompt"] for row in rows] == titles
    for row in rows[::4]:
        assert json.loads(run(*flags, "--prompt", row["prompt"])[1]) == row


def test_a_character_of_many_bytes_is_streamed_whole(trained, run, monkeypatch):
    """Byte by byte the model writes text of one, two, three and four bytes a character; no piece has a broken one."""
    out, cache = trained
    said, pieces = "½ cup crème – 🍰 für 2", []

    def written(engine, prompts, ends, numbers, on_token):
        ids = Text(out_base(out)).encode([said])[0]
        for token in ids:
            on_token(0, token)
        yield 0, ids, True

    monkeypatch.setattr(sample, "Scheduler", written)
    for module in (sample, generate):
        monkeypatch.setattr(
            module,
            "print",
            lambda *a, end="\n", **_: pieces.append("".join(a) + end),
            raising=False,
        )
    assert run("--run", out, "--cache", cache, "--title", "Pie")[0] == 0
    assert "".join(pieces) == f"Pie{said}\n" and not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 10  # as it comes, not in one


def out_base(out):
    return json.loads((out / "run.json").read_text())["base"]


def test_each_way_to_keep_the_weights_and_to_add_the_adapter(trained, run):
    """In fp32 merged is unmerged; from 4 and 8 bits a text comes, too."""
    out, cache = trained
    flags = [
        "--run",
        out,
        "--cache",
        cache,
        "--max_new_tokens",
        20,
        "--title",
        "Pie",
        "--temperature",
        0,
        "--dtype",
        "fp32",
    ]
    plain = run(*flags)[1]
    assert run(*flags, "--merge")[1] == plain
    for kind in ("nf4", "fp8"):
        code, said, err = run(*flags, "--quant", kind)
        assert code == 0 and said.startswith("Pie") and f"linears in {kind}" in err, err
        assert "merged" in run(*flags, "--quant", kind, "--merge")[2]


@pytest.mark.slow
def test_compiled_text_is_eager_text(trained, run, tmp_path):
    out, cache = trained
    (tmp_path / "p.txt").write_text("Rice\nA pie of apples\nBeans\n")
    flags = [
        "--run",
        out,
        "--cache",
        cache,
        "--max_new_tokens",
        20,
        "--prompts",
        tmp_path / "p.txt",
        "--dtype",
        "fp32",
        "--json",
        "--batch_size",
        2,
        "--repetition_penalty",
        1.1,
    ]
    code, said, err = run(*flags, "--compile")
    assert code == 0 and said == run(*flags)[1] and "compile" in err, err


def test_a_chat_asks_with_the_models_template(tmp_path, run):
    """The ids of transformers' own rendering; what looks like a control token in the prompt stays text."""
    from transformers import PreTrainedTokenizerFast

    template = (
        "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    base = make_model(tmp_path / "base")
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    text = Text(base)
    ids, shown = sample.beginning(text, {"prompt": "What is in a pie?"}, chat=True)
    assert shown == "What is in a pie?"
    assert (
        ids
        == PreTrainedTokenizerFast.from_pretrained(base).apply_chat_template(
            [{"role": "user", "content": "What is in a pie?"}],
            add_generation_prompt=True,
            return_dict=True,
        )["input_ids"]
    )
    assert sample.beginning(text, {"prompt": "a</s>b"}, chat=True)[0].count(1) == 1
    code, said, err = run(
        "--model", base, "--chat", "--prompt", "What is in a pie?", "--max_new_tokens", 3
    )
    assert code == 0 and said.startswith("What is in a pie?\n\n"), err
    bad = json.dumps(config | {"chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}"})
    (base / "tokenizer_config.json").write_text(bad)
    code, _, err = run("--model", base, "--chat", "--prompt", "x")
    assert code == 2 and "the chat template refuses it" in err and "Traceback" not in err


@pytest.mark.parametrize(
    "what, word",
    [("data", "has changed"), ("gone", "as its run.json has it"), ("base", "has changed")],
)
def test_eval_is_refused_where_data_or_base_are_others(tiny_recipes, run, tmp_path, what, word):
    base, heap = make_model(tmp_path / "base"), tmp_path / "heap.jsonl"
    heap.write_bytes(tiny_recipes.read_bytes())
    flags = [
        "--cache",
        tmp_path / "c",
        "--out",
        tmp_path / "out",
        "--val_recipes",
        8,
        "--max_steps",
        1,
    ]
    program("train.py", "--model", base, "--data", heap, *flags)
    if what == "data":
        heap.write_text("".join(heap.read_text().splitlines(keepends=True)[:-3]))
    elif what == "gone":
        heap.unlink()
    else:
        make_model(base, seed=9)
    code, said, err = run("--run", tmp_path / "out", "--cache", tmp_path / "c", "--eval", 3)
    assert code == 2 and word in err and not said and "Traceback" not in err


def test_eval_of_a_run_that_trained_all_weights(tiny_model, tiny_recipes, run, tmp_path):
    flags = [
        "--cache",
        tmp_path / "c",
        "--out",
        tmp_path / "out",
        "--val_recipes",
        8,
        "--max_steps",
        2,
        "--lora_r",
        0,
    ]
    program("train.py", "--model", tiny_model, "--data", tiny_recipes, *flags)
    flags = ["--run", tmp_path / "out", "--cache", tmp_path / "c", "--max_new_tokens", 9]
    code, said, err = run(*flags, "--eval", 3, "--json")
    got = json.loads(said)
    assert code == 0 and got["run"]["perplexity"] < got["base"]["perplexity"], err


def test_a_sentencepiece_text_keeps_its_first_space(trained, run, monkeypatch):
    """Llama 2's decoder takes the space off the first token that it is given."""
    from tokenizers import decoders

    out, cache = trained
    text = Text(out_base(out))
    ids = text.encode([" of apples"])[0]
    load = sample.load

    def sentencepiece(cfg):
        model, text, info = load(cfg)
        text.tokenizer.decoder = decoders.Sequence(
            [decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]
        )
        return model, text, info

    def written(engine, prompts, ends, numbers, on_token):
        for token in ids:
            on_token(0, token)
        yield 0, ids, True

    monkeypatch.setattr(sample, "load", sentencepiece)
    monkeypatch.setattr(sample, "Scheduler", written)
    flags = ["--run", out, "--cache", cache, "--title", "Pie"]
    assert run(*flags)[1] == "Pie of apples\n"
    assert json.loads(run(*flags, "--json")[1])["text"] == " of apples"


def test_out_of_memory_is_one_sentence(trained, run, monkeypatch):
    out, cache = trained

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 270 GiB")

    monkeypatch.setattr(sample, "Engine", full)
    flags = ["--run", out, "--cache", cache, "--title", "Pie"]
    code, _, err = run(*flags)
    assert code == 2 and "out of memory while texts were written, with " in err
    assert "By the plan the largest parts are " in err and "Traceback" not in err
    # One text is written, so a smaller batch would not help. Of 20 texts 16 are written at a time.
    assert "--max_new_tokens 200 (" in err and "--batch_size" not in err
    code, _, err = run(*flags, "--num_samples", 20)
    assert re.search(r"these take less: .*--batch_size 8 \([\d.]+ MB less\)", err)


def test_texts_that_are_written_at_a_time(tmp_path):
    prompts = str(tmp_path / "a pipe, say")
    flags = {"num_samples": 5}, {"num_samples": 99}, {"eval": 3}, {"prompts": prompts}
    assert [sample.at_once(sample.Config(**one)) for one in flags] == [5, 16, 3, 16]


def test_eval_is_not_silent(trained, run, monkeypatch):
    """Tokens while texts are written, batches while the held-out loss is measured."""
    out, cache = trained
    progress = functools.partial(sample.cli.Progress, every=0)
    monkeypatch.setattr(sample.cli, "Progress", progress)
    flags = ["--run", out, "--cache", cache, "--eval", 5, "--max_new_tokens", 12]
    code, _, err = run(*flags)
    said = [line.split() for line in err.splitlines()]
    assert code == 0
    for who in ("run", "base"):
        counts = [int(words[2]) for words in said if words[0] == who and "tokens" in words]
        assert len(counts) > 10 and counts == sorted(counts)
    assert sum(words[0] == "perplexity" for words in said) >= 2


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 270 GiB"),
        RuntimeError("unable to mmap 9 bytes from file <a>: Cannot allocate memory (12)"),
        MemoryError(),
    ],
)
@pytest.mark.parametrize("merge", [False, True])
def test_out_of_memory_while_loading_names_what_makes_a_model_smaller(
    trained, run, monkeypatch, error, merge
):
    out, cache = trained

    def full(*_):
        raise error

    monkeypatch.setattr(weights, "read", full)
    flags = ["--run", out, "--cache", cache, "--title", "Pie", "--dtype", "fp32"]
    code, said, err = run(*flags, "--merge" if merge else "--no-merge")
    assert code == 2 and said == "" and "Traceback" not in err
    assert "while the model was loaded" in err and " GB in use" in err
    helps = err.partition("In order of gain, these take less: ")[2]
    assert re.search(r"--dtype bf16 \([\d.]+ MB less\)", helps)
    assert re.search(r"--quant nf4 \([\d.]+ MB less\)", helps)
    # What is written takes nothing yet.
    assert "--batch_size" not in helps and "max_new_tokens" not in helps


def test_a_tied_head_that_is_stored_and_another_is_refused(run, tmp_path):
    model = make_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    flags = ["--model", model, "--cache", tmp_path, "--prompt", "A pie", "--max_new_tokens", 2]
    code, said, err = run(*flags)
    assert code == 2 and said == "" and "Traceback" not in err
    assert "lm_head.weight differs from model.embed_tokens.weight" in err
    # What the sentence advises works.
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert run(*flags)[0] == 0


def test_eval_measures_base_and_run_on_held_out_titles(trained, run, tiny_model):
    """Perplexity against a loop over the recipes with transformers; the run's differs from the base's."""
    out, cache = trained
    flags = ["--run", out, "--cache", cache, "--eval", 5, "--max_new_tokens", 30, "--dtype", "fp32"]
    code, said, err = run(*flags, "--json")
    got = json.loads(said)
    assert code == 0 and got["asked"] == 5 and got["base"].keys() == got["run"].keys(), err
    info = json.loads((out / "run.json").read_text())
    cfg = data.Data(
        **{k: v for k, v in info["config"].items() if k in data.Data.__dataclass_fields__}
    )
    _, held, _ = data.prepare(cfg, recipes.Rules(**info["rules"]), tiny_model)
    reference, loss, n = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), 0.0, 0
    for i in held.indices:
        ids = torch.tensor(held.ids(i))[None]
        with torch.no_grad():
            loss += float(reference(ids, labels=ids).loss) * (ids.shape[1] - 1)
        n += ids.shape[1] - 1
    assert got["base"]["perplexity"] == pytest.approx(torch.tensor(loss / n).exp().item(), rel=1e-4)
    assert got["run"]["perplexity"] != got["base"]["perplexity"]
    table = run(*flags)[1].splitlines()
    assert table[0].split() == ["5", "held-out", "titles", "base", "run"] and len(table) == 1 + len(
        got["run"]
    )
    assert float(table[-1].split()[1]) == pytest.approx(got["base"]["perplexity"], abs=1e-3)


def test_best_and_a_base_model_can_be_asked(trained, run, tiny_model):
    out, cache = trained
    for flags in (["--run", out / "best"], ["--model", tiny_model]):
        code, said, err = run(
            *flags,
            "--cache",
            cache,
            "--max_new_tokens",
            3,
            "--title",
            "Pie",
            "--top_p",
            0.9,
            "--dtype",
            "bf16",
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
        run("--run", "out", "--model", moved, *flags)[1]
        == run(*flags)[1]
        == wanted
        != run("--model", moved, *flags)[1]
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
        (["--min_p", 1.5], "--min_p"),
        (["--top_k", -1], "--top_k"),
        (["--repetition_penalty", 0], "--repetition_penalty"),
        (["--repetition_penalty", "nan"], "--repetition_penalty"),
        (["--batch_size", 0], "--batch_size"),
        (["--eval", -1], "--eval"),
        (["--eval", 3, "--title", "a"], "exclude"),
        (["--chat"], "--prompt"),
        (["--prompt", "caf\udce9"], "UTF-8"),
        (["--chat", "--prompt", "hello"], "no chat template"),
        (["--no-run", "--merge", "--model", "{base}", "--title", "a"], "--merge"),
        (["--prompt", "rice " * 3000], "window"),
        (["--temprature", 1], "temprature"),
        (["--max_new_tokens", 0], "--max_new_tokens"),
        (["--device", "gpu"], "gpu"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--run", ""], "--run"),
        (["--model", ""], "--model"),
        (["--prompts", ""], "--prompts"),
        (["--cache", ""], "--cache"),
        (["--prompt", ""], "no BOS"),
        (["--title", ""], "no BOS"),
        (["--title", "Pie", "--ingredients", ""], "--ingredients"),
        (["--title", "Pie", "--ingredients", " , "], "--ingredients"),
        (["--ingredients", ""], "--title"),
        (["--title", "", "--prompt", "a"], "exclude"),
        (["--prompt", "", "--eval", 3], "exclude"),
        (["--chat", "--title", ""], "--prompt"),
    ],
    ids=str,
)
def test_a_mistake_gets_one_sentence(trained, run, tiny_model, flags, word):
    out, cache = trained
    flags = [tiny_model if flag == "{base}" else flag for flag in flags]
    before = ["--run", out, "--cache", cache]
    if flags[0] == "--no-run":
        before = ["--cache", cache]
        flags = flags[1:]
    # The last --run counts.
    code, _, err = run(*before, *flags)
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and word in last and "Traceback" not in err


@pytest.mark.parametrize(
    "text, word",
    [
        ("", "no prompt"),
        ("\n \n", "no prompt"),
        ("{broken", "prompts.txt:1"),
        ('Pie\n{"titel": 1}', "prompts.txt:2"),
        ('{"title": 1}', "prompts.txt:1"),
        ('{"prompt": ["a", 1]}', "prompts.txt:1"),
        ('{"title": "Pie", "ingredients": [1]}', "prompts.txt:1"),
        ('{"title": "Pie", "ingredients": null}', "prompts.txt:1"),
        ('\ufeff{"titel": 1}', "prompts.txt:1"),
        (' {"titel": 1}', "prompts.txt:1"),
        ('{"prompt": ' + "[" * 100_000, "prompts.txt:1"),
        ('{"prompt": "\\ud800"}', "UTF-8"),
        ('{"prompt": "Pie", "temperature": 0.1}', "temperature"),
        ('{"prompt": "Pie", "ingredients": ["eggs"]}', "ingredients"),
        ('{"prompt": "Pie", "title": "Pie"}', "title"),
        ('{"title": "Pie", "directions": []}', "directions"),
        ('{"prompt": "Pie", "text": "x", "sample": 0}', "sample, text"),
        ('{"prompt": "Pie", "prompt": "Tart"}', "twice"),
        ('[{"prompt": "Pie"}, {"prompt": "Tart"}]', "a list"),
        ('{"title": "Pie", "ingredients": {"eggs": 2}}', "ingredients"),
        ('{"prompt": null}', "prompt is no text"),
        ('{"prompt": ""}', "no BOS"),
        ('Pie\n{"title": ""}', "no BOS"),
        ("\r\n \r\n", "no prompt"),
        (b"Cr\xe8me", "cannot be read"),
        ("Pie".encode("utf-16"), "cannot be read"),
    ],
)
def test_a_broken_file_of_prompts_is_refused(trained, run, tmp_path, text, word):
    out, cache = trained
    put(tmp_path / "prompts.txt", text)
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
    "name, word",
    [("adapter_model.safetensors", "adapter_model"), ("adapter_config.json", "adapter_config")],
)
def test_a_damaged_adapter_is_refused(trained, run, tmp_path, name, word):
    import shutil

    out, cache = trained
    copy = shutil.copytree(out, tmp_path / "copy")
    (copy / name).write_bytes((out / name).read_bytes()[:100])
    code, _, err = run("--run", copy, "--cache", cache)
    assert code == 2 and word in err and "Traceback" not in err


@pytest.mark.parametrize("flags", [["--prompt", ""], ["--title", ""]], ids=str)
def test_an_empty_prompt_is_gone_on_from_the_bos(run, bos_model, flags):
    """Greedy, as transformers goes on from BOS alone."""
    flags = [*flags, "--model", bos_model, "--json", "--temperature", 0, "--dtype", "fp32"]
    code, said, err = run(*flags, "--max_new_tokens", 8)
    assert code == 0, err
    row = json.loads(said)
    reference = LlamaForCausalLM.from_pretrained(bos_model, dtype=torch.float32)
    ids = reference.generate(torch.tensor([[0]]), max_new_tokens=8, do_sample=False)[0].tolist()
    text = Text(bos_model)
    assert row["prompt"] == "" and row["text"] == text.tokenizer.decode(ids)


@pytest.mark.parametrize(
    "content, prompts",
    [
        ("\ufeffPie\r\nTart\r\n\r\n", ["Pie", "Tart"]),
        ('\ufeff{"prompt": "Pie"}\r\n {"title": "Tart", "ingredients": ""}', ["Pie", "Tart"]),
        ("[INST] Pie\n  Tart", ["[INST] Pie", "  Tart"]),
        ('{"title": "Pie", "ingredients": []}\n\n{"title": "Tart"}', ["Pie", "Tart"]),
        ('"Pie"\n["Tart"]', ['"Pie"', '["Tart"]']),
    ],
)
def test_prompts_as_people_have_them(tmp_path, content, prompts):
    file = put(tmp_path / "prompts.txt", content)
    rows = sample.read_prompts(file)
    assert [row.get("prompt", row.get("title")) for row in rows] == prompts


def test_ingredients_of_a_row_are_a_list_or_a_text(tmp_path):
    rows = ['{"title": "Pie", "ingredients": ["2 eggs", "salt"]}']
    rows += ['{"title": "Pie", "ingredients": "2 eggs, salt"}']
    file = put(tmp_path / "prompts.txt", "\n".join(rows))
    texts = [sample.recipe_beginning(row["ingredients"]) for row in sample.read_prompts(file)]
    assert texts == ["\n\nIngredients:\n- 2 eggs\n- salt\n\nDirections:\n1."] * 2


# {a decoder: the tokens that are added for it and what the model is said to write, in tokens}
WRITTEN = {
    "half a character at the end": (None, ["P", "Ã"]),
    "half a character, then the other half": (None, ["Â", "½"]),
    "a stray byte": (None, ["ÿ", "P", "Â"]),
    "a stray byte behind a character of bytes": (
        decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]),
        ["<0xE2>", "<0x80>", "<0x93>", "<0xFF>", "P"],
    ),
    "stray bytes at the end": (
        decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]),
        ["P", "<0xC2>", "<0xBD>", "<0xC2>"],
    ),
    "an earlier character changes": (
        decoders.Sequence([decoders.Fuse(), decoders.Replace("Pi", "X")]),
        ["P", "i", "e"],
    ),
}


@pytest.mark.parametrize("decoder, tokens", WRITTEN.values(), ids=WRITTEN.keys())
def test_a_streamed_text_is_that_of_json(trained, run, monkeypatch, decoder, tokens):
    """And both are what the package tokenizers makes of all ids at once."""
    out, cache = trained
    text = Text(out_base(out))
    text.tokenizer.add_tokens(
        [token for token in tokens if text.tokenizer.token_to_id(token) is None]
    )
    if decoder is not None:
        text.tokenizer.decoder = decoder
    load = sample.load
    ids = [text.tokenizer.token_to_id(token) for token in tokens]

    def written(engine, prompts, ends, numbers, on_token):
        for token in ids:
            on_token(0, token)
        yield 0, ids, True

    monkeypatch.setattr(sample, "load", lambda cfg: (load(cfg)[0], text, load(cfg)[2]))
    monkeypatch.setattr(sample, "Scheduler", written)
    flags = ["--run", out, "--cache", cache, "--title", "Pie"]
    code, streamed, err = run(*flags)
    row = json.loads(run(*flags, "--json")[1])
    prompt = text.prompt("Pie")
    before, whole = text.decode(prompt), text.decode(prompt + ids)
    assert code == 0 and streamed == row["prompt"] + row["text"] + "\n", err
    assert whole == before + row["text"]


def test_logits_that_are_no_numbers_are_one_sentence(trained, run, monkeypatch):
    """A weight becomes NaN after loading. Before, a token of argmax was printed, or nothing, with exit code 0."""
    out, cache = trained
    load = sample.load

    def spoilt(cfg):
        model, text, info = load(cfg)
        model.layers[1].mlp.down_proj.base.weight[0, 0] = float("nan")
        return model, text, info

    monkeypatch.setattr(sample, "load", spoilt)
    for more in ([], ["--json"], ["--temperature", 0], ["--num_samples", 3]):
        code, _, err = run("--run", out, "--cache", cache, "--title", "Pie", *more)
        last = err.strip().splitlines()[-1]
        assert code == 2 and last.startswith("error: the model computed NaN or inf")
        assert "Traceback" not in err


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"}, C_LOCALE], ids=str)
def test_a_prompt_beyond_ascii_in_an_ascii_terminal(bos_model, tmp_path, env):
    """The command line's bytes are UTF-8, whatever the locale; --json is the same rows."""
    flags = ["--model", bos_model, "--max_new_tokens", 2, "--device", "cpu", "--cache", tmp_path]
    flags += ["--prompt", "½ crème 🍰"]
    want = json.loads(program("sample.py", *flags, "--json").stdout)
    got = program("sample.py", *flags, "--json", env={**os.environ, **env}).stdout
    assert got.isascii() and json.loads(got) == want and want["prompt"] == "½ crème 🍰"
    shown = program("sample.py", *flags, env={**os.environ, **env}).stdout
    assert shown.startswith(r"\u00bd cr\u00e8me \ud83c\udf70")


def test_names_that_are_no_utf8(bos_model, tmp_path):
    """A Latin-1 file name in --prompts is read, and a missing one is named in the error."""
    latin = os.fsdecode(b"cr\xe8me.txt")
    (tmp_path / latin).write_text("Pie")
    flags = ["--model", bos_model, "--max_new_tokens", 2, "--cache", tmp_path, "--prompts"]
    assert program("sample.py", *flags, tmp_path / latin).stdout.startswith("Pie")
    for flag in (flags[-1], "--run", "--model"):
        done = program("sample.py", *flags[:-1], flag, f"{latin}.no", check=False)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert r"cr\udce8me.txt.no" in done.stderr


@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_texts_into_a_closed_pipe_are_a_silent_end(bos_model, tmp_path, json_flag):
    """`python sample.py --num_samples 20 | head -c 1`: exit code 0 and no traceback."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, str(sample.__file__), "--model", str(bos_model), "--prompt", "Pie"]
    command += ["--max_new_tokens", "3", "--cache", str(tmp_path), *json_flag]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=100, check=False)
    os.close(write)
    assert done.returncode == 0 and b"Traceback" not in done.stderr and b"error" not in done.stderr


@pytest.mark.parametrize("content", ['{"ste', '{"step": 3, "best_step": null}', "[]", "{}"])
def test_a_broken_state_json_costs_a_note_only(tmp_path, content):
    (tmp_path / "state.json").write_text(content)
    sample.say_if_not_best(tmp_path)
