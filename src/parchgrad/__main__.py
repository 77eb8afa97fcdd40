"""`python -m parchgrad` is the command line."""

from parchgrad.cli import main

main()
