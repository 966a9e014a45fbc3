"""The frozen linear layer: a weight that is multiplied with and never trained.

A frozen layer is any module with

    mm(x)       x · Wᵀ, [*, in] -> [*, out]
    mm_t(g)     g · W,  [*, out] -> [*, in]: the gradient of mm's input
    forward(x)  one autograd function around the two, which keeps nothing of x and nothing of W

so whoever stands on it (lora.py) need not know how W is kept. nn.Linear would keep a reference to W per call too, but in a
compressed kind that reference is to a weight that had to be made in full first.
"""
import torch
from torch import nn


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
