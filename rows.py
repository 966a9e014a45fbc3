"""A row of somebody's file becomes a Recipe: title and lists, another text, or a chat.

    recipe = parse({"title": "Tea", "ingredients": ["water"], "directions": ["Boil."]})
    recipe = parse({"messages": [{"role": "user", "content": "Hi."}, …], "tools": […]})

Raises BadRow where a row is none of these. What a row says beside its text is honoured where the field has a convention
for it: "weight": 0 takes a turn out of what is learned, tools, documents and tool calls go to the chat template
(template.py). A row that says more, which would change what is learned, is a bad row by name. Other fields are counted
and named in the account.
"""

import json
import re
from dataclasses import dataclass, field

from files.sources import BadRow

ROLES = {"system", "user", "assistant", "tool"}

# Keys of a row that the template gets beside the turns.
FOR_THE_TEMPLATE = ["tools", "documents"]
# Keys of a row that change what is learned of a chat or a text, and that this program cannot honour.
REFUSED = [
    *(
        "functions",
        "function_call",
        "images",
        "videos",
        "audios",
        "system",
        "system_prompt",
        "enable_thinking",
    ),
    *(
        "weight",
        "weights",
        "loss_weight",
        "train",
        "loss",
        "loss_mask",
        "labels",
        "chosen",
        "rejected",
    ),
]

# Characters of Unicode's planes 15 and 16, for private use: template.py marks the parts of a chat with them.
PRIVATE = re.compile("[\U000f0000-\U0010ffff]")
# A lone surrogate, which no tokenizer takes.
HALF_A_PAIR = re.compile("[\ud800-\udfff]")

# The fields of a row that are used, by kind of row. Of a recipe, link and source say where a row comes from.
LISTS = {"title", "ingredients", "directions", "NER", "link", "source"}
CHAT = {"messages", "chat_template_kwargs", *FOR_THE_TEMPLATE}
PAIR = {"prompt", "completion"}
TEXT = {"text"}
# How many unused fields of a row are named.
MOST_NAMES = 10


@dataclass
class Chat:
    """A conversation as a row has it: turns {"role", "content", …}, and what the template gets beside them."""

    messages: list[dict] = field(default_factory=list)
    more: dict = field(default_factory=dict)

    def __bool__(self):
        return bool(self.messages)

    def said(self):
        """All words of the turns as one text, for the rules that count words."""
        return "\n\n".join(f"{turn['role']}: {turn.get('content', '')}" for turn in self.messages)

    def extras(self):
        """What tells two chats of the same words apart, as JSON; empty for plain turns."""
        plain = all(turn.keys() <= {"role", "content"} for turn in self.messages)
        if plain and not self.more:
            return ""
        return json.dumps([self.messages, self.more], sort_keys=True)

    def row(self):
        return {"messages": self.messages, **self.more}


@dataclass(slots=True)
class Recipe:
    """A recipe as title and lists. Where `completion` is not None: another text or a chat, without lists."""

    title: str = ""
    ingredients: list[str] = field(default_factory=list)
    directions: list[str] = field(default_factory=list)
    # The names of the ingredients, where the row has RecipeNLG's column NER (named entities).
    ner: list[str] = field(default_factory=list, compare=False)
    prompt: str | None = None
    completion: str | None = None
    # A chat. Its words are in the completion, too, for the rules that count words.
    chat: Chat | None = None
    # The fields of the row that were not used.
    unused: tuple = field(default=(), compare=False)

    def text(self):
        """(prompt, completion): "Pumpkin Bread" and "\\n\\nIngredients:\\n- 2 eggs …\\n\\nDirections:\\n1. …"."""
        if self.completion is not None:
            return self.prompt, self.completion
        ingredients = "\n- ".join(["\n\nIngredients:", *self.ingredients])
        steps = [f"{n}. {step}" for n, step in enumerate(self.directions, 1)]
        directions = "\n".join(["\n\nDirections:", *steps])
        return self.title, ingredients + directions


# --- a row to a Recipe ---


def parse(row):
    """The Recipe in a row (a dict of files/sources.py), unrepaired. Raises BadRow where the row is no recipe."""
    recipe = parse_fields(row)
    text = "".join([*recipe.text(), *recipe.ner])
    # Refuse half a surrogate pair, because no tokenizer takes one. Encoding with "ignore" leaves it out.
    if not text.isascii() and text != text.encode(errors="ignore").decode():
        raise BadRow("a lone surrogate, or bytes that are no UTF-8")
    return recipe


def parse_fields(row):
    if "ingredients" in row or "directions" in row or "steps" in row:
        recipe, used = parse_lists(row)
    elif "messages" in row:
        chat = parse_chat(row)
        recipe = Recipe(prompt="", completion=chat.said(), chat=chat)
        used = CHAT
    elif "completion" in row:
        refuse_fields(row, "completion")
        recipe = Recipe(prompt=text_of(row, "prompt"), completion=text_of(row, "completion"))
        used = PAIR
    elif "text" in row:
        refuse_fields(row, "text")
        recipe = Recipe(prompt="", completion=text_of(row, "text"))
        used = TEXT
    else:
        raise BadRow(
            "it has neither title, ingredients and directions nor text, prompt and completion, or messages"
        )
    recipe.unused = tuple(sorted(row.keys() - used)[:MOST_NAMES])
    return recipe


def parse_lists(row):
    ner = []
    if row.get("NER"):
        ner = texts_of(row, "NER")
    # The Wikibooks file calls them steps.
    steps = "directions"
    if "steps" in row and "directions" not in row:
        steps = "steps"
    recipe = Recipe(text_of(row, "title"), texts_of(row, "ingredients"), texts_of(row, steps), ner)
    return recipe, LISTS | {steps}


def refuse_fields(row, beside):
    """Raise BadRow for a field that would change what is learned. An empty one says nothing; false and 0 do."""
    for key in REFUSED:
        if row.get(key) not in (None, "", [], {}):
            raise BadRow(f"`{key}` beside `{beside}` is not supported")


def text_of(row, name):
    text = row.get(name)
    if not isinstance(text, str):
        raise wrong_field(row, name, "text")
    return text


def texts_of(row, name):
    items = row.get(name)
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise wrong_field(row, name, "list of texts")
    return items


def wrong_field(row, name, kind):
    if name not in row:
        return BadRow(f"`{name}` is missing")
    return BadRow(f"`{name}` is no {kind} but {row[name]!r:.40}")


# --- a row to a Chat ---


def parse_chat(row):
    """The Chat in a row with `messages`. Raises BadRow, which names what is wrong or cannot be honoured."""
    refuse_fields(row, "messages")
    turns = parse_turns(row["messages"])
    if not any(is_learned(turn) for turn in turns):
        raise BadRow("`messages` has no turn of the assistant with a weight of 1: nothing to learn")
    more = parse_more(row)
    refuse_characters(more)
    return Chat(turns, more)


def parse_turns(messages):
    """The turns of a conversation. Raises BadRow where they are no turns."""
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        raise BadRow(f"`messages` is no list of objects but {messages!r:.40}")
    refuse_characters(messages)
    return [parse_turn(turn) for turn in messages]


def refuse_characters(value):
    """Raise BadRow for characters that no tokenizer takes, or that mark a chat's parts here."""
    everything = json.dumps(value, ensure_ascii=False)
    if PRIVATE.search(everything):
        raise BadRow("a character of Unicode's private planes 15 and 16, which mark a chat's parts")
    if HALF_A_PAIR.search(everything):
        raise BadRow("a lone surrogate, or bytes that are no UTF-8")


def parse_turn(turn):
    """The turn without what is null, as transformers does it."""
    turn = {key: value for key, value in turn.items() if value is not None}
    role = turn.get("role")
    if "role" not in turn:
        raise BadRow("`role` is missing")
    if not isinstance(role, str):
        raise BadRow(f"`role` is no text but {role!r:.40}")
    if role not in ROLES:
        raise BadRow(f"`messages` has the unknown role {role!r:.40}")
    if "content" not in turn and "tool_calls" not in turn:
        raise BadRow("`content` is missing")
    if not isinstance(turn.get("content", ""), str):
        raise BadRow(f"`content` is no text but {turn['content']!r:.40}")
    calls = turn.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRow(f"`tool_calls` is no list of objects but {calls!r:.40}")
    if calls and role != "assistant":
        raise BadRow(f"`tool_calls` in a turn of the {role}")
    weight = turn.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise BadRow(f"`weight` is {weight!r:.40}; only 0 and 1 are supported")
    return turn


def is_learned(turn):
    """Whether a turn is the assistant's and is not taken out by the convention "weight": 0."""
    return turn["role"] == "assistant" and turn.get("weight", 1) == 1


def parse_more(row):
    """What the template gets beside the turns: tools and documents, and the row's chat_template_kwargs."""
    more = {}
    for key in FOR_THE_TEMPLATE:
        value = row.get(key)
        if isinstance(value, str) and value:
            # Many datasets keep a list of tools as JSON in a text, because their columns have one type.
            value = from_json(key, value)
        if value in (None, ""):
            continue
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise BadRow(f"`{key}` is no list of objects but {value!r:.40}")
        more[key] = value
    settings = row.get("chat_template_kwargs")
    if settings:
        if not isinstance(settings, dict):
            raise BadRow(f"`chat_template_kwargs` is no object but {settings!r:.40}")
        more["chat_template_kwargs"] = settings
    return more


def from_json(key, text):
    try:
        return json.loads(text)
    except ValueError as e:
        raise BadRow(f"`{key}` is no JSON ({e})") from None
