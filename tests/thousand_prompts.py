"""Many prompts at once beside each alone: the same texts?

    python tests/thousand_prompts.py out prompts.txt       # a run, and a file of sample.py's --prompts

In fp32, greedy and sampled, 50 of the texts are written again alone and must be the same, token by token. In bf16 a
batch rounds differently from a row: where a text parts from its single run, the two tokens must have been close, 0.1
(logit / temperature + noise: 0.1 / temperature), by the same weights multiplied in fp32. A line of JSON for each.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def main(run, file, rows=64, alone=50):
    import torch

    import sample

    for dtype in ("fp32", "bf16"):
        for temperature in (0, 0.7):
            torch._dynamo.reset()
            cfg = sample.Config(
                run=run,
                dtype=dtype,
                temperature=temperature,
                compile=torch.cuda.is_available(),
                batch_size=rows,
                max_new_tokens=256,
            )
            model, text, _ = sample.load(cfg)
            prompts = [sample.beginning(text, row)[0] for row in sample.read_prompts(file)]
            writer = sample.Writer(model, prompts, cfg)
            began, out = time.time(), {}
            for i, ids, _ in sample.write(writer, prompts, text.ends):
                out[i] = ids
            taken, tokens = time.time() - began, sum(map(len, out.values()))
            some = list(range(0, len(prompts), max(1, len(prompts) // alone)))[:alone]
            cfg.batch_size = 1
            mine = [prompts[i] for i in some]
            single = {
                some[i]: ids
                for i, ids, _ in sample.write(sample.Writer(model, mine, cfg), mine, text.ends)
            }
            gaps, model = [], model.float()  # the same weights, multiplied in fp32
            model.apply(
                lambda m: (
                    setattr(m, "dtype", torch.float32)
                    if isinstance(m, sample.models.RMSNorm)
                    else None
                )
            )
            for i in some:
                if out[i] != single[i]:
                    n = next(
                        (n for n, (a, b) in enumerate(zip(out[i], single[i])) if a != b),
                        min(len(out[i]), len(single[i])),
                    )
                    ids = torch.tensor([prompts[i] + single[i][:n]], device=writer.device)
                    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                        logits = sample.models.logits(model, model(ids)[:, -1])
                    if temperature:
                        key = torch.tensor(
                            [sample.noise_key(cfg.seed, prompts[i], 0)], device=writer.device
                        )
                        pos = torch.tensor([ids.shape[1]], device=writer.device)
                        logits = logits / temperature + sample.noise(key, pos, logits.shape[1])
                    one, other = (
                        [*ids, *text.ends][n] for ids in (out[i], single[i])
                    )  # one may have ended there
                    gaps.append(round(abs(logits[0, one] - logits[0, other]).item(), 4))
            bound = 0 if dtype == "fp32" else 0.1 / (temperature or 1)
            print(
                json.dumps(
                    {
                        "dtype": dtype,
                        "temperature": temperature,
                        "texts": len(prompts),
                        "tokens": tokens,
                        "s": round(taken, 2),
                        "tok_s": round(tokens / taken, 1),
                        "alone": len(some),
                        "same": len(some) - len(gaps),
                        "gaps": gaps,
                    }
                ),
                flush=True,
            )
            if any(not gap <= bound for gap in gaps):
                raise SystemExit(
                    f"a text parts from its single run where the two tokens were not within {bound}"
                )


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
