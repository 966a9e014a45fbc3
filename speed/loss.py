"""The loss of a step, with and without ever holding all logits.

    loss = plain(h, head, where, targets, scale)        # logits [N, V], then cross-entropy
    loss = chunked(h, head, where, targets, scale)      # the same number, a few rows of logits at a time

h [B, T, C] comes from the model. head [V, C] is the weight of its last layer. where [N] holds b * T + t of the
positions that predict a target, targets [N] the ids. scale is 1 / the target tokens of a whole step, times fp16's loss
scale. So the losses of a step's micro-batches add up to the mean over all target tokens.

Why chunked (--fused_loss): with Llama-3's vocabulary of 128,256, 8,192 target tokens have 4.2 GB of fp32 logits. Their
gradient takes as much again. A chunk is 512 tokens, 263 MB. For backward only the gradient of h is kept: 67 MB in bf16.

Cost: no further arithmetic, because a frozen head needs two products a token either way. The gradient is made in
forward already, in 16 pieces.

Proof: tests/test_train.py: test_a_fast_path_gives_the_losses_of_the_slow_one (--no-fused_loss),
test_fp16_gradients_are_scaled_before_they_are_cast. tests/test_witness.py:
test_fused_loss_keeps_no_logits_for_backward.
"""

import torch
import torch.nn.functional as F


def plain(h, head, where, targets, scale=1.0):
    """scale * sum of the cross-entropies, by way of all logits [N, V]."""
    h = rows_with_targets(h, where)
    logits = F.linear(h, head.to(h.dtype)).float()
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum") * scale


def rows_with_targets(h, where):
    """[B, T, C] -> [N, C]: positions without a target, padding say, need no logits."""
    return h.flatten(0, 1)[where]


def one_chunk(h, W, targets, scale):
    """(sum of the cross-entropies of h [rows, C], scale * its gradient by the logits [rows, V], in h's dtype)

    For one row: loss = logsumexp(logits) - logits[target], and its gradient is softmax(logits) - one_hot(target).
    With logits [2, 1, 0] and target 0:

        lse         2.41                        log(e² + e¹ + e⁰)
        loss        0.41                        2.41 - 2
        softmax     [0.67, 0.24, 0.09]          exp(logits - lse)
        one_hot     [1, 0, 0]
        gradient    [-0.33, 0.24, 0.09]         softmax - one_hot

    scale multiplies while the numbers are fp32: an fp16 gradient of one token among thousands might be cast to 0.
    A target of -1 is no target: its loss and its gradient are 0. Such rows fill a chunk up (speed/graphs.py)."""
    logits, lse, is_target, loss = loss_of_chunk(h, W, targets)
    one_hot = torch.arange(W.shape[0], device=W.device) == targets[:, None]  # [rows, V]
    # Overwrite the logits step by step, because a tensor [rows, V] is among the largest of a step.
    softmax = logits.sub_(lse).exp_()
    gradient = softmax.sub_(one_hot.float()).mul_(is_target * scale)
    return loss, gradient.to(h.dtype)


def loss_of_chunk(h, W, targets):
    """-> logits [rows, V], their logsumexp [rows, 1], 1 or 0 for a target or none [rows, 1], the sum of the losses"""
    logits = (h @ W.t()).float()
    lse = logits.logsumexp(-1, keepdim=True)
    is_target = (targets >= 0).float()[:, None]
    at_target = logits.gather(-1, targets.clamp(min=0)[:, None])
    loss = (lse - at_target).mul(is_target).sum()
    return logits, lse, is_target, loss


def loss_alone(h, W, targets, scale):
    """one_chunk for an evaluation, which wants no gradient: that is half of the work. -> (loss, None)"""
    *_, loss = loss_of_chunk(h, W, targets)
    return loss, None


class ChunkedLoss(torch.autograd.Function):
    """Sum of cross-entropies, a chunk of rows at a time. Forward makes the gradient, too, and drops the chunk's logits.

    For each chunk:    h [rows, C] -> logits [rows, V] -> loss, dlogits [rows, V] -> dh [rows, C]
    For backward:      dh [N, C] is kept, and multiplied by the incoming gradient. dW [V, C], too, with --lora_r 0.

    The idea is Liger's fused linear loss and Cut Cross-Entropy."""

    @staticmethod
    def forward(ctx, h, head, targets, scale, chunk):
        """h [N, C], head [V, C], targets [N]. chunk: one_chunk, compiled with --compile"""
        wants_h, wants_head, *_ = ctx.needs_input_grad
        W = head.detach().to(h.dtype)
        total = torch.zeros((), device=h.device)
        if not isinstance(scale, torch.Tensor):
            scale = torch.full_like(total, scale)
        rows = rows_of_a_chunk(W.shape[0])
        dh = torch.empty_like(h) if wants_h else None
        dW = torch.zeros_like(head, dtype=torch.float32) if wants_head else None
        for i in range(0, h.shape[0], rows):
            part = h[i : i + rows].detach()
            loss, dlogits = chunk(part, W, targets[i : i + rows], scale)
            total += loss
            if wants_h:
                torch.mm(dlogits, W, out=dh[i : i + rows])
            if wants_head:
                dW += (dlogits.t() @ part).float()
        ctx.save_for_backward(dh, dW)
        return total * scale

    @staticmethod
    def backward(ctx, grad):
        dh, dW = ctx.saved_tensors
        if dh is not None:
            dh = dh * grad.to(dh.dtype)
        if dW is not None:
            dW = dW * grad
        return dh, dW, None, None, None


def rows_of_a_chunk(V):
    """How many rows have at most 2**26 logits, 268 MB in fp32. A multiple of 64, for whole tiles of a matmul.

    Llama-3: 2**26 // 128,256 = 523, so 512 rows."""
    return max(1, 2**26 // V // 64 * 64)


def chunked(h, head, where, targets, scale=1.0, chunk=one_chunk):
    """scale * sum of the cross-entropies, a chunk of rows at a time."""
    h = rows_with_targets(h, where)
    if not torch.is_grad_enabled():
        head = head.detach()
        if chunk is one_chunk:
            chunk = loss_alone
    return ChunkedLoss.apply(h, head, targets, scale, chunk)
