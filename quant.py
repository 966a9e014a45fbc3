"""The frozen linear layer: a weight that is multiplied with and never trained.

A frozen layer is any module with

    mm(x)       x · Wᵀ, [*, in] -> [*, out]
    mm_t(g)     g · W,  [*, out] -> [*, in]: the gradient of mm's input
    forward(x)  one autograd function around the two, which keeps nothing of x and nothing of W

so whoever stands on it (lora.py) need not know how W is kept. nn.Linear would keep a reference to W per call too, but
in a compressed kind that reference is to a weight that had to be made in full first.
"""
import torch
from torch import nn

from cli import UserError


class FrozenMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return layer.mm(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.layer.mm_t(grad), None


class Plain(nn.Module):
    """W [out, in] as it was stored, in the dtype it was loaded in; the product is made in x's dtype."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None
        self.out_features, self.in_features = weight.shape

    def mm(self, x):
        return x @ self.weight.to(x.dtype).t()

    def mm_t(self, g):
        return g @ self.weight.to(g.dtype)

    def forward(self, x):
        y = FrozenMatmul.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def plain(name, tensor):
    """make_linear for model.load: frozen, uncompressed."""
    return Plain(tensor)


# --- the arithmetic of this machine ---


def pick_device(name):
    """"auto": the GPU if there is one. mps is taken where torch has it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("only cuda, mps and cpu are supported")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name} does not work here ({str(e).splitlines()[0]}); try --device cpu.") from None
    return device


def pick_dtype(name, device):
    """(dtype that frozen weights are kept in, dtype of the arithmetic, why).

    A CPU without bf16 instructions makes bf16 products many times slower than fp32 ones: there bf16 is only how weights
    are kept, half of fp32's memory, and the product is made in fp32."""
    native = {"cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False), "mps": lambda: True,
              "cpu": lambda: torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()}[device.type]()
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"this {device.type}"
    if name == "auto":
        name = "bf16" if native else "fp32"
        why = f"{where} has {'' if native else 'no '}bf16 instructions"
    else:
        why = "as asked"
    kept = {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
    if name == "bf16" and not native:
        if device.type == "cuda":
            raise UserError(f"--dtype bf16: {where} has no bf16; use --dtype fp32.")
        return kept, torch.float32, f"weights kept in bf16, arithmetic in fp32: {where} has no bf16 instructions"
    return kept, kept, why
