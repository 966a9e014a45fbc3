"""LoRA by hand (Hu et al. 2021): y = x · Wᵀ + s · (x · Aᵀ) · Bᵀ; W frozen, A [r, in], B [out, r] trained.

One example: W of 4096 × 4096 holds 16.8 million numbers; at r = 16, A and B hold 131 thousand, 0.8 % of them. B starts
at zero, so an untrained adapter changes nothing. s is lora_alpha / r, or lora_alpha / sqrt(r) (rsLoRA, Kalajdzievski).

Beside peft, where each layer runs its own three products and autograd keeps their inputs, this file sends the layers
that share an input (q, k, v; gate, up) through one autograd function: the input is kept once, all A are multiplied at
once, and W is asked for again in backward instead of being kept. It speaks to W by two methods, mm(x) = x · Wᵀ and
mm_t(g) = g · W (with --fp8 for a whole group at once), so the same lines serve bf16, NF4 and fp8 weights. Files are in
PEFT's format, both ways.

    model = model.load(folder, make_linear=quant.make_linear("none"))
    adapt(model, r=16, alpha=32)                    # or: load(model, "out")
    tensors = parameters(model)                     # {PEFT's key: A or B}
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from cli import UserError

# the layers that can be adapted, and where Hugging Face's module tree (and so PEFT's) has them
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
    """A frozen layer (`base`) with its A and B. Those are fp32 and cast where they are used: Adam's small steps would
    be lost in bf16's eight bits."""

    def __init__(self, base, r, scale, dropout=0.0, generator=None):
        super().__init__()
        self.base, self.scale, self.dropout, self.bias = base, scale, dropout, base.bias
        self.joins = getattr(base, "joins", False)
        device, bound = (
            next(base.parameters()).device,
            1 / math.sqrt(base.in_features),
        )  # as PEFT's kaiming_uniform_
        self.A = nn.Parameter(
            torch.empty(r, base.in_features).uniform_(-bound, bound, generator=generator).to(device)
        )
        self.B = nn.Parameter(torch.zeros(base.out_features, r, device=device))
        self.train(base.training)  # a model in eval() stays so: no dropout

    def mm(self, x, *uB):
        """x · Wᵀ, and u · Bᵀ added, by the frozen layer itself if it can (quant.py)."""
        return self.base.mm(x, *uB) if self.joins or not uB else self.base.mm(x) + uB[0] @ uB[1].t()

    def mm_t(self, g, *duA):
        return (
            self.base.mm_t(g, *duA)
            if self.joins or not duA
            else self.base.mm_t(g) + duA[0] @ duA[1]
        )


def cast(layers, params, dtype):
    """The adapters of a group in the dtype of the arithmetic: all A as one [R, in], and for each layer scale * B in its
    own columns of an [out, R] (0 without a LoRA), so that u = x · Aᵀ [N, R] serves them all."""
    A, todo, Bs, at = torch.cat(params[0::2]).to(dtype), list(params[1::2]), [], 0
    for layer in layers:
        B = (
            todo.pop(0) * layer.scale
            if isinstance(layer, LoRA)
            else params[1].new_zeros(layer.out_features, 0)
        )
        Bs.append(F.pad(B.to(dtype), (at, len(A) - at - B.shape[1])))
        at += B.shape[1]
    return A, Bs


def forward(x, xd, layers, *params):
    """-> ([x · Wᵀ + scale * xd · Aᵀ · Bᵀ of each layer], u = xd · Aᵀ)"""
    A, Bs = cast(layers, params, x.dtype)
    u = (x if xd is None else xd) @ A.t()  # [N, R]: one product for all A
    if bases := in_fp8(layers):
        return bases[0].group_mm(bases, x, u, torch.cat(Bs)), u
    return [
        layer.mm(x, u, B) if isinstance(layer, LoRA) else layer.mm(x)
        for layer, B in zip(layers, Bs)
    ], u


def in_fp8(layers):
    """The group's frozen layers if they can be one product (--fp8)."""
    bases = [layer.base if isinstance(layer, LoRA) else layer for layer in layers]
    return bases if all(getattr(base, "fp8", False) for base in bases) else None


class GroupMatmul(torch.autograd.Function):
    """All layers of a group on the input that they share. What is kept for backward: that input once, and u.

    x [N, in], what the frozen layers see; xd [N, in], what the A matrices see after dropout, or None: the same;
    params A1, B1, A2, B2, … of the adapted layers among `layers`. -> one [N, out] a layer"""

    @staticmethod
    def forward(ctx, x, xd, layers, *params):
        out, u = forward(x, xd, layers, *params)
        ctx.layers, ctx.dropped = layers, xd is not None
        ctx.save_for_backward(x if xd is None else xd, u, *params)
        return tuple(out)

    @staticmethod
    def backward(ctx, *grads):
        h, u, *params = ctx.saved_tensors
        A, Bs = cast(ctx.layers, params, h.dtype)
        du, dBs, dx, at = 0, [], None, 0
        for layer, g, B in zip(ctx.layers, grads, Bs):
            if isinstance(layer, LoRA):
                r, du = layer.B.shape[1], du + g @ B  # du [N, R]
                dBs.append(
                    (g.t() @ u[:, at : at + r]).float() * layer.scale
                )  # [out, r]; fp32 like the parameter
                at += r
        dA = (du.t() @ h).float()  # [R, in]
        along = () if ctx.dropped else (du, A)
        if ctx.needs_input_grad[0] and (bases := in_fp8(ctx.layers)):
            dx = bases[0].group_mm_t(bases, grads, *along)
        elif ctx.needs_input_grad[
            0
        ]:  # W once more, however it is kept; du · A goes along with an adapted layer's
            last = max(i for i, layer in enumerate(ctx.layers) if isinstance(layer, LoRA))
            parts = [
                layer.mm_t(g, *along if i == last else ())
                for i, (layer, g) in enumerate(zip(ctx.layers, grads))
            ]
            dx = sum(parts[1:], start=parts[0])
        dxd = du @ A if ctx.dropped else None
        dAs = dA.split([len(A) for A in params[0::2]])
        return dx, dxd, None, *(p for pair in zip(dAs, dBs) for p in pair)


def project(x, layers):
    """Block.project of an adapted model: x [..., in] through layers that share it. -> [[..., out], …]"""
    adapted = [layer for layer in layers if isinstance(layer, LoRA)]
    if not adapted:
        return [layer(x) for layer in layers]
    flat, p = x.flatten(0, -2), adapted[0].dropout
    xd = (
        F.dropout(flat, p) if p and adapted[0].training else None
    )  # one mask for the group; peft draws one a layer
    args = flat, xd, layers, *(p for layer in adapted for p in (layer.A, layer.B))
    # an autograd function would break the compiled graph of an evaluation
    out = GroupMatmul.apply(*args) if torch.is_grad_enabled() else forward(*args)[0]
    out = [y if layer.bias is None else y + layer.bias.to(y.dtype) for layer, y in zip(layers, out)]
    return [y.view(*x.shape[:-1], -1) for y in out]


def adapt(model, r, alpha, dropout=0.0, targets="all", rslora=False, seed=0):
    """Put an untrained LoRA around the target layers of every block and freeze everything else. -> the LoRA layers

    targets: "all", or names with commas, q_proj,v_proj say."""
    names = list(PARENT) if targets == "all" else [name.strip() for name in targets.split(",")]
    for name in names:
        if name not in PARENT:
            raise UserError(
                f"--lora_targets: {name!r} is no layer to adapt; choose among {', '.join(PARENT)} or all."
            )
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same adapter on every device
    for block in model.layers:
        for name in PARENT:
            if name in names:
                scale = alpha / (math.sqrt(r) if rslora else r)
                setattr(block, name, LoRA(getattr(block, name), r, scale, dropout, generator))
        block.project = project
    return [m for m in model.modules() if isinstance(m, LoRA)]


def peft_name(name):
    """layers.0.q_proj -> base_model.model.model.layers.0.self_attn.q_proj"""
    path, _, leaf = name.rpartition(".")
    return f"base_model.model.model.{path}.{PARENT[leaf]}.{leaf}"


def parameters(model):
    """{PEFT's key: A or B}, in the order of the model."""
    return {
        f"{peft_name(name)}.lora_{leaf}.weight": getattr(layer, leaf)
        for name, layer in model.named_modules()
        if isinstance(layer, LoRA)
        for leaf in "AB"
    }


def peft_config(base, r, alpha, dropout, targets, rslora):
    """adapter_config.json as peft reads it."""
    names = list(PARENT) if targets == "all" else [name.strip() for name in targets.split(",")]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": names,
        "use_rslora": rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def read_config(folder):
    """adapter_config.json; a variant that this file does not compute is refused by name."""
    path = Path(folder) / "adapter_config.json"
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
        r, alpha, targets = config["r"], config["lora_alpha"], config["target_modules"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"{path} cannot be read as a LoRA adapter's configuration ({e!r})."
        ) from None
    if not (
        isinstance(r, int)
        and r > 0
        and isinstance(alpha, (int, float))
        and isinstance(targets, (list, str))
    ):
        raise UserError(
            f"{path}: r = {r!r}, lora_alpha = {alpha!r}, target_modules = {targets!r} are no adapter's."
        )
    for key, fine in (
        ("peft_type", "LORA"),
        ("bias", "none"),
        ("use_dora", False),
        ("modules_to_save", None),
        ("rank_pattern", {}),
        ("alpha_pattern", {}),
        ("layers_to_transform", None),
        ("lora_bias", False),
        ("fan_in_fan_out", False),
        ("alora_invocation_tokens", None),
    ):
        if (config.get(key) or fine) != fine:
            raise UserError(f"{path}: {key} = {config[key]!r} is not supported, only {fine!r}.")
    if str(config.get("init_lora_weights")).split("_")[0] in ("pissa", "olora", "corda", "loftq"):
        raise UserError(
            f"{path}: init_lora_weights = {config['init_lora_weights']!r} changes the base's own weights."
        )
    if isinstance(targets, str) and targets != "all-linear":
        raise UserError(
            f"{path}: target_modules = {targets!r} is a pattern; only names and all-linear are supported."
        )
    names = (
        "all"
        if isinstance(targets, str)
        else ",".join(sorted({t.rpartition(".")[2] for t in targets}))
    )  # or paths
    return {
        "r": r,
        "alpha": alpha,
        "dropout": config.get("lora_dropout") or 0.0,
        "targets": names,
        "rslora": bool(config.get("use_rslora")),
    }


def load(model, folder):
    """Adapt the model as the folder's adapter_config.json says and fill in its tensors."""
    layers = adapt(model, **read_config(folder))
    fill(model, read_tensors(folder))
    return layers


def merging(folder, make_linear):
    """(a make_linear for model.load that first adds the adapter, W + scale * B · A in fp32; its tensors not used yet).
    NF4 of the sum, not a sum with NF4: what is finer than its steps would be rounded off."""
    config, tensors = read_config(folder), read_tensors(folder)
    scale = config["alpha"] / (math.sqrt(config["r"]) if config["rslora"] else config["r"])

    def make(name, W):
        if config["targets"] == "all" or name.rpartition(".")[2] in config["targets"].split(","):
            try:
                A, B = (
                    tensors.pop(f"{peft_name(name)}.lora_{x}.weight").to(W.device, torch.float32)
                    for x in "AB"
                )
                W = (W.float() + scale * B @ A).to(W.dtype)
            except (KeyError, RuntimeError) as e:
                raise UserError(
                    f"the adapter in {folder} does not fit this base model's {name} ({e})."
                ) from None
        return make_linear(name, W)

    return make, tensors


def read_tensors(folder):
    path = Path(folder) / "adapter_model.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as e:
        raise UserError(
            f"{path} cannot be read ({e}); an adapter has it beside its adapter_config.json."
        ) from None


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
