"""The optimiser: AdamW, its 8-bit forms, an adapter as one flat tensor, and whether gradients reach it."""

from cli import UserError, say

import math
from functools import partial

import torch
from torch import nn

# bitsandbytes quantises the states of tensors from this size on. Smaller ones keep fp32 states: they are little memory.
SMALLEST_IN_8_BITS = 4096
BLOCK = 256  # 8-bit states that share an absmax


def flatten(params):
    """An adapter's hundreds of small tensors become views of one flat parameter, their gradients views of its gradient.

    So a step is one kernel instead of hundreds (bitsandbytes waits for the GPU after each), the norm of the gradient
    is one reduction, and a CUDA graph finds the gradients where it left them. -> the flat parameter"""
    sizes = [p.numel() for p in params]
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in params]))
    flat.grad = torch.zeros_like(flat)
    values = flat.detach().split(sizes)
    gradients = flat.grad.split(sizes)
    for p, value, gradient in zip(params, values, gradients, strict=True):
        p.data = value.view_as(p)
        p.grad = gradient.view_as(p)
    return flat


def make_optimizer(kind, trained, device, lr, weight_decay):
    """kind: adamw, adamw8bit or paged_adamw8bit, over the tensors in `trained`."""
    note = ""
    if kind == "paged_adamw8bit" and device.type != "cuda":
        note = ", unpaged: only a GPU has pages"
    megabytes = sum(bytes_of_states(kind, p) for p in trained) / 1e6
    say("optim", f"{kind}{note}, {megabytes:.0f} MB of states")
    make = optimizer_class(kind, device)
    return make(trained, lr=lr, weight_decay=weight_decay)


def optimizer_class(kind, device):
    if kind == "adamw":
        return partial(torch.optim.AdamW, fused=True)
    # States in 8 bits with an absmax a block of 256 (Dettmers et al. 2021).
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    if kind == "paged_adamw8bit" and device.type == "cuda":
        return PagedAdamW8bit
    return AdamW8bit


def bytes_of_states(kind, p):
    """AdamW keeps two numbers a weight: the running means of its gradient and of the gradient's square."""
    if kind == "adamw" or p.numel() < SMALLEST_IN_8_BITS:
        return p.numel() * 2 * 4
    a_state = 1 + 4 / BLOCK  # a byte, and its share of an fp32 absmax
    return p.numel() * 2 * a_state


def clip(trained, loss_scale, grad_clip):
    """Take the loss scale out of the gradients and bound their common norm (0: no bound). -> the norm before"""
    if loss_scale != 1:
        for p in trained:
            p.grad /= loss_scale
    return nn.utils.clip_grad_norm_(trained, grad_clip or math.inf)


# --- a check of a classic silent mistake ---


class GradientWatch:
    """Which trained tensors the first backward reached: a LoRA that is not trained looks like a run that learns slowly.

    A gradient of zeros cannot tell (an untrained B gives its A one), so autograd says by a hook whom it reached."""

    def __init__(self, params):
        self.params = params
        self.reached = set()
        self.done = False
        self.hooks = [
            p.register_post_accumulate_grad_hook(lambda _, name=name: self.reached.add(name))
            for name, p in params.items()
        ]

    def check(self, model, has_loss_scale):
        """Once, after a backward. In fp16 a loss scale that is too high yet puts it off."""
        if self.done:
            return
        all_finite = all(p.grad is None or p.grad.isfinite().all() for p in self.params.values())
        if has_loss_scale and not all_finite:
            return
        check_gradients(model, self.params, self.reached)
        self.done = True
        for hook in self.hooks:
            hook.remove()


def check_gradients(model, params, reached):
    """An error for a trained tensor without a usable gradient, or a frozen one with a gradient."""
    wrong = [name for name, p in params.items() if name not in reached or not is_usable(name, p)]
    if wrong:
        raise UserError(
            f"{len(wrong)} trained tensor(s) got no usable gradient, the first is {wrong[0]}."
        )
    trained = {id(p) for p in params.values()}
    for name, p in model.named_parameters():
        if id(p) not in trained and p.grad is not None:
            raise UserError(f"{name} is frozen and got a gradient.")
    say("check", f"all {len(params)} trained tensors get a gradient, no frozen one does")


def is_usable(name, p):
    """A of an untrained adapter gets zeros at first, since B is 0; B must get something."""
    if not p.grad.isfinite().all():
        return False
    return ".lora_B." not in name or bool(p.grad.any())
