"""The recipes by name. See recipe.py for what one is."""

from deepseek_fp4_plugin.quantization.recipe import Recipe
from deepseek_fp4_plugin.quantization.recipes.four_over_six import FourOverSix
from deepseek_fp4_plugin.quantization.recipes.max import Max
from deepseek_fp4_plugin.quantization.recipes.mse_sweep import MseSweep

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (Max(), FourOverSix(), MseSweep())}
