"""What a category's own options make of a method's."""

from __future__ import annotations

from typing import Any

from pipelines.training.options import FitOptions
from unianom.errors import OptionError
from unianom.options import from_plain, merged, to_plain


def own_config(config: Any, categories: list[str], options: FitOptions) -> Any:
    """A method's options for the model of these categories.

    Raises:
        OptionError: one category's options are not the method's, or for a model of several categories.
    """
    if len(categories) > 1:
        if named := sorted(set(options.category_options) & set(categories)):
            raise OptionError(
                f"category_options of {', '.join(named)} are for models of one category; give --per_category true, or "
                f"leave them out"
            )
        return config
    changes = options.category_options.get(categories[0], {})
    if "preset" in changes:
        raise OptionError(f"category_options.{categories[0]}.preset: a preset is chosen for all categories")
    try:
        return from_plain(type(config), merged(to_plain(config), changes))
    except OptionError as error:
        raise OptionError(f"category_options.{categories[0]}: {error}") from error
