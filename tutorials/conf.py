# SPDX-License-Identifier: Apache-2.0
"""The documentation: ``sphinx-build -W tutorials OUT``. Tutorials are shown as they stand, without running them."""

import importlib
import inspect
import re
from pathlib import Path

from docutils import nodes
from sphinx.util import logging

import pyro_sm

HERE = Path(__file__).parent
ROOT = HERE.parent
# Pages that are files of the repository; each has a stub for where the file is missing.
FILES = {"readme": "README.md", "changelog": "CHANGELOG.md", "results": "pyro_sm/bench/RESULTS.md"}
_log = logging.getLogger(__name__)

project = "pyro_sm"
author = "The pyro_sm developers"
copyright = f"2026, {author}"
version = release = pyro_sm.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["conf.py", "_build", "**/.ipynb_checkpoints"]
templates_path: list[str] = []
language = "en"
html_theme = "furo"
html_title = f"pyro_sm {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_copy_source = False

# Tutorials are percent-format scripts: read by jupytext, not run.
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
autoclass_content = "class"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_preprocess_types = False
napoleon_custom_sections = [("Attributes", "params_style")]  # not "Variables"
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
maximum_signature_line_length = 100


def _link(file):
    """How a link in ``file`` (from its own folder) is written on the page that shows it; None if there is no page."""

    def target(match):
        label, link = match.groups()
        if "://" in link or link.startswith("#"):
            return match.group()
        path = (file.parent / link.partition("#")[0]).resolve()
        for page, name in FILES.items():
            if path == (ROOT / name).resolve():
                return f"{label}({page}.md)"
        return f"{label}({path.relative_to(HERE)})" if path.is_relative_to(HERE) else label[label.find("[") + 1 : -1]

    return target


def _read_files(app, docname, source):
    """The text of a file of the repository in the place of the stub; its title only if the stub has the same."""
    file = ROOT / FILES.get(docname, "")
    if file.is_file():
        text = re.sub(r"(!?\[[^\]]*\])\(([^)\s]+)\)", _link(file), file.read_text())
        title, _, rest = text.partition("\n")
        stub = source[0].partition("\n")[0]
        source[0] = f"{stub}\n{rest}" if title.startswith("# ") else f"{stub}\n\n{text}"


def _found(path):
    """The object with a dotted path, or None; ``~`` and a class's attribute are understood."""
    parts = path.lstrip("~.").split(".")
    for cut in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:cut]))
            for name in parts[cut:]:
                thing = getattr(thing, name)
        except (ImportError, AttributeError):
            continue
        return thing
    return None


def _by_identity(app, env, node, contnode):
    """A reference to one of our objects by any of its paths, led to the one path under which it is documented."""
    target = node.get("reftarget", "")
    domain = node.get("refdomain")
    if domain != "py" or not target.startswith("pyro_sm"):
        return None
    thing = _found(target)
    if thing is None:
        _log.warning("there is no %s", target, location=node, type="ref")
        return None
    objects = env.get_domain("py").objects
    for name, entry in objects.items():
        if name.rpartition(".")[2] == target.rpartition(".")[2] and not entry.aliased and _found(name) is thing:
            uri = app.builder.get_relative_uri(node["refdoc"], entry.docname)
            return nodes.reference("", "", contnode, internal=True, refuri=f"{uri}#{entry.node_id}")
    return None


def _fields_are_explained_above(app, what, name, obj, skip, options):
    """Fields of named tuples have docstrings made up by Python; the class's own explains them."""
    return True if "field number" in (getattr(obj, "__doc__", None) or "") else None


def _no_made_up_signature(app, what, name, obj, options, signature, annotation):
    """A contract is not called: what Python takes for its arguments says nothing."""
    return ("()", None) if inspect.isclass(obj) and getattr(obj, "_is_protocol", False) else None


def _prose_is_no_markup(app, what, name, obj, options, lines):
    """The star of a shape such as ``(N, *shape)`` is a star; what stands before a property's colon is no type."""
    if what == "property" and lines:
        lines[0] = re.sub(r"^([\w ]+): ", r"\1 – ", lines[0])
    text = "\n".join(lines)
    parts = re.split(r"(``.*?``)", text, flags=re.DOTALL)
    parts[::2] = [re.sub(r"(?<=, )\*(?=[\w.]+\))", r"\\*", part) for part in parts[::2]]
    lines[:] = "".join(parts).split("\n")


def _letters_are_no_numerals(app, what, name, obj, options, lines):
    """``N.`` at the beginning of an argument's explanation is a symbol, and no item of a list."""
    lines[:] = [re.sub(r"^((?::\w+ [^:]*:)? +[A-Za-z])\.( |$)", r"\1\\.\2", line) for line in lines]


def setup(app):
    app.connect("source-read", _read_files)
    app.connect("missing-reference", _by_identity)
    app.connect("autodoc-skip-member", _fields_are_explained_above)
    app.connect("autodoc-process-signature", _no_made_up_signature)
    app.connect("autodoc-process-docstring", _prose_is_no_markup, priority=100)  # before napoleon
    app.connect("autodoc-process-docstring", _letters_are_no_numerals, priority=900)  # after it
