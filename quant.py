"""The frozen linear layer: a weight that is multiplied with and never trained, kept whole, in 4 bits or in 8.

A frozen layer is any module with

    mm(x)       x · Wᵀ, [*, in] -> [*, out]
    mm_t(g)     g · W,  [*, out] -> [*, in]: the gradient of mm's input
    forward(x)  one autograd function around the two, which keeps nothing of x and nothing of W

so lora.py, which uses these layers, need not know how W is kept. Three kinds, and the bytes of one 4096 × 4096 matrix:

    Plain  as stored, bf16 say: 2 a weight                                                  33,554,432
    FP8    e4m3 codes, 1 a weight: 16,777,216; an fp32 scale a row: 16,384                  16,793,600: 1.001 a weight
    NF4    4-bit codes: 8,388,608; absmax, one a block of 64, in 8 bits: 262,144; their      8,654,852: 0.516 a weight
           own absmax, fp32, one a block of 256 of them: 4,096; one fp32 offset: 4

How a weight is kept (--quant) and how it is multiplied (--fp8: in e4m3) are two choices; --fp8 adds the scale a row to
the kinds without one. What only speed needs stands at the end, each part marked "skip at first reading".
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
    """What the kinds share. A kind adds full(dtype), the weight W [out, in] in that dtype."""

    # Whether W is dequantised for each product.
    compressed = True

    def __init__(self, shape):
        super().__init__()
        self.shape = tuple(shape)
        self.out_features, self.in_features = self.shape
        self.bias = None  # [out]
        self.scale = None  # [out, 1], of W in e4m3

        # Three switches, and the one function that changes each:
        # multiply_in_fp8: the products are in e4m3, whatever W is kept as.
        self.fp8 = False
        # for_few_rows: up to this many rows use the small-batch kernels; 0 while training.
        self.few = 0
        # decode_once: backward shares with forward the W that forward dequantised.
        self.decoded_once = False

    def full(self, dtype):
        """W [out, in] in dtype: each kind has its own."""
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
    """x · Wᵀ. The gradient of x needs W only, and W can be had again: so nothing is kept for backward."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return layer.mm(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.layer.mm_t(grad), None


def frozen(tensor):
    """A parameter that is not trained: codes and scales, too, shard, save and move like weights."""
    return nn.Parameter(tensor, requires_grad=False)


# --- the three kinds ---


class Plain(Frozen):
    """W as it was stored, in the dtype in which it was loaded."""

    compressed = False

    def __init__(self, weight):
        super().__init__(weight.shape)
        self.weight = frozen(weight)  # [out, in]

    def full(self, dtype):
        return self.weight.to(dtype)


class FP8(Frozen):
    """W in e4m3, 8 bits a weight, with a scale a row."""

    def __init__(self, weight):
        super().__init__(weight.shape)
        self.scale = frozen(fp8.row_scale(weight))  # [out, 1]
        self.weight = frozen(fp8.to_codes(weight, self.scale))  # [out, in]

    def full(self, dtype):
        W = self.weight.float() * self.scale
        return W.to(dtype)


class NF4(Frozen):
    """W in 4 bits (QLoRA, Dettmers et al. 2023): each weight becomes the nearest of 16 values that are equally likely
    under a normal distribution, times the largest magnitude (absmax) of its block of 64 weights.

    Double quantisation: the absmax values, less their mean (`offset`), are themselves kept in 8 bits, in blocks of 256
    that have an absmax each (`nested`). The operators are those of bitsandbytes, on CPU and GPU: as torch.ops they do
    not break the graph of torch.compile."""

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
        # The 256 values that an 8-bit absmax stands for.
        self.register_buffer("table", table, persistent=False)

    def full(self, dtype):
        return self.dequantise(self.weight, self.absmax, dtype)

    def dequantise(self, codes, absmax, dtype):
        scales = self.scales(absmax)
        dequantise = torch.ops.bitsandbytes.dequantize_4bit
        return dequantise(codes, scales, 64, "nf4", self.shape, dtype)

    def scales(self, absmax):
        """The absmax of each block of 64 weights, fp32. Compiled, these lines are one kernel."""
        count = len(absmax.flatten())
        block = torch.arange(count, device=absmax.device) // 256
        values = self.table[absmax.int()]
        return values * self.nested[block] + self.offset


KINDS = {"none": Plain, "nf4": NF4, "fp8": FP8}


def make_linear(kind):
    """The make_linear of model.load for --quant: (name, tensor) -> a frozen layer."""

    def make(name, tensor):
        if kind == "nf4" and tensor.shape[1] % 64:
            raise UserError(
                f"--quant nf4: {name} is {tensor.shape[1]} wide, no multiple of its block of 64; "
                "use --quant fp8 or none."
            )
        return KINDS[kind](tensor)

    return make


def frozen_layers(module):
    """[(name, layer)] of the module's frozen layers of these kinds; the module itself may be one."""
    return [(name, m) for name, m in module.named_modules() if isinstance(m, Frozen)]


# --- --fp8: the products in e4m3 (speed/fp8.py says which axis has which scale) ---


def multiply_in_fp8(model, device):
    """--fp8: every frozen layer multiplies in e4m3 from here on."""
    old_card = device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9)
    if device.type == "mps" or old_card:
        raise UserError(
            "--fp8: this device has no fp8 (GPUs have it from compute capability 8.9 on); drop --fp8."
        )
    for name, layer in frozen_layers(model):
        ragged = layer.in_features % 16 != 0 or layer.out_features % 16 != 0
        if device.type == "cuda" and ragged:
            raise UserError(
                f"--fp8: {name} is {layer.shape}, no multiple of the tiles of 16; drop --fp8."
            )
        if layer.scale is None:
            # No name is given to W: it would live on while the next layer is dequantised.
            layer.scale = frozen(fp8.row_scale(layer.full(torch.bfloat16)))  # [out, 1]
        layer.fp8 = True


def e4m3_codes(layer):
    """W [out, in] in e4m3, in layer.scale [out, 1]. An FP8 layer is kept so; other kinds are cast for each product."""
    if isinstance(layer, FP8):
        return layer.weight
    return fp8.to_codes(layer.full(torch.bfloat16), layer.scale)


def e4m3_codes_in_backward(layer):
    """The same codes, where backward needs them."""
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
    """y [N, out] or [N * out], of an x [*, in] -> [*, out]"""
    return y.view(*x.shape[:-1], -1)


# --- the layers that share an input, with the small products of a LoRA: what lora.py calls ---


def group_mm(layers, x, u, Bs):
    """x [N, in] · Wᵀ + u [N, R] · Bᵀ of each layer -> [y [N, out] of each layer]

    Bs: a B [out, R] a layer, or None for a layer without a LoRA: then its y is x · Wᵀ."""
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
    """The sum of the layers' g [N, out] · W, + du [N, R] · A [R, in] -> dx [N, in]. du may be None: then without."""
    if all_in_fp8(layers):
        return fp8_group_mm_t(layers, grads, du, A)
    parts = []
    for layer, g in zip(layers[:-1], grads[:-1], strict=True):
        parts.append(layer.mm_t(g))
    # du · A is one product for the whole group: it goes along with the last layer.
    parts.append(last_mm_t(layers[-1], grads[-1], du, A))
    return sum(parts[1:], start=parts[0])


def last_mm_t(layer, g, du, A):
    if du is None:
        return layer.mm_t(g)
    if isinstance(layer, Frozen):
        return mm_t_and_lora(layer, g, du, A)
    dx = layer.mm_t(g)
    return dx + du @ A


def all_in_fp8(layers):
    return all(isinstance(layer, Frozen) and layer.fp8 for layer in layers)


# --- skip at first reading: how the products of a LoRA ride along ---
#
# u · Bᵀ sums over R numbers only: as a product of its own its time goes into reading and writing y once more. Where
# the compiler dequantises W for a product anyway, u becomes further columns of x, and B further columns of W:
#
#     [x u] [N, in + R] · [W B]ᵀ = x · Wᵀ + u · Bᵀ        [g du] [N, out + R] · [W above A] = g · W + du · A
#
# The copy of x pays only where x is narrower than y, and the copy of g only where g is narrower than dx.


def mm_and_lora(layer, x, u, B):
    """x [N, in] · Wᵀ + u [N, R] · Bᵀ -> [N, out]"""
    if layer.fp8:
        return fp8_group_mm([layer], x, u, [B])[0]
    expands = layer.out_features > layer.in_features
    if not (rides_along(layer) and expands and x.shape[0] > layer.few):
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
    if not (rides_along(layer) and shrinks):
        dx = layer.mm_t(g)
        return add(dx, du, A)
    W = full_in_backward(layer, g.dtype)
    g_du = torch.cat((g, pad(du, 1)), 1)  # [N, out + R]
    WA = torch.cat((W, pad(A, 0)))  # [out + R, in]
    return g_du @ WA


def rides_along(layer):
    return layer.compressed and torch.compiler.is_compiling()


def pad(t, dim):
    """Zeros behind dim 0 or 1 of t, up to a multiple of 128, the tile of a matmul: other widths cost a third of its
    speed."""
    missing = -t.shape[dim] % 128
    if dim == 1:
        return F.pad(t, (0, missing))
    return F.pad(t, (0, 0, 0, missing))


def add(y, u, B):
    """y [N, out] + u [N, R] · B [R, out], in the memory of y in eager mode"""
    if torch.compiler.is_compiling():
        # torch 2.11: an in-place add inside an autograd function loses its gradient when compiled, so this returns a
        # new tensor; the compiler makes the sum where it is used.
        # tests/test_quant.py: test_compiled_products_are_the_eager_ones says whether it is still needed (on a CPU with
        # torch 2.13 it is not).
        return y + u @ B
    return y.addmm_(u, B)


def fp8_group_mm(layers, x, u, Bs):
    """group_mm where every layer multiplies in e4m3: one product [N, in + R] · [in + R, out of all layers].

    B takes the scales [out, 1] of W. What of B would be too large for those scales goes over to u."""
    codes = torch.cat([e4m3_codes(layer) for layer in layers])  # [out of all, in]
    scale = torch.cat([layer.scale for layer in layers])  # [out of all, 1]
    B = torch.cat(zeros_for_none(layers, u, Bs))  # [out of all, R]
    # Where y is the narrow one, a product of its own is cheaper: then the scale of x need not wait for u.
    if x.shape[1] > 2 * len(scale):
        x_codes, x_scale = fp8.to_e4m3(x)
        y = fp8.scaled_mm(x_codes, x_scale, codes, scale, x.dtype)
        y = add(y, u, B.t())
    else:
        B = pad(B, 1).float() / scale
        over = (B.abs().amax() / fp8.LARGEST).clamp(min=1)
        B_codes = (B / over).to(torch.float8_e4m3fn)
        u = pad(u, 1).float() * over
        xu_codes, xu_scale = fp8.to_e4m3(x, u)
        WB_codes = torch.cat((codes, B_codes), 1)  # [out of all, in + R]
        y = fp8.scaled_mm(xu_codes, xu_scale, WB_codes, scale, x.dtype)
        y = fp8.keep_gradient(y, x)
    return split_outputs(y, layers)


def zeros_for_none(layers, u, Bs):
    """Bs, with zeros [out, R] for a layer without a LoRA."""
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
        # A view would keep all of y: of the narrow ones (k, v) a copy.
        if 4 * part.shape[1] < y.shape[1]:
            part = part.clone()
        parts.append(part)
    return parts


def fp8_group_mm_t(layers, grads, du, A):
    """group_mm_t where every layer multiplies in e4m3: one product [N, out of all layers + R] · [out of all + R, in].

    The rows of W and A are summed over, so their scales go into g and du before those are cast."""
    codes = [e4m3_codes_in_backward(layer) for layer in layers]  # [out, in] each
    scaled = []  # [N, out] each
    for layer, g in zip(layers, grads, strict=True):
        scaled.append(g.float() * layer.scale.t())
    widths = sum(layer.out_features for layer in layers)
    apart = widths > 2 * layers[0].in_features
    if du is not None and not apart:
        A_codes, A_scale = fp8.to_e4m3(pad(A, 0))
        codes.append(A_codes)
        scaled.append(pad(du, 1).float() * A_scale.t())
    g_codes, g_scale = fp8.to_e4m3(*scaled)
    codes = torch.cat(codes)
    dx = fp8.scaled_mm_t(g_codes, g_scale, codes, grads[0].dtype)
    if du is not None and apart:
        dx = add(dx, du, A)
    return dx


# --- skip at first reading: the few rows of sampling ---
#
# A decode step multiplies one row a text. Then a product takes the time of reading W, and cuBLAS, made for many rows,
# is slower than that. A training batch as short as this must not take these ways: it would compile a graph of its own.

FEW = 64  # rows


def for_few_rows(model):
    """For sampling: from here on, products of few rows use the small-batch kernels."""
    for block in model.layers:
        for _, layer in frozen_layers(block):
            layer.few = FEW
        attn = block.self_attn
        if can_be_joined(block):
            attn.project = Joined([attn.q_proj, attn.k_proj, attn.v_proj])


def has_small_batch_kernel(layer, x):
    """Whether mm_of_few_rows is the faster way for x [*, in]. Off a GPU there is no such kernel."""
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
    """x [*, in] of one row · Wᵀ. For one row the compiler's reduction is faster than cuBLAS."""
    # The compiler computes what comes from a view again for each row of W; of as_strided it keeps the result.
    row = x.as_strided(x.shape[-1:], (1,))  # [in]
    W = weight.to(x.dtype).float()
    products = W * row.float()  # [out, in], never in memory
    y = products.sum(-1).to(x.dtype)
    return in_shape_of(x, y)


def nf4_rows(layer, x):
    """x [*, in] · Wᵀ by the kernel of bitsandbytes that dequantises W as it reads W."""
    # The rows go in as one matrix: rows with gaps between them would be a product each.
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
    """Whether q, k and v can be one product: on a GPU, every layer of the block in NF4, and none with an adapter, as
    an adapted half has lora.py's project."""
    attn = block.self_attn
    mlp = block.mlp
    layers = [attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj]
    layers += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    if any(type(layer) is not NF4 for layer in layers):
        return False
    return attn.q_proj.weight.is_cuda and attn.q_proj.bias is None


class Joined:
    """The `project` of an attention half for sampling in NF4: few rows go through q, k and v in one product, because
    the product of k alone takes little more than its launch.

    The codes of the three layers lie end to end, and each layer's own codes become a view of them. The absmax values
    are dequantised once, because each layer has an offset of its own."""

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


# --- skip at first reading: W once more in backward ---


def decode_once(model):
    """For a compiled block that backward computes again (--compile with --grad_ckpt): what forward dequantises there
    serves the input gradient, too."""
    for _, layer in frozen_layers(model):
        layer.decoded_once = True


def full_in_backward(layer, dtype):
    """W [out, in] as layer.full(dtype) has it, but dequantised again, so that nothing of it is kept from forward."""
    if layer.decoded_once or not isinstance(layer, NF4):
        return layer.full(dtype)
    # The compiler would see that forward dequantises the same codes, and keep the dequantised weight until backward.
    # Flattened, they are other tensors to it.
    codes = layer.weight.flatten()
    absmax = layer.absmax.flatten()
    return layer.dequantise(codes, absmax, dtype)


# --- bitsandbytes, only where a flag needs it ---


@functools.cache
def bitsandbytes(device):
    """(torch.ops.bitsandbytes, the 256 values of the 8-bit format of absmax: one table for all layers); or an error
    that says what is missing for this device."""
    instead = "use --quant none (or fp8) and --optim adamw, which do without"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"--quant nf4 and 8-bit optimizers need bitsandbytes (pip install bitsandbytes); {instead}."
        )
    # bitsandbytes warns of a machine without a GPU, which is no mistake.
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
