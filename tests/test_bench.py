"""bench.py's rows are runs of train.py on a model and recipes that it makes: does one come out as it should?"""

import cli

import json
import re
import statistics
import types

import pytest
import torch
from conftest import ROOT, program
from safetensors import safe_open

import bench
import data
import model as models
import recipes
import train
from files import made_up, weights


@pytest.fixture
def root(tmp_path):
    bench.make_model(tmp_path / "tiny", "tiny")
    return tmp_path


def a_row(flags, batch=2):
    return bench.Row("a short one", lengths="fixed", batch=batch, flags=flags)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_made_up_model_loads_and_its_words_are_tokens(root):
    cfg = models.read_config(root / "tiny")
    models.load(root / "tiny", "cpu")
    assert (cfg.hidden_size, cfg.num_hidden_layers) == (256, 2)
    assert len(weights.shards(root / "tiny")) == 1
    file = bench.make_recipes(root / "r.jsonl", [5, 48, 7], 1024)
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    assert [len(text.split()) for text in texts] == [5, 48, 7]


def test_the_made_up_model_is_not_made_a_second_time(root):
    (file,) = weights.shards(root / "tiny")
    before = file.stat().st_mtime_ns
    bench.make_model(root / "tiny", "tiny")
    assert file.stat().st_mtime_ns == before


def test_tensors_are_spread_over_shards_and_the_index_says_where(tmp_path):
    shapes = {f"w{i}": (2, 3) for i in range(7)} | {"norm": (3,)}
    where = made_up.write_weights(tmp_path, shapes, shards=3)
    assert set(where) == set(shapes) and len(set(where.values())) == 3
    for name, file in where.items():
        with safe_open(tmp_path / file, framework="pt") as tensors:
            assert tuple(tensors.get_tensor(name).shape) == shapes[name]


def test_lengths_are_those_of_the_measured_workload():
    drawn = bench.lengths_of("sorted", 16, 20)
    assert len(drawn) == 320 == 16 * bench.SORTED_BATCHES
    assert min(drawn) >= 48 and max(drawn) <= 512
    assert 180 < sorted(drawn)[160] < 220
    assert bench.lengths_of("fixed", 32, 2) == [256] * 64
    assert bench.lengths_of("long", 1, 3) == [2048] * 3


@pytest.mark.parametrize("name", bench.ROWS)
def test_the_flags_of_a_row_are_train_py_s(name, tmp_path):
    cfg = bench.Config(shape="tiny")
    paths = [tmp_path / "model", tmp_path / "r.jsonl", tmp_path / "held.jsonl", tmp_path / "out"]
    command = bench.train_command(cfg, bench.ROWS[name], 14, paths)
    flags = command[command.index("train.py") + 1 :]
    train_cfg, data_cfg, _ = cli.parse("", train.Config, data.Data, recipes.Rules, argv=flags)
    train.check(train_cfg, data_cfg)
    assert (train_cfg.max_steps, train_cfg.out) == (14, str(tmp_path / "out"))
    assert data_cfg.batch_size == bench.ROWS[name].batch and not data_cfg.clean


def test_a_row_says_what_train_measured(root, monkeypatch):
    monkeypatch.setitem(bench.ROWS, "1", a_row("--quant nf4"))
    cfg = bench.Config(shape="tiny", steps=5, device="cpu", cache=str(root / "cache"))
    row = bench.run_row(cfg, "1", root)
    assert "error" not in row, row
    steps = metrics(root / "row1")[1:]
    # 256 inputs a recipe, and so 256 targets
    assert [step["target_tokens"] for step in steps] == [2 * 256] * 5
    rates = [step["tokens_per_s"] for step in steps[bench.WARM_UP :]]
    assert row["steps"] == 2 and row["padding"] == 0
    assert row["tokens_per_s"] == round(statistics.median(rates))
    assert (row["low"], row["high"]) == (round(min(rates)), round(max(rates)))
    summary = json.loads((root / "row1" / "summary.json").read_text())
    assert row["peak_gb"] == summary["peak_mem_gb"] > 0
    assert row["to_first_step_s"] == summary["to_first_step_s"] > 0
    assert row["to_first_step_s"] > row["first_step_s"] > 0
    assert row["flags"] == "--quant nf4" and row["what"] == "a short one"


def test_of_sorted_rows_the_third_epoch_counts_and_the_first_is_new(tmp_path):
    row = bench.Row("sorted", lengths="sorted", batch=16, flags="")
    lines = [{"step": 0}]
    for step in range(1, 61):
        lines.append({"step": step, "tokens_per_s": step, "padding": step / 1000})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    found = bench.rates_of_run(tmp_path, row)
    assert (found["low"], found["high"], found["steps"]) == (41, 60, 20)
    assert found["tokens_per_s"] == 50 and found["padding"] == 0.0505
    assert found["new_lengths_median"] == statistics.median(range(4, 21))


def test_a_row_that_fails_says_why(root, monkeypatch):
    monkeypatch.setitem(bench.ROWS, "1", a_row("--lora_r 0 --quant nf4"))
    cfg = bench.Config(shape="tiny", steps=2, device="cpu", cache=str(root))
    row = bench.run_row(cfg, "1", root)
    assert "--lora_r 0" in row["error"]


def test_rows_that_differ_in_our_flags_only_are_one_row_of_a_peer():
    assert bench.peer_row("1") == bench.peer_row("2")
    assert bench.peer_row("4") == bench.peer_row("8") == bench.peer_row("9")
    assert len({bench.peer_row(name) for name in "13456"}) == 5
    assert not bench.peer_row("3").ckpt and bench.peer_row("3").nf4
    assert not bench.peer_row("5").nf4


class FakePeer(torch.nn.Module):
    """Takes what transformers' models take, and remembers the batches."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.batches = []

    def forward(self, **batch):
        self.batches.append(batch)
        return types.SimpleNamespace(loss=self.weight.sum())


@pytest.fixture
def peers(monkeypatch):
    """The peers that are loaded, with a CPU in the place of the card."""
    loaded = []

    def load_peer(tool, folder, nf4, ckpt):
        loaded.append((tool, nf4, ckpt, FakePeer()))
        return loaded[-1][-1]

    monkeypatch.setattr(bench, "load_peer", load_peer)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda: 3 * 10**9)
    monkeypatch.setattr("bitsandbytes.optim.AdamW8bit", torch.optim.AdamW)
    return loaded


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_a_peer_trains_on_the_same_lengths(peers, tmp_path, capsys):
    cfg = bench.Config(shape="tiny", rows=["1", "2", "7", "4", "8", "5"], steps=4)
    bench.run_peer("hf", cfg, tmp_path)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(x["row"], x["lengths"], x["batch"]) for x in lines] == [
        ("1", "fixed", 32),
        ("4", "sorted", 16),
        ("5", "sorted", 16),
    ]
    # a model serves all rows of its kind of weights
    assert [peer[:3] for peer in peers] == [("hf", True, True), ("hf", False, True)]
    assert [x["steps"] for x in lines] == [1, 20, 20]
    assert all(x["peak_gb"] == 3.0 and x["to_first_step_s"] >= x["load_s"] for x in lines)
    assert "new_lengths_median" not in lines[0] and lines[1]["new_lengths_median"] > 0
    batches = peers[0][-1].batches
    assert len(batches) == 4 + 2 * 20
    real = sum(int((batch["labels"] != -100).sum()) for batch in batches[4:24])
    assert real == sum(bench.lengths_of("sorted", 16, 20))
    assert "attention_mask" not in batches[0]
    padded = batches[4]
    assert (padded["attention_mask"] == (padded["labels"] != -100)).all()


def test_a_peer_is_started_with_the_same_flags(monkeypatch):
    started = []
    monkeypatch.setattr(bench.subprocess, "run", lambda command, check: started.append(command))
    cfg = bench.Config(shape="tiny", rows=["1", "4"], steps=7, peers=["hf", "liger"], device="cpu")
    bench.start_peer("hf", cfg)
    (command,) = started
    flags = command[command.index(bench.__file__) + 1 :]
    (again,) = cli.parse("", bench.Config, argv=flags)
    assert again == bench.Config(shape="tiny", rows=["1", "4"], steps=7, peer="hf", device="cpu")


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--rows", "99"], "99"),
        (["--shape", "7b"], "7b"),
        (["--steps", "3"], "--steps 3"),
        (["--peers", "unslothh"], "unslothh"),
        (["--peer", "unslothh"], "unslothh"),
    ],
)
def test_a_mistake_gets_one_sentence_before_anything_is_made(flags, word, tmp_path):
    done = program("bench.py", "--cache", tmp_path, *flags, cwd=ROOT, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert word in done.stderr.splitlines()[-1]
    assert not (tmp_path / "bench").exists()


def test_a_peer_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setitem(bench.PEERS, "unsloth", "no_such_package")
    with pytest.raises(cli.UserError, match=re.escape("no_such_package is not installed here")):
        bench.check_installed(["unsloth"])
    monkeypatch.setitem(bench.PEERS, "unsloth", "safetensors")
    bench.check_installed(["unsloth"])
