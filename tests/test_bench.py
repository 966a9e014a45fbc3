"""bench.py's rows are runs of train.py on a model and recipes that it makes: does one come out as it should?"""

import json

import pytest
from conftest import ROOT, program

import bench
import model as models


@pytest.fixture
def root(tmp_path):
    bench.make_model(tmp_path / "tiny", "tiny")
    return tmp_path


def test_the_made_up_model_loads_and_its_words_are_tokens(root):
    model = models.load(root / "tiny")
    assert (
        model.cfg.hidden_size,
        model.cfg.num_hidden_layers,
        len(models.shards(root / "tiny")),
    ) == (256, 2, 1)
    heap = bench.make_recipes(root / "r.jsonl", [5, 48, 7], 1024)
    assert [len(json.loads(line)["text"].split()) for line in heap.read_text().splitlines()] == [
        5,
        48,
        7,
    ]


def test_lengths_are_those_of_the_measured_workload():
    drawn = bench.lengths_of("sorted", 16, 20)
    assert (
        len(drawn) == 320
        and min(drawn) >= 48
        and max(drawn) <= 512
        and 180 < sorted(drawn)[160] < 220
    )
    assert (
        bench.lengths_of("fixed", 32, 2) == [256] * 64
        and bench.lengths_of("long", 1, 3) == [2048] * 3
    )


def test_a_row_says_what_train_measured(root, monkeypatch):
    monkeypatch.setitem(bench.ROWS, "1", ("a short one", "fixed", 2, ["--quant", "nf4"]))
    cfg = bench.Config(shape="tiny", steps=5, device="cpu", cache=str(root / "cache"))
    row = bench.run_row(cfg, "1", root)
    assert "error" not in row, row
    lines = [json.loads(s) for s in (root / "row1" / "metrics.jsonl").read_text().splitlines()]
    assert [x["target_tokens"] for x in lines[1:]] == [
        2 * 256
    ] * 5  # 256 inputs a recipe, and so 256 targets
    assert (
        row["steps"] == 2
        and row["low"] <= row["tokens_per_s"] <= row["high"]
        and row["padding"] == 0
    )
    assert row["to_first_step_s"] > 0 and row["peak_gb"] > 0


def test_a_row_that_fails_says_why(root, monkeypatch):
    monkeypatch.setitem(
        bench.ROWS, "1", ("impossible", "fixed", 2, ["--lora_r", "0", "--quant", "nf4"])
    )
    row = bench.run_row(
        bench.Config(shape="tiny", steps=2, device="cpu", cache=str(root)), "1", root
    )
    assert "--lora_r 0" in row["error"]


@pytest.mark.parametrize("flags, word", [(["--rows", "99"], "99"), (["--shape", "3b"], "3b")])
def test_a_mistake_gets_one_sentence(flags, word):
    done = program("bench.py", *flags, cwd=ROOT, check=False)
    assert (
        done.returncode == 2
        and word in done.stderr.splitlines()[-1]
        and "Traceback" not in done.stderr
    )


def test_a_peer_that_is_not_installed_is_said_before_anything_is_made(tmp_path):
    done = program(
        "bench.py", "--peers", "unslothh", "--shape", "tiny", "--cache", tmp_path, check=False
    )
    assert (
        done.returncode == 2
        and "unslothh" in done.stderr.splitlines()[-1]
        and not (tmp_path / "bench").exists()
    )
