"""files/weights.py: each tensor of a checkpoint once, of the right shape, or an error that names it."""

from cli import UserError

import gc
import json
import re
import weakref

import pytest
import torch
from safetensors.torch import save_file

from files import weights
from files.weights import hf_name, read, shards

TENSORS = {
    "model.embed_tokens.weight": torch.arange(24.0).view(6, 4),
    "model.layers.0.self_attn.q_proj.weight": torch.randn(4, 4).bfloat16(),
    "model.layers.0.self_attn.q_proj.bias": torch.randn(4),
    "model.norm.weight": torch.ones(4, dtype=torch.float16),
}
SHAPES = {name: t.shape for name, t in TENSORS.items()}
Q, NORM, HEAD = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight", "lm_head.weight"
EMBED = "model.embed_tokens.weight"


def save_shards(folder, shards):
    """{file: {name: tensor}}, and the index that names all of them."""
    index = {"weight_map": {}}
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
        index["weight_map"] |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def refused(folder, shapes, *words):
    with pytest.raises(UserError) as e:
        list(read(folder, shapes, "cpu"))
    for word in words:
        assert re.search(rf"(?<![\w.]){re.escape(word)}(?!\w)", str(e.value)), (word, e.value)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("layers.11.self_attn.o_proj.bias", "model.layers.11.self_attn.o_proj.bias"),
        ("layers.0.self_attn.input_layernorm.weight", "model.layers.0.input_layernorm.weight"),
        (
            "layers.3.mlp.post_attention_layernorm.weight",
            "model.layers.3.post_attention_layernorm.weight",
        ),
        ("layers.0.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.weight"),
        ("layers.0.mlp.down_proj", "model.layers.0.mlp.down_proj"),
        ("embed_tokens.weight", "model.embed_tokens.weight"),
        ("norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_names(ours, theirs):
    assert hf_name(ours) == theirs


@pytest.mark.parametrize("split", [False, True])
def test_each_tensor_comes_once_and_as_stored(tmp_path, split):
    if split:
        names = list(TENSORS)
        parts = {"b.safetensors": names[:3], "a.safetensors": names[3:]}
        save_shards(tmp_path, {f: {n: TENSORS[n] for n in part} for f, part in parts.items()})
    else:
        save_file(TENSORS, tmp_path / "model.safetensors")
    got = list(read(tmp_path, SHAPES, torch.device("cpu")))
    assert sorted(name for name, _ in got) == sorted(TENSORS)
    for name, tensor in got:
        assert torch.equal(tensor, TENSORS[name]) and tensor.dtype == TENSORS[name].dtype
        assert tensor.device == torch.device("cpu")
    if split:  # shards in the order of their names
        assert got[0][0] == NORM


def test_shapes_are_left_as_they_were(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    shapes = dict(SHAPES)
    list(read(tmp_path, shapes, "cpu"))
    assert shapes == SHAPES


def test_a_tensor_is_freed_as_soon_as_the_caller_forgets_it(tmp_path):
    """The peak is what the caller keeps and one tensor."""
    save_file(TENSORS, tmp_path / "model.safetensors")
    stream = read(tmp_path, SHAPES, "cpu")
    gc.disable()
    try:
        for _ in TENSORS:
            _, tensor = next(stream)
            ref = weakref.ref(tensor)
            del tensor
            assert ref() is None
    finally:
        gc.enable()


def test_what_old_checkpoints_store_beside_the_weights_is_passed_over(tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(TENSORS | {name: torch.ones(3)}, tmp_path / "model.safetensors")
    assert name not in dict(read(tmp_path, SHAPES, "cpu"))


@pytest.mark.parametrize("first", ["head", "embedding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_head_that_is_stored_equal_is_passed_over(tmp_path, first, dtype):
    """In one shard or in two, in either order, in another dtype."""
    head = {HEAD: TENSORS[EMBED].to(dtype)}
    files = {"a.safetensors": head, "b.safetensors": TENSORS}
    if first == "embedding":
        files = {"a.safetensors": TENSORS, "b.safetensors": head}
    save_shards(tmp_path, files)
    assert HEAD not in dict(read(tmp_path, SHAPES, "cpu"))


@pytest.mark.parametrize("where", ["one number", "shape"])
def test_a_tied_head_that_is_stored_and_another_is_refused(tmp_path, where):
    """It was dropped without a word: the model then had another head than its maker's."""
    head = TENSORS[EMBED].clone()
    head[-1, -1] += 1
    if where == "shape":
        head = head[:-1].contiguous()
    save_file(TENSORS | {HEAD: head}, tmp_path / "model.safetensors")
    said = refused(tmp_path, SHAPES, HEAD, EMBED, "tie_word_embeddings", "config.json")
    assert str(tmp_path / "model.safetensors") in said and f"remove {HEAD}" in said


@pytest.mark.parametrize("other", ["a.safetensors", "b.safetensors"])
def test_of_a_tied_head_in_two_shards_each_is_compared(tmp_path, other):
    files = {"a.safetensors": dict(TENSORS), "b.safetensors": {}}
    # Each shard needs a tensor of its own, or the index does not name it.
    files["b.safetensors"][NORM] = files["a.safetensors"].pop(NORM)
    for name, tensors in files.items():
        tensors[HEAD] = TENSORS[EMBED] + (1 if name == other else 0)
    save_shards(tmp_path, files)
    assert str(tmp_path / other) in refused(tmp_path, SHAPES, HEAD, EMBED)


def test_head_and_embedding_are_compared_without_a_copy_of_either(tmp_path, monkeypatch):
    """A part at a time, the last one included."""
    sizes = []
    equal = torch.equal

    def watched(some, others):
        sizes.append((some.shape[0], others.shape[0]))
        return equal(some, others)

    monkeypatch.setattr(torch, "equal", watched)
    monkeypatch.setattr(weights, "ROWS_COMPARED", 4)
    head = TENSORS[EMBED].clone()
    save_file(TENSORS | {HEAD: head}, tmp_path / "model.safetensors")
    list(read(tmp_path, SHAPES, "cpu"))
    assert sizes == [(4, 4), (2, 2)]


def test_an_untied_head_is_read_like_any_other(tmp_path):
    save_file(TENSORS | {HEAD: torch.ones(6, 4)}, tmp_path / "model.safetensors")
    assert HEAD in dict(read(tmp_path, SHAPES | {HEAD: (6, 4)}, "cpu"))
    refused(tmp_path, SHAPES | {HEAD: (7, 4)}, HEAD, "[6, 4]", "[7, 4]")


@pytest.mark.parametrize("name", [NORM, HEAD])
def test_a_tensor_in_two_shards_is_named(tmp_path, name):
    tensors = TENSORS | {HEAD: torch.ones(6, 4)}
    save_shards(tmp_path, {"a.safetensors": tensors, "b.safetensors": {name: tensors[name]}})
    assert "is there twice" in refused(tmp_path, SHAPES | {HEAD: (6, 4)}, name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(NORM), ["1 tensor(s), the first is", NORM]),
        (lambda t: (t.pop(Q), t.pop(NORM)), ["2 tensor(s), the first is", Q]),
        (lambda t: t.update({"classifier": torch.ones(2)}), ["classifier"]),
        (lambda t: t.update({NORM: torch.ones(5)}), [NORM, "[5]", "[4]"]),
        (lambda t: t.update({NORM: torch.ones(1)}), [NORM, "[1]"]),
        (lambda t: t.update({NORM: torch.ones(1, 4)}), [NORM, "[1, 4]"]),
        (
            lambda t: t.update({"model.embed_tokens.weight": torch.ones(4, 6)}),
            ["[4, 6]", "[6, 4]"],
        ),
    ],
    ids=["one missing", "two missing", "extra", "too long", "broadcastable", "wrapped", "turned"],
)
def test_what_does_not_fit_is_named(tmp_path, change, words):
    tensors = dict(TENSORS)
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    refused(tmp_path, SHAPES, *words)


def test_a_tensor_that_does_not_fit_is_an_error_before_it_is_read(tmp_path):
    """What comes before it has been given out by then; it itself is not."""
    save_file(TENSORS | {"classifier": torch.ones(2)}, tmp_path / "model.safetensors")
    got = []
    with pytest.raises(UserError, match="classifier"):
        for name, _ in read(tmp_path, SHAPES, "cpu"):
            got.append(name)
    assert "classifier" not in got


@pytest.mark.parametrize("keep", [0, 20, 0.5, -1])
def test_a_file_that_is_cut_off_is_named(tmp_path, keep):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if 0 < keep < 1 else keep])
    refused(tmp_path, SHAPES, str(path), "cut off or damaged")


def test_an_error_of_the_callers_is_not_taken_for_a_damaged_file(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    with pytest.raises(OSError, match="the callers"):
        for _ in read(tmp_path, SHAPES, "cpu"):
            raise OSError("the callers")


def test_shards_without_an_index_are_the_one_file(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    save_file(TENSORS, tmp_path / "other.safetensors")
    assert shards(str(tmp_path)) == [tmp_path / "model.safetensors"]


def test_shards_of_an_index_each_once_and_sorted(tmp_path):
    save_shards(tmp_path, {"b.safetensors": TENSORS, "a.safetensors": {HEAD: torch.ones(2)}})
    assert shards(tmp_path) == [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks a\.safetensors"):
        shards(tmp_path)


def test_a_folder_without_safetensors_is_named(tmp_path):
    with pytest.raises(UserError, match=r"lacks model\.safetensors.*only safetensors"):
        shards(tmp_path)


@pytest.mark.parametrize(
    "text",
    [b"{", b"[]", b"{}", b"\xff", b'{"weight_map": []}', b'{"weight_map": {"a": 1}}'],
    ids=["broken", "no object", "no weight_map", "no utf-8", "a list", "a number"],
)
def test_a_broken_index_is_named(tmp_path, text):
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_bytes(text)
    refused(tmp_path, SHAPES, str(tmp_path / "model.safetensors.index.json"), "cannot be read")
