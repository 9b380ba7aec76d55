"""ray job submit --working-dir . -- python jobs/run.py CONFIG [section.key=value ...]"""

import sys

from raydistill.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
