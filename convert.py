"""Convert a GGUF file, llama.cpp's format, into a Hugging Face folder: config.json, safetensors, tokenizer.json.

    python convert.py model.gguf folder/

The other programs need no such folder: give them the .gguf file as --model. files/gguf_file.py does the work.
"""

import cli
from cli import UserError

import argparse
from pathlib import Path

from files import gguf_file


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
    if not args.gguf.is_file() or args.folder.exists():
        raise UserError(
            f"{args.gguf} must be a file, and the folder {args.folder} must not exist yet."
        )
    print(gguf_file.convert(args.gguf, args.folder))


if __name__ == "__main__":
    cli.run(main)
