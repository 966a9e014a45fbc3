"""speed/optim.py: an adapter as one flat tensor, bytes of the states, and gradients that do not arrive."""

from cli import UserError

import pytest
import torch

from speed import optim


def two_params():
    return [
        torch.nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]])),
        torch.nn.Parameter(torch.ones(3)),
    ]


def test_parameters_and_gradients_are_views_of_one_tensor():
    a, b = two_params()
    flat = optim.flatten([a, b])
    assert flat.tolist() == [1, 2, 3, 4, 1, 1, 1]
    (a.sum() * 2 + b.sum() * 5).backward()
    assert flat.grad.tolist() == [2, 2, 2, 2, 5, 5, 5]
    # A second backward adds in place: nothing else would reach the flat gradient, or a recorded CUDA graph.
    (a[0, 0] * 10).backward()
    assert flat.grad.tolist() == [12, 2, 2, 2, 5, 5, 5]
    flat.data.mul_(10)
    assert a.tolist() == [[10, 20], [30, 40]] and b.tolist() == [10, 10, 10]


def test_the_loss_scale_is_taken_out_before_the_norm_is_bounded():
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([24.0, 32.0])  # 8 times (3, 4), whose norm is 5
    assert float(optim.clip([p], 8.0, grad_clip=1.0)) == pytest.approx(5)
    assert p.grad.tolist() == pytest.approx([0.6, 0.8])
    p.grad = torch.tensor([3.0, 4.0])
    assert float(optim.clip([p], 1.0, grad_clip=0)) == pytest.approx(5)
    assert p.grad.tolist() == [3, 4]


@pytest.mark.parametrize(
    "kind, weights, wanted",
    [
        ("adamw", 1000, 8000),
        ("adamw8bit", 4095, 8 * 4095),  # bitsandbytes keeps small tensors in fp32
        (
            "adamw8bit",
            4096,
            2 * 4096 + 2 * 4 * 16,
        ),  # two bytes a weight, two fp32 absmax a block of 256
    ],
)
def test_bytes_of_states(kind, weights, wanted):
    assert optim.bytes_of_states(kind, torch.zeros(weights)) == wanted


def watched(params, model, used):
    watch = optim.GradientWatch(params)
    sum(params[name].sum() for name in used).backward()
    watch.check(model)
    return watch


def model_of(params, frozen=None):
    model = torch.nn.Module()
    for name, p in params.items():
        model.register_parameter(name.replace(".", "_"), p)
    if frozen is not None:
        model.register_parameter("frozen", frozen)
    return model


def test_a_parameter_that_backward_did_not_reach_is_named():
    a, b = two_params()
    params = {"x.lora_A.weight": a, "x.lora_B.weight": b}
    optim.flatten([a, b])  # their gradients are zeros, not None
    with pytest.raises(UserError, match=r"1 trained tensor\(s\) .* the first is x.lora_A.weight"):
        watched(params, model_of(params), ["x.lora_B.weight"])


def test_an_untrained_b_gives_its_a_zeros_and_that_is_fine():
    a, b = two_params()
    params = {"x.lora_A.weight": a, "x.lora_B.weight": b}
    watch = optim.GradientWatch(params)
    (a.sum() * 0 + b.sum()).backward()
    watch.check(model_of(params))
    assert watch.done


def test_a_frozen_tensor_with_a_gradient_is_named():
    a, b = two_params()
    params = {"x.lora_A.weight": a, "x.lora_B.weight": b}
    leak = torch.nn.Parameter(torch.ones(1), requires_grad=False)
    leak.grad = torch.ones(1)
    with pytest.raises(UserError, match="frozen is frozen and got a gradient"):
        watched(params, model_of(params, leak), params)


# {case: the loss of (A, B)}. Autograd reaches both in each, whatever the numbers are.
UNUSUAL = {
    "a B of zeros, because v is zero": (lambda a, b: a.sum() + b.sum() * 0, "x.lora_B.weight"),
    "an A of zeros under a trained B": (lambda a, b: a.sum() * 0 + b.sum(), "x.lora_A.weight"),
    "what is too small for fp32": (
        lambda a, b: a.sum() + b.sum() * 1e-30 * 1e-30,
        "x.lora_B.weight",
    ),
    "an overflow of fp16": (lambda a, b: a.sum() * float("inf") + b.sum(), None),
    "a nan": (lambda a, b: a.sum() * float("nan") + b.sum(), None),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_a_gradient_is_reached_whatever_its_numbers_are(case, capsys):
    loss_of, named = UNUSUAL[case]
    a, b = two_params()
    params = {"x.lora_A.weight": a, "x.lora_B.weight": b}
    watch = optim.GradientWatch(params)
    loss_of(a, b).backward()
    watch.check(model_of(params))
    said = capsys.readouterr().err
    assert watch.done and "all 2 trained tensors get a gradient" in said
    if named is None:
        assert "zeros" not in said
    else:
        assert f"1 of these gradients are all zeros at the first step, the first is {named}" in said


def test_an_untrained_adapter_is_nothing_unusual(capsys):
    a, b = two_params()
    b.data.zero_()
    params = {"x.lora_A.weight": a, "x.lora_B.weight": b}
    watch = optim.GradientWatch(params)
    (a.sum() * b.sum() + b.sum()).backward()
    watch.check(model_of(params))
    assert "zeros" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "max_steps, epochs, wanted",
    [
        (None, None, (60, "neither --max_steps nor --epochs is given")),
        (None, 3, (36, "all of --epochs 3")),
        (200, None, (200, "as --max_steps says")),
        (200, 3, (200, "as --max_steps says")),
        (0, 3, (36, "all of --epochs 3")),
        (0, None, (12, "all of --epochs 1")),
    ],
)
def test_which_flag_decides_how_long_a_run_is(max_steps, epochs, wanted):
    assert optim.how_many_steps(max_steps, epochs, lambda n: 12 * n) == wanted


@pytest.mark.parametrize("max_steps, epochs, flag", [(-1, None, "max_steps"), (None, 0, "epochs")])
def test_a_length_that_no_run_can_have(max_steps, epochs, flag):
    with pytest.raises(UserError, match=f"--{flag} .* is out of range: it must be at least"):
        optim.check_length(max_steps, epochs)


def test_an_optimiser_has_stepped_when_it_has_states():
    params = two_params()
    optimizer = torch.optim.AdamW(params, lr=0.1)
    # A save looks at the state of each parameter, which makes an empty one.
    assert optimizer.state[params[0]] == {}
    assert not optim.has_stepped(optimizer)
    params[0].grad = torch.ones(2, 2)
    optimizer.step()
    assert optim.has_stepped(optimizer)
