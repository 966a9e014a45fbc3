"""The frozen linear layer: a weight that is multiplied with and never trained, kept whole, in 4 bits or in 8.

A frozen layer is any module with

    mm(x)       x · Wᵀ, [*, in] -> [*, out]
    mm_t(g)     g · W,  [*, out] -> [*, in]: the gradient of mm's input
    forward(x)  one autograd function around the two, which keeps nothing of x and nothing of W

so whoever stands on it (lora.py) need not know how W is kept. The kinds here also take a LoRA's small products along:
mm(x, u, B) is x · Wᵀ + u · Bᵀ and mm_t(g, du, A) is g · W + du · A.

Three kinds, and the bytes of one 4096 × 4096 matrix:

    Plain  as stored, bf16 say: 2 a weight                                                  33,554,432
    FP8    e4m3 codes, 1 a weight: 16,777,216; an fp32 scale a row: 16,384                  16,793,600: 1.001 a weight
    NF4    4-bit codes: 8,388,608; absmax, one a block of 64, in 8 bits: 262,144; their      8,654,852: 0.516 a weight
           own absmax, fp32, one a block of 256 of them: 4,096; one fp32 offset: 4

--fp8 adds the scale a row to the others. NF4 (QLoRA, Dettmers et al. 2023): the nearest of 16 values that are equally
likely under a normal distribution. To it and back go bitsandbytes' operators, on CPU and GPU; as torch.ops they break
no graph of torch.compile.
"""

import functools
import importlib.util
import logging
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from cli import UserError


class Frozen(nn.Module):
    """What the kinds share. A kind has full(dtype): W [out, in]. again=True is how backward asks: the same by another
    name, or the compiler would see that it decompresses what forward did, and keep the decompressed weight for it."""

    fp8 = False  # --fp8: how it is multiplied, whatever it is kept as
    compressed = True  # W is made anew for each product
    joins = True  # mm and mm_t take a LoRA's products along
    few = 0  # rows for which there are other ways, when sampling; a training batch as short would be a graph of its own
    recomputed = False  # backward runs forward again, compiled with it: what is decompressed there serves both

    def __init__(self, shape):
        super().__init__()
        self.shape = self.out_features, self.in_features = tuple(shape)
        self.bias = self.scale = None  # scale [out, 1]: for fp8

    def e4m3(self, again=False):
        return (self.full(torch.bfloat16, again).float() / self.scale).to(
            torch.float8_e4m3fn
        ), self.scale

    def multiply_in_fp8(self):
        if self.scale is None:
            self.scale = row_scale(self.full(torch.bfloat16))
        self.fp8 = True

    def product(self, x):
        return x @ self.full(x.dtype).t()

    def mm(self, x, u=None, B=None):
        """x [*, in] · Wᵀ; for a LoRA + u [N, r] · Bᵀ, B [out, r]. Sums over r alone would read and write y once
        more: where W is made anew for a product anyway, u rides in the last columns of x and B in those of W."""
        if self.fp8:
            return fp8_mm([self], x.flatten(0, -2), u, B)[0].view(*x.shape[:-1], -1)
        wide = self.compressed and torch.compiler.is_compiling() and self.shape[0] > self.shape[1]
        if u is not None and wide and x.shape[0] > self.few:
            return torch.cat((x, pad(u, 1)), 1) @ torch.cat((self.full(x.dtype), pad(B, 1)), 1).t()
        y = self.product(x)
        return y if u is None else add(y, u, B.t())

    def mm_t(self, g, du=None, A=None):
        """g [*, out] · W; for a LoRA + du [N, r] · A, A [r, in]: likewise, with A below the rows of W."""
        if self.fp8:
            return fp8_mm_t([self], [g.flatten(0, -2)], du, A).view(*g.shape[:-1], -1)
        W = self.full(g.dtype, again=not self.recomputed)
        if (
            du is not None
            and self.compressed
            and torch.compiler.is_compiling()
            and self.shape[0] < self.shape[1]
        ):
            return torch.cat((g, pad(du, 1)), 1) @ torch.cat((W, pad(A, 0)))
        return g @ W if du is None else add(g @ W, du, A)

    def forward(self, x):
        y = FrozenMatmul.apply(x, self) if torch.is_grad_enabled() else self.mm(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def pad(t, dim):
    """Zeros up to a multiple of 128, the tile of a matmul: other widths cost a third of its speed."""
    return F.pad(t, (0, 0) * (1 - dim) + (0, -t.shape[dim] % 128))


def add(y, u, B):
    """y + u · B, in y's place. The compiler makes the sum where it is used; in place, 2.11's loses every gradient."""
    return y + u @ B if torch.compiler.is_compiling() else y.addmm_(u, B)


def row_scale(W):
    """e4m3's scale a row, [out, 1]. A row far below the others, zeros say, keeps room: a LoRA's B goes by the same."""
    scale = to_e4m3(W)[1]
    return frozen(scale.clamp(min=max(scale.max().item() / 64, 1e-6)))


class FrozenMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return layer.mm(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.layer.mm_t(grad), None


def frozen(tensor):
    return nn.Parameter(
        tensor, requires_grad=False
    )  # codes and scales too: they shard, save and move like weights


class Plain(Frozen):
    """W as it was stored, in the dtype it was loaded in; the product is made in x's dtype."""

    compressed = False

    def __init__(self, weight):
        super().__init__(weight.shape)
        self.weight = frozen(weight)

    def full(self, dtype, again=False):
        return self.weight.to(dtype)

    def product(self, x):
        if (
            self.few
            and x.is_cuda
            and torch.compiler.is_compiling()
            and x.numel() == self.in_features
        ):  # one row:
            row = x.as_strided(
                x.shape[-1:], (1,)
            )  # kept: what comes from a view is made anew for each row of W
            y = (self.weight.to(x.dtype).float() * row.float()).sum(
                -1
            )  # a better kernel than cuBLAS has
            return y.to(x.dtype).view(*x.shape[:-1], -1)
        return super().product(x)


class FP8(Frozen):
    """W in e4m3; each row has a scale that takes its largest magnitude to e4m3's, 448, at most."""

    def __init__(self, weight):
        super().__init__(weight.shape)
        self.scale = row_scale(weight)
        self.weight = frozen((weight.float() / self.scale).to(torch.float8_e4m3fn))

    def full(self, dtype, again=False):
        return (self.weight.float() * self.scale).to(dtype)

    def e4m3(self, again=False):
        return self.weight, self.scale


class NF4(Frozen):
    """W in 4 bits with double quantisation: a block of 64 weights has an absmax; those, less their mean, are kept in 8
    bits, a block of 256 at a time."""

    def __init__(self, weight):
        super().__init__(weight.shape)
        ops, table = bitsandbytes(weight.device)
        codes, absmax = ops.quantize_4bit(weight.contiguous(), 64, "nf4", torch.uint8)
        self.offset = frozen(absmax.mean())
        absmax, nested = ops.quantize_blockwise(absmax - self.offset, table, 256)
        self.weight, self.absmax, self.nested = frozen(codes), frozen(absmax), frozen(nested)
        self.register_buffer("table", table, persistent=False)

    def full(self, dtype, again=False):
        codes, absmax = (
            (self.weight.flatten(), self.absmax.flatten()) if again else (self.weight, self.absmax)
        )
        return torch.ops.bitsandbytes.dequantize_4bit(
            codes, self.scales(absmax), 64, "nf4", self.shape, dtype
        )

    def scales(self, absmax):  # in fp32
        block = (
            torch.arange(len(absmax.flatten()), device=absmax.device) // 256
        )  # one kernel, compiled
        return self.table[absmax.int()] * self.nested[block] + self.offset

    def product(self, x):
        if (
            self.few and x.is_cuda and x.numel() <= self.few * self.in_features
        ):  # decoded as it is read
            y = torch.ops.bitsandbytes.gemm_4bit(
                x.flatten(0, -2),
                self.weight,
                self.shape,
                self.nested,
                64,
                "nf4",
                None,
                self.absmax,
                self.table,
                self.offset,
            )
            return y.view(
                *x.shape[:-1], -1
            )  # flat: rows with gaps between them would be a product each
        return super().product(x)


class Joined:
    """Block.project for sampling in nf4: few rows go through q, k and v in one product, for k's alone is little but its
    launch. Their codes lie end to end, each layer's are a view; absmax is decoded, as their offsets differ."""

    def __init__(self, layers):
        self.codes, self.rows = (
            torch.cat([layer.weight for layer in layers]),
            [layer.out_features for layer in layers],
        )
        self.absmax = torch.cat([layer.scales(layer.absmax) for layer in layers])
        for layer, part in zip(layers, self.codes.split([len(layer.weight) for layer in layers])):
            layer.weight = frozen(part)

    def __call__(self, x, layers):
        if len(layers) < 3 or x.numel() > layers[0].few * x.shape[-1]:
            return [layer(x) for layer in layers]
        shape = sum(self.rows), x.shape[-1]
        y = torch.ops.bitsandbytes.gemm_4bit(
            x.flatten(0, -2), self.codes, shape, self.absmax, 64, "nf4"
        )
        return [part.view(*x.shape[:-1], -1) for part in y.split(self.rows, 1)]


def for_writing(model):  # few rows at a time from here on
    for block in model.layers:
        block.apply(lambda layer: isinstance(layer, Frozen) and setattr(layer, "few", 64))
        kinds = {
            type(layer) for layer in block.children() if hasattr(layer, "mm")
        }  # an adapter has its own project
        if kinds == {NF4} and block.q_proj.weight.is_cuda and block.q_proj.bias is None:
            block.project = Joined([block.q_proj, block.k_proj, block.v_proj])


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


def multiply_in_fp8(model, device):
    """--fp8: every frozen layer multiplies in e4m3 from here on."""
    if (
        device.type == "mps"
        or device.type == "cuda"
        and torch.cuda.get_device_capability() < (8, 9)
    ):
        raise UserError(
            "--fp8: this device has no fp8 (GPUs have it from compute capability 8.9 on); drop --fp8."
        )
    for name, layer in [(name, m) for name, m in model.named_modules() if isinstance(m, Frozen)]:
        if device.type == "cuda" and (layer.in_features % 16 or layer.out_features % 16):
            raise UserError(
                f"--fp8: {name} is {layer.shape}, no multiple of the tiles of 16; drop --fp8."
            )
        layer.multiply_in_fp8()


# --- fp8 products ---
def to_e4m3(*parts):
    """Parts [N, K1], [N, K2] … side by side -> (codes e4m3 [N, K], scale fp32 [N, 1]), about codes * scale. A scale a
    row: an outlier costs its own row only."""
    top = functools.reduce(torch.maximum, [p.abs().amax(-1, keepdim=True) for p in parts])
    scale = top.float().clamp(min=1e-12) / 448
    codes = [(p.float() / scale).to(torch.float8_e4m3fn) for p in parts]
    return codes[0] if len(codes) == 1 else torch.cat(codes, 1), scale


SCALED_MM = {
    "cuda": True,
    "cpu": tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13),
}  # has row scales


def scaled_mm(a, scale_a, b, scale_b, dtype):
    """(a [M, K] · b [N, K]ᵀ) * scale_a [M, 1] * scale_b [N, 1]ᵀ of e4m3 codes. -> [M, N]; sums in fp32"""
    if SCALED_MM.get(a.device.type):
        return torch._scaled_mm(
            a,
            b.t(),
            scale_a=scale_a,
            scale_b=scale_b.t(),
            out_dtype=torch.bfloat16,
            use_fast_accum=a.is_cuda,
        ).to(dtype)
    return ((a.float() @ b.float().t()) * scale_a * scale_b.t()).to(dtype)


def fp8_mm(layers, x, u=None, B=None):
    """[x [N, in] · Wᵀ + u [N, r] · Bᵀ of each layer], B [sum of out, r], as one product: u rides along as further
    columns of x, B as those of W, in W's scales; what of B would be too large for those goes over to u."""
    codes, scale = map(torch.cat, zip(*(layer.e4m3() for layer in layers)))
    # where y is the narrow one, a sum of its own is cheaper: x's largest magnitude need not wait for u
    parts, apart = [x], u is not None and x.shape[1] > 2 * len(scale)
    if u is not None and not apart:
        B = pad(B, 1).float() / scale
        over = (B.abs().amax() / 448).clamp(min=1)
        codes = torch.cat((codes, (B / over).to(torch.float8_e4m3fn)), 1)
        parts.append(pad(u, 1).float() * over)
    y = scaled_mm(*to_e4m3(*parts), codes, scale, x.dtype)
    if apart:
        y = add(y, u, B.t())
    elif (
        torch.compiler.is_compiling()
    ):  # _scaled_mm has no derivative: 2.11's compiler takes what an autograd function
        y = (
            y + 0 * x[:, :1]
        )  # makes of it for a constant, and loses every gradient, but for a term in x
    parts = y.split(
        [layer.out_features for layer in layers], 1
    )  # of the narrow ones (k, v) a copy: a view keeps all
    return [part.clone() if 4 * part.shape[1] < y.shape[1] else part for part in parts]


def fp8_mm_t(layers, grads, du=None, A=None):
    """Sum of the layers' g [N, out] · W, + du [N, r] · A, one product likewise. The rows of W are summed over here,
    so their scales go into g before its cast: the same codes serve both ways."""
    codes, scales = zip(*(layer.e4m3(again=not layer.recomputed) for layer in layers))
    pairs, width = list(zip(grads, scales)), layers[0].in_features
    apart = du is not None and sum(map(len, scales)) > 2 * width
    if du is not None and not apart:
        A, a = to_e4m3(pad(A, 0))
        pairs.append((pad(du, 1), a))
        codes = *codes, A
    g, scale_g = to_e4m3(*(g.float() * scale.t() for g, scale in pairs))
    one = torch.ones(width, 1, device=g.device)
    dx = scaled_mm(g, scale_g, torch.cat(codes).t().contiguous(), one, grads[0].dtype)
    return add(dx, du, A) if apart else dx


Frozen.group_mm, Frozen.group_mm_t = (
    staticmethod(fp8_mm),
    staticmethod(fp8_mm_t),
)  # how lora.py finds them


# --- bitsandbytes, only where a flag needs it ---
@functools.cache
def bitsandbytes(device):
    """torch.ops.bitsandbytes and the 256 values of the 8-bit format of absmax, one table for all layers; or an error
    that says what is missing for this device."""
    instead = "use --quant none (or fp8) and --optim adamw, which do without"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"--quant nf4 and 8-bit optimizers need bitsandbytes (pip install bitsandbytes); {instead}."
        )
    logging.getLogger("bitsandbytes").setLevel(
        logging.CRITICAL
    )  # a machine without a GPU is no mistake
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from bitsandbytes.cextension import lib
        from bitsandbytes.functional import create_dynamic_map
    if device.type not in ("cuda", "cpu") or device.type == "cuda" and not lib.compiled_with_cuda:
        raise UserError(
            f"bitsandbytes has no library for this {device.type} and torch {torch.__version__}; {instead}."
        )
    return torch.ops.bitsandbytes, create_dynamic_map().to(device)
