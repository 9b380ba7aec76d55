"""ray job submit --working-dir . -- python jobs/teach.py CONFIG [section.key=value ...]"""

import sys

from raydistill.cli import main

if __name__ == "__main__":
    main(["teach", *sys.argv[1:]])
