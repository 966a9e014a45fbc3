"""A GGUF file, llama.cpp's format, as a Hugging Face folder.

    convert("model.gguf", "folder")

A GGUF file is metadata and tensors in one file. The `gguf` package parses and dequantises. This file gives the tensors
Hugging Face's names, puts the rows of q and k in Hugging Face's order, and builds tokenizer.json from its parts,
because GGUF only names the pre-tokenizer. Weights become fp32, which loses nothing.
"""

import cli
from cli import UserError, say

import os
import shutil
from pathlib import Path

import numpy as np

from files import disk

SHARD_BYTES = 2_000_000_000  # no more of a model than this is in memory at a time

# {llama.cpp's name: Hugging Face's} of the tensors that stand once in a model …
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}

# … and of those that stand once in a block.
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

ROPE_FACTORS = "rope_freqs.weight"  # no weight: Llama 3.1's RoPE scaling as numbers

# {key of config.json: key of the metadata, after "llama."}
KEYS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "head_dim": "attention.key_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# {name of a pre-tokenizer: what its steps cut out of a text}
SPLITS = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [LLAMA3],
}

# The kinds of a token, as llama.cpp numbers them. The others are 5, unused, and 6, a byte.
NORMAL = 1
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4


# --- the way of a file ---


def convert(src, dst):
    """Make the Hugging Face folder dst of the GGUF file src, beside its place and renamed when whole; returns dst.

    Raises UserError for a file that is cut off or damaged, is no Llama, or has a tensor too many or too few."""
    src = Path(src)
    dst = Path(dst)
    say("convert", f"{src} to {dst}")
    part = dst.with_name(f".{dst.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        fill(part, src)
        # Another process may have been quicker.
        if not (dst / "config.json").exists():
            os.replace(part, dst)
    except (UserError, OSError, MemoryError):
        raise
    except Exception as e:  # over a broken file gguf, numpy and tokenizers raise all kinds
        number = disk.error_number(e)
        if number:
            raise OSError(number, os.strerror(number), str(dst)) from None
        raise UserError(
            f"{src} is cut off, damaged or no GGUF file ({type(e).__name__}: {e}). Get it again."
        ) from e
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return dst


def fill(folder, src):
    """Write all files of a Hugging Face folder."""
    meta, tensors = read(src)
    config = make_config(src, meta, tensors)
    tokenizer, tokenizer_config, generation_config = make_tokenizer(meta)
    tokenizer.save(str(folder / "tokenizer.json"))
    index = write_weights(src, folder, config, tensors)
    disk.write_json(folder / "config.json", config | generation_config)
    disk.write_json(folder / "tokenizer_config.json", tokenizer_config)
    if generation_config:
        disk.write_json(folder / "generation_config.json", generation_config)
    if index:
        disk.write_json(folder / "model.safetensors.index.json", index)


def read(src):
    """({key: value}, {name: tensor}); a tensor has .data (as stored), .tensor_type and .n_elements."""
    import gguf

    class Reader(gguf.GGUFReader):
        def _get(self, offset, dtype, count=1, **more):
            # At the file's end gguf's own gives less than it was asked for, without a word.
            size = int(count) * np.dtype(dtype).itemsize
            if offset + size > len(self.data):
                raise ValueError("it ends too early")
            return super()._get(offset, dtype, count, **more)

    reader = Reader(src)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {t.name: t for t in reader.tensors}
    return meta, tensors


def refuse(src, refusals):
    """Raise UserError for the first of {what: whether it is refused}. What cannot be reproduced is refused by name."""
    for what, is_refused in refusals.items():
        if is_refused:
            raise UserError(f"{src}: {what} is not supported.")


# --- config.json ---


def make_config(src, meta, tensors):
    """config.json as transformers 4 and 5 read it."""
    check_kinds(src, meta)
    found = llama_values(src, meta)
    scaling = rope_scaling(src, found, tensors)
    theta = found["rope.freq_base"]
    config = {ours: found[key] for ours, key in KEYS.items()}
    config |= {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }
    for_transformers_4 = {
        "torch_dtype": "float32",
        "rope_scaling": scaling,
    }
    for_transformers_5 = {
        "dtype": "float32",
        "rope_parameters": {"rope_theta": theta, **(scaling or {"rope_type": "default"})},
    }
    return config | for_transformers_4 | for_transformers_5


def check_kinds(src, meta):
    """The architecture and the tokenizer are of a kind that this file knows."""
    architecture = meta.get("general.architecture")
    parts = meta.get("split.count", 1)
    tokenizer = meta.get("tokenizer.ggml.model")
    pre = meta.get("tokenizer.ggml.pre")
    refusals = {
        f"architecture {architecture!r}": architecture != "llama",
        "one part of a split file (join them: llama-gguf-split --merge)": parts > 1,
        f"tokenizer {tokenizer!r}": tokenizer not in ("gpt2", "llama"),
        f"pre-tokenizer {pre!r}": tokenizer == "gpt2" and pre not in SPLITS,
    }
    refuse(src, refusals)


def llama_values(src, meta):
    """{key without "llama.": value} of the metadata, with what llama.cpp takes where a key is not there."""
    found = {}
    for key, value in meta.items():
        if isinstance(value, float):
            value = shortest_decimal(value)
        found[key.removeprefix("llama.")] = value
    uneven = any(isinstance(found.get(key), list) for key in KEYS.values())
    refuse(src, {"a model of unequal layers": uneven})
    heads = found["attention.head_count"]
    defaults = {
        "attention.head_count_kv": heads,
        "attention.key_length": found["embedding_length"] // heads,
        "rope.freq_base": 10000.0,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": found.get("rope.scale_linear", 1.0),
    }
    return defaults | found


def shortest_decimal(value):
    """The shortest decimal that means the stored float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def rope_scaling(src, found, tensors):
    """config.json's rope_scaling; None where the angles are not scaled."""
    D = found["attention.key_length"]
    kind = found["rope.scaling.type"]
    factor = found["rope.scaling.factor"]
    refusals = {
        "RoPE over a part of a head": found.get("rope.dimension_count", D) != D,
        f"RoPE scaling {kind!r}": kind not in ("none", "linear"),
    }
    refuse(src, refusals)
    if ROPE_FACTORS in tensors:
        return llama3_scaling(src, tensors[ROPE_FACTORS].data, D, found["rope.freq_base"])
    if kind == "linear" and factor not in (0, 1):
        return {"rope_type": "linear", "factor": factor}
    return None


def llama3_scaling(src, factors, D, theta):
    """Llama 3.1's scaling from the D/2 factors that a GGUF file holds in its place.

    The factor is the largest of them; all of them are computed again, to see that the scaling is no other one."""
    factor = round(float(factors.max()), 4)
    low = 1.0
    high = 4.0
    length = 8192  # of the first training
    frequencies = theta ** -(np.arange(0, D, 2) / D)  # [D/2]
    turns = length * frequencies / (2 * np.pi)
    keep = ((turns - low) / (high - low)).clip(0, 1)
    again = 1 / (keep + (1 - keep) / factor)
    differs = not np.allclose(factors, again, rtol=1e-4)
    refuse(src, {f"{ROPE_FACTORS} other than Llama 3.1's": differs})
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }


# --- model.safetensors ---


def tensor_names(config):
    """{Hugging Face's name of a tensor: GGUF's} of a model, in the order of its layers."""
    names = {f"{hf}.weight": f"{ours}.weight" for ours, hf in NAMES.items()}
    if config["tie_word_embeddings"]:
        del names["lm_head.weight"]
    for i in range(config["num_hidden_layers"]):
        for ours, hf in BLOCK_NAMES.items():
            names[f"model.layers.{i}.{hf}.weight"] = f"blk.{i}.{ours}.weight"
            if has_bias(hf, config):
                names[f"model.layers.{i}.{hf}.bias"] = f"blk.{i}.{ours}.bias"
    return names


def has_bias(hf, config):
    if hf.startswith("self_attn."):
        return config["attention_bias"]
    if hf.startswith("mlp."):
        return config["mlp_bias"]
    return False


def check_names(src, tensors, names):
    """Every tensor of the file has a name in the model, and every name a tensor."""
    there = tensors.keys() - {ROPE_FACTORS}
    wanted = set(names.values())
    for name in sorted(there ^ wanted):
        wrong = "not one of a Llama" if name in there else "missing"
        raise UserError(f"{src}: tensor {name} is {wrong}.")


def write_weights(src, folder, config, tensors):
    """Dequantise into shards of at most SHARD_BYTES (a larger tensor has its own).

    Returns their index, or None where one file holds all."""
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.numpy import save_file

    names = tensor_names(config)
    check_names(src, tensors, names)
    split = split_state_dict_into_shards_factory(
        {hf: tensors[name] for hf, name in names.items()},
        get_storage_size=lambda t: 4 * int(t.n_elements),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    progress = cli.Progress(len(names), "convert")
    for file, shard in split.filename_to_tensors.items():
        made = {}
        for hf in shard:
            made[hf] = hf_tensor(src, tensors[names[hf]], config)
            progress.step()
        save_file(made, folder / file, metadata={"format": "pt"})
        disk.set_usual_mode(folder / file)
    progress.close()
    if not split.is_sharded:
        return None
    return {"metadata": split.metadata, "weight_map": split.tensor_to_filename}


def hf_tensor(src, tensor, config):
    """A tensor's numbers in fp32, with its rows in Hugging Face's order."""
    from gguf import dequantize

    x = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    if not np.isfinite(x).all():
        raise UserError(
            f"{src}: {tensor.name} has numbers that are not finite. The file is damaged, get it again."
        )
    kind = tensor.name.split(".")[-2]  # blk.0.attn_q.weight: attn_q
    if kind == "attn_q":
        return hf_rows(x, config["num_attention_heads"])
    if kind == "attn_k":
        return hf_rows(x, config["num_key_value_heads"])
    return x


def hf_rows(x, heads):
    """The rows [heads * D, …] of q or k in Hugging Face's order.

    RoPE turns pairs of rows of a head: llama.cpp's are (0, 1), (2, 3), …, Hugging Face's (i, i + D/2)."""
    pairs = x.reshape(heads, -1, 2, *x.shape[1:])  # [heads, D/2, 2, …]
    halves = pairs.swapaxes(1, 2)  # [heads, 2, D/2, …]
    return np.ascontiguousarray(halves).reshape(x.shape)


# --- tokenizer.json, tokenizer_config.json, generation_config.json ---


def make_tokenizer(meta):
    """(a tokenizers.Tokenizer, the content of tokenizer_config.json, that of generation_config.json)."""
    meta = {key.removeprefix("tokenizer.ggml."): value for key, value in meta.items()}
    if meta["model"] == "gpt2":
        tokenizer = byte_level_tokenizer(meta)
    else:
        tokenizer = sentencepiece_tokenizer(meta)
    add_special_tokens(tokenizer, meta)
    ids = special_ids(meta)
    if "bos" in ids and begins_with_bos(meta):
        add_bos(tokenizer, meta["tokens"][ids["bos"]], ids["bos"])
    return tokenizer, make_tokenizer_config(meta, ids), make_generation_config(meta, ids)


def byte_level_tokenizer(meta):
    """Byte-level BPE, as GPT-2, SmolLM and Llama 3 have it: a pre-tokenizer cuts, merges join bytes within a piece."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pre = meta.get("pre")
    vocab = {token: i for i, token in enumerate(meta["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in meta["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    steps = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in SPLITS[pre]]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece_tokenizer(meta):
    """SentencePiece's BPE, as Llama 2 has it: a space is ▁, and what no piece covers becomes its bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens = meta["tokens"]
    vocab = {token: i for i, token in enumerate(tokens)}
    bpe = models.BPE(
        vocab,
        sentencepiece_merges(meta, vocab),
        unk_token=tokens[meta.get("unknown_token_id", 0)],
        fuse_unk=True,
        byte_fallback=True,
    )
    normal = [normalizers.Replace(" ", "▁")]
    decode = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    # A text begins with a space that is not its own.
    if meta.get("add_space_prefix", True):
        normal.insert(0, normalizers.Prepend("▁"))
        decode.append(decoders.Strip(" ", 1, 0))
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(normal)
    tokenizer.decoder = decoders.Sequence(decode)
    return tokenizer


def sentencepiece_merges(meta, vocab):
    """The merges of a vocabulary that only has scores: any split of a piece into two pieces, the best-scored first.

    SentencePiece joins whichever pair of neighbours is the piece of the best score."""
    tokens = meta["tokens"]
    score = {}
    for token, points, kind in zip(tokens, meta["scores"], meta["token_type"], strict=True):
        if kind == NORMAL:
            score[token] = points
    splits = []
    for token in score:
        for n in range(1, len(token)):
            left = token[:n]
            right = token[n:]
            if left in score and right in score:
                splits.append((-score[token], vocab[token], vocab[left], vocab[right]))
    splits.sort()
    return [(tokens[left], tokens[right]) for _, _, left, right in splits]


def add_special_tokens(tokenizer, meta):
    """Tokens that are matched in a text as a whole; those that a user defined are text all the same."""
    from tokenizers import AddedToken

    added = []
    for token, kind in zip(meta["tokens"], meta["token_type"], strict=True):
        if kind in (UNKNOWN, CONTROL, USER_DEFINED):
            added.append(AddedToken(token, special=kind != USER_DEFINED, normalized=False))
    tokenizer.add_tokens(added)


def special_ids(meta):
    """{"bos", "eos", "pad": its id}, those that the file names."""
    keys = {
        "bos": "bos_token_id",
        "eos": "eos_token_id",
        "pad": "padding_token_id",
    }
    return {name: meta[key] for name, key in keys.items() if key in meta}


def begins_with_bos(meta):
    by_default = meta["model"] == "llama" or meta.get("pre") == "llama-bpe"
    return meta.get("add_bos_token", by_default)


def add_bos(tokenizer, bos, bos_id):
    """Let each text begin with the token."""
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, bos_id)]
    )


def make_tokenizer_config(meta, ids):
    # At the name GPT2Tokenizer transformers would cut texts in its own way.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "chat_template": meta.get("tokenizer.chat_template"),
    }
    for name, i in ids.items():
        config[f"{name}_token"] = meta["tokens"][i]
    return config


def make_generation_config(meta, ids):
    config = {f"{name}_token_id": i for name, i in ids.items()}
    ends = []
    for key in ("eos_token_id", "eot_token_id", "eom_token_id"):
        if key in meta and meta[key] not in ends:
            ends.append(meta[key])
    # A turn of a chat ends with another token than a text.
    if len(ends) > 1:
        config["eos_token_id"] = ends
    return config
