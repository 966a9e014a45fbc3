"""On the card: every fast path against plain fp32 on the same dequantised weights, at Llama-3-8B's widths.

Two blocks of random weights under an embedding of deviation 1 (as after training, a block adds to the stream and does
not replace it), B not zero. A loss at random weights says nothing, so the gradient of every A and B is compared, and
the adapter after 20 steps. The bounds are calibrated: transformers + peft in bf16 are off by 0.045 here, this code by
0.026 at most. A product of e4m3 numbers, three bits of mantissa on either side, is off by 0.036 (tests/test_quant.py);
over the products of two blocks, there and back, that adds up to 0.25. Without a GPU these skip; `python -m pytest -m
gpu` runs them.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import lora
import model as models
import plan
import quant
import sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
CUDA = torch.device("cuda")
WIDTHS = models.ModelConfig(
    8192,
    4096,
    14336,
    2,
    32,
    8,
    128,
    2048,
    1e-5,
    500000.0,
    {"rope_type": "default"},
    False,
    False,
    False,
)
BF16_BOUND, FP8_BOUND = 0.03, 0.3
FP8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="no fp8"
)


def batch():
    """Three recipes of different lengths, padded on the right: (ids, where, targets)."""
    g = torch.Generator().manual_seed(0)
    lengths, ids = (200, 131, 77), torch.zeros(3, 200, dtype=torch.long)
    for row, n in enumerate(lengths):
        ids[row, :n] = torch.randint(0, WIDTHS.vocab_size, (n,), generator=g)
    where = torch.cat([torch.arange(n - 1) + row * 200 for row, n in enumerate(lengths)])
    targets = torch.cat([ids[row, 1:n] for row, n in enumerate(lengths)])
    return ids.cuda(), where.cuda(), targets.cuda()


def packed_batch():
    """The same three end to end in a row of 512: (ids, where, targets, cu_seqlens)."""
    ids, where, targets = batch()
    begins = torch.tensor([0, 200, 331, 408, 512, 512], dtype=torch.int32, device="cuda")
    row = torch.zeros(1, 512, dtype=torch.long, device="cuda")
    for i, (a, b) in enumerate(((0, 200), (200, 331), (331, 408))):
        row[0, a:b] = ids[i, : b - a]
    return row, begins.long()[where // 200] + where % 200, targets, begins


def build(
    kind,
    dequantised=False,
    fp8=False,
    dtype=torch.bfloat16,
    flash=True,
    ckpt=False,
    offload=False,
    comp=False,
    blocks=2,
    cudnn=False,
):
    """The model as train.build makes it; dequantised: fp32 plain layers that hold what `kind` made of the weights."""
    torch._dynamo.reset()
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    torch.backends.cuda.enable_flash_sdp(not cudnn)
    g = torch.Generator(device="cuda").manual_seed(1)
    with torch.device("meta"):
        model = models.Llama(dataclasses.replace(WIDTHS, num_hidden_layers=blocks), flash)
    model.frequencies = models.rope_frequencies(WIDTHS).cuda()

    def make(name, W):
        made = quant.make_linear(kind)(name, W)
        return quant.Plain(made.full(torch.float32)) if dequantised else made

    for name, p in list(model.named_parameters()):
        t = (
            torch.ones(p.shape, device="cuda")
            if p.dim() == 1
            else torch.randn(p.shape, device="cuda", generator=g)
            * (1 if name.startswith("embed") else 0.02)
        )
        t = t.bfloat16()
        models.place(
            model, name, t.float() if dequantised and not name.endswith("_proj.weight") else t, make
        )
    model.dtype = torch.float32 if dequantised else dtype
    if fp8:
        quant.multiply_in_fp8(model, CUDA)
    b = torch.Generator().manual_seed(2)
    for layer in lora.adapt(model, 16, 32):
        layer.B.data.copy_(torch.randn(layer.B.shape, generator=b) * 0.01)
    if ckpt and not comp:
        model.around = lambda block, *args: torch.utils.checkpoint.checkpoint(
            block, *args, use_reentrant=False
        )
    if comp:
        quant.Frozen.recomputed = ckpt
        plan.compile_blocks(model, ckpt, halves=offload)
    if offload:
        model.around, model.halves = plan.Offload(model.around, CUDA), True
    return model


def gradients(model, packed=False):
    ids, where, targets, cu = packed_batch() if packed else (*batch(), None)
    for block in model.layers:
        block.longest = 200
    h = model(ids, cu_seqlens=cu)
    loss = models.sum_loss(
        h, model.lm_head.weight, where, targets, 1 / len(targets), True, model.loss_chunk
    )
    loss.backward()
    grads = {name: p.grad.double() for name, p in lora.parameters(model).items()}
    for p in lora.parameters(model).values():
        p.grad = None
    return grads


def after_steps(model, steps=20):
    """How far 20 steps of AdamW moved the adapter."""
    params = lora.parameters(model)
    start = {name: p.detach().clone() for name, p in params.items()}
    optimizer = torch.optim.AdamW(params.values(), lr=1e-4, weight_decay=0, eps=1e-6)
    ids, where, targets = batch()
    for _ in range(steps):
        models.sum_loss(
            model(ids),
            model.lm_head.weight,
            where,
            targets,
            1 / len(targets),
            True,
            model.loss_chunk,
        ).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().double() - start[name].double() for name, p in params.items()}


def worst(got, want):
    return max((((got[n] - want[n]).norm() / want[n].norm()).item(), n) for n in want)


@pytest.fixture(scope="module")
def reference():
    """Gradients of plain fp32 with naive attention, for each kind's own dequantised weights."""
    cache = {}

    def get(kind):
        if kind not in cache:
            cache[kind] = gradients(build(kind, dequantised=True, flash=False))
        return cache[kind]

    return get


ROWS = [  # the flags of bench.py's rows, and the largest relative error of a gradient
    pytest.param("none", {}, BF16_BOUND, id="bf16"),
    pytest.param("nf4", {}, BF16_BOUND, id="nf4"),
    pytest.param("nf4", {"fp8": True}, FP8_BOUND, id="fp8", marks=FP8),
    pytest.param(
        "nf4", {"ckpt": True, "offload": True, "comp": True, "cudnn": True}, BF16_BOUND, id="row1"
    ),
    pytest.param(
        "nf4",
        {"ckpt": True, "offload": True, "comp": True, "fp8": True, "cudnn": True},
        FP8_BOUND,
        id="row2",
        marks=FP8,
    ),
    pytest.param("nf4", {"ckpt": True, "comp": True, "fp8": True}, FP8_BOUND, id="row4", marks=FP8),
    pytest.param(
        "fp8", {"comp": True, "fp8": True, "cudnn": True}, FP8_BOUND, id="row3", marks=FP8
    ),
    pytest.param(
        "none", {"ckpt": True, "comp": True, "fp8": True}, FP8_BOUND, id="row5", marks=FP8
    ),
    pytest.param("nf4", {"dtype": torch.float16}, BF16_BOUND, id="fp16"),
]


@pytest.mark.parametrize("kind, how, bound", ROWS)
def test_gradients_of_every_a_and_b(reference, kind, how, bound):
    error, name = worst(gradients(build(kind, **how)), reference(kind))
    print(f"{kind} {how}: largest gradient error {error:.4f} ({name})")
    assert error <= bound, name


@pytest.mark.parametrize(
    "how", [{}, {"ckpt": True, "comp": True}, {"ckpt": True, "offload": True, "comp": True}]
)
def test_gradients_of_a_packed_row(reference, how):
    """Through varlen attention, against padded rows in fp32."""
    error, name = worst(gradients(build("nf4", **how), packed=True), reference("nf4"))
    print(f"packed {how}: largest gradient error {error:.4f} ({name})")
    assert error <= BF16_BOUND, name


@torch.no_grad()
def test_losses_of_packed_recipes_are_those_of_padded_ones():
    model, each = build("none"), []
    for ids, where, targets, *cu in (batch(), packed_batch()):
        h = model(ids, cu_seqlens=cu[0] if cu else None).flatten(0, 1)[where]
        each.append(F.cross_entropy(models.logits(model, h).float(), targets, reduction="none"))
    assert ((each[0] - each[1]).abs() / each[0]).max().item() < 0.05  # a token's; bf16 has 8 bits
    means = [torch.stack([part.mean() for part in e.split((199, 130, 76))]) for e in each]
    assert ((means[0] - means[1]).abs() / means[0]).max().item() < 2e-3


@pytest.mark.parametrize("kind, how, bound", [p for p in ROWS if p.id in ("row1", "row2")])
def test_the_adapter_after_20_steps(kind, how, bound):
    error, name = worst(
        after_steps(build(kind, **how)), after_steps(build(kind, dequantised=True, flash=False))
    )
    print(f"{kind} {how}: error of the adapter after 20 steps {error:.4f} ({name})")
    assert error <= 2 * bound, (
        name
    )  # Adam divides by the gradient's size: the smallest, noisiest ones count in full


@pytest.mark.parametrize("fp8", [False, pytest.param(True, marks=FP8)], ids=["bf16", "fp8"])
@pytest.mark.parametrize("fault", ["scale", "block"])
def test_a_planted_fault_is_found(reference, fault, fp8):
    model = build("nf4", fp8=fp8)
    layer = model.layers[1].up_proj.base
    if fault == "block":
        model.layers[0].forward = lambda x, *args: x
    elif fp8:
        layer.e4m3 = lambda again=False, e4m3=layer.e4m3: (e4m3(again)[0], layer.scale * 2)
    else:
        layer.offset.data *= 1.2
    ids, where, targets = batch()
    models.sum_loss(model(ids), model.lm_head.weight, where, targets, 1 / len(targets)).backward()
    grads = {
        n: (torch.zeros_like(p) if p.grad is None else p.grad).double()
        for n, p in lora.parameters(model).items()
    }
    assert worst(grads, reference("nf4"))[0] > (FP8_BOUND if fp8 else BF16_BOUND)


def test_lengths_share_one_graph():
    """Any number of rows and any length: no graph after the first few."""
    model = build("nf4", ckpt=True, comp=True)
    counts = []
    for B, T in ((4, 512), (16, 203), (16, 311), (2, 64), (5, 1000), (3, 17)):
        model(torch.randint(0, 8192, (B, T), device="cuda")).sum().backward()
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[-1] - counts[1] == 0, counts


def test_offloaded_inputs_leave_the_card():
    """Between forward and backward the blocks' inputs are in host memory, not on the card."""
    held = []
    for offload in (False, True):
        model = build("nf4", ckpt=True, offload=offload, blocks=4)
        h = model(batch()[0].repeat(8, 4))
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
        h.sum().backward()
    assert (
        held[0] - held[1] > 2 * 24 * 800 * 4096 * 2 * 0.9
    )  # of four: the first's is a leaf, the last's is leaving


@pytest.mark.parametrize(
    "how", [{}, pytest.param({"comp": True, "fp8": True}, marks=FP8)], ids=["eager", "row4"]
)
def test_replayed_graphs_add_the_gradients_of_eager_steps(how):
    """Batches of several shapes, each thrice: the third time is a replay, after others used the same memory."""
    ids, where, targets = batch()
    got = []
    for graph in (False, True):
        model = build("nf4", ckpt=True, **how)

        def step(ids, where, targets, scale, cu_seqlens=None, model=model):
            loss = models.sum_loss(
                model(ids), model.lm_head.weight, where, targets, scale, True, model.loss_chunk
            )
            loss.backward()
            return loss.detach()

        params = lora.parameters(model).values()
        run = plan.Graphs(step, list(params), CUDA) if graph else step
        losses = []
        for T in (200, 149, 90, 90, 200, 149, 200, 90, 149):
            keep = where % 200 < T - 1
            at = where[keep] // 200 * T + where[keep] % 200
            losses.append(
                run(ids[:, :T].contiguous(), at, targets[keep], 1 / int(keep.sum()), None).item()
            )
        got.append((losses, torch.cat([p.grad.flatten() for p in params])))
    assert len(run.graphs) == 3
    assert got[0][0] == pytest.approx(got[1][0], rel=2e-3)
    assert (
        (got[0][1] - got[1][1]).norm() / got[0][1].norm()
    ).item() < 0.03  # padded further, rounded otherwise


# --- sampling ---


PROMPTS = [[7 + i, *range(11, 11 + 5 * (i % 4))] for i in range(8)]


def writes(kind, dtype, compiled, **how):
    """What a model of these widths writes after eight prompts, in rows that are filled anew."""
    torch._dynamo.reset()
    model = build(kind, dtype=dtype).requires_grad_(False).eval()
    if dtype == torch.float32:
        model = model.float()
    model.dtype = dtype
    cfg = sample.Config(compile=compiled, batch_size=3, max_new_tokens=24, **how)
    writer = sample.Writer(model, PROMPTS, cfg)
    return [ids for _, ids, _ in sorted(sample.write(writer, PROMPTS, set(range(100))))]


@pytest.mark.parametrize(
    "how", [{"temperature": 0}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9}], ids=str
)
def test_a_step_in_a_cuda_graph_writes_what_an_eager_one_does(how):
    """And greedy what the largest logits of the whole text so far say, without a cache."""
    eager = writes("none", torch.float32, False, **how)
    assert (
        writes("none", torch.float32, True, **how) == eager
        and len({tuple(ids) for ids in eager}) == 8
    )
    if not how["temperature"]:
        model = build("none", dtype=torch.float32).requires_grad_(False).eval().float()
        for prompt, ids in zip(PROMPTS, eager):
            for n, token in enumerate(ids):
                h = model(torch.tensor([prompt + ids[:n]], device="cuda"))
                assert models.logits(model, h[0, -1]).argmax() == token


@pytest.mark.parametrize("N", [1, 3, 32])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_products_of_few_rows(kind, dtype, bound, N):
    """The kernels that only sampling meets, compiled and eager, against float64."""
    torch._dynamo.reset()
    g = torch.Generator(device="cuda").manual_seed(0)
    layer = quant.make_linear(kind)(
        "q_proj", torch.randn(1024, 4096, device="cuda", generator=g).mul(0.02).to(dtype)
    )
    x = torch.randn(N, 1, 4096, device="cuda", generator=g).to(dtype)
    want = x.double() @ layer.full(torch.float32).double().t()
    products, layer.few = [layer.mm], 64
    if kind == "nf4":
        joined = quant.Joined([layer, *(quant.NF4(layer.full(dtype)[:n]) for n in (64, 128))])
        products.append(lambda x: joined(x, [layer] * 3)[0])
    with torch.no_grad():
        for product in (*products, *(torch.compile(p, dynamic=False) for p in products)):
            y = product(x)
            assert (
                y.shape == (N, 1, 1024)
                and y.dtype == dtype
                and (y - want).norm() / want.norm() < bound
            )
