"""The names of `import cirloop` (docs/python.md), a file each. What they need is imported when they
are called, so that `import cirloop` is quick and changes nothing."""
