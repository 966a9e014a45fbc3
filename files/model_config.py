"""config.json of a model folder: each key is used, known to be harmless, or refused by name.

    settings = read(folder)         # {"vocab_size": 49152, …}: the fields of model.ModelConfig
    read_object(path, "why")        # the JSON object in any file of settings, or a UserError

A setting that is passed over in silence gives another model than the one that was trained: other angles, another scale,
another window. So a key that no table here names is refused, unless its value is null, false, 0 or empty: such a value
switches a feature off.

A missing key means what LlamaConfig and MistralConfig of transformers mean by its absence.
Proof: test_a_key_that_is_left_out_means_what_it_means_to_transformers (tests/test_model.py).

Of generation_config.json text.py reads eos_token_id. The other keys are defaults of sampling (temperature, top_p and
the like). Flags of sample.py stand in their place, so nothing reads these keys.
"""

from cli import UserError

import json
from pathlib import Path

# {key: its largest value}. The bounds are far above any model, and keep the bytes of a matrix below 2**63.
SIZES = {
    "vocab_size": 2**27,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "max_position_embeddings": 2**31,
}
FLAGS = ["tie_word_embeddings", "attention_bias", "mlp_bias"]

# What a missing key means to LlamaConfig of transformers. Sizes without a default must be there.
LLAMA = {
    "model_type": "llama",
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "sliding_window": None,
}
# What a missing key means to MistralConfig, where that is something else.
MISTRAL = {
    "model_type": "mistral",
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
MEANING = {"LlamaForCausalLM": LLAMA, "MistralForCausalLM": LLAMA | MISTRAL}

# {rope_type: the fields that change the angles}
ROPE_FIELDS = {
    "default": [],
    "linear": ["factor"],
    "llama3": [
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ],
}

# The keys that are used, here or in text.py.
USED = {
    *SIZES,
    *LLAMA,
    "architectures",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "layer_types",
    "eos_token_id",
    "is_causal",
}

# {key: what it changes}. Known, and not computed by model.py.
REFUSED = {
    "quantization_config": "the weights are stored in another format",
    "compression_config": "the weights are stored in another format",
    "quantization": "the weights are stored in another format",
    "attention_multiplier": "it scales the attention scores",
    "embedding_multiplier": "it scales the embedding",
    "residual_multiplier": "it scales the output of each half of a block",
    "logits_scaling": "it scales the logits",
    "logit_scale": "it scales the logits",
    "attn_logit_softcapping": "it bounds the attention scores",
    "final_logit_softcapping": "it bounds the logits",
    "clip_qkv": "it bounds queries, keys and values",
    "use_qk_norm": "it normalises queries and keys",
    "qk_norm": "it normalises queries and keys",
    "num_experts": "the MLP is a choice of several",
    "num_local_experts": "the MLP is a choice of several",
    "original_max_position_embeddings": "it belongs into the RoPE settings",
    "rope_interleaved": "RoPE turns other pairs",
    "attention_dropout": "this program trains without dropout in the base; 0.0 says the same",
}

# {key: why its value changes nothing here}
HARMLESS = {
    # Names and versions.
    "_name_or_path": "where the model came from",
    "name_or_path": "where the model came from",
    "_commit_hash": "where the model came from",
    "transformers_version": "who wrote the file",
    "paddlenlp_version": "who wrote the file",
    "unsloth_version": "who wrote the file",
    "unsloth_fixed": "a note of unsloth's: the tokenizer was repaired",
    "is_llama_config": "a note of nanotron's",
    "transformers.js_config": "for a program in a browser",
    "auto_map": "code that transformers, too, runs only on request",
    "finetuning_task": "a name",
    "problem_type": "of a classifier",
    "id2label": "of a classifier",
    "label2id": "of a classifier",
    "_num_labels": "of a classifier",
    "task_specific_params": "for pipelines of transformers",
    # The tokenizer says these itself.
    "bos_token_id": "the tokenizer puts its BOS in front",
    "pad_token_id": "padding is no target and is never seen",
    "unk_token_id": "the tokenizer's",
    "sep_token_id": "the tokenizer's",
    "cls_token_id": "the tokenizer's",
    "mask_token_id": "the tokenizer's",
    "tokenizer_class": "tokenizer.json says how to tokenise",
    "tokenizer_model_max_length": "a limit of the tokenizer",
    "tokenizer_padding_side": "the side of the padding changes no text",
    "model_max_length": "a limit of the tokenizer",
    # How the weights were made, kept or computed.
    "torch_dtype": "each tensor says its own dtype",
    "dtype": "each tensor says its own dtype",
    "initializer_range": "of weights that are drawn, not read",
    "pretraining_tp": "cuts a product in parts whose sum is the same",
    "use_cache": "this program decides where it caches",
    "attn_implementation": "the same attention by another kernel",
    "_attn_implementation": "the same attention by another kernel",
    "_attn_implementation_autoset": "the same attention by another kernel",
    "_attn_implementation_internal": "the same attention by another kernel",
    "_flash_attn_2_enabled": "the same attention by another kernel",
    "use_flash_attention": "the same attention by another kernel",
    "use_flash_attention_2": "the same attention by another kernel",
    "use_flash_attn": "the same attention by another kernel",
    "use_sdpa": "the same attention by another kernel",
    "use_fused_rope": "the same numbers by another kernel",
    "use_fused_rms_norm": "the same numbers by another kernel",
    "gradient_checkpointing": "memory of training",
    "use_recompute": "memory of training",
    "torchscript": "another way to run the same numbers",
    "use_bfloat16": "each tensor says its own dtype",
    "chunk_size_feed_forward": "cuts a product in parts that are joined again",
    "return_dict": "the form of an output",
    "output_attentions": "the form of an output",
    "output_hidden_states": "the form of an output",
    "output_scores": "the form of an output",
    "return_dict_in_generate": "the form of an output",
    "is_decoder": "a Llama is a decoder in any case",
    "max_sequence_length": "max_position_embeddings says it",
    "max_seq_len": "max_position_embeddings says it",
    "seq_length": "max_position_embeddings says it",
    # Defaults of sampling that old files hold. Flags of sample.py stand in their place.
    "do_sample": "sampling",
    "early_stopping": "sampling",
    "max_length": "sampling",
    "max_new_tokens": "sampling",
    "min_length": "sampling",
    "num_beams": "sampling",
    "num_beam_groups": "sampling",
    "num_return_sequences": "sampling",
    "diversity_penalty": "sampling",
    "length_penalty": "sampling",
    "repetition_penalty": "sampling",
    "encoder_no_repeat_ngram_size": "sampling",
    "no_repeat_ngram_size": "sampling",
    "temperature": "sampling",
    "top_k": "sampling",
    "top_p": "sampling",
    "typical_p": "sampling",
    "remove_invalid_values": "sampling",
    "loss_type": "of a training by transformers",
}


def read(folder):
    """The fields of model.ModelConfig, {name: value}. A UserError names each key that cannot be reproduced."""
    path = Path(folder) / "config.json"
    stored = read_object(path, "a model folder needs config.json")
    kind = architecture(path, stored)
    refuse_unknown(path, stored)
    config = MEANING[kind] | stored
    refuse_other_arithmetic(path, kind, config)
    settings = {key: flag(path, key, config[key]) for key in FLAGS}
    for key, largest in SIZES.items():
        # Without these two keys, or with null, the other sizes say them.
        if key in ("num_key_value_heads", "head_dim") and config.get(key) is None:
            settings[key] = None
        else:
            settings[key] = whole(path, key, config.get(key), largest)
    settings["rms_norm_eps"] = positive(path, "rms_norm_eps", config["rms_norm_eps"])
    share_out(path, settings)
    refuse_window(path, stored, config["sliding_window"], settings["max_position_embeddings"])
    rope = rope_of(path, config)
    return settings | {"rope_theta": rope["rope_theta"], "rope_scaling": rope}


# --- reading a file of settings ---


def read_object(path, otherwise):
    """The JSON object in a file. otherwise: the end of the UserError's sentence, what to do or to know"""
    try:
        text = path.read_text(encoding="utf-8-sig")
        stored = json.loads(text, object_pairs_hook=without_contradiction)
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} cannot be read ({e}); {otherwise}.") from None
    if not isinstance(stored, dict):
        raise UserError(
            f"{path} cannot be read: it holds {stored!r:.40}, no JSON object; {otherwise}."
        )
    return stored


def without_contradiction(pairs):
    """The dict of some (key, value). Of a key that is there twice, programs take the first value or the last."""
    found = {}
    for key, value in pairs:
        if found.setdefault(key, value) != value:
            raise ValueError(f"the key {key!r} is there twice, with two values")
    return found


def is_off(value):
    """Whether a value switches a feature off: null, false, 0, empty."""
    return value in (None, False, 0, "", [], {})


# --- one value ---


def whole(path, key, value, largest):
    """The value, a whole number. Refuse 16.0 like transformers 5, because a size that was computed may be wrong."""
    # True is an int to Python.
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if not is_number or not 1 <= value <= largest:
        raise UserError(
            f"{path}: {key} is {shown(value)}, where a whole number from 1 to {largest} is wanted."
        )
    return value


def positive(path, key, value):
    """The value, a finite number above 0."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # NaN fails the comparison, and so does infinity.
    if not is_number or not 0 < value < 1e30:
        raise UserError(f"{path}: {key} is {shown(value)}, where a number above 0 is wanted.")
    return value


def flag(path, key, value):
    if not isinstance(value, bool):
        raise UserError(f"{path}: {key} is {shown(value)}, where true or false is wanted.")
    return value


def shown(value):
    """A value as config.json has it, cut short."""
    if value is None:
        return "missing or null"
    return f"{json.dumps(value):.40}"


# --- what a model is ---


def architecture(path, stored):
    """LlamaForCausalLM or MistralForCausalLM."""
    named = stored.get("architectures")
    first = None
    if isinstance(named, list) and named:
        first = named[0]
    if first not in list(MEANING):
        raise UserError(
            f"{path}: architectures is {shown(named)}, which is no Llama-architecture model "
            '(["LlamaForCausalLM"] or ["MistralForCausalLM"]).'
        )
    return first


def refuse_unknown(path, stored):
    """A UserError for a key that no table names as used or harmless, unless its value switches a feature off."""
    for key, value in stored.items():
        if key in USED or key in HARMLESS or is_off(value):
            continue
        if key in REFUSED:
            raise UserError(
                f"{path}: {key} is {shown(value)}, which is not supported: {REFUSED[key]}. Use a checkpoint without it."
            )
        raise UserError(
            f"{path}: {key} is {shown(value)}, and this program does not know what that changes. Use a checkpoint "
            "without it; if it does not change the arithmetic, remove the key."
        )


def refuse_other_arithmetic(path, kind, config):
    """A UserError for a known key whose value asks for something that model.py does not compute."""
    layers = config.get("layer_types")
    if isinstance(layers, list):
        layers = [layer for layer in layers if layer != "full_attention"]
    if not is_off(layers):
        raise UserError(f"{path}: layer_types has {shown(layers)}, which is not supported.")
    # Without the key attention is causal; false lets a token see later ones.
    config = {"is_causal": True} | config
    wanted = {"model_type": MEANING[kind]["model_type"], "hidden_act": "silu", "is_causal": True}
    # Mistral's layers of transformers have no biases, whatever the file says.
    if kind == "MistralForCausalLM":
        wanted |= {"attention_bias": False, "mlp_bias": False}
    for key, only in wanted.items():
        if config[key] != only:
            raise UserError(
                f"{path}: {key} is {shown(config[key])}, but of a {kind} only {shown(only)} is supported."
            )


def share_out(path, settings):
    """Fill in num_key_value_heads and head_dim where they follow from other sizes. Heads must share out evenly."""
    heads = settings["num_attention_heads"]
    if settings["num_key_value_heads"] is None:
        settings["num_key_value_heads"] = heads
    if heads % settings["num_key_value_heads"]:
        raise UserError(
            f"{path}: {heads} heads cannot be shared out over {settings['num_key_value_heads']} key/value heads."
        )
    hidden = settings["hidden_size"]
    if settings["head_dim"] is None:
        if hidden % heads:
            raise UserError(
                f"{path}: head_dim is missing, and hidden_size {hidden} cannot be shared out over {heads} heads."
            )
        settings["head_dim"] = hidden // heads
    if settings["head_dim"] % 2:
        raise UserError(
            f"{path}: head_dim is {settings['head_dim']}, but RoPE turns pairs: an even number is wanted."
        )


def refuse_window(path, stored, window, positions):
    """A UserError if a token does not see all earlier ones. A window of all positions hides nothing."""
    if is_off(window):
        return
    window = whole(path, "sliding_window", window, SIZES["max_position_embeddings"])
    if window >= positions:
        return
    begin = f"sliding_window {window} is not supported"
    if "sliding_window" not in stored:
        begin = f"without the key sliding_window a Mistral has a window of {window} tokens, which is not supported"
    raise UserError(
        f'{path}: {begin}. If the checkpoint has no window, write "sliding_window": null; if it has one, write '
        f'"max_position_embeddings": {window}, because up to there a window hides nothing.'
    )


# --- RoPE ---


def rope_of(path, config):
    """The RoPE settings with rope_type and rope_theta: transformers 5 writes rope_parameters, 4 wrote rope_scaling.

    A file may have both, ours too. Then transformers 5 takes rope_scaling, and others rope_parameters."""
    rope = {}
    for key in ("rope_parameters", "rope_scaling"):
        for name, value in rope_table(path, key, config.get(key)).items():
            agree(path, name, rope.setdefault(name, value), value)
    rope.setdefault("rope_type", "default")
    theta = config.get("rope_theta")
    if theta is not None:
        agree(path, "rope_theta", rope.setdefault("rope_theta", theta), theta)
    elif "rope_theta" not in config:
        rope.setdefault("rope_theta", 10000.0)
    check_rope(path, config, rope)
    return rope


def rope_table(path, key, table):
    """A copy of one of the two tables, with rope_type, which old files call type. Empty where there is none."""
    if is_off(table):
        return {}
    if not isinstance(table, dict):
        raise UserError(f"{path}: {key} is {shown(table)}, where an object is wanted.")
    table = dict(table)
    kind = table.pop("type", None)
    if kind is not None:
        agree(path, "rope_type", table.setdefault("rope_type", kind), kind)
    table.setdefault("rope_type", "default")
    return table


def agree(path, name, one, other):
    """A UserError unless two places of the file give a setting the same value."""
    if one != other:
        raise UserError(
            f"{path}: {name} is {shown(one)} in one place and {shown(other)} in another; correct one of them."
        )


def check_rope(path, config, rope):
    """Check every RoPE setting: known, and a number that makes sense."""
    kind = rope["rope_type"]
    if kind not in list(ROPE_FIELDS):
        raise UserError(
            f"{path}: rope type {shown(kind)} is not supported; use a checkpoint without it."
        )
    for table in (rope, config):
        partial = table.get("partial_rotary_factor")
        if partial not in (None, 1):
            raise UserError(f"{path}: partial_rotary_factor {shown(partial)} is not supported.")
    for name in ["rope_theta", *ROPE_FIELDS[kind]]:
        positive(path, f"{name}, of RoPE,", rope.get(name))
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise UserError(f"{path}: low_freq_factor must be below high_freq_factor.")
    known = {"rope_type", "rope_theta", "partial_rotary_factor", *ROPE_FIELDS["llama3"]}
    for name, value in rope.items():
        if name not in known and not is_off(value):
            raise UserError(
                f"{path}: {name}, of RoPE, is {shown(value)}, and rope type {shown(kind)} knows no such setting."
            )
