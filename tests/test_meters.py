"""speed/meters.py: a failed allocation is known as one whoever reports it. fit.py makes a sentence of it."""

from cli import UserError

import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import fit
from speed import meters

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
import fit

path, allocation = sys.argv[1:]
with open("/proc/self/statm") as f:
    now = int(f.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 2 * 10**8,) * 2)
try:
    with fit.out_of_memory(torch.device("cpu"), lambda: ("while it was tried", "Try less.")):
        eval(allocation)
except fit.UserError as e:
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
    assert ran.stdout.startswith("out of memory while it was tried, with "), ran.stderr
    assert " GB in use. Try less. (" in ran.stdout
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
        with fit.out_of_memory(torch.device("cpu"), None):
            raise RuntimeError("shapes do not fit")


def test_the_sentence_has_what_was_done_what_is_in_use_and_the_account(monkeypatch):
    monkeypatch.setattr(meters, "peak_memory", lambda device: 5.0)
    with pytest.raises(UserError) as e:
        with fit.out_of_memory(torch.device("cpu"), lambda: ("while training", "Try less.")):
            raise OUT_OF_MEMORY[2]
    # Of the error, its first line.
    assert str(e.value) == (
        "out of memory while training, with 5.0 GB in use. Try less. (CUDA error: out of memory)"
    )
