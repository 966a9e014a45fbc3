"""state.safetensors: all that a resume needs, in one file, because one file appears in one rename.

    the trained tensors | the optimiser's states | the random generators | step, best loss … as JSON

    save("out/state.safetensors", optimizer, params, {"step": 30}, run_id)
    facts = load("out/state.safetensors", optimizer, params, run_id)

So weights of step 60 never meet optimiser states of step 30. A checksum covers all of it, because a bit that a disk
flipped would else be trained on. In more detail:

    tensors     param.NAME, optim.NUMBER.KEY (of the optimiser's parameter NUMBER), random.cpu, random.cuda
    metadata    facts, scalars (NUMBER.KEY of the optimiser), shapes, run (the id in run.json), versions: each as JSON;
                checksum

Proof: tests/test_run.py: test_stopped_and_resumed_is_bit_for_bit_what_uninterrupted_is,
test_a_state_that_is_damaged_or_does_not_fit_is_refused_by_name, test_no_flipped_bit_of_a_state_passes.
"""

from cli import UserError, say

import json
import platform

import torch
from safetensors import SafetensorError, safe_open

from files import disk

STATE = "state.safetensors"

# What of run.json's versions a state holds too: {key: its name in a sentence}.
VERSIONS = {"torch": "torch", "program": "this program"}

# What a paged optimiser of bitsandbytes keeps in memory that the driver moves between card and host.
PAGED = ("state1", "state2")


def save(path, optimizer, params, facts, run_id):
    """params: {name: parameter}; facts: a dict of JSON values (step, best loss, …); run_id: as in run.json"""
    on_device = tensors_of(optimizer, params) | random_states()
    tensors = {name: t.detach().cpu().contiguous() for name, t in on_device.items()}
    metadata = {
        "facts": disk.json_line(facts),
        "scalars": json.dumps(optimizer_scalars(optimizer)),
        "shapes": json.dumps(shapes_of(tensors)),
        "run": json.dumps(run_id),
        "versions": json.dumps(versions()),
    }
    metadata["checksum"] = disk.checksum(tensors, metadata)
    disk.write_tensors(path, tensors, metadata)


def load(path, optimizer, params, run_id=None):
    """Fill parameters, optimiser and random generators. -> the facts

    run_id: of run.json; None if that is of a version that wrote none"""
    tensors, about = read_state(path)
    if run_id is not None and about["run"] not in (None, run_id):
        raise UserError(f"--resume: {path} and run.json beside it are of two different runs.")
    refuse_no_numbers(path, tensors)
    fill_params(path, params, tensors)
    saved = [key for key in tensors if key.startswith("optim.")]
    for key in saved:
        fill_optimizer(path, optimizer, key.removeprefix("optim."), tensors[key])
    for key, value in about["scalars"].items():
        fill_optimizer(path, optimizer, key, value)
    set_random_states(tensors)
    say_other_versions(about["versions"])
    return about["facts"]


def trained_by(optimizer):
    """The optimiser's parameters. STATE numbers them in this order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def tensors_of(optimizer, params):
    """{name in STATE: tensor} of what is trained and of the optimiser's state."""
    tensors = {f"param.{name}": p for name, p in params.items()}
    return tensors | optimizer_tensors(optimizer)


def optimizer_tensors(optimizer):
    """{optim.NUMBER.KEY: tensor} of the optimiser's state."""
    tensors = {}
    for i, p in enumerate(trained_by(optimizer)):
        for key, value in optimizer.state[p].items():
            if not isinstance(value, torch.Tensor):
                continue
            # All parameters share one table of bitsandbytes. Copy it, because safetensors stores no tensor twice.
            if key.startswith("qmap"):
                value = value.clone()
            tensors[f"optim.{i}.{key}"] = value
    return tensors


def optimizer_scalars(optimizer):
    """{NUMBER.KEY: number} of the optimiser's state, because some optimisers count their steps in plain numbers."""
    scalars = {}
    for i, p in enumerate(trained_by(optimizer)):
        for key, value in optimizer.state[p].items():
            if not isinstance(value, torch.Tensor):
                scalars[f"{i}.{key}"] = value
    return scalars


def random_states():
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(tensors):
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])


def shapes_of(tensors):
    return {name: list(t.shape) for name, t in tensors.items()}


def read_state(path):
    """(tensors, {"facts", "scalars", "run", "versions"}) of a state file; UserError if the file is damaged."""
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata()
            tensors = {key: f.get_tensor(key) for key in f.offset_keys()}
        shapes = json.loads(metadata["shapes"])
        if shapes != shapes_of(tensors):
            raise ValueError("its tensors do not have the saved shapes")
        # Earlier versions of this program wrote no checksum.
        metadata.pop("format", None)
        saved = metadata.pop("checksum", None)
        if saved is not None and saved != disk.checksum(tensors, metadata):
            raise ValueError("its content is not what was written: the checksum differs")
        about = {
            "facts": disk.parse_json(metadata["facts"]),
            "scalars": json.loads(metadata["scalars"]),
            # Earlier versions of this program wrote neither of these two.
            "run": json.loads(metadata.get("run", "null")),
            "versions": json.loads(metadata.get("versions", "{}")),
        }
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as e:
        raise UserError(
            f"{path} cannot be read ({e}); start without --resume, which keeps the old run under another name."
        ) from None
    return tensors, about


def refuse_no_numbers(path, tensors):
    """Raise UserError for a state whose training had already failed: it would only go on to fail."""
    name = first_with_no_number(tensors)
    if name:
        raise UserError(
            f"{path}: {name} holds nan or inf: begin from what was saved before, in best/ say (--init_adapter)."
        )


def first_with_no_number(tensors):
    """The name of the first tensor with nan or inf; "" if there is none."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return name
    return ""


def versions():
    """What a run was made with, {name: version}. That of this program is a hash of its code."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "program": disk.program(),
    }


def say_other_versions(saved):
    """A line where another torch or another version of this program saved the state. saved: its versions"""
    now = versions()
    changes = []
    for key, what in VERSIONS.items():
        before = saved.get(key, "an earlier version")
        if before != now[key]:
            changes.append(f"{what} was {before}, is {now[key]}")
    if changes:
        say("resume", f"{'; '.join(changes)}: losses may differ in their last digits")


def fill_params(path, params, tensors):
    for name, p in params.items():
        saved = tensors.get(f"param.{name}")
        if saved is None or saved.shape != p.shape:
            raise UserError(
                f"{path} does not fit this model: {name} is missing or has another shape."
            )
        with torch.no_grad():
            p.copy_(saved)


def fill_optimizer(path, optimizer, key, value):
    """Put one tensor or number back into the optimiser's state. key: NUMBER.KEY"""
    number, _, name = key.partition(".")
    trained = trained_by(optimizer)
    if int(number) >= len(trained):
        raise UserError(
            f"{path} was saved by another version of this program: start without --resume."
        )
    p = trained[int(number)]
    if not isinstance(value, torch.Tensor):
        optimizer.state[p][name] = value
    elif name in PAGED and getattr(optimizer, "is_paged", False):
        optimizer.state[p][name] = paged(path, optimizer, p, value)
    else:
        optimizer.state[p][name] = value.to(p.device)


def paged(path, optimizer, p, value):
    """A saved state in a buffer such as the optimiser makes at its first step: paged, unless p is small.

    Proof: tests/test_run.py: test_a_paged_state_comes_back_into_paged_memory. On a card: tests/test_gpu.py:
    test_a_resumed_paged_optimiser_is_paged_again."""
    if value.shape != p.shape:
        raise UserError(f"{path} does not fit this model: a state has another shape.")
    buffer = optimizer.get_state_buffer(p, dtype=value.dtype)
    buffer.copy_(value)
    return buffer
