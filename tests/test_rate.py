"""speed/rate.py: the speed of a run, by hand, and against what an H100 did."""

import math
from dataclasses import replace

import pytest
import torch
from test_memory import CKPT, EIGHT, NF4, SHAPES, SMALL, work

from speed import memory, rate

# Figures by which a second is easy to count: 1 operation, 1 byte a second.
ONE = rate.Card("one", memory=1, bf16=1, fp8=2, bandwidth=1, host=1, launch=1)

# --- by hand ---


def flops_of_a_token(**flags):
    blocks, head = rate.operations(EIGHT, work(**flags))
    return (blocks + head) / 8192


def test_operations_of_a_token_of_8b():
    """speed/checkpoint.py: P = 6.979e9 weights in the blocks' linears, h = 0.525e9 in the head."""
    P = 6_979_321_856
    h = 128256 * 4096
    assert flops_of_a_token() == 4 * P + 4 * h
    assert flops_of_a_token() / 1e9 == pytest.approx(30.0, abs=0.05)
    # A recomputation is one more pass over the blocks.
    assert flops_of_a_token(**CKPT) == 6 * P + 4 * h
    assert flops_of_a_token(**CKPT) / 1e9 == pytest.approx(44.0, abs=0.05)
    # Half of the blocks.
    assert flops_of_a_token(**CKPT, ckpt_blocks=16) == 5 * P + 4 * h
    # nanoGPT's 6 operations a weight.
    assert flops_of_a_token(lora_r=0) == 6 * P + 6 * h
    # A compiled checkpoint leaves down_proj out: 14336 · 4096 in each of 32 blocks.
    down = 32 * 14336 * 4096
    assert flops_of_a_token(**CKPT, compile=True) == pytest.approx(6 * P + 4 * h - 2 * down)


def test_only_rows_with_targets_go_through_the_head():
    _, head = rate.operations(EIGHT, replace(work(), targets=100))
    assert head == 4 * 100 * 128256 * 4096


def test_operations_of_attention():
    """q · k and p · v: 2 operations a number of a head for T · T / 2 pairs; backward has 2.5 times as many."""
    pairs = 32 * 256 * 256 / 2
    forward = 32 * pairs * 2 * 2 * 32 * 128
    assert rate.attention(EIGHT, work(), ONE) == pytest.approx(3.5 * forward / rate.ATTENTION)
    assert rate.attention(EIGHT, work(**CKPT), ONE) == pytest.approx(4.5 * forward / rate.ATTENTION)
    # A packed row of 8,192 tokens attends inside recipes: here of 256.
    packed = work(1, 8192, document=256)
    assert rate.attention(EIGHT, packed, ONE) == rate.attention(EIGHT, work(), ONE)
    assert rate.attention(EIGHT, work(1, 8192), ONE) == 32 * rate.attention(EIGHT, packed, ONE)


def test_a_mask_leaves_no_pair_out():
    """A packed row without varlen attention: T x T pairs of the whole row, not half of them, and no document's."""
    row = work(1, 8192)
    masked = rate.attention(EIGHT, replace(row, masked=True), ONE)
    assert masked == 2 * rate.attention(EIGHT, row, ONE)


@pytest.mark.parametrize("attn, size, speed", [("naive", 2, 1), ("math", 4, 1 / 16)])
def test_scores_that_are_held_go_through_memory(attn, size, speed):
    """Six products of all pairs, 16 passes over 32 · 32 · 256 · 256 scores of 32 blocks. PyTorch's math is in fp32."""
    pairs = 32 * 256 * 256
    of_products = 32 * pairs * 32 * 128 * 2 * 6 / speed
    scores = 32 * pairs * 32 * size
    held = rate.attention(EIGHT, work(attn=attn), ONE)
    assert held == pytest.approx(of_products + 16 * scores)
    # A recomputation has two products and six passes.
    again = rate.attention(EIGHT, work(attn=attn, **CKPT), ONE)
    assert again == pytest.approx(of_products * 8 / 6 + 22 * scores)
    # On a card whose memory is slow beside its products, flash is quicker.
    h100 = rate.CARDS["h100"]
    slow = rate.attention(EIGHT, work(4, 2048, attn=attn), h100)
    assert slow > 2 * rate.attention(EIGHT, work(4, 2048), h100)


def test_products_in_fp32_are_slower_on_a_gpu():
    """NVIDIA's sheets: an H100 does 67 TFLOP/s in fp32 of 989 in bf16. A CPU was measured in fp32."""
    h100 = rate.CARDS["h100"]
    in_fp32 = work(bytes_of_a_weight=4, bytes_of_a_number=4)
    slower = rate.products(EIGHT, in_fp32, h100) / rate.products(EIGHT, work(), h100)
    assert slower == pytest.approx(989 / 67)
    blocks, head = rate.operations(EIGHT, work())
    assert rate.products(EIGHT, in_fp32, ONE) == 16 * (blocks + head)
    assert rate.products(EIGHT, in_fp32, replace(ONE, fp32=3)) == pytest.approx((blocks + head) / 3)
    assert rate.products(EIGHT, in_fp32, replace(ONE, device="cpu")) == blocks + head
    # Half of the pairs in fp32, too.
    assert rate.attention(EIGHT, in_fp32, ONE) == 16 * rate.attention(EIGHT, work(), ONE)


def test_dropout_recomputes_the_whole_block():
    """torch's checkpoint, not the compiler's: with down_proj, and each weight decoded once more."""
    flags = {**NF4, **CKPT, "compile": True}
    P = 6_979_321_856
    h = 128256 * 4096
    assert flops_of_a_token(**flags, dropout=True) == 6 * P + 4 * h
    assert rate.decoding(EIGHT, work(**flags), ONE) == 2 * 2.5 * P
    assert rate.decoding(EIGHT, work(**flags, dropout=True), ONE) == 3 * 2.5 * P


def test_a_measured_call_is_waited_for_on_each_device(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append("cuda"))
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    for name in ("cuda", "mps", "cpu"):
        rate.wait(torch.device(name))
    assert waited == ["cuda", "mps"]


def test_products_in_eight_bits_are_those_of_the_blocks():
    blocks, head = rate.operations(EIGHT, work())
    assert rate.products(EIGHT, work(), ONE) == blocks + head
    assert rate.products(EIGHT, work(fp8=True), ONE) == blocks / 2 + head
    # A card without fp8 does not divide by zero.
    assert rate.products(EIGHT, work(fp8=True), replace(ONE, fp8=0)) == blocks + head


def test_decoding_reads_codes_and_writes_sixteen_bits():
    """Half a byte and two bytes a weight, in forward and in backward."""
    P = 6_979_321_856
    assert rate.decoding(EIGHT, work(), ONE) == 0
    assert rate.decoding(EIGHT, work(**NF4), ONE) == 2 * 2.5 * P
    # --offload_embed: a recomputation decodes again.
    assert rate.decoding(EIGHT, work(**NF4, **CKPT, offload_embed=True), ONE) == 3 * 2.5 * P


def test_the_optimiser_reads_four_numbers_and_writes_three():
    assert rate.updating(EIGHT, work(), ONE) == 7 * 4 * 41_943_040
    assert rate.updating(EIGHT, work(lora_r=0), ONE) == 7 * 4 * 8_030_261_248


def test_copies_of_checkpoints():
    """63 inputs of half blocks of 67 MB, to the host and back."""
    offloaded = work(**CKPT, offload_ckpt=True)
    assert rate.copies(EIGHT, offloaded, ONE) == 2 * 63 * 8192 * 4096 * 2
    assert rate.copies(EIGHT, work(**CKPT), ONE) == 0


# --- a step waits for the slowest of three ---

FAST = rate.Card("fast", memory=1, bf16=1e30, fp8=1e30, bandwidth=1e30, host=1e30, launch=1e-30)


def test_a_step_waits_for_the_slowest():
    offloaded = work(**CKPT, offload_ckpt=True, compile=True)
    rest = rate.step_seconds(EIGHT, offloaded, FAST)
    slow_card = replace(FAST, bf16=1e12)
    slow_host = replace(FAST, launch=1.0)
    slow_copies = replace(FAST, host=1e6)
    blocks, head = rate.operations(EIGHT, offloaded)
    on_card = rate.step_seconds(EIGHT, offloaded, slow_card)
    assert on_card > (blocks + head) / 1e12 > rest
    launches = 32 * rate.LAUNCHES
    assert rate.step_seconds(EIGHT, offloaded, slow_host) == launches
    copied = 2 * 63 * 8192 * 4096 * 2 / 1e6
    assert rate.step_seconds(EIGHT, offloaded, slow_copies) == pytest.approx(copied)
    # The three overlap, so two that are slow are not added.
    both = replace(slow_host, host=1e6)
    assert rate.step_seconds(EIGHT, offloaded, both) == pytest.approx(max(launches, copied))
    # A CUDA graph has no launches.
    recorded = replace(work(compile=True), cuda_graph=True)
    assert rate.step_seconds(EIGHT, recorded, slow_host) < 1


def test_the_card_waits_for_rows_of_an_embedding_on_the_host():
    slow = replace(FAST, host=1e6)
    there = rate.step_seconds(EIGHT, work(compile=True), slow)
    away = rate.step_seconds(EIGHT, work(compile=True, offload_embed=True), slow)
    assert away - there == pytest.approx(8192 * 4096 * 2 / 1e6)


def test_a_small_batch_waits_for_the_host():
    """README: 135M is bound by the host's launches, and three times as fast in CUDA graphs."""
    h100 = replace(rate.CARDS["h100"], launch=25e-6)
    small = work(1, 4096, compile=True)
    slow = rate.step_seconds(SHAPES["135m"], small, h100)
    assert slow == 30 * rate.LAUNCHES * 25e-6
    assert rate.step_seconds(SHAPES["135m"], replace(small, cuda_graph=True), h100) < slow / 2


# --- cards ---


def test_figures_of_a_card():
    h100 = rate.CARDS["h100"]
    assert h100.memory == 80e9 and h100.bandwidth == pytest.approx(3350e9 * 0.9)
    # README: 700 TFLOP/s in bf16 of a sheet's 989, and 1,500 in fp8 of 1,979.
    assert h100.bf16 == pytest.approx(707e12, rel=0.02)
    assert h100.fp8 == pytest.approx(1450e12, rel=0.02)
    assert h100.flash and h100.is_gpu
    assert rate.FP32.keys() == rate.SHEETS.keys()
    # bf16 came with Ampere, of compute capability 8.0.
    assert {name for name, card in rate.CARDS.items() if not card.has_bf16} == {
        *("t4", "v100", "p100"),
    }


def test_what_cards_can():
    """fp8 since Ada Lovelace, flash for grouped heads since Ampere."""
    without_fp8 = {"t4", "v100", "p100", "rtx3060", "rtx3090", "a10", "a10g", "a6000", "a100"}
    assert {name for name, card in rate.CARDS.items() if not card.fp8} == without_fp8 | {
        "a100-40gb"
    }
    assert {name for name, card in rate.CARDS.items() if not card.flash} == {"t4", "v100", "p100"}
    assert all(card.name.lower() == name for name, card in rate.CARDS.items())


def test_a_cpu_is_measured():
    card = rate.measured(torch.device("cpu"), SHAPES["135m"], fp8=True)
    assert card.name == card.device == "cpu" and not card.is_gpu
    for figure in (card.memory, card.bf16, card.bandwidth, card.host):
        assert 0 < figure < math.inf
    # More than a pocket calculator, less than a rack.
    assert 1e8 < card.bf16 < 1e14 and 1e8 < card.bandwidth < 1e13
    assert card.fp8 == 0 and card.launch == 0
    with open("/proc/meminfo") as f:
        total = int(f.readline().split()[1]) * 1024
    assert card.memory == pytest.approx(total, rel=0.01)
    assert 0 < rate.step_seconds(SHAPES["135m"], work(2, 64, bytes_of_a_number=4), card) < math.inf


@pytest.mark.parametrize("capability, fp8, flash", [((8, 0), False, True), ((7, 5), False, False)])
def test_what_an_older_gpu_has(monkeypatch, capability, fp8, flash):
    """torch._scaled_mm raises on an A100, so it must not be timed there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    cuda = torch.device("cuda")
    assert rate.has_fp8(cuda, 4096, 14336) == fp8 and rate.has_flash(cuda) == flash
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert rate.has_fp8(cuda, 4096, 14336) and not rate.has_fp8(cuda, 4096, 14330)


# --- against what an H100 80GB did (torch 2.11, --compile, made-up recipes of one length) ---

H100 = rate.Card("h", 85e9, 707e12, 1450e12, 3.0e12, host=51e9, launch=25e-6)
FP8 = {"fp8": True}
MEASURED = [  # shape, rows, tokens, flags, tokens/s
    ("1b", 32, 256, NF4 | CKPT, 63684),
    ("1b", 2, 2048, NF4 | CKPT, 43754),
    ("1b", 32, 256, NF4, 81079),
    ("1b", 2, 2048, NF4, 44689),
    ("1b", 32, 256, CKPT, 63488),
    ("1b", 2, 2048, CKPT, 53536),
    ("1b", 32, 256, {}, 78952),
    ("1b", 2, 2048, {}, 62098),
    ("8b", 32, 256, NF4 | CKPT, 12634),
    ("8b", 2, 2048, NF4 | CKPT, 10987),
    ("8b", 32, 256, NF4, 16817),
    ("8b", 2, 2048, NF4, 14421),
    ("8b", 32, 256, CKPT, 12833),
    ("8b", 2, 2048, CKPT, 11546),
    ("8b", 32, 256, {}, 16807),
    ("8b", 2, 2048, {}, 14948),
    ("8b", 32, 256, NF4 | CKPT | FP8, 18287),
    ("8b", 32, 256, NF4 | FP8, 23002),
    ("8b", 32, 256, SMALL | FP8 | {"quant": "fp8"}, 24798),
    ("8b", 32, 256, CKPT | SMALL | FP8, 18895),
    ("8b", 32, 256, NF4 | CKPT | SMALL | FP8 | {"offload_ckpt": True, "attn": "cudnn"}, 18847),
    ("8b", 2, 2048, NF4 | CKPT | SMALL | {"offload_ckpt": True, "offload_embed": True}, 10741),
    ("8b", 32, 256, NF4 | CKPT | SMALL | FP8 | {"cuda_graph": True}, 18621),
]


def test_the_numbers_of_the_docstrings():
    """What speed/rate.py and speed/memory.py say of 32 x 256 tokens of 8B."""
    h100 = rate.CARDS["h100"]
    step = work(compile=True)
    parts = [rate.products, rate.attention, rate.the_rest, rate.gaps]
    assert [round(1000 * part(EIGHT, step, h100)) for part in parts] == [345, 8, 109, 14]
    assert round(1000 * rate.step_seconds(EIGHT, step, h100)) == 476
    assert memory.peak(EIGHT, step).bytes / 1e9 == pytest.approx(56.55, abs=0.005)
    in_nf4 = work(**NF4, **CKPT, compile=True)
    assert memory.peak(EIGHT, in_nf4).bytes / 1e9 == pytest.approx(10.96, abs=0.005)


@pytest.mark.parametrize("shape, rows, tokens, flags, measured", MEASURED)
def test_the_speed_that_was_measured(shape, rows, tokens, flags, measured):
    one = replace(work(rows, tokens, compile=True, **flags), targets=rows * (tokens - 1))
    planned = rows * tokens / rate.step_seconds(SHAPES[shape], one, H100)
    assert planned == pytest.approx(measured, rel=0.12)
