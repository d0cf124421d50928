"""Sphinx configuration; the tables and the API reference are generated from the catalogue."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_origin

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

import tables  # noqa: E402  found through the line above

import lightning_sgd  # noqa: E402

project = "lightning-sgd"
author = "The lightning-sgd developers"
copyright = f"2026, {author}"  # noqa: A001  the name that Sphinx reads
release = lightning_sgd.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "_generated", "results/*.md"]
html_theme = "furo"
html_title = "lightning-sgd"

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_links_external_new_tab = True

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
add_module_names = False


def aliases() -> set[str]:
    """Names of type aliases of the package, such as ``Literal`` types: they have no entry of their own."""
    modules = [module for name, module in sys.modules.items() if name.startswith("lightning_sgd")]
    return {name for module in modules for name, x in vars(module).items() if get_origin(x)}


# The documentation of others cannot be reached while this one is built.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|lightning|torchmetrics|numpy|collections|typing)(\..*)?"),
    (
        r"py:.*",
        r"(Any|DataLoader|Dataset|Figure|LightningModule|Optimizer|ParamsT|T_co|Tensor|Trainer|optional|timedelta)",
    ),
    (r"py:.*", "|".join(sorted(aliases()))),
    # Types of attributes that no user makes.
    (r"py:.*", r"lightning_sgd\.strategies\.byzantine\.sharded_rule\.StepReport"),
    (r"py:.*", r"lightning_sgd\.sampling\.draw\.Draw"),
    (r"py:.*", r"lightning_sgd\.functional\.step_size\.diminishing\.DiminishingSteps"),
    (r"py:.*", r"(Selection|SupportsErrorModel|_AX_TYPE|_PLOT_OUT_TYPE)"),
]

tables.write(HERE / "_generated", HERE / "compatibility.json")
