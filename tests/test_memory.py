"""speed/memory.py: the memory of a run, against sums by hand, tensors that are held, and peaks measured on a card."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
import lora
import model as models
import planner
import quant
import train
from files import weights
from speed import memory, meters, optim, precision

CPU = torch.device("cpu")
SHAPES = {
    "135m": memory.Shape(C=576, F=1536, L=30, H=9, K=3, D=64, V=49152, tied=True),
    "1b": memory.Shape(C=2048, F=8192, L=16, H=32, K=8, D=64, V=128256, tied=True),
    "3b": memory.Shape(C=3072, F=8192, L=28, H=24, K=8, D=128, V=128256, tied=True),
    "8b": memory.Shape(C=4096, F=14336, L=32, H=32, K=8, D=128, V=128256, tied=False),
    "70b": memory.Shape(C=8192, F=28672, L=80, H=64, K=8, D=128, V=128256, tied=False),
}
EIGHT = SHAPES["8b"]


def work(rows=32, tokens=256, **flags):
    return memory.Work(rows=rows, tokens=tokens, targets=rows * tokens, **flags)


def gigabytes(parts, *names):
    return sum(parts[name] for name in names) / 1e9


# --- by hand, and as the makers of the models count ---


@pytest.mark.parametrize(
    "shape, weights", [("1b", 1_235_814_400), ("8b", 8_030_261_248), ("70b", 70_553_706_496)]
)
def test_weights_of_the_known_models(shape, weights):
    """Llama-3.2-1B, Llama-3-8B and Llama-3.1-70B as their model cards and their checkpoints count them."""
    assert SHAPES[shape].weights() == weights


def test_8b_by_hand():
    assert EIGHT.L * EIGHT.block() == 6_979_321_856
    # A and B of r 16: 16 · (4096 + 4096) of q and o, (4096 + 1024) of k and v, (4096 + 14336) of the MLP's three.
    assert EIGHT.adapter(16) == 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432) == 41_943_040
    assert EIGHT.adapter(16, ("q_proj", "v_proj")) == 32 * 16 * (8192 + 5120)
    in_bf16 = memory.static(EIGHT, work())
    assert in_bf16["base"] / 1e9 == pytest.approx(13.96, abs=0.005)
    assert in_bf16["embedding and head"] / 1e9 == pytest.approx(2.10, abs=0.005)
    # 168 MB of A and B, as much of gradients, and two states of each.
    assert in_bf16["adapter"] == in_bf16["gradients"] == 4 * 41_943_040
    assert in_bf16["optimizer"] == 2 * 4 * 41_943_040
    held = ("base", "embedding and head", "adapter", "gradients", "optimizer")
    assert gigabytes(in_bf16, *held) == pytest.approx(16.06 + 0.67, abs=0.01)


def test_what_quantised_weights_take_by_hand():
    in_nf4 = memory.base(EIGHT, work(quant="nf4"))
    codes = in_nf4["base"] + in_nf4["quant constants"]
    assert codes / 1e9 == pytest.approx(3.600, abs=0.001)
    assert 8 * codes / 6_979_321_856 == pytest.approx(4.127, abs=0.0005)
    in_fp8 = memory.base(EIGHT, work(quant="fp8"))
    # A row is an output of a layer: 43,008 of them a block.
    assert in_fp8["base"] == 6_979_321_856
    assert in_fp8["quant constants"] == 32 * 4 * (2 * 4096 + 2 * 1024 + 2 * 14336 + 4096)
    # --fp8 scales rows of other weights, too.
    scaled = memory.base(EIGHT, work(fp8=True))
    assert scaled["quant constants"] == in_fp8["quant constants"]


def test_all_weights_are_trained_in_fp32():
    """nanoGPT's 16 bytes a weight: it, its gradient and two states."""
    parts = memory.static(EIGHT, work(lora_r=0))
    names = ("base", "embedding and head", "gradients", "optimizer")
    assert gigabytes(parts, *names) == pytest.approx(16 * 8.030261248)
    assert "adapter" not in parts


def test_states_in_eight_bits_by_hand():
    """A code of a byte, and a scale of 4 bytes for 256 of them, twice."""
    assert memory.bytes_of_states("adamw8bit") == 2 + 2 * 4 / 256
    # Of paged ones the codes lie elsewhere: tests/test_gpu.py measures none on the card.
    assert memory.bytes_of_states("paged_adamw8bit") == 2 * 4 / 256
    paged = replace(work(), optim="paged_adamw8bit")
    assert memory.of_host(EIGHT, paged)["paged states"] == 2 * 41_943_040


def test_the_embedding_in_host_memory_is_half_of_the_vocabulary():
    stays = memory.base(EIGHT, work())
    leaves = memory.base(EIGHT, work(offload_embed=True))
    embedding = 128256 * 4096 * 2
    assert stays["embedding and head"] - leaves["embedding and head"] == embedding
    assert memory.of_host(EIGHT, work(offload_embed=True))["embedding"] == embedding
    # A tied one is the head, too, and stays.
    tied = SHAPES["1b"]
    assert memory.base(tied, work()) == memory.base(tied, work(offload_embed=True))
    assert "embedding" not in memory.of_host(tied, work(offload_embed=True))


def test_checkpoints_of_8b_by_hand():
    """speed/offload.py: an input takes 67 MB; 63 inputs of half blocks go to the host, 4.2 GB."""
    kept = memory.kept(EIGHT, work(grad_ckpt=True))
    assert kept["kept for backward"] == 0
    assert kept["checkpoints"] == 32 * 8192 * 4096 * 2
    offloaded = work(grad_ckpt=True, offload_ckpt=True)
    assert memory.of_host(EIGHT, offloaded)["checkpoints"] == 63 * 8192 * 4096 * 2
    assert memory.kept(EIGHT, offloaded)["checkpoints"] == 2 * 8192 * 4096 * 2


def test_a_compiled_block_of_8b_by_hand():
    """Of a token: 8C + 6HD + 4KD + 6F bytes, 14 · 16 of x · A, 4 · 32 of heads, 8 of norms; A and B once a block."""
    a_token = 8 * 4096 + 6 * 4096 + 4 * 1024 + 6 * 14336 + 224 + 128 + 8
    assert a_token == 147_816
    A = 2 * 16 * (3 * 4096 + 4096 + 2 * 4096 + 14336)
    B = 2 * 16 * (3 * 6144 + 4096 + 4 * 14336 + 4096)
    kept = memory.kept_of_a_block(EIGHT, work(compile=True))
    assert kept == 8192 * a_token + A + B


def test_the_loss_of_8b_by_hand():
    """speed/loss.py: 512 rows of 128,256 logits in 4 + 2 bytes; README: all of them in 8.4 GB and more."""
    h = 2 * 8192 * 4096 * 2
    assert memory.of_loss(EIGHT, work()) == h + 512 * 128256 * 6
    assert memory.of_loss(EIGHT, work(fused_loss=False)) > 8192 * 128256 * 8
    # Fewer targets than a chunk has rows.
    few = replace(work(1, 100), targets=99)
    assert memory.of_loss(EIGHT, few) == 2 * 99 * 4096 * 2 + 99 * 128256 * 6


def test_sampling_by_hand():
    """model.Cache: 131 kB a token in bf16."""
    parts = memory.of_sampling(EIGHT, work(32, 464), 464)
    assert parts["keys and values"] == 32 * 464 * 131072
    assert gigabytes(parts, "base", "embedding and head") == pytest.approx(16.06, abs=0.01)


# --- against tensors that are held ---

SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,  # not C / H
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
}


def make_folder(folder, blocks, tied):
    folder.mkdir()
    config = SIZES | {"num_hidden_layers": blocks, "tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {
        weights.hf_name(name): torch.randn(p.shape) * 0.05
        for name, p in models.Llama(models.read_config(folder)).named_parameters()
        if not (tied and name.startswith("lm_head"))
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{(blocks, tied): folder}"""
    root = tmp_path_factory.mktemp("models")
    made = [(1, False), (3, False), (3, True)]
    return {key: make_folder(root / f"{key[0]}{key[1]}", *key) for key in made}


@pytest.fixture
def build(folders, monkeypatch):
    """(train.Built, memory.Shape, memory.Work) of the flags, as on a CPU that has bf16."""
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)

    def call(blocks, tied=False, **flags):
        folder = folders[blocks, tied]
        cfg = train.Config(**flags)
        built = train.build(cfg, data.Data(), folder, CPU, meters.Meter(CPU, lambda: 0))
        shape = planner.shape_of(models.read_config(folder))
        same = {name: getattr(cfg, name) for name in planner.SAME_NAME}
        targets = tuple(cfg.lora_targets.split(","))
        if cfg.lora_targets == "all":
            targets = ()
        size = precision.DTYPES[cfg.dtype].itemsize
        planned = memory.Work(
            rows=4,
            tokens=64,
            targets=4 * 64,
            lora_targets=targets,
            dropout=cfg.lora_dropout > 0,
            attn=cfg.attn,
            bytes_of_a_weight=size,
            bytes_of_a_number=size,
            optim=cfg.optim,
            **same,
        )
        return built, shape, planned

    return call


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "flags",
    [
        {"quant": "none"},
        {"quant": "nf4"},
        {"quant": "fp8"},
        {"quant": "nf4", "fp8": True},
        {"quant": "none", "dtype": "fp32"},
    ],
    ids=str,
)
def test_a_base_takes_what_its_parameters_take(build, flags, tied):
    built, shape, planned = build(3, tied, **({"dtype": "bf16"} | flags))
    frozen = quant.frozen_layers(built.model)
    held = sum(p.nbytes for _, layer in frozen for p in layer.parameters())
    parts = memory.base(shape, planned)
    assert len(frozen) == 3 * 7
    assert parts["base"] + parts["quant constants"] == held
    rest = [built.model.embed_tokens.weight, built.model.norm.weight]
    if not tied:
        rest.append(built.model.lm_head.weight)
    for block in built.model.layers:
        rest += [block.self_attn.input_layernorm.weight, block.mlp.post_attention_layernorm.weight]
    assert parts["embedding and head"] == sum(p.nbytes for p in rest)


def states_of(built, kind):
    """Bytes of what an optimiser holds for each trained number, after a step."""
    for p in built.trained:
        p.grad = torch.ones_like(p)
    optimizer = optim.make_optimizer(kind, built.trained, CPU, 1e-3, 0.0)
    optimizer.step()
    states = [state for p in built.trained for state in [optimizer.state[p]]]
    # The number of the step, and the 256 values of an 8-bit code, do not grow with the model.
    return sum(
        x.nbytes
        for state in states
        for name, x in state.items()
        if isinstance(x, torch.Tensor) and not name.startswith(("qmap", "step"))
    )


@pytest.mark.parametrize("targets", ["all", "q_proj,down_proj"])
def test_an_adapter_its_gradients_and_states(build, targets):
    built, shape, planned = build(3, dtype="bf16", lora_targets=targets)
    layers = [m for m in built.model.modules() if isinstance(m, lora.LoRA)]
    parts = memory.static(shape, planned)
    assert parts["adapter"] == sum(layer.A.nbytes + layer.B.nbytes for layer in layers)
    assert parts["gradients"] == sum(p.grad.nbytes for p in built.trained)
    assert parts["optimizer"] == states_of(built, "adamw")


def test_states_in_eight_bits_are_those_that_are_held(build):
    built, shape, planned = build(3, dtype="bf16", optim="adamw8bit")
    held = states_of(built, "adamw8bit")
    # The last scale may stand for fewer than 256 codes.
    assert memory.static(shape, planned)["optimizer"] == pytest.approx(held, abs=8)


def test_all_weights_their_gradients_and_states(build):
    built, shape, planned = build(3, dtype="bf16", lora_r=0)
    parts = memory.static(shape, planned)
    held = sum(p.nbytes for p in built.model.parameters())
    assert parts["base"] + parts["quant constants"] + parts["embedding and head"] == held
    assert parts["gradients"] == held
    assert parts["optimizer"] == states_of(built, "adamw") == 2 * held


# --- against what autograd keeps ---


def kept(built):
    """Bytes that autograd keeps of a micro-batch of 4 x 64 tokens, without the model's own tensors."""
    own = {
        t.untyped_storage().data_ptr() for t in [*built.model.parameters(), *built.model.buffers()]
    }
    # Hold what is kept, so that no storage gets the address of an earlier one.
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        with built.autocast():
            h = built.model(torch.randint(0, 512, (4, 64)))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    del h
    return sum(size for at, size in storages.items() if at not in own)


def kept_of_a_block(build, **flags):
    """(what autograd keeps of a block more, what memory.py says)"""
    one, _, _ = build(1, **flags)
    three, shape, planned = build(3, **flags)
    for built in (one, three):
        # Dropout is drawn in training only.
        built.model.train()
    return (kept(three) - kept(one)) / 2, memory.kept_of_a_block(shape, planned)


EAGER = [
    {},
    {"dtype": "fp32"},
    {"quant": "nf4"},
    {"lora_targets": "q_proj,v_proj"},
    {"lora_targets": "o_proj,up_proj", "dtype": "fp32"},
    {"lora_targets": "down_proj"},
    {"lora_r": 3},
    {"attn": "naive"},
    {"attn": "naive", "dtype": "fp32"},
    {"fp8": True},
    {"lora_r": 0},
    {"lora_r": 0, "dtype": "fp32"},
]


DROPOUT = [{}, {"dtype": "fp32"}, {"lora_targets": "q_proj,v_proj,down_proj"}, {"quant": "nf4"}]


@pytest.mark.parametrize("flags", DROPOUT, ids=str)
def test_dropout_keeps_its_mask_and_the_dropped_input(build, flags):
    """In eager mode on a CPU the mask is the factors themselves, in the numbers of the arithmetic."""
    flags = {"dtype": "bf16", "lora_dropout": 0.1} | flags
    one, _, _ = build(1, **flags)
    three, shape, planned = build(3, **flags)
    for built in (one, three):
        built.model.train()
    real = (kept(three) - kept(one)) / 2
    assert memory.kept_of_a_block(shape, replace(planned, on_gpu=False)) == real
    # On a GPU a number of the mask is a byte: this is by hand, of q, k and v's input, and so on.
    inputs = 128 + 4 * 48 + 128 + 320
    if flags.get("lora_targets"):
        inputs = 128 + 320
    undropped = memory.kept_of_a_block(shape, replace(planned, dropout=False))
    assert memory.kept_of_a_block(shape, planned) == undropped + 4 * 64 * inputs


def test_a_checkpoint_with_dropout_is_torchs_own_and_makes_all_again():
    """The compiler's checkpoint would draw another mask (train.build), so it is not used; what is kept is the same."""
    flags = {"compile": True, "grad_ckpt": True}
    own = memory.peak(EIGHT, work(**flags))
    torchs = memory.peak(EIGHT, work(**flags, dropout=True))
    assert memory.kept(EIGHT, work(**flags, dropout=True)) == memory.kept(EIGHT, work(**flags))
    a_block = memory.kept_of_a_block(EIGHT, work(compile=True, dropout=True))
    # gate, up and their product, each with a gradient of 8192 · 14336 numbers; a weight of down_proj's size.
    widest = 8192 * 3 * 14336 * 2 + 14336 * 4096 * 2
    block = torchs.moments["block"] - sum(memory.static(EIGHT, work(**flags)).values())
    kept_then = sum(memory.kept(EIGHT, work(**flags)).values())
    assert block == pytest.approx(kept_then + a_block + widest)
    assert own.moments["loss"] == torchs.moments["loss"]


@pytest.mark.parametrize("flags", EAGER, ids=str)
def test_an_eager_block_keeps_what_the_plan_says(build, flags):
    real, planned = kept_of_a_block(build, **({"dtype": "bf16"} | flags))
    assert planned == real


def test_attention_before_ampere_keeps_scores_in_fp32(build):
    """PyTorch's own path without a kernel, which a card takes where flash has none."""
    one, _, _ = build(1, dtype="fp16")
    three, shape, planned = build(3, dtype="fp16")
    with sdpa_kernel(SDPBackend.MATH):
        real = (kept(three) - kept(one)) / 2
    assert memory.kept_of_a_block(shape, replace(planned, attn="math")) == real


@pytest.mark.parametrize("flags", [{}, {"dtype": "fp32"}, {"lora_r": 0}, {"quant": "nf4"}], ids=str)
def test_a_checkpoint_keeps_its_input(build, flags):
    flags = {"dtype": "bf16", "grad_ckpt": True} | flags
    one, _, _ = build(1, **flags)
    three, shape, planned = build(3, **flags)
    assert kept(three) - kept(one) == 2 * memory.kept_of_a_checkpoint(shape, planned)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_only_so_many_blocks_are_checkpoints(build, blocks):
    """All further blocks keep what a block keeps."""
    flags = {"dtype": "bf16", "grad_ckpt": True}
    every, shape, _ = build(3, **flags)
    some, _, planned = build(3, **flags, ckpt_blocks=blocks)
    a_block = memory.kept_of_a_block(shape, planned)
    more = (3 - blocks) * (a_block - memory.kept_of_a_checkpoint(shape, planned))
    parts = memory.kept(shape, planned)
    assert parts["kept for backward"] == (3 - blocks) * a_block
    assert parts["checkpoints"] == blocks * memory.kept_of_a_checkpoint(shape, planned)
    assert kept(some) - kept(every) == more


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [{}, {"lora_targets": "q_proj,v_proj"}, {"lora_dropout": 0.1}], ids=str
)
def test_a_compiled_block_keeps_what_the_plan_says(build, flags):
    real, planned = kept_of_a_block(build, **({"dtype": "bf16", "compile": True} | flags))
    assert planned == pytest.approx(real, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_compiled_checkpoint_keeps_its_input(build, dropout):
    flags = {"dtype": "bf16", "grad_ckpt": True, "compile": True, "lora_dropout": dropout}
    one, _, _ = build(1, **flags)
    three, shape, planned = build(3, **flags)
    assert kept(three) - kept(one) == 2 * memory.kept_of_a_checkpoint(shape, planned)


# --- against what was measured on an H100 80GB (torch 2.11, --compile) ---

CKPT = {"grad_ckpt": True}
NF4 = {"quant": "nf4"}
SMALL = {"optim": "adamw8bit"}
MEASURED = [  # shape, rows, tokens, flags, largest torch.cuda.max_memory_allocated of five steps in GB
    ("1b", 32, 256, NF4 | CKPT, 3.031),
    ("1b", 2, 2048, NF4 | CKPT, 2.202),
    ("1b", 32, 256, NF4, 12.454),
    ("1b", 2, 2048, NF4, 7.114),
    ("1b", 32, 256, CKPT, 4.791),
    ("1b", 2, 2048, CKPT, 3.758),
    ("1b", 32, 256, {}, 13.837),
    ("1b", 2, 2048, {}, 8.496),
    ("8b", 32, 256, NF4 | CKPT, 10.964),
    ("8b", 2, 2048, NF4 | CKPT, 8.865),
    ("8b", 32, 256, CKPT, 21.705),
    ("8b", 2, 2048, CKPT, 19.255),
    ("8b", 32, 256, {}, 56.546),
    ("8b", 2, 2048, {}, 36.864),
    ("8b", 32, 256, NF4 | CKPT | {"fp8": True}, 10.979),
    ("8b", 32, 256, CKPT | SMALL | {"fp8": True}, 21.060),
    (
        "8b",
        32,
        256,
        NF4 | CKPT | SMALL | {"fp8": True, "offload_ckpt": True, "attn": "cudnn"},
        8.367,
    ),
    ("8b", 2, 2048, NF4 | CKPT | SMALL | {"offload_ckpt": True, "offload_embed": True}, 6.061),
    ("8b", 32, 256, NF4 | CKPT | SMALL | {"fp8": True, "cuda_graph": True}, 10.696),
]


@pytest.mark.parametrize("shape, rows, tokens, flags, measured", MEASURED)
def test_the_peak_that_was_measured(shape, rows, tokens, flags, measured):
    at = memory.peak(SHAPES[shape], work(rows, tokens, compile=True, **flags))
    assert at.bytes / 1e9 == pytest.approx(measured, rel=0.03)


# --- what takes more takes more ---

WAYS = [
    {"compile": c} | f for c in (False, True) for f in ({}, NF4, {"attn": "naive"}, {"lora_r": 0})
]


@pytest.mark.parametrize("flags", WAYS, ids=str)
@pytest.mark.parametrize("shape", ["135m", "8b"])
def test_more_checkpoints_keep_less(shape, flags):
    """Only the input of a block may come on top, where the peak is the recomputation of the last checkpoint."""
    shape = SHAPES[shape]
    peaks = [
        memory.peak(shape, work(grad_ckpt=True, ckpt_blocks=n, **flags))
        for n in range(1, shape.L + 1)
    ]
    x = memory.kept_of_a_checkpoint(shape, work(**flags))
    for fewer, more in zip(peaks, peaks[1:], strict=False):
        grew = more.bytes - fewer.bytes
        assert grew < 0 or (more.moment == "block" and grew <= x)
    assert peaks[-1].bytes == memory.peak(shape, work(grad_ckpt=True, **flags)).bytes
    assert peaks[0].bytes < memory.peak(shape, work(**flags)).bytes


@pytest.mark.parametrize("flags", [*WAYS, CKPT, CKPT | {"offload_ckpt": True}], ids=str)
def test_a_larger_batch_takes_more(flags):
    sizes = [(1, 64), (2, 64), (2, 128), (8, 512), (1, 8192)]
    peaks = [memory.peak(EIGHT, work(*size, **flags)).bytes for size in sizes]
    assert peaks == sorted(peaks) and len(set(peaks)) == len(peaks)


def test_parts_add_up_and_the_peak_is_the_largest_moment():
    at = memory.peak(EIGHT, work(**NF4, **CKPT))
    assert sum(at.parts.values()) == at.bytes == max(at.moments.values())
    assert at.moments[at.moment] == at.bytes and set(at.moments) == {"loss", "last norm", "block"}


def test_a_card_needs_more_than_the_peak():
    at = memory.peak(EIGHT, work(**NF4, **CKPT))
    assert memory.needed(at, 0.5e9) > at.bytes + 0.5e9
    # Where loading takes more than training, loading counts.
    small = memory.peak(EIGHT, work(1, 8, quant="nf4", lora_r=1))
    loading = replace(small, loading=20e9)
    assert memory.needed(loading, 0.5e9) == 20.5e9


def test_what_is_beside_the_peak_adds_up():
    """4 % of all but weights, adapter, gradients and states; what loading takes more, if that is more."""
    at = memory.peak(EIGHT, work(**NF4, **CKPT))
    parts = memory.beside(at, 0.5e9)
    names = ("workspace", "checkpoints", "last norm", "one block", "loss chunk", "norm in fp32")
    comes_and_goes = sum(at.parts.get(name, 0) for name in names)
    assert parts == {"allocator": pytest.approx(0.04 * comes_and_goes), "context": 0.5e9}
    loading = replace(at, loading=at.bytes + 7e9)
    assert memory.beside(loading, 0.0)["allocator"] == 7e9


# --- evaluation ---


def test_an_eager_evaluation_of_8b_by_hand():
    """32 x 256 tokens: the last h in fp32 and in bf16; an MLP's three tensors and four of the stream; no checkpoint."""
    parts = memory.of_evaluation(EIGHT, work(grad_ckpt=True, dropout=True))
    assert parts["last norm"] == 8192 * 4096 * (4 + 2)
    assert parts["one block"] == 8192 * (3 * 14336 + 4 * 4096) * 2
    assert not {"checkpoints", "kept for backward", "loss chunk"} & set(parts)
    # A chunk of logits takes less than a block; all logits take more, 128,256 numbers of 2 + 4 + 4 bytes a token.
    plain = memory.of_evaluation(EIGHT, work(16, 256, fused_loss=False))
    assert plain["loss chunk"] == 4096 * (4096 * 2 + 128256 * 10)


def test_a_compiled_evaluation_keeps_what_training_keeps():
    flags = {"compile": True, "grad_ckpt": True, "ckpt_blocks": 20}
    parts = memory.of_evaluation(EIGHT, work(**flags, dropout=True))
    assert parts["kept for backward"] == 12 * memory.kept_of_a_block(EIGHT, work(compile=True))
    assert parts["checkpoints"] == 20 * 8192 * 4096 * 2
