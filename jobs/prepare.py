"""ray job submit --working-dir . -- python jobs/prepare.py CONFIG [section.key=value ...]"""

import sys

from raydistill.cli import main

if __name__ == "__main__":
    main(["prepare", *sys.argv[1:]])
