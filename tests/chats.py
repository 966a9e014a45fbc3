"""Tokenizers, chat templates and conversations as people have them, written for the tests in test_text.py.

In a printed conversation [[ and ]] stand around what is learned, as a person would write it down."""

import json
import re

from conftest import made_recipes, make_model
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CONTROL = [
    *(
        "<s>",
        "</s>",
        "<|im_start|>",
        "<|im_end|>",
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
    ),
    *(
        "<|eot_id|>",
        "<|eom_id|>",
        "<|python_tag|>",
        "[INST]",
        "[/INST]",
        "[TOOL_CALLS]",
        "[AVAILABLE_TOOLS]",
    ),
    *(
        "[/AVAILABLE_TOOLS]",
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
        "<start_of_turn>",
        "<end_of_turn>",
    ),
    *("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<unk>"),
]
ENDS = ["</s>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<｜end▁of▁sentence｜>"]
# As in Qwen3 and R1: tokens of their own, and yet ordinary text.
ORDINARY = ["<think>", "</think>", "<tool_call>", "</tool_call>"]


def trained(tokenizer, vocab, **how):
    texts = [" ".join([r["title"], *r["ingredients"], *r["directions"]]) for r in made_recipes(30)]
    texts += [
        "user assistant system tool name arguments What is in a pie? Apples, of course. More sugar!"
    ] * 9
    trainer = how.pop("trainer", trainers.BpeTrainer)
    tokenizer.train_from_iterator(texts, trainer(vocab_size=vocab, **how))
    return tokenizer


def byte_level(prefix=False, vocab=330, trim=False):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    if trim:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return trained(tokenizer, vocab, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def sentencepiece(dummy_prefix, scheme=None):
    """Llama's: spaces become ▁, an unknown character its bytes. scheme: by Metaspace, as newer conversions have it"""
    pieces = [f"<0x{n:02X}>" for n in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if scheme:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    else:
        prepend = [normalizers.Prepend("▁")] if dummy_prefix else []
        tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if dummy_prefix or scheme == "first" else []
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(steps)
    return trained(tokenizer, 420, special_tokens=["<unk>", *pieces])


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return trained(tokenizer, 400, trainer=trainers.WordPieceTrainer, special_tokens=["<unk>"])


def padded():
    tokenizer = byte_level()
    tokenizer.enable_padding(length=64, pad_token="</s>")
    tokenizer.enable_truncation(24)
    return tokenizer


TOKENIZERS = {
    "byte_level": byte_level,
    "add_prefix_space": lambda: byte_level(prefix=True),
    "trim_offsets": lambda: byte_level(trim=True),
    "sentencepiece": lambda: sentencepiece(dummy_prefix=True),
    "no_dummy_prefix": lambda: sentencepiece(dummy_prefix=False),
    "metaspace_first": lambda: sentencepiece(dummy_prefix=False, scheme="first"),
    "word_piece": word_piece,
    "padded": padded,
    "end_not_special": byte_level,
}


def with_bos(tokenizer, bos="<s>"):
    number = tokenizer.token_to_id(bos)
    one = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, number)])
    tokenizer.post_processor = one
    return tokenizer


def folder_of(folder, kind, template, **more):
    """A model folder with one of the TOKENIZERS and a chat template."""
    tokenizer = TOKENIZERS[kind]()
    plain_ends = ENDS if kind == "end_not_special" else []
    tokenizer.add_tokens(
        [AddedToken(text, special=text not in plain_ends, normalized=False) for text in CONTROL]
        + [AddedToken(text, special=False, normalized=False) for text in ORDINARY]
    )
    return save(folder, tokenizer, template, **more)


def save(folder, tokenizer, template, ends=ENDS, **settings):
    vocab = tokenizer.get_vocab_size()
    ids = [tokenizer.token_to_id(text) for text in ends]
    make_model(folder, vocab_size=vocab, eos_token_id=ids, bos_token_id=None)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


# --- templates, in the manner of well-known models ---

CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\nTools:' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

GENERATION = """{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

LLAMA2 = """{%- if messages[0].role == 'system' %}
    {%- set turns = messages[1:] %}{%- set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}
{%- else %}{%- set turns = messages %}{%- set system = '' %}{%- endif %}
{%- for message in turns %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- bos_token + '[INST] ' + (system if loop.index0 == 0 else '') + message.content.strip() + ' [/INST]' }}
    {%- else %}{{- ' ' + message.content.strip() + ' ' + eos_token }}{%- endif %}
{%- endfor %}"""

LLAMA3 = """{{- '<|begin_of_text|>' }}
{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none %}{{- 'Environment: ipython\\n' }}{%- endif %}
{{- 'Today Date: ' + date_string + '\\n\\n' }}
{%- if tools is not none %}
    {%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- '\\n\\n' }}{%- endfor %}
{%- endif %}
{{- system + '<|eot_id|>' }}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n<|python_tag|>' }}
        {{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}<|eot_id|>' }}
    {%- else %}
        {%- set role = 'ipython' if message.role == 'tool' else message.role %}
        {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

MISTRAL = """{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}{%- set turns = messages[1:] %}
{%- else %}{%- set system = '' %}{%- set turns = messages %}{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if message.role == 'user' %}
        {%- if tools is not none and loop.first %}
            {{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {%- if loop.first and system %}{{- '[INST]' + system + '\\n\\n' + message.content + '[/INST]' }}
        {%- else %}{{- '[INST]' + message.content + '[/INST]' }}{%- endif %}
    {%- elif message.tool_calls %}
        {{- '[TOOL_CALLS]' + (message.tool_calls | map(attribute='function') | list | tojson) + eos_token }}
    {%- elif message.role == 'tool' %}{{- '[TOOL_RESULTS]' + message.content + '[/TOOL_RESULTS]' }}
    {%- else %}{{- message.content + eos_token }}{%- endif %}
{%- endfor %}"""

QWEN3 = """{%- if tools %}{{- '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content or '' %}{%- set reasoning = message.reasoning_content or '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<think>\\n' + reasoning + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

R1 = """{%- set ns = namespace(system='') %}
{%- for message in messages %}{%- if message.role == 'system' %}{%- set ns.system = message.content %}{%- endif %}
{%- endfor %}
{{- bos_token + ns.system }}
{%- for message in messages %}
    {%- if message.role == 'user' %}{{- '<｜User｜>' + message.content }}{%- endif %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- if '</think>' in content %}{%- set content = content.split('</think>')[-1] %}{%- endif %}
        {{- '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\\n' }}{%- endif %}"""

GEMMA = """{{ bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for message in messages %}
    {%- set role = 'model' if message.role == 'assistant' else message.role %}
    {{- '<start_of_turn>' + role + '\\n' + message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

TEMPLATES = {
    "chatml": CHATML,
    "generation": GENERATION,
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "qwen3": QWEN3,
    "r1": R1,
    "gemma": GEMMA,
}


# --- conversations ---


def turns(*said, system=None):
    """said: user, assistant, user, assistant, …"""
    roles = ["user", "assistant"] * len(said)
    made = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
    return ([{"role": "system", "content": system}] if system else []) + made


CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"what": "pie <3"}}}
TOOL = {"type": "function", "function": {"name": "look_up", "description": "Looks a dish up."}}
CHATS = {
    "one": {"messages": turns("What is in a pie?", "Apples, of course.")},
    "two": {"messages": turns("What is in a pie?", "Apples.", "More?", "No more sugar!")},
    "system": {"messages": turns("Hi", "Ho", "And?", "So.", system="Be kind.")},
    "spaces": {"messages": turns(" What?\n", "  Apples.\n", "\tMore? ", "No \n\n")},
    "empty": {"messages": turns("Hi", "", "Say more.", "Ho")},
    "thinking": {
        "messages": turns(
            "Hi", "<think>\nHm.\n</think>\n\nHo", "And?", "<think>\nEh.\n</think>\n\nSo"
        )
    },
    "tool": {
        "messages": [
            {"role": "user", "content": "Pie?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "Apples & more"},
            {"role": "assistant", "content": "Apples."},
        ],
        "tools": [TOOL],
    },
}

# What a template refuses, or prints only in part: then the row is bad.
REFUSED = {
    ("gemma", "system"),
    *((name, "tool") for name in ("generation", "llama2", "r1", "gemma")),
}

# What each template prints, as a person reads it off the template.
HEAD3 = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n{}<|eot_id|>"
TURN3 = "<|start_header_id|>{}<|end_header_id|>\n\n"
PRINTED = {
    ("chatml", "two"): (
        "<|im_start|>user\nWhat is in a pie?<|im_end|>\n<|im_start|>assistant\n[[Apples.<|im_end|>]]\n"
        "<|im_start|>user\nMore?<|im_end|>\n<|im_start|>assistant\n[[No more sugar!<|im_end|>]]\n"
    ),
    ("chatml", "spaces"): (
        "<|im_start|>user\n What?\n<|im_end|>\n<|im_start|>assistant\n[[  Apples.\n<|im_end|>]]\n"
        "<|im_start|>user\n\tMore? <|im_end|>\n<|im_start|>assistant\n[[No \n\n<|im_end|>]]\n"
    ),
    ("chatml", "empty"): (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[<|im_end|>]]\n"
        "<|im_start|>user\nSay more.<|im_end|>\n<|im_start|>assistant\n[[Ho<|im_end|>]]\n"
    ),
    ("chatml", "tool"): (
        '<|im_start|>system\nTools:\n{"type": "function", "function": {"name": "look_up", "description": "Looks a dish'
        ' up."}}<|im_end|>\n<|im_start|>user\nPie?<|im_end|>\n<|im_start|>assistant\n[[<tool_call>{"name": "look_up", '
        '"arguments": {"what": "pie <3"}}</tool_call><|im_end|>]]\n<|im_start|>tool\nApples & more<|im_end|>\n'
        "<|im_start|>assistant\n[[Apples.<|im_end|>]]\n"
    ),
    ("generation", "two"): (
        "<|im_start|>user\nWhat is in a pie?<|im_end|>\n<|im_start|>assistant\n[[Apples.<|im_end|>]]\n"
        "<|im_start|>user\nMore?<|im_end|>\n<|im_start|>assistant\n[[No more sugar!<|im_end|>]]\n"
    ),
    ("llama2", "two"): (
        "<s>[INST] What is in a pie? [/INST][[ Apples. </s>]]<s>[INST] More? [/INST][[ No more sugar! </s>]]"
    ),
    ("llama2", "system"): (
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST][[ Ho </s>]]<s>[INST] And? [/INST][[ So. </s>]]"
    ),
    ("llama2", "spaces"): (
        "<s>[INST] What? [/INST][[ Apples. </s>]]<s>[INST] More? [/INST][[ No </s>]]"
    ),
    ("llama3", "two"): (
        HEAD3.format("")
        + TURN3.format("user")
        + "What is in a pie?<|eot_id|>"
        + TURN3.format("assistant")
        + "[[Apples.<|eot_id|>]]"
        + TURN3.format("user")
        + "More?<|eot_id|>"
        + TURN3.format("assistant")
        + "[[No more sugar!<|eot_id|>]]"
    ),
    ("llama3", "system"): (
        HEAD3.format("Be kind.")
        + TURN3.format("user")
        + "Hi<|eot_id|>"
        + TURN3.format("assistant")
        + "[[Ho<|eot_id|>]]"
        + TURN3.format("user")
        + "And?<|eot_id|>"
        + TURN3.format("assistant")
        + "[[So.<|eot_id|>]]"
    ),
    ("mistral", "two"): (
        "<s>[INST]What is in a pie?[/INST][[Apples.</s>]][INST]More?[/INST][[No more sugar!</s>]]"
    ),
    ("mistral", "system"): "<s>[INST]Be kind.\n\nHi[/INST][[Ho</s>]][INST]And?[/INST][[So.</s>]]",
    ("mistral", "tool"): (
        '<s>[AVAILABLE_TOOLS][{"type": "function", "function": {"name": "look_up", "description": "Looks a dish up."}}]'
        '[/AVAILABLE_TOOLS][INST]Pie?[/INST][[[TOOL_CALLS][{"name": "look_up", "arguments": {"what": "pie <3"}}]</s>]]'
        "[TOOL_RESULTS]Apples & more[/TOOL_RESULTS][[Apples.</s>]]"
    ),
    # A later turn takes the reasoning out of an earlier one, and the last turn has an empty one where it has none.
    ("qwen3", "two"): (
        "<|im_start|>user\nWhat is in a pie?<|im_end|>\n<|im_start|>assistant\n[[Apples.<|im_end|>]]\n"
        "<|im_start|>user\nMore?<|im_end|>\n<|im_start|>assistant\n"
        "[[<think>\n\n</think>\n\nNo more sugar!<|im_end|>]]\n"
    ),
    ("qwen3", "thinking"): (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[Ho<|im_end|>]]\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n[[<think>\nEh.\n</think>\n\nSo<|im_end|>]]\n"
    ),
    ("qwen3", "tool"): (
        '<|im_start|>system\n[{"type": "function", "function": {"name": "look_up", "description": "Looks a dish up."}}]'
        "<|im_end|>\n<|im_start|>user\nPie?<|im_end|>\n<|im_start|>assistant\n"
        '[[\n<tool_call>\n{"name": "look_up", "arguments": {"what": "pie <3"}}\n</tool_call><|im_end|>]]\n'
        "<|im_start|>user\n<tool_response>\nApples & more\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        "[[<think>\n\n</think>\n\nApples.<|im_end|>]]\n"
    ),
    ("r1", "two"): (
        "<s><｜User｜>What is in a pie?<｜Assistant｜>[[Apples.<｜end▁of▁sentence｜>]]"
        "<｜User｜>More?<｜Assistant｜>[[No more sugar!<｜end▁of▁sentence｜>]]"
    ),
    ("r1", "thinking"): (
        "<s><｜User｜>Hi<｜Assistant｜>[[\n\nHo<｜end▁of▁sentence｜>]]<｜User｜>And?<｜Assistant｜>[[\n\nSo<｜end▁of▁sentence｜>]]"
    ),
    ("gemma", "two"): (
        "<s><start_of_turn>user\nWhat is in a pie?<end_of_turn>\n<start_of_turn>model\n[[Apples.<end_of_turn>]]\n"
        "<start_of_turn>user\nMore?<end_of_turn>\n<start_of_turn>model\n[[No more sugar!<end_of_turn>]]\n"
    ),
}


def by_hand(printed):
    """(text, [(begin, end)]) of one of PRINTED."""
    plain = ""
    edges = []
    # Where a text itself begins with "[", the mark is the first two of three.
    for part in re.split(r"(\[\[|\]\](?!\]))", printed):
        if part in ("[[", "]]"):
            edges.append(len(plain))
        else:
            plain += part
    return plain, list(zip(edges[0::2], edges[1::2], strict=True))


# --- a token a byte ---


def byte_folder(folder, template):
    """A model folder whose tokenizer has the control tokens and one token a byte."""
    tokenizer = byte_level(vocab=256)
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in CONTROL])
    return save(folder, tokenizer, template)


def byte_characters(text):
    """The characters by which a byte-level vocabulary names the bytes of a text."""
    ((piece, _),) = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    ).pre_tokenize_str(text) or [("", 0)]
    return piece


# Somebody writes control tokens into each turn. « and » stand around those that the template puts.
SPECIAL = turns("say <|im_end|> <s>", "x</s><|eot_id|>", "[INST]?", "<｜User｜><end_of_turn>y")
SPECIAL_PRINTED = {
    "chatml": (
        "«<|im_start|>»user\nsay <|im_end|> <s>«<|im_end|>»\n«<|im_start|>»assistant\nx</s><|eot_id|>«<|im_end|>»\n"
        "«<|im_start|>»user\n[INST]?«<|im_end|>»\n«<|im_start|>»assistant\n<｜User｜><end_of_turn>y«<|im_end|>»\n"
    ),
    "llama2": (
        "«<s>»«[INST]» say <|im_end|> <s> «[/INST]» x</s><|eot_id|> «</s>»"
        "«<s>»«[INST]» [INST]? «[/INST]» <｜User｜><end_of_turn>y «</s>»"
    ),
    "mistral": (
        "«<s>»«[INST]»say <|im_end|> <s>«[/INST]»x</s><|eot_id|>«</s>»"
        "«[INST]»[INST]?«[/INST]»<｜User｜><end_of_turn>y«</s>»"
    ),
    "llama3": (
        "«<|begin_of_text|>»«<|start_header_id|>»system«<|end_header_id|>»\n\nToday Date: 26 Jul 2024\n\n«<|eot_id|>»"
        "«<|start_header_id|>»user«<|end_header_id|>»\n\nsay <|im_end|> <s>«<|eot_id|>»"
        "«<|start_header_id|>»assistant«<|end_header_id|>»\n\nx</s><|eot_id|>«<|eot_id|>»"
        "«<|start_header_id|>»user«<|end_header_id|>»\n\n[INST]?«<|eot_id|>»"
        "«<|start_header_id|>»assistant«<|end_header_id|>»\n\n<｜User｜><end_of_turn>y«<|eot_id|>»"
    ),
    "r1": (
        "«<s>»«<｜User｜>»say <|im_end|> <s>«<｜Assistant｜>»x</s><|eot_id|>«<｜end▁of▁sentence｜>»"
        "«<｜User｜>»[INST]?«<｜Assistant｜>»<｜User｜><end_of_turn>y«<｜end▁of▁sentence｜>»"
    ),
    "gemma": (
        "«<s>»«<start_of_turn>»user\nsay <|im_end|> <s>«<end_of_turn>»\n"
        "«<start_of_turn>»model\nx</s><|eot_id|>«<end_of_turn>»\n"
        "«<start_of_turn>»user\n[INST]?«<end_of_turn>»\n"
        "«<start_of_turn>»model\n<｜User｜><end_of_turn>y«<end_of_turn>»\n"
    ),
}
SPECIAL_PRINTED["generation"] = SPECIAL_PRINTED["chatml"]
SPECIAL_PRINTED["qwen3"] = SPECIAL_PRINTED["chatml"].replace(
    "assistant\n<｜User｜>", "assistant\n<think>\n\n</think>\n\n<｜User｜>"
)
