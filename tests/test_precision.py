"""speed/precision.py: which device and dtype, and fp16's rule for its loss scale."""

from cli import UserError

import pytest
import torch

from speed.precision import LossScale, pick_device, pick_dtype

CPU = torch.device("cpu")


def test_without_fp16_the_scale_is_one_and_stays():
    scale = LossScale(torch.bfloat16)
    assert scale.value == 1.0
    assert scale.update(2000, overflowed=False, tell=None) == 1.0
    assert not scale.overflowed(torch.tensor(float("inf")))


def test_an_overflow_halves_the_scale_and_says_so():
    scale = LossScale(torch.float16)
    said = []
    assert scale.value == 65536
    assert scale.overflowed(torch.tensor(float("nan")))
    assert not scale.overflowed(torch.tensor(3.0))
    assert scale.update(7, overflowed=True, tell=lambda *words: said.append(words)) == 32768
    assert said == [("overflow", "step 7 is skipped, the loss scale halved to 32768")]


def test_two_thousand_steps_double_the_scale():
    scale = LossScale(torch.float16, value=8.0)
    values = [scale.update(step, overflowed=False, tell=None) for step in (1999, 2000, 2001)]
    assert values == [8.0, 16.0, 16.0]


@pytest.mark.parametrize(
    "dtype, value, loss, norm, is_fatal",
    [
        (torch.float32, 1.0, 2.0, 1.0, False),
        (torch.float32, 1.0, 2.0, float("inf"), True),
        (torch.float16, 64.0, 2.0, float("inf"), False),
        (torch.float16, 2**-11, 2.0, float("inf"), True),
        (torch.float16, 64.0, float("nan"), float("inf"), True),
        (torch.float16, 64.0, float("nan"), 1.0, True),
    ],
)
def test_what_no_smaller_scale_can_help_stops_the_run(dtype, value, loss, norm, is_fatal):
    scale = LossScale(dtype, value=value)
    if not is_fatal:
        scale.refuse_no_number(loss, norm, 3, [5, 6], "out")
        return
    with pytest.raises(UserError, match=r"at step 3, .* \(recipes \[5, 6\] …\): lower --lr"):
        scale.refuse_no_number(loss, norm, 3, [5, 6], "out")


def test_before_a_weight_was_changed_the_learning_rate_is_not_blamed():
    scale = LossScale(torch.bfloat16)
    with pytest.raises(UserError, match=r"nan at step 1, .*no weight was changed before") as e:
        scale.refuse_no_number(float("nan"), 1.0, 1, [5, 6], "out")
    assert "--lr" not in str(e.value) and "--init_adapter" in str(e.value)


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
