"""lora.py and the plain frozen layer of quant.py: the arithmetic of peft, the files of peft, and loud refusals."""

from cli import UserError

import json
import math

import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import make_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import lora
import model as models
import quant
from speed import checkpoint, compiled, loss

logging.disable_progress_bar()
V = 96
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BASE = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def save_base(folder, **changes):
    """A random Llama of transformers, with weights so large that every layer shows in the logits."""
    ref, g = LlamaForCausalLM(LlamaConfig(**(BASE | changes))), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in ref.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            p.copy_(
                1 + 0.3 * noise
                if "norm" in name
                else noise * (0.5 if p.dim() == 1 else p.shape[1] ** -0.5)
            )
    ref.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("biased"), attention_bias=True, mlp_bias=True)


def frozen(folder, dtype=None):
    return models.load(folder, dtype=dtype, make_linear=quant.make_linear("none"))


def reference(folder):
    return LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")


def by_peft(folder, names=NAMES, r=4, alpha=8, **more):
    """The base with an adapter of peft whose B are not zero."""
    torch.manual_seed(2)
    ref = get_peft_model(
        reference(folder),
        LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=alpha, target_modules=names, **more),
    )
    with torch.no_grad():
        for name, p in ref.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    return ref


def peft_tensors(ref):
    return {
        name.replace(".default.", "."): p for name, p in ref.named_parameters() if ".lora_" in name
    }


def twins(folder, names=NAMES, r=4, alpha=8, rslora=False):
    """The same adapter on the same base: peft's, and ours."""
    ref, ours = by_peft(folder, names, r, alpha, use_rslora=rslora), frozen(folder)
    lora.adapt(ours, r, alpha, targets="all" if names == NAMES else ",".join(names), rslora=rslora)
    lora.fill(ours, peft_tensors(ref))
    return ref, ours


def randomise(model, seed=3):
    """B that are not zero."""
    g = torch.Generator().manual_seed(seed)
    for key, p in lora.parameters(model).items():
        if ".lora_B." in key:
            p.data = torch.randn(p.shape, generator=g) * 0.1
    return model


def tokens(B=3, T=20, seed=0):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits if hasattr(model, "generate") else models.logits(model, model(ids))


def mean_loss(model, ids):
    """Of the tokens after the first of each row."""
    B, T = ids.shape
    if hasattr(model, "generate"):
        return F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    where = (torch.arange(B)[:, None] * T + torch.arange(T - 1)).flatten()
    return loss.chunked(
        model(ids), model.lm_head.weight, where, ids[:, 1:].flatten(), scale=1 / (B * (T - 1))
    )


def gradients(model, ids):
    """{key: gradient of A or B}"""
    model.zero_grad()
    mean_loss(model, ids).backward()
    return {key: p.grad.clone() for key, p in lora.parameters(model).items()}


def distance(a, b):
    """Largest difference, relative to the largest entry of b."""
    return (
        (a.detach().double() - b.detach().double()).abs().max() / b.detach().double().abs().max()
    ).item()


def assert_near(got, wanted, rtol):
    """Two dictionaries of tensors; a failure shows the keys that differ."""
    assert got.keys() == wanted.keys()
    assert {key: d for key in got if not (d := distance(got[key], wanted[key])) < rtol} == {}


# --- the frozen layer ---


@pytest.mark.parametrize("bias", [False, True])
def test_plain_layer_computes_what_a_linear_layer_does(bias):
    W, b, x = (
        torch.randn(7, 5),
        torch.randn(7) if bias else None,
        torch.randn(2, 3, 5, requires_grad=True),
    )
    layer, g = quant.make_linear("none")("layers.0.q_proj", W.clone()), torch.randn(2, 3, 7)
    layer.bias = b
    y = layer(x)
    torch.testing.assert_close(y, F.linear(x, W, b))
    torch.testing.assert_close(layer.mm(x), x @ W.t())
    torch.testing.assert_close(layer.mm_t(g), g @ W)
    torch.testing.assert_close(torch.autograd.grad(y, x, g)[0], g @ W)


def test_plain_layer_keeps_its_dtype_and_multiplies_in_that_of_its_input():
    layer, x = (
        quant.make_linear("none")("layers.0.q_proj", torch.randn(7, 5).bfloat16()),
        torch.randn(3, 5),
    )
    assert layer.weight.dtype == torch.bfloat16 and not layer.weight.requires_grad
    assert layer(x).dtype == layer.mm_t(torch.randn(3, 7)).dtype == torch.float32
    torch.testing.assert_close(layer(x), x @ layer.weight.float().t())


def kept_for_backward(function, *args):
    """Addresses of the memory that autograd keeps."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.data_ptr()) or t, lambda t: t
    ):
        function(*args)
    return kept


def test_plain_layer_keeps_nothing_for_backward():
    layer = quant.make_linear("none")("layers.0.q_proj", torch.randn(7, 5))
    assert kept_for_backward(layer, torch.randn(3, 5, requires_grad=True)) == []


# --- the group against arithmetic by hand ---

SIZES = [12, 6, 6]  # q, k, v: grouped-query attention makes k and v narrower


def group(adapted, bias=False, dropout=0.0, r=3, dtype=torch.float32):
    """Layers of SIZES on an input of 8, those in `adapted` with an A and a B, and the same as tensors in float64."""
    g, layers, exact = torch.Generator().manual_seed(0), [], []
    for i, out in enumerate(SIZES):
        layer = quant.make_linear("none")("", torch.randn(out, 8, generator=g).to(dtype))
        layer.bias = (
            torch.nn.Parameter(torch.randn(out, generator=g).to(dtype), requires_grad=False)
            if bias
            else None
        )
        A = B = None
        if i in adapted:
            layer = lora.LoRA(
                layer, r + i, 0.5 + i, dropout, g
            )  # ranks and scales differ, so that none is mistaken for another
            layer.B.data = torch.randn(layer.B.shape, generator=g)
            layer.to(dtype)
            A, B = (p.detach().double().requires_grad_() for p in (layer.A, layer.B))
        exact.append((getattr(layer, "base", layer).weight.double(), layer.bias, A, B, 0.5 + i))
        layers.append(layer)
    return layers, exact


def by_hand(x, exact, mask=None):
    """x Wᵀ + s (x Aᵀ) Bᵀ + b, a layer at a time; mask is what dropout multiplies the adapters' input with."""
    out = []
    for W, bias, A, B, s in exact:
        y = x @ W.t() + (0 if bias is None else bias.double())
        out.append(y if A is None else y + s * ((x if mask is None else x * mask) @ A.t()) @ B.t())
    return out


def assert_group_is_right(layers, exact, mask=None, input_needs_gradient=True):
    g = torch.Generator().manual_seed(5)
    x = torch.randn(2, 7, 8, generator=g, requires_grad=input_needs_gradient)
    x64 = x.detach().double().requires_grad_()
    pulls = [torch.randn(2, 7, out, generator=g) for out in SIZES]
    out, wanted = lora.project(x, layers), by_hand(x64, exact, mask)
    for y, y64 in zip(out, wanted, strict=True):
        assert y.shape == y64.shape and distance(y, y64) < 1e-5
    sum((y * pull).sum() for y, pull in zip(out, pulls, strict=True)).backward()
    sum((y * pull).sum() for y, pull in zip(wanted, pulls, strict=True)).backward()
    if input_needs_gradient:
        assert distance(x.grad, x64.grad) < 1e-5
    for layer, (_, _, A, B, _) in zip(layers, exact, strict=True):
        if A is not None:
            assert distance(layer.A.grad, A.grad) < 1e-5 and distance(layer.B.grad, B.grad) < 1e-5


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("adapted", [[0, 1, 2], [0, 2], [1], [2]])
def test_group_equals_arithmetic_by_hand(adapted, bias):
    assert_group_is_right(*group(adapted, bias))


def test_group_whose_input_needs_no_gradient_still_trains_its_adapters():
    assert_group_is_right(*group([0, 2]), input_needs_gradient=False)


def test_group_with_an_output_that_is_not_used():
    layers, exact = group([0, 1, 2])
    x = torch.randn(2, 7, 8, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    lora.project(x, layers)[2].sum().backward()
    by_hand(x64, exact)[2].sum().backward()
    assert distance(x.grad, x64.grad) < 1e-5 and distance(layers[2].A.grad, exact[2][2].grad) < 1e-5
    assert layers[0].A.grad is None or layers[0].A.grad.abs().max() == 0


@pytest.mark.parametrize("adapted", [[0, 1, 2], [0, 2]])
@pytest.mark.parametrize("dropped", [False, True])
def test_group_passes_gradcheck(adapted, dropped):
    """Numerical derivatives with respect to both inputs and every A and B."""
    layers, _ = group(adapted, dtype=torch.float64)
    params = [p for i in adapted for p in (layers[i].A, layers[i].B)]
    x, xd = (torch.randn(4, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def function(x, xd, *params):
        return lora.GroupMatmul.apply(x, xd if dropped else None, layers, *params)

    assert torch.autograd.gradcheck(function, (x, xd, *params))


def test_group_keeps_its_input_once_and_no_weight():
    layers, _ = group([0, 1, 2])
    x = torch.randn(50, 8, requires_grad=True)
    kept = kept_for_backward(lora.project, x, layers)
    assert kept.count(x.data_ptr()) == 1
    assert not {layer.base.weight.data_ptr() for layer in layers} & set(kept)


# --- dropout ---


def test_dropout_does_nothing_in_eval_mode():
    layers, exact = group([0, 1, 2], dropout=0.5)
    for layer in layers:
        layer.eval()
    assert_group_is_right(layers, exact)


@pytest.mark.parametrize("adapted", [[0, 1, 2], [1]])
def test_dropout_with_a_known_mask_equals_arithmetic_by_hand(monkeypatch, adapted):
    """Only the adapters' input is dropped: the frozen layers see all of x, and x's gradient has both parts."""
    mask = (
        torch.bernoulli(torch.full((2, 7, 8), 0.6), generator=torch.Generator().manual_seed(1))
        / 0.6
    )
    asked = []
    monkeypatch.setattr(
        lora.F,
        "dropout",
        lambda x, p=0.5, *_, **__: asked.append(p) or x * mask.view(x.shape).to(x.dtype),
    )
    assert_group_is_right(*group(adapted, dropout=0.4), mask=mask.double())
    assert asked == [0.4]


def test_dropout_is_unbiased():
    """The mean over 40,000 masks is the output without dropout, within five standard errors."""
    torch.manual_seed(0)
    layers, exact = group([0, 1, 2], dropout=0.4)
    x = torch.randn(1, 8)
    with torch.no_grad():
        drawn, wanted = lora.project(x.expand(40000, 8), layers), by_hand(x.double(), exact)
    for y, y64 in zip(drawn, wanted, strict=True):
        assert y.std(0).min() > 0.01  # it is random
        assert ((y.double().mean(0) - y64[0]).abs() < 5 * y.double().std(0) / 200).all()


# --- against peft ---

CASES = {
    "all": {},
    "q and v": {"names": ["q_proj", "v_proj"]},
    "k, o, up and down": {"names": ["k_proj", "o_proj", "up_proj", "down_proj"]},
    "rslora": {"rslora": True, "r": 9, "alpha": 6},
    "alpha not r": {"r": 3, "alpha": 7},
    "alpha is r": {"r": 4, "alpha": 4},
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_those_of_peft(base, case):
    ref, ours = twins(base, **CASES[case])
    assert distance(logits(ours, tokens()), logits(ref, tokens())) < 1e-5
    assert (
        distance(logits(ours, tokens()), logits(frozen(base), tokens())) > 1e-2
    )  # the adapter does something
    ref.zero_grad()
    mean_loss(ref, tokens()).backward()
    assert_near(
        gradients(ours, tokens()), {key: p.grad for key, p in peft_tensors(ref).items()}, 2e-5
    )


def test_outputs_and_gradients_equal_those_of_peft_on_a_base_with_biases(biased):
    ref, ours = twins(biased)
    assert distance(logits(ours, tokens()), logits(ref, tokens())) < 1e-5
    mean_loss(ref, tokens()).backward()
    assert_near(
        gradients(ours, tokens()), {key: p.grad for key, p in peft_tensors(ref).items()}, 2e-5
    )


@pytest.mark.parametrize("case", CASES)
def test_ten_adamw_steps_end_where_those_of_peft_do(base, case):
    """To 1e-4: Adam divides a gradient by its size, so a rounding of a small one is as good as one of a large one."""
    ref, ours = twins(base, **CASES[case])
    before = {key: p.detach().clone() for key, p in lora.parameters(ours).items()}
    for model, params in ((ref, peft_tensors(ref)), (ours, lora.parameters(ours))):
        optimiser = torch.optim.AdamW(params.values(), lr=1e-3, weight_decay=0.1)
        for step in range(10):
            optimiser.zero_grad()
            mean_loss(model, tokens(seed=step)).backward()
            optimiser.step()
    assert_near(lora.parameters(ours), peft_tensors(ref), 1e-4)
    assert all(
        distance(p, before[key]) > 1e-3 for key, p in lora.parameters(ours).items()
    )  # ten steps went somewhere


# --- what training may and may not touch ---


@pytest.mark.parametrize("targets", ["all", "q_proj,v_proj"])
def test_untrained_adapter_changes_nothing(base, targets):
    model = frozen(base)
    before = logits(model, tokens())
    lora.adapt(model, 4, 8, targets=targets)
    assert torch.equal(logits(model, tokens()), before)


def test_untrained_adapter_is_drawn_as_peft_draws_it_and_by_its_seed(base):
    """A uniform within 1 / sqrt(in), B zero."""
    drawn = [
        lora.parameters(model)
        for seed in (1, 1, 2)
        if lora.adapt(model := frozen(base), 16, 32, seed=seed)
    ]
    for key in drawn[0]:
        one, same, other = (d[key] for d in drawn)
        assert torch.equal(one, same)
        if ".lora_B." in key:
            assert one.abs().max() == 0
        else:
            bound = 1 / math.sqrt(one.shape[1])
            assert not torch.equal(one, other)
            assert one.abs().max() <= bound and abs(one.std() * math.sqrt(3) / bound - 1) < 0.1


@pytest.mark.parametrize("targets", ["all", "q_proj,v_proj", " up_proj , o_proj"])
def test_only_a_and_b_of_the_targets_train_and_the_base_stays(base, targets):
    model = frozen(base)
    wanted = NAMES if targets == "all" else [name.strip() for name in targets.split(",")]
    layers = lora.adapt(model, 4, 8, targets=targets)
    params = lora.parameters(randomise(model))
    assert len(layers) == 2 * len(wanted) and len(params) == 4 * len(wanted)
    assert {key.split(".")[-3] for key in params} == set(wanted)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {
        id(p) for p in params.values()
    }
    rest = [(p, p.detach().clone()) for p in model.parameters() if not p.requires_grad]
    optimiser = torch.optim.AdamW(params.values(), lr=1e-2)
    for step in range(3):
        optimiser.zero_grad()
        mean_loss(model, tokens(seed=step)).backward()
        optimiser.step()
    assert all(p.grad is None and torch.equal(p, before) for p, before in rest)
    assert all(p.grad.abs().max() > 0 for p in params.values())


def test_first_step_moves_b_alone(base):
    """With B zero the gradient of A is zero, not absent and not nan."""
    model = frozen(base)
    lora.adapt(model, 4, 8)
    for key, grad in gradients(model, tokens()).items():
        assert grad.abs().max() > 0 if ".lora_B." in key else grad.abs().max() == 0, key


def test_bf16_base_has_fp32_adapters_whose_gradients_are_those_of_the_fp32_model(base):
    """To 5 % of each tensor's norm: bf16 keeps 8 bits and the error goes through two blocks."""
    half, full = frozen(base, torch.bfloat16), frozen(base)
    for model in (half, full):
        lora.adapt(model, 4, 8)
        randomise(model)
    assert {p.dtype for p in half.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in lora.parameters(half).values()} == {torch.float32}
    assert half(tokens()).dtype == torch.bfloat16
    got, wanted = gradients(half, tokens()), gradients(full, tokens())
    assert {grad.dtype for grad in got.values()} == {torch.float32}
    assert {
        key: d
        for key in got
        if not (d := ((got[key] - wanted[key]).norm() / wanted[key].norm()).item()) < 0.05
    } == {}


def test_small_steps_are_not_lost_in_a_bf16_model(base):
    """An update of a thousandth of a weight, which bf16 would round away."""
    model = frozen(base, torch.bfloat16)
    lora.adapt(model, 4, 8)
    params = lora.parameters(randomise(model))
    before = {key: p.detach().clone() for key, p in params.items()}
    mean_loss(model, tokens()).backward()
    torch.optim.AdamW(params.values(), lr=1e-5, weight_decay=0).step()
    for key, p in params.items():
        assert (p != before[key]).float().mean() > 0.95


# --- checkpoints and compile ---


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_no_loss_and_no_gradient(base, dropout):
    """With dropout the second forward draws the first one's masks."""
    model = frozen(base)
    lora.adapt(model, 4, 8, dropout)
    params = lora.parameters(randomise(model))
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint.apply(models.places(model, range(2)), random=dropout > 0)
        torch.manual_seed(7)
        model.zero_grad()
        mean_loss(model, tokens()).backward()
        grads = {key: p.grad.clone() for key, p in params.items()}
        results.append(grads | {"loss": mean_loss(model.eval(), tokens())})
        model.train()
    assert_near(*results, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("targets", ["all", "q_proj,v_proj"])
def test_compiled_blocks_equal_eager_ones_with_one_graph_for_all_lengths(
    base, targets, checkpointed
):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, compiled = frozen(base), frozen(base)
    for model in (eager, compiled):
        lora.adapt(model, 4, 8, targets=targets)
        randomise(model)
    params = lora.parameters(compiled)
    for block in compiled.layers:
        block.compile(dynamic=True, fullgraph=True)
    if checkpointed:
        checkpoint.apply(models.places(compiled, range(2)), random=False)
    for B, T in ((5, 30), (5, 21), (2, 47), (3, 9)):
        ids = tokens(B, T)
        compiled.zero_grad()
        mean_loss(compiled, ids).backward()
        grads = {key: p.grad.clone() for key, p in params.items()}
        assert_near(grads, gradients(eager, ids), 1e-5)
        assert distance(mean_loss(compiled, ids), mean_loss(eager, ids)) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def kept_by_block(model, ids):
    """(loss, [bytes that autograd keeps of each block beside parameters])"""
    own = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    found = [{} for _ in model.layers]

    def watch(number):
        def note(t):
            if t.data_ptr() not in own:
                # A view keeps all of the memory that it lies in.
                found[number][t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        return torch.autograd.graph.saved_tensors_hooks(note, lambda t: t)

    hooks = []
    for number, block in enumerate(model.layers):
        context = watch(number)
        hooks.append(block.register_forward_pre_hook(lambda *_, c=context: c.__enter__()))
        hooks.append(block.register_forward_hook(lambda *_, c=context: c.__exit__()))
    total = mean_loss(model, ids)
    for hook in hooks:
        hook.remove()
    return total, [sum(storages.values()) for storages in found]


@pytest.mark.slow
@pytest.mark.parametrize("halves", [False, True])
def test_of_compiled_blocks_those_asked_for_recompute(tmp_path, halves):
    """Two graphs, or three with halves. The first block keeps its inputs, cos and sin. The others keep what README's
    section on memory and lora.py list, which is five times as much at these widths and more at real ones."""
    folder = save_base(tmp_path / "base", num_hidden_layers=3)
    eager, fast = frozen(folder), frozen(folder)
    for model in (eager, fast):
        lora.adapt(model, 4, 8)
        randomise(model)
    params = lora.parameters(fast)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    first, others = models.places(fast, range(1), halves), models.places(fast, range(1, 3))
    compiled.apply(first, others, by_compiler=True, one_length=False)
    for B, T in ((5, 30), (3, 17)):
        ids = tokens(B, T)
        fast.zero_grad()
        total, (checkpointed, second, third) = kept_by_block(fast, ids)
        total.backward()
        grads = {key: p.grad.clone() for key, p in params.items()}
        assert_near(grads, gradients(eager, ids), 1e-5)
        assert distance(total, mean_loss(eager, ids)) < 1e-5
        # fp32: x [B, T, C] of each half or of the block, cos and sin [T, D/2]
        assert checkpointed == 4 * (B * T * 32 * (1 + halves) + 2 * T * 4)
        # C = HD = 32, KD = 16, F = 48; beside them u, two scales of norms and flash's logsumexp
        by_token = 4 * (7 * 32 + 2 * 16 + 3 * 48)
        assert second == third
        assert B * T * by_token <= third < 1.35 * B * T * by_token
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 + halves


# --- files ---

SAVED = {
    "all": {},
    "q and v": {"names": ["q_proj", "v_proj"]},
    "rslora": {"rslora": True, "r": 9, "alpha": 6},
}


def save_ours(model, folder, base, r=4, alpha=8, dropout=0.0, names=NAMES, rslora=False):
    targets = "all" if names == NAMES else ",".join(names)
    save_file(
        {key: p.detach() for key, p in lora.parameters(model).items()},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(
        json.dumps(lora.peft_config(base, r, alpha, dropout, targets, rslora))
    )


@pytest.mark.parametrize("case", SAVED)
def test_an_adapter_of_peft_loads_and_gives_the_same_outputs(base, tmp_path, case):
    ref, ours = twins(base, **SAVED[case])
    ref.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert set(lora.parameters(ours)) == set(stored)
    assert all(p.shape == stored[key].shape for key, p in lora.parameters(ours).items())
    loaded = frozen(base)
    layers = lora.load(loaded, tmp_path)
    assert len(layers) == len(stored) / 2
    assert distance(logits(loaded, tokens()), logits(ref, tokens())) < 1e-5


@pytest.mark.parametrize(
    "more",
    [
        {"names": "all-linear"},
        {"names": ["self_attn.q_proj", "up_proj"]},
        {"init_lora_weights": "gaussian"},
        {"lora_dropout": 0.1},
    ],
    ids=str,
)
def test_other_ways_to_ask_peft_for_the_same_arithmetic_load_too(base, tmp_path, more):
    """peft writes all-linear as a list, of names or of whole paths, and takes any ending of a path for a name."""
    ref = by_peft(base, **more).eval()
    ref.save_pretrained(tmp_path)
    loaded = frozen(base)
    lora.load(loaded, tmp_path)
    assert distance(logits(loaded.eval(), tokens()), logits(ref, tokens())) < 1e-5


@pytest.mark.parametrize("case", SAVED)
def test_an_adapter_of_ours_loads_in_peft_and_gives_the_same_outputs(base, tmp_path, recwarn, case):
    _, ours = twins(base, **SAVED[case])
    save_ours(ours, tmp_path, base, **SAVED[case])
    ref = PeftModel.from_pretrained(reference(base), tmp_path)
    assert not [w for w in recwarn if "missing adapter keys" in str(w.message)]
    assert_near(lora.parameters(ours), peft_tensors(ref), 1e-7)
    assert distance(logits(ref, tokens()), logits(ours, tokens())) < 1e-5


def test_peft_reads_our_configuration_as_its_own(base, tmp_path):
    model = frozen(base)
    lora.adapt(model, 5, 11, 0.25, "q_proj,v_proj", True)
    save_ours(model, tmp_path, base, 5, 11, 0.25, ["q_proj", "v_proj"], True)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert (
        isinstance(config, LoraConfig)
        and config.task_type == "CAUSAL_LM"
        and config.base_model_name_or_path == str(base)
    )
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (
        5,
        11,
        0.25,
        True,
    )
    assert set(config.target_modules) == {"q_proj", "v_proj"}


def test_a_saved_adapter_comes_back_with_its_settings(base, tmp_path):
    model = frozen(base)
    lora.adapt(model, 5, 11, 0.25, "v_proj,q_proj", True)
    save_ours(randomise(model), tmp_path, base, 5, 11, 0.25, ["v_proj", "q_proj"], True)
    loaded = frozen(base)
    for layer in lora.load(loaded, tmp_path):
        assert (layer.scale, layer.dropout, layer.A.shape[0]) == (
            pytest.approx(11 / math.sqrt(5)),
            0.25,
            5,
        )
    assert_near(lora.parameters(loaded), lora.parameters(model), 1e-9)
    assert torch.equal(logits(loaded.eval(), tokens()), logits(model.eval(), tokens()))


def test_target_modules_all_linear_means_every_projection(base, tmp_path):
    model = frozen(base)
    lora.adapt(model, 4, 8)
    save_ours(randomise(model), tmp_path, base)
    edit_config(tmp_path, target_modules="all-linear")
    loaded = frozen(base)
    lora.load(loaded, tmp_path)
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))


def test_tensors_in_half_precision_fill_fp32_adapters(base, tmp_path):
    model = frozen(base)
    lora.adapt(model, 4, 8)
    save_ours(randomise(model), tmp_path, base)
    edit_tensors(tmp_path, lambda t: t.update({key: x.bfloat16() for key, x in t.items()}))
    loaded = frozen(base)
    lora.load(loaded, tmp_path)
    assert {p.dtype for p in lora.parameters(loaded).values()} == {torch.float32}
    assert_near(
        lora.parameters(loaded),
        {key: p.bfloat16() for key, p in lora.parameters(model).items()},
        1e-9,
    )


# --- refusals ---


@pytest.fixture
def saved(base, tmp_path):
    """An adapter's folder, for a test to spoil."""
    model = frozen(base)
    lora.adapt(model, 4, 8, targets="q_proj,v_proj")
    save_ours(randomise(model), tmp_path, base, names=["q_proj", "v_proj"])
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def refused(base, folder, *words):
    """Loading ends in one UserError that names all of `words`."""
    with pytest.raises(UserError) as error:
        lora.load(frozen(base), folder)
    text = str(error.value).replace(str(folder), "")
    assert [word for word in words if word not in text] == [], text


KEY = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"  # [16, 4]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop(KEY), [KEY]),
        (lambda t: [t.pop(key) for key in list(t)], ["lacks"]),
        (
            lambda t: t.update({KEY.replace("v_proj", "k_proj"): t[KEY].clone()}),
            [KEY.replace("v_proj", "k_proj")],
        ),
        (
            lambda t: t.update({KEY.replace("layers.1", "layers.2"): t[KEY].clone()}),
            [KEY.replace("layers.1", "layers.2")],
        ),
        (
            lambda t: t.update({KEY.replace("lora_B", "lora_magnitude_vector"): torch.ones(16)}),
            ["lora_magnitude_vector"],
        ),
        (lambda t: t.update({KEY: torch.ones(16, 5)}), [KEY, "[16, 5]", "[16, 4]"]),
        (lambda t: t.update({KEY: torch.ones(16, 1)}), [KEY, "[16, 1]", "[16, 4]"]),
        (lambda t: t.update({KEY: torch.ones(4, 16)}), [KEY, "[4, 16]"]),
        (
            lambda t: t.update(
                {key.removeprefix("base_model.model."): t.pop(key) for key in list(t)}
            ),
            ["model.layers.0.self_attn"],
        ),
    ],
    ids=[
        "lacks one",
        "lacks all",
        "extra layer kind",
        "extra block",
        "dora vector",
        "shape",
        "broadcastable",
        "transposed",
        "other prefix",
    ],
)
def test_tensors_that_do_not_fit_are_named(base, saved, change, words):
    edit_tensors(saved, change)
    refused(base, saved, *words)


def test_a_smaller_base_is_refused(base, saved, tmp_path_factory):
    other = save_base(tmp_path_factory.mktemp("smaller"), hidden_size=16, intermediate_size=24)
    refused(
        other,
        saved,
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "[4, 32]",
        "[4, 16]",
    )


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(base, saved, file):
    (saved / file).unlink()
    refused(base, saved, file)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: b"no",
    ],
    ids=["half", "last byte", "empty", "text"],
)
def test_a_damaged_tensor_file_is_named(base, saved, damage):
    path = saved / "adapter_model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    refused(base, saved, "adapter_model.safetensors")


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"{}", b"[]", b"\xff\xfe{}"],
    ids=["empty", "broken", "no keys", "a list", "no utf-8"],
)
def test_a_broken_configuration_is_named(base, saved, data):
    (saved / "adapter_config.json").write_bytes(data)
    refused(base, saved, "adapter_config.json")


@pytest.mark.parametrize(
    "key, value",
    [
        ("use_dora", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 8}),
        ("alpha_pattern", {"q_proj": 8}),
        ("layers_to_transform", [0]),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("peft_type", "LOHA"),
        ("target_modules", ".*_proj"),
        ("target_modules", None),
        ("r", 0),
        ("r", None),
        ("lora_alpha", "many"),
        ("alora_invocation_tokens", [1, 2]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "mica"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", 3),
        ("use_qalora", True),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["mlp.experts"]),
        ("megatron_config", {"a": 1}),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 2}),
        ("kasa_config", {"beta": 0.1}),
        ("monteclora_config", {"n": 2}),
        ("exclude_modules", ".*q_proj"),
        ("exclude_modules", ["layers.0.self_attn.q_proj"]),
        ("exclude_modules", ["q_proj", "v_proj"]),
        ("a_key_of_next_year", 0.5),
        ("r", True),
        ("r", 4.0),
        ("r", "4"),
        ("r", -4),
        ("lora_alpha", float("nan")),
        ("lora_alpha", True),
        ("lora_alpha", None),
        ("lora_dropout", "0.1"),
        ("lora_dropout", -0.5),
        ("lora_dropout", 1.0),
        ("use_rslora", "false"),
        ("use_rslora", 1),
        ("target_modules", [3]),
        ("target_modules", []),
        ("target_modules", {"q_proj": 1}),
    ],
)
def test_a_variant_that_is_not_computed_is_refused_by_name(base, saved, key, value):
    """pissa and olora begin by changing the base's own weights, alora adapts only what follows certain tokens."""
    edit_config(saved, **{key: value})
    refused(base, saved, "adapter_config.json", key)


def test_every_key_that_peft_writes_is_known(base, saved):
    """With its default: peft's newest file loads, and what is off is no reason to refuse."""
    LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]).save_pretrained(saved)
    lora.load(frozen(base), saved)
    written = json.loads((saved / "adapter_config.json").read_text())
    needed = {"r", "lora_alpha", "target_modules"}
    edit_config(saved, **{key: None for key in written if key not in needed})
    lora.load(frozen(base), saved)


@pytest.mark.parametrize(
    "changes",
    [
        {"enable_lora": None, "merge_weights": False},
        {"auto_mapping": {"unsloth_fixed": True}, "ensure_weight_tying": False},
        {"exclude_modules": ["lm_head"]},
        {"layers_pattern": "layers", "loftq_config": {}, "revision": "main"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 1.0}},
        {"_name_or_path": "me/adapter", "task_type": "FEATURE_EXTRACTION"},
        {"velora_config": {"num_groups": 64}},
    ],
    ids=str,
)
def test_keys_that_change_nothing_are_no_reason_to_refuse(base, saved, changes):
    model = frozen(base)
    lora.load(model, saved)
    edit_config(saved, **changes)
    again = frozen(base)
    lora.load(again, saved)
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))


def test_excluded_modules_have_no_adapter_as_in_peft(base, tmp_path):
    ref = by_peft(base, exclude_modules=["q_proj", "lm_head"]).eval()
    ref.save_pretrained(tmp_path)
    edit_config(tmp_path, target_modules=NAMES, exclude_modules=["q_proj", "lm_head"])
    loaded = frozen(base)
    lora.load(loaded, tmp_path)
    assert not any("q_proj" in key for key in lora.parameters(loaded))
    assert distance(logits(loaded.eval(), tokens()), logits(ref, tokens())) < 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_adapter_with_a_number_that_is_not_finite_is_named(base, saved, value):
    spoiled = torch.ones(16, 4)
    spoiled[3, 2] = value
    edit_tensors(saved, lambda t: t.update({KEY: spoiled}))
    refused(base, saved, "adapter_model.safetensors", KEY, "not finite")
    with pytest.raises(UserError, match="not finite"):
        lora.load_model(base, "cpu", None, quant.make_linear("none"), adapter=saved, merge=True)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_an_adapter_of_codes_is_named(base, saved, dtype):
    edit_tensors(saved, lambda t: t.update({KEY: torch.ones(16, 4).to(dtype)}))
    refused(base, saved, "adapter_model.safetensors", KEY, "stored as")


def test_an_adapter_in_pickle_is_named_and_one_beside_it_is_passed_over(base, saved):
    (saved / "adapter_model.bin").write_bytes(b"pickle")
    lora.load(frozen(base), saved)
    (saved / "adapter_model.safetensors").unlink()
    refused(base, saved, "adapter_model.bin", "pickle")


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "w1"])
def test_an_unknown_target_is_named(base, saved, name):
    edit_config(saved, target_modules=["q_proj", name])
    refused(base, saved, name)
    for targets in (f"q_proj,{name}", name):
        with pytest.raises(UserError, match=name):
            lora.adapt(frozen(base), 4, 8, targets=targets)


# --- an adapter that stands still ---


@pytest.mark.parametrize("kind", ["none", "nf4", "fp8"])
@pytest.mark.parametrize("targets", ["all", "q_proj,v_proj", "down_proj"])
@torch.no_grad()
def test_an_adapter_that_is_cast_once_has_the_same_logits_to_the_bit(
    biased, tmp_path, kind, targets
):
    # NF4 wants widths that are multiples of 64.
    folder = make_model(tmp_path / "wide") if kind == "nf4" else biased
    model = models.load(folder, make_linear=quant.make_linear(kind), product_dtype=torch.bfloat16)
    lora.adapt(model, 4, 8, targets=targets)
    randomise(model)
    before = logits(model, tokens())
    with lora.standing_still(model):
        assert torch.equal(logits(model, tokens()), before)
        # Witness: what happens to A and B meanwhile is not seen.
        for p in lora.parameters(model).values():
            p.zero_()
        assert torch.equal(logits(model, tokens()), before)
    assert not torch.equal(logits(model, tokens()), before)


@torch.no_grad()
def test_an_untrained_adapter_that_stands_still_is_not_computed(base, monkeypatch):
    model = frozen(base)
    before = logits(model, tokens())
    lora.adapt(model, 4, 8)
    with monkeypatch.context() as patch, lora.standing_still(model):
        patch.setattr(quant, "group_mm", None)
        assert torch.equal(logits(model, tokens()), before)


def test_training_goes_on_behind_a_model_that_stood_still(base):
    """Also where the block is left by an error; and nothing stands still where that is forbidden."""
    model = frozen(base)
    lora.adapt(model, 4, 8)
    randomise(model)
    expected = gradient_of(model)
    with pytest.raises(KeyError), lora.standing_still(model):
        raise KeyError
    assert torch.equal(gradient_of(model), expected)
    with lora.standing_still(model, unless=True):
        assert torch.equal(gradient_of(model), expected)


def gradient_of(model):
    model.zero_grad()
    mean_loss(model, tokens()).backward()
    return torch.cat([p.grad.flatten() for p in lora.parameters(model).values()])
