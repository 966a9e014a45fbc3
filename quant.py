"""The frozen linear layer: a weight W [out, in] that is multiplied with and never trained.

lora.py adapts any module that has in_features, out_features, bias and these two methods:

    mm(x)       x · Wᵀ, [*, in] -> [*, out]
    mm_t(g)     g · W,  [*, out] -> [*, in]: the gradient of mm's input

So lora.py need not know how W is kept. `Frozen` adds forward(x), for a layer without an adapter. Three kinds are here,
with the bytes of one 4096 × 4096 matrix:

    Plain  as stored, bf16 say: 2 a weight                                                  33,554,432
    FP8    e4m3 codes, 1 a weight: 16,777,216; an fp32 scale a row: 16,384                  16,793,600: 1.001 a weight
    NF4    4-bit codes: 8,388,608; absmax, one a block of 64, in 8 bits: 262,144; their      8,654,852: 0.516 a weight
           own absmax, fp32, one a block of 256 of them: 4,096; one fp32 offset: 4

Two flags, independent of each other: --quant says how W is kept, --fp8 says that products are made in e4m3. With --fp8,
a kind without a scale a row gets one. Class NF4 says why 4 bits help, what they cost, and where W is dequantised.

Three parts near the end serve speed alone and are marked "skip at first reading".
"""

from cli import UserError

import functools
import importlib.util
import logging
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from speed import fp8

# --- the seam ---


class Frozen(nn.Module):
    """What the three kinds share. Each kind adds full(dtype): the weight W [out, in] in that dtype.

    Three switches choose the kernels. All are off after loading, and one function sets each in every layer:

        switch          set by             wanted by                     effect
        fp8             multiply_in_fp8    --fp8                         mm and mm_t multiply e4m3 codes
        few             for_few_rows       sampling                      up to so many rows use small-batch kernels
        decoded_once    decode_once        --compile with --grad_ckpt    backward dequantises W once, not twice
    """

    # Whether W must be dequantised before a product.
    compressed = True

    def __init__(self, shape):
        super().__init__()
        self.shape = tuple(shape)
        self.out_features, self.in_features = self.shape
        self.bias = None  # [out]
        self.scale = None  # [out, 1], of W in e4m3
        self.fp8 = False
        self.few = 0  # rows
        self.decoded_once = False

    def full(self, dtype):
        """W [out, in] in dtype. Each kind has its own way."""
        raise NotImplementedError

    def mm(self, x):
        """x [*, in] · Wᵀ -> [*, out]"""
        if self.fp8:
            return mm_in_fp8(self, x)
        if has_small_batch_kernel(self, x):
            return mm_of_few_rows(self, x)
        W = self.full(x.dtype)
        return x @ W.t()

    def mm_t(self, g):
        """g [*, out] · W -> [*, in]"""
        if self.fp8:
            return mm_t_in_fp8(self, g)
        W = full_in_backward(self, g.dtype)
        return g @ W

    def forward(self, x):
        if torch.is_grad_enabled():
            y = FrozenMatmul.apply(x, self)
        else:
            y = self.mm(x)
        if self.bias is None:
            return y
        return y + self.bias.to(y.dtype)


class FrozenMatmul(torch.autograd.Function):
    """x · Wᵀ, with nothing saved for backward.

    The gradient of x is g · W, so backward needs no x, and the layer gives W once more. If autograd saved the
    dequantised W instead, NF4 would take 13.96 GB more on Llama-3-8B: all block weights in bf16."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return layer.mm(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.layer.mm_t(grad), None


def frozen(tensor):
    """A parameter that is not trained. Codes and scales are parameters too, so .to() and parameters() find them."""
    return nn.Parameter(tensor, requires_grad=False)


# --- the three kinds ---


class Plain(Frozen):
    """W in the dtype in which it was loaded."""

    compressed = False

    def __init__(self, weight):
        super().__init__(weight.shape)
        self.weight = frozen(weight)  # [out, in]

    def full(self, dtype):
        return self.weight.to(dtype)


class FP8(Frozen):
    """W in e4m3, 8 bits a weight, with one fp32 scale a row. On Llama-3-8B 6.98 GB, where bf16 takes 13.96 GB."""

    def __init__(self, weight):
        super().__init__(weight.shape)
        self.scale = frozen(fp8.row_scale(weight))  # [out, 1]
        self.weight = frozen(fp8.to_codes(weight, self.scale))  # [out, in]

    def full(self, dtype):
        W = self.weight.float() * self.scale
        return W.to(dtype)


class NF4(Frozen):
    """W in 4 bits (QLoRA, Dettmers et al. 2023).

    A block of 64 weights shares one scale: its largest magnitude, absmax. A weight divided by absmax becomes the 4-bit
    code of the nearest of 16 fixed values between -1 and 1. The 16 values are quantiles of a normal distribution,
    because weights are nearly normal: each code is then used about as often as the others.

    Double quantisation keeps the absmax values in 8 bits too, in blocks of 256. `offset` is the mean of all absmax; it
    is subtracted first, because the 8-bit format has a sign and absmax has none. `nested` is the absmax of each block.

        bits a weight    4 (code) + 8 / 64 (absmax) + 32 / (64 · 256) (nested) = 4.127

    Why: the block weights of Llama-3-8B, 6.98e9, take 3.60 GB in place of 13.96 GB in bf16. Without double
    quantisation absmax would be fp32: 4 + 32 / 64 = 4.5 bits, 3.93 GB. So double quantisation saves 0.33 GB.

    Cost: the relative error of W is 0.09. The default model's held-out loss after 200 steps is 1.743; bf16 gives 1.713.
    Before each product `full` dequantises W to bf16, at most 117 MB (gate_proj), which is dropped after the product.
    On an H100 this takes 43 of 451 ms of a step of 8,192 tokens, the cast for --fp8 included. How often a micro-batch
    dequantises each W:

        eager                      2    forward; backward's input gradient
        eager, --grad_ckpt         3    forward; backward's recomputed forward; its input gradient
        --compile                  2    as eager
        --compile --grad_ckpt      2    forward; backward, for both of its uses (see decode_once)
            and --offload_embed    3    as eager, to save memory
            and --lora_dropout     3    as eager, because the compiler's checkpoint would draw another dropout mask

    Proof: tests/test_quant.py: test_nf4_is_that_of_bitsandbytes_with_double_quantisation,
    test_decode_once_lets_backward_share_what_it_dequantises. tests/test_witness.py:
    test_quant_keeps_the_frozen_weights_small.

    The operators are bitsandbytes' on CPU and GPU. They are called as torch.ops, because torch.compile can then put
    them into its graph."""

    def __init__(self, weight):
        super().__init__(weight.shape)
        ops, table = bitsandbytes(weight.device)
        weight = weight.contiguous()
        codes, absmax = ops.quantize_4bit(weight, 64, "nf4", torch.uint8)
        self.offset = frozen(absmax.mean())
        absmax_codes, nested = ops.quantize_blockwise(absmax - self.offset, table, 256)
        self.weight = frozen(codes)  # [out * in / 2, 1], two weights a byte
        self.absmax = frozen(absmax_codes)  # [out * in / 64]
        self.nested = frozen(nested)  # [out * in / 64 / 256]
        # The 256 values that the 8-bit codes stand for.
        self.register_buffer("table", table, persistent=False)

    def full(self, dtype):
        return self.dequantise(self.weight, self.absmax, dtype)

    def dequantise(self, codes, absmax, dtype):
        scales = self.scales(absmax).flatten()
        dequantise = torch.ops.bitsandbytes.dequantize_4bit
        return dequantise(codes, scales, 64, "nf4", self.shape, dtype)

    def scales(self, absmax):
        """The absmax of each block of 64 weights, fp32. torch.compile makes one kernel of these lines."""
        number = torch.arange(absmax.numel(), device=absmax.device).view(absmax.shape)
        values = self.table[absmax.int()]
        return values * self.nested[number // 256] + self.offset


KINDS = {"none": Plain, "nf4": NF4, "fp8": FP8}


def make_linear(kind):
    """What model.load calls with each weight of a block, for --quant: make(name, tensor) -> a frozen layer."""

    def make(name, tensor):
        if kind == "nf4" and tensor.shape[1] % 64:
            raise UserError(
                f"--quant nf4 keeps weights in blocks of 64, but {name} is {tensor.shape[1]} wide; "
                "use --quant fp8 or none."
            )
        return KINDS[kind](tensor)

    return make


def frozen_layers(module):
    """[(name, layer)] of all Frozen layers in the module, which may itself be one."""
    return [(name, m) for name, m in module.named_modules() if isinstance(m, Frozen)]


# --- --fp8: products in e4m3 (speed/fp8.py says why, at what cost, and which axis has which scale) ---


def multiply_in_fp8(model, device):
    """--fp8: from here on, every frozen layer of the model multiplies in e4m3."""
    old_card = device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9)
    if device.type == "mps" or old_card:
        raise UserError(
            "--fp8: this device has no fp8 (GPUs have it from compute capability 8.9 on); drop --fp8."
        )
    for name, layer in frozen_layers(model):
        ragged = layer.in_features % 16 != 0 or layer.out_features % 16 != 0
        if device.type == "cuda" and ragged:
            raise UserError(
                f"--fp8 needs sizes that are multiples of 16, but {name} is {layer.shape}; drop --fp8."
            )
        if layer.scale is None:
            # Give the dequantised W no name: a name would keep W in memory while the next layer is dequantised.
            layer.scale = frozen(fp8.row_scale(layer.full(torch.bfloat16)))  # [out, 1]
        layer.fp8 = True


def e4m3_codes(layer):
    """The e4m3 codes of W [out, in], for layer.scale [out, 1]. FP8 stores them; other kinds cast W for each product."""
    if isinstance(layer, FP8):
        return layer.weight
    return fp8.to_codes(layer.full(torch.bfloat16), layer.scale)


def e4m3_codes_in_backward(layer):
    """The same codes, for use in backward: full_in_backward says why that is another function."""
    if isinstance(layer, FP8):
        return layer.weight
    return fp8.to_codes(full_in_backward(layer, torch.bfloat16), layer.scale)


def mm_in_fp8(layer, x):
    """x [*, in] · Wᵀ -> [*, out]"""
    flat = x.flatten(0, -2)  # [N, in]
    y = fp8.mm(flat, e4m3_codes(layer), layer.scale)
    return in_shape_of(x, y)


def mm_t_in_fp8(layer, g):
    """g [*, out] · W -> [*, in]"""
    flat = g.flatten(0, -2)  # [N, out]
    dx = fp8.mm_t(flat, e4m3_codes_in_backward(layer), layer.scale)
    return in_shape_of(g, dx)


def in_shape_of(x, y):
    """y [N, out] or [N * out] -> [*, out], with the leading axes of x [*, in]"""
    return y.view(*x.shape[:-1], -1)


# --- what lora.py calls: layers that share an input (q, k, v say), with their LoRA products added ---
#
# R is the number of LoRA columns of the group: the sum of the ranks of its adapted layers. u = x · Aᵀ [N, R].


def group_mm(layers, x, u, Bs):
    """x [N, in] · Wᵀ + u [N, R] · Bᵀ for each layer -> [y [N, out] of each layer]

    Bs: one B [out, R] a layer. B is None for a layer without a LoRA, whose y is x · Wᵀ."""
    if all_in_fp8(layers):
        return fp8_group_mm(layers, x, u, Bs)
    ys = []
    for layer, B in zip(layers, Bs, strict=True):
        if B is None:
            y = layer.mm(x)
        elif isinstance(layer, Frozen):
            y = mm_and_lora(layer, x, u, B)
        else:
            y = layer.mm(x)
            y = y + u @ B.t()
        ys.append(y)
    return ys


def group_mm_t(layers, grads, du, A):
    """The gradient of x: the sum of g [N, out] · W over the layers, + du [N, R] · A [R, in] -> dx [N, in].

    du is None where A saw another input than W (dropout): then dx has no du · A."""
    if all_in_fp8(layers):
        return fp8_group_mm_t(layers, grads, du, A)
    parts = []
    for layer, g in zip(layers[:-1], grads[:-1], strict=True):
        parts.append(layer.mm_t(g))
    # du · A belongs to the whole group, so it is added once, with the last layer.
    parts.append(last_mm_t(layers[-1], grads[-1], du, A))
    return sum(parts[1:], start=parts[0])


def last_mm_t(layer, g, du, A):
    """g [N, out] · W + du [N, R] · A -> [N, in]"""
    if du is None:
        return layer.mm_t(g)
    if isinstance(layer, Frozen):
        return mm_t_and_lora(layer, g, du, A)
    dx = layer.mm_t(g)
    return dx + du @ A


def all_in_fp8(layers):
    return all(isinstance(layer, Frozen) and layer.fp8 for layer in layers)


# --- skip at first reading: LoRA's product as further columns of the frozen product ---
#
# Why: u · Bᵀ sums over R numbers only, 16 to 48. As a product of its own, its time is that of reading and writing y
# once more: for gate_proj and 8,192 tokens 2 · 235 MB. Where the compiler dequantises W for a product anyway, u becomes
# further columns of x, and B of W. One product then makes both:
#
#     [x u] [N, in + R] · [W B]ᵀ = x · Wᵀ + u · Bᵀ
#     [g du] [N, out + R] · [W above A] = g · W + du · A
#
# Cost: x (or g) is copied. So x is appended to only where it is narrower than y, and g where it is narrower than dx.
# On Llama-3-8B in NF4 these are gate and up in forward, v and down in backward.
#
# With --fp8, x and g are written once more in any case, as e4m3 codes. A whole group is one product there. LoRA's
# columns are left out of that product where its input is more than twice as wide as its output: down in forward, gate
# and up in backward.
#
# Proof: tests/test_quant.py: test_a_lora_rides_along_where_the_compiler_dequantises,
# test_compiled_products_are_the_eager_ones, test_a_group_with_a_layer_that_has_no_lora.


def mm_and_lora(layer, x, u, B):
    """x [N, in] · Wᵀ + u [N, R] · Bᵀ -> [N, out]"""
    if layer.fp8:
        return fp8_group_mm([layer], x, u, [B])[0]
    expands = layer.out_features > layer.in_features
    if not (appends_lora(layer) and expands and x.shape[0] > layer.few):
        y = layer.mm(x)
        return add(y, u, B.t())
    W = layer.full(x.dtype)
    xu = torch.cat((x, pad(u, 1)), 1)  # [N, in + R]
    WB = torch.cat((W, pad(B, 1)), 1)  # [out, in + R]
    return xu @ WB.t()


def mm_t_and_lora(layer, g, du, A):
    """g [N, out] · W + du [N, R] · A -> [N, in]"""
    if layer.fp8:
        return fp8_group_mm_t([layer], [g], du, A)
    shrinks = layer.out_features < layer.in_features
    if not (appends_lora(layer) and shrinks):
        dx = layer.mm_t(g)
        return add(dx, du, A)
    W = full_in_backward(layer, g.dtype)
    g_du = torch.cat((g, pad(du, 1)), 1)  # [N, out + R]
    WA = torch.cat((W, pad(A, 0)))  # [out + R, in]
    return g_du @ WA


def appends_lora(layer):
    """Whether LoRA's columns are appended: W is dequantised for the product, and the compiler writes the copies."""
    return layer.compressed and torch.compiler.is_compiling()


def pad(t, dim):
    """Zeros behind dim 0 or 1 of t, up to a multiple of 128, the tile of a matmul.

    Measured in fp8: 4,096 + 16 = 4,112 columns make a product a third slower, 4,096 + 128 = 4,224 columns do not."""
    missing = -t.shape[dim] % 128
    if dim == 1:
        return F.pad(t, (0, missing))
    return F.pad(t, (0, 0, 0, missing))


def add(y, u, B):
    """y [N, out] + u [N, R] · B [R, out]. Eager mode adds in place, in the memory of y."""
    if torch.compiler.is_compiling():
        # torch 2.11: an in-place add inside an autograd function loses its gradient when compiled, so this returns a
        # new tensor. The compiler fuses the sum into what uses it.
        # This can go when tests/test_quant.py: test_compiled_products_are_the_eager_ones passes without it, as it does
        # with torch 2.13 on a CPU.
        return y + u @ B
    return y.addmm_(u, B)


def fp8_group_mm(layers, x, u, Bs):
    """group_mm where every layer multiplies in e4m3: one product [N, in + R] · [in + R, out of all layers].

    Each row of [W B] has one scale. So B [out, R] is cast with the scales [out, 1] of W. B / scale may exceed 448, the
    largest e4m3 number. Then B is divided by the excess, and u is multiplied by it: u · Bᵀ does not change."""
    codes = torch.cat([e4m3_codes(layer) for layer in layers])  # [out of all, in]
    scale = torch.cat([layer.scale for layer in layers])  # [out of all, 1]
    B = torch.cat(zeros_for_none(layers, u, Bs))  # [out of all, R]
    # For down_proj (in 14,336, out 4,096) a product u · Bᵀ of its own is cheaper, because y is narrow. The cast of x
    # then need not wait for u, whose magnitudes would be part of x's scales.
    if x.shape[1] > 2 * len(scale):
        x_codes, x_scale = fp8.to_e4m3(x)
        y = fp8.scaled_mm(x_codes, x_scale, codes, scale, x.dtype)
        y = add(y, u, B.t())
    else:
        B = pad(B, 1).float() / scale
        excess = (B.abs().amax() / fp8.LARGEST).clamp(min=1)
        B_codes = (B / excess).to(torch.float8_e4m3fn)
        u = pad(u, 1).float() * excess
        xu_codes, xu_scale = fp8.to_e4m3(x, u)
        WB_codes = torch.cat((codes, B_codes), 1)  # [out of all, in + R]
        y = fp8.scaled_mm(xu_codes, xu_scale, WB_codes, scale, x.dtype)
        y = fp8.keep_gradient(y, x)
    return split_outputs(y, layers)


def zeros_for_none(layers, u, Bs):
    """Bs, with zeros [out, R] in place of None."""
    filled = []
    for layer, B in zip(layers, Bs, strict=True):
        if B is None:
            B = u.new_zeros(layer.out_features, u.shape[1])
        filled.append(B)
    return filled


def split_outputs(y, layers):
    """y [N, out of all layers] -> [y [N, out] of each layer]"""
    parts = []
    widths = [layer.out_features for layer in layers]
    for part in y.split(widths, 1):
        # Copy the narrow parts (k, v), because a view of them would keep all of y in memory.
        if 4 * part.shape[1] < y.shape[1]:
            part = part.clone()
        parts.append(part)
    return parts


def fp8_group_mm_t(layers, grads, du, A):
    """group_mm_t where every layer multiplies in e4m3: one product [N, out of all layers + R] · [out of all + R, in].

    This product sums over the rows of W and A. A scale must not change along a summed axis (speed/fp8.py). So g is
    multiplied by W's scales, and du by A's, before g and du are cast."""
    codes = [e4m3_codes_in_backward(layer) for layer in layers]  # [out, in] each
    scaled = []  # [N, out] each
    for layer, g in zip(layers, grads, strict=True):
        scaled.append(g.float() * layer.scale.t())
    out_of_all = sum(layer.out_features for layer in layers)
    # For gate and up (out 28,672, in 4,096) a separate product du · A is cheaper, because dx is narrow.
    apart = out_of_all > 2 * layers[0].in_features
    if du is not None and not apart:
        A_codes, A_scale = fp8.to_e4m3(pad(A, 0))
        codes.append(A_codes)
        scaled.append(pad(du, 1).float() * A_scale.t())
    g_codes, g_scale = fp8.to_e4m3(*scaled)
    dx = fp8.scaled_mm_t(g_codes, g_scale, joined_in_backward(codes, layers), grads[0].dtype)
    if du is not None and apart:
        dx = add(dx, du, A)
    return dx


def joined_in_backward(codes, layers):
    """The codes [out, in] of the layers (and of A) one below the other. decode_once says why this is no plain cat."""
    if layers[0].decoded_once:
        return torch.cat(codes)
    # Join them transposed, which is how scaled_mm_t wants them in memory. Forward joins gate and up as they are.
    return torch.cat([c.t() for c in codes], 1).t()


# --- skip at first reading: the few rows of sampling ---
#
# Why: a decode step multiplies one row for each text. So the time of a product is the time of reading W. Dequantising
# writes W in bf16, and the product reads W again: at best 67 tokens/s for one text of Llama-3-8B on an H100. A kernel
# that dequantises while it multiplies allows 258.
# Cost: one more way through the code. Training keeps `few` at 0, because a batch as short as this would compile a
# second graph.
# Proof: tests/test_gpu.py: test_products_of_few_rows, test_few_rows_have_the_logits_of_many.

FEW = 64  # rows


def for_few_rows(model):
    """For sampling: from here on, products of at most FEW rows use the small-batch kernels."""
    for block in model.layers:
        for _, layer in frozen_layers(block):
            layer.few = FEW
        attn = block.self_attn
        if can_be_joined(block):
            attn.project = Joined([attn.q_proj, attn.k_proj, attn.v_proj])


def has_small_batch_kernel(layer, x):
    """Whether mm_of_few_rows is faster for x [*, in]: NF4 up to `few` rows, Plain for one row when compiled.

    Only GPUs have such kernels."""
    if not (layer.few and x.is_cuda):
        return False
    if isinstance(layer, NF4):
        return x.numel() <= layer.few * layer.in_features
    one_row = x.numel() == layer.in_features
    return isinstance(layer, Plain) and torch.compiler.is_compiling() and one_row


def mm_of_few_rows(layer, x):
    """x [*, in] · Wᵀ -> [*, out]"""
    if isinstance(layer, NF4):
        return nf4_rows(layer, x)
    return one_row(layer.weight, x)


def one_row(weight, x):
    """x [*, in] of one row · Wᵀ. For one row the compiler's reduction is faster than cuBLAS: it reads W at 3.1 TB/s."""
    # as_strided makes the compiler store x first. With a plain view it would recompute x for each row of W.
    row = x.as_strided(x.shape[-1:], (1,))  # [in]
    W = weight.to(x.dtype).float()
    products = W * row.float()  # [out, in], never in memory
    y = products.sum(-1).to(x.dtype)
    return in_shape_of(x, y)


def nf4_rows(layer, x):
    """x [*, in] · Wᵀ by the kernel of bitsandbytes that dequantises W while it multiplies."""
    # Flatten to one matrix, because rows with gaps between them in memory would become one product each.
    flat = x.flatten(0, -2)  # [N, in]
    y = torch.ops.bitsandbytes.gemm_4bit(
        flat,
        layer.weight,
        layer.shape,
        layer.nested,
        64,
        "nf4",
        absmax_8bit=layer.absmax,
        absmax_code=layer.table,
        absmax_offset=layer.offset,
    )
    return in_shape_of(x, y)


def can_be_joined(block):
    """Whether q, k and v can be one product: on a GPU, where every layer of the block is NF4 and has no adapter.

    An adapted layer is no NF4 but a LoRA around one, and lora.py has set `project` already."""
    attn = block.self_attn
    mlp = block.mlp
    layers = [attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj]
    layers += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    if any(type(layer) is not NF4 for layer in layers):
        return False
    return attn.q_proj.weight.is_cuda and attn.q_proj.bias is None


class Joined:
    """The `project` of an attention half for sampling in NF4: one product of few rows for q, k and v together.

    k's codes are 2.1 MB on Llama-3-8B, which an H100 reads in 0.7 µs: a launch of its own would take longer.

    The codes of the three layers lie end to end, and each layer's codes become a view of them: no memory is added. The
    kernel takes one offset, and each layer has its own. So absmax is dequantised here, once: 1.6 MB of fp32 a block."""

    def __init__(self, layers):
        self.codes = torch.cat([layer.weight for layer in layers])
        self.rows = [layer.out_features for layer in layers]
        self.absmax = torch.cat([layer.scales(layer.absmax) for layer in layers])
        lengths = [len(layer.weight) for layer in layers]
        parts = self.codes.split(lengths)
        for layer, part in zip(layers, parts, strict=True):
            layer.weight = frozen(part)

    def __call__(self, x, layers):
        many = x.numel() > layers[0].few * x.shape[-1]
        if len(layers) < 3 or many:
            return [layer(x) for layer in layers]
        flat = x.flatten(0, -2)  # [N, in]
        shape = (sum(self.rows), flat.shape[1])
        y = torch.ops.bitsandbytes.gemm_4bit(flat, self.codes, shape, self.absmax, 64, "nf4")
        return [in_shape_of(x, part) for part in y.split(self.rows, 1)]


# --- skip at first reading: how often a compiled backward dequantises W ---
#
# With --compile --grad_ckpt backward needs W twice: it recomputes x · Wᵀ, then makes the input gradient g · W.
#
#     decoded_once False    each use dequantises W: less memory           with forward 3 times a micro-batch
#     decoded_once True     the compiler shares one W between the uses    with forward 2 times a micro-batch
#
# Cost of sharing: W stays in memory from the first use to the second. A block of Llama-3-8B is 436 MB in bf16.
# train.build leaves the switch off with --offload_embed, which prefers memory to speed.
#
# Only a block that is recomputed may share. In another block the first use is in forward, and the compiler would keep
# what it finds there a second time until backward, in all blocks at once. On Llama-3-8B:
#
#     W in bf16, of NF4 or FP8                            13.96 GB
#     absmax of NF4 in fp32                                0.44 GB
#     codes of gate and up in e4m3, joined, with --fp8     3.76 GB
#
# So the functions named …_in_backward make the same numbers by other operations: on a transposed or reshaped view. The
# compiler does not see that both are equal.
# Proof: tests/test_quant.py: test_decode_once_lets_backward_share_what_it_dequantises,
# test_a_compiled_block_keeps_no_copy_of_a_weight_for_backward.


def decode_once(block):
    """For --compile with --grad_ckpt: from here on, the backward of this block dequantises each W once."""
    for _, layer in frozen_layers(block):
        layer.decoded_once = True


def full_in_backward(layer, dtype):
    """W [out, in], as layer.full(dtype) gives it, but without sharing the W that forward dequantised."""
    if layer.decoded_once or not layer.compressed:
        return layer.full(dtype)
    if isinstance(layer, FP8):
        W_t = layer.weight.t().float() * layer.scale.t()  # [in, out]
        return W_t.to(dtype).t()
    codes = layer.weight.flatten()
    absmax = layer.absmax[:, None]
    return layer.dequantise(codes, absmax, dtype)


# --- bitsandbytes, which is imported only where a flag needs it ---


@functools.cache
def bitsandbytes(device):
    """(torch.ops.bitsandbytes, the 256 values of the 8-bit format of absmax), or an error that says what is missing.

    The result is cached, so that all layers share one table."""
    instead = "use --quant none (or fp8) and --optim adamw, which need no bitsandbytes"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"--quant nf4 and 8-bit optimizers need bitsandbytes (pip install bitsandbytes); {instead}."
        )
    # Silence bitsandbytes' warning that there is no GPU, because training on a CPU is no mistake.
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from bitsandbytes.cextension import lib
        from bitsandbytes.functional import create_dynamic_map
    without_cuda = device.type == "cuda" and not lib.compiled_with_cuda
    if device.type not in ("cuda", "cpu") or without_cuda:
        raise UserError(
            f"bitsandbytes has no library for this {device.type} and torch {torch.__version__}; {instead}."
        )
    return torch.ops.bitsandbytes, create_dynamic_map().to(device)
