"""`python -m raydistill` is the console script."""

from raydistill.cli import main

if __name__ == "__main__":
    main()
