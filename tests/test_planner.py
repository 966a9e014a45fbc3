"""planner.py: `train.py --plan`, before any weight is read."""

import json
import shutil
import threading
from http.server import ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import made_recipes, make_model, program, train_here, write_jsonl
from test_hub import Repository, hub_env

import data
import model as models
import planner
import train
from files import weights
from recipes import Rules
from speed import precision, rate

# Llama-3.1-70B's config.json, as it is on the hub.
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 8192,
    "initializer_range": 0.02,
    "intermediate_size": 28672,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}


@pytest.fixture
def config_alone(tmp_path):
    """A function that makes a folder with a config.json and no other file."""

    def make(**changes):
        folder = tmp_path / "config_alone"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(LLAMA_70B | changes))
        return folder

    return make


@pytest.fixture
def plan(monkeypatch, capsys, tiny_model, tiny_recipes, tmp_path):
    """Run train.py --plan in this process: (its JSON, what it said). `--no-data` gives no recipes."""
    # To measure the CPU takes half a second.
    quick = rate.Card("cpu", 8e9, 1e11, 0, 1e10, launch=0.0, context=0.45e9, device="cpu")
    monkeypatch.setattr(rate, "measured", lambda *_: quick)
    monkeypatch.setattr(weights, "read", None)  # a plan reads no weight

    def call(*flags, model=tiny_model, recipes=(tiny_recipes,), code=0):
        words = ["--plan", "--model", model, "--cache", tmp_path / "cache", "--device", "cpu"]
        words += ["--val_recipes", 8, "--out", tmp_path / "out", *flags]
        if recipes:
            words += ["--data", *recipes]
        ended, out, err = train_here(monkeypatch, capsys, *words)
        assert ended == code and "Traceback" not in err, err
        if code:
            assert not out
            return None, err
        (line,) = out.splitlines()
        return json.loads(line), err

    return call


def test_a_plan_is_one_line_of_json(plan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, said = plan()
    assert {"peak_gb", "parts", "fits", "tokens_per_s", "hours"} <= found.keys()
    # Each of the parts is rounded to a tenth of a megabyte.
    assert sum(found["parts"].values()) == pytest.approx(found["peak_gb"], abs=1e-3)
    assert {"base", "embedding and head", "adapter", "gradients", "optimizer"} <= set(
        found["parts"]
    )
    assert set(found["fits"]) == {"8 GB", "16 GB", "24 GB", "40 GB", "80 GB", "cpu"}
    assert all(found["fits"].values())
    assert 0 < found["tokens_per_s"] and 0 < found["hours"]
    assert found["steps"] == 60
    for words in ("tokens/s on cpu", "hours for 60 steps", "while loading", "host memory"):
        assert words in said
    # Only the tokens are kept, in the cache.
    assert not (tmp_path / "out").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]


def test_hours_are_real_tokens_of_all_steps_over_their_speed(tiny_model):
    """500 steps of 2 micro-batches of 2 recipes of 101 tokens, of which a recipe's last is no input."""
    cfg = train.Config(grad_accum=2)
    card = rate.CARDS["h100"]
    config = models.read_config(tiny_model)
    made = planner.of_run(config, cfg, data.Data(batch_size=2), np.full(64, 101), 500, card)
    assert made.hours * 3600 * made.tokens_per_s == pytest.approx(500 * 2 * 2 * 100)


def batches_of(model, recipes, tmp_path, **changes):
    """(data.Data, dataset, the Batches of an epoch as training gets them on a CPU)"""
    cfg = data.Data(
        model=str(model),
        data=[str(recipes)],
        cache=str(tmp_path / "cache"),
        val_recipes=8,
        **changes,
    )
    dataset, _, _ = data.prepare(cfg, Rules(), model)
    lengths = dataset.lengths(dataset.indices)
    batches = []
    for step in data.plan(lengths, cfg, 0):
        rows = [dataset.indices[at] for at in step]
        batches += data.make_step(dataset, torch.device("cpu"), False, cfg.budget, rows)
    return cfg, dataset, batches


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 8},
        {"batch_size": 7, "batching": "random"},
        {"batch_tokens": 2000},
        {"batching": "packed", "batch_tokens": 1000},
    ],
    ids=str,
)
def test_the_largest_micro_batch_is_that_of_the_data(
    plan, tiny_model, tiny_recipes, tmp_path, changes
):
    flags = [word for name, value in changes.items() for word in (f"--{name}", value)]
    found, said = plan(*flags)
    _, _, batches = batches_of(tiny_model, tiny_recipes, tmp_path, **changes)
    shapes = [tuple(b.ids.shape) for b in batches]
    assert tuple(found["batch"]) in shapes
    assert np.prod(found["batch"]) == max(np.prod(shape) for shape in shapes)
    assert "every row is taken as" not in said


def test_batches_are_those_of_training(tiny_model, tiny_recipes, tmp_path):
    """Shape and real tokens of each micro-batch; on a GPU rows are a multiple of 8 long."""
    cfg, dataset, batches = batches_of(tiny_model, tiny_recipes, tmp_path, batch_size=5)
    true = sorted((*b.ids.shape, b.real) for b in batches)
    lengths = dataset.lengths(dataset.indices)
    config = models.read_config(tiny_model)
    cpu = rate.unmeasured(torch.device("cpu"))
    made = planner.of_run(config, train.Config(), cfg, lengths, 1, cpu)
    assert sorted(map(tuple, made.batches.tolist())) == true
    on_gpu = planner.of_run(config, train.Config(), cfg, lengths, 1, rate.CARDS["h100"])
    padded = sorted((rows, -(-tokens // 8) * 8, real) for rows, tokens, real in true)
    assert sorted(map(tuple, on_gpu.batches.tolist())) == padded


def test_a_config_alone_is_enough(plan, config_alone):
    """Llama-3.1-70B: 70.55e9 weights, 141 GB in bf16; in NF4 36 GB and two matrices of 2.1 GB in bf16."""
    flags = ["--card", "H200", "--grad_ckpt", "--compile", "--max_len", 512]
    found, said = plan(*flags, model=config_alone(), recipes=())
    assert "70.55 billion weights: 80 blocks" in said
    assert "every row is taken as --max_len 512 long" in said
    # A recipe's last token is no input; the rest is padded to a multiple of 8.
    assert found["batch"] == [2, 512]
    held = found["parts"]["base"] + found["parts"]["embedding and head"]
    assert held == pytest.approx(141.1, abs=0.05)
    assert found["card"] == "H200" and not found["fits"]["H200"] and not found["fits"]["80 GB"]
    # torch in the process that plans has no say in the rate of another card.
    assert 100 < found["tokens_per_s"] < 10_000


def test_70b_in_four_bits(plan, config_alone):
    flags = ["--card", "H100", "--grad_ckpt", "--compile", "--quant", "nf4"]
    found, _ = plan(*flags, model=config_alone(), recipes=())
    weights_in_blocks = 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    codes = found["parts"]["base"] + found["parts"]["quant constants"]
    assert codes == pytest.approx(weights_in_blocks * 4.127 / 8 / 1e9, rel=1e-3)
    assert found["fits"]["80 GB"] and found["fits"]["H100"] and not found["fits"]["40 GB"]


@pytest.mark.slow
def test_a_plan_of_70b_is_quick(config_alone, tmp_path):
    """In a process of its own: no machine with a GPU, no tokenizer, no weight, no data."""
    flags = ["--plan", "--card", "H100", "--quant", "nf4", "--model", config_alone()]
    done = program("train.py", *flags, "--data", "none.jsonl", cwd=tmp_path)
    assert json.loads(done.stdout)["needed_gb"] > 40
    assert [file.name for file in tmp_path.iterdir()] == ["config_alone"]


def test_without_a_tokenizer_rows_are_full_whatever_the_batch(plan, config_alone):
    model = config_alone()
    found, _ = plan("--batch_size", 3, "--max_len", 100, model=model, recipes=())
    assert found["batch"] == [3, 99]
    found, _ = plan("--batch_tokens", 1000, "--max_len", 100, model=model, recipes=())
    assert found["batch"] == [10, 99]
    packed = ["--batching", "packed", "--max_len", 100]
    found, _ = plan(*packed, "--batch_tokens", 1000, model=model, recipes=())
    assert found["batch"] == [1, 1000]
    # Shorter than a tile of 8 tokens.
    found, _ = plan("--max_len", 3, "--card", "T4", model=model, recipes=())
    assert found["batch"] == [2, 8]


def test_recipes_without_a_tokenizer_have_no_lengths(plan, config_alone):
    """A folder has no tokenizer to fetch, so recipes that are named are not read."""
    found, said = plan("--max_len", 100, model=config_alone())
    assert found["batch"] == [2, 99]
    assert "without a tokenizer and recipes every row is taken as --max_len 100 long" in said


def test_a_model_that_is_no_llama_is_refused(plan, config_alone):
    model = config_alone(architectures=["GPT2LMHeadModel"], model_type="gpt2")
    _, said = plan(model=model, recipes=(), code=2)
    assert 'architectures is ["GPT2LMHeadModel"], which is no Llama-architecture model' in said


def test_a_run_that_is_there_is_left_as_it_is(plan, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("run.json", "adapter_model.safetensors", "state.json"):
        (out / name).write_text("{}")
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    plan()
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before
    assert not (tmp_path / "out.1").exists()


def test_a_resume_is_planned_with_the_flags_of_its_run(plan, tmp_path, tiny_model, tiny_recipes):
    """--grad_ckpt and --max_steps are the run's, and nothing of the run changes."""
    out = tmp_path / "out"
    flags = ["--model", tiny_model, "--data", tiny_recipes, "--cache", tmp_path / "cache"]
    flags += ["--val_recipes", 8, "--device", "cpu", "--out", out]
    program("train.py", *flags, "--grad_ckpt", "--max_steps", 2, "--batch_size", 3)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    found, _ = plan("--resume")
    assert found["steps"] == 2 and found["batch"][0] == 3
    assert "checkpoints" in found["parts"] and "kept for backward" not in found["parts"]
    longer, _ = plan("--resume", "--max_steps", 200)
    assert longer["steps"] == 200
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    _, said = plan("--resume", "--batch_size", 4, code=2)
    assert "--resume: these flags make it another run: --batch_size was 3, is 4" in said


@pytest.fixture
def hub(tiny_model, tmp_path):
    """A server of recipes/tiny on this machine, and the files that were fetched of it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Repository)
    server.folder = tmp_path / "served"
    shutil.copytree(tiny_model, server.folder)
    server.fetched = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_model_of_the_hub_costs_one_small_file(hub, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    env = hub_env(home, HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}")
    flags = ["--plan", "--card", "T4", "--model", "recipes/tiny", "--cache", home / "cache"]
    done = program("train.py", *flags, cwd=home, env=env)
    assert hub.fetched == ["config.json"]
    assert "every row is taken as --max_len 1024 long" in done.stderr
    assert json.loads(done.stdout)["card"] == "T4"


def test_plans_for_other_cards(plan, tmp_path):
    old, said = plan("--card", "t4")
    assert old["card"] == "T4" and set(old["fits"]) >= {"T4", "16 GB"} and "tokens/s on T4" in said
    new, _ = plan("--card", "rtx 4090")
    assert new["card"] == "RTX4090" and new["tokens_per_s"] > old["tokens_per_s"]
    # A T4 has no flash attention for grouped heads, so there the scores are kept.
    assert old["parts"]["kept for backward"] > new["parts"]["kept for backward"]
    _, said = plan("--card", "Voodoo2", code=2)
    assert "--card Voodoo2 is not known; choose one of T4, V100, " in said and "H100" in said
    _, said = plan("--card", "T4", "--fp8", code=2)
    assert "--fp8: T4 multiplies no 8-bit floats" in said


def test_numbers_of_four_bytes(plan):
    half, _ = plan("--card", "H100")
    full, _ = plan("--card", "H100", "--dtype", "fp32")
    for part in ("embedding and head", "base"):
        assert full["parts"][part] == pytest.approx(2 * half["parts"][part], abs=2e-4)
    assert full["parts"]["adapter"] == half["parts"]["adapter"]


def test_a_cpu_without_bf16_keeps_weights_in_two_bytes_and_works_in_four(monkeypatch):
    monkeypatch.setattr(precision, "has_bf16", lambda device: False)
    cpu = rate.unmeasured(torch.device("cpu"))
    assert planner.sizes_of(train.Config(dtype="bf16"), cpu) == (2, 4)
    assert planner.sizes_of(train.Config(dtype="auto"), cpu) == (4, 4)
    # Every GPU works in 16 bits: before Ampere in fp16.
    assert planner.sizes_of(train.Config(dtype="auto"), rate.CARDS["t4"]) == (2, 2)
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    assert planner.sizes_of(train.Config(dtype="auto"), cpu) == (2, 2)
    mps = rate.Card("mps", 16e9, 1e12, 0, 1e11, device="mps")
    assert planner.sizes_of(train.Config(dtype="auto"), mps) == (2, 2) and not mps.is_gpu


def test_all_weights_trained(plan):
    found, _ = plan("--lora_r", 0, "--dtype", "fp32")
    parts = found["parts"]
    held = parts["base"] + parts["embedding and head"]
    assert parts["gradients"] == pytest.approx(held, abs=2e-4) and "adapter" not in parts
    assert parts["optimizer"] == pytest.approx(2 * held, abs=3e-4)


def test_targets_with_spaces_are_those_without(plan):
    apart, _ = plan("--lora_targets", "v_proj, q_proj,q_proj")
    together, _ = plan("--lora_targets", "q_proj,v_proj")
    assert apart == together
    _, said = plan("--lora_targets", "q_proj,lm_head", code=2)
    assert "--lora_targets: 'lm_head' is no layer to adapt" in said


def test_more_blocks_than_there_are_is_a_sentence(plan):
    _, said = plan("--grad_ckpt", "--ckpt_blocks", 3, code=2)
    assert "--ckpt_blocks 3" in said


def test_paged_states_are_unpaged_on_a_cpu(plan):
    paged, _ = plan("--optim", "paged_adamw8bit")
    unpaged, _ = plan("--optim", "adamw8bit")
    assert paged == unpaged
    on_card, _ = plan("--optim", "paged_adamw8bit", "--card", "T4")
    assert on_card["parts"].get("optimizer", 0) < unpaged["parts"]["optimizer"]


def test_data_of_one_recipe_is_a_sentence(plan, tmp_path):
    one = write_jsonl(tmp_path / "one.jsonl", made_recipes(1))
    _, said = plan(recipes=[one], code=2)
    assert "1 recipe(s) are too few to train on and hold out" in said
    # Of two, one is trained on.
    two = write_jsonl(tmp_path / "two.jsonl", made_recipes(2))
    found, _ = plan("--val_recipes", 1, "--batch_size", 16, recipes=[two])
    assert found["batch"][0] == 1


def test_tokens_per_s_counts_no_padding(tmp_path):
    """Half of each batch is padding: half of the real tokens a second."""
    config = models.read_config(make_model(tmp_path / "m", window=4096))
    card = rate.CARDS["h100"]
    even = data.Data(batch_size=2, batching="random")
    cfg = train.Config(compile=True, cuda_graph=True)
    same = planner.of_run(config, cfg, even, np.full(64, 2049), 1, card)
    # The longest recipe comes first, so of two recipes one is short.
    mixed = planner.of_run(config, cfg, even, np.array([2049, 1]), 1, card)
    assert same.batches[0].tolist() == [2, 2048, 4096]
    assert mixed.batches[0].tolist() == [2, 2048, 2048]
    assert mixed.tokens_per_s == pytest.approx(same.tokens_per_s / 2, rel=0.05)


def test_many_recipes_are_planned_by_some_of_them():
    lengths = np.random.default_rng(0).integers(30, 500, 400_000)
    lengths[12345] = 1000
    shape = models.ModelConfig(512, 64, 128, 2, 4, 2, 16, 1024, 1e-5, 1e4, {}, True, False, False)
    card = rate.CARDS["h100"]
    made = planner.of_run(shape, train.Config(), data.Data(batch_size=16), lengths, 1000, card)
    assert len(made.lengths) < 60_000
    # The longest recipe is among them, and the mean is that of all.
    assert made.work.tokens == 1000
    assert made.lengths.mean() == pytest.approx(lengths.mean(), rel=0.01)


# --- what a plan refuses, and what it bounds ---


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--batch_tokens", 100], "--batch_tokens 100: the longest recipe has 1024 tokens"),
        (
            ["--batching", "packed", "--batch_tokens", 510],
            "--batch_tokens 512: the longest recipe has 1024 tokens",
        ),
        (["--card", "T4", "--dtype", "bf16"], "--dtype bf16: T4 has no bf16; use --dtype fp16"),
    ],
)
def test_what_training_would_refuse(plan, config_alone, flags, said):
    _, err = plan(*flags, model=config_alone(), recipes=(), code=2)
    assert said in err


def test_recipes_that_do_not_fit_into_a_batch_are_a_sentence(plan):
    """data.load_dataset says the same."""
    _, said = plan("--batch_tokens", 20, code=2)
    assert "--batch_tokens 20: the longest recipe has " in said


def tiny(**flags):
    """The Plan of a model of two blocks."""
    of_data = {name: flags.pop(name) for name in ("batch_size", "batch_tokens") if name in flags}
    lengths = flags.pop("lengths", None)
    card = flags.pop("card", rate.CARDS["h100"])
    steps = flags.pop("steps", 10)
    shape = models.ModelConfig(512, 64, 128, 2, 4, 2, 16, 1024, 1e-5, 1e4, {}, True, False, False)
    return planner.of_run(shape, train.Config(**flags), data.Data(**of_data), lengths, steps, card)


def test_a_batch_larger_than_the_dataset_is_the_dataset():
    lengths = np.full(100, 65)
    assert tiny(batch_size=10**11, lengths=lengths).batches.tolist() == [[100, 64, 6400]]
    # A step of more micro-batches than there are: 10 steps of 100 recipes of 64 tokens.
    made = tiny(batch_size=10, grad_accum=10**9, lengths=lengths)
    assert made.hours * 3600 * made.tokens_per_s == pytest.approx(10 * 6400)


def test_a_batch_of_more_recipes_than_are_planned_is_whole():
    lengths = np.random.default_rng(0).integers(30, 500, 130_000)
    assert tiny(batch_size=60_000, lengths=lengths).batches[0][0] == 60_000


def test_a_huge_batch_without_recipes_is_bounded_and_said():
    made = tiny(batch_size=10**11, grad_accum=10**11)
    assert made.batches[0][0] == 50_000
    assert "a micro-batch as 50000 recipes at most" in made.note
    assert "at most" not in tiny(batch_size=50_000).note


def test_a_card_without_bf16_trains_all_weights_in_fp32():
    """fp16 is too coarse for that (precision.pick_dtype)."""
    t4 = rate.CARDS["t4"]
    assert planner.sizes_of(train.Config(lora_r=0), t4) == (4, 4)
    assert planner.sizes_of(train.Config(lora_r=0), rate.CARDS["h100"]) == (2, 2)


@pytest.mark.parametrize(
    "flags, card, masked",
    [
        ({}, "h100", False),
        ({}, "t4", True),
        ({"attn": "naive"}, "h100", True),
        ({"dtype": "fp32"}, "h100", True),
        ({"lora_r": 0}, "h100", True),
    ],
    ids=str,
)
def test_packed_rows_are_masked_where_varlen_attention_does_not_run(flags, card, masked):
    """model.takes_documents: CUDA from Ampere on, in 16 bits."""
    config = models.ModelConfig(512, 64, 128, 2, 4, 2, 16, 1024, 1e-5, 1e4, {}, True, False, False)
    packed = data.Data(batching="packed", batch_tokens=1024)
    lengths = np.full(64, 101)
    cfg = train.Config(**flags)
    work = planner.of_run(config, cfg, packed, lengths, 1, rate.CARDS[card]).work
    assert (work.masked, work.document) == (masked, 0 if masked else 101)
    padded = planner.of_run(config, cfg, data.Data(), lengths, 1, rate.CARDS[card]).work
    assert not padded.masked and padded.document == 0


def test_dropout_reaches_the_plan():
    assert tiny(lora_dropout=0.1).work.dropout and not tiny().work.dropout


def test_peak_and_what_is_beside_it_add_up_to_what_is_needed(plan):
    found, said = plan()
    beside = found["beside"]
    assert set(beside) == {"allocator", "context"}
    assert found["peak_gb"] + sum(beside.values()) == pytest.approx(found["needed_gb"], abs=2e-3)
    # A CPU has no CUDA.
    assert "Python and torch before the model" in said and "cuda" not in said.lower()
    _, said = plan("--card", "T4")
    assert "what CUDA takes before the first tensor" in said


def test_steps_that_depend_on_recipes_have_no_hours():
    made = tiny(steps=None)
    assert made.hours is None
    assert "hours" not in "".join(planner.table(made, made.peak))
    assert planner.as_json(made, made.peak)["hours"] is None


def test_the_largest_held_out_batch():
    """Cut as quality.held_out_batches cuts: the longest first; padded to 8 tokens on a GPU."""
    lengths = np.array([20, 61, 30, 50, 10])
    made = tiny(batch_size=2, lengths=np.full(16, 9))
    assert (made.evaluating(lengths).rows, made.evaluating(lengths).tokens) == (2, 64)
    assert made.evaluating(lengths).targets == 60 + 49
    by_tokens = tiny(batch_tokens=100, lengths=np.full(16, 9))
    # 61 alone, 50 and 30, 20 and 10.
    assert (by_tokens.evaluating(lengths).rows, by_tokens.evaluating(lengths).tokens) == (2, 56)
