"""ray job submit --working-dir . -- python jobs/evaluate.py CONFIG [section.key=value ...]"""

import sys

from raydistill.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
