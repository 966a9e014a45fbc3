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

from cli import PULSE, UserError, say

import json
import math
import os
import re
import time
from collections import deque
from dataclasses import dataclass
from hashlib import blake2b

import torch

import model as models
from speed.compiled import not_compiled


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

# The constants of splitmix64 (Steele et al. 2014), a generator whose n-th number is a function of seed and n. They are
# written as signed numbers, because torch multiplies int64. MIX: (right shift, factor) of its two mixing steps.
GOLDEN = -0x61C8864680B583EB
MIX = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))


def noise_key(seed, prompt, n):
    """A 64-bit key for the noise of one text, from --seed, its prompt, and n: which sample of this prompt it is."""
    told = f"{seed} {n} {list(prompt)}"
    digest = blake2b(told.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def noise(keys, pos, V):
    """Gumbel noise [B, V], a pure function of keys [B], pos [B] and the column.

    What for: the largest of logit + Gumbel noise is a draw from the softmax. One draw from three tokens:

        logits     2.0    1.0    0.0     softmax 0.67, 0.24, 0.09
        noise      0.1    1.9   -0.4
        sum        2.1    2.9   -0.4     token 1 is drawn; of many draws 67 % are token 0

    Why a pure function: the numbers of torch's generator depend on how many were drawn before, so a text would depend
    on its neighbours in the batch. These depend on the text's own key and position. They need no state, so a recorded
    step can replay them, and every device computes the same integers.
    Proof, in tests/test_generate.py: test_choose_draws_from_the_softmax, test_a_text_does_not_depend_on_its_batch,
    test_the_noise_is_gumbel_noise_of_the_key_the_position_and_the_column, test_the_noise_is_splitmix64."""
    columns = torch.arange(V, device=keys.device)
    # Each position and column of a text has a number of its own.
    counter = pos[:, None] * V + columns  # [B, V]
    x = keys[:, None] + counter * GOLDEN
    for shift, factor in MIX:
        # >> of a negative int64 fills in ones from the left, and splitmix64 wants zeros: `unsigned` masks the ones out.
        unsigned = (1 << 64 - shift) - 1
        x = (x ^ (x >> shift & unsigned)) * factor
    # Take the top 23 bits, which are mixed best. fp32 holds bits + 0.5 exactly, so u is never 0 or 1.
    bits = x >> 41 & 2**23 - 1
    u = (bits + 0.5) / 2**23
    # A uniform u becomes Gumbel noise.
    return -(-u.log()).log()


def keep_likely(logits, top_k, top_p, min_p):
    """logits [B, V] with all but the likeliest at -inf.

    Three filters, one after another. With top_k 4 and these probabilities among the four:

        p            0.5    0.3    0.15    0.05
        before       0      0.5    0.8     0.95     the sum of those to the left
        top_p 0.7    keep   keep   -       -        keep while before < 0.7: the fewest that together reach 0.7
        min_p 0.2    keep   keep   keep    -        keep p >= 0.2 * 0.5

    A token exactly as likely as the last one kept is kept, too.
    Proof: tests/test_generate.py: test_top_k_top_p_and_min_p_keep_exactly_the_likeliest."""
    V = logits.shape[-1]
    k = min(top_k or V, V)
    best = logits.topk(k).values  # [B, k], falling
    p = best.softmax(-1)
    # A sum of probabilities may be rounded to 1 or above, so top_p = 1 needs a bound that no sum reaches.
    most = top_p if top_p < 1 else 2
    before = p.cumsum(-1) - p
    enough = min_p * p[:, :1]
    keep = (before < most) & (p >= enough)
    kept = keep.sum(-1, keepdim=True)  # [B, 1], how many
    least = best.gather(-1, (kept - 1).clamp(0))  # [B, 1], logit of the last one kept
    return logits.masked_fill(logits < least, float("-inf"))


def penalise(logits, penalty, seen):
    """Make the tokens that a row holds already less likely (CTRL, Keskar et al. 2019).

    Divide a positive logit by the penalty, multiply a negative one: with 1.2, 3 becomes 2.5 and -3 becomes -3.6."""
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

# The Scheduler gets this id where the model computed NaN or inf.
NO_TOKEN = -1


@dataclass
class Rows:
    """What the engine knows of each of its rows. A step writes into these tensors and makes no new ones.

    So a recorded step finds them at the same addresses."""

    token: torch.Tensor  # [B], chosen last
    pos: torch.Tensor  # [B], where that token stands
    keys: torch.Tensor  # [B], of the noise
    seen: torch.Tensor  # [B, V], whether the row holds the token already
    logit: torch.Tensor  # [B], of the token chosen last; NaN where any logit of the row was NaN

    @classmethod
    def empty(cls, B, V, device):
        return cls(
            token=torch.zeros(B, dtype=torch.long, device=device),
            pos=torch.zeros(B, dtype=torch.long, device=device),
            keys=torch.zeros(B, dtype=torch.long, device=device),
            seen=torch.zeros(B, V, dtype=torch.bool, device=device),
            logit=torch.zeros(B, device=device),
        )

    def only(self, which):
        token = self.token[which]
        pos = self.pos[which]
        keys = self.keys[which]
        seen = self.seen[which]
        logit = self.logit[which]
        return Rows(token, pos, keys, seen, logit)


def write_token(model, h, rows, which, sampling):
    """Choose the next token of the rows `which` [n] from their hidden states h [n, C], and write it into `rows`.

    A function and no method: an Engine keeps its compiled form, and a compiled method would refer to the Engine."""
    logits = models.logits(model, h)  # [n, V]
    keys = rows.keys[which]
    pos = rows.pos[which]
    seen = rows.seen[which]
    token = choose(logits, sampling, keys, pos, seen)
    rows.token[which] = token
    # argmax takes a NaN for the largest, so the logit of the choice tells whether one was there. See Engine.send.
    best = logits.gather(1, token[:, None])  # [n, 1]
    rows.logit[which] = best[:, 0].float()
    # Write True, as a comparison that always holds: a plain True would be copied from the host.
    rows.seen[which, token] = token >= 0


def shapes(tensors):
    return [t.shape for t in tensors]


class Engine:
    """Texts in B rows of S positions: the tensors, and the two kinds of work on them. Which text is in which row is the
    Scheduler's business.

        read    a pass: prompts into some rows, in one forward; each gets its first new token
        step    a decode step: one more token for every row, whether somebody reads it or not

    Token, position, noise key and cache of each row are in tensors that keep their address and shape. A step reads
    nothing from the host. So on a GPU a step can be recorded once, and replayed with one launch.

    An Engine holds no reference to itself, so its caches are freed as soon as nobody holds the Engine."""

    @torch.no_grad()
    def __init__(self, model, prompts, sampling):
        """prompts: all that will be read. The longest, and max_new_tokens, say how many positions a row has."""
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
        # Functions that replay a CUDA graph, or None. The recorded pass is for prompts of the shape of `incoming`.
        self.recorded_step = None
        self.recorded_pass = None
        self.can_record = on_one_gpu(model)
        if sampling.compile or self.can_record:
            self.warm_up(prompts)

    def read(self, rows, prompts, numbers):
        """Take a prompt (token ids) into each of these rows, in one pass, and choose its first new token.

        numbers: which sample of its prompt each text is."""
        incoming = self.prepare(rows, prompts, numbers)
        if shapes(incoming) != shapes(self.incoming):
            self.incoming = incoming
            self.recorded_pass = None
        elif self.recorded_pass is None and self.can_record:
            # Record the second pass of a shape in a row: one shape alone is not worth it.
            self.recorded_pass = self.record(self.run_pass)

        # A recorded pass reads its own tensors, so copy the prompts into those.
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
        """Go on with these rows only: the others are not computed from here on. Frees their caches."""
        self.B = len(rows)
        self.rows = self.rows.only(rows)
        self.every = self.every[: self.B]
        self.caches = [self.cut(cache, rows) for cache in self.caches]

    def cut(self, cache, rows):
        k = cache.k[rows]
        v = cache.v[rows]
        return models.Cache(k, v, self.every)

    def send(self):
        """Begin to copy the tokens chosen last to the host. -> a function that waits for them and returns them

        The copy stands in the GPU's queue behind the step that chose the tokens. So the host can launch the next step
        before it waits for this copy. A token that was chosen by NaN or inf is returned as NO_TOKEN."""
        if self.device.type != "cuda":
            tokens = told(self.rows.token, self.rows.logit)
            return lambda: tokens

        token = self.rows.token.to("cpu", non_blocking=True)
        logit = self.rows.logit.to("cpu", non_blocking=True)
        arrived = torch.cuda.current_stream().record_event()

        def wait():
            arrived.synchronize()
            return told(token, logit)

        return wait

    # --- the work itself, which can be recorded ---

    def prepare(self, rows, prompts, numbers):
        """The tensors of a pass: ids [n, T], and row, length and noise key of each prompt, [n]."""
        lengths = [len(prompt) for prompt in prompts]
        tiles = -(-max(lengths) // 16)
        T = min(self.S, tiles * 16)
        # Round T up to a multiple of 16, so that shapes repeat. Fill a prompt up on the right with its last token,
        # because no token sees what follows it.
        ids = [prompt + prompt[-1:] * (T - len(prompt)) for prompt in prompts]
        pairs = zip(prompts, numbers, strict=True)
        keys = [noise_key(self.sampling.seed, prompt, n) for prompt, n in pairs]
        return [torch.tensor(x, device=self.device) for x in (ids, rows, lengths, keys)]

    def run_pass(self):
        """Read the prompts in self.incoming. Not compiled, because each new length would compile a graph."""
        ids, which, lengths, keys = self.incoming
        caches = [models.Cache(cache.k, cache.v, which) for cache in self.caches]
        with not_compiled(self.sampling.compile):
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
        # A row whose text is finished goes on computing. Stop it at its last position, where its cache ends.
        self.rows.pos.add_(1).clamp_(max=self.S - 1)
        self.choose_from(h[:, 0], self.every)

    def choose_from(self, h, which):
        self.write_token(self.model, h, self.rows, which, self.sampling)

    # --- compiled and recorded: skip at first reading ---
    #
    # Why: a step of SmolLM2-135M is 2,000 launches from Python: on an H100 60 ms, the work itself 4. A recorded
    # step is one launch. It replays the same kernels, so its tokens are the same.
    # Cost: the time that warm_up prints. Proof: tests/test_gpu.py:
    # test_a_step_in_a_cuda_graph_writes_what_an_eager_one_does.

    def warm_up(self, prompts):
        """Run a pass and two steps for nothing, then record a step.

        The first calls compile, load kernels and set up libraries, and none of that may be recorded. These runs write
        into row 0 and the caches. That does no harm, because a row's first real prompt overwrites what it will read."""
        began = time.time()
        what = "cuda_graph"
        if self.sampling.compile:
            what = "compile"
            # Two cores of a Xeon, SmolLM2, tokens/s: one row 14.2 without and 14.1 with, 16 rows 117 and 167.
            if self.device.type == "cpu":
                say(what, "on a CPU half a minute or more; pays for many rows, not for one")
            for block in self.model.layers:
                block.compile(dynamic=False)
            self.write_token = torch.compile(write_token, dynamic=False)
        # One prompt, sample number 0, into row 0.
        self.incoming = self.prepare([0], prompts[:1], [0])
        self.run_pass()
        # Forget this shape, so that the first real pass counts as the first of its shape.
        self.incoming = ()
        self.run_step()
        self.run_step()
        if self.can_record:
            self.recorded_step = self.record(self.run_step)
        taken = time.time() - began
        say(what, f"{taken:.1f} s, for {self.B} row(s) of {self.S} positions")

    def record(self, work):
        """Record the kernels that work() launches as one CUDA graph. -> the function that launches them again

        Nothing runs while they are recorded. A replay reads and writes the addresses of the recording."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: let other threads make CUDA calls meanwhile, because they do not belong to the graph.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            work()
        return graph.replay


def told(token, logit):
    """What the Scheduler hears of tokens [B] and their logits [B]: ids, and NO_TOKEN where a logit is no number.

    Why here: on the GPU a text goes on with some valid id, so that no lookup is out of range."""
    pairs = zip(token.tolist(), logit.tolist(), strict=True)
    return [token if math.isfinite(logit) else NO_TOKEN for token, logit in pairs]


def on_one_gpu(model):
    """Whether all weights are on a GPU. With an embedding in host memory a step waits for the host: no recording."""
    return all(p.is_cuda for p in model.parameters())


# --- the scheduler ---


class Scheduler:
    """Go on from each prompt until one of `ends`, with an Engine that may have fewer rows than there are prompts.

    Iterating yields (index of the prompt, new ids without the end token, ended) as texts are finished. The longest
    prompts are begun first, and a free row takes the next. numbers: which sample of its prompt each text is.
    on_token(index, id) is called as tokens come.

    On a GPU the host takes tokens one step late (`lag`). t2: the tokens that step 2 chose:

        host    launch step 2, send t2 | wait for t1, take it | launch step 3, send t3 | wait for t2, take it | …
        GPU     step 1                 | step 2                                        | step 3

    Why: step 3 needs t2 only on the GPU, where it is. So the GPU has step 3 to do while the host looks at t2.
    Cost: where t2 ends a text, step 3 was launched before the host knows. The text's row computes step 3 for nothing,
    and `settle` drops that token.
    Proof: tests/test_generate.py: test_on_a_gpu_tokens_are_taken_one_step_late."""

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
        # (the function that waits for the tokens of a step, which prompt was in each row then)
        self.sent = deque()
        self.most = engine.sampling.max_new_tokens
        self.lag = int(engine.device.type == "cuda")  # steps whose tokens may still be on their way
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
        # All rows wait while a pass reads prompts. So begin a pass only for several prompts at once.
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
        """How many prompts may be read at once. A pass has about 8,192 tokens at most, because they take memory."""
        longest = self.length(self.waiting[-1])
        fitting = max(1, 8192 // longest)
        if self.texts:
            return min(self.together, fitting)
        return fitting

    def worth_shrinking(self):
        """Whether half of the rows are free and no prompt waits. A compiled or recorded step keeps its one shape."""
        if self.waiting or self.engine.sampling.compile or self.engine.can_record:
            return False
        return 2 * len(self.free()) >= self.engine.B

    def shrink(self):
        """Go on with the busy rows only."""
        busy = [row for row, i in enumerate(self.slots) if i is not None]
        self.engine.keep(busy)
        self.slots = [self.slots[row] for row in busy]

    def settle(self, whose):
        """Send the tokens chosen last, then take those that were sent `lag` steps ago.

        whose[row]: the prompt whose token is in that row, or None. -> [(index, ids, ended)] of finished texts"""
        tokens = self.engine.send()
        self.sent.append((tokens, list(whose)))
        finished = []
        while len(self.sent) > self.lag:
            tokens, whose = self.sent.popleft()
            for token, i in zip(tokens(), whose, strict=True):
                # Pass over a row without a text, and one whose text ended with the token before.
                if i in self.texts and self.take(i, token):
                    finished.append(self.finish(i, token))
        return finished

    def take(self, i, token):
        """Add a token to text i. -> whether the text is finished"""
        if token == NO_TOKEN:
            raise UserError(
                "the model computed NaN or inf in the place of a token's logit: its weights or its adapter hold one, "
                "or --dtype fp16 is too small for it; try --dtype fp32."
            )
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


def generate(model, prompts, ends, numbers=None, on_token=None, **how):
    """Go on from each prompt, all at once. -> [new ids, without the end token], [ended]; how: fields of Sampling."""
    sampling = Sampling(**{"batch_size": len(prompts), **how})
    engine = Engine(model, prompts, sampling)
    finished = sorted(Scheduler(engine, prompts, ends, numbers, on_token))
    texts = [ids for _, ids, _ in finished]
    ended = [end for _, _, end in finished]
    return texts, ended


# --- from ids to what is shown ---


def said(text, prompt, ids):
    """The text that `ids` add behind the ids of a prompt.

    Decode prompt and ids together, because a tokenizer may take the space off the first token that it decodes."""
    return behind(text.decode(prompt), text.decode(prompt + ids))


def behind(before, whole):
    """What stands in `whole` behind the beginning that it shares with `before`.

    A prompt may end in half a character, which its next token completes. With � for the half of a –:

        before "3�"    whole "3– 4"    behind "– 4"        (whole[len(before):] would lose the –)"""
    if whole.startswith(before):
        return whole[len(before) :]
    shared = os.path.commonprefix([before, whole])
    return whole[len(shared) :]


# Decoders of the package tokenizers that leave the text of earlier tokens as it is when a token is added. ByteFallback
# and ByteLevel may change the character that they are in: see Stream.add.
# fmt: off
ADDING = {"BPEDecoder", "ByteFallback", "ByteLevel", "CTC", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"}
# fmt: on
# Behind one of the JOINING a decoder sees a single text. There Replace may make one character of the last of this text
# and the first of the next token, so only these two leave the beginning alone.
JOINING = {"ByteLevel", "Fuse"}
ADDING_TO_A_TEXT = {"Fuse", "Strip"}


def only_adds(decoder):
    """Whether a tokenizer's decoder leaves earlier text as it is when a token is added. None puts spaces between."""
    if decoder is None:
        return True
    settings = json.loads(decoder.__getstate__())
    allowed = ADDING
    for stage in settings.get("decoders", [settings]):
        if stage["type"] not in allowed:
            return False
        if stage["type"] in JOINING:
            allowed = ADDING_TO_A_TEXT
    return True


class Stream:
    """Prints one text as its tokens come: in the end exactly what `said` returns.

    A piece of text is printed once no later token can change it. So a character whose bytes are spread over tokens
    comes whole. Where the decoder is none that is known to leave earlier text alone, all comes at the end.
    Proof: tests/test_generate.py: test_a_streamed_text_is_the_text_of_all_its_ids."""

    # Decode at most about this many ids for a token, and keep this many when older ones are left out.
    WINDOW = 256
    KEPT = 16

    def __init__(self, text, prompt):
        self.text = text
        self.ids = list(prompt)  # what is decoded
        self.before = text.decode(prompt)  # what of it is printed, or belongs to the prompt
        self.only_adds = only_adds(text.tokenizer.decoder)

    def add(self, token):
        self.ids.append(token)
        if not self.only_adds or not self.settles(token):
            return
        whole = self.text.decode(self.ids)
        # Half a character is decoded to U+FFFD: wait for its other half.
        if not whole.endswith("\ufffd"):
            self.show(whole)
            self.forget()

    def settles(self, token):
        """Whether the text up to this token is final, but for half a character at its end.

        ByteFallback decodes a run of tokens <0xE2> <0x80> <0x93> as a whole: to characters where all of the run is
        UTF-8, else to a � for each byte. So only another token with a text makes a run final."""
        piece = self.text.tokenizer.id_to_token(token) or ""
        if re.fullmatch("<0x..>", piece):
            return False
        return self.text.decode([token]) != ""

    def show(self, whole):
        piece = behind(self.before, whole)
        self.before = whole
        if piece:
            print(piece, end="", flush=True)
            PULSE.heard()

    def forget(self):
        """Leave out old ids, because to decode 8,000 takes 1.5 ms.

        The ids that are kept must have a text: a decoder treats the first token that has one in its own way."""
        if len(self.ids) <= self.WINDOW:
            return
        kept = self.ids[-self.KEPT :]
        text = self.text.decode(kept)
        if text:
            self.ids = kept
            self.before = text

    def end(self):
        """Print the rest: no token comes any more."""
        self.show(self.text.decode(self.ids))
