"""Rows of the files that people bring: .json, .jsonl and .csv, each also with .gz behind it.

    for rows in read([Path("full_dataset.csv"), Path("mine.jsonl.gz")]):  # a thousand rows at a time
        for path, line, row in rows:
            ...  # row is a dict, or the BadRow that stands in its place

recipes.py decides what the fields of a row mean. Files are read a thousand rows at a time; only a .json file, which is
one JSON value, is held in memory as a whole.
"""

from cli import UserError

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
LARGEST_CELL = 2**31 - 1

ROWS_OF_A_LIST = 1000
# Files of more bytes than this are worth several processes.
LARGE = 2**25


class BadRow(Exception):
    """Why a row cannot be used."""


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
    """Lists of a thousand (path, line, row). With 3 processes, rank 0 gets lists 0, 3, 6 …, rank 1 gets 1, 4, 7 …

    Each process splits all files into raw rows, because splitting is quick, but decodes only its own lists."""
    raw_rows = (raw for path in paths for raw in split(path))
    lists = iter(lambda: list(islice(raw_rows, ROWS_OF_A_LIST)), [])
    for raw_list in islice(lists, rank, None, processes):
        yield [(path, line, decode(raw)) for path, line, raw in raw_list]


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
            for line, raw in rows_of(file, path):
                yield path, line, raw
    except (EOFError, zlib.error, OSError, csv.Error) as e:
        # In most cases a gzip file that is cut off or corrupt, or a file that is no gzip.
        message = f"{path} cannot be read to its end: {e}. Fetch it again if it was cut off."
        raise UserError(message) from e
    except (ValueError, RecursionError) as e:
        # Only a .json file comes here. A ValueError is broken JSON or broken UTF-8, and its text says where.
        raise UserError(f"{path} is broken JSON: {e}.") from e


def json_values(file, path):
    """(number, row) of each row of a JSON file. The file holds a list of rows, an object of rows, or one row."""
    content = json.loads(file.read())
    if isinstance(content, dict):
        content = content.values()
    elif not isinstance(content, list):
        content = [content]
    return enumerate(content, 1)


def json_lines(file, path):
    """(number, line as bytes) of a JSON Lines file."""
    return enumerate(file, 1)


def csv_cells(file, path):
    """(line, cells of COLUMNS) of each row of a CSV file, or (line, BadRow). line: the first line of the row"""
    csv.field_size_limit(LARGEST_CELL)
    # Read a byte that is no UTF-8 as a lone surrogate, so that only its own row becomes bad: recipes.parse refuses it.
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text)
    header = next(reader, [])
    missing = [name for name in NEEDED if name not in header]
    if missing:
        lacks = ", ".join(missing)
        raise UserError(
            f"{path} lacks the columns {lacks}; its first line has {header[:12]!r:.400}."
        )
    places = [header.index(name) for name in COLUMNS if name in header]
    line = reader.line_num + 1
    for cells in reader:
        if len(cells) == len(header):
            yield line, tuple(cells[place] for place in places)
        elif cells:
            yield line, BadRow(f"{len(cells)} cells under {len(header)} columns")
        else:
            yield line, BadRow("an empty line")
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


def decode_cells(cells):
    """{column: text or list} of the cells of a CSV row. An empty NER cell is left out."""
    row = {}
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
