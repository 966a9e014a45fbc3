"""Rows of the files that people bring: .json, .jsonl and .csv, each also with .gz behind it.

    for rows in read([Path("full_dataset.csv"), Path("mine.jsonl.gz")]):  # a thousand rows at a time
        for path, line, row in rows:
            ...  # row is a dict, or the BadRow that stands in its place

What a row means is the business of recipes.py. No file is held in memory but a .json, which is one value.
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

# The columns of RecipeNLG's CSV that are read. All but the title hold a list, as JSON inside the cell.
COLUMNS = ["title", "ingredients", "directions", "NER"]
NEEDED = COLUMNS[:3]
LARGEST_CELL = 2**31 - 1

ROWS_OF_A_LIST = 1000
LARGE = 2**25  # bytes: reading more than this is worth several processes


class BadRow(Exception):
    """Why a row cannot be used."""


def kind_of(path):
    """The ending that says how a file is read, without the .gz behind it."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def check(paths):
    """A UserError for the first path that is no file of a known kind: a typo in the last one should cost no time."""
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
    """Whether several processes should share the rows. A .json is one value, which each process would have to parse."""
    if any(kind_of(path) == ".json" for path in paths):
        return False
    return sum(path.stat().st_size for path in paths) > LARGE


def read(paths, rank=0, processes=1):
    """Lists of a thousand (path, line, row). With n `processes`, each gets every n-th list, beginning with its rank.

    Splitting files into raw rows is quick, so each process does that for all; only its own rows are decoded."""
    raw_rows = (raw for path in paths for raw in split(path))
    lists = iter(lambda: list(islice(raw_rows, ROWS_OF_A_LIST)), [])
    for raw_list in islice(lists, rank, None, processes):
        yield [(path, line, decode(raw)) for path, line, raw in raw_list]


# --- a file to raw rows ---


def split(path):
    """(path, line, raw row) of each row of a file. Errors of the file as a whole become a UserError."""
    opened = open
    if path.suffix.lower() == ".gz":
        opened = gzip.open
    rows_of = FORMATS[kind_of(path)]
    try:
        # In binary: in a text file, U+2028 inside a string may end a line, too.
        with opened(path, "rb") as file:
            for line, raw in rows_of(file, path):
                yield path, line, raw
    except (EOFError, zlib.error, OSError, csv.Error) as e:
        # Mostly a gzip file that is cut off or corrupt, or that is none.
        message = f"{path} cannot be read to its end: {e}. Fetch it again if it was cut off."
        raise UserError(message) from e
    except (ValueError, RecursionError) as e:
        # Of a .json. ValueError is broken JSON or broken UTF-8, and says where.
        raise UserError(f"{path} is broken JSON: {e}.") from e


def json_values(file, path):
    """(number, value) of a JSON file: a list of rows, an object of them, or a single one."""
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
    """(number of its first line, cells of COLUMNS) of each row of a CSV file, or (number, BadRow)."""
    csv.field_size_limit(LARGEST_CELL)
    # A byte that is no UTF-8 becomes a lone surrogate, so that it spoils only its own row.
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
    """The dict that a raw row stands for (bytes of a line, a tuple of cells, or a JSON value); else a BadRow."""
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
    """{column: its text or its list} of a CSV's row, where an empty NER is none."""
    row = {}
    for column, cell in zip(COLUMNS, cells, strict=False):  # there may be no NER
        if column == "title":
            row[column] = cell
        elif cell or column != "NER":
            row[column] = decode_json(cell, f"`{column}`")
    return row


def decode_json(text, what):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        # ValueError: broken JSON, broken UTF-8, or a number of 5,000 digits.
        why = "it is empty"
        if text.strip():
            why = getattr(e, "msg", e)
        raise BadRow(f"{what} is no JSON in UTF-8 ({why})") from None


# --- and back ---


def save(rows, path):
    """Write dicts as JSON Lines that `read` takes, gzipped if the name ends in .gz. All of them or no file."""
    try:
        with tempfile.TemporaryDirectory(".part", dir=path.parent) as folder:
            part = Path(folder, path.name)
            write_lines(rows, part)
            os.replace(part, path)
    except OSError as e:
        raise UserError(f"--to {path} cannot be written ({e}).") from None


def write_lines(rows, path):
    opened = open
    if path.suffix == ".gz":
        opened = gzip.open
    with opened(path, "wt", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
