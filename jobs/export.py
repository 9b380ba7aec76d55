"""ray job submit --working-dir . -- python jobs/export.py CONFIG [section.key=value ...]"""

import sys

from raydistill.cli import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
