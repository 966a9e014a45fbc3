"""files/gguf_file.py: GGUF files made here and read back, tokenizers against llama.cpp's, bad input."""

from cli import UserError

import html
import json
import math
import os
import subprocess
import sys
import textwrap

import gguf
import numpy as np
import pytest
import torch
from conftest import made_recipes
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from files import gguf_file

Q4, Q8, F16, F32 = (getattr(gguf.GGMLQuantizationType, t) for t in ("Q4_0", "Q8_0", "F16", "F32"))
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
OURS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TEXTS = [
    "Pumpkin bread",
    " 12½ cups",
    "3½ cups of flour, 250 g",
    "It's 1999!\n\n  Don't  WE'LL\tgo.\r\n",
    "crème brûlée ☕ 日本",
    "  two  spaces ",
    "<|im_end|> and </s>",
    "١٢ ⅔ x²",
    "foo.bar(baz) = 12345;",
    "a",
    ".",
    "zqzq",
]


# --- GGUF files, written as llama.cpp writes them ---


def byte_level_tokens(size=420):
    """(tokens, kinds, merges) of a byte-level BPE: <|end|> and <|im_end|> in front, a user-defined token behind."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = (
        [" ".join([r["title"], *r["directions"]]) for r in made_recipes(50)]
        + TEXTS * 3
        + [str(n) for n in range(1000)]
    )
    trained.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=["<|end|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    made = json.loads(trained.to_str())["model"]
    tokens = sorted(made["vocab"], key=made["vocab"].get) + [
        "zqzq",
        "<fraction>",
    ]  # zqzq: no merges lead there
    return tokens, [3, 3] + [1] * (len(tokens) - 3) + [4], [" ".join(m) for m in made["merges"]]


def sentencepiece_tokens():
    """(tokens, kinds, scores): <unk> <s> </s>, 256 bytes, then pieces, the better-scored first; no ½, no é."""
    pieces = [
        "▁a",
        "an",
        "▁the",
        "▁t",
        "in",
        "he",
        "th",
        "ead",
        "ea",
        "br",
        "▁bread",
        "bread",
        "▁▁",
        "kin",
        "Pu",
        "mp",
        "Pump",
        "12",
        "▁cups",
        "cup",
        "cu",
        "ps",
        "▁",
        *"abcdefghijklmnopqrstuvwxyzPIDWEL0123456789.,'!<>/|_",
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    kinds = [2, 3, 3] + [6] * 256 + [1] * len(pieces)
    return tokens, kinds, [0.0] * 259 + [-float(i) for i in range(len(pieces))]


def add_tokenizer(w, pre, bos=None):
    w.add_tokenizer_model("llama" if pre == "llama" else "gpt2")
    if pre == "llama":
        tokens, kinds, scores = sentencepiece_tokens()
        w.add_token_scores(scores)
        w.add_bos_token_id(1)
        w.add_eos_token_id(2)
        w.add_unk_token_id(0)
    else:
        tokens, kinds, merges = byte_level_tokens()
        w.add_tokenizer_pre(pre)
        w.add_token_merges(merges)
        w.add_bos_token_id(0)
        w.add_eos_token_id(1)
    w.add_token_list(tokens)
    w.add_token_types(kinds)
    if bos is not None:
        w.add_add_bos_token(bos)


def llama_cpp_rows(x, heads):
    """llama.cpp's order of the rows of q and k: its convert_hf_to_gguf.py, LlamaModel.permute."""
    return (
        x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
    )


def make_gguf(
    path, pre="smollm", quants=None, change=None, tensors=None, bos=None, seed=0, **config
):
    """A random Llama as `path`; returns transformers' model of the same weights (those that the quantised file means).

    quants {part of a Hugging Face name: type}; change(writer) and tensors(dict) may alter what is stored."""
    torch.manual_seed(seed)
    vocab = len(sentencepiece_tokens()[0] if pre == "llama" else byte_level_tokens()[0])
    c = LlamaConfig(
        **{
            "vocab_size": vocab,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "initializer_range": 0.2,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": None,
            **config,
        }
    )
    model = LlamaForCausalLM(c).eval()
    for p in model.parameters():
        if p.ndim == 1:  # norms are ones and biases zeros at first, which would hide a mix-up
            p.data = p.data + 0.1 * torch.randn_like(p)
    w = gguf.GGUFWriter(path, "llama")
    w.add_context_length(512)
    w.add_embedding_length(c.hidden_size)
    w.add_block_count(c.num_hidden_layers)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_dimension_count(c.head_dim)
    w.add_rope_freq_base(c.rope_parameters["rope_theta"])
    if c.head_dim != c.hidden_size // c.num_attention_heads:
        w.add_key_length(c.head_dim)
        w.add_value_length(c.head_dim)
    if c.rope_parameters["rope_type"] == "linear":
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(c.rope_parameters["factor"])
    add_tokenizer(w, pre, bos)
    stored = {}
    for name, p in model.named_parameters():
        part, _, leaf = name.rpartition(".")
        ours = OURS.get(part) or "blk.{}.{}".format(part.split(".")[2], OURS[part.split(".", 3)[3]])
        x, kind = (
            p.detach().numpy(),
            next((t for end, t in (quants or {}).items() if end in name), F32),
        )
        if kind != F32:
            x = gguf.quantize(x, kind)
            p.data = torch.from_numpy(gguf.dequantize(x, kind).copy())
        if (
            "q_proj" in name or "k_proj" in name
        ):  # quantised blocks lie within a row, so packed rows are moved as they are
            x = llama_cpp_rows(
                x, c.num_attention_heads if "q_proj" in name else c.num_key_value_heads
            )
        stored[f"{ours}.{leaf}"] = [np.ascontiguousarray(x), kind]
    if c.rope_parameters["rope_type"] == "llama3":
        plain = c.rope_parameters["rope_theta"] ** -(
            torch.arange(0, c.head_dim, 2).double() / c.head_dim
        )
        slow, _ = ROPE_INIT_FUNCTIONS["llama3"](c, "cpu")
        stored["rope_freqs.weight"] = [(plain / slow).float().numpy(), F32]
    (tensors or (lambda t: None))(stored)
    (change or (lambda w: None))(w)
    for name, (x, kind) in stored.items():
        w.add_tensor(name, x, raw_dtype=kind if kind not in (F32, F16) else None)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return model


def stored_tensors(folder):
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"tie_word_embeddings": False},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 32},
        {"num_attention_heads": 4, "num_key_value_heads": 1},
        {"num_key_value_heads": 4},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
        {"rope_parameters": LLAMA3, "head_dim": 64},
        {"rope_parameters": LLAMA3 | {"factor": 32.0}, "head_dim": 128},
        {"quants": {"q_proj": Q8, "k_proj": Q4, "down_proj": Q4, "embed": Q8, "up_proj": F16}},
        {"quants": {"lm_head": Q8, "v_proj": Q4}, "tie_word_embeddings": False},
    ],
    ids=str,
)
def test_a_model_comes_back_with_the_same_logits(case, tmp_path):
    model = make_gguf(tmp_path / "m.gguf", **case)
    folder = gguf_file.convert(tmp_path / "m.gguf", tmp_path / "hf")
    ids = torch.arange(2, 130).reshape(2, 64)
    with torch.no_grad():
        got = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        assert (got - model(ids).logits).abs().max() < 1e-5
    weights, wanted = stored_tensors(folder), dict(model.named_parameters())
    assert (
        weights.keys() == wanted.keys()
    )  # a tied head is stored once: named_parameters names it once
    assert all(
        w.dtype == torch.float32 and torch.equal(w, wanted[name]) for name, w in weights.items()
    )
    config = json.loads((folder / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5 and config["tie_word_embeddings"] is case.get(
        "tie_word_embeddings", True
    )
    rope = case.get("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0})
    assert (
        config["rope_parameters"] == rope and config["rope_theta"] == rope["rope_theta"]
    )  # transformers 5 and 4
    assert config["rope_scaling"] == (
        {k: v for k, v in rope.items() if k != "rope_theta"} if len(rope) > 2 else None
    )


def test_shards_are_small_indexed_and_hold_the_same(tmp_path, monkeypatch):
    make_gguf(tmp_path / "m.gguf")
    whole = gguf_file.convert(tmp_path / "m.gguf", tmp_path / "whole")
    monkeypatch.setattr(gguf_file, "SHARD_BYTES", 50_000)
    parts = gguf_file.convert(tmp_path / "m.gguf", tmp_path / "parts")
    files = sorted(f.name for f in parts.glob("*.safetensors"))
    assert len(files) > 3 and files == [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    alone = stored_tensors(whole)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in alone.values())
    for file in files:
        inside = load_file(parts / file)
        assert len(inside) == 1 or sum(x.nbytes for x in inside.values()) <= 50_000
        assert {name for name, f in index["weight_map"].items() if f == file} == inside.keys()
        assert all(torch.equal(x, alone.pop(name)) for name, x in inside.items())
    assert not alone and not (whole / "model.safetensors.index.json").exists()
    assert (
        LlamaForCausalLM.from_pretrained(parts).num_parameters()
        == LlamaForCausalLM.from_pretrained(whole).num_parameters()
    )


# --- tokenizers ---

ASK_LLAMA_CPP = """
    import json, sys, urllib.request, xllamacpp
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup, params.cpuparams.n_threads = sys.argv[1], 256, False, 1
    server = xllamacpp.Server(params)
    def ask(what, body):
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(server.listening_address + what, json.dumps(body).encode(), headers)
        return json.loads(urllib.request.urlopen(request).read())
    how = {"add_special": True, "parse_special": False}
    tokens = [ask("/tokenize", {"content": t, **how})["tokens"] for t in json.loads(sys.argv[2])]
    how = {"n_predict": 12, "temperature": 0, "return_tokens": True, "ignore_eos": True}
    said = ask("/completion", {"prompt": list(range(20, 40)), **how})
    print("ANSWER" + json.dumps([tokens, said["tokens"]]), flush=True)
"""


def llama_cpp(path):
    """(token ids of TEXTS, 12 greedy tokens after the tokens 20 … 39) by llama.cpp itself."""
    pytest.importorskip("xllamacpp")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ASK_LLAMA_CPP), str(path), json.dumps(TEXTS)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    answers = [line[6:] for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    assert answers, done.stderr[-2000:]
    return json.loads(answers[0])


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "llama"])
def test_tokens_are_llama_cpps_and_so_is_greedy_text(pre, tmp_path):
    """llama.cpp reads the file made here as we do: its tokens of each text, and what it says after the same ids."""
    model = make_gguf(tmp_path / "m.gguf", pre=pre, tie_word_embeddings=False)
    folder = gguf_file.convert(tmp_path / "m.gguf", tmp_path / "hf")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = (
        True  # what looks like a special token is text, as parse_special=False has it
    )
    tokens, said = llama_cpp(tmp_path / "m.gguf")
    assert [tokenizer.encode(t).ids for t in TEXTS] == tokens
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert (
            AutoTokenizer.from_pretrained(folder)(text, split_special_tokens=True)["input_ids"]
            == ids
        )
        assert tokenizer.decode(ids) == text
    ids = torch.arange(20, 40)[None]
    for got in said:
        logits = model(ids).logits[0, -1].detach()
        assert logits[got] > logits.max() - 0.05  # llama.cpp's cache is fp16
        ids = torch.cat((ids, torch.tensor([[got]])), dim=1)


def test_every_digit_is_a_token_of_its_own_for_smollm_only(tmp_path):
    got = {}
    for pre in ("smollm", "gpt-2"):
        make_gguf(tmp_path / f"{pre}.gguf", pre=pre)
        folder = gguf_file.convert(tmp_path / f"{pre}.gguf", tmp_path / pre)
        got[pre] = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert got["smollm"].encode(" 12½").tokens == [
        "Ġ",
        "1",
        "2",
        "Â",
        "½",
    ]  # the little vocabulary has no whole ½
    by_hand = Tokenizer.from_file(str(folder / "tokenizer.json"))
    by_hand.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert [got["gpt-2"].encode(t).ids for t in TEXTS] == [by_hand.encode(t).ids for t in TEXTS]
    by_hand.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    assert [got["smollm"].encode(t).ids for t in TEXTS] == [by_hand.encode(t).ids for t in TEXTS]
    assert got["gpt-2"].encode(" 12").tokens != ["Ġ", "1", "2"]


def test_sentencepiece_by_hand(tmp_path):
    """Scores decide: "an" is behind "▁a", so ▁a comes first; what no piece covers becomes its UTF-8 bytes."""
    make_gguf(tmp_path / "m.gguf", pre="llama")
    folder = gguf_file.convert(tmp_path / "m.gguf", tmp_path / "hf")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("an").tokens == ["<s>", "▁a", "n"]
    assert tokenizer.encode("ban").tokens == ["<s>", "▁", "b", "an"]
    assert tokenizer.encode("½€").tokens == [
        "<s>",
        "▁",
        "<0xC2>",
        "<0xBD>",
        "<0xE2>",
        "<0x82>",
        "<0xAC>",
    ]
    assert tokenizer.decode(tokenizer.encode("½€").ids) == "½€"
    assert (
        tokenizer.encode("a</s>").ids[-1] == 2
    )  # a special token where special tokens are asked for


def test_sentencepiece_without_the_space_in_front(tmp_path):
    """A text begins with a space of its own or with none."""
    make_gguf(tmp_path / "m.gguf", pre="llama", change=lambda w: w.add_add_space_prefix(False))
    folder = gguf_file.convert(tmp_path / "m.gguf", tmp_path / "hf")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("an").tokens == ["<s>", "an"]
    assert tokenizer.encode(" an").tokens == ["<s>", "▁a", "n"]
    for text in ("an", " an", "  an"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_sentencepiece_never_builds_a_special_token_out_of_text(tmp_path):
    tokens = sentencepiece_tokens()[0]
    tokens[tokens.index("Pump")], tokens[tokens.index("mp")] = (
        "</",
        "s>",
    )  # so that </s> is two pieces side by side
    make_gguf(tmp_path / "m.gguf", pre="llama", change=instead("tokenizer.ggml.tokens", tokens))
    tokenizer = Tokenizer.from_file(
        str(gguf_file.convert(tmp_path / "m.gguf", tmp_path / "hf") / "tokenizer.json")
    )
    tokenizer.encode_special_tokens = True
    assert tokenizer.encode("a</s>").tokens == ["<s>", "▁a", "</", "s>"]


def test_special_tokens_bos_and_ends(tmp_path):
    def change(w):
        w.add_eot_token_id(5)
        w.add_pad_token_id(1)
        w.add_chat_template("{{ messages }}")

    make_gguf(tmp_path / "m.gguf", pre="llama-bpe", change=change)
    folder = gguf_file.convert(tmp_path / "m.gguf", tmp_path / "hf")
    read = {
        name: json.loads((folder / f"{name}.json").read_text())
        for name in ("config", "generation_config", "tokenizer_config")
    }
    for name in ("config", "generation_config"):
        assert [read[name][f"{k}_token_id"] for k in ("bos", "eos", "pad")] == [0, [1, 5], 1]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|end|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert (
        tokenizer.chat_template == "{{ messages }}"
        and read["tokenizer_config"]["tokenizer_class"] == "PreTrainedTokenizerFast"
    )
    last = len(byte_level_tokens()[0]) - 1
    assert tokenizer("a<fraction>").input_ids == [
        0,
        *tokenizer("a", add_special_tokens=False).input_ids,
        last,
    ]
    assert (
        tokenizer.decode([0, 1, last], skip_special_tokens=True) == "<fraction>"
    )  # user-defined, and not special
    for pre, bos, begins in (
        ("llama-bpe", False, False),
        ("smollm", None, False),
        ("smollm", True, True),
        ("llama", False, False),
    ):
        make_gguf(tmp_path / "n.gguf", pre=pre, bos=bos)
        ids = (
            Tokenizer.from_file(
                str(
                    gguf_file.convert(tmp_path / "n.gguf", tmp_path / f"{pre}{bos}")
                    / "tokenizer.json"
                )
            )
            .encode("a")
            .ids
        )
        assert (ids[0] == (1 if pre == "llama" else 0)) is begins, pre


@pytest.mark.parametrize(
    ("ends", "wanted"), [({}, 1), ({"eot": 1}, 1), ({"eot": 1, "eom": 7}, [1, 7])], ids=str
)
def test_an_end_that_has_two_names_is_one_end(ends, wanted, tmp_path):
    def change(w):
        for name, i in ends.items():
            w.add_uint32(f"tokenizer.ggml.{name}_token_id", i)

    make_gguf(tmp_path / "m.gguf", change=change)
    folder = gguf_file.convert(tmp_path / "m.gguf", tmp_path / "hf")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((folder / name).read_text())["eos_token_id"] == wanted


@pytest.mark.parametrize(
    ("kind", "factor"), [("LINEAR", 0.0), ("LINEAR", 1.0), ("NONE", 4.0)], ids=str
)
def test_a_rope_scaling_that_scales_nothing_is_none(kind, factor, tmp_path):
    def change(w):
        w.add_rope_scaling_type(gguf.RopeScalingType[kind])
        w.add_rope_scaling_factor(factor)

    make_gguf(tmp_path / "m.gguf", change=change)
    folder = gguf_file.convert(tmp_path / "m.gguf", tmp_path / "hf")
    assert json.loads((folder / "config.json").read_text())["rope_scaling"] is None


# --- files that are refused ---


def uneven(w):
    del w.kv_data[0]["llama.attention.head_count_kv"]
    w.add_head_count_kv([2, 1])


def without(key):
    return lambda w: w.kv_data[0].pop(key)


def instead(key, value):
    def change(w):
        w.kv_data[0][key].value = value

    return change


def nan(t):
    t["blk.1.ffn_up.weight"][0][3, 3] = np.nan


BAD_MODELS = {
    "architecture": (
        {"change": instead("general.architecture", "qwen2")},
        "architecture 'qwen2' is not supported",
    ),
    "pre-tokenizer": (
        {"change": instead("tokenizer.ggml.pre", "deepseek-llm")},
        "pre-tokenizer 'deepseek-llm' is not supported",
    ),
    "no pre-tokenizer": (
        {"change": without("tokenizer.ggml.pre")},
        "pre-tokenizer None is not supported",
    ),
    "tokenizer": (
        {"change": instead("tokenizer.ggml.model", "t5")},
        "tokenizer 't5' is not supported",
    ),
    "no tokens": ({"change": without("tokenizer.ggml.tokens")}, "'tokens'"),
    "no heads": ({"change": without("llama.attention.head_count")}, "attention.head_count"),
    "no layers": ({"change": without("llama.block_count")}, "block_count"),
    "uneven": ({"change": uneven}, "a model of unequal layers is not supported"),
    "partial rope": (
        {"change": instead("llama.rope.dimension_count", 8)},
        "RoPE over a part of a head",
    ),
    "yarn": (
        {"change": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)},
        "RoPE scaling 'yarn' is not supported",
    ),
    "split": ({"change": lambda w: w.add_uint16("split.count", 2)}, "one part of a split file"),
    "wrong heads": ({"change": instead("llama.attention.head_count", 3)}, "is not supported"),
    "merge of no tokens": ({"change": instead("tokenizer.ggml.merges", ["qq zz"])}, "damaged"),
    "missing": (
        {"tensors": lambda t: t.pop("blk.1.ffn_up.weight")},
        "tensor blk.1.ffn_up.weight is missing",
    ),
    "missing bias": (
        {"tensors": lambda t: t.pop("blk.1.attn_v.bias"), "attention_bias": True},
        "blk.1.attn_v.bias is missing",
    ),
    "no embedding": ({"tensors": lambda t: t.pop("token_embd.weight")}, "token_embd.weight"),
    "extra": (
        {"tensors": lambda t: t.update({"blk.0.ffn_gate_inp.weight": t["blk.0.ffn_up.weight"]})},
        "tensor blk.0.ffn_gate_inp.weight is not part of a Llama",
    ),
    "rope_freqs": (
        {
            "tensors": lambda t: t.update(
                {"rope_freqs.weight": [np.linspace(1, 9, 8, dtype=np.float32), F32]}
            )
        },
        "rope_freqs.weight other than Llama 3.1's is not supported",
    ),
    "no such end token": (
        {"change": instead("tokenizer.ggml.eos_token_id", 100_000)},
        "damaged",
    ),
    "softcapping": (
        {"change": lambda w: w.add_float32("llama.attn_logit_softcapping", 50.0)},
        "llama.attn_logit_softcapping is not supported",
    ),
    "experts": ({"change": lambda w: w.add_expert_count(8)}, "llama.expert_count"),
    "logit scale": ({"change": lambda w: w.add_logit_scale(0.5)}, "llama.logit_scale"),
    "attention scale": ({"change": lambda w: w.add_attention_scale(0.5)}, "attention.scale"),
    "clamp": ({"change": lambda w: w.add_clamp_kqv(8.0)}, "llama.attention.clamp_kqv"),
    "not causal": ({"change": lambda w: w.add_causal_attention(False)}, "attention.causal"),
    "attention factor": (
        {"change": lambda w: w.add_rope_scaling_attn_factors(2.0)},
        "llama.rope.scaling.attn_factor",
    ),
    "sections": ({"change": lambda w: w.add_rope_dimension_sections([4, 4, 0, 0])}, "sections"),
    "window": ({"change": lambda w: w.add_sliding_window(64)}, "a sliding window"),
    "value length": ({"change": lambda w: w.add_value_length(8)}, "value length"),
    "a key of next year": (
        {"change": lambda w: w.add_bool("llama.attention.new", True)},
        "llama.attention.new",
    ),
    "white space": (
        {"change": lambda w: w.add_remove_extra_whitespaces(True)},
        "remove_extra_whitespaces",
    ),
    "nan": ({"tensors": nan}, "blk.1.ffn_up.weight has numbers that are not finite"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_a_gguf_that_is_refused(name, tmp_path):
    how, says = BAD_MODELS[name]
    make_gguf(tmp_path / "m.gguf", **how)
    with pytest.raises(UserError) as e:
        gguf_file.convert(tmp_path / "m.gguf", tmp_path / "made" / "hf")
    assert says in str(e.value) and "m.gguf" in str(e.value)
    assert not any((tmp_path / "made").iterdir())


@pytest.mark.parametrize(
    "where", ["empty", "magic", "version", 3, 20, 200, 3000, 0.3, 0.6, 0.9, -1, "length", "text"]
)
def test_a_gguf_that_is_cut_off_or_damaged(where, tmp_path):
    path = tmp_path / "m.gguf"
    make_gguf(path, pre="llama")
    data = path.read_bytes()
    scores = (
        data.index(b"tokenizer.ggml.scores") + len("tokenizer.ggml.scores") + 8
    )  # its length: 8 bytes from here on
    text = data.index("▁bread".encode())
    path.write_bytes(
        {
            "empty": b"",
            "magic": b"PK" + data[2:],
            "version": data[:4] + b"\x63\0\0\0" + data[8:],
            "length": data[:scores] + b"\xff" * 7 + b"\0" + data[scores + 8 :],
            "text": data[:text] + b"\xff" + data[text + 1 :],
        }[where]
        if isinstance(where, str)
        else data[: int(where * len(data)) if 0 < where < 1 else where]
    )
    with pytest.raises(UserError, match=r"m\.gguf is cut off, damaged or no GGUF file"):
        gguf_file.convert(path, tmp_path / "made" / "hf")
    assert not any((tmp_path / "made").iterdir())


def test_what_stops_a_conversion_leaves_nothing_half(tmp_path, monkeypatch):
    make_gguf(tmp_path / "m.gguf")
    monkeypatch.setattr(
        "safetensors.numpy.save_file", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        gguf_file.convert(tmp_path / "m.gguf", tmp_path / "made" / "hf")
    assert not any((tmp_path / "made").iterdir())


def test_a_conversion_without_enough_memory_is_a_sentence_and_leaves_nothing_half(
    tmp_path, monkeypatch
):
    make_gguf(tmp_path / "m.gguf")

    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(UserError, match=r"out of memory while .*m\.gguf was converted"):
        gguf_file.convert(tmp_path / "m.gguf", tmp_path / "made" / "hf")
    assert not any((tmp_path / "made").iterdir())


def test_a_folder_that_another_process_made_meanwhile_is_kept(tmp_path):
    make_gguf(tmp_path / "m.gguf")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("theirs")
    assert gguf_file.convert(tmp_path / "m.gguf", tmp_path / "hf") == tmp_path / "hf"
    assert [p.name for p in (tmp_path / "hf").iterdir()] == ["config.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "m.gguf"]


def test_what_a_killed_run_left_is_not_in_the_way_and_not_taken_for_whole(tmp_path):
    """Also of the same process number, which containers use again."""
    make_gguf(tmp_path / "m.gguf")
    left = tmp_path / f".hf.{os.getpid()}.part"
    left.mkdir()
    (left / "config.json").write_text("half")
    folder = gguf_file.convert(tmp_path / "m.gguf", tmp_path / "hf")
    assert LlamaForCausalLM.from_pretrained(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == [left.name, "hf", "m.gguf"]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_a_destination_that_is_something_else_is_named(tmp_path, kind):
    make_gguf(tmp_path / "m.gguf")
    there = tmp_path / "hf"
    if kind == "folder":
        there.mkdir()
        (there / "notes.txt").write_text("mine")
    elif kind == "file":
        there.write_text("mine")
    else:
        there.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="hf is there already"):
        gguf_file.convert(tmp_path / "m.gguf", there)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "m.gguf"]


def test_an_empty_destination_is_filled(tmp_path):
    make_gguf(tmp_path / "m.gguf")
    (tmp_path / "hf").mkdir()
    assert LlamaForCausalLM.from_pretrained(gguf_file.convert(tmp_path / "m.gguf", tmp_path / "hf"))


def test_keys_of_the_metadata_that_change_nothing_are_no_reason_to_refuse(tmp_path):
    def change(w):
        w.add_vocab_size(len(byte_level_tokens()[0]))
        w.add_tensor_data_layout("Meta AI original pth")
        w.add_causal_attention(True)
        w.add_expert_count(0)
        w.add_rope_scaling_attn_factors(1.0)
        w.add_sliding_window(512)
        w.add_value_length(16)
        w.add_string("general.note", "x")
        w.add_uint32("vendor.imatrix", 3)
        w.add_remove_extra_whitespaces(False)

    model = make_gguf(tmp_path / "m.gguf", change=change)
    folder = gguf_file.convert(tmp_path / "m.gguf", tmp_path / "hf")
    ids = torch.arange(2, 66)[None]
    with torch.no_grad():
        got = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        assert (got - model(ids).logits).abs().max() < 1e-5


@pytest.mark.parametrize("kind", [1, 4, 5], ids=["normal", "user-defined", "unused"])
@pytest.mark.parametrize("name", ["bos", "eos", "eot", "eom"])
@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "llama"])
def test_a_token_that_ends_a_turn_is_never_built_out_of_text(tmp_path, pre, name, kind):
    """A whole word of the vocabulary, to which merges lead, whatever the file calls its kind."""
    word = "bread"
    if pre == "llama":
        tokens, kinds, _ = sentencepiece_tokens()
    else:
        tokens, kinds, _ = byte_level_tokens()
        word = max((t for t in tokens[300:-2] if t.isalpha() and t.isascii()), key=len)
    i = tokens.index(word)
    kinds[i] = kind

    def change(w):
        w.kv_data[0].pop(f"tokenizer.ggml.{name}_token_id", None)
        w.add_uint32(f"tokenizer.ggml.{name}_token_id", i)
        w.kv_data[0]["tokenizer.ggml.token_type"].value = kinds

    make_gguf(tmp_path / "m.gguf", pre=pre, change=change)
    folder = gguf_file.convert(tmp_path / "m.gguf", tmp_path / "hf")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_added_tokens_decoder()[i].special
    assert i in tokenizer.encode(f"a {word}").ids
    tokenizer.encode_special_tokens = True
    for text in (word, f"a {word}", f"{word}{word}", f"a{word} b"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert i not in ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode([i]) == ""


def test_a_count_that_no_file_has_is_a_sentence(tmp_path, monkeypatch):
    make_gguf(tmp_path / "m.gguf")
    monkeypatch.setattr(gguf_file, "MOST_VALUES", 500)
    with pytest.raises(UserError, match="more than 500 values"):
        gguf_file.convert(tmp_path / "m.gguf", tmp_path / "hf")


@pytest.mark.parametrize("at", [8, 16], ids=["tensors", "keys"])
def test_a_huge_count_in_the_header_is_a_sentence(tmp_path, at):
    path = tmp_path / "m.gguf"
    make_gguf(path)
    data = path.read_bytes()
    path.write_bytes(data[:at] + b"\xff" * 7 + b"\x0f" + data[at + 8 :])
    with pytest.raises(UserError, match="cut off, damaged or no GGUF file"):
        gguf_file.convert(path, tmp_path / "hf")


def test_file_modes_follow_the_umask(tmp_path):
    make_gguf(tmp_path / "m.gguf")
    before = os.umask(0o027)
    try:
        folder = gguf_file.convert(tmp_path / "m.gguf", tmp_path / "hf")
    finally:
        os.umask(before)
    assert {f.stat().st_mode & 0o777 for f in folder.iterdir()} == {
        0o640
    } and folder.stat().st_mode & 0o777 == 0o750


# --- the default model ---


@pytest.mark.slow
def test_the_default_models_weights_are_those_of_transformers(default_model):
    folder, file, _ = default_model
    theirs = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    ours = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(100, 164)[None]
    with torch.no_grad():
        assert (ours(ids).logits - theirs(ids).logits).abs().max() < 1e-4
    assert ours.num_parameters() == 134_515_008


@pytest.mark.slow
def test_the_default_model_knows_recipes(default_model):
    """Rows of q and k in the wrong order, a wrong epsilon or other tokens all show here, and nowhere else."""
    folder, _, recipes = default_model
    model, tokenizer = (
        LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32),
        Tokenizer.from_file(str(folder / "tokenizer.json")),
    )
    rows = [
        r
        for r in json.loads(recipes.read_text()).values()
        if len(r["ingredients"]) >= 3 and len(r["steps"]) >= 3
    ][:30]
    assert tokenizer.encode(" 12½").tokens == ["Ġ", "1", "2", "Â½"]
    loss = targets = 0
    for r in rows:
        items, steps = (
            "".join(f"\n- {i}" for i in r["ingredients"]),
            "".join(f"\n{n}. {s}" for n, s in enumerate(r["steps"], 1)),
        )
        ids = torch.tensor(
            [
                tokenizer.encode(
                    html.unescape(f"{r['title']}\n\nIngredients:{items}\n\nDirections:{steps}")
                ).ids
            ]
        )
        with torch.no_grad():
            loss += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        targets += ids.shape[1] - 1
    assert targets == 7150 and math.exp(loss / targets) == pytest.approx(10.631, abs=0.01)
