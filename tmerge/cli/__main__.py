"""``python -m tmerge.cli``."""

from tmerge.cli import main

main()
