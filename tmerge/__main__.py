"""``python -m tmerge``, and so ``accelerate launch -m tmerge`` and ``torchrun -m tmerge``."""

from tmerge.cli import main

if __name__ == "__main__":
    main()
