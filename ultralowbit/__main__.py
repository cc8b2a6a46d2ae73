"""`python -m ultralowbit` is the `ultralowbit` command."""

from ultralowbit.cli import main

main()
