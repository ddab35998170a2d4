"""`python -m persona.evaluation.report outputs/a outputs/b --output report.html`."""

import sys

from persona.evaluation.report.page import main

sys.exit(main())
