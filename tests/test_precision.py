"""speed/precision.py: which device and dtype, and fp16's rule for its loss scale."""

from cli import UserError

import pytest
import torch

from speed.precision import BAD, OVERFLOW, TAKEN, LossScale, pick_device, pick_dtype, why_no_numbers

CPU = torch.device("cpu")


def test_without_fp16_the_scale_is_one_and_stays():
    scale = LossScale(torch.bfloat16)
    assert scale.value == 1.0
    assert scale.update(2000, overflowed=False, tell=None) == 1.0


def test_an_overflow_halves_the_scale_and_says_so():
    scale = LossScale(torch.float16)
    said = []
    assert scale.value == 65536
    assert scale.update(7, overflowed=True, tell=lambda *words: said.append(words)) == 32768
    assert said == [("overflow", "step 7 is skipped, the loss scale halved to 32768")]


def test_two_thousand_steps_double_the_scale():
    scale = LossScale(torch.float16, value=8.0)
    values = [scale.update(step, overflowed=False, tell=None) for step in (1999, 2000, 2001)]
    assert values == [8.0, 16.0, 16.0]


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "dtype, value, loss, norm, wanted",
    [
        (torch.float32, 1.0, 2.0, 1.0, TAKEN),
        (torch.float32, 1.0, 2.0, INF, BAD),
        (torch.bfloat16, 1.0, 2.0, NAN, BAD),
        (torch.bfloat16, 1.0, NAN, 1.0, BAD),
        (torch.bfloat16, 1.0, -INF, 1.0, BAD),
        (torch.float16, 64.0, 2.0, 1.0, TAKEN),
        # A smaller scale may help.
        (torch.float16, 64.0, 2.0, INF, OVERFLOW),
        (torch.float16, 64.0, 2.0, NAN, OVERFLOW),
        (torch.float16, 2**-10, 2.0, INF, OVERFLOW),
        # No smaller scale can help: it is tiny already, or the loss, which is not scaled, is none.
        (torch.float16, 2**-11, 2.0, INF, BAD),
        (torch.float16, 64.0, NAN, INF, BAD),
        (torch.float16, 64.0, NAN, 1.0, BAD),
    ],
)
def test_what_becomes_of_a_step(dtype, value, loss, norm, wanted):
    assert LossScale(dtype, value=value).judge(loss, norm) == wanted


def test_before_a_weight_was_changed_the_learning_rate_is_not_blamed():
    assert "lower --lr" in why_no_numbers(is_untrained=False)
    untrained = why_no_numbers(is_untrained=True)
    assert "no weight was changed before" in untrained
    assert "--lr" not in untrained and "--init_adapter" in untrained


def test_a_cpu_with_bf16_instructions_computes_in_bf16_another_only_keeps_weights_in_it(
    monkeypatch,
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert pick_dtype("auto", CPU)[:2] == (torch.bfloat16, torch.bfloat16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert pick_dtype("auto", CPU)[:2] == (torch.float32, torch.float32)
    assert pick_dtype("bf16", CPU)[:2] == (torch.bfloat16, torch.float32)
    assert pick_dtype("fp16", CPU, train_all=True)[:2] == (torch.float32, torch.float32)


def test_a_device_that_does_not_work_is_one_sentence():
    with pytest.raises(UserError, match="--device meta does not work here"):
        pick_device("meta")
