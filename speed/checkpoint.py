"""--grad_ckpt: of each block only its input is kept; backward computes the block again (Chen et al. 2016)."""

from cli import say

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Checkpoint(nn.Module):
    """A block, or a half of one, that keeps one tensor for backward."""

    def __init__(self, inner, random=False):
        """random: the part draws random numbers (dropout), which its second run must draw again."""
        super().__init__()
        self.inner = inner
        self.random = random

    def forward(self, x, *how):
        if not torch.is_grad_enabled():
            return self.inner(x, *how)
        return checkpoint(self.inner, x, *how, use_reentrant=False, preserve_rng_state=self.random)


def apply(places, random):
    """Checkpoint what stands at each of the places: [(parent module, name)]."""
    for parent, name in places:
        setattr(parent, name, Checkpoint(getattr(parent, name), random))


def say_kept(blocks):
    say("grad_ckpt", f"{blocks} blocks keep one tensor each and are computed again in backward")
