"""model.py: the same logits as transformers, fast paths equal to slow ones, a checkpoint that does not fit refused."""

from cli import UserError

import json
import re
import weakref

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.utils import logging

import model as models
import quant
from speed import checkpoint, loss

logging.disable_progress_bar()
V = 96
BASE = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# heads of 16 numbers: of the 8 pairs some turn often within 32 positions, some seldom, some lie between
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "gqa": {},
    "as many key as query heads": {"num_key_value_heads": 4},
    "tied head": {"tie_word_embeddings": True},
    "llama3 rope": {"rope_parameters": LLAMA3, "head_dim": 16},
    "linear rope": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    },
    "another theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "head_dim": {"head_dim": 24},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "another eps": {"rms_norm_eps": 0.1},
    "mistral": {"kind": "Mistral", "sliding_window": None},
}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def reference(kind="Llama", **changes):
    """A random model of transformers, with weights so large that every part of it shows in the logits."""
    config, causal = {
        "Llama": (LlamaConfig, LlamaForCausalLM),
        "Mistral": (MistralConfig, MistralForCausalLM),
    }[kind]
    ref = causal._from_config(config(**(BASE | changes)), attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in ref.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(
                1 + 0.3 * noise
                if "norm" in name
                else noise * (0.5 if p.dim() == 1 else 1.5 * p.shape[1] ** -0.5)
            )
    return ref


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder that several tests read."""
    folder = tmp_path_factory.mktemp("tiny")
    reference().save_pretrained(folder)
    return folder


@pytest.fixture
def spoiled(tmp_path):
    """A folder of its own for a test that changes its files."""
    reference().save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def save_shard(folder, name, tensors):
    """One more shard, and the index that names it."""
    save_file(tensors, folder / name)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text()) if path.exists() else {"weight_map": {}}
    index["weight_map"] |= dict.fromkeys(tensors, name)
    path.write_text(json.dumps(index))


def as_transformers_4(folder, key):
    """Rewrite config.json to what transformers 4 wrote: rope_theta beside rope_scaling, whose kind is under `key`."""
    path = folder / "config.json"
    c = json.loads(path.read_text())
    rope = c.pop("rope_parameters")
    c["rope_theta"], kind = rope.pop("rope_theta"), rope.pop("rope_type")
    c["rope_scaling"] = None if kind == "default" else {key: kind, **rope}
    c["torch_dtype"] = c.pop("dtype")
    if c["head_dim"] == c["hidden_size"] // c["num_attention_heads"]:
        del c["head_dim"]
    path.write_text(json.dumps(c))


def tokens(B, T, seed=0):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def next_tokens(ids, lengths):
    """(where, targets) of sum_loss for rows of these lengths, padded on the right."""
    B, T = ids.shape
    where = torch.tensor([b * T + t for b in range(B) for t in range(lengths[b] - 1)])
    return where, ids.flatten()[where + 1]


def distance(a, b):
    """Largest difference, relative to the largest entry of b."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def loss_and_gradients(model, ids, lengths, sum_loss=loss.chunked):
    model.zero_grad()
    total = sum_loss(model(ids), model.lm_head.weight, *next_tokens(ids, lengths))
    total.backward()
    # A wrapper around a block or a half of one is called inner.
    grads = {n.replace(".inner", ""): p.grad.clone() for n, p in model.named_parameters()}
    return total.detach(), grads


def assert_same(got, wanted, rtol=1e-5):
    (loss, grads), (loss0, grads0) = got, wanted
    assert distance(loss, loss0) < rtol
    assert grads.keys() == grads0.keys()
    assert {
        name: d for name in grads if not (d := distance(grads[name], grads0[name])) < rtol
    } == {}


# --- parity with transformers ---


@pytest.mark.parametrize(
    "written", ["transformers 5", "transformers 4, rope_type", "transformers 4, type"]
)
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_those_of_transformers(tmp_path, name, written):
    ref = reference(**VARIANTS[name])
    ref.save_pretrained(tmp_path)
    if written != "transformers 5":
        as_transformers_4(tmp_path, written.split()[-1])
    ids = tokens(2, 50)
    with torch.no_grad():
        model = models.load(tmp_path)
        wanted = ref(ids).logits
        assert wanted.abs().max() > 1  # so that 1e-4 means something
        for attn in ("flash", "naive"):
            model = models.load(tmp_path, attn=attn)
            torch.testing.assert_close(models.logits(model, model(ids)), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", sorted(set(VARIANTS) - {"gqa", "mistral"}))
def test_each_variant_shows_in_the_logits(name):
    """Else the parity above would prove nothing."""
    ids = tokens(2, 50)
    with torch.no_grad():
        plain = reference()
        other = reference(**VARIANTS[name])
        if name in ("llama3 rope", "head_dim"):
            plain = reference(head_dim=VARIANTS[name]["head_dim"])
        if (
            name == "head_dim"
        ):  # has no reference without it: a wrong head_dim cannot even be loaded
            assert other.model.layers[0].self_attn.q_proj.weight.shape == (4 * 24, 32)
        else:
            assert (plain(ids).logits - other(ids).logits).abs().max() > 1e-2


def test_several_shards_are_read_as_one(tmp_path):
    ref = reference()
    ref.save_pretrained(tmp_path, max_shard_size="12KB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= 3
    model, ids = models.load(tmp_path), tokens(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(
            models.logits(model, model(ids)), ref(ids).logits, rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("dtype, wanted", [(None, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_weights_are_in_the_dtype_asked_for_or_as_stored(tiny, dtype, wanted):
    model = models.load(tiny, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {wanted}
    assert (
        model.frequencies.dtype == torch.float32
    )  # an angle of some hundreds has no digits left in bf16
    assert model(tokens(1, 5)).dtype == wanted


def test_residual_stream_has_the_dtype_of_the_model_whatever_the_weights_are_kept_in(tiny):
    """bf16 weights, fp32 arithmetic: as near to the fp32 model of the same rounded weights as fp32 is."""
    how = {"make_linear": cast_linear, "stream_dtype": torch.float32}
    kept, ids = models.load(tiny, dtype=torch.bfloat16, **how), tokens(2, 20)
    rounded = models.load(tiny, dtype=torch.bfloat16).float()
    rounded.frequencies = models.rope_frequencies(rounded.cfg)
    with torch.no_grad():
        h = kept(ids)
        assert h.dtype == torch.float32
        assert distance(models.logits(kept, h), models.logits(rounded, rounded(ids))) < 1e-5


def cast_linear(name, tensor):
    layer = models.plain_linear(name, tensor)
    layer.forward = lambda x: F.linear(x, layer.weight.to(x.dtype))
    return layer


# --- fast paths equal slow ones ---

ROWS = [30, 17, 2, 24]  # lengths; right padding fills the rest


def test_naive_and_flash_attention_give_the_same_loss_and_gradients(tiny):
    ids = tokens(4, 30)
    assert_same(
        loss_and_gradients(models.load(tiny, attn="flash"), ids, ROWS),
        loss_and_gradients(models.load(tiny, attn="naive"), ids, ROWS),
    )


@pytest.mark.parametrize("attn", ["flash", "naive"])
def test_checkpointing_changes_no_loss_and_no_gradient(tiny, attn):
    ids, model, calls = tokens(4, 30), models.load(tiny, attn=attn), []
    wanted = loss_and_gradients(model, ids, ROWS)
    for block in model.layers:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    checkpoint.apply(models.places(model, range(2)), random=False)
    assert_same(loss_and_gradients(model, ids, ROWS), wanted)
    assert len(calls) == 2 * len(model.layers)  # each block once more in backward


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_blocks_equal_eager_ones_with_one_graph_for_all_lengths(tiny, checkpointed):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, compiled = models.load(tiny), models.load(tiny)
    for block in compiled.layers:
        block.compile(dynamic=True, fullgraph=True)
    if checkpointed:
        checkpoint.apply(models.places(compiled, range(2)), random=False)
    for B, T in ((5, 30), (5, 21), (2, 47), (3, 9)):
        ids, lengths = tokens(B, T), [T, T - 3, T - 1, 2, T][:B]
        assert_same(
            loss_and_gradients(compiled, ids, lengths), loss_and_gradients(eager, ids, lengths)
        )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("attn", ["flash", "naive"])
def test_a_padded_row_has_the_losses_it_has_alone(tiny, attn):
    model, ids = models.load(tiny, attn=attn), tokens(4, 30)
    with torch.no_grad():
        together = models.logits(model, model(ids))
        for row, n in zip(range(4), ROWS, strict=True):
            alone = models.logits(model, model(ids[row : row + 1, :n]))[0]
            losses = [
                F.cross_entropy(x[: n - 1], ids[row, 1:n], reduction="none")
                for x in (together[row], alone)
            ]
            torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attn", ["flash", "naive"])
@pytest.mark.parametrize("lengths", [[3, 7, 5], [1, 1, 1]])
def test_cached_steps_equal_the_full_forward(tiny, attn, lengths):
    """Prompts of different lengths at once, then six tokens one by one, against each row alone and without a cache."""
    model, more, T = models.load(tiny, attn=attn), 6, max(lengths)
    rows = [tokens(1, n + more, seed=n + i)[0] for i, n in enumerate(lengths)]
    prompts = torch.full((3, T), 5)
    for i, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        prompts[i, :n] = row[:n]
    caches = models.new_caches(model, 3, T + more)
    with torch.no_grad():
        h = model(prompts, torch.arange(T).expand(3, T), caches)
        got = [[h[i, n - 1]] for i, n in enumerate(lengths)]
        for step in range(more):
            pos = torch.tensor([[n + step] for n in lengths])
            h = model(
                torch.stack(
                    [row[n + step : n + step + 1] for row, n in zip(rows, lengths, strict=True)]
                ),
                pos,
                caches,
            )
            for i in range(3):
                got[i].append(h[i, 0])
        for i, n in enumerate(lengths):
            wanted = models.logits(model, model(rows[i][None]))[0, n - 1 :]
            assert distance(models.logits(model, torch.stack(got[i])), wanted) < 1e-5


# --- the loss ---


def head_and_targets(N=40, C=16, vocab=V, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    h, weight = (
        torch.randn(2, N, C, generator=g).to(dtype),
        (torch.randn(vocab, C, generator=g) * 0.5).to(dtype),
    )
    where = torch.randperm(2 * N, generator=g)[:N]
    return (
        h.requires_grad_(),
        weight.requires_grad_(),
        where,
        torch.randint(vocab, (N,), generator=g),
    )


def exact_loss(h, weight, where, targets, scale=1.0):
    """(loss, gradient of h, of weight) by torch in float64."""
    h, weight = (x.detach().double().requires_grad_() for x in (h, weight))
    loss = F.cross_entropy(h.flatten(0, 1)[where] @ weight.t(), targets, reduction="sum") * scale
    loss.backward()
    return loss.detach(), h.grad, weight.grad


class Largest(TorchDispatchMode):
    """The shapes of all tensors that are made inside the `with`."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.detach.default:  # a view makes nothing
            return out
        self.shapes += [
            tuple(x.shape)
            for x in torch.utils._pytree.tree_leaves(out)
            if isinstance(x, torch.Tensor)
        ]
        return out

    def numel(self):
        return max(torch.Size(shape).numel() for shape in self.shapes)


@pytest.mark.parametrize("scale", [1.0, 1 / 40])
@pytest.mark.parametrize("sum_loss", [loss.chunked, loss.plain])
def test_loss_and_its_gradients_equal_torch_in_float64(sum_loss, scale):
    h, weight, where, targets = head_and_targets()
    total = sum_loss(h, weight, where, targets, scale)
    total.backward()
    for got, wanted in zip(
        (total.detach(), h.grad, weight.grad),
        exact_loss(h, weight, where, targets, scale),
        strict=True,
    ):
        assert distance(got, wanted) < 1e-5


def test_fused_loss_respects_what_the_caller_does_with_it():
    """A loss that is multiplied afterwards, as a loss scaler does, multiplies the gradients."""
    h, weight, where, targets = head_and_targets()
    (loss.chunked(h, weight, where, targets) * 64).backward()
    _, dh, dW = exact_loss(h, weight, where, targets, scale=64)
    assert distance(h.grad, dh) < 1e-5 and distance(weight.grad, dW) < 1e-5


def test_fused_and_plain_loss_train_a_whole_model_alike(tiny):
    ids, model = tokens(4, 30), models.load(tiny)
    assert_same(
        loss_and_gradients(model, ids, ROWS, loss.chunked),
        loss_and_gradients(model, ids, ROWS, loss.plain),
    )


@pytest.mark.parametrize("sum_loss", [loss.chunked, loss.plain])
def test_padding_and_prompts_do_not_reach_the_loss(sum_loss):
    h, weight, where, targets = head_and_targets()
    sum_loss(h, weight, where, targets).backward()
    others = torch.ones(h.shape[0] * h.shape[1], dtype=torch.bool)
    others[where] = False
    assert h.grad.flatten(0, 1)[others].abs().max() == 0


def test_fused_loss_works_in_chunks_and_each_chunk_counts():
    """A million words: 64 positions a chunk, so 140 positions take three chunks, the last shorter. All words but the
    first thousand have a logit so low that the loss and its gradients are those of a thousand words."""
    N, vocab, few = 140, 2**20, 1000
    h, weight, where, targets = head_and_targets(N, 16, vocab)
    with torch.no_grad():
        h[..., 0], weight[few:], weight[few:, 0] = 1, 0, -80
    with Largest() as largest:
        total = loss.chunked(h, weight, where, targets % few, scale=0.5)
        total.backward()
    assert largest.numel() <= 2**26 < N * vocab / 2
    for got, wanted in zip(
        (total.detach(), h.grad, weight.grad[:few]),
        exact_loss(h, weight[:few], where, targets % few, scale=0.5),
        strict=True,
    ):
        assert distance(got, wanted) < 1e-5
    assert weight.grad[few:].abs().max() < 1e-20


def test_plain_loss_holds_all_logits():
    """So the measure of the test above measures something."""
    h, weight, where, targets = head_and_targets()
    with Largest() as largest:
        loss.plain(h, weight, where, targets)
    assert largest.numel() == 40 * V


def test_frozen_head_gets_no_gradient_and_none_is_computed():
    h, weight, where, targets = head_and_targets()
    weight.requires_grad_(False)
    with Largest() as largest:
        loss.chunked(h, weight, where, targets).backward()
    assert weight.grad is None
    assert tuple(weight.shape) not in largest.shapes  # nothing of the gradient's size was ever made
    assert distance(h.grad, exact_loss(h, weight, where, targets)[1]) < 1e-5


def test_fused_loss_without_gradients_is_the_same_number():
    """Evaluation takes this path."""
    h, weight, where, targets = head_and_targets()
    with torch.no_grad():
        total = loss.chunked(h, weight, where, targets)
    assert distance(total, exact_loss(h, weight, where, targets)[0]) < 1e-5


@pytest.mark.parametrize("sum_loss", [loss.chunked, loss.plain])
def test_loss_in_bf16_is_within_a_hundredth_of_float64(sum_loss):
    """bf16 keeps 8 bits: 1 / 256 a rounding. Logits are rounded once, the gradients of the logits once more."""
    h, weight, where, targets = head_and_targets(N=200, C=64, dtype=torch.bfloat16)
    total = sum_loss(h, weight, where, targets, scale=1 / 200)
    total.backward()
    assert total.dtype == torch.float32 and h.grad.dtype == weight.grad.dtype == torch.bfloat16
    for got, wanted, rtol in zip(
        (total.detach(), h.grad, weight.grad),
        exact_loss(h, weight, where, targets, 1 / 200),
        (2e-3, 1e-2, 1e-2),
        strict=True,
    ):
        assert distance(got, wanted) < rtol


# --- loading ---


def test_make_linear_gets_each_linear_weight_of_the_blocks_once_and_the_model_holds_what_it_returns(
    tiny,
):
    stored, made = load_file(tiny / "model.safetensors"), {}

    def make_linear(name, tensor):
        assert name not in made
        assert torch.equal(tensor, stored[f"model.{name}.weight"])
        made[name] = models.plain_linear(name, tensor)
        return made[name]

    model = models.load(tiny, make_linear=make_linear)
    parents = 4 * ["self_attn"] + 3 * ["mlp"]
    half_and_leaf = list(zip(parents, PROJECTIONS, strict=True))
    assert set(made) == {
        f"layers.{i}.{half}.{leaf}" for i in range(2) for half, leaf in half_and_leaf
    }
    assert all(model.get_submodule(name) is layer for name, layer in made.items())


def test_a_weight_is_forgotten_before_the_next_one_comes(tiny):
    """make_linear keeps nothing here, as a quantised layer keeps nothing: then nobody else may either."""
    seen, alive = [], []

    def make_linear(name, tensor):
        alive.append(sum(ref() is not None for ref in seen))
        seen.append(weakref.ref(tensor))
        return torch.nn.Identity()

    models.load(tiny, make_linear=make_linear)
    assert alive == [0] * (2 * len(PROJECTIONS))


@pytest.mark.parametrize("bias_first", [True, False])
def test_biases_survive_the_replacement_of_their_layer(tmp_path, bias_first):
    """Whichever of the two the file holds first."""
    reference(attention_bias=True, mlp_bias=True).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    for kind, file in zip(
        ("weight", "bias"), "ba" if bias_first else "ab", strict=True
    ):  # files are read in the order of their names
        save_shard(
            tmp_path, f"{file}.safetensors", {k: v for k, v in stored.items() if k.endswith(kind)}
        )
    model = models.load(tmp_path)
    for leaf, parent in zip(PROJECTIONS, 4 * ["self_attn"] + 3 * ["mlp"], strict=True):
        layer = getattr(getattr(model.layers[1], parent), leaf)
        assert torch.equal(layer.bias, stored[f"model.layers.1.{parent}.{leaf}.bias"])
        assert torch.equal(layer.weight, stored[f"model.layers.1.{parent}.{leaf}.weight"])


def test_stored_inv_freq_is_accepted(spoiled):
    before, ids = models.load(spoiled)(tokens(1, 9)), tokens(1, 9)
    edit_tensors(
        spoiled, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    )
    assert torch.equal(models.load(spoiled)(ids), before)


def test_tied_head_stored_twice_is_accepted_and_stays_one_tensor(tmp_path):
    ref, ids = reference(tie_word_embeddings=True), tokens(1, 9)
    ref.save_pretrained(tmp_path)
    edit_tensors(
        tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    model = models.load(tmp_path)
    assert model.lm_head.weight is model.embed_tokens.weight
    with torch.no_grad():
        torch.testing.assert_close(
            models.logits(model, model(ids)), ref(ids).logits, rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", ["none", "fp8"])
@pytest.mark.parametrize("other", [0, 1e-6])
def test_a_tied_head_is_compared_as_it_is_stored(tmp_path, dtype, kind, other):
    """Cast to bf16 the two heads would be the same."""
    reference(tie_word_embeddings=True).save_pretrained(tmp_path)
    edit_tensors(
        tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + other})
    )
    if not other:
        assert models.load(tmp_path, "cpu", dtype, quant.make_linear(kind)).lm_head is not None
        return
    with pytest.raises(UserError, match=r"lm_head.weight differs .*tie_word_embeddings"):
        models.load(tmp_path, "cpu", dtype, quant.make_linear(kind))


def refused(folder, *words):
    """Loading ends in one UserError that names all of `words`."""
    with pytest.raises(UserError) as error:
        models.load(folder)
    text = str(error.value).replace(str(folder), "")
    for word in words:
        assert re.search(rf"(?<![\w.]){re.escape(word)}(?!\w)", text), (
            f"{word!r} is not named: {error.value}"
        )
    return text


UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop(UP), [UP]),
        (lambda t: t.pop("lm_head.weight"), ["lm_head.weight"]),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t[UP].clone()}),
            ["model.layers.2.mlp.up_proj.weight"],
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
            ["model.layers.0.self_attn.q_proj.bias"],
        ),
        (lambda t: t.update({"classifier": torch.ones(2)}), ["classifier"]),
        (lambda t: t.update({UP: t[UP].t().contiguous()}), [UP, "[32, 48]", "[48, 32]"]),
        (lambda t: t.update({NORM: torch.ones(33)}), [NORM, "[33]", "[32]"]),
        (lambda t: t.update({NORM: torch.ones(1)}), [NORM, "[1]"]),
        (
            lambda t: t.update({"model.embed_tokens.weight": torch.ones(V + 1, 32)}),
            ["model.embed_tokens.weight", f"[{V + 1}, 32]"],
        ),
    ],
    ids=[
        "missing",
        "missing head",
        "extra layer",
        "extra bias",
        "extra",
        "transposed",
        "too long",
        "broadcastable",
        "vocabulary",
    ],
)
def test_tensors_that_do_not_fit_are_named(spoiled, change, words):
    edit_tensors(spoiled, change)
    refused(spoiled, *words)


def test_a_missing_bias_is_named(tmp_path):
    reference(attention_bias=True).save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda t: t.pop("model.layers.0.self_attn.k_proj.bias"))
    refused(tmp_path, "model.layers.0.self_attn.k_proj.bias")


def test_a_tensor_in_two_shards_is_named(spoiled):
    save_shard(spoiled, "all.safetensors", load_file(spoiled / "model.safetensors"))
    save_shard(spoiled, "more.safetensors", {NORM: torch.ones(32)})
    (spoiled / "model.safetensors").unlink()
    refused(spoiled, NORM)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[:20],
        lambda data: b"",
        lambda data: b"version https://git-lfs.github.com/spec/v1\n",
        lambda data: b"\xff" * 8 + data[8:],
    ],
    ids=["half", "last byte", "header", "empty", "lfs pointer", "length"],
)
def test_a_damaged_file_is_named(spoiled, damage):
    path = spoiled / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    refused(spoiled, "model.safetensors")


def test_a_missing_shard_is_named(tmp_path):
    reference().save_pretrained(tmp_path, max_shard_size="12KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    refused(tmp_path, lost.name)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", "\xff"], ids=["broken", "no object", "no weight_map", "no utf-8"]
)
def test_a_broken_index_is_named(tmp_path, text):
    reference().save_pretrained(tmp_path, max_shard_size="12KB")
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    refused(tmp_path, "model.safetensors.index.json")


def test_a_folder_without_safetensors_is_named(spoiled):
    (spoiled / "model.safetensors").rename(spoiled / "pytorch_model.bin")
    refused(spoiled, "model.safetensors")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, ["yarn"]),
        ({"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 4.0}}, ["yarn"]),
        (
            {"rope_parameters": None, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
            ["dynamic"],
        ),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, ["factor"]),
        (
            {"rope_parameters": {k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}},
            ["low_freq_factor"],
        ),
        ({"sliding_window": 64}, ["sliding_window"]),
        (MISTRAL | {"sliding_window": 64}, ["sliding_window", "max_position_embeddings"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["quantization_config"]),
        ({"architectures": ["Qwen2ForCausalLM"]}, ["Qwen2ForCausalLM"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification"]),
        ({"architectures": None}, ["LlamaForCausalLM"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, ["4 heads", "3 key"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"vocab_size": "many"}, ["vocab_size"]),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_config_that_cannot_be_reproduced_is_refused_by_name(spoiled, changes, words):
    edit_config(spoiled, **changes)
    refused(spoiled, "config.json", *words)


@pytest.mark.parametrize(
    "key",
    ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"],
)
def test_a_config_that_lacks_a_size_names_it(spoiled, key):
    config = json.loads((spoiled / "config.json").read_text())
    del config[key]
    (spoiled / "config.json").write_text(json.dumps(config))
    refused(spoiled, "config.json", key)


# Each value stands where a number, a flag or a table is wanted: {key: values}.
NO_NUMBERS = [None, "16", 16.0, True, 0, -16, [16], {}, float("nan"), 10**30]
NO_POSITIVE_NUMBERS = [None, "1e-5", True, 0, -1.0, [1.0], float("nan"), float("inf"), 10**400]
NO_FLAGS = [None, "false", 0, 1, 1.0, []]
NO_VALUES = {
    "vocab_size": NO_NUMBERS,
    "hidden_size": NO_NUMBERS,
    "intermediate_size": NO_NUMBERS,
    "num_hidden_layers": NO_NUMBERS,
    "num_attention_heads": NO_NUMBERS,
    "num_key_value_heads": NO_NUMBERS[1:],
    "head_dim": [*NO_NUMBERS[1:], 7],
    "max_position_embeddings": NO_NUMBERS,
    "rms_norm_eps": NO_POSITIVE_NUMBERS,
    "tie_word_embeddings": NO_FLAGS,
    "attention_bias": NO_FLAGS,
    "mlp_bias": NO_FLAGS,
    "hidden_act": [None, 3, ["silu"]],
    "model_type": [None, 3, "mistral", ["llama"]],
    "architectures": ["LlamaForCausalLM", [], [None], [["LlamaForCausalLM"]], {}, 3],
    "rope_parameters": ["linear", 3, [1.0], True],
    "rope_scaling": ["linear", 3, [1.0], True],
    "sliding_window": ["64", 64.0, True, -64, [64]],
    "layer_types": [["sliding_attention"], "full", 3],
    "partial_rotary_factor": ["1", 0.5, 0, [1]],
}


@pytest.mark.parametrize(
    "key, value", [(key, value) for key, values in NO_VALUES.items() for value in values]
)
def test_a_value_of_config_json_that_makes_no_sense_is_named(spoiled, key, value):
    edit_config(spoiled, **{key: value})
    said = refused(spoiled, "config.json", key)
    assert len(said) < 400 and "\n" not in said


@pytest.mark.parametrize("value", NO_POSITIVE_NUMBERS)
@pytest.mark.parametrize(
    "key",
    [
        "rope_theta",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ],
)
def test_a_rope_setting_that_makes_no_sense_is_named(spoiled, key, value):
    edit_config(spoiled, rope_parameters=LLAMA3 | {key: value})
    refused(spoiled, "config.json", key)
    edit_config(spoiled, rope_parameters=None, rope_scaling=LLAMA3 | {key: value})
    refused(spoiled, "config.json", key)


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"rope_theta": 500.0}, "rope_theta"),
        ({"rope_parameters": None, "rope_theta": None}, "rope_theta"),
        ({"rope_parameters": None, "rope_theta": "10000"}, "rope_theta"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_type"),
        ({"rope_parameters": {"rope_type": "linear", "type": "default"}}, "rope_type"),
        ({"rope_parameters": LLAMA3, "rope_scaling": LLAMA3 | {"factor": 4.0}}, "factor"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor"),
        ({"rope_parameters": {"full_attention": LLAMA3}}, "full_attention"),
        ({"rope_parameters": LLAMA3 | {"mscale": 2.0}}, "mscale"),
        ({"rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"head_dim": None, "hidden_size": 34}, "head_dim"),
    ],
)
def test_settings_that_contradict_each_other_are_named(spoiled, changes, word):
    edit_config(spoiled, **changes)
    refused(spoiled, "config.json", word)


def without(folder, key):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop(key, None)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_parameters",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "hidden_act",
        "sliding_window",
        "model_type",
        "architectures",
        "dtype",
        "pretraining_tp",
    ],
)
def test_a_key_that_is_left_out_means_what_it_means_to_transformers(tmp_path, kind, key):
    """The same logits, or the key is named. The weights are those that transformers makes for the file."""
    sizes = {"num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 4096}
    reference(kind, **sizes).save_pretrained(tmp_path)
    without(tmp_path, key)
    config_class = {"Llama": LlamaConfig, "Mistral": MistralConfig}[kind]
    stored = json.loads((tmp_path / "config.json").read_text())
    try:
        models.read_config(tmp_path)
    except UserError as error:
        assert key in str(error)
        assert key in BASE or key in ("architectures", "sliding_window")
        return
    causal = {"Llama": LlamaForCausalLM, "Mistral": MistralForCausalLM}[kind]
    ref = causal._from_config(config_class.from_dict(stored), attn_implementation="eager").eval()
    ref.save_pretrained(tmp_path / "weights")
    (tmp_path / "weights" / "config.json").write_text(json.dumps(stored))
    ids = tokens(1, 40)
    model = models.load(tmp_path / "weights")
    with torch.no_grad():
        torch.testing.assert_close(
            models.logits(model, model(ids)), ref(ids).logits, rtol=0, atol=1e-4
        )
    assert model.cfg.max_position_embeddings == ref.config.max_position_embeddings


@pytest.mark.parametrize("window", ["absent", 4096, None])
def test_a_mistral_without_the_key_has_a_window_that_hides_nothing_or_is_refused(tmp_path, window):
    """Logits of 4,300 tokens were off by 0.95 where the key was absent."""
    changes = {"num_hidden_layers": 1, "max_position_embeddings": 8192}
    reference("Mistral", **changes).save_pretrained(tmp_path)
    edit_config(tmp_path, sliding_window=window)
    if window == "absent":
        without(tmp_path, "sliding_window")
    if window is not None:
        refused(tmp_path, "sliding_window", "4096", "null", "max_position_embeddings")
        # With fewer positions the window hides nothing.
        edit_config(tmp_path, max_position_embeddings=4096)
        models.load(tmp_path)
        return
    ref = MistralForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    ids = tokens(1, 4300)
    model = models.load(tmp_path)
    with torch.no_grad():
        ours = models.logits(model, model(ids))
        torch.testing.assert_close(ours, ref(ids).logits, rtol=0, atol=1e-3)


def test_attention_that_is_not_causal_is_refused(spoiled):
    """Without the key a Llama is causal; here false is no switch that is off."""
    edit_config(spoiled, is_causal=True)
    models.read_config(spoiled)
    edit_config(spoiled, is_causal=False)
    refused(spoiled, "config.json", "is_causal")


@pytest.mark.parametrize(
    "key, value",
    [
        ("attention_multiplier", 0.5),
        ("embedding_multiplier", 12.0),
        ("residual_multiplier", 0.22),
        ("logits_scaling", 8.0),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("clip_qkv", 8.0),
        ("use_qk_norm", True),
        ("num_experts", 8),
        ("num_local_experts", 8),
        ("attention_dropout", 0.1),
        ("original_max_position_embeddings", 4096),
        ("rope_interleaved", True),
        ("rope_condense_ratio", 8),
        ("is_encoder_decoder", True),
        ("quantization", {"bits": 4}),
        ("a_key_of_next_year", "yes"),
    ],
)
def test_a_key_of_config_json_that_is_not_known_is_refused_unless_it_is_off(spoiled, key, value):
    edit_config(spoiled, **{key: value})
    refused(spoiled, "config.json", key)
    for off in (None, False, 0, 0.0, "", [], {}):
        edit_config(spoiled, **{key: off})
        models.read_config(spoiled)


# What real files of the architecture hold beside the sizes.
TRANSFORMERS_4_31 = {
    "_name_or_path": "x",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
}
REAL = {
    "Llama 1 (huggyllama)": {"max_sequence_length": 2048, "pad_token_id": 0},
    "Llama 2": TRANSFORMERS_4_31 | {"rope_scaling": None},
    "Llama 2 70B": TRANSFORMERS_4_31 | {"pretraining_tp": 8},
    "Llama 3.1": {"eos_token_id": [1, 8, 9], "attention_dropout": 0.0, "pretraining_tp": 1},
    "Llama 3.2": {"head_dim": 8, "tie_word_embeddings": False, "rope_theta": 10000.0},
    "SmolLM2": {
        "is_llama_config": True,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 10000,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
    "unsloth": {"unsloth_version": "2025.1.5", "unsloth_fixed": True, "pad_token_id": 128004},
    "axolotl": {"_attn_implementation_autoset": True, "use_cache": False},
    "Vicuna": {"max_length": 4096, "temperature": 0.9, "top_p": 0.6},
    "Yi": {"auto_map": {"AutoModelForCausalLM": "modeling.LlamaForCausalLM"}},
    "quantized once": {"quantization_config": None, "compression_config": {}},
    "transformers 4, every key": {
        "add_cross_attention": False,
        "bad_words_ids": None,
        "begin_suppress_tokens": None,
        "chunk_size_feed_forward": 0,
        "cross_attention_hidden_size": None,
        "decoder_start_token_id": None,
        "diversity_penalty": 0.0,
        "do_sample": False,
        "early_stopping": False,
        "encoder_no_repeat_ngram_size": 0,
        "exponential_decay_length_penalty": None,
        "finetuning_task": None,
        "forced_bos_token_id": None,
        "forced_eos_token_id": None,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
        "is_decoder": False,
        "is_encoder_decoder": False,
        "label2id": {"LABEL_0": 0, "LABEL_1": 1},
        "length_penalty": 1.0,
        "max_length": 20,
        "min_length": 0,
        "no_repeat_ngram_size": 0,
        "num_beam_groups": 1,
        "num_beams": 1,
        "num_return_sequences": 1,
        "output_attentions": False,
        "output_hidden_states": False,
        "output_scores": False,
        "prefix": None,
        "problem_type": None,
        "pruned_heads": {},
        "remove_invalid_values": False,
        "repetition_penalty": 1.0,
        "return_dict": True,
        "return_dict_in_generate": False,
        "sep_token_id": None,
        "suppress_tokens": None,
        "task_specific_params": None,
        "temperature": 1.0,
        "tf_legacy_loss": False,
        "tie_encoder_decoder": False,
        "tokenizer_class": "LlamaTokenizer",
        "top_k": 50,
        "top_p": 1.0,
        "torchscript": False,
        "typical_p": 1.0,
        "use_bfloat16": False,
    },
}


@pytest.mark.parametrize("name", REAL)
def test_the_keys_of_real_files_are_no_reason_to_refuse(spoiled, name):
    expected = models.load(spoiled)(tokens(1, 9))
    edit_config(spoiled, **REAL[name])
    assert torch.equal(models.load(spoiled)(tokens(1, 9)), expected)


@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
def test_every_key_that_transformers_writes_is_known(tmp_path, kind):
    config = {"Llama": LlamaConfig, "Mistral": MistralConfig}[kind](**BASE, sliding_window=None)
    stored = config.to_dict() | {"architectures": [f"{kind}ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert models.read_config(tmp_path).hidden_size == BASE["hidden_size"]


@pytest.mark.parametrize(
    "data",
    [
        None,
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe{}",
        b'"text"',
        b"[" * 100_000,
        b'{"vocab_size": ' + b"9" * 5000 + b"}",
        b'{"vocab_size": 96, "vocab_size": 97}',
    ],
    ids=[
        "absent",
        "empty",
        "broken",
        "a list",
        "null",
        "no utf-8",
        "a text",
        "deep",
        "a long number",
        "a key twice",
    ],
)
def test_a_broken_config_is_named(spoiled, data):
    path = spoiled / "config.json"
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    refused(spoiled, "config.json")


def test_a_loss_without_gradient_is_the_same_number_and_makes_no_gradient(monkeypatch):
    """The evaluation on a CPU. Witness: the chunk that makes gradients is not called."""
    torch.manual_seed(0)
    h, head = torch.randn(2, 300, 16), torch.randn(500, 16, requires_grad=True)
    where = torch.arange(600)
    targets = torch.randint(-1, 500, (600,))
    monkeypatch.setattr(loss, "rows_of_a_chunk", lambda V: 64)
    expected = loss.chunked(h, head, where, targets).detach()
    made = []
    one_chunk = loss.one_chunk

    def watched(*args):
        made.append(1)
        return one_chunk(*args)

    monkeypatch.setattr(loss, "one_chunk", watched)
    with torch.no_grad():
        assert torch.equal(loss.chunked(h, head, where, targets, chunk=watched), expected)
        assert not made
    loss.chunked(h, head, where, targets, chunk=watched)
    assert len(made) == 10
