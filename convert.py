"""Convert a GGUF file, llama.cpp's format, into a Hugging Face folder: config.json, safetensors, tokenizer.json.

    python convert.py model.gguf folder/

The other programs need no such folder: give them the .gguf file as --model. files/gguf_file.py does the work.
"""

import cli
from cli import UserError

import argparse
import os
from pathlib import Path

from files import disk, gguf_file


def main():
    parser = cli.Parser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("gguf", type=Path, help="GGUF file to read")
    parser.add_argument(
        "folder", type=Path, help="Hugging Face folder to write; must not exist yet"
    )
    args = parser.parse_args()
    source = Path(disk.user_path(args.gguf, "The file"))
    folder = Path(disk.user_path(args.folder, "The folder"))
    check(source, folder)
    print(gguf_file.convert(source, folder))


def check(source, folder):
    """Raise UserError for paths with which no conversion can begin."""
    if not source.is_file():
        raise UserError(f"{source} must be a file: name the .gguf file to convert.")
    if not os.access(source, os.R_OK):
        raise UserError(f"{source} cannot be read: you have no permission to.")
    # A link to nowhere does not exist for Path.exists, but no folder can take its place.
    if os.path.lexists(folder):
        raise UserError(f"The folder {folder} must not exist yet: name another one.")
    if folder.name in {"", ".."}:
        raise UserError(f"{folder} names no new folder: name one that does not exist yet.")
    for parent in folder.absolute().parents:
        if parent.exists() and not parent.is_dir():
            raise UserError(
                f"{folder} would lie in {parent}, which is a file: name another folder."
            )


if __name__ == "__main__":
    cli.run(main)
