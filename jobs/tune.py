"""ray job submit --working-dir . -- python jobs/tune.py CONFIG [section.key=value ...]"""

import sys

from raydistill.cli import main

if __name__ == "__main__":
    main(["tune", *sys.argv[1:]])
