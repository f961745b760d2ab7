"""A calibration's result as a file: what every projection saw, so that converting again needs no forward.

JSON: {"deepseek_fp4_calibration": 1, "model", "description", "samples", "tokens", "amax": {module: number}, "rows":
{module: number}}.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_fp4_plugin.checkpoint.durable import write_file
from deepseek_fp4_plugin.checkpoint.json_files import parse_object
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.quantization.observer import LayerAmax

_FORMAT, _VERSION = "deepseek_fp4_calibration", 1


class SavedCalibration(NamedTuple):
    """found: of all layers.  description, samples, tokens: of the text that it was made with."""

    found: LayerAmax
    description: str
    samples: int
    tokens: int

    @property
    def digest(self) -> str:
        """Identifies what it says, for the job of a resumed run."""
        return hashlib.sha256(json.dumps(self.found.to_json(), sort_keys=True).encode()).hexdigest()

    def seen(self, index: int) -> LayerAmax:
        """What layer `index` saw."""
        prefix = f"model.layers.{index}."
        return LayerAmax(
            {name: value for name, value in self.found.amax.items() if name.startswith(prefix)},
            {name: count for name, count in self.found.rows.items() if name.startswith(prefix)},
        )

    def end(self) -> None:
        """Nothing is left to clean up."""

    def write(self, path: str | Path, config: DeepseekV3Config) -> None:
        """Put it at `path`, whole or not at all."""
        content = {_FORMAT: _VERSION, "model": _model(config), "description": self.description}
        content |= {"samples": self.samples, "tokens": self.tokens, **self.found.to_json()}
        write_file(Path(path), json.dumps(content, indent=1) + "\n")


# Of a run without any: nothing was seen, and every scale of inputs is the safe one.
UNCALIBRATED = SavedCalibration(LayerAmax(), "nothing", 0, 0)


def is_saved(path: str | Path) -> bool:
    """Whether the file says that it is one; other JSON files hold text."""
    try:
        with open(path, "rb") as file:
            return f'"{_FORMAT}"'.encode() in file.read(64)
    except OSError:
        return False


def load_saved(path: str | Path, config: DeepseekV3Config) -> SavedCalibration:
    """Raises ValueError naming the file when it is no calibration, or one of another model."""
    try:
        content = parse_object(Path(path).read_bytes())
        found = LayerAmax(_numbers(content["amax"]), {name: int(count) for name, count in content["rows"].items()})
        saved = SavedCalibration(found, str(content["description"]), int(content["samples"]), int(content["tokens"]))
        form, model = content[_FORMAT], content["model"]
    except OSError as error:
        raise ValueError(f"calibration file {path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a calibration that --save-calibration wrote ({type(error).__name__}: {error})"
        ) from None
    if form != _VERSION or model != _model(config):
        raise ValueError(f"{path} is the calibration of another model or version; calibrate this one on text")
    return saved


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    numbers = {name: float(value) for name, value in values.items()}
    if not all(0 <= value < float("inf") for value in numbers.values()):
        raise ValueError("a largest magnitude is negative or not finite")
    return numbers


def _model(config: DeepseekV3Config) -> dict[str, int]:
    """What must agree for a module's name to mean the same weight."""
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "moe_intermediate_size", "n_routed_experts")
    return {name: getattr(config, name) for name in names}
