"""Programs over the package, run from the repository's folder with `python -m examples.NAME`."""
