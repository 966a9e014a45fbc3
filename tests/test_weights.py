"""files/weights.py: each tensor of a checkpoint once, of the right shape, or an error that names it."""

from cli import UserError

import gc
import json
import re
import weakref

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from files import weights
from files.weights import INDEX, hf_name, read, shards

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
    [
        b"{",
        b"[]",
        b"{}",
        b"\xff",
        b'{"weight_map": []}',
        b'{"weight_map": {"a": 1}}',
        b'{"weight_map": {"a": null, "b": "b.safetensors"}}',
        b"[" * 100_000,
    ],
    ids=[
        "broken",
        "no object",
        "no weight_map",
        "no utf-8",
        "a list",
        "a number",
        "a null",
        "deep",
    ],
)
def test_a_broken_index_is_named(tmp_path, text):
    (tmp_path / INDEX).write_bytes(text)
    refused(tmp_path, SHAPES, str(tmp_path / INDEX), "cannot be read")


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "sub/../../outside.safetensors",
        "/etc/outside.safetensors",
        "pytorch_model.bin",
        "..",
        "",
        "model.safetensors.gz",
    ],
)
def test_a_shard_name_that_leaves_the_folder_or_is_no_safetensors_is_refused(tmp_path, name):
    """Also where the file is there and whole."""
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    save_file(TENSORS, tmp_path / "outside.safetensors")
    save_file(TENSORS, folder / "pytorch_model.bin")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, name)}))
    assert repr(name) in refused(folder, SHAPES, str(folder / INDEX), "inside the folder")


@pytest.mark.parametrize("name", ["a" * 3000, "a\0b"], ids=["long", "zero byte"])
def test_a_shard_name_that_no_file_can_have_is_a_missing_file(tmp_path, name):
    index = {"weight_map": dict.fromkeys(TENSORS, f"{name}.safetensors")}
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="lacks"):
        shards(tmp_path)


def test_an_index_that_names_nothing_and_one_with_an_unknown_key_are_refused(tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {}}))
    refused(tmp_path, SHAPES, INDEX, "names")
    save_shards(tmp_path, {"a.safetensors": TENSORS})
    index = json.loads((tmp_path / INDEX).read_text())
    (tmp_path / INDEX).write_text(json.dumps(index | {"metadata": {"total_size": 3}}))
    assert len(list(read(tmp_path, SHAPES, "cpu"))) == len(TENSORS)
    (tmp_path / INDEX).write_text(json.dumps(index | {"scales": {"a": 2}}))
    refused(tmp_path, SHAPES, INDEX, "scales")


def test_shards_in_a_subfolder_and_links_to_elsewhere_are_read(tmp_path):
    """transformers reads both; the hub's cache is links to a folder of blobs."""
    folder = tmp_path / "snapshot"
    (folder / "sub").mkdir(parents=True)
    save_file(TENSORS, tmp_path / "blob")
    names = list(TENSORS)
    save_file({n: TENSORS[n] for n in names[:2]}, folder / "sub" / "a.safetensors")
    save_file({n: TENSORS[n] for n in names[2:]}, tmp_path / "blob")
    (folder / "b.safetensors").symlink_to(tmp_path / "blob")
    index = dict.fromkeys(names[:2], "sub/a.safetensors")
    index |= dict.fromkeys(names[2:], "b.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    assert len(list(read(folder, SHAPES, "cpu"))) == len(TENSORS)


# --- several checkpoints in one folder ---


def test_a_new_file_beside_an_old_index_and_old_shards_is_the_model(tmp_path, capsys):
    """The same weights as transformers takes; the old ones were loaded before. A line says what is passed over."""
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    torch.manual_seed(1)
    old = LlamaForCausalLM(config)
    old.save_pretrained(tmp_path, max_shard_size="1KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    torch.manual_seed(2)
    new = LlamaForCausalLM(config)
    save_file(dict(new.state_dict()), tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    shapes = {name: tensor.shape for name, tensor in theirs.items()}
    ours = dict(read(tmp_path, shapes, "cpu"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(ours[EMBED], new.state_dict()[EMBED])
    assert not torch.equal(ours[EMBED], old.state_dict()[EMBED])
    said = capsys.readouterr().err
    assert "not read" in said and INDEX in said and "model-00001-of-" in said


def test_a_damaged_index_beside_the_whole_file_is_not_asked(tmp_path, capsys):
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / INDEX).write_bytes(b"{")
    assert len(list(read(tmp_path, SHAPES, "cpu"))) == len(TENSORS)
    assert INDEX in capsys.readouterr().err


@pytest.mark.parametrize(
    "other", ["model.fp16.safetensors", "model-00003-of-00003.safetensors", None]
)
def test_shards_and_variants_that_nothing_names_are_said(tmp_path, capsys, other):
    names = list(TENSORS)
    parts = {
        "model-00001-of-00002.safetensors": names[:2],
        "model-00002-of-00002.safetensors": names[2:],
    }
    save_shards(tmp_path, {f: {n: TENSORS[n] for n in part} for f, part in parts.items()})
    if other:
        save_file(TENSORS, tmp_path / other)
    # Weights of something else are nobody's concern.
    save_file(TENSORS, tmp_path / "adapter_model.safetensors")
    assert len(list(read(tmp_path, SHAPES, "cpu"))) == len(TENSORS)
    said = capsys.readouterr().err
    assert (other in said) if other else (said == "")


def test_where_only_a_variant_is_there_the_missing_file_is_named(tmp_path):
    save_file(TENSORS, tmp_path / "model.fp16.safetensors")
    with pytest.raises(UserError, match=r"lacks model\.safetensors"):
        shards(tmp_path)


def test_an_index_that_names_a_tensor_in_another_shard_loses_nothing(tmp_path):
    """Each shard says itself what it holds; transformers, too, asks the shards."""
    names = list(TENSORS)
    save_shards(
        tmp_path,
        {
            "a.safetensors": {n: TENSORS[n] for n in names[:2]},
            "b.safetensors": {n: TENSORS[n] for n in names[2:]},
        },
    )
    turned = dict.fromkeys(names[:2], "b.safetensors") | dict.fromkeys(names[2:], "a.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": turned}))
    got = dict(read(tmp_path, SHAPES, "cpu"))
    assert all(torch.equal(got[name], TENSORS[name]) for name in names)


# --- numbers that are none ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "values",
    [[float("nan")], [float("inf")], [float("-inf")], [float("inf"), float("-inf")]],
    ids=str,
)
def test_a_number_that_is_not_finite_is_named_with_file_and_tensor(tmp_path, dtype, values):
    spoiled = torch.ones(6, 4, dtype=dtype)
    spoiled[-1, : len(values)] = torch.tensor(values, dtype=dtype)
    path = tmp_path / "model.safetensors"
    save_file(TENSORS | {EMBED: spoiled}, path)
    refused(tmp_path, SHAPES, str(path), EMBED, "not finite")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_numbers_whose_sum_overflows_are_weights(tmp_path, dtype):
    large = torch.full((6, 4), torch.finfo(dtype).max, dtype=dtype)
    assert not torch.isfinite(large.sum())
    save_file(TENSORS | {EMBED: large}, tmp_path / "model.safetensors")
    assert torch.equal(dict(read(tmp_path, SHAPES, "cpu"))[EMBED], large)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.int32, "I32"),
        (torch.bool, "BOOL"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
    ],
    ids=str,
)
def test_codes_without_their_scale_are_no_weights(tmp_path, dtype, name):
    save_file(TENSORS | {Q: torch.ones(4, 4).to(dtype)}, tmp_path / "model.safetensors")
    refused(tmp_path, SHAPES, Q, name)


@pytest.mark.parametrize(
    "head",
    [
        (2**60).to_bytes(8, "little") + b"{}",
        (100_000_001).to_bytes(8, "little") + b"{" * 50,
        (90_000).to_bytes(8, "little") + b"[" * 90_000,
        (40).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[1099511627776],' + b" " * 99,
    ],
    ids=["longer than any file", "longer than this file", "deep", "cut off"],
)
def test_a_header_that_lies_is_a_sentence(tmp_path, head):
    (tmp_path / "model.safetensors").write_bytes(head)
    refused(tmp_path, SHAPES, "model.safetensors", "cut off or damaged")
