"""`python -m ultralowbit` is the `ultralowbit` command."""

from ultralowbit.cli.app import main

main()
