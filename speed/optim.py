"""The optimiser: AdamW with states in 32 or 8 bits, the length and learning rates of a run, an adapter as one flat
tensor, a check that gradients arrive.

AdamW keeps two states a trained weight: the running means of its gradient and of the gradient's square. --optim
adamw8bit keeps them in 8 bits (Dettmers et al. 2021): a code of one byte, and one fp32 scale (absmax) for 256 codes.
--optim paged_adamw8bit puts them where the driver can move them to host memory, for a card that is nearly full. A
resume puts them back there (files/state.py).

Why: LoRA r = 16 on all linears of Llama-3-8B trains 41,943,040 weights. Their states take 336 MB in fp32 and 85 MB in
8 bits: 2 · (1 + 4 / 256) bytes a weight in place of 8. The 250 MB saved are 3 % of a run of 8.3 GB. With --lora_r 0 the
states of all 8.03e9 weights take 64 GB or 16 GB.

Cost: each state is rounded to one of 256 values. In the test below losses stay within 0.2 % of AdamW's.

Small tensors keep fp32 states: bitsandbytes leaves out tensors of fewer than 4,096 numbers. These are norm weights and
biases. One number that stands out sets the scale of all the others there, so the error is large. 8 bits would save at
most 6 bytes · 4,095 = 25 KB a tensor. Here this concerns --lora_r 0 only, because an adapter is one tensor (`flatten`).

Proof: tests/test_train.py: test_adamw8bit_stays_near_adamw. tests/test_witness.py:
test_optim_keeps_its_states_in_eight_bits. tests/test_gpu.py:
test_states_of_the_optimiser_take_the_memory_that_they_should.
"""

from cli import UserError, say

import math
from functools import partial

import torch
from torch import nn

# bitsandbytes' own bound and block, for the receipt.
SMALLEST_IN_8_BITS = 4096  # numbers in a tensor
BLOCK = 256  # 8-bit codes that share an absmax


def flatten(params):
    """Make an adapter's tensors views of one flat parameter, and their gradients views of its gradient. -> that one

    params [2, 2] and [3]:    flat       p00 p01 p10 p11 | q0 q1 q2       flat.grad likewise

    Why: Llama-3-8B's adapter is 448 tensors. One flat tensor takes one kernel a step in place of 448, and bitsandbytes
    waits for the GPU after each. The gradient's norm is one reduction. A CUDA graph finds gradients where they were.
    Cost: gradients must stay in place, so a step zeroes them and does not drop them.
    Proof: tests/test_optim.py: test_parameters_and_gradients_are_views_of_one_tensor."""
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
    """The optimiser of the tensors in `trained`. kind: adamw, adamw8bit or paged_adamw8bit"""
    note = ""
    if kind == "paged_adamw8bit" and device.type != "cuda":
        note = " (unpaged, because only a GPU has paged memory)"
    megabytes = sum(bytes_of_states(kind, p) for p in trained) / 1e6
    say("optim", f"{kind}{note}, {megabytes:.0f} MB of states")
    make = optimizer_class(kind, device)
    return make(trained, lr=lr, weight_decay=weight_decay)


def optimizer_class(kind, device):
    if kind == "adamw":
        return partial(torch.optim.AdamW, fused=True)
    # Import bitsandbytes only here, because --optim adamw does without.
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    if kind == "paged_adamw8bit" and device.type == "cuda":
        return PagedAdamW8bit
    return AdamW8bit


def bytes_of_states(kind, p):
    """Bytes of the two states of each weight of p."""
    if kind == "adamw" or p.numel() < SMALLEST_IN_8_BITS:
        return p.numel() * 2 * 4
    a_state = 1 + 4 / BLOCK  # bytes: a code, and its share of an fp32 absmax
    return p.numel() * 2 * a_state


def clip(trained, loss_scale, grad_clip):
    """Divide the gradients by the loss scale, then shrink them to the norm grad_clip (0: no bound).

    -> their common norm before shrinking"""
    if loss_scale != 1:
        for p in trained:
            p.grad /= loss_scale
    return nn.utils.clip_grad_norm_(trained, grad_clip or math.inf)


def has_stepped(optimizer):
    """Whether the optimiser ever made a step: only then it has states."""
    return any(optimizer.state.values())


# Optimiser steps of a run to which neither --max_steps nor --epochs is given.
DEFAULT_STEPS = 60


def check_length(max_steps, epochs):
    """Raise UserError for a --max_steps or --epochs, None where not given, that no run can have."""
    if max_steps is not None and max_steps < 0:
        raise UserError(f"--max_steps {max_steps} is out of range: it must be at least 0.")
    if epochs is not None and epochs < 1:
        raise UserError(f"--epochs {epochs} is out of range: it must be at least 1.")


def how_many_steps(max_steps, epochs, steps_of):
    """(how many optimiser steps a run has, which flag says so). steps_of(n): the steps of n epochs

    --max_steps    --epochs     steps
    not given      not given    60
    not given      3            all of 3 epochs
    200            any          200
    0              3            all of 3 epochs; of 1 epoch where --epochs is not given"""
    if max_steps:
        return max_steps, "as --max_steps says"
    if max_steps is None and epochs is None:
        return DEFAULT_STEPS, "neither --max_steps nor --epochs is given"
    epochs = epochs or 1
    return steps_of(epochs), f"all of --epochs {epochs}"


def lr_at(step, total, lr, warmup_steps):
    """Learning rate of step 1, 2, … total: linear warm-up, then half a cosine. It is above 0 at every step.

    lr 1, warmup_steps 3, total 7: 0.25, 0.5, 0.75, then 1, 0.85, 0.5, 0.15."""
    if step <= warmup_steps:
        return lr * step / (warmup_steps + 1)
    done = (step - 1 - warmup_steps) / max(1, total - warmup_steps)
    return lr * 0.5 * (1 + math.cos(math.pi * min(1, done)))


# --- a check that every trained tensor gets a gradient ---


class GradientWatch:
    """Records which trained tensors the first backward reaches, and raises an error for one that it misses.

    Why: a LoRA that gets no gradient raises no error by itself. The run only seems to learn slowly.
    A hook on each tensor records that autograd reached it. The gradient's value cannot tell. All zeros are right for an
    A whose B is 0, for q and k of a row with one token, and in fp16 for what is too small. A nan is right for a step
    of fp16 that overflows. Whether the numbers are any good is asked by LossScale.judge."""

    def __init__(self, params):
        self.params = params
        self.reached = set()
        self.done = False
        self.hooks = [
            p.register_post_accumulate_grad_hook(lambda _, name=name: self.reached.add(name))
            for name, p in params.items()
        ]

    def check(self, model):
        """Check once, after a backward."""
        if self.done:
            return
        check_gradients(model, self.params, self.reached)
        self.done = True
        for hook in self.hooks:
            hook.remove()


def check_gradients(model, params, reached):
    """An error for a trained tensor that backward did not reach, or for a frozen one with a gradient."""
    missed = [name for name in params if name not in reached]
    if missed:
        raise UserError(
            f"{len(missed)} trained tensor(s) got no gradient, because the loss does not depend on them; "
            f"the first is {missed[0]}."
        )
    trained = {id(p) for p in params.values()}
    for name, p in model.named_parameters():
        if id(p) not in trained and p.grad is not None:
            raise UserError(f"{name} is frozen and got a gradient.")
    say("check", f"all {len(params)} trained tensors get a gradient, no frozen one does")
    zeros = [name for name, p in params.items() if not p.grad.any() and not waits(name, params)]
    if zeros:
        say(
            "check",
            f"{len(zeros)} of these gradients are all zeros at the first step, the first is {zeros[0]}",
        )


def waits(name, params):
    """Whether the tensor is an A whose B is all zeros, as in any untrained adapter: its gradient must be zeros."""
    B = params.get(name.replace(".lora_A.", ".lora_B."))
    return ".lora_A." in name and B is not None and not B.any()
