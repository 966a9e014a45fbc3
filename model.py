"""A Llama-3-architecture model in plain PyTorch: Llama 2 / 3 / 3.1 / 3.2, SmolLM2, TinyLlama, Mistral without window.

    model = load(folder, device="cuda", dtype=torch.bfloat16)
    h = model(ids)                                  # [B, T] token ids -> [B, T, C] after the last norm
    loss = sum_loss(h, model.lm_head.weight, where, targets)

The names of the dimensions, once: B batch, T time, C hidden size, H query heads, K key/value heads, D head size,
F width of the MLP, V vocabulary, S slots of the KV cache, N target tokens.
Frozen layers come from outside through `make_linear` and a group of layers that share an input is called through
`block.project`: that is all that LoRA, quantisation and fp8 need, so none of them is in this file.
"""

import inspect
import json
import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.attention.varlen import varlen_attn

from cli import UserError


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


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


def read_config(folder):
    """ModelConfig of a Hugging Face folder. What this file cannot reproduce is refused by name."""
    path = Path(folder) / "config.json"
    try:
        c = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"{path} cannot be read ({e}); a model folder needs config.json.") from None
    kind = (c.get("architectures") or ["?"])[0]
    if kind not in ("LlamaForCausalLM", "MistralForCausalLM"):
        raise UserError(
            f"{path}: {kind} is no Llama-architecture model (LlamaForCausalLM or MistralForCausalLM)."
        )
    rope = dict(
        c.get("rope_parameters") or c.get("rope_scaling") or {}
    )  # transformers 5, transformers 4
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    refused = {
        f"rope type {rope['rope_type']!r}": rope["rope_type"]
        not in ("default", "linear", "llama3"),
        "sliding_window": bool(c.get("sliding_window")),
        f"hidden_act {c.get('hidden_act')!r}": c.get("hidden_act", "silu") != "silu",
        "partial_rotary_factor": rope.get(
            "partial_rotary_factor", c.get("partial_rotary_factor") or 1
        )
        != 1,
        "quantization_config (weights stored in another format)": bool(
            c.get("quantization_config")
        ),
    }
    if what := next(filter(refused.get, refused), None):
        raise UserError(f"{path}: {what} is not supported; use a checkpoint without it.")
    if size := next((s for s in SIZES if not isinstance(c.get(s), int) or c[s] < 1), None):
        raise UserError(f"{path}: {size} is {c.get(size)!r}, where a number is wanted.")
    heads = c["num_attention_heads"]
    try:
        cfg = ModelConfig(
            **{size: c[size] for size in SIZES},
            num_key_value_heads=c.get("num_key_value_heads") or heads,
            rms_norm_eps=c.get("rms_norm_eps", 1e-6),
            head_dim=c.get("head_dim") or c["hidden_size"] // heads,
            rope_scaling=rope,
            max_position_embeddings=c.get("max_position_embeddings", 2048),
            rope_theta=rope.get("rope_theta") or c.get("rope_theta") or 10000.0,
            **{
                flag: c.get(flag, False)
                for flag in ("tie_word_embeddings", "attention_bias", "mlp_bias")
            },
        )
        rope_frequencies(cfg)
    except (KeyError, TypeError, ZeroDivisionError) as e:
        raise UserError(f"{path}: a value is missing or makes no sense ({e!r}).") from None
    if heads % cfg.num_key_value_heads:
        raise UserError(
            f"{path}: {heads} heads cannot be shared out over {cfg.num_key_value_heads} key/value heads."
        )
    return cfg


# --- the parts of a block ---


class RMSNorm(nn.Module):
    dtype = None  # of what comes out, and so of the products; None: of what goes in

    def __init__(self, C, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(C)), eps

    def forward(self, x):
        x32, dtype = (
            x.float(),
            self.dtype or x.dtype,
        )  # the mean of squares overflows fp16 and loses digits in bf16
        return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)).to(
            dtype
        ) * self.weight.to(dtype)


def rope_frequencies(cfg):
    """Angle per position of each of the D/2 pairs, [D/2] fp32. Llama 3.1 (`apply_scaling` in its code) slows the pairs
    whose wavelength is near or beyond the length it was first trained on, and leaves the quick ones alone."""
    D, s = cfg.head_dim, cfg.rope_scaling
    freq = 1.0 / cfg.rope_theta ** (torch.arange(0, D, 2, dtype=torch.float32, device="cpu") / D)
    if s["rope_type"] == "llama3":
        turns = (
            s["original_max_position_embeddings"] * freq / (2 * math.pi)
        )  # turns within the first training's length
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(
            0, 1
        )  # 1: quick, as it was; 0: slow, divided by the factor
        return keep * freq + (1 - keep) * freq / s["factor"]
    return freq / s["factor"] if s["rope_type"] == "linear" else freq


def rotate(x, cos, sin):
    """RoPE on x [B, h, T, D] with cos and sin [B or 1, 1, T, D/2]: the pairs are (i, i + D/2), as in Hugging Face's."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def takes_packed(device, dtype, flash, D):
    """Whether varlen attention does; elsewhere a packed row is masked, and what is masked is computed."""
    fits = flash and device.type == "cuda" and dtype.itemsize == 2 and D % 8 == 0 and D <= 256
    return fits and torch.cuda.get_device_capability() >= (8, 0)


GROUPED = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)  # torch 2.12 on


def attention(q, k, v, mask, flash, longest=None):
    """q [B, H, T, D], k and v [B, K, S, D]. -> [B, H, T, D]. mask: a bool [B, 1, T, S]; the cu_seqlens of a packed row
    (B = 1; none is longer than `longest`); or None: causal, and as padding is on the right no real token sees it."""
    (B, H, T, D), K = q.shape, k.shape[1]
    if (
        T == 1 and K < H and mask is not None
    ):  # one new token: the queries that share a key are rows of one product
        return attention(q.view(B, K, H // K, D), k, v, mask, False).view(B, H, T, D)
    packed = mask is not None and mask.dim() == 1
    grouped = (
        GROUPED
        if packed
        else flash and not (q.is_cuda and (mask is not None or q.dtype == torch.float32))
    )
    if (
        not grouped and K < H
    ):  # [k1, k2] -> [k1, k1, k2, k2]: the kernel would take the first with equal heads only
        k, v = (x.repeat_interleave(H // K, dim=1) for x in (k, v))
    if packed:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [T, H or K, D]
        return varlen_attn(
            q, k, v, mask, mask, longest, longest, window_size=(-1, 0), **GROUPED
        ).transpose(0, 1)[None]
    if flash:  # never holds the [T, S] scores (Dao et al. 2022)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
        )
    scores = q @ k.mT / math.sqrt(q.shape[-1])  # [B, H, T, S]
    keep = (
        torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if mask is None
        else mask
    )
    return scores.masked_fill(~keep, float("-inf")).softmax(-1) @ v


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, cfg, flash):
        super().__init__()
        C, width, H, K = (
            cfg.hidden_size,
            cfg.intermediate_size,
            cfg.num_attention_heads,
            cfg.num_key_value_heads,
        )
        self.flash, self.longest, self.D = flash, cfg.max_position_embeddings, (D := cfg.head_dim)
        self.project = lambda h, layers: [layer(h) for layer in layers]  # lora.py sets its own here
        self.input_layernorm = RMSNorm(C, cfg.rms_norm_eps)
        self.q_proj = nn.Linear(C, H * D, bias=cfg.attention_bias)
        self.k_proj = nn.Linear(C, K * D, bias=cfg.attention_bias)
        self.v_proj = nn.Linear(C, K * D, bias=cfg.attention_bias)
        self.o_proj = nn.Linear(H * D, C, bias=cfg.attention_bias)
        self.post_attention_layernorm = RMSNorm(C, cfg.rms_norm_eps)
        self.gate_proj = nn.Linear(C, width, bias=cfg.mlp_bias)
        self.up_proj = nn.Linear(C, width, bias=cfg.mlp_bias)
        self.down_proj = nn.Linear(width, C, bias=cfg.mlp_bias)

    def forward(self, x, *args):
        return self.mlp(self.attend(x, *args))

    def attend(self, x, cos, sin, cache=None, pos=None, mask=None):
        B, T, _ = x.shape
        h = self.input_layernorm(x)
        q, k, v = self.project(h, [self.q_proj, self.k_proj, self.v_proj])
        q, k, v = (y.view(B, T, -1, self.D).transpose(1, 2) for y in (q, k, v))  # [B, H or K, T, D]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.put(k, v, pos)
        y = (
            attention(q, k, v, mask, self.flash, self.longest).transpose(1, 2).reshape(B, T, -1)
        )  # [B, T, H * D]
        return x + self.project(y, [self.o_proj])[0]

    def mlp(self, x, *_):
        h = self.post_attention_layernorm(x)
        gate, up = self.project(h, [self.gate_proj, self.up_proj])
        return x + self.project(F.silu(gate) * up, [self.down_proj])[0]


@dataclass
class Cache:
    """Keys and values of one block, allocated once, of which `rows` are written, each at its own positions. So rows of
    different lengths share a batch: what padding left in a row is overwritten before the row's mask reaches it."""

    k: torch.Tensor  # [B, K, S, D]
    v: torch.Tensor
    rows: torch.Tensor  # [b]

    def put(self, k, v, pos):
        """k, v [b, K, T, D] at pos [b, T]. A prompt (T > 1) attends to itself, a single token to the whole cache."""
        rows = self.rows[:, None]
        self.k[rows, :, pos], self.v[rows, :, pos] = k.transpose(1, 2), v.transpose(1, 2)
        return (self.k, self.v) if k.shape[2] == 1 else (k, v)


def new_caches(model, B, S):
    dtype, device = (
        model.norm.dtype or model.dtype or model.embed_tokens.weight.dtype,
        model.lm_head.weight.device,
    )
    new = partial(
        torch.zeros,
        B,
        model.cfg.num_key_value_heads,
        S,
        model.cfg.head_dim,
        dtype=dtype,
        device=device,
    )
    return [Cache(new(), new(), torch.arange(B, device=device)) for _ in model.layers]


class Llama(nn.Module):
    def __init__(self, cfg, flash=True):
        super().__init__()
        self.cfg = cfg
        self.dtype = None  # of the residual stream; None: as the embedding is stored
        self.around = lambda block, *args: block(
            *args
        )  # how a block is called: train.py puts checkpointing here
        self.halves = (
            False  # whether it is called in two parts, so that both of its inputs can be kept
        )
        self.loss_chunk = loss_chunk  # for sum_loss
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Block(cfg, flash) for _ in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        self.register_buffer("frequencies", rope_frequencies(cfg), persistent=False)

    def forward(self, ids, pos=None, caches=None, cu_seqlens=None):
        """ids [B, T], pos [B, T] (None: 0, 1, 2 … in each row), caches one a block. -> [B, T, C] after the last norm.

        With caches, T > 1 is a prompt that starts at position 0 and T = 1 the next token of each row. cu_seqlens
        [docs + 1], int32: the one row is documents end to end; positions begin anew, attention stays in a document."""
        x = self.embed_tokens(
            ids.to(self.embed_tokens.weight.device)
        )  # which may be in host memory
        x = x.to(ids.device, self.dtype or x.dtype)
        if torch.is_grad_enabled() and not x.requires_grad:
            x.requires_grad_()  # every block's input is then of one kind: the first shares the others' compiled graph
        mask, t = None, torch.arange(ids.shape[1], device=ids.device)
        if cu_seqlens is not None:
            doc = (
                torch.searchsorted(cu_seqlens, t, right=True, out_int32=True) - 1
            )  # [T], the document of each token
            mask, pos = cu_seqlens, (t - cu_seqlens[doc])[None]
            if not takes_packed(x.device, x.dtype, self.layers[0].flash, self.cfg.head_dim):
                mask = ((doc[:, None] == doc) & (t[:, None] >= t))[None, None]  # [1, 1, T, T]
        elif pos is None:
            pos = t[None]
        elif caches is not None and ids.shape[1] == 1:
            mask = (torch.arange(caches[0].k.shape[2], device=ids.device) <= pos[:, :, None])[
                :, None
            ]  # [B, 1, 1, S]
        angle = pos[:, None, :, None] * self.frequencies  # [B or 1, 1, T, D/2]
        cos, sin = angle.cos(), angle.sin()
        for i, block in enumerate(self.layers):
            for part in (block.attend, block.mlp) if self.halves else (block,):
                x = self.around(part, x, cos, sin, caches and caches[i], pos, mask)
        return self.norm(x)


# --- the loss ---
def loss_chunk(h, W, targets, scale):
    """(sum of the cross-entropies of h [rows, C], scale * their gradient by the logits [rows, V] in h's dtype). The
    scale goes in while the numbers are fp32: an fp16 gradient of one token among thousands would be cast to 0. A target
    of -1 is none: it fills rows up to a fixed number."""
    z = (h @ W.t()).float()  # [rows, V]
    lse = z.logsumexp(-1, keepdim=True)
    keep = (targets >= 0).float()[:, None]
    loss = (lse - z.gather(-1, targets.clamp(min=0)[:, None])).mul(keep).sum()
    right = torch.arange(W.shape[0], device=W.device) == targets[:, None]
    return loss, z.sub_(lse).exp_().sub_(right.float()).mul_(keep * scale).to(h.dtype)


class ChunkedLoss(torch.autograd.Function):
    """Sum of cross-entropies without the [N, V] logits: chunk by chunk, each with its gradient at once, then forgotten.
    At 8,192 tokens and Llama-3's vocabulary logits and gradient would be 8 GB in fp32; this holds `rows` of them.
    A frozen head (all but --lora_r 0) gets no gradient. The idea: Liger's fused linear loss, Cut Cross-Entropy."""

    @staticmethod
    def forward(ctx, h, weight, targets, scale, chunk):
        want_h, want_w, *_ = ctx.needs_input_grad
        W, total = weight.detach().to(h.dtype), torch.zeros((), device=h.device)
        scale = scale if isinstance(scale, torch.Tensor) else torch.full_like(total, scale)
        rows = max(
            1, 2**26 // W.shape[0] // 64 * 64
        )  # 256 MB of fp32 logits, in whole tiles of a matmul
        dh = torch.empty_like(h) if want_h else None
        dW = torch.zeros_like(weight, dtype=torch.float32) if want_w else None
        for i in range(0, h.shape[0], rows):
            hc = h[i : i + rows].detach()
            loss, dz = chunk(hc, W, targets[i : i + rows], scale)
            total += loss
            if want_h:
                torch.mm(dz, W, out=dh[i : i + rows])
            if want_w:
                dW += (dz.t() @ hc).float()
        ctx.save_for_backward(dh, dW)
        return total * scale

    @staticmethod
    def backward(ctx, grad):
        dh, dW = ctx.saved_tensors
        return (
            dh if dh is None else dh * grad.to(dh.dtype),
            dW if dW is None else dW * grad,
            None,
            None,
            None,
        )


def sum_loss(h, weight, where, targets, scale=1.0, fused=True, chunk=loss_chunk):
    """scale * sum of the cross-entropies. h [B, T, C] from the model, weight [V, C] of the head, where [N] = b * T + t
    of the positions that predict a target, targets [N] the ids; scale divides by the target tokens of a whole step."""
    h = h.flatten(0, 1)[where]  # [N, C]: the head is not asked about padding or prompts
    if fused:
        return ChunkedLoss.apply(
            h, weight if torch.is_grad_enabled() else weight.detach(), targets, scale, chunk
        )
    return (
        F.cross_entropy(
            F.linear(h, weight.to(h.dtype)).float(), targets, ignore_index=-1, reduction="sum"
        )
        * scale
    )


def logits(model, h):
    """h [..., C] -> [..., V]. On a GPU in fp32: bf16 rounds what is above 16 to eighths, and the two best to a tie."""
    W = model.lm_head.weight.to(h.dtype)
    if h.is_cuda and h.dtype != torch.float32:
        return torch.mm(h.reshape(-1, h.shape[-1]), W.t(), out_dtype=torch.float32).view(
            *h.shape[:-1], -1
        )
    return F.linear(h, W)


# --- loading ---
def plain_linear(name, tensor):
    """The default make_linear: a trainable nn.Linear that owns the tensor."""
    layer = nn.Linear(*tensor.shape[::-1], bias=False, device="meta")
    layer.weight = nn.Parameter(tensor)
    return layer


def hf_name(name):
    """A parameter's name in a Hugging Face checkpoint: layers.0.q_proj -> model.layers.0.self_attn.q_proj."""
    name = re.sub(
        r"([qkvo]_proj)", r"self_attn.\1", re.sub(r"((?:gate|up|down)_proj)", r"mlp.\1", name)
    )
    return name if name.startswith("lm_head") else f"model.{name}"


def shards(folder):
    """The safetensors files of a folder, by its index if it has one."""
    folder, index = Path(folder), Path(folder) / "model.safetensors.index.json"
    try:
        names = (
            json.loads(index.read_bytes())["weight_map"].values()
            if index.exists()
            else ["model.safetensors"]
        )
        files = [folder / name for name in sorted(set(names))]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{index} cannot be read ({e!r}); fetch it again.") from None
    for f in files:
        if not f.exists():
            raise UserError(
                f"{folder} lacks {f.name}: fetch the missing file (only safetensors and .gguf are read)."
            )
    return files


def load(folder, device="cpu", dtype=None, make_linear=plain_linear, flash=True):
    """A Llama with the weights of a folder. Each tensor goes from its shard to the device and dtype (None: as stored),
    becomes what make_linear(name, tensor) makes of it, and is forgotten: the peak is the finished model and one tensor.

    Loud: every tensor of the checkpoint is used once, every parameter filled once, every shape checked."""
    with torch.device("meta"):
        model = Llama(read_config(folder), flash)
    model.frequencies = rope_frequencies(model.cfg).to(device)
    wanted = {
        hf_name(name): (name, p.shape)
        for name, p in model.named_parameters()
        if name != "lm_head.weight" or not model.cfg.tie_word_embeddings
    }
    for file in shards(folder):
        try:
            with safe_open(file, framework="pt", device=str(device)) as tensors:
                for hf in tensors.offset_keys():
                    if (
                        hf.endswith("rotary_emb.inv_freq")
                        or hf == "lm_head.weight"
                        and model.cfg.tie_word_embeddings
                    ):
                        continue  # old checkpoints store the one, some store a tied head a second time
                    if hf not in wanted:
                        raise UserError(
                            f"{file}: {hf} has no place in config.json's model, or is there twice."
                        )
                    name, shape = wanted.pop(hf)
                    tensor = tensors.get_tensor(hf)
                    if tensor.shape != shape:
                        raise UserError(
                            f"{file}: {hf} has shape {list(tensor.shape)}, config.json says {list(shape)}."
                        )
                    place(model, name, tensor.to(dtype or tensor.dtype), make_linear)
        except (SafetensorError, OSError) as e:
            raise UserError(
                f"{file} cannot be read ({e}): cut off or damaged; fetch it again."
            ) from None
    if wanted:
        raise UserError(
            f"{folder} lacks {len(wanted)} tensor(s), the first is {next(iter(wanted))}."
        )
    if model.cfg.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model


def place(model, name, tensor, make_linear):
    """Put one tensor where it belongs. A block's linear layer is replaced by make_linear's; its bias stays."""
    path, _, leaf = name.rpartition(".")
    (parent, _, child), layer = path.rpartition("."), model.get_submodule(path)
    if leaf == "weight" and child.endswith("_proj"):
        setattr(model.get_submodule(parent), child, new := make_linear(path, tensor))
        new.bias = layer.bias
    else:
        setattr(layer, leaf, nn.Parameter(tensor))
