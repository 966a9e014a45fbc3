"""How fast a training run goes, by arithmetic: operations over the card's rate, bytes over its bandwidth, launches.

    card = measured(device, Shape, …) or CARDS["a100"]
    seconds = step_seconds(shape, work, card)

A step waits for the slowest of three: the card, the host that launches kernels, copies between the two.

    the card   matrix products     2 operations a weight and token in forward, 2 for the input gradient, 2 for the
                                   recomputation of a checkpoint. Frozen weights have no gradient of their own.
               attention           half of all pairs of tokens; backward does 2.5 times forward's work. Where scores are
                                   held: all pairs, and SCORES passes over the scores
               the rest            norms, SwiGLU, RoPE, LoRA's thin products: their tensors are read and written PASSES
                                   times, at the card's bandwidth
               decoding            a weight in 4 bits becomes 16 bits or e4m3, in forward and in backward
               gaps                between kernels
    the host   LAUNCHES kernels a block; none with --cuda_graph
    copies     --offload_ckpt: the inputs of half blocks to the host and back

Llama-3-8B, 32 x 256 tokens, bf16 without checkpoints on CARDS["h100"]: 345 ms products, 8 attention, 109 the rest, 14
gaps: 476 ms. Measured: 487. PASSES, GAP and the share of attention were fitted to such steps of 1B and 8B models. Not
measured are SCORES, and fp32.

Proof: tests/test_rate.py, by hand and against these steps. results/plan.json compares measured runs.
"""

import os
import time
from dataclasses import dataclass, replace

import torch

# --- 1. cards ---


@dataclass(frozen=True)
class Card:
    """bf16, fp8, fp32: operations a second of large products (fp8 0: none; fp32 0: see products). A CPU's bf16 is
    measured in fp32. bandwidth, host: bytes a second of the card's memory, and between card and host. launch: seconds
    in which the host launches a kernel."""

    name: str
    memory: float  # bytes
    bf16: float
    fp8: float
    bandwidth: float
    host: float = 25e9
    launch: float = 20e-6
    context: float = 0.55e9  # bytes that CUDA takes before the first tensor, as measured on an H100
    device: str = "cuda"  # cuda, mps or cpu
    flash: bool = True  # whether attention of grouped heads holds no scores, as from Ampere on
    fp32: float = 0.0

    @property
    def is_gpu(self):
        return self.device == "cuda"

    @property
    def has_bf16(self):
        """A GPU has bf16 from Ampere on, as it has flash."""
        return self.flash or not self.is_gpu

    def products(self, size):
        """Operations a second of large products, in numbers of `size` bytes.

        torch uses no TF32 unless it is told to, so an A100 is 16 times slower in fp32."""
        if size == 2 or not self.is_gpu:
            return self.bf16
        return self.fp32 or self.bf16 / 16


# Of what a data sheet promises, the share that large products reach: 707 of 989 TFLOP/s on an H100.
REACHED = 0.72
# The same for the bandwidth.
BANDWIDTH = 0.9

# {card: [GB, dense TFLOP/s in 16 bits, in 8 bits, GB a second]}, from the data sheets. The first three multiply in
# fp16, all others in bf16. GB are 10⁹ bytes, as sold; a card has a little more.
SHEETS = {
    "T4": [16, 65, 0, 320],
    "V100": [16, 125, 0, 900],
    "P100": [16, 19, 0, 732],
    "RTX3060": [12, 51, 0, 360],
    "RTX3090": [24, 71, 0, 936],
    "RTX4060Ti": [16, 88, 176, 288],
    "RTX4090": [24, 165, 330, 1008],
    "RTX5090": [32, 209, 419, 1792],
    "A10": [24, 125, 0, 600],
    "A10G": [24, 70, 0, 600],
    "L4": [24, 121, 242, 300],
    "L40S": [48, 362, 733, 864],
    "A6000": [48, 155, 0, 768],
    "A100-40GB": [40, 312, 0, 1555],
    "A100": [80, 312, 0, 2039],
    "H100": [80, 989, 1979, 3350],
    "H200": [141, 989, 1979, 4800],
    "B200": [180, 2250, 4500, 8000],
}
# {card: TFLOP/s of fp32 outside tensor cores}, from the same sheets.
FP32 = {
    "T4": 8.1,
    "V100": 15.7,
    "P100": 9.5,
    "RTX3060": 12.7,
    "RTX3090": 35.6,
    "RTX4060Ti": 22.1,
    "RTX4090": 82.6,
    "RTX5090": 104.8,
    "A10": 31.2,
    "A10G": 31.5,
    "L4": 30.3,
    "L40S": 91.6,
    "A6000": 38.7,
    "A100-40GB": 19.5,
    "A100": 19.5,
    "H100": 67,
    "H200": 67,
    "B200": 80,
}
BEFORE_AMPERE = ["T4", "V100", "P100"]


def sold(name):
    """The Card of a data sheet. name: a key of SHEETS"""
    gigabytes, *teraflops, bandwidth = SHEETS[name]
    bf16, fp8 = teraflops
    return Card(
        name=name,
        memory=gigabytes * 1e9,
        bf16=bf16 * 1e12 * REACHED,
        fp8=fp8 * 1e12 * REACHED,
        bandwidth=bandwidth * 1e9 * BANDWIDTH,
        flash=name not in BEFORE_AMPERE,
        fp32=FP32[name] * 1e12 * REACHED,
    )


CARDS = {name.lower(): sold(name) for name in SHEETS}

# Memory that cards are sold with, for the table of what fits.
SIZES = [8, 16, 24, 40, 80]  # GB


def measured(device, shape, fp8):
    """The Card that this device is: short products of the model's own widths, a copy, launches. About a second."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        dtype = torch.float16
    # A CPU takes seconds for what a GPU does in a millisecond, so there the products are small.
    sizes = [256, 512, 1024]
    if device.type == "cuda":
        sizes = [8192, shape.C, shape.F]
    rows, inputs, outputs = sizes
    x = torch.randn(rows, inputs, device=device, dtype=dtype)
    W = torch.randn(inputs, outputs, device=device, dtype=dtype)
    operations = 2 * rows * inputs * outputs
    found = Card(
        name=name_of(device),
        memory=memory_of(device),
        bf16=operations / seconds_of(lambda: x @ W, device),
        fp8=0.0,
        bandwidth=copy_rate(device),
        device=device.type,
        flash=has_flash(device),
    )
    if device.type != "cuda":
        # Python and torch have about as much in use before a model is there.
        return replace(found, launch=0.0, context=0.45e9)
    # A compiled block spends about twice as long on a kernel as a plain call does, because its sizes are checked.
    small = torch.zeros(1, device=device)
    found = replace(found, launch=2 * seconds_of(lambda: small.add_(1), device))
    if not fp8 or not has_fp8(device, inputs, outputs):
        return found
    return replace(found, fp8=operations / seconds_of(product_in_fp8(x, W), device))


def product_in_fp8(x, W):
    """A function that multiplies x and W in e4m3, with a scale a row, as speed/fp8.py does."""
    codes = x.to(torch.float8_e4m3fn)
    weights = W.t().contiguous().to(torch.float8_e4m3fn).t()
    rows = torch.ones(x.shape[0], 1, device=x.device)
    columns = torch.ones(1, W.shape[1], device=x.device)

    def product():
        return torch._scaled_mm(
            codes, weights, rows, columns, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return product


def copy_rate(device):
    """Bytes a second of a copy in the device's memory, read and written, of a tensor that no cache holds."""
    numbers = 2**28 if device.type == "cuda" else 2**24
    x = torch.zeros(numbers, device=device, dtype=torch.uint8)
    return 2 * x.nbytes / seconds_of(lambda: x.clone(), device)


def unmeasured(device):
    """A Card of this device for a plan of memory alone."""
    return Card(
        name=name_of(device),
        memory=memory_of(device),
        bf16=1,
        fp8=0,
        bandwidth=1,
        device=device.type,
        flash=has_flash(device),
    )


def has_flash(device):
    """Whether attention of grouped heads holds no scores there."""
    return device.type != "cuda" or torch.cuda.get_device_capability() >= (8, 0)


def has_fp8(device, inputs, outputs):
    """Whether products of these sizes run in fp8 there: from compute capability 8.9 on, in multiples of 16."""
    if device.type != "cuda" or torch.cuda.get_device_capability() < (8, 9):
        return False
    return inputs % 16 == 0 and outputs % 16 == 0


def seconds_of(call, device, at_least=0.15):
    """Seconds of one call, the mean over so many that they take `at_least` seconds."""
    call()
    wait(device)
    began = time.time()
    calls = 0
    while time.time() - began < at_least:
        for _ in range(20):
            call()
        calls += 20
        wait(device)
    return (time.time() - began) / calls


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    if device.type == "mps":
        torch.mps.synchronize()


def name_of(device):
    return torch.cuda.get_device_name() if device.type == "cuda" else device.type


def memory_of(device):
    """Bytes of the card, or of the host for a device without memory of its own."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


# --- 2. a step ---

# How often what a block keeps for backward is read or written besides products: in forward and backward, and in a
# recomputation. Eager mode fuses nothing.
PASSES = 8.5
PASSES_RECOMPUTED = 3
PASSES_EAGER = 20
# Attention reaches this share of the rate of large products.
ATTENTION = 0.35
# How often scores are read or written where they are held. Forward: written, masked, normalised, read for p · v.
# Backward: the same of their gradient, and the softmax read twice.
SCORES = 6
SCORES_BACKWARD = 10
# Kernels of a block in forward and backward, as the profiler counts them.
LAUNCHES = 150
LAUNCHES_QUANTISED = 230
LAUNCHES_EAGER = 450
# Seconds in which a kernel begins and ends, and the card is not full.
GAP = 3e-6
# Bytes that are read and written for each weight before it can be multiplied: {(--quant, --fp8): bytes}. 4 bits or
# a byte become bf16; bf16 becomes e4m3 in two layouts.
DECODED = {
    ("none", False): 0,
    ("none", True): 2 + 1 + 1,
    ("nf4", False): 0.5 + 2,
    ("nf4", True): 0.5 + 2 + 2 + 1 + 1,
    ("fp8", False): 1 + 2,
    ("fp8", True): 1 + 1,
}


def step_seconds(shape, work, card):
    """Seconds of forward and backward of one micro-batch."""
    on_card = 0.0
    for part in [products, attention, the_rest, decoding, gaps, embedding]:
        on_card += part(shape, work, card)
    return max(on_card, launching(shape, work, card), copies(shape, work, card))


def operations(shape, work):
    """(operations of the blocks' products, of the head's) for a micro-batch."""
    forward = 2 * work.n * shape.L * shape.block()
    head = 2 * work.targets * shape.V * shape.C
    passes = 2 if work.lora_r else 3
    return passes * forward + recomputed(shape, work) * forward, passes * head


def recomputed(shape, work):
    """The share of forward's products that backward makes again.

    The compiler's own checkpoint leaves down_proj out, because backward needs no output of it (speed/compiled.py)."""
    share = work.checkpoints(shape.L) / shape.L
    if work.by_compiler:
        share *= 1 - shape.F * shape.C / shape.block()
    return share


def products(shape, work, card):
    blocks, head = operations(shape, work)
    fast = card.products(work.bytes_of_a_number)
    of_blocks = card.fp8 if work.fp8 and card.fp8 else fast
    return blocks / of_blocks + head / fast


def attention(shape, work, card):
    if work.holds_scores:
        return attention_with_scores(shape, work, card)
    # Two products, q · k and p · v, of 2 operations each, over half of the T x T pairs; over all where a mask says
    # which count.
    T = work.document or work.tokens
    forward = 2 * work.n * T * shape.H * shape.D * shape.L
    if work.masked:
        forward *= 2
    passes = 3.5 + work.checkpoints(shape.L) / shape.L
    return forward * passes / (card.products(work.bytes_of_a_number) * ATTENTION)


def attention_with_scores(shape, work, card):
    """--attn naive, and what PyTorch does without a kernel: all T x T pairs, and scores that go through memory."""
    again = work.checkpoints(shape.L) / shape.L
    T = work.tokens
    forward = 4 * work.n * T * shape.H * shape.D * shape.L
    # Backward has four products where forward has two.
    of_products = forward * (3 + again) / card.products(work.bytes_of_a_score)
    scores = work.n * T * shape.H * shape.L * work.bytes_of_a_score
    passes = SCORES * (1 + again) + SCORES_BACKWARD
    return of_products + scores * passes / card.bandwidth


def the_rest(shape, work, card):
    numbers = 4 * shape.C + 3 * shape.H * shape.D + 2 * shape.K * shape.D + 3 * shape.F
    moved = work.n * shape.L * numbers * work.bytes_of_a_number
    passes = PASSES if work.compile else PASSES_EAGER
    passes += PASSES_RECOMPUTED * work.checkpoints(shape.L) / shape.L
    return moved * passes / card.bandwidth


def updating(shape, work, card):
    """Seconds of the optimiser's step: AdamW reads a weight, its gradient and two states, and writes all but one."""
    trained = work.trained(shape)
    return trained * 7 * 4 / card.bandwidth


def decoding(shape, work, card):
    """Weights become what is multiplied, in forward and in backward. The compiler's own checkpoint shares backward's.

    With --offload_embed nothing is shared, because whoever gives that flag prefers memory to speed (train.build)."""
    times = 2
    if work.offload_embed or not work.by_compiler:
        times += work.checkpoints(shape.L) / shape.L
    return times * shape.L * shape.block() * DECODED[work.quant, work.fp8] / card.bandwidth


def kernels(shape, work):
    """Of all blocks, in forward and backward."""
    if not work.compile:
        return shape.L * LAUNCHES_EAGER
    if work.quant == "none" and not work.fp8:
        return shape.L * LAUNCHES
    return shape.L * LAUNCHES_QUANTISED


def gaps(shape, work, card):
    """A CPU has none."""
    if not card.launch:
        return 0.0
    return kernels(shape, work) * GAP


def launching(shape, work, card):
    if work.cuda_graph:
        return 0.0
    return kernels(shape, work) * card.launch


def embedding(shape, work, card):
    """--offload_embed: rows of the embedding come from the host, and the card waits for them."""
    if not work.offload_embed:
        return 0.0
    return work.n * shape.C * work.bytes_of_a_number / card.host


def copies(shape, work, card):
    if not work.offload_ckpt:
        return 0.0
    inputs = 2 * work.checkpoints(shape.L) - 1
    return 2 * inputs * work.n * shape.C * work.bytes_of_a_number / card.host
