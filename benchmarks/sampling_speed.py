"""Measure how fast texts are written: this code, transformers and Unsloth, on the same random weights and prompts.

    python benchmarks/sampling_speed.py .cache/bench/8b ours:1:none ours:1:nf4 ours:32:none ours:32:nf4 eager:1:none
    python benchmarks/sampling_speed.py .cache/bench/8b static:1:none dynamic:1:none static:32:none
    python benchmarks/sampling_speed.py .cache/bench/8b unsloth-graphs:1:none unsloth-graphs:32:nf4
    python benchmarks/sampling_speed.py .cache/bench/8b unsloth:1:nf4 unsloth:32:nf4 unsloth:1:none

The first argument is the folder of the model, which is made if it is missing (this takes a GPU and 16 GB of disk). Each
other argument is a row, who:batch:weights, with weights none (bf16), nf4 or fp8. who is one of:

    ours              sample.py's engine with --compile: a decode step is one CUDA graph
    eager             the same engine without --compile
    static, dynamic   transformers with its static or its dynamic cache
    unsloth           Unsloth as it comes
    unsloth-graphs    Unsloth with its decoding in CUDA graphs

Run the last two in a process of their own each, because Unsloth patches transformers. A prompt has 64 tokens and gets
256 new ones, greedy; no token ends a text. stdout has one JSON line a row: tok_s counts the time from the prompt on,
decode_tok_s from the first new token on.
"""

import gc
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
T, NEW = 64, 256  # tokens of a prompt, and new ones


def ours(folder, B, kind, prompts, compiled):
    import torch

    import sample
    from generate import Engine

    torch._dynamo.reset()
    cfg = sample.Config(
        model=str(folder),
        quant=kind,
        compile=compiled,
        temperature=0,
        max_new_tokens=NEW,
        batch_size=B,
    )
    out = {}
    began = time.time()
    model, _, _ = sample.load(cfg)
    out["load_s"] = time.time() - began

    began = time.time()
    engine = Engine(model, prompts, sample.sampling(cfg))
    out["compile_s"] = time.time() - began
    # The third time counts, because the first one loads kernels and the second one records a CUDA graph.
    for _ in range(3):
        speeds = time_once(engine, prompts)
    return out | speeds


def time_once(engine, prompts):
    from generate import Scheduler

    times = []

    def on_token(i, token):
        times.append(time.time())

    began = time.time()
    texts = Scheduler(engine, prompts, set(), on_token=on_token)
    tokens = sum(len(ids) for _, ids, _ in texts)
    taken = time.time() - began
    assert tokens == len(prompts) * NEW
    return speeds_of(len(prompts), taken, times[0] - began)


def speeds_of(B, taken, first):
    """taken: seconds to the last new token of B texts; first: seconds to the first one"""
    tokens = B * NEW
    return {
        "tok_s": tokens / taken,
        "decode_tok_s": (tokens - B) / (taken - first),
        "first_s": first,
    }


def theirs(model, prompts, **how):
    """Measure a model with transformers' generate. Its third call counts, as in `ours`."""
    import torch

    ids = torch.tensor(prompts, device="cuda")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 1
    how["attention_mask"] = torch.ones_like(ids)
    how["do_sample"] = False

    def seconds(new):
        began = time.time()
        made = model.generate(ids, max_new_tokens=new, **how)
        torch.cuda.synchronize()
        assert made.shape[1] == T + new, made.shape
        return time.time() - began

    first_call = seconds(NEW)
    seconds(NEW)
    taken = seconds(NEW)
    first = seconds(1)
    return {"compile_s": first_call - taken} | speeds_of(len(prompts), taken, first)


def transformers(folder, B, kind, prompts, static):
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch._dynamo.reset()
    bits = None
    if kind == "nf4":
        bits = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": 0}, quantization_config=bits
    )
    how = {"cache_implementation": "static"} if static else {}
    return theirs(model, prompts, **how)


def unsloth(folder, B, kind, prompts):
    import torch
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        str(folder),
        max_seq_length=512,
        load_in_4bit=kind == "nf4",
        dtype=None if kind == "nf4" else torch.bfloat16,
    )
    FastLanguageModel.for_inference(model)
    return theirs(model, prompts)


def measure(who, *args):
    if who == "ours":
        return ours(*args, compiled=True)
    if who == "eager":
        return ours(*args, compiled=False)
    if who == "static":
        return transformers(*args, static=True)
    if who == "dynamic":
        return transformers(*args, static=False)
    return unsloth(*args)


def import_unsloth(rows):
    """Import Unsloth before all others, because Unsloth patches them; so a process has one kind of rows."""
    if any(row.startswith("unsloth-graphs") for row in rows):
        os.environ["UNSLOTH_DECODE_CUDA_GRAPHS"] = "1"
    kinds = {row.split(":")[0] if row.startswith("unsloth") else "" for row in rows}
    if len(kinds) > 1:
        raise SystemExit(
            "run unsloth and unsloth-graphs each in a process of its own, because Unsloth patches the others"
        )
    if kinds != {""}:
        import unsloth as _  # noqa: F401 (imported for its patches)


def one_row(folder, row):
    """Measure one row, who:batch:weights. -> the content of its JSON line"""
    import torch

    who, B, kind = row.split(":")
    g = torch.Generator().manual_seed(0)
    prompts = torch.randint(2, 1024, (int(B), T), generator=g).tolist()
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.reset_peak_memory_stats()
    out = {"who": who, "batch": int(B), "weights": kind, "torch": torch.__version__}
    try:
        numbers = measure(who, folder, int(B), kind, prompts)
        out |= {name: round(value, 3) for name, value in numbers.items()}
    except Exception as e:  # noqa: BLE001 (one peer that fails should not end the others' measurements)
        out["error"] = f"{type(e).__name__}: {str(e).strip().splitlines()[-1:]}"
    if has_gpu:
        out["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
        out["card"] = torch.cuda.get_device_name()
    return out


WHO = ["ours", "eager", "static", "dynamic", "unsloth", "unsloth-graphs"]


def arguments(argv):
    """-> (folder, rows), each row who:batch:weights"""
    folder, *rows = argv
    for row in rows:
        who, batch, kind = row.split(":")
        if who not in WHO or int(batch) < 1 or kind not in ("none", "nf4", "fp8"):
            raise SystemExit(
                f"{row} is no row: who:batch:weights, with who one of {', '.join(WHO)}"
            )
    return folder, rows


def main():
    folder, rows = arguments(sys.argv[1:])
    import_unsloth(rows)
    import torch

    import bench

    bench.make_model(Path(folder), "tiny" if folder.endswith("tiny") else "8b")
    for row in rows:
        print(json.dumps(one_row(folder, row)), flush=True)
        torch.compiler.reset()
        # Collect, because compiled code is part of reference cycles and would keep the old model on the card.
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
