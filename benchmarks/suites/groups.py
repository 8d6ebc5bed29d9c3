"""The groups of every suite. A group is one measurement; each of its providers is a row.

Suites: speed of T2T modules, whole models, their training steps, single images and operators; scaling; largest batch.
Modes: "inference" is a forward pass without autograd in eval mode. "training" is, for an operator, forward and
backward; for a T2T module, forward and backward in train mode (dropout active); for a model, a whole step with
cross-entropy and AdamW.
"""

from typing import NamedTuple

BATCHES = {"cpu": (8, 32), "cuda": (256, 32)}  # the headline batch first
MIDDLE = {"cpu": 8, "cuda": 32}  # the batch for operators and for 384 px
# the headline dtype first; half types run under autocast with float32 parameters
DTYPES = {"cpu": ("fp32",), "cuda": ("bf16", "fp16", "fp32")}
MODES = ("inference", "training")
MODULES = ("performer", "transformer")
# measured models; the lite ones first, whose front end has the largest share
LITE, LARGER = ("t2t_vit_7", "t2t_vit_10", "t2t_vit_12"), ("t2t_vit_14", "t2t_vit_t_14")

_STAGES = ("stage1", "stage2", "stage3")
_WHERE = {
    "soft_split_linear": _STAGES,
    "performer_layer": _STAGES[:2],
    "performer_attention": _STAGES[:2],
    "token_mlp": _STAGES[:1],
    "soft_split": (*_STAGES, "fuseformer"),
    "soft_composition": (*_STAGES, "fuseformer"),
    "fused_fold_unfold": ("fuseformer",),
}
OPERATORS = tuple(f"{operator}-{where}" for operator, places in _WHERE.items() for where in places)
_COPIES = [f"{operator}-{stage}" for operator in ("soft_split", "soft_composition") for stage in _STAGES[1:]]
# the headline length measures the attention of stage 1
LEFT_OUT_OF_QUICK = ("performer_attention-stage1", "performer_attention-stage2", *_COPIES)

# lengths at which Performer attention is measured, to find where it becomes faster than softmax attention, and the
# batch at each, for about the same number of tokens
LENGTHS = {
    "cpu": {196: 128, 784: 32, 3136: 8, 9216: 2, 12544: 2, 50176: 1, 200704: 1, 1_000_000: 1},
    "cuda": {196: 256, 784: 256, 3136: 64, 9216: 64, 12544: 16, 50176: 4, 200704: 1, 1_000_000: 1},
}
HEADLINE_LENGTH = 3136  # stage 1 at 224 px; quick runs and further dtypes measure this length only
CROSSOVER = "crossover"  # in the name of every group of :data:`LENGTHS`, for ``--filter``

SCALED_BATCHES = (1, 4, 16, 64, 256, 1024)  # at 224 px
LARGEST_CPU_TRAINING = 64  # upstream's step of 256 images takes 10 seconds and 6 GB
SCALED_SIZES = (224, 384, 512, 768, 1024, 1536, 2048)  # at batch 1
QUICK_SCALED = ((224, 1), (224, 16), (512, 1))  # image side and batch
FIT_SIZES = (224, 384, 512)  # image sides at which the largest batch is searched

TIMED = ("module", "models", "training", "latency", "ops", "scaling")
# in the order in which they run: the most important first, for runs with a time limit
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

    ``level``, of the subject: "op", "module" or "model"; ``size``: image side in pixels, ``None`` if the subject gives
    the number of tokens; ``batch``: images per call, ``None`` if the largest is searched; ``compiled``: whether it has
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


def _cells(suite, device, quick):
    """(level, subject, image side, batch) of a suite's groups in the headline dtype."""
    batches, middle = BATCHES[device], MIDDLE[device]
    if suite == "ops":
        return [
            ("op", subject, size, middle)
            for size in ((224,) if quick else (224, 384))
            for subject in OPERATORS
            if (size == 224 or not subject.endswith("fuseformer")) and not (quick and subject in LEFT_OUT_OF_QUICK)
        ] + [
            ("op", f"performer_attention-L{length}", None, batch)
            for length, batch in LENGTHS[device].items()
            if length == HEADLINE_LENGTH or not quick
        ]
    if suite == "module":
        cells = [(subject, 224, batch) for batch in batches for subject in MODULES]
        cells = [("module", *cell) for cell in (*cells, *((subject, 384, middle) for subject in MODULES))]
        return cells[:1] if quick else cells
    if suite in ("models", "training"):
        cells = [(subject, 224, batches[0]) for subject in (*LITE, *LARGER)]
        # only the first model is measured at the other batch
        cells += [(LITE[0], 224, batches[1]), *((subject, 384, middle) for subject in (LITE[0], *LARGER))]
        return [("model", *cell) for cell in (cells[:1] if quick else cells)]
    if suite == "latency":
        cells = [("model", LITE[0]), ("module", MODULES[0])]
        cells += [] if quick else [("model", LARGER[0]), ("model", LARGER[1]), ("module", MODULES[1])]
        return [(*cell, 224, 1) for cell in cells]
    if suite == "scaling":
        cells = [(224, batch) for batch in SCALED_BATCHES] + [(size, 1) for size in SCALED_SIZES]
        return [("module", MODULES[0], *cell) for cell in (QUICK_SCALED if quick else cells)]
    if suite == "memory":
        subjects, sizes = (LITE[:1], FIT_SIZES[:1]) if quick else ((LITE[0], *LARGER), FIT_SIZES)
        return [("model", subject, size, None) for subject in subjects for size in sizes]
    return [("model", LITE[0], 224, 4)] if device == "cpu" else []


def groups(suite, device, quick):
    """The groups of a suite on a device, the important ones first; quick: the headline rows."""
    modes = MODES[:1] if quick and suite == "scaling" else _MODES.get(suite, MODES)
    compiled = suite == "module" or (not quick and suite in TIMED and suite != "scaling")
    return [
        Group(*cell, dtype, mode, compiled, suite, processes)
        for dtype in DTYPES[device][: 1 if quick or suite not in TIMED or suite == "scaling" else None]
        for cell in dict.fromkeys(_cells(suite, device, quick))
        for mode in modes
        if cell[2] is not None or dtype == DTYPES[device][0] or cell[1] == f"performer_attention-L{HEADLINE_LENGTH}"
        if not (suite == "scaling" and device == "cpu" and mode == "training" and cell[3] > LARGEST_CPU_TRAINING)
        for processes in ((1,) if suite != "processes" else (2,) if quick else (1, 2))
    ]
