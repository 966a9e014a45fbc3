"""--cuda_graph: forward and backward of a micro-batch as one CUDA graph for each padded shape.

An eager step is thousands of launches from Python, 8B's with small batches is bound by them. A recorded graph is one
launch. It reads and writes the same addresses each time: so a batch is copied into buffers that stay, and gradients
are added to tensors that stay."""

from cli import say

from dataclasses import dataclass

import torch

MOST_GRAPHS = 64  # each takes memory of the driver's


@dataclass
class Buffers:
    """What one recorded shape reads."""

    ids: torch.Tensor  # [B, T]
    where: torch.Tensor  # [N]: b * T + t
    targets: torch.Tensor  # [N], -1: none
    scale: torch.Tensor  # []
    cu_seqlens: torch.Tensor | None  # [docs + 1], of a packed row

    def fill(self, ids, where, targets, scale, cu_seqlens):
        """Copy a batch in; its rows and its targets may be fewer and shorter than the buffers."""
        T = ids.shape[1]
        N = len(targets)
        wide = self.ids.shape[1]
        self.ids[:, :T] = ids
        self.where[:N] = where // T * wide + where % T
        self.targets[:N] = targets
        self.targets[N:] = -1
        self.scale.fill_(scale)
        if cu_seqlens is not None:
            self.cu_seqlens.copy_(cu_seqlens)

    def tensors(self):
        return self.ids, self.where, self.targets, self.scale, self.cu_seqlens


class Graphs:
    """Calls step(ids, where, targets, scale, cu_seqlens) -> loss, which adds to gradients, by way of recorded graphs.

    A shape runs as it is the first time, and compiles; the second time it is recorded, from then on replayed. Where
    there is no CUDA only the padding is the same."""

    def __init__(self, step, device):
        self.step = step
        self.device = device
        self.buffers = {}  # {shape: Buffers}
        self.recorded = {}  # {shape: (replay, loss)}
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        lengths = "lengths go up to multiples of 8, beside the padding shown"
        say("cuda_graph", f"one launch a micro-batch; {lengths}")

    def __call__(self, ids, where, targets, scale, cu_seqlens):
        shape = padded_shape(ids, targets)
        seen = shape in self.buffers
        if not seen:
            self.buffers[shape] = self.new_buffers(shape, ids, cu_seqlens)
        buffers = self.buffers[shape]
        buffers.fill(ids, where, targets, scale, cu_seqlens)
        if shape not in self.recorded:
            if not seen or len(self.recorded) == MOST_GRAPHS:
                return self.step(*buffers.tensors())
            self.recorded[shape] = self.record(buffers)
        replay, loss = self.recorded[shape]
        replay()
        return loss.clone()

    def new_buffers(self, shape, ids, cu_seqlens):
        B, wide, slots = shape
        where = torch.arange(slots, device=self.device)
        return Buffers(
            ids=ids.new_zeros(B, wide),
            where=where,
            targets=where.clone(),
            scale=torch.zeros((), device=self.device),
            cu_seqlens=None if cu_seqlens is None else cu_seqlens.clone(),
        )

    def record(self, buffers):
        """(replay, the loss that it writes)"""
        if self.device.type != "cuda":
            loss = torch.zeros(())
            return lambda: loss.copy_(self.step(*buffers.tensors())), loss
        graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's thread goes on copying.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            loss = self.step(*buffers.tensors())
        return graph.replay, loss


def padded_shape(ids, targets):
    """(B, T, N) that a batch is padded to: T a multiple of 8, N in eighths of B * T. Few shapes, little padding."""
    B, T = ids.shape
    wide = round_up(T, 8)
    eighths = -(-len(targets) * 8 // (B * wide))
    return B, wide, eighths * B * wide // 8


def round_up(n, multiple):
    return -(-n // multiple) * multiple
