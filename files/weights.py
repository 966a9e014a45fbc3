"""Weights from Hugging Face's safetensors files, loudly: what does not fit is an error that names the tensor.

    for hf, tensor in read(folder, {hf_name(name): p.shape for name, p in model.named_parameters()}, device): ...

Every tensor of the checkpoint is used once, every shape is checked, and nothing may be missing. `read` hands out one
tensor at a time and keeps none. So memory holds at most what the caller made of earlier tensors, and one more: of 8B in
bf16 the largest is the embedding, 1.05 GB of 16 GB.
Proof: tests/test_weights.py: test_a_tensor_is_freed_as_soon_as_the_caller_forgets_it.
"""

from cli import UserError, say

import itertools
import json
import math
import os
import shutil
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open

from files import disk

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
# How many rows of head and embedding are compared at a time: 34 MB of each, of 8B in bf16.
ROWS_COMPARED = 4096
# How many numbers are looked at one by one at a time.
NUMBERS_CHECKED = 2**24
# The dtypes of weights, as safetensors names them. Others hold codes.
DTYPES = ["F64", "F32", "F16", "BF16"]


def hf_name(name):
    """A parameter's name in a Hugging Face checkpoint.

    layers.0.self_attn.q_proj.weight -> model.layers.0.self_attn.q_proj.weight
    layers.0.self_attn.input_layernorm.weight -> model.layers.0.input_layernorm.weight

    In model.py a norm belongs to the half of the block that it comes before; in Hugging Face's models, to the block."""
    if name.startswith("lm_head"):
        return name
    name = name.replace(".self_attn.input_layernorm", ".input_layernorm")
    name = name.replace(".mlp.post_attention_layernorm", ".post_attention_layernorm")
    return f"model.{name}"


def shards(folder):
    """The safetensors files of a folder: model.safetensors, or where it is missing those that the index names.

    transformers looks for them in this order. So a model.safetensors that was saved beside the index and the shards of
    an older model is the model. A line says which files are passed over."""
    folder = Path(folder)
    index = folder / INDEX
    names = [WHOLE]
    if not os.path.exists(folder / WHOLE) and index.exists():
        names = read_index(index)
    for name in names:
        # Path.exists raises an error over a name that is too long.
        if not os.path.exists(folder / name):
            raise UserError(
                f"{folder} lacks {name}: fetch the missing file (only safetensors and .gguf are read)."
            )
    passed_over = not_read(folder, names)
    if passed_over:
        say("weights", f"{folder} has files that are not read: {passed_over}")
    return [folder / name for name in names]


def not_read(folder, names):
    """The names of what else looks like weights of this model: an old index, its shards, a variant (model.fp16.…)."""
    found = sorted(path.name for path in folder.glob("model*.safetensors"))
    if names == [WHOLE] and (folder / INDEX).exists():
        found.insert(0, INDEX)
    found = [name for name in found if name not in names]
    shown = ", ".join(found[:3])
    if len(found) > 3:
        shown += f" and {len(found) - 3} more"
    return shown


def read_index(index):
    """The names of the shards in model.safetensors.index.json, each once, sorted.

    Of its keys weight_map is used; metadata (sizes and counts) is harmless. Which shard a tensor is in, each shard says
    itself, and the index is not asked."""
    try:
        stored = json.loads(index.read_bytes())
        names = sorted(set(stored["weight_map"].values()))
        unknown = stored.keys() - {"weight_map", "metadata"}
        wrong = [name for name in names if not is_shard_name(name)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{index} cannot be read ({e!r:.200}); fetch it again.") from None
    if unknown:
        raise UserError(
            f"{index}: the key {min(unknown)} is not known; fetch the file again, or remove the key."
        )
    if wrong or not names:
        raise UserError(
            f"{index} names {wrong[:1]!r:.100} as a shard. A shard is a .safetensors file inside the folder."
        )
    return names


def is_shard_name(name):
    """Whether an index may name this file: safetensors, and inside the folder, also where a link leads out of it."""
    path = PurePosixPath(name)
    leaves = path.is_absolute() or ".." in path.parts
    return path.suffix == ".safetensors" and not leaves


def read(folder, shapes, device):
    """Generate (Hugging Face's name, tensor as stored, on the device) for each of `shapes` {name: shape}.

    A tensor without a place, a missing one and another shape raise UserError; a missing one only at the end."""
    missing = dict(shapes)
    files = shards(folder)
    if HEAD not in shapes:
        refuse_another_head(folder, files)
    for file in files:
        try:
            yield from read_shard(file, shapes, missing, device)
        except (SafetensorError, OSError) as e:
            raise UserError(
                f"{file} cannot be read ({e}): cut off or damaged; fetch it again."
            ) from None
    if missing:
        first = next(iter(missing))
        raise UserError(f"{folder} lacks {len(missing)} tensor(s), the first is {first}.")


def read_shard(file, shapes, missing, device):
    """One file's part of `read`, which takes the names of its tensors out of `missing`."""
    with safe_open(file, framework="pt", device=str(device)) as tensors:
        for hf in tensors.offset_keys():
            if is_passed_over(hf, shapes):
                continue
            shape = tensors.get_slice(hf).get_shape()
            check(file, hf, shape, missing)
            del missing[hf]
            check_dtype(file, hf, tensors.get_slice(hf).get_dtype())
            # Give the tensor no name here, because a name would keep it in memory until the next one is read.
            yield hf, finite(file, hf, tensors.get_tensor(hf))


def is_passed_over(hf, shapes):
    """Whether a stored tensor needs no place: RoPE's frequencies in old checkpoints, or a tied head stored again."""
    is_tied_head = hf == HEAD and hf not in shapes
    return is_tied_head or hf.endswith("rotary_emb.inv_freq")


def refuse_another_head(folder, files):
    """Raise UserError if config.json ties head and embedding, but the files store two that differ.

    A tied model has one tensor for both, so `read` passes over a stored head. A copy of the embedding loses nothing so.
    A head that was trained on its own would be dropped, and the model would write other texts without an error. Compare
    both as they are stored, because two that differ in fp32 may be equal in bf16.
    Proof: tests/test_weights.py: test_a_tied_head_that_is_stored_and_another_is_refused."""
    try:
        heads = [file for file in files if HEAD in keys_of(file)]
        embeddings = [file for file in files if EMBEDDING in keys_of(file)]
        # Without an embedding there is nothing to compare: `read` says that it is missing.
        for head, embedding in itertools.product(heads, embeddings):
            if not are_equal(head, embedding):
                raise UserError(
                    f"{head}: {HEAD} differs from {EMBEDDING}, but config.json says that they are tied. To use this "
                    f'head, write "tie_word_embeddings": false into {Path(folder) / "config.json"}; to use the '
                    f"embedding in its place, remove {HEAD} from the file."
                )
    except (SafetensorError, OSError):
        # Leave a damaged file to `read`, whose error names the file.
        return


def keys_of(file):
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def are_equal(head_file, embedding_file):
    """Whether head and embedding hold the same numbers. Compare parts, so that memory never holds a whole one."""
    with (
        safe_open(head_file, framework="pt") as some,
        safe_open(embedding_file, framework="pt") as others,
    ):
        head = some.get_slice(HEAD)
        embedding = others.get_slice(EMBEDDING)
        if head.get_shape() != embedding.get_shape():
            return False
        for row in range(0, head.get_shape()[0], ROWS_COMPARED):
            part = slice(row, row + ROWS_COMPARED)
            if not torch.equal(head[part].float(), embedding[part].float()):
                return False
    return True


def check(file, hf, shape, missing):
    """Raise UserError if the tensor has no place, its place is already filled, or its shape differs."""
    if hf not in missing:
        raise UserError(f"{file}: {hf} has no place in config.json's model, or is there twice.")
    if list(shape) != list(missing[hf]):
        raise UserError(
            f"{file}: {hf} has shape {list(shape)}, config.json says {list(missing[hf])}."
        )


def check_dtype(file, name, dtype):
    """Raise UserError for a tensor of codes (I8, U8, F8_E4M3 …), because a code without its scale is no weight."""
    if dtype not in DTYPES:
        raise UserError(
            f"{file}: {name} is stored as {dtype}, and only {', '.join(DTYPES)} are read; use a checkpoint "
            "whose weights are not quantised."
        )


def finite(file, name, tensor):
    """The tensor itself. Raise UserError if one of its numbers is NaN or infinite.

    The sum is not finite then. A sum reads the tensor once and makes no copy: PyTorch sums 16-bit numbers in fp32. Look
    at every number only if the sum is not finite, because a sum of finite numbers may overflow, too.
    Cost: 0.17 s for the 538 MB of the default model on two cores of a Xeon, most of it reading the mapped file."""
    if math.isfinite(tensor.sum().item()):
        return tensor
    for part in tensor.flatten().split(NUMBERS_CHECKED):
        if not torch.isfinite(part).all():
            raise UserError(
                f"{file}: {name} has numbers that are not finite (NaN or infinity). The training that wrote the file "
                "went wrong, or the file is damaged: fetch it again, or take an earlier checkpoint."
            )
    return tensor


# What a model folder has beside its weights.
BESIDE_WEIGHTS = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
]


def save_model(folder, tensors, base):
    """Write a model folder: {Hugging Face's name: tensor}, and the files of `base` that are no weights."""
    for name in BESIDE_WEIGHTS:
        if (base / name).exists():
            with disk.atomic(folder / name) as beside:
                shutil.copyfile(base / name, beside)
    disk.write_tensors(folder / "model.safetensors", tensors)
