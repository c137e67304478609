"""Recipes: methods in at most 60 lines of their own, one module and one `configs/<slug>.yaml` each."""
