"""`python -m attngen` is `attngen`."""

from attngen.cli import main

main()
