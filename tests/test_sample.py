"""Sampling: against transformers' greedy search, its distribution, its stops, batches, streaming, mistakes."""

import gc
import json
import sys
import weakref

import pytest
import torch
from conftest import make_model, program
from transformers import LlamaForCausalLM

import cli
import data
import lora
import model as models
import plan
import quant
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


PROMPTS = [
    "Flour and eggs",
    "Rice",
    "A much longer title with beans and carrots and onions",
    "Milk number 7",
]


def transformers_greedy(folder, prompts, n, weights=None, penalty=1.0, end=1):
    """What transformers writes after each prompt alone, fp32; weights: {its name: tensor} in place of the folder's."""
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if weights:
        assert not reference.load_state_dict(weights, strict=False).unexpected_keys
    out = []
    for p in prompts:
        ids = reference.generate(
            torch.tensor([p]),
            max_new_tokens=n,
            do_sample=False,
            pad_token_id=end,
            eos_token_id=end,
            repetition_penalty=penalty,
        )[0, len(p) :].tolist()
        out.append(ids[: ids.index(end)] if end in ids else ids)
    return out


def test_greedy_text_is_transformers_greedy_text(tiny, tiny_model):
    """Each prompt alone and all in one batch of different lengths, 40 tokens, fp32."""
    model, text = tiny
    prompts = [text.prompt(p) for p in PROMPTS]
    want = transformers_greedy(tiny_model, prompts, 40)
    alone = [
        sample.generate(model, [p], {1}, max_new_tokens=40, temperature=0)[0][0] for p in prompts
    ]
    assert alone == want
    for rows in (4, 3, 1):  # all at once; a row that is filled anew; one after the other
        assert (
            sample.generate(model, prompts, {1}, max_new_tokens=40, temperature=0, batch_size=rows)[
                0
            ]
            == want
        )


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    """A folder with an adapter whose B is not zero."""
    import peft

    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=list(lora.PARENT), init_lora_weights=False
    )
    peft.get_peft_model(model, config).save_pretrained(folder := tmp_path_factory.mktemp("adapter"))
    return folder


def test_a_writer_in_bf16_keeps_its_residual_stream_in_fp32(tmp_path, monkeypatch):
    """A block adds little to what came before it, of which bf16 would round off much; the products stay bf16."""
    monkeypatch.setattr(
        plan, "pick_dtype", lambda name, device: (torch.bfloat16, torch.bfloat16, "as asked")
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


def test_a_writer_goes_with_its_last_name(tiny):
    """Its caches are the largest thing beside the weights: they must not wait for the collector of cycles."""
    model, text = tiny
    prompts = [text.prompt(p) for p in PROMPTS]
    gc.collect()
    gc.disable()
    try:
        writer = sample.Writer(model, prompts, sample.Config(batch_size=2, max_new_tokens=5))
        assert len(list(sample.write(writer, prompts, {1}))) == len(prompts)
        gone = weakref.ref(writer)
        del writer
        assert gone() is None
    finally:
        gc.enable()


def with_adapter(folder, adapter, kind, merged):
    """(our model, the same weights for transformers): what `kind` made of the base's, dequantised, and peft's own
    product of B and A beside it, or in it."""
    make, left = (
        lora.merging(adapter, quant.make_linear(kind)) if merged else (quant.make_linear(kind), {})
    )
    model, weights, tensors = models.load(folder, make_linear=make), {}, lora.read_tensors(adapter)
    assert not left
    if not merged:
        lora.load(model, adapter)
    for name, layer in model.named_modules():
        if isinstance(layer, quant.Frozen):
            path = name.removesuffix(".base")
            A, B = (tensors[f"{lora.peft_name(path)}.lora_{x}.weight"] for x in "AB")
            weights[models.hf_name(path + ".weight")] = layer.full(torch.float32) + (
                0 if merged else 2.0 * B @ A
            )
    return model.requires_grad_(False).eval(), weights


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", ["none", "nf4", "fp8"])
def test_greedy_text_with_an_adapter_on_any_weights_is_transformers(
    tiny_model, adapter, kind, merged
):
    """A batch of eight prompts of mixed lengths, in three rows."""
    model, weights = with_adapter(tiny_model, adapter, kind, merged)
    text = data.Text(tiny_model)
    prompts = [
        text.prompt(p) for p in [*PROMPTS, "Beans", "Cream and cheese", "Butter", "Pasta " * 9]
    ]
    want = transformers_greedy(tiny_model, prompts, 24, weights)
    assert (
        sample.generate(model, prompts, {1}, max_new_tokens=24, temperature=0, batch_size=3)[0]
        == want
    )
    assert want != transformers_greedy(tiny_model, prompts, 24)


@pytest.mark.slow
def test_greedy_text_of_the_default_model_is_transformers(default_model):
    """Eight prompts of mixed lengths, fp32, each alone and in three rows that are filled anew."""
    folder = default_model[0]
    text, model = data.Text(folder), models.load(folder).requires_grad_(False).eval()
    prompts = [
        text.prompt(p)
        for p in [*PROMPTS, "Pumpkin Bread", "The best way to cook a goose", "1.", "Soup " * 30]
    ]
    want = transformers_greedy(folder, prompts, 48, end=2)
    assert [
        sample.generate(model, [p], {2}, max_new_tokens=48, temperature=0)[0][0] for p in prompts
    ] == want
    assert (
        sample.generate(model, prompts, {2}, max_new_tokens=48, temperature=0, batch_size=3)[0]
        == want
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, merged", [("none", False), ("none", True), ("nf4", False), ("nf4", True)]
)
def test_greedy_text_of_the_default_model_with_an_adapter_is_transformers(
    default_model, tmp_path, kind, merged
):
    import peft

    folder = default_model[0]
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(lora.PARENT))
    theirs = peft.get_peft_model(
        LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), config
    )
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.01)
    theirs.save_pretrained(tmp_path)
    model, weights = with_adapter(folder, tmp_path, kind, merged)
    text = data.Text(folder)
    prompts = [
        text.prompt(p)
        for p in [*PROMPTS, "Pumpkin Bread", "The best way to cook a goose", "1.", "Soup " * 30]
    ]
    want = transformers_greedy(folder, prompts, 24, weights, end=2)
    assert (
        sample.generate(model, prompts, {2}, max_new_tokens=24, temperature=0, batch_size=5)[0]
        == want
    )
    assert want != transformers_greedy(folder, prompts, 24, end=2)


def test_a_merged_adapter_is_quantised_with_the_weights(tiny_model, adapter):
    """NF4 is made of the sum W + BA as fp32 has it, not of W before."""
    plain = models.load(tiny_model, make_linear=lora.merging(adapter, quant.make_linear("none"))[0])
    small = models.load(tiny_model, make_linear=lora.merging(adapter, quant.make_linear("nf4"))[0])
    before = models.load(tiny_model)
    W, Q, old = (m.layers[0].q_proj for m in (plain, small, before))
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
        models.load(
            tiny_model, make_linear=lora.merging(tmp_path / "a", quant.make_linear("none"))[0]
        )


def test_the_repetition_penalty_is_transformers(tiny, tiny_model):
    model, text = tiny
    prompts = [text.prompt(p) for p in PROMPTS]
    want = transformers_greedy(tiny_model, prompts, 40, penalty=1.7)
    for rows in (4, 2):
        out, _ = sample.generate(
            model,
            prompts,
            {1},
            max_new_tokens=40,
            temperature=0,
            repetition_penalty=1.7,
            batch_size=rows,
        )
        assert out == want != transformers_greedy(tiny_model, prompts, 40)


@pytest.mark.parametrize(
    "how", [{}, {"top_k": 0, "top_p": 0.9}, {"min_p": 0.1}, {"temperature": 0}], ids=str
)
def test_a_text_does_not_depend_on_its_batch(tiny, how):
    model, text = tiny
    prompts = [text.prompt(p) for p in PROMPTS * 2]
    numbers, how = [0] * 4 + [1] * 4, {"max_new_tokens": 30, "seed": 5, **how}
    alone = [
        sample.generate(model, [p], {1}, numbers=[n], **how)[0][0] for p, n in zip(prompts, numbers)
    ]
    for rows in (8, 3):
        out, _ = sample.generate(
            model, prompts[::-1], {1}, numbers=numbers[::-1], batch_size=rows, **how
        )
        assert out == alone[::-1]
    if how.get("temperature") != 0:
        assert (
            sample.generate(model, prompts, {1}, numbers=numbers, **{**how, "seed": 6})[0] != alone
        )


def test_samples_of_one_prompt_differ(tiny):
    model, text = tiny
    out, _ = sample.generate(
        model, [text.prompt("Rice")] * 3, {1}, numbers=[0, 1, 2], max_new_tokens=20
    )
    assert out[0] != out[1] != out[2] != out[0]


def test_each_row_stops_at_any_end_token_and_only_there(tiny):
    """An end token is planted by choosing one that greedy search writes."""
    model, text = tiny
    prompts = [text.prompt(p) for p in PROMPTS]
    free, _ = sample.generate(model, prompts, set(), max_new_tokens=12, temperature=0)
    ends = {free[0][3], free[1][5]}
    for rows in (4, 2):
        out, ended = sample.generate(
            model, prompts, ends, max_new_tokens=12, temperature=0, batch_size=rows
        )
        for row, whole in zip(out, free):
            first = next((i for i, t in enumerate(whole) if t in ends), len(whole))
            assert row == whole[:first]
        assert ended == [any(t in ends for t in whole) for whole in free] and any(ended)


def test_a_text_that_ends_at_once_is_empty(tiny):
    model, text = tiny
    p = text.prompt("Rice")
    (first,), _ = sample.generate(model, [p], set(), max_new_tokens=1, temperature=0)
    assert sample.generate(model, [p, p], set(first), max_new_tokens=9, temperature=0) == (
        [[], []],
        [True, True],
    )


def test_tokens_come_in_order_and_texts_when_finished(tiny):
    """on_token sees every token of every text, none of the end; write hands a text out before others are begun."""
    model, text = tiny
    prompts, seen, finished = [text.prompt(p) for p in PROMPTS], {}, []
    writer = sample.Writer(
        model, prompts, sample.Config(batch_size=2, max_new_tokens=5, temperature=0)
    )
    for i, ids, _ in sample.write(
        writer, prompts, {1}, on_token=lambda i, t: seen.setdefault(i, []).append(t)
    ):
        assert seen[i] == ids and len(seen) <= 2 + len(finished)
        finished.append(i)
    assert (
        sorted(finished) == [0, 1, 2, 3] and finished[0] == 2
    )  # the longest prompt is begun first


# --- the draw ---


def settings(**how):
    return sample.Config(**{"top_k": 0, "temperature": 1.0, **how})


def draw(logits, n, **how):
    """n draws of the tokens of one row, each at its own position."""
    rows = logits.expand(n, -1)
    keys = torch.full((n,), sample.noise_key(3, [7, 8], 0))
    return sample.pick(
        rows, settings(**how), keys, torch.arange(n), torch.zeros(n, 0, dtype=torch.bool)
    )


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_pick_draws_from_the_softmax(temperature):
    """Chi-square over 20,000 draws of six tokens: 5 degrees of freedom, 20.5 is its 99.9th percentile."""
    logits, n = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -2.0]]), 20_000
    p = (logits[0].double() / temperature).softmax(-1)
    counts = torch.bincount(draw(logits, n, temperature=temperature), minlength=6)
    assert float(((counts - n * p) ** 2 / (n * p)).sum()) < 20.5


@pytest.mark.parametrize(
    "how, kept", [({"top_k": 2}, 2), ({"top_p": 0.6}, 2), ({"min_p": 0.3}, 3), ({"top_k": 1}, 1)]
)
def test_pick_draws_only_from_the_likeliest_and_in_their_proportion(how, kept):
    logits, n = torch.tensor([[1.0, 0.4, 0.0, -0.8, -3.0]]), 20_000
    p = logits[0, :kept].double().softmax(-1)
    counts = torch.bincount(draw(logits, n, **how), minlength=5)
    assert not counts[kept:].any()
    assert (
        float(((counts[:kept] - n * p) ** 2 / (n * p)).sum()) < 13.8
    )  # 2 degrees of freedom, 99.9th percentile


def test_the_noise_is_gumbel_noise_of_the_key_the_position_and_the_column():
    """Kolmogorov-Smirnov against Gumbel's distribution over 100,000; no correlation with neighbours; no repetition."""
    keys, V = torch.tensor([sample.noise_key(1, [5], 0), sample.noise_key(1, [5], 1)]), 100_000
    a, b = sample.noise(keys, torch.tensor([4, 4]), V).double()
    cdf = torch.exp(-torch.exp(-a.sort().values))
    assert float((cdf - (torch.arange(V) + 0.5) / V).abs().max()) < 1.95 / V**0.5  # 99.9 %
    (later,) = sample.noise(keys[:1], torch.tensor([5]), V).double()
    for other in (b, later, a.roll(1)):
        assert abs(float(torch.corrcoef(torch.stack([a, other]))[0, 1])) < 3.3 / V**0.5
    assert torch.isfinite(a).all() and torch.equal(
        sample.noise(keys[:1], torch.tensor([4]), V)[0].double(), a
    )


def test_the_noise_is_splitmix64():
    """Its first numbers from the seed 0, as its authors' C code gives them; the top 23 bits are what is used."""
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    got = sample.noise(torch.tensor([-0x61C8864680B583EB]), torch.tensor([0]), 3)[0].double()
    u = torch.exp(-torch.exp(-got)) * 2**23 - 0.5
    # the last step of the generator, x ^ (x >> 31), leaves the top 31 bits as they are
    assert (u - torch.tensor([float(k >> 41) for k in known])).abs().max() < 8


def test_a_key_hangs_on_seed_prompt_and_number():
    base = sample.noise_key(1, [2, 3], 0)
    assert base == sample.noise_key(1, (2, 3), 0) and -(2**63) <= base < 2**63
    others = {
        sample.noise_key(2, [2, 3], 0),
        sample.noise_key(1, [3, 2], 0),
        sample.noise_key(1, [2, 3], 1),
    }
    assert len({base, *others}) == 4


@pytest.mark.parametrize(
    "how",
    [{"top_k": 7}, {"top_p": 0.7}, {"min_p": 0.05}, {"top_k": 20, "top_p": 0.8, "min_p": 0.02}],
    ids=str,
)
def test_the_kept_are_those_of_transformers(how):
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(50, 200, generator=torch.Generator().manual_seed(1)) * 3
    want, kinds = (
        logits,
        {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper},
    )
    for name, value in how.items():
        want = kinds[name](value)(None, want)
    got = sample.keep_likely(
        logits, how.get("top_k", 0), how.get("top_p", 1.0), how.get("min_p", 0.0)
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    "top_k, top_p, min_p, kept",
    [
        (0, 1.0, 0.0, {0, 1, 2, 3, 4}),
        (2, 1.0, 0.0, {0, 1}),
        (99, 1.0, 0.0, {0, 1, 2, 3, 4}),
        (1, 1.0, 0.0, {0}),
        (0, 0.5, 0.0, {0}),
        (0, 0.51, 0.0, {0, 1}),
        (0, 0.75, 0.0, {0, 1}),
        (0, 0.76, 0.0, {0, 1, 2}),
        (2, 0.9, 0.0, {0, 1}),
        (2, 0.6, 0.0, {0}),  # of the two, the first has 2/3 of the probability
        (0, 1e-6, 0.0, {0}),
        (0, 1.0, 0.5, {0, 1}),
        (0, 1.0, 0.51, {0}),
        (0, 1.0, 0.125, {0, 1, 2, 3, 4}),
        (0, 1.0, 1.0, {0}),
    ],
)
def test_top_k_top_p_and_min_p_keep_exactly_the_likeliest(top_k, top_p, min_p, kept):
    """Probabilities 1/2, 1/4, 1/8, 1/16, 1/16, in an order that is not theirs."""
    p = torch.tensor([[0.0625, 0.5, 0.125, 0.25, 0.0625]])
    order = [1, 3, 2, 0, 4]
    out = sample.keep_likely(p.double().log(), top_k, top_p, min_p)
    assert {order.index(i) for i in torch.isfinite(out[0]).nonzero().flatten().tolist()} == kept


def test_a_prompt_beyond_the_window_is_refused_and_the_text_ends_at_it(tmp_path):
    model = models.load(make_model(tmp_path / "short", window=32)).requires_grad_(False)
    with pytest.raises(cli.UserError, match="window"):
        sample.generate(model, [list(range(5, 37))], {1}, max_new_tokens=5)
    assert len(sample.generate(model, [list(range(5, 25))], set(), max_new_tokens=50)[0][0]) == 12


def test_a_beginning_is_made_of_the_tokens_that_training_saw(tiny):
    """The title, and title with ingredients, are the first tokens of the rendered recipe."""
    _, text = tiny
    recipe = data.recipes.Recipe(
        "Rice pudding", ["2 cups rice", "milk"], ["Stir the rice.", "Boil it."]
    )
    prompt, completion = recipe.text()
    whole = text.prompt(prompt, completion)
    for ids, shown in (
        sample.beginning(text, {"title": "Rice pudding"}),
        sample.beginning(text, {"title": "Rice pudding", "ingredients": "2 cups rice, milk"}),
        sample.beginning(text, {"title": "Rice pudding", "ingredients": ["2 cups rice", "milk"]}),
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

    def write(writer, prompts, ends, numbers, on_token):
        ids = data.Text(out_base(out)).encode([said])[0]
        for token in ids:
            on_token(0, token)
        yield 0, ids, True

    monkeypatch.setattr(sample, "write", write)
    monkeypatch.setattr(
        sample, "print", lambda *a, end="\n", **_: pieces.append("".join(a) + end), raising=False
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
    text = data.Text(base)
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
    assert code == 2 and "--chat: the chat template refuses it" in err and "Traceback" not in err


# --- how good it is ---

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
    assert sample.measure([(text, ended)])["recipes"] == recipe


def test_the_measures_of_a_text_worked_out_by_hand():
    """Flour of two ingredients is named; one of three steps says the same as another; of the 3-word runs of 'mix the
    flour. 2. bake ...' some come again."""
    again = "\n\nIngredients:\n- 2 cups flour\n- 1 egg\n\nDirections:\n1. Mix the flour.\n2. Rest.\n3. Mix the flour.\n"
    got = sample.measure([(again, True), ("nothing at all", True)])
    words = (
        again.casefold().split()
    )  # ingredients: - 2 cups flour - 1 egg directions: 1. mix the flour. 2. rest. …
    assert (
        len(words) == 19 and got["distinct_3"] == 17 / 18
    )  # 17 runs and 1; 'mix the flour.' stands there twice
    assert (
        got["recipes"] == 0.5 and got["ingredients_used"] == 0.5 and got["steps_repeated"] == 1 / 3
    )


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
    text = data.Text(out_base(out))
    ids = text.encode([" of apples"])[0]
    load = sample.load

    def sentencepiece(cfg):
        model, text, info = load(cfg)
        text.tokenizer.decoder = decoders.Sequence(
            [decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]
        )
        return model, text, info

    def write(writer, prompts, ends, numbers, on_token):
        for token in ids:
            on_token(0, token)
        yield 0, ids, True

    monkeypatch.setattr(sample, "load", sentencepiece)
    monkeypatch.setattr(sample, "write", write)
    flags = ["--run", out, "--cache", cache, "--title", "Pie"]
    assert run(*flags)[1] == "Pie of apples\n"
    assert json.loads(run(*flags, "--json")[1])["text"] == " of apples"


def test_out_of_memory_is_one_sentence(trained, run, monkeypatch):
    out, cache = trained

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 270 GiB")

    monkeypatch.setattr(sample, "Writer", full)
    code, _, err = run("--run", out, "--cache", cache, "--title", "Pie")
    assert code == 2 and "--batch_size" in err and "Traceback" not in err


def test_a_temperature_beyond_what_fp32_holds_still_draws():
    logits = torch.tensor([[2.0, 1.0, -3.0]])
    assert draw(logits, 5, temperature=1e-40, top_k=2).tolist() == [0] * 5


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
    _, held, _ = data.prepare(cfg, data.recipes.Rules(**info["rules"]), tiny_model)
    reference, loss, n = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), 0.0, 0
    for i in held.val:
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
        (["--merge", "--run", "", "--model", "{base}", "--title", "a"], "--merge"),
        (["--prompt", "rice " * 3000], "window"),
        (["--temprature", 1], "temprature"),
        (["--max_new_tokens", 0], "--max_new_tokens"),
        (["--device", "gpu"], "gpu"),
        (["--model", "/nowhere"], "/nowhere"),
    ],
    ids=str,
)
def test_a_mistake_gets_one_sentence(trained, run, tiny_model, flags, word):
    out, cache = trained
    flags = [tiny_model if flag == "{base}" else flag for flag in flags]
    code, _, err = run(*([] if "--run" in flags else ["--run", out]), "--cache", cache, *flags)
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
    ],
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
