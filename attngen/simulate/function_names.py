"""How the function that simulates a Step or a sheet is called."""

import re


def function_name(named: type) -> str:
    """The name of a class in the spelling of functions: ForTiles, for_tiles."""
    return re.sub(r"(?<!^)([A-Z])", r"_\1", named.__name__).lower()
