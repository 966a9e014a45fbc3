"""Many texts at a time: the engine, its scheduler, the choice of a token.

Follow one token. A `Scheduler` puts prompts into the rows of an `Engine`, which reads them in one pass. `Engine.step`
feeds the last token of every row to the model, which looks at the keys and values cached before; `choose` takes the
next token of each row. The `Scheduler` hands out what is finished and gives the free row to the next prompt.

    texts, ended = generate(model, prompts, ends, max_new_tokens=100)     # all at once

    engine = Engine(model, prompts, Sampling(batch_size=16))              # or as they are finished
    for i, ids, ended in Scheduler(engine, prompts, ends):
        ...

The names of the dimensions: B rows (texts at a time), n rows of one pass, T time, S positions of a row, C hidden size,
V vocabulary.
"""

from cli import UserError, say

import time
from collections import deque
from dataclasses import dataclass
from hashlib import blake2b

import torch

import model as models


@dataclass
class Sampling:
    """How a text is written. What the numbers mean stands in sample.py, whose flags they are."""

    temperature: float = 0.7
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 400
    seed: int = 1
    batch_size: int = 16
    compile: bool = False


# --- choosing a token ---

# The constants of splitmix64 (Steele et al. 2014), as signed 64-bit numbers.
GOLDEN = -0x61C8864680B583EB
MIX = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))


def noise_key(seed, prompt, n):
    """The noise of a text depends on seed, prompt and number of the sample alone: its batch changes nothing."""
    told = f"{seed} {n} {list(prompt)}"
    digest = blake2b(told.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def noise(keys, pos, V):
    """Gumbel noise [B, V], a pure function of keys [B], pos [B] and the column.

    The numbers are those of splitmix64, which every device computes alike. The largest of logit + noise is a draw from
    the softmax."""
    columns = torch.arange(V, device=keys.device)
    counter = pos[:, None] * V + columns  # [B, V]
    x = keys[:, None] + counter * GOLDEN
    for shift, factor in MIX:
        # >> of an int64 repeats its sign, and the mask takes the repeated signs away.
        unsigned = (1 << 64 - shift) - 1
        x = (x ^ (x >> shift & unsigned)) * factor
    # The best mixed 23 bits: with the half added they are exact in fp32, so u is never 0 or 1.
    bits = x >> 41 & 2**23 - 1
    u = (bits + 0.5) / 2**23
    return -(-u.log()).log()


def keep_likely(logits, top_k, top_p, min_p):
    """logits [B, V] with all but the likeliest at -inf.

    Kept are the top_k; of those the fewest that together reach top_p; of those what has min_p of the largest
    probability. What is exactly as likely as the last one kept is kept, too."""
    V = logits.shape[-1]
    k = min(top_k or V, V)
    best = logits.topk(k).values  # [B, k], falling
    p = best.softmax(-1)
    # A sum of probabilities may be rounded to above 1, so top_p = 1 needs a bound that no sum reaches.
    most = top_p if top_p < 1 else 2
    before = p.cumsum(-1) - p
    enough = min_p * p[:, :1]
    keep = (before < most) & (p >= enough)
    kept = keep.sum(-1, keepdim=True)  # [B, 1]
    least = best.gather(-1, (kept - 1).clamp(0))  # [B, 1], logit of the last one kept
    return logits.masked_fill(logits < least, float("-inf"))


def penalise(logits, penalty, seen):
    """Make what a row holds already less likely (CTRL, Keskar et al. 2019)."""
    less_likely = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, less_likely, logits)


def choose(logits, sampling, keys, pos, seen):
    """The next token of each row, [B], from logits [B, V]; seen [B, V]: what the row holds already."""
    logits = logits.float()
    if sampling.repetition_penalty != 1:
        logits = penalise(logits, sampling.repetition_penalty, seen)
    if sampling.temperature == 0:
        return logits.argmax(-1)

    logits = logits / sampling.temperature
    V = logits.shape[-1]
    fewer = 0 < sampling.top_k < V
    if fewer or sampling.top_p < 1 or sampling.min_p:
        logits = keep_likely(logits, sampling.top_k, sampling.top_p, sampling.min_p)
    drawn = logits + noise(keys, pos, V)
    return drawn.argmax(-1)


# --- the engine ---


@dataclass
class Rows:
    """What the engine knows of each of its rows. A step changes these tensors in place."""

    token: torch.Tensor  # [B], chosen last
    pos: torch.Tensor  # [B], where that token stands
    keys: torch.Tensor  # [B], of the noise
    seen: torch.Tensor  # [B, V], whether the row holds the token already

    @classmethod
    def empty(cls, B, V, device):
        return cls(
            token=torch.zeros(B, dtype=torch.long, device=device),
            pos=torch.zeros(B, dtype=torch.long, device=device),
            keys=torch.zeros(B, dtype=torch.long, device=device),
            seen=torch.zeros(B, V, dtype=torch.bool, device=device),
        )

    def only(self, which):
        token = self.token[which]
        pos = self.pos[which]
        keys = self.keys[which]
        seen = self.seen[which]
        return Rows(token, pos, keys, seen)


def write_token(model, h, rows, which, sampling):
    """Choose the next token of the rows `which` [n] from their hidden states h [n, C], and write it into `rows`.

    This is a function and no method, so that an Engine may keep its compiled form and still hold no cycle."""
    logits = models.logits(model, h)  # [n, V]
    keys = rows.keys[which]
    pos = rows.pos[which]
    seen = rows.seen[which]
    token = choose(logits, sampling, keys, pos, seen)
    rows.token[which] = token
    # A plain True would be copied from the host; a comparison that always holds is made on the device.
    rows.seen[which, token] = token >= 0


def shapes(tensors):
    return [t.shape for t in tensors]


class Engine:
    """Texts in B rows of S positions. Token, position, noise and cache of a row are in tensors that stay where they
    are: a step has one shape and waits for nobody, so it can be one CUDA graph.

    An Engine holds no reference to itself: it goes, and its caches with it, with its last name."""

    @torch.no_grad()
    def __init__(self, model, prompts, sampling):
        """prompts: all that will be read. The longest says how many positions a row has."""
        window = model.cfg.max_position_embeddings
        longest = max(len(prompt) for prompt in prompts)
        if longest >= window:
            raise UserError(
                f"a prompt has {longest} tokens, the model's window {window}: shorten it."
            )

        self.model = model
        self.sampling = sampling
        self.device = model.lm_head.weight.device
        self.B = min(sampling.batch_size, len(prompts))
        self.S = min(window, longest + sampling.max_new_tokens)
        self.rows = Rows.empty(self.B, model.cfg.vocab_size, self.device)
        self.every = torch.arange(self.B, device=self.device)  # the numbers of all rows
        self.caches = models.new_caches(model, self.B, self.S)
        self.write_token = write_token
        self.incoming = ()  # the tensors that a pass over prompts reads
        self.recorded_step = None  # the replay of a CUDA graph, where there is one
        self.recorded_pass = None
        if sampling.compile:
            self.compile()

    def read(self, rows, prompts, numbers):
        """Take a prompt (token ids) into each of these rows, in one pass, and choose its first new token.

        numbers: which sample of its prompt each text is."""
        incoming = self.prepare(rows, prompts, numbers)
        if shapes(incoming) != shapes(self.incoming):
            self.incoming = incoming
            self.recorded_pass = None
        elif self.recorded_pass is None:
            # Prompts of one shape often come in a row: the second pass of a shape is recorded.
            self.recorded_pass = self.record(self.run_pass)

        torch._foreach_copy_(self.incoming, incoming)
        if self.recorded_pass is not None:
            self.recorded_pass()
        else:
            self.run_pass()

    def step(self):
        """One more token for every row."""
        if self.recorded_step is not None:
            self.recorded_step()
        else:
            self.run_step()

    def keep(self, rows):
        """Go on with these rows only."""
        self.B = len(rows)
        self.rows = self.rows.only(rows)
        self.every = self.every[: self.B]
        self.caches = [self.cut(cache, rows) for cache in self.caches]

    def cut(self, cache, rows):
        k = cache.k[rows]
        v = cache.v[rows]
        return models.Cache(k, v, self.every)

    def send(self):
        """A function that waits for the tokens chosen last, on their way to the host beside what runs next."""
        if self.device.type != "cuda":
            return self.rows.token.tolist

        host = self.rows.token.to("cpu", non_blocking=True)
        arrived = torch.cuda.current_stream().record_event()

        def wait():
            arrived.synchronize()
            return host.tolist()

        return wait

    # --- the work itself, which can be recorded ---

    def prepare(self, rows, prompts, numbers):
        """The tensors of a pass: ids [n, T], and row, length and noise key of each prompt, [n]."""
        lengths = [len(prompt) for prompt in prompts]
        tiles = -(-max(lengths) // 16)
        T = min(self.S, tiles * 16)
        # On the right a prompt is filled up with its last token: no token sees what follows it.
        ids = [prompt + prompt[-1:] * (T - len(prompt)) for prompt in prompts]
        pairs = zip(prompts, numbers, strict=True)
        keys = [noise_key(self.sampling.seed, prompt, n) for prompt, n in pairs]
        return [torch.tensor(x, device=self.device) for x in (ids, rows, lengths, keys)]

    @torch.compiler.set_stance("force_eager")
    def run_pass(self):
        """Read what is in self.incoming. Not compiled: each length would be a graph of its own."""
        ids, which, lengths, keys = self.incoming
        caches = [models.Cache(cache.k, cache.v, which) for cache in self.caches]
        h = self.model(ids, caches=caches)  # [n, T, C]
        self.rows.pos[which] = lengths
        self.rows.keys[which] = keys
        nothing = torch.zeros_like(self.rows.seen[which])  # [n, V]
        self.rows.seen[which] = nothing.scatter_(1, ids, value=True)
        first = self.every[: len(which)]
        last = h[first, lengths - 1]  # [n, C]
        self.choose_from(last, which)

    def run_step(self):
        token = self.rows.token[:, None]  # [B, 1]
        pos = self.rows.pos[:, None]
        h = self.model(token, pos, self.caches)  # [B, 1, C]
        # A row that nobody reads any more stays at its last position.
        self.rows.pos.add_(1).clamp_(max=self.S - 1)
        self.choose_from(h[:, 0], self.every)

    def choose_from(self, h, which):
        self.write_token(self.model, h, self.rows, which, self.sampling)

    # --- compiled and recorded: skip at first reading ---

    def compile(self):
        began = time.time()
        for block in self.model.layers:
            block.compile(dynamic=False)
        self.write_token = torch.compile(write_token, dynamic=False)
        # A first call may still set something up, which must not be recorded.
        self.run_step()
        self.run_step()
        self.recorded_step = self.record(self.run_step)
        taken = time.time() - began
        say("compile", f"{taken:.1f} s, for {self.B} row(s) of {self.S} positions")

    def record(self, work):
        """work() as one CUDA graph: the function that replays it. None where there are no graphs."""
        if not self.sampling.compile or self.device.type != "cuda":
            return None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay


# --- the scheduler ---


class Scheduler:
    """Go on from each prompt until one of `ends`, with an Engine that has fewer rows than there are prompts.

    Iterating yields (index of the prompt, new ids without the end token, ended) as texts are finished. The longest
    prompts are begun first, and a free row takes the next. numbers: which sample of its prompt each text is.
    on_token(index, id) is called as tokens come: on a GPU one step behind, so that the GPU never waits for it."""

    def __init__(self, engine, prompts, ends, numbers=None, on_token=None):
        self.engine = engine
        self.prompts = prompts
        self.ends = ends
        self.numbers = numbers or [0] * len(prompts)
        self.on_token = on_token
        # The next prompt to begin is the last of this list.
        self.waiting = sorted(range(len(prompts)), key=self.length)
        self.slots = [None] * engine.B  # which prompt is in each row
        self.texts = {}  # {prompt: its new ids} of what is being written
        self.sent = deque()  # (tokens on their way, the prompt of each)
        self.most = engine.sampling.max_new_tokens
        self.lag = int(engine.device.type == "cuda")  # steps that may be on their way
        self.together = max(1, engine.B // 8)  # prompts read at once, while other rows wait

    def length(self, i):
        return len(self.prompts[i])

    @torch.no_grad()
    def __iter__(self):
        while self.waiting or self.texts:
            if self.worth_filling():
                begun = self.fill()
                yield from self.settle(begun)
            elif self.worth_shrinking():
                self.shrink()
            self.engine.step()
            yield from self.settle(self.slots)

    def free(self):
        """The rows that hold no text, by number."""
        return [row for row, i in enumerate(self.slots) if i is None]

    def worth_filling(self):
        if not self.waiting:
            return False
        # All rows wait while some read, so several prompts are read at once.
        wanted = min(self.together, len(self.waiting))
        return len(self.free()) >= wanted

    def fill(self):
        """Read waiting prompts into free rows. -> the prompt that each row began with, None where it began with none"""
        free = self.free()
        n = min(len(free), len(self.waiting), self.largest_pass())
        rows = free[:n]
        new = [self.waiting.pop() for _ in rows]

        begun = [None] * self.engine.B
        for row, i in zip(rows, new, strict=True):
            begun[row] = i
            self.slots[row] = i
            self.texts[i] = []
        prompts = [self.prompts[i] for i in new]
        numbers = [self.numbers[i] for i in new]
        self.engine.read(rows, prompts, numbers)
        return begun

    def largest_pass(self):
        """How many prompts may be read at once. A pass has a bounded number of tokens, because they take memory."""
        longest = self.length(self.waiting[-1])
        fitting = max(1, 8192 // longest)
        if self.texts:
            return min(self.together, fitting)
        return fitting

    def worth_shrinking(self):
        """Whether half of the work would be for nobody. What is compiled has one shape and stays."""
        if self.waiting or self.engine.sampling.compile:
            return False
        return 2 * len(self.free()) >= self.engine.B

    def shrink(self):
        """Go on with the busy rows only."""
        busy = [row for row, i in enumerate(self.slots) if i is not None]
        self.engine.keep(busy)
        self.slots = [self.slots[row] for row in busy]

    def settle(self, whose):
        """Send the tokens chosen last, whose[row] being the prompt of each, and take those that have come.

        -> [(index, ids, ended)] of the texts that these finish"""
        tokens = self.engine.send()
        self.sent.append((tokens, list(whose)))
        finished = []
        while len(self.sent) > self.lag:
            tokens, whose = self.sent.popleft()
            for token, i in zip(tokens(), whose, strict=True):
                # A row may have no text, or one that was finished a step ago.
                if i in self.texts and self.take(i, token):
                    finished.append(self.finish(i, token))
        return finished

    def take(self, i, token):
        """Add a token to text i. -> whether the text is finished"""
        if token in self.ends:
            return True
        ids = self.texts[i]
        ids.append(token)
        if self.on_token is not None:
            self.on_token(i, token)
        room = self.engine.S - self.length(i)
        return len(ids) == min(self.most, room)

    def finish(self, i, token):
        """Free the row of text i. -> what iterating yields"""
        row = self.slots.index(i)
        self.slots[row] = None
        ids = self.texts.pop(i)
        return i, ids, token in self.ends


def generate(model, prompts, ends, numbers=None, **how):
    """Go on from each prompt, all at once. -> [new ids, without the end token], [ended]; how: fields of Sampling."""
    sampling = Sampling(**{"batch_size": len(prompts), **how})
    engine = Engine(model, prompts, sampling)
    finished = sorted(Scheduler(engine, prompts, ends, numbers))
    texts = [ids for _, ids, _ in finished]
    ended = [end for _, _, end in finished]
    return texts, ended
