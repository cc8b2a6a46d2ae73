"""Shipped recipes, one YAML a file; `ultralowbit recipes list` names them."""
