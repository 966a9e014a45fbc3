"""Rows of the files that people bring: .json, .jsonl and .csv, each also with .gz behind it.

    for rows in read([Path("full_dataset.csv"), Path("mine.jsonl.gz")]):  # a thousand rows at a time
        for path, line, row in rows:
            ...  # row is a dict, or the BadRow that stands in its place

recipes.py decides what the fields of a row mean. Files are read a thousand rows at a time; only a .json file, which is
one JSON value, is held in memory as a whole.
"""

from cli import UserError

import codecs
import csv
import gzip
import io
import json
import os
import tempfile
import zlib
from itertools import islice
from pathlib import Path

# The columns of RecipeNLG's CSV that are used. Each but the title holds a list, written as JSON inside the cell.
COLUMNS = ["title", "ingredients", "directions", "NER"]
NEEDED = COLUMNS[:3]
# RecipeNLG's other columns: a number, and where a recipe comes from.
OF_RECIPENLG = ["", "Unnamed: 0", "link", "source"]
LARGEST_CELL = 2**31 - 1

ROWS_OF_A_LIST = 1000
# A list of long rows has fewer of them, because a list is in memory as a whole.
BYTES_OF_A_LIST = 2**26

# What a file may expand to. No recipe or chat has 16 MB, so a longer row is another kind of file, or a gzip bomb.
LARGEST_ROW = 2**24
# A .json file is in memory as a whole. The largest that people have, of a million recipes, has 1.4 GB.
LARGEST_JSON = 2**31
# gzip makes JSON of recipes 3 to 30 times smaller. A bomb is 1,000 times smaller.
MOST_EXPANSION = 100
MOST_EMPTY_LINES = 1_000_000

# Files of more bytes than this are worth several processes.
LARGE = 2**25


class BadRow(Exception):
    """Why a row cannot be used."""


# Stands for each line of white space. At the end of a file it is no row, elsewhere a bad one.
EMPTY = BadRow("an empty line")


def kind_of(path):
    """The ending that says how to read a file: "a.CSV.gz" is ".csv"."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def check(paths):
    """A UserError for the first path that is no file of a known kind.

    Check all files before the first is read, because a typo in the last one should show at once."""
    for path in paths:
        if path.is_file() and kind_of(path) in FORMATS:
            continue
        wrong = "has another ending"
        if not path.exists():
            wrong = "does not exist"
        elif path.is_dir():
            wrong = "is a folder"
        endings = ", ".join(FORMATS)
        raise UserError(
            f"{path} {wrong}: --data takes {endings} files, each also with .gz behind it."
        )


def are_large(paths):
    """Whether several processes should share the rows of these files.

    With a .json file they should not, because each process would parse the whole file."""
    if any(kind_of(path) == ".json" for path in paths):
        return False
    return sum(path.stat().st_size for path in paths) > LARGE


def read(paths, rank=0, processes=1):
    """Lists of at most a thousand (path, line, row). With 3 processes, rank 0 gets lists 0, 3, 6 …, rank 1 1, 4, 7 …

    Each process splits all files into raw rows, because splitting is quick, but decodes only its own lists."""
    raw_rows = (raw for path in paths for raw in split(path))
    for raw_list in islice(lists_of(raw_rows), rank, None, processes):
        yield [(path, line, decode(raw)) for path, line, raw in raw_list]


def lists_of(raw_rows):
    """Lists of a thousand raw rows; of fewer rows where these are long."""
    some = []
    size = 0
    for raw_row in raw_rows:
        some.append(raw_row)
        size += size_of(raw_row[2])
        if len(some) == ROWS_OF_A_LIST or size > BYTES_OF_A_LIST:
            yield some
            some = []
            size = 0
    if some:
        yield some


def size_of(raw):
    """The length of a raw row in bytes or characters. A row of a .json file is 0: it is in memory already."""
    if isinstance(raw, bytes):
        return len(raw)
    if isinstance(raw, tuple):
        return sum(map(len, raw))
    return 0


# --- a file to raw rows ---


def split(path):
    """(path, line, raw row) of each row of a file. An error of the file as a whole becomes a UserError."""
    opened = open
    if path.suffix.lower() == ".gz":
        opened = gzip.open
    rows_of = FORMATS[kind_of(path)]
    try:
        # Open in binary, because then only "\n" ends a line, and a broken byte spoils one row only.
        with opened(path, "rb") as file:
            for line, raw in without_empty_end(rows_of(file, path), path):
                yield path, line, raw
    except (EOFError, zlib.error, OSError, csv.Error) as e:
        # In most cases a gzip file that is cut off or corrupt, or a file that is no gzip.
        message = f"{path} cannot be read to its end: {e}. Fetch it again if it was cut off."
        raise UserError(message) from e
    except (ValueError, RecursionError) as e:
        # Only a .json file comes here. A ValueError is broken JSON or broken UTF-8, and its text says where.
        raise UserError(f"{path} is broken JSON: {e}.") from e


def without_empty_end(rows, path):
    """The (line, raw row) of a file without the empty lines at its end, which editors leave there.

    Only a count is kept of the lines that wait for a row behind them."""
    waiting = 0
    for line, raw in rows:
        if raw is EMPTY:
            waiting += 1
            if waiting > MOST_EMPTY_LINES:
                raise UserError(
                    f"{path}: {waiting} empty lines end at line {line}: no file of rows."
                )
            continue
        for earlier in range(line - waiting, line):
            yield earlier, EMPTY
        waiting = 0
        yield line, raw


class Lines:
    """The lines of an open file. A row that is too long is a UserError before it is in memory.

    size: what the lines of the present row have together. The reader sets it to 0 behind each row, because a row of a
    CSV file may have many lines."""

    def __init__(self, file, path):
        self.file = file
        self.path = path
        self.size = 0

    def __iter__(self):
        return self

    def __next__(self):
        line = self.file.readline(LARGEST_ROW + 1)
        self.size += len(line)
        if self.size > LARGEST_ROW:
            raise UserError(
                f"{self.path} has a row of more than {LARGEST_ROW} characters, which is no recipe. A file that is one "
                "JSON value should end in .json; a CSV file may lack a closing quote."
            )
        if not line:
            raise StopIteration
        return line


def refuse_large_json(file, path):
    """A UserError if the file expands to more than memory should hold. Count first, because parsing takes far more."""
    most = max(LARGEST_ROW, MOST_EXPANSION * path.stat().st_size)
    most = min(most, LARGEST_JSON)
    size = 0
    while piece := file.read(LARGEST_ROW):
        size += len(piece)
        if size > most:
            raise UserError(
                f"{path} expands to more than {most} bytes, which is too much for a .json file: write one row a line "
                "and name the file .jsonl."
            )
    file.seek(0)


def json_values(file, path):
    """(number, row) of each row of a JSON file. The file holds a list of rows, an object of rows, or one row."""
    refuse_large_json(file, path)
    content = json.loads(file.read())
    if isinstance(content, dict):
        content = content.values()
    elif not isinstance(content, list):
        content = [content]
    return enumerate(content, 1)


def json_lines(file, path):
    """(number, line as bytes) of a JSON Lines file, or (number, EMPTY)."""
    lines = Lines(file, path)
    for number, line in enumerate(lines, 1):
        lines.size = 0
        raw = line
        # A file without rows may begin with a byte order mark.
        if not line.removeprefix(codecs.BOM_UTF8).strip():
            raw = EMPTY
        yield number, raw


def csv_cells(file, path):
    """(line, cells of COLUMNS and the names of other columns) of each row of a CSV file, or (line, BadRow).

    line: the first line of the row"""
    csv.field_size_limit(LARGEST_CELL)
    # Read a byte that is no UTF-8 as a lone surrogate, so that only its own row becomes bad: recipes.parse refuses it.
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    lines = Lines(text, path)
    reader = csv.reader(lines)
    header = next(reader, [])
    missing = [name for name in NEEDED if name not in header]
    if missing:
        lacks = ", ".join(missing)
        raise UserError(
            f"{path} lacks the columns {lacks}; its first line has {header[:12]!r:.400}."
        )
    twice = [name for name in COLUMNS if header.count(name) > 1]
    if twice:
        raise UserError(f"{path} has the column {twice[0]} twice: which one holds the recipes?")
    places = [header.index(name) for name in COLUMNS if name in header]
    # The names of the other columns go with each row, so that the account can name what is not used.
    others = tuple(name for name in header if name not in (*COLUMNS, *OF_RECIPENLG))
    line = reader.line_num + 1
    lines.size = 0
    for cells in reader:
        lines.size = 0
        if len(cells) == len(header):
            yield line, (*(cells[place] for place in places), others)
        elif not cells or (len(cells) == 1 and cells[0].isspace()):
            yield line, EMPTY
        else:
            yield line, BadRow(f"{len(cells)} cells under {len(header)} columns")
        line = reader.line_num + 1


FORMATS = {".json": json_values, ".jsonl": json_lines, ".csv": csv_cells}


# --- a raw row to a dict ---


def decode(raw):
    """The dict in a raw row (bytes of a line, a tuple of cells, or a JSON value); a BadRow where there is none."""
    if isinstance(raw, BadRow):
        return raw
    try:
        row = raw
        if isinstance(raw, bytes):
            row = decode_json(raw, "the line")
        elif isinstance(raw, tuple):
            row = decode_cells(raw)
        if not isinstance(row, dict):
            raise BadRow(f"no JSON object but {row!r:.40}")
        return row
    except (BadRow, RecursionError) as why:
        return BadRow(str(why))


def decode_cells(raw):
    """{column: text or list} of the cells of a CSV row. An empty NER cell is left out, the unused columns are None."""
    *cells, others = raw
    row = dict.fromkeys(others)
    # Not strict, because a file may have no column NER.
    for column, cell in zip(COLUMNS, cells, strict=False):
        if column == "title":
            row[column] = cell
        elif cell or column != "NER":
            row[column] = decode_json(cell, f"`{column}`")
    return row


def decode_json(text, what):
    """The value in some JSON. what: the line or the cell, for the BadRow where there is none"""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        # A ValueError is broken JSON, broken UTF-8, or a number of more digits than Python takes.
        why = "it is empty"
        if text.strip():
            why = getattr(e, "msg", e)
        raise BadRow(f"{what} is no JSON in UTF-8 ({why})") from None


# --- and back ---


def save(rows, path):
    """Write dicts as JSON Lines, gzipped if the name ends in .gz. After an error there is no file, never a half one."""
    try:
        with tempfile.TemporaryDirectory(".part", dir=path.parent) as folder:
            part = Path(folder, path.name)
            write_lines(rows, part)
            os.replace(part, path)
    except OSError as e:
        raise UserError(f"--to {path} cannot be written ({e}).") from None


def write_lines(rows, path):
    """Write each dict as one line of JSON."""
    opened = open
    if path.suffix == ".gz":
        opened = gzip.open
    with opened(path, "wt", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
