"""LoRA by hand (Hu et al. 2021): y = x · Wᵀ + s · (x · Aᵀ) · Bᵀ; W frozen, A [r, in], B [out, r] trained.

One example: W of 4096 × 4096 holds 16.8 million numbers; at r = 16, A and B hold 131 thousand, 0.8 % of them. B starts
at zero, so an untrained adapter changes nothing. s is lora_alpha / r, or lora_alpha / sqrt(r) (rsLoRA, Kalajdzievski).

In peft each layer runs its own three products and autograd keeps the inputs of each. This file sends the layers that
share an input (q, k, v; gate, up) through one autograd function: the input is kept once, all A are multiplied at once,
and W is asked for again in backward instead of being kept. The frozen layers are multiplied by quant.group_mm and
quant.group_mm_t, so the same lines serve bf16, NF4 and fp8 weights. Files are in PEFT's format, both ways.

    model = load_model(folder, "cuda", torch.bfloat16, quant.make_linear("nf4"))
    adapt(model, r=16, alpha=32)                    # or: load_model(…, adapter="out")
    tensors = parameters(model)                     # {PEFT's key: A or B}
"""

from cli import UserError, say

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import model as models
import quant
from files import disk

# The layers that can be adapted, and the half of a block that has them.
PARENT = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}


class LoRA(nn.Module):
    """A frozen layer (`base`) with its A and B.

    A and B are fp32 and are cast where they are used: Adam's small steps would be lost in bf16's eight bits."""

    def __init__(self, base, r, scale, dropout=0.0, generator=None):
        super().__init__()
        self.base = base
        self.scale = scale
        self.dropout = dropout
        self.bias = base.bias
        device = next(base.parameters()).device
        # PEFT's kaiming_uniform_ comes to this bound.
        bound = 1 / math.sqrt(base.in_features)
        A = torch.empty(r, base.in_features).uniform_(-bound, bound, generator=generator)
        self.A = nn.Parameter(A.to(device))
        self.B = nn.Parameter(torch.zeros(base.out_features, r, device=device))
        # A model in eval() stays so: no dropout.
        self.train(mode=base.training)


# --- a group of layers that share their input ---


def bases_of(layers):
    """The frozen layer of each of `layers`, adapted or not."""
    return [layer.base if isinstance(layer, LoRA) else layer for layer in layers]


def cast_adapters(layers, params, dtype):
    """(A, Bs) of a group in the dtype of the products.

    params: A1, B1, A2, B2, … of the adapted layers. A [R, in] is all their A, one below the other; R is the sum of
    their ranks. Bs has one [out, R] a layer: scale * B in the layer's own r columns and zeros in the others', so that
    one u = x · Aᵀ [N, R] serves all. A layer without an adapter has None. With q and v adapted, r = 2:

        A    rows 0, 1: q's A    rows 2, 3: v's A
        Bs   q: [B B 0 0]        k: None        v: [0 0 B B]
    """
    As = params[0::2]
    Bs = list(params[1::2])
    A = torch.cat(As).to(dtype)
    R = A.shape[0]
    begin = 0
    wide = []
    for layer in layers:
        if not isinstance(layer, LoRA):
            wide.append(None)
            continue
        B = (Bs.pop(0) * layer.scale).to(dtype)  # [out, r]
        r = B.shape[1]
        wide.append(F.pad(B, (begin, R - begin - r)))
        begin += r
    return A, wide


def group_forward(x, dropped, layers, *params):
    """-> ([x · Wᵀ + scale * d · Aᵀ · Bᵀ of each layer], u = d · Aᵀ), with d = dropped, or x where that is None."""
    A, Bs = cast_adapters(layers, params, x.dtype)
    seen_by_A = x if dropped is None else dropped
    u = seen_by_A @ A.t()  # [N, R]: one product for all A
    return quant.group_mm(bases_of(layers), x, u, Bs), u


class GroupMatmul(torch.autograd.Function):
    """All layers of a group on the input that they share. What is kept for backward: that input once, and u.

    x [N, in] is what the frozen layers see; dropped [N, in] what the A matrices see after dropout, or None: x;
    params A1, B1, A2, B2, … of the adapted layers among `layers`. -> one [N, out] a layer"""

    @staticmethod
    def forward(ctx, x, dropped, layers, *params):
        out, u = group_forward(x, dropped, layers, *params)
        ctx.layers = layers
        ctx.has_dropout = dropped is not None
        ctx.save_for_backward(x if dropped is None else dropped, u, *params)
        return tuple(out)

    @staticmethod
    def backward(ctx, *grads):
        """grads: one [N, out] a layer. y = x Wᵀ + u Bᵀ with u = h Aᵀ gives, by the chain rule,

        du = Σ g · B,   dB = gᵀ · u,   dA = duᵀ · h,   dx = Σ g · W + du · A."""
        h, u, *params = ctx.saved_tensors  # [N, in], [N, R]
        A, Bs = cast_adapters(ctx.layers, params, h.dtype)
        du = 0
        dBs = []
        begin = 0
        for layer, g, B in zip(ctx.layers, grads, Bs, strict=True):
            if B is None:
                continue
            r = layer.B.shape[1]
            du = du + g @ B  # [N, R]
            dB = g.t() @ u[:, begin : begin + r]  # [out, r]
            dBs.append(dB.float() * layer.scale)
            begin += r
        dA = (du.t() @ h).float()  # [R, in], fp32 like the parameters
        dAs = dA.split([len(A1) for A1 in params[0::2]])

        dx = None
        if ctx.needs_input_grad[0]:
            # W once more, however it is kept. Without dropout h is x, and du · A is a part of its gradient.
            through_A = None if ctx.has_dropout else du
            dx = quant.group_mm_t(bases_of(ctx.layers), grads, through_A, A)
        d_dropped = du @ A if ctx.has_dropout else None
        d_params = [d for pair in zip(dAs, dBs, strict=True) for d in pair]
        return dx, d_dropped, None, *d_params


def project(x, layers):
    """`project` of an adapted half of a block: x [..., in] through layers that share it. -> [[..., out], …]"""
    adapted = [layer for layer in layers if isinstance(layer, LoRA)]
    if not adapted:
        return models.call_each(x, layers)
    flat = x.flatten(0, -2)  # [N, in]
    dropped = None
    # dropout is asked first: the compiler would make one graph of training and another of evaluation for `training`.
    if adapted[0].dropout > 0 and adapted[0].training:
        # One mask for the group; peft draws one a layer.
        dropped = F.dropout(flat, adapted[0].dropout)
    params = [p for layer in adapted for p in (layer.A, layer.B)]
    if torch.is_grad_enabled():
        out = GroupMatmul.apply(flat, dropped, layers, *params)
    else:
        # An autograd function would break the compiled graph of an evaluation.
        out, _ = group_forward(flat, dropped, layers, *params)
    shape = x.shape[:-1]
    return [add_bias(y, layer).view(*shape, -1) for layer, y in zip(layers, out, strict=True)]


def add_bias(y, layer):
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


# --- an adapter on a model ---


def adapt(model, r, alpha, dropout=0.0, targets="all", rslora=False, seed=0):
    """Put an untrained LoRA around the target layers of every block and freeze everything else. -> the LoRA layers

    targets: "all", or names with commas, q_proj,v_proj say."""
    names = target_names(targets)
    for name in names:
        if name not in PARENT:
            choices = ", ".join(PARENT)
            raise UserError(
                f"--lora_targets: {name!r} is no layer to adapt; choose among {choices} or all."
            )
    model.requires_grad_(requires_grad=False)
    scale = scale_of(alpha, r, rslora)
    # On the CPU: the same adapter on every device.
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for block in model.layers:
        for name, parent in PARENT.items():
            if name in names:
                half = getattr(block, parent)
                layer = LoRA(getattr(half, name), r, scale, dropout, generator)
                setattr(half, name, layer)
                half.project = project
                layers.append(layer)
    return layers


def target_names(targets):
    if targets == "all":
        return list(PARENT)
    return [name.strip() for name in targets.split(",")]


def scale_of(alpha, r, rslora):
    return alpha / (math.sqrt(r) if rslora else r)


def peft_name(name):
    """layers.0.self_attn.q_proj -> base_model.model.model.layers.0.self_attn.q_proj"""
    return f"base_model.model.model.{name}"


def parameters(model):
    """{PEFT's key: A or B}, in the order of the model, before speed/ wraps its blocks."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoRA):
            found[f"{peft_name(name)}.lora_A.weight"] = layer.A
            found[f"{peft_name(name)}.lora_B.weight"] = layer.B
    return found


# --- base and adapter put together ---


@dataclass
class Settings:
    """What adapter_config.json says of an adapter."""

    r: int
    alpha: float
    dropout: float = 0.0
    targets: str = "all"
    rslora: bool = False


def begin(model, settings, seed, init=""):
    """Put an adapter to train on a base model: untrained, or filled from the folder `init`. -> {PEFT's key: A or B}"""
    if init:
        same_settings(init, settings)
    layers = adapt(model, **asdict(settings), seed=seed)
    params = parameters(model)
    if init:
        fill(model, read_tensors(init))
    trained = sum(p.numel() for p in params.values())
    source = f", from {init}" if init else ""
    say("lora", f"r={settings.r} on {len(layers)} layers: {trained:,} trained parameters{source}")
    return params


def same_settings(init, settings):
    """An error if --init_adapter has another rank or scale than the flags say."""
    have = read_config(init)
    if (have["r"], have["alpha"], have["rslora"]) != (settings.r, settings.alpha, settings.rslora):
        raise UserError(
            f"--init_adapter {init} has r {have['r']}, alpha {have['alpha']}, rslora {have['rslora']}: "
            "give --lora_r, --lora_alpha and --rslora the same values."
        )


def save(folder, params, base, settings):
    """Write an adapter as PEFT reads it. base: the base model's name"""
    disk.write_json(folder / "adapter_config.json", peft_config(base, **asdict(settings)))
    disk.write_tensors(folder / "adapter_model.safetensors", params)


def load_model(folder, device, dtype, make_linear, adapter=None, merge=False, **how):
    """A base model, with the adapter of a folder beside its weights, or merged into them.

    how: further arguments of model.Llama."""
    if adapter is None or not merge:
        model = models.load(folder, device, dtype, make_linear, **how)
        if adapter is not None:
            load(model, adapter)
        return model
    make_merged, unused = merging(adapter, make_linear)
    model = models.load(folder, device, dtype, make_merged, **how)
    if unused:
        raise UserError(f"the adapter's {next(iter(unused))} has no place in {folder}.")
    return model


def load(model, folder):
    """Adapt the model as the folder's adapter_config.json says and fill in its tensors. -> the LoRA layers"""
    layers = adapt(model, **read_config(folder))
    fill(model, read_tensors(folder))
    return layers


def merging(folder, make_linear):
    """(a make_linear for model.load that first adds the adapter, W + scale * B · A in fp32; its tensors not used yet).

    NF4 of the sum, not a sum with NF4: what is finer than its steps would be rounded off."""
    config = read_config(folder)
    unused = read_tensors(folder)
    scale = scale_of(config["alpha"], config["r"], config["rslora"])
    targets = target_names(config["targets"])

    def make(name, W):
        if name.rpartition(".")[2] not in targets:
            return make_linear(name, W)
        key = peft_name(name)
        try:
            A = unused.pop(f"{key}.lora_A.weight").to(W.device, torch.float32)
            B = unused.pop(f"{key}.lora_B.weight").to(W.device, torch.float32)
            merged = (W.float() + scale * B @ A).to(W.dtype)
        except (KeyError, RuntimeError) as e:
            raise UserError(
                f"the adapter in {folder} does not fit this base model's {name} ({e})."
            ) from None
        return make_linear(name, merged)

    return make, unused


def fill(model, tensors):
    """Copy {PEFT's key: tensor} into the model's adapter: each is used once, each A and B filled, or an error says."""
    wanted = parameters(model)
    for key, tensor in tensors.items():
        if key not in wanted:
            raise UserError(
                f"the adapter's {key} has no place in this base model or its target_modules."
            )
        param = wanted.pop(key)
        if param.shape != tensor.shape:
            raise UserError(
                f"the adapter's {key} has shape {list(tensor.shape)}, this base needs {list(param.shape)}."
            )
        with torch.no_grad():
            param.copy_(tensor)
    if wanted:
        raise UserError(
            f"the adapter lacks {len(wanted)} tensor(s), the first is {next(iter(wanted))}."
        )


# --- PEFT's files ---


def peft_config(base, r, alpha, dropout, targets, rslora):
    """adapter_config.json as peft reads it."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": target_names(targets),
        "use_rslora": rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


# What PEFT can do and this file does not: the only value that each of these keys may have.
ONLY = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "alora_invocation_tokens": None,
}
CHANGES_THE_BASE = ["pissa", "olora", "corda", "loftq"]


def read_config(folder):
    """The arguments of adapt from adapter_config.json; a variant that is not computed here is refused by name."""
    path = Path(folder) / "adapter_config.json"
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
        r = config["r"]
        alpha = config["lora_alpha"]
        targets = config["target_modules"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"{path} cannot be read as a LoRA adapter's configuration ({e!r})."
        ) from None
    is_rank = isinstance(r, int) and r > 0
    if not (is_rank and isinstance(alpha, (int, float)) and isinstance(targets, (list, str))):
        raise UserError(
            f"{path}: r = {r!r}, lora_alpha = {alpha!r}, target_modules = {targets!r} are no adapter's."
        )
    refuse_variants(path, config)
    return {
        "r": r,
        "alpha": alpha,
        "dropout": config.get("lora_dropout") or 0.0,
        "targets": plain_targets(path, targets),
        "rslora": bool(config.get("use_rslora")),
    }


def refuse_variants(path, config):
    for key, only in ONLY.items():
        if (config.get(key) or only) != only:
            raise UserError(f"{path}: {key} = {config[key]!r} is not supported, only {only!r}.")
    init = config.get("init_lora_weights")
    if str(init).split("_")[0] in CHANGES_THE_BASE:
        raise UserError(f"{path}: init_lora_weights = {init!r} changes the base's own weights.")


def plain_targets(path, targets):
    """target_modules as --lora_targets has them: "all", or names with commas."""
    if targets == "all-linear":
        return "all"
    if isinstance(targets, str):
        raise UserError(
            f"{path}: target_modules = {targets!r} is a pattern; only names and all-linear are supported."
        )
    # PEFT also takes whole paths: model.layers.0.self_attn.q_proj.
    names = {target.rpartition(".")[2] for target in targets}
    return ",".join(sorted(names))


def read_tensors(folder):
    path = Path(folder) / "adapter_model.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as e:
        raise UserError(
            f"{path} cannot be read ({e}); an adapter has it beside its adapter_config.json."
        ) from None
