"""convert.py: the program around files/gguf_file.py."""

import os
import subprocess
import sys

from conftest import ROOT, program
from test_gguf_file import make_gguf


def test_the_program(tmp_path):
    make_gguf(tmp_path / "m.gguf")
    done = program("convert.py", tmp_path / "m.gguf", tmp_path / "hf")
    assert (
        done.stdout == f"{tmp_path / 'hf'}\n" and (tmp_path / "hf" / "model.safetensors").exists()
    )
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for args, says in (
        ((tmp_path / "m.gguf", tmp_path / "hf"), "must not exist yet"),
        ((tmp_path / "no.gguf", tmp_path / "n"), "must be a file"),
        ((tmp_path / "m.gguf", tmp_path / "m.gguf" / "hf"), "m.gguf, which is a file"),
        ((tmp_path / "m.gguf", tmp_path / "none" / ".."), "names no new folder"),
        ((tmp_path / "m.gguf", tmp_path / "link"), "must not exist yet"),
        (("~nobody-here/m.gguf", tmp_path / "n"), "no user and no file ~nobody-here"),
        ((tmp_path / "m.gguf", "~nobody-here/n"), "no user and no file ~nobody-here"),
        ((tmp_path / "m.gguf",), "required"),
        ((tmp_path / "m.gguf", tmp_path / "n", "--fast"), "--fast"),
    ):
        done = program("convert.py", *args, check=False)
        assert (
            done.returncode == 2
            and says in done.stderr
            and "Traceback" not in done.stderr
            and not done.stdout
        )


def test_a_full_disk_is_a_sentence_and_leaves_nothing_half(tmp_path):
    make_gguf(tmp_path / "m.gguf")
    code = (
        "import resource, sys, cli, convert; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); "
        "sys.argv[1:] = ['m.gguf', 'hf']; cli.run(convert.main)"
    )  # no file may grow further: as on a full disk
    full = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert full.returncode == 1 and "cannot write" in full.stderr and "Traceback" not in full.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
