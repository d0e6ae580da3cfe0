"""The command `hirelc-deploy`, also as `python -m hirelc_deploy`."""

import sys

from hirelc_deploy.cli import main

if __name__ == "__main__":
    sys.exit(main())
