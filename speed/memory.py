"""How much memory a training run takes, by arithmetic, before any weight is read: method 1, choose the model.

    at = peak(Shape of the model, Work of the run)    # at.parts {name: bytes}, at.moment, at.bytes

What is held all the time is static: weights, adapter, gradients, optimiser. The rest comes and goes in a step, so the
peak is the largest of some moments:

    forward …  loss          every block has kept what its backward needs; the loss holds a chunk of logits
               last norm     the same is kept, and the backward of the last norm works in fp32
               block         a block that is a checkpoint is recomputed, and its backward runs (--grad_ckpt)
               attention     the last block's attention works on its scores (only where scores are held)

Names: C hidden size, F width of the MLP, L blocks, H and K heads of queries and of keys, D head size, V vocabulary.
n are the tokens of a micro-batch, padding included. An activation has 2 bytes a number (fp32: 4). Biases are left out:
they are less than 0.1 % of a model that has them.

Llama-3-8B, 32 x 256 tokens: in NF4 with --compile --grad_ckpt the sum is 10.96 GB, in bf16 without checkpoints 56.55.
Measured on an H100: 10.96 and 56.55. results/plan.json compares measured runs, README.md sums them up.

Cost: the formulas follow the code of model.py, lora.py and quant.py, and must change with it.
Proof: tests/test_memory.py, against tensors that are really held and sums by hand.
"""

import math
from dataclasses import dataclass, replace

# What cuBLAS holds to work in, as measured on an H100. Beside it only BETWEEN_BLOCKS and of_host have measured numbers.
WORKSPACE = 70e6
CHUNK = 2**26  # the most logits of a chunk of the loss (speed/loss.py)


@dataclass(frozen=True)
class Shape:
    """The sizes of a model."""

    C: int
    F: int
    L: int
    H: int
    K: int
    D: int
    V: int
    tied: bool  # one matrix is embedding and head

    def linears(self):
        """{layer: (inputs, outputs)} of the seven linear layers of a block."""
        q = self.H * self.D
        kv = self.K * self.D
        return {
            "q_proj": (self.C, q),
            "k_proj": (self.C, kv),
            "v_proj": (self.C, kv),
            "o_proj": (q, self.C),
            "gate_proj": (self.C, self.F),
            "up_proj": (self.C, self.F),
            "down_proj": (self.F, self.C),
        }

    def outputs(self):
        """Rows of all weights of one block."""
        return sum(outputs for _, outputs in self.linears().values())

    def block(self):
        """Weights of the linears of one block."""
        return sum(inputs * outputs for inputs, outputs in self.linears().values())

    def vocabulary(self):
        """Weights of embedding and head together."""
        return self.V * self.C * (1 if self.tied else 2)

    def norms(self):
        return (2 * self.L + 1) * self.C

    def weights(self):
        """Of the whole model."""
        return self.L * self.block() + self.vocabulary() + self.norms()

    def adapter(self, r, targets=()):
        """Numbers of all A [r, inputs] and B [outputs, r]: 41,943,040 for 8B with r = 16. targets: none for all"""
        linears = self.linears()
        sides = sum(sum(linears[name]) for name in targets or linears)
        return self.L * r * sides


@dataclass(frozen=True)
class Work:
    """What a run does with the model: flags of train.py as they are named there, and its largest micro-batch."""

    rows: int
    tokens: int  # of a row, padding included
    targets: int  # of the micro-batch
    lora_r: int = 16
    lora_targets: tuple = ()  # none: all seven linears
    dropout: bool = False  # whether --lora_dropout is above 0
    quant: str = "none"
    fp8: bool = False
    bytes_of_a_weight: int = 2  # of a frozen weight that is not quantised
    # Of an activation. On a CPU without bf16 4, whatever its weights have.
    bytes_of_a_number: int = 2
    attn: str = "flash"
    document: int = 0  # tokens that attention spans in a packed row; 0: the whole row
    masked: bool = False  # a packed row with a mask between documents: all pairs count
    fused_loss: bool = True
    grad_ckpt: bool = False
    ckpt_blocks: int = 0  # 0: all
    offload_ckpt: bool = False
    offload_embed: bool = False
    compile: bool = False
    cuda_graph: bool = False
    optim: str = "adamw"
    on_gpu: bool = True  # a CPU has no cuBLAS

    @property
    def n(self):
        return self.rows * self.tokens

    @property
    def stream(self):
        """Bytes of a number between blocks. With --lora_r 0 the embedding is fp32, and so is what it becomes."""
        return self.bytes_of_a_number if self.lora_r else 4

    @property
    def workspace(self):
        return WORKSPACE if self.on_gpu else 0

    @property
    def by_compiler(self):
        """Whether checkpoints are the compiler's own. With dropout they are torch's (train.build)."""
        return self.compile and not self.dropout

    @property
    def holds_scores(self):
        """Whether attention holds [B, H, T, T]. PyTorch takes "math" where flash has no kernel."""
        return self.attn in ["naive", "math"]

    @property
    def bytes_of_a_score(self):
        """PyTorch's "math" works in fp32."""
        return 4 if self.attn == "math" else self.bytes_of_a_number

    def checkpoints(self, L):
        """How many blocks are checkpoints."""
        if not self.grad_ckpt:
            return 0
        return min(self.ckpt_blocks or L, L)

    def trained(self, shape):
        """How many weights are trained."""
        if not self.lora_r:
            return shape.weights()
        return shape.adapter(self.lora_r, self.lora_targets)

    def adapted(self, layer):
        """Whether a layer has an adapter."""
        return self.lora_r > 0 and (not self.lora_targets or layer in self.lora_targets)


# --- 1. what is held all the time ---


def static(shape, work):
    """{part: bytes} of all that is held from the first step to the last."""
    trained = work.trained(shape)
    parts = base(shape, work)
    if work.lora_r:
        # fp32, so that small steps are not rounded away (speed/precision.py).
        parts["adapter"] = 4 * trained
    parts["gradients"] = 4 * trained
    parts["optimizer"] = trained * bytes_of_states(work.optim)
    parts["workspace"] = work.workspace
    return parts


def base(shape, work):
    """{part: bytes} of the model as it is kept. 8B in NF4: 3.49 + 0.11 + 2.10 GB, in bf16 13.96 + 2.10."""
    # With --lora_r 0 all weights are trained, so they are fp32.
    each = work.bytes_of_a_weight if work.lora_r else 4
    vocabulary = shape.vocabulary()
    if work.offload_embed and not shape.tied:
        vocabulary -= shape.V * shape.C
    bytes_of_codes = {"none": each, "nf4": 1 / 2, "fp8": 1}
    return {
        "base": shape.L * shape.block() * bytes_of_codes[work.quant],
        "quant constants": shape.L * of_scales(shape, work),
        "embedding and head": (vocabulary + shape.norms()) * each,
    }


def of_scales(shape, work):
    """Bytes of what a block's codes are multiplied with."""
    total = 0
    if work.quant == "nf4":
        # For 64 weights an absmax of one byte, for 256 of these a number of 4 bytes, and one a layer (quant.py).
        for inputs, outputs in shape.linears().values():
            absmax = inputs * outputs // 64
            total += absmax + math.ceil(absmax / 256) * 4 + 4
    if work.quant == "fp8" or work.fp8:
        # A scale of 4 bytes a row.
        total += shape.outputs() * 4
    return total


def bytes_of_states(optim):
    """Of AdamW, a trained weight: two fp32 numbers; or two codes of a byte, with an fp32 scale for 256 of them.

    Paged codes lie in memory that the driver moves, so torch counts their scales alone."""
    scales = 2 * 4 / 256
    return {"adamw": 8, "adamw8bit": 2 + scales, "paged_adamw8bit": scales}[optim]


# --- 2. what is kept from forward to backward ---


# The layers of a block that share an input, and so one product with their A matrices (lora.py).
GROUPS = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def kept_of_a_block(shape, work):
    """Bytes that the backward of a block needs of its forward, if the block is no checkpoint. A token, for 8B: 149 kB

                                                                       compiled        eager
    input x, normed x, attention + x, normed again                     4C              2C, and 2C in fp32
    queries, attention's result, and that again as rows                3HD             3HD
    keys, values                                                       2KD             2KD
    gate, up, silu(gate) * up; eager: silu(gate), too                  3F              4F
    a number for each head and each norm (fp32); x · A of each layer   4H + 8 bytes, 7r

    A matrix A needs the input of its layer. So where --lora_targets leaves out all layers of an input, it is not kept.
    With --lora_dropout A sees the dropped input, which is kept in place of the input; and dropout keeps its mask.
    """
    if not work.lora_r:
        return kept_of_a_trained_block(shape, work)
    size = work.bytes_of_a_number
    numbers = 0
    a_mask = 0
    for ranks, inputs, _ in adapted_groups(shape, work):
        numbers += inputs + ranks
        if work.dropout:
            a_mask += inputs * size_of_a_mask(work)
    if work.compile:
        numbers += 2 * shape.C + 2 * shape.F
        more = of_casts(shape, work)
    else:
        numbers += 3 * shape.F
        # RMSNorm squares in fp32, and eager mode keeps that copy.
        more = work.n * 2 * shape.C * 4
        if work.fp8:
            # The values are a view of the product that made queries, keys and values together.
            numbers += shape.H * shape.D + shape.K * shape.D
    return work.n * (numbers * size + a_mask + 8) + kept_of_attention(shape, work) + more


def size_of_a_mask(work):
    """Bytes of what dropout keeps for a number: whether it stays, or in eager mode on a CPU the factor itself."""
    if work.compile or work.on_gpu:
        return 1
    return work.bytes_of_a_number


def adapted_groups(shape, work):
    """[(sum of the ranks, inputs, outputs of the adapted layers)] of layers that share an input and have an adapter."""
    linears = shape.linears()
    found = []
    for names in GROUPS:
        adapted = [name for name in names if work.adapted(name)]
        if adapted:
            inputs, _ = linears[names[0]]
            outputs = sum(linears[name][1] for name in adapted)
            found.append((work.lora_r * len(adapted), inputs, outputs))
    return found


def of_casts(shape, work):
    """Bytes of A and B of a block in 16 bits, which a compiled backward keeps. 8B: 3.9 MB

    In a group of layers each B has the columns of all its layers (cast_adapters in lora.py)."""
    numbers = sum(
        ranks * (inputs + outputs) for ranks, inputs, outputs in adapted_groups(shape, work)
    )
    return numbers * work.bytes_of_a_number


def kept_of_a_trained_block(shape, work):
    """The same with --lora_r 0, where the stream is fp32. A weight's gradient needs the input of each layer.

    In 16 bits autocast casts the weights, and for each layer its input; backward needs all these casts."""
    size = work.bytes_of_a_number
    # Of each norm: its input, and that divided by its length.
    stream = 4 * shape.C * 4
    if size == 4:
        stream += 2 * shape.C * 4
        casts = 0
    else:
        stream += 5 * shape.C * size
        casts = shape.block() * size
    numbers = shape.H * shape.D + 4 * shape.F
    return work.n * (numbers * size + stream + 8) + kept_of_attention(shape, work) + casts


def kept_of_attention(shape, work):
    """Bytes of queries, keys, values and, unless scores are held, of the result and a number for each head (fp32)."""
    rows = shape.H * shape.D
    if not work.holds_scores:
        numbers = 2 * rows + 2 * shape.K * shape.D
        return work.n * (numbers * work.bytes_of_a_number + shape.H * 4)
    # Keys and values are repeated for all heads. The softmax of the scores is kept, and naive's mask of all pairs.
    mask = work.tokens**2 if work.attn == "naive" else 0
    return 3 * work.n * rows * work.bytes_of_a_score + of_scores(shape, work) + mask


def of_scores(shape, work):
    """Bytes of attention's scores in a block, [B, H, T, T]; 0 where they are not held."""
    if not work.holds_scores:
        return 0
    return work.rows * shape.H * work.tokens**2 * work.bytes_of_a_score


def kept_of_a_checkpoint(shape, work):
    """Bytes of the input of a block, [B, T, C], which is all that a checkpoint keeps. A token, for 8B: 8 kB"""
    return work.n * shape.C * work.stream


def kept(shape, work):
    """{part: bytes} that are kept for backward when forward has ended."""
    checkpoints = work.checkpoints(shape.L)
    x = kept_of_a_checkpoint(shape, work)
    # With --offload_ckpt two inputs are on the card: of the part that runs, and of the one that is on its way.
    on_card = 2 if work.offload_ckpt else checkpoints
    return {
        "kept for backward": (shape.L - checkpoints) * kept_of_a_block(shape, work),
        "checkpoints": on_card * x,
        # The last block's output in fp32, and that output normed. The embedding is the input of the first block.
        "last norm": work.n * shape.C * 4 + x,
    }


# --- 3. what the moments hold beside that ---


def of_loss(shape, work):
    """Bytes of the rows of h that have targets, of their gradient, and of a chunk of logits, or of all logits.

    A logit has an fp32 number and its gradient in 16 bits. 8B: 512 rows of 128,256 logits are a chunk, 394 MB."""
    size = work.bytes_of_a_number
    if not work.fused_loss:
        # Logits in 16 bits and in fp32, their log-softmax, and both gradients.
        return work.targets * shape.V * (2 * size + 3 * 4)
    rows = rows_of_a_chunk(shape, work)
    h = work.targets * shape.C * work.stream
    chunk = rows * shape.V * (4 + size)
    if not work.lora_r:
        # The head's gradient in fp32, and a chunk's share of it in 16 bits and in fp32.
        chunk += shape.V * shape.C * (4 + size + 4)
    return 2 * h + chunk


def rows_of_a_chunk(shape, work):
    """How many rows of logits the loss holds at a time (speed/loss.py)."""
    return min(work.targets, max(1, CHUNK // shape.V // 64 * 64))


def of_last_norm(shape, work):
    """Bytes of the backward of the last norm, which is not compiled: five tensors [B, T, C] in fp32."""
    return 5 * work.n * shape.C * 4


def of_recomputed_block(shape, work):
    """Bytes of a checkpoint's backward: what its forward keeps, made again, and the gradients at its widest place.

    Widest is the MLP: gate, up, their product and the gradient of each are 6 tensors [n, F]. With --quant none the
    compiler does not write the adapter's product over the layer's, which makes 9. With --fp8 they are 7, and codes of
    a byte. Where a dequantised weight serves recomputation and gradient (quant.decode_once), all but one of the MLP's
    are held. With --offload_ckpt a checkpoint is a half of a block, so attention's tensors are not there.
    That is the compiler's own checkpoint. torch's, with --lora_dropout or in eager mode, makes all again that a block
    without a checkpoint keeps."""
    size = work.bytes_of_a_number
    wide = 6 * shape.F
    if work.quant == "none":
        wide = 9 * shape.F
    if work.fp8:
        wide = 7.5 * shape.F
    if work.offload_ckpt:
        narrow = shape.C
    else:
        narrow = 6 * shape.C + 2 * shape.K * shape.D + 7 * work.lora_r
    weights = 0
    if work.quant != "none" and not work.fp8 and not work.offload_embed:
        weights = 2 * (shape.block() - shape.F * shape.C)
    if not work.by_compiler:
        # Backward works on three tensors [n, F] beside.
        of_forward = kept_of_a_block(shape, work)
        at_work = work.n * 3 * shape.F * size + shape.F * shape.C * size
        return of_forward + at_work + 2 * of_scores(shape, work)
    return work.n * (wide + narrow) * size + weights + 3 * of_scores(shape, work)


@dataclass(frozen=True)
class Peak:
    moment: str  # loss, last norm, block or attention
    parts: dict  # {part: bytes} at that moment
    moments: dict  # {moment: bytes} of all
    loading: float  # bytes while the model is loaded

    @property
    def bytes(self):
        return sum(self.parts.values())


def peak(shape, work):
    """The moment at which most is held: Peak."""
    always = static(shape, work)
    at_the_end = kept(shape, work)
    moments = {
        "loss": always | at_the_end | {"loss chunk": of_loss(shape, work)},
        "last norm": always | at_the_end | {"norm in fp32": of_last_norm(shape, work)},
    }
    if work.grad_ckpt:
        # Backward begins at the last block. When the first checkpoint is recomputed, the others are used up.
        only_checkpoints = at_the_end | {"kept for backward": 0}
        moments["block"] = (
            always | only_checkpoints | {"one block": of_recomputed_block(shape, work)}
        )
    if of_scores(shape, work):
        moments["attention"] = always | at_the_end | {"scores": 2 * of_scores(shape, work)}
    sums = {moment: sum(parts.values()) for moment, parts in moments.items()}
    most = max(sums, key=sums.get)
    return Peak(most, moments[most], sums, of_loading(shape, work))


def of_loading(shape, work):
    """Bytes while the model streams off the disk: all of it, and one tensor in 16 bits that is being quantised."""
    largest = max(inputs * outputs for inputs, outputs in shape.linears().values())
    one = 0
    if work.quant != "none":
        one = largest * work.bytes_of_a_weight
    if work.offload_embed and not shape.tied:
        # The embedding leaves the card after it was loaded.
        one += shape.V * shape.C * work.bytes_of_a_weight
    return sum(base(shape, work).values()) + one + work.workspace


# --- 4. host memory, and cards ---


def of_host(shape, work):
    """{part: bytes} of host memory, a mapped file of weights not counted.

    Python, torch and the driver take about 2.9 GB on a machine with a GPU, as measured."""
    x = kept_of_a_checkpoint(shape, work)
    parts = {"python and torch": 2.9e9}
    if work.offload_embed and not shape.tied:
        parts["embedding"] = shape.V * shape.C * work.bytes_of_a_weight
    if work.offload_ckpt:
        # Checkpoints are halves of blocks, so a block has two inputs; the first one stays on the card.
        parts["checkpoints"] = (2 * work.checkpoints(shape.L) - 1) * x
    if work.optim == "paged_adamw8bit":
        parts["paged states"] = 2 * work.trained(shape)
    return parts


FIXED = ["base", "quant constants", "embedding and head", "adapter", "gradients", "optimizer"]
# torch's allocator hands out memory in blocks, and between blocks some stays free: this share of what comes and goes.
BETWEEN_BLOCKS = 0.04


def beside(at, context):
    """{part: bytes} that a card needs beside the peak. context: bytes that CUDA takes before the first tensor

    allocator: what lies between its blocks; or what loading takes more than the peak, if that is more"""
    fixed = sum(at.parts.get(name, 0) for name in FIXED)
    free = BETWEEN_BLOCKS * (at.bytes - fixed)
    return {"allocator": max(free, at.loading - at.bytes), "context": context}


def needed(at, context):
    """Bytes of a card that a run needs: the peak, CUDA's context (bytes), and what torch's allocator cannot use.

    torch may reserve more than that, because its allocator gives free blocks back to the card only when it must. On a
    card of 80 GB bf16 without checkpoints had 61.6 GB reserved, context included, where this sum is 60.0. So the sum
    is what must be there, and not what nvidia-smi shows. results/plan.json has both.

    With --cuda_graph torch reserves a pool for eager steps and one for the graph. speed/graphs.py gives back the free
    blocks of the first before it records, so the sum counts one pool."""
    return at.bytes + sum(beside(at, context).values())


# --- 5. evaluation, sampling ---


def of_evaluation(shape, work):
    """{part: bytes} of a held-out micro-batch, at the moment that takes most: the end of forward, or the loss.

    Eager mode keeps nothing for a backward: one block works on the MLP's three tensors. Compiled blocks keep what
    training keeps, because they reuse its graph (Built.loss_of in job.py). The loss finds that given up. It makes no
    gradient. No dropout is drawn."""
    size = work.bytes_of_a_number
    always = static(shape, work)
    h = {"last norm": work.n * shape.C * (4 + work.stream)}
    at_work = work.n * (3 * shape.F + 4 * shape.C) * size + 2 * of_scores(shape, work)
    forward = always | h | {"one block": at_work}
    if work.compile:
        forward |= kept(shape, replace(work, dropout=False))
    loss = always | h | {"loss chunk": of_loss_alone(shape, work)}
    return max(forward, loss, key=lambda parts: sum(parts.values()))


def of_loss_alone(shape, work):
    """Bytes of the loss without its gradient: the rows of h that have targets, a chunk of logits, or all of them."""
    size = work.bytes_of_a_number
    h = work.targets * shape.C * work.stream
    if work.fused_loss:
        return h + rows_of_a_chunk(shape, work) * shape.V * (size + 4)
    # Logits in 16 bits and in fp32, and their log-softmax.
    return h + work.targets * shape.V * (size + 4 + 4)


def of_sampling(shape, work, slots):
    """{part: bytes} of writing work.rows texts of up to `slots` tokens, prompt included, with weights as work says.

    8B in bf16, 32 texts of 464 tokens: 16.1 GB of weights, 1.9 of keys and values."""
    parts = base(shape, work)
    parts["keys and values"] = (
        2 * shape.L * shape.K * shape.D * slots * work.rows * work.bytes_of_a_number
    )
    # A pass over prompts has about 8,192 tokens at most (generate.py), and a block works on the MLP's three tensors.
    read = min(8192, work.rows * slots)
    parts["one block"] = read * (3 * shape.F + 4 * shape.C) * work.bytes_of_a_number
    parts["logits"] = 3 * work.rows * shape.V * 4
    return parts
