"""Convert a GGUF file, llama.cpp's format, into a Hugging Face folder.

    convert("model.gguf", "folder")

A GGUF file holds metadata and tensors. The `gguf` package parses the file and dequantises the tensors. This file does
the rest:

    config.json          from the metadata, under Hugging Face's keys
    model.safetensors    the tensors under Hugging Face's names, with the rows of q and k in Hugging Face's order
    tokenizer.json       built from its parts, because GGUF stores the vocabulary and only a name of the pre-tokenizer

Weights become fp32, because fp32 holds every dequantised number exactly. The cost is disk: 4 bytes a weight.
"""

import cli
from cli import UserError, say

import os
import re
import tempfile
from pathlib import Path

import numpy as np

from files import disk

# The largest size of a shard, because one shard at a time is in memory.
SHARD_BYTES = 2_000_000_000
MOST_VALUES = 10_000_000

# {llama.cpp's name: Hugging Face's name} of the tensors that a model has once.
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}

# The same of the tensors that each block has.
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

# This tensor is no weight: llama.cpp keeps Llama 3.1's RoPE scaling in it.
ROPE_FACTORS = "rope_freqs.weight"

# {key of config.json: key of the metadata without its prefix "llama."}
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

# The other keys that begin with "llama.", which are used or checked.
CHECKED = {
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scale_linear",
    "attention.value_length",
    "attention.sliding_window",
}

# {key without "llama.": why its value changes nothing here}
HARMLESS = {
    "vocab_size": "token_embd.weight has as many rows",
    "tensor_data_layout": "a note; the order of q and k is llama.cpp's in every file",
    "attention.layer_norm_epsilon": "of a norm that a Llama has not",
    "rope.scaling.finetuned": "a note",
    "pooling_type": "of embeddings of whole texts",
}

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# {name of a pre-tokenizer: the regexes by which its steps cut a text into pieces}
SPLITS = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [LLAMA3],
}

# llama.cpp's numbers for the kinds of a token. Not needed here: 5, unused.
NORMAL = 1
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4
BYTE = 6


# --- the conversion ---


def convert(src, dst, weights=True):
    """Convert the GGUF file src into the Hugging Face folder dst. -> dst

    weights: those too, and not only configuration and tokenizer.

    Write into a folder beside dst and rename it at the end, so that dst is never half there. Raise UserError if src is
    damaged or no Llama, or if a tensor is missing or unknown."""
    src = Path(src)
    dst = Path(dst)
    say("convert", f"{src} to {dst}")
    dst.parent.mkdir(parents=True, exist_ok=True)
    try:
        # A name of its own, because what a killed run has left there must not be in the way.
        with tempfile.TemporaryDirectory(".part", f".{dst.name}.", dst.parent) as temporary:
            part = Path(temporary, dst.name)
            part.mkdir()
            fill(part, src, weights)
            put_in_place(part, dst)
    except (UserError, OSError):
        raise
    except MemoryError:
        raise UserError(
            f"out of memory while {src} was converted, which takes a few GB for the weights of a shard in fp32: free "
            "memory, or name a smaller model."
        ) from None
    except Exception as e:  # gguf, numpy and tokenizers raise many kinds over a damaged file
        number = disk.error_number(e)
        if number:
            raise OSError(number, os.strerror(number), str(dst)) from None
        raise UserError(
            f"{src} is cut off, damaged or no GGUF file ({type(e).__name__}: {e}). Download it again."
        ) from e
    return dst


def put_in_place(part, dst):
    """Rename the whole folder to dst. Keep a dst that another process has made of the same file meanwhile."""
    try:
        os.replace(part, dst)
    except OSError as e:
        # A folder that is not empty is never replaced.
        if not (dst / "config.json").exists():
            raise UserError(
                f"{dst} is there already and is no model ({e.strerror}): remove it, or name another folder."
            ) from None


def fill(folder, src, weights):
    """Write all files of a Hugging Face folder, or all but the weights."""
    meta, tensors = read(src)
    config = make_config(src, meta, tensors)
    tokenizer, tokenizer_config, generation_config = make_tokenizer(meta)
    tokenizer.save(str(folder / "tokenizer.json"))
    disk.write_json(folder / "config.json", config | generation_config)
    disk.write_json(folder / "tokenizer_config.json", tokenizer_config)
    if generation_config:
        disk.write_json(folder / "generation_config.json", generation_config)
    if weights:
        index = write_weights(src, folder, config, tensors)
        if index:
            disk.write_json(folder / "model.safetensors.index.json", index)


def read(src):
    """-> ({key: value}, {name: tensor}). A tensor has .data (as stored), .tensor_type and .n_elements."""
    import gguf

    class Reader(gguf.GGUFReader):
        values = 0

        def _get(self, offset, dtype, count=1, **more):
            # gguf's own _get returns too little at the end of a cut-off file, without an error.
            size = int(count) * np.dtype(dtype).itemsize
            if offset + size > len(self.data):
                raise ValueError("it ends too early")
            # Each value becomes an array of its own. Vocabularies and merges of Llama 3 are 1.1 million.
            self.values += 1
            if self.values > MOST_VALUES:
                raise ValueError(f"its metadata has more than {MOST_VALUES} values")
            return super()._get(offset, dtype, count, **more)

    reader = Reader(src)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {t.name: t for t in reader.tensors}
    return meta, tensors


def refuse(src, refusals):
    """Raise UserError for the first feature in {feature: whether the file has it} that the file has.

    Refuse a feature by name, because a folder without that feature would give other logits."""
    for what, is_refused in refusals.items():
        if is_refused:
            raise UserError(f"{src}: {what} is not supported.")


# --- config.json ---


def make_config(src, meta, tensors):
    """The content of config.json, for transformers 4 and 5: each reads keys of its own."""
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
    """Refuse an architecture or a tokenizer that this file does not know."""
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
    refuse(src, {key: changes_the_model(key, value) for key, value in meta.items()})


def changes_the_model(key, value):
    """Whether a key is one of the model's own ("llama.…") that is not known. null, false, 0 and empty are off.

    Of the tokenizer's keys two change a text before it is tokenised."""
    if key in (
        "tokenizer.ggml.remove_extra_whitespaces",
        "tokenizer.ggml.precompiled_charsmap",
    ):
        return bool(value)
    if not key.startswith("llama."):
        return False
    name = key.removeprefix("llama.")
    if name == "attention.causal":
        return not value
    if name == "rope.scaling.attn_factor":
        return value != 1
    # YaRN is refused by its name, and without YaRN nothing reads these.
    if name.startswith("rope.scaling.yarn_") or name == "rope.scaling.original_context_length":
        return False
    return bool(value) and name not in {*KEYS.values(), *CHECKED, *HARMLESS}


def llama_values(src, meta):
    """{key without "llama.": value} of the metadata. A missing key gets llama.cpp's default."""
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
    """The shortest decimal that rounds to the stored float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def rope_scaling(src, found, tensors):
    """The rope_scaling of config.json; None if the angles are not scaled."""
    D = found["attention.key_length"]
    kind = found["rope.scaling.type"]
    factor = found["rope.scaling.factor"]
    refusals = {
        "a value length other than the key length": found.get("attention.value_length", D) != D,
        "a sliding window": 0 < found.get("attention.sliding_window", 0) < found["context_length"],
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
    """The rope_scaling of Llama 3.1, from the D/2 factors that a GGUF file stores instead.

    The largest factor is Llama 3.1's `factor`. Compute all D/2 from it and compare, to refuse any other scaling."""
    factor = round(float(factors.max()), 4)
    low = 1.0
    high = 4.0
    length = 8192  # tokens, of the first training
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
    """{Hugging Face's name of a tensor: GGUF's name} of a model, in the order of the layers."""
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
    """Raise UserError unless the file has exactly the tensors of the model."""
    there = tensors.keys() - {ROPE_FACTORS}
    wanted = set(names.values())
    for name in sorted(there ^ wanted):
        wrong = "not part of a Llama" if name in there else "missing"
        raise UserError(f"{src}: tensor {name} is {wrong}.")


def write_weights(src, folder, config, tensors):
    """Dequantise all tensors into shards of at most SHARD_BYTES; a larger tensor gets a shard of its own.

    -> the index of the shards, or None if there is one shard"""
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
    """The numbers of a tensor in fp32, with the rows in Hugging Face's order."""
    from gguf import dequantize

    x = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    if not np.isfinite(x).all():
        raise UserError(
            f"{src}: {tensor.name} has numbers that are not finite. The file is damaged: download it again."
        )
    kind = tensor.name.split(".")[-2]  # attn_q of blk.0.attn_q.weight
    if kind == "attn_q":
        return hf_rows(x, config["num_attention_heads"])
    if kind == "attn_k":
        return hf_rows(x, config["num_key_value_heads"])
    return x


def hf_rows(x, heads):
    """The rows [heads * D, …] of q or k in Hugging Face's order.

    RoPE turns pairs of rows of a head: (0, 1), (2, 3), … in llama.cpp, (i, i + D/2) in Hugging Face. With D = 6:

        llama.cpp       a0 b0 a1 b1 a2 b2
        Hugging Face    a0 a1 a2 b0 b1 b2"""
    pairs = x.reshape(heads, -1, 2, *x.shape[1:])  # [heads, D/2, 2, …]
    halves = pairs.swapaxes(1, 2)  # [heads, 2, D/2, …]
    return np.ascontiguousarray(halves).reshape(x.shape)


# --- tokenizer.json, tokenizer_config.json, generation_config.json ---


def make_tokenizer(meta):
    """-> (a tokenizers.Tokenizer, the content of tokenizer_config.json, the content of generation_config.json)"""
    meta = {key.removeprefix("tokenizer.ggml."): value for key, value in meta.items()}
    meta["controls"] = control_ids(meta)
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
    """Byte-level BPE, of GPT-2, SmolLM, Llama 3: a pre-tokenizer cuts a text, and merges join bytes within a piece."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pre = meta.get("pre")
    vocab = {token: i for i, token in enumerate(meta["tokens"])}
    # A control token that merges lead to would be built out of somebody's text.
    never = {meta["tokens"][i] for i in meta["controls"]}
    merges = [tuple(merge.split(" ")) for merge in meta["merges"]]
    merges = [merge for merge in merges if "".join(merge) not in never]
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    steps = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in SPLITS[pre]]
    for token in sorted(never):
        # Tokens like <|eot_id|> are several pieces in any case.
        if pre == "llama-bpe" and not token.startswith("<"):
            steps.append(cut(token))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def cut(token):
    """A step that cuts a piece, which is the text of a token, behind its first character.

    With ignore_merges a piece that is in the vocabulary is that token, without any merge. A control token must not be
    found so in somebody's text."""
    from tokenizers import Regex, decoders, pre_tokenizers

    piece = decoders.ByteLevel().decode([token])
    first = re.escape(piece[:1])
    rest = re.escape(piece[1:])
    return pre_tokenizers.Split(Regex(rf"\A{first}(?={rest}\z)"), "isolated")


def sentencepiece_tokenizer(meta):
    """SentencePiece's BPE, of Llama 2: a space becomes ▁, and a character that no piece has becomes its bytes."""
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
    # SentencePiece puts a space before each text, and decoding takes that space away.
    if meta.get("add_space_prefix", True):
        normal.insert(0, normalizers.Prepend("▁"))
        decode.append(decoders.Strip(" ", 1, 0))
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(normal)
    tokenizer.decoder = decoders.Sequence(decode)
    return tokenizer


def sentencepiece_merges(meta, vocab):
    """The merges of a vocabulary that has scores instead of merges: each split of a piece into two pieces.

    Sort by the score of the joined piece, best first, because SentencePiece joins the two neighbours whose piece has
    the best score. Of the pieces a, b, c, ab (the best score) and abc the merges are (a, b), then (ab, c)."""
    tokens = meta["tokens"]
    score = {}
    for token, points, kind in zip(tokens, meta["scores"], meta["token_type"], strict=True):
        if kind == NORMAL:
            score[token] = points
    # A control token that merges lead to would be built out of somebody's text.
    for i in meta["controls"]:
        score.pop(tokens[i], None)
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
    """Add the tokens that a text is searched for as a whole. Of these, user-defined tokens stay ordinary text."""
    from tokenizers import AddedToken

    added = []
    for i, (token, kind) in enumerate(zip(meta["tokens"], meta["token_type"], strict=True)):
        special = kind in (UNKNOWN, CONTROL) or i in meta["controls"]
        if special or kind == USER_DEFINED:
            added.append(AddedToken(token, special=special, normalized=False))
    tokenizer.add_tokens(added)


def control_ids(meta):
    """The ids of the tokens that begin and end a text or a turn. They are special tokens, whatever their kind says.

    An end token of another kind would be an end token inside somebody's text. Leave out a token of one character,
    because no tokenizer can keep that out of a text, and decoding would lose the character."""
    controls = set()
    for name in ("bos", "eos", "eot", "eom"):
        i = meta.get(f"{name}_token_id")
        if i is None:
            continue
        token = meta["tokens"][i]
        kind = meta["token_type"][i]
        if kind == BYTE or (kind == NORMAL and len(token) == 1):
            say("convert", f"the {name} token is {token!r}, which any text may have")
        else:
            controls.add(i)
    return controls


def special_ids(meta):
    """{"bos", "eos" or "pad": its id}, of the tokens that the file names."""
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
    """Let the tokenizer put the BOS token before each text."""
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, bos_id)]
    )


def make_tokenizer_config(meta, ids):
    # Name PreTrainedTokenizerFast, because transformers would replace the pre-tokenizer of a GPT2Tokenizer.
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
    # A turn of a chat ends with another token than a text, so a model may have several end tokens.
    if len(ends) > 1:
        config["eos_token_id"] = ends
    return config
