"""The machine: which device and arithmetic it has, how much memory is in use, and what helps where it runs out."""

import contextlib
import re
import shutil
import sys
from pathlib import Path

import torch

from cli import UserError


def pick_device(name):
    """ "auto": the GPU if there is one. mps is taken where torch has it."""
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("only cuda, mps and cpu are supported")
        torch.empty(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(
            f"--device {name} does not work here ({str(e).splitlines()[0]}); try --device cpu."
        ) from None
    return device


def pick_dtype(name, device):
    """(dtype that frozen weights are kept in, dtype of the arithmetic, why).

    A CPU without bf16 instructions makes bf16 products many times slower than fp32 ones: there bf16 is only how weights
    are kept, half of fp32's memory, and the product is made in fp32."""
    native = {
        "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
        "mps": lambda: True,
        "cpu": lambda: torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
    }[device.type]()
    where, why = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"this {device.type}",
        "as asked",
    )
    if name == "auto":
        name = "bf16" if native else "fp16" if device.type == "cuda" else "fp32"
        why = f"{where} has {'' if native else 'no '}bf16 instructions"
    kept = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    if name == "bf16" and not native:
        if device.type == "cuda":
            raise UserError(f"--dtype bf16: {where} has no bf16; use --dtype fp16.")
        return (
            kept,
            torch.float32,
            f"weights kept in bf16, arithmetic in fp32: {where} has no bf16 instructions",
        )
    return kept, kept, why


# --- the compiler ---


def start_compiler():
    """Its worker processes take seconds to come up: they do while the weights are loaded."""
    if not any(map(shutil.which, ("g++", "clang++", "c++", "gcc", "clang", "cc"))):
        raise UserError(
            "--compile needs a C++ compiler (apt install g++); everything runs without --compile."
        )
    from torch._inductor import async_compile

    async_compile.maybe_warm_pool()


def compile_blocks(model, checkpoint, halves):
    """Each block, or half of one, one graph for all lengths; with `checkpoint` backward's graph computes it again."""
    from torch._functorch import config as aot
    from torch._inductor import config as inductor

    torch._dynamo.config.specialize_float = (
        True  # no float changes here; to find that out it would trace twice
    )
    torch.fx.experimental._config.use_duck_shape = (
        False  # sizes equal by chance, B and T say, stay two
    )
    inductor.shape_padding = False  # it asks for a graph of its own for each range of lengths
    aot.activation_memory_budget = 0 if checkpoint else 1
    aot.autograd_cache_allow_custom_autograd_functions = (
        True  # a second process then traces a block in seconds
    )
    for block in model.layers:
        if halves:
            block.attend, block.mlp = (
                torch.compile(part, dynamic=True) for part in (block.attend, block.mlp)
            )
        else:
            block.compile(dynamic=True)
    model.loss_chunk = torch.compile(model.loss_chunk, dynamic=True)


# --- memory ---


def peak_memory(device):
    """GB: the GPU's allocated peak; on a CPU the anonymous memory now (a memory-mapped file is not counted)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return (
            next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024 / 1e9
        )
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1e9 if sys.platform == "darwin" else 1e6
    )


def count_frozen(model, dtype):
    """(frozen layers, their bytes in dtype, their bytes as they are kept, bytes of all other weights)."""
    layers = [m for m in model.modules() if hasattr(m, "mm_t") and not hasattr(m, "base")]
    before = sum(m.in_features * m.out_features for m in layers) * dtype.itemsize
    after, everything = (
        sum(p.nbytes for m in ms for p in m.parameters()) for ms in (layers, [model])
    )
    return len(layers), before, after, everything - after


ADVICE = [  # in order of gain
    ("--grad_ckpt", lambda c: not c.grad_ckpt),
    ("--fused_loss", lambda c: not c.fused_loss),
    ("--quant nf4", lambda c: c.lora_r and c.quant == "none"),
    ("--attn flash", lambda c: c.attn == "naive"),
    ("--no-cuda_graph", lambda c: c.cuda_graph),
    ("--offload_ckpt", lambda c: c.grad_ckpt and not c.offload_ckpt and not c.cuda_graph),
    ("--dtype bf16", lambda c: c.dtype == "fp32"),
    ("--optim adamw8bit", lambda c: c.optim == "adamw"),
    (
        "a smaller --batch_size with a larger --grad_accum",
        lambda c: c.batch_size > 1 and not c.budget,
    ),
    ("a smaller --batch_tokens", lambda c: c.budget or c.batch_tokens),
    ("a smaller --max_len", lambda c: True),
]


@contextlib.contextmanager
def out_of_memory(cfg, model, device):
    """Which part was the largest, and which flags help, for the one failure that every user meets."""
    try:
        yield
    except (
        RuntimeError
    ) as e:  # torch.OutOfMemoryError is one, and a CPU's allocator raises no better
        if not isinstance(e, torch.OutOfMemoryError) and not re.search(
            "out of memory|can't allocate memory", str(e)
        ):
            raise
        weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
        rest = max(0.0, peak_memory(device) - weights)
        flags = ", then ".join(flag for flag, helps in ADVICE if helps(cfg))
        raise UserError(
            f"out of memory: weights hold {weights:.1f} GB, what training keeps beside them {rest:.1f} GB "
            f"or more. Add {flags}. ({str(e).splitlines()[0]})"
        ) from None


class Offload:
    """--offload_ckpt: the one tensor that a checkpointed half of a block keeps, its input, goes to pinned host memory
    on a side stream while it runs, and comes back while backward is in the half behind it."""

    def __init__(self, around, device):
        self.around, self.device, self.cuda = around, device, device.type == "cuda"
        self.side = torch.cuda.Stream() if self.cuda else None
        self.index, self.host, self.back, self.leaving, self.now = {}, {}, {}, None, None

    def __call__(self, block, x, *args):
        if not torch.is_grad_enabled():
            return self.around(block, x, *args)
        self.now = self.index.setdefault(block, len(self.index)), x, self.mark()
        with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
            y = self.around(block, x, *args)
        self.now = None  # autograd keeps the hooks: x must not hang on to them
        return y

    def pack(
        self, t
    ):  # weights stay, and so does the first input: a leaf, which autograd keeps anyway
        i, x, ready = self.now
        return (
            self.send(i, t, ready)
            if t.data_ptr() == x.data_ptr() and t.shape == x.shape and not x.is_leaf
            else t
        )

    def unpack(self, t):
        return t if isinstance(t, torch.Tensor) else self.fetch(*t)

    def mark(self):
        return torch.cuda.current_stream().record_event() if self.cuda else None

    def wait(self, event):
        if event is not None:
            torch.cuda.current_stream().wait_event(event)

    def copy(self, to, x, ready):
        """x to `to` beside what is running, once `ready` has come. -> the event of its end"""
        with torch.cuda.stream(self.side):  # None: does nothing
            self.wait(ready)
            to.copy_(x, non_blocking=self.cuda)
            return self.mark()

    def send(self, i, x, ready):
        if (
            self.leaving
        ):  # the block before: only when its copy is done may its memory be used again
            self.wait(self.leaving[2])
        if (
            i not in self.host or self.host[i].numel() < x.numel()
        ):  # the longest batch comes first: allocated once
            self.host[i] = torch.empty(x.numel(), dtype=x.dtype, pin_memory=self.cuda)
        x = x.detach()
        self.leaving = i, x, self.copy(self.host[i][: x.numel()].view(x.shape), x, ready)
        return i, x.shape

    def fetch(self, i, shape):
        if self.leaving:  # the last block's is still here
            self.back[self.leaving[0]], self.leaving = self.leaving[1:], None
        for j in (
            i,
            i - 1,
        ):  # this one, unless it is on its way already, and the one that is wanted next
            if j in self.host and j not in self.back:
                x = torch.empty(shape, dtype=self.host[j].dtype, device=self.device)
                self.back[j] = (
                    x,
                    self.copy(x, self.host[j][: shape.numel()].view(shape), self.mark()),
                )
        x, ready = self.back.pop(i)
        self.wait(ready)
        return x


class Graphs:
    """--cuda_graph: forward and backward of a micro-batch as one CUDA graph a padded shape: thousands of launches
    become one. A shape runs as it is the first time, and compiles; then it is recorded. Elsewhere only the padding."""

    def __init__(self, step, params, device):
        """step(ids, where, targets, scale, cu_seqlens) -> loss, with the gradients added to those of params."""
        self.step, self.device, self.into, self.graphs = step, device, {}, {}
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.grad = torch.zeros(
            sum(p.numel() for p in params), device=device
        )  # a graph adds to where it added before
        for p, part in zip(params, self.grad.split([p.numel() for p in params])):
            p.grad = part.view_as(p)

    def __call__(self, ids, where, targets, scale, cu_seqlens):
        (B, T), N, wide = ids.shape, len(targets), -(-ids.shape[1] // 8) * 8
        slots = (
            -(-N * 8 // (B * wide)) * B * wide // 8
        )  # in eighths of the batch: few shapes, little padding
        if not (known := (key := (B, wide, slots)) in self.into):
            slot, cu = (
                torch.arange(slots, device=self.device),
                None if cu_seqlens is None else cu_seqlens.clone(),
            )
            self.into[key] = (
                ids.new_zeros(B, wide),
                slot,
                slot.clone(),
                torch.zeros((), device=self.device),
                cu,
            )
        into = self.into[key]
        into[0][:, :T] = ids
        into[1][:N] = where // T * wide + where % T
        into[2][:N], into[2][N:], into[3][...] = targets, -1, scale
        if cu_seqlens is not None:
            into[4].copy_(cu_seqlens)
        if key not in self.graphs and (not known or len(self.graphs) == 64):
            return self.step(*into)  # beyond 64 graphs too: each takes memory of the driver's
        replay, loss = self.graphs[key] = self.graphs.get(key) or self.capture(into)
        replay()
        return loss.clone()

    def capture(self, into):
        if self.device.type != "cuda":
            loss = torch.zeros(())
            return lambda: loss.copy_(self.step(*into)), loss
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self.pool, capture_error_mode="thread_local"
        ):  # the loader's thread goes on
            loss = self.step(*into)
        return graph.replay, loss
