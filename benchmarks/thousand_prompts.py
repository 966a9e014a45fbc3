"""Write many prompts in one batch, some of them again alone, and compare the texts.

    python benchmarks/thousand_prompts.py out prompts.txt       # a run, and a file of sample.py's --prompts
    python benchmarks/thousand_prompts.py out prompts.txt 64 50   # rows of the batch, texts that are written alone

stdout has one JSON line for each of fp32 greedy, fp32 sampled, bf16 greedy and bf16 sampled. In fp32 each text must be
the same alone, token by token. In bf16 a batch rounds differently from a row, so a text may differ. At the first token
that differs the two choices must be close: within 0.1 (sampled: 0.1 / temperature) by the same weights in fp32.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def written(model, prompts, ends, sampling):
    """Write all prompts. -> the new ids of each"""
    from generate import Engine, Scheduler

    engine = Engine(model, prompts, sampling)
    return [ids for _, ids, _ in sorted(Scheduler(engine, prompts, ends))]


def parting(one, other):
    """The first index at which two lists of ids differ."""
    for n, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return n
    return min(len(one), len(other))


def gap(exact, prompt, one, other, ends, sampling):
    """The distance of the two tokens at which `one` and `other` part: of their logits, by a model in fp32.

    For sampled texts it is the distance of logit / temperature + noise, of which sampling takes the largest."""
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
    # One of the two texts may have ended there: then its token is the end token.
    a = [*one, *ends][n]
    b = [*other, *ends][n]
    return round(abs(logits[0, a] - logits[0, b]).item(), 4)


def compare(cfg, file, alone):
    """Compare with one dtype and temperature. -> the content of its JSON line"""
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
    # Load the rounded weights of `model` into a model that multiplies in fp32.
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
    """-> (run, file of prompts, rows of the batch, texts that are written again alone)"""
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
                    f"a text differs from the one written alone, and the two tokens are not within {bound}"
                )


if __name__ == "__main__":
    main(*arguments(sys.argv[1:]))
