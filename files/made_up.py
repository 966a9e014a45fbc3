"""A made-up model and made-up recipes, to measure with: random weights in real sizes, words that are a token each.

make_model(folder, "8b")                        # a Hugging Face folder, made once
make_recipes(file, [256] * 32, vocab=128256)    # recipes of exactly so many tokens
"""

import json
import shutil
from dataclasses import dataclass

import numpy as np

from files import weights


@dataclass
class Shape:
    hidden: int
    mlp: int
    blocks: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False  # one matrix is embedding and head


SHAPES = {
    "8b": Shape(4096, 14336, 32, 32, 8, 128256),
    "3b": Shape(3072, 8192, 28, 24, 8, 128256, tied=True),
    "1b": Shape(2048, 8192, 16, 32, 8, 128256, tied=True),
    "135m": Shape(576, 1536, 30, 9, 3, 49152, tied=True),
    "tiny": Shape(256, 512, 2, 4, 2, 1024),
}


def make_model(folder, shape):
    """Make a Hugging Face folder: random weights in bf16 shards, and a tokenizer whose words w2, w3, … are tokens."""
    if (folder / "made").exists():
        return
    shape = SHAPES[shape]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shard_of_tensor = write_weights(folder, shapes_of_tensors(shape), shards=shape.blocks // 8)
    write_tokenizer(folder, shape.vocab)
    # Let half of the tokens end a text, because random weights would never end the recipe that train.py writes. The
    # recipes have words of the other half only.
    configs = {
        "config": model_config(shape),
        "generation_config": {"eos_token_id": list(range(shape.vocab // 2, shape.vocab))},
        "tokenizer_config": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"},
        "model.safetensors.index": {"metadata": {}, "weight_map": shard_of_tensor},
    }
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "made").touch()


def shapes_of_tensors(shape):
    """{Hugging Face's name: shape} of every weight of the model."""
    head_dim = shape.hidden // shape.heads
    q, kv = shape.heads * head_dim, shape.kv_heads * head_dim
    block = {
        "self_attn.q_proj": (q, shape.hidden),
        "self_attn.k_proj": (kv, shape.hidden),
        "self_attn.v_proj": (kv, shape.hidden),
        "self_attn.o_proj": (shape.hidden, q),
        "mlp.gate_proj": (shape.mlp, shape.hidden),
        "mlp.up_proj": (shape.mlp, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.mlp),
        "self_attn.input_layernorm": (shape.hidden,),
        "mlp.post_attention_layernorm": (shape.hidden,),
    }
    found = {"embed_tokens.weight": (shape.vocab, shape.hidden)}
    for i in range(shape.blocks):
        for name, of_tensor in block.items():
            found[f"layers.{i}.{name}.weight"] = of_tensor
    found["norm.weight"] = (shape.hidden,)
    if not shape.tied:
        found["lm_head.weight"] = (shape.vocab, shape.hidden)
    return {weights.hf_name(name): of_tensor for name, of_tensor in found.items()}


def write_weights(folder, shapes, shards):
    """Write random weights into `shards` files, at least one. -> {tensor: its file}"""
    from safetensors.torch import save_file

    names, shards = list(shapes), max(1, shards)
    file_of_tensor = {}
    for i in range(shards):
        begin = i * len(names) // shards
        end = (i + 1) * len(names) // shards
        file = f"model-{i + 1:05d}.safetensors"
        tensors = {name: random_weight(shapes[name]) for name in names[begin:end]}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        for name in tensors:
            file_of_tensor[name] = file
    return file_of_tensor


def random_weight(shape):
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if len(shape) == 1:
        return torch.ones(shape, device=device, dtype=torch.bfloat16)
    return torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02


def write_tokenizer(folder, vocab):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"</s>": 0, "<unk>": 1}
    for i in range(2, vocab):
        words[f"w{i}"] = i
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def model_config(shape):
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.blocks,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": None,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }


def make_recipes(file, lengths, vocab):
    """Write a .jsonl file with a recipe of random words for each length. -> the file"""
    rng = np.random.default_rng(2)
    with open(file, "w", encoding="utf-8") as out:
        for n in lengths:
            words = [f"w{i}" for i in rng.integers(2, vocab // 2, n)]
            out.write(json.dumps({"text": " ".join(words)}) + "\n")
    return file
