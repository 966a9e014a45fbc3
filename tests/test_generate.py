"""Generating: against transformers' greedy search, its distribution, its stops, batches, the order of its work."""

import cli

import gc
import random
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from transformers import LlamaForCausalLM

import generate
import lora
import model as models
import quant
from files import weights
from generate import Engine, Sampling, Scheduler
from text import Text


@pytest.fixture(scope="module")
def tiny(tiny_model):
    model = models.load(tiny_model)
    return model.requires_grad_(False).eval(), Text(tiny_model)


PROMPTS = [
    "Flour and eggs",
    "Rice",
    "A much longer title with beans and carrots and onions",
    "Milk number 7",
]


def transformers_greedy(folder, prompts, n, weights=None, penalty=1.0, end=1):
    """What transformers writes after each prompt alone, fp32; weights: {its name: tensor} in place of the folder's."""
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if weights:
        assert not reference.load_state_dict(weights, strict=False).unexpected_keys
    out = []
    for p in prompts:
        ids = reference.generate(
            torch.tensor([p]),
            max_new_tokens=n,
            do_sample=False,
            pad_token_id=end,
            eos_token_id=end,
            repetition_penalty=penalty,
        )[0, len(p) :].tolist()
        out.append(ids[: ids.index(end)] if end in ids else ids)
    return out


def test_greedy_text_is_transformers_greedy_text(tiny, tiny_model):
    """Each prompt alone and all in one batch of different lengths, 40 tokens, fp32."""
    model, text = tiny
    prompts = [text.prompt(p) for p in PROMPTS]
    want = transformers_greedy(tiny_model, prompts, 40)
    alone = [
        generate.generate(model, [p], {1}, max_new_tokens=40, temperature=0)[0][0] for p in prompts
    ]
    assert alone == want
    for rows in (4, 3, 1):  # all at once; a row that is filled anew; one after the other
        assert (
            generate.generate(
                model, prompts, {1}, max_new_tokens=40, temperature=0, batch_size=rows
            )[0]
            == want
        )


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_engine_goes_with_its_last_name(tiny_model, compiled):
    """Its caches are the largest thing beside the weights: they must not wait for the collector of cycles."""
    model, text = models.load(tiny_model).requires_grad_(False).eval(), Text(tiny_model)
    prompts = [text.prompt(p) for p in PROMPTS]
    gc.collect()
    gc.disable()
    try:
        engine = Engine(model, prompts, Sampling(batch_size=2, max_new_tokens=5, compile=compiled))
        assert len(list(Scheduler(engine, prompts, {1}))) == len(prompts)
        gone = weakref.ref(engine)
        cache_gone = weakref.ref(engine.caches[0].k)
        del engine
        assert gone() is None and cache_gone() is None
    finally:
        gc.enable()


def with_adapter(folder, adapter, kind, merged):
    """(our model, the same weights for transformers): what `kind` made of the base's, dequantised, and peft's own
    product of B and A beside it, or in it."""
    make_linear = quant.make_linear(kind)
    model = lora.load_model(folder, "cpu", None, make_linear, adapter=adapter, merge=merged)
    tensors = lora.read_tensors(adapter)
    theirs = {}
    for name, layer in model.named_modules():
        if isinstance(layer, quant.Frozen):
            path = name.removesuffix(".base")
            A, B = (tensors[f"{lora.peft_name(path)}.lora_{x}.weight"] for x in "AB")
            added = 0 if merged else 2.0 * B @ A
            theirs[weights.hf_name(path + ".weight")] = layer.full(torch.float32) + added
    return model.requires_grad_(False).eval(), theirs


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", ["none", "nf4", "fp8"])
def test_greedy_text_with_an_adapter_on_any_weights_is_transformers(
    tiny_model, adapter, kind, merged
):
    """A batch of eight prompts of mixed lengths, in three rows."""
    model, theirs = with_adapter(tiny_model, adapter, kind, merged)
    text = Text(tiny_model)
    prompts = [
        text.prompt(p) for p in [*PROMPTS, "Beans", "Cream and cheese", "Butter", "Pasta " * 9]
    ]
    want = transformers_greedy(tiny_model, prompts, 24, theirs)
    assert (
        generate.generate(model, prompts, {1}, max_new_tokens=24, temperature=0, batch_size=3)[0]
        == want
    )
    assert want != transformers_greedy(tiny_model, prompts, 24)


@pytest.mark.slow
def test_greedy_text_of_the_default_model_is_transformers(default_model):
    """Eight prompts of mixed lengths, fp32, each alone and in three rows that are filled anew."""
    folder = default_model[0]
    text, model = Text(folder), models.load(folder).requires_grad_(False).eval()
    prompts = [
        text.prompt(p)
        for p in [*PROMPTS, "Pumpkin Bread", "The best way to cook a goose", "1.", "Soup " * 30]
    ]
    want = transformers_greedy(folder, prompts, 48, end=2)
    assert [
        generate.generate(model, [p], {2}, max_new_tokens=48, temperature=0)[0][0] for p in prompts
    ] == want
    assert (
        generate.generate(model, prompts, {2}, max_new_tokens=48, temperature=0, batch_size=3)[0]
        == want
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, merged", [("none", False), ("none", True), ("nf4", False), ("nf4", True)]
)
def test_greedy_text_of_the_default_model_with_an_adapter_is_transformers(
    default_model, tmp_path, kind, merged
):
    import peft

    folder = default_model[0]
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(lora.PARENT))
    theirs = peft.get_peft_model(
        LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), config
    )
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.01)
    theirs.save_pretrained(tmp_path)
    model, theirs = with_adapter(folder, tmp_path, kind, merged)
    text = Text(folder)
    prompts = [
        text.prompt(p)
        for p in [*PROMPTS, "Pumpkin Bread", "The best way to cook a goose", "1.", "Soup " * 30]
    ]
    want = transformers_greedy(folder, prompts, 24, theirs, end=2)
    assert (
        generate.generate(model, prompts, {2}, max_new_tokens=24, temperature=0, batch_size=5)[0]
        == want
    )
    assert want != transformers_greedy(folder, prompts, 24, end=2)


def test_the_repetition_penalty_is_transformers(tiny, tiny_model):
    model, text = tiny
    prompts = [text.prompt(p) for p in PROMPTS]
    want = transformers_greedy(tiny_model, prompts, 40, penalty=1.7)
    for rows in (4, 2):
        out, _ = generate.generate(
            model,
            prompts,
            {1},
            max_new_tokens=40,
            temperature=0,
            repetition_penalty=1.7,
            batch_size=rows,
        )
        assert out == want != transformers_greedy(tiny_model, prompts, 40)


@pytest.mark.parametrize(
    "how", [{}, {"top_k": 0, "top_p": 0.9}, {"min_p": 0.1}, {"temperature": 0}], ids=str
)
def test_a_text_does_not_depend_on_its_batch(tiny, how):
    model, text = tiny
    prompts = [text.prompt(p) for p in PROMPTS * 2]
    numbers, how = [0] * 4 + [1] * 4, {"max_new_tokens": 30, "seed": 5, **how}
    alone = [
        generate.generate(model, [p], {1}, numbers=[n], **how)[0][0]
        for p, n in zip(prompts, numbers, strict=True)
    ]
    for rows in (8, 3):
        out, _ = generate.generate(
            model, prompts[::-1], {1}, numbers=numbers[::-1], batch_size=rows, **how
        )
        assert out == alone[::-1]
    if how.get("temperature") != 0:
        assert (
            generate.generate(model, prompts, {1}, numbers=numbers, **{**how, "seed": 6})[0]
            != alone
        )


def test_samples_of_one_prompt_differ(tiny):
    model, text = tiny
    out, _ = generate.generate(
        model, [text.prompt("Rice")] * 3, {1}, numbers=[0, 1, 2], max_new_tokens=20
    )
    assert out[0] != out[1] != out[2] != out[0]


def test_each_row_stops_at_any_end_token_and_only_there(tiny):
    """An end token is planted by choosing one that greedy search writes."""
    model, text = tiny
    prompts = [text.prompt(p) for p in PROMPTS]
    free, _ = generate.generate(model, prompts, set(), max_new_tokens=12, temperature=0)
    ends = {free[0][3], free[1][5]}
    for rows in (4, 2):
        out, ended = generate.generate(
            model, prompts, ends, max_new_tokens=12, temperature=0, batch_size=rows
        )
        for row, whole in zip(out, free, strict=True):
            first = next((i for i, t in enumerate(whole) if t in ends), len(whole))
            assert row == whole[:first]
        assert ended == [any(t in ends for t in whole) for whole in free] and any(ended)


def test_a_text_that_ends_at_once_is_empty(tiny):
    model, text = tiny
    p = text.prompt("Rice")
    (first,), _ = generate.generate(model, [p], set(), max_new_tokens=1, temperature=0)
    assert generate.generate(model, [p, p], set(first), max_new_tokens=9, temperature=0) == (
        [[], []],
        [True, True],
    )


def test_tokens_come_in_order_and_texts_when_finished(tiny):
    """on_token sees every token of every text, none of the end; write hands a text out before others are begun."""
    model, text = tiny
    prompts, seen, finished = [text.prompt(p) for p in PROMPTS], {}, []
    sampling = Sampling(batch_size=2, max_new_tokens=5, temperature=0)
    engine = Engine(model, prompts, sampling)

    def on_token(i, token):
        seen.setdefault(i, []).append(token)

    for i, ids, _ in Scheduler(engine, prompts, {1}, on_token=on_token):
        assert seen[i] == ids and len(seen) <= 2 + len(finished)
        finished.append(i)
    assert (
        sorted(finished) == [0, 1, 2, 3] and finished[0] == 2
    )  # the longest prompt is begun first


# --- the order of the work ---


class Played:
    """An Engine that writes down what is asked of it. Its tokens are 7, and 0 where a text has had all of its own."""

    def __init__(self, B, lasts, device="cpu", compiled=False):
        self.B = B
        self.S = 10**6
        self.lasts = lasts
        self.device = torch.device(device)
        self.sampling = Sampling(max_new_tokens=10**6, compile=compiled)
        self.can_record = False
        self.left = [0] * B
        self.calls = []

    def read(self, rows, prompts, numbers):
        self.calls.append(("read", [prompt[0] for prompt in prompts]))
        for row, prompt in zip(rows, prompts, strict=True):
            self.left[row] = self.lasts[prompt[0]]

    def step(self):
        self.calls.append(("step", self.B))
        self.left = [left - 1 for left in self.left]

    def keep(self, rows):
        self.calls.append(("keep", rows))
        self.B = len(rows)
        self.left = [self.left[row] for row in rows]

    def send(self):
        work = self.work_done()
        tokens = [7 if left > 0 else 0 for left in self.left]

        def wait():
            self.calls.append(("wait", self.work_done() - work))
            return tokens

        return wait

    def work_done(self):
        return len(asked(self.calls, "read")) + len(asked(self.calls, "step"))


def asked(calls, what):
    return [value for name, value in calls if name == what]


def play(lasts, B, lengths=None, **how):
    """(calls, prompts in the order of their ends) of an Engine of B rows that writes lasts[i] tokens after prompt i."""
    lengths = lengths or [1] * len(lasts)
    prompts = [[i] * n for i, n in enumerate(lengths)]
    engine = Played(B, lasts, **how)
    texts = list(Scheduler(engine, prompts, {0}))
    assert {i: len(ids) for i, ids, _ in texts} == dict(enumerate(lasts))
    return engine.calls, [i for i, _, _ in texts]


def test_the_longest_prompts_are_begun_first_and_a_free_row_takes_the_next():
    calls, finished = play([5, 1, 3, 2], B=2, lengths=[1, 2, 3, 4])
    assert asked(calls, "read") == [[3, 2], [1], [0]]
    assert finished == [3, 1, 2, 0]


def test_several_prompts_are_read_at_once_where_there_are_many_rows():
    """An eighth of the rows: all others wait while some read."""
    calls, _ = play(list(range(1, 49)), B=16)
    sizes = [len(read) for read in asked(calls, "read")]
    assert sizes[0] == 16 and set(sizes[1:]) == {2}


def test_the_tokens_of_a_pass_are_bounded():
    calls, _ = play([3] * 6, B=6, lengths=[4096, 3000, 3000, 5, 5, 5])
    assert asked(calls, "read")[0] == [0, 2]


def test_rows_that_nobody_reads_are_given_up_when_half_of_them_are_free():
    calls, _ = play([1, 2, 9, 9], B=4)
    assert asked(calls, "keep") == [[0, 1]] and asked(calls, "step")[-1] == 2
    calls, _ = play([1, 2, 9, 9], B=4, compiled=True)  # a compiled step has one shape
    assert not asked(calls, "keep") and asked(calls, "step")[-1] == 4


@pytest.mark.parametrize("device, late", [("cpu", 0), ("cuda", 1)])
def test_on_a_gpu_tokens_are_taken_one_step_late(device, late):
    """The next step is on its way before anybody waits for the tokens of the last."""
    calls, _ = play([4, 4], B=2, device=device)
    waits = asked(calls, "wait")
    assert waits and set(waits) == {late}
    assert len(asked(calls, "step")) == 4 + late


# --- the draw ---


def settings(**how):
    return Sampling(**{"top_k": 0, "temperature": 1.0, **how})


def draw(logits, n, **how):
    """n draws of the tokens of one row, each at its own position."""
    rows = logits.expand(n, -1)
    keys = torch.full((n,), generate.noise_key(3, [7, 8], 0))
    return generate.choose(
        rows, settings(**how), keys, torch.arange(n), torch.zeros(n, 0, dtype=torch.bool)
    )


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_choose_draws_from_the_softmax(temperature):
    """Chi-square over 20,000 draws of six tokens: 5 degrees of freedom, 20.5 is its 99.9th percentile."""
    logits, n = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -2.0]]), 20_000
    p = (logits[0].double() / temperature).softmax(-1)
    counts = torch.bincount(draw(logits, n, temperature=temperature), minlength=6)
    assert float(((counts - n * p) ** 2 / (n * p)).sum()) < 20.5


@pytest.mark.parametrize(
    "how, kept", [({"top_k": 2}, 2), ({"top_p": 0.6}, 2), ({"min_p": 0.3}, 3), ({"top_k": 1}, 1)]
)
def test_choose_draws_only_from_the_likeliest_and_in_their_proportion(how, kept):
    logits, n = torch.tensor([[1.0, 0.4, 0.0, -0.8, -3.0]]), 20_000
    p = logits[0, :kept].double().softmax(-1)
    counts = torch.bincount(draw(logits, n, **how), minlength=5)
    assert not counts[kept:].any()
    assert (
        float(((counts[:kept] - n * p) ** 2 / (n * p)).sum()) < 13.8
    )  # 2 degrees of freedom, 99.9th percentile


def test_the_noise_is_gumbel_noise_of_the_key_the_position_and_the_column():
    """Kolmogorov-Smirnov against Gumbel's distribution over 100,000; no correlation with neighbours; no repetition."""
    keys, V = torch.tensor([generate.noise_key(1, [5], 0), generate.noise_key(1, [5], 1)]), 100_000
    a, b = generate.noise(keys, torch.tensor([4, 4]), V).double()
    cdf = torch.exp(-torch.exp(-a.sort().values))
    assert float((cdf - (torch.arange(V) + 0.5) / V).abs().max()) < 1.95 / V**0.5  # 99.9 %
    (later,) = generate.noise(keys[:1], torch.tensor([5]), V).double()
    for other in (b, later, a.roll(1)):
        assert abs(float(torch.corrcoef(torch.stack([a, other]))[0, 1])) < 3.3 / V**0.5
    assert torch.isfinite(a).all() and torch.equal(
        generate.noise(keys[:1], torch.tensor([4]), V)[0].double(), a
    )


def test_the_noise_is_splitmix64():
    """Its first numbers from the seed 0, as its authors' C code gives them; the top 23 bits are what is used."""
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    got = generate.noise(torch.tensor([-0x61C8864680B583EB]), torch.tensor([0]), 3)[0].double()
    u = torch.exp(-torch.exp(-got)) * 2**23 - 0.5
    # the last step of the generator, x ^ (x >> 31), leaves the top 31 bits as they are
    assert (u - torch.tensor([float(k >> 41) for k in known])).abs().max() < 8


def test_a_key_hangs_on_seed_prompt_and_number():
    base = generate.noise_key(1, [2, 3], 0)
    assert base == generate.noise_key(1, (2, 3), 0) and -(2**63) <= base < 2**63
    others = {
        generate.noise_key(2, [2, 3], 0),
        generate.noise_key(1, [3, 2], 0),
        generate.noise_key(1, [2, 3], 1),
    }
    assert len({base, *others}) == 4


@pytest.mark.parametrize(
    "how",
    [{"top_k": 7}, {"top_p": 0.7}, {"min_p": 0.05}, {"top_k": 20, "top_p": 0.8, "min_p": 0.02}],
    ids=str,
)
def test_the_kept_are_those_of_transformers(how):
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(50, 200, generator=torch.Generator().manual_seed(1)) * 3
    want, kinds = (
        logits,
        {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper},
    )
    for name, value in how.items():
        want = kinds[name](value)(None, want)
    got = generate.keep_likely(
        logits, how.get("top_k", 0), how.get("top_p", 1.0), how.get("min_p", 0.0)
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    "top_k, top_p, min_p, kept",
    [
        (0, 1.0, 0.0, {0, 1, 2, 3, 4}),
        (2, 1.0, 0.0, {0, 1}),
        (99, 1.0, 0.0, {0, 1, 2, 3, 4}),
        (1, 1.0, 0.0, {0}),
        (0, 0.5, 0.0, {0}),
        (0, 0.51, 0.0, {0, 1}),
        (0, 0.75, 0.0, {0, 1}),
        (0, 0.76, 0.0, {0, 1, 2}),
        (2, 0.9, 0.0, {0, 1}),
        (2, 0.6, 0.0, {0}),  # of the two, the first has 2/3 of the probability
        (0, 1e-6, 0.0, {0}),
        (0, 1.0, 0.5, {0, 1}),
        (0, 1.0, 0.51, {0}),
        (0, 1.0, 0.125, {0, 1, 2, 3, 4}),
        (0, 1.0, 1.0, {0}),
    ],
)
def test_top_k_top_p_and_min_p_keep_exactly_the_likeliest(top_k, top_p, min_p, kept):
    """Probabilities 1/2, 1/4, 1/8, 1/16, 1/16, in an order that is not theirs."""
    p = torch.tensor([[0.0625, 0.5, 0.125, 0.25, 0.0625]])
    order = [1, 3, 2, 0, 4]
    out = generate.keep_likely(p.double().log(), top_k, top_p, min_p)
    assert {order.index(i) for i in torch.isfinite(out[0]).nonzero().flatten().tolist()} == kept


def test_a_prompt_beyond_the_window_is_refused_and_the_text_ends_at_it(tmp_path):
    model = models.load(make_model(tmp_path / "short", window=32)).requires_grad_(False)
    with pytest.raises(cli.UserError, match="window"):
        generate.generate(model, [list(range(5, 37))], {1}, max_new_tokens=5)
    assert len(generate.generate(model, [list(range(5, 25))], set(), max_new_tokens=50)[0][0]) == 12


def test_a_temperature_beyond_what_fp32_holds_still_draws():
    logits = torch.tensor([[2.0, 1.0, -3.0]])
    assert draw(logits, 5, temperature=1e-40, top_k=2).tolist() == [0] * 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "how",
    [{"temperature": 0}, {}, {"top_k": 0}, {"top_p": 0.5, "repetition_penalty": 1.3}],
    ids=str,
)
@pytest.mark.parametrize("where", ["head", "norm", "block"])
def test_a_logit_that_is_no_number_is_a_sentence(tiny_model, where, how, bad):
    """One weight is spoilt after loading. Of the embedding, which is the head too, it is that of one other token."""
    model, text = models.load(tiny_model).requires_grad_(False).eval(), Text(tiny_model)
    prompts = [text.prompt(p) for p in PROMPTS]
    if where == "head":
        used = {token for prompt in prompts for token in prompt}
        other = min(set(range(2, 300)) - used)
        model.embed_tokens.weight[other, 3] = bad
    elif where == "norm":
        model.norm.weight[3] = bad
    else:
        model.layers[1].mlp.down_proj.weight[0, 0] = bad
    with pytest.raises(cli.UserError, match="NaN or inf"):
        generate.generate(model, prompts, {1}, max_new_tokens=50, **how)


# --- what is printed while a text is written ---

BYTES = [f"<0x{n:02X}>" for n in range(256)]
WORDS = ["▁mix", "the", "▁", "▁½", "up", "s", "–", "a", "b", "�", " ", ",", "▁🍰", "\n"]
PIECES = ["mix", "##ing", ".", ",", "'", "s", "n't", "do", "not", "½", "##½", "�"]
ENDED = ["mix</w>", "ing</w>", "a", "b</w>", "½", "</w>", "|", "<pad>"]
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
LLAMA_2 = decoders.Sequence([*LLAMA, decoders.Strip(" ", 1, 0)])

# {name: (tokens, decoder, whether a text is printed before its end)}
DECODERS = {
    "byte-level": (LETTERS, decoders.ByteLevel(), True),
    "byte-level, stripped": (
        LETTERS,
        decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]),
        True,
    ),
    "Llama 2": (BYTES + WORDS * 9, LLAMA_2, True),
    "Llama 2, mostly words": (BYTES[::40] + WORDS, LLAMA_2, True),
    "Gemma": (BYTES + WORDS, decoders.Sequence(LLAMA), True),
    "Metaspace": (WORDS, decoders.Metaspace(), True),
    "WordPiece": (PIECES, decoders.WordPiece(cleanup=True), True),
    "BPE": (ENDED, decoders.BPEDecoder(), True),
    "CTC": (ENDED, decoders.CTC(), True),
    "none": (WORDS, None, True),
    "ab becomes X": (
        ["a", "b", "½"],
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "X")]),
        False,
    ),
    "a pattern": (
        ["a", "b", " "],
        decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex("a.*b"), "")]),
        False,
    ),
    "WordPiece of a text": (
        PIECES,
        decoders.Sequence([decoders.Fuse(), decoders.WordPiece(cleanup=True)]),
        False,
    ),
}


def stand_in(tokens, decoder):
    """A Text of these tokens, number 0 being special."""
    vocabulary = {token: n for n, token in enumerate(dict.fromkeys(["<s>", *tokens]))}
    tokenizer = Tokenizer(token_models.WordLevel(vocabulary, unk_token="<s>"))
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    if decoder is not None:
        tokenizer.decoder = decoder
    return SimpleNamespace(
        tokenizer=tokenizer,
        size=len(vocabulary),
        decode=lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True),
    )


def streamed(text, prompt, ids, capsys):
    """(what a Stream prints behind the prompt, how much of it before the end)"""
    stream = generate.Stream(text, prompt)
    for token in ids:
        stream.add(token)
    early = capsys.readouterr().out
    stream.end()
    return early + capsys.readouterr().out, len(early)


@pytest.mark.parametrize("tokens, decoder, grows", DECODERS.values(), ids=DECODERS.keys())
def test_a_streamed_text_is_the_text_of_all_its_ids(capsys, tokens, decoder, grows):
    """Of random ids behind random prompts, of all lengths and of some beyond the window of a Stream."""
    text, rng = stand_in(tokens, decoder), random.Random(1)
    early = 0
    for n in range(300):
        most = 700 if n % 30 == 0 else 12
        prompt = rng.choices(range(text.size), k=rng.randint(0, most))
        ids = rng.choices(range(text.size), k=rng.randint(0, most))
        got, printed = streamed(text, prompt, ids, capsys)
        assert got == generate.said(text, prompt, ids)
        before, whole = text.decode(prompt), text.decode(prompt + ids)
        if whole.startswith(before):
            assert got == whole[len(before) :]
        early += printed
    assert (early > 0) == grows


@pytest.mark.parametrize(
    "ids, pieces",
    [
        (["▁mix", "▁½"], [" mix", " ½"]),
        # A character of three bytes comes whole, when the next token shows that the bytes end there.
        (["<0xE2>", "<0x80>", "<0x93>", "up"], ["", "", "", "–up"]),
        # A stray byte behind it spoils the whole run of bytes: that is what the package tokenizers decodes.
        (["<0xE2>", "<0x80>", "<0x93>", "<0xFF>", "up"], ["", "", "", "", "����up"]),
        # Half a character at the end is no character.
        (["up", "<0xE2>", "<0x80>"], ["up", "", ""]),
        # A special token in between has no text.
        (["<0xC2>", "<s>", "<0xBD>", "up"], ["", "", "", "½up"]),
    ],
)
def test_a_piece_is_printed_once_it_is_final(capsys, ids, pieces):
    text = stand_in(BYTES + WORDS, LLAMA_2)
    stream = generate.Stream(text, [text.tokenizer.token_to_id("the")])
    for token, piece in zip(ids, pieces, strict=True):
        stream.add(text.tokenizer.token_to_id(token))
        assert capsys.readouterr().out == piece
    stream.end()
    assert capsys.readouterr().out == "��" * (ids[-1] == "<0x80>")


def test_what_follows_a_prompt_that_ends_in_half_a_character():
    """The prompt's decoded text holds a � for the half, the whole text a – in its place."""
    text = stand_in(LETTERS, decoders.ByteLevel())
    dash = [text.tokenizer.token_to_id(letter) for letter in "3âĢĵ4"]
    assert text.decode(dash) == "3–4"
    assert generate.said(text, dash[:2], dash[2:]) == "–4"
    assert generate.said(text, dash[:1], dash[1:]) == "–4"
    assert generate.said(text, dash, dash[:1]) == "3"


def test_a_long_text_is_not_decoded_from_its_beginning(capsys):
    text = stand_in(WORDS, decoders.Metaspace())
    stream = generate.Stream(text, [1] * 1000)
    for _ in range(1000):
        stream.add(2)
        assert len(stream.ids) <= 1001
    assert len(stream.ids) < 300
    assert capsys.readouterr().out == "the" * 1000
