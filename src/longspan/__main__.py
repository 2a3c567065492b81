import sys

from longspan.cli.main import main

sys.exit(main())
