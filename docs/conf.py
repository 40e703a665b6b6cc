"""Sphinx settings."""

project = "hunyuan_train"
author = "The hunyuan_train authors"
extensions = ["myst_parser"]
html_theme = "furo"
exclude_patterns = ["_build"]
