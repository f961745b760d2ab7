"""The recipes by name. See recipe.py for what one is."""

from deepseek_fp4_plugin.quantization.recipe import Recipe
from deepseek_fp4_plugin.quantization.recipes.max import Max

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (Max(),)}
