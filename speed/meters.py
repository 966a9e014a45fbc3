"""Memory and time of a run that is going on: what is in use, how fast it goes, whether an error is a lack of memory.

    "loaded" receipt                 seconds and peak of loading
    "quant" receipt                  bytes of the frozen linears, before and after
    metrics.jsonl, each step         tokens_per_s, peak_mem_gb, padding
    summary.json, last receipts      FIGURES, below

speed/memory.py tells the memory, and speed/rate.py the time, of a run that has not begun.
"""

import cli
from cli import say

import contextlib
import re
import sys
import time
from pathlib import Path

import torch


def peak_memory(device):
    """GB: on a GPU the peak that torch allocated; on a CPU the memory in use now, without memory-mapped files."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                kilobytes = int(line.split()[1])
                return kilobytes * 1024 / 1e9
    # macOS has no /proc, and counts in bytes what Linux counts in kilobytes.
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)


def reserved_memory(device):
    """GB that torch took from the GPU at the peak; None without a GPU.

    Reserved is at least allocated, because torch keeps freed blocks for the next tensors. nvidia-smi shows it."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_reserved() / 1e9


def count_frozen(model, dtype):
    """(frozen layers, their bytes in dtype, their bytes as they are kept, bytes of all other weights)."""
    # Only a frozen layer has mm_t.
    layers = [m for m in model.modules() if hasattr(m, "mm_t")]
    in_dtype = sum(m.in_features * m.out_features for m in layers) * dtype.itemsize
    kept = sum(p.nbytes for m in layers for p in m.parameters())
    everything = sum(p.nbytes for p in model.parameters())
    return len(layers), in_dtype, kept, everything - kept


def say_quantised(kind, model, dtype):
    if kind == "none":
        return
    layers, before, after, rest = count_frozen(model, dtype)
    kept = str(dtype).removeprefix("torch.")
    say(
        "quant",
        f"{kind}: {layers} layers, {before / 1e9:.2f} GB -> {after / 1e9:.2f}; "
        f"embedding, head and norms stay {kept}: {rest / 1e9:.2f} GB",
    )


# What a failed allocation is called in a plain RuntimeError: by CUDA, by torch on a CPU, by the system where a file is
# mapped, by cuBLAS, by C++.
NO_MEMORY = re.compile(
    "out of memory|can't allocate memory|Cannot allocate memory|CUBLAS_STATUS_ALLOC_FAILED|bad_alloc"
)


def is_out_of_memory(error):
    """Whether an allocation failed. Of a plain RuntimeError only the message tells.

    Proof: tests/test_meters.py: test_an_allocation_that_really_fails_is_a_sentence."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return NO_MEMORY.search(str(error)) is not None


def reason(error):
    """The first line of an allocator's message."""
    return str(error).partition("\n")[0] or type(error).__name__


@contextlib.contextmanager
def go_on_without(what, out):
    """A `with` block that is given up where memory runs out in it, because nothing depends on its result.

    train.py writes its recipes so: a run of hours must not end because a recipe found no memory. sample.py can write
    one later, from the run's folder `out`.
    Proof: tests/test_train.py: test_out_of_memory_in_a_recipe_costs_the_recipe_only."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        later = f"the run goes on, and `python sample.py --run {out}` writes one later"
        say(what, f"left out, because memory ran out: {later}. ({reason(e)})")


FIGURES = [
    "tokens_per_s",
    "peak_mem_gb",
    "reserved_mem_gb",
    "first_step_s",
    "to_first_step_s",
    "load_s",
    "load_peak_gb",
    "graphs",
    "graphs_after_step_10",
    "host_share",
    "waiting_share",
]


class Meter:
    """Time, tokens and memory of the steps of this process. train.py calls these methods around each step:

        rest()         begin()              launched()               end()                         rest()
          |   waiting    |     launching       |    the GPU finishes   |   log, evaluate, save        |
                         |<------------- the time of a step ---------->|

        waiting          the loop asks the loader (data.feed) for the next batches
        launching        Python launches forward and backward; the GPU works behind it
        GPU finishes     one_step ends with float(loss), which waits for the GPU

    Is the GPU waiting for data? At end() its queue is empty, so it stands still until begin(). Of that time rest() to
    begin() is the loader's: waiting_share is its part of the time of all steps and all waiting. A batch that is ready
    costs microseconds: 0.19 % of the quickest run in README.md, 135M at 23 ms a step, are 44 µs a step.

    host_share is launching / the time of a step. Near 1: the GPU is done when Python is, so the host is the bound, and
    --cuda_graph or a larger batch helps. The first step is in no share, because it compiles."""

    def __init__(self, device, graphs_so_far):
        """graphs_so_far(): how many graphs the compiler has made"""
        self.device = device
        self.graphs_so_far = graphs_so_far
        self.load = None  # seconds
        self.load_peak = None  # GB on the GPU
        self.peak = 0.0  # GB
        self.steps = 0
        self.seconds = 0.0  # of all steps but the first, which compiles
        self.tokens = 0  # in those seconds
        self.launching = 0.0  # seconds from begin() to launched(), of the same steps
        self.waited = 0.0  # seconds from rest() to begin(), from the third step on
        self.graphs = None  # how many graphs were compiled so far
        self.graphs_at_step_10 = None  # of this process, or at its last step
        self.first_step = None  # seconds
        self.to_first_step = None  # seconds from the start of the process
        # Of the present step: when it began, seconds to launched(), when the loop last began to wait.
        self.began = 0.0
        self.launched_after = 0.0
        self.rested = 0.0

    @contextlib.contextmanager
    def loading(self, name):
        """A block in which the weights of `name` are loaded: a receipt of its time and, on a GPU, of its peak."""
        began = time.time()
        yield
        self.load = time.time() - began
        peak = ""
        if self.device.type == "cuda":
            self.load_peak = peak_memory(self.device)
            peak = f", {self.load_peak:.2f} GB at the peak"
        say("loaded", f"{name} in {self.load:.1f} s{peak}")

    def look(self):
        """Note the memory in use. On a CPU the peak is the largest that was looked at."""
        self.peak = max(self.peak, peak_memory(self.device))

    def begin(self):
        """A step begins: its batches are there."""
        self.began = time.time()
        # Leave out the waiting before the first two steps, because the loader's thread only begins to work then.
        if self.steps >= 2:
            self.waited += self.began - self.rested

    def launched(self):
        """Python has launched all of forward and backward. The GPU may still be computing."""
        self.launched_after = time.time() - self.began

    def end(self, batches, tell):
        """A step is over, on the GPU too. -> what metrics.jsonl has of its speed and memory

        tell(what, text) prints the receipt of the first step."""
        took = time.time() - self.began
        tokens = sum(b.real for b in batches)
        padded = sum(b.ids.numel() for b in batches)
        if self.steps == 0:
            self.first_step = took
            self.to_first_step = time.time() - cli.STARTED
            tell("first step", f"{took:.1f} s, compilation and warm-up in it")
        else:
            self.seconds += took
            self.tokens += tokens
            self.launching += self.launched_after
        self.steps += 1
        self.graphs = self.graphs_so_far()
        if self.steps <= 10:
            self.graphs_at_step_10 = self.graphs
        self.look()
        return {
            "target_tokens": sum(len(b.targets) for b in batches),
            "tokens_per_s": round(tokens / took, 1),
            "padding": round(1 - tokens / padded, 4),
            "peak_mem_gb": round(self.peak, 3),
        }

    def rest(self):
        """Logging, evaluation and saving are over. From here to begin() the loop only waits for data."""
        self.rested = time.time()

    def summary(self):
        """The figures of the run, for summary.json. A figure is None where too few steps were made to tell."""
        figures = dict.fromkeys(FIGURES)
        figures["peak_mem_gb"] = round(self.peak, 3)
        figures["reserved_mem_gb"] = reserved_memory(self.device)
        figures["load_s"] = self.load
        figures["load_peak_gb"] = self.load_peak
        figures["first_step_s"] = self.first_step
        figures["to_first_step_s"] = self.to_first_step
        if self.graphs is not None:
            figures["graphs"] = self.graphs
            figures["graphs_after_step_10"] = self.graphs - self.graphs_at_step_10
        if self.seconds:
            figures["tokens_per_s"] = round(self.tokens / self.seconds, 1)
            figures["host_share"] = self.launching / self.seconds
            figures["waiting_share"] = self.waited / (self.seconds + self.waited)
        return figures

    def say_summary(self, is_compiled):
        figures = self.summary()
        if is_compiled and self.graphs is not None:
            late = figures["graphs_after_step_10"]
            say("compile", f"{figures['graphs']} graphs, {late} of them after step 10")
        if self.seconds:
            say(
                "host",
                f"{figures['host_share']:.0%} of a step's time goes by before backward is launched to its end; "
                f"{figures['waiting_share']:.2%} of all time went by in waiting for data",
            )
        reserved = figures["reserved_mem_gb"]
        if reserved is not None:
            say("memory", f"{self.peak:.2f} GB allocated at the peak, {reserved:.2f} GB reserved")
