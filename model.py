"""A Llama-3-architecture model in plain PyTorch: Llama 2 / 3 / 3.1 / 3.2, SmolLM2, TinyLlama, Mistral without window.

    model = load(folder, device="cuda", dtype=torch.bfloat16)
    h = model(ids)                                  # [B, T] token ids -> [B, T, C] after the last norm

The names of the dimensions, once: B batch, T time, C hidden size, H query heads, K key/value heads, D head size,
F width of the MLP, V vocabulary, S slots of the KV cache.

Other files change the model in two ways only, and LoRA, quantisation and fp8 need no other:

    make_linear(name, tensor)   an argument of `load`: makes the layer of each weight, for example one in NF4
    project(h, layers)          an attribute of each half of a block: calls the layers that share the input h
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from files import model_config, weights


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


def read_config(folder):
    """The ModelConfig of a Hugging Face folder. A UserError names each setting that this file cannot reproduce."""
    return ModelConfig(**model_config.read(folder))


# --- norm and positions ---


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight (Zhang & Sennrich 2019)."""

    def __init__(self, C, eps, out_dtype=None):
        """out_dtype: the dtype of the output, and so of the matmuls behind the norm; None: the input's dtype."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))
        self.eps = eps
        self.out_dtype = out_dtype

    def forward(self, x):
        dtype = self.out_dtype or x.dtype
        # Square in fp32, because the mean of squares overflows fp16 and loses digits in bf16.
        x32 = x.float()
        scale = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return (x32 * scale).to(dtype) * self.weight.to(dtype)


def rope_frequencies(cfg):
    """The angle in radians by which each pair turns from one position to the next, [D/2] fp32 (RoPE, Su et al. 2021).

    A pair is two of the D numbers of a head. Pair 0 turns by 1 radian a position, later pairs turn ever more slowly.
    Llama 3.1 (`apply_scaling` in its code) was first trained on 8,192 positions. Pairs that turn fewer than 4 times in
    these are slowed down. Quicker pairs keep their angle."""
    D = cfg.head_dim
    scaling = cfg.rope_scaling
    pairs = torch.arange(0, D, 2, dtype=torch.float32, device="cpu")
    freq = 1.0 / cfg.rope_theta ** (pairs / D)
    if scaling["rope_type"] == "linear":
        return freq / scaling["factor"]
    if scaling["rope_type"] == "llama3":
        # How many full turns a pair makes within the length of the first training.
        turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)
        low = scaling["low_freq_factor"]
        high = scaling["high_freq_factor"]
        # 1: a quick pair, whose angle stays. 0: a slow pair, whose angle is divided by the factor.
        quick = ((turns - low) / (high - low)).clamp(0, 1)
        return quick * freq + (1 - quick) * freq / scaling["factor"]
    return freq


def rotate(x, cos, sin):
    """RoPE on x [B, H or K, T, D] with cos and sin [B or 1, 1, T, D/2].

    The pairs are (i, i + D/2), as in Hugging Face's weights: 4 numbers have the pairs (0, 2) and (1, 3)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


# --- attention: who sees whom, and four ways to compute it ---


class Documents(NamedTuple):
    """A packed row: documents (here recipes) end to end. A token sees the earlier tokens of its own document only.

        tokens       a0 a1 a2 b0 b1 b2 b3
        document      0  0  0  1  1  1  1
        position      0  1  2  0  1  2  3
        cu_seqlens   [0, 3, 7]

    The name cu_seqlens (cumulative sequence lengths) is that of flash attention's own argument."""

    # [docs + 1] int32: where each document begins, and where the last one ends
    cu_seqlens: torch.Tensor

    def document_of(self, t):
        """The number of the document at each position t [T]."""
        return torch.searchsorted(self.cu_seqlens, t, right=True, out_int32=True) - 1

    def positions(self, t):
        """The position of each token in its own document, from 0. t [T] -> [1, T]"""
        return (t - self.cu_seqlens[self.document_of(t)])[None]

    def mask(self, t):
        """True where a token (third dimension) sees another one (fourth). t [T] -> [1, 1, T, T]

        Used where varlen attention does not run: scores between documents are computed, then masked."""
        document = self.document_of(t)
        same = document[:, None] == document
        return (same & (t[:, None] >= t))[None, None]


def takes_documents(device, dtype, attn, D):
    """Whether varlen attention runs: on CUDA from Ampere on, in 16 bits, for head sizes that its kernel has.

    Elsewhere a packed row is masked."""
    if attn == "naive" or device.type != "cuda":
        return False
    fits = dtype.itemsize == 2 and D % 8 == 0 and D <= 256
    return fits and torch.cuda.get_device_capability() >= (8, 0)


def attention(q, k, v, mask, documents, attn, longest):
    """q [B, H, T, D], k and v [B, K, S, D] -> [B, H, T, D], in one of four ways:

        varlen_attention      a packed row, on a GPU that has the kernel
        one_token_attention   sampling: one new token a row, against the KV cache
        naive_attention       --attn naive
        flash_attention       everything else

    mask: bool [B, 1, T, S], or None: causal. Padding stands on the right, so no real token sees padding.
    documents: the Documents of a packed row (B = 1), each of `longest` tokens or fewer; None: not packed or masked.

    Why flash: naive attention holds the scores of every pair of tokens. For one block of Llama-3-8B, in bf16:

        32 rows of 256 tokens    32 rows * 32 heads * 256 * 256 * 2 bytes = 134 MB
        1 row of 4,096 tokens             32 heads * 4096 * 4096 * 2 bytes = 1.07 GB

    Naive attention keeps the softmax of these scores, as many bytes, for backward: 4.3 GB or 34 GB in 32 blocks without
    --grad_ckpt.
    Flash attention computes the scores tile by tile and never holds them (Dao et al. 2022). Flash keeps one fp32
    number a head and token for backward, the logsumexp: 8,192 tokens * 32 heads * 4 bytes = 1 MB a block.
    Cost: flash computes each tile of scores again in backward. The sums differ from naive ones in the last bits. Cards
    before Ampere have no flash kernel for grouped heads, so PyTorch holds the scores there.
    Proof: test_naive_and_flash_attention_give_the_same_loss_and_gradients (tests/test_model.py), and
    test_attn_naive_holds_the_scores_and_flash_does_not (tests/test_witness.py)."""
    if documents is not None:
        return varlen_attention(q, k, v, documents, longest)
    if q.shape[2] == 1 and mask is not None and k.shape[1] < q.shape[1]:
        return one_token_attention(q, k, v, mask)
    if attn == "naive":
        return naive_attention(q, k, v, mask)
    return flash_attention(q, k, v, mask)


def varlen_attention(q, k, v, documents, longest):
    """Flash attention inside each document of a packed row.

    Why: scores between documents are never computed. 16 recipes of 256 tokens fill a row of 4,096: 16 * 256 * 256
    scores a head in place of 4096 * 4096, which is a sixteenth.
    Cost: the kernel runs on CUDA from Ampere on, and in 16 bits. Elsewhere a mask keeps recipes apart, saving nothing.
    Proof: test_losses_of_packed_recipes_are_those_of_padded_ones (tests/test_gpu.py) on a GPU, and with the mask
    test_a_neighbours_tokens_do_not_change_a_packed_recipe_at_all (tests/test_train.py)."""
    # This import brings the compiler along, which takes 2 s, so only those pay who pack.
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11: varlen_attn wants as many key heads as query heads, so k and v are repeated. From 2.12 on enable_gqa
    # does without. test_gradients_of_a_packed_row (tests/test_gpu.py) passes without the repetition then.
    grouped = {}
    if torch.__version__ >= (2, 12):
        grouped["enable_gqa"] = True
    else:
        k = repeat_heads(k, q.shape[1])
        v = repeat_heads(v, q.shape[1])
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [T, H or K, D]
    cu = documents.cu_seqlens
    y = varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(-1, 0), **grouped)
    return y.transpose(0, 1)[None]


def one_token_attention(q, k, v, mask):
    """Sampling's attention: one new token a row, q [B, H, 1, D], against the whole cache, k and v [B, K, S, D].

    The scores [B, H, 1, S] are small, 2 MB a block for 32 rows of 1,024 tokens at 8B: holding them costs nothing. What
    takes time is reading the cache.
    8B has H / K = 4 queries for each key: as 4 rows of one product these read the key once. Repeating the keys for
    flash attention would write 4 copies first: for these rows 17 GB a step, beside a cache of 4.3 GB.
    The mask hides the slots that a row has not written yet, because rows of different lengths share the cache.
    Proof: test_cached_steps_equal_the_full_forward (tests/test_model.py)."""
    B, H, _, D = q.shape
    K = k.shape[1]
    rows = q.view(B, K, H // K, D)
    return naive_attention(rows, k, v, mask).view(B, H, 1, D)


def flash_attention(q, k, v, mask):
    """Attention without the scores in memory: why, cost and proof stand at `attention`."""
    # Repeat k and v for a mask or fp32, because CUDA's kernels for these want as many key as query heads.
    grouped = not (q.is_cuda and (mask is not None or q.dtype == torch.float32))
    if not grouped:
        k = repeat_heads(k, q.shape[1])
        v = repeat_heads(v, q.shape[1])
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)


def naive_attention(q, k, v, mask):
    """Attention in plain lines, for reading and for comparison: the scores of all pairs are held."""
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
    """The default of `project`: call each of the layers that share the input h. -> a list of their outputs"""
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
        # lora.py and quant.py replace this function by their own.
        self.project = call_each
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
    """Two halves, each with its norm and its residual sum: attention, then MLP."""

    def __init__(self, cfg, attn, longest, product_dtype):
        super().__init__()
        self.self_attn = Attention(cfg, attn, longest, product_dtype)
        self.mlp = MLP(cfg, product_dtype)

    def forward(self, x, *attention_arguments):
        """attention_arguments: cos, sin, cache, pos, mask, documents, as in Attention.forward."""
        return self.mlp(self.self_attn(x, *attention_arguments))


# --- the KV cache: keys and values of earlier tokens, for sampling ---


@dataclass
class Cache:
    """The keys and values of one block, allocated once. Each row writes at its own positions.

    Rows of different lengths therefore share a batch: a row of 3 tokens in a prompt batch of width 5 writes slots 0 to
    4. The mask of its next token covers slots 0 to 3, and slot 3 is written first: padding is never seen.
    Size at 8B in bf16: 2 * 8 heads * 128 * 2 bytes = 4 kB a token and block, 131 kB a token in all 32 blocks."""

    k: torch.Tensor  # [B, K, S, D]
    v: torch.Tensor  # [B, K, S, D]
    rows: torch.Tensor  # [b]: the rows that the next call of `put` writes

    def put(self, k, v, pos):
        """Write k and v [b, K, T, D] at the positions pos [b, T]. -> the k and v to attend to

        A prompt (T > 1) attends to itself only, a single token to the whole cache."""
        rows = self.rows[:, None]
        self.k[rows, :, pos] = k.transpose(1, 2)
        self.v[rows, :, pos] = v.transpose(1, 2)
        if k.shape[2] == 1:
            return self.k, self.v
        return k, v


def product_dtype(model):
    """The dtype of the products, and of keys and values."""
    return model.norm.out_dtype or model.stream_dtype or model.embed_tokens.weight.dtype


def new_caches(model, B, S):
    """A list of empty Caches, one a block, for B rows of S positions."""
    device = model.lm_head.weight.device
    shape = [B, model.cfg.num_key_value_heads, S, model.cfg.head_dim]
    new = partial(torch.zeros, shape, dtype=product_dtype(model), device=device)
    return [Cache(new(), new(), torch.arange(B, device=device)) for _ in model.layers]


# --- the model ---


class Llama(nn.Module):
    def __init__(self, cfg, attn="flash", stream_dtype=None, product_dtype=None, longest=None):
        """attn: "naive", or "flash" ("cudnn" is flash by another kernel, see speed/precision.py).
        stream_dtype: the dtype of the residual stream; None: the embedding's.
        product_dtype: the dtype of the norms' outputs, and so of the matmuls behind them; None: the stream's.
        longest: the most tokens of a document in a packed row; None: the model's window."""
        super().__init__()
        C = cfg.hidden_size
        longest = longest or cfg.max_position_embeddings
        self.cfg = cfg
        self.attn = attn
        self.stream_dtype = stream_dtype
        # nn.Embedding(V, C) would draw random numbers on the meta device, and for that import the compiler: 2 to 6 s.
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.empty(cfg.vocab_size, C), freeze=False
        )
        self.layers = nn.ModuleList(
            Block(cfg, attn, longest, product_dtype) for _ in range(cfg.num_hidden_layers)
        )
        self.norm = RMSNorm(C, cfg.rms_norm_eps, product_dtype)
        self.lm_head = nn.Linear(C, cfg.vocab_size, bias=False)
        self.register_buffer("frequencies", rope_frequencies(cfg), persistent=False)

    def forward(self, ids, pos=None, caches=None, cu_seqlens=None):
        """ids [B, T] -> [B, T, C] after the last norm. Three uses:

        training   ids alone: causal attention in each row, positions 0, 1, 2, …
        packed     cu_seqlens [docs + 1] int32: the one row is Documents, which see nothing of each other
        sampling   pos [B, T] and caches (one a block): T > 1: a prompt from position 0 on; T = 1: each row's next token
        """
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
        elif caches is not None and len(t) == 1:
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
        """ids [B, T] -> [B, T, C] on the device of ids; --offload_embed keeps the embedding itself on the host."""
        x = self.embed_tokens(ids.to(self.embed_tokens.weight.device))
        x = x.to(ids.device, self.stream_dtype or x.dtype)
        if torch.is_grad_enabled() and not x.requires_grad:
            # The first block's input requires a gradient like the others', so that all blocks share a compiled graph.
            x.requires_grad_()
        return x


def places(model, numbers, halves=False):
    """Where speed/ puts its wrappers: [(parent module, name in the parent)], in the order of forward.

    numbers: of the blocks, range(2) say:

        halves False    [(layers, "0"), (layers, "1")]
        halves True     [(block 0, "self_attn"), (block 0, "mlp"), (block 1, "self_attn"), (block 1, "mlp")]

    --offload_ckpt needs halves, because the inputs of attention and of MLP both leave for the host."""
    if not halves:
        return [(model.layers, str(i)) for i in numbers]
    return [(model.layers[i], half) for i in numbers for half in ("self_attn", "mlp")]


def size(model):
    """How many weights a model has; a tied head counts once."""
    return sum(p.numel() for p in model.parameters())


def takes_packed(model, device):
    """Whether this model's packed rows go through varlen attention on this device."""
    dtype = model.stream_dtype or torch.float32
    return takes_documents(device, dtype, model.attn, model.cfg.head_dim)


def logits(model, h):
    """h [..., C] -> logits [..., V]. On a GPU the logits are fp32 whatever dtype h has.

    bf16 has 8 bits of mantissa: above 16 its steps are 1/8, so the two best logits are often rounded to a tie."""
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
