"""Every setting of a run: its default, its bounds and what it means; a module for each section.

A default lives on its field and nowhere else. A field marked `Speed` changes how fast a result comes and not the
result, so it stays out of every fingerprint (see `section.identity`).
"""
