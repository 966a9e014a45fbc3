"""Many prompts at once beside each alone: the same texts?

    python benchmarks/thousand_prompts.py out prompts.txt       # a run, and a file of sample.py's --prompts

In fp32, greedy and sampled, 50 of the texts are written again alone and must be the same, token by token. In bf16 a
batch rounds differently from a row: where a text parts from its single run, the two tokens must have been close, 0.1
(logit / temperature + noise: 0.1 / temperature), by the same weights multiplied in fp32. A line of JSON for each.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def written(model, prompts, ends, sampling):
    """[new ids] of each prompt"""
    from generate import Engine, Scheduler

    engine = Engine(model, prompts, sampling)
    return [ids for _, ids, _ in sorted(Scheduler(engine, prompts, ends))]


def parting(one, other):
    """The first place where two lists of ids differ."""
    for n, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return n
    return min(len(one), len(other))


def gap(exact, prompt, one, other, ends, sampling):
    """How far the two tokens with which `one` and `other` part are from each other, by a model in fp32."""
    import torch

    import generate
    import model as models

    device = exact.lm_head.weight.device
    n = parting(one, other)
    ids = torch.tensor([prompt + other[:n]], device=device)  # [1, T]
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        logits = models.logits(exact, exact(ids)[:, -1])  # [1, V]
    if sampling.temperature:
        key = torch.tensor([generate.noise_key(sampling.seed, prompt, 0)], device=device)
        pos = torch.tensor([ids.shape[1]], device=device)
        noise = generate.noise(key, pos, logits.shape[1])
        logits = logits / sampling.temperature + noise
    # One of the two may have ended there.
    a = [*one, *ends][n]
    b = [*other, *ends][n]
    return round(abs(logits[0, a] - logits[0, b]).item(), 4)


def compare(cfg, file, alone):
    """-> what is printed of one dtype and temperature"""
    import torch

    import sample

    torch._dynamo.reset()
    model, text, _ = sample.load(cfg)
    sampling = sample.sampling(cfg)
    rows = sample.read_prompts(file)
    prompts = [sample.beginning(text, row)[0] for row in rows]
    began = time.time()
    many = written(model, prompts, text.ends, sampling)
    taken = time.time() - began

    step = max(1, len(prompts) // alone)
    some = range(0, len(prompts), step)[:alone]
    mine = [prompts[i] for i in some]
    single = written(model, mine, text.ends, replace(sampling, batch_size=1))
    # The same weights, as they were rounded, multiplied in fp32.
    exact, _, _ = sample.load(replace(cfg, dtype="fp32", compile=False))
    exact.load_state_dict(model.state_dict())
    gaps = []
    for i, other in zip(some, single, strict=True):
        if many[i] != other:
            gaps.append(gap(exact, prompts[i], many[i], other, text.ends, sampling))
    tokens = sum(len(ids) for ids in many)
    return {
        "dtype": cfg.dtype,
        "temperature": cfg.temperature,
        "texts": len(prompts),
        "tokens": tokens,
        "s": round(taken, 2),
        "tok_s": round(tokens / taken, 1),
        "alone": len(mine),
        "same": len(mine) - len(gaps),
        "gaps": gaps,
    }


def arguments(argv):
    """-> (run, file of prompts, rows of a batch, texts that are written again alone)"""
    run, file, *numbers = argv
    rows, alone = [*map(int, numbers), *(64, 50)[len(numbers) :]]
    return run, file, rows, alone


def main(run, file, rows, alone):
    import torch

    import sample

    cfg = sample.Config(
        run=run, compile=torch.cuda.is_available(), batch_size=rows, max_new_tokens=256
    )
    for dtype in ("fp32", "bf16"):
        for temperature in (0, 0.7):
            out = compare(replace(cfg, dtype=dtype, temperature=temperature), file, alone)
            print(json.dumps(out), flush=True)
            bound = 0.1 / (temperature or 1)
            if dtype == "fp32":
                bound = 0
            if any(not gap <= bound for gap in out["gaps"]):
                raise SystemExit(
                    f"a text parts from its single run where the two tokens were not within {bound}"
                )


if __name__ == "__main__":
    main(*arguments(sys.argv[1:]))
