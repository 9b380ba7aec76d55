"""ray job submit --working-dir . -- python jobs/train.py CONFIG [section.key=value ...]"""

import sys

from raydistill.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
