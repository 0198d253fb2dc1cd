"""The site: `make docs` builds it with warnings as errors, into docs/_build."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

import torch_winnow

sys.path.insert(0, str(Path(__file__).parent))
import benchmark_pages

project = "torch-winnow"
author = copyright = "The torch-winnow developers"
release = torch_winnow.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False  # "Returns: what: for what" is a sentence here, no type
exclude_patterns = ["_build"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"torch-winnow {release}"

benchmark_pages.write()  # ignored by git: the results are kept


def public_modules() -> Iterator[ModuleType]:
    """What users import. Packages export what their rooms hold, so rooms don't count."""
    yield torch_winnow
    yield importlib.import_module("torch_winnow.models.training")
    for package in (torch_winnow, importlib.import_module("torch_winnow.integrations")):
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            if "._" not in found.name:
                module = importlib.import_module(found.name)
                if hasattr(module, "__all__"):
                    yield module


def check_reference(app: Sphinx, env: BuildEnvironment) -> None:
    """Warns of every public function, class and method that the reference leaves out."""
    documented = env.get_domain("py").objects
    for module in public_modules():
        for name in module.__all__:
            value = getattr(module, name)
            wanted = [f"{module.__name__}.{name}"]
            if inspect.ismodule(value):
                wanted = []
            elif inspect.isclass(value):
                methods = [key for key, member in vars(value).items() if inspect.isroutine(member)]
                wanted += [f"{wanted[0]}.{key}" for key in methods if not key.startswith("_")]
            for path in wanted:
                if path not in documented:
                    logging.getLogger(__name__).warning("%s is not in the reference", path)


def setup(app: Sphinx) -> None:
    app.connect("env-check-consistency", check_reference)
