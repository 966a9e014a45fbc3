"""How fast text is written, ours beside transformers and Unsloth, on the same random weights and the same prompts.

    python benchmarks/sampling_speed.py .cache/bench/8b ours:1:none ours:1:nf4 ours:32:none static:1:none
    python benchmarks/sampling_speed.py .cache/bench/8b unsloth-graphs:1:none

The folder is made if it is not there (a GPU and 16 GB of disk). who:batch:kind, who being ours (compiled, one graph a
token), eager (ours without), dynamic and static (transformers' caches), unsloth and unsloth-graphs (its decoding in
CUDA graphs); each of these two in a process of its own, as Unsloth patches transformers. Prompts of 64 tokens, 256 new
ones, greedy, nothing ends a text. A line of JSON each: tok_s counts all from the prompt on, decode_tok_s from the first
token on.
"""

import gc
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
T, NEW = 64, 256


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
    # The last counts: the first call of a kernel loads it, the second pass of a shape is recorded.
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
    """taken, first: seconds to the last and to the first new tokens of B texts."""
    tokens = B * NEW
    return {
        "tok_s": tokens / taken,
        "decode_tok_s": (tokens - B) / (taken - first),
        "first_s": first,
    }


def theirs(model, prompts, **how):
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
    """Unsloth has to be imported before all others, and patches them: one kind of it a process."""
    if any(row.startswith("unsloth-graphs") for row in rows):
        os.environ["UNSLOTH_DECODE_CUDA_GRAPHS"] = "1"
    kinds = {row.split(":")[0] if row.startswith("unsloth") else "" for row in rows}
    if len(kinds) > 1:
        raise SystemExit(
            "unsloth and unsloth-graphs each in a process of its own: they patch the others"
        )
    if kinds != {""}:
        import unsloth as _  # noqa: F401 (before all others)


def one_row(folder, row):
    """-> what is printed of one who:batch:kind"""
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
    except Exception as e:  # noqa: BLE001 (a peer that fails here should not take the others along)
        out["error"] = f"{type(e).__name__}: {str(e).strip().splitlines()[-1:]}"
    if has_gpu:
        out["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
        out["card"] = torch.cuda.get_device_name()
    return out


WHO = ["ours", "eager", "static", "dynamic", "unsloth", "unsloth-graphs"]


def arguments(argv):
    """-> (folder, rows), each row who:batch:kind"""
    folder, *rows = argv
    for row in rows:
        who, batch, kind = row.split(":")
        if who not in WHO or int(batch) < 1 or kind not in ("none", "nf4", "fp8"):
            raise SystemExit(f"{row} is no row: who:batch:kind, with who one of {', '.join(WHO)}")
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
        gc.collect()  # what is compiled refers to itself
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
