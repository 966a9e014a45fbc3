"""Products in e4m3: floats of 8 bits, 3 of them mantissa, which a GPU with fp8 multiplies twice as fast as bf16.

A matrix is kept as codes and scales, and is about codes * scale. e4m3 ends at 448, so a scale takes the largest
magnitude of its row to 448. Which row has a scale, for a product of N tokens:

    x [N, in]      codes [N, in]      scale [N, 1]      one a token: an outlier costs the digits of its own token only
    W [out, in]    codes [out, in]    scale [out, 1]    one an output feature
    g [N, out]     codes [N, out]     scale [N, 1]      the gradient of the output, one a token

    y  = x · Wᵀ    sums over `in`. Each y[n, o] has one scale of x and one of W: they multiply the finished sum.
    dx = g · W     sums over `out`, the axis of W's scales. So W's scales multiply g before g is cast to e4m3, and the
                   same codes of W serve both products.
"""

import functools

import torch

LARGEST = 448  # of e4m3


def scale_of_rows(*parts):
    """The scales [N, 1], fp32, of parts [N, K1], [N, K2] … that stand side by side."""
    tops = [part.abs().amax(-1, keepdim=True) for part in parts]  # [N, 1] each
    top = functools.reduce(torch.maximum, tops)
    return top.float().clamp(min=1e-12) / LARGEST


def to_codes(matrix, scale):
    """matrix [N, K] / scale [N, 1] in e4m3"""
    return (matrix.float() / scale).to(torch.float8_e4m3fn)


def to_e4m3(*parts):
    """Parts [N, K1], [N, K2] … side by side -> (codes e4m3 [N, K], scale fp32 [N, 1])"""
    scale = scale_of_rows(*parts)
    codes = [to_codes(part, scale) for part in parts]
    if len(codes) == 1:
        return codes[0], scale
    return torch.cat(codes, 1), scale


def row_scale(W):
    """The scales of a weight [out, in] -> [out, 1].

    A row far below the others, of zeros say, gets a larger scale than it needs: the B of a LoRA is cast by the same
    scales, and would not fit a tiny one."""
    scale = scale_of_rows(W)
    floor = max(scale.max().item() / 64, 1e-6)
    return scale.clamp(min=floor)


TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

# torch 2.11: on the CPU, _scaled_mm has row scales from torch 2.13 on; before, the codes are multiplied in fp32.
# tests/test_fp8.py: test_scaled_product_against_float64 runs both ways.
HAS_ROW_SCALES = {"cuda": True, "cpu": TORCH >= (2, 13)}


def scaled_mm(a, scale_a, b, scale_b, dtype):
    """(a [M, K] · b [N, K]ᵀ) * scale_a [M, 1] * scale_b [N, 1]ᵀ of e4m3 codes a and b -> [M, N], summed in fp32"""
    if not HAS_ROW_SCALES.get(a.device.type):
        sums = a.float() @ b.float().t()  # [M, N]
        return (sums * scale_a * scale_b.t()).to(dtype)
    y = torch._scaled_mm(
        a,
        b.t(),
        scale_a=scale_a,
        scale_b=scale_b.t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=a.is_cuda,
    )
    return y.to(dtype)


def mm(x, codes, scale):
    """x [N, in] · Wᵀ of W's codes [out, in] and scale [out, 1] -> [N, out]"""
    x_codes, x_scale = to_e4m3(x)
    y = scaled_mm(x_codes, x_scale, codes, scale, x.dtype)
    return keep_gradient(y, x)


def mm_t(g, codes, scale):
    """g [N, out] · W of W's codes [out, in] and scale [out, 1] -> [N, in]"""
    g_codes, g_scale = to_e4m3(g.float() * scale.t())
    return scaled_mm_t(g_codes, g_scale, codes, g.dtype)


def scaled_mm_t(g_codes, g_scale, codes, dtype):
    """g_codes [N, out] · codes [out, in] * g_scale [N, 1] -> [N, in], where W's scales are in g_codes already"""
    columns = codes.t().contiguous()  # [in, out]: _scaled_mm sums over the last axis of both
    one = torch.ones(codes.shape[1], 1, device=codes.device)
    return scaled_mm(g_codes, g_scale, columns, one, dtype)


def keep_gradient(y, x):
    """y [N, out] as a function of x [N, in], in the compiler's eyes"""
    if not torch.compiler.is_compiling():
        return y
    # torch 2.11: _scaled_mm has no derivative, so the compiler takes the result of an autograd function around it for
    # a constant and loses every gradient. A term in x prevents that.
    # tests/test_quant.py: test_compiled_products_are_the_eager_ones says whether the term is still needed (on a CPU
    # with torch 2.13 it is not).
    return y + 0 * x[:, :1]
