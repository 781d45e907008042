"""The corpus is replayed where what reads it is there: the server, and DICOM."""

import importlib.util

NEEDED = ("uvicorn", "fastapi", "pydicom")
collect_ignore = [] if all(importlib.util.find_spec(name) for name in NEEDED) else ["test_corpus.py"]
