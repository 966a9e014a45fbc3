"""--cuda_graph: forward and backward of a micro-batch as one CUDA graph for each padded shape.

Why: in eager mode Python launches every kernel. A compiled block of Llama-3-8B with checkpoints is 231 kernels, so 32
blocks are 7,392 launches a micro-batch. With small batches the GPU is done before Python launches the next kernel. A
recorded graph is one launch. SmolLM2-135M's shape, packed into 4,096 tokens, goes from 51,512 to 177,074 tokens/s.

Cost: a graph reads and writes the same addresses each time. So each batch is copied into buffers that stay, and
gradients are added to tensors that stay. Lengths are padded to multiples of 8, so that shapes repeat. A graph's
activations stay allocated, in a pool that all graphs share. train.check refuses --lora_dropout, --offload_ckpt and
--offload_embed, which no recording can repeat, and --lora_r 0, whose gradients do not stay.

Proof: tests/test_gpu.py: test_replayed_graphs_add_the_gradients_of_eager_steps. tests/test_train.py:
test_a_fast_path_gives_the_losses_of_the_slow_one. tests/test_witness.py: test_cuda_graph_pads_to_few_shapes.
"""

from cli import say

from dataclasses import dataclass

import torch

# Each graph takes memory of the driver's. Further shapes run without a graph.
MOST_GRAPHS = 64


@dataclass
class Buffers:
    """The tensors that one recorded graph reads: the arguments of Graphs.step, at addresses that never change."""

    ids: torch.Tensor  # [B, T]
    where: torch.Tensor  # [N]: b * T + t
    targets: torch.Tensor  # [N], -1: no target
    scale: torch.Tensor  # [], a tensor because a number would be recorded as a constant
    cu_seqlens: torch.Tensor | None  # [docs + 1], of a packed row

    def fill(self, ids, where, targets, scale, cu_seqlens):
        """Copy a batch in. Its rows may be shorter than the buffers', and its targets fewer.

        B 2, T 5, padded to T 8: the target at row 1, position 3 moves from `where` 1 * 5 + 3 = 8 to 1 * 8 + 3 = 11.
        Behind T a row holds tokens of an earlier batch, and no real token sees what is right of it."""
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
        """In the order of Graphs.step's arguments."""
        return self.ids, self.where, self.targets, self.scale, self.cu_seqlens


class Graphs:
    """Calls step(ids, where, targets, scale, cu_seqlens) -> loss, which adds to the gradients, by recorded graphs.

    What happens to a padded shape (B, T, N):
        first time     step runs eagerly, because compiling cannot be recorded
        second time    step is recorded as a graph, then replayed
        later          the graph is replayed
    Without CUDA step runs each time, on the same padded buffers."""

    def __init__(self, step, device):
        self.step = step
        self.device = device
        self.buffers = {}  # {shape: Buffers}
        self.recorded = {}  # {shape: (replay, loss)}
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        lengths = "lengths are padded to multiples of 8, which the padding shown leaves out"
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
        # The next replay overwrites this loss.
        return loss.clone()

    def new_buffers(self, shape, ids, cu_seqlens):
        """Buffers of a padded shape. `fill` gives the slots that a batch leaves empty a target of -1."""
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
        """-> (a function that replays the graph, the tensor that the graph writes its loss to)"""
        if self.device.type != "cuda":
            loss = torch.zeros(())
            return lambda: loss.copy_(self.step(*buffers.tensors())), loss
        # A graph has a pool of its own, and while it is recorded nothing can be given back. So give back now what eager
        # steps have left.
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        # thread_local: let the loader's thread make CUDA calls meanwhile, because they do not belong to the graph.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            loss = self.step(*buffers.tensors())
        return graph.replay, loss


def padded_shape(ids, targets):
    """(B, T, N) that a batch is padded to: T to a multiple of 8, N to a multiple of B * T / 8.

    Each shape is a graph, so coarse steps mean few graphs, and fine steps little padding. 2 rows of T 21 and 30 targets
    become (2, 24, 30), because 30 is five eighths of 48. With 31 targets they become (2, 24, 36)."""
    B, T = ids.shape
    wide = round_up(T, 8)
    eighths = -(-len(targets) * 8 // (B * wide))
    return B, wide, eighths * B * wide // 8


def round_up(n, multiple):
    return -(-n // multiple) * multiple
