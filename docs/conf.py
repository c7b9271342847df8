"""Settings of Sphinx: `make docs` writes the pages of this folder as HTML to build/docs."""

import json
from typing import Any, Literal, get_args, get_origin

import fastseg

project = "fastseg"
author = "the fastseg authors"
release = version = fastseg.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["conf.py"]
default_role = "code"  # docstrings write `name` for code
add_module_names = False

myst_enable_extensions = ["substitution"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"  # types stand with the text that gives shapes and units, not in the signature
autodoc_typehints_description_target = "documented_params"
python_use_unqualified_type_names = True
napoleon_use_ivar = True

# With -n every reference must lead somewhere. Those into other packages lead outside these pages.
nitpick_ignore_regex = [("py:.*", r"(?!fastseg\.).*")]
nitpick_ignore = [("py:class", "fastseg.network.outline.refiner.Refiner")]  # which `fastseg.load_refiner` wraps

html_theme = "furo"
html_title = f"fastseg {release}"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["narrow.css"]

# The first field of each group of settings, in the order of fastseg/config.py.
SETTINGS = {
    "train_img_dir": "Data",
    "num_workers": "Loading",
    "network": "Network",
    "recipe": "Training",
    "flip": "Augmentation",
    "out_dir": "Output and start",
}


def settings_table() -> str:
    """All fields of `Config` with default and meaning, one Markdown table per group."""
    lines, missing = [], set(SETTINGS)
    for name, field in fastseg.Config.model_fields.items():
        if name in SETTINGS:
            missing.remove(name)
            lines += ["", f"## {SETTINGS[name]}", "", "| field | default | meaning |", "|---|---|---|"]
        default = f"`{json.dumps(field.default)}`".replace('"', "") if field.default not in ("", ()) else "empty"
        lines.append(f"| `{name}` | {default} | {_meaning(field)} |")
    if missing:
        raise ValueError(f"docs/conf.py: SETTINGS names fields that Config lacks: {', '.join(sorted(missing))}")
    return "\n".join(lines)


def _meaning(field: Any) -> str:
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    listed = ", ".join(f"`{choice}`" for choice in choices if choice)
    text = field.description.replace("**", r"\*\*").replace("|", r"\|")
    return f"{text} ({listed})" if listed else text


def error_classes() -> str:
    """The public errors, base class first."""
    classes = [getattr(fastseg, name) for name in fastseg.__all__ if name.endswith("Error")]
    classes.sort(key=lambda error: (len(error.__mro__), error.__name__))
    listed = "\n\n".join(f".. autoexception:: {error.__name__}\n   :show-inheritance:" for error in classes)
    return f"```{{eval-rst}}\n.. currentmodule:: fastseg\n\n{listed}\n```"


myst_substitutions = {"settings": settings_table(), "errors": error_classes()}
