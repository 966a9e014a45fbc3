"""The whole run on a tiny model: every flag flipped, every fast path against its slow one, stops, refusals."""

import cli

import functools
import gc
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import weakref

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import ROOT, made_recipes, make_model, program, write_jsonl
from safetensors.torch import load_file

import data
import generate
import job as jobs
import lora
import model as models
import quality
import quant
import text
import train
from files import weights
from recipes import Rules
from speed import checkpoint, compiled, loss, offload, optim, precision


@pytest.fixture
def base(tiny_model, tiny_recipes, tmp_path):
    """Flags of a run that takes a second."""
    return [
        "--model",
        tiny_model,
        "--data",
        tiny_recipes,
        "--cache",
        tmp_path / "cache",
        "--val_recipes",
        8,
        "--max_steps",
        6,
        "--eval_every",
        3,
        "--lr",
        "5e-3",
        "--warmup_steps",
        2,
        "--batch_size",
        8,
        "--dtype",
        "fp32",
        "--device",
        "cpu",
    ]


def in_a_run(monkeypatch, name, function):
    """Replace a function of job.py, which the loop of train.py calls by the name that it imported."""
    monkeypatch.setattr(jobs, name, function)
    monkeypatch.setattr(train, name, function, raising=False)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run train.py in this process as a user would: (exit code, stdout, stderr)."""

    write_recipe = jobs.write_recipe

    def call(*args, recipes=False):
        """recipes: write them, too, which is slow, and test_sample.py's business"""
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
        wanted = write_recipe if recipes else lambda *_: print("a recipe")
        monkeypatch.setattr(jobs, "write_recipe", wanted)
        with pytest.raises(SystemExit) as stop:
            cli.run(train.main)
        said = capsys.readouterr()
        return stop.value.code, said.out, said.err

    return call


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    return [line["loss"] for line in metrics(out) if line["loss"] is not None]


def essence(out):
    """What must be the same bit for bit in a run that was stopped and resumed."""
    return [
        {k: line.get(k) for k in ("step", "loss", "lr", "grad_norm", "target_tokens", "val_loss")}
        for line in metrics(out)
    ]


def ok(result):
    code, out, err = result
    assert code == 0, err
    return out


def test_a_run_learns_and_leaves_what_the_design_promises(base, tmp_path):
    """One run as a user starts it: recipe before, recipe after, one JSON line; the loss falls; the folder is whole."""
    out = tmp_path / "out"
    done = program("train.py", *base, "--out", out)
    last = json.loads(done.stdout.splitlines()[-1])
    assert set(last) == {
        "steps",
        "val_loss_before",
        "val_loss_after",
        "bad_steps",
        "tokens_per_s",
        "peak_mem_gb",
    }
    assert last["bad_steps"] == 0
    assert last["steps"] == 6 and last["val_loss_after"] < last["val_loss_before"] - 0.3
    assert [line["step"] for line in metrics(out)] == list(range(7))
    assert [line["step"] for line in metrics(out) if "val_loss" in line] == [0, 3, 6]
    for name in (
        "adapter_model.safetensors",
        "adapter_config.json",
        "best/adapter_model.safetensors",
        "run.json",
        "curve.png",
        "state.safetensors",
        "state.json",
    ):
        assert (out / name).stat().st_size > 0, name
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.rglob("*.part"))
    assert json.loads((out / "run.json").read_text())["config"]["lr"] == 5e-3
    assert "config" in done.stderr and "check" in done.stderr


@pytest.mark.parametrize(
    "flags",
    [
        ["--attn", "naive"],
        ["--no-fused_loss"],
        ["--grad_ckpt"],
        ["--grad_ckpt", "--offload_ckpt"],
        ["--grad_ckpt", "--ckpt_blocks", 1, "--offload_ckpt"],
        ["--cuda_graph"],  # on a CPU its padding and its accumulation
        ["--cuda_graph", "--no-fused_loss"],
        ["--cuda_graph", "--batch_size", 2, "--grad_accum", 4],
        ["--batch_size", 4, "--grad_accum", 2],
        ["--batch_size", 2, "--grad_accum", 4],
        pytest.param(["--compile"], marks=pytest.mark.slow),
        pytest.param(["--compile", "--grad_ckpt"], marks=pytest.mark.slow),
        pytest.param(["--compile", "--grad_ckpt", "--offload_ckpt"], marks=pytest.mark.slow),
        pytest.param(["--compile", "--grad_ckpt", "--ckpt_blocks", 1], marks=pytest.mark.slow),
        pytest.param(
            ["--compile", "--grad_ckpt", "--ckpt_blocks", 1, "--offload_ckpt"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--compile", "--grad_ckpt", "--ckpt_blocks", 1, "--cuda_graph"], marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_a_fast_path_gives_the_losses_of_the_slow_one(base, run, tmp_path, flags):
    ok(run(*base, "--out", tmp_path / "a"))
    ok(run(*base, "--out", tmp_path / "b", *flags))
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=1e-5)
    a, b = (load_file(tmp_path / x / "adapter_model.safetensors") for x in "ab")
    for name in a:
        assert (a[name] - b[name]).norm() <= 1e-3 * a[name].norm() + 1e-6, name


def test_accumulation_is_the_gradient_of_one_larger_batch(base, run, tmp_path, monkeypatch):
    """1 x 8 and 8 x 1 at the first step, with very different numbers of target tokens in the micro-batches."""
    norms = []
    monkeypatch.setattr(
        optim,
        "check_gradients",
        lambda m, params, reached: norms.append([p.grad.clone() for p in params.values()]),
    )
    for n, flags in enumerate((["--batch_size", 8], ["--batch_size", 1, "--grad_accum", 8])):
        ok(
            run(
                *base,
                "--out",
                tmp_path / str(n),
                "--batching",
                "random",
                "--mask_prompt",
                "--max_steps",
                1,
                *flags,
            )
        )
    largest = max(g.abs().max() for g in norms[0])
    for a, b in zip(*norms, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5 * float(largest))


def test_held_out_loss_is_the_same_in_batches_and_one_by_one(base, run, tmp_path):
    """Padding changes nothing: the loss of each recipe alone, in sorted batches, and by a token budget."""
    seen = []
    for n, flags in enumerate((["--batch_size", 1], ["--batch_size", 8], ["--batch_tokens", 900])):
        ok(run(*base, "--out", tmp_path / str(n), "--max_steps", 1, *flags))
        seen.append(metrics(tmp_path / str(n))[0]["val_loss"])
    assert seen == pytest.approx([seen[0]] * 3, rel=1e-5)


def test_the_loss_that_is_logged_is_transformers_loss(
    base, run, tmp_path, tiny_model, tiny_recipes
):
    """Step 0's val_loss against LlamaForCausalLM on the same recipes, each alone, weighted by target tokens."""
    from transformers import LlamaForCausalLM

    ok(run(*base, "--out", tmp_path / "out", "--max_steps", 1))
    reference = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    cfg = data.Data(
        model=str(tiny_model),
        data=[str(tiny_recipes)],
        val_recipes=8,
        cache=str(tmp_path / "cache"),
    )
    _, held, _ = data.prepare(cfg, Rules(), tiny_model)
    total = count = 0
    for i in held.indices:
        ids = torch.tensor(held.ids(i))[None]
        with torch.no_grad():
            total += reference(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert metrics(tmp_path / "out")[0]["val_loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        ["--lora_r", 0],
        ["--lora_targets", "q_proj,v_proj"],
        ["--rslora"],
        ["--lora_dropout", 0.2],
        ["--mask_prompt"],
        ["--no-clean"],
        ["--batching", "random"],
        ["--batch_tokens", 600],
        ["--dtype", "bf16"],
        ["--dtype", "bf16", "--lora_r", 0],
        ["--grad_clip", 0],
        ["--weight_decay", 0.1],
        ["--max_steps", 0, "--epochs", 1],
        ["--seed", 7],
        ["--save_every", 2],
        ["--max_len", 200],
        ["--lora_alpha", 8],
        ["--optim", "adamw"],
        ["--optim", "adamw8bit"],
        ["--optim", "paged_adamw8bit"],
        ["--optim", "adamw8bit", "--lora_r", 0],
        ["--quant", "nf4"],
        ["--quant", "fp8"],
        ["--quant", "nf4", "--fp8"],
        ["--quant", "fp8", "--fp8", "--grad_ckpt", "--offload_ckpt"],
        ["--fp8", "--lora_targets", "q_proj,up_proj"],
        ["--dtype", "fp16"],
        ["--dtype", "fp16", "--cuda_graph"],
        ["--dtype", "fp16", "--quant", "nf4", "--no-fused_loss"],
        ["--attn", "cudnn"],
        pytest.param(
            ["--quant", "nf4", "--fp8", "--compile", "--grad_ckpt", "--ckpt_blocks", 1],
            marks=pytest.mark.slow,
        ),
        pytest.param(["--quant", "nf4", "--dtype", "fp16", "--compile"], marks=pytest.mark.slow),
        pytest.param(
            ["--compile", "--grad_ckpt", "--ckpt_blocks", 1, "--lora_dropout", 0.2],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--compile", "--grad_ckpt", "--ckpt_blocks", 1, "--lora_r", 0], marks=pytest.mark.slow
        ),
        pytest.param(
            ["--compile", "--grad_ckpt", "--ckpt_blocks", 1, "--batching", "packed"],
            marks=pytest.mark.slow,
        ),
        ["--allow_bad", 0.5],
    ],
    ids=str,
)
def test_each_flag_runs_and_learns(base, run, tmp_path, flags):
    out = tmp_path / "out"
    last = json.loads(ok(run(*base, "--out", out, *flags)).splitlines()[-1])
    assert last["val_loss_after"] < last["val_loss_before"]


def test_a_run_of_all_weights_can_be_read_by_transformers(base, run, tmp_path):
    from transformers import LlamaForCausalLM

    ok(run(*base, "--out", tmp_path / "out", "--lora_r", 0))
    trained = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(
        trained.model.layers[0].mlp.up_proj.weight, saved["model.layers.0.mlp.up_proj.weight"]
    )


@pytest.fixture(scope="session")
def untied_model(tmp_path_factory):
    """tiny_model with a head of its own."""
    from safetensors.torch import save_file

    folder = make_model(tmp_path_factory.mktemp("model") / "untied", tie_word_embeddings=False)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_an_embedding_in_host_memory_changes_nothing(base, run, tmp_path, untied_model):
    for name, flags in (("a", []), ("b", ["--offload_embed"])):
        ok(run(*base, "--model", untied_model, "--out", tmp_path / name, *flags))
    assert losses(tmp_path / "b") == losses(tmp_path / "a")


@pytest.mark.parametrize(
    "flags, wanted",
    [
        ([], [3, 2, 1]),
        (["--ckpt_blocks", 1], [1]),
        pytest.param(["--compile"], [3, 2, 1], marks=pytest.mark.slow),
        pytest.param(["--compile", "--ckpt_blocks", 1], [1], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_each_half_of_a_block_but_the_first_sends_its_input_away_and_back(
    base, run, tmp_path, monkeypatch, flags, wanted
):
    seen = []
    fetch = offload.Offloader.fetch

    def watched(self, number, shape):
        seen.append(number)
        return fetch(self, number, shape)

    monkeypatch.setattr(offload.Offloader, "fetch", watched)
    ok(
        run(
            *base,
            "--out",
            tmp_path / "out",
            "--grad_ckpt",
            "--offload_ckpt",
            "--max_steps",
            1,
            *flags,
        )
    )
    assert seen == wanted


def test_offloaded_inputs_are_not_held_by_anything_else(tmp_path):
    """After a forward pass no input of half a block is alive but the first, which is a leaf: autograd keeps leaves."""
    import weakref

    make_linear = quant.make_linear("none")
    model = models.load(make_model(tmp_path / "m", layers=4), make_linear=make_linear)
    lora.adapt(model, 4, 8)
    places = models.places(model, range(4), halves=True)
    checkpoint.apply(places, random=False)
    offload.apply(places, torch.device("cpu"))
    inputs = []
    for parent, name in places:
        getattr(parent, name).register_forward_pre_hook(
            lambda _, args: inputs.append(weakref.ref(args[0]))
        )
    h = model(torch.arange(40)[None])
    assert [ref() is not None for ref in inputs] == [True] + [False] * 7, "still held"
    h.sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, blocks",
    [
        (["--grad_ckpt"], 1),
        (["--grad_ckpt", "--offload_ckpt"], 2),
        ([], 1),
        (["--grad_ckpt", "--ckpt_blocks", 1], 2),
        (["--grad_ckpt", "--ckpt_blocks", 1, "--offload_ckpt"], 3),
        (["--grad_ckpt", "--ckpt_blocks", 1, "--lora_dropout", 0.1], 1),
    ],
)
def test_training_and_evaluation_share_the_graphs_of_a_block(base, run, tmp_path, flags, blocks):
    """One of a block (or of each half) and of a block that recomputes nothing, and one of a chunk of the loss with
    gradients and perhaps one without. Where torch.utils.checkpoint recomputes, all blocks are compiled alike."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    code, _, err = run(*base, "--out", tmp_path / "out", "--compile", *flags)
    graphs = int(re.search(r"(\d+) graphs, 0 of them after step", err)[1])
    assert code == 0 and blocks + 1 <= graphs <= blocks + 2


def test_an_overflow_in_fp16_is_skipped_once_and_training_goes_on(base, run, tmp_path, monkeypatch):
    """A planted overflow at step 3: the adapter stays as it was, the scale is halved, the next step trains."""
    adapters = []
    calls = []
    clip = optim.clip

    def plant(trained, loss_scale, grad_clip):
        calls.append(loss_scale)
        if len(calls) == 3:
            trained[0].grad[5] = float("inf")
        return clip(trained, loss_scale, grad_clip)

    monkeypatch.setattr(optim, "clip", plant)
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *a: (adapters.append(1), step(self, *a))[1]
    )
    code, out, err = run(*base, "--dtype", "fp16", "--out", tmp_path / "out")
    assert code == 0, err
    assert (
        err.count("is skipped") == 1 and "step 3 is skipped, the loss scale halved to 32768" in err
    )
    assert len(adapters) == 5
    assert calls == [65536.0] * 3 + [32768.0] * 3
    assert [line["grad_norm"] is None for line in metrics(tmp_path / "out")[1:]] == [
        i == 2 for i in range(6)
    ]
    assert json.loads((tmp_path / "out" / "state.json").read_text())["loss_scale"] == 32768
    last = json.loads(out.splitlines()[-1])
    assert last["val_loss_after"] < last["val_loss_before"]


def test_a_run_in_fp16_that_stops_before_its_first_step_keeps_its_loss_scale(
    base, run, tmp_path, monkeypatch
):
    evaluate = jobs.evaluate

    def signalled(job):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(job)

    in_a_run(monkeypatch, "evaluate", signalled)
    code, _, err = run(*base, "--dtype", "fp16", "--out", tmp_path / "out")
    assert code == 143, err
    assert json.loads((tmp_path / "out" / "state.json").read_text())["loss_scale"] == 65536
    in_a_run(monkeypatch, "evaluate", evaluate)
    ok(run("--resume", "--out", tmp_path / "out"))
    ok(run(*base, "--dtype", "fp16", "--out", tmp_path / "whole"))
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


def test_fp16_gradients_are_scaled_before_they_are_cast(base, run, tmp_path, monkeypatch):
    """The gradient of a token among thousands, 1 / 8192 and less, would be a subnormal fp16 number, or zero."""
    seen = []

    def watched(*args):
        seen.append(loss.one_chunk(*args))
        return seen[-1]

    monkeypatch.setattr(loss, "chunked", functools.partial(loss.chunked, chunk=watched))
    ok(run(*base, "--dtype", "fp16", "--out", tmp_path / "out", "--max_steps", 1))
    dz = next(dz for _, dz in seen if float(dz.abs().max()) > 1)
    assert dz.dtype == torch.float16 and float((dz == 0).float().mean()) < 0.01


def test_adamw8bit_stays_near_adamw(base, run, tmp_path):
    for kind in ("adamw", "adamw8bit"):
        ok(run(*base, "--out", tmp_path / kind, "--optim", kind))
    assert losses(tmp_path / "adamw8bit") == pytest.approx(losses(tmp_path / "adamw"), rel=2e-3)
    assert losses(tmp_path / "adamw8bit") != losses(tmp_path / "adamw")


def test_val_data_is_what_is_measured(base, run, tmp_path):
    other = write_jsonl(tmp_path / "val.jsonl", made_recipes(12, seed=5))
    ok(run(*base, "--out", tmp_path / "out", "--val_data", other))
    titles = json.loads((tmp_path / "out" / "run.json").read_text())["titles"]
    assert titles and set(titles) <= {r["title"] for r in made_recipes(12, seed=5)}


def test_patience_stops_a_run_that_does_not_get_better(base, run, tmp_path):
    code, out, err = run(
        *base,
        "--out",
        tmp_path / "out",
        "--lr",
        0,
        "--max_steps",
        50,
        "--eval_every",
        1,
        "--patience",
        3,
    )
    assert code == 0 and json.loads(out.splitlines()[-1])["steps"] == 3
    assert "no progress in 3 evaluations" in err


def test_best_is_the_adapter_of_the_best_evaluation(base, run, tmp_path, monkeypatch):
    values = iter([3.0, 1.0, 2.0, 1.5])
    monkeypatch.setattr(train.quality, "held_out_loss", lambda *a: next(values))
    ok(run(*base, "--out", tmp_path / "out", "--eval_every", 2))
    facts = json.loads((tmp_path / "out" / "state.json").read_text())
    assert (facts["best_step"], facts["best_val"], facts["step"]) == (2, 1.0, 6)
    best, last = (
        load_file(tmp_path / "out" / p / "adapter_model.safetensors") for p in ("best", ".")
    )
    assert any(not torch.equal(best[k], last[k]) for k in best)


def test_init_adapter_begins_where_the_other_ended(base, run, tmp_path):
    ok(run(*base, "--out", tmp_path / "a"))
    ok(run(*base, "--out", tmp_path / "b", "--init_adapter", tmp_path / "a"))
    assert metrics(tmp_path / "b")[0]["val_loss"] == metrics(tmp_path / "a")[-1]["val_loss"]


# --- stopping and resuming ---


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    "more",
    [
        ["--lora_dropout", 0.1],
        ["--lora_dropout", 0.1, "--optim", "adamw8bit"],
        ["--cuda_graph"],
    ],
    ids=str,
)
def test_stopped_and_resumed_in_mid_epoch_is_bit_for_bit_the_same_run(
    base, run, tmp_path, monkeypatch, number, code, more
):
    flags = [
        *base,
        "--batch_size",
        3,
        "--grad_accum",
        2,
        "--max_steps",
        12,
        "--eval_every",
        5,
        *more,
    ]
    ok(run(*flags, "--out", tmp_path / "whole"))
    log = train.Run.log

    def log_and_signal(self, line):
        log(self, line)
        if line["step"] == 5:  # an evaluation's step, in the middle of the first epoch (9 steps)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(train.Run, "log", log_and_signal)
    got, _, err = run(*flags, "--out", tmp_path / "cut")
    assert got == code and "--resume" in err
    monkeypatch.setattr(train.Run, "log", log)
    ok(run("--resume", "--out", tmp_path / "cut"))  # its flags come from run.json
    assert essence(tmp_path / "cut") == essence(tmp_path / "whole")
    for name in ("adapter_model.safetensors", "best/adapter_model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def stop_after(monkeypatch, *steps):
    """Send a SIGTERM when one of these steps is logged. -> a function that sends none any more"""
    log = train.Run.log

    def log_and_signal(self, line):
        log(self, line)
        if line["step"] in steps:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train.Run, "log", log_and_signal)
    return lambda: monkeypatch.setattr(train.Run, "log", log)


def test_a_packed_plan_and_a_loss_scale_survive_a_resume(base, run, tmp_path, monkeypatch):
    """Stopped after step 2 of a run in fp16 whose first step overflowed; saved by the clock, too."""
    flags = [*base, "--max_steps", 4, "--eval_every", 4, "--dtype", "fp16", "--batching", "packed"]
    flags += ["--batch_tokens", 300, "--optim", "paged_adamw8bit", "--save_every", "0.001m"]
    for name, stops in (("whole", []), ("cut", [2])):
        with monkeypatch.context() as patch:
            PLANT["gradient"](patch, [1])
            undo = stop_after(patch, *stops)
            how = flags
            if stops:
                assert run(*flags, "--out", tmp_path / name)[0] == 143
                how = ["--resume"]
            undo()
            ok(run(*how, "--out", tmp_path / name))
    assert essence(tmp_path / "cut") == essence(tmp_path / "whole")
    states = [(tmp_path / name / "state.json").read_text() for name in ("cut", "whole")]
    assert states[0] == states[1] and json.loads(states[0])["loss_scale"] == 32768
    name = "adapter_model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_patience_and_best_loss_survive_a_resume(base, run, tmp_path, monkeypatch):
    """Held-out losses 3, 1, 2, 2, 2 …: the third one that is no better ends the run, wherever it was stopped."""
    flags = [*base, "--max_steps", 50, "--eval_every", 2, "--patience", 3]
    for name, stops in (("whole", []), ("cut", [3, 5, 6])):
        values = iter([3.0, 1.0, *[2.0] * 20])
        monkeypatch.setattr(train.quality, "held_out_loss", lambda *a, values=values: next(values))
        undo = stop_after(monkeypatch, *stops)
        how = flags
        for _ in stops:
            assert run(*how, "--out", tmp_path / name)[0] == 143
            how = ["--resume"]
        code, out, err = run(*how, "--out", tmp_path / name)
        undo()
        assert code == 0 and json.loads(out.splitlines()[-1])["steps"] == 8, err
    facts = [json.loads((tmp_path / n / "state.json").read_text()) for n in ("whole", "cut")]
    assert facts[0] == facts[1]
    assert (facts[0]["best_val"], facts[0]["best_step"], facts[0]["without_progress"]) == (1, 2, 3)
    assert essence(tmp_path / "cut") == essence(tmp_path / "whole")


def test_a_run_of_a_version_that_saved_every_so_many_steps_is_resumed(base, run, tmp_path):
    """run.json has a number there; a resume may ask for minutes, and for another --max_bad_steps."""
    out = tmp_path / "out"
    ok(run(*base, "--out", out))
    about = json.loads((out / "run.json").read_text())
    about["config"]["save_every"] = 50
    del about["config"]["max_bad_steps"]
    (out / "run.json").write_text(json.dumps(about))
    ok(run("--resume", "--out", out, "--max_steps", 8))
    assert json.loads((out / "run.json").read_text())["config"]["save_every"] == 50
    ok(run("--resume", "--out", out, "--max_steps", 9, "--save_every", "2m", "--max_bad_steps", 3))
    assert json.loads((out / "state.json").read_text())["step"] == 9


def test_a_killed_run_goes_on_from_its_last_save(base, run, tmp_path):
    """kill -9: no handler runs. Steps after the last save are made again, and stand in metrics.jsonl once."""
    flags = [*base, "--max_steps", 150, "--save_every", 3, "--eval_every", 1000]
    out = tmp_path / "cut"
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *map(str, flags), "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.time() + 120
        while time.time() < deadline and not (
            (out / "metrics.jsonl").exists() and len(metrics_so_far(out)) > 8
        ):
            time.sleep(0.02)
    finally:
        child.kill()
        child.wait()
    stopped = json.loads((out / "state.json").read_text())["step"]
    assert 3 <= stopped < 150
    ok(run("--resume", "--out", out, "--save_every", 1000))
    ok(run(*flags, "--out", tmp_path / "whole"))
    assert [line["step"] for line in metrics(out)] == list(range(151))
    assert essence(out) == essence(tmp_path / "whole")


def metrics_so_far(out):
    return (out / "metrics.jsonl").read_text().splitlines()


def test_a_resume_may_go_further(base, run, tmp_path):
    ok(run(*base, "--out", tmp_path / "out"))
    code, _, err = run("--resume", "--out", tmp_path / "out")
    assert code == 2 and "raise --max_steps" in err
    code, _, err = run("--resume", "--out", tmp_path / "out", "--max_steps", 9)
    assert code == 0 and "the schedule was for 6 steps and is for 9" in err
    assert [line["step"] for line in metrics(tmp_path / "out")] == list(range(10))


def test_a_longer_resume_that_is_stopped_goes_on_as_it_was_asked(base, run, tmp_path, monkeypatch):
    ok(run(*base, "--out", tmp_path / "out"))
    log = train.Run.log
    monkeypatch.setattr(
        train.Run,
        "log",
        lambda self, line: (
            log(self, line),
            line["step"] == 7 and os.kill(os.getpid(), signal.SIGINT),
        ),
    )
    assert run("--resume", "--out", tmp_path / "out", "--max_steps", 12)[0] == 130
    monkeypatch.setattr(train.Run, "log", log)
    ok(run("--resume", "--out", tmp_path / "out"))
    assert [line["step"] for line in metrics(tmp_path / "out")] == list(range(13))


def test_stopped_before_the_first_step_it_starts_over_without_a_trace(
    base, run, tmp_path, monkeypatch
):
    ok(run(*base, "--out", tmp_path / "whole"))
    evaluate = jobs.evaluate
    in_a_run(
        monkeypatch, "evaluate", lambda *a: (os.kill(os.getpid(), signal.SIGINT), evaluate(*a))[1]
    )
    assert run(*base, "--out", tmp_path / "cut")[0] == 130
    in_a_run(monkeypatch, "evaluate", evaluate)
    ok(run("--resume", "--out", tmp_path / "cut"))
    assert essence(tmp_path / "cut") == essence(tmp_path / "whole")
    assert json.loads((tmp_path / "cut" / "state.json").read_text()) == json.loads(
        (tmp_path / "whole" / "state.json").read_text()
    )


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--lr", 1e-3], "--lr"),
        (["--seed", 2], "--seed"),
        (["--batch_size", 5], "--batch_size"),
        (["--lora_r", 8], "--lora_r"),
        (["--mask_prompt"], "--mask_prompt"),
        (["--min_words", 1], "--min_words"),
    ],
    ids=str,
)
def test_a_resume_with_flags_of_another_run_is_refused(base, run, tmp_path, flags, word):
    ok(run(*base, "--out", tmp_path / "out"))
    before = (tmp_path / "out" / "state.safetensors").read_bytes()
    code, _, err = run("--resume", "--out", tmp_path / "out", "--max_steps", 9, *flags)
    assert code == 2 and word in err and "Traceback" not in err
    assert (tmp_path / "out" / "state.safetensors").read_bytes() == before


def test_a_resume_with_another_base_or_heap_is_refused(base, run, tmp_path):
    ok(run(*base, "--out", tmp_path / "out"))
    other = make_model(tmp_path / "other", seed=3)
    code, _, err = run("--resume", "--out", tmp_path / "out", "--max_steps", 9, "--model", other)
    assert code == 2 and "base model" in err
    heap = write_jsonl(tmp_path / "other.jsonl", made_recipes(60, seed=4))
    for flag in ("--data", "--val_data"):
        code, _, err = run("--resume", "--out", tmp_path / "out", "--max_steps", 9, flag, heap)
        assert code == 2 and "the data (or its tokenizer) is not the one" in err
    code, _, err = run(
        "--resume",
        "--out",
        tmp_path / "out",
        "--max_steps",
        9,
        "--device",
        "cpu",
        "--dtype",
        "bf16",
    )
    assert code == 2 and "--dtype" in err


def test_an_old_run_is_renamed_and_kept(base, run, tmp_path):
    ok(run(*base, "--out", tmp_path / "out"))
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    code, _, err = run(*base, "--out", tmp_path / "out", "--seed", 3)
    assert code == 0 and "out.1" in err
    assert (tmp_path / "out.1" / "adapter_model.safetensors").read_bytes() == before


# --- mistakes ---


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--learning_rate", 1], "learning_rate"),
        (["--lr", "fast"], "lr"),
        (["--batch_size", 0], "--batch_size"),
        (["--save_every", "0"], "--save_every 0: give steps or minutes"),
        (["--save_every", "10s"], "--save_every 10s: give steps or minutes"),
        (["--max_bad_steps", 0], "--max_bad_steps"),
        (["--lr", "nan"], "--lr"),
        (["--attn", "quick"], "attn"),
        (["--max_len", 5000], "--max_len"),
        (["--max_len", 20], "max_len"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--data", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--resume"], "--resume"),
        (["--init_adapter", "/nowhere"], "/nowhere"),
        (["--lora_targets", "q_proj,qq"], "qq"),
        (["--device", "gpu"], "gpu"),
        (["--min_words", 10**6], "too_short"),
        (["--batch_tokens", 30], "--batch_tokens"),
        (["--loraX"], "loraX"),
        (["--init_adapter", "/nowhere", "--lora_r", 0], "--lora_r 0"),
        (["--device", "meta"], "meta"),
        (["--quant", "nf4", "--lora_r", 0], "--lora_r 0"),
        (["--fp8", "--lora_r", 0], "--lora_r 0"),
        (["--dtype", "fp16", "--lora_r", 0], "--lora_r 0"),
        (["--offload_ckpt"], "--grad_ckpt"),
        (["--ckpt_blocks", 1], "--grad_ckpt"),
        (["--grad_ckpt", "--ckpt_blocks", -1], "--ckpt_blocks -1"),
        (["--grad_ckpt", "--ckpt_blocks", 3], "--ckpt_blocks 3: this model has 2 blocks"),
        (["--cuda_graph", "--lora_r", 0], "--cuda_graph"),
        (["--cuda_graph", "--lora_dropout", 0.1], "--cuda_graph"),
        (["--cuda_graph", "--grad_ckpt", "--offload_ckpt"], "--cuda_graph"),
        (["--offload_embed"], "--offload_embed"),  # the tiny model's head is its embedding
    ],
    ids=str,
)
def test_a_mistake_gets_one_sentence(base, run, tmp_path, flags, word):
    code, out, err = run(*base, "--out", tmp_path / "out", *flags)
    assert code == 2 and not out
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ") and word in last and "Traceback" not in err


def test_compile_without_a_compiler_is_told(base, run, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    code, _, err = run(*base, "--out", tmp_path / "out", "--compile")
    assert code == 2 and "--compile needs a C++ compiler" in err.splitlines()[-1]


def test_a_card_without_bf16_takes_fp16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    cuda = torch.device("cuda")
    assert precision.pick_dtype("auto", cuda)[:2] == (torch.float16, torch.float16)
    with pytest.raises(cli.UserError, match="Tesla T4 has no bf16; use --dtype fp16"):
        precision.pick_dtype("bf16", cuda)


def test_all_weights_are_not_trained_in_fp16_on_an_older_card(base, run, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "best_dtype", lambda device, native: "fp16")
    code, _, err = run(
        *base, "--out", tmp_path / "out", "--lora_r", 0, "--max_steps", 1, "--dtype", "auto"
    )
    assert code == 0 and "float32 (all weights are trained" in err


def test_the_receipt_of_quantisation_counts_layers_and_bytes(base, run, tmp_path):
    code, _, err = run(*base, "--out", tmp_path / "out", "--quant", "nf4", "--max_steps", 1)
    assert code == 0 and "nf4: 14 layers" in err and "embedding, head and norms stay" in err


def test_a_run_may_not_be_its_own_base(base, run, tmp_path):
    ok(run(*base, "--out", tmp_path / "out", "--lora_r", 0))
    code, _, err = run(*base, "--out", tmp_path / "out", "--model", tmp_path / "out")
    assert code == 2 and "another --out" in err
    ok(
        run(*base, "--out", tmp_path / "two", "--model", tmp_path / "out", "--lora_r", 0)
    )  # and a run can be another's base
    assert json.loads((tmp_path / "two" / "run.json").read_text())["base"] == str(tmp_path / "out")


def test_two_processes_on_one_folder(base, run, tmp_path):
    held = train.Run(tmp_path / "out", resume=False)
    code, _, err = run(*base, "--out", tmp_path / "out")
    assert code == 2 and "another process" in err
    assert held.folder.exists()


def test_a_heap_smaller_than_a_batch_trains_and_says_so(base, run, tmp_path):
    few = write_jsonl(tmp_path / "few.jsonl", made_recipes(5))
    code, _, err = run(*base, "--data", few, "--val_recipes", 2, "--out", tmp_path / "out")
    assert code == 0 and "a step wants 8 recipes and there are 3" in err


# --- steps whose loss or gradient is no number ---


def plant_in_loss(monkeypatch, steps):
    """In these steps the loss of the first micro-batch is nan, and so are its gradients."""
    chunked = loss.chunked
    made = []

    def planted(h, *args, **more):
        total = chunked(h, *args, **more)
        if not h.requires_grad:
            return total
        made.append(1)
        return total * float("nan") if len(made) in steps else total

    monkeypatch.setattr(loss, "chunked", planted)


def plant_in_gradient(monkeypatch, steps):
    """In these steps one number of the gradient is infinite; the loss is not."""
    clip = optim.clip
    made = []

    def planted(trained, *args):
        made.append(1)
        if len(made) in steps:
            trained[0].grad.view(-1)[5] = float("inf")
        return clip(trained, *args)

    monkeypatch.setattr(optim, "clip", planted)


PLANT = {"loss": plant_in_loss, "gradient": plant_in_gradient}


def contents(job):
    """Copies of all that a step may change."""
    weights = [p.detach().clone() for p in job.built.trained]
    states = [
        {k: v.clone() if torch.is_tensor(v) else v for k, v in job.optimizer.state[p].items()}
        for p in job.built.trained
    ]
    return weights, states


def are_same(before, after):
    weights, states = zip(before, after, strict=True)
    for one, other in zip(*states, strict=True):
        assert one.keys() == other.keys() and one
        for key, value in one.items():
            same = torch.equal(value, other[key]) if torch.is_tensor(value) else value == other[key]
            if not same:
                return False
    return all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


@pytest.mark.parametrize("where", PLANT)
@pytest.mark.parametrize(
    "flags",
    [[], ["--optim", "adamw8bit"], ["--cuda_graph"], ["--lora_r", 0], ["--dtype", "fp16"]],
    ids=str,
)
def test_a_bad_step_changes_nothing(base, run, tmp_path, monkeypatch, where, flags):
    """Weights, moments and step counts stay as they are, bit for bit; the next steps train with finite gradients."""
    one_step = train.one_step
    seen = []

    def watched(job, batches, lr):
        before = contents(job)
        loss_now, norm, fate = one_step(job, batches, lr)
        rows = [int(i) for b in batches for i in b.rows]
        is_same = bool(before[1][0]) and are_same(before, contents(job))
        zero = all(p.grad is None or not p.grad.any() for p in job.built.trained)
        seen.append((fate, is_same, zero, rows))
        return loss_now, norm, fate

    monkeypatch.setattr(train, "one_step", watched)
    PLANT[where](monkeypatch, [3])
    code, out, err = run(*base, "--out", tmp_path / "out", *flags)
    assert code == 0, err
    is_overflow = where == "gradient" and "fp16" in flags
    assert [fate for fate, *_ in seen] == [
        *("taken", "taken", "overflow" if is_overflow else "bad", "taken", "taken", "taken")
    ]
    assert [same for _, same, *_ in seen] == [False, False, True, False, False, False]
    assert all(zero for _, _, zero, _ in seen)
    lines = metrics(tmp_path / "out")[1:]
    assert [line["grad_norm"] is None for line in lines] == [i == 2 for i in range(6)]
    assert [line["loss"] is None for line in lines] == [
        i == 2 and where == "loss" for i in range(6)
    ]
    last = json.loads(out.splitlines()[-1])
    assert last["val_loss_after"] < last["val_loss_before"]
    assert last["bad_steps"] == (not is_overflow)
    assert json.loads((tmp_path / "out/summary.json").read_text())["bad_steps"] == last["bad_steps"]
    assert [line.get("bad_rows") for line in lines] == [
        seen[2][3] if i == 2 and not is_overflow else None for i in range(6)
    ]
    if not is_overflow:
        first = ", ".join(str(i) for i in seen[2][3][:8])
        assert re.search(rf"bad step +3 is skipped: loss .* \(recipes {first} …\); 1 in a row", err)
    scale = json.loads((tmp_path / "out/state.json").read_text())["loss_scale"]
    assert scale == (32768 if is_overflow else 65536 if "fp16" in flags else 1)


def test_bad_steps_in_a_row_end_a_run_that_can_go_on(base, run, tmp_path, monkeypatch):
    """Bad are 2, 3, 5, 6, 7: with --max_bad_steps 3 the run ends after step 7. No number of its state is none."""
    out = tmp_path / "out"
    flags = [*base, "--max_steps", 9, "--max_bad_steps", 3, "--eval_every", 5, "--save_every", 100]
    with monkeypatch.context() as patch:
        PLANT["loss"](patch, [2, 3, 5, 6, 7])
        code, said, err = run(*flags, "--out", out)
    assert code == 2 and not said.startswith("{") and "Traceback" not in err
    assert (
        "3 steps in a row had a loss or a gradient that is nan or infinite" in err.splitlines()[-1]
    )
    assert "lower --lr" in err.splitlines()[-1]
    assert "has the state after step 7. Go on with: python train.py --resume" in err
    facts = json.loads((out / "state.json").read_text())
    assert (facts["step"], facts["bad_steps"], facts["bad_in_a_row"]) == (7, 5, 3)
    assert all(t.isfinite().all() for t in load_file(out / "adapter_model.safetensors").values())
    code, said, err = run("--resume", "--out", out)
    assert code == 0 and json.loads(said.splitlines()[-1])["bad_steps"] == 5, err
    assert [line["step"] for line in metrics(out) if line.get("bad_rows")] == [2, 3, 5, 6, 7]


def test_a_run_that_never_makes_a_step_is_not_told_to_lower_its_learning_rate(
    base, run, tmp_path, monkeypatch
):
    PLANT["loss"](monkeypatch, range(1, 20))
    code, _, err = run(*base, "--out", tmp_path / "out", "--max_bad_steps", 4)
    last = err.splitlines()[-1]
    assert code == 2 and "4 steps in a row" in last and "no weight was changed before" in last
    assert "--lr" not in last and len(losses_of_all(tmp_path / "out")) == 4


def losses_of_all(out):
    return [line["loss"] for line in metrics(out)[1:]]


def test_an_overflow_that_no_scale_helps_is_a_bad_step(base, run, tmp_path, monkeypatch):
    """fp16: two overflows halve the scale, then it is below the smallest, and three bad steps end the run."""
    monkeypatch.setattr(precision.LossScale, "SMALLEST", 2.0**15)
    PLANT["gradient"](monkeypatch, range(2, 20))
    flags = ["--dtype", "fp16", "--max_steps", 20, "--max_bad_steps", 3, "--out", tmp_path / "out"]
    code, _, err = run(*base, *flags)
    assert code == 2 and err.count("overflow ") == 2 and err.count("bad step ") == 3
    facts = json.loads((tmp_path / "out/state.json").read_text())
    assert (facts["step"], facts["loss_scale"], facts["bad_steps"]) == (6, 2.0**14, 3)


@pytest.mark.parametrize("save_every, kept", [(100, None), (3, 3)])
def test_a_weight_that_is_no_number_is_never_saved(
    base, run, tmp_path, monkeypatch, save_every, kept
):
    """After step 4 a number of the adapter is nan: each step is bad, and what was saved before stays."""
    out = tmp_path / "out"
    one_step = train.one_step

    def planted(job, *args):
        got = one_step(job, *args)
        if job.facts.step == 3:
            job.built.trained[0].data[7] = float("nan")
        return got

    monkeypatch.setattr(train, "one_step", planted)
    flags = ["--max_steps", 30, "--max_bad_steps", 4, "--save_every", save_every, "--eval_every", 3]
    code, _, err = run(*base, *flags, "--out", out)
    last = err.splitlines()[-1]
    assert code == 2 and "Traceback" not in err
    # At the next save, or when --max_bad_steps are reached.
    at = 6 if kept else 8
    assert re.search(rf"param\..* holds nan or inf after step {at}, so nothing was saved", last)
    assert "bad step     5 is skipped: loss nan" in err
    best = load_file(out / "best/adapter_model.safetensors")
    assert all(t.isfinite().all() for t in best.values())
    if kept is None:
        assert "holds no state to go on from yet" in err
        assert not (out / "adapter_model.safetensors").exists()
        return
    assert f"has the state after step {kept}. Go on with" in err
    adapter = load_file(out / "adapter_model.safetensors")
    assert all(t.isfinite().all() for t in adapter.values())
    monkeypatch.setattr(train, "one_step", one_step)
    ok(run("--resume", "--out", out, "--max_steps", 7))


def test_a_lora_that_gets_no_gradient_is_found(base, run, tmp_path, monkeypatch):
    """The classic: one layer is left out of the graph and nobody notices."""
    project = lora.project
    monkeypatch.setattr(
        lora,
        "project",
        lambda x, layers: project(x, layers) if len(layers) > 1 else [layers[0].base(x)],
    )
    code, _, err = run(*base, "--out", tmp_path / "out")
    assert code == 2 and "o_proj" in err


def with_zeros(folder, part):
    """A model whose weights of this name are zeros."""
    model = make_model(folder)
    tensors = load_file(model / "model.safetensors")
    for name in tensors:
        if part in name:
            tensors[name] = torch.zeros_like(tensors[name])
    safetensors.torch.save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("part", ["v_proj", "o_proj", "down_proj", "up_proj"])
def test_a_model_whose_gradients_are_zeros_in_places_is_trained(base, run, tmp_path, part):
    """Where v or o_proj is zero, q and k get gradients of zeros: autograd reaches them all the same."""
    model = with_zeros(tmp_path / "model", part)
    flags = ["--model", model, "--out", tmp_path / "out", "--lora_r", 2, "--max_steps", 1]
    code, _, err = run(*base, *flags)
    assert code == 0, err
    assert "trained tensors get a gradient" in err
    assert "of these gradients are all zeros at the first step" in err


@pytest.mark.parametrize("part", ["v_proj", "down_proj"])
def test_all_weights_of_such_a_model_are_trained(base, run, tmp_path, part):
    model = with_zeros(tmp_path / "model", part)
    flags = ["--model", model, "--out", tmp_path / "out", "--lora_r", 0, "--max_steps", 1]
    code, _, err = run(*base, *flags)
    assert code == 0, err


def test_a_nan_in_the_backward_of_the_first_step_is_not_called_a_missing_gradient(
    base, run, tmp_path, monkeypatch
):
    """The loss is a number, its gradient is none, as where a square root of 0 is differentiated."""
    chunked = loss.chunked
    monkeypatch.setattr(
        loss, "chunked", lambda h, *a, **k: chunked(h, *a, **k) + (h - h).abs().sqrt().sum()
    )
    in_a_run(monkeypatch, "evaluate", lambda *a: 1.0)
    code, _, err = run(*base, "--out", tmp_path / "out", "--max_bad_steps", 2)
    assert code == 2 and "2 steps in a row had a loss or a gradient that is nan" in err
    assert "no weight was changed before" in err and "lower --lr" not in err


def strict(text):
    """The value of a JSON text; NaN and Infinity are no JSON."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_every_json_of_a_run_whose_held_out_loss_is_no_number_is_json(
    base, run, tmp_path, monkeypatch
):
    monkeypatch.setattr(train.quality, "held_out_loss", lambda *a: float("nan"))
    out = ok(run(*base, "--out", tmp_path / "out"))
    assert strict(out.splitlines()[-1])["val_loss_after"] is None
    for name in ("summary.json", "state.json", "run.json"):
        strict((tmp_path / "out" / name).read_text())
    lines = [strict(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("val_loss", "none") for line in lines][::3] == [None] * 3
    # A nan is never the best, so there is no best/.
    assert not (tmp_path / "out" / "best").exists()


# --- how long a run is ---


@pytest.mark.parametrize(
    "flags, steps, says",
    [
        (["--epochs", 2], 14, "14 steps (all of --epochs 2)"),
        (["--max_steps", 3, "--epochs", 2], 3, "3 steps (as --max_steps says)"),
        (["--max_steps", 0, "--epochs", 2], 14, "14 steps (all of --epochs 2)"),
        (["--max_steps", 0], 7, "7 steps (all of --epochs 1)"),
        ([], 60, "60 steps (neither --max_steps nor --epochs is given)"),
    ],
    ids=str,
)
def test_which_flag_decides_is_said(base, run, tmp_path, flags, steps, says):
    """52 recipes in batches of 8 are 7 steps an epoch."""
    without = base[: base.index("--max_steps")] + base[base.index("--max_steps") + 2 :]
    code, out, err = run(*without, "--eval_every", 100, "--out", tmp_path / "out", *flags)
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["steps"] == steps and says in err


def test_epochs_of_a_resume_decide_over_the_steps_of_before(base, run, tmp_path):
    ok(run(*base, "--max_steps", 2, "--out", tmp_path / "out"))
    code, out, err = run("--resume", "--out", tmp_path / "out", "--epochs", 1)
    assert code == 0 and "7 steps (all of --epochs 1)" in err
    assert "the schedule was for 2 steps and is for 7" in err
    assert json.loads(out.splitlines()[-1])["steps"] == 7
    config = json.loads((tmp_path / "out" / "run.json").read_text())["config"]
    assert (config["max_steps"], config["epochs"]) == (None, 1)


# --- what a run reads, and what it leaves ---


def test_a_base_inside_the_runs_folder_is_not_moved_away(base, run, tmp_path):
    ok(run(*base, "--out", tmp_path / "out", "--lora_r", 0, "--max_steps", 1))
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    flags = ["--model", tmp_path / "out/best", "--out", tmp_path / "out", "--lora_r", 0]
    code, out, err = run(*base, *flags)
    assert code == 2 and not out and "name another --out" in err.splitlines()[-1]
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before
    ok(run(*base, *flags[:2], "--out", tmp_path / "two", "--lora_r", 0, "--max_steps", 1))


def test_an_adapter_in_the_runs_folder_is_read_before_it_is_moved(base, run, tmp_path):
    out = tmp_path / "out"
    ok(run(*base, "--out", out))
    ok(run(*base, "--out", out, "--init_adapter", out / "best"))
    assert metrics(out)[0]["val_loss"] == metrics(tmp_path / "out.1")[-1]["val_loss"]


def test_all_weights_are_saved_as_a_whole_model_even_if_the_base_is_gone(
    base, run, tmp_path, monkeypatch
):
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = make_model(tmp_path / "model")
    before_training = train.before_training

    def base_is_deleted(job):
        for file in model.iterdir():
            file.unlink()
        before_training(job)

    monkeypatch.setattr(train, "before_training", base_is_deleted)
    ok(run(*base, "--model", model, "--out", tmp_path / "out", "--lora_r", 0, "--max_steps", 1))
    for folder in (tmp_path / "out", tmp_path / "out/best"):
        LlamaForCausalLM.from_pretrained(folder)
        assert AutoTokenizer.from_pretrained(folder).eos_token == "</s>"


def test_a_resume_says_which_torch_and_which_program_saved_the_state(
    base, run, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    ok(run(*base, "--out", out))
    code, _, err = run("--resume", "--out", out, "--max_steps", 7)
    assert code == 0 and "losses may differ" not in err
    monkeypatch.setattr(train.disk, "program", lambda: "another")
    code, _, err = run("--resume", "--out", out, "--max_steps", 8)
    assert code == 0 and "is another: losses may differ in their last digits" in err


def test_a_run_of_an_earlier_version_is_resumed(base, run, tmp_path):
    """Its run.json has no id and no hash of the program, its lengths are numbers, its state has neither."""
    out = tmp_path / "out"
    ok(run(*base, "--out", out))
    about = json.loads((out / "run.json").read_text())
    del about["id"], about["versions"]["program"]
    about["config"] |= {"max_steps": 6, "epochs": 1}
    (out / "run.json").write_text(json.dumps(about))
    with safetensors.safe_open(out / "state.safetensors", "pt") as f:
        metadata = {key: f.metadata()[key] for key in ("format", "facts", "scalars", "shapes")}
    tensors = {k: t.clone() for k, t in load_file(out / "state.safetensors").items()}
    safetensors.torch.save_file(tensors, out / "state.safetensors", metadata=metadata)
    code, _, err = run("--resume", "--out", out, "--max_steps", 8)
    assert code == 0 and "torch was an earlier version" in err
    assert [line["step"] for line in metrics(out)] == list(range(9))


def test_names_that_are_no_utf_8_and_home_folders(base, run, tmp_path, monkeypatch, tiny_recipes):
    """A Latin-1 name of --data, and ~ in quotes or behind a =.

    The package safetensors opens no Latin-1 name, so --out and --model are refused."""
    monkeypatch.setenv("HOME", str(tmp_path))
    heap = tmp_path / os.fsdecode(b"rag\xf9.jsonl")
    try:
        heap.write_bytes(tiny_recipes.read_bytes())
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    monkeypatch.setattr(train, "say", lambda *_: None)
    out = "crème"
    flags = ["--data", "~/" + heap.name, f"--out=~/{out}", "--max_steps", 1]
    ok(run(*base, *flags))
    about = json.loads((tmp_path / out / "run.json").read_bytes().decode("utf-8"))
    assert about["config"]["data"] == [str(heap)]
    assert about["config"]["out"] == str(tmp_path / out)
    for name in ("--out", "--data", "--init_adapter", "--model", "--val_data"):
        code, _, err = run(*base, f"{name}=~nobody-here/x")
        assert code == 2 and f"{name} ~nobody-here/x: there is no user" in err


def test_out_of_memory_says_which_flags_help(base, run, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(loss, "chunked", full)
    out = tmp_path / "out"
    # Without an evaluation before, which has the same loss, the first step is the first to run out.
    in_a_run(monkeypatch, "evaluate", lambda job: 1.0)
    code, _, err = run(*base, "--out", out)
    assert code == 2 and "Traceback" not in err
    assert "out of memory while training, with " in err
    assert "By the plan the largest parts are " in err
    assert f"{out} holds no state to go on from yet" in err
    # A model of 0.5 MB: what is saved is told in MB.
    helps = err.partition("In order of gain, these take less: ")[2]
    assert re.search(r"--grad_ckpt \([\d.]+ MB less\)", helps)
    assert re.search(r"--batch_size 4 --grad_accum 2 \([\d.]+ MB less\)", helps)
    gains = [float(size) for size in re.findall(r"\(([\d.]+) MB less\)", helps)]
    assert gains == sorted(gains, reverse=True) and min(gains) > 0


def test_out_of_memory_names_the_last_state_that_is_whole(base, run, tmp_path, monkeypatch):
    made = []
    one_step = train.one_step

    def full_later(*args):
        made.append(args)
        if len(made) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return one_step(*args)

    monkeypatch.setattr(train, "one_step", full_later)
    out = tmp_path / "out"
    code, _, err = run(*base, "--out", out, "--save_every", 2)
    go_on = f"python train.py --resume --out {out}"
    assert code == 2 and f"{out} has the state after step 2. Go on with: {go_on}" in err
    made.clear()
    monkeypatch.setattr(train, "one_step", one_step)
    ok(run("--resume", "--out", out))
    assert [line["step"] for line in metrics(out)] == [0, 1, 2, 3, 4, 5, 6]


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("unable to mmap 9 bytes from file <a>: Cannot allocate memory (12)"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_while_loading_is_a_sentence(base, run, tmp_path, monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(weights, "read", full)
    code, _, err = run(*base, "--out", tmp_path / "out")
    assert code == 2 and "while the model was loaded" in err and "--quant nf4 (" in err
    assert " GB in use. By the plan that takes " in err and "Traceback" not in err
    # Checkpoints save nothing while the model is loaded.
    assert "--dtype bf16 (" in err and "--grad_ckpt" not in err.splitlines()[-1]


def test_out_of_memory_while_a_state_is_loaded_is_a_sentence(base, run, tmp_path, monkeypatch):
    """Of --lora_r 0 the state is three times the weights: these and both of Adam's moments."""
    ok(run(*base, "--out", tmp_path / "out", "--max_steps", 1, "--lora_r", 0))

    def full(*_, **__):
        raise OUT_OF_MEMORY[1]

    monkeypatch.setattr(train.Run, "load_state", full)
    code, _, err = run("--resume", "--out", tmp_path / "out")
    assert code == 2 and "loaded and made ready" in err and "--lora_r 16" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
@pytest.mark.parametrize("when", [1, 2])
def test_out_of_memory_in_an_evaluation_is_a_sentence(
    base, run, tmp_path, monkeypatch, error, when
):
    """In the one before training, and in the first one of the loop."""
    calls = []
    held_out_batches = quality.held_out_batches

    def full_later(*args):
        calls.append(args)
        yield next(held_out_batches(*args))
        if len(calls) == when:
            raise error

    monkeypatch.setattr(quality, "held_out_batches", full_later)
    code, _, err = run(*base, "--out", tmp_path / "out")
    assert code == 2 and "out of memory while the held-out loss was measured" in err
    assert "By the plan the largest parts are" in err and "these take less: " in err
    assert "Traceback" not in err and len(calls) == when
    # The steps before the evaluation are saved, so a resume begins behind them.
    assert ("has the state after step" in err) == (when == 2)


def test_a_tied_head_that_is_stored_and_another_is_refused(base, run, tmp_path):
    model = make_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    safetensors.torch.save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    for rank in (16, 0):
        code, _, err = run(*base, "--model", model, "--out", tmp_path / "out", "--lora_r", rank)
        assert code == 2 and "lm_head.weight differs" in err and "Traceback" not in err


def test_all_weights_with_a_tied_head_that_is_stored_too_are_saved_with_one(base, run, tmp_path):
    """config.json, copied from the base, ties it, so no second head may stand in the run's folder."""
    model = make_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    ok(run(*base, "--model", model, "--out", tmp_path / "out", "--lora_r", 0))
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == tensors.keys() - {"lm_head.weight"}
    assert torch.equal(
        models.load(tmp_path / "out").lm_head.weight, saved["model.embed_tokens.weight"]
    )


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_in_a_recipe_costs_the_recipe_only(base, run, tmp_path, monkeypatch, error):
    """Both recipes fail; the losses are those of a run whose recipes were written, dropout included."""
    flags = [*base, "--lora_dropout", 0.1]
    ok(run(*flags, "--out", tmp_path / "whole", recipes=True))

    def full(*_, **__):
        raise error

    monkeypatch.setattr(quality, "generate", full)
    code, said, err = run(*flags, "--out", tmp_path / "out", recipes=True)
    assert code == 0 and err.count("left out, because memory ran out") == 2
    assert err.count(f"`python sample.py --run {tmp_path / 'out'}` writes one later") == 2
    assert "Traceback" not in err
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    assert json.loads(said.splitlines()[-1])["steps"] == len(losses(tmp_path / "whole"))


def test_nothing_of_a_recipe_that_failed_stays_in_memory(base, run, tmp_path, monkeypatch):
    """The KV cache is free before the evaluation, without a search for cycles."""
    caches = []
    alive = []

    def full(self):
        caches.extend(weakref.ref(cache.k) for cache in self.caches)
        # One of the list above would keep its traceback, and with it the cache.
        raise torch.OutOfMemoryError("CUDA out of memory.")

    evaluate = jobs.evaluate

    def watched(job):
        alive.append(sum(ref() is not None for ref in caches))
        return evaluate(job)

    monkeypatch.setattr(generate.Engine, "step", full)
    in_a_run(monkeypatch, "evaluate", watched)
    gc.disable()
    try:
        ok(run(*base, "--out", tmp_path / "out", "--max_steps", 1, recipes=True))
    finally:
        gc.enable()
    assert caches and alive[0] == 0


def test_an_error_that_is_not_about_memory_is_not_called_that(base, run, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(quality, "generate", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run(*base, "--out", tmp_path / "out", recipes=True)


def test_a_recipe_is_on_stdout_token_by_token(base, run, tmp_path, monkeypatch):
    """What has been printed grows while the recipe is written."""
    seen = []
    add = generate.Stream.add

    def watched(self, token):
        add(self, token)
        seen.append(sys.stdout.getvalue())

    monkeypatch.setattr(generate.Stream, "add", watched)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    run(*base, "--out", tmp_path / "out", "--max_steps", 1, recipes=True)
    assert len(set(seen[:20])) > 10


def test_a_full_disk_keeps_the_last_state(base, run, tmp_path, monkeypatch):
    """The second save fails half-way: the first is still whole, and a resume goes on from it."""
    save_file, calls = safetensors.torch.save_file, []

    def full_later(tensors, path, metadata=None):
        calls.append(path)
        if len(calls) > 4:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", full_later)
    code, _, err = run(*base, "--out", tmp_path / "out", "--save_every", 2, "--eval_every", 100)
    assert code == 1 and "No space left" in err and "Traceback" not in err
    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    assert not list((tmp_path / "out").rglob("*.part"))
    ok(run("--resume", "--out", tmp_path / "out", "--save_every", 50))


# ---- packed rows ----------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tiny_model, tmp_path):
    """24 recipes of very different lengths."""
    file = write_jsonl(tmp_path / "r.jsonl", made_recipes(24))
    cfg = data.Data(data=[str(file)], cache=str(tmp_path), clean=False)
    source = text.TokenFile(text.tokenise([file], cfg, None, text.Text(tiny_model)))
    return data.Dataset(source, source.rows, source.account, np.arange(len(source.rows)))


def recipe_losses(model, dataset, batches, budget):
    """{recipe: mean loss of its targets} of batches, whatever their layout."""
    found = {}
    for rows in batches:
        batch = data.collate(dataset, rows, False, budget)
        h = model(batch.ids, cu_seqlens=batch.cu_seqlens).flatten(0, 1)[batch.where]
        each = F.cross_entropy(F.linear(h, model.lm_head.weight), batch.targets, reduction="none")
        counts = [len(dataset.recipe(i)[1]) for i in rows]
        for i, part in zip(rows, each.split(counts), strict=True):
            found[int(i)] = part.mean().item()
    return found


@pytest.mark.parametrize("attn", ["naive", "flash"])
@torch.no_grad()
def test_packed_sorted_and_alone_every_recipe_has_the_same_loss(tiny_model, dataset, attn):
    model = models.load(tiny_model, attn=attn)
    lengths = dataset.lengths(slice(None))
    alone = recipe_losses(model, dataset, [[i] for i in range(24)], 0)
    for batching, budget in (("sorted", 0), ("packed", 1024)):
        cfg = data.Data(batching=batching, batch_size=5, batch_tokens=budget)
        batches = [b for step in data.plan(lengths, cfg, 0) for b in step]
        each = recipe_losses(model, dataset, batches, cfg.budget)
        assert each == pytest.approx(alone, rel=1e-5)


@torch.no_grad()
def test_a_neighbours_tokens_do_not_change_a_packed_recipe_at_all(tiny_model, dataset):
    model = models.load(tiny_model)
    batch = data.collate(dataset, [3, 5, 8], False, 1024)
    first, second = (int(dataset.rows["length"][i]) - 1 for i in (3, 5))
    before = model(batch.ids, cu_seqlens=batch.cu_seqlens)
    batch.ids[0, :first] = (batch.ids[0, :first] + 7) % 256
    batch.ids[0, first + second :] = (batch.ids[0, first + second :] + 7) % 256
    after = model(batch.ids, cu_seqlens=batch.cu_seqlens)
    assert torch.equal(before[0, first : first + second], after[0, first : first + second])
    assert not torch.equal(before[0, :first], after[0, :first])


def test_a_packed_run_trains(base, run, tmp_path):
    flags = (*base, "--batching", "packed", "--batch_tokens", 1024, "--out", tmp_path / "packed")
    code, _, err = run(*flags)
    assert code == 0, err
    assert "packed" in err and "by a mask" in err
    before, *lines = metrics(tmp_path / "packed")
    assert (
        min(line["padding"] for line in lines) < 0.2 and lines[-1]["val_loss"] < before["val_loss"]
    )
    code, _, err = run(*flags[:-1], tmp_path / "graph", "--cuda_graph")
    assert code == 0, err
    assert losses(tmp_path / "graph") == pytest.approx(losses(tmp_path / "packed"), rel=1e-5)
