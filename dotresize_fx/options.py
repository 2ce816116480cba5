"""What a user may choose, checked in one place for the command line and for Python."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from dotresize_fx.cost import COSTS
from dotresize_fx.errors import UsageError
from dotresize_fx.memory import LEAST_BUDGET, Memory, read_size, show_size
from dotresize_fx.regions import ATTENTION_KINDS, RegionKind
from dotresize_fx.solvers import METHODS
from dotresize_fx.structure_options import RANK_METHODS, changes_structure, check_methods, check_structure
from dotresize_fx.width_plan import check_ratio
from dotresize_fx.workload import Workload, read_workload

REGION_NAMES = {
    "ffn": (RegionKind.FFN, RegionKind.EXPERTS),
    "attention": ATTENTION_KINDS,
    **{kind.value: (kind,) for kind in ATTENTION_KINDS},
    "residual": (RegionKind.RESIDUAL,),
}
# What is cut where nothing is said, of those that the method cuts.
DEFAULT_REGIONS = ("ffn", "attention")
DEVICES = ("auto", "cpu", "cuda")
EFFORTS = ("fast", "best", "heal")
ALLOCATIONS = ("measured", "uniform")
HEAD_SIZES = ("free", "equal")
# Whose ops the ONNX holds: the standard's, or ONNX Runtime's own for one of its providers too.
TARGETS = ("any", "cpu", "cuda")
BASES = ("shared", "sublayer")
DTYPES = ("float32", "float16", "bfloat16")
# What products of activations are taken in.
COMPUTE_DTYPES = ("float32", "bfloat16")
QUANTISED = ("int8", "int4")
# What is written; onnx always. The others go into folders of these names.
FORMATS = ("onnx", "pt2", "openvino", "executorch", "genai")
MORE_CHOICES = {
    "cost": COSTS,
    "head_sizes": HEAD_SIZES,
    "basis": BASES,
    "target": TARGETS,
    "dtype": DTYPES,
    "compute_dtype": COMPUTE_DTYPES,
    "quantize": QUANTISED,
}
# What decides the widths, with its defaults. Beside a plan of widths none of it can be given.
PLANNED: dict[str, object] = {
    "ratio": 0.2,
    "regions": (),
    "allocation": "measured",
    "cost": "weights",
    "head_sizes": "free",
    "uniform": False,
    "multiple": None,
}
# A few minutes of distillation see so much once or twice; text of few sources alone is learnt by heart.
SELF_TOKENS = 393_216
# Calibration text where nothing is said. An encoder is small, and what it loses it loses to text that it did not see.
CALIBRATION_TOKENS = {"decoder": 24_576, "encoder": 98_304}
# Of calibration and measurement, where nothing is said and the model takes as many.
SEQUENCE_LENGTH = 512
# Steps that repair each cut sublayer, likewise.
REPAIR_STEPS = {"decoder": 400, "encoder": 1200, "logits": 400, "outputs": 1200}


@dataclass(frozen=True, kw_only=True)
class Options:
    """``ratio`` is the share of ``cost`` (COSTS) to remove. Lengths and counts are in tokens.

    ``regions`` are names of REGION_NAMES; none stands for what the method cuts of DEFAULT_REGIONS. ``head_sizes``:
    "equal" cuts query, key and value heads of an attention to one size, a multiple of 8. ``uniform``: what is cut of
    one kind takes one width in all layers. ``multiple``: every width that is cut becomes a multiple of it, heads are
    counted one by one; None is 16, with a finer grid for small widths. These and ``allocation`` are None (or no
    regions) to take their defaults, of PLANNED; with a ``plan``, a file of widths to follow instead, they stay so, and
    none may be given. ``calibration_tokens`` and ``repair_steps`` None are what CALIBRATION_TOKENS and REPAIR_STEPS say
    of the task. ``effort``: fast is closed forms alone; best refines each cut sublayer for ``repair_steps`` steps; heal
    also distils end to end for ``heal_minutes`` (or for ``heal_steps``, whatever the clock says), on calibration text
    and ``self_tokens`` tokens that the dense model itself writes (None: as many as pay on this device), in all
    processes that torchrun started. ``heal_checkpoint`` is a folder to go on from. ``calibration`` are files of text,
    ``calibration_data`` .npz files or folders of them, for modules, programs and ONNX files. ``tokenizer``: the folder
    of an ONNX file's tokenizer, where it is not beside it. ``basis``: "shared" cuts the residual
    stream in one basis for all layers; "sublayer" gives each sublayer its own, with a k x k adapter on each skip, and
    so also takes post-norm models. ``checkpoint``: a Hugging Face checkpoint will be wanted too, so what no stock model
    can hold is refused. ``formats``
    (FORMATS) are what to write beside model.onnx; "genai" is built from the checkpoint. ``cache``: a decoder's ONNX
    reads and hands on keys and values, where its cache is no more than these. ``target`` (TARGETS): "any" emits
    standard ops alone, "cpu" and "cuda" also fused ops that only ONNX Runtime has. ``dtype`` (DTYPES) and
    ``quantize`` (QUANTISED) are what model.onnx is written in once all is computed. ``device`` is where calibration and
    solving run; conversion and ONNX Runtime stay on the CPU. ``compute_dtype`` (COMPUTE_DTYPES): what products of
    activations are taken in there; sums and solving are more precise. None is bfloat16 on a GPU for models that are
    stored so.

    ``methods`` (METHODS of mixed/frontier.py): the ratio is spent on widths, ranks and depth together.

    ``merge`` stands for the ratio too: so many blocks go, by ``merge_method`` (None is "mka"). The methods "rom" and
    "rank" replace linears by two of a lower rank. Both leave widths alone.

    ``memory_budget`` ("4GiB", or bytes): how much memory the process may take for itself, and of a GPU's; weights stay
    in the files of a Hugging Face folder until they are needed where they would take too much of it, or without it of
    what is free.

    ``target_latency`` stands for the ratio, which is None then: the share of the dense model's time that ``workload``
    ("prompt=128,decode=64,batch=1"; None is that) is to take on this machine. ``profile``: the ratio is split by what
    the kernels of each width take in it.

    Raises:
        UsageError: an option has a value that cannot be used.
    """

    ratio: float | None = None
    regions: tuple[str, ...] = ()
    method: str = "auto"
    methods: tuple[str, ...] = ()
    merge: int | None = None
    merge_method: str | None = None
    effort: str = "fast"
    basis: str = "shared"
    allocation: str | None = None
    cost: str | None = None
    head_sizes: str | None = None
    uniform: bool | None = None
    target_latency: float | None = None
    profile: bool = False
    workload: str | None = None
    plan: Path | None = None
    checkpoint: bool = False
    formats: tuple[str, ...] = ()
    repair_steps: int | None = None
    heal_minutes: float = 5.0
    heal_steps: int | None = None
    heal_checkpoint: Path | None = None
    self_tokens: int | None = None
    multiple: int | None = None
    calibration: tuple[Path, ...] = ()
    calibration_data: tuple[Path, ...] = ()
    tokenizer: Path | None = None
    calibration_tokens: int | None = None
    sequence_length: int = SEQUENCE_LENGTH
    evaluation_tokens: int = 8_192
    latency_length: int = 128
    tolerance: float = 1e-3
    cache: bool = True
    target: str = "any"
    dtype: str = "float32"
    quantize: str | None = None
    device: str = "auto"
    compute_dtype: str | None = None
    memory_budget: int | str | None = None
    seed: int = 0
    check: bool = field(default=False)

    def __post_init__(self) -> None:
        self._settle_what_is_planned()
        for name in ("plan", "heal_checkpoint"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(path))
        if self.heal_checkpoint is not None and not self.heal_checkpoint.is_dir():
            raise UsageError(f"--heal-checkpoint {self.heal_checkpoint}: there is no such folder: make it first")
        choices = {"method": (*METHODS, *RANK_METHODS), "effort": EFFORTS, "allocation": ALLOCATIONS, "device": DEVICES}
        for name, known in (choices | MORE_CHOICES).items():
            if (chosen := getattr(self, name)) not in known and chosen is not None:
                raise UsageError(f"--{name.replace('_', '-')} {chosen}: choose one of {', '.join(sorted(known))}")
        if unknown := [name for name in self.formats if name not in FORMATS]:
            raise UsageError(f"--format {unknown[0]}: choose from {', '.join(FORMATS)}")
        if "genai" in self.formats and not self.checkpoint:
            raise UsageError("--format genai is built from the checkpoint: say --checkpoint too")
        said = f"--regions {','.join(self.regions)}"
        if any(name not in REGION_NAMES for name in self.regions):
            raise UsageError(f"{said}: choose from {', '.join(REGION_NAMES)}")
        if len(set(self.regions)) < len(self.regions):
            raise UsageError(f"{said}: names one twice")
        check_structure(self)
        check_methods(self)
        cuts = METHODS.get(self.method, {})
        idle = [name for name in self.regions if not any(kind in cuts for kind in REGION_NAMES[name])]
        if idle or not (self.kinds or changes_structure(self) or self.methods):
            takes = [name for name, kinds in REGION_NAMES.items() if any(k in cuts for k in kinds)]
            raise UsageError(
                f"--method {self.method} does not cut {' or '.join(idle) or 'what is cut by default'}: "
                f"choose --regions from {', '.join(takes)}"
            )
        self._settle_head_sizes()
        self._check_clock()
        if isinstance(self.memory_budget, str):
            object.__setattr__(self, "memory_budget", read_size(self.memory_budget))
        if self.memory_budget is not None and int(self.memory_budget) < LEAST_BUDGET:
            raise UsageError(
                f"--memory-budget {self.memory_budget} bytes: at least {show_size(LEAST_BUDGET)} are needed"
            )
        if self.memory_budget is not None and (why := self._takes_all_weights):
            raise UsageError(f"--memory-budget and {why[0]} do not go together: {why[1]}")
        widths = self.checkpoint and self.plan is None and not changes_structure(self)
        if widths and not self.uniform and set(self.kinds) != {RegionKind.RESIDUAL}:
            raise UsageError("--checkpoint: a stock model has one width for all layers: say --uniform too")
        if self.quantize is not None and self.dtype != "float32":
            raise UsageError(
                f"--quantize {self.quantize} starts from float32 weights and leaves float32 between them: "
                f"leave out --dtype {self.dtype}"
            )
        if self.head_sizes == "equal" and len({RegionKind.QUERY_KEY, RegionKind.VALUE} & set(self.kinds)) == 1:
            raise UsageError(f"{said}: --head-sizes equal cuts query_key and value together: name both")
        if not math.isfinite(self.heal_minutes) or self.heal_minutes <= 0:
            raise UsageError(f"--heal-minutes is {self.heal_minutes}: it must be above 0")
        # A sequence of one token has no next token to predict.
        least = {
            "multiple": 1,
            "calibration_tokens": 1,
            "sequence_length": 2,
            "evaluation_tokens": 1,
            "repair_steps": 1,
        }
        for name, smallest in (least | {"latency_length": 1, "seed": 0, "self_tokens": 0, "heal_steps": 1}).items():
            if (value := getattr(self, name)) is not None and value < smallest:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be at least {smallest}")
        if self.seed >= 2**63:
            raise UsageError(f"--seed is {self.seed}: it must be below 2**63")

    def _settle_what_is_planned(self) -> None:
        given = [name for name in PLANNED if getattr(self, name) not in (None, ())]
        if self.plan is not None:
            if given:
                said = ", ".join(f"--{name.replace('_', '-')}" for name in given)
                raise UsageError(
                    f"--plan says all widths, so {said} cannot be given beside it: leave out one of the two"
                )
            return
        if self.target_latency is not None:
            for name in ("ratio", "cost"):
                if name in given and getattr(self, name) != "weights":  # that is what is settled below
                    raise UsageError(f"--target-latency says how much goes, so --{name} cannot be given beside it")
        for name in PLANNED.keys() - given - {"head_sizes"}:
            object.__setattr__(self, name, PLANNED[name])
        if self.merge is not None and "ratio" in given:
            raise UsageError("--merge says how many blocks go, so --ratio cannot be given beside it")
        if self.target_latency is not None or self.merge is not None:
            object.__setattr__(self, "ratio", None)
            return
        assert self.ratio is not None
        check_ratio(self.ratio)

    def _settle_head_sizes(self) -> None:
        """ONNX Runtime's fast attentions on CUDA take heads of one size, a multiple of 8; others take 2.5 times as long
        (fp16, 16 sequences of 512 tokens on an H100: benchmarks/attention_ops.py).
        """
        if self.head_sizes is not None or self.plan is not None:
            return
        both = {RegionKind.QUERY_KEY, RegionKind.VALUE} <= set(self.kinds)
        object.__setattr__(self, "head_sizes", "equal" if self.target == "cuda" and both else PLANNED["head_sizes"])

    def _check_clock(self) -> None:
        """What does not go with widths that are planned by the clock."""
        said = "--profile" if self.target_latency is None else "--target-latency"
        if self.target_latency is not None and not 0 < self.target_latency < 1:
            raise UsageError(
                f"{said} is {self.target_latency}: it is a share of the dense latency, above 0 and below 1"
            )
        if self.workload is not None:
            read_workload(self.workload)
            if not self.by_the_clock:
                raise UsageError(f"--workload {self.workload}: only --target-latency and --profile run one")
        if not self.by_the_clock:
            return
        against = {
            "--plan": self.plan is not None and "it says all widths",
            "--allocation uniform": self.allocation == "uniform" and "it cuts all alike, whatever they take",
            f"--dtype {self.dtype}": self.dtype != "float32"
            and self.target != "cuda"
            and "half precision is for GPUs, which are timed with --target cuda",
            f"--quantize {self.quantize}": self.quantize is not None and "kernels are timed in float32",
            "--regions residual": RegionKind.RESIDUAL in self.kinds and "the stream's one width is not timed",
        }
        for option, why in against.items():
            if why:
                raise UsageError(f"{said} and {option} do not go together: {why}")

    @property
    def _takes_all_weights(self) -> tuple[str, str] | None:
        """What is asked for that has all weights in memory, and why."""
        known = {
            "--effort heal": self.effort == "heal" and "it trains the whole model (best does not)",
            "--regions residual": RegionKind.RESIDUAL in self.kinds and "a stream is cut in all weights at once",
            "--methods": bool(self.methods) and "it solves the model four times",
            "--merge": self.merge is not None and "blocks are compared with each other",
            f"--method {self.method}": self.method in RANK_METHODS and "it changes linears in all blocks at once",
            "--checkpoint": self.checkpoint and "a stock model is made in memory",
            "--format": set(self.formats) > {"onnx"} and "other formats are converted in memory",
            f"--target {self.target}": self.target != "any" and "fusions join weights in memory",
            f"--dtype {self.dtype}": self.dtype != "float32" and "the float32 ONNX alone is written bit by bit",
            "--quantize": self.quantize is not None and "the float32 ONNX alone is written bit by bit",
            "--profile": self.profile and "models of other widths are tried in memory",
            "--target-latency": self.target_latency is not None and "models of other widths are tried in memory",
        }
        return next(((name, why) for name, why in known.items() if why), None)

    @property
    def memory(self) -> Memory:
        """What there is, for weights above all."""
        assert not isinstance(self.memory_budget, str)
        return Memory(self.memory_budget, lazy=not self._takes_all_weights)

    @property
    def by_the_clock(self) -> bool:
        """Whether the widths depend on what kernels take."""
        return self.profile or self.target_latency is not None

    @property
    def helped(self) -> bool:
        """Whether several processes do more than one: they heal together, or share the calibration text."""
        if self.effort != "fast":
            return self.effort == "heal"
        return not (
            self.ratio == 0
            or self.methods
            or changes_structure(self)
            or self.by_the_clock
            or RegionKind.RESIDUAL in self.kinds
        )

    @property
    def finest_step(self) -> int:
        """What planned widths are multiples of at the least: a GPU's kernels want rows of 16 bytes."""
        if self.dtype in ("float16", "bfloat16"):
            return 8
        return 4 if self.target == "cuda" else 1

    @property
    def timed_workload(self) -> Workload:
        """What is run where widths are planned by the clock."""
        return Workload() if self.workload is None else read_workload(self.workload)

    @property
    def kinds(self) -> tuple[RegionKind, ...]:
        """The kinds of region that are cut; with a plan all that the method can."""
        if changes_structure(self) or (self.methods and "width" not in self.methods):
            return ()
        if self.plan is not None:
            return tuple(METHODS[self.method])
        names = self.regions or DEFAULT_REGIONS
        return tuple(kind for name in names for kind in REGION_NAMES[name] if kind in METHODS[self.method])

    @property
    def precision(self) -> str | None:
        """What model.onnx is written in, where it is not float32."""
        return self.quantize or (None if self.dtype == "float32" else self.dtype)

    def tokens_that_calibrate(self, task: str) -> int:
        """How much text calibrates; an encoder's without padding."""
        return CALIBRATION_TOKENS[task] if self.calibration_tokens is None else self.calibration_tokens

    def steps_that_repair(self, task: str) -> int:
        """How many steps each cut sublayer takes, where the effort repairs."""
        return REPAIR_STEPS[task] if self.repair_steps is None else self.repair_steps

    def steps_taken(self, task: str) -> int:
        """The same, and none where it does not."""
        return 0 if self.effort == "fast" else self.steps_that_repair(task)

    def own_tokens(self, task: str, device: str) -> int:
        """How much text the dense model writes for its slim self; an encoder writes none."""
        if self.effort != "heal" or task != "decoder":
            return 0
        if self.self_tokens is not None:
            return self.self_tokens
        return 0 if device == "cpu" else SELF_TOKENS
