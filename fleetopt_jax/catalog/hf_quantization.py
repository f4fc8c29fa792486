"""How a checkpoint's weights are quantized: which of its matrices, in what format, with how many bytes of scales.

Sources: the configurations that transformers, compressed-tensors, ModelOpt, AutoAWQ and GPTQModel write; sizes were
checked against the safetensors of published checkpoints (tests/test_configs.py).
"""

import fnmatch
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from fleetopt_jax.catalog.architecture import Held
from fleetopt_jax.catalog.hf_fields import HfGroup, HfQuantization, HfWeights
from fleetopt_jax.catalog.hf_layers import Matrix
from fleetopt_jax.catalog.llms import BYTES_16_BIT
from fleetopt_jax.core.errors import BadInput
from fleetopt_jax.core.files import shown

MAX_PATTERNS = 1_000  # of those with wildcards; lists of whole names may be longer
MAX_FREE = 50  # of those that begin with one
MAX_PATTERN_CHARS = 300
MAX_REPEATS = 5  # of a regular expression: more may take for ever
METHODS = "fp8, fbgemm_fp8, mxfp4, gptq, awq, compressed-tensors, modelopt, auto-round or bitsandbytes"


@dataclass(frozen=True)
class Format:
    """Of one weight matrix in a checkpoint."""

    precision: str  # its name among `catalog.llms.PRECISIONS`
    bits: int
    group: int = 0  # weights of a row that share a scale; 0: see `block`
    block: tuple[int, int] = (0, 0)  # rows and columns that do; 0: all of them
    scale_bytes: float = 4.0
    zero_bits: int = 0  # of a zero point, beside every scale
    index_bytes: float = 0.0  # of every column (gptq's g_idx)
    low_activations: bool = False  # whether activations are as narrow, so that the products are as well

    def matrix_bytes(self, rows: int, cols: int) -> float:
        """Weights, scales and zero points."""
        if self.group > 0:
            n_scales = rows * -(-cols // self.group)
        else:
            n_scales = -(-rows // (self.block[0] or rows)) * -(-cols // (self.block[1] or cols))
        scales = n_scales * (self.scale_bytes + self.zero_bits / 8)
        return rows * cols * self.bits / 8 + scales + cols * self.index_bytes


_BLOCK_FP8 = Format("fp8", 8, block=(128, 128), low_activations=True)
_TENSOR_FP8 = Format("fp8", 8, low_activations=True)
_CHANNEL_FP8 = Format("fp8", 8, block=(1, 0), low_activations=True)
_CHANNEL_INT8 = Format("int8", 8, block=(1, 0), low_activations=True)
_INT4 = Format("int4", 4, group=128, scale_bytes=2.0)
_NVFP4 = Format("nvfp4", 4, group=16, scale_bytes=1.0, low_activations=True)
_MXFP4 = Format("mxfp4", 4, group=32, scale_bytes=1.0)
_OF_ALGORITHM: dict[str, Format] = {  # modelopt's quant_algo
    "FP8": _TENSOR_FP8,
    "FP8_PER_CHANNEL_PER_TOKEN": _CHANNEL_FP8,
    "FP8_PB_WO": _BLOCK_FP8,
    "FP8_PB_REAL": _BLOCK_FP8,
    "FP8_BLOCK_SCALES": _BLOCK_FP8,
    "MXFP8": Format("fp8", 8, group=32, scale_bytes=1.0, low_activations=True),
    "NVFP4": _NVFP4,
    "NVFP4_AWQ": _NVFP4,
    "NVFP4_SVD": _NVFP4,
    "W4A16_NVFP4": Format("nvfp4", 4, group=16, scale_bytes=1.0),
    "MXFP4": _MXFP4,
    "W4A8_MXFP4_FP8": _MXFP4,
    "W4A16_AWQ": _INT4,
    "W4A8_AWQ": _INT4,
    "INT4_AWQ": _INT4,
    "INT8_SQ": _CHANNEL_INT8,
    "W8A8_SQ_PER_CHANNEL": _CHANNEL_INT8,
    "W8A16": Format("int8", 8, block=(1, 0)),
}
_KV = {"FP8": "fp8", "FP8_E4M3": "fp8", "FP8_E5M2": "fp8", "FLOAT8": "fp8", "AUTO": "bf16", "NONE": "bf16"}


@dataclass(frozen=True)
class Quantization:
    """The format of each matrix, and of the KV cache."""

    said: str  # where it was found, and as what
    format_of: Callable[[Matrix], Format | None]  # None: 16 bits
    kv_precision: str
    warnings: tuple[str, ...] = ()


def quantization_of(where: str, found: HfQuantization, said: str) -> Quantization:
    """What a file's quantization means, or `BadInput` naming what is not known."""
    warnings: list[str] = []
    method = (found.quant_method or ("modelopt" if found.quant_algo or found.config_groups else "")).lower()
    if not method:
        raise BadInput(where, "quantization_config.quant_method: field required", f"need {METHODS}")
    kept = _Names(_kept(found), warnings)
    rules = _rules(where, method, found, warnings)

    def format_of(matrix: Matrix) -> Format | None:
        if not matrix.linear or kept.hold(matrix.module):
            return None
        return next((form for takes, form in rules if takes(matrix)), None)

    return Quantization(said, format_of, _kv_precision(found, warnings), tuple(warnings))


def matrix_bytes(quantization: Quantization | None, matrix: Matrix) -> float:
    """One matrix in the checkpoint, with its copies [B]."""
    form = quantization.format_of(matrix) if quantization is not None else None
    one = form.matrix_bytes(matrix.rows, matrix.cols) if form else BYTES_16_BIT * matrix.rows * matrix.cols
    return matrix.copies * one


def held(
    quantization: Quantization, parts: Iterable[Matrix], expert_share: float
) -> tuple[str, Held, dict[str, float]]:
    """(precision of most quantized weights, bytes by part, share of each part's weights that is quantized)."""
    nbytes: dict[str, float] = dict.fromkeys(("attention", "dense", "expert", "lm_head"), 0.0)
    params, quantized = dict(nbytes), dict(nbytes)
    by_precision: dict[str, float] = {}
    low = active = 0.0
    for matrix in parts:
        form = quantization.format_of(matrix)
        nbytes[matrix.part] += matrix_bytes(quantization, matrix)
        params[matrix.part] += matrix.params
        used = 0.0 if matrix.part == "lm_head" else matrix.params * (expert_share if matrix.part == "expert" else 1.0)
        active += used if matrix.linear else 0.0
        if form is not None:
            quantized[matrix.part] += matrix.params
            by_precision[form.precision] = by_precision.get(form.precision, 0.0) + matrix.params
            low += used if form.low_activations else 0.0
    found = Held(*nbytes.values(), low_bits_frac=low / active if active else 0.0)
    shares = {part: quantized[part] / params[part] for part in params if params[part]}
    return max(by_precision, key=lambda name: by_precision[name], default="bf16"), found, shares


# ----------------------------------------------------------------------------------------------- what takes a format

Rule = tuple[Callable[[Matrix], bool], Format | None]


def _rules(where: str, method: str, found: HfQuantization, warnings: list[str]) -> list[Rule]:
    """Formats in their order, each with the matrices that take it. Most leave the output layer as it is."""
    match method.replace("_", "-"):
        case "fp8" | "fbgemm-fp8" | "deepseek-fp8":
            rows, cols = found.weight_block_size or (0, 0)
            channel = _CHANNEL_FP8 if method.startswith("fbgemm") else _TENSOR_FP8
            return [(_inner, Format("fp8", 8, block=(rows, cols), low_activations=True) if rows else channel)]
        case "mxfp4" | "gpt-oss-mxfp4":
            return [(lambda matrix: matrix.part == "expert", _MXFP4)]
        case "awq" | "awq-marlin" | "gptq" | "gptq-marlin" | "auto-round" | "auto-awq" | "auto-gptq" | "gptqmodel":
            return _of_integers(where, method, found, warnings)
        case "bitsandbytes":
            return [(_inner, _of_bitsandbytes(found, warnings))]
        case "compressed-tensors" | "modelopt" | "modelopt-fp4" | "modelopt-mixed" | "modelopt-fp8":
            return _of_groups(where, found, warnings)
    raise _unknown(where, f"quantization_config.quant_method = {shown(method)}")


def _inner(matrix: Matrix) -> bool:
    return matrix.part != "lm_head"


def _of_integers(where: str, method: str, found: HfQuantization, warnings: list[str]) -> list[Rule]:
    """Of awq and gptq: a scale of 16 bits and a zero point for every group; gptq keeps the order of columns as well."""
    bits = found.bits
    if bits not in (4, 8):
        raise _unknown(where, f"quantization_config.quant_method = {method} ({bits} bits)", "need 4 or 8 bits")
    group = 128 if found.group_size is None else found.group_size
    zero = 0 if "awq" in method and found.zero_point is False else bits
    form = Format(
        f"int{bits}",
        bits,
        group=max(group, 0),
        block=(1, 0),
        scale_bytes=2.0,
        zero_bits=zero,
        index_bytes=0.0 if "awq" in method else 4.0,
    )
    rules: list[Rule] = []
    if skipped := [name[2:] for name in found.dynamic or {} if name.startswith("-:")]:
        names = _Names([f"re:{name}" for name in skipped], warnings)
        rules.append((lambda matrix: names.hold(matrix.module), None))
    return [*rules, (lambda matrix: matrix.part != "lm_head" or bool(found.lm_head), form)]


def _of_bitsandbytes(found: HfQuantization, warnings: list[str]) -> Format:
    warnings.append("bitsandbytes: its bytes are counted; its kernels are slower than the law's")
    if found.load_in_8bit:
        return Format("int8", 8, block=(1, 0))
    return Format("int4", 4, group=64, scale_bytes=4.0)


def _of_groups(where: str, found: HfQuantization, warnings: list[str]) -> list[Rule]:
    """Of compressed-tensors and modelopt: groups of modules with a format each, or one algorithm for all."""
    algorithm = (found.quant_algo or "").upper()
    if found.quantized_layers:
        by_format: dict[Format, list[str]] = {}
        for name, layer in found.quantized_layers.items():
            form = _of_algorithm(where, layer.get("quant_algo"), layer.get("group_size"))
            by_format.setdefault(form, []).append(name)
        return [(_taking(names, warnings), form) for form, names in by_format.items()]
    groups = [group for group in (found.config_groups or {}).values() if group.weights is not None]
    if groups:
        return [(_taking(group.targets or ["Linear"], warnings), _of_group(where, group)) for group in groups]
    if algorithm:
        return [(_inner, _of_algorithm(where, algorithm, found.group_size))]
    raise BadInput(where, "quantization_config says no format", "need config_groups, quant_algo or quantized_layers")


def _taking(targets: list[str], warnings: list[str]) -> Callable[[Matrix], bool]:
    """Whether a matrix is among `targets`: classes of modules, names or patterns."""
    if any(target in ("Linear", "QKVParallelLinear", "FusedMoE") for target in targets):
        return lambda matrix: True
    names = _Names(targets, warnings)
    return lambda matrix: names.hold(matrix.module)


def _of_algorithm(where: str, said: Any, group: Any) -> Format:
    known = _OF_ALGORITHM.get(said.upper()) if isinstance(said, str) else None
    if known is None:
        raise _unknown(where, f"quantization: quant_algo = {shown(said)}", f"need one of {', '.join(_OF_ALGORITHM)}")
    if known.group and isinstance(group, int) and not isinstance(group, bool) and group > 0:
        return Format(**{**vars(known), "group": group})
    return known


def _of_group(where: str, group: HfGroup) -> Format:
    weights, activations = group.weights, group.input_activations
    assert weights is not None
    kind, bits, low = weights.type, weights.num_bits, activations.num_bits if activations is not None else 0
    if (kind, bits) == ("float", 8):
        return Format("fp8", 8, **_scales(weights, 2.0), low_activations=low == 8)
    if (kind, bits) == ("int", 8):
        return Format("int8", 8, **_scales(weights, 2.0), low_activations=low == 8)
    if (kind, bits) == ("int", 4):
        zero = 4 if weights.symmetric is False else 0
        return Format("int4", 4, **_scales(weights, 2.0), zero_bits=zero)
    if (kind, bits) == ("float", 4):
        if weights.group_size == 32:
            return _MXFP4
        return Format("nvfp4", 4, group=weights.group_size or 16, scale_bytes=1.0, low_activations=low > 0)
    raise _unknown(where, f"quantization_config.config_groups: weights of {bits} bits ({kind})", "need 4 or 8 bits")


def _scales(weights: HfWeights, scale_bytes: float) -> dict[str, Any]:
    """Which weights share a scale."""
    group = weights.group_size or 0
    if group > 0:
        return dict(group=group, scale_bytes=scale_bytes)
    block = weights.block_structure
    if isinstance(block, str):
        block = [int(part) for part in re.findall(r"\d{1,5}", block)]
    if block is not None and len(block) == 2 and min(block) > 0:
        return dict(block=(block[0], block[1]), scale_bytes=scale_bytes)
    return dict(block=(0, 0) if weights.strategy == "tensor" else (1, 0), scale_bytes=scale_bytes)


def _kept(found: HfQuantization) -> list[str]:
    lists = (
        found.modules_to_not_convert,
        found.ignore,
        found.ignored_layers,
        found.exclude_modules,
        found.exclude,
        found.llm_int8_skip_modules,
    )
    return list(dict.fromkeys(name for each in lists for name in each or ()))


def _kv_precision(found: HfQuantization, warnings: list[str]) -> str:
    """The KV cache's type, where the checkpoint asks for one."""
    scheme = found.kv_cache_scheme
    if isinstance(scheme, HfWeights):
        name = "FP8" if scheme.num_bits == 8 and scheme.type == "float" else f"{scheme.type}{scheme.num_bits}"
    else:
        name = scheme or found.kv_cache_quant_algo or "none"
    known = _KV.get(name.upper())
    if known is None:
        warnings.append(f"a KV cache in {shown(name)} is not known: counted in fp8")
    return known or "fp8"


def _unknown(where: str, problem: str, allowed: str = f"need {METHODS}") -> BadInput:
    return BadInput(where, problem, allowed)


# -------------------------------------------------------------------------------------------------- names of modules

_OUTER = re.compile(r"^(?:re:)?\^?(?:(?:model|language_model|text_model|transformer|backbone|decoder)\\?\.)*")
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_PREFIXES = ("", "model.")
_CALLED: tuple[dict[str, str], ...] = (  # as families call what we call self_attn, mlp, gate_proj, ...
    {},
    {"mlp": "feed_forward", "shared_experts": "shared_expert"},
    {"mlp": "block_sparse_moe", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
    {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"},
    {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"},
    {"shared_experts": "shared_expert", "self_attn": "linear_attn"},
    {"self_attn": "mixer", "mlp": "mixer"},
)  # fmt: skip


class _Names:
    """Modules by whole names, parts of names between dots, wildcards (*) and regular expressions (re:)."""

    def __init__(self, said: Iterable[str], warnings: list[str]):
        self._whole: set[str] = set()
        patterns = []
        for name in dict.fromkeys(said):
            if name.startswith("re:") or "*" in name or "?" in name:
                patterns.append(name)
            else:
                self._whole.add(_OUTER.sub("", name) or name)
        self._pattern = _compiled(patterns, warnings)
        self._last: dict[str, bool] = {}

    def hold(self, module: str) -> bool:
        if not self._whole and self._pattern is None:
            return False
        if module not in self._last:
            self._last[module] = self._holds(module)
        return self._last[module]

    def _holds(self, module: str) -> bool:
        for name in _also_called(module):
            if self._whole and any(run in self._whole for run in _runs(name)):
                return True
            if self._pattern is not None and any(self._pattern.match(prefix + name) for prefix in _PREFIXES):
                return True
        return False


def _compiled(patterns: list[str], warnings: list[str]) -> re.Pattern[str] | None:
    """One expression of all, each whole or up to a dot. What might take for ever, or is none, is left out and said."""
    parts: list[str] = []
    n_free = n_left = 0
    for pattern in patterns:
        regular = pattern.startswith("re:")
        inner = _OUTER.sub("", pattern)
        expression = inner if regular else re.sub(r"\\[Zz]$", "", fnmatch.translate(inner))
        n_free += (free := ".*" in expression[:12])  # may begin anywhere
        if len(parts) >= MAX_PATTERNS or (free and n_free > MAX_FREE):
            n_left += 1
            continue
        try:
            if not _is_quick(expression):
                raise ValueError
            re.compile(expression)
        except (ValueError, re.error, RecursionError, OverflowError):
            warnings.append(f"the pattern {shown(pattern)} of modules in 16 bits is not read")
            continue
        parts.append(f"(?:{expression})" + ("" if regular else r"(?:\.|$)"))
    if n_left:
        warnings.append(f"{n_left} patterns of modules in 16 bits are not read: they are too many")
    try:
        return re.compile("|".join(parts)) if parts else None
    except (re.error, RecursionError, OverflowError):  # groups of the same name
        warnings.append("the patterns of modules in 16 bits are not read together")
        return None


def _is_quick(expression: str) -> bool:
    """Whether an expression takes a bounded time: few repetitions, and none of what repeats."""
    repeats = sum(expression.count(sign) for sign in "*+{")
    nested = repeats > 1 and _REPEATED_GROUP.search(expression)
    return len(expression) <= MAX_PATTERN_CHARS and repeats <= MAX_REPEATS and not nested


def _runs(name: str) -> tuple[str, ...]:
    """Every part of a name from one dot to another."""
    parts = name.split(".")
    n = len(parts)
    return tuple(".".join(parts[i:j]) for i in range(n) for j in range(i + 1, n + 1))


def _also_called(module: str) -> list[str]:
    """A module's name as each family has it."""
    parts = module.split(".")
    return list(dict.fromkeys(".".join(called.get(part, part) for part in parts) for called in _CALLED))
