"""Products in e4m3: codes and scales against a loop in float64, products against what the codes stand for."""

import pytest
import torch

from speed import fp8


def error(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def matrix(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_e4m3_codes_of_a_row_against_a_loop_in_float64():
    W = matrix(16, 32) * 0.02
    W[3] = 0
    W[5, 7] = 40.0  # an outlier costs its own row only
    codes, scale = fp8.to_e4m3(W)
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    grid = grid[grid.isfinite()]
    for i, row in enumerate(W.double()):
        s = max(float(row.abs().max()), 1e-12) / 448
        assert float(scale[i]) == pytest.approx(s, rel=1e-6)
        for j, w in enumerate(row):
            nearest = (grid - w / s).abs().min()
            assert abs(float(codes[i, j].double() - w / s)) <= float(nearest) + 1e-4
    assert error(codes[0].float() * scale[0], W[0]) < 0.03


def test_parts_side_by_side_share_the_scales_of_the_larger_one():
    a, b = matrix(6, 8), matrix(6, 4, seed=1)
    b[2] *= 50
    codes, scale = fp8.to_e4m3(a, b)
    whole_codes, whole_scale = fp8.to_e4m3(torch.cat((a, b), 1))
    assert torch.equal(scale, whole_scale)
    assert torch.equal(codes.float(), whole_codes.float())


def test_a_weights_row_far_below_the_others_keeps_room():
    W = matrix(8, 32)
    W[3] = 0
    scale = fp8.row_scale(W)
    assert float(scale[3]) == pytest.approx(float(scale.max()) / 64)
    others = [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(scale[others], fp8.scale_of_rows(W)[others])
    assert float(fp8.row_scale(W * 0).min()) == pytest.approx(1e-6)


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "in fp32"])
def test_scaled_product_against_float64(kernel, monkeypatch):
    """A scale belongs to its own row of a, its own row of b: a mix-up of the two would be far off."""
    if kernel and not fp8.HAS_ROW_SCALES["cpu"]:
        pytest.skip("this torch has no row scales on the CPU")
    monkeypatch.setitem(fp8.HAS_ROW_SCALES, "cpu", kernel)
    calls = []
    real = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *a, **k: calls.append(1) or real(*a, **k))
    a, scale_a = fp8.to_e4m3(matrix(16, 32) * torch.logspace(-2, 2, 16)[:, None])
    b, scale_b = fp8.to_e4m3(matrix(48, 32, seed=1) * torch.logspace(2, -2, 48)[:, None])
    want = (a.double() * scale_a) @ (b.double() * scale_b).t()
    got = fp8.scaled_mm(a, scale_a, b, scale_b, torch.float32)
    assert bool(calls) == kernel
    assert got.dtype == torch.float32
    # The kernel's result is bf16, of 8 bits of mantissa.
    assert error(got, want) < (0.004 if kernel else 1e-6)


def test_both_products_use_the_same_codes_of_the_weight():
    """Forward sums over `in`, the gradient over `out`, where W's scales go into g."""
    W = matrix(48, 32) * torch.logspace(-1, 1, 48)[:, None]
    scale = fp8.row_scale(W)
    codes = fp8.to_codes(W, scale)
    x, g = matrix(5, 32, seed=1), matrix(5, 48, seed=2)
    kept = codes.double() * scale
    assert error(fp8.mm(x, codes, scale), x.double() @ kept.t()) < 0.04
    assert error(fp8.mm_t(g, codes, scale), g.double() @ kept) < 0.04
    assert error(fp8.mm_t(g, codes, scale * 0 + scale.mean()), g.double() @ kept) > 0.2
