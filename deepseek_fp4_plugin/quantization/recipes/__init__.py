"""The recipes by name. See recipe.py for what one is."""

from deepseek_fp4_plugin.quantization.recipe import Recipe
from deepseek_fp4_plugin.quantization.recipes.four_over_six import FourOverSix
from deepseek_fp4_plugin.quantization.recipes.gptq import Gptq
from deepseek_fp4_plugin.quantization.recipes.local_hessian import LocalHessian
from deepseek_fp4_plugin.quantization.recipes.max import Max
from deepseek_fp4_plugin.quantization.recipes.max_modelopt_0_31 import MaxModelOpt031
from deepseek_fp4_plugin.quantization.recipes.mse_sweep import MseSweep

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (Max(), FourOverSix(), MseSweep(), LocalHessian(), Gptq())
}
# ModelOpt's releases whose bits `max` can have; the first is the default.
ARITHMETICS: dict[str, Recipe] = {"modelopt-0.47.0": RECIPES["max"], "modelopt-0.31.0": MaxModelOpt031()}


def find_recipe(name: str, arithmetic: str | None = None) -> Recipe:
    """Raises ValueError for an unknown name, and for an arithmetic with a recipe that is not ModelOpt's."""
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r} is unknown; choose from {', '.join(RECIPES)}")
    if arithmetic is None:
        return RECIPES[name]
    if arithmetic not in ARITHMETICS:
        raise ValueError(f"arithmetic {arithmetic!r} is unknown; choose from {', '.join(ARITHMETICS)}")
    if name != "max":
        raise ValueError(f"arithmetic {arithmetic} is of recipe max; recipe {name} has its own")
    return ARITHMETICS[arithmetic]
