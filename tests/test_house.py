"""The house as it is meant to be: which file may import which, and how much a reader has to hold in mind at once.

Each guard is a function that takes a House, the syntax trees of all files of a folder, and returns its offences as
sentences. The first tests ask the project; the last ones plant an offender in a small house and see that it is found.

The measures, on the syntax tree, so that layout, comments and docstrings do not count:

- A node is an expression in the header of a statement: all of it but the statements inside.
- The size of a statement leaves out constants and f-strings. A dict, or a call with three keywords and more, that is
  laid out one element a line counts as its largest element. Fields of a dataclass between `# fmt: off` and
  `# fmt: on` have no size.
- `and` and `or` stand for truth in a test (if, while, assert, the condition of a conditional expression or of a
  comprehension, below `not`, `bool`, `any` and `all`). Elsewhere they give a value, and two forms are allowed:
  a default, `x or default`, where all operands but the last are names, attributes, subscripts or calls; and an
  expression that is a boolean by its looks, whose operands are comparisons, negations, calls that answer yes or no
  (`isinstance`, `any`, `startswith`, `is_…`), or names and attributes that are tested beside them. Where `and` stands
  inside `or`, names are not enough: `a and b or c` is the old conditional expression. As a statement of its own
  (`cond and f()`) neither is allowed.
"""

import ast
import re
import shutil
import subprocess
import tokenize
from pathlib import Path

import pytest
from conftest import ROOT

# --- the floors: each file, and what of ours it may import ---

FILES = {
    "files/weights",
    "files/gguf_file",
    "files/sources",
    "files/tokenizer",
    "files/model_config",
    "files/run",
    "files/state",
    "files/pictures",
    "files/board",
}
SPEED = {
    "speed/precision",
    "speed/fp8",
    "speed/checkpoint",
    "speed/compiled",
    "speed/parallel",
    "speed/loss",
    "speed/optim",
    "speed/offload",
    "speed/graphs",
    "speed/memory",
    "speed/meters",
    "speed/rate",
}
BENCHMARKS = {
    "benchmarks/sampling_speed",
    "benchmarks/thousand_prompts",
    "benchmarks/plan_on_card",
    "benchmarks/kill_and_resume",
    "benchmarks/watch_memory",
}
FLOORS = [
    {"cli"},
    {"files/disk", "files/hub", "files/made_up"} | FILES | SPEED,
    # What near.py and rows.py do is half of what recipes.py would be with them.
    {"near", "rows"},
    # template.py prints a chat and text.py tokenises it: together they would be no file for one evening.
    {"model", "quant", "recipes", "template"},
    {"lora", "text"},
    {"data", "generate"},
    {"quality"},
    # The plan of a run needs its flags, data and model, and sample.py needs it, too.
    {"planner"},
    {"fit"},
    # What a run does beside training: with it train.py would be no file for one evening.
    {"job"},
    {"train", "sample", "export", "convert", "bench"} | BENCHMARKS,
]
ROOMS = set().union(*FLOORS)
# What a room may import of its own floor.
INSIDE_A_FLOOR = {
    "files/hub": FILES,
    "files/made_up": FILES,
    # The folder of a run, and its state: together they would be no file for one evening.
    "files/run": {"files/state"},
}
PACKAGES = ("speed", "files", "benchmarks")


def allowed(room):
    """The rooms that a room may import."""
    if room == "files/disk":
        return {"cli"}
    if room in FILES | SPEED | {"files/hub", "files/made_up"}:
        return {"cli", "files/disk"} | INSIDE_A_FLOOR.get(room, set())
    if room == "bench":
        return {"cli", "files/disk", "files/hub", "files/made_up"} | FILES
    if room in BENCHMARKS:
        # They measure inside a process what no program prints: the third text of a model, the logits of one token.
        return ROOMS - BENCHMARKS
    floor = next(i for i, rooms in enumerate(FLOORS) if room in rooms)
    return set().union(*FLOORS[:floor])


# --- the bounds ---

FILE_NODES = 1800
FUNCTION = (300, 60)  # nodes, lines
LARGE_FUNCTIONS = {"train.py:main": (400, 75), "train.py:build": (400, 75)}
STATEMENT_NODES = 25
MEAN, NINETIETH = 6.0, 11  # nodes a statement, of the whole project
CONDITIONALS = (2, 0.04)  # so many in any file, or this share of its statements
READS_OF_A_FLAG = 2  # of a flag of speed or memory, in train.py

# Present offenders, as the guards name them. An entry that is no offender any more fails a test.
OFFENDERS = set()


class House:
    """The syntax tree and the source of every .py file in the root and the packages of a folder."""

    def __init__(self, root):
        self.root = Path(root)
        paths = list(self.root.glob("*.py"))
        for package in PACKAGES:
            paths += (self.root / package).rglob("*.py")
        self.names = sorted(p.relative_to(self.root).as_posix() for p in paths)
        self.source = {n: (self.root / n).read_text(encoding="utf-8") for n in self.names}
        self.tree = {n: ast.parse(text) for n, text in self.source.items()}


def room_of(name):
    return name.removesuffix(".py")


# --- floors, imports, circles ---


def unknown_files(house, name):
    if room_of(name) not in ROOMS:
        return [f"{name}: an unknown file: it has no floor"]
    return []


def imported_names(tree, package):
    """[(line, dotted name)] of all that a file imports, also inside functions; `from a import b` gives a.b."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = [package] if node.level and package else []
            where = ".".join([*above, *filter(None, [node.module])])
            dotted = [f"{where}.{alias.name}".strip(".") for alias in node.names]
            found += [(node.lineno, text) for text in dotted]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__")
        ):
            texts = [a.value for a in node.args if isinstance(a, ast.Constant)]
            found += [(node.lineno, text) for text in texts if isinstance(text, str)]
    return found


def room_imported(dotted, house):
    """The room that a dotted name leads to; None where it is not ours."""
    first, _, rest = dotted.partition(".")
    if first == "tests":
        return "tests"
    if first in PACKAGES:
        return f"{first}/{rest.partition('.')[0]}".rstrip("/")
    if first in ROOMS or f"{first}.py" in house.names:
        return first
    return None


def imports(house, name):
    """[(line, room)] of ours that a file imports."""
    package = name.rpartition("/")[0]
    rooms = [
        (line, room_imported(dotted, house))
        for line, dotted in imported_names(house.tree[name], package)
    ]
    return [(line, room) for line, room in rooms if room]


def wrong_imports(house, name):
    room = room_of(name)
    if room not in ROOMS:
        return []
    return [
        f"{name}:{line}: imports {other}, which is not below it"
        for line, other in imports(house, name)
        if other not in allowed(room)
    ]


def circles(house):
    """The files that import themselves, by way of others."""
    below = {room_of(n): {room for _, room in imports(house, n)} for n in house.names}
    reached = {room: set(rooms) for room, rooms in below.items()}
    for _ in below:
        for rooms in reached.values():
            rooms |= set().union(*(below.get(r, set()) for r in rooms))
    return [
        f"{room}.py: imports itself, by way of others" for room in below if room in reached[room]
    ]


# --- how much there is to hold in mind ---

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)
INSIDE = (ast.stmt, ast.ExceptHandler, ast.match_case)


def header(node):
    """What belongs to a node and is not a statement inside it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, INSIDE):
            yield child
            yield from header(child)


def expressions(statement):
    return [n for n in header(statement) if isinstance(n, ast.expr)]


def is_table(node):
    """A dict, or a call with three keywords and more, laid out one element a line."""
    if isinstance(node, ast.Dict):
        parts = node.values
    elif isinstance(node, ast.Call) and len(node.keywords) >= 3:
        parts = table_elements(node)
    else:
        return False
    return len(parts) >= 3 and len({p.lineno for p in parts}) == len(parts)


def table_elements(node):
    if isinstance(node, ast.Dict):
        return node.values
    return [*node.args, *(k.value for k in node.keywords)]


def size(node):
    """The nodes of a statement or expression that are no constants."""
    silent = isinstance(node, (ast.Constant, ast.JoinedStr, ast.FormattedValue))
    own = 1 if isinstance(node, ast.expr) and not silent else 0
    if is_table(node):
        return own + max(size(part) for part in table_elements(node))
    return own + sum(size(c) for c in ast.iter_child_nodes(node) if not isinstance(c, INSIDE))


def is_docstring(body, statement):
    if statement is not body[0] or not isinstance(statement, ast.Expr):
        return False
    return isinstance(statement.value, ast.Constant)


def statements(tree):
    """All statements but docstrings."""
    found = []
    for node in ast.walk(tree):
        for body in ("body", "orelse", "finalbody"):
            block = getattr(node, body, None)
            if not isinstance(block, list):
                continue
            documented = body == "body" and isinstance(node, (ast.Module, *DEFINITIONS))
            found += [
                s
                for s in block
                if isinstance(s, ast.stmt) and not (documented and is_docstring(block, s))
            ]
    return found


def fenced_lines(source):
    """The numbers of the lines between `# fmt: off` and `# fmt: on`."""
    lines, fenced = set(), False
    for number, line in enumerate(source.splitlines(), 1):
        if "fmt: off" in line:
            fenced = True
        if "fmt: on" in line:
            fenced = False
        if fenced:
            lines.add(number)
    return lines


def fields_of_tables(tree, source):
    """The lines of the fields of dataclasses that stand in a fence."""
    lines = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef):
            continue
        if any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            lines |= {s.lineno for s in node.body if isinstance(s, ast.AnnAssign)}
    return lines & fenced_lines(source)


def counted_statements(house, name):
    fields = fields_of_tables(house.tree[name], house.source[name])
    return [s for s in statements(house.tree[name]) if s.lineno not in fields]


def too_large(house, name):
    """File, functions, statements."""
    tree, found = house.tree[name], []
    nodes = sum(len(expressions(s)) for s in statements(tree))
    if nodes > FILE_NODES:
        found.append(f"{name}: {nodes} nodes, more than {FILE_NODES}")
    for function in ast.walk(tree):
        if not isinstance(function, FUNCTIONS):
            continue
        where = f"{name}:{function.name}"
        most_nodes, most_lines = LARGE_FUNCTIONS.get(where, FUNCTION)
        inside = [s for s in ast.walk(function) if isinstance(s, ast.stmt) and s is not function]
        nodes = sum(len(expressions(s)) for s in inside)
        lines = function.end_lineno - function.lineno + 1
        if nodes > most_nodes:
            found.append(f"{where}: {nodes} nodes, more than {most_nodes}")
        if lines > most_lines:
            found.append(f"{where}: {lines} lines, more than {most_lines}")
    for s in counted_statements(house, name):
        if not isinstance(s, DEFINITIONS) and size(s) > STATEMENT_NODES:
            found.append(f"{name}:{s.lineno}: {size(s)} nodes a statement, over {STATEMENT_NODES}")
    return found


def squeezed(house, name):
    """Conditional expressions, assignments inside expressions, tuples of unrelated things."""
    conditionals, found = 0, []
    for s in counted_statements(house, name):
        inside = expressions(s)
        choices = [n for n in inside if isinstance(n, ast.IfExp)]
        conditionals += len(choices)
        parts = [part for c in choices for part in (c.test, c.body, c.orelse)]
        if any(isinstance(part, ast.IfExp) for part in parts):
            found.append(f"{name}:{s.lineno}: a conditional expression inside another")
        walrus = any(isinstance(n, ast.NamedExpr) for n in inside)
        if walrus and not isinstance(s, (ast.If, ast.While)):
            found.append(f"{name}:{s.lineno}: := outside the test of an if or while")
        several = isinstance(s, ast.Assign) and isinstance(s.value, ast.Tuple)
        if several and len(s.value.elts) >= 3:
            found.append(f"{name}:{s.lineno}: an assignment of {len(s.value.elts)} values at once")
    least, share = CONDITIONALS
    most = max(least, share * len(statements(house.tree[name])))
    if conditionals > most:
        found.append(f"{name}: {conditionals} conditional expressions, more than {most:g}")
    return found


def sizes(house):
    """Of every statement of the project but definitions and imports; benchmarks/ left out."""
    found = []
    for name in house.names:
        if name.startswith("benchmarks/"):
            continue
        for s in counted_statements(house, name):
            if not isinstance(s, (*DEFINITIONS, ast.Import, ast.ImportFrom)):
                found.append(size(s))
    return sorted(found)


# --- and, or ---

ANSWERS = {"isinstance", "issubclass", "any", "all", "bool", "hasattr", "callable", "exists"}
ANSWERS |= {"startswith", "endswith", "isdigit", "isalpha", "isalnum", "isspace", "isatty"}
ANSWERS |= {"isfinite", "isnan", "equal", "allclose"}


def callee(call):
    return ast.unparse(call.func).rpartition(".")[2]


def is_boolean(node):
    """True or False by its looks."""
    if isinstance(node, ast.Compare):
        return True
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.Not)
    if isinstance(node, ast.Constant):
        return isinstance(node.value, bool)
    if isinstance(node, ast.Call):
        return callee(node) in ANSWERS or callee(node).startswith(("is_", "has_"))
    if isinstance(node, ast.BoolOp):
        return all(is_boolean(v) for v in node.values)
    return False


def may_be_boolean(node):
    """A boolean by its looks, or a name that is tested beside one. Never `a and b or c` of names."""
    if isinstance(node, (ast.Name, ast.Attribute)):
        return True
    if isinstance(node, ast.BoolOp):
        inside_or = isinstance(node.op, ast.Or)
        if inside_or and any(isinstance(v, ast.BoolOp) for v in node.values):
            return is_boolean(node)
        return all(may_be_boolean(v) for v in node.values)
    return is_boolean(node)


def is_default(node):
    """`x or default`."""
    named = (ast.Name, ast.Attribute, ast.Subscript, ast.Call)
    return isinstance(node.op, ast.Or) and all(isinstance(v, named) for v in node.values[:-1])


class Values(ast.NodeVisitor):
    """Collects each `and` and `or` that gives a value and is neither a default nor a boolean by its looks."""

    def __init__(self):
        self.found = []

    def truth(self, node):
        """Of a node that stands for its truth only."""
        if isinstance(node, ast.BoolOp):
            for value in node.values:
                self.truth(value)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            self.truth(node.operand)
        elif node is not None:
            self.visit(node)

    def visit_BoolOp(self, node):
        if not is_default(node) and not may_be_boolean(node):
            self.found.append(node)
            return
        for value in node.values:
            self.visit(value)

    def visit_Expr(self, node):
        if isinstance(node.value, ast.BoolOp):
            self.found.append(node.value)
        else:
            self.visit(node.value)

    def visit_UnaryOp(self, node):
        if isinstance(node.op, ast.Not):
            self.truth(node.operand)
        else:
            self.visit(node.operand)

    def visit_Call(self, node):
        if callee(node) not in ("bool", "any", "all") or len(node.args) != 1:
            self.generic_visit(node)
            return
        (argument,) = node.args
        if isinstance(argument, (ast.GeneratorExp, ast.ListComp)):
            self.truth(argument.elt)
            for generator in argument.generators:
                self.visit(generator)
        else:
            self.truth(argument)

    def visit_test(self, node):
        """A node with a test: that is for truth, all the rest is visited."""
        self.truth(node.test)
        for name, value in ast.iter_fields(node):
            parts = value if isinstance(value, list) else [value]
            for part in parts:
                if name != "test" and isinstance(part, ast.AST):
                    self.visit(part)

    visit_If = visit_While = visit_Assert = visit_IfExp = visit_test

    def visit_comprehension(self, node):
        self.visit(node.target)
        self.visit(node.iter)
        for condition in node.ifs:
            self.truth(condition)

    def visit_match_case(self, node):
        self.truth(node.guard)
        for statement in node.body:
            self.visit(statement)


def values_of_and_or(house, name):
    visitor = Values()
    visitor.visit(house.tree[name])
    return [f"{name}:{n.lineno}: and / or for a value: {ast.unparse(n)}" for n in visitor.found]


# --- what changes at run time ---


class Classes:
    """Of all classes of the house: their methods, their fields and their bases, by name."""

    def __init__(self, house):
        self.methods, self.fields, self.bases = {}, {}, {}
        for tree in house.tree.values():
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    self.add(node)

    def add(self, node):
        defined = [s for s in node.body if isinstance(s, FUNCTIONS)]
        settable = {
            s.name for s in defined if any("setter" in ast.unparse(d) for d in s.decorator_list)
        }
        fields = {s.target.id for s in node.body if isinstance(s, ast.AnnAssign)}
        for target, _ in targets(node):
            if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                fields.add(target.attr)
        methods = {s.name for s in defined} - settable
        self.methods[node.name] = methods | self.methods.get(node.name, set())
        self.fields[node.name] = (fields - methods) | self.fields.get(node.name, set())
        self.bases[node.name] = {ast.unparse(b).rpartition(".")[2] for b in node.bases}

    def has_method(self, owner, name):
        """Whether a class, or a base of it that is ours, has a method of that name."""
        if name in self.methods.get(owner, ()):
            return True
        return any(self.has_method(base, name) for base in self.bases.get(owner, ()))

    def is_method(self, name):
        """Whether some class has a method of that name, and none has a field of it."""
        methods = any(name in names for names in self.methods.values())
        return methods and not any(name in names for names in self.fields.values())


def targets(tree):
    """[(what is assigned to, line)]: in assignments, for, with, del, and by setattr with a name that is written out."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del)):
            found.append((node, node.lineno))
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
            found.append((node.value, node.lineno))
        elif isinstance(node, ast.Call) and callee(node) in ("setattr", "delattr"):
            owner, name = node.args[:2]
            text = name.value if isinstance(name, ast.Constant) else "?"
            found.append((ast.Attribute(owner, text, ast.Store()), node.lineno))
    return found


def owner_class(value, name):
    """The class whose attribute `value.name` would be, where `value` is a class by its looks; else None."""
    if isinstance(value, ast.Call) and callee(value) == "type":
        return ast.unparse(value)
    last = ast.unparse(value).rpartition(".")[2]
    if last in ("cls", "__class__"):
        return last
    is_class = re.fullmatch(r"_*[A-Z]\w*[a-z]\w*|NF4|FP8", last)
    return last if is_class and isinstance(value, (ast.Name, ast.Attribute)) else None


def instances(function):
    """{name: class} of what a function makes itself (`bar = cli.Progress(…)`) or is given with an annotation."""
    made = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            for target in node.targets:
                made[ast.unparse(target)] = callee(node.value)
        elif isinstance(node, ast.withitem) and isinstance(node.context_expr, ast.Call):
            if node.optional_vars is not None:
                made[ast.unparse(node.optional_vars)] = callee(node.context_expr)
        elif isinstance(node, ast.arg) and node.annotation is not None:
            made[node.arg] = ast.unparse(node.annotation).rpartition(".")[2]
    return made


def scopes(tree):
    """[(nodes of a function with its class or the top level, its class's name or None)], outermost functions only."""
    found, rest = [], []
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found += [(part, node.name) for part in node.body]
        elif isinstance(node, FUNCTIONS):
            found.append((node, None))
        else:
            rest.append(node)
    return [*found, (ast.Module(rest, []), None)]


def changed_at_run_time(house, name):
    """Methods that are rebound, and class attributes that are set while the program runs."""
    classes, found = Classes(house), []
    for scope, own_class in scopes(house.tree[name]):
        made = instances(scope)
        for target, line in targets(scope):
            if not isinstance(target, ast.Attribute):
                continue
            text = ast.unparse(target)
            if owner_class(target.value, target.attr):
                found.append(f"{name}:{line}: sets a class attribute, {text}")
                continue
            owner = ast.unparse(target.value)
            known = own_class if owner == "self" else made.get(owner)
            if known in classes.methods:
                rebound = classes.has_method(known, target.attr)
            else:
                rebound = classes.is_method(target.attr)
            if rebound:
                found.append(f"{name}:{line}: rebinds a method, {text}")
    return found


BASES = {"Frozen"}


def inheritance(house, name):
    """The only class of ours that others build on is quant.Frozen."""
    ours, found = Classes(house).bases, []
    for node in ast.walk(house.tree[name]):
        if not isinstance(node, ast.ClassDef):
            continue
        for base in node.bases:
            last = ast.unparse(base).rpartition(".")[2]
            if last in ours and last not in BASES:
                found.append(f"{name}:{node.lineno}: {node.name} inherits from our {last}")
    return found


# --- one flag, one place ---


def flags_of_speed(tree, source):
    """The fields of Config below the line `# --- speed and memory …`, up to the next such line."""
    lines = source.splitlines()
    (config,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config"]
    flags = []
    for s in config.body:
        if not isinstance(s, ast.AnnAssign):
            continue
        above = [
            line for line in lines[config.lineno : s.lineno] if line.strip().startswith("# ---")
        ]
        if above and "speed and memory" in above[-1]:
            flags.append(s.target.id)
    return flags


def is_set_aside(function):
    """check(), and what plans, may ask for a flag as often as they like."""
    return function.name == "check" or "plan" in function.name


def reads(node):
    """The names of all flags that are read as cfg.<flag>, once an occurrence, outside check and the plan."""
    if isinstance(node, FUNCTIONS) and is_set_aside(node):
        return []
    found = []
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "cfg":
        found.append(node.attr)
    for child in ast.iter_child_nodes(node):
        found += reads(child)
    return found


def scattered_flags(house, name):
    if name != "train.py":
        return []
    tree = house.tree[name]
    found = reads(tree)
    counts = {flag: found.count(flag) for flag in flags_of_speed(tree, house.source[name])}
    return [
        f"{name}: cfg.{flag} stands in {count} places, more than {READS_OF_A_FLAG}"
        for flag, count in counts.items()
        if count > READS_OF_A_FLAG
    ]


# --- no option from the environment, no pickle, a docstring, a reason for each noqa ---

PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
PICKLING_CALLS = {"torch.load", "torch.save", "pd.read_pickle"}


def sets_the_environment(node):
    """`os.environ["X"] = …` and `.setdefault("X", …)`: benchmarks/ for the libraries beside us, cli.py for torch."""
    if isinstance(node, ast.Attribute) and node.attr == "setdefault":
        return True
    return isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)


def environment(house, name):
    tree, found = house.tree[name], []
    setting = set()
    if name.startswith("benchmarks/") or name == "cli.py":
        setting = {id(n.value) for n in ast.walk(tree) if sets_the_environment(n)}
    for node in ast.walk(tree):
        words = {getattr(node, "id", ""), getattr(node, "attr", "")}
        if isinstance(node, ast.alias):
            words.add(node.name)
        if words & {"environ", "environb", "getenv", "getenvb"} and id(node) not in setting:
            found.append(f"{name}:{node.lineno}: reads the environment")
    return found


def pickles(house, name):
    tree, package = house.tree[name], name.rpartition("/")[0]
    found = [
        f"{name}:{line}: imports {dotted}"
        for line, dotted in imported_names(tree, package)
        if dotted.partition(".")[0] in PICKLES
    ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        allows = any(
            k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords
        )
        if allows or ast.unparse(node.func) in PICKLING_CALLS:
            found.append(f"{name}:{node.lineno}: reads or writes pickle")
    return found


def no_docstring(house, name):
    return [] if ast.get_docstring(house.tree[name]) else [f"{name}: has no docstring"]


def bare_noqa(path):
    """A comment that silences ruff names its rules, and then says why."""
    found = []
    with tokenize.open(path) as lines:
        comments = [
            t for t in tokenize.generate_tokens(lines.readline) if t.type == tokenize.COMMENT
        ]
    for token in comments:
        silencer = re.search(
            r"# *(?:ruff: *)?noqa\b(?::? *([A-Z]+\d+(?:, *[A-Z]+\d+)*))?(.*)", token.string
        )
        if silencer is None:
            continue
        rules, reason = silencer.groups()
        if not rules or len(re.findall(r"\w{2,}", reason)) < 2:
            found.append(f"{path.name}:{token.start[0]}: a noqa without rule or reason")
    return found


def noqa_without_reason(house, name):
    return bare_noqa(house.root / name)


GUARDS = [
    unknown_files,
    wrong_imports,
    too_large,
    squeezed,
    values_of_and_or,
    changed_at_run_time,
    inheritance,
    scattered_flags,
    environment,
    pickles,
    no_docstring,
    noqa_without_reason,
]

# --- the project ---

PROJECT = House(ROOT)


@pytest.mark.parametrize("name", PROJECT.names)
@pytest.mark.parametrize("guard", GUARDS, ids=lambda g: g.__name__)
def test_a_file_keeps_to_the_house(guard, name):
    found = [offence for offence in guard(PROJECT, name) if offence not in OFFENDERS]
    assert not found, "\n".join(found)


def test_no_import_goes_in_a_circle():
    assert circles(PROJECT) == []


def test_a_statement_of_the_project_holds_few_nodes():
    found = sizes(PROJECT)
    mean, ninetieth = sum(found) / len(found), found[int(0.9 * len(found))]
    assert mean <= MEAN and ninetieth <= NINETIETH, f"{mean:.2f} nodes a statement, {ninetieth}"


def test_offenders_are_still_offenders():
    found = {offence for guard in GUARDS for n in PROJECT.names for offence in guard(PROJECT, n)}
    assert OFFENDERS - found == set()


def test_the_flags_of_speed_and_memory_are_found():
    flags = flags_of_speed(PROJECT.tree["train.py"], PROJECT.source["train.py"])
    assert {"quant", "fp8", "attn", "fused_loss", "grad_ckpt", "compile", "optim"} <= set(flags)
    assert not {"out", "lora_r", "lr", "eval_every"} & set(flags)


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("*.py")), ids=lambda p: p.name)
def test_a_test_file_has_a_docstring_and_reasons(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert bare_noqa(path) == []


@pytest.mark.parametrize("arguments", [["format", "--check"], ["check"]], ids=" ".join)
def test_ruff_has_nothing_to_say(arguments):
    ruff = shutil.which("ruff")
    if ruff is None:
        pytest.skip("ruff is not installed: pip install -r requirements-dev.txt")
    done = subprocess.run(
        [ruff, *arguments, "."], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


# --- the guards themselves: what is planted is found, what is allowed is not ---


def planted(tmp_path, **files):
    """A house of these files; a double underscore in a name is the folder's slash."""
    for name, source in files.items():
        path = tmp_path / f"{name.replace('__', '/', 1)}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'"""A planted file."""\n{source}\n', encoding="utf-8")
    return House(tmp_path)


@pytest.mark.parametrize("name", ["plan", "speed__magic", "files____init__", "benchmarks__other"])
def test_an_unknown_file_is_found(tmp_path, name):
    house = planted(tmp_path, cli="", **{name: ""})
    found = [offence for n in house.names for offence in unknown_files(house, n)]
    assert len(found) == 1 and name.replace("__", "/", 1) in found[0]


@pytest.mark.parametrize(
    "name, source",
    [
        ("cli", "from files import disk"),
        ("files__disk", "import files.weights"),
        ("files__weights", "from files.run import Run"),
        ("files__sources", "from . import weights"),
        ("files__hub", "import model"),
        ("speed__loss", "import speed.fp8"),
        ("speed__loss", "from speed import fp8 as products"),
        ("speed__loss", "import quant"),
        ("model", "def load():\n    from lora import adapt\n    return adapt"),
        ("model", "import quant"),
        ("quant", "if True:\n    import text as t"),
        ("data", "from generate import Engine"),
        ("sample", "import train"),
        ("train", "import convert"),
        ("train", "import importlib\nm = importlib.import_module('sample')"),
        ("bench", "import lora"),
        ("bench", "from speed.meters import peak_memory"),
        ("benchmarks__sampling_speed", "import benchmarks.thousand_prompts"),
        ("generate", "from tests import conftest"),
        ("train", "import files"),
    ],
)
def test_an_import_that_runs_upwards_or_sideways_is_found(tmp_path, name, source):
    house = planted(tmp_path, **{name: source})
    assert len(wrong_imports(house, house.names[0])) == 1


@pytest.mark.parametrize(
    "name, source",
    [
        ("cli", "import os"),
        ("files__disk", "import cli"),
        ("files__weights", "from files import disk\nfrom cli import say"),
        ("files__hub", "from files import disk, weights\nfrom files.gguf_file import convert"),
        ("speed__loss", "import torch\nfrom files.disk import atomic"),
        ("quant", "from speed.fp8 import to_e4m3\nfrom files import weights"),
        ("lora", "import model\nimport quant"),
        ("train", "import quality\nfrom speed import loss, memory\nimport data"),
        ("bench", "import cli\nfrom files import disk, weights"),
        ("convert", "from files import hub"),
    ],
)
def test_an_import_that_runs_downwards_is_none_of_them(tmp_path, name, source):
    house = planted(tmp_path, **{name: source})
    assert wrong_imports(house, house.names[0]) == []


def test_a_circle_is_found(tmp_path):
    house = planted(tmp_path, lora="import text", text="import model", model="import lora")
    assert len(circles(house)) == 3
    assert circles(planted(tmp_path, lora="import text", text="import model", model="")) == []


SQUEEZED = "x = [f(a, b + 1, c[i], d.e) for a, b in zip(p, q, strict=True) if g(a) < h(b, -c[d])]"


def test_the_size_of_a_statement_is_as_defined(tmp_path):
    def of(source):
        return size(ast.parse(source).body[0])

    assert of("x = 1") == 1
    assert of("x = f(a, 1, f'{b} c')") == 5
    assert of("if a < b:\n    c = d + e") == 3
    assert of("x = {'a': b + c,\n 'd': e,\n 'f': g}") == 1 + 1 + 3
    assert of("x = {'a': b + c, 'd': e, 'f': g}") == 1 + 1 + 5
    assert of("f(a=b,\n c=d.e,\n g=h)") == 1 + 2
    assert of("f(a=b,\n c=d.e)") == 1 + 1 + 3


@pytest.mark.parametrize(
    "source",
    [
        SQUEEZED,
        "def f(x):\n" + "    x = x + x * x\n" * 61,
        "def f(x):\n" + "    x = x + x * x + g(x, x)\n" * 40,
        "def f(x):\n    return x + x\n" * 700,
    ],
    ids=["statement", "lines of a function", "nodes of a function", "file"],
)
def test_what_is_too_large_is_found(tmp_path, source):
    assert too_large(planted(tmp_path, model=source), "model.py")


def test_a_table_of_flags_may_be_as_wide_as_it_likes(tmp_path):
    table = f"@dataclass\nclass Config:\n    # fmt: off\n    a: int = {SQUEEZED[4:]}\n    # fmt: on"
    assert too_large(planted(tmp_path, train=table), "train.py") == []
    open_table = table.replace("# fmt: off", "").replace("# fmt: on", "")
    assert too_large(planted(tmp_path, train=open_table), "train.py")


@pytest.mark.parametrize(
    "source",
    [
        "x = a if b else c if d else e",
        "x = f(y := 3)",
        "for x in (y := f()):\n    pass",
        "a, b, c = 1, 2, 3",
        "a = b if c else d\n" * 3,
    ],
)
def test_what_is_squeezed_is_found(tmp_path, source):
    assert len(squeezed(planted(tmp_path, model=source), "model.py")) == 1


@pytest.mark.parametrize(
    "source",
    [
        "if (y := f()) is not None:\n    pass",
        "while chunk := f():\n    pass",
        "B, T, C = x.shape",
        "a, b = 1, 2",
        "a = b if c else d\n" * 2,
        "a = b if c else d\n" * 4 + "a = b\n" * 96,
    ],
)
def test_what_is_plain_is_none_of_them(tmp_path, source):
    assert squeezed(planted(tmp_path, model=source), "model.py") == []


@pytest.mark.parametrize(
    "source",
    [
        "x = a and b or c",
        "x = a > 1 and b or c",
        "x = cond and f()",
        "cond and f()",
        "done or f()",
        "a > 1 and b.append(c)",
        "x = f(a and 'text')",
        "return_value = a and b + 1",
        "x = a > 1 or 3",
        "x = lambda y: y and y[0]",
        "if f(a and 'b'):\n    pass",
        "x = [a and b[0] for a in c]",
        "x = (a and b or c) or d",
    ],
)
def test_and_or_for_a_value_is_found(tmp_path, source):
    assert len(values_of_and_or(planted(tmp_path, model=source), "model.py")) == 1


@pytest.mark.parametrize(
    "source",
    [
        "x = a or 3",
        "x = a.b or c[0] or f() or None",
        "x = f() or [d for d in e if d and d[0]]",
        "if a and b[0] or f():\n    pass",
        "while not (a and f()):\n    pass",
        "assert a and f() or b",
        "x = b if a and f() else c",
        "x = [a for a in b if a and f(a)]",
        "x = a > 1 and b < 2",
        "x = a and not b",
        "x = cfg.patience and n >= cfg.patience",
        "x = isinstance(a, int) or a.startswith('b') or c.is_file()",
        "x = a > 1 and b < 2 or not c",
        "x = any(a and f(a) for a in b)",
        "x = bool(a and f())",
        "x = not (a and f())",
    ],
)
def test_and_or_for_truth_or_a_default_is_none_of_them(tmp_path, source):
    assert values_of_and_or(planted(tmp_path, model=source), "model.py") == []


CLASSES = """
class Frozen:
    few = 0

    def __init__(self):
        self.shape = 1

    def mm(self, x):
        return x

    @property
    def scale(self):
        return 1

    @scale.setter
    def scale(self, value):
        self.shape = value

    @classmethod
    def make(cls):
        return cls()


class NF4(Frozen):
    pass


class Progress:
    def step(self):
        pass


class Facts:
    step: int = 0
"""


@pytest.mark.parametrize(
    "source",
    [
        "layer.mm = print",
        "def f(model):\n    for layer in model:\n        layer.mm = print",
        "def f(layer):\n    setattr(layer, 'mm', print)",
        "def f(layer):\n    layer.mm, x = 1, 2",
        "def f():\n    bar = Progress()\n    bar.step = print",
        "def f(layer: NF4):\n    layer.mm = print",
        "class Other(Frozen):\n    def g(self):\n        self.mm = print",
        "Frozen.few = 2",
        "def f():\n    quant.Frozen.few = 2",
        "quant.NF4.few = 2",
        "setattr(quant.Frozen, 'few', 2)",
        "setattr(Frozen, name, 2)",
        "Frozen.table['a'] = 1",
        "Frozen.few += 1",
        "torch.nn.Linear.forward = print",
        "type(layer).few = 2",
        "layer.__class__.few = 2",
        "class Other:\n    @classmethod\n    def g(cls):\n        cls.few = 2",
    ],
)
def test_what_is_rebound_or_set_on_a_class_is_found(tmp_path, source):
    house = planted(tmp_path, quant=CLASSES, lora=source)
    assert len(changed_at_run_time(house, "lora.py")) == 1


@pytest.mark.parametrize(
    "source",
    [
        "layer.few = 2",
        "layer.scale = 2",
        "facts.step = 3",
        "setattr(block, name, layer)",
        "block.project = print",
        "class Other:\n    def __init__(self):\n        self.mm = 3",
        "x['mm'] = 3",
        "SHAPES['8b'] = 3",
        "torch.backends.cuda.flag = 3",
    ],
)
def test_what_is_set_on_an_object_is_none_of_them(tmp_path, source):
    house = planted(tmp_path, quant=CLASSES, lora=source)
    assert changed_at_run_time(house, "lora.py") == []
    assert changed_at_run_time(house, "quant.py") == []


def test_a_base_class_of_ours_is_found(tmp_path):
    source = "class Sorted(data.Data):\n    pass\nclass FP8(quant.Frozen):\n    pass\n"
    house = planted(tmp_path, quant=CLASSES, data="class Data:\n    pass", train=source)
    assert len(inheritance(house, "train.py")) == 1
    assert inheritance(house, "quant.py") == []


TABLE = """
class Config:
    out: str = "out"
    # --- speed and memory: each can be switched off ---
    quant: str = "none"
    fp8: bool = False
    # --- schedule ---
    lr: float = 1.0


def check(cfg):
    return cfg.quant, cfg.quant, cfg.quant


def plan(cfg):
    return cfg.quant, cfg.quant, cfg.quant


def build(cfg):
    return cfg.lr, cfg.lr, cfg.lr, cfg.fp8, cfg.quant, cfg.quant
"""


def test_a_flag_that_is_asked_for_everywhere_is_found(tmp_path):
    assert scattered_flags(planted(tmp_path, train=TABLE), "train.py") == []
    house = planted(tmp_path, train=TABLE + "\n\ndef loop(cfg):\n    return cfg.quant")
    assert len(scattered_flags(house, "train.py")) == 1


@pytest.mark.parametrize(
    "source",
    [
        "x = os.environ['A']",
        "x = os.getenv('A')",
        "from os import environ",
        "os.environ['A'] = '1'",
    ],
)
def test_an_option_from_the_environment_is_found(tmp_path, source):
    assert environment(planted(tmp_path, model=source), "model.py")


def test_cli_may_set_the_environment_that_torch_finds_and_read_nothing(tmp_path):
    source = "import os\nos.environ.setdefault('OMP_WAIT_POLICY', 'passive')\n"
    assert environment(planted(tmp_path, cli=source), "cli.py") == []
    assert environment(planted(tmp_path, model=source), "model.py")
    assert environment(planted(tmp_path, cli=source + "x = os.environ['A']"), "cli.py")


def test_a_benchmark_may_set_the_environment_of_others(tmp_path):
    source = "import os\nos.environ['HF_HUB_OFFLINE'] = '1'\n"
    house = planted(tmp_path, benchmarks__sampling_speed=source)
    assert environment(house, house.names[0]) == []
    house = planted(tmp_path, benchmarks__sampling_speed=source + "x = os.environ['A']")
    assert environment(house, house.names[0])


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from joblib import load",
        "x = torch.load('a.pt')",
        "x = np.load('a.npy', allow_pickle=True)",
    ],
)
def test_pickle_is_found(tmp_path, source):
    assert len(pickles(planted(tmp_path, model=source), "model.py")) == 1


SILENCER = "no" + "qa"  # written so, or ruff would read the lines below as meant for it


@pytest.mark.parametrize(
    "comment, bad",
    [
        (SILENCER, True),
        (f"{SILENCER}: E402", True),
        (f"{SILENCER}: E402 yes", True),
        (f"ruff: {SILENCER}", True),
        (f"{SILENCER}: E402  cli sets the environment first", False),
        (f"{SILENCER}: E402, F401 - torch must come after it", False),
    ],
)
def test_a_silencer_without_a_reason_is_found(tmp_path, comment, bad):
    house = planted(tmp_path, model=f"import os  # {comment}")
    assert bool(noqa_without_reason(house, "model.py")) == bad


def test_a_file_without_a_docstring_is_found(tmp_path):
    (tmp_path / "model.py").write_text("x = 1\n")
    assert no_docstring(House(tmp_path), "model.py")
