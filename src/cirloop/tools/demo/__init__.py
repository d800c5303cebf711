"""A page to search with a run's models or any other, and the same over HTTP."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
