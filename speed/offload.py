"""--offload_ckpt and --offload_embed: what need not be on the card all the time lives in host memory.

A checkpointed half of a block keeps one tensor for backward, its input x. That goes to pinned host memory while the
half computes, and comes back while backward is in the half behind it. Part 0's input stays (see `Offloader.pack`):

    forward     compute part 1 | compute part 2 | compute part 3 | …
    side stream        x1 out        | x2 out         | x3 out
    backward    … | part 3 again, backward | part 2 again, backward | part 1 …
    side stream        x2 back                   | x1 back
"""

from cli import UserError, say

from typing import NamedTuple

import torch
from torch import nn


def embedding_to_host(model):
    """Move the input embedding to host memory: a step reads a few rows of it."""
    embed = model.embed_tokens
    if embed.weight.requires_grad or model.cfg.tie_word_embeddings:
        raise UserError(
            "--offload_embed: this embedding is the head too, or trained: it must stay; drop the flag."
        )
    embed.weight.data = embed.weight.data.cpu()
    gigabytes = embed.weight.nbytes / 1e9
    say("offload", f"the input embedding, {gigabytes:.2f} GB, is in host memory")


class Current(NamedTuple):
    """The part that runs in forward at this moment."""

    number: int
    x: torch.Tensor  # its input
    ready: object  # the event after which x may be read


class Copy(NamedTuple):
    """A tensor that is copied at this moment, or was."""

    number: int
    x: torch.Tensor  # on the card
    done: object  # the event after which the copy is whole


class Offloader:
    """Takes the inputs of all parts to the host and back. One for a model."""

    def __init__(self, device):
        self.device = device
        self.cuda = device.type == "cuda"
        self.side = torch.cuda.Stream() if self.cuda else None
        self.host = {}  # {part's number: flat pinned tensor}
        self.arriving = {}  # {part's number: Copy to the card}
        self.leaving = None  # the last Copy to the host
        self.current = None

    def run(self, part, number, x, how):
        """part(x, *how), whose saved input goes to the host."""
        self.current = Current(number, x, self.mark())
        with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
            y = part(x, *how)
        # Autograd keeps the hooks until backward, and with them this object: x must not hang on to it.
        self.current = None
        return y

    # --- autograd calls these for each tensor that it saves, and for each that it wants back ---

    def pack(self, saved):
        """-> what autograd is to keep: the tensor, or (number, shape) of one that went to the host"""
        number, x, ready = self.current
        is_input = saved.data_ptr() == x.data_ptr() and saved.shape == x.shape
        # The first part's input is a leaf, which autograd keeps anyway; weights stay, too.
        if not is_input or x.is_leaf:
            return saved
        self.send(number, saved.detach(), ready)
        return number, saved.shape

    def unpack(self, kept):
        if isinstance(kept, torch.Tensor):
            return kept
        number, shape = kept
        return self.fetch(number, shape)

    # --- forward: out ---

    def send(self, number, x, ready):
        if self.leaving is not None:
            # Only when the part before has left may its memory be used again.
            self.wait(self.leaving.done)
        room = self.host_room(number, x)
        done = self.copy(room, x, ready)
        self.leaving = Copy(number, x, done)

    def host_room(self, number, x):
        """A pinned tensor of x's shape. The longest batch comes first, so this allocates once a part."""
        flat = self.host.get(number)
        if flat is None or flat.numel() < x.numel():
            flat = torch.empty(x.numel(), dtype=x.dtype, pin_memory=self.cuda)
            self.host[number] = flat
        return flat[: x.numel()].view(x.shape)

    # --- backward: in ---

    def fetch(self, number, shape):
        if self.leaving is not None:
            # The last part's input has not been given up yet.
            self.arriving[self.leaving.number] = self.leaving
            self.leaving = None
        # This one, unless it is on its way already, and the one that is wanted next.
        for n in (number, number - 1):
            if n in self.host and n not in self.arriving:
                self.bring_back(n, shape)
        copy = self.arriving.pop(number)
        self.wait(copy.done)
        return copy.x

    def bring_back(self, number, shape):
        flat = self.host[number]
        x = torch.empty(shape, dtype=flat.dtype, device=self.device)
        done = self.copy(x, flat[: shape.numel()].view(shape), self.mark())
        self.arriving[number] = Copy(number, x, done)

    # --- streams and events; on a CPU these do nothing ---

    def mark(self):
        """An event at this point of the computing stream."""
        return torch.cuda.current_stream().record_event() if self.cuda else None

    def wait(self, event):
        """The stream that computes goes on after the event."""
        if event is not None:
            torch.cuda.current_stream().wait_event(event)

    def copy(self, to, x, ready):
        """x to `to` beside what is running, once `ready` has come. -> the event of its end"""
        with torch.cuda.stream(self.side):  # None: the stream stays as it is
            self.wait(ready)
            to.copy_(x, non_blocking=self.cuda)
            return self.mark()


class Offloaded(nn.Module):
    """A half of a block whose input lies in host memory between forward and backward."""

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
    """Offload the input of what stands at each of the places: [(parent module, name)], in the order of forward."""
    offloader = Offloader(device)
    for number, (parent, name) in enumerate(places):
        setattr(parent, name, Offloaded(getattr(parent, name), offloader, number))
    say("offload", "the inputs of a block and of its MLP are in host memory, so o_proj runs once")
