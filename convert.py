"""A GGUF file (llama.cpp's) as a Hugging Face folder: config.json, safetensors, tokenizer.json.

    python convert.py model.gguf folder/

The other programs take a .gguf file as --model and convert it by themselves.
"""

import cli
from cli import UserError

from pathlib import Path

from files import gguf_file


def main():
    parser = cli.Parser(
        description="Make a Hugging Face folder of a GGUF file (llama.cpp's).", allow_abbrev=False
    )
    parser.add_argument("gguf", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    if not args.gguf.is_file() or args.folder.exists():
        raise UserError(f"{args.gguf} must be a file, and {args.folder} must not be there yet.")
    print(gguf_file.convert(args.gguf, args.folder))


if __name__ == "__main__":
    cli.run(main)
