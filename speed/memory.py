"""Memory and time of a run: what is in use, how fast it goes, and which flags help where memory runs out."""

import cli
from cli import UserError, say

import contextlib
import re
import sys
import time
from pathlib import Path

import torch


def peak_memory(device):
    """GB: the GPU's allocated peak; on a CPU the anonymous memory now (a memory-mapped file is not counted)."""
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
    """GB that torch has taken from the GPU at the peak, or None."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_reserved() / 1e9


def count_frozen(model, dtype):
    """(frozen layers, their bytes in dtype, their bytes as they are kept, bytes of all other weights)."""
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


def advice(flags):
    """The flags that would take less memory, in order of gain. flags {name: value}: those of the run."""
    is_packed = flags["batching"] == "packed"
    can_offload = all([flags["grad_ckpt"], not flags["offload_ckpt"], not flags["cuda_graph"]])
    helps = {
        "--grad_ckpt": not flags["grad_ckpt"],
        "--fused_loss": not flags["fused_loss"],
        "--quant nf4": flags["lora_r"] > 0 and flags["quant"] == "none",
        "--attn flash": flags["attn"] == "naive",
        "--no-cuda_graph": flags["cuda_graph"],
        "--offload_ckpt": can_offload,
        "--dtype bf16": flags["dtype"] == "fp32",
        "--optim adamw8bit": flags["optim"] == "adamw",
        "a smaller --batch_size with a larger --grad_accum": flags["batch_size"] > 1
        and not is_packed,
        "a smaller --batch_tokens": is_packed or flags["batch_tokens"] > 0,
        "a smaller --max_len": True,
    }
    return [flag for flag, does in helps.items() if does]


@contextlib.contextmanager
def out_of_memory(model, device, flags):
    """Which part was the largest, and which flags help, for the one failure that every user meets."""
    try:
        yield
    except RuntimeError as e:  # torch.OutOfMemoryError is one
        # A CPU's allocator raises no better than a RuntimeError.
        on_cpu = re.search("out of memory|can't allocate memory", str(e))
        if not isinstance(e, torch.OutOfMemoryError) and not on_cpu:
            raise
        weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
        rest = max(0.0, peak_memory(device) - weights)
        add = ", then ".join(advice(flags))
        reason = str(e).splitlines()[0]
        raise UserError(
            f"out of memory: weights hold {weights:.1f} GB, what training keeps beside them {rest:.1f} GB or more. "
            f"Add {add}. ({reason})"
        ) from None


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
    """Time, tokens and memory of the steps of this process."""

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
        self.launching = 0.0  # seconds until backward was launched to its end
        self.waited = 0.0  # seconds for data
        self.graphs = []  # compiled so far, after each step
        self.first_step = None  # seconds
        self.to_first_step = None  # seconds from the start of the process
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
        self.peak = max(self.peak, peak_memory(self.device))

    def begin(self):
        self.began = time.time()
        # Before the third step the loader's queue fills up.
        if self.steps >= 2:
            self.waited += self.began - self.rested

    def launched(self):
        self.launched_after = time.time() - self.began

    def end(self, batches, tell):
        """A step is over. -> what metrics.jsonl has of its speed and memory. tell(what, text): of the first step"""
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
        self.graphs.append(self.graphs_so_far())
        self.look()
        return {
            "target_tokens": sum(len(b.targets) for b in batches),
            "tokens_per_s": round(tokens / took, 1),
            "padding": round(1 - tokens / padded, 4),
            "peak_mem_gb": round(self.peak, 3),
        }

    def rest(self):
        """Evaluation and saving are over: from here on the loop waits for data."""
        self.rested = time.time()

    def summary(self):
        """The figures of the run, for summary.json. None where there were no steps to tell."""
        figures = dict.fromkeys(FIGURES)
        figures["peak_mem_gb"] = round(self.peak, 3)
        figures["reserved_mem_gb"] = reserved_memory(self.device)
        figures["load_s"] = self.load
        figures["load_peak_gb"] = self.load_peak
        figures["first_step_s"] = self.first_step
        figures["to_first_step_s"] = self.to_first_step
        if self.graphs:
            step_10 = min(10, self.steps)
            figures["graphs"] = self.graphs[-1]
            figures["graphs_after_step_10"] = self.graphs[-1] - self.graphs[step_10 - 1]
        if self.seconds:
            figures["tokens_per_s"] = round(self.tokens / self.seconds, 1)
            figures["host_share"] = self.launching / self.seconds
            figures["waiting_share"] = self.waited / (self.seconds + self.waited)
        return figures

    def say_summary(self, is_compiled):
        figures = self.summary()
        if is_compiled and self.graphs:
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
