"""--grad_ckpt: keep only the input of each block for backward, and recompute the rest (Chen et al. 2016).

    forward     x0 -> block 0 -> x1 -> block 1 -> x2 …    kept: x0, x1, x2 … (cos and sin, too, once for all blocks)
    backward    … recompute block 1 from x1, its gradients; recompute block 0 from x0, its gradients

Recomputed are the norms, q, k, v, attention, o_proj, gate, up, SwiGLU and down_proj of one block at a time.

Why: at 8,192 tokens of Llama-3-8B a block's input takes 8192 · 4096 · 2 bytes = 67 MB, 2.1 GB for 32 blocks. Training
in NF4 and fp8 peaks at 10.83 GB with checkpoints (and --cuda_graph), at 46.2 GB without checkpoints.

Cost: backward runs each block's forward again. P = 6.979e9 weights are in the blocks' linears, h = 0.525e9 in the
head. A pass over them takes 2 operations a weight and token. Frozen weights need two passes, for forward and for the
input gradient: 4P + 4h = 30.0 GFLOP a token. (Training all weights needs a third pass: the 6P known from nanoGPT.)
Recomputing the blocks is one more pass: 6P + 4h = 44.0 GFLOP, 1.46 times as much, in theory. Measured are 18,184
tokens/s with checkpoints and 22,534 without: 1.24 times. There the blocks are compiled, and recompute less than this
file does: not down_proj, whose output backward does not need. (18,184 and 10.83 GB are of commit a42183e: row 2 of
README's table, with --cuda_graph in place of --offload_ckpt.)

--offload_ckpt (speed/offload.py) takes the kept inputs to host memory: 8.36 GB, 17,914 tokens/s.

--ckpt_blocks N: only the first N blocks do all that. The others keep what backward needs, and recompute nothing.

Why: it gives the steps between 10.83 and 46.2 GB. A block that is no checkpoint spares a 32nd of the additional pass,
0.44 GFLOP a token. It keeps 8192 · (7C + 2KD + 3F) · 2 bytes = 1.21 GB in place of 67 MB (README, "How much memory").
With N = 16, 16 · 0.067 + 16 · 1.21 = 20.4 GB are kept between forward and backward.

Why the first N: backward begins with the last block, and gives up what a block kept when its gradients are there. When
the first recomputation takes its 1.21 GB, the 19.4 GB of the later blocks are free already. So the peak is that of the
end of forward. If the last N were checkpoints, backward would begin with a recomputation. The peak would be 1.21 GB
higher, as if one more block were no checkpoint, and not quicker.

Proof: tests/test_train.py: test_a_fast_path_gives_the_losses_of_the_slow_one. tests/test_witness.py:
test_grad_ckpt_computes_each_block_again_and_keeps_little, test_ckpt_blocks_recompute_the_first_blocks_only.
tests/test_lora.py: test_checkpointing_changes_no_loss_and_no_gradient,
test_of_compiled_blocks_those_asked_for_recompute. tests/test_gpu.py:
test_ckpt_blocks_take_memory_between_all_and_none.
"""

from cli import UserError, say

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Checkpoint(nn.Module):
    """A block, or a half of one, of which only the input x is kept for backward."""

    def __init__(self, inner, random=False):
        """random: the part draws random numbers (dropout), and the recomputation must draw the same ones."""
        super().__init__()
        self.inner = inner
        self.random = random

    def forward(self, x, *how):
        if not torch.is_grad_enabled():
            return self.inner(x, *how)
        return checkpoint(self.inner, x, *how, use_reentrant=False, preserve_rng_state=self.random)


def apply(places, random):
    """Put a Checkpoint around the module at each of the places: [(parent module, name in the parent)]."""
    for parent, name in places:
        setattr(parent, name, Checkpoint(getattr(parent, name), random))


def check(blocks, ckpt_blocks):
    """An error if --ckpt_blocks asks for more blocks than the model has."""
    if ckpt_blocks > blocks:
        raise UserError(
            f"--ckpt_blocks {ckpt_blocks}: this model has {blocks} blocks; give at most {blocks}, or 0 for all."
        )


def how_many(blocks, ckpt_blocks):
    """The number of blocks that backward recomputes: the first ckpt_blocks of all, or all if that is 0."""
    count = ckpt_blocks or blocks
    say("grad_ckpt", f"{count} of {blocks} blocks keep only inputs; backward recomputes the rest")
    return count
