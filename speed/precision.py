"""The device, its number formats (bf16, fp16 with a loss scale, fp32), the attention kernel.

Mixed precision, of a run that trains an adapter:

    16 bits (bf16 or fp16)    frozen weights, residual stream, all products and their gradients, A and B when multiplied
    fp32                      A and B themselves, their gradients, AdamW's states; inside RMSNorm, RoPE and the loss
    8 or 4 bits               frozen linears with --quant (quant.py); products with --fp8 (speed/fp8.py)

Why: in 16 bits Llama-3-8B takes 16 GB in place of 32, and an H100's matmuls reach 700 TFLOP/s.

Why A and B are fp32: bf16 stores 7 bits of mantissa, so 1 + 1/256 is 1 in bf16. AdamW moves a weight by about the
learning rate, which falls from 2e-4 to 0. A's weights begin at up to 1/64 on 8B, where neighbours in bf16 are 6e-5
apart. So bf16 would round the steps at first and lose the late ones.

Cost: fp32 A and B at r = 16 take 168 MB, in bf16 they would take 84 MB. Held-out loss of the default model after 200
steps: bf16 1.7127, fp16 1.7094.

Proof: tests/test_lora.py: test_small_steps_are_not_lost_in_a_bf16_model,
test_bf16_base_has_fp32_adapters_whose_gradients_are_those_of_the_fp32_model. tests/test_witness.py:
test_dtype_of_the_weights_and_of_the_arithmetic.

Class LossScale says why fp16 needs a loss scale, speed/fp8.py in which layers fp8 multiplies and what fp8 costs.
"""

from cli import UserError, say

import contextlib
import math

import torch

# What becomes of a step, see LossScale.judge. Only the first changes the weights.
TAKEN = "taken"
OVERFLOW = "overflow"
BAD = "bad"

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_device(name):
    """The torch.device of a name. "auto": cuda, else mps, else cpu"""
    if name == "auto":
        name = best_device()
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("only cuda, mps and cpu are supported")
        torch.empty(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise UserError(
            f"--device {name} does not work here ({reason}); try --device cpu."
        ) from None
    return device


def best_device():
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def has_bf16(device):
    """Whether the device has instructions for bf16 and does not emulate them."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def pick_dtype(name, device, train_all=False):
    """(dtype that frozen weights are kept in, dtype of the arithmetic, why). train_all: --lora_r 0

    On a CPU without bf16 instructions --dtype bf16 keeps the weights in bf16, for half of fp32's memory. Products are
    made in fp32 there, because emulated bf16 is many times slower."""
    native = has_bf16(device)
    where = f"this {device.type}"
    if device.type == "cuda":
        where = torch.cuda.get_device_name()
    why = "as asked"
    if name == "auto":
        name = best_dtype(device, native)
        has = "has" if native else "has no"
        why = f"{where} {has} bf16 instructions"
    if train_all and name == "fp16":
        return torch.float32, torch.float32, "all weights are trained: fp16 is too coarse for that"
    kept = DTYPES[name]
    if name != "bf16" or native:
        return kept, kept, why
    if device.type == "cuda":
        raise UserError(f"--dtype bf16: {where} has no bf16; use --dtype fp16.")
    why = f"weights kept in bf16, arithmetic in fp32: {where} has no bf16 instructions"
    return kept, torch.float32, why


def say_dtype(dtype, why):
    say("dtype", f"{str(dtype).removeprefix('torch.')} ({why})")


def best_dtype(device, native):
    if native:
        return "bf16"
    if device.type == "cuda":
        return "fp16"
    return "fp32"


def autocast(device, dtype):
    """A `with` block that makes products in dtype, whatever the dtype of the weights."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


ATTENTION = {
    "naive": "naive: all scores [B, H, T, T] are held",
    "flash": "flash: scaled_dot_product_attention never holds the scores",
    "cudnn": "cudnn: scaled_dot_product_attention never holds the scores",
}


def pick_attention(attn):
    """Say and set which kernel computes attention. -> attn

    cuDNN's kernel takes 0.63 ms of a step on an H100, for a block of Llama-3-8B and 8,192 tokens. Flash takes 0.9 ms.
    But cuDNN plans for 0.1 s and more at each new length. So use cudnn for batches of few lengths."""
    torch.backends.cuda.enable_cudnn_sdp(attn == "cudnn")
    torch.backends.cuda.enable_flash_sdp(attn != "cudnn")
    say("attn", ATTENTION[attn])
    return attn


def say_packed(budget, by_kernel):
    """The receipt of packed rows. budget: tokens of a row, 0 if not packed. by_kernel: varlen attention takes them"""
    if not budget:
        return
    by = "varlen" if by_kernel else "a mask, which computes masked scores too"
    say("packed", f"rows of {budget} tokens, attention by {by}")


class LossScale:
    """fp16's loss scale (Micikevicius et al. 2018). Other dtypes have a scale of 1.

    Why: fp16 has 5 bits of exponent, so it rounds magnitudes below 2⁻²⁵ = 3e-8 to 0. The loss is a mean over target
    tokens: with 8,192 of them, a logit's gradient is at most 1 / 8,192 = 1e-4, and most are far smaller. So train.py
    multiplies the loss by `value`, 65,536 at first. All gradients grow by that factor, and optim.clip divides by it.
    bf16 has 8 bits of exponent, as fp32 has, and needs no scale.

    Cost: fp16 ends at 65,504, so a scaled gradient may overflow to inf. Such a step is skipped, and the scale halved.
    The scale doubles every 2,000 steps, to find the largest that fits. A loss of nan is no matter of the scale: such a
    step is skipped in every dtype, and --max_bad_steps of them in a row end the run (train.py).

    Proof: tests/test_train.py: test_an_overflow_in_fp16_is_skipped_once_and_training_goes_on,
    test_fp16_gradients_are_scaled_before_they_are_cast."""

    # With a scale below this one an overflow is no matter of scale.
    SMALLEST = 2**-10
    GROWS_EVERY = 2000  # steps

    def __init__(self, dtype, value=2.0**16):
        """dtype: of the arithmetic. value: to begin with; a resumed run hands its own over"""
        self.used = dtype == torch.float16
        self.value = value if self.used else 1.0

    def judge(self, loss, norm):
        """What becomes of a step with this loss and this norm of its gradient: TAKEN, OVERFLOW or BAD.

        loss      norm          fp16                            other dtypes
        finite    finite        TAKEN                           TAKEN
        finite    inf or nan    OVERFLOW; BAD at SMALLEST       BAD
        nan       any           BAD: the scale is not in it     BAD"""
        if not math.isfinite(loss):
            return BAD
        if math.isfinite(norm):
            return TAKEN
        if self.used and self.value >= self.SMALLEST:
            return OVERFLOW
        return BAD

    def update(self, step, overflowed, tell):
        """After a step: halve the scale if the step overflowed, double it every 2,000 steps. -> the value from here on

        tell(what, text) reports a skipped step."""
        if overflowed:
            self.value *= 0.5
            tell("overflow", f"step {step} is skipped, the loss scale halved to {self.value:g}")
        elif self.used and step % self.GROWS_EVERY == 0:
            self.value *= 2
        return self.value


def why_no_numbers(is_untrained):
    """What to do about steps that all give nan or inf. is_untrained: whether no step was ever taken"""
    if is_untrained:
        # So the learning rate is not the cause.
        return (
            "no weight was changed before, so numbers of the model leave the range of --dtype: use bf16 or fp32, "
            "or another --model or --init_adapter where that does not help"
        )
    return "lower --lr or use --dtype fp32 in a new run, or go on with a larger --max_bad_steps"
