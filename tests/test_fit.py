"""fit.py: `train.py --fit` chooses the fastest flags that fit; the account where memory ran out."""

import cli
from cli import UserError

import itertools
import json
import re
import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_model, train_here

import data
import fit
import model as models
import planner
import sample
import train
from recipes import Rules
from speed import compiled, memory, precision, rate

H100 = rate.CARDS["h100"]
LLAMA_8B = models.ModelConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=5e5,
    rope_scaling={"rope_type": "default"},
    tie_word_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
)


@pytest.fixture(autouse=True)
def a_compiler(monkeypatch):
    """As on a machine that has one, and bitsandbytes."""
    monkeypatch.setattr(compiled, "has_compiler", lambda: True)
    monkeypatch.setattr(fit, "has_bitsandbytes", lambda device: True)


def plan_of(config=LLAMA_8B, lengths=None, card=H100, batch_size=32, of_data=None, **flags):
    if lengths is None:
        lengths = np.full(256, 257)
    data_cfg = data.Data(batch_size=batch_size, **(of_data or {}))
    return planner.of_run(config, train.Config(**flags), data_cfg, lengths, 10, card)


# --- the search ---


def brute_force(room, quants, fp8s, batches):
    """The most tokens/s of all combinations that fit, and of what it has them. Written without fit.py."""
    best = (0, None)
    shape = planner.shape_of(LLAMA_8B)
    switches = [False, True]
    checkpoints = [(False, 0)] + [(True, n) for n in range(1, 33)]
    every = itertools.product(quants, fp8s, batches, checkpoints, switches, switches, switches)
    for quant, fp8, rows, (ckpt, blocks), offload, embed, graph in every:
        if graph and (offload or embed):
            continue
        if offload and blocks != 32:
            continue
        work = memory.Work(
            rows=rows,
            tokens=256,
            targets=rows * 256,
            quant=quant,
            fp8=fp8,
            grad_ckpt=ckpt,
            ckpt_blocks=blocks,
            offload_ckpt=offload,
            offload_embed=embed,
            compile=True,
            cuda_graph=graph,
        )
        if memory.needed(memory.peak(shape, work), H100.context) > room:
            continue
        accum = max(1, 32 // rows)
        seconds = rate.step_seconds(shape, work, H100) + rate.updating(shape, work, H100) / accum
        best = max(best, (rows * 256 / seconds, (quant, fp8, rows, blocks)), key=lambda b: b[0])
    return best


@pytest.mark.parametrize("room", [12, 18, 24, 30, 40, 60, 80])
def test_what_is_chosen_is_the_fastest_of_all_that_fit(room):
    plan = plan_of()
    chosen = plan.changed(fit.fit(plan, room * 1e9, "quant"))
    best, _ = brute_force(room * 1e9, ["none", "fp8", "nf4"], [False], [32])
    assert chosen.needed <= room * 1e9
    assert chosen.tokens_per_s == pytest.approx(best)


@pytest.mark.parametrize("room", [10, 24, 40])
def test_with_all_that_may_be_allowed(room):
    plan = plan_of()
    flags = fit.fit(plan, room * 1e9, "quant, fp8,batch")
    best, what = brute_force(
        room * 1e9, ["none", "fp8", "nf4"], [False, True], [1, 2, 4, 8, 16, 32, 64, 128]
    )
    assert plan.changed(flags).tokens_per_s == pytest.approx(best), what
    assert flags["fp8"]
    # A smaller micro-batch is accumulated, so that a step has as many recipes as before.
    assert flags["batch_size"] * flags["grad_accum"] == max(32, flags["batch_size"])


def test_only_what_is_allowed_changes():
    plan = plan_of(quant="nf4")
    flags = fit.fit(plan, 24e9, "")
    assert flags["quant"] == "nf4" and not flags["fp8"] and "batch_size" not in flags
    assert flags["compile"]
    assert fit.fit(plan, 24e9, "batch")["quant"] == "nf4"
    assert fit.fit(plan, 80e9, "quant")["quant"] != "nf4"


def test_as_few_checkpoints_as_fit():
    """Between none, which needs more, and all, which is slower."""
    plan = plan_of(quant="nf4")
    flags = fit.fit(plan, 30e9, "")
    assert 0 < flags["ckpt_blocks"] < 32 and flags["grad_ckpt"]
    fewer = plan.changed(flags | {"ckpt_blocks": flags["ckpt_blocks"] - 1})
    assert plan.changed(flags).needed <= 30e9 < fewer.needed
    # Where all blocks may keep everything, none is a checkpoint.
    assert not fit.fit(plan, 80e9, "")["grad_ckpt"]


def test_a_batch_of_ones_own_size_is_tried():
    plan = plan_of(batch_size=48, lengths=np.full(48, 257), quant="nf4")
    sizes = [one["batch_size"] for one in fit.batch_sizes(plan, ["batch"])]
    assert sizes == [1, 2, 4, 8, 16, 48]


def test_the_recipes_of_a_step_stay_or_are_more():
    """A step of 3 x 2: four recipes at a time would make a step of 4 or of 8. So 1, 2, 3, and larger steps."""
    plan = plan_of(batch_size=3, grad_accum=2, lengths=np.full(20, 257))
    tried = [(one["batch_size"], one["grad_accum"]) for one in fit.batch_sizes(plan, ["batch"])]
    assert tried == [(1, 6), (2, 3), (3, 2), (8, 1), (16, 1)]


def test_another_step_is_said(capfd):
    fit.fit(plan_of(batch_size=3, grad_accum=2), 80e9, "batch")
    ranking = said_of_fit(capfd.readouterr().err)
    assert len(ranking) == 5
    for line in ranking:
        rows, accum = re.search(r"--batch_size (\d+) --grad_accum (\d+)", line).groups()
        step = int(rows) * int(accum)
        assert line.endswith(f", a step of {step} recipes") == (step != 6)
    # A step of 6 is far from the fastest.
    assert ", a step of 32 recipes" in ranking[0]
    fit.fit(plan_of(batch_size=3, grad_accum=2), 80e9, "")
    assert "a step of" not in capfd.readouterr().err


@pytest.mark.parametrize("of_data", [{"batching": "packed"}, {"batch_tokens": 8192}], ids=str)
def test_batches_in_tokens_are_not_changed_and_that_is_said(of_data, capfd):
    fit.fit(plan_of(of_data=of_data), 80e9, "batch")
    first, *ranking = said_of_fit(capfd.readouterr().err)
    assert first.startswith("--allow batch changes nothing") and len(ranking) == 5
    fit.fit(plan_of(of_data=of_data), 80e9, "quant")
    assert "--allow batch" not in capfd.readouterr().err


def test_the_chosen_plan_neither_plans_nor_chooses(capfd):
    """Its line trains on this machine: without --plan, --card, --fit and --allow."""
    plan = plan_of(plan=True, card=H100, fit=30.0, allow="batch")
    found = fit.chosen(plan, 30e9, "", Rules())
    line = said_of_fit(capfd.readouterr().err)[-1]
    cfg, data_cfg, _ = again(line)
    assert (cfg, data_cfg) == (found.cfg, found.data_cfg)
    assert not cfg.plan and not cfg.fit and not cfg.allow and cfg.grad_ckpt


def test_batches_in_tokens_stay():
    packed = plan_of(of_data={"batching": "packed"})
    assert fit.batch_sizes(packed, ["batch"]) == [{}]
    assert fit.batch_sizes(plan_of(of_data={"batch_tokens": 4096}), ["batch"]) == [{}]


def tried(**how):
    plan = plan_of(**how)
    return list(fit.same_mathematics(plan, ["quant", "fp8"]))


def test_what_cannot_run_is_not_tried():
    """A recorded step waits for no host; a tied embedding is the head; an A100 has no fp8; NF4 needs rows of 64."""
    every = tried()
    assert any(one["cuda_graph"] for one in every) and any(one["offload_embed"] for one in every)
    assert not any(one["cuda_graph"] and one["offload_embed"] for one in every)
    assert not any(one["cuda_graph"] for one in tried(lora_dropout=0.1))
    tied = replace(LLAMA_8B, tie_word_embeddings=True)
    assert not any(one["offload_embed"] for one in tried(config=tied))
    assert not any(one["fp8"] for one in tried(card=rate.CARDS["a100"]))
    narrow = replace(LLAMA_8B, hidden_size=4096 + 32)
    assert {one["quant"] for one in tried(config=narrow)} == {"none", "fp8"}
    trained = tried(lora_r=0)
    assert [(one["quant"], one["fp8"], one["cuda_graph"]) for one in trained] == [
        ("none", False, False)
    ]
    on_cpu = tried(card=rate.unmeasured(torch.device("cpu")))
    assert not any(one["cuda_graph"] or one["offload_embed"] for one in on_cpu)


def test_each_choice_passes_the_programs_own_check():
    """With grad_accum, batch_size and all checkpoints as the search makes them."""
    plan = plan_of()
    for _, one in fit.ranked(plan, 80e9, "quant,fp8,batch"):
        train.check(one.cfg, one.data_cfg)


def test_nothing_fits_names_the_least():
    plan = plan_of(lengths=np.full(64, 4097))
    with pytest.raises(UserError) as e:
        fit.fit(plan, 4e9, "quant,fp8,batch")
    said = str(e.value)
    assert said.startswith("--fit 4: nothing fits; the least is ")
    assert "--quant nf4" in said and "--batch_size 1" in said and "--offload_ckpt" in said
    least = float(re.search(r"least is ([\d.]+) GB", said)[1])
    # With as much as that it fits.
    flags = fit.fit(plan, (least + 0.05) * 1e9, "quant,fp8,batch")
    assert plan.changed(flags).needed <= (least + 0.05) * 1e9


def test_fifty_thousand_recipes_are_searched_quickly(monkeypatch):
    """The batches of an epoch are planned once for each size of a batch."""
    calls = []
    plan = data.plan
    monkeypatch.setattr(data, "plan", lambda *a: calls.append(a) or plan(*a))
    lengths = np.random.default_rng(0).integers(30, 500, 50_000)
    fit.fit(plan_of(lengths=lengths), 24e9, "quant,fp8,batch")
    assert len(calls) <= 9


# --- the command line ---


def again(line):
    program, *argv = shlex.split(line)
    assert program == "python" and argv[0] == "train.py"
    return cli.parse("", train.Config, data.Data, Rules, argv=argv[1:])


@pytest.mark.parametrize(
    "cfg, data_cfg, rules",
    [
        (train.Config(), data.Data(), Rules()),
        (train.Config(out="a b", lora_r=0, fused_loss=False, max_steps=0), data.Data(), Rules()),
        (
            train.Config(
                lr=2e-4, compile=True, quant="nf4", epochs=3, lora_targets="q_proj, v_proj"
            ),
            data.Data(data=["it's.jsonl", "b c.csv"], val_data=["d"], clean=False, model="$HOME"),
            Rules(max_similar=2.0),
        ),
        (train.Config(out="-x", init_adapter="--no"), data.Data(batch_tokens=512), Rules()),
        (train.Config(grad_accum=4, ckpt_blocks=1, grad_ckpt=True), data.Data(cache="ü"), Rules()),
    ],
)
def test_a_command_line_gives_the_very_same_flags(cfg, data_cfg, rules):
    line = fit.command_line("python train.py", cfg, data_cfg, rules)
    assert again(line) == [cfg, data_cfg, rules]


# --- train.py --fit ---


@pytest.fixture
def run(monkeypatch, capsys, tiny_model, tiny_recipes, tmp_path):
    """Run train.py in this process on a CPU: (exit code, stdout, stderr)."""
    quick = rate.Card("cpu", 8e9, 1e11, 0, 1e10, launch=0.0, context=0.45e9, device="cpu")
    monkeypatch.setattr(rate, "measured", lambda *_: quick)
    monkeypatch.setattr(compiled, "has_compiler", lambda: False)
    (tmp_path / "with space").mkdir()
    recipes = tmp_path / "with space" / "recipes.jsonl"
    recipes.write_bytes(tiny_recipes.read_bytes())

    def call(*flags):
        words = ["--model", tiny_model, "--data", recipes, "--cache", tmp_path / "cache"]
        words += ["--val_recipes", 8, "--max_steps", 2, "--device", "cpu", "--dtype", "fp32"]
        words += ["--out", tmp_path / "out", *flags]
        return train_here(monkeypatch, capsys, *words)

    return call


def said_of_fit(err):
    return [line.split(maxsplit=1)[1] for line in err.splitlines() if line.startswith("fit ")]


def test_fit_trains_with_what_it_chose(run, tmp_path):
    """Room for a micro-batch of 8 of the 52 recipes, without checkpoints, and for no larger one."""
    code, out, err = run("--fit", "0.5", "--allow", "batch", "--batch_size", 4, "--no-fused_loss")
    assert code == 0 and json.loads(out.splitlines()[-1])["steps"] == 2, err
    *ranking, line = said_of_fit(err)
    assert [words.split(".")[0] for words in ranking] == list("12345")
    sizes = [float(re.search(r"([\d.]+) (?:GB|MB), (\d+) tokens/s", words)[2]) for words in ranking]
    assert sizes == sorted(sizes, reverse=True)
    about = json.loads((tmp_path / "out" / "run.json").read_text())
    flags = about["config"] | about["rules"]
    cfg, data_cfg, rules = again(line)
    assert train.flags_of(cfg, data_cfg, rules) == flags
    assert flags["fit"] == 0 and flags["allow"] == "" and not flags["fused_loss"]
    assert f"--batch_size {flags['batch_size']} " in ranking[0]
    # The metrics are those of a step of that many recipes.
    steps = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[1:]
    assert len(steps) == 2 and all(json.loads(step)["target_tokens"] > 0 for step in steps)


def test_a_resume_of_a_fitted_run_has_the_chosen_flags(run, monkeypatch, capsys, tmp_path):
    assert run("--fit", "1", "--allow", "batch")[0] == 0
    before = json.loads((tmp_path / "out" / "run.json").read_text())["config"]
    words = ["--resume", "--out", tmp_path / "out", "--max_steps", 4]
    code, out, err = train_here(monkeypatch, capsys, *words)
    assert code == 0 and json.loads(out.splitlines()[-1])["steps"] == 4, err
    after = json.loads((tmp_path / "out" / "run.json").read_text())["config"]
    assert after == before | {"max_steps": 4, "resume": True}


def test_a_fit_that_nothing_meets_leaves_all_as_it_is(run, tmp_path):
    code, out, err = run("--fit", "0.1")
    assert code == 2 and not out and not (tmp_path / "out").exists()
    assert "--fit 0.1: nothing fits; the least is 0.5 GB, with " in err.splitlines()[-1]


def test_plan_and_fit_print_the_ranking_and_the_chosen_plan(run, tmp_path):
    code, out, err = run("--plan", "--fit", "1", "--allow", "batch,quant")
    assert code == 0 and not (tmp_path / "out").exists()
    (line,) = out.splitlines()
    *ranking, command = said_of_fit(err)
    assert len(ranking) == 5
    rows = re.search(r"--batch_size (\d+)", ranking[0])[1]
    found = json.loads(line)
    assert found["batch"][0] == int(rows) and found["card"] == "cpu"
    assert found["needed_gb"] <= 1
    # The command line trains with these flags, and plans no more.
    cfg, data_cfg, _ = again(command)
    assert data_cfg.batch_size == int(rows) and not cfg.plan and not cfg.fit
    speed = float(re.search(r"(\d+) tokens/s", ranking[0])[1])
    assert found["tokens_per_s"] == pytest.approx(speed, abs=0.6)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--fit", "24", "--allow", "quant,speed"], "--allow speed is none of quant, fp8, batch"),
        (["--allow", "quant"], "--allow says what --fit may change: add --fit GB"),
        (["--fit", "-1"], "--fit -1.0 is out of range"),
        (["--card", "T4"], "--card plans for another card: add --plan"),
    ],
)
def test_flags_that_do_not_go_together(run, tmp_path, flags, said):
    code, out, err = run(*flags)
    assert code == 2 and said in err and not out and not (tmp_path / "out").exists()


def test_fit_does_not_go_with_resume(run, tmp_path):
    assert run()[0] == 0
    before = (tmp_path / "out" / "run.json").read_bytes()
    code, _, err = run("--resume", "--fit", "24")
    assert code == 2 and "--fit chooses flags of a new run" in err
    assert (tmp_path / "out" / "run.json").read_bytes() == before


# --- where memory ran out ---


def test_the_account_names_the_largest_parts_and_what_each_flag_saves():
    plan = plan_of(fused_loss=False)
    said = fit.account(plan)
    assert said.startswith("By the plan the largest parts are kept for backward ")
    saved = dict(re.findall(r"(--[^(]+) \(([\d.]+) GB less\)", said))
    # Checkpoints keep 32 inputs of 67 MB in place of what 32 blocks keep.
    shape = planner.shape_of(LLAMA_8B)
    kept = 32 * memory.kept_of_a_block(shape, plan.work)
    assert float(saved["--grad_ckpt"]) == pytest.approx((kept - 32 * 67.1e6) / 1e9, rel=0.05)
    # 13.96 GB become 3.60.
    assert float(saved["--quant nf4"]) == pytest.approx(10.36, abs=0.1)
    assert float(saved["--quant fp8"]) == pytest.approx(6.98, abs=0.1)
    assert float(saved["--batch_size 16 --grad_accum 2"]) > 20
    gains = list(map(float, saved.values()))
    assert gains == sorted(gains, reverse=True)


@pytest.mark.parametrize(
    "flags, has, has_not",
    [
        ({"grad_ckpt": True}, ["--offload_ckpt"], ["--grad_ckpt"]),
        ({"grad_ckpt": True, "ckpt_blocks": 4}, ["--ckpt_blocks 0"], []),
        ({"grad_ckpt": True, "cuda_graph": True}, [], ["--offload_ckpt", "--offload_embed"]),
        ({"lora_r": 0}, ["an adapter (--lora_r 16)", "--optim adamw8bit"], ["--quant"]),
        ({"quant": "nf4"}, ["--grad_ckpt"], ["--quant"]),
        ({"attn": "naive"}, ["--attn flash"], []),
        ({"dtype": "fp32"}, ["--dtype bf16"], ["fp16"]),
        ({"dtype": "fp32", "card": rate.CARDS["t4"]}, ["--dtype fp16"], ["bf16"]),
        ({"batch_size": 3, "grad_accum": 3}, ["--batch_size 1 --grad_accum 9"], []),
        ({"batch_size": 9, "grad_accum": 2}, ["--batch_size 3 --grad_accum 6"], []),
        ({"batch_size": 1}, ["--grad_ckpt"], ["--batch_size"]),
        ({"of_data": {"batch_tokens": 8192}}, ["--batch_tokens 3968"], ["--batch_size"]),
        ({"card": rate.unmeasured(torch.device("cpu"))}, ["--grad_ckpt"], ["--offload_embed"]),
    ],
    ids=str,
)
def test_what_helps_is_what_the_run_has_not(flags, has, has_not):
    said = fit.account(plan_of(**flags))
    for flag in has:
        assert flag + " (" in said, said
    for flag in has_not:
        assert flag not in said, said


def test_a_run_that_has_all_is_told_so():
    flags = {"quant": "nf4", "grad_ckpt": True, "offload_ckpt": True, "offload_embed": True}
    plan = plan_of(batch_size=1, lengths=np.full(4, 9), optim="adamw8bit", **flags)
    assert "No flag takes less: choose a smaller --max_len or --model" in fit.account(plan)


def test_while_loading_it_helps_to_load_less():
    doing, said = fit.while_loading(plan_of())
    assert doing == "while the model was loaded and made ready"
    # 16.06 GB of weights, 0.67 of adapter, gradients and states.
    assert said.startswith("By the plan that takes 16.8 GB.")
    assert "--quant nf4 (" in said and "--grad_ckpt" not in said and "--batch_size" not in said
    _, said = fit.while_loading(plan_of(lora_r=0))
    assert said.startswith("By the plan that takes 128.6 GB.") and "(--lora_r 16) (1" in said


@pytest.mark.parametrize("size, said", [(3.6e9, "3.6 GB"), (1e8, "0.1 GB"), (9.9e7, "99 MB")])
def test_sizes_are_told_in_what_a_user_reads(size, said):
    assert fit.gigabytes(size) == said
    assert fit.gigabytes(2e5) == "0.2 MB"


def test_bitsandbytes_is_not_advised_where_there_is_none(monkeypatch):
    monkeypatch.setattr(fit, "has_bitsandbytes", lambda device: False)
    said = fit.account(plan_of(lora_r=0))
    assert "(--lora_r 16)" in said and "adamw8bit" not in said
    said = fit.account(plan_of())
    assert "--quant fp8 (" in said and "nf4" not in said


# --- where an evaluation found no memory ---

LONG = np.full(40, 4097)


def test_an_eager_evaluation_wants_smaller_batches_and_weights():
    """32 of 4,096 tokens: an MLP's three tensors and four of the stream, 2 bytes a number."""
    said = fit.evaluation_account(plan_of(), LONG)
    a_block = 32 * 4096 * (3 * 14336 + 4 * 4096) * 2 / 1e9
    assert f"one block {a_block:.1f} GB" in said
    assert "--batch_size 16 --grad_accum 2 (" in said and "--quant nf4 (" in said
    for flag in ("--grad_ckpt", "--ckpt_blocks", "--optim", "--offload_ckpt"):
        assert flag not in said
    # Half of the last norm's 6 bytes, and of the block.
    saved = float(re.search(r"--grad_accum 2 \(([\d.]+) GB less", said)[1])
    assert saved == pytest.approx((a_block + 32 * 4096 * 4096 * 6 / 1e9) / 2, abs=0.1)


def test_a_compiled_evaluation_is_told_what_it_keeps():
    said = fit.evaluation_account(plan_of(compile=True), LONG)
    kept = 32 * 32 * 4096 * 147_816 / 1e9
    assert float(re.search(r"kept for backward ([\d.]+) GB", said)[1]) == pytest.approx(
        kept, rel=1e-3
    )
    assert "--batch_size 16" in said


def test_the_batches_of_an_evaluation_hold_its_longest_recipe():
    by_tokens = plan_of(of_data={"batch_tokens": 16384}, lengths=np.full(64, 101))
    assert "--batch_tokens 8192 (" in fit.evaluation_account(by_tokens, np.full(4, 4096))
    assert "--batch_tokens" not in fit.evaluation_account(by_tokens, np.array([16000, 10]))
    # One recipe at a time has no smaller batch.
    assert "--batch_size" not in fit.evaluation_account(plan_of(batch_size=1), LONG)


def test_an_evaluation_of_all_logits_is_told_of_chunks():
    said = fit.evaluation_account(plan_of(fused_loss=False), LONG)
    assert "--fused_loss (" in said
    assert "--fused_loss" not in fit.evaluation_account(plan_of(), LONG)


# --- sample.py ---


@pytest.fixture
def folder(tmp_path):
    return make_model(tmp_path / "model")


def test_sampling_on_a_cpu_without_bf16_saves_weights_alone(folder, monkeypatch):
    """The cache of keys and values is in fp32 there, so a 16-bit format takes off half of the weights."""
    monkeypatch.setattr(precision, "has_bf16", lambda device: False)
    cfg = sample.Config(device="cpu", dtype="fp32")
    weights = planner.shape_of(models.read_config(folder)).weights()
    doing, said = fit.while_sampling(folder, cfg, 4)
    assert doing == "while texts were written"
    saved = float(re.search(r"--dtype bf16 \(([\d.]+) MB less\)", said)[1])
    assert saved == pytest.approx(2 * weights / 1e6, abs=0.06)
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    _, said = fit.while_sampling(folder, cfg, 4)
    assert float(re.search(r"--dtype bf16 \(([\d.]+) ", said)[1]) > 1.5 * saved


def test_one_text_has_no_smaller_batch(folder):
    cfg = sample.Config(device="cpu", dtype="fp32")
    assert "--batch_size" not in fit.while_sampling(folder, cfg, 1)[1]
    said = fit.while_sampling(folder, cfg, 16)[1]
    assert "--batch_size 8 (" in said and "--max_new_tokens 200 (" in said


def test_loading_a_base_wants_smaller_weights_alone(folder):
    doing, said = fit.while_a_base_is_loaded(folder, sample.Config(device="cpu", dtype="fp32"))
    weights = planner.shape_of(models.read_config(folder)).weights()
    assert doing == "while the model was loaded"
    assert (
        f"that takes {4 * weights / 1e6:.1f} MB" in said
        or f"that takes {4 * weights / 1e6:.0f} MB" in said
    )
    assert "--dtype bf16 (" in said and "--quant nf4 (" in said
    assert "--batch_size" not in said and "--max_new_tokens" not in said
