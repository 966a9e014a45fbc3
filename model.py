"""A Llama-3-architecture model in plain PyTorch: Llama 2 / 3 / 3.1 / 3.2, SmolLM2, TinyLlama, Mistral without window.

    model = load(folder, device="cuda", dtype=torch.bfloat16)
    h = model(ids)                                  # [B, T] token ids -> [B, T, C] after the last norm

The names of the dimensions, once: B batch, T time, C hidden size, H query heads, K key/value heads, D head size,
F width of the MLP, V vocabulary, S slots of the KV cache.

Two doors lead into this file. `make_linear` says what becomes of each weight while it is loaded. `project`, an
attribute of each half of a block, calls the layers that share an input. LoRA, quantisation and fp8 need no other.
"""

from cli import UserError

import inspect
import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn

from files import weights


@dataclass
class ModelConfig:
    # fmt: off
    vocab_size: int                      # V
    hidden_size: int                     # C
    intermediate_size: int               # F
    num_hidden_layers: int
    num_attention_heads: int             # H
    num_key_value_heads: int             # K: H / K query heads share a key and a value (grouped-query attention)
    head_dim: int                        # D; not always C / H
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict                   # {"rope_type": "default" | "linear" | "llama3", …}
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    # fmt: on


SIZES = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
]
FLAGS = ["tie_word_embeddings", "attention_bias", "mlp_bias"]


def read_config(folder):
    """ModelConfig of a Hugging Face folder. What this file cannot reproduce is refused by name."""
    path = Path(folder) / "config.json"
    try:
        stored = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"{path} cannot be read ({e}); a model folder needs config.json.") from None
    rope = rope_of(stored)
    refuse(path, stored, rope)
    heads = stored["num_attention_heads"]
    try:
        cfg = ModelConfig(
            **{size: stored[size] for size in SIZES},
            **{flag: stored.get(flag, False) for flag in FLAGS},
            num_key_value_heads=stored.get("num_key_value_heads") or heads,
            head_dim=stored.get("head_dim") or stored["hidden_size"] // heads,
            max_position_embeddings=stored.get("max_position_embeddings", 2048),
            rms_norm_eps=stored.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta") or stored.get("rope_theta") or 10000.0,
            rope_scaling=rope,
        )
        rope_frequencies(cfg)
    except (KeyError, TypeError, ZeroDivisionError) as e:
        raise UserError(f"{path}: a value is missing or makes no sense ({e!r}).") from None
    if heads % cfg.num_key_value_heads:
        raise UserError(
            f"{path}: {heads} heads cannot be shared out over {cfg.num_key_value_heads} key/value heads."
        )
    return cfg


def rope_of(stored):
    """The RoPE settings: transformers 5 writes rope_parameters, transformers 4 wrote rope_scaling."""
    rope = dict(stored.get("rope_parameters") or stored.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    return rope


def refuse(path, stored, rope):
    """A UserError for a model that this file would compute wrongly."""
    kind = (stored.get("architectures") or ["?"])[0]
    if kind not in ("LlamaForCausalLM", "MistralForCausalLM"):
        raise UserError(
            f"{path}: {kind} is no Llama-architecture model (LlamaForCausalLM or MistralForCausalLM)."
        )
    rotary = rope.get("partial_rotary_factor", stored.get("partial_rotary_factor") or 1)
    activation = stored.get("hidden_act", "silu")
    refused = {
        f"rope type {rope['rope_type']!r}": rope["rope_type"]
        not in ("default", "linear", "llama3"),
        "sliding_window": bool(stored.get("sliding_window")),
        f"hidden_act {activation!r}": activation != "silu",
        "partial_rotary_factor": rotary != 1,
        "quantization_config (weights stored in another format)": bool(
            stored.get("quantization_config")
        ),
    }
    for what, is_refused in refused.items():
        if is_refused:
            raise UserError(f"{path}: {what} is not supported; use a checkpoint without it.")
    for size in SIZES:
        value = stored.get(size)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{path}: {size} is {value!r}, where a number is wanted.")


# --- norm and positions ---


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight (Zhang & Sennrich 2019)."""

    def __init__(self, C, eps, out_dtype=None):
        """out_dtype: of what comes out, and so of the products behind the norm; None: as what goes in."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))
        self.eps = eps
        self.out_dtype = out_dtype

    def forward(self, x):
        dtype = self.out_dtype or x.dtype
        # The mean of squares overflows fp16 and loses digits in bf16.
        x32 = x.float()
        scale = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return (x32 * scale).to(dtype) * self.weight.to(dtype)


def rope_frequencies(cfg):
    """Angle per position of each of the D/2 pairs, [D/2] fp32 (RoPE, Su et al. 2021).

    Llama 3.1 (`apply_scaling` in its code) slows the pairs whose wavelength is near or beyond the length of its first
    training. It leaves the quick pairs alone."""
    D = cfg.head_dim
    scaling = cfg.rope_scaling
    pairs = torch.arange(0, D, 2, dtype=torch.float32, device="cpu")
    freq = 1.0 / cfg.rope_theta ** (pairs / D)
    if scaling["rope_type"] == "linear":
        return freq / scaling["factor"]
    if scaling["rope_type"] == "llama3":
        # How often a pair turns within the length of the first training.
        turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)
        low = scaling["low_freq_factor"]
        high = scaling["high_freq_factor"]
        # 1: a quick pair, which stays. 0: a slow pair, which is divided by the factor.
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * freq + (1 - keep) * freq / scaling["factor"]
    return freq


def rotate(x, cos, sin):
    """RoPE on x [B, H or K, T, D] with cos, sin [B or 1, 1, T, D/2]: the pairs are (i, i + D/2), as in Hugging Face."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


# --- attention: who sees whom, and four ways to compute it ---


class Documents(NamedTuple):
    """A packed row: documents end to end. A token sees the earlier tokens of its own document, nobody else's."""

    cu_seqlens: (
        torch.Tensor
    )  # [docs + 1] int32: where each document begins, and where the last one ends

    def of(self, t):
        """The document of each position t [T]."""
        return torch.searchsorted(self.cu_seqlens, t, right=True, out_int32=True) - 1

    def positions(self, t):
        """Positions begin at 0 in each document. t [T] -> [1, T]"""
        return (t - self.cu_seqlens[self.of(t)])[None]

    def mask(self, t):
        """Who sees whom, where varlen attention is not to be had. t [T] -> [1, 1, T, T]"""
        document = self.of(t)
        same = document[:, None] == document
        return (same & (t[:, None] >= t))[None, None]


def takes_documents(device, dtype, attn, D):
    """Whether varlen attention runs here. Elsewhere a packed row is masked, and what is masked is computed."""
    if attn == "naive" or device.type != "cuda":
        return False
    fits = dtype.itemsize == 2 and D % 8 == 0 and D <= 256
    return fits and torch.cuda.get_device_capability() >= (8, 0)


def attention(q, k, v, mask, documents, attn, longest):
    """q [B, H, T, D], k and v [B, K, S, D] -> [B, H, T, D].

    mask: bool [B, 1, T, S], or None: causal. As padding is on the right, no real token sees padding.
    documents: of a packed row (B = 1), none of them longer than `longest`, for varlen attention; or None."""
    if documents is not None:
        return varlen_attention(q, k, v, documents, longest)
    T = q.shape[2]
    if T == 1 and mask is not None and k.shape[1] < q.shape[1]:
        return one_token_attention(q, k, v, mask)
    if attn == "naive":
        return naive_attention(q, k, v, mask)
    return flash_attention(q, k, v, mask)


# torch 2.11: varlen_attn wants as many key heads as query heads; enable_gqa came in 2.12.
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def varlen_attention(q, k, v, documents, longest):
    """Flash attention inside each document of a packed row; scores between documents are never computed."""
    if not GROUPED:
        k = repeat_heads(k, q.shape[1])
        v = repeat_heads(v, q.shape[1])
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [T, H or K, D]
    cu = documents.cu_seqlens
    y = varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(-1, 0), **GROUPED)
    return y.transpose(0, 1)[None]


def one_token_attention(q, k, v, mask):
    """One new token against the cache: the H / K queries that share a key are rows of one product."""
    B, H, _, D = q.shape
    K = k.shape[1]
    rows = q.view(B, K, H // K, D)
    return naive_attention(rows, k, v, mask).view(B, H, 1, D)


def flash_attention(q, k, v, mask):
    """Scores [T, S] are never held in memory (Dao et al. 2022)."""
    # The CUDA kernels for masks and for fp32 want as many key heads as query heads.
    grouped = not (q.is_cuda and (mask is not None or q.dtype == torch.float32))
    if not grouped:
        k = repeat_heads(k, q.shape[1])
        v = repeat_heads(v, q.shape[1])
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)


def naive_attention(q, k, v, mask):
    """The four plain lines."""
    k = repeat_heads(k, q.shape[1])
    v = repeat_heads(v, q.shape[1])
    scores = q @ k.mT / math.sqrt(q.shape[-1])  # [B, H, T, S]
    if mask is None:
        mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
    scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


def repeat_heads(x, H):
    """x [B, K, S, D] -> [B, H, S, D]: keys [k1, k2] become [k1, k1, k2, k2]."""
    K = x.shape[1]
    if K == H:
        return x
    return x.repeat_interleave(H // K, dim=1)


# --- a block: attention and MLP, each a module with its norm ---


def call_each(h, layers):
    """The default of `project`: each of the layers that share the input h."""
    return [layer(h) for layer in layers]


class Attention(nn.Module):
    """x + o_proj(attention(norm(x)))"""

    def __init__(self, cfg, attn, longest, product_dtype):
        super().__init__()
        C = cfg.hidden_size
        H = cfg.num_attention_heads
        K = cfg.num_key_value_heads
        D = cfg.head_dim
        self.attn = attn
        self.longest = longest
        self.D = D
        self.project = call_each  # lora.py and quant.py put their own here
        self.input_layernorm = RMSNorm(C, cfg.rms_norm_eps, product_dtype)
        self.q_proj = nn.Linear(C, H * D, bias=cfg.attention_bias)
        self.k_proj = nn.Linear(C, K * D, bias=cfg.attention_bias)
        self.v_proj = nn.Linear(C, K * D, bias=cfg.attention_bias)
        self.o_proj = nn.Linear(H * D, C, bias=cfg.attention_bias)

    def forward(self, x, cos, sin, cache=None, pos=None, mask=None, documents=None):
        B, T, _ = x.shape
        h = self.input_layernorm(x)
        projected = self.project(h, [self.q_proj, self.k_proj, self.v_proj])
        q, k, v = (y.view(B, T, -1, self.D).transpose(1, 2) for y in projected)  # [B, H or K, T, D]
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.put(k, v, pos)
        y = attention(q, k, v, mask, documents, self.attn, self.longest)
        y = y.transpose(1, 2).reshape(B, T, -1)  # [B, T, H * D]
        (y,) = self.project(y, [self.o_proj])
        return x + y


class MLP(nn.Module):
    """x + down_proj(silu(gate_proj(norm(x))) * up_proj(norm(x))): SwiGLU (Shazeer 2020)"""

    def __init__(self, cfg, product_dtype):
        super().__init__()
        C = cfg.hidden_size
        width = cfg.intermediate_size  # F
        self.project = call_each
        self.post_attention_layernorm = RMSNorm(C, cfg.rms_norm_eps, product_dtype)
        self.gate_proj = nn.Linear(C, width, bias=cfg.mlp_bias)
        self.up_proj = nn.Linear(C, width, bias=cfg.mlp_bias)
        self.down_proj = nn.Linear(width, C, bias=cfg.mlp_bias)

    def forward(self, x):
        h = self.post_attention_layernorm(x)
        gate, up = self.project(h, [self.gate_proj, self.up_proj])  # [B, T, F]
        (y,) = self.project(F.silu(gate) * up, [self.down_proj])
        return x + y


class Block(nn.Module):
    def __init__(self, cfg, attn, longest, product_dtype):
        super().__init__()
        self.self_attn = Attention(cfg, attn, longest, product_dtype)
        self.mlp = MLP(cfg, product_dtype)

    def forward(self, x, *how):
        return self.mlp(self.self_attn(x, *how))


# --- the keys and values of what was read before ---


@dataclass
class Cache:
    """Keys and values of one block, allocated once, of which `rows` are written, each at its own positions.

    So rows of different lengths share a batch: what padding left in a row is overwritten before the row's mask
    reaches it."""

    k: torch.Tensor  # [B, K, S, D]
    v: torch.Tensor
    rows: torch.Tensor  # [b]

    def put(self, k, v, pos):
        """k, v [b, K, T, D] at pos [b, T]. A prompt (T > 1) attends to itself, a single token to the whole cache."""
        rows = self.rows[:, None]
        self.k[rows, :, pos] = k.transpose(1, 2)
        self.v[rows, :, pos] = v.transpose(1, 2)
        if k.shape[2] == 1:
            return self.k, self.v
        return k, v


def new_caches(model, B, S):
    """One empty Cache a block, for B rows of S positions."""
    dtype = model.norm.out_dtype or model.stream_dtype or model.embed_tokens.weight.dtype
    device = model.lm_head.weight.device
    K = model.cfg.num_key_value_heads
    new = partial(torch.zeros, B, K, S, model.cfg.head_dim, dtype=dtype, device=device)
    return [Cache(new(), new(), torch.arange(B, device=device)) for _ in model.layers]


# --- the model ---


class Llama(nn.Module):
    def __init__(self, cfg, attn="flash", stream_dtype=None, product_dtype=None, longest=None):
        """attn: naive, or flash (cudnn is flash by another kernel). stream_dtype: of the residual stream; None: as the
        embedding is stored. product_dtype: of what norms give out; None: the stream's. longest: the most tokens of a
        document in a packed row; None: the model's window."""
        super().__init__()
        C = cfg.hidden_size
        longest = longest or cfg.max_position_embeddings
        self.cfg = cfg
        self.attn = attn
        self.stream_dtype = stream_dtype
        self.embed_tokens = nn.Embedding(cfg.vocab_size, C)
        self.layers = nn.ModuleList(
            Block(cfg, attn, longest, product_dtype) for _ in range(cfg.num_hidden_layers)
        )
        self.norm = RMSNorm(C, cfg.rms_norm_eps, product_dtype)
        self.lm_head = nn.Linear(C, cfg.vocab_size, bias=False)
        self.register_buffer("frequencies", rope_frequencies(cfg), persistent=False)

    def forward(self, ids, pos=None, caches=None, cu_seqlens=None):
        """ids [B, T], pos [B, T] (None: 0, 1, 2 … in each row), caches one a block. -> [B, T, C] after the last norm.

        With caches, T > 1 is a prompt that starts at position 0 and T = 1 the next token of each row. cu_seqlens
        [docs + 1], int32: the one row is documents end to end; positions begin anew, attention stays in a document."""
        x = self.embed(ids)
        t = torch.arange(ids.shape[1], device=ids.device)
        mask = None
        documents = None
        if cu_seqlens is not None:
            documents = Documents(cu_seqlens)
            pos = documents.positions(t)
            if not takes_documents(x.device, x.dtype, self.attn, self.cfg.head_dim):
                mask = documents.mask(t)
                documents = None
        elif pos is None:
            pos = t[None]
        elif caches is not None and ids.shape[1] == 1:
            slots = torch.arange(caches[0].k.shape[2], device=ids.device)
            mask = (slots <= pos[:, :, None])[:, None]  # [B, 1, 1, S]
        angle = pos[:, None, :, None] * self.frequencies  # [B or 1, 1, T, D/2]
        cos = angle.cos()
        sin = angle.sin()
        for i, block in enumerate(self.layers):
            cache = None if caches is None else caches[i]
            x = block(x, cos, sin, cache, pos, mask, documents)
        return self.norm(x)

    def embed(self, ids):
        """ids [B, T] -> [B, T, C] on the device of ids; the embedding may be in host memory."""
        x = self.embed_tokens(ids.to(self.embed_tokens.weight.device))
        x = x.to(ids.device, self.stream_dtype or x.dtype)
        if torch.is_grad_enabled() and not x.requires_grad:
            # The first block's input then is of the same kind as the others', and shares their compiled graph.
            x.requires_grad_()
        return x


def places(model, halves):
    """Where the blocks of a model stand, or their halves: [(parent module, name in it)], in the order of forward.

    speed/ wraps what stands there and puts the wrapper in the same place."""
    if not halves:
        return [(model.layers, str(i)) for i in range(len(model.layers))]
    return [(block, half) for block in model.layers for half in ("self_attn", "mlp")]


def size(model):
    """How many weights it has; a tied head counts once."""
    return sum(p.numel() for p in model.parameters())


def takes_packed(model, device):
    """Whether this model's packed rows go through varlen attention on this device."""
    dtype = model.stream_dtype or torch.float32
    return takes_documents(device, dtype, model.attn, model.cfg.head_dim)


def logits(model, h):
    """h [..., C] -> [..., V]. On a GPU in fp32: bf16 rounds what is above 16 to eighths, and the two best to a tie."""
    W = model.lm_head.weight.to(h.dtype)
    if h.is_cuda and h.dtype != torch.float32:
        flat = h.reshape(-1, h.shape[-1])
        return torch.mm(flat, W.t(), out_dtype=torch.float32).view(*h.shape[:-1], -1)
    return F.linear(h, W)


# --- loading: one weight from its shard to its place ---


def plain_linear(name, tensor):
    """The default make_linear: a trainable nn.Linear that owns the tensor."""
    layer = nn.Linear(*tensor.shape[::-1], bias=False, device="meta")
    layer.weight = nn.Parameter(tensor)
    return layer


def load(folder, device="cpu", dtype=None, make_linear=plain_linear, **how):
    """A Llama with the weights of a folder; how: further arguments of Llama.

    Each tensor goes from its shard to the device and dtype (None: as stored), becomes what make_linear(name, tensor)
    makes of it, and is forgotten: the peak is the finished model and one tensor. files/weights.py sees to it that
    every tensor of the checkpoint is used once and every parameter filled once."""
    with torch.device("meta"):
        model = Llama(read_config(folder), **how)
    model.frequencies = rope_frequencies(model.cfg).to(device)
    tied = model.cfg.tie_word_embeddings
    ours = {weights.hf_name(name): name for name, _ in model.named_parameters()}
    shapes = {weights.hf_name(name): p.shape for name, p in model.named_parameters()}
    if tied:
        del shapes["lm_head.weight"]
    for name, tensor in weights.read(folder, shapes, device):
        place(model, ours[name], tensor.to(dtype or tensor.dtype), make_linear)
    if tied:
        model.lm_head.weight = model.embed_tokens.weight
    return model


def place(model, name, tensor, make_linear):
    """Put one tensor where it belongs. A block's linear layer is replaced by make_linear's; its bias stays."""
    path, _, leaf = name.rpartition(".")
    layer = model.get_submodule(path)
    if leaf != "weight" or not path.endswith("_proj"):
        setattr(layer, leaf, nn.Parameter(tensor))
        return
    half, _, child = path.rpartition(".")
    new = make_linear(path, tensor)
    new.bias = layer.bias
    setattr(model.get_submodule(half), child, new)
