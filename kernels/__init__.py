"""Products of activations with packed weights. Imports nothing: see README.md, "Why the packages are mapped"."""
