"""``python -m rrsq.cli`` is ``rrsq``."""

from rrsq.cli import main

main()
