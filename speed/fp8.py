"""Products in e4m3 (--fp8): floats of 8 bits, with 4 bits of exponent and 3 of mantissa; the largest is 448.

A matrix is stored as codes and scales: matrix ≈ codes * scale. The scale of a row takes its largest magnitude to 448.
The row [0.5, -7, 1] has scale 7 / 448 and codes [32, -448, 64]. The rows that have a scale, for N tokens:

    x [N, in]      codes [N, in]      scale [N, 1]      one a token, so an outlier costs only its own token digits
    W [out, in]    codes [out, in]    scale [out, 1]    one an output feature
    g [N, out]     codes [N, out]     scale [N, 1]      one a token; g is the gradient of the output

The kernel sums products of codes, and multiplies by scales after the sum. So a scale must not change along the summed
axis. Forward sums over `in`, where it does not:

    y = x · Wᵀ     y[n, o]  = Σ_i x[n, i] · W[o, i]  =  x_scale[n] · W_scale[o] · Σ_i x_code[n, i] · W_code[o, i]
    dx = g · W     dx[n, i] = Σ_o g[n, o] · W[o, i]  =  Σ_o (g[n, o] · W_scale[o]) · W_code[o, i]

Backward sums over `out`, where W_scale[o] does. So mm_t multiplies g by W's scales first and casts that product to
e4m3. The same codes of W then serve both products.

Why: an H100 makes 1,500 TFLOP/s in e4m3 and 700 in bf16. Llama-3-8B in NF4, 32 × 256 tokens with offloaded checkpoints,
trains at 18,283 tokens/s with --fp8 and at 12,514 without.

Cost: 3 bits of mantissa on both sides. One product is off by 0.036, a gradient through two blocks of 8B's widths by
0.14 to 0.25 (bf16: 0.03). The default model's held-out loss after 200 steps in NF4 is 1.7535, without --fp8 1.7429.

Where: forward and input gradient of the seven linears of each block, with LoRA's columns in them (quant.fp8_group_mm).
All else stays in bf16 or fp32: x · Aᵀ, the gradients of A and B, attention, norms, embedding, head and loss.

Proof: tests/test_fp8.py: test_both_products_use_the_same_codes_of_the_weight. tests/test_quant.py:
test_products_of_a_kind_are_those_of_its_dequantised_weight. tests/test_witness.py: test_fp8_multiplies_in_e4m3.
tests/test_gpu.py: test_gradients_of_every_a_and_b.
"""

import functools

import torch

# The largest number of e4m3.
LARGEST = 448


def scale_of_rows(*parts):
    """The scales [N, 1], fp32, of a matrix whose columns come in parts: [N, K1], [N, K2] …"""
    tops = [part.abs().amax(-1, keepdim=True) for part in parts]  # [N, 1] each
    top = functools.reduce(torch.maximum, tops)
    return top.float().clamp(min=1e-12) / LARGEST


def to_codes(matrix, scale):
    """matrix [N, K] / scale [N, 1], cast to e4m3"""
    return (matrix.float() / scale).to(torch.float8_e4m3fn)


def to_e4m3(*parts):
    """A matrix in parts [N, K1], [N, K2] … -> (codes e4m3 [N, K1 + K2 + …], scale fp32 [N, 1])"""
    scale = scale_of_rows(*parts)
    codes = [to_codes(part, scale) for part in parts]
    if len(codes) == 1:
        return codes[0], scale
    return torch.cat(codes, 1), scale


def row_scale(W):
    """The scales of a weight [out, in] -> [out, 1], none below 1/64 of the largest.

    A row of zeros would else have a tiny scale. quant.fp8_group_mm casts the B of a LoRA with these scales too. An
    ordinary B divided by a tiny scale would exceed 448. Proof: tests/test_quant.py:
    test_a_tiny_layer_of_a_group_costs_the_others_nothing_in_fp8."""
    scale = scale_of_rows(W)
    floor = max(scale.max().item() / 64, 1e-6)
    return scale.clamp(min=floor)


TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

# torch 2.11: _scaled_mm takes no row scales on a CPU, so the codes are multiplied in fp32 there; 2.13 takes them.
# This can go when no supported torch skips the case "kernel" of tests/test_fp8.py: test_scaled_product_against_float64.
HAS_ROW_SCALES = {"cuda": True, "cpu": TORCH >= (2, 13)}


def scaled_mm(a, scale_a, b, scale_b, dtype):
    """(a [M, K] · b [N, K]ᵀ) * scale_a [M, 1] * scale_b [N, 1]ᵀ of e4m3 codes a and b -> [M, N]

    use_fast_accum: the GPU sums inside its tensor cores, which is faster and less exact than summing in fp32."""
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
    """x [N, in] · Wᵀ -> [N, out]. codes [out, in] and scale [out, 1]: W's"""
    x_codes, x_scale = to_e4m3(x)
    y = scaled_mm(x_codes, x_scale, codes, scale, x.dtype)
    return keep_gradient(y, x)


def mm_t(g, codes, scale):
    """g [N, out] · W -> [N, in]. codes [out, in] and scale [out, 1]: W's"""
    # W's scales change along the summed axis `out`, so they are multiplied into g.
    g_codes, g_scale = to_e4m3(g.float() * scale.t())
    return scaled_mm_t(g_codes, g_scale, codes, g.dtype)


def scaled_mm_t(g_codes, g_scale, codes, dtype):
    """g_codes [N, out] · codes [out, in] * g_scale [N, 1] -> [N, in]. W's scales are part of g_codes and g_scale."""
    # Transpose the codes in memory, because _scaled_mm sums over the last axis of both sides.
    columns = codes.t().contiguous()  # [in, out]
    one = torch.ones(codes.shape[1], 1, device=codes.device)
    return scaled_mm(g_codes, g_scale, columns, one, dtype)


def keep_gradient(y, x):
    """y [N, out]; compiled, with a term in x [N, in] added that is 0"""
    if not torch.compiler.is_compiling():
        return y
    # torch 2.11: _scaled_mm has no derivative. So the compiler takes y, made inside an autograd function, for a
    # constant and loses every gradient. The term makes y depend on x.
    # This can go when tests/test_quant.py: test_compiled_products_are_the_eager_ones passes without it, as it does
    # with torch 2.13 on a CPU.
    return y + 0 * x[:, :1]
