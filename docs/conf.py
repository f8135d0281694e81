"""Sphinx configuration: ``sphinx-build -W --keep-going -b html docs docs/_build/html``.

The build needs no network. Notebooks (Markdown files with a ``kernelspec``) are executed, and an exception in
one of them ends the build; so does a link that leads nowhere.
"""

import logging
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import api_pages  # noqa: E402
import contract_page  # noqa: E402

import distill_jax  # noqa: E402

# Notebooks are compiled as fast as the test suite is: XLA's optimizations would take longer than they save.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Kernels that do not depend on the user's settings, and that report errors alone
ipython = HERE / "_build" / "ipython"
(ipython / "profile_default").mkdir(parents=True, exist_ok=True)
config = "c = get_config()\nc.IPKernelApp.log_level = 40\n"
(ipython / "profile_default" / "ipython_kernel_config.py").write_text(config)
os.environ["IPYTHONDIR"] = str(ipython)
logging.getLogger("traitlets").setLevel(logging.WARNING)

project = "distill_jax"
author = "The distill_jax maintainers"
copyright = "2026, the distill_jax maintainers"
version = release = distill_jax.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
templates_path: list[str] = []
nitpicky = True
highlight_language = "text"  # of blocks that name none: what a program prints
# Names of other projects, and the parameters of generic types: this site has no page for them.
nitpick_ignore_regex = [
    (
        "py:.*",
        r"(jax|jaxlib|flax|nnx|linen|optax|numpy|np|tokenizers|collections|typing|types|pathlib|os)(\..*)?",
    ),
    ("py:.*", "|".join(api_pages.OUTSIDE)),
]

html_theme = "furo"
html_title = f"distill_jax {version}"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_show_sphinx = False
html_copy_source = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

nb_execution_mode = "force"
nb_execution_in_temp = True  # what a notebook writes does not stay
nb_execution_timeout = 120
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
add_module_names = False
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
maximum_signature_line_length = 88


def setup(app):
    """Connects the generated pages to the build."""
    app.connect("builder-inited", lambda app: api_pages.write(HERE / "api"))
    app.connect(
        "builder-inited", lambda app: contract_page.write(HERE / "methods" / "generated" / "every_loss.md")
    )
    app.connect("autodoc-process-signature", api_pages.source_signature)
    app.connect("autodoc-process-docstring", api_pages.escape_bars)
    app.connect("autodoc-skip-member", api_pages.skip_member)
    app.connect("missing-reference", api_pages.resolve_private_path)
    app.connect("doctree-read", api_pages.link_names)
    app.connect("build-finished", api_pages.check_complete)
    return {"parallel_read_safe": True}
