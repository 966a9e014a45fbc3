"""--compile: torch.compile, a block at a time.

All blocks are alike, so that one small graph serves them all, and one graph serves all lengths (dynamic=True)."""

from cli import UserError, say

import shutil

import torch

COMPILERS = ["g++", "clang++", "c++", "gcc", "clang", "cc"]


def start_compiler():
    """The compiler's worker processes take seconds to come up: they do while the weights are loaded."""
    if not any(shutil.which(name) for name in COMPILERS):
        raise UserError(
            "--compile needs a C++ compiler (apt install g++); everything runs without --compile."
        )
    from torch._inductor import async_compile

    async_compile.maybe_warm_pool()


def configure(recompute):
    """recompute: the compiler's own checkpoint. Backward's graph then computes a part again from its input."""
    from torch._functorch import config as aot
    from torch._inductor import config as inductor

    # No float changes between steps; to find that out the compiler would trace everything twice.
    torch._dynamo.config.specialize_float = True
    # Sizes that are equal by chance, B and T say, stay two sizes.
    torch.fx.experimental._config.use_duck_shape = False
    # Padding of shapes asks for a graph of its own for each range of lengths.
    inductor.shape_padding = False
    # The share of the activations that may be kept for backward: none, or all.
    aot.activation_memory_budget = 0 if recompute else 1
    # A second process then finds the traced graphs of the first and needs seconds.
    aot.autograd_cache_allow_custom_autograd_functions = True


def apply(places, recompute):
    """Compile the modules at these places, blocks or halves of blocks: one graph a kind, for all lengths."""
    configure(recompute)
    for parent, name in places:
        getattr(parent, name).compile(dynamic=True)
    say("compile", "each block, one graph for all lengths; the first step takes longer")


def compile_function(function):
    return torch.compile(function, dynamic=True)


def graphs_so_far():
    """How many graphs this process has compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
