"""`python -m keyecli` is `keye`."""

from keyecli.cli import main

main()
