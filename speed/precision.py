"""Which device, which numbers it calculates with (bf16, fp16 with a loss scale, fp32), which attention kernel."""

from cli import UserError, say

import math

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_device(name):
    """ "auto": the GPU if there is one. mps is taken where torch has it."""
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
    """Whether the device has instructions for bf16, not an emulation."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def pick_dtype(name, device, train_all=False):
    """(dtype that frozen weights are kept in, dtype of the arithmetic, why). train_all: --lora_r 0

    A CPU without bf16 instructions makes bf16 products many times slower than fp32 ones: there bf16 is only how
    weights are kept, half of fp32's memory, and the product is made in fp32."""
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


ATTENTION = {
    "naive": "four plain lines",
    "flash": "scaled_dot_product_attention: scores are never held",
    "cudnn": "scaled_dot_product_attention: scores are never held",
}


def pick_attention(attn):
    """Say and set which kernel computes attention. -> attn

    cuDNN's is the quicker one on an H100, but plans for 0.1 s and more at each length that it has not seen."""
    torch.backends.cuda.enable_cudnn_sdp(attn == "cudnn")
    torch.backends.cuda.enable_flash_sdp(attn != "cudnn")
    say("attn", ATTENTION[attn])
    return attn


def say_packed(budget, by_kernel):
    """budget: tokens of a packed row, 0: rows are not packed. by_kernel: whether varlen attention takes it"""
    if not budget:
        return
    by = "varlen" if by_kernel else "a mask, which costs time"
    say("packed", f"rows of {budget} tokens, attention by {by}")


class LossScale:
    """fp16 has 5 bits of exponent: small gradients would be 0. So the loss is multiplied by this value and the gradient
    divided by it. A step whose gradient overflows is skipped, with half the value (Micikevicius et al. 2018)."""

    SMALLEST = 2**-10
    GROWS_EVERY = 2000  # steps

    def __init__(self, dtype, value=2.0**16):
        """value: of the run that is resumed"""
        self.used = dtype == torch.float16
        self.value = value if self.used else 1.0

    def overflowed(self, norm):
        """Whether this step is to be skipped, by the norm of its gradient."""
        return self.used and not norm.isfinite()

    def hopeless(self):
        """No scale is small enough: the gradient itself is no number."""
        return not self.used or self.value < self.SMALLEST

    def refuse_no_number(self, loss, norm, step, rows, folder):
        """A UserError for a loss or a gradient that is no number, where no smaller scale will help.

        rows: which recipes were in the batch. folder: of the run"""
        if math.isfinite(loss) and (math.isfinite(norm) or not self.hopeless()):
            return
        some = [int(i) for i in rows[:8]]
        raise UserError(
            f"the loss is {loss} at step {step}, its gradient's norm {norm} (recipes {some} …): "
            f"lower --lr or use --dtype fp32. {folder} keeps what was last saved."
        )

    def update(self, step, overflowed, tell):
        """tell(what, text): of a step that is skipped. -> the value from here on"""
        if overflowed:
            self.value *= 0.5
            tell("overflow", f"step {step} is skipped, the loss scale halved to {self.value:g}")
        elif self.used and step % self.GROWS_EVERY == 0:
            self.value *= 2
        return self.value
