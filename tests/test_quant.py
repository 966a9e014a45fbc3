"""The frozen layer in 4 and 8 bits, against bitsandbytes' own functions, a float64 loop, and the plain layer."""

from cli import UserError

import functools
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_model
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config as functorch_config
from torch._inductor.compile_fx import compile_fx
from torch._subclasses import FakeTensorMode

import lora
import model as models
import quant
from speed import fp8 as e4m3
from speed import meters

CPU = torch.device("cpu")


def error(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def weight(out=256, width=128, seed=0):
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed)) * 0.02


def layer(kind, W, fp8=False):
    made = quant.make_linear(kind)("layers.0.q_proj", W)
    if fp8:
        quant.multiply_in_fp8(made, CPU)
    return made


def test_the_bytes_of_the_docstring_are_those_of_a_real_layer():
    W = weight(4096, 4096).bfloat16()
    for kind, name in (("none", "Plain"), ("fp8", "FP8"), ("nf4", "NF4")):
        held = sum(p.nbytes for p in layer(kind, W).parameters())
        assert f"{held:,}" in quant.__doc__, (kind, held)
        assert all(not p.requires_grad for p in layer(kind, W).parameters())
        assert name in quant.__doc__


def test_nf4_is_that_of_bitsandbytes_with_double_quantisation():
    from bitsandbytes import functional

    W = weight().bfloat16()
    codes, state = functional.quantize_4bit(W, quant_type="nf4", compress_statistics=True)
    made = layer("nf4", W)
    assert torch.equal(made.weight.flatten(), codes.flatten())
    reference = functional.dequantize_4bit(codes, state)
    assert torch.equal(made.full(torch.bfloat16), reference)
    assert torch.equal(quant.full_in_backward(made, torch.bfloat16), reference)
    assert 0.05 < error(reference, W) < 0.12


@pytest.mark.parametrize("kind", ["none", "nf4", "fp8"])
@pytest.mark.parametrize("fp8, bound", [(False, 1e-6), (True, 0.045)])
def test_products_of_a_kind_are_those_of_its_dequantised_weight(kind, fp8, bound):
    made, g = layer(kind, weight(), fp8), torch.Generator().manual_seed(1)
    W = made.full(torch.float32)
    x, dy = torch.randn(2, 5, 128, generator=g), torch.randn(2, 5, 256, generator=g)
    assert made.mm(x).shape == (2, 5, 256) and made.mm_t(dy).shape == (2, 5, 128)
    assert error(made.mm(x), x @ W.t()) <= bound
    assert error(made.mm_t(dy), dy @ W) <= bound
    x.requires_grad_()
    made(x).backward(dy)
    assert torch.equal(x.grad, made.mm_t(dy))
    if fp8 and kind == "fp8":  # a planted fault: the scales of another layer
        made.scale = layer("fp8", weight(seed=2) * 2).scale
        assert error(made.mm(x), x @ W.t()) > 2 * bound


@pytest.mark.parametrize("kind", ["none", "nf4", "fp8"])
@pytest.mark.parametrize("fp8, bound", [(False, 1e-6), (True, 0.045)])
@pytest.mark.parametrize(
    "large", [0.02, 3.0]
)  # 3: rows of B far above W's, beyond what W's scale could hold
def test_a_loras_products_ride_along(kind, fp8, bound, large):
    made, g = layer(kind, weight(), fp8), torch.Generator().manual_seed(1)
    W, x, dy = (
        made.full(torch.float32),
        torch.randn(5, 128, generator=g),
        torch.randn(5, 256, generator=g),
    )
    u, B, A = (
        torch.randn(5, 6, generator=g),
        torch.randn(256, 6, generator=g) * large,
        torch.randn(6, 128, generator=g),
    )
    (y,) = quant.group_mm([made], x, u, [B])
    assert error(y, x @ W.t() + u @ B.t()) <= bound
    assert error(quant.group_mm_t([made], [dy], u, A), dy @ W + u @ A) <= bound
    assert torch.equal(quant.group_mm_t([made], [dy], None, A), made.mm_t(dy))


@pytest.mark.parametrize("factor", [1.0, 1e-4, 0.0])
def test_a_tiny_layer_of_a_group_costs_the_others_nothing_in_fp8(factor):
    """Gate's output beside an up layer of small or no weights at all, with a B of ordinary size on both."""
    W, g = weight(256, 128), torch.Generator().manual_seed(1)
    layers = [layer("none", W, fp8=True), layer("none", W * factor, fp8=True)]
    x, u, B = (torch.randn(*shape, generator=g) for shape in ((9, 128), (9, 4), (512, 4)))
    Bs = (B * 0.02).split(256)
    gate, up = quant.group_mm(layers, x, u, Bs)
    assert error(gate, x @ W.t() + u @ Bs[0].t()) < 0.06
    assert error(up, x @ (W * factor).t() + u @ Bs[1].t()) < 0.2


def test_a_group_of_nf4_layers_has_the_gradients_of_plain_ones_on_the_same_weights():
    grads = []
    for kind in ("nf4", "none"):
        layers = [layer("nf4", weight(256, 128, seed=i)) for i in range(2)]
        if kind == "none":
            layers = [layer("none", made.full(torch.float32)) for made in layers]
        g = torch.Generator().manual_seed(3)
        adapted = [lora.LoRA(made, 4, 2.0, generator=g) for made in layers]
        for a in adapted:
            a.B.data.normal_(generator=g)
        x = torch.randn(7, 128, generator=g).requires_grad_()
        sum((y * (i + 1)).sum() for i, y in enumerate(lora.project(x, adapted))).backward()
        grads.append([x.grad, *(p.grad for a in adapted for p in (a.A, a.B))])
    for a, b in zip(*grads, strict=True):
        assert error(a, b) < 1e-5


def test_a_frozen_layer_of_ones_own_needs_mm_and_mm_t_only():
    class Mine(torch.nn.Module):
        bias = None

        def __init__(self, W):
            super().__init__()
            self.W = torch.nn.Parameter(W, requires_grad=False)
            self.out_features, self.in_features = W.shape

        def mm(self, x):
            return x @ self.W.t()

        def mm_t(self, g):
            return g @ self.W

    W, got = weight(16, 8), []
    for base in (Mine(W), layer("none", W)):
        adapted = lora.LoRA(base, 2, 2.0, generator=torch.Generator().manual_seed(0))
        adapted.B.data.fill_(0.1)
        x = torch.ones(3, 8, requires_grad=True)
        (y,) = lora.project(x, [adapted])
        y.square().sum().backward()
        got.append([y, x.grad, adapted.A.grad, adapted.B.grad])
    for a, b in zip(*got, strict=True):
        assert torch.allclose(a, b, rtol=1e-5)


def sum_by_hand(layers, x, u, Bs):
    return [
        x @ made.full(torch.float32).t() + (0 if B is None else u @ B.t())
        for made, B in zip(layers, Bs, strict=True)
    ]


@pytest.mark.parametrize("in_fp8, bound", [(False, 1e-6), (True, 0.06)])
@pytest.mark.parametrize("kind", ["none", "nf4", "fp8"])
def test_a_group_with_a_layer_that_has_no_lora(kind, in_fp8, bound, monkeypatch):
    """With --fp8 the group is one product forward and one backward; else each layer has its own."""
    layers = [layer(kind, weight(out, seed=out), in_fp8) for out in (256, 48, 64)]
    g = torch.Generator().manual_seed(1)
    x, u = torch.randn(9, 128, generator=g), torch.randn(9, 6, generator=g)
    A = torch.randn(6, 128, generator=g)
    Bs = [torch.randn(made.out_features, 6, generator=g) * 0.02 for made in layers]
    Bs[1] = None
    grads = [torch.randn(9, made.out_features, generator=g) for made in layers]
    products, real = [], e4m3.scaled_mm
    monkeypatch.setattr(e4m3, "scaled_mm", lambda *a: products.append(1) or real(*a))
    for y, want in zip(
        quant.group_mm(layers, x, u, Bs), sum_by_hand(layers, x, u, Bs), strict=True
    ):
        assert error(y, want) <= bound
    assert len(products) == in_fp8
    dx = sum(dy @ made.full(torch.float32) for dy, made in zip(grads, layers, strict=True))
    assert error(quant.group_mm_t(layers, grads, u, A), dx + u @ A) <= bound
    assert error(quant.group_mm_t(layers, grads, None, A), dx) <= bound
    assert len(products) == 3 * in_fp8


def gradients_of(layers, compiled):
    """Outputs and gradients of a group of adapted layers, with shapes that the compiler has to leave open."""
    g = torch.Generator().manual_seed(3)
    adapted = [lora.LoRA(made, 4, 2.0, generator=g) for made in layers]
    for a in adapted:
        a.B.data.normal_(generator=g).mul_(0.1)
    project = lora.project
    if compiled:
        torch._dynamo.reset()
        project = torch.compile(project, dynamic=True, backend="aot_eager", fullgraph=True)
    got = []
    for N in (7, 9):
        x = torch.randn(3, N, layers[0].in_features, generator=g).requires_grad_()
        ys = project(x, adapted)
        sum((y * (i + 1)).square().sum() for i, y in enumerate(ys)).backward()
        got += [*ys, x.grad]
    return got + [p.grad for a in adapted for p in (a.A, a.B)]


@pytest.mark.parametrize("outs, width", [([256, 64], 128), ([64], 256)], ids=["wide", "narrow"])
@pytest.mark.parametrize("kind, in_fp8", [("nf4", False), ("none", True)])
def test_compiled_products_are_the_eager_ones(kind, in_fp8, outs, width):
    """Where the compiler is at work a LoRA's columns ride along, sums are made apart, and a term in x keeps a gradient
    alive. The results are those of eager mode: no gradient is lost."""
    layers = [layer(kind, weight(out, width, seed=out), in_fp8) for out in outs]
    torch._dynamo.utils.counters.clear()
    eager, compiled = gradients_of(layers, False), gradients_of(layers, True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for a, b in zip(compiled, eager, strict=True):
        assert b.norm() > 0
        assert error(a, b) < 1e-5


@pytest.mark.parametrize("out, width", [(256, 128), (128, 256)])
@pytest.mark.parametrize("kind, rides", [("nf4", True), ("fp8", True), ("none", False)])
def test_a_lora_rides_along_where_the_compiler_dequantises(kind, rides, out, width, monkeypatch):
    """On the side of the product that is not the wider one, and nowhere in eager mode. The numbers are the same."""
    made, g = layer(kind, weight(out, width)), torch.Generator().manual_seed(1)
    x, u, dy = (torch.randn(9, n, generator=g) for n in (width, 6, out))
    A, B = torch.randn(6, width, generator=g), torch.randn(out, 6, generator=g)
    padded, pad = [], quant.pad
    monkeypatch.setattr(quant, "pad", lambda t, dim: padded.append(1) or pad(t, dim))
    eager = quant.group_mm([made], x, u, [B]), [quant.group_mm_t([made], [dy], u, A)]
    assert not padded
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    (y,) = quant.group_mm([made], x, u, [B])
    assert bool(padded) == (rides and out > width)
    padded.clear()
    dx = quant.group_mm_t([made], [dy], u, A)
    assert bool(padded) == (rides and out < width)
    assert error(y, eager[0][0]) < 1e-6 and error(dx, eager[1][0]) < 1e-6


def backward_decodes(once):
    """How often the backward graph of a compiled, recomputed group dequantises."""
    made = layer("nf4", weight(256, 128))
    if once:
        quant.decode_once(made)
    graphs = []

    def look(graph, inputs):
        codes = [str(node.target) for node in graph.graph.nodes]
        graphs.append(sum("dequantize_4bit" in code for code in codes))
        return make_boxed_func(graph)

    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=look, bw_compiler=look, partition_fn=min_cut_rematerialization_partition
    )
    with functorch_config.patch(activation_memory_budget=0):
        x = torch.randn(7, 128, requires_grad=True)
        # The square keeps y for backward: with a budget of 0 that means to compute y again.
        torch.compile(lambda x: made(x).square().sum(), backend=backend)(x).backward()
    return graphs[-1]


def test_decode_once_lets_backward_share_what_it_dequantises():
    assert backward_decodes(False) == 2
    assert backward_decodes(True) == 1


def copies_of_weights(kinds, in_fp8, once=False):
    """What autograd keeps of a compiled group beside parameters, activations, and A and B cast."""
    N, R = 7, 6
    layers = [layer(kind, weight(256, 128), in_fp8) for kind in kinds]
    adapted = [lora.LoRA(made, R // 2, 2.0) for made in layers]
    if once:
        quant.decode_once(torch.nn.ModuleList(adapted))
    torch._dynamo.reset()
    # All of inductor's steps up to the two graphs of forward and backward; these run as they are.
    backend = functools.partial(
        compile_fx, inner_compile=lambda graph, inputs, **how: make_boxed_func(graph)
    )
    project = torch.compile(lora.project, dynamic=True, backend=backend, fullgraph=True)
    kept = []
    x = torch.randn(N, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ys = project(x, adapted)
    assert any(t.shape == x.shape for t in kept), "the input is kept, for dA"
    sum(y.square().sum() for y in ys).backward()
    assert x.grad.norm() > 0
    own = {t.data_ptr() for a in adapted for t in (*a.parameters(), *a.buffers())}
    return [t for t in kept if t.data_ptr() not in own and t.dim() and not {N, R} & set(t.shape)]


@pytest.mark.parametrize(
    "kinds, in_fp8",
    [
        (["nf4", "fp8"], False),
        pytest.param(["none", "none"], True, marks=pytest.mark.slow),
        pytest.param(["nf4", "nf4"], True, marks=pytest.mark.slow),
        pytest.param(["fp8", "fp8"], True, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_block_keeps_no_copy_of_a_weight_for_backward(kinds, in_fp8):
    """No dequantised W, no absmax in fp32, no codes of layers joined. With decode_once W is kept, or its codes are."""
    assert not copies_of_weights(kinds, in_fp8)
    assert copies_of_weights(kinds, in_fp8, once=True)


def test_a_model_is_quantised_while_it_loads(tmp_path):
    folder = make_model(tmp_path / "m")
    whole = models.load(folder, dtype=torch.bfloat16, make_linear=quant.make_linear("none"))
    small = models.load(folder, dtype=torch.bfloat16, make_linear=quant.make_linear("nf4"))
    layers, before, after, rest = meters.count_frozen(small, torch.bfloat16)
    frozen = sum(m.weight.nbytes for m in whole.modules() if isinstance(m, quant.Plain))
    assert (layers, before) == (14, frozen) and after < 0.5 * before
    assert rest == sum(p.nbytes for p in whole.parameters()) - frozen
    for name, plain in whole.named_modules():
        if isinstance(plain, quant.Plain):
            assert error(small.get_submodule(name).full(torch.float32), plain.weight) < 0.12, name


@pytest.mark.parametrize(
    "make, words",
    [
        (
            lambda: quant.make_linear("nf4")("layers.3.up_proj", torch.ones(64, 96)),
            ["3.up_proj", "96", "--quant"],
        ),
        (
            lambda: quant.multiply_in_fp8(torch.nn.Module(), torch.device("mps")),
            ["--fp8", "8.9", "drop"],
        ),
    ],
)
def test_what_cannot_be_quantised_is_refused_by_name(make, words):
    with pytest.raises(UserError) as e:
        make()
    assert all(word in str(e.value) for word in words)


def test_an_older_card_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    with pytest.raises(UserError, match="8.9"):
        quant.multiply_in_fp8(torch.nn.Module(), torch.device("cuda"))


def test_bitsandbytes_missing_or_without_a_library_for_the_card(monkeypatch):
    quant.bitsandbytes.cache_clear()
    with pytest.raises(UserError, match="no library for this mps"):
        quant.bitsandbytes(torch.device("mps"))
    monkeypatch.setattr(quant.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install bitsandbytes.*--quant none"):
        quant.bitsandbytes(CPU)
    quant.bitsandbytes.cache_clear()


def test_bitsandbytes_comes_only_where_it_is_needed_and_without_a_warning():
    code = (
        "import sys, train, torch, quant; assert 'bitsandbytes' not in sys.modules; "
        "quant.bitsandbytes(torch.device('cpu')); assert 'bitsandbytes' in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("N", [1, 3, 70])
def test_joined_projections_are_those_of_each_layer(N):
    """Attention's three projections as one product: the same numbers, and layers that are still themselves."""
    g = torch.Generator().manual_seed(0)
    layers = [quant.NF4(torch.randn(rows, 128, generator=g)) for rows in (256, 64, 64)]
    before = [layer.full(torch.float32) for layer in layers]
    layers[0].few = 64
    joined, x = quant.Joined(layers), torch.randn(N, 1, 128, generator=g)
    got = joined(x, layers)
    assert all(
        torch.equal(layer.full(torch.float32), W) for layer, W in zip(layers, before, strict=True)
    )
    assert all(
        layer.weight.untyped_storage().data_ptr() == joined.codes.data_ptr() for layer in layers
    )
    for y, W in zip(got, before, strict=True):
        torch.testing.assert_close(y, (x.double() @ W.double().t()).float(), rtol=1e-4, atol=1e-4)


def nf4_model(tmp_path):
    return models.load(make_model(tmp_path / "m"), make_linear=quant.make_linear("nf4"))


def on_a_gpu(block):
    """The block's q_proj.weight, as if on a GPU."""
    with FakeTensorMode():
        codes = torch.empty(1, dtype=torch.uint8, device="cuda")
        block.self_attn.q_proj.weight = torch.nn.Parameter(codes, requires_grad=False)


def test_few_rows_are_for_sampling_only_and_only_bare_nf4_layers_are_joined(tmp_path):
    model = nf4_model(tmp_path)
    layers = [made for _, made in quant.frozen_layers(model)]
    projects = [block.self_attn.project for block in model.layers]
    assert {made.few for made in layers} == {0}
    quant.for_few_rows(model)
    assert {made.few for made in layers} == {64}
    # There is no kernel for few rows on a CPU, so nothing is joined.
    assert [block.self_attn.project for block in model.layers] == projects
    block = model.layers[0]
    assert not quant.can_be_joined(block)
    on_a_gpu(block)
    assert quant.can_be_joined(block)
    block.self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(64))
    assert not quant.can_be_joined(block)
    block.self_attn.q_proj.bias = None
    block.mlp.up_proj = lora.LoRA(block.mlp.up_proj, 2, 1.0)
    assert not quant.can_be_joined(block)
