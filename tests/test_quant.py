"""The frozen layer in 4 and 8 bits, against bitsandbytes' own functions, a float64 loop, and the plain layer."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_model

import lora
import model as models
import plan
import quant
from cli import UserError

CPU = torch.device("cpu")


def error(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def weight(out=256, width=128, seed=0):
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed)) * 0.02


def layer(kind, W, fp8=False):
    made = quant.make_linear(kind)("layers.0.q_proj", W)
    if fp8:
        made.multiply_in_fp8()
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
    assert torch.equal(made.full(torch.bfloat16, again=True), reference)
    assert 0.05 < error(reference, W) < 0.12


def test_e4m3_codes_of_a_row_against_a_loop_in_float64():
    W = weight(16, 32)
    W[3] = 0
    W[5, 7] = 40.0  # an outlier costs its own row only
    codes, scale = quant.to_e4m3(W)
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    grid = grid[grid.isfinite()]
    for i, row in enumerate(W.double()):
        s = max(float(row.abs().max()), 1e-12) / 448
        assert float(scale[i]) == pytest.approx(s, rel=1e-6)
        for j, w in enumerate(row):
            nearest = (grid - w / s).abs().min()
            assert abs(float(codes[i, j].double() - w / s)) <= float(nearest) + 1e-4
    assert error(codes[0].float() * scale[0], W[0]) < 0.03


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
    assert error(made.mm(x, u, B), x @ W.t() + u @ B.t()) <= bound
    assert error(made.mm_t(dy, u, A), dy @ W + u @ A) <= bound


@pytest.mark.parametrize("factor", [1.0, 1e-4, 0.0])
def test_a_tiny_layer_of_a_group_costs_the_others_nothing_in_fp8(factor):
    """Gate's output beside an up layer of small or no weights at all, with a B of ordinary size on both."""
    W, g = weight(256, 128), torch.Generator().manual_seed(1)
    layers = [layer("none", W, fp8=True), layer("none", W * factor, fp8=True)]
    x, u, B = (torch.randn(*shape, generator=g) for shape in ((9, 128), (9, 4), (512, 4)))
    gate, up = quant.fp8_mm(layers, x, u, B * 0.02)
    assert error(gate, x @ W.t() + u @ (B[:256] * 0.02).t()) < 0.06
    assert error(up, x @ (W * factor).t() + u @ (B[256:] * 0.02).t()) < 0.2


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
    for a, b in zip(*grads):
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
    for a, b in zip(*got):
        assert torch.allclose(a, b, rtol=1e-5)


def test_a_model_is_quantised_while_it_loads(tmp_path):
    folder = make_model(tmp_path / "m")
    whole = models.load(folder, dtype=torch.bfloat16, make_linear=quant.make_linear("none"))
    small = models.load(folder, dtype=torch.bfloat16, make_linear=quant.make_linear("nf4"))
    layers, before, after, rest = plan.count_frozen(small, torch.bfloat16)
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
    assert all(torch.equal(layer.full(torch.float32), W) for layer, W in zip(layers, before))
    assert all(
        layer.weight.untyped_storage().data_ptr() == joined.codes.data_ptr() for layer in layers
    )
    for y, W in zip(got, before, strict=True):
        torch.testing.assert_close(y, (x.double() @ W.double().t()).float(), rtol=1e-4, atol=1e-4)
