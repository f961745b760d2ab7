"""What a quantization did: bytes before and after by module class, error by class, every module's figures.

The table on the screen, the model card, and the report that lies beside the weights (report_page.py) all read this.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader
from deepseek_fp4_plugin.checkpoint.sizes import size_text
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.inventory import Weight
from deepseek_fp4_plugin.models.ledger import checkpoint_size
from deepseek_fp4_plugin.quantization.plan import Plan, layout_format, result_tensors
from deepseek_fp4_plugin.quantization.recipe import Rounding

MTP = "MTP layer"
WORST = 5
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


class Bytes(NamedTuple):
    """Bytes of tensors before and after."""

    before: int
    after: int

    @property
    def ratio(self) -> float:
        return self.before / self.after

    def __add__(self, other: "Bytes") -> "Bytes":  # type: ignore[override]
        return Bytes(self.before + other.before, self.after + other.after)


class ModuleError(NamedTuple):
    """SQNR of one NVFP4 weight against its BF16 values, in decibels; infinite when exact."""

    module: str
    sqnr_db: float


class ModuleFigures(NamedTuple):
    """One NVFP4 weight. kind: its module class.  expert: None where it is no routed expert's.

    amax: the largest magnitude before.  tokens: input rows that calibration sent through it.
    """

    module: str
    kind: str
    layer: int
    expert: int | None
    sqnr_db: float
    amax: float
    tokens: int

    @property
    def projection(self) -> str:
        return self.module.rpartition(".")[2]


@dataclass(frozen=True)
class QuantizationReport:
    """Everything that the tables, the report beside the weights and the model card say of one run.

    size: module class -> bytes.  sqnr_db: module class -> decibels over all its weights.  worst: lowest SQNR first.
    modules: every NVFP4 weight, in reading order.
    cold_experts: expert projections that saw no calibration token.  zero_inputs: modules that saw nothing but zeros.
    r1: the same arithmetic on DeepSeek-R1.  format: whose names the tensors have.
    kv_scales: whether the FP8 cache has calibrated scales.  mtp: what the MTP layer became, "bf16" or "nvfp4".
    smooth: whether norms were smoothed.
    """

    source: str
    destination: str
    recipe: str
    layout: str
    kv_cache: str
    calibration: str
    samples: int
    tokens: int
    size: dict[str, Bytes]
    sqnr_db: dict[str, float]
    worst: tuple[ModuleError, ...]
    modules: tuple[ModuleFigures, ...]
    quantized_modules: int
    cold_experts: int
    zero_inputs: tuple[str, ...]
    r1: Bytes
    format: str = "modelopt"
    kv_scales: bool = False
    mtp: str = "bf16"
    smooth: bool = False

    @property
    def total(self) -> Bytes:
        return sum_bytes(self.size.values())

    @property
    def without_mtp(self) -> Bytes:
        return sum_bytes(count for name, count in self.size.items() if name != MTP)

    def to_state(self) -> dict[str, Any]:
        """A JSON object that `from_state` makes the same report of."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "QuantizationReport":
        read = {
            "size": {name: Bytes(*count) for name, count in state["size"].items()},
            "worst": tuple(ModuleError(*module) for module in state["worst"]),
            "modules": tuple(ModuleFigures(*module) for module in state["modules"]),
            "zero_inputs": tuple(state["zero_inputs"]),
            "r1": Bytes(*state["r1"]),
        }
        return cls(**{**state, **read})

    def to_json(self) -> dict[str, Any]:
        """A JSON object; infinite SQNR becomes null. Single modules are in the report beside the weights."""
        content = asdict(self)
        del content["modules"]
        content["size"] = {name: _bytes_json(count) for name, count in self.size.items()}
        content["total"], content["without_mtp"] = _bytes_json(self.total), _bytes_json(self.without_mtp)
        content["r1"] = _bytes_json(self.r1)
        content["sqnr_db"] = {name: _finite(value) for name, value in self.sqnr_db.items()}
        content["worst"] = [{"module": m.module, "sqnr_db": _finite(m.sqnr_db)} for m in self.worst]
        return content

    def tables(self) -> list[Table]:
        """Sizes, then errors."""
        return [self._sizes(), self._errors()]

    def render(self, console: Console) -> None:
        for table in self.tables():
            console.print(table)

    def __str__(self) -> str:
        text = StringIO()
        self.render(Console(width=110, file=text))
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def _sizes(self) -> Table:
        table = _table("Size", ("", "before", "after", "ratio"))
        for name, count in self.size.items():
            table.add_row(name, *_cells(count))
        table.add_section()
        table.add_row("all", *_cells(self.total))
        if MTP in self.size:
            table.add_row("all without the MTP layer", *_cells(self.without_mtp))
        table.add_row(f"DeepSeek-R1, layout {self.layout} (our arithmetic)", *_cells(self.r1))
        return table

    def _errors(self) -> Table:
        table = _table(f"Error of the {self.quantized_modules} NVFP4 weights", ("", "SQNR dB"))
        for name, value in self.sqnr_db.items():
            table.add_row(name, decibels(value))
        table.add_section()
        for module in self.worst:
            table.add_row(f"worst: {module.module}", decibels(module.sqnr_db))
        if self.cold_experts:
            table.add_section()
            table.add_row("expert projections that saw no calibration token", str(self.cold_experts))
        if self.zero_inputs:
            table.add_section()
            table.add_row(f"projections that saw only zeros, first {self.zero_inputs[0]}", str(len(self.zero_inputs)))
        return table


def sizes(reader: CheckpointReader, config: DeepseekV3Config, plan: Plan) -> dict[str, Bytes]:
    """Bytes by module class, from the source's headers and the plan."""
    after = {spec.name: spec.nbytes for spec in plan.tensors}
    found: dict[str, Bytes] = {}
    for unit in plan.units:
        for conversion in unit.conversions:
            source_bytes = sum(reader.info(name).nbytes for name in conversion.source_names)
            specs = result_tensors(conversion, torch.bfloat16)
            _count(found, conversion.weight, config, Bytes(source_bytes, sum(after[spec.name] for spec in specs)))
    return found


def planned_sizes(config: DeepseekV3Config, layout: str, mtp: bool = False) -> Bytes:
    """Bytes of a checkpoint as DeepSeek publishes one (FP8 linears) and of its NVFP4 result, from the config alone."""
    return Bytes(*(checkpoint_size(config, layout_format(config, name, mtp))[0] for name in ("fp8", layout)))


def module_figures(
    plan: Plan, config: DeepseekV3Config, roundings: Mapping[str, Rounding], tokens: Mapping[str, int]
) -> tuple[ModuleFigures, ...]:
    """Of every NVFP4 weight. tokens: module -> input rows seen, as the observers counted them."""
    found = []
    for unit in plan.units:
        for conversion in unit.conversions:
            if conversion.nvfp4:
                weight, module = conversion.weight, conversion.weight.module
                assert weight.layer is not None
                rounding, expert = roundings[module], _EXPERT.search(module)
                found.append(
                    ModuleFigures(
                        module,
                        class_of(weight, config),
                        weight.layer,
                        int(expert[1]) if expert else None,
                        _sqnr(rounding.signal, rounding.noise),
                        rounding.amax,
                        tokens.get(module, 0),
                    )
                )
    return tuple(found)


def sqnr_by_class(
    plan: Plan, config: DeepseekV3Config, roundings: Mapping[str, Rounding]
) -> tuple[dict[str, float], tuple[ModuleError, ...]]:
    """SQNR of every class that has NVFP4 weights, and the worst modules."""
    energy: dict[str, tuple[float, float]] = {}
    modules = module_figures(plan, config, roundings, {})
    for module in modules:
        rounding = roundings[module.module]
        signal, noise = energy.get(module.kind, (0.0, 0.0))
        energy[module.kind] = (signal + rounding.signal, noise + rounding.noise)
    worst = sorted((ModuleError(m.module, m.sqnr_db) for m in modules), key=lambda m: (m.sqnr_db, m.module))
    return {name: _sqnr(*pair) for name, pair in energy.items()}, tuple(worst[:WORST])


def class_of(weight: Weight, config: DeepseekV3Config) -> str:
    """The weight's class in the tables: its role, or the MTP layer."""
    return MTP if weight.layer is not None and weight.layer >= config.num_hidden_layers else weight.role.value


def sum_bytes(counts: Iterable[Bytes]) -> Bytes:
    total = Bytes(0, 0)
    for count in counts:
        total += count
    return total


def decibels(value: float) -> str:
    """An SQNR as tables show it."""
    return "exact" if value == math.inf else f"{value:.2f}"


def _count(found: dict[str, Bytes], weight: Weight, config: DeepseekV3Config, count: Bytes) -> None:
    name = class_of(weight, config)
    found[name] = found.get(name, Bytes(0, 0)) + count


def _sqnr(signal: float, noise: float) -> float:
    return math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf


def _cells(count: Bytes) -> tuple[str, str, str]:
    return size_text(count.before), size_text(count.after), f"{count.ratio:.2f}x"


def _bytes_json(count: Bytes) -> dict[str, float]:
    return {"before": count.before, "after": count.after, "ratio": count.ratio}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left")
    return table
