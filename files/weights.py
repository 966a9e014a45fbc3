"""Weights from Hugging Face's safetensors files, loudly: what does not fit is an error that names the tensor.

    for hf, tensor in read(folder, {hf_name(name): p.shape for name, p in model.named_parameters()}, device): ...

Every tensor of the checkpoint is used once, every shape is checked, and nothing may be missing. One tensor is read at a
time, and this file keeps none: the peak is what the caller makes of them, and one tensor.
"""

from cli import UserError

import json
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open

from files import disk


def hf_name(name):
    """A parameter's name in a Hugging Face checkpoint.

    layers.0.self_attn.q_proj.weight -> model.layers.0.self_attn.q_proj.weight
    layers.0.self_attn.input_layernorm.weight -> model.layers.0.input_layernorm.weight

    In our model a norm belongs to the half of the block which it stands before, in Hugging Face's to the block."""
    if name.startswith("lm_head"):
        return name
    name = name.replace(".self_attn.input_layernorm", ".input_layernorm")
    name = name.replace(".mlp.post_attention_layernorm", ".post_attention_layernorm")
    return f"model.{name}"


def shards(folder):
    """The safetensors files of a folder, by its index if it has one."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    names = read_index(index) if index.exists() else ["model.safetensors"]
    files = [folder / name for name in names]
    for file in files:
        if not file.exists():
            raise UserError(
                f"{folder} lacks {file.name}: fetch the missing file (only safetensors and .gguf are read)."
            )
    return files


def read_index(index):
    """The names of the shards in model.safetensors.index.json, each once, sorted."""
    try:
        file_of_tensor = json.loads(index.read_bytes())["weight_map"]
        names = sorted(set(file_of_tensor.values()))
        for name in names:
            Path(name)  # a TypeError where the name is no text
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{index} cannot be read ({e!r}); fetch it again.") from None
    return names


def read(folder, shapes, device):
    """Generate (Hugging Face's name, tensor as stored, on the device) for each of `shapes` {name: shape}.

    A tensor too many, too few or of another shape raises UserError; too few are known only at the end."""
    missing = dict(shapes)
    for file in shards(folder):
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
            # Without a name of its own here, the tensor is freed as soon as the caller forgets it.
            yield hf, tensors.get_tensor(hf)


def is_passed_over(hf, shapes):
    """Old checkpoints store RoPE's frequencies, and some store a tied head a second time."""
    is_tied_head = hf == "lm_head.weight" and hf not in shapes
    return is_tied_head or hf.endswith("rotary_emb.inv_freq")


def check(file, hf, shape, missing):
    """The tensor has a place that is not yet filled, and its shape."""
    if hf not in missing:
        raise UserError(f"{file}: {hf} has no place in config.json's model, or is there twice.")
    if list(shape) != list(missing[hf]):
        raise UserError(
            f"{file}: {hf} has shape {list(shape)}, config.json says {list(missing[hf])}."
        )


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
