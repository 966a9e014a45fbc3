"""How fast text is written, ours beside transformers and Unsloth, on the same random weights and the same prompts.

    python tests/sampling_speed.py .cache/bench/8b ours:1:none ours:1:nf4 ours:32:none static:1:none
    python tests/sampling_speed.py .cache/bench/8b unsloth-graphs:1:none

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

    torch._dynamo.reset()
    cfg = sample.Config(
        model=str(folder),
        quant=kind,
        compile=compiled,
        temperature=0,
        max_new_tokens=NEW,
        batch_size=B,
    )
    began = time.time()
    model, *_ = sample.load(cfg)
    loaded, began = time.time() - began, time.time()
    writer, out = sample.Writer(model, prompts, cfg), {"load_s": loaded}
    out["compile_s"] = time.time() - began
    for _ in range(
        3
    ):  # the last counts: the first call of a kernel loads it, the second of a shape is recorded
        times, began, n = [], time.time(), 0
        for _, ids, _ in sample.write(
            writer, prompts, set(), on_token=lambda i, t, add=times.append: add(time.time())
        ):
            n += len(ids)
        first, taken = times[0] - began, time.time() - began
        out |= {"tok_s": n / taken, "decode_tok_s": (n - B) / (taken - first), "first_s": first}
    assert n == B * NEW
    return out


def theirs(model, prompts, **how):
    import torch

    ids, out = torch.tensor(prompts, device="cuda"), {}
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 1
    kept = {"attention_mask": torch.ones_like(ids), "do_sample": False, **how}
    for name in ("compile_s", "again", "taken"):
        began = time.time()
        made = model.generate(ids, max_new_tokens=NEW, **kept)
        torch.cuda.synchronize()
        out[name] = time.time() - began
    assert made.shape[1] == T + NEW, made.shape
    out["compile_s"] -= out["taken"]
    began = time.time()
    model.generate(ids, max_new_tokens=1, **kept)
    torch.cuda.synchronize()
    out["first_s"] = time.time() - began
    n, taken, _ = len(prompts) * NEW, out.pop("taken"), out.pop("again")
    return {
        **out,
        "tok_s": n / taken,
        "decode_tok_s": (n - len(prompts)) / (taken - out["first_s"]),
    }


def transformers(folder, B, kind, prompts, static):
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch._dynamo.reset()
    bits = (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        if kind == "nf4"
        else None
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": 0}, quantization_config=bits
    )
    return theirs(model, prompts, **({"cache_implementation": "static"} if static else {}))


def unsloth(folder, B, kind, prompts):
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        str(folder),
        max_seq_length=512,
        load_in_4bit=kind == "nf4",
        dtype=None if kind == "nf4" else __import__("torch").bfloat16,
    )
    FastLanguageModel.for_inference(model)
    return theirs(model, prompts)


def main():
    folder, *rows = sys.argv[1:]
    if any(row.startswith("unsloth-graphs") for row in rows):
        os.environ["UNSLOTH_DECODE_CUDA_GRAPHS"] = "1"
    if any(row.startswith("unsloth") for row in rows):
        import unsloth as _  # noqa: F401 (before all others)
    if len({row.split(":")[0] if row.startswith("unsloth") else "" for row in rows}) > 1:
        raise SystemExit(
            "unsloth and unsloth-graphs each in a process of its own: they patch the others"
        )
    import torch

    import bench

    bench.make_model(Path(folder), "tiny" if folder.endswith("tiny") else "8b")
    for row in rows:
        who, B, kind = row.split(":")
        g = torch.Generator().manual_seed(0)
        prompts = torch.randint(2, 1024, (int(B), T), generator=g).tolist()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        how = {
            "ours": lambda *a: ours(*a, True),
            "eager": lambda *a: ours(*a, False),
            "static": lambda *a: transformers(*a, True),
            "dynamic": lambda *a: transformers(*a, False),
        }
        try:
            out = how.get(who, unsloth)(folder, int(B), kind, prompts)
        except Exception as e:  # noqa: BLE001 (a peer that fails here should not take the others along)
            out = {"error": f"{type(e).__name__}: {str(e).strip().splitlines()[-1:]}"}
        if torch.cuda.is_available():
            out |= {
                "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
                "card": torch.cuda.get_device_name(),
            }
        print(
            json.dumps(
                {
                    "who": who,
                    "batch": int(B),
                    "weights": kind,
                    "torch": torch.__version__,
                    **{k: round(v, 3) if isinstance(v, float) else v for k, v in out.items()},
                }
            ),
            flush=True,
        )
        torch.compiler.reset()
        gc.collect()  # what is compiled refers to itself
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
