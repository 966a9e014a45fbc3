"""The model's own chat template prints a conversation, and the assistant's words in it are marked.

    template = Template(files.templates, files.named, files.folder, control)
    printed = template.print_marked(chat, ends)   # a text in which marks stand around what is learned
    text, spans = unmark(printed)                 # the text that transformers would print, and [(begin, end)]

Two kinds of words stand in the text: those of the template, and those that somebody wrote. "<|im_end|>" is the end of a
turn where the template put it, and a few characters where a person wrote it. So before the template sees a
conversation, each control token that a person wrote becomes one private character, its alias:

    a turn               "say <|im_end|>"
    the template sees    "say X"                                  X: the alias, of Unicode's plane 15
    printed              "<|im_start|>user\\nsay X<|im_end|>\\n"

text.py tokenises the two kinds differently. Proof, in tests/test_text.py: test_ids_of_a_chat,
test_targets_of_a_chat.
"""

from cli import UserError

import contextlib
import json
import re
import signal
import threading
from datetime import datetime

from files import tokenizer as tokenizers
from files.sources import BadRow
from rows import FOR_THE_TEMPLATE, is_learned

# Marks around what the assistant says, and around the number that stands for a turn's words. They are characters of
# Unicode's plane 16, for private use; rows.py refuses rows that hold such characters.
BEGIN = "\U00100000"
END = "\U00100001"
NUMBER = "\U00100002"

# Keys of a turn that say who or when, and nothing that is learned. A template may print them.
ABOUT_A_TURN = {
    *("role", "content", "weight", "tool_calls"),
    *("name", "tool_call_id", "id", "uuid", "message_id", "parent_id", "turn_id", "index"),
    *("timestamp", "created", "created_at", "create_time", "date", "model", "language", "lang"),
}
# transformers hands a turn's reasoning to the template under these names; the first one that is there counts.
REASONING = ["reasoning_content", "thinking", "reasoning"]

# A template that takes longer than this for one chat, or more memory, is stopped: it may loop for ever.
SECONDS = 10
BYTES = 2 * 10**9


class Template:
    """The chat template of a model folder, in jinja2's sandbox, because a template is code that came with the model."""

    def __init__(self, sources, named, folder, control):
        """sources: {name: template}. named: {"bos_token": "<s>", …}. control: {text of a control token: id}"""
        if "default" not in sources:
            raise UserError(
                f"{folder} has no chat template, and a chat needs one: name a model that has."
            )
        self.sources = sources
        self.named = named
        self.folder = folder
        self.alias = tokenizers.aliases(control)
        # Any control token; the longest first, because one may contain another.
        self.control = re.compile("|".join(map(re.escape, self.alias)) or "(?!)")
        self.text_of = {alias: text for text, alias in self.alias.items()}
        # {name: (compiled template, the words in it that may be names of a turn's keys, the variables that it reads)}
        self.compiled = self.compile()

    def compile(self):
        found = {}
        for name, source in self.sources.items():
            try:
                with self.bounded():
                    box = sandbox()
                    source.encode()  # a lone surrogate raises an error here
                    found[name] = (box.from_string(source), *names_in(box, source))
            except UserError as e:
                found[name] = e
            # Catch every Exception, because a template is code that may fail in any way.
            except Exception as e:
                found[name] = UserError(
                    f"{self.folder}: the chat template {name!r} cannot be read "
                    f"(line {getattr(e, 'lineno', '?')}: {e})."
                )
        return found

    def pick(self, more):
        """What `compile` found of the right template: "tool_use" for tools, if there is one, as in transformers."""
        name = "tool_use" if "tools" in more and "tool_use" in self.compiled else "default"
        found = self.compiled[name]
        # A template that cannot be read does no harm until it is wanted.
        if isinstance(found, UserError):
            raise found
        return found

    @contextlib.contextmanager
    def bounded(self):
        """Inside this block a template that loops for ever, or asks for too much memory, ends in a UserError."""
        why = f"{self.folder}: the chat template takes more than"
        try:
            with bounded_time(UserError(f"{why} {SECONDS} s for one chat: it may loop for ever.")):
                with bounded_memory():
                    yield
        except MemoryError:
            raise UserError(f"{why} {BYTES / 1e9:.0f} GB for one chat.") from None

    def render(self, messages, more, ask=False):
        """The text of a conversation as transformers prints it, with marks where the template marks the assistant."""
        template, _, _ = self.pick(more)
        turns = [for_template(turn) for turn in messages]
        given = {"tools": None, "documents": None, **self.named, **more}
        given |= given.pop("chat_template_kwargs", {})
        try:
            return template.render(messages=turns, add_generation_prompt=ask, **given)
        except (UserError, MemoryError):
            raise
        # Catch every Exception, because a template is code that may fail in any way.
        except Exception as e:
            raise BadRow(f"the chat template refuses it: {e}") from None

    def prints(self, messages, more, ask=False):
        """The same text; None where the template refuses it."""
        try:
            return self.render(messages, more, ask)
        except BadRow:
            return None

    # --- what somebody wrote, and what the template put ---

    def escaped(self, value):
        """A value of a row, in whose texts an alias stands for each control token."""
        if isinstance(value, str):
            return self.control.sub(self.alias_of, value)
        if isinstance(value, list):
            return [self.escaped(item) for item in value]
        if isinstance(value, dict):
            return {self.escaped(key): self.escaped(item) for key, item in value.items()}
        return value

    def alias_of(self, match):
        return self.alias[match[0]]

    def unescaped(self, text):
        return "".join(self.text_of.get(character, character) for character in text)

    def holds_alias(self, text):
        return any(alias in text for alias in self.text_of)

    def exchanged(self, text):
        """The text for files/tokenizer.aliased: what the template put becomes an alias, an alias becomes the text."""
        both = re.compile(f"{self.control.pattern}|[{''.join(self.text_of)}]")
        other = {**self.alias, **self.text_of}
        return both.sub(lambda match: other[match[0]], text)

    def print_chat(self, messages, more, ask=False):
        """(text with an alias for each control token that somebody wrote, the messages and the rest with aliases)

        Raises BadRow where the template prints something else for an alias than for the token itself."""
        told = self.escaped(messages)
        around = self.escaped(more)
        text = self.render(told, around, ask)
        if (told, around) != (messages, more):
            if self.unescaped(text) != self.render(messages, more, ask):
                raise BadRow("the chat template looks at a special token that a turn contains")
        self.check_nothing_is_lost(told, around, text, ask)
        return text, told, around

    def check_nothing_is_lost(self, messages, more, text, ask):
        """Raise BadRow where the template prints some turn not at all or twice, or passes over a key of it."""
        self.check_keys(messages, more)
        said = [n for n, turn in enumerate(messages) if turn.get("content", "").strip()]
        numbered = list(messages)
        for n in said:
            numbered[n] = {**messages[n], "content": f"{NUMBER}{n}{NUMBER}"}
        # [text, number, text, number, …, text]: the pattern's group makes `split` return the numbers, too.
        parts = re.split(f"{NUMBER}(\\d+){NUMBER}", self.render(numbered, more, ask))
        if sorted(map(int, parts[1::2])) != said:
            raise BadRow("the chat template leaves out a turn, or prints one twice")
        for before, n, behind in zip(parts[0::2], parts[1::2], parts[2::2], strict=False):
            self.check_seams(before, messages[int(n)]["content"], behind)
        self.check_calls(messages, more, text, ask)

    def check_keys(self, messages, more):
        """Raise BadRow for a key of a turn, or of chat_template_kwargs, that no word in the template asks for."""
        _, names, variables = self.pick(more)
        for key in more.get("chat_template_kwargs", {}).keys() - variables:
            raise BadRow(f"the chat template does not read `{key}` of `chat_template_kwargs`")
        if names.intersection(REASONING):
            names = names.union(REASONING)
        for turn in messages:
            for key in turn.keys() - ABOUT_A_TURN - names:
                # False and 0 say something, "train": false for example.
                if turn[key] not in ("", [], {}):
                    raise BadRow(f"the chat template does not print `{key}` of a turn")

    def check_calls(self, messages, more, text, ask):
        """Raise BadRow where the text is the same without the tools, the documents, or the calls of a turn."""
        for n, turn in enumerate(messages):
            if turn.get("tool_calls"):
                without = [*messages[:n], {**turn, "tool_calls": None}, *messages[n + 1 :]]
                if self.prints(without, more, ask) == text:
                    raise BadRow("the chat template does not print `tool_calls`")
        for key in FOR_THE_TEMPLATE:
            if more.get(key):
                without = {other: value for other, value in more.items() if other != key}
                if self.prints(messages, without, ask) == text:
                    raise BadRow(f"the chat template does not print `{key}`")

    def check_seams(self, before, content, behind):
        """Raise BadRow where words and template together spell a special token: "<" of one and "/s>" of the other."""
        for words in (content, content.strip()):
            edges = {len(before), len(before) + len(words)}
            for token in self.control.finditer(before + words + behind):
                if any(token.start() < edge < token.end() for edge in edges):
                    raise BadRow(f"a turn and the chat template together spell {token[0]!r}")

    # --- what the assistant says ---

    def print_marked(self, chat, ends):
        """The text of a chat with BEGIN and END around each part that is learned. ends: texts of the end tokens"""
        with self.bounded():
            text, messages, more = self.print_chat(chat.messages, chat.more)
            if BEGIN in text:
                return keep_learned(text, messages)
            told = Told(self, messages, more, text, ends)
            turns = [n for n, turn in enumerate(messages) if turn["role"] == "assistant"]
            return marked(text, [told.span(n, turns) for n in turns if is_learned(messages[n])])

    def print_prompt(self, messages):
        """The text of a chat up to where the assistant speaks next, without marks."""
        with self.bounded():
            text, _, _ = self.print_chat(messages, {}, ask=True)
            plain, _ = unmark(text)
            return plain


def keep_learned(text, messages):
    """A text with the template's own marks, without those around a turn of weight 0."""
    plain, spans = unmark(text)
    learned = [is_learned(turn) for turn in messages if turn["role"] == "assistant"]
    if all(learned):
        return text
    if len(spans) != len(learned):
        raise BadRow("`weight` is 0, but the template does not mark one part for each turn")
    return marked(plain, [span for span, keep in zip(spans, learned, strict=True) if keep])


def sandbox():
    """jinja2's sandbox as transformers sets it up (utils/chat_template_utils.py there)."""
    from jinja2 import TemplateError, ext, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """{% generation %} … {% endgeneration %} stands around what the assistant says: print marks there."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.CallBlock(self.call_method("between_marks"), [], [], body).set_lineno(line)

        def between_marks(self, caller):
            return f"{BEGIN}{caller()}{END}"

    class Box(ImmutableSandboxedEnvironment):
        # Python computes 9 ** 9 ** 9 in one step that no signal interrupts.
        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context, operator, left, right):
            if isinstance(left, int) and isinstance(right, int):
                bits = left.bit_length() * max(1, right if operator == "**" else 1)
                if bits + right.bit_length() > 1024:
                    raise SecurityError("it computes with numbers that are too large")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message):
        raise TemplateError(message)

    def strftime_now(pattern):
        return datetime.now().strftime(pattern)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):  # noqa: FBT002  as transformers
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    box = Box(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    box.filters["tojson"] = tojson
    box.globals["raise_exception"] = raise_exception
    box.globals["strftime_now"] = strftime_now
    return box


def names_in(box, source):
    """(every attribute and text in a template, "reasoning_content" say; every variable that it is given)"""
    from jinja2 import meta, nodes

    tree = box.parse(source)
    found = {node.attr for node in tree.find_all(nodes.Getattr)}
    found |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return found, meta.find_undeclared_variables(tree)


def for_template(turn):
    """A turn as the template gets it: without what is null, and reasoning under each of its names."""
    turn = {key: value for key, value in turn.items() if value is not None and key != "weight"}
    for name in REASONING:
        if name in turn:
            return {"thinking": turn[name], **turn, "reasoning_content": turn[name]}
    return turn


@contextlib.contextmanager
def bounded_time(error):
    """Raise the error inside this block after SECONDS. Only the main thread can be interrupted so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def too_long(number, frame):
        raise error

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def bounded_memory():
    """Let this block take BYTES of memory at most, beyond what the process has: more is a MemoryError. Linux only."""
    try:
        import resource

        with open("/proc/self/statm") as f:
            pages = int(f.read().split()[0])
        before = resource.getrlimit(resource.RLIMIT_AS)
        most = pages * resource.getpagesize() + BYTES
    except (ImportError, OSError):
        yield
        return
    if before[0] != resource.RLIM_INFINITY:
        most = min(most, before[0])
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# --- marks ---


def marked(text, spans):
    """The text with BEGIN and END around the spans [(begin, end)]. Raises BadRow where spans overlap."""
    out = []
    last = 0
    for begin, end in spans:
        if begin < last:
            raise ambiguous()
        out += [text[last:begin], BEGIN, text[begin:end], END]
        last = end
    return "".join([*out, text[last:]])


def unmark(text):
    """(the text without marks, [(begin, end)] of what stood between them)"""
    parts = re.split(f"([{BEGIN}{END}])", text)
    marks = parts[1::2]
    if marks[0::2] != [BEGIN] * len(marks[0::2]) or marks[1::2] != [END] * len(marks[0::2]):
        raise ambiguous()
    edges = []
    length = 0
    for part in parts[0::2]:
        length += len(part)
        edges.append(length)
    plain = "".join(parts[0::2])
    return plain, list(zip(edges[0:-1:2], edges[1::2], strict=True))


def ambiguous():
    return BadRow(
        "where the assistant's turn begins or ends in the chat template's text is ambiguous"
    )


class Told:
    """A printed conversation, and what its beginnings are printed as. So one turn is found without marks.

    The assistant's turn number i is what the template prints for turns 0 to i beyond what it prints for turns 0 to
    i - 1 and the invitation to speak (add_generation_prompt):

        turns 0 to i - 1, ask     <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n
        turns 0 to i              <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHo<|im_end|>\\n
        learned                                                                           Ho<|im_end|>

    Where a template prints earlier turns otherwise in a longer chat, this may not hold; then the row is bad."""

    def __init__(self, template, messages, more, text, ends):
        self.template = template
        self.messages = messages
        self.more = more
        self.text = text
        # Any end token of the model.
        self.ends = re.compile("|".join(map(re.escape, ends)))

    def beginning(self, n, ask=False):
        """What the template prints for the first n turns; None where it refuses so few."""
        if not n and not ask:
            return ""
        return self.template.prints(self.messages[:n], self.more, ask)

    def span(self, n, turns):
        """(begin, end) of what turn n of the assistant has to learn, with its end token. turns: all of the assistant"""
        before = self.beginning(n, ask=True)
        if before is None:
            return self.span_by_words(n, turns)
        begin = self.begin(n, before)
        whole = self.beginning(n + 1)
        is_exact = whole is not None and self.text.startswith(whole)
        limit = len(whole) if is_exact else self.limit(n, turns)
        said = self.messages[n].get("content", "").strip()
        behind_words = max(begin, self.text.find(said, begin, limit))
        if self.text.startswith(said, behind_words):
            behind_words += len(said)
        end = self.ends.search(self.text, behind_words, limit)
        if end:
            return begin, end.end()
        if not is_exact:
            raise ambiguous()
        return begin, limit

    def begin(self, n, before):
        """Where turn n begins. before: the turns before it, with the invitation to speak"""
        if self.text.startswith(before):
            return len(before)
        # The invitation may hold more than a turn begins with: R1's ends in "<think>\n". Take what both have.
        without = self.beginning(n)
        if without is None or not before.startswith(without) or not self.text.startswith(without):
            raise ambiguous()
        begin = len(without)
        first_word, _ = self.words(n)
        for invited, printed in zip(before[begin:], self.text[begin:first_word], strict=False):
            if invited != printed:
                break
            begin += 1
        return begin

    def limit(self, n, turns):
        """Where turn n has certainly ended: where the assistant's next turn begins, or at the end of the text."""
        later = [turn for turn in turns if turn > n]
        if not later:
            return len(self.text)
        # Some templates print something else at the end of a conversation that does not ask for more.
        for ask in (False, True):
            before = self.beginning(later[0], ask)
            if before is not None and self.text.startswith(before):
                return len(before)
        raise ambiguous()

    def words(self, n):
        """(begin, end) of the words of turn n in the text: what changes when other words are put there."""
        other = {**self.messages[n], "content": NUMBER}
        printed = self.template.render(
            [*self.messages[:n], other, *self.messages[n + 1 :]], self.more
        )
        begin, _, behind = printed.partition(NUMBER)
        if not self.text.startswith(begin) or not self.text.endswith(behind):
            raise ambiguous()
        return len(begin), len(self.text) - len(behind)

    def span_by_words(self, n, turns):
        """The span of turn n where the template refuses to print the turns before it alone: its words and its end."""
        begin, end = self.words(n)
        later = [turn for turn in turns if turn > n]
        limit = self.words(later[0])[0] if later else len(self.text)
        found = self.ends.search(self.text, end, limit)
        if begin == end or not found:
            raise ambiguous()
        return begin, found.end()
