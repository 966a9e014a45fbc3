"""The loss of a step, with and without ever holding all logits.

    loss = plain(h, head, where, targets, scale)        # logits [N, V], then cross-entropy
    loss = chunked(h, head, where, targets, scale)      # the same number, a few rows of logits at a time

h [B, T, C] comes from the model, head [V, C] is the weight of its last layer. where [N] holds b * T + t of the
positions that predict a target, targets [N] the ids. scale divides by the target tokens of a whole step, so that the
sum of all micro-batches' losses is the mean over the step.
"""

import torch
import torch.nn.functional as F


def plain(h, head, where, targets, scale=1.0):
    """scale * sum of the cross-entropies, by way of all logits [N, V]."""
    h = rows_with_targets(h, where)
    logits = F.linear(h, head.to(h.dtype)).float()
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum") * scale


def rows_with_targets(h, where):
    """[B, T, C] -> [N, C]: the head is not asked about padding or prompts."""
    return h.flatten(0, 1)[where]


def one_chunk(h, W, targets, scale):
    """(sum of the cross-entropies of h [rows, C], scale * their gradient by the logits [rows, V] in h's dtype).

    The gradient of a cross-entropy by its logits is softmax minus one-hot. The scale goes in while the numbers are
    fp32: an fp16 gradient of one token among thousands would be cast to 0. A target of -1 is none: it fills rows up
    to a fixed number."""
    logits = (h @ W.t()).float()  # [rows, V]
    lse = logits.logsumexp(-1, keepdim=True)  # [rows, 1]
    is_target = (targets >= 0).float()[:, None]
    at_target = logits.gather(-1, targets.clamp(min=0)[:, None])
    loss = (lse - at_target).mul(is_target).sum()
    one_hot = torch.arange(W.shape[0], device=W.device) == targets[:, None]
    # In place: these are the largest tensors of the whole step.
    softmax = logits.sub_(lse).exp_()
    gradient = softmax.sub_(one_hot.float()).mul_(is_target * scale)
    return loss, gradient.to(h.dtype)


class ChunkedLoss(torch.autograd.Function):
    """Sum of cross-entropies without the [N, V] logits: chunk by chunk, each with its gradient at once, then forgotten.

    At 8,192 tokens and Llama-3's vocabulary logits and gradient would be 8 GB in fp32; a chunk of them is 256 MB. A
    frozen head (all but --lora_r 0) gets no gradient. The idea: Liger's fused linear loss, Cut Cross-Entropy."""

    @staticmethod
    def forward(ctx, h, head, targets, scale, chunk):
        """h [N, C], head [V, C], targets [N]; chunk: one_chunk, perhaps compiled"""
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
    """256 MB of fp32 logits, in whole tiles of a matmul."""
    return max(1, 2**26 // V // 64 * 64)


def chunked(h, head, where, targets, scale=1.0, chunk=one_chunk):
    """scale * sum of the cross-entropies, a chunk of rows at a time."""
    h = rows_with_targets(h, where)
    if not torch.is_grad_enabled():
        head = head.detach()
    return ChunkedLoss.apply(h, head, targets, scale, chunk)
