"""LoRA by hand (Hu et al. 2021): y = x · Wᵀ + s · (x · Aᵀ) · Bᵀ; W frozen, A [r, in], B [out, r] trained.

Why: W of 4096 × 4096 holds 16.8 million numbers. At r = 16, A and B hold 16 · (4096 + 4096) = 131 thousand. On all
seven linears of Llama-3-8B's 32 blocks A and B hold 41.9 million, 0.6 % of the 6.98 billion frozen weights:

    per block    q, o: 131,072 each    k, v: 81,920 each    gate, up, down: 294,912 each    = 1,310,720

A trained weight takes 16 bytes: itself, its gradient and two states of AdamW, 4 bytes each. A and B take 0.67 GB. All
8.03 billion weights of 8B would take 128 GB.

B starts at zero, so an untrained adapter changes nothing. A starts at random, because each gradient has the other
matrix as a factor. With g the gradient of y:

    dB = s · gᵀ · (x · Aᵀ)        not zero from step 1 on, because A is not
    dA = s · (g · B)ᵀ · x         zero at step 1, because B is; not zero from step 2 on

With A and B both zero, both gradients would be zero at every step, and nothing would train.

s is lora_alpha / r. The adapter's output is a sum of r terms, one for each column of B, so the sum grows with r.
Dividing by r keeps its size, so r can change and the learning rate stay. s is 2 for lora_alpha = 32 and r = 16.
rsLoRA (Kalajdzievski 2023) divides by sqrt(r), because r independent terms add up to sqrt(r) times one of them.

What is kept for backward, of the layers that share an input (q, k, v; gate, up): that input, once, and u = x · Aᵀ. One
autograd function, GroupMatmul, serves all of them. At 8,192 tokens of 8B, q, k and v keep 67 MB, and 0.8 MB of u.
peft casts the input for each layer's A, and autograd keeps the three casts: 201 MB in bf16. No dequantised W is kept,
which autograd's own product would do with NF4: 436 MB a block. Instead backward multiplies by W again, by
quant.group_mm_t. lora.py never sees how W is kept, so the same lines serve bf16, NF4 and fp8 weights.

Cost: the products of rank 16 take 1.10 of the 11.88 ms of a block (README), but are 1 % of the arithmetic. They read
every activation, and multiply each number of it only R times.

Proof, in tests/test_lora.py: test_untrained_adapter_changes_nothing, test_first_step_moves_b_alone,
test_group_keeps_its_input_once_and_no_weight; against peft: test_outputs_and_gradients_equal_those_of_peft,
test_ten_adamw_steps_end_where_those_of_peft_do.

    model = load_model(folder, "cuda", torch.bfloat16, quant.make_linear("nf4"))
    adapt(model, r=16, alpha=32)                    # or: load_model(…, adapter="out")
    tensors = parameters(model)                     # {PEFT's key: A or B}
"""

from cli import UserError, say

import contextlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

import model as models
import quant
from files import disk, model_config, weights

# The layers that can be adapted: (the half of a block that has them, those that share an input).
GROUPS = [
    ("self_attn", ["q_proj", "k_proj", "v_proj"]),
    ("self_attn", ["o_proj"]),
    ("mlp", ["gate_proj", "up_proj"]),
    ("mlp", ["down_proj"]),
]
PARENT = {name: parent for parent, names in GROUPS for name in names}


class LoRA(nn.Module):
    """A frozen layer (`base`) with its A and B. This class holds tensors; `project` computes with them.

    A and B are fp32 and are cast where they are used, because bf16 would round Adam's small steps away
    (speed/precision.py has the arithmetic)."""

    def __init__(self, base, r, scale, dropout=0.0, generator=None):
        super().__init__()
        self.base = base
        self.scale = scale
        self.dropout = dropout
        self.bias = base.bias
        device = next(base.parameters()).device
        # Draw A within the bound that PEFT's kaiming_uniform_(a=sqrt(5)) has: 1/64 for 4,096 inputs.
        bound = 1 / math.sqrt(base.in_features)
        A = torch.empty(r, base.in_features).uniform_(-bound, bound, generator=generator)
        self.A = nn.Parameter(A.to(device))
        self.B = nn.Parameter(torch.zeros(base.out_features, r, device=device))
        # A new module is in training mode. Take the mode of the base, so that a model in eval() draws no dropout.
        self.train(mode=base.training)


# --- a group of layers that share their input ---


def bases_of(layers):
    """The frozen layer of each of `layers`, adapted or not."""
    return [layer.base if isinstance(layer, LoRA) else layer for layer in layers]


def cast_adapters(layers, params, dtype):
    """(A, Bs) of a group in the dtype of the products.

    params: A1, B1, A2, B2, … of the adapted layers. All A stand one below the other in A [R, in], and R is the sum of
    the ranks. So one product u = x · Aᵀ [N, R] serves the whole group. Each layer then takes its own r columns of u,
    because its B [out, R] is zero in the columns of the others. With q and v adapted and r = 2:

        A [4, in]     rows 0, 1: A of q       rows 2, 3: A of v
        u [N, 4]      columns 0, 1: q's       columns 2, 3: v's
        Bs            q: [B B 0 0]            k: None             v: [0 0 B B]        each times scale

    So u · Bᵀ of v is u0 · 0 + u1 · 0 + u2 · b2 + u3 · b3: v's own product. All layers of a group read the same u, as
    the fp8 kernel wants it. The zeros cost little: q, k and v at r = 16 have R = 48 beside 4,096 inputs.

    A layer without an adapter has None in Bs."""
    As = params[0::2]
    Bs = list(params[1::2])
    A = torch.cat(As).to(dtype)
    R = A.shape[0]
    # The number of this layer's first own column.
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
    """-> ([x · Wᵀ + scale * h · Aᵀ · Bᵀ of each layer], u = h · Aᵀ). h: `dropped`, or x where `dropped` is None"""
    A, Bs = cast_adapters(layers, params, x.dtype)
    seen_by_A = x if dropped is None else dropped
    u = seen_by_A @ A.t()  # [N, R]: one product for all A
    return quant.group_mm(bases_of(layers), x, u, Bs), u


class GroupMatmul(torch.autograd.Function):
    """All layers of a group on the input that they share. What is kept for backward: that input once, and u.

    x [N, in]         the input of the frozen layers
    dropped [N, in]   the input of the A matrices after dropout; None: they see x, too
    params            A1, B1, A2, B2, … of the adapted layers among `layers`

    -> one y [N, out] a layer"""

    @staticmethod
    def forward(ctx, x, dropped, layers, *params):
        out, u = group_forward(x, dropped, layers, *params)
        ctx.layers = layers
        ctx.has_dropout = dropped is not None
        ctx.save_for_backward(x if dropped is None else dropped, u, *params)
        return tuple(out)

    @staticmethod
    def backward(ctx, *grads):
        """grads: one g [N, out] a layer, the gradient of that layer's output y = x · Wᵀ + u · Bᵀ, with u = h · Aᵀ.

        h is what A saw: x, or x after dropout. The chain rule gives, with Σ over the layers of the group:

            du [N, R]   = Σ g · B             u is part of every y
            dB [out, r] = gᵀ · u              of each layer; u: the layer's own r columns
            dA [R, in]  = duᵀ · h
            dx [N, in]  = Σ g · W + du · A    without dropout; with dropout du · A is the gradient of h instead

        Here B stands for what cast_adapters made: scale * B, with zeros in the columns of other layers. So du holds the
        scale already, and dB, the gradient of the parameter without scale, is multiplied by scale."""
        h, u, *params = ctx.saved_tensors  # [N, in], [N, R]
        A, Bs = cast_adapters(ctx.layers, params, h.dtype)
        du = 0
        dBs = []
        begin = 0
        for layer, g, B in zip(ctx.layers, grads, Bs, strict=True):
            if B is None:
                continue
            r = layer.B.shape[1]
            # [N, out] · [out, R]: the zeros of B leave the columns of other layers as they are.
            du = du + g @ B  # [N, R]
            # [out, N] · [N, r]
            dB = g.t() @ u[:, begin : begin + r]  # [out, r]
            # fp32 like the parameters
            dBs.append(dB.float() * layer.scale)
            begin += r
        # [R, N] · [N, in]: the gradients of all A, one below the other as in A
        dA = (du.t() @ h).float()  # [R, in]
        dAs = dA.split([len(A1) for A1 in params[0::2]])

        dx = None
        if ctx.needs_input_grad[0]:
            # Multiply by W again, in whatever format W is kept. Without dropout h is x, so du · A belongs to dx.
            through_A = None if ctx.has_dropout else du
            dx = quant.group_mm_t(bases_of(ctx.layers), grads, through_A, A)
        d_dropped = du @ A if ctx.has_dropout else None
        # dA1, dB1, dA2, dB2, …: one gradient for each argument of forward, in their order.
        d_params = [d for pair in zip(dAs, dBs, strict=True) for d in pair]
        return dx, d_dropped, None, *d_params


def project(x, layers):
    """`project` of an adapted half of a block: x [..., in] through layers that share it. -> [[..., out], …]"""
    adapted = [layer for layer in layers if isinstance(layer, LoRA)]
    if not adapted:
        return models.call_each(x, layers)
    flat = x.flatten(0, -2)  # [N, in]
    dropped = None
    # Ask for dropout first: the compiler would make a graph for each value of `training` that it sees.
    if adapted[0].dropout > 0 and adapted[0].training:
        # One mask for the group; peft draws one a layer.
        dropped = F.dropout(flat, adapted[0].dropout)
    params = adapters_of(layers)
    if torch.is_grad_enabled():
        out = GroupMatmul.apply(flat, dropped, layers, *params)
    else:
        # Without gradients call the plain function, because an autograd function would break a compiled graph there.
        out, _ = group_forward(flat, dropped, layers, *params)
    return in_shape_of(x, out, layers)


class CastOnce:
    """Stands in for `project` while A and B do not change: joins, scales and casts A and B of each group once.

    Why: training changes A and B at every step, so `project` calls cast_adapters at every call. Sampling calls it for
    every token. Here cast_adapters runs once, in __init__. On two cores of a Xeon SmolLM2 then writes 11.9 tokens/s in
    place of 10.2.

    An untrained adapter adds nothing, because its B are zero. So a group with zero B computes its frozen layers only.
    Cost: a second copy of A and B, in the dtype of the products.
    Proof: tests/test_lora.py: test_an_adapter_that_is_cast_once_has_the_same_logits_to_the_bit,
    test_an_untrained_adapter_that_stands_still_is_not_computed."""

    def __init__(self, half, dtype):
        # (the first layer, A, Bs) of each group whose B are not all zero. The first layer tells the groups apart.
        self.groups = []
        for _, names in GROUPS:
            layers = [getattr(half, name) for name in names if hasattr(half, name)]
            params = adapters_of(layers)
            if any(B.any() for B in params[1::2]):
                A, Bs = cast_adapters(layers, params, dtype)
                self.groups.append((layers[0], A, Bs))

    def __call__(self, x, layers):
        for first, A, Bs in self.groups:
            if first is layers[0]:
                flat = x.flatten(0, -2)  # [N, in]
                out = quant.group_mm(bases_of(layers), flat, flat @ A.t(), Bs)
                return in_shape_of(x, out, layers)
        return models.call_each(x, bases_of(layers))


@torch.no_grad()
def cast_once(model):
    """Cast the adapter once, for a model that only samples. A later change of A or B has no effect."""
    dtype = models.product_dtype(model)
    for half in adapted_halves(model):
        half.project = CastOnce(half, dtype)


@contextlib.contextmanager
def standing_still(model, unless=False):
    """A `with` block that trains nothing: A and B are cast at its beginning, and `project` comes back at its end.

    unless: change nothing, for a compiled model, whose graphs contain the casts
    Proof: tests/test_lora.py: test_training_goes_on_behind_a_model_that_stood_still."""
    if unless:
        yield
        return
    cast_once(model)
    try:
        yield
    finally:
        for half in adapted_halves(model):
            half.project = project


def adapted_halves(model):
    """The attention and MLP modules that have an adapted layer, found inside whatever speed/ put around them."""
    return [m for m in model.modules() if any(isinstance(layer, LoRA) for layer in m.children())]


def adapters_of(layers):
    """[A1, B1, A2, B2, …] of the adapted ones among the layers"""
    return [p for layer in layers if isinstance(layer, LoRA) for p in (layer.A, layer.B)]


def in_shape_of(x, out, layers):
    """[y [N, out] of each layer], of an x [..., in] -> [[..., out], …], with the layers' biases"""
    shape = x.shape[:-1]
    return [add_bias(y, layer).view(*shape, -1) for layer, y in zip(layers, out, strict=True)]


def add_bias(y, layer):
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


# --- an adapter on a model ---


def adapt(model, r, alpha, dropout=0.0, targets="all", rslora=False, seed=0):
    """Put an untrained LoRA around the target layers of every block and freeze everything else. -> the LoRA layers

    targets: "all", or names with commas, q_proj,v_proj say."""
    names = target_names(targets)
    check_targets(names)
    model.requires_grad_(requires_grad=False)
    scale = scale_of(alpha, r, rslora)
    # Draw on the CPU, so that a seed gives the same adapter on every device.
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


def check_targets(names):
    for name in names:
        if name not in PARENT:
            choices = ", ".join(PARENT)
            raise UserError(
                f"--lora_targets: {name!r} is no layer to adapt; choose among {choices} or all."
            )


def scale_of(alpha, r, rslora):
    return alpha / (math.sqrt(r) if rslora else r)


def peft_name(name):
    """layers.0.self_attn.q_proj -> base_model.model.model.layers.0.self_attn.q_proj"""
    return f"base_model.model.model.{name}"


def parameters(model):
    """{PEFT's key: A or B}, in the order of the model.

    To be called before speed/ wraps blocks, because a wrapper changes the names of the modules in it."""
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
    """For --merge. -> (a make_linear for model.load that first adds the adapter, the adapter's tensors not used yet)

    Add in fp32, and quantise the sum. A W that is in NF4 already stands on NF4's 16 values. Whatever of B · A is less
    than half the way to the next value would be rounded away there, and that is most of B · A."""
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
    """Copy {PEFT's key: tensor} into the model's adapter. An error names a tensor without a place, or a missing one."""
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


# Far above any adapter, and far below what overflows.
LARGEST_RANK = 2**16
# The keys of adapter_config.json that are used.
USED = {
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "use_rslora",
    "bias",
    "init_lora_weights",
}
# {key: why its value changes nothing here}
HARMLESS = {
    "_name_or_path": "a name",
    "task_type": "the same arithmetic for every task that a Llama has",
    "auto_mapping": "names of classes",
    "peft_version": "who wrote the file",
    "base_model_name_or_path": "a name; shapes are checked",
    "revision": "a name",
    "inference_mode": "train.py trains an adapter, sample.py does not",
    "merge_weights": "old files: merged or not, the sum is the same",
    "layers_pattern": "read with layers_to_transform only, which is refused",
    "megatron_core": "read with megatron_config only, which is refused",
    "qalora_group_size": "read with use_qalora only, which is refused",
    "ensure_weight_tying": "of adapters on embedding and head, which are refused",
    "velora_config": "saves memory in peft's own backward",
    "runtime_config": "where peft computes",
    # How A and B began. init_lora_weights says whether W began otherwise, too.
    "eva_config": "how A began",
    "loftq_config": "read with init_lora_weights = loftq only, which is refused",
    "corda_config": "read with init_lora_weights = corda only, which is refused",
    "lora_ga_config": "read with init_lora_weights = lora_ga only, which is refused",
}
# Initialisations that leave W as it is. Others (pissa, olora, corda, loftq, lora_ga …) change W, so that A and B alone
# are not the adapter.
LEAVES_THE_BASE = ["none", "true", "false", "gaussian", "eva", "orthogonal"]


def read_config(folder):
    """adapter_config.json -> the arguments of adapt. A variant that this file does not compute is an error."""
    path = Path(folder) / "adapter_config.json"
    config = model_config.read_object(path, "a LoRA adapter has it beside its tensors")
    refuse_variants(path, config)
    return {
        "r": model_config.whole(path, "r", config.get("r"), LARGEST_RANK),
        "alpha": model_config.positive(path, "lora_alpha", config.get("lora_alpha")),
        "dropout": dropout_of(path, config.get("lora_dropout")),
        "targets": plain_targets(path, config),
        "rslora": model_config.flag(path, "use_rslora", config.get("use_rslora") or False),
    }


def refuse_variants(path, config):
    """A UserError for each key that changes the arithmetic, or that is not known: PEFT gets new ones every year.

    A value that switches a feature off (null, false, empty) is let through."""
    for key, value in config.items():
        known = key in USED or key in HARMLESS
        if not known and not model_config.is_off(value):
            raise UserError(
                f"{path}: {key} = {model_config.shown(value)} is not supported; if it does not change the adapter's "
                "arithmetic, remove the key."
            )
    for key, only in {"peft_type": "LORA", "bias": "none"}.items():
        if config.get(key, only) not in (only, None):
            raise UserError(
                f"{path}: {key} = {model_config.shown(config[key])} is not supported, only {only!r}."
            )
    init = config.get("init_lora_weights")
    if str(init).lower() not in LEAVES_THE_BASE:
        raise UserError(
            f"{path}: init_lora_weights = {model_config.shown(init)} changes the base's own weights, or is unknown."
        )


def dropout_of(path, dropout):
    """lora_dropout, a number from 0 to below 1; a missing one is 0."""
    if model_config.is_off(dropout):
        return 0.0
    if model_config.positive(path, "lora_dropout", dropout) >= 1:
        raise UserError(f"{path}: lora_dropout is {dropout}, where a number below 1 is wanted.")
    return dropout


def plain_targets(path, config):
    """target_modules as --lora_targets has them: "all", or names with commas. exclude_modules is taken away."""
    targets = config.get("target_modules")
    excluded = config.get("exclude_modules")
    if targets == "all-linear" and model_config.is_off(excluded):
        return "all"
    names = set(PARENT)
    if targets != "all-linear":
        # PEFT also takes whole paths: model.layers.0.self_attn.q_proj. Tensors say whether a layer is left out.
        names = {name.rpartition(".")[2] for name in module_names(path, "target_modules", targets)}
    if not model_config.is_off(excluded):
        for name in module_names(path, "exclude_modules", excluded):
            if name.rpartition(".")[2] in PARENT and name not in PARENT:
                raise UserError(
                    f"{path}: exclude_modules has {name!r}, one layer of several; only names are supported."
                )
            names.discard(name)
    if not names:
        raise UserError(f"{path}: target_modules without exclude_modules names no layer to adapt.")
    return ",".join(sorted(names))


def module_names(path, key, value):
    """The value itself, a list of names; a text would be a pattern."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise UserError(
            f"{path}: {key} is {model_config.shown(value)}; only a list of names is supported (target_modules also "
            "takes all-linear)."
        )
    return value


def read_tensors(folder):
    """{PEFT's key: tensor} of an adapter. Each number is checked, because one NaN makes all logits NaN."""
    disk.refuse_no_utf8(folder, "the adapter's folder")
    path = Path(folder) / "adapter_model.safetensors"
    try:
        with safe_open(path, framework="pt") as stored:
            for key in stored.offset_keys():
                weights.check_dtype(path, key, stored.get_slice(key).get_dtype())
        tensors = load_file(path)
    except (OSError, SafetensorError) as e:
        hint = "an adapter has it beside its adapter_config.json"
        if path.with_suffix(".bin").exists() and not path.exists():
            hint = (
                "adapter_model.bin is pickle, which is never read: let peft save the adapter again"
            )
        raise UserError(f"{path} cannot be read ({e}); {hint}.") from None
    return {key: weights.finite(path, key, tensor) for key, tensor in tensors.items()}
