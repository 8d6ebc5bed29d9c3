"""The groups of every suite. A group is one measurement; each of its providers is a row.

Suites: the time of T2T modules, whole models, their training steps, single images and operators; scaling with batch and
image size; the largest batch that fits; several training processes side by side.
Modes: "inference" is a forward pass in eval mode without autograd. "training" is forward and backward, for a T2T module
in train mode (dropout active), and for a model a whole step with cross-entropy and AdamW.
"""

from itertools import product
from typing import NamedTuple

BATCHES = {"cpu": (8, 32), "cuda": (256, 32)}  # the headline batch first
MIDDLE = {"cpu": 8, "cuda": 32}  # the batch for operators and for 384 px
# the headline dtype first; half types run under autocast with float32 parameters
DTYPES = {"cpu": ("fp32", "bf16"), "cuda": ("bf16", "fp16", "fp32")}
MODES = ("inference", "training")
MODULES = ("performer", "transformer")
# measured models, all six sizes; the lite ones first, because their T2T module has the largest share of the time
LITE, LARGER = ("t2t_vit_7", "t2t_vit_10", "t2t_vit_12"), ("t2t_vit_14", "t2t_vit_t_14")
LARGEST = ("t2t_vit_19", "t2t_vit_24")

_STAGES = ("stage1", "stage2", "stage3")
_WHERE = {
    "soft_split_linear": _STAGES,
    "performer_layer": _STAGES[:2],
    "performer_attention": _STAGES[:2],
    "token_mlp": _STAGES[:1],
    "transformer_block": ("vit14",),  # a CPU's only; on a GPU it is composed of other operators
    "soft_split": (*_STAGES, "fuseformer"),
    "soft_composition": (*_STAGES, "fuseformer"),
    "fused_fold_unfold": ("fuseformer",),
}
OPERATORS = tuple(f"{operator}-{where}" for operator, places in _WHERE.items() for where in places)
_COPIES = [f"{operator}-{stage}" for operator in ("soft_split", "soft_composition") for stage in _STAGES[1:]]
# only in full runs; a quick run measures the attention of stage 1 at the headline length
_FULL_ONLY = ("performer_attention-stage1", "performer_attention-stage2", *_COPIES)

# length -> batch of Performer attention, with similar numbers of tokens; shows where it overtakes softmax attention
LENGTHS = {
    "cpu": {196: 128, 784: 32, 3136: 8, 9216: 2, 12544: 2, 50176: 1, 200704: 1, 1_000_000: 1},
    "cuda": {196: 256, 784: 256, 3136: 64, 9216: 64, 12544: 16, 50176: 4, 200704: 1, 1_000_000: 1},
}
HEADLINE_LENGTH = 3136  # stage 1 at 224 px; the only length in quick runs and in other dtypes than the headline one
_HEADLINE_ATTENTION = f"performer_attention-L{HEADLINE_LENGTH}"
CROSSOVER = "crossover"  # in the name of every group of :data:`LENGTHS`, for ``--filter``

SCALED_BATCHES = (1, 4, 16, 64, 256, 1024)  # at 224 px
LARGEST_CPU_TRAINING = 64  # upstream's step of 256 images takes 10 seconds and 6 GB
SCALED_SIZES = (384, 512, 768, 1024, 1536, 2048)  # at batch 1
QUICK_SCALED = ((224, 1), (224, 16), (512, 1))  # image side and batch
FIT_SIZES = (224, 384, 512)  # image sides at which the largest batch is searched

TIMED = ("module", "models", "training", "latency", "ops", "scaling")
# in the order in which they run, the most important first, because a run may have a time limit
SUITES = (*TIMED, "memory", "processes")
# suites whose name is part of a group's id; groups of the others differ by level or mode
OWN_NAMES = ("latency", "scaling", "memory", "processes")
# suites with one mode; the others have both
_MODES = {"models": MODES[:1], "latency": MODES[:1], **dict.fromkeys(("training", "memory", "processes"), MODES[1:])}


class LeftOut(RuntimeError):
    """A provider of a group is not measured; the report shows the reason."""


LOST = "its call ended the process's CUDA context"  # rows with this reason are not measured again


class ContextLost(RuntimeError):
    """A call of ``provider`` ended the CUDA context of this process, so every later call fails."""

    def __init__(self, provider, failure):
        text = next(iter(str(failure).strip().splitlines()), "")
        super().__init__(f"{LOST}: {type(failure).__name__}: {text}")
        self.provider = provider


class Group(NamedTuple):
    """One measurement, whose providers are measured interleaved.

    ``level``: "op", "module" or "model"; ``size``: image side in pixels, ``None`` if the subject gives the number of
    tokens; ``batch``: images per call, ``None`` if the largest is searched; ``compiled``: whether it has
    ``torch.compile`` rows (in a quick run for T2T modules only, because compilation takes most of the time);
    ``processes``: number of training processes, each with ``batch`` images.
    """

    level: str
    subject: str
    size: int | None
    batch: int | None
    dtype: str
    mode: str
    compiled: bool = True
    suite: str | None = None
    processes: int = 1

    @property
    def id(self):
        """Unique in a run."""
        kind = self.suite if self.suite in OWN_NAMES else self.level
        where = CROSSOVER if self.size is None else f"{self.size}px"
        batch = "" if self.batch is None else f"-b{self.batch}"
        processes = f"-n{self.processes}" if self.suite == "processes" else ""
        return f"{kind}-{self.subject}-{where}{batch}-{self.dtype}-{self.mode}{processes}"


def _cells(device):
    """Suite -> (subject, image side, batch) of its groups, the important ones first."""
    batch, other_batch = BATCHES[device]
    middle, model, module = MIDDLE[device], LITE[0], MODULES[0]
    models = [(name, 224, batch) for name in (*LITE, *LARGER, *LARGEST)]
    models += [(model, 224, other_batch), *((name, 384, middle) for name in (model, *LARGER))]
    named = [name for name in OPERATORS if device == "cpu" or not name.startswith("transformer_block")]
    operators = [(name, size, middle) for size in (224, 384) for name in named]
    lengths = [(f"performer_attention-L{length}", None, batch) for length, batch in LENGTHS[device].items()]
    return {
        "module": [(name, *at) for at in ((224, batch), (224, other_batch), (384, middle)) for name in MODULES],
        "models": models,
        "training": models,
        "latency": [(name, 224, 1) for name in (model, module, *LARGER, MODULES[1])],
        "ops": [cell for cell in operators if "fuseformer" not in cell[0] or cell[1] == 224] + lengths,
        "scaling": [(module, 224, n) for n in SCALED_BATCHES] + [(module, size, 1) for size in SCALED_SIZES],
        "memory": [(name, size, None) for name in (model, *LARGER) for size in FIT_SIZES],
        "processes": [(model, 224, 4)] if device == "cpu" else [],
    }


def _quick(suite, cells, device):
    """The cells of a suite that a quick run measures."""
    if suite == "ops":
        attention = [cell for cell in cells if cell[0] == _HEADLINE_ATTENTION]
        return [cell for cell in cells if cell[1] == 224 and cell[0] not in _FULL_ONLY] + attention
    if suite == "scaling":
        return [cell for cell in cells if cell[1:] in QUICK_SCALED]
    if suite in ("models", "training") and device == "cuda":  # on a CPU the second takes minutes
        return [next(cell for cell in cells if cell[0] == name) for name in (LITE[0], LARGER[0])]
    return cells[: 2 if suite == "latency" else 1]


def groups(suite, device, quick):
    """The groups of a suite on a device, the important ones first; quick: the headline rows."""
    cells, modes, dtypes = _cells(device)[suite], _MODES.get(suite, MODES), DTYPES[device]
    headline = 224, BATCHES[device][0]
    compared = suite in TIMED and suite != "scaling"  # in every dtype, and with torch.compile
    if quick:
        cells, modes = _quick(suite, cells, device), modes[:1] if suite == "scaling" else modes
    if quick or not compared:
        dtypes = dtypes[:1]
    compiled = suite == "module" or (compared and not quick)
    counts = (1,) if suite != "processes" else (2,) if quick else (1, 2)
    found = []
    for dtype, (subject, size, batch), mode, count in product(dtypes, cells, modes, counts):
        minor_length = size is None and dtype != dtypes[0] and subject != _HEADLINE_ATTENTION
        slow = suite == "scaling" and device == "cpu" and mode == "training" and batch > LARGEST_CPU_TRAINING
        level = "op" if suite == "ops" else "module" if subject in MODULES else "model"
        # on a CPU the time of a run is limited: modules and models at the headline size, and one image
        minor = device == "cpu" and dtype != dtypes[0] and (suite == "ops" or (size, batch) not in ((224, 1), headline))
        if not (minor_length or minor or slow):
            found.append(Group(level, subject, size, batch, dtype, mode, compiled, suite, count))
    return found
