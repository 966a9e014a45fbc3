"""--compile: torch.compile, a block at a time.

Why: the compiler fuses chains of elementwise operations into one kernel. SwiGLU, silu(gate) * up, works on tensors of
235 MB at 8,192 tokens of Llama-3-8B. Eager mode reads or writes five of them, 1.17 GB; the fused kernel three, 0.70 GB.
Also, Python launches fewer kernels. Row 2 of README's table makes 18,124 tokens/s with --compile and 5,711 without, on
one H100, one after the other. A part of that comes from the compiler's own checkpoint. That checkpoint does not
recompute down_proj, because backward needs no output of it, and one dequantised weight serves recomputation and input
gradient (quant.decode_once).

Why a block at a time: the 32 blocks run the same code on the same shapes, so one small graph serves all of them.
Compiling the whole model would compile the same block 32 times. Also, checkpoints and offloading (speed/) can wrap a
block from outside. One graph serves all lengths, because sizes stay symbols (dynamic=True). Packed
rows all have one length, so there sizes are constants, which compiles 1 to 2 s faster.

Cost: 19 of the 33.4 s from the start of the process to the end of the first step, on 8B. A second run finds the graphs
in the compiler's cache, and is there after 17.4 s.

Graphs in all: one of a block, and one of a chunk of the loss, with gradients and perhaps another without. With
--offload_ckpt one of each half in place of one of a block. With --ckpt_blocks one more, of a block that keeps all.

What would compile another graph, and what prevents it (none after step 10):

    evaluation without gradients             train.Built.loss_of keeps gradients on
    an input that needs no gradient          model.Llama.embed makes the first block's input need one
    a batch of 1 row or 1 token              nothing: torch takes sizes 0 and 1 for constants; packed rows always have 1
    a T that is no multiple of 8             data.make_step pads the rows to multiples of 8 on a GPU
    an attribute with another value          quant.Frozen's switches stay as they are while training
    a block with other kinds of layers       all blocks are built alike

Proof: tests/test_lora.py: test_compiled_blocks_equal_eager_ones_with_one_graph_for_all_lengths. tests/test_train.py:
test_training_and_evaluation_share_the_graphs_of_a_block. tests/test_witness.py:
test_compile_makes_graphs_and_changes_no_loss. tests/test_gpu.py: test_lengths_share_one_graph.
"""

from cli import UserError, say

import contextlib
import shutil
import threading

import torch

COMPILERS = ["g++", "clang++", "c++", "gcc", "clang", "cc"]


def has_compiler():
    return any(shutil.which(name) for name in COMPILERS)


STARTING = []  # the thread of start_compiler, while it runs


def start_compiler():
    """Import the compiler and start its worker processes in a thread: 4 to 6 s, while the recipes are read."""
    if not has_compiler():
        raise UserError(
            "--compile needs a C++ compiler (apt install g++); everything runs without --compile."
        )
    if STARTING:
        return
    thread = threading.Thread(target=import_compiler, daemon=True)
    thread.start()
    STARTING.append(thread)


def import_compiler():
    from torch._inductor import async_compile, compile_fx  # noqa: F401 torch.compile imports compile_fx later anyway

    async_compile.maybe_warm_pool()


def wait_for_compiler():
    """To be called before a model is loaded: two threads that import parts of torch may see half a module."""
    while STARTING:
        STARTING.pop().join()


def configure():
    """Set the compiler's options."""
    from torch._functorch import config as aot
    from torch._inductor import config as inductor

    # Take Python floats (eps, the scale of a LoRA) for constants, because none changes between steps. By default the
    # compiler first leaves them open, and then traces everything a second time.
    torch._dynamo.config.specialize_float = True
    # Keep two sizes apart that are equal by chance, B and T say. Else the first batch in which they differ recompiles.
    torch.fx.experimental._config.use_duck_shape = False
    # Do not pad the shapes of products, because each range of lengths would then compile a graph of its own.
    inductor.shape_padding = False
    # Let graphs with autograd functions of ours (lora.GroupMatmul) into the cache on disk, so that a second run finds
    # them. By default they are not cached.
    aot.autograd_cache_allow_custom_autograd_functions = True


def recomputing(graph, inputs):
    """A backend of torch.compile: the compiler's own checkpoint. Backward recomputes a block from its input.

    torch.compile keeps one graph for each backend, even if the code is the same. So blocks that are compiled with this
    backend and blocks that are compiled with the plain one, "inductor", run next to each other, each kind with a graph
    of its own. The graphs' cache on disk does not confuse the two, because the options of AOTAutograd, which has the
    one that is set here, are part of its keys.
    Proof: tests/test_lora.py: test_of_compiled_blocks_those_asked_for_recompute."""
    from torch._functorch import config as aot
    from torch._inductor.compile_fx import compile_fx

    # How many activations the compiler may keep for backward, between 0 and 1. 0: only a graph's input, as a checkpoint
    # does. The default is 1: as many as are quickest.
    with aot.patch(activation_memory_budget=0):
        return compile_fx(graph, inputs)


def apply(recomputed, kept, by_compiler, one_length):
    """Compile the modules at two lists of places, blocks or halves of blocks. Modules of one kind share a graph.

    by_compiler: the compiler sees to it that backward recomputes the modules at the first places. Else somebody else
    does (speed/checkpoint.py), and all blocks are compiled alike.
    one_length: all batches have one shape, as packed rows do; sizes are constants then, which compiles faster."""
    configure()
    compile_each(recomputed, recomputing if by_compiler else "inductor", one_length)
    compile_each(kept, "inductor", one_length)
    say("compile", "each block, one graph for all lengths; the first step compiles, so is slow")


def compile_each(places, backend, one_length):
    for parent, name in places:
        getattr(parent, name).compile(backend=backend, dynamic=not one_length)


def compile_function(function):
    """The function compiled, with one graph for all sizes."""
    return torch.compile(function, dynamic=True)


def not_compiled(is_compiled):
    """A block in which what is compiled runs as plain Python: for shapes that would compile a graph of their own."""
    if not is_compiled:
        # set_stance would import the compiler, which takes 2 s.
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def graphs_so_far():
    """How many graphs this process has compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
