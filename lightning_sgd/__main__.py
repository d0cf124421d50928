"""``python -m lightning_sgd`` is the console command ``lightning-sgd``."""

from lightning_sgd.cli import main

if __name__ == "__main__":
    main()
