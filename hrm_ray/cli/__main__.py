import sys

from hrm_ray.cli import main

sys.exit(main())
