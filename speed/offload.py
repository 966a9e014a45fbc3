"""--offload_ckpt and --offload_embed: host memory for what the card does not need all the time.

--offload_ckpt. A part is a half of a block: attention or MLP. With --grad_ckpt autograd saves one tensor of each part
for backward, the part's input x. That x is copied to pinned host memory, and back before backward needs it. A second
CUDA stream, the side stream, copies while the computing stream computes. Autograd drives the copies: it calls pack for
each tensor that it saves (-> send), and unpack when backward wants the tensor (-> fetch). One step of two blocks, parts
0 to 3; in backward "part 3" recomputes part 3, then makes its gradients:

    forward     computing stream    part 0     part 1     part 2     part 3
                side stream                    x1 out     x2 out     x3 out
    backward    computing stream    part 3     part 2     part 1     part 0
                side stream         x2 back    x1 back

    x0 stays on the card, because autograd holds it in any case: the embedding is frozen, so x0 is a leaf.
    x3 goes out like the others, but its memory on the card is not given up, because backward wants x3 at once.
    With --ckpt_blocks further blocks follow, which are no parts, keep what they need and send nothing. x3 stays, too.

    who waits (by CUDA events; Python never does)                        for what
    side stream, before it copies x2 out                                 part 1 has computed x2
    computing stream, in part 3, before the memory of x2 is given up     x2 is out
    side stream, before it copies x2 back                                the new memory of x2 is free
    computing stream, in backward, before part 2                         x2 is back

Why: on Llama-3-8B and 8,192 tokens an input takes 67 MB. 63 of the 64 parts' inputs go to the host: 4.2 GB. The card
then holds 8.36 GB at the peak. The peak is 10.83 GB where whole blocks are checkpoints that stay on the card. Saving
the MLP's input spares compiled blocks a product: backward need not recompute o_proj to get that input.

Cost: 17,914 tokens/s, and 18,184 where checkpoints stay and --cuda_graph, which cannot go with this flag, helps. A copy
of 67 MB takes 1.3 ms at 51 GB/s. A block makes four of them, 5.3 ms, in the 11.9 ms that it computes.

Proof: tests/test_train.py: test_each_half_of_a_block_but_the_first_sends_its_input_away_and_back,
test_offloaded_inputs_are_not_held_by_anything_else. tests/test_gpu.py: test_offloaded_inputs_leave_the_card.
tests/test_witness.py: test_offload_ckpt_sends_the_inputs_of_half_blocks_away_and_back.
"""

from cli import UserError, say

from typing import NamedTuple

import torch
from torch import nn


def embedding_to_host(model):
    """Move the input embedding to host memory.

    Why: a micro-batch of 8,192 tokens reads at most 8,192 of Llama-3-8B's 128,256 rows. The card is spared 1.05 GB.
    Cost: the rows are looked up on the host and copied to the card, 67 MB. The host first waits for the token ids.
    Proof: tests/test_train.py: test_an_embedding_in_host_memory_changes_nothing. tests/test_gpu.py:
    test_the_embedding_leaves_the_card."""
    embed = model.embed_tokens
    if embed.weight.requires_grad or model.cfg.tie_word_embeddings:
        raise UserError(
            "--offload_embed: this embedding is trained, or is the head too, so it must stay; drop the flag."
        )
    embed.weight.data = embed.weight.data.cpu()
    gigabytes = embed.weight.nbytes / 1e9
    say("offload", f"the input embedding, {gigabytes:.2f} GB, is in host memory")


class Current(NamedTuple):
    """The part whose forward runs now."""

    number: int
    x: torch.Tensor  # its input
    ready: object  # the event after which x may be read


class Copy(NamedTuple):
    """A copy of a part's input between card and host, under way or finished.

    It holds x, so that the memory of x is not used again before the copy is whole."""

    number: int  # of the part
    x: torch.Tensor  # the input, on the card
    done: object  # the event after which the copy is whole


class Offloader:
    """Takes the inputs of all parts to the host and back. A model has one.

    attribute    set by                            read by
    current      run, before a part's forward      pack, to know the input among all that autograd saves
    leaving      send                              the next send, the first fetch of backward
    host         send                              fetch
    arriving     fetch                             fetch, for the same part or the next one
    """

    def __init__(self, device):
        self.device = device
        self.cuda = device.type == "cuda"
        self.side = torch.cuda.Stream() if self.cuda else None
        self.host = {}  # {part's number: flat pinned tensor}
        self.arriving = {}  # {part's number: Copy to the card}
        self.leaving = None  # the last Copy to the host
        self.current = None

    def run(self, part, number, x, how):
        """part(x, *how). The input x that autograd saves in it goes to the host."""
        self.current = Current(number, x, self.mark())
        with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
            y = part(x, *how)
        # Forget x, because autograd keeps the hooks, and with them this object, until backward.
        self.current = None
        return y

    # --- autograd calls pack for each tensor that it saves, and unpack when backward wants the tensor ---

    def pack(self, saved):
        """-> what autograd keeps: the tensor itself, or (number, shape) of one that goes to the host"""
        number, x, ready = self.current
        is_input = saved.data_ptr() == x.data_ptr() and saved.shape == x.shape
        # Weights, cos and sin stay. The first part's input stays, because autograd holds a leaf in any case.
        if not is_input or x.is_leaf:
            return saved
        self.send(number, saved.detach(), ready)
        return number, saved.shape

    def unpack(self, kept):
        """What pack returned -> the tensor, on the card"""
        if isinstance(kept, torch.Tensor):
            return kept
        number, shape = kept
        return self.fetch(number, shape)

    # --- forward: to the host ---

    def send(self, number, x, ready):
        """Begin to copy x to the host, once `ready` has come."""
        if self.leaving is not None:
            # Below, `leaving` forgets the input of the part before, and its memory is used again. So wait for its copy.
            self.wait(self.leaving.done)
        room = self.host_room(number, x)
        done = self.copy(room, x, ready)
        self.leaving = Copy(number, x, done)

    def host_room(self, number, x):
        """A pinned tensor of x's shape. The longest batch comes first, so each part allocates once.

        Only pinned memory, which the system may not move, can be copied beside the GPU's computing."""
        flat = self.host.get(number)
        if flat is None or flat.numel() < x.numel():
            flat = torch.empty(x.numel(), dtype=x.dtype, pin_memory=self.cuda)
            self.host[number] = flat
        return flat[: x.numel()].view(x.shape)

    # --- backward: back to the card ---

    def fetch(self, number, shape):
        """The input of a part, on the card. Begins to copy the input that backward wants next, too."""
        if self.leaving is not None:
            # Backward begins. `leaving` still holds the last part's input, which need not be copied back.
            self.arriving[self.leaving.number] = self.leaving
            self.leaving = None
        # Backward runs from the last part to the first, so number - 1 is wanted next.
        for n in (number, number - 1):
            if n in self.host and n not in self.arriving:
                self.bring_back(n, shape)
        copy = self.arriving.pop(number)
        self.wait(copy.done)
        return copy.x

    def bring_back(self, number, shape):
        """Begin to copy a part's input to the card."""
        flat = self.host[number]
        # The memory of x may still be in use by what was launched before. So the copy waits for this point, by mark().
        x = torch.empty(shape, dtype=flat.dtype, device=self.device)
        done = self.copy(x, flat[: shape.numel()].view(shape), self.mark())
        self.arriving[number] = Copy(number, x, done)

    # --- streams and events. On a CPU, mark and wait do nothing, and copy is a plain copy ---

    def mark(self):
        """An event that comes when the computing stream has done all that was launched so far."""
        return torch.cuda.current_stream().record_event() if self.cuda else None

    def wait(self, event):
        """Let the current stream wait for the event. Python does not wait."""
        if event is not None:
            torch.cuda.current_stream().wait_event(event)

    def copy(self, to, x, ready):
        """Copy x into `to` on the side stream, once `ready` has come. -> the event of the copy's end"""
        # A side stream of None, as on a CPU, changes nothing.
        with torch.cuda.stream(self.side):
            self.wait(ready)
            to.copy_(x, non_blocking=self.cuda)
            return self.mark()


class Offloaded(nn.Module):
    """A half of a block, whose input is in host memory between forward and backward."""

    def __init__(self, inner, offloader, number):
        super().__init__()
        self.inner = inner
        self.offloader = offloader
        self.number = number

    def forward(self, x, *how):
        if not torch.is_grad_enabled():
            return self.inner(x, *how)
        return self.offloader.run(self.inner, self.number, x, how)


def apply(places, device):
    """Put an Offloaded around the module at each place: [(parent module, name in the parent)], in forward's order."""
    offloader = Offloader(device)
    for number, (parent, name) in enumerate(places):
        setattr(parent, name, Offloaded(getattr(parent, name), offloader, number))
    say("offload", "the inputs of attention and MLP of each recomputed block wait in host memory")
