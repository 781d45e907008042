"""Put on PYTHONPATH: a Python that has only what a plain GPU machine has. Hides packages that are installed here."""

import importlib.machinery

ABSENT = {
    "tyro", "docstring_parser", "pydicom", "matplotlib", "scipy", "sacrebleu", "fastapi", "starlette", "uvicorn", "ray",
    "deepspeed", "bitsandbytes", "xformers", "flash_attn", "flash_attn_interface", "openvino", "nncf", "onnx",
    "onnxscript", "torchao",
}  # fmt: skip


class _Hiding:
    """Callable and no function: pytest keeps it as a class attribute, which would bind one."""

    def __init__(self, find):
        self.find = find

    def __call__(self, name, path=None, target=None):
        return None if name.split(".")[0] in ABSENT else self.find(name, path, target)


importlib.machinery.PathFinder.find_spec = _Hiding(importlib.machinery.PathFinder.find_spec)
