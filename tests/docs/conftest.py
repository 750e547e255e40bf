"""The programs of the documentation import each other from their own folder."""

import sys

from support.pages import DOCS

sys.path.insert(0, str(DOCS))
