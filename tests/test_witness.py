"""Each flag does what it says: a fact that only its path makes, seen from outside the program.

`runs` trains a tiny model for three steps as a user would and watches what torch is asked to do: the operators that it
runs, the tensors that autograd keeps, the files that are written. A run is made once and shared. An equality of losses
alone would hold as well if the flag did nothing, so each one stands beside such a fact.
The name of a test holds the flags that it is about: tests/mutations.py finds it by them.
"""

import cli

import contextlib
import io
import json
import os
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from conftest import made_recipes, make_model, write_jsonl
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import job
import sample
import train

STEPS, LAYERS, CHANNELS, BATCH = 3, 2, 64, 4
SDPA = "_scaled_dot_product"


# --- a run, watched ---


def call_program(patch, program, argv):
    """The exit code of a program with these arguments. The only place that knows names inside the programs."""
    patch.setattr(sys, "argv", [f"{program.__name__}.py", *argv])
    # The two recipes of a run are the business of test_sample.py, and slow.
    patch.setattr(job, "write_recipe", lambda *_, **__: None)
    with pytest.raises(SystemExit) as stop:
        cli.run(program.main)
    return stop.value.code


Op = namedtuple("Op", "name inputs shape dtype training cudnn flash")


class Operators(TorchDispatchMode):
    """Every operator that torch runs below autograd, recomputations of a backward pass included."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = [(tuple(x.shape), x.dtype) for x in tree_leaves(args) if torch.is_tensor(x)]
        first = next((x for x in tree_leaves(out) if torch.is_tensor(x)), None)
        shape = None if first is None else tuple(first.shape)
        dtype = None if first is None else first.dtype
        kernels = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()
        self.ops.append(Op(str(func), inputs, shape, dtype, torch.is_grad_enabled(), *kernels))
        return out


class ToHost(TorchFunctionMode):
    """Counts how often a tensor of a given shape is asked to lie in host memory."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("cpu", "to", "pin_memory") and tuple(args[0].shape) == self.shape:
            where = [*map(str, args[1:]), str((kwargs or {}).get("device"))]
            self.count += name != "to" or "cpu" in where
        return func(*args, **(kwargs or {}))


class Run(SimpleNamespace):
    """What a run said, wrote and asked of torch: code, out, err, folder, ops, kept, files, to_host."""

    def read(self, name):
        return json.loads((self.folder / name).read_text())

    def tensors(self, name="adapter_model.safetensors"):
        return load_file(self.folder / name)

    @property
    def lines(self):
        return [json.loads(t) for t in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def column(self, key):
        """A column of metrics.jsonl, steps 1, 2, …"""
        return [line[key] for line in self.lines[1:]]

    @property
    def losses(self):
        return self.column("loss")

    @property
    def val_losses(self):
        return {line["step"]: line["val_loss"] for line in self.lines if "val_loss" in line}

    def count(self, word, **facts):
        """How many operators have this word in their name, and these facts."""
        named = [op for op in self.ops if word in op.name]
        return sum(all(getattr(op, k) == v for k, v in facts.items()) for op in named)

    @property
    def batches(self):
        """[B, T] of the ids of each micro-batch that was trained on: what the embedding was asked for."""
        embedded = [op for op in self.ops if "embedding.default" in op.name and op.training]
        return [op.shape[:2] for op in embedded]


@pytest.fixture(scope="session")
def tiny(tiny_model, tmp_path_factory):
    """Files that the runs share: two models, recipes to train on and others to measure on."""
    folder = tmp_path_factory.mktemp("witness")
    untied = make_model(folder / "untied", tie_word_embeddings=False)
    weights = load_file(untied / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    safetensors.torch.save_file(weights, untied / "model.safetensors")
    return SimpleNamespace(
        folder=folder,
        model=tiny_model,
        untied=untied,
        vocab=json.loads((tiny_model / "config.json").read_text())["vocab_size"],
        data=write_jsonl(folder / "recipes.jsonl", made_recipes(60)),
        other=write_jsonl(folder / "other.jsonl", made_recipes(20, seed=5)),
    )


class Runs:
    """runs(flag, value, …) -> Run. The same flags are the same run, made once."""

    def __init__(self, tiny):
        self.tiny, self.made = tiny, {}

    def __call__(self, *flags, watch=True, fails=False):
        flags = tuple(map(str, flags))
        if flags not in self.made:
            self.made[flags] = self.train(flags, self.tiny.folder / f"run{len(self.made)}", watch)
        run = self.made[flags]
        assert fails or run.code == 0, run.err
        return run

    def base(self, folder):
        flags = {
            "model": self.tiny.model,
            "data": self.tiny.data,
            "cache": self.tiny.folder / "cache",
            "out": folder,
            "val_recipes": 8,
            "max_steps": STEPS,
            "eval_every": STEPS,
            "lr": 1e-2,
            "warmup_steps": 1,
            "batch_size": BATCH,
            "dtype": "fp32",
            "device": "cpu",
        }
        return [str(x) for flag, value in flags.items() for x in (f"--{flag}", value)]

    def train(self, flags, folder, watch):
        argv = [*self.base(folder), *flags]
        if "--out" in flags:
            folder = Path(flags[flags.index("--out") + 1])
        return watch_program(train, argv, folder, (self.tiny.vocab, CHANNELS), watch)


def watch_program(program, argv, folder, embedding, watch=True):
    """Run a program in this process. -> Run"""
    out, err = io.StringIO(), io.StringIO()
    operators, host = Operators(), ToHost(embedding)
    kept, files = [], []
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        note_files(patch, files)
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        if watch:
            for mode in (operators, host, kept_for_backward(kept)):
                stack.enter_context(mode)
        code = call_program(patch, program, argv)
    said = {"out": out.getvalue(), "err": err.getvalue()}
    seen = {"ops": operators.ops, "kept": kept, "files": files, "to_host": host.count}
    return Run(code=code, folder=folder, **said, **seen)


def kept_for_backward(found):
    """Append (shape, bytes) of each tensor that autograd keeps; what a checkpoint keeps apart is not seen."""

    def note(t):
        found.append((tuple(t.shape), t.nbytes))
        return t

    return torch.autograd.graph.saved_tensors_hooks(note, lambda t: t)


def note_files(patch, names):
    """Append the name of each safetensors file that is written, and draw no curve, which is half of a run's time."""
    write = safetensors.torch.serialize_file

    def write_and_note(tensors, path, *args, **kwargs):
        names.append(os.path.basename(path))
        return write(tensors, path, *args, **kwargs)

    patch.setattr(safetensors.torch, "serialize_file", write_and_note)
    patch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).touch())


@pytest.fixture(scope="session")
def runs(tiny):
    return Runs(tiny)


def same_losses(a, b, rel=1e-5):
    """DESIGN's tolerance of a fast path against the slow one."""
    return a.losses == pytest.approx(b.losses, rel=rel)


def close_but_other(a, b, most):
    """Losses of another arithmetic: not the same numbers, and not far from them."""
    apart = [abs(x - y) for x, y in zip(a.losses, b.losses, strict=True)]
    return 0 < max(apart) < most


def other_bits(a, b):
    return any(not torch.equal(x, b.tensors()[name]) for name, x in a.tensors().items())


# --- speed and memory ---


def test_attn_naive_holds_the_scores_and_flash_does_not(runs):
    flash, naive = runs(), runs("--attn", "naive")
    assert same_losses(naive, flash)
    passes = flash.count("embedding.default") * LAYERS
    assert flash.count(SDPA) > passes - 1 and flash.count("_softmax.default") == 0
    assert naive.count(SDPA) == 0 and naive.count("aten._softmax.default") == passes
    scores = [op.shape for op in naive.ops if "aten._softmax.default" in op.name]
    assert all(len(s) == 4 and s[2] == s[3] for s in scores)
    assert other_bits(naive, flash), "two ways of summing differ in the last bits"


def test_attn_cudnn_asks_for_the_kernels_of_cudnn(runs):
    """The choice between the two kernels is visible on any machine; test_gpu.py sees the kernel."""
    for name, cudnn in (("flash", False), ("cudnn", True)):
        asked = {
            (op.cudnn, op.flash)
            for op in runs("--attn", name, "--max_steps", 1).ops
            if "silu.default" in op.name
        }
        assert asked == {(cudnn, not cudnn)}, name


def test_fused_loss_keeps_no_logits_for_backward(runs, tiny):
    fused, plain = runs(), runs("--no-fused_loss")
    assert same_losses(plain, fused)
    held = [
        [shape for shape, _ in run.kept if shape[-1:] == (tiny.vocab,)] for run in (fused, plain)
    ]
    assert not held[0]
    assert len(held[1]) >= STEPS
    assert plain.count("nll_loss_forward") and not fused.count("nll_loss")


def kept_bytes(run):
    return sum(nbytes for _, nbytes in run.kept)


def test_grad_ckpt_computes_each_block_again_and_keeps_little(runs):
    plain, again = runs(), runs("--grad_ckpt")
    assert same_losses(again, plain)
    twice = STEPS * LAYERS
    assert again.count("silu.default") == plain.count("silu.default") + twice
    assert kept_bytes(again) < 0.3 * kept_bytes(plain)


def test_ckpt_blocks_recompute_the_first_blocks_only(runs):
    """Of two blocks the first: one block's SwiGLU a step is computed again, half of the memory is given up."""
    plain, every, one = runs(), runs("--grad_ckpt"), runs("--grad_ckpt", "--ckpt_blocks", 1)
    assert same_losses(one, plain)
    assert one.count("silu.default") == plain.count("silu.default") + STEPS
    assert 2 * kept_bytes(one) == kept_bytes(plain) + kept_bytes(every)


def copies(run):
    """Copies of an input of half a block, [B, T, C]."""
    shapes = [op.shape for op in run.ops if "aten.copy_.default" in op.name]
    return sum(len(shape) == 3 and shape[2] == CHANNELS for shape in shapes)


def test_offload_ckpt_sends_the_inputs_of_half_blocks_away_and_back(runs):
    """Of four halves three inputs go, since the first is a leaf; the last is still here when it is wanted."""
    plain, here, away = runs(), runs("--grad_ckpt"), runs("--grad_ckpt", "--offload_ckpt")
    assert same_losses(away, plain)
    assert copies(here) == 0
    assert copies(away) == STEPS * (3 + 2)
    assert away.count("silu.default") == here.count("silu.default")


def test_offload_embed_puts_the_embedding_into_host_memory(runs, tiny):
    here = runs("--model", tiny.untied)
    away = runs("--model", tiny.untied, "--offload_embed")
    assert away.losses == here.losses
    assert away.to_host > here.to_host


def test_cuda_graph_pads_to_few_shapes(runs):
    """The graphs are a card's (test_gpu.py); what every machine shows is the padding that makes shapes few."""
    eager, graphs = runs(), runs("--cuda_graph")
    assert same_losses(graphs, eager)
    assert any(T % 8 for _, T in eager.batches)
    assert not any(T % 8 for _, T in graphs.batches)
    assert len(graphs.batches) == STEPS


def test_compile_makes_graphs_and_changes_no_loss(runs):
    """The one compiled run that is not slow: two layers that share a graph, two steps, an evaluation at either end."""
    flags = ["--lora_targets", "o_proj", "--lora_r", 4, "--max_steps", 2, "--eval_every", 2]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager = runs(*flags)
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled = runs(*flags, "--compile", watch=False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    assert same_losses(compiled, eager)
    assert other_bits(compiled, eager), "fused sums differ in the last bits"


def states(run):
    """The optimiser's states on disk, by what they hold."""
    tensors = run.tensors("state.safetensors")
    return {name.split(".", 2)[2]: t for name, t in tensors.items() if name.startswith("optim.")}


@pytest.mark.parametrize("optim", ["adamw8bit", "paged_adamw8bit"])
def test_optim_keeps_its_states_in_eight_bits(runs, optim):
    whole, small = runs(), runs("--optim", optim)
    assert close_but_other(small, whole, 0.01)
    assert states(whole)["exp_avg"].dtype == torch.float32
    assert states(small)["state1"].dtype == torch.uint8
    assert ("unpaged" in small.err) == (optim == "paged_adamw8bit")
    assert small.count("optimizer_update_8bit") == STEPS


def test_grad_accum_is_the_gradient_of_a_larger_batch(runs):
    one = runs()
    many = runs("--batch_size", 1, "--grad_accum", BATCH)
    assert same_losses(many, one)
    assert many.column("grad_norm") == pytest.approx(one.column("grad_norm"), rel=1e-4)
    assert many.column("target_tokens") == one.column("target_tokens")
    assert [B for B, _ in one.batches] == [BATCH] * STEPS
    assert [B for B, _ in many.batches] == [1] * STEPS * BATCH


@pytest.mark.parametrize("quant", ["nf4", "fp8"])
def test_quant_keeps_the_frozen_weights_small(runs, quant):
    whole, small = runs(), runs("--quant", quant)
    assert close_but_other(small, whole, 0.3)
    products = (
        STEPS * LAYERS * 7 * 2
    )  # forward and backward of the seven layers, less the first block's q, k and v
    if quant == "nf4":
        assert small.count("bitsandbytes.quantize_4bit") == LAYERS * 7
        assert small.count("bitsandbytes.dequantize_4bit") >= products - 3 * STEPS
        assert not whole.count("bitsandbytes")
    else:
        read = [op for op in small.ops if (op.inputs or [(0, 0)])[0][1] == torch.float8_e4m3fn]
        assert len(read) >= products - 3 * STEPS
        assert not any(op.dtype == torch.float8_e4m3fn for op in whole.ops)


def test_fp8_multiplies_in_e4m3(runs):
    """What goes into the products is cast to e4m3 at each step, not only the weights when they are loaded."""
    whole, fast = runs(), runs("--fp8")
    kept = runs("--quant", "fp8")
    casts = [run.count("_to_copy", dtype=torch.float8_e4m3fn) for run in (whole, kept, fast)]
    assert casts[0] == 0
    assert casts[2] >= casts[1] + STEPS * LAYERS * 4 * 2
    assert close_but_other(fast, whole, 0.1)
    if hasattr(torch, "_scaled_mm") and torch.__version__ >= "2.13":
        assert fast.count("_scaled_mm") >= STEPS * LAYERS * 4 * 2
        assert not whole.count("_scaled_mm")


def a_machine_where_auto_is_another(patch, dtype):
    """With bf16 instructions auto is bf16, without them fp32 (and bf16 is only how weights are kept)."""
    for question in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        patch.setattr(torch.cpu, question, lambda: dtype == "fp32")


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_dtype_of_the_weights_and_of_the_arithmetic(runs, dtype, monkeypatch):
    a_machine_where_auto_is_another(monkeypatch, dtype)
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    run, whole = runs("--dtype", dtype), runs()
    embedded = [op.inputs[0][1] for op in run.ops if "embedding.default" in op.name]
    assert set(embedded) == {wanted}
    assert run.read("run.json")["dtype"] == str(wanted)
    assert run.read("state.json")["loss_scale"] == (65536 if dtype == "fp16" else 1)
    assert dtype == "fp32" or close_but_other(run, whole, 0.03)
    if dtype == "fp16":
        assert sum(wanted == op.dtype for op in run.ops if "aten.mm." in op.name) > 100


# --- batches ---


def test_batch_size_is_the_height_of_a_batch(runs):
    assert [B for B, _ in runs("--batch_size", 6).batches] == [6] * STEPS


def test_batching_by_length_and_by_chance(runs):
    by_length, by_chance = runs(), runs("--batching", "random")
    assert sum(by_length.column("padding")) < 0.5 * sum(by_chance.column("padding"))
    assert by_chance.val_losses[0] == pytest.approx(by_length.val_losses[0], rel=1e-5)


def test_batching_packed_is_one_long_row(runs):
    apart, packed = runs(), runs("--batching", "packed", "--batch_tokens", 1021)
    assert packed.batches == [(1, 1024)] * STEPS, "a whole number of tiles of 8"
    assert packed.val_losses[0] == pytest.approx(apart.val_losses[0], rel=1e-5)
    assert min(packed.column("target_tokens")) > 700


def test_batching_packed_has_4096_tokens_a_row_where_batch_tokens_is_not_given(runs):
    assert runs("--batching", "packed", "--max_steps", 1).batches == [(1, 4096)]


def test_batch_tokens_is_a_budget_in_place_of_batch_size(runs):
    run, fixed = runs("--batch_tokens", 1500), runs()
    recipes = [B for B, _ in run.batches]
    assert all(B * (T + 1) <= 1500 for B, T in run.batches)
    assert max(recipes) > BATCH and len(set(recipes)) > 1
    assert run.val_losses[0] == pytest.approx(fixed.val_losses[0], rel=1e-5)


# --- the schedule ---


def test_lr_warmup_steps_and_max_steps_are_those_of_the_line_and_the_cosine(runs):
    """Three quarters of the way up, the peak, and half of it in the middle of the cosine."""
    run = runs("--lr", 4e-3, "--warmup_steps", 3, "--max_steps", 5)
    assert run.column("lr") == pytest.approx([0.001, 0.002, 0.003, 0.004, 0.002], rel=1e-6)


def test_lr_is_how_far_the_first_step_goes(runs):
    """Adam's first step moves each number by the learning rate, whatever its gradient: B starts at 0 and shows it."""
    for lr, warmup_steps, rate in ((1e-2, 1, 0.005), (4e-3, 0, 0.004), (4e-3, 7, 0.0005)):
        run = runs("--max_steps", 1, "--lr", lr, "--warmup_steps", warmup_steps)
        moved = [t.abs().max().item() for name, t in run.tensors().items() if "lora_B" in name]
        assert moved == pytest.approx([rate] * LAYERS * 7, rel=1e-3)


def test_weight_decay_by_hand(runs):
    """AdamW takes lr * weight_decay of each number away, beside the step that it makes anyway."""
    start = runs("--max_steps", 1, "--lr", 0).tensors()
    plain = runs("--max_steps", 1).tensors()
    decayed = runs("--max_steps", 1, "--weight_decay", 0.5).tensors()
    rate = 0.005  # step 1 of a warm-up of 1 to 1e-2
    for name in plain:
        assert torch.allclose(decayed[name], plain[name] - rate * 0.5 * start[name], atol=1e-7)
    A = next(name for name in plain if "lora_A" in name)
    assert (decayed[A] - plain[A]).abs().max() > 1e-4


def test_grad_clip_by_hand(runs):
    """After one step Adam's first moment is a tenth of the gradient that it was given."""
    whole = runs("--max_steps", 1, "--grad_clip", 0)
    (norm,) = whole.column("grad_norm")
    assert states(whole)["exp_avg"].norm().item() == pytest.approx(0.1 * norm, rel=1e-4)
    for most in (0.03, 0.01):
        clipped = runs("--max_steps", 1, "--grad_clip", most)
        assert norm > most and clipped.column("grad_norm") == [norm]
        assert states(clipped)["exp_avg"].norm().item() == pytest.approx(0.1 * most, rel=1e-3)


def test_epochs_decide_where_max_steps_is_0(runs):
    """52 recipes in batches of 18 are three steps an epoch."""
    flags = ["--max_steps", 0, "--batch_size", 18]
    assert [len(runs(*flags, "--epochs", n).losses) for n in (1, 2)] == [3, 6]


def test_max_steps_go_on_into_further_epochs(runs):
    assert len(runs("--max_steps", 4, "--batch_size", 18).losses) == 4


def test_patience_stops_after_evaluations_without_progress(runs):
    flags = ["--lr", 0, "--max_steps", 6, "--eval_every", 1]
    assert len(runs(*flags, "--patience", 2).losses) == 2
    assert len(runs(*flags, "--patience", 4).losses) == 4


def test_eval_every_is_when_it_is_measured(runs):
    assert list(runs("--max_steps", 5, "--eval_every", 2).val_losses) == [0, 2, 4, 5]


def test_tensorboard_writes_an_event_file(runs):
    pytest.importorskip("tensorboard")
    run = runs("--tensorboard", "--max_steps", 1, watch=False)
    (events,) = (run.folder / "tensorboard").iterdir()
    assert b"grad_norm" in events.read_bytes()
    assert not (runs().folder / "tensorboard").exists()


def test_save_every_is_when_the_state_is_written(runs):
    for every, times in ((2, 3), (3, 2), (50, 1)):
        run = runs("--max_steps", 5, "--save_every", every)
        assert sum("state" in name for name in run.files) == times, every


# --- the adapter ---


def test_lora_alpha_scales_the_first_gradient(runs):
    """With B at 0 the loss does not know the scale, and the gradient of B is proportional to alpha / r."""
    first = [
        runs(*f).column("grad_norm")[0] for f in ([], ["--lora_alpha", 64], ["--lora_alpha", 8])
    ]
    assert first[1:] == pytest.approx([2 * first[0], first[0] / 4], rel=1e-4)
    assert runs("--lora_alpha", 64).read("adapter_config.json")["lora_alpha"] == 64


def test_rslora_scales_by_the_root_of_the_rank(runs):
    """alpha / sqrt(16) is four times alpha / 16."""
    plain, rooted = runs(), runs("--rslora")
    assert rooted.column("grad_norm")[0] == pytest.approx(
        4 * plain.column("grad_norm")[0], rel=1e-4
    )
    written = [run.read("adapter_config.json")["use_rslora"] for run in (plain, rooted)]
    assert written == [False, True]


def test_lora_dropout_drops_in_training_only(runs):
    plain, dropped = runs(), runs("--lora_dropout", 0.5)
    masks = [run.count("bernoulli") + run.count("native_dropout") for run in (plain, dropped)]
    assert masks == [0, STEPS * LAYERS * 4]
    assert dropped.losses[0] == plain.losses[0], "B is 0 at first"
    assert dropped.losses[2] != plain.losses[2]
    assert dropped.val_losses[0] == plain.val_losses[0]
    assert dropped.read("adapter_config.json")["lora_dropout"] == 0.5


@pytest.mark.parametrize("r", [3, 16])
def test_lora_r_is_the_width_of_the_adapter(runs, r):
    run = runs("--lora_r", r)
    assert {min(t.shape) for t in run.tensors().values()} == {r}
    assert run.read("adapter_config.json")["r"] == r


def test_lora_r_0_trains_all_weights(runs, tiny):
    before, after = (
        load_file(tiny.model / "model.safetensors"),
        runs("--lora_r", 0).tensors("model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_lora_targets_are_the_layers_that_are_adapted(runs):
    run = runs("--lora_targets", "q_proj,down_proj")
    layers = {name.split(".")[-3] for name in run.tensors()}
    assert layers == {"q_proj", "down_proj"}
    assert set(run.read("adapter_config.json")["target_modules"]) == layers
    assert {name.split(".")[-3] for name in runs().tensors()} > layers


# --- what is trained on ---


def test_seed_chooses_adapter_order_and_held_out_recipes(runs, tiny):
    fixed = ["--val_data", tiny.other]
    for flags in ([], fixed):
        one, two = (runs(*flags, *f) for f in ([], ["--seed", 2]))
        assert one.column("target_tokens") != two.column("target_tokens")
        assert one.read("run.json")["titles"] != two.read("run.json")["titles"]
    A = [
        run.tensors()
        for run in (
            runs("--lr", 0, "--max_steps", 1),
            runs("--lr", 0, "--max_steps", 1, "--seed", 2),
        )
    ]
    assert all(not torch.equal(A[0][name], A[1][name]) for name in A[0] if "lora_A" in name)
    masks = [runs("--lora_dropout", 0.5, *f).losses for f in ([], ["--seed", 2])]
    assert masks[0] != masks[1]


def test_mask_prompt_leaves_the_titles_out_of_the_targets(runs):
    whole, masked = runs(), runs("--mask_prompt")
    fewer = [
        a - b
        for a, b in zip(whole.column("target_tokens"), masked.column("target_tokens"), strict=True)
    ]
    assert all(3 * BATCH <= n <= 30 * BATCH for n in fewer)
    assert masked.val_losses[0] != whole.val_losses[0]


def test_max_len_drops_what_is_longer(runs):
    whole, short = runs(), runs("--max_len", 150)
    dropped = [run.read("run.json")["data"]["dropped"]["max_len"] for run in (whole, short)]
    assert dropped[0] == 0 and dropped[1] > 5
    assert max(T for _, T in short.batches) < 150 < max(T for _, T in whole.batches)


def test_val_recipes_are_held_out(runs):
    for n in (8, 5):
        run = runs("--val_recipes", n).read("run.json")
        assert run["data"]["held_out"] == n == len(run["titles"])


def test_val_data_is_measured_and_not_trained_on(runs, tiny):
    run = runs("--val_data", tiny.other)
    theirs = {r["title"] for r in made_recipes(20, seed=5)}
    assert set(run.read("run.json")["titles"]) <= theirs
    assert run.val_losses[0] != runs().val_losses[0]


def test_data_is_read(runs, tiny):
    assert runs().read("run.json")["data"]["read"] == 60
    both = runs("--data", tiny.data, tiny.other)
    assert both.read("run.json")["data"]["read"] == 80


def test_model_is_the_base(runs, tiny):
    other = runs("--model", tiny.untied, "--max_steps", 1)
    assert other.read("run.json")["base"] == str(tiny.untied)
    assert other.losses != runs("--max_steps", 1).losses


def test_allow_bad_is_the_share_of_rows_that_may_be_broken(runs, tiny):
    broken = tiny.folder / "broken.jsonl"
    broken.write_text(tiny.data.read_text() + '{"title": 7}\n' * 3)
    refused = runs("--data", broken, fails=True)
    assert refused.code == 2 and "bad" in refused.err.splitlines()[-1]
    assert runs("--data", broken, "--allow_bad", 0.1).read("run.json")["data"]["bad"] == 3


def test_clean_applies_the_rules(runs, tiny):
    """A stub of three words, and a recipe that is there twice."""
    stub = {"title": "Toast", "ingredients": ["bread"], "directions": ["Toast."]}
    mixed = write_jsonl(tiny.folder / "mixed.jsonl", [*made_recipes(60), stub, made_recipes(1)[0]])
    kept = [
        runs("--data", mixed, *f).read("run.json")["data"]["kept"] for f in ([], ["--no-clean"])
    ]
    assert kept == [60, 62]


RULES = [  # flag, a bound that no made-up recipe or not every one meets, the rule that counts it
    ("min_words", 60, "too_short"),
    ("max_words", 90, "too_long"),
    ("min_ingredients", 5, "few_ingredients"),
    ("max_ingredients", 5, "many_ingredients"),
    ("min_steps", 6, "few_steps"),
    ("min_mentioned", 0.95, "unused_ingredients"),
    ("max_similar", 0.02, "near_duplicate"),
]


@pytest.mark.parametrize("flag, bound, rule", RULES)
def test_a_bound_of_the_rules_drops_by_name(runs, flag, bound, rule):
    run = runs(f"--{flag}", bound, "--max_steps", 1, "--val_recipes", 1)
    before, after = (x.read("run.json")["data"]["dropped"][rule] for x in (runs(), run))
    assert after > before == 0


# --- where a run begins and where it stands ---


def test_init_adapter_begins_where_the_other_run_ended(runs):
    first = runs()
    second = runs("--init_adapter", first.folder)
    assert second.val_losses[0] == first.val_losses[STEPS] != first.val_losses[0]


def test_resume_and_out_go_on_in_the_same_folder(runs, tiny):
    out = tiny.folder / "resumed"
    short = runs("--out", out, "--max_steps", 2)
    assert short.folder == out and len(short.losses) == 2
    two = short.losses
    again = runs("--out", out, "--resume", "--max_steps", 4)
    assert [line["step"] for line in again.lines] == [0, 1, 2, 3, 4]
    assert again.losses[:2] == two
    assert not list(tiny.folder.glob("resumed.*"))


def test_cache_is_where_the_tokens_go(runs, tiny):
    runs("--cache", tiny.folder / "elsewhere", "--max_steps", 1)
    assert list((tiny.folder / "elsewhere").rglob("tokens.bin"))


def test_device_is_asked_for(runs):
    refused = runs("--device", "meta", fails=True)
    assert refused.code == 2 and "meta" in refused.err.splitlines()[-1]


# --- sampling ---


@pytest.fixture(scope="session")
def asks(runs, tiny):
    """asks(flag, value, …) -> Run of sample.py on a run that trained six steps, with few and short texts."""
    folder = runs("--max_steps", 6).folder
    made = {}

    def ask(*flags, of=("--run", folder), fails=False):
        short = ["--max_new_tokens", 12, "--cache", tiny.folder / "cache", "--device", "cpu"]
        argv = tuple(map(str, [*of, *short, *flags]))
        if argv not in made:
            made[argv] = watch_program(sample, argv, folder, (tiny.vocab, CHANNELS))
        run = made[argv]
        assert fails or run.code == 0, run.err
        return run

    return ask


PROMPT = ["--prompt", "Mix the flour", "--dtype", "fp32"]
GREEDY = [*PROMPT, "--temperature", 0]


def rows(run):
    return [json.loads(line) for line in run.out.splitlines()]


def decoded(run):
    """[B] of each forward pass over one token a row."""
    return [op.shape[0] for op in run.ops if "embedding.default" in op.name and op.shape[1] == 1]


def test_sample_temperature_0_asks_no_seed(asks):
    hot = [asks(*PROMPT, "--temperature", 1, "--seed", n).out for n in (1, 2)]
    cold = [asks(*GREEDY, "--seed", n).out for n in (1, 2)]
    assert hot[0] != hot[1] and cold[0] == cold[1]


@pytest.mark.parametrize("flag, value", [("top_k", 1), ("top_p", 1e-6), ("min_p", 1)])
def test_sample_only_the_likeliest_is_the_greedy_text(asks, flag, value):
    """With each flag at its narrowest the seed decides nothing."""
    wide = asks(*PROMPT, "--temperature", 1, "--top_k", 0).out
    narrow = asks(*PROMPT, "--temperature", 1, "--top_k", 0, f"--{flag}", value).out
    assert narrow == asks(*GREEDY).out != wide


def test_sample_repetition_penalty_changes_the_text(asks):
    assert asks(*GREEDY, "--repetition_penalty", 100).out != asks(*GREEDY).out


def test_sample_seed_is_the_texts(asks):
    texts = [asks(*PROMPT, "--seed", n).out for n in (1, 2, 3)]
    assert len(set(texts)) == 3


def test_sample_max_new_tokens_is_how_long_a_text_gets(asks):
    short, long = (asks(*GREEDY, "--json", "--max_new_tokens", n) for n in (4, 9))
    assert [rows(run)[0]["tokens"] for run in (short, long)] == [4, 9]
    assert len(decoded(long)) == len(decoded(short)) + 5


def test_sample_num_samples_and_json(asks):
    some = rows(asks(*PROMPT, "--json", "--num_samples", 3))
    assert [row["sample"] for row in some] == [0, 1, 2]
    assert len({row["text"] for row in some}) == 3


def test_sample_prompts_and_batch_size(asks, tiny):
    file = tiny.folder / "prompts.txt"
    file.write_text("Rice\nBeans\nEggs\nMilk\nPasta\n")
    run = asks("--prompts", file, "--json", "--batch_size", 3, "--dtype", "fp32")
    assert [row["prompt"] for row in rows(run)] == ["Rice", "Beans", "Eggs", "Milk", "Pasta"]
    assert max(decoded(run)) == 3


def test_sample_title_and_ingredients_begin_a_recipe(asks):
    run = asks("--title", "Bean pie", "--ingredients", "beans, eggs", "--json")
    assert rows(run)[0]["prompt"].startswith("Bean pie\n\nIngredients:\n- beans\n- eggs\n")


def test_sample_run_and_model_are_what_is_asked(asks, tiny):
    trained = asks(*GREEDY).out
    base = asks(*GREEDY, of=("--model", tiny.model)).out
    other = asks(*GREEDY, of=("--model", tiny.untied)).out
    assert len({trained, base, other}) == 3


def test_sample_merge_needs_fewer_products(asks):
    apart, merged = asks(*GREEDY), asks(*GREEDY, "--merge")
    assert merged.out == apart.out
    products = [run.count("aten.mm.") + run.count("aten.addmm") for run in (apart, merged)]
    assert products[1] < 0.7 * products[0]


@pytest.mark.parametrize("quant", ["nf4", "fp8"])
def test_sample_quant_keeps_the_weights_small(asks, quant):
    run, whole = asks(*GREEDY, "--quant", quant), asks(*GREEDY)
    if quant == "nf4":
        assert run.count("bitsandbytes.quantize_4bit") == LAYERS * 7
        assert run.count("bitsandbytes.quantize_4bit") > whole.count("bitsandbytes")
    else:
        assert any(op.dtype == torch.float8_e4m3fn for op in run.ops)
        assert not any(op.dtype == torch.float8_e4m3fn for op in whole.ops)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_sample_dtype_is_that_of_the_embedding(asks, dtype, monkeypatch):
    a_machine_where_auto_is_another(monkeypatch, dtype)
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    run = asks("--prompt", "Mix the flour", "--dtype", dtype)
    embedded = {op.inputs[0][1] for op in run.ops if "embedding.default" in op.name}
    assert embedded == {wanted}


def test_sample_device_is_asked_for(asks):
    refused = asks(*GREEDY, "--device", "meta", fails=True)
    assert refused.code == 2 and "meta" in refused.err.splitlines()[-1]


def test_sample_compile_wants_a_compiler(asks, monkeypatch):
    """What is compiled is test_sample.py's business, and slow; that --compile asks for it shows without a compiler."""
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    refused = asks(*GREEDY, "--compile", fails=True)
    assert refused.code == 2 and "C++ compiler" in refused.err.splitlines()[-1]


def test_sample_eval_and_cache(asks, tiny):
    """It measures on the held-out recipes, whose tokens are made in the cache that is named."""
    run = asks("--eval", 2, "--json", "--cache", tiny.folder / "again", "--max_new_tokens", 4)
    said = json.loads(run.out.splitlines()[-1])
    assert said["asked"] == 2 and said["run"]["perplexity"] < said["base"]["perplexity"]
    assert list((tiny.folder / "again").rglob("tokens.bin"))
