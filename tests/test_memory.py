"""speed/memory.py: a failed allocation is known as one whoever reports it, and becomes a sentence that helps."""

from cli import UserError

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch import nn

from speed import memory

# Each of these asks for 4 GB more than the process may have.
ALLOCATIONS = {
    "numpy": "np.zeros(10**9, np.float32)",
    "python": "bytearray(4 * 10**9)",
    "torch": "torch.zeros(10**9)",
    "a mapped file": "torch.from_file(path, size=10**9)",
    "safetensors": "safe_open(path, framework='pt')",
}
PROGRAM = """
import resource, sys
import numpy as np
import torch
from safetensors import safe_open
from speed import memory

path, allocation = sys.argv[1:]
with open("/proc/self/statm") as f:
    now = int(f.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 2 * 10**8,) * 2)
flags = {"lora_r": 16, "quant": "none", "dtype": "fp32"}
try:
    with memory.out_of_memory(torch.device("cpu"), flags):
        eval(allocation)
except memory.UserError as e:
    print(e)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux holds a process to RLIMIT_AS")
@pytest.mark.parametrize("whose", ALLOCATIONS)
def test_an_allocation_that_really_fails_is_a_sentence(tmp_path, whose):
    path = tmp_path / "sparse.safetensors"
    with open(path, "wb") as f:
        f.truncate(4 * 10**9)
    call = [sys.executable, "-c", PROGRAM, path, ALLOCATIONS[whose]]
    ran = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert "while the model was loaded" in ran.stdout, ran.stderr
    assert "--quant nf4" in ran.stdout and "--dtype bf16" in ran.stdout
    assert ran.stdout.count("\n") == 1


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("MPS backend out of memory (MPS allocated: 9.05 GB)"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("unable to mmap 9 bytes from file <a.safetensors>: Cannot allocate memory (12)"),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_every_allocators_error_is_known(error):
    assert meters.is_out_of_memory(error)


def test_other_errors_are_not_taken_for_it():
    for error in (RuntimeError("shapes do not fit"), UserError("out of range"), ValueError()):
        assert not meters.is_out_of_memory(error)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        with memory.out_of_memory(torch.device("cpu"), {}):
            raise RuntimeError("shapes do not fit")


FLAGS = {"lora_r": 16, "quant": "none", "dtype": "auto"}


@pytest.mark.parametrize(
    ("changes", "helps"),
    [
        ({}, ["--quant nf4"]),
        ({"dtype": "fp32"}, ["--quant nf4", "--dtype bf16"]),
        ({"quant": "fp8"}, ["--quant nf4"]),
        ({"quant": "nf4"}, []),
        ({"lora_r": 0, "dtype": "fp32"}, ["an adapter (--lora_r 16)"]),
    ],
)
def test_what_helps_while_loading_is_what_the_flags_do_not_have_yet(changes, helps):
    """--lora_r 0 keeps all weights in fp32 and refuses --quant, so neither is advised there."""
    assert memory.advice_while_loading(FLAGS | changes) == [*helps, "a smaller --model"]


def test_sampling_has_no_rank_and_may_quantise():
    assert "--quant nf4" in memory.advice_while_loading({"quant": "none", "dtype": "auto"})


@pytest.mark.parametrize("was", ["training", "evaluating"])
def test_the_sentence_says_what_was_done_and_what_held_the_memory(was, monkeypatch):
    monkeypatch.setattr(memory, "peak_memory", lambda device: 5.0)
    monkeypatch.setattr(memory, "advice", lambda flags: ["--grad_ckpt", "--fused_loss"])
    model = nn.Linear(10**4, 5 * 10**4, bias=False, device="meta").train(mode=was == "training")
    with pytest.raises(UserError) as e:
        with memory.out_of_memory(torch.device("cpu"), {}, model):
            raise OUT_OF_MEMORY[0]
    doing = {"training": "while training", "evaluating": "while the held-out loss was measured"}
    assert str(e.value) == (
        f"out of memory {doing[was]}: weights hold 2.0 GB, all else 3.0 GB or more. In order of gain, these take "
        "less: --grad_ckpt, --fused_loss. (CUDA out of memory. Tried to allocate 2.00 GiB.)"
    )
